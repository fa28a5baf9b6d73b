"""What the doctor makes of many ranks' answers: which node is other than the rest, which rank is wrong or slow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from pipeline.doctor.collective import Trial, judge, shifts
from pipeline.doctor.compare import Report, compare
from pipeline.doctor.finding import Finding
from pipeline.doctor.report import Row, job_lines
from pipeline.doctor.roll import Place, place
from pipeline.slurm_job import expand

NAMES = {rank: f"rank {rank} of n{rank}" for rank in range(8)}


def reports(
    versions: Sequence[Mapping[str, str]] = (), clocks: Sequence[float] = (), rates: Sequence[float] = ()
) -> list[Report]:
    """A rank a node, n0 to n3."""
    found = []
    for rank in range(4):
        same = versions[rank] if versions else {}
        finding = Finding("x", "ok", "", same=same, rates={"speed": rates[rank]} if rates else {})
        found.append(Report(rank, f"n{rank}", [finding], clocks[rank] if clocks else 100.0))
    return found


def troubles(found: Sequence[Report]) -> list[tuple[str, str, str]]:
    return [(node, each.level, each.found) for node, each in compare(found) if each.level != "ok"]


def test_the_node_that_differs_is_named_even_if_it_is_that_of_rank_0() -> None:
    versions = [{"peft": "1", "torch": "2"}, *[{"peft": "3", "torch": "2"}] * 3]
    assert troubles(reports(versions)) == [("n0", "failed", "peft 1 (others 3)")]


def test_in_doubt_rank_0_is_right() -> None:
    versions = [{"peft": "1"}, {"peft": "1"}, {"peft": "3"}, {}]
    assert troubles(reports(versions)) == [
        ("n2", "failed", "peft 3 (others 1)"),
        ("n3", "failed", "peft nothing (others 1)"),
    ]
    versions = [{"peft": "1"}, {"peft": "1"}, {"peft": "3"}, {"peft": "3"}]
    assert [node for node, _, _ in troubles(reports(versions))] == ["n2", "n3"]


def test_clocks() -> None:
    assert troubles(reports(clocks=[100.0, 100.2, 95.0, 100.1])) == [("n2", "warning", "5.0 s behind")]
    assert not troubles(reports(clocks=[100.0, 100.2, 100.3, 100.1]))


def test_a_rate_far_below_the_others() -> None:
    found = troubles(reports(rates=[700.0, 690.0, 300.0, 710.0]))
    assert found == [("n2", "warning", "rank 2: 300, and half of the ranks have 695 or more")]
    assert not troubles(reports(rates=[700.0, 690.0, 400.0, 710.0]))


def trial(rank: int, size: int, *, right: bool = True, slow: Sequence[int] = (), liar: int | None = None) -> Trial:
    """A rank's answers: exchanges at every distance, slow with the `slow` ranks, wrong from the `liar`."""
    steps: dict[str, dict[str, object]] = {"all-reduce": {"step": "all-reduce", "right": right, "bandwidth": 5e9}}
    for by in range(1, size):
        source = (rank - by) % size
        bandwidth = 1e9 if {rank, source} & set(slow) else 9e9
        steps[f"shift {by}"] = {"from": source, "right": source != liar, "bandwidth": bandwidth}
    return Trial(steps, "left", None)


def judged(trials: Mapping[int, Trial]) -> list[tuple[int, str, str, str]]:
    return [(rank, each.check, each.level, each.found) for rank, each in judge("nccl", trials, NAMES)]


def test_good_collectives() -> None:
    found = judged({rank: trial(rank, 4) for rank in range(4)})
    assert [(check, level) for _, check, level, _ in found] == [("all-reduce (nccl)", "ok"), ("connections", "ok")]


def test_the_slow_rank_is_named_and_not_its_partners() -> None:
    found = judged({rank: trial(rank, 4, slow=[2]) for rank in range(4)})
    assert [(rank, level) for rank, check, level, _ in found if check == "connections"] == [(2, "warning")]
    assert "rank 2 of n2 reaches nobody faster than 1.0 GB/s; half of the ranks 9.0 GB/s" in found[-1][3]


