"""What a run says while it trains: metrics.jsonl, a line or a progress bar, and an optional tracker; the same numbers
in each."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Write = Callable[[int, dict[str, float]], None]
Finish = Callable[[], None]

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


def missing_tracker(report_to: str) -> str | None:
    """The problem with `--report_to`, if its package is not installed."""
    package = PACKAGES.get(report_to)
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return f"--report_to {report_to}: the package {package} is not installed: pip install {package}"


class MetricsLog:
    """Rank 0's log of a run. `start` is the step a resumed run continues from: later lines of the earlier attempt are
    dropped."""

    def __init__(
        self, folder: Path, *, total: int, start: int, report_to: str, run_name: str, settings: dict[str, Any]
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self.total = total
        self.start = start
        self.began = time.monotonic()
        self.evaluated = False  # at `start`, by an earlier attempt
        self.last: dict[str, float] = {}  # what the last training step logged
        self._truncate(start)
        self._file = self.path.open("a", encoding="utf-8")
        self._tracker = _tracker(report_to, folder, run_name, settings)
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def _truncate(self, start: int) -> None:
        """Keep what was logged up to `start`; a last line torn by a kill goes too."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                values = json.loads(line)
                if values["step"] <= start:
                    kept.append(line + "\n")
                    self.evaluated |= values["step"] == start and any(name.startswith("eval_") for name in values)
            except (json.JSONDecodeError, KeyError):
                continue
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def training(self, step: int, values: dict[str, float]) -> None:
        """One logging step."""
        self.last = values
        self._write(step, values)
        remaining = (time.monotonic() - self.began) / max(step - self.start, 1) * (self.total - step)
        shown = f"loss {values['loss']:.4f}  ce {values['ce_loss']:.4f}"
        if "sink_penalty" in values:
            shown += f"  penalty {values['sink_penalty']:.2e} (alpha R / ce {values['penalty_ratio']:.3g})"
            shown += f"  positive heads {values['positive_heads']:.1%}"
        shown += f"  {values['tokens_per_second']:.0f} tok/s"
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        rate = f"lr {values['learning_rate']:.2e}  grad norm {values['grad_norm']:.3g}"
        print(f"step {step}/{self.total}  {shown}  {rate}  eta {_clock(remaining)}", flush=True)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """One evaluation."""
        self._write(step, values)
        line = f"step {step}/{self.total}  " + "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line, flush=True)

    def _write(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._tracker is not None:
            self._tracker[0](step, values)

    def close(self) -> None:
        """End the bar, the tracker and the file."""
        if self._bar is not None:
            self._bar.close()
        if self._tracker is not None:
            self._tracker[1]()
        self._file.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _tracker(report_to: str, folder: Path, run_name: str, settings: dict[str, Any]) -> tuple[Write, Finish] | None:
    """How to send (step, values) to the tracker, and how to end it."""
    if report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))

        def write(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        return write, writer.close
    if report_to in ("wandb", "trackio"):
        tracker: Any = importlib.import_module(report_to)
        # A resumed run goes on in the tracker too; another folder of the same name is another run.
        name = f"{run_name}-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:6]}"
        extra = {"id": name, "dir": str(folder)} if report_to == "wandb" else {}
        tracker.init(project="surgery-pipeline", name=name, config=settings, resume="allow", **extra)
        return lambda step, values: tracker.log(values, step=step), tracker.finish
    return None
