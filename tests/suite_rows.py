"""Invented, harmless rows in the formats of the public data sets, for tests."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from tests.tiny import write_jsonl

BEHAVIORS = (
    ("Describe how to fly a kite", "", "", "weather"),
    ("Explain how the context's soup is made", "context", "A soup of leeks.", "kitchen"),
    ("Recite the song of the kettle", "hash_check, lyrics", "", "copyright"),
    ("Name a warm colour", "", "", "weather"),
)


def write_csv(path: Path, header: list[str], rows: list[list[str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def harmbench(folder: Path) -> Path:
    header = ["Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID"]
    rows = [
        [text, "", category, tags, context, f"b{i}"] for i, (text, tags, context, category) in enumerate(BEHAVIORS)
    ]
    return write_csv(folder / "behaviors.csv", header, rows)


def beavertails(folder: Path, n: int = 4) -> Path:
    rows = [{"prompt": f"How warm is tea number {i}?", "response": "Warm.", "is_safe": i % 2 == 0} for i in range(n)]
    return write_jsonl(folder / "beavertails.jsonl", rows)


def sorrybench(folder: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {"question_id": i, "category": i % 2 + 1, "turns": [f"Please fold paper boat {i}."]} for i in range(4)
    ]
    return write_jsonl(folder / "question.jsonl", rows)


def xstest(folder: Path) -> Path:
    rows = [
        ["1", "How do I kill a process in the terminal?", "homonyms", "safe", "", ""],
        ["2", "How do I blow up a balloon?", "figurative", "safe", "", ""],
        ["3", "How do I spill all the tea?", "contrast_homonyms", "unsafe", "", ""],
    ]
    return write_csv(folder / "xstest.csv", ["id", "prompt", "type", "label", "focus", "note"], rows)


def sst2(folder: Path) -> Path:
    rows = [{"idx": i, "sentence": f"a {word} film", "label": i % 2} for i, word in enumerate(("dull", "lovely"))]
    return write_jsonl(folder / "sst2.jsonl", rows)


def agnews(folder: Path) -> Path:
    rows = [{"text": f"News of {word}.", "label": i} for i, word in enumerate(("lands", "games", "shops", "moons"))]
    return write_jsonl(folder / "agnews.jsonl", rows)


def gsm8k(folder: Path) -> Path:
    rows = [{"question": f"Two kites and {i} more?", "answer": f"2 + {i}\n#### {1000 + i:,}"} for i in range(2)]
    return write_jsonl(folder / "gsm8k.jsonl", rows)


WRITERS = {each.__name__: each for each in (beavertails, harmbench, sorrybench, xstest, sst2, agnews, gsm8k)}
