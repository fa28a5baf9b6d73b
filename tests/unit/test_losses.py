"""Token losses in chunks equal plain cross-entropy, in value and gradient, with tied and untied projections."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pipeline.training import losses
from pipeline.training.losses import TokenLoss
from tests.tiny import tiny_llama, tiny_qwen2


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2], ids=["untied", "tied"])
@pytest.mark.parametrize("tokens_at_once", [1, 7, 1000])
def test_chunks_equal_plain_cross_entropy(build: Any, tokens_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", tokens_at_once * 512)
    ids = torch.randint(4, 400, (1, 24), generator=torch.Generator().manual_seed(0))
    predict = torch.tensor([2, 3, 5, 8, 9, 10, 13, 14, 15, 16, 20])
    plain = build().train()
    wanted = F.cross_entropy(plain(input_ids=ids).logits[0, predict], ids[0, predict + 1], reduction="none")
    wanted.sum().backward()
    model = build().train()
    loss = TokenLoss(model)
    assert loss.fused
    found = loss(model, ids[0, predict + 1], input_ids=ids, logits_to_keep=predict)
    found.sum().backward()
    torch.testing.assert_close(found, wanted)
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    logits = model(input_ids=ids).logits
    assert logits.shape == (1, 24, 512), "without targets the model gives logits as ever"


def test_a_model_that_changes_its_logits_gets_its_own_logits_loss() -> None:
    model = tiny_llama()
    model.config.logits_scaling = 2.0
    loss = TokenLoss(model)
    assert not loss.fused
    ids = torch.arange(10, 20)[None]
    predict = torch.tensor([1, 4])
    found = loss(model, ids[0, predict + 1], input_ids=ids, logits_to_keep=predict)
    wanted = F.cross_entropy(model(input_ids=ids).logits[0, predict], ids[0, predict + 1], reduction="none")
    torch.testing.assert_close(found, wanted)
