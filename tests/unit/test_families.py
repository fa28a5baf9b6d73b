"""Every mainstream decoder against eager attention, on a random small model of its architecture: the loss, the penalty
and every parameter's gradient of a packed row against every text alone; padded batches; and what is refused
by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import AutoConfig

from pipeline.sink import attention
from pipeline.sink.divergence import SinkStep, penalty
from pipeline.sink.layout import Segments
from pipeline.sink.support import attention_refusals

ALPHA = 300.0
WINDOW = 4  # shorter than every reference text
LENGTHS = [11, 7, 9, 13]  # two texts of the user's, a harmful and a harmless reference
SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "attention_dropout": 0.0,
}  # fmt: skip
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# model_type and what differs from SIZES; names after a dash are variants of one architecture.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 4},
    "llama-3": {"rope_parameters": LLAMA3_ROPE},
    "qwen2": {},
    "qwen2-windows": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {
        "layer_types": ALTERNATING, "sliding_window": WINDOW, "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 24,
    },
    "gemma3_text": {
        "layer_types": ALTERNATING, "sliding_window": WINDOW, "query_pre_attn_scalar": 24,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    },
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "phi3-window": {"sliding_window": WINDOW},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "mixtral": EXPERTS,
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "gpt_oss": {**EXPERTS, "layer_types": ALTERNATING, "sliding_window": WINDOW, "intermediate_size": 32},
    "deepseek_v3": {
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    },
    "granite": {
        "attention_multiplier": 0.4, "embedding_multiplier": 6.0, "residual_multiplier": 0.5, "logits_scaling": 4.0,
    },
    "cohere2": {"layer_types": ALTERNATING, "sliding_window": WINDOW},
}  # fmt: skip
RULES = {
    "window": ["qwen2-windows", "mistral", "gemma2", "gemma3_text", "phi3-window", "gpt_oss", "cohere2"],
    "softcap": ["gemma2"],
    "sink_logits": ["gpt_oss"],
}
SHARPER = {
    "q_proj.weight": 12, "k_proj.weight": 12, ".gate.weight": 20, ".router.weight": 20,
    "q_b_proj.weight": 60, "kv_b_proj.weight": 20, "kv_a_proj_with_mqa.weight": 20,
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:attention kernel .* does not compute")


def small_model(family: str) -> Any:
    """A random model of an architecture in fp32 whose attention is far from uniform, so that heads differ, windows and
    caps bite and experts are chosen clearly."""
    config = AutoConfig.for_model(family.partition("-")[0], **{**SIZES, **FAMILIES[family]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config).float()
        with torch.no_grad():
            for name, each in model.named_parameters():
                if name.endswith(("q_norm.weight", "k_norm.weight")):
                    each.add_(2)  # a factor of 3, whether the norm multiplies by w or by 1 + w
                elif name.endswith("qkv_proj.weight"):
                    each[: 16 * (4 + 2)].mul_(12)  # its rows of q and k
                elif name.endswith("sinks"):
                    each.uniform_(-2, 4)
                else:
                    each.mul_(next((by for end, by in SHARPER.items() if name.endswith(end)), 1))
    return model.train()


def texts() -> tuple[torch.Tensor, torch.Tensor, Segments]:
    """Random token ids of LENGTHS in one row, with positions and segments."""
    ids = torch.randint(4, 128, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(3))
    bounds = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    return ids, torch.cat([torch.arange(n) for n in LENGTHS])[None], Segments.from_bounds(bounds, "cpu")


@cache
def expected(family: str) -> tuple[float, torch.Tensor, dict[str, torch.Tensor]]:
    """CE, d [L,H] and the gradient of CE + alpha R: every text alone, eager attention, `output_attentions`."""
    model = small_model(family)
    model.set_attn_implementation("eager")
    ids, _, segments = texts()
    nll, trained, means = torch.zeros(()), 0, []
    for i, (start, end) in enumerate(segments.spans):
        text = ids[:, start:end]
        out = model(input_ids=text, output_attentions=i >= 2, use_cache=False)
        if i < 2:
            nll = nll + F.cross_entropy(out.logits[0, :-1], text[0, 1:], reduction="sum")
            trained += end - start - 1
        else:
            means.append(torch.stack([a[0, :, 1:, 0].mean(-1) for a in out.attentions]))
    divergence = means[0] - means[1]
    (nll / trained + ALPHA * torch.relu(divergence).mean()).backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters()}
    return (nll / trained).item(), divergence.detach(), gradients


class Watched(SinkStep):
    """A SinkStep that also notes which layers reported."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reported: list[int] = []

    def watches(self, layer: int) -> bool:
        self.reported.append(layer)
        return super().watches(layer)


