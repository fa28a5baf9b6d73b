"""From what all ranks say they are doing to which of them is to blame; no process, no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pipeline.training.heartbeat import NAMES, Beat

# Files in which a rank waits for others.
WAITING = ("torch/distributed/", "deepspeed/comm/")


def divergence(beats: Sequence[Beat]) -> str | None:
    """The first call that some rank made otherwise than the others, and which; None while all agree.

    All ranks make the same calls in the same order, so one difference is proof, however short the time. A rank that is
    behind has made the same calls, only fewer.
    """
    first = max((beat.calls - len(beat.recent) for beat in beats), default=0)
    last = max((beat.calls for beat in beats), default=0)
    for index in range(first, last):
        made = {beat.rank: letter for beat in beats if (letter := _call(beat, index))}
        if len(set(made.values())) > 1:
            # The usual call is that of most ranks, and between two of them rank 0's.
            counts = Counter(made[rank] for rank in sorted(made))
            usual = counts.most_common(1)[0][0]
            odd = [beat for beat in beats if made.get(beat.rank, usual) != usual]
            each = "; ".join(f"{_name(beat)} made {NAMES[made[beat.rank]]}" for beat in odd)
            others = f"{counts[usual]} of {len(beats)} ranks made {NAMES[usual]}"
            return f"{each}, where {others} (call {index + 1} of the run)"
    return None


def stragglers(beats: Sequence[Beat]) -> str:
    """Which ranks the others wait for, when none goes on: those that made fewest calls; among equals, those that do
    not wait for anybody."""
    fewest = min(beat.calls for beat in beats)
    late = [beat for beat in beats if beat.calls == fewest]
    if len(late) == len(beats):
        late = [beat for beat in beats if not waits(beat)]
    if not late or len(late) == len(beats):
        return "no rank stands out: look at the stacks"
    names = "; ".join(
        f"{_name(beat)}, {beat.phase}, in {beat.where[-1] if beat.where else 'unknown code'}" for beat in late
    )
    return f"{len(beats) - len(late)} of {len(beats)} ranks wait for {names}"


def waits(beat: Beat) -> bool:
    """Whether a rank's main thread is inside a collective."""
    return any(part in frame for frame in beat.where for part in WAITING)


def table(beats: Sequence[Beat]) -> list[str]:
    """One line a rank, with its counters."""
    return [
        f"  {_name(beat)}: {beat.phase} at step {beat.step}, {beat.forwards} forward and {beat.backwards} backward "
        f"passes, batch {beat.shape or '-'}, nothing new for {beat.idle:.0f} s"
        for beat in sorted(beats, key=lambda beat: beat.rank)
    ]


def _call(beat: Beat, index: int) -> str | None:
    place = index - (beat.calls - len(beat.recent))
    return beat.recent[place] if 0 <= place < len(beat.recent) else None


def _name(beat: Beat) -> str:
    return f"rank {beat.rank} ({beat.node})"
