"""Sampled answers: the distribution is transformers' own, and each prompt has its own stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pipeline.config import ModelArguments
from pipeline.evaluation.engine_transformers import TransformersEngine
from pipeline.evaluation.model import EvaluatedModel
from pipeline.evaluation.sampling import DrawTokens, Sampling, kept_shares, seed_of


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> TransformersEngine:
    return TransformersEngine(EvaluatedModel(ModelArguments(model_name_or_path=str(tiny_model_dir))).load(), 0)


def sampling(*seeds: int, **settings: Any) -> Sampling:
    return Sampling(**{"temperature": 0.6, "top_p": 0.95, "top_k": 20, **settings}, seeds=seeds)


@pytest.mark.parametrize("settings", [{}, {"top_k": 0}, {"top_p": 1.0}, {"temperature": 1.7, "top_p": 0.3}])
def test_what_is_kept_is_what_transformers_keeps(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    scores = 3 * torch.randn(16, 300)
    chosen = sampling(**settings)
    expected = TemperatureLogitsWarper(chosen.temperature)(None, scores)
    if chosen.top_k:
        expected = TopKLogitsWarper(chosen.top_k)(None, expected)
    if chosen.top_p < 1:
        expected = TopPLogitsWarper(chosen.top_p)(None, expected)
    shares = kept_shares(scores, chosen)
    torch.testing.assert_close(shares / shares.sum(-1, keepdim=True), expected.softmax(-1), rtol=1e-5, atol=1e-7)


def test_tokens_are_drawn_as_often_as_their_shares_say() -> None:
    torch.manual_seed(1)
    scores, n = torch.randn(1, 12), 20000
    chosen = sampling(*range(n), temperature=1.0, top_p=0.9, top_k=0)
    drawn = DrawTokens(chosen)(torch.zeros(n, 1, dtype=torch.long), scores.expand(n, -1)).argmax(-1)
    shares = kept_shares(scores, chosen)[0]
    shares = shares / shares.sum()
    counts = torch.bincount(drawn, minlength=12)
    assert (counts[shares == 0] == 0).all()
    kept = shares > 0
    chi_square = ((counts - n * shares)[kept] ** 2 / (n * shares[kept])).sum()
    assert chi_square < 31.3  # 0.1 % of 11 degrees of freedom


def test_a_draw_depends_on_its_own_seed_and_prompt_alone(engine: TransformersEngine) -> None:
    prompts = [[5, 6, 7], list(range(10, 40)), [9]]
    seeds = [seed_of(1, "a"), seed_of(1, "b"), seed_of(2, "a")]
    wide = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    alone = [engine.answer([p], 12, sampling(s, **wide))[0] for p, s in zip(prompts, seeds, strict=True)]
    assert engine.answer(prompts, 12, sampling(*seeds, **wide)) == alone
    assert engine.answer(prompts[::-1], 12, sampling(*seeds[::-1], **wide)) == alone[::-1]
    assert engine.answer(prompts, 12, sampling(*seeds[::-1], **wide)) != alone
    assert len({*seeds, seed_of(1, "b")}) == 3


def test_a_low_temperature_is_greedy(engine: TransformersEngine) -> None:
    prompts = [[5, 6, 7], [9]]
    assert engine.answer(prompts, 8, sampling(1, 2, temperature=1e-4)) == engine.answer(prompts, 8)