def check_against_eager(family: str, kernel: str, reentrant: bool | None = None) -> None:
    wanted_ce, wanted_divergence, wanted = expected(family)
    model = small_model(family)
    model.set_attn_implementation(attention.register(kernel))
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    ids, positions, segments = texts()
    config = model.config.get_text_config()
    sink = Watched(
        Segments.from_bounds([0, 9, 22], "cpu"), start=18, harmful=1, alpha=ALPHA,
        layers=config.num_hidden_layers, heads=config.num_attention_heads,
    )  # fmt: skip
    predict = torch.tensor([*range(10), *range(11, 17)])
    out = model(
        input_ids=ids, position_ids=positions, segments=segments, sink=sink, logits_to_keep=predict, use_cache=False
    )
    assert sink.reported == [0, 1, 2], "every attention layer reports once"
    ce = F.cross_entropy(out.logits[0], ids[0, predict + 1])
    sink.tap(ce).backward()
    assert ce.item() == pytest.approx(wanted_ce, rel=1e-5)
    torch.testing.assert_close(sink.divergence(), wanted_divergence, rtol=1e-4, atol=1e-6)
    wanted_r = penalty(wanted_divergence).item()
    assert penalty(sink.divergence()).item() == pytest.approx(wanted_r, rel=1e-4)
    assert 0 < (wanted_divergence > 0).sum() < wanted_divergence.numel(), "some heads have a penalty, others do not"
    assert ALPHA * wanted_r > 0.1, "the penalty must weigh beside the cross-entropy to be tested"
    for name, each in model.named_parameters():
        error, norm = (each.grad - wanted[name]).norm(), wanted[name].norm()
        assert error <= 1e-4 * norm + 1e-7, f"{name}: error {error:.2e} at a norm of {norm:.2e}"


