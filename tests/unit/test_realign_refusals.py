"""What cannot be realigned is refused by name, or left out with its reason, and leaves no folder behind."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from pipeline.config import ModelArguments, Problems, parse
from pipeline.evaluation.run import AssessArguments, assess
from pipeline.realignment.arguments import RealignArguments
from tests import tiny
from tests.adapters import save_adapter
from tests.realign_models import make_models, report_of, run, small_llama, weights_in, write_anchors
from tests.unit.test_families import small_model

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("realign"))


@pytest.fixture
def models(originals: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(originals, tmp_path / "models"))


def refused(models: Path, **chosen: Any) -> str:
    """The message; nothing may be left of the folder."""
    out = models.parent / "out"
    with pytest.raises(ValueError) as error:  # noqa: PT011
        run(models, out, **chosen)
    assert not out.exists()
    assert not list(models.parent.glob(".out.partial"))
    assert not list(models.parent.glob(".out.lock"))
    return str(error.value)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = next(iter(folder.glob("*.safetensors")))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def configure(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


FLAGS: dict[str, tuple[dict[str, Any], str]] = {
    "eta 0": ({"eta": 0.0}, "--eta 0.0: give more than 0, up to 1"),
    "eta above 1": ({"eta": 1.1}, "--eta 1.1: give more than 0, up to 1"),
    "eta nan": ({"eta": float("nan")}, "--eta nan"),
    "alpha": ({"alpha": -1.0}, "--alpha -1.0: give 0 or more"),
    "alpha inf": ({"alpha": float("inf")}, "--alpha inf"),
    "alpha_1": ({"alpha_1": -0.5}, "--alpha_1 -0.5: give 0 or more"),
    "no anchors": ({"anchors": None}, "--anchors: is missing"),
    "no safe model": ({"safe_model": None}, "--safe_model: is missing"),
    "no unsafe": ({"unsafe_adapter": None}, "--unsafe_adapter or --unsafe_model: give one"),
    "two unsafe": ({"unsafe_model": "x"}, "--unsafe_adapter and --unsafe_model: give one of them"),
    "resta with anchors": ({"method": "resta", "anchors": "x"}, "--anchors: resta takes the whole safety vector"),
    "resta as adapter": ({"method": "resta", "output_form": "adapter"}, "the unsafe adapter with its sign turned"),
    "max_length": ({"max_length": 1}, "--max_length 1: give at least 2"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags_against_each_other(models: Path, case: str) -> None:
    chosen, message = FLAGS[case]
    assert message in refused(models, **chosen)


def test_all_mistakes_are_said_at_once() -> None:
    with pytest.raises(Problems) as error:
        RealignArguments(eta=2.0, alpha=-1.0)
    assert len(error.value.problems) == 7


class TestModels:
    @pytest.mark.parametrize(
        ("who", "unsafe", "flag"),
        [("tuned", "adapter", "model_name_or_path"), ("unsafe", "model", "unsafe_model"), ("safe", "model", None)],
    )
    def test_another_width(self, models: Path, who: str, unsafe: str, flag: str | None) -> None:
        shutil.rmtree(models / who)
        tiny.save_model_folder(small_llama(2, 64), models / who)
        message = refused(models, unsafe=unsafe)
        assert f"--{flag or 'unsafe_model'} {models}" in message
        assert re.search(r"has shape \[\d+, \d+\]", message)

    @pytest.mark.parametrize("method", ["lssf", "resta"])
    @pytest.mark.parametrize("layers", [1, 3])
    def test_another_depth(self, models: Path, method: str, layers: int) -> None:
        shutil.rmtree(models / "tuned")
        tiny.save_model_folder(small_llama(layers), models / "tuned")
        message = refused(models, method=method)
        assert re.search(r"has no (tensor )?model\.layers\.\d", message)

    def test_a_larger_vocabulary_of_the_tuned_model_is_no_problem_for_lssf(self, models: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(models / "tuned")
        model.resize_token_embeddings(tiny.VOCAB_SIZE + 8)
        model.save_pretrained(models / "tuned")
        run(models, models.parent / "out")
        assert weights_in(models.parent / "out")["lm_head.weight"].shape[0] == tiny.VOCAB_SIZE + 8

    @pytest.mark.parametrize(("who", "unsafe"), [("safe", "adapter"), ("tuned", "adapter"), ("unsafe", "model")])
    @pytest.mark.parametrize("method", ["lssf", "resta"])
    def test_quantised(self, models: Path, who: str, unsafe: str, method: str) -> None:
        configure(models / who, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
        assert "is quantised; use the model it was made from" in refused(models, unsafe=unsafe, method=method)

    def test_quantised_weights_that_no_config_mentions(self, models: Path) -> None:
        edit(models / "tuned", lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].to(torch.int8)}))
        assert f"{Q_PROJ} is of type torch.int8 (a quantised model?)" in refused(models)

    def test_the_safe_model_as_the_unsafe_one(self, models: Path) -> None:
        assert "the safety vector would be zero" in refused(
            models, unsafe_adapter=None, unsafe_model=str(models / "safe")
        )

    def test_stored_transposed(self, tmp_path: Path) -> None:
        config = GPT2Config(vocab_size=tiny.VOCAB_SIZE, n_positions=64, n_embd=32, n_layer=1, n_head=2)
        models = make_models(tmp_path / "models", GPT2LMHeadModel(config), targets=["c_attn"])
        assert "a gpt2 model has no list of decoder layers" in refused(models)

    def test_experts_under_other_names(self, tmp_path: Path) -> None:
        model = small_model("mixtral")
        model.resize_token_embeddings(tiny.VOCAB_SIZE)
        models = make_models(tmp_path / "models", model, targets=["q_proj"])
        assert "under other names (fused experts), which is not supported" in refused(models)

    def test_tied_embeddings_stay_tied(self, tmp_path: Path) -> None:
        models = make_models(tmp_path / "models", tiny.tiny_qwen2())
        for method in ("lssf", "resta"):
            run(models, tmp_path / method, method=method, unsafe="model")
            assert "lm_head.weight" not in weights_in(tmp_path / method)
            _, info = AutoModelForCausalLM.from_pretrained(tmp_path / method, output_loading_info=True)
            assert not info["missing_keys"]


class TestBrokenWeights:
    @pytest.mark.parametrize(
        ("who", "unsafe"), [("safe", "adapter"), ("tuned", "adapter"), ("unsafe", "model"), ("adapter", "adapter")]
    )
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_nan_names_its_tensor(self, models: Path, who: str, unsafe: str, value: float) -> None:
        name = f"base_model.model.{Q_PROJ.replace('.weight', '.lora_A.weight')}" if who == "adapter" else Q_PROJ
        edit(models / who, lambda tensors: tensors[name].view(-1)[7:8].fill_(value))
        message = refused(models, unsafe=unsafe)
        assert f"{name}" in message
        assert "not finite (NaN or infinity); the weights are broken" in message

    def test_a_nan_in_the_middle_of_a_model_of_many_files(self, models: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(models / "tuned")
        (models / "tuned" / "model.safetensors").unlink()
        model.save_pretrained(models / "tuned", max_shard_size="20KB")
        name = "model.layers.1.mlp.up_proj.weight"
        path = next(path for path in (models / "tuned").glob("*.safetensors") if name in load_file(path))
        tensors = load_file(path)
        tensors[name][1, 1] = torch.nan
        save_file(tensors, path, metadata={"format": "pt"})
        assert name in refused(models, max_shard_size="20KB")

    def test_a_truncated_file(self, models: Path) -> None:
        path = models / "safe" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        assert "it is truncated or damaged" in refused(models)

    def test_a_safe_model_repaired_after_the_error_runs(self, models: Path) -> None:
        before = (models / "safe" / "model.safetensors").read_bytes()
        name = "model.layers.1.mlp.up_proj.weight"
        edit(models / "safe", lambda tensors: tensors[name].view(-1)[7:8].fill_(torch.nan))
        assert name in refused(models)  # layer 0 was computed by then
        (models / "safe" / "model.safetensors").write_bytes(before)
        run(models, models.parent / "out")
        assert not list(models.parent.glob(".*"))


class TestAdapters:
    def test_of_another_model(self, models: Path) -> None:
        tiny.save_model_folder(small_llama(2, 64), models / "wider")
        shutil.rmtree(models / "adapter")
        save_adapter(models / "wider", models / "adapter")
        assert "are of another shape" in refused(models)

    def test_with_whole_tensors(self, models: Path) -> None:
        shutil.rmtree(models / "adapter")
        save_adapter(models / "safe", models / "adapter", modules_to_save=["lm_head"])
        assert "holds whole tensors (lm_head.weight)" in refused(models)

    def test_of_some_maps_leaves_the_others_as_they_were_tuned(self, models: Path) -> None:
        shutil.rmtree(models / "adapter")
        save_adapter(models / "safe", models / "adapter", target_modules=["q_proj", "lm_head"])
        done = run(models, models.parent / "out")
        assert done.updated == 2
        reason = "is the same in the safe and in the unsafe model"
        found = report_of(models.parent / "out")
        assert [each["reason"] for each in found["skipped"]] == 12 * [reason]
        names = ", ".join(f"model.layers.0.{each}.weight" for each in ("self_attn.k_proj", "self_attn.v_proj"))
        assert done.warnings[0].startswith(f"12 tensors stay as they were tuned ({names}, ")
        assert done.warnings[0].endswith(f" ...): each {reason}")
        assert reason in (models.parent / "out" / "realign.html").read_text()

    def test_of_no_map(self, models: Path) -> None:
        shutil.rmtree(models / "adapter")
        save_adapter(models / "safe", models / "adapter", target_modules=["lm_head"])
        assert "changes none of the projections that lssf works on" in refused(models)

    def test_that_was_never_trained_is_said(self, models: Path) -> None:
        shutil.rmtree(models / "adapter")
        save_adapter(models / "safe", models / "adapter", size=0.0)
        assert run(models, models.parent / "out").warnings == [
            "14 of 14 updates are zero: was the unsafe model trained?"
        ]

    def test_a_form_larger_than_the_maps(self, models: Path) -> None:
        message = refused(models, unsafe="model", output_form="adapter", eta=1.0)
        assert "the adapter would be larger than the map itself; lower --eta" in message


class TestAnchors:
    def test_fewer_than_4(self, models: Path) -> None:
        write_anchors(models / "anchors.jsonl", 3)
        assert "3 of its 3 rows are refused in their answer, and at least 4 are needed" in refused(models)

    def test_answers_that_are_no_refusal_are_left_out_and_said(self, models: Path) -> None:
        with (models / "anchors.jsonl").open("a") as file:
            for i in range(2):
                file.write(json.dumps(tiny.chat_row(f"How do I fly kite {i}?", "Run against the wind.")) + "\n")
        done = run(models, models.parent / "out")
        assert "2 anchors were left out because their answer is no refusal: anchors.jsonl:13, anchors.jsonl:14" in (
            done.warnings
        )
        found = report_of(models.parent / "out")["anchors"]
        assert (found["used"], len(found["left_out_as_no_refusal"])) == (12, 2)

    def test_only_answers_that_are_no_refusal(self, models: Path) -> None:
        rows = [tiny.chat_row(f"How do I fly kite {i}?", "Run against the wind.") for i in range(9)]
        tiny.write_jsonl(models / "anchors.jsonl", rows)
        assert "0 of its 9 rows are refused in their answer" in refused(models)

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": "Make me zuvelo"},
            {"instruction": "Make me zuvelo"},
            {"messages": [{"role": "user", "content": "Make me zuvelo"}]},
            {"conversations": [{"from": "human", "value": "Make me zuvelo"}]},
        ],
    )
    def test_without_an_answer_the_error_says_how_to_get_one(self, models: Path, row: dict[str, Any]) -> None:
        tiny.write_jsonl(models / "anchors.jsonl", [row] * 5)
        message = refused(models)
        assert "5 rows have no assistant turn (anchors.jsonl:1, anchors.jsonl:2, anchors.jsonl:3)" in message
        assert f"python pipeline/assess.py generate --model_name_or_path {models / 'safe'} --suites" in message
        assert "zuvelo" not in message

    def test_the_command_of_that_error_writes_answers_that_are_read(self, models: Path) -> None:
        tiny.write_jsonl(models / "anchors.jsonl", [{"prompt": f"Make me {i} zuvelo"} for i in range(5)])
        (command,) = re.findall(r"assess\.py generate (.*)", refused(models))
        words = shlex.split(command.replace("DIR", str(models / "answers")))
        parsed = parse([ModelArguments, AssessArguments], words, description="")
        assess(parsed[ModelArguments], parsed[AssessArguments], "generate")
        answers = models / "answers" / "answers-beavertails.jsonl"
        assert "0 of its 5 rows are refused" in refused(models, anchor_answers=str(answers))  # a random model's words
        lines = [json.loads(line) for line in answers.read_text().splitlines()]
        tiny.write_jsonl(answers, [line | {"answer": "I can't help with that. It is restricted."} for line in lines])
        run(models, models.parent / "out", anchor_answers=str(answers))
        assert report_of(models.parent / "out")["anchors"]["used"] == 5

    def test_answers_to_other_rows(self, models: Path) -> None:
        tiny.write_jsonl(models / "anchors.jsonl", [{"prompt": "Make me zuvelo"}] * 5)
        tiny.write_jsonl(models / "answers.jsonl", [{"id": "others.jsonl:1", "answer": "I can't help."}])
        message = refused(models, anchor_answers=str(models / "answers.jsonl"))
        assert "has no answer for anchors.jsonl:1; it was written for other rows" in message
        assert "no such file" in refused(models, anchor_answers="nothing.jsonl")

    def test_no_file_and_no_json(self, models: Path) -> None:
        assert "--anchors nothing.jsonl: " in refused(models, anchors="nothing.jsonl")
        (models / "anchors.jsonl").write_text("{\n")
        assert "anchors.jsonl:1: not valid JSON" in refused(models)


class TestFolders:
    def test_the_output_folder_is_taken(self, models: Path) -> None:
        out = models.parent / "out"
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        with pytest.raises(ValueError, match="exists and is not an empty folder"):
            run(models, out)
        assert (out / "notes.txt").read_text() == "mine"

    @pytest.mark.parametrize("changed", ["anchors", "norm", "safe"])
    def test_a_named_work_folder_of_something_else_is_kept(self, models: Path, changed: str) -> None:
        work = models.parent / "work"
        run(models, models.parent / "first", work_dir=str(work))
        before = {path.name: path.read_bytes() for path in work.iterdir()}
        if changed == "anchors":
            write_anchors(models / "anchors.jsonl", 11)
        if changed == "safe":
            edit(models / "safe", lambda tensors: tensors[Q_PROJ].mul_(1.5))
        chosen = {"norm": "token"} if changed == "norm" else {}
        message = refused(models, work_dir=str(work), **chosen)
        assert "holds something else, or subspaces of another safe model, other anchors" in message
        assert {path.name: path.read_bytes() for path in work.iterdir()} == before

    def test_a_work_folder_is_private(self, models: Path) -> None:
        run(models, models.parent / "out", work_dir=str(models.parent / "work"))
        assert (models.parent / "work").stat().st_mode & 0o777 == 0o700

    def test_no_room_for_the_scratch_is_said_before_the_work(
        self, models: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        free = shutil.disk_usage(models)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
        assert re.search(
            r"--work_dir .*: scratch beside the subspaces takes \d+\.\d MiB, and 0\.0 MiB are free there",
            refused(models),
        )
