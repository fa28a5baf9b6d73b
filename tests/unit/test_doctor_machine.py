"""The doctor's checks of one machine: what each says about a machine that has the trouble."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.doctor import accelerator, disk, host, kernels, network, packages, probing
from pipeline.doctor.finding import Finding, examine, size
from pipeline.sink.backends import KERNELS

BUILD = {
    "version": "2.13.1+cu130", "cuda": "13.0", "cxx11_abi": True, "available": True, "count": 2, "nccl": "2.28.3",
    "architectures": ["sm_80", "sm_90", "sm_120", "compute_120"], "warnings": [],
}  # fmt: skip
H100 = {
    "name": "H100", "capability": [9, 0], "free": 79e9, "total": 80e9, "wrong": 0, "tflops": 700.0,
}  # fmt: skip
A100 = {**H100, "name": "A100", "capability": [8, 0]}


def only(findings: Iterator[Finding]) -> Finding:
    """The one finding of a check."""
    (finding,) = findings
    return finding


def test_a_check_that_breaks_is_a_finding_and_the_next_one_runs() -> None:
    def broken() -> Iterator[Finding]:
        raise RuntimeError("no /proc here")

    names: list[str] = []
    checks = [("first", broken), ("second", lambda: [Finding("second", "ok", "fine")])]
    findings = list(examine(checks, names.append))
    assert names == ["first", "second"]
    assert findings[0].level == "failed"
    assert "RuntimeError: no /proc here" in findings[0].found
    assert findings[1].found == "fine"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (64e6, "64.0 MB"), (43.12e9, "43.1 GB"), (2e15, "2000.0 TB")]
)
def test_size(count: float, text: str) -> None:
    assert size(count) == text


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules a new Python process finds."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_probe_survives_modules_that_crash_exit_and_print(modules: Path) -> None:
    (modules / "crashes.py").write_text("import os\nos.abort()")
    (modules / "leaves.py").write_text("import sys\nsys.exit('no licence')")
    (modules / "chatty.py").write_text("import os\nprint('hello')\nos.write(1, b'{')")
    answers = probing.run_probe(["crashes", "leaves", "chatty", "not_there"], None, 30)
    assert answers["import crashes"]["error"].startswith("python was killed by SIGABRT")
    assert answers["import leaves"]["error"] == "SystemExit: no licence"
    assert answers["import chatty"]["seconds"] >= 0
    assert answers["import not_there"]["error"].startswith("ModuleNotFoundError")


def test_probe_ends_a_module_that_hangs(modules: Path) -> None:
    (modules / "hangs.py").write_text("import time\ntime.sleep(60)")
    answers = probing.run_probe(["hangs"], None, 1)
    assert answers["import hangs"]["error"] == "did not end within 1 s"


def test_probe_imports_nothing_from_the_doctors_folder() -> None:
    answers = probing.run_probe(["disk", "roll"], None, 30)
    assert all("ModuleNotFoundError" in answer["error"] for answer in answers.values())


def test_modules_to_import_are_those_of_the_requirements() -> None:
    found = packages.modules()
    assert found[0] == "torch"
    assert {"yaml", "transformers", "deepspeed", "sentencepiece", "jinja2", "peft"} <= set(found)


def test_wheel_is_named_as_flash_attn_names_its_releases() -> None:
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    machine = os.uname().machine
    assert kernels.wheel(BUILD) == (
        f"flash_attn-2.8.*+cu13torch2.13cxx11abiTRUE-{python}-{python}-linux_{machine}.whl"
    )


def test_flash_modules_are_those_the_kernels_import() -> None:
    needed = {name: (kernel.module, kernel.capability) for name, kernel in KERNELS.items() if kernel.module}
    assert needed == kernels.FLASH


@pytest.mark.parametrize(
    ("answers", "require", "level", "found"),
    [
        ({"torch": BUILD, "device 0": H100}, set(), "warning", "none: --attention auto takes PyTorch's own kernel"),
        ({"torch": BUILD, "device 0": H100, "import flash_attn_2_cuda": {"seconds": 1}}, set(), "ok", "attention_2"),
        (
            {"torch": BUILD, "device 0": H100, "import flash_attn_2_cuda": {"error": "ImportError: undefined symbol"}},
            set(),
            "failed",
            "flash_attn_2_cuda is installed and does not import: ImportError: undefined symbol",
        ),
        ({"torch": {**BUILD, "available": False}}, set(), "ok", "not needed on a CPU"),
        ({"torch": BUILD, "device 0": H100}, {"flash_attention_3"}, "failed", "flash_attn_interface is not installed"),
        (
            {"torch": BUILD, "device 0": A100, "import flash_attn_interface": {"seconds": 1}},
            {"flash_attention_3"},
            "failed",
            "it needs compute capability 9.0",
        ),
    ],
)
def test_flash_attention(answers: dict[str, Any], require: set[str], level: str, found: str) -> None:
    finding = next(kernels.flash_attention(answers, require))
    assert finding.level == level
    assert found in finding.found
    assert bool(finding.remedy) == (level != "ok")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("flash_attention_2", "install the wheel flash_attn-2.8.*+cu13torch2.13"),
        ("flash_attention_3", "build the folder `hopper`"),
        ("flash_attention_4", "pip install flash-attn-4"),
    ],
)
def test_how_to_get_a_kernel(name: str, remedy: str) -> None:
    assert next(kernels.flash_attention({"torch": BUILD}, {name})).remedy.startswith(remedy)


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["sm_80"], (8, 6), True),
        (["sm_86"], (8, 0), False),
        (["sm_80"], (9, 0), False),
        (["sm_80", "compute_80"], (9, 0), True),
        (["sm_90a"], (9, 0), True),
        (["compute_90a"], (10, 0), False),
        (["sm_120"], (12, 0), True),
    ],
)
def test_which_devices_a_build_has_code_for(architectures: list[str], capability: tuple[int, int], runs: bool) -> None:
    assert accelerator.covers(architectures, *capability) is runs


@pytest.mark.parametrize(
    ("changes", "level", "found"),
    [
        ({}, "ok", "H100, compute capability 9.0, 79.0 GB free of 80.0 GB, 700 TFLOP/s in bf16"),
        ({"wrong": 3}, "failed", "3 wrong elements in a product of matrices"),
        ({"free": 60e9}, "warning", "60.0 GB free"),
        ({"capability": [10, 0]}, "failed", "this torch has code for sm_80"),
        ({"error": "AcceleratorError: CUDA error: uncorrectable ECC error"}, "failed", "uncorrectable ECC error"),
    ],
)
def test_device(changes: dict[str, Any], level: str, found: str) -> None:
    finding = only(accelerator.devices({"torch": BUILD, "device 0": {**H100, **changes}}, 1, None))
    assert finding.level == level
    assert found in finding.found


def test_more_ranks_than_devices() -> None:
    finding = only(accelerator.devices({"torch": BUILD}, 8, 2))
    assert finding.level == "failed"
    assert finding.found == "8 ranks on this node see 2 devices: local rank 2 has none"


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in its place that a test writes."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tool


def test_driver(nvidia_smi: Path) -> None:
    nvidia_smi.write_text("#!/bin/sh\necho '0, H100, 580.95, 0'\necho '1, H100, 580.95, 2'\n")
    driver, memory = accelerator.driver(set())
    assert driver.found == "580.95: 2 x H100"
    assert (memory.check, memory.level) == ("gpu 1 memory", "warning")
    assert memory.found.startswith("2 uncorrected ECC errors")


def test_driver_that_does_not_fit_its_library(nvidia_smi: Path) -> None:
    nvidia_smi.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n")
    finding = only(accelerator.driver(set()))
    assert finding.level == "failed"
    assert "Driver/library version mismatch" in finding.found


@pytest.mark.parametrize(
    ("changes", "level", "found"),
    [
        ({}, "ok", "2.13.1+cu130, CUDA 13.0, NCCL 2.28.3, 2 devices"),
        (
            {"cuda": None, "nccl": None, "available": False},
            "failed",
            "the CPU build of torch, on a machine with an NV",
        ),
        ({"available": False, "warnings": ["The NVIDIA driver on your system is too old"]}, "failed", "is too old"),
    ],
)
def test_torch_against_the_driver(nvidia_smi: Path, changes: dict[str, Any], level: str, found: str) -> None:
    assert nvidia_smi.exists()
    finding = only(accelerator.torch_cuda({"torch": {**BUILD, **changes}}, set()))
    assert finding.level == level
    assert found in finding.found


def test_hidden_gpus_are_not_missed(nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    answers = {"torch": {**BUILD, "cuda": None, "available": False}}
    assert nvidia_smi.exists()
    assert only(accelerator.torch_cuda(answers, set())).level == "ok"
    assert only(accelerator.torch_cuda(answers, {"cuda"})).level == "failed"


def test_nvcc_of_another_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    finding = list(kernels.compilers({"torch": BUILD}, set()))[-1]
    assert (finding.check, finding.level) == ("nvcc", "warning")
    assert finding.found.startswith("nvcc of CUDA 12.4, torch of CUDA 13.0")


def test_missing_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = only(kernels.compilers({}, {"compilers"}))
    assert finding.level == "failed"
    assert finding.found.startswith("no g++ and no ninja; ")


@pytest.mark.parametrize("make", ["file", "dead link", "proc"])
def test_an_output_dir_that_cannot_be(tmp_path: Path, make: str) -> None:
    folder = tmp_path / "taken"
    if make == "file":
        folder.write_text("")
    elif make == "dead link":
        folder.symlink_to(tmp_path / "nowhere")
    else:
        folder = Path("/proc/nowhere")
    findings = list(disk.output_dir(folder / "run"))
    assert [each.level for each in findings] == ["failed"]
    assert findings[0].remedy


def test_writing_leaves_no_file(tmp_path: Path) -> None:
    findings = list(disk.output_dir(tmp_path / "runs/new"))
    assert [each.check for each in findings] == ["output_dir", "write speed", "clock"]
    assert all(each.level != "failed" for each in findings)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_half_way(tmp_path: Path) -> None:
    # A limit on file size stops the write as a quota does; in a process of its own, for it cannot be raised again.
    program = (
        "import resource, sys; from pathlib import Path; from pipeline.doctor import disk\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20 << 20, 20 << 20))\n"
        "print(*disk.output_dir(Path(sys.argv[1])), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "check='write speed', level='failed', found='File too large after 16.8 MB'" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_build_lock_that_nobody_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam/lock"
    lock.parent.mkdir()
    lock.touch()
    assert "cpu_adam" not in list(disk.caches())[-1].found, "this one may be compiling now"
    os.utime(lock, (0, 0))
    finding = list(disk.caches())[-1]
    assert (finding.level, finding.remedy) == ("warning", f"rm {lock}")


def test_token_is_seen_in_the_same_folder_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "SHARED_SECONDS", 0.3)
    (tmp_path / "other").mkdir()
    with disk.token(tmp_path / "runs") as name:
        assert only(disk.shared(tmp_path / "runs", name)).level == "ok"
        assert only(disk.shared(tmp_path / "other", name)).level == "failed"
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_port(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert only(network.port()).level == "failed"
    monkeypatch.setenv("MASTER_PORT", str(network.free_port()))
    assert only(network.port()).level == "ok"


@pytest.mark.parametrize(
    ("variable", "value", "level"),
    [
        ("GLOO_SOCKET_IFNAME", "lo", "ok"),
        ("GLOO_SOCKET_IFNAME", "l", "failed"),
        ("NCCL_SOCKET_IFNAME", "l", "ok"),
        ("NCCL_SOCKET_IFNAME", "=l", "failed"),
        ("NCCL_SOCKET_IFNAME", "^docker", "ok"),
        ("NCCL_SOCKET_IFNAME", "lo,ib9", "failed"),
    ],
)
def test_interfaces(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, level: str) -> None:
    monkeypatch.setenv(variable, value)
    finding = only(network.interfaces())
    assert finding.level == level
    assert variable not in finding.same  # interfaces have other names on other nodes


def test_settings_of_nccl_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    assert only(network.interfaces()).same["NCCL_ALGO"] == "Ring"


@pytest.mark.parametrize(("mask", "level"), [(0o022, "ok"), (0o027, "ok"), (0o000, "warning"), (0o277, "failed")])
def test_umask(mask: int, level: str) -> None:
    before = os.umask(mask)
    try:
        assert only(host.umask()).level == level
        assert os.umask(mask) == mask  # looking at it changes nothing
    finally:
        os.umask(before)


def test_memory_limit_of_a_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for _, controllers, path in groups:
        root, name = (tmp_path / "memory", "memory.limit_in_bytes") if controllers else (tmp_path, "memory.max")
        (root / path.strip("/")).mkdir(parents=True, exist_ok=True)
        if not controllers or "memory" in controllers.split(","):
            (root / path.strip("/") / name).write_text("4000000000\n")
    monkeypatch.setattr(host, "CGROUPS", tmp_path)
    finding = only(host.memory())
    assert finding.level == "warning"
    assert finding.found.endswith("a control group allows 4.0 GB")


def test_limits() -> None:
    program = (
        "import resource; from pipeline.doctor import host\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**9, 10**9))\n"
        "print(*((each.check, each.level) for each in host.limits()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "('limits', 'ok') ('limit of open files', 'warning') ('limit of files', 'failed')"
