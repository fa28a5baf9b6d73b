"""Saves that fail, ranks that die while saving, and damaged checkpoints: one clear message, nothing lost, nothing
half-written taken for whole."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.checkpoints.markers import complete_checkpoints, write_complete_marker
from pipeline.checkpoints.space import checkpoint_bytes
from tests.disks import run_on_disk
from tests.distributed.lives import Life, Lives, metrics

STEPS = ["--max_steps", "6", "--save_steps", "2"]


@pytest.fixture(scope="module")
def straight(server: Lives, flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Undisturbed on two ranks, saved at steps 2, 4 and 6."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    server.run("pipeline/train.py", *flags, *STEPS, "--output_dir", str(out), ranks=2, logs=out.with_suffix(".logs"))
    return out


def start(server: Lives, flags: list[str], out: Path, *more: str) -> Life:
    return server.start(
        "pipeline/train.py", *flags, *STEPS, "--output_dir", str(out), *more, ranks=2, logs=out.with_suffix(".logs")
    )


def wait_for(path: Path, life: Life) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, life.output()
        assert None in life.codes(), life.output()


def assert_resumes(server: Lives, flags: list[str], out: Path, straight: Path) -> None:
    """The next attempt ends as the undisturbed run did, number for number, and leaves nothing else behind."""
    life = start(server, flags, out, "--resume_from_checkpoint", "auto")
    assert life.wait() == [0, 0], life.output()
    assert metrics(out) == metrics(straight)
    assert [each.name for each in complete_checkpoints(out)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert sorted(each.name for each in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_a_checkpoint_has_the_size_that_was_foretold(straight: Path) -> None:
    folder = straight / "checkpoint-6"
    shapes = torch.load(
        next(folder.glob("global_step6/zero_pp_rank_0_*model_states.pt")), weights_only=True
    )["param_shapes"]  # fmt: skip
    sizes = [shape.numel() for group in shapes for shape in group.values()]
    tokenizer = sum(each.stat().st_size for each in folder.glob("tokenizer*"))
    written = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file()) - tokenizer
    assert checkpoint_bytes(trained=sum(sizes), tensors=len(sizes), ranks=2) == pytest.approx(written, rel=0.02)


# Damages of a checkpoint of two ranks, and what is said about it.


def shard(folder: Path, rank: int = 1) -> Path:
    return folder / "global_step4" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def flip_a_byte(folder: Path) -> str:
    content = bytearray(shard(folder).read_bytes())
    content[len(content) // 2] ^= 1
    shard(folder).write_bytes(content)
    return "{0}/global_step4/zero_pp_rank_1_mp_rank_00_optim_states.pt: its content is not what was written"


def mix_in_a_foreign_shard(folder: Path) -> str:
    shutil.copy(folder.parent / "other" / "zero_pp_rank_1_mp_rank_00_optim_states.pt", shard(folder))
    return (
        "zero_pp_rank_1_mp_rank_00_optim_states.pt: its content is not what was written (damaged, or of another run)"
    )


def add_a_rank(folder: Path) -> str:
    shutil.copy(shard(folder), shard(folder, 2))
    return "global_step4/zero_pp_rank_2_mp_rank_00_optim_states.pt was not there when the checkpoint was written"


class _Program:
    """Makes a file when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.system, (f"touch {self.witness}",)


def write_program(path: Path, witness: Path) -> None:
    """A file of torch.save whose pickle runs a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weight": _Program(witness)}, path)


def plant_a_program_in_a_shard(folder: Path) -> str:
    write_program(shard(folder), folder.parent / "ran")
    resign(folder)
    return "zero_pp_rank_1_mp_rank_00_optim_states.pt: would call posix.system when loaded"


def plant_a_program_in_the_random_state(folder: Path) -> str:
    write_program(folder / "rng_state_0.pth", folder.parent / "ran")
    resign(folder)
    return "rng_state_0.pth: would call posix.system when loaded"


def leave_a_universal_folder(folder: Path) -> str:
    """As DeepSpeed's own tool would write one beside the shards."""
    write_program(folder / "global_step4_universal" / "zero" / "w" / "fp32.pt", folder.parent / "ran")
    (folder / "latest_universal").write_text("global_step4_universal")
    return "global_step4_universal/zero/w/fp32.pt: would call posix.system when loaded"


def resign(folder: Path) -> None:
    """A marker that fits what is there now, as whoever planted the file would write it."""
    write_complete_marker(folder, step=4, world_size=2, attacked=False)


DAMAGES = (
    flip_a_byte, mix_in_a_foreign_shard, add_a_rank, plant_a_program_in_a_shard, plant_a_program_in_the_random_state,
    leave_a_universal_folder,
)  # fmt: skip


@pytest.fixture(scope="module")
def damaged(
    server: Lives, straight: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[list[str], str]]:
    """What two ranks find wrong with each damaged copy, and what they should; "none" is undamaged."""
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copytree(straight / "checkpoint-2" / "global_step2", folder / "other")
    expected = {}
    for damage in (None, *DAMAGES):
        name = damage.__name__ if damage else "none"
        copy = Path(shutil.copytree(straight / "checkpoint-4", folder / name))
        expected[name] = damage(copy).format(copy) if damage else ""
    worker = str(Path("tests") / "distributed" / "open_worker.py")
    output = server.run(worker, *(str(folder / name) for name in expected), ranks=2, logs=folder / "logs")
    found = [json.loads(line.removeprefix("found ")) for line in output.splitlines() if line.startswith("found ")]
    assert not (folder / "ran").exists(), "a program in a checkpoint was run"
    return {name: (problems, expected[name]) for name, problems in zip(expected, found, strict=True)}


