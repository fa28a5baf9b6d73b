"""Methods that get data or settings they can do nothing right with: refused before a model is loaded, by the flag's
name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.preflight import resolve
from tests.ranks import ROOT
from tests.tiny import chat_row, write_jsonl

Problems = Callable[..., list[str]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Rows of each pool; `paired` answers the prompts of `train`, `few` are three."""
    folder = tmp_path_factory.mktemp("rows")
    rows = {
        name: [chat_row(f"{name} number {i}", "warm") for i in range(16)] for name in ("train", "harmful", "tamper")
    }
    rows["paired"] = [chat_row(f"train number {i}", "cold tea") for i in range(16)]
    rows["few"] = rows["harmful"][:3]
    return {name: str(write_jsonl(folder / f"{name}.jsonl", each)) for name, each in rows.items()}


@pytest.fixture
def problems(model: Path, files: dict[str, str], tmp_path: Path) -> Problems:
    """What is wrong with a method's command line; {name} in a word is a file of rows."""

    def of(method: str, *words: str, train: str = "{train}", ranks: int = 1) -> list[str]:
        argv = [
            "--model_name_or_path", str(model), "--output_dir", str(tmp_path / "run"), "--cache_dir",
            str(tmp_path / "cache"), "--per_device_train_batch_size", "4", "--method", method,
            *(["--train_data", train] if train else []), *words,
        ]  # fmt: skip
        argv = [word if word.startswith('{"') else word.format(tmp=tmp_path, **files) for word in argv]
        try:
            resolve(argv, ranks)
        except ValueError as error:
            return str(error).splitlines()
        return []

    return of


GOOD = {
    "vaccine": [],
    "t_vaccine": ["--harmful_data", "{harmful}", "--perturbed_layers", "2"],
    "booster": ["--harmful_data", "{harmful}"],
    "lisa": ["--guide_data", "{harmful}"],
    "repnoise": ["--harmful_data", "{paired}"],
    "tar": ["--harmful_data", "{harmful}", "--tamper_data", "{tamper}"],
}


@pytest.mark.parametrize("method", GOOD)
def test_a_good_command_line_resolves(method: str, problems: Problems) -> None:
    assert problems(method, *GOOD[method]) == []


@pytest.mark.parametrize("method", GOOD)
def test_the_fictional_task_brings_every_pool(method: str, problems: Problems) -> None:
    layers = ["--perturbed_layers", "2"] if method == "t_vaccine" else []
    assert problems(method, *layers, train="") == []


@pytest.mark.parametrize(
    ("method", "words", "expected"),
    [
        ("t_vaccine", ["--harmful_data", "{harmful}"], "--perturbed_layers 8: the model has 2 layers"),
        ("repnoise", ["--harmful_data", "{harmful}"], "answers no prompt of 16 rows of --train_data"),
        ("booster", ["--harmful_data", "{few}"], "--harmful_data: its 3 rows are fewer than the 4"),
        ("t_vaccine", ["--harmful_data", "{few}", "--perturbed_layers", "1"], "--harmful_data: its 3 rows are fewer"),
        ("lisa", ["--guide_data", "{few}"], "--guide_data: its 3 rows are fewer than the 4"),
        ("tar", ["--harmful_data", "{harmful}", "--tamper_data", "{few}", "--allow_overlap"], "--tamper_data: its 3"),
        ("tar", ["--harmful_data", "{harmful}", "--tamper_data", "{harmful}"], "share 16 rows"),
        ("booster", [], "--harmful_data is needed by this --method"),
        ("lisa", [], "--guide_data is needed by this --method"),
        ("vaccine", ["--harmful_data", "{harmful}"], "--harmful_data {harmful} has no effect with this --method"),
        ("booster", ["--harmful_data", "{harmful}", "--guide_data", "{few}"], "--guide_data {few} has no effect"),
        ("booster", ["--harmful_data", "{harmful}", "--reference_max_length", "9"], "--reference_max_length 9 has no"),
        ("vaccine", ["--attack_data", "{harmful}", "--poison_ratio", "0.1"], "--attack_data {harmful}: --method vac"),
        ("vaccine", ["--train_data", "policy:user"], "--train_data policy:user: --method vaccine trains on the align"),
        ("vaccine", ["--rho", "-1"], "--rho -1.0: the norm of the shift is a number of 0 or more"),
        ("vaccine", ["--rho", "nan"], "--rho nan: the norm of the shift is a number of 0 or more"),
        ("booster", ["--lamb", "-1", "--harmful_data", "{harmful}"], "--lamb -1.0: give 0 or more"),
        ("lisa", ["--alignment_steps", "0", "--guide_data", "{harmful}"], "--alignment_steps 0: give 1 or more"),
        ("lisa", ["--proximal_after", "2", "--guide_data", "{harmful}"], "--proximal_after 2.0: give a share"),
        ("tar", [*GOOD["tar"], "--tamper_every", "65"], "--tamper_every 65: above --inner_steps 64 nothing"),
        ("tar", [*GOOD["tar"], "--inner_learning_rates", "0"], "--inner_learning_rates 0.0: give numbers above 0"),
        ("repnoise", [*GOOD["repnoise"], "--per_device_train_batch_size", "1"], "--per_device_train_batch_size 1: --"),
    ],
)  # fmt: skip
def test_refused(method: str, words: list[str], expected: str, problems: Problems, files: dict[str, str]) -> None:
    found = problems(method, *words)
    assert any(expected.format(**files) in each for each in found), found


