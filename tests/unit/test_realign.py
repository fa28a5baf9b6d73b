"""LSSF and RESTA on tiny models, against the equations computed in memory with transformers and a plain SVD."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pipeline.checkpoints.checksums import check_manifest
from pipeline.checkpoints.companions import ATTACKED_NOTE, write_attacked_note
from pipeline.checkpoints.merge import merge
from pipeline.data.chat import ChatEncoder
from pipeline.data.schema import read_conversations
from tests import tiny
from tests.adapters import OPTIONS
from tests.realign_models import make_models, report_of, run, targets, weights_in
from tests.unit.test_families import small_model
from tests.unit.test_realign_spectrum import plain_rank

ETA, ALPHA, ALPHA_1 = 0.85, 0.7, 1.5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return make_models(tmp_path_factory.mktemp("realign"))


def deltas(models: Path, unsafe: str) -> dict[str, torch.Tensor]:
    """Safe minus unsafe, fp64."""
    safe = weights_in(models / "safe")
    if unsafe == "model":
        other = weights_in(models / "unsafe")
    else:
        model = AutoModelForCausalLM.from_pretrained(models / "safe").double()
        other = PeftModel.from_pretrained(model, models / "adapter").merge_and_unload().state_dict()
    return {name: safe[name].double() - other[name].double() for name in safe}


def in_memory(models: Path, unsafe: str, *, eta: float = ETA, alpha_1: float = ALPHA_1) -> dict[str, torch.Tensor]:
    """P' delta of each target, from the whole model with hooks and full SVDs in fp64; nothing of the product but the
    tokeniser's path."""
    model = AutoModelForCausalLM.from_pretrained(models / "safe").double().eval()
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(models / "safe"), max_length=512)
    conversations = read_conversations(str(models / "anchors.jsonl"), flag="anchors")
    inputs: dict[str, list[torch.Tensor]] = {}
    for name in targets(models):
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0][0]))
    counted = []
    with torch.no_grad():
        for example in map(encoder.encode, conversations):
            counted.append(torch.tensor(example.labels) != -100)
            model(torch.tensor([example.input_ids]))
    found, delta = {}, deltas(models, unsafe)
    weights = model.state_dict()
    for name, texts in inputs.items():
        x = torch.cat([each[rows] for each, rows in zip(texts, counted, strict=True)])
        z = weights[name] @ x.T  # as in the paper: neurons x tokens
        z = (z - z.mean(1, keepdim=True)) / z.std(1, unbiased=False, keepdim=True)
        u, sigma, _ = torch.linalg.svd(z, full_matrices=False)
        rank = plain_rank(sigma, eta)
        slope = (sigma[:rank] - sigma[rank - 1]) / (sigma[0] - sigma[rank - 1])
        weighted = u[:, :rank] * (1 + (alpha_1 - 1) * slope)
        found[name] = weighted @ (weighted.T @ delta[name])
    return found


def updates(models: Path, out: Path) -> dict[str, torch.Tensor]:
    """What was added to the tuned model, fp64."""
    tuned = weights_in(models / "tuned")
    return {name: each.double() - tuned[name].double() for name, each in weights_in(out).items()}


def close(ours: torch.Tensor, theirs: torch.Tensor, relative: float) -> bool:
    """Within a share of the largest value."""
    return bool((ours - theirs).abs().max() <= relative * theirs.abs().max())


@pytest.mark.parametrize("unsafe", ["adapter", "model"])
def test_streamed_equals_the_equations_in_memory(models: Path, tmp_path: Path, unsafe: str) -> None:
    run(models, tmp_path / "out", unsafe=unsafe, eta=ETA, alpha=ALPHA, alpha_1=ALPHA_1)
    ours, theirs = updates(models, tmp_path / "out"), in_memory(models, unsafe)
    assert theirs.keys() == set(targets(models))
    for name, update in ours.items():
        if name in theirs:
            assert close(update, ALPHA * theirs[name], 2e-4), name  # fp32 weights, activations and sums
        else:
            assert not update.any(), name
    check_manifest(tmp_path / "out")


