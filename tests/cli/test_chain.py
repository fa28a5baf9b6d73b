"""The chain runner as users start it, mostly with two light doors, match and compare, on hand-written runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.chain.doors import DOORS
from pipeline.chain.flags import FLAGS
from tests.runs import METRIC, write_assessment, write_run

ROOT = Path(__file__).resolve().parents[2]


def chain(recipe: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/chain.py", str(recipe), *flags]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300, check=False)


def write_recipe(path: Path, stages: list[dict[str, Any]], **keys: Any) -> Path:
    recipe = {"name": "test", "output_dir": str(path.parent / "out"), "stages": stages, **keys}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def light_stages(tmp_path: Path) -> list[dict[str, Any]]:
    """Two stages that take no time: find the control of a run, and a table with it."""
    sft = write_run(tmp_path / "runs/sft", {2: 3.0, 4: 2.0, 6: 1.0}, saved=[2, 4, 6])
    surgery = write_run(tmp_path / "runs/surgery", {6: 2.1})
    answers = write_assessment(tmp_path / "runs/answers")
    rows = [f"Control=assess:{answers};match:{{control}}"]
    return [
        {"name": "table", "run": "compare", "with": {"rows": rows}},
        {"name": "control", "run": "match", "with": {"run": str(sft), "like": str(surgery), "metric": METRIC}},
    ]


def test_stages_run_in_order_of_what_they_need_and_only_once(
    tmp_path: Path, light_stages: list[dict[str, Any]]
) -> None:
    recipe = write_recipe(tmp_path / "chain.yaml", light_stages)
    first = chain(recipe)
    assert first.returncode == 0, first.stderr
    assert first.stdout.index("[1/2] control: finished in") < first.stdout.index("[2/2] table: finished in")
    table = (tmp_path / "out/table/table.md").read_text()
    assert first.stdout.endswith(table)
    assert "sft at step 4" in table
    assert "| Control |" in (tmp_path / "out/logs/table.log").read_text()

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("[!.]*/*")}
    second = chain(recipe)
    assert second.returncode == 0
    assert "[1/2] control: finished before" in second.stdout
    assert "[2/2] table: finished before" in second.stdout
    assert second.stdout.endswith(table)
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_a_changed_stage_is_named_and_nothing_is_touched(tmp_path: Path, light_stages: list[dict[str, Any]]) -> None:
    recipe = write_recipe(tmp_path / "chain.yaml", light_stages)
    assert chain(recipe).returncode == 0
    before = (tmp_path / "out/control/match.json").read_text()
    light_stages[1]["with"]["like"] = light_stages[1]["with"]["run"]
    write_recipe(recipe, light_stages)
    changed = chain(recipe)
    assert changed.returncode == 2
    assert f"{tmp_path / 'out/control'} was made by a stage control with another definition" in changed.stderr
    assert "use another --output_dir, or remove" in changed.stderr
    assert (tmp_path / "out/control/match.json").read_text() == before

    # The remedies it names: another folder, and the removal of the stage's own; what depends on it is made anew too.
    assert chain(recipe, "--output_dir", str(tmp_path / "other")).returncode == 0
    for path in (tmp_path / "out/control").iterdir():
        path.unlink()
    (tmp_path / "out/control").rmdir()
    again = chain(recipe)
    assert again.returncode == 0, again.stderr
    assert "sft at step 6" in (tmp_path / "out/table/table.md").read_text()


def test_a_failed_stage_is_named_with_the_end_of_its_log_and_the_next_start_goes_on_there(
    tmp_path: Path, light_stages: list[dict[str, Any]]
) -> None:
    other = tmp_path / "runs/later"
    light_stages.append(
        {
            "name": "second",
            "run": "match",
            "after": ["table"],
            "with": {**light_stages[1]["with"], "like": str(other)},
        }
    )
    recipe = write_recipe(tmp_path / "chain.yaml", light_stages)
    failed = chain(recipe)
    assert failed.returncode == 1
    assert "stage second failed with exit code 2" in failed.stderr
    assert str(tmp_path / "out/logs/second.log") in failed.stderr
    assert f"error: {other / 'metrics.jsonl'}: no such file" in failed.stderr
    (tmp_path / "out/second").mkdir(exist_ok=True)
    (tmp_path / "out/second/half-written").write_text("")
    write_run(other, {6: 1.0})
    later = chain(recipe)
    assert later.returncode == 0
    assert "[2/3] table: finished before" in later.stdout
    assert json.loads((tmp_path / "out/second/match.json").read_text())["step"] == 6
    assert not (tmp_path / "out/second/half-written").exists()


def test_a_dry_run_shows_commands_and_states_and_creates_nothing(
    tmp_path: Path, light_stages: list[dict[str, Any]]
) -> None:
    recipe = write_recipe(tmp_path / "chain.yaml", light_stages)
    shown = chain(recipe, "--dry_run")
    assert shown.returncode == 0
    assert "[1/2] control: to run" in shown.stdout
    assert f"--metric {METRIC}" in shown.stdout
    assert not (tmp_path / "out").exists()
    assert chain(recipe).returncode == 0
    assert chain(recipe, "--dry_run").stdout == "[1/2] control: finished\n[2/2] table: finished\n"


def test_a_matrix_runs_each_stage_for_every_seed_and_joins_them_in_a_stage_that_runs_once(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_run(tmp_path / f"runs/sft{seed}", {2: 3.0, 4: 1.0}, saved=[2, 4])
        write_run(tmp_path / f"runs/surgery{seed}", {4: float(seed)})
        write_assessment(tmp_path / f"runs/answers{seed}", harmful=10 * seed)
    runs = {"run": str(tmp_path / "runs/sft{seed}"), "like": str(tmp_path / "runs/surgery{seed}"), "metric": METRIC}
    answers = ",".join(str(tmp_path / f"runs/answers{seed}") for seed in (1, 2))
    rows = [f"Control=assess:{answers};match:{{control}}"]
    stages = [
        {"name": "control", "run": "match", "with": runs},
        {"name": "table", "run": "compare", "once": True, "with": {"rows": rows}},
    ]
    done = chain(write_recipe(tmp_path / "chain.yaml", stages, matrix={"seed": [1, 2]}))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in sorted((tmp_path / "out").iterdir()) if not path.name.startswith(".")] == [
        "control-seed1",
        "control-seed2",
        "logs",
        "table",
    ]
    assert "25.0%" in done.stdout  # 30 of 120
    assert "sft1 at step 4" in done.stdout
    assert "sft2 at step 2" in done.stdout or "sft2 at step 4" in done.stdout


def test_axes_repeat_only_the_stages_that_depend_on_them(tmp_path: Path) -> None:
    """Two axes: one stage depends on the seed, one on both and not for ratio 0; the table has a row for each ratio,
    with the folders of all seeds."""
    for seed in (1, 2):
        write_run(tmp_path / f"sft{seed}", {2: 3.0, 4: 1.0}, saved=[2, 4])
        write_run(tmp_path / f"surgery{seed}", {4: 1.0})
        write_assessment(tmp_path / f"answers{seed}")
    answers = ",".join(str(tmp_path / f"answers{seed}") for seed in (1, 2))
    stages = [
        {
            "name": "poisoned",
            "run": "match",
            "skip": {"ratio": [0]},
            "after": ["first"],
            "with": {"run": "{first}/checkpoint", "like": "{other}", "metric": METRIC},
        },
        {
            "name": "first",
            "run": "match",
            "with": {"run": f"{tmp_path}/sft{{seed}}", "like": f"{tmp_path}/surgery{{seed}}", "metric": METRIC},
        },
        {
            "name": "table",
            "run": "compare",
            "once": True,
            "with": {
                "rows": [
                    f"Aligned=assess:{answers};match:{{first}}",
                    f"Poisoned {{ratio}}=assess:{answers};match:{{poisoned}}",
                ]
            },
        },
    ]
    other = [{"ratio": 0, "other": "none"}, {"ratio": 0.1, "other": "low"}, {"ratio": 0.2, "other": "high"}]
    recipe = write_recipe(tmp_path / "chain.yaml", stages, matrix={"seed": [1, 2], "ratio": other})
    shown = chain(recipe, "--dry_run")
    assert shown.returncode == 0, shown.stderr
    names = [
        "first-seed1", "poisoned-seed1-ratio0.1", "poisoned-seed1-ratio0.2",
        "first-seed2", "poisoned-seed2-ratio0.1", "poisoned-seed2-ratio0.2", "table",
    ]  # fmt: skip
    assert re.findall(r"^\[\d/7\] (\S+): to run", shown.stdout, re.MULTILINE) == names
    assert shown.stdout.count("--like low") == shown.stdout.count("--like high") == 2
    out = tmp_path / "out"
    rows = shown.stdout.split("--rows ")[1]
    for ratio in ("0.1", "0.2"):
        folders = ",".join(str(out / f"poisoned-seed{seed}-ratio{ratio}") for seed in (1, 2))
        assert f"'Poisoned {ratio}=assess:{answers};match:{folders}'" in rows
    assert "Poisoned 0=" not in rows
    assert f"match:{out / 'first-seed1'},{out / 'first-seed2'}" in rows


def test_folders_the_chain_did_not_make_are_left_alone(tmp_path: Path, light_stages: list[dict[str, Any]]) -> None:
    (tmp_path / "out/control").mkdir(parents=True)
    (tmp_path / "out/control/precious").write_text("mine")
    refused = chain(write_recipe(tmp_path / "chain.yaml", light_stages))
    assert refused.returncode == 2
    assert f"{tmp_path / 'out/control'} holds something, and no stage of a chain made it" in refused.stderr
    assert (tmp_path / "out/control/precious").read_text() == "mine"


def test_a_folder_of_another_chain_is_refused(tmp_path: Path, light_stages: list[dict[str, Any]]) -> None:
    assert chain(write_recipe(tmp_path / "chain.yaml", light_stages)).returncode == 0
    renamed = [{**light_stages[1], "name": "match_up"}]
    refused = chain(write_recipe(tmp_path / "renamed.yaml", renamed))
    assert refused.returncode == 2
    for name in ("control", "table"):
        assert f"{tmp_path / 'out' / name} was made by a stage that the recipe does not have" in refused.stderr
    assert not (tmp_path / "out/match_up").exists()


CHAINS = [path for path in sorted((ROOT / "pipeline/recipes").glob("*.yaml")) if "stages:" in path.read_text()]


@pytest.mark.parametrize("path", CHAINS, ids=lambda path: path.stem)
def test_every_chain_of_the_house_is_ready_to_run(tmp_path: Path, path: Path) -> None:
    shown = chain(path, "--dry_run", "--output_dir", str(tmp_path / "out"))
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^\[1/\d+\] \S+: to run$", shown.stdout, re.MULTILINE)


@pytest.mark.parametrize("run", FLAGS)
def test_the_runner_knows_the_flags_of_doors_with_a_parser_of_their_own(run: str) -> None:
    command = [sys.executable, DOORS[run].file, "--help"]
    shown = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=60, check=True).stdout
    assert set(re.findall(r"^  --(\w+)", shown, re.MULTILINE)) - {"output_dir"} == set(FLAGS[run])


MATCH = {"name": "a", "run": "match", "with": {"run": "x", "like": "y", "metric": "m"}}
TRAIN = {"name": "t", "run": "train", "with": {"train_data": "policy:user"}}


@pytest.mark.parametrize(
    ("recipe", "messages"),
    [
        ({"name": "n", "stages": [MATCH], "stage": []}, ["key stage is unknown; did you mean stages?"]),
        ({"stages": [MATCH]}, ["name: expected a text, got None"]),
        ({"name": "n", "stages": []}, ["stages: expected a list of stages"]),
        ({"name": "n", "stages": [MATCH, MATCH]}, ["stage a: the name stands twice"]),
        ({"name": "n", "stages": [{**MATCH, "name": "logs"}]}, ["name 'logs': expected letters"]),
        (
            {"name": "n", "stages": [{**MATCH, "run": "mesure", "wiht": {}}]},
            [
                "stage a: key wiht is unknown; did you mean with?",
                "stage a: run: mesure is no door; did you mean measure?",
            ],
        ),
        ({"name": "n", "stages": [{**MATCH, "with": {"run": "{b}", "like": "y"}}]}, ["stage a: {b} is unknown"]),
        ({"name": "n", "stages": [{**MATCH, "after": ["aa"]}]}, ["stage a: after: aa is unknown; did you mean a?"]),
        ({"name": "n", "stages": [{**MATCH, "with": {"like": "y"}}]}, ["stage a: with: run is missing"]),
        ({"name": "n", "stages": [{**MATCH, "ranks": 2}]}, ["stage a: ranks: 2 is not"]),
        ({"name": "n", "stages": [{**MATCH, "once": True}]}, ["stage a: once: has no effect without a matrix"]),
        (
            {"name": "n", "stages": [{**MATCH, "with": {"run": "x", "output_dir": "y", "like": None}}]},
            ["output_dir is filled in by the runner", "like: expected a text, a number"],
        ),
        (
            {"name": "n", "stages": [{**MATCH, "after": ["b"]}, {**MATCH, "name": "b", "after": ["a"]}]},
            ["stages wait for each other: a -> b -> a"],
        ),
        (
            {"name": "n", "matrix": {"seed": [1, 1], "rank": [1]}, "stages": [MATCH]},
            ["matrix: seed: a value stands twice in 1, 1", "matrix: rank is named by no stage"],
        ),
        ({"name": "n", "matrix": {"seed": [1, 2]}, "stages": [TRAIN]}, ["matrix: seed is named by no stage"]),
        ({"name": "n", "matrix": [1], "stages": [MATCH]}, ["matrix: expected {axis: [values]}, got [1]"]),
        (
            {"name": "n", "matrix": {"a": [1], "b": ["x/y"], "c": [{"c": 1}, {"d": 2}]}, "stages": [MATCH]},
            ["{a} is a stage, the chain's folder or", "a text without spaces and slashes", "and c among them"],
        ),
        (
            {"name": "n", "matrix": {"seed": [1, 2]}, "stages": [{**MATCH, "once": True, "with": {"run": "{seed}"}}]},
            ["{seed} has several values in a stage that runs once: name it in an item of a list"],
        ),
        (
            {"name": "n", "matrix": {"p": [1]}, "stages": [{**MATCH, "skip": {"q": [1], "p": [2]}}]},
            ["skip: q is no axis of the matrix", "skip: p has no value 2"],
        ),
        (
            {"name": "n", "stages": [{**MATCH, "with": {**MATCH["with"], "liek": 1}}]},
            ["--liek is unknown; did you mean like?"],
        ),
        (
            {"name": "n", "stages": [{**TRAIN, "with": {"learning_rat": 1}}]},
            ["stage t: --learning_rat is unknown; did you mean learning_rate?"],
        ),
        (  # one mistake, one message
            {
                "name": "n",
                "matrix": {"seed": [1, 2, 3]},
                "stages": [{**TRAIN, "with": {"seed": "{seed}", "learning_rat": 1}}],
            },
            ["error: stage t-seed1 and 2 more: --learning_rat is unknown; did you mean learning_rate?\n"],
        ),
        (
            {"name": "n", "stages": [{**TRAIN, "with": {"seed": "one"}}]},
            ["stage t: --seed: invalid int value"],
        ),
        (
            {
                "name": "n",
                "stages": [
                    {"name": "c", "run": "convert", "with": {"checkpoint": "x", "allow_attacked_model": False}}
                ],
            },
            ["stage c: --allow_attacked_model false: leave it out"],
        ),
        ({"name": "n", "stages": [{**TRAIN, "with": {"ds_config": "no.json"}}]}, ["ds_config no.json: no such file"]),
        (
            {
                "name": "n",
                "stages": [
                    {**TRAIN, "with": {"attack_data": "policy:attack", "poison_ratio": 0.1}},
                    {"name": "c", "run": "convert", "with": {"checkpoint": "{t}"}},
                ],
            },
            ["stage c: reads an attacked model; if that is meant, set allow_attacked_model: true"],
        ),
    ],
)
def test_every_problem_of_a_recipe_is_found_before_anything_runs(
    tmp_path: Path, recipe: dict[str, Any], messages: list[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    refused = chain(path, "--output_dir", str(tmp_path / "out"))
    assert refused.returncode == 2
    for message in messages:
        assert message in refused.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "not valid YAML"),
        ("- a", "expected a mapping"),
        ("name: a\nname: b\nstages: []", "key name stands twice"),
        (
            "name: a\nstages:\n- name: b\n  run: match\n  with:\n    run: x\n    run: y\n",
            "line 6: key run stands twice",
        ),
    ],
)
def test_a_recipe_that_is_no_mapping_or_says_a_thing_twice_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    refused = chain(path)
    assert refused.returncode == 2
    assert message in refused.stderr
