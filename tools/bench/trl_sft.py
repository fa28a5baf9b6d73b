"""TRL's SFTTrainer on the same rows, model folder and DeepSpeed file, in a process of its own that makes one training
step at a time when asked, so that its steps can stand between the product's.

    parent  -> a line on stdin      child: one step
    child   -> {"seconds": s}       from the batch on the device to the optimizer's step, as TRL's callbacks see it
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

ROOT = Path(__file__).resolve().parents[2]
MODES = ("padded", "padding_free")


def check_trl() -> None:
    """Errors: ValueError if TRL is not installed, with what installs it."""
    if importlib.util.find_spec("trl") is None:
        raise ValueError("--trl: the package trl is not installed: pip install -e '.[bench]'")


def missing_mode(mode: str, device: torch.device) -> str | None:
    """Why SFTTrainer cannot run in a mode here; None if it can."""
    if mode == "padding_free" and device.type == "cuda" and importlib.util.find_spec("flash_attn") is None:
        return "padding-free rows need flash-attn on CUDA, which is not installed: run `make setup-gpu`"
    return None


class TrlProcess:
    """A child process that trains with SFTTrainer. Calls are training steps and return their seconds."""

    def __init__(
        self, mode: str, rows: Sequence[tuple[list[int], list[int]]], *, model: str, ds_config: str, bf16: bool
    ) -> None:
        """rows: (input_ids, labels) of the one batch of every step; mode: one of MODES."""
        self.folder = tempfile.TemporaryDirectory()
        settings = Path(self.folder.name) / "settings.json"
        settings.write_text(
            json.dumps({"mode": mode, "rows": rows, "model": model, "ds_config": ds_config, "bf16": bf16})
        )
        self._log = (Path(self.folder.name) / "log.txt").open("w+", encoding="utf-8")
        # The parent is rank 0 of a process group of its own, at an address that the child must not join.
        ranks = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE")
        self._child = subprocess.Popen(
            [sys.executable, __file__, str(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            text=True, bufsize=1, env={name: value for name, value in os.environ.items() if name not in ranks},
        )  # fmt: skip
        self.version = str(self._read()["version"])

    def __call__(self) -> float:
        assert self._child.stdin is not None
        self._child.stdin.write("step\n")
        return float(self._read()["seconds"])

    def _read(self) -> dict[str, Any]:
        """The child's next answer. Errors: ValueError with the end of its log if it died."""
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._log.seek(0)
        raise ValueError(f"--trl: SFTTrainer ended with {self._child.wait()}:\n{self._log.read()[-3000:]}")

    def __enter__(self) -> TrlProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.kill()
        self._child.wait()
        self._log.close()
        self.folder.cleanup()


def train(settings: dict[str, Any], answers: TextIO) -> None:
    """The child: train until the parent goes away."""
    from pipeline.training.distributed import initialize_process_group, world
    from tools.bench.timing import clock

    device = initialize_process_group(world())  # with the product's allocator settings
    import datasets
    import trl
    from transformers import TrainerCallback

    class OneStepAtATime(TrainerCallback):
        def __init__(self) -> None:
            self.began: float | None = None

        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            if self.began is None:
                print(json.dumps({"version": trl.__version__}), file=answers, flush=True)
            if not sys.stdin.readline():
                os._exit(0)
            self.began = clock(device)

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            assert self.began is not None
            print(json.dumps({"seconds": clock(device) - self.began}), file=answers, flush=True)

    ids, labels = zip(*settings["rows"], strict=True)
    padding_free = settings["mode"] == "padding_free"
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.SFTConfig(
            output_dir=folder, deepspeed=settings["ds_config"], bf16=settings["bf16"], use_cpu=device.type == "cpu",
            per_device_train_batch_size=len(ids), max_steps=10**9, learning_rate=0.0, weight_decay=0.0,
            max_length=None, padding_free=padding_free, packing=False, gradient_checkpointing=False,
            logging_strategy="no", save_strategy="no", report_to="none", optim="adamw_torch",
            model_init_kwargs={"dtype": torch.bfloat16 if settings["bf16"] else torch.float32}
            | ({"attn_implementation": "flash_attention_2"} if padding_free and device.type == "cuda" else {}),
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            settings["model"], args=arguments, callbacks=[OneStepAtATime()],
            train_dataset=datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}),
        )  # fmt: skip
        trainer.train()


def main() -> None:
    """Start the child: answers alone go to the parent's pipe, what libraries print goes to the log."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    train(json.loads(Path(sys.argv[1]).read_text()), answers)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    main()
