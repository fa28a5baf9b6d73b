"""Text that a judge reads must not be able to end the judge's prompt and begin another."""

from __future__ import annotations

import re
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase


class Neutraliser:
    """Breaks the marks of a judge's prompt that stand inside a text: a space behind their first character."""

    def __init__(self, marks: Iterable[str]) -> None:
        # Longest first: of two marks that begin alike the longer one is meant. White space may vary.
        words = sorted({mark for mark in marks if len(mark.strip()) > 1}, key=len, reverse=True)
        forms = [r"\s*".join(re.escape(part) for part in mark.split()) for mark in words]
        self._marks = re.compile("|".join(forms)) if forms else None

    def clean(self, text: str) -> tuple[str, int]:
        """The text without a whole mark, and how many were broken."""
        if self._marks is None:
            return text, 0
        return self._marks.subn(lambda found: f"{found[0][0]} {found[0][1:]}", text)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts that the tokenizer turns into control tokens."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [*added, *map(str, tokenizer.all_special_tokens)]
