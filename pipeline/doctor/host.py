"""The machine around Python: memory, shared memory, cores, limits, text encoding, umask."""

from __future__ import annotations

import locale
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

from pipeline.doctor.finding import FAILED, OK, WARNING, Finding, size

LOW_MEMORY = 8e9  # bytes: loading the built-in model and DeepSpeed takes about 3 GB
LOW_SHM = 1e9  # bytes of /dev/shm: containers have 64 MB by default, and NCCL and data workers share memory there
LOW_FILES = 4096
CGROUPS = Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60  # what version 1 control groups say for "none" is around 2^63


def memory() -> Iterator[Finding]:
    """Memory that is free, within what a job or container may use."""
    fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in _lines(Path("/proc/meminfo"))}
    total, free = fields["MemTotal"], fields["MemAvailable"]
    found = f"{size(free)} free of {size(total)}"
    if limit := memory_limit():
        found += f"; a control group allows {size(limit)}"
        free = min(free, limit)
    if free < LOW_MEMORY:
        remedy = "ask the scheduler for more (--mem=0: all of a node), or end other programs"
        yield Finding("host memory", WARNING, found, remedy)
    else:
        yield Finding("host memory", OK, found)


def memory_limit() -> int | None:
    """The lowest memory limit of the control groups this process is in, in bytes; None without one."""
    limits = []
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (CGROUPS, "memory.max") if not controllers else (CGROUPS / "memory", "memory.limit_in_bytes")
        folder = root / path.strip("/")
        for each in (folder, *folder.parents):
            if each.is_relative_to(root) and (each / name).exists():
                value = (each / name).read_text().strip()
                limits.append(int(value) if value.isdigit() else NO_LIMIT)
    return min((limit for limit in limits if limit < NO_LIMIT), default=None)


def shared_memory() -> Iterator[Finding]:
    """/dev/shm, which NCCL and gloo use between the ranks of a node."""
    state = os.statvfs("/dev/shm")
    total, free = state.f_frsize * state.f_blocks, state.f_frsize * state.f_bavail
    found = f"{size(free)} free of {size(total)}"
    if free < LOW_SHM:
        yield Finding("/dev/shm", WARNING, found, "start the container with --shm-size=16g or --ipc=host")
    else:
        yield Finding("/dev/shm", OK, found)


def cores() -> Iterator[Finding]:
    """Processor cores that this process may use."""
    mine, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    if mine == 1 < there:
        remedy = "ask the scheduler for more cores (--cpus-per-task), or drop the binding"
        yield Finding("cores", WARNING, f"this process may use 1 of {there}", remedy)
    else:
        yield Finding("cores", OK, f"{mine} of {there}")


def limits() -> Iterator[Finding]:
    """What `ulimit` allows."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shown = [f"{files} open files", f"{'unlimited' if locked == resource.RLIM_INFINITY else size(locked)} locked"]
    yield Finding("limits", OK, ", ".join(shown))
    if 0 <= files < LOW_FILES:
        yield Finding("limit of open files", WARNING, f"{files}, for sockets and shards", "ulimit -n 65536")
    fabric = Path("/sys/class/infiniband")
    if locked != resource.RLIM_INFINITY and fabric.is_dir() and any(fabric.iterdir()):
        found = f"{size(locked)}, and RDMA registers its buffers as locked memory"
        yield Finding("limit of locked memory", WARNING, found, "ulimit -l unlimited, as the scheduler sets it")
    for name, flag, number in (
        ("files", "-f", resource.RLIMIT_FSIZE),
        ("addresses", "-v", resource.RLIMIT_AS),
    ):
        allowed, _ = resource.getrlimit(number)
        if allowed != resource.RLIM_INFINITY:
            found = f"{size(allowed)}: a checkpoint, or CUDA's reservations, will not fit"
            yield Finding(f"limit of {name}", FAILED, found, f"ulimit {flag} unlimited")


def text() -> Iterator[Finding]:
    """How files are read and written as text where nobody says otherwise."""
    encodings = {locale.getpreferredencoding(False).lower(), sys.getfilesystemencoding().lower()}
    if encodings <= {"utf-8", "utf8"}:
        yield Finding("text encoding", OK, "UTF-8")
    else:
        yield Finding("text encoding", WARNING, ", ".join(sorted(encodings)), "export LC_ALL=C.UTF-8 PYTHONUTF8=1")


def umask() -> Iterator[Finding]:
    """Who may read and change what training writes."""
    mask = os.umask(0o077)
    os.umask(mask)
    if mask & 0o700:
        found = f"{mask:04o}: files would be closed to their own owner"
        yield Finding("umask", FAILED, found, "umask 0027")
    elif not mask & 0o002:
        yield Finding("umask", WARNING, f"{mask:04o}: anybody may change your checkpoints", "umask 0027")
    else:
        yield Finding("umask", OK, f"{mask:04o}")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()
