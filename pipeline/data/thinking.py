"""The thought of a reasoning model's turn, as DeepSeek-R1's distilled models and Qwen3 write it: `<think>`, the
thought, `</think>`, the answer.

What their chat templates do with it differs. Qwen3's keeps the thought of the last turn and drops those before; R1's
drops every thought, the last one too. R1's newer templates and Qwen3's thinking-only ones write the opening marker as
the end of the generation prompt, so that what the model writes has the closing marker alone.
"""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


def join_thought(thought: str, answer: str) -> str:
    """A turn as both families generate it; no thought is written as an empty one."""
    return f"{OPEN}\n{thought}\n{CLOSE}\n\n{answer}"


def split_thought(turn: str) -> tuple[str | None, str]:
    """Thought and answer, None for a turn without markers; white space around both is cut.

    The opening marker may be missing, as in text behind a generation prompt that ends with it.

    Raises:
        ValueError: more than one thought, or a marker in the wrong place.
    """
    if OPEN not in turn and CLOSE not in turn:
        return None, turn.strip()
    thought, _, answer = turn.partition(CLOSE)
    thought = thought.lstrip().removeprefix(OPEN)
    if CLOSE not in turn or any(marker in part for marker in (OPEN, CLOSE) for part in (thought, answer)):
        raise ValueError(
            f"expected one thought, {OPEN} ... {CLOSE} and then the answer; it has {turn.count(OPEN)} {OPEN} and "
            f"{turn.count(CLOSE)} {CLOSE}"
        )
    return thought.strip(), answer.strip()