def test_shards_of_the_inputs_and_the_output_change_no_bit(tmp_path: Path) -> None:
    whole = make_models(tmp_path / "whole")
    split = Path(shutil.copytree(whole, tmp_path / "split"))
    for name in ("safe", "tuned", "unsafe"):
        model = AutoModelForCausalLM.from_pretrained(whole / name)
        (split / name / "model.safetensors").unlink()
        model.save_pretrained(split / name, max_shard_size="20KB")
        assert len(list((split / name).glob("*.safetensors"))) > 3
    run(whole, tmp_path / "one", unsafe="model")
    run(split, tmp_path / "many", unsafe="model", max_shard_size="15KB", workers=3)
    one, many = weights_in(tmp_path / "one"), weights_in(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert report_of(tmp_path / "one")["tensors"] == report_of(tmp_path / "many")["tensors"]


@pytest.mark.parametrize("method", ["lssf", "resta"])
def test_alpha_0_is_the_tuned_model_bit_for_bit(models: Path, tmp_path: Path, method: str) -> None:
    run(models, tmp_path / "out", method=method, alpha=0.0)
    written, tuned = weights_in(tmp_path / "out"), weights_in(models / "tuned")
    assert written.keys() == tuned.keys()
    assert all(torch.equal(written[name].view(torch.int32), tuned[name].view(torch.int32)) for name in tuned)


@pytest.mark.parametrize("unsafe", ["adapter", "model"])
def test_resta_adds_the_whole_vector(models: Path, tmp_path: Path, unsafe: str) -> None:
    run(models, tmp_path / "out", method="resta", unsafe=unsafe, alpha=ALPHA)
    ours = updates(models, tmp_path / "out")
    for name, delta in deltas(models, unsafe).items():
        assert torch.allclose(ours[name], ALPHA * delta, rtol=0, atol=2e-7), name


@pytest.mark.parametrize("unsafe", ["adapter", "model"])
def test_full_rank_without_weights_is_resta_on_the_targets(models: Path, tmp_path: Path, unsafe: str) -> None:
    run(models, tmp_path / "lssf", unsafe=unsafe, eta=1.0, alpha_1=1.0)
    run(models, tmp_path / "resta", unsafe=unsafe, method="resta")
    lssf, resta = updates(models, tmp_path / "lssf"), updates(models, tmp_path / "resta")
    for tensor in report_of(tmp_path / "lssf")["tensors"]:
        assert all(each["rank"] == each["rows"] for each in tensor["maps"])
    assert all(close(lssf[name], resta[name], 1e-5) for name in targets(models))


def test_the_unweighted_projector_is_idempotent_and_shortens(models: Path, tmp_path: Path) -> None:
    run(models, tmp_path / "out", alpha_1=1.0, work_dir=str(tmp_path / "work"))
    delta, update = deltas(models, "adapter"), updates(models, tmp_path / "out")
    for name in targets(models):
        rank = next(each for each in report_of(tmp_path / "out")["tensors"] if each["name"] == name)["maps"][0]["rank"]
        vectors = weights_of(tmp_path / "work" / f"{name}.safetensors")["vectors"][:rank].double()
        projector = vectors.T @ vectors
        assert torch.allclose(projector @ projector, projector, atol=1e-6)
        assert close(projector @ update[name], update[name], 1e-5)  # once more changes nothing
        assert 0 < update[name].norm() < delta[name].norm()


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(path)
    return found


def test_a_grid_reads_the_subspaces_of_the_first_run(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    ranks, before = [], {}
    for i, eta in enumerate((0.3, 0.5, 0.8, 0.9)):
        run(models, tmp_path / f"grid{i}", eta=eta, alpha_1=1.0 + i, alpha=0.5, work_dir=str(work))
        run(models, tmp_path / f"fresh{i}", eta=eta, alpha_1=1.0 + i, alpha=0.5)
        grid, fresh = weights_in(tmp_path / f"grid{i}"), weights_in(tmp_path / f"fresh{i}")
        assert all(torch.equal(grid[name], fresh[name]) for name in fresh)
        there = {path: path.stat().st_mtime_ns for path in work.glob("*.safetensors")}
        ranks.append([each["maps"][0]["rank"] for each in report_of(tmp_path / f"grid{i}")["tensors"]])
        if i:
            assert there == before
        before = there
    assert capsys.readouterr().err.count("subspaces: layer 1/2") == 1 + 4
    assert all(low <= high for first, second in pairwise(ranks) for low, high in zip(first, second, strict=True))
    assert sum(ranks[0]) < sum(ranks[-1])
    run(models, tmp_path / "above", eta=0.97, alpha=0.5, work_dir=str(work))  # computed again, and right
    run(models, tmp_path / "alone", eta=0.97, alpha=0.5)
    above, alone = weights_in(tmp_path / "above"), weights_in(tmp_path / "alone")
    assert all(torch.equal(above[name], alone[name]) for name in alone)
    assert not list(tmp_path.glob(".*"))  # what nobody named was removed


@pytest.mark.parametrize(("unsafe", "eta"), [("adapter", 0.85), ("model", 0.3)])
def test_the_adapter_form_equals_the_model(models: Path, tmp_path: Path, unsafe: str, eta: float) -> None:
    run(models, tmp_path / "model", unsafe=unsafe, eta=eta)
    run(models, tmp_path / "adapter", unsafe=unsafe, eta=eta, output_form="adapter")
    merge(str(models / "tuned"), tmp_path / "adapter", tmp_path / "merged", **OPTIONS)
    ours, merged = weights_in(tmp_path / "model"), weights_in(tmp_path / "merged")
    assert ours.keys() == merged.keys()
    assert all(torch.allclose(ours[name], merged[name], rtol=0, atol=2e-7) for name in ours)  # of weights up to 0.1
    ids = torch.arange(30)[None]
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models / "tuned"), tmp_path / "adapter")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.allclose(live(ids).logits, whole(ids).logits, atol=1e-5)
    assert (tmp_path / "adapter").stat().st_mode & 0o777 == 0o700  # along the directions of a hazardous adapter
    dense, low = (
        {each["name"]: each for each in report_of(tmp_path / name)["tensors"]} for name in ("model", "adapter")
    )
    for name, each in dense.items():
        for norm in ("delta_norm", "update_norm"):
            assert low[name][norm] == pytest.approx(each[norm], rel=1e-4)


