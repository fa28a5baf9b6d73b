"""The statistics of measure.py against their formulas, and the pictures made of them."""

from __future__ import annotations

import io
import json
import math
import statistics
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.evaluation.sink_pass import TOKENS_A_PASS, passes
from pipeline.evaluation.sink_statistics import head_statistics
from pipeline.report.comparison import read_rows
from pipeline.report.positive_heads import write_hypothesis
from pipeline.report.significance import holm, sign_test
from pipeline.report.sink_page import page, write_pictures
from tests.runs import write_assessment, write_json
from tests.sinks import measurement, score


def p_value(positive: int, negative: int) -> float:
    return float(sign_test(np.array([positive]), np.array([negative]))[0])


@given(positive=st.integers(0, 60), negative=st.integers(0, 60))
def test_the_sign_test_is_the_sum_over_outcomes_as_unlikely(positive: int, negative: int) -> None:
    n = positive + negative
    ways = [math.comb(n, k) for k in range(n + 1)]
    expected = Fraction(sum(each for each in ways if each <= ways[positive]), 2**n)
    assert p_value(positive, negative) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(
    ("positive", "negative", "p"),
    # Siegel and Castellan (1988), table D: one-tailed cumulative binomial probabilities; doubled.
    [(12, 3, 2 * 0.018), (5, 0, 2 * 0.031), (8, 4, 2 * 0.194), (7, 7, 1.0), (0, 0, 1.0)],
)
def test_the_sign_test_gives_tabled_values(positive: int, negative: int, p: float) -> None:
    assert p_value(positive, negative) == pytest.approx(p, abs=1e-3)


def test_the_sign_test_is_exact_where_floats_underflow() -> None:
    # 2 * 2^-1000, and three in favour of the other sign among 1000.
    assert p_value(1000, 0) == pytest.approx(2.0**-999, rel=1e-12)
    assert p_value(997, 3) == pytest.approx(2 * (1 + 1000 + 499500 + 166167000) * 2.0**-1000, rel=1e-12)
    assert p_value(2500, 2400) == pytest.approx(math.erfc(99 / math.sqrt(2 * 4900)), rel=5e-3)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_rejects_what_the_step_down_procedure_rejects(values: list[float]) -> None:
    adjusted = holm(np.array(values))
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
            if values[index] * (len(values) - rank) >= level:
                break
            rejected.add(index)
        assert {int(i) for i in np.flatnonzero(adjusted < level)} == rejected


def test_statistics_of_pools_of_different_sizes() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.random((7, 2, 3)).astype(np.float32), generator.random((5, 2, 3)).astype(np.float32)
    x[0, 1, 2] = y[0, 1, 2]  # a tie
    found = head_statistics(x, y)
    a, b = x[:, 1, 2].tolist(), y[:, 1, 2].tolist()
    assert found.divergence[1, 2] == pytest.approx(statistics.fmean(a) - statistics.fmean(b), rel=1e-12)
    error = math.sqrt(statistics.variance(a) / 7 + statistics.variance(b) / 5)
    assert found.standard_error[1, 2] == pytest.approx(error, rel=1e-12)
    positive = sum(one > other for one, other in zip(a[1:], b[1:], strict=False))
    assert (found.pairs, found.positive_pairs[1, 2]) == (5, positive)
    assert found.p_value[1, 2] == p_value(positive, 4 - positive)


def test_a_head_is_significant_only_if_mean_and_majority_agree() -> None:
    shape = (60, 1, 4)
    x, y = np.full(shape, 0.5, np.float32), np.full(shape, 0.5, np.float32)
    x[:, 0, 0] += 0.01
    x[:, 0, 1] -= 0.01
    x[:, 0, 2] += 0.01
    x[0, 0, 2] = -1.0  # one text turns the mean round
    found = head_statistics(x, y)
    assert found.significant.tolist() == [[1, -1, 0, 0]]
    assert found.p_holm[0, 2] < 1e-10
    assert found.p_value[0, 3] == 1
    record = found.record()
    assert (record["significant_positive_heads"], record["significant_negative_heads"]) == (1, 1)
    assert record["positive_heads"] == 0.25
    assert record["penalty"] == pytest.approx(0.01 / 4, rel=1e-5)
    json.dumps(record)  # plain numbers


