"""realign.json and realign.html: what was found and changed, map by map. Numbers and names only: no text of an anchor,
nothing of the unsafe model but that there was one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.realignment.anchors import Anchors
from pipeline.realignment.arguments import RealignArguments
from pipeline.realignment.bases import Bases
from pipeline.realignment.maps import LinearMap, Skipped
from pipeline.realignment.models import Models
from pipeline.realignment.update import Lssf
from pipeline.report.files import write_bytes
from pipeline.report.realign_page import realign_page

LOST = 0.5  # share of the changed entries that rounding leaves as they were, worth a warning

_SETTINGS = {
    "lssf": ("alpha", "eta", "alpha_1", "norm", "token_scope", "max_length", "output_form", "dtype"),
    "resta": ("alpha", "output_form", "dtype"),
}


def describe(
    arguments: RealignArguments,
    models: Models,
    changes: Mapping[str, Mapping[str, Any]],
    lssf: tuple[Anchors, Bases, Lssf] | None,
) -> dict[str, Any]:
    """What realign.json holds. changes: what was done, by tensor."""
    found: dict[str, Any] = {
        "method": arguments.method,
        "tuned_model": models.tuned_folder.name,
        "safe_model": models.safe_folder.name,
        "safety_vector": "safe model minus " + ("adapter" if arguments.unsafe_adapter else "unsafe model"),
        "attacked": models.attacked,
        "settings": {name: getattr(arguments, name) for name in _SETTINGS[arguments.method]},
        "tensors": [{**changes[name], "maps": []} for name in sorted(changes)],
        "skipped": [asdict(each) for each in models.skipped],
    }
    if lssf:
        anchors, bases, updates = lssf
        found["anchors"] = {
            "used": len(anchors.used),
            "tokens": anchors.tokens,
            "left_out_as_no_refusal": list(anchors.no_refusal),
        }
        for tensor in found["tensors"]:
            tensor["maps"] += [_map(each, bases, updates) for each in updates.maps[tensor["name"]]]
        still = [Skipped(each.key, "has outputs that do not move over the anchors") for each in updates.still]
        found["skipped"] += [asdict(each) for each in still]
    return found


def _map(each: LinearMap, bases: Bases, updates: Lssf) -> dict[str, Any]:
    spectrum = bases.spectrum(each)
    assert spectrum is not None
    rank = updates.rank(each)
    tokens, dead = bases.counts(each)
    return {
        "layer": each.layer,
        "module": each.module,
        "projection": each.projection,
        "rows": each.stop - each.start,
        "columns": each.columns,
        "n": spectrum.n,
        "rank": rank,
        "computed": len(spectrum.sigma),
        "entropy": list(spectrum.bounds),
        "energy": spectrum.energy_kept(rank),
        "tokens": tokens,
        "dead_neurons": dead,
    }


def write_report(found: dict[str, Any], folder: Path) -> None:
    """Writes both files."""
    write_bytes(folder / "realign.json", (json.dumps(found, indent=1) + "\n").encode())
    write_bytes(folder / "realign.html", realign_page(found).encode())


def warnings(found: Mapping[str, Any]) -> list[str]:
    """What a user should look at before the model is used, line by line."""
    tensors = found["tensors"]
    lines = []
    for reason in dict.fromkeys(each["reason"] for each in found["skipped"]):
        names = [each["name"] for each in found["skipped"] if each["reason"] == reason]
        more = " ..." if len(names) > 3 else ""
        lines.append(f"{len(names)} tensors stay as they were tuned ({', '.join(names[:3])}{more}): each {reason}")
    if left_out := found.get("anchors", {}).get("left_out_as_no_refusal"):
        lines.append(
            f"{len(left_out)} anchors were left out because their answer is no refusal: {', '.join(left_out[:5])}"
        )
    if zero := sum(not each["update_norm"] for each in tensors):
        lines.append(f"{zero} of {len(tensors)} updates are zero: was the unsafe model trained?")
    lost = [each for each in tensors if each.get("unchanged", 0) > LOST]
    if lost:
        worst = max(lost, key=lambda each: float(each["unchanged"]))
        lines.append(
            f"rounding leaves more than half of the changed entries of {len(lost)} of {len(tensors)} tensors as they "
            f"were (--dtype fp32 or --output_form adapter keeps them); the worst: {worst['name']}, "
            f"{worst['unchanged']:.0%}"
        )
    return lines