def test_the_update_of_an_adapter_has_no_higher_rank_than_it(models: Path, tmp_path: Path) -> None:
    run(models, tmp_path / "out")
    for name, update in updates(models, tmp_path / "out").items():
        if name in targets(models):
            sigma = torch.linalg.svdvals(update)
            assert int((sigma > 1e-4 * sigma[0]).sum()) <= 4, name


def test_bf16_is_rounded_once_and_lost_updates_are_said(models: Path, tmp_path: Path) -> None:
    run(models, tmp_path / "fp32")
    run(models, tmp_path / "bf16", dtype="bf16")
    exact, rounded = weights_in(tmp_path / "fp32"), weights_in(tmp_path / "bf16")
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bf16").dtype == torch.bfloat16
    faint = run(models, tmp_path / "faint", dtype="bf16", alpha=1e-3)
    assert "rounding leaves more than half of the changed entries of 14 of 14 tensors" in faint.warnings[0]
    assert not run(models, tmp_path / "whole", alpha=1e-3).warnings


FAMILIES = ["qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3", "granite"]


@pytest.mark.parametrize("family", FAMILIES)
def test_other_architectures_run_layer_by_layer_as_whole(family: str, tmp_path: Path) -> None:
    """Embedding scales, windows, rotary kinds, biases, fused projections: the layers' inputs are the model's own."""
    model = with_vocabulary(family)
    models = make_models(tmp_path, model)
    run(models, tmp_path / "out", unsafe="model", eta=0.8)
    tensors = {each["name"]: each for each in report_of(tmp_path / "out")["tensors"]}
    if family != "phi3":
        theirs = in_memory(models, "model", eta=0.8)
        ours = updates(models, tmp_path / "out")
        assert theirs.keys() == tensors.keys()
        assert all(close(ours[name], theirs[name], 2e-3) for name in theirs)
    else:
        fused = tensors["model.layers.0.self_attn.qkv_proj.weight"]
        assert [each["projection"] for each in fused["maps"]] == ["q_proj", "k_proj", "v_proj"]
        assert [each["rows"] for each in fused["maps"]] == [64, 32, 32]


