"""The texts that define a protocol, each quoted exactly in a file of `templates/`; SOURCES.json says from where."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("templates")


def read_template(name: str) -> str:
    """A file of `templates/`, byte for byte (no newline is changed)."""
    return (FOLDER / name).read_bytes().decode()


def read_list(name: str) -> list[str]:
    """A JSON list of `templates/`."""
    found: list[str] = json.loads(read_template(name))
    return found


def sources() -> dict[str, dict[str, Any]]:
    """Of each file: repository, commit, path there, licence, sha256."""
    found: dict[str, dict[str, Any]] = json.loads(read_template("SOURCES.json"))
    return found


def sha256(text: str) -> str:
    """Of the text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def fill(template: str, **values: str) -> str:
    """The template with each `{name}` replaced, in one pass: a `{name}` inside a value stays what it is."""
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda found: values[found[1]], template)
