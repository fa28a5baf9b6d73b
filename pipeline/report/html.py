"""What all pages share: one file that asks for nothing, everything escaped, light and dark screens."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.report.figures import COLOURS, DARK_COLOURS
from pipeline.report.heatmap import colours


def render(template: str, filters: Mapping[str, Callable[..., str]], **content: Any) -> str:
    """A page from a template of this folder, which extends page.html."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": "{:.1%}".format, "signed": _signed, **filters}
    gradient = ", ".join(colours(np.linspace(-1, 1, 11)))
    return environment.get_template(template).render(
        colours=COLOURS, dark_colours=DARK_COLOURS, gradient=gradient, **content
    )


def base64_text(content: bytes) -> str:
    """What follows `data:image/png;base64,`."""
    return base64.b64encode(content).decode()


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")
