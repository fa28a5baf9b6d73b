"""A program of its own that imports packages and tries devices: what crashes or hangs here ends this process alone.

`python probe.py '{"imports": [...], "devices": "all" | N | null}'` prints one JSON line before and one after each
step, so that the reader knows which one it did not survive. It imports nothing of the pipeline.
"""

from __future__ import annotations

import sys

if sys.path and sys.path[0].endswith("doctor"):
    del sys.path[0]  # this folder, which python puts first: its files must not stand in for installed modules

import importlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

SIDE = 4096  # of the square matrices that are multiplied
ROUNDS = 10


def imported(name: str) -> dict[str, Any]:
    """Import one module and say how long that took."""
    start = time.monotonic()
    importlib.import_module(name)
    return {"seconds": round(time.monotonic() - start, 3)}


def torch_build() -> dict[str, Any]:
    """What this torch was built for, and whether it reaches a device here. Starts CUDA."""
    import torch

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    cuda = torch.version.cuda
    return {
        "version": torch.__version__,
        "cuda": cuda,
        "cxx11_abi": torch.compiled_with_cxx11_abi(),
        "available": available,
        "count": torch.cuda.device_count() if available else 0,
        "architectures": torch.cuda.get_arch_list() if available else [],
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if available else None,
        "warnings": [str(each.message).splitlines()[0] for each in heard],
    }


def device(index: int) -> dict[str, Any]:
    """One CUDA device: what it is, what is free on it, and a product of matrices with a known result."""
    import torch

    place = torch.device("cuda", index)
    properties = torch.cuda.get_device_properties(place)
    free, total = torch.cuda.mem_get_info(place)
    rows = torch.arange(SIDE, device=place)
    # Of the 128 ones of a row exactly 64 meet a one of the column: every partial sum is an integer that bf16 holds.
    left = (rows[None, :] % 32 == rows[:, None] % 32).to(torch.bfloat16)
    right = ((rows[:, None] // 32 + rows[None, :]) % 2).to(torch.bfloat16)
    wrong = int((left @ right != SIDE // 64).sum())
    torch.cuda.synchronize(place)
    start = time.monotonic()
    for _ in range(ROUNDS):
        left @ right
    torch.cuda.synchronize(place)
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "free": free,
        "total": total,
        "wrong": wrong,
        "tflops": 2 * SIDE**3 * ROUNDS / (time.monotonic() - start) / 1e12,
    }


def main() -> None:
    """Do the steps that were asked for, one after another; a step that raises does not stop the next."""
    plan = json.loads(sys.argv[1])
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print as they are imported is not part of the answer

    def step(name: str, do: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        print(json.dumps({"step": name}), file=lines, flush=True)
        try:
            answer = do(*arguments)
        except BaseException as error:  # an import that calls sys.exit is as broken as one that raises
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        print(json.dumps({"step": name, **answer}), file=lines, flush=True)
        return answer

    for name in plan["imports"]:
        step(f"import {name}", imported, name)
    if plan["devices"] is not None:
        count = step("torch", torch_build).get("count", 0)
        wanted = range(count) if plan["devices"] == "all" else [plan["devices"]] if count else []
        for index in wanted:
            step(f"device {index}", device, index)


if __name__ == "__main__":
    main()
