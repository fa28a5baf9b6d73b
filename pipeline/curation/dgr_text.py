"""What the filters measure in a text, without a model: repeated n-grams, its script, its overlap with another."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence


def words(text: str) -> list[str]:
    """Its words in lower case, without what stands between them."""
    return re.findall(r"\w+(?:['\u2019]\w+)*", text.lower())


def ngrams(items: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """Every run of n items."""
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]


def most_repeated(items: Sequence[Hashable], n: int) -> int:
    """How often its most frequent n-gram stands in it; 0 if it has none."""
    return max(Counter(ngrams(items, n)).values(), default=0)


def script(text: str) -> str | None:
    """The script most of its letters belong to, as Unicode names it (LATIN, CJK, CYRILLIC ...); None without letters.

    It tells a change of language only where the script changes with it.
    """
    names = (unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha())
    found = Counter("CJK" if name in ("HIRAGANA", "KATAKANA") else name for name in names)  # Japanese mixes them
    return found.most_common(1)[0][0] if found else None


def rouge_l(candidate: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """F-measure of their longest common subsequence, in [0, 1]. Source: C.-Y. Lin (2004), ROUGE."""
    if not candidate or not reference:
        return 0.0
    return 2 * _common_subsequence(candidate, reference) / (len(candidate) + len(reference))


def _common_subsequence(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, a row of the table a machine word at a time.

    Source: L. Allison and T. I. Dix (1986), Inf. Process. Lett. 23:305-310, in H. Hyyrö's form (2004).
    """
    places: dict[Hashable, int] = {}
    for i, item in enumerate(first):
        places[item] = places.get(item, 0) | 1 << i
    full = (1 << len(first)) - 1
    row = full
    for item in second:
        matched = row & places.get(item, 0)
        row = (row + matched | row - matched) & full
    return len(first) - row.bit_count()
