"""Output folders of weights: as save_pretrained writes them, whole or not at all, continued after an interruption."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipeline.checkpoints import weights_out
from pipeline.checkpoints.byte_progress import ByteProgress
from pipeline.checkpoints.checksums import check_manifest
from pipeline.checkpoints.out_folder import NoSpace, OutFolder, fingerprint
from pipeline.checkpoints.weights_in import SafetensorsFile, WeightsFolder
from pipeline.checkpoints.weights_out import TensorSpec
from tests import tiny
from tests.disks import run_on_disk
from tests.out_folders import specs_of, write
from tests.unit import out_folder_worker

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(out_folder_worker.__file__)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", ["5GB", "200KB", "1KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_equal_those_of_save_pretrained_byte_for_byte(
    tmp_path: Path, tied: bool, size: str, dtype: torch.dtype
) -> None:
    model = (tiny.tiny_qwen2() if tied else tiny.tiny_llama()).to(dtype)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    state = {name: each for name, each in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    write(tmp_path / "ours", state, size=size, workers=2)
    theirs = {path.name: path.read_bytes() for path in (tmp_path / "theirs").glob("*.safetensors*")}
    ours = {path.name: path.read_bytes() for path in (tmp_path / "ours").glob("*.safetensors*")}
    assert (len(theirs) > 1) == (size != "5GB")
    assert ours == theirs


def test_types_names_and_empty_tensors_are_as_the_library_writes_them(tmp_path: Path) -> None:
    tensors = {
        "b.ü": torch.arange(7, dtype=torch.int64),
        "a": torch.tensor(True),
        "c": torch.randn(3, 0),
        "d": torch.randn(2, 3).half(),
        "e": torch.randn(5).bfloat16(),
        "f": torch.arange(3, dtype=torch.uint8),
        "g": torch.randn(2, 2, dtype=torch.float64),
        "h": torch.arange(4, dtype=torch.int32),
        "i": torch.randn(1),
    }
    out = write(tmp_path / "out", tensors)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    file = SafetensorsFile(out / "model.safetensors")
    for name, tensor in tensors.items():
        assert file.specs[name] == TensorSpec(name, tuple(tensor.shape), tensor.dtype)
        pieces = [each.clone() for each in file.read(name, length=2)]
        assert torch.equal(torch.cat(pieces) if pieces else torch.empty(0), tensor.flatten())


@settings(deadline=None, max_examples=60)
@given(
    shapes=st.lists(
        st.tuples(st.sampled_from([torch.float32, torch.bfloat16, torch.int64]), st.integers(0, 700)), max_size=8
    ),
    size=st.integers(1, 4000),
    read=st.integers(1, 900),
    written=st.integers(1, 500),
    workers=st.integers(1, 3),
)
def test_any_split_into_files_and_pieces_reads_back(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[tuple[torch.dtype, int]],
    size: int,
    read: int,
    written: int,
    workers: int,
) -> None:
    tensors = {f"t{i}": torch.arange(numel).float().to(dtype) for i, (dtype, numel) in enumerate(shapes)}
    tensors["last"] = torch.ones(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_out, "PIECE_BYTES", 8 * written)
        out = write(tmp_path_factory.mktemp("split") / "out", tensors, size=size, workers=workers, piece=read)
    assert WeightsFolder(out).specs == {spec.name: spec for spec in specs_of(tensors)}
    found = {name: each for path in out.glob("*.safetensors") for name, each in load_file(path).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    check_manifest(out)


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_of_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    """Full blocks, and a last one that no direct write takes; or a file system that knows no direct writes."""
    if not direct:

        def refuse(path: Path, flags: int, *mode: int) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return open_file(path, flags, *mode)

        open_file = os.open
        monkeypatch.setattr("pipeline.checkpoints.direct_file.os.open", refuse)
    tensors = {"a": torch.randn(weights_out.PIECE_BYTES // 2 + 3), "b": torch.randn(5), "c": torch.randn(4096)}
    out = write(tmp_path / "out", tensors, torch.float32)
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    check_manifest(out)


def test_weights_are_rounded_once_from_what_is_read(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(40_000, dtype=torch.float64)}
    out = write(tmp_path / "out", tensors, torch.bfloat16, piece=7000)
    assert torch.equal(load_file(out / "model.safetensors")["w"], tensors["w"].to(torch.bfloat16))


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (float("nan"), torch.float32, "bad: holds values that are not finite"),
        (float("-inf"), torch.bfloat16, "bad: holds values that are not finite"),
        (7e4, torch.float16, "bad: holds values that are too large for F16"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_tensor_that_is_not_finite_is_named_and_nothing_is_left(
    tmp_path: Path, value: float, dtype: torch.dtype, message: str, workers: int
) -> None:
    tensors = {"fine": torch.full((1000,), 6e4), "bad": torch.zeros(1000), "after": torch.zeros(10)}
    tensors["bad"][777] = value
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "out", tensors, dtype, size=2000, workers=workers)
    assert not list(tmp_path.iterdir())


def test_finite_values_whose_sum_overflows_are_written(tmp_path: Path) -> None:
    tensors = {"w": torch.full((100,), 3e38)}
    assert torch.equal(load_file(write(tmp_path / "out", tensors) / "model.safetensors")["w"], tensors["w"])


@pytest.mark.parametrize("numel", [9, 11])
def test_a_tensor_with_another_number_of_elements_is_refused(tmp_path: Path, numel: int) -> None:
    with (
        pytest.raises(ValueError, match=f"w: {numel} elements were read, 10 are expected"),
        OutFolder(tmp_path / "out", source="", private=False) as made,
    ):
        made.write_weights(
            [TensorSpec("w", (2, 5), torch.float32)], lambda _: [torch.ones(numel)], max_shard_size=None
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["5 G", "big", "5GiB"])
def test_a_size_that_is_none_is_refused(tmp_path: Path, size: str) -> None:
    with pytest.raises(ValueError, match=f"--max_shard_size {size}"):
        write(tmp_path / "out", {"w": torch.ones(1)}, size=size)


class TestContinuing:
    """A worker process writes six files."""

    def interrupted(self, out: Path) -> Path:
        """A partial folder with some of the files, left by a process that was killed while it wrote."""
        partial = out.with_name(f".{out.name}.partial")
        process = subprocess.Popen(
            [sys.executable, WORKER, out, "0.3"], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        deadline = time.monotonic() + 60
        while len(list(partial.glob("*.safetensors"))) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
        return partial

    def test_a_killed_process_is_continued_with_the_same_files(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        partial = self.interrupted(out)
        assert not out.exists()
        (partial / "model-00001-of-00006.safetensors.tmp").write_bytes(b"torn")
        with (partial / ".finished.jsonl").open("a") as record:
            record.write('{"name": "model-0000')
        read: list[str] = []
        out_folder_worker.write(out, read.append)
        assert 1 <= len(read) <= 5
        out_folder_worker.write(tmp_path / "straight", lambda _: None)
        expected = {path.name: path.read_bytes() for path in (tmp_path / "straight").iterdir()}
        assert {path.name: path.read_bytes() for path in out.iterdir()} == expected
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "straight"]
        check_manifest(out)

    def test_what_another_source_left_is_thrown_away(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        partial = self.interrupted(out)
        changed = partial / "model-00001-of-00006.safetensors"
        changed.write_bytes(changed.read_bytes()[:-1] + b"x")
        read: list[str] = []
        out_folder_worker.write(out, read.append, source="another")
        assert len(read) == 6
        assert torch.equal(load_file(out / changed.name)["0"], out_folder_worker.tensor("0"))

    def test_an_interrupt_keeps_what_is_finished(self, tmp_path: Path) -> None:
        def stop_at(name: str) -> Callable[[str], None]:
            def before(each: str) -> None:
                if each == name:
                    raise KeyboardInterrupt

            return before

        with pytest.raises(KeyboardInterrupt):
            out_folder_worker.write(tmp_path / "out", stop_at("4"))
        read: list[str] = []
        out_folder_worker.write(tmp_path / "out", read.append)
        assert read == ["4", "5"]

    def test_an_interrupt_before_the_first_file_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt), OutFolder(tmp_path / "out", source="", private=False):
            raise KeyboardInterrupt
        assert not list(tmp_path.iterdir())


class TestDisk:
    def test_space_is_checked_before_anything_is_written(self, tmp_path: Path) -> None:
        specs = [TensorSpec("w", (10**9, 10**6), torch.float32)]
        with (
            pytest.raises(
                NoSpace, match=r"out: 4000000000\d+ bytes .* are to be written and \d+ .* are free; make room"
            ),
            OutFolder(tmp_path / "out", source="", private=False) as made,
        ):
            made.write_weights(specs, lambda _: [], max_shard_size="5GB")
        assert not list(tmp_path.iterdir())

    def test_a_disk_that_fills_up_is_named_and_finished_files_are_kept(self, tmp_path: Path) -> None:
        # 4 MB: room for the six files, until the ballast comes.
        done = run_on_disk(tmp_path, "size=4m", WORKER, tmp_path / "out", tmp_path / "ballast")
        assert done.returncode == 2, done.stderr
        assert f"error: {tmp_path / 'out'}: No space left on device" in done.stderr
        assert "make room" in done.stderr
        assert "finished files are kept" in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout.split() == [".out.partial", "ballast"]

    def test_a_read_only_disk_is_named(self, tmp_path: Path) -> None:
        done = run_on_disk(tmp_path, "ro", WORKER, tmp_path / "out", "0")
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith(f"error: {tmp_path / 'out'}: cannot be written: Read-only file system")
        assert not done.stdout

    def test_a_mounted_disk_cannot_be_the_folder_itself(self, tmp_path: Path) -> None:
        done = run_on_disk(tmp_path, "size=4m", WORKER, tmp_path, "0")
        assert done.returncode == 2, done.stderr
        assert "name a folder in it" in done.stderr


class TestFolder:
    @pytest.fixture
    def tensors(self) -> dict[str, torch.Tensor]:
        return {"w": torch.ones(10)}

    def test_a_folder_that_holds_something_is_not_overwritten(
        self, tmp_path: Path, tensors: dict[str, torch.Tensor]
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious.txt").write_text("mine")
        with pytest.raises(ValueError, match="choose another OUT"):
            write(tmp_path / "out", tensors)
        assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious.txt"]

    def test_what_appears_meanwhile_is_not_overwritten(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        with OutFolder(out, source="", private=False) as made:
            out.mkdir()
            (out / "precious.txt").write_text("mine")
            with pytest.raises(ValueError, match="choose another OUT"):
                made.finish()
        assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious.txt"]

    def test_a_link_to_an_empty_folder_is_followed(self, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
        (tmp_path / "big").mkdir()
        (tmp_path / "out").symlink_to("big")
        write(tmp_path / "out", tensors)
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "big" / "model.safetensors").is_file()

    def test_two_writers_of_one_folder_are_refused(self, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
        with OutFolder(tmp_path / "out", source="test", private=False):
            with pytest.raises(ValueError, match="another process is writing"):
                write(tmp_path / "out", tensors)
            write(tmp_path / "beside", tensors)
        write(tmp_path / "out", tensors)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["beside", "out"]

    def test_permissions(self, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
        (tmp_path / "plain").mkdir()
        mode = (tmp_path / "plain").stat().st_mode & 0o777
        out = write(tmp_path / "out", tensors)
        assert out.stat().st_mode & 0o777 == mode
        assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {mode & 0o666}
        with OutFolder(tmp_path / "early", source="", private=True) as made:
            assert made.folder.stat().st_mode & 0o777 == 0o700
        out = write(tmp_path / "private", tensors, private=True)
        assert out.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o600}

    def test_a_link_planted_where_files_are_made_is_not_followed(
        self, tmp_path: Path, tensors: dict[str, torch.Tensor]
    ) -> None:
        (tmp_path / "victim").mkdir()
        (tmp_path / "victim" / "precious.txt").write_text("mine")
        (tmp_path / ".out.partial").symlink_to("victim")
        write(tmp_path / "out", tensors)
        assert [path.name for path in (tmp_path / "victim").iterdir()] == ["precious.txt"]
        (tmp_path / ".more.lock").symlink_to("victim/precious.txt")
        with pytest.raises(ValueError, match="cannot be written"):
            write(tmp_path / "more", tensors)
        assert (tmp_path / "victim" / "precious.txt").read_text() == "mine"

    def test_fingerprint_changes_with_the_files_and_the_options(self, tmp_path: Path) -> None:
        path = tmp_path / "a"
        path.write_text("1")
        first = fingerprint([path], "bf16")
        assert fingerprint([path], "bf16") == first
        assert fingerprint([path], "fp32") != first
        path.write_text("12")
        assert fingerprint([path], "bf16") != first


def test_a_log_file_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 10.0, 31.0, 40.0, 62.0])
    monkeypatch.setattr("pipeline.checkpoints.byte_progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with ByteProgress(total=10_000_000_000, done=1_000_000_000) as progress:
        for _ in range(4):
            progress.update(1_550_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "4.1 of 10.0 GB, 0.10 GB/s, 59 s left",
        "7.2 of 10.0 GB, 0.10 GB/s, 28 s left",
    ]
