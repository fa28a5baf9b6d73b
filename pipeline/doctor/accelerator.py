"""GPU driver, torch's CUDA and the devices, and whether the three fit each other."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from pipeline.doctor.finding import FAILED, OK, WARNING, Finding, size, tool_output
from pipeline.doctor.probing import Answers

CPU_BUILD = "the CPU build of torch, on a machine with an NVIDIA device"
BUSY = 0.05  # of a device's memory that may be taken before training starts: a context of the display or a monitor
BF16 = 8  # the lowest compute capability (major) with bf16 matrix units, which the flash kernels need too
QUERY = "index,name,driver_version,ecc.errors.uncorrected.volatile.total"


def hidden() -> bool:
    """Whether the user has hidden all GPUs: training then runs on the CPU, as asked."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1", "NoDevFiles")


def present() -> bool:
    """Whether this machine has an NVIDIA device or its tool, whatever torch thinks."""
    return not hidden() and (shutil.which("nvidia-smi") is not None or any(Path("/dev").glob("nvidia[0-9]*")))


def driver(require: Set[str]) -> Iterator[Finding]:
    """What the NVIDIA driver says of itself and of its memory errors."""
    if not present():
        why = "CUDA_VISIBLE_DEVICES hides all GPUs" if hidden() else "no NVIDIA device: training runs on the CPU"
        level, remedy = (FAILED, "run on a GPU node") if "cuda" in require else (OK, "")
        yield Finding("gpu driver", level, why, remedy)
        return
    try:
        lines = tool_output(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]).splitlines()
    except RuntimeError as error:
        yield Finding("gpu driver", FAILED, f"nvidia-smi: {error}", "reload the driver, or drain and reboot the node")
        return
    rows = [[each.strip() for each in line.split(",")] for line in lines if line.count(",") == QUERY.count(",")]
    kinds = sorted({name for _, name, _, _ in rows})
    versions = sorted({version for _, _, version, _ in rows})
    yield Finding("gpu driver", OK, f"{', '.join(versions)}: {len(rows)} x {' and '.join(kinds)}")
    for index, _, _, errors in rows:
        if errors.isdigit() and int(errors):
            remedy = "drain the node: the next such error ends the run, or goes unseen into the weights"
            yield Finding(f"gpu {index} memory", WARNING, f"{errors} uncorrected ECC errors since the boot", remedy)


def torch_cuda(answers: Answers, require: Set[str]) -> Iterator[Finding]:
    """The CUDA that torch was built for against the driver."""
    build = answers.get("torch", {"error": "not tried, because the probe ended before"})
    if "error" in build:
        yield Finding("torch", FAILED, build["error"], "make setup (on a GPU node: make setup-gpu)")
        return
    cuda, version = build["cuda"], build["version"]
    same = {"torch CUDA": str(cuda), "NCCL": str(build["nccl"])}
    if build["available"]:
        found = f"{version}, CUDA {cuda}, NCCL {build['nccl']}, {build['count']} devices"
        yield Finding("torch", OK, found, same=same)
    elif cuda is None:
        here = present()
        level = FAILED if here or "cuda" in require else OK
        remedy = "make setup-gpu, or CUDA_VISIBLE_DEVICES= to train on the CPU" if level is FAILED else ""
        yield Finding("torch", level, f"{version}: {CPU_BUILD if here else 'the CPU build'}", remedy, same)
    else:
        why = "; ".join(build["warnings"]) or ("GPUs are hidden" if hidden() else "no device, or no driver")
        level = FAILED if present() or "cuda" in require else WARNING
        remedy = f"a driver for CUDA {cuda}, or a torch built for an older CUDA" if present() else "run on a GPU node"
        yield Finding("torch", level, f"{version}, CUDA {cuda} reaches no device: {why}", remedy, same)


def devices(answers: Answers, node_ranks: int, local_rank: int | None) -> Iterator[Finding]:
    """Each device that was tried: whether torch has code for it, its free memory, and that it computes right.

    node_ranks: ranks on this node; local_rank: the one this process is, None outside a job.
    """
    build = answers.get("torch", {})
    if local_rank is not None and build.get("available") and local_rank >= build["count"]:
        found = f"{node_ranks} ranks on this node see {build['count']} devices: local rank {local_rank} has none"
        remedy = "start one rank a GPU, and let every rank see all (no --gpus-per-task, no --gpu-bind)"
        yield Finding(f"device {local_rank}", FAILED, found, remedy)
    for step, answer in answers.items():
        if step.startswith("device "):
            yield device(step, answer, build.get("architectures", []))


def device(name: str, answer: Mapping[str, Any], architectures: list[str]) -> Finding:
    """One device's answer as a finding; the first trouble decides."""
    if "error" in answer:
        return Finding(name, FAILED, answer["error"], "look at the kernel log for Xid errors, and drain the node")
    major, minor = answer["capability"]
    found = f"{answer['name']}, compute capability {major}.{minor}, {size(answer['free'])} free of "
    found += f"{size(answer['total'])}, {answer['tflops']:.0f} TFLOP/s in bf16"
    rates = {"bf16 TFLOP/s": float(answer["tflops"])}
    if answer["wrong"]:
        found = f"{answer['wrong']} wrong elements in a product of matrices; {found}"
        return Finding(name, FAILED, found, "drain the node: this device computes wrong", rates=rates)
    if not covers(architectures, major, minor):
        found = f"{found}; this torch has code for {', '.join(architectures)}"
        return Finding(name, FAILED, found, "a torch built for this device", rates=rates)
    if major < BF16:
        return Finding(name, WARNING, found, "bf16 and flash attention need compute capability 8.0", rates=rates)
    if answer["free"] < (1 - BUSY) * answer["total"]:
        return Finding(name, WARNING, found, "somebody else computes here: see nvidia-smi", rates=rates)
    return Finding(name, OK, found, rates=rates)


def covers(architectures: list[str], major: int, minor: int) -> bool:
    """Whether code built for `architectures` (sm_80, sm_90a, compute_90 ...) runs on a compute capability.

    Machine code runs on the same major version with an equal or higher minor one, PTX (compute_) on everything newer;
    a letter behind the number ties it to that device alone.
    """
    for each in architectures:
        kind, _, number = each.partition("_")
        digits = number.rstrip("af")
        built = (int(digits[:-1]), int(digits[-1]))
        if built == (major, minor) or (digits == number and kind == "compute" and built <= (major, minor)):
            return True
        if digits == number and kind == "sm" and built[0] == major and built[1] <= minor:
            return True
    return False


def trains_on_cuda(answers: Answers) -> bool:
    """Whether training here would run on a GPU."""
    return bool(answers.get("torch", {}).get("available"))
