"""The benchmarks end to end on a tiny model, and what makes their figures fair: never a time."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pipeline.data.chat import IGNORE, Example
from pipeline.data.packing import pack
from pipeline.methods import METHODS
from pipeline.sink.attention import register
from pipeline.sink.divergence import SinkStep, penalty
from pipeline.sink.layout import Segments
from pipeline.training.method import model_kwargs
from tests.numerics.cases import sharp_llama
from tests.ranks import ROOT, run_ranks
from tests.tiny import save_model_folder, tiny_llama
from tools.bench.attention_ways import POSITIVE, Layer, Shape
from tools.bench.eager_step import eager_loss
from tools.bench.flops import bound, forward_flops
from tools.bench.layouts import Layout
from tools.bench.memory import peak_bytes
from tools.bench.timing import fit, interleave

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sharp_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose heads differ, so that the penalty is far from 0."""
    return save_model_folder(sharp_llama(), tmp_path_factory.mktemp("models") / "sharp")


def bench(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"tools/bench/{script}.py", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def step(sharp_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What step.py reports."""
    output = tmp_path_factory.mktemp("bench") / "step.json"
    done = bench(
        "step", "--model_name_or_path", sharp_dir, "--layers", 1, "--layouts", "2x64+2x64", "1x96+4x64",
        "--lengths", 64, 128, 256, 512, "--repeats", 2, "--output", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Surgery / SFT" in done.stdout
    assert "(1 of 2 layers), fp32" in done.stdout
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_a_layout_is_run_as_asked_and_held_against_the_bound(step: dict[str, Any]) -> None:
    assert [each["layout"] for each in step["layouts"]] == ["2x64+2x64", "1x96+4x64"]
    first, second = step["layouts"]
    assert (first["user_tokens"], first["reference_tokens"]) == (128, 128)
    assert (second["user_tokens"], second["reference_tokens"]) == (96, 256)
    for each in step["layouts"]:
        assert 0 < each["trained_tokens"] < each["user_tokens"]
        for kind in ("passes", "step"):
            ratios = each["ratio"][kind]
            assert ratios["low"] <= ratios["median"] <= ratios["high"]
            assert each["holds"][kind] == (ratios["median"] <= each["bound"])
            for method in ("sft", "surgery"):
                assert len(each["seconds"][method][kind]) == 2
        assert all(p < s for p, s in zip(*each["seconds"]["surgery"].values(), strict=True))
    config = sharp_llama().config
    config.num_hidden_layers = 1
    assert first["bound"] == pytest.approx(bound(config, Layout(2, 64, 2, 64), first["trained_tokens"]))


def test_surgery_and_the_eager_passes_compute_the_same(step: dict[str, Any]) -> None:
    for each in step["lengths"]:
        assert each["eager_values"]["sink_penalty"] > 1e-4
        assert each["difference"]["ce_loss"] < 1e-5
        assert each["difference"]["sink_penalty"] < 1e-4
        assert each["difference"]["grad_norm"] < 1e-4


def test_memory_is_linear_where_eager_attention_is_quadratic(step: dict[str, Any]) -> None:
    fits = step["memory"]["fits"]
    assert fits["surgery_above_sft"]["linear_r_squared"] > 0.98
    assert fits["surgery_above_sft"]["bytes_per_token"] > 0
    assert fits["surgery"]["quadratic_share"] < 0.2 < 0.5 < fits["eager"]["quadratic_share"]
    # The eager step keeps at least the softmax of its two layers: 4 heads of 512 x 512 in fp32.
    assert step["lengths"][-1]["peak_bytes"]["eager"] > 2 * 4 * 512 * 512 * 4


def test_a_report_names_machine_versions_and_settings(step: dict[str, Any]) -> None:
    assert step["machine"]["cores"] >= 1
    assert step["versions"]["torch"] == torch.__version__
    assert step["settings"]["bf16"] is False
    assert step["device"] == "cpu"


def test_every_method_is_measured_beside_sft(sharp_dir: Path, tmp_path: Path) -> None:
    done = bench(
        "methods", "--model_name_or_path", sharp_dir, "--texts", 2, "--tokens", 64, "--inner_steps", 2,
        "--repeats", 1, "--output", tmp_path / "methods.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "methods.json").read_text())["methods"]
    assert list(found) == list(METHODS)
    assert found["sft"]["ratio"]["step"]["median"] == 1
    for name, each in found.items():
        assert f"| {name} " in done.stdout
        assert 0 < each["seconds"]["passes"][0] < each["seconds"]["step"][0], name
        assert each["peak_bytes"] > 0, name
    # Lisa keeps the weights of its last switch of states, TAR those it started from.
    copy = 4 * sum(each.numel() for each in sharp_llama().parameters())
    assert found["sft"]["kept_bytes"] < 0.1 * copy
    for name in ("lisa", "tar"):
        assert found[name]["kept_bytes"] == pytest.approx(copy, rel=0.1), name


def example(name: str, generator: torch.Generator, tokens: int, prompt: int) -> Example:
    ids = torch.randint(4, 500, (tokens,), generator=generator).tolist()
    return Example(name, ids, [IGNORE] * prompt + ids[prompt:], False)


def test_the_eager_step_is_surgerys_objective() -> None:
    """Rows of different lengths, so that one is padded; loss, R and the gradient of every tensor."""
    generator = torch.Generator().manual_seed(1)
    users = [example("a", generator, 12, 5), example("b", generator, 20, 9)]
    references = [example("harmful", generator, 17, 17), example("harmless", generator, 11, 11)]
    alpha = 300.0

    eager = sharp_llama().train()
    eager.set_attn_implementation("eager")
    loss, ce, r = eager_loss(eager, users, *references, alpha)
    loss.backward()

    packed = sharp_llama().train()
    packed.set_attn_implementation(register("cpu_flash"))
    batch = pack(users, references)
    sink = SinkStep(
        Segments.from_bounds(batch.reference_bounds, "cpu"), start=batch.reference_start, harmful=1, layers=2, heads=4,
        alpha=alpha,
    )  # fmt: skip
    logits = packed(**model_kwargs(batch), sink=sink).logits[0]
    wanted = F.cross_entropy(logits, batch.targets)
    sink.tap(wanted).backward()

    assert ce.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert r.item() == pytest.approx(penalty(sink.divergence()).item(), rel=1e-5)
    assert r.item() > 1e-3
    for (name, found), exact in zip(eager.named_parameters(), packed.parameters(), strict=True):
        assert (found.grad - exact.grad).norm() <= 1e-4 * exact.grad.norm() + 1e-7, name


def test_the_flop_formula_counts_what_torch_counts() -> None:
    model, tokens, trained = tiny_llama().eval(), 64, 10
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, tokens, dtype=torch.int64), logits_to_keep=trained // 2, use_cache=False)
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    found = forward_flops(model.config, 2, tokens, trained)
    assert found.projections + found.output == counted["aten.mm"]
    # Eager attention computes the whole square; the counter also sees the rotary angles.
    assert 2 * found.attention == pytest.approx(counted["aten.bmm"], rel=0.01)


def test_the_bound_weighs_references_by_their_own_flops() -> None:
    config = tiny_llama().config
    same = bound(config, Layout(2, 64, 2, 64), 0)
    assert same == pytest.approx(1.05 * 2)
    assert bound(config, Layout(2, 64, 2, 64), 64) < same  # the user's rows also pay the output projection
    assert bound(config, Layout(8, 64, 2, 64), 0) == pytest.approx(1.05 * 1.25)
    # Attention grows with the square, so one long text weighs more than its tokens.
    assert bound(config, Layout(1, 2048, 2, 64), 0) < 1.05 * (1 + 128 / 2048)


def test_peak_memory_is_counted_from_allocations() -> None:
    held = torch.empty(1 << 20)

    def call() -> None:
        first = torch.empty(1 << 18)  # 1 MiB
        second = torch.empty(1 << 19)  # 2 MiB
        del first, second
        torch.empty(1 << 18)

    assert peak_bytes(call, CPU) == 3 << 20
    assert held.numel() == 1 << 20


def test_ways_take_turns_and_swap() -> None:
    seen: list[str] = []
    ways = {name: (lambda name=name: seen.append(name)) for name in "ab"}
    found = interleave(ways, 3)
    assert "".join(seen) == "baabbaab"
    assert {name: len(values) for name, values in found.items()} == {"a": 3, "b": 3}


def test_fits_find_the_curve() -> None:
    lengths = [1, 2, 4, 8]
    line = fit(lengths, [3 + 2 * n for n in lengths], 1)
    assert line.coefficients == pytest.approx([2, 3])
    assert line.r_squared == pytest.approx(1)
    assert fit(lengths, [n**2 for n in lengths], 1).r_squared < 0.97


@pytest.mark.parametrize("positive", POSITIVE)
def test_the_kernel_benchmark_sets_the_heads_it_claims(positive: str) -> None:
    layer = Layer(Shape(tokens=40, heads=4, groups=2, dim=16), "cpu_flash", CPU, torch.float32)
    step = layer.step()
    q, k = layer.q_and_k[positive]
    layer._two_call(q, k, step)
    assert (step.divergence() > 0).float().mean() == POSITIVE[positive]


def test_kernel_reports_every_way(sharp_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "kernel.json"
    done = bench("kernel", "--model_name_or_path", sharp_dir, "--tokens", 64, "--repeats", 3, "--output", output)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert {"attention", "two_call:all", "two_call:half", "two_call:none"} <= set(found["seconds"])
    assert all(len(seconds) == 3 for seconds in found["seconds"].values())
    assert found["sink_share"]["attention"]["two_call:all"]["median"] > -1
    assert 0 < found["bf16_value_error"] < 1e-3
    assert found["settings"]["dim"] == 16


def test_a_surgery_step_gathers_as_an_sft_step(sharp_dir: Path, tmp_path: Path) -> None:
    config = json.loads((ROOT / "ds_configs/z3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "z3.json").write_text(json.dumps(config))
    words = ["--model_name_or_path", sharp_dir, "--ds_config", tmp_path / "z3.json", "--tokens", 64]
    run_ranks(ROOT / "tools/bench/collectives.py", *map(str, words), "--output", str(tmp_path / "c.json"), ranks=2)
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["settings"]["ranks"] == 2
    assert found["equal"]
    parameters = sum(each.numel() for each in sharp_llama().parameters())
    for counts in (*found["steps"]["sft"], *found["steps"]["surgery"]):
        for kind in ("all_gather", "reduce_scatter"):
            assert counts[kind]["calls"] > 0
            assert counts[kind]["elements"] >= parameters


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("step", ["--layouts", "8x512"], "--layouts 8x512: write user texts x tokens"),
        ("step", ["--layouts", "8x512+3x512"], "as many harmful as harmless references"),
        ("step", ["--repeats", "0"], "--repeats 0: give 1 or more"),
        ("step", ["--lengths", "16"], "--lengths 16: give 64 or more"),
        ("step", ["--lenghts", "64"], "did you mean lengths?"),
        ("step", ["--device", "tpu"], "--device tpu: choose cpu or cuda"),
        ("step", ["--model_name_or_path", "no/where"], "--model_name_or_path no/where"),
        ("kernel", ["--attention", "fast"], "--attention fast: choose auto or one of"),
        ("kernel", ["--tokens", "1"], "--tokens 1: give 2 or more"),
        ("collectives", ["--tokens", "8"], "--tokens 8: give 64 or more"),
        pytest.param(
            "step", ["--trl"], "--trl: the package trl is not installed",
            marks=pytest.mark.skipif(importlib.util.find_spec("trl") is not None, reason="trl is installed"),
        ),
        pytest.param(
            "kernel", ["--device", "cuda"], "torch finds no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)  # fmt: skip
def test_a_mistake_ends_with_its_flag_and_code_2(script: str, words: list[str], message: str) -> None:
    done = bench(script, *words)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl (the extra `bench`)")
def test_sft_stands_beside_trl(sharp_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "step.json"
    done = bench(
        "step", "--model_name_or_path", sharp_dir, "--layouts", "2x64+2x64", "--lengths", 0, "--repeats", 2, "--trl",
        "--output", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(output.read_text())["trl"]
    assert found["faster"] in ("padded", "padding_free")
    assert set(found["seconds"]) == {"sft", "padded", "padding_free"}
    assert found["ratio"]["median"] > 0
