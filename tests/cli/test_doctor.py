"""tools/doctor.py on this machine: a good one, one with everything wrong, one without packages."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.doctors import HERE, other_version, quick_imports
from tests.ranks import ROOT

DOCTOR = ROOT / "tools/doctor.py"


def run_doctor(
    *words: object, environment: Mapping[str, str] = HERE, python: Path | str = sys.executable, umask: int = 0o022
) -> subprocess.CompletedProcess[str]:
    """`python tools/doctor.py WORDS`."""
    command = [str(python), str(DOCTOR), *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, umask=umask, timeout=200)


def by_check(file: Path) -> dict[str, dict[str, Any]]:
    """The findings of a JSON file; of several of one check the last."""
    return {each["check"]: each for each in json.loads(file.read_text())["findings"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the doctor's test file goes."""
    return tmp_path_factory.mktemp("doctor")


@pytest.fixture(scope="module")
def good(folder: Path) -> subprocess.CompletedProcess[str]:
    """The doctor's answer here, where training runs."""
    return run_doctor("--output_dir", folder / "runs/new", "--json", folder / "good.json")


def test_this_machine_is_ready(good: subprocess.CompletedProcess[str]) -> None:
    assert good.returncode == 0, good.stdout + good.stderr
    assert good.stdout.splitlines()[-1].startswith("ready")
    assert "failed" not in good.stdout


def test_findings_are_what_is_here(good: subprocess.CompletedProcess[str], folder: Path) -> None:
    findings = by_check(folder / "good.json")
    assert platform.python_version() in findings["python"]["found"]
    assert f"torch {torch.__version__}" in findings["packages"]["found"]
    assert findings["packages"]["same"]["torch"] == torch.__version__
    assert torch.__version__ in findings["torch"]["found"]
    assert findings["all-reduce (gloo)"]["found"].startswith("2 ranks, the right sum at ")
    assert findings["write speed"]["rates"]["write speed in MB/s"] > 0
    assert findings["cores"]["found"].startswith(f"{len(os.sched_getaffinity(0))} of ")


def test_json_holds_every_printed_row(good: subprocess.CompletedProcess[str], folder: Path) -> None:
    content = json.loads((folder / "good.json").read_text())
    assert content["ready"] is True
    printed = [line for line in good.stdout.splitlines() if line.startswith(("ok ", "warning "))]
    assert [line.split()[0] for line in printed] == [each["level"] for each in content["findings"]]
    for line, finding in zip(printed, content["findings"], strict=True):
        assert finding["check"] in line
        assert finding["found"] in line


def test_nothing_is_left_behind(good: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == ["good.json"]


@pytest.fixture(scope="module")
def bad(folder: Path) -> subprocess.CompletedProcess[str]:
    """The doctor's answer where nearly everything is wrong at once."""
    packages = quick_imports(folder.parent / "bad-packages")
    other_version(packages, "peft", "0.0.1")
    other_version(packages, "tqdm", "9.9")
    (packages / "accelerate.py").write_text("raise RuntimeError('an ABI of another day')")
    (packages / "datasets.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    (packages / "a-file").write_text("")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        environment = {
            **HERE, "PYTHONPATH": str(packages), "MASTER_PORT": str(taken.getsockname()[1]), "LC_ALL": "C",
            "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "GLOO_SOCKET_IFNAME": "nosuch0", "HF_HOME": "/proc/no",
        }  # fmt: skip
        words = ["--output_dir", packages / "a-file/run", "--json", folder.parent / "bad.json"]
        return run_doctor(*words, "--require", "cuda", "flash_attention_2", environment=environment, umask=0)


@pytest.mark.parametrize(
    ("check", "level", "found"),
    [
        ("package peft", "failed", "0.0.1, and surgery-pipeline asks for peft>="),
        ("pinned versions", "warning", "tqdm 9.9 (tested with "),
        ("import accelerate", "failed", "RuntimeError: an ABI of another day"),
        ("import datasets", "failed", "python was killed by SIGSEGV"),
        ("flash_attention_2", "failed", "flash_attn_2_cuda is not installed"),
        ("text encoding", "warning", "ansi_x3.4-1968"),
        ("umask", "warning", "0000: anybody may change"),
        ("output_dir", "failed", "a-file is not a folder"),
        ("hub cache (HF_HUB_CACHE)", "failed", "/proc/no/hub cannot be written: "),
        ("interfaces", "failed", "GLOO_SOCKET_IFNAME=nosuch0, and nosuch0 is not among lo"),
        ("port", "failed", "is taken by another program"),
        ("all-reduce (gloo)", "failed", "joining: python exited with 1"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="expects a machine without a GPU")
def test_every_trouble_is_named(
    bad: subprocess.CompletedProcess[str], folder: Path, check: str, level: str, found: str
) -> None:
    assert bad.returncode == 1, bad.stdout + bad.stderr
    assert "Traceback" not in bad.stdout + bad.stderr
    finding = by_check(folder.parent / "bad.json")[check]
    assert finding["level"] == level
    assert found in finding["found"]
    assert finding["remedy"]
    assert check in bad.stdout.splitlines()[-1] or level == "warning"


def test_a_crash_does_not_hide_what_comes_after_it(bad: subprocess.CompletedProcess[str], folder: Path) -> None:
    findings = by_check(folder.parent / "bad.json")
    assert "import transformers" not in findings  # tried in the next process, and good
    assert findings["torch"]["found"].startswith(torch.__version__)


def test_without_torch_or_any_package(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    environment = {name: value for name, value in HERE.items() if name != "PYTHONPATH"}
    python = tmp_path / "bare/bin/python"
    words = ["--output_dir", tmp_path, "--json", tmp_path / "x.json"]
    done = run_doctor(*words, environment=environment, python=python)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    findings = by_check(tmp_path / "x.json")
    assert findings["torch"]["level"] == "failed"
    assert "No module named 'torch'" in findings["torch"]["found"]
    assert findings["write speed"]["level"] != "failed"  # what needs no package is still looked at


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--require", "rocm"], "--require: invalid choice: 'rocm'"),
        (["--timeout", "0"], "--timeout 0: give a number of seconds above 0"),
        (["--json", "no/such/folder/x.json"], "--json no/such/folder/x.json: there is no folder"),
        (["--distributed"], "no rank in the environment (RANK, LOCAL_RANK, WORLD_SIZE or SLURM_PROCID, "),
        (["--outputdir", "x"], "unrecognized arguments: --outputdir x"),
    ],
)
def test_wrong_usage(words: list[str], problem: str) -> None:
    done = run_doctor(*words)
    assert done.returncode == 2
    assert problem in done.stderr
