"""A stage's process: its log, its exit code, and that nothing of it outlives the runner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.chain.process import minutes, run_logged

ROOT = Path(__file__).resolve().parents[2]


def run(command: list[str], log: Path, *, private: bool = False) -> int:
    with (log.parent / "lock").open("w") as lock:
        return run_logged(command, log, label="[1/1] stage", lock=lock.fileno(), private=private)


def alive(pid: int) -> bool:
    """Whether a process runs: a zombie nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 137)])
def test_the_exit_code_is_the_commands(tmp_path: Path, script: str, code: int) -> None:
    assert run(["sh", "-c", script], tmp_path / "log") == code


def test_the_log_holds_the_command_and_both_outputs_of_every_attempt(tmp_path: Path) -> None:
    log = tmp_path / "logs/stage.log"
    log.parent.mkdir()
    run(["sh", "-c", "echo out; echo err >&2"], log)
    run(["sh", "-c", "echo again"], log)
    assert log.read_text() == "$ sh -c 'echo out; echo err >&2'\nout\nerr\n$ sh -c 'echo again'\nagain\n"


@pytest.mark.parametrize(("private", "mode"), [(True, 0o700), (False, 0o755)])
def test_a_private_stage_makes_folders_for_its_user_alone(tmp_path: Path, private: bool, mode: int) -> None:
    before = os.umask(0o022)
    try:
        run(["mkdir", "-p", str(tmp_path / "stage/deeper")], tmp_path / "log", private=private)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "stage", tmp_path / "stage/deeper")] == [mode, mode]


def test_what_a_stage_leaves_running_is_ended_with_it(tmp_path: Path) -> None:
    begin = time.monotonic()
    code = run(["sh", "-c", f"sleep 300 & echo $! > {tmp_path}/pid; exit 5"], tmp_path / "log")
    assert code == 5
    assert not alive(int((tmp_path / "pid").read_text()))
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_all_processes_of_a_stage_end_when_the_runner_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    stage = f"sleep 300 & echo $! > {tmp_path}/child; echo $$ > {tmp_path}/leader; touch {tmp_path}/ready; wait"
    runner = (
        "import sys; from pathlib import Path; from pipeline.chain.process import run_logged; "
        "run_logged(['sh', '-c', sys.argv[1]], Path(sys.argv[2]), label='', lock=sys.stdin.fileno(), private=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", runner, stage, str(tmp_path / "log")], cwd=ROOT)
    wait_for((tmp_path / "ready").exists)
    pids = [int((tmp_path / name).read_text()) for name in ("leader", "child")]
    assert all(map(alive, pids))
    process.send_signal(number)
    assert process.wait(timeout=30) == -number
    wait_for(lambda: not any(map(alive, pids)))
    assert "the runner is gone" in (tmp_path / "log").read_text()


def test_times_are_written_as_people_read_them() -> None:
    assert [minutes(each) for each in (0.4, 59.4, 59.6, 3725)] == ["0 s", "59 s", "1 min 00 s", "62 min 05 s"]