@pytest.mark.parametrize("kernel", ["cpu_flash", "sdpa", "blocked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_loss_penalty_and_gradient_equal_eager(family: str, kernel: str) -> None:
    check_against_eager(family, kernel)


@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss"])
def test_checkpointing_changes_nothing(family: str, reentrant: bool) -> None:
    check_against_eager(family, "cpu_flash", reentrant)


def without_window(model: Any) -> None:
    model.config.sliding_window = 1000


def without_softcap(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None


def without_sink_logits(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-1e4)


WITHOUT: dict[str, Callable[[Any], None]] = {
    "window": without_window, "softcap": without_softcap, "sink_logits": without_sink_logits,
}  # fmt: skip


@pytest.mark.parametrize(("family", "rule"), [(family, rule) for rule in RULES for family in RULES[rule]])
def test_the_small_model_exercises_its_rule(family: str, rule: str) -> None:
    """Without its window, cap or learned sinks the model is another one, so the comparisons above see the rule."""
    model = small_model(family).eval()
    model.set_attn_implementation("eager")
    text = texts()[0][:, 18:]
    with torch.no_grad():
        wanted = model(input_ids=text, use_cache=False).logits
        WITHOUT[rule](model)
        other = model(input_ids=text, use_cache=False).logits
    assert (wanted - other).norm() > 0.02 * wanted.norm()


@pytest.mark.parametrize("kernel", ["cpu_flash", "blocked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_gives_the_logits_of_eager_attention(family: str, kernel: str) -> None:
    """Padded left and right, without cu_seqlens: transformers#46132 is about masks that go missing here."""
    ids = torch.randint(4, 128, (3, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[0, 9:] = 0
    mask[2, :4] = 0
    model = small_model(family).eval()
    with torch.no_grad():
        model.set_attn_implementation("eager")
        wanted = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        model.set_attn_implementation(attention.register(kernel))
        found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-5)


def test_a_kernel_without_the_rule_says_that_the_blocked_path_is_taken() -> None:
    model = small_model("gemma2")
    model.set_attn_implementation(attention.register("sdpa"))
    ids, positions, segments = texts()
    with pytest.warns(UserWarning, match="sdpa does not compute softcap.*blocked path"):
        model(input_ids=ids, position_ids=positions, segments=segments, use_cache=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_that_works_is_not_refused(family: str) -> None:
    assert attention_refusals(small_model(family).config, longest=200) == []


# Refused where a layer hands over what cannot be computed: model type, flags, what the message names.
REFUSED_AT_RUN_TIME: dict[str, tuple[dict[str, Any], str]] = {
    "phimoe": ({**EXPERTS, "sliding_window": WINDOW}, "window of 4 tokens that it applies by its mask alone"),
    "qwen2_moe": (
        {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "use_sliding_window": True,
            "shared_expert_intermediate_size": 32, "sliding_window": WINDOW, "max_window_layers": 1,
        },
        "window of 4 tokens that it applies by its mask alone",
    ),
    "nemotron": ({}, "without its boundaries"),
    "diffllama": ({}, "layer 0 attends twice"),
}  # fmt: skip


@pytest.mark.parametrize("model_type", REFUSED_AT_RUN_TIME)
def test_a_layer_that_would_be_computed_wrongly_is_refused_when_it_runs(model_type: str) -> None:
    """A window that only the mask knows of, keywords that are not handed on, two attentions of one layer."""
    flags, named = REFUSED_AT_RUN_TIME[model_type]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **flags}))
    model.set_attn_implementation(attention.register("cpu_flash"))
    ids, positions, segments = texts()
    sink = SinkStep(Segments.from_bounds([0, 9, 22], "cpu"), start=18, harmful=1, layers=3, heads=4, alpha=ALPHA)
    with pytest.raises(ValueError, match=named):
        model(input_ids=ids, position_ids=positions, segments=segments, sink=sink, use_cache=False)


# Refused by their configuration alone, before a weight is loaded: model type, flags, what the message names.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "qwen3_next": ({}, "qwen3_next"),
    "qwen3_5_text": ({}, "qwen3_5_text"),
    "jamba": ({}, "jamba"),
    "bamba": ({}, "bamba"),
    "falcon_h1": ({}, "falcon_h1"),
    "nemotron_h": ({}, "nemotron_h"),
    "granitemoehybrid": ({}, "linear_attention"),
    "minimax": ({}, "linear_attention"),
    "recurrent_gemma": ({}, "linear_attention"),
    "lfm2": ({"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, "conv"),
    "mamba": ({}, "mamba"),
    "llama4_text": ({}, "chunked_attention"),
    "deepseek_v32": ({}, "indexed_attention"),
    "doge": ({}, "doge"),
    "bart": ({}, "encoder-decoder"),
    "bloom": ({}, "bloom"),
    "gptj": ({}, "gptj"),
    "stablelm": ({}, "stablelm"),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_model_that_would_train_wrongly_is_refused_by_its_configuration(model_type: str) -> None:
    flags, named = REFUSED[model_type]
    reasons = attention_refusals(AutoConfig.for_model(model_type, **flags), longest=512)
    assert reasons, "not refused"
    assert named in " ".join(reasons)