def test_a_rank_whose_data_arrives_wrong_everywhere_is_named() -> None:
    found = judged({rank: trial(rank, 4, right=False, liar=1) for rank in range(4)})
    sums = [(rank, text) for rank, check, _, text in found if check == "all-reduce (nccl)"]
    assert sums == [(1, "rank 1 of n1 spoils the sum: 4 of 4 ranks have a wrong one")]
    assert {text for _, check, _, text in found if check == "connections"} == {
        f"{NAMES[rank]} received wrong data from rank 1 of n1" for rank in (0, 2, 3)
    }


def test_a_rank_that_alone_has_a_wrong_sum_is_named() -> None:
    found = judged({rank: trial(rank, 4, right=rank != 3) for rank in range(4)})
    assert found[0][:3] == (3, "all-reduce (nccl)", "failed")
    assert found[0][3] == "rank 3 of n3 spoils the sum: 1 of 4 ranks have a wrong one"


def test_of_broken_ranks_the_one_that_got_least_far_is_to_be_looked_at() -> None:
    trials = {rank: trial(rank, 3) for rank in range(3)}
    trials[0] = Trial({"all-reduce": {}}, "shift 1", "python exited with 1: RuntimeError: connection closed by peer")
    trials[1] = Trial({}, "all-reduce", "python was killed by SIGBUS")
    findings = dict(judge("nccl", trials, NAMES))
    assert findings[1].found == "rank 1 of n1, all-reduce: python was killed by SIGBUS"
    assert findings[1].remedy
    assert not findings[0].remedy


@pytest.mark.parametrize(
    ("ranks", "per_node", "distances"),
    [
        (1, 1, []),
        (2, 2, [1]),
        (4, 4, [1, 2, 3]),
        (16, 8, [8]),
        (32, 8, [8, 16, 24]),
        (6, 0, [1, 2, 3, 4, 5]),
        (512, 8, [8, 16, 24, 32, 40, 48, 56, 64]),
    ],
)
def test_exchanges_cross_nodes(ranks: int, per_node: int, distances: list[int]) -> None:
    assert shifts(ranks, per_node) == distances


@pytest.mark.parametrize(
    ("short", "names"),
    [
        ("", []),
        ("gpu7", ["gpu7"]),
        ("n[01-03,7],m", ["n01", "n02", "n03", "n7", "m"]),
        ("rack1-n[9-11]-ib,x[1]", ["rack1-n9-ib", "rack1-n10-ib", "rack1-n11-ib", "x1"]),
    ],
)
def test_names_of_slurm_nodes(short: str, names: list[str]) -> None:
    assert expand(short) == names


def test_place_prefers_the_launchers_variables() -> None:
    slurm = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}
    meeting = {"MASTER_ADDR": "n0", "MASTER_PORT": "29500"}
    assert place({**slurm, **meeting}) == Place(3, 1, 4, "n0", 29500)
    launcher = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    assert place({**slurm, **launcher, **meeting}) == Place(1, 1, 2, "n0", 29500)
    with pytest.raises(ValueError, match="MASTER_ADDR and MASTER_PORT"):
        place(slurm)


def test_job_report_names_the_bad_node_and_how_to_leave_it_out() -> None:
    rows = [Row(node, rank, Finding("python", "ok", "3.11.9")) for rank, node in enumerate(["a", "b", "c"])]
    rows.append(Row("b", 1, Finding("device 0", "failed", "wrong", "drain it")))
    text = list(job_lines(rows))
    assert text[0] == f"ok       {'python':<24} a (and 2 more nodes): 3.11.9"
    assert text[1] == f"failed   {'device 0':<24} b: wrong"
    assert "b      1         0       1   <- not ready" in text
    assert text[-2:] == ["not ready: device 0 on b", "to go on without: sbatch --exclude=b ..."]
