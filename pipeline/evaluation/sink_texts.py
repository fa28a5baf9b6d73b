"""The two pools of texts of measure.py: read and checked before a model is, tokenised when their pass comes."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.config import Problems
from pipeline.data.chat import ChatEncoder, Example
from pipeline.data.rows import bad_rows
from pipeline.data.schema import Conversation, Keep, read_conversations

KEEP: dict[str, Keep] = {"harmful_data": "unsafe", "harmless_data": "safe"}  # of rows that carry is_safe


class Texts:
    """Both pools in one order, the harmful texts first.

    rows: the conversations. harmful: how many of them are harmful. lengths: tokens of each, after `encode_with`.
    """

    def __init__(self, specs: Mapping[str, str], *, max_texts: int | None, system_prompt: str | None) -> None:
        """specs: the source of each flag of KEEP. Errors: Problems for sources that cannot be read or hold too few."""
        self._pools: dict[str, list[Conversation]] = {}
        problems = []
        for flag, keep in KEEP.items():
            try:
                rows = read_conversations(specs[flag], flag=flag, keep=keep, system_prompt=system_prompt)
            except ValueError as error:
                problems += str(error).splitlines()
                continue
            if len(rows) < 2:
                problems.append(f"--{flag} {specs[flag]}: 1 usable text, and a standard error needs at least 2")
            self._pools[flag] = rows[:max_texts]
        if problems:
            raise Problems(problems)
        self.rows = [row for pool in self._pools.values() for row in pool]
        self.harmful = len(self._pools["harmful_data"])
        self.lengths: list[int] = []

    @property
    def counts(self) -> dict[str, int]:
        """Texts of each pool, by its flag."""
        return {flag: len(pool) for flag, pool in self._pools.items()}

    def encode_with(self, encoder: ChatEncoder, *, position: int) -> None:
        """Count every text's tokens. The tokens are made again for each pass: that costs little beside it, and any
        number of texts fits into memory.

        Errors: Problems for rows that cannot be encoded, or have no query after the sink at `position`.
        """
        self._encoder = encoder
        self.lengths = []
        problems: list[str] = []
        for flag, pool in self._pools.items():
            bad = []
            for row in pool:
                try:
                    self.lengths.append(len(encoder.encode(row).input_ids))
                except ValueError as error:
                    bad.append(str(error))
                    continue
                if self.lengths[-1] < position + 2:
                    bad.append(
                        f"--{flag}: {row.id} has {self.lengths[-1]} tokens, and --sink_token_position {position} "
                        f"needs {position + 2} for one query after the sink: lower it, or remove the row"
                    )
            if bad:
                problems += str(bad_rows(bad)).splitlines()
        if problems:
            raise Problems(problems)

    def example(self, text: int) -> Example:
        """A text's tokens."""
        return self._encoder.encode(self.rows[text])