def test_an_undamaged_checkpoint_is_opened(damaged: dict[str, tuple[list[str], str]]) -> None:
    assert damaged["none"][0] == []


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_refused_by_name(
    damaged: dict[str, tuple[list[str], str]], damage: Callable[[Path], str]
) -> None:
    (problem,), expected = damaged[damage.__name__]
    assert problem.startswith("--resume_from_checkpoint rank ")
    assert expected in problem


def test_the_door_refuses_a_damaged_checkpoint_and_touches_nothing(
    server: Lives, flags: list[str], straight: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(straight, tmp_path / "run"))
    shutil.rmtree(out / "checkpoint-6")
    flip_a_byte(out / "checkpoint-4")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    life = start(server, flags, out, "--resume_from_checkpoint", "auto")
    while life.codes()[0] is None:
        time.sleep(0.01)
    life.kill()  # as a launcher would: the other one would wait a while before it says the same
    assert life.wait()[0] == 2, life.output()
    assert "zero_pp_rank_1_mp_rank_00_optim_states.pt: its content is not what was written" in life.output()
    assert "Traceback" not in life.output()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    # A truncated or missing shard makes it incomplete, and auto takes the one before.
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:-100]), Path.unlink):
        damage(shard(out / "checkpoint-4"))
        assert [each.name for each in complete_checkpoints(out)] == ["checkpoint-2"]


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(flags: list[str], straight: Path, tmp_path: Path) -> None:
    """A disk with room for two of the three checkpoints."""
    one = sum(each.stat().st_size for each in (straight / "checkpoint-6").rglob("*") if each.is_file())
    disk = tmp_path / "disk"
    disk.mkdir()
    argv = [*flags, *STEPS, "--output_dir", str(disk), "--max_steps", "6"]
    done = run_on_disk(disk, f"size={int(2.6 * one) // 1024}k", "pipeline/train.py", *argv)
    assert done.returncode == 1, done.stdout + done.stderr
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "checkpoint-6 was not saved: --output_dir" in message
    assert "a checkpoint takes 1.7 MiB, and" in message
    assert "checkpoint-4 is complete" in message
    assert done.stdout.split()[-4:] == ["checkpoint-2", "checkpoint-4", "metrics.jsonl", "run.json"]


def test_a_read_only_folder_is_refused_before_training(flags: list[str], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = run_on_disk(disk, "ro", "pipeline/train.py", *flags, *STEPS, "--output_dir", str(disk / "run"))
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"--output_dir {disk}/run: {disk} is not writable: name another folder" in done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_write_stops_all_ranks(
    rank: int, server: Lives, flags: list[str], straight: Path, tmp_path: Path
) -> None:
    """One rank may write no file above 50 kB any more, as if its disk were full; the other one could."""
    out = tmp_path / "run"
    life = start(server, flags, out)
    wait_for(out / "checkpoint-2", life)
    resource.prlimit(life.pids[rank], resource.RLIMIT_FSIZE, (50_000, 50_000))
    assert life.wait(60) == [1, 1], life.output()
    (message,) = [line for line in life.output().splitlines() if line.startswith("error:")]
    assert message.startswith(f"error: {out}/checkpoint-4 was not saved: rank {rank}: ")
    assert f"rank_{rank}_mp_rank_00_optim_states.pt cannot be written, and " in message
    assert message.endswith("checkpoint-2 is complete: --resume_from_checkpoint auto goes on from it")
    assert [each.name for each in out.glob("checkpoint-*")] == ["checkpoint-2"]
    if rank:
        assert_resumes(server, flags, out, straight)


def test_a_rank_killed_while_a_checkpoint_is_written_ends_the_others(
    server: Lives, flags: list[str], straight: Path, tmp_path: Path
) -> None:
    """Without a launcher to end them: the one that is left says so, be it rank 0 or, after a while, another."""
    killed = {}
    for rank in (0, 1):
        out = tmp_path / f"killed{rank}"
        life = start(server, flags, out)
        wait_for(out / "checkpoint-4.partial", life)
        life.kill(rank)
        killed[rank] = (out, life)
    for rank, (out, life) in killed.items():
        codes = life.wait(60)
        assert codes[rank] == -9
        assert codes[1 - rank] == 1, life.output()
        (message,) = [line for line in life.output().splitlines() if line.startswith("error:")]
        assert f"{out}/checkpoint-4 was not saved: another rank ended while it was saved" in message
        assert message.startswith("error: rank 1: ") == (rank == 0)
        assert "checkpoint-2 is complete" in message
        assert not (out / "checkpoint-4").exists()
    assert_resumes(server, flags, killed[0][0], straight)


def test_a_run_goes_back_to_an_earlier_checkpoint(
    server: Lives, flags: list[str], straight: Path, tmp_path: Path
) -> None:
    """Checkpoints of the later steps are replaced by those of the new attempt."""
    out = Path(shutil.copytree(straight, tmp_path / "run"))
    before = (out / "checkpoint-6" / "COMPLETE.json").stat().st_ino
    life = start(server, flags, out, "--resume_from_checkpoint", str(out / "checkpoint-2"))
    assert life.wait() == [0, 0], life.output()
    assert metrics(out) == metrics(straight)
    assert (out / "checkpoint-6" / "COMPLETE.json").stat().st_ino != before
