"""tools/doctor.py --distributed: real processes, one a rank, as srun starts them; Slurm's names tell nodes apart."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import packaging
import pytest

from tests.cli.doctors import HERE, other_version, quick_imports
from tests.ranks import ROOT, free_port

Ended = dict[int, tuple[int | None, str]]  # exit code (None: had to be killed) and output by rank
RunJob = Callable[..., Ended]


@pytest.fixture(scope="module")
def run_job(tmp_path_factory: pytest.TempPathFactory) -> RunJob:
    """Start the ranks of `nodes` (rank: node) of a job of `size`, with variables and an output_dir of their own."""
    quick = quick_imports(tmp_path_factory.mktemp("packages") / "quick")

    def run(
        nodes: Mapping[int, str],
        *words: object,
        size: int,
        folders: Mapping[int, Path],
        own: Mapping[int, Mapping[str, str]] = MappingProxyType({}),
        packages: Mapping[int, Path] = MappingProxyType({}),
    ) -> Ended:
        shared = {
            **HERE, "SLURM_NTASKS": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        with ExitStack() as open_files:
            logs = {rank: open_files.enter_context(tempfile.TemporaryFile("w+")) for rank in nodes}
            processes = {}
            for rank, node in nodes.items():
                place = {
                    "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(list(nodes.values())[:rank].count(node)),
                    "SLURMD_NODENAME": node, "PYTHONPATH": f"{packages.get(rank, quick)}:{quick}",
                }  # fmt: skip
                command = [sys.executable, "tools/doctor.py", "--distributed", "--output_dir", str(folders[rank])]
                processes[rank] = subprocess.Popen(
                    [*command, *map(str, words)], cwd=ROOT, stdout=logs[rank], stderr=subprocess.STDOUT,
                    env={**shared, **place, **own.get(rank, {})},
                )  # fmt: skip
            deadline = time.monotonic() + 150
            while any(each.poll() is None for each in processes.values()) and time.monotonic() < deadline:
                time.sleep(0.1)
            ended = {}
            for rank, process in processes.items():
                code = process.poll()
                process.kill()
                process.wait()
                logs[rank].seek(0)
                ended[rank] = (code, logs[rank].read())
        return ended

    return run


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path_factory.mktemp("small")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"needs the right to mount a small disk (run as root): {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_two_good_nodes(run_job: RunJob, tmp_path: Path) -> None:
    folders = dict.fromkeys(range(3), tmp_path / "runs")
    nodes = {0: "node-a", 1: "node-a", 2: "node-b"}
    ended = run_job(nodes, "--json", tmp_path / "job.json", size=3, folders=folders)
    assert {code for code, _ in ended.values()} == {0}, ended
    assert ended[1][1] == ended[2][1] == ""  # rank 0 speaks for all
    content = json.loads((tmp_path / "job.json").read_text())
    findings: list[dict[str, Any]] = content["findings"]
    assert content["ready"] is True
    assert {(each["node"], each["rank"]) for each in findings if each["check"] == "python"} == {
        ("node-a", 0), ("node-b", 2),
    }  # fmt: skip
    found = {each["check"]: each["found"] for each in findings}
    assert found["all-reduce (gloo)"].startswith("3 ranks, the right sum at ")
    assert found["shared output_dir"] == "the one of rank 0"
    assert "on 2 nodes" in found["same on all nodes"]
    assert {"clocks", "connections"} <= set(found)
    assert ended[0][1].splitlines()[-1].startswith("ready")
    assert [path.name for path in tmp_path.iterdir()] == ["job.json"]


def test_a_bad_node_is_named(run_job: RunJob, tmp_path: Path, small_disk: Path) -> None:
    folders = {0: tmp_path, 1: small_disk}
    (tmp_path / "other").mkdir()
    other = {1: other_version(tmp_path / "other", "peft", "0.99")}
    ended = run_job({0: "node-a", 1: "node-b"}, size=2, folders=folders, packages=other)
    assert {code for code, _ in ended.values()} == {1}
    output = ended[0][1]
    rows = [line for line in output.splitlines() if line.startswith("failed")]
    for check, found in (
        ("output_dir", "node-b: 1.0 MB free in "),
        ("same on all nodes", "node-b: peft 0.99 (others 0."),
        ("shared output_dir", f"node-b: {small_disk} is another folder here than on the node of rank 0"),
    ):
        assert [row for row in rows if row.split(maxsplit=1)[1].startswith(check) and found in row], output
    assert all("node-b" in row for row in rows)
    assert output.splitlines()[-2].endswith("on node-b")
    assert output.splitlines()[-1] == "to go on without: sbatch --exclude=node-b ..."


def test_ranks_that_never_come_are_named_in_time(run_job: RunJob, tmp_path: Path) -> None:
    broken = tmp_path / "broken/torch/__init__.py"
    broken.parent.mkdir(parents=True)
    broken.write_text("raise ImportError('libcudart.so.13: no such file')")
    job = {"SLURM_JOB_NODELIST": "node-[a,b],gpu-[07-08]"}
    own, folders = dict.fromkeys(range(2), job), dict.fromkeys(range(2), tmp_path)
    packages = {1: tmp_path / "broken"}
    ended = run_job({0: "node-a", 1: "node-b"}, "--timeout", 6, size=4, own=own, folders=folders, packages=packages)
    assert {code for code, _ in ended.values()} == {1}
    assert ended[1][1].startswith("error: rank 1 (node-b): torch cannot be imported: libcudart.so.13")
    for node in ("node-b", "gpu-07", "gpu-08"):
        assert f"{node}: nobody: rank 1-3 of 4 never came, in 6 s" in ended[0][1]
    assert "<- not ready" not in next(line for line in ended[0][1].splitlines() if line.startswith("node-a"))


def test_without_rank_0(run_job: RunJob, tmp_path: Path) -> None:
    ended = run_job({1: "node-b"}, "--timeout", 3, size=2, folders={1: tmp_path})
    code, output = ended[1]
    assert code == 1
    assert output.startswith("error: rank 1 (node-b): rank 0 did not answer at 127.0.0.1:")
    assert "Traceback" not in output


def test_a_rank_that_dies_in_a_check_is_named(run_job: RunJob, tmp_path: Path) -> None:
    deadly = tmp_path / "deadly/packaging/specifiers.py"  # the first check imports it
    deadly.parent.mkdir(parents=True)
    deadly.write_text("import os\nos.kill(os.getpid(), 9)")
    deadly.with_name("__init__.py").write_text(f"__path__.append({str(Path(packaging.__file__).parent)!r})")
    folders, packages = dict.fromkeys(range(2), tmp_path), {1: tmp_path / "deadly"}
    ended = run_job({0: "node-a", 1: "node-b"}, "--timeout", 12, size=2, folders=folders, packages=packages)
    assert ended[1][0] == -9
    assert ended[0][0] == 1
    assert "node-b: rank 1 ended, hangs or is slow in the check of python" in ended[0][1]


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"SLURM_PROCID": "2", "SLURM_LOCALID": "0"}, "SLURM_PROCID 2: give 0 to 1, for SLURM_NTASKS 2"),
        ({"SLURM_PROCID": "one", "SLURM_LOCALID": "0"}, "SLURM_PROCID one: give a number"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT http: give a number"),
    ],
)
def test_wrong_usage(run_job: RunJob, tmp_path: Path, variables: dict[str, str], problem: str) -> None:
    code, output = run_job({0: "node-a"}, size=2, own={0: variables}, folders={0: tmp_path})[0]
    assert code == 2
    assert problem in output
