"""The loss-matched control: the checkpoint of one run that has the loss with which another run ends, or that another
model was assessed with.

A defense that learns more slowly, or a repair that takes back what was learned, looks safer than plain SFT without
protecting anything. So it is compared with the SFT checkpoint at the same cross-entropy; what remains of the
difference is the defense's own.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pipeline.checkpoints.markers import complete_checkpoints
from pipeline.report.records import read_json, series


@dataclass(frozen=True)
class Match:
    """match.json. `checkpoint` is relative to the folder of match.json.

    value, target: the metric of that checkpoint, and of the other run at its end (or the other model's, as assessed);
        gap = value - target.
    bracket: [step, value] of the saved checkpoints nearest to the target from below and from above, where there are
        such: how close a match was possible.
    in_range: the target lies between saved values. If not, the control is the nearest end of what was saved.
    """

    checkpoint: str
    run: str
    like: str
    step: int
    metric: str
    value: float
    target: float
    gap: float
    bracket: list[tuple[int, float]]
    in_range: bool

    def sentence(self) -> str:
        """What was matched, and how well, for people."""
        saved = " and ".join(f"{value:.4f} (step {step})" for step, value in self.bracket)
        between = "between the saved" if self.in_range else "OUTSIDE the range of what was saved; nearest"
        return (
            f"{self.run} at step {self.step}: {self.metric} {self.value:.4f} against {self.target:.4f} of {self.like} "
            f"(gap {self.gap:+.4f}); the target is {between} {saved}"
        )


def match_checkpoint(run: Path, like: Path, metric: str, output_dir: Path) -> Match:
    """Choose the complete checkpoint of `run` whose `metric` (`eval_NAME_loss`) is nearest to the final one of `like`,
    a training run, or to the loss NAME of `like`, an assessment.

    Writes `output_dir`/match.json and the symbolic link `output_dir`/checkpoint. Of two equally near ones the earlier
    is taken. Errors: ValueError if `metric` is missing, or was evaluated at no step with a complete checkpoint.
    """
    target, values = _target(like, metric), series(run, metric)
    folders = {int(folder.name.removeprefix("checkpoint-")): folder for folder in complete_checkpoints(run)}
    saved = {step: values[step] for step in folders if step in values}
    if not saved:
        raise ValueError(
            f"{run}: no complete checkpoint at a step with {metric}: saved at {sorted(folders) or 'no step'}, "
            f"evaluated at {list(values)}; train with --save_steps and --eval_steps that meet"
        )
    step = min(saved, key=lambda each: (abs(saved[each] - target), each))
    by_value = sorted(saved.items(), key=lambda each: each[1])
    below = [each for each in by_value if each[1] <= target]
    above = [each for each in by_value if each[1] > target]
    match = Match(
        checkpoint=os.path.relpath(folders[step], output_dir),
        run=run.name,
        like=like.name,
        step=step,
        metric=metric,
        value=saved[step],
        target=target,
        gap=saved[step] - target,
        bracket=below[-1:] + above[:1],
        in_range=by_value[0][1] <= target <= by_value[-1][1],
    )
    _write(match, output_dir)
    return match


def _target(like: Path, metric: str) -> float:
    if not (like / "results.json").is_file():
        return list(series(like, metric).values())[-1]
    losses = read_json(like / "results.json").get("losses", {})
    name = metric.removeprefix("eval_").removesuffix("_loss")
    if name not in losses or metric != f"eval_{name}_loss":
        raise ValueError(
            f"{like / 'results.json'}: no loss for {metric}; it has "
            f"{[f'eval_{each}_loss' for each in losses] or 'none'}: assess with --loss_data {name}=ROWS"
        )
    return float(losses[name]["value"])


def read_match(folder: Path) -> Match:
    """What match_checkpoint wrote into a folder. Errors: ValueError if match.json is missing or not one."""
    content = read_json(folder / "match.json")
    if set(content) != {each.name for each in fields(Match)}:
        raise ValueError(f"{folder / 'match.json'}: not what match_checkpoint.py writes")
    return Match(**content)


def _write(match: Match, output_dir: Path) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    link, temporary = output_dir / "checkpoint", output_dir / "checkpoint.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(match.checkpoint, target_is_directory=True)
    temporary.replace(link)
    written = output_dir / "match.json.tmp"
    written.write_text(json.dumps(asdict(match), indent=1) + "\n", encoding="utf-8")
    written.replace(output_dir / "match.json")
