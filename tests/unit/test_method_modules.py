"""The modules that methods look into, in every mainstream decoder: found by their names, heard and moved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.methods.repnoise import RepNoise, RepNoiseConfig, _every_hidden_state, _heard
from pipeline.training.passes import blocks, missing_blocks, shifted
from tests.unit.test_families import FAMILIES, small_model

IDS = torch.arange(4, 16)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_outputs_can_be_moved(family: str) -> None:
    model = small_model(family)
    modules, shifts = list(blocks(model, "self_attn").values()), []
    with shifted(modules, shifts):
        model(input_ids=IDS, use_cache=False).logits.square().sum().backward()
    assert [each.shape for each in shifts] == [(1, 12, 64)] * 3
    assert all(each.grad.abs().max() > 0 for each in shifts)
    # Moved against the slope, the value falls by about the slope's square.
    with torch.no_grad():
        before = model(input_ids=IDS, use_cache=False).logits.double().square().sum()
        slope = sum(each.grad.double().square().sum() for each in shifts)
        step = 1e-3 * before / slope
        with shifted(modules, [-step.float() * each.grad for each in shifts]):
            after = model(input_ids=IDS, use_cache=False).logits.double().square().sum()
    assert (before - after).item() == pytest.approx((step * slope).item(), rel=0.2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_hidden_state_reaches_the_head(family: str) -> None:
    model = small_model(family)
    assert RepNoise(RepNoiseConfig()).refuse_modules(model) == []
    places, outputs = torch.tensor([3, 7]), []
    with torch.no_grad():
        whole = model(input_ids=IDS, use_cache=False, output_hidden_states=True)
        with _heard(model, outputs), _every_hidden_state(model, places):
            logits = model(input_ids=IDS, use_cache=False, logits_to_keep=places).logits[0]
    assert [each.shape for each in outputs] == [(12, 64)] * 3
    torch.testing.assert_close(logits[:2], whole.logits[0, places])
    norm = model.get_submodule("model.norm")
    plain = model.get_output_embeddings()(whole.hidden_states[-1])[0, places]
    factor = (whole.logits[0, places] * plain).sum() / plain.square().sum()  # some families scale behind the head
    for layer in range(3):
        wanted = model.get_output_embeddings()(norm(whole.hidden_states[layer]))[0, places]
        if family == "gemma2":  # a soft cap behind the head, not a factor
            wanted = 3 * torch.tanh(wanted / 3)
        else:
            wanted = wanted * factor
        torch.testing.assert_close(logits[2 + 2 * layer : 4 + 2 * layer], wanted, rtol=1e-3, atol=1e-4)


def test_a_model_without_the_modules_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = small_model("llama").config
            self.attention = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    assert missing_blocks(Odd(), "self_attn") == [
        "0 modules are named self_attn, and there are 3 layers: this --method needs one in each"
    ]
