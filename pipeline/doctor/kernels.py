"""What the fast attention kernels need: flash-attn and the wheel of it that fits, Triton, and compilers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from pipeline.doctor.accelerator import trains_on_cuda
from pipeline.doctor.finding import FAILED, OK, WARNING, Finding, missing, tool_output
from pipeline.doctor.packages import extra
from pipeline.doctor.probing import Answers

# The compiled module of each kernel that --attention names, and the lowest compute capability (major) it is for.
FLASH = {
    "flash_attention_2": ("flash_attn_2_cuda", 8),
    "flash_attention_3": ("flash_attn_interface", 9),
    "flash_attention_4": ("flash_attn.cute", 9),
}
INSTALL = {
    "flash_attention_3": "build the folder `hopper` of Dao-AILab/flash-attention",
    "flash_attention_4": "pip install flash-attn-4",
}
BUILT = "DeepSpeed's CPU optimizer (ds_configs/z3_offload.json) is compiled at its first use"


def flash_modules() -> list[str]:
    """The flash-attn modules that are installed, to be imported by the probe."""
    return [module for module, _ in FLASH.values() if _found(module)]


def wheel(build: Mapping[str, Any]) -> str:
    """The name of the flash-attn 2 wheel that fits this Python and this torch build, as its releases name them:
    `flash_attn-VERSION+cuMAJORtorchX.YcxxABI-cpXY-cpXY-PLATFORM.whl`; `*` stands for any newest part."""
    cuda = str(build["cuda"]).partition(".")[0]
    torch = ".".join(build["version"].split(".")[:2])
    interpreter = f"cp{sys.version_info.major}{sys.version_info.minor}"
    abi = str(bool(build["cxx11_abi"])).upper()
    tag = f"cu{cuda}torch{torch}cxx11abi{abi}-{interpreter}-{interpreter}"
    return f"flash_attn-{extra('flash-attn')}.*+{tag}-{platform.system().lower()}_{platform.machine()}.whl"


def flash_attention(answers: Answers, require: Set[str]) -> Iterator[Finding]:
    """Which flash-attn kernels are installed and import, and what to install where none is."""
    build = answers.get("torch", {})
    capabilities = [answer["capability"][0] for answer in answers.values() if "capability" in answer]
    usable = []
    for name, (module, least) in FLASH.items():
        answer = answers.get(f"import {module}")
        if answer is None and name in require:
            yield Finding(name, FAILED, f"{module} is not installed, and --require asks for it", remedy(name, build))
        elif answer is not None and "error" in answer:
            level = missing(trains_on_cuda(answers) or name in require)
            found = f"{module} is installed and does not import: {answer['error']}"
            yield Finding(name, level, found, f"built for another torch, CUDA or Python: {remedy(name, build)}")
        elif answer is not None and capabilities and min(capabilities) < least:
            found = f"{module} imports; it needs compute capability {least}.0"
            yield Finding(name, missing(name in require), found, "use --attention auto")
        elif answer is not None:
            usable.append(name)
    if usable:
        yield Finding("flash-attn", OK, f"{', '.join(usable)} (flash-attn {_version('flash-attn')})")
    elif not trains_on_cuda(answers):
        yield Finding("flash-attn", OK, "not needed on a CPU")
    elif min(capabilities, default=0) >= FLASH["flash_attention_2"][1]:
        found = "none: --attention auto takes PyTorch's own kernel"
        yield Finding("flash-attn", WARNING, found, remedy("flash_attention_2", build))


def remedy(name: str, build: Mapping[str, Any]) -> str:
    """How to get a kernel for a torch build."""
    if not build.get("cuda"):
        return "install a CUDA build of torch first: make setup-gpu"
    if name in INSTALL:
        return INSTALL[name]
    return f"install the wheel {wheel(build)} where there is one, else compile it: make setup-gpu (needs nvcc)"


def triton(answers: Answers, require: Set[str]) -> Iterator[Finding]:
    """Triton, which the sink gradient's kernels are written in, and what it compiles its launchers with."""
    cuda, asked = trains_on_cuda(answers), "triton" in require
    if not _found("triton"):
        level = WARNING if cuda else OK
        found = "not installed: the sink gradient takes two more flash calls" if cuda else "not needed on a CPU"
        level = FAILED if asked else level
        yield Finding("triton", level, found, "pip install -c constraints.txt triton" if level != OK else "")
        return
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    lacks = [] if compiler("CC", "gcc", "cc", "clang") else ["a C compiler"]
    lacks += [] if header.exists() else [f"Python's headers ({header})"]
    if lacks:
        found = f"{_version('triton')}, which compiles its launchers, lacks {' and '.join(lacks)}"
        yield Finding("triton", missing(cuda or asked), found, "install gcc and python3-dev, or load their modules")
    else:
        yield Finding("triton", OK, _version("triton"))


def compilers(answers: Answers, require: Set[str]) -> Iterator[Finding]:
    """g++, ninja and nvcc: training needs none of them without offload, compiling an operator needs all."""
    cuda = trains_on_cuda(answers)
    asked = "compilers" in require
    have = {"g++": compiler("CXX", "g++", "c++", "clang++"), "ninja": shutil.which("ninja")}
    if cuda:
        have["nvcc"] = nvcc()
    lacks = [name for name, path in have.items() if path is None]
    if lacks:
        found = f"no {' and no '.join(lacks)}; {BUILT}"
        yield Finding("compilers", missing(asked), found, "install them, or load their modules")
    else:
        yield Finding("compilers", OK, ", ".join(str(path) for path in have.values()))
    if cuda and have["nvcc"]:
        release = re.search(r"release (\d+)\.(\d+)", tool_output([have["nvcc"], "--version"]))
        built = str(answers["torch"]["cuda"])
        if release and release[1] != built.partition(".")[0]:
            found = f"nvcc of CUDA {release[1]}.{release[2]}, torch of CUDA {built}: operators will not compile"
            yield Finding("nvcc", missing(asked), found, f"point CUDA_HOME to a CUDA {built} toolkit")


def compiler(variable: str, *names: str) -> str | None:
    """Where a compiler is: the one its variable names, else the first of `names` on the path."""
    given = os.environ.get(variable, "").split()
    return next((path for name in given[:1] or names if (path := shutil.which(name))), None)


def nvcc() -> str | None:
    """The CUDA compiler that torch's extension builder would take."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    default = Path("/usr/local/cuda/bin/nvcc")
    if home:
        return shutil.which("nvcc", path=f"{home}/bin")
    return shutil.which("nvcc") or (str(default) if default.exists() else None)


def _found(module: str) -> bool:
    """Whether a module is installed; unlike importlib's own look into a package, this imports nothing."""
    top, *inside = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not inside:
        return spec is not None
    return any(Path(folder, *inside).exists() for folder in spec.submodule_search_locations or [])


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "without metadata"
