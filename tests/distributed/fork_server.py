"""Starts scripts as children of a process that has imported the slow libraries: a rank then starts in a fraction of a
second instead of ten.

Each line of stdin is a JSON request, each answered with a JSON line: {"start": SCRIPT, "argv": [...], "env": {...},
"log": FILE} with a pid, {"poll": PID} with the exit code (-9: killed by signal 9), or null while it lives.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # not this folder


def warm_up() -> None:
    """Import what every rank needs. Nothing here may start a thread: a child has only the one that forked."""
    from pipeline.training.distributed import world

    world()  # chooses DeepSpeed's accelerator
    import datasets  # noqa: F401
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    import deepspeed.runtime.zero.stage3  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import pipeline.training.preflight
    import pipeline.training.run  # noqa: F401

    gc.collect()
    gc.freeze()  # else each child's first collection copies every page


def start(request: dict[str, Any]) -> int:
    """Fork; the child becomes the script."""
    pid = os.fork()
    if pid:
        return pid
    code: Any = 1
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(request["env"])
        os.chdir(ROOT)
        sys.argv = [request["start"], *request["argv"]]
        runpy.run_path(request["start"], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def poll(pid: int, ended: dict[int, int]) -> int | None:
    """The exit code of a child, None while it lives."""
    if pid not in ended:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            ended[pid] = os.waitstatus_to_exitcode(status)
    return ended.get(pid)


def main() -> None:
    """Serve until stdin is closed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout as they like
    warm_up()
    ended: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer = start(request) if "start" in request else poll(request["poll"], ended)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
