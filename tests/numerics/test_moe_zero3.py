"""Surgery on routed experts under ZeRO-3: two gloo ranks, whose tokens choose different experts, equal one plain
process with eager attention. A layer's experts are one module with three-dimensional parameters, so no rank gathers
what another does not, and no module has to be declared a ZeRO-3 leaf."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.training.distributed import World
from tests.command_lines import prepared
from tests.distributed.lives import Lives
from tests.numerics import reference
from tests.numerics.cases import distances, train_cases, updates
from tests.tiny import VOCAB_SIZE, save_model_folder, tiny_tokenizer

GRADIENT, UPDATE = 1e-4, 1e-3  # relative, of each tensor's norm
ALPHA, STEPS, EXPERTS = 100, 4, 32
FLAGS = {
    "mixtral": ["--per_device_train_batch_size", "1", "--gradient_checkpointing"],
    "qwen3_moe": ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"],
}


def sharp_experts(model_type: str) -> Any:
    """A random 2-layer model in fp32 with 32 experts, two a token, clear choices between them and attention far from
    uniform."""
    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=32, moe_intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=2048,
        num_experts=EXPERTS, num_local_experts=EXPERTS, num_experts_per_tok=2, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float()
        for name, each in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                each.mul_(3)
            elif name.endswith(("q_proj.weight", "k_proj.weight", "mlp.gate.weight")):
                each.mul_(12)
    return model


@pytest.fixture(scope="module")
def argv(base: list[str], references: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The flags of each architecture's run."""
    folder: Path = tmp_path_factory.mktemp("experts")
    common = [*base, *references, "--method", "surgery", "--alpha", str(ALPHA), "--max_steps", str(STEPS)]
    flags = {}
    for name, more in FLAGS.items():
        saved = save_model_folder(sharp_experts(name), folder / name)
        flags[name] = [*common, "--model_name_or_path", str(saved), *more]
    return flags


@pytest.fixture(scope="module")
def trained(argv: dict[str, list[str]], server: Lives, tmp_path_factory: pytest.TempPathFactory) -> Any:
    cases = {name: {"argv": flags} for name, flags in argv.items()}
    return train_cases(server, cases, tmp_path_factory.mktemp("two-ranks"), ranks=2)


@pytest.fixture(scope="module")
def expected(argv: dict[str, list[str]]) -> Any:
    @cache
    def compute(name: str) -> dict[str, Any]:
        model = sharp_experts(name).train()
        model.set_attn_implementation("eager")
        return reference.train(model, prepared(argv[name], World(0, 0, 2)), ranks=2)

    return compute


def chosen_experts(model: Any, texts: list[Any]) -> list[set[int]]:
    """The experts of each layer that any token of the texts goes to."""
    chosen: list[set[int]] = [set() for _ in model.model.layers]
    hooks = [
        layer.mlp.gate.register_forward_hook(
            lambda _module, _inputs, out, seen=seen: seen.update(out[2].flatten().tolist())
        )
        for layer, seen in zip(model.model.layers, chosen, strict=True)
    ]
    with torch.no_grad():
        for each in texts:
            model(input_ids=torch.tensor(each.input_ids)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return chosen


@pytest.mark.parametrize("name", FLAGS)
def test_the_ranks_route_differently(name: str, argv: dict[str, list[str]]) -> None:
    """In the first step some expert has tokens on one rank and none on the other."""
    run = prepared(argv[name], World(0, 0, 2))
    train, model = run.streams["train"], sharp_experts(name)
    ranks = []
    for index in (0, 1):
        texts = [train.pool[int(i)] for i in train.micro_batch(0, index)]
        for kind in ("harmful", "harmless"):
            stream = run.streams[kind]
            texts += [stream.pool[int(i)] for i in stream.sample(0, index, 1)]
        ranks.append(chosen_experts(model, texts))
    assert ranks[0] != ranks[1]


@pytest.mark.parametrize("name", FLAGS)
def test_first_gradient_and_updates_equal_the_reference(name: str, trained: Any, expected: Any) -> None:
    found, metrics = trained(name)
    wanted = expected(name)
    assert wanted["penalty"][0] > 1e-3, "the penalty must weigh to be tested"
    wrong = {n: e for n, e in distances(found["gradients"], wanted["gradients"]).items() if e > GRADIENT}
    assert not wrong, f"gradients differ: {wrong}"
    wrong = {n: e for n, e in distances(updates(found), updates(wanted)).items() if e > UPDATE}
    assert not wrong, f"updates differ: {wrong}"
    assert [line["ce_loss"] for line in metrics] == pytest.approx(wanted["ce"], rel=1e-4)
    assert [line["sink_penalty"] for line in metrics] == pytest.approx(wanted["penalty"], rel=1e-3, abs=1e-9)