@given(st.lists(st.integers(2, 5000), max_size=40))
def test_passes_hold_every_text_once_in_order_within_the_budget(lengths: list[int]) -> None:
    groups = passes(lengths)
    assert [text for group in groups for text in group] == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(lengths[text] for text in group) <= TOKENS_A_PASS
    for one, other in zip(groups, groups[1:], strict=False):
        assert sum(lengths[text] for text in [*one, other.start]) > TOKENS_A_PASS


def test_the_page_escapes_what_it_shows_and_asks_for_nothing() -> None:
    found = measurement(model="models/<b>x", system_prompt='"><script>alert(1)</script>', steps=(1, 2))
    shown = page(found, {"positive_heads.png": b"png"})
    assert "<b>" not in shown
    assert "alert(1)</script>" not in shown
    assert "http" not in shown.replace("http-equiv", "")
    assert "src=" not in shown.replace('src="data:image/png;base64,', "")


def test_the_heat_map_is_red_where_positive_and_blue_where_negative(tmp_path: Path) -> None:
    write_pictures(measurement(), tmp_path)
    picture = np.array(Image.open(tmp_path / "heatmap.png").convert("RGB")).astype(int)
    red = (picture[..., 0] > picture[..., 2] + 60).nonzero()
    blue = (picture[..., 2] > picture[..., 0] + 60).nonzero()
    assert red[0].size > 500
    assert blue[0].size > 500
    cells = red[1] < 0.6 * picture.shape[1]  # left of the colour bar
    assert red[0][cells].mean() < blue[0].mean(), "layer 0 is on top"
    assert red[1][cells].mean() < blue[1][blue[1] < 0.85 * picture.shape[1]].mean(), "head 0 is on the left"


def test_pictures_follow_what_was_measured(tmp_path: Path) -> None:
    def names() -> set[str]:
        return {path.name for path in tmp_path.iterdir()}

    judged = measurement(steps=(3, 6, 9))
    judged["checkpoints"][0]["harmful_score"], judged["checkpoints"][2]["harmful_score"] = score(1), score(30)
    write_pictures(judged, tmp_path)
    assert names() == {"heatmap.png", "positive_heads.png", "hypothesis.png", "sinks.html"}
    text = (tmp_path / "sinks.html").read_text()
    assert "50.0% [37.7%, 62.3%]" in text
    assert "trained on attack data" in text
    write_pictures(measurement(steps=(3,)), tmp_path)
    assert names() == {"heatmap.png", "sinks.html"}


def test_a_comparison_draws_the_rows_that_were_measured_and_judged(tmp_path: Path) -> None:
    rows = []
    for name, heads, harmful in (("A", 0.2, 3), ("B", 0.7, 40), ("C", None, 9)):
        spec = f"{name}={write_assessment(tmp_path / name, harmful)}"
        if heads is not None:
            spec += f";sinks:{write_json(tmp_path / f'sinks-{name}' / 'sinks.json', {'positive_heads': heads})}"
        rows.append(spec)
    out = tmp_path / "out"
    out.mkdir()
    write_hypothesis(read_rows([rows[0], rows[2]]), out)
    assert not list(out.iterdir()), "one point is no comparison"
    write_hypothesis(read_rows(rows), out)
    assert [path.name for path in out.iterdir()] == ["hypothesis.png"]
    drawn = np.array(Image.open(io.BytesIO((out / "hypothesis.png").read_bytes())).convert("RGB")).astype(int)
    # The first two of Okabe and Ito's colours, the first model low on the left, the second high on the right.
    first, second = (np.abs(drawn - colour).sum(-1) < 30 for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)))
    plot = np.s_[:, : int(0.91 * drawn.shape[1])]  # without the legend
    (y1, x1), (y2, x2) = (each[plot].nonzero() for each in (first, second))
    assert x1.mean() < x2.mean()
    assert y1.mean() > y2.mean()