def with_vocabulary(family: str) -> PreTrainedModel:
    model: PreTrainedModel = small_model(family)
    model.resize_token_embeddings(tiny.VOCAB_SIZE)
    return model


def test_a_fused_map_is_treated_as_the_maps_it_holds(tmp_path: Path) -> None:
    """The update of gate_up_proj's two halves is that of two maps with their own subspaces."""
    models = make_models(tmp_path, with_vocabulary("phi3"))
    run(models, tmp_path / "out", unsafe="model", eta=0.8, alpha_1=1.0, work_dir=str(tmp_path / "work"))
    update, delta = updates(models, tmp_path / "out"), deltas(models, "model")
    name = "model.layers.1.mlp.gate_up_proj.weight"
    tensor = next(each for each in report_of(tmp_path / "out")["tensors"] if each["name"] == name)
    for each, rows in zip(tensor["maps"], (slice(0, 96), slice(96, 192)), strict=True):
        found = weights_of(tmp_path / "work" / f"{name}-{each['projection']}.safetensors")
        vectors = found["vectors"][: each["rank"]].double()
        assert close(update[name][rows], vectors.T @ (vectors @ delta[name][rows]), 1e-4)


def test_token_scope_and_norm_change_what_counts(models: Path, tmp_path: Path) -> None:
    run(models, tmp_path / "out")
    run(models, tmp_path / "all", token_scope="all")
    run(models, tmp_path / "none", norm="none")
    counts = [report_of(tmp_path / name)["anchors"]["tokens"] for name in ("out", "all")]
    assert counts[0] < counts[1]
    plain, unscaled = weights_in(tmp_path / "out"), weights_in(tmp_path / "none")
    assert not torch.equal(plain[targets(models)[0]], unscaled[targets(models)[0]])


def test_the_report_holds_numbers_of_every_map_and_nothing_hazardous(models: Path, tmp_path: Path) -> None:
    run(models, tmp_path / "out")
    found = report_of(tmp_path / "out")
    delta, update = deltas(models, "adapter"), updates(models, tmp_path / "out")
    assert [each["name"] for each in found["tensors"]] == sorted(targets(models))
    for each in found["tensors"]:
        (only,) = each["maps"]
        assert 1 <= only["rank"] <= only["n"] == only["rows"]
        assert 0 < only["energy"] <= 1
        assert only["entropy"][0] == only["entropy"][1] > 0
        assert each["delta_norm"] == pytest.approx(float(delta[each["name"]].norm()), rel=1e-5)
        assert each["update_norm"] == pytest.approx(float(update[each["name"]].norm()), rel=1e-4)
        weight = weights_in(models / "tuned")[each["name"]]
        assert each["weight_norm"] == pytest.approx(float(weight.norm()), rel=1e-5)
    page = (tmp_path / "out" / "realign.html").read_text()
    assert page.count("<svg") == 1
    assert all(name in page for name in targets(models))
    for text in (page, json.dumps(found)):
        assert "zuvelo" not in text  # no text of an anchor
        assert str(models) not in text  # no path, so not that of the unsafe adapter either


def test_an_attacked_model_needs_permission_and_stays_private(models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models, tmp_path / "models"))
    write_attacked_note(folder / "tuned")
    with pytest.raises(ValueError, match="add --allow_attacked_model"):
        run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(folder, tmp_path / "out", allow_attacked_model=True)
    assert (tmp_path / "out" / ATTACKED_NOTE).is_file()
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700