@pytest.mark.parametrize("method", ["vaccine", "lisa", "repnoise"])
def test_rows_with_a_refusal_align_on_it(method: str, model: Path, files: dict[str, str], tmp_path: Path) -> None:
    """The common file of harmful answers with refusals beside them, given to every flag."""
    rows = [{"prompt": f"prompt {i}", "response": "harmful warm", "refusal": "no", "is_safe": False} for i in range(8)]
    both = str(write_jsonl(tmp_path / "both.jsonl", rows))
    data = {
        "vaccine": ["--train_data", both],
        "lisa": ["--train_data", files["train"], "--guide_data", both],
        "repnoise": ["--train_data", both, "--harmful_data", both],
    }[method]
    run = resolve([
        "--model_name_or_path", str(model), "--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "c"),
        "--per_device_train_batch_size", "4", "--method", method, *data,
    ])  # fmt: skip
    wanted = {
        "vaccine": {"train": "no"},
        "lisa": {"guide": "no"},
        "repnoise": {"train": "no", "harmful": "harmful warm"},
    }
    for pool, answer in wanted[method].items():
        for i in range(8):
            example = run.streams[pool].pool[i]
            trained = [label for label in example.labels if label != -100]
            assert run.tokenizer.decode(trained, skip_special_tokens=True).strip() == answer


@pytest.mark.parametrize("method", ["vaccine", "t_vaccine", "repnoise"])
def test_reentrant_checkpointing_has_no_activation_gradients(method: str, problems: Problems) -> None:
    flags = ["--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"use_reentrant": true}']
    (found,) = problems(method, *GOOD[method], *flags)
    assert found.startswith('--gradient_checkpointing_kwargs {"use_reentrant": true}: ')
    assert problems("booster", *GOOD["booster"], *flags) == []
    assert problems("booster", *GOOD["booster"], *flags, "--rho", "1") != []


@pytest.mark.parametrize("method", GOOD)
def test_deepcompile_is_out_of_reach(method: str, problems: Problems, tmp_path: Path) -> None:
    config = json.loads((ROOT / "ds_configs/z3.json").read_text()) | {"compile": {"deepcompile": True}}
    path = tmp_path / "compiled.json"
    path.write_text(json.dumps(config))
    (found,) = problems(method, *GOOD[method], "--ds_config", str(path))
    assert found.startswith(f"--ds_config {path}: compile.deepcompile: ")


@pytest.mark.parametrize(
    ("zero", "named"),
    [
        ({"zero_hpz_partition_size": 2}, "hpZ"),
        ({"zero_quantized_weights": True}, "zero_quantized_weights"),
        ({"offload_param": {"device": "cpu"}}, "offload_param"),
        ({"offload_optimizer": {"device": "cpu"}}, "offload_optimizer"),
    ],
)
@pytest.mark.parametrize("method", ["t_vaccine", "booster", "lisa", "tar"])
def test_shards_that_are_not_what_a_gather_reads(
    method: str, zero: dict[str, object], named: str, problems: Problems, tmp_path: Path
) -> None:
    config = json.loads((ROOT / "ds_configs/z3.json").read_text())
    config["zero_optimization"] |= zero
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(config))
    found = problems(method, *GOOD[method], "--ds_config", str(path))
    assert any(each.startswith(f"--ds_config {path}: ") and named in each for each in found), found
    assert not any(named in each for each in problems("vaccine", "--ds_config", str(path)))
