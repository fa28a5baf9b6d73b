"""The step benchmark's figures as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tools.bench.report import table

MIB = 2**20

Part = Mapping[str, Any]


def layouts(found: Part) -> str:
    """Surgery against SFT."""
    lines = [["layout", "SFT s", "Surgery s", "fwd+bwd ratio", "step ratio", "bound", "holds", "positive heads"]]
    for each in found["layouts"]:
        lines.append(
            [
                each["layout"], _seconds(each, "sft"), _seconds(each, "surgery"), _spread(each["ratio"]["passes"]),
                _spread(each["ratio"]["step"]), f"{each['bound']:.3f}", "yes" if all(each["holds"].values()) else "no",
                f"{each['positive_heads']:.0%}",
            ]
        )  # fmt: skip
    title = f"Surgery / SFT, {_model(found, 'layers')}: at most 1.05 x (1 + reference FLOPs / user FLOPs)"
    return _titled(title, lines)


def trl(found: Part) -> str:
    """SFT against SFTTrainer."""
    lines = [["layout", "SFT tok/s", "TRL tok/s", "TRL's faster mode", "SFT / TRL"]]
    for each in found["trl"]:
        tokens, faster = each["tokens_per_second"], each["faster"]
        lines.append(
            [
                each["layout"], f"{tokens['sft']['median']:.0f}", f"{tokens[faster]['median']:.0f}",
                faster, _spread(each["ratio"]),
            ]
        )  # fmt: skip
    version, skipped = found["trl"][0]["version"], found["trl"][0]["skipped"]
    notes = [f"- {mode}: left out, {reason}" for mode, reason in skipped.items()]
    return _titled(f"SFT beside SFTTrainer of trl {version}, whole steps, {_model(found, 'layers')}", lines, notes)


def lengths(found: Part) -> str:
    """Three eager passes against Surgery."""
    lines = [
        [
            "user tokens",
            "Surgery s",
            "eager s",
            "eager / Surgery, fwd+bwd",
            "step",
            "Surgery MiB",
            "eager MiB",
            "SFT MiB",
        ]
    ]
    for each in found["lengths"]:
        peaks = {name: f"{peak / MIB:.0f}" for name, peak in each["peak_bytes"].items()}
        lines.append(
            [
                str(each["tokens"]), _seconds(each, "surgery"), _seconds(each, "eager"),
                _spread(each["speedup"]["passes"]), _spread(each["speedup"]["step"]),
                peaks["surgery"], peaks["eager"], peaks["sft"],
            ]
        )  # fmt: skip
    worst = {
        name: max(each["difference"][name] for each in found["lengths"]) for name in found["lengths"][0]["difference"]
    }
    notes = [
        "- MiB: the most that the forward and backward passes hold above what lives between steps. The eager step's "
        "gradients are in it; ZeRO-3 keeps its own between steps.",
        "- References: two texts as long as the user's, at most 512 tokens.",
        "- Largest relative difference between Surgery's step and the eager one on the same rows: "
        + ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
        + ".",
    ]
    return _titled(f"Three eager passes / Surgery, {_model(found, 'eager_layers')}", lines, notes)


def memory(found: Part) -> str:
    """Peak memory over lengths."""
    lines = [["tokens of each text", "SFT MiB", "Surgery MiB", "above SFT"]]
    for each in found["memory"]["rows"]:
        sft, surgery = (each["peak_bytes"][name] / MIB for name in ("sft", "surgery"))
        lines.append([str(each["tokens"]), f"{sft:.0f}", f"{surgery:.0f}", f"{surgery - sft:.0f}"])
    fits, notes = found["memory"]["fits"], []
    if fits:
        above = fits["surgery_above_sft"]
        notes.append(
            f"- Above SFT: {above['bytes_per_token']:.0f} bytes a token of the length, straight line with "
            f"R2 = {above['linear_r_squared']:.5f}."
        )
        notes += [
            f"- {name}'s peak in the comparison above: straight line with R2 = {fits[name]['linear_r_squared']:.5f}; "
            f"{fits[name]['quadratic_share']:.0%} of it at the longest text grows with the square."
            for name in ("surgery", "eager")
        ]
    title = (
        f"Peak memory of forward and backward passes, {_model(found, 'eager_layers')}, a user text and two references"
    )
    return _titled(title, lines, notes)


TABLES = {"layouts": layouts, "trl": trl, "lengths": lengths, "memory": memory}


def _titled(title: str, lines: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    return "\n".join([f"{title}:", "", table(lines), *(["", *notes] if notes else [])])


def _model(found: Part, layers: str) -> str:
    settings = found["settings"]
    precision = "bf16" if settings["bf16"] else "fp32"
    return f"{settings['model_name_or_path']} ({settings[layers]} of {settings['model_layers']} layers), {precision}"


def _seconds(part: Part, name: str) -> str:
    steps = sorted(part["seconds"][name]["step"])
    return f"{steps[len(steps) // 2]:.3f}"


def _spread(quartiles: Part) -> str:
    return f"{quartiles['median']:.3f} [{quartiles['low']:.3f}, {quartiles['high']:.3f}]"
