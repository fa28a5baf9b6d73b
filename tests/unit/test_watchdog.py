"""Who is to blame, from what all ranks say: a difference is proof, being behind is not."""

from __future__ import annotations

import pytest

from pipeline.training.divergence import divergence, stragglers, table
from pipeline.training.heartbeat import BACKWARD, FORWARD, OPTIMIZER, Beat, Heart

WAITS = "/site/torch/distributed/distributed_c10d.py:4242 all_gather_into_tensor"
COMPUTES = "/repo/pipeline/data/streams.py:17 micro_batch"


def beat(rank: int, recent: str, *, calls: int | None = None, where: str = WAITS) -> Beat:
    """A rank whose last calls are `recent`."""
    return Beat(
        rank=rank, node=f"n{rank}", step=3, phase="training", calls=len(recent) if calls is None else calls,
        recent=recent, forwards=recent.count("f"), backwards=recent.count("b"), shape="1x512", idle=7.0, time=0.0,
        where=[where],
    )  # fmt: skip


@pytest.mark.parametrize(
    "calls",
    [
        ["fbofb", "fbofb", "fbofb"],
        ["fbofb", "fbof", "fb"],  # behind by whole passes
        ["fbofb", "", "fb"],  # one that has not begun
    ],
)
def test_ranks_that_are_behind_do_not_diverge(calls: list[str]) -> None:
    assert divergence([beat(rank, each) for rank, each in enumerate(calls)]) is None


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        (["fbof", "fbof", "fbob"], "rank 2 (n2) made a backward pass, where 2 of 3 ranks made a forward pass (call 4"),
        (
            ["fbof", "fbo", "fboo"],
            "rank 2 (n2) made an optimizer step, where 1 of 3 ranks made a forward pass (call 4",
        ),
        (["fbc", "fbe"], "rank 1 (n1) made an evaluation, where 1 of 2 ranks made a checkpoint (call 3"),  # a tie
        (["ofb", "fbo", "fbo"], "rank 0 (n0) made an optimizer step, where 2 of 3 ranks made a forward pass (call 1"),
    ],
)
def test_the_first_call_that_differs_is_named_with_its_rank(calls: list[str], message: str) -> None:
    found = divergence([beat(rank, each) for rank, each in enumerate(calls)])
    assert found is not None
    assert found.startswith(message)


def test_windows_that_begin_elsewhere_are_compared_where_both_look() -> None:
    assert divergence([beat(0, "bofb", calls=1005), beat(1, "fbof", calls=1004)]) is None
    found = divergence([beat(0, "bofb", calls=1005), beat(1, "bof", calls=1005)])
    assert found is not None
    assert "(call 1003 of the run)" in found


def test_the_others_wait_for_the_rank_with_fewest_calls() -> None:
    found = stragglers([beat(0, "fbof"), beat(1, "fbo", where=COMPUTES), beat(2, "fbof")])
    assert found == f"2 of 3 ranks wait for rank 1 (n1), training, in {COMPUTES}"


def test_among_equals_the_one_that_is_in_no_collective() -> None:
    found = stragglers([beat(0, "fbof"), beat(1, "fbof", where=COMPUTES), beat(2, "fbof")])
    assert found == f"2 of 3 ranks wait for rank 1 (n1), training, in {COMPUTES}"
    assert "no rank stands out" in stragglers([beat(0, "fbof"), beat(1, "fbof")])


def test_the_table_has_each_ranks_counters() -> None:
    assert table([beat(1, "fbf"), beat(0, "fb")]) == [
        "  rank 0 (n0): training at step 3, 1 forward and 1 backward passes, batch 1x512, nothing new for 7 s",
        "  rank 1 (n1): training at step 3, 2 forward and 1 backward passes, batch 1x512, nothing new for 7 s",
    ]


def test_a_heart_keeps_a_window_and_counts_all() -> None:
    heart = Heart()
    heart.phase("training", 1)
    for _ in range(400):
        heart.call(FORWARD, "1x64")
        heart.call(BACKWARD)
    heart.call(OPTIMIZER)
    told = heart.beat(0, "n0", [])
    assert (told.calls, told.forwards, told.backwards, told.shape) == (801, 400, 400, "1x64")
    assert len(told.recent) == 512
    assert told.recent.endswith("fbo")
