"""The phases of an evaluation one by one, and other tasks by lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ModelArguments
from pipeline.evaluation.jsonl import append_lines, read_lines
from pipeline.evaluation.report_phase import summary
from pipeline.evaluation.run import AssessArguments, assess
from tests import suite_rows, tiny


class TestPhases:
    """Each phase in its own call; the later ones know the folder alone."""

    def run(self, out: Path, phase: str, model: Path | None = None, **settings: Any) -> dict[str, Any]:
        arguments = ModelArguments(model_name_or_path=str(model or out / "nowhere"))
        return assess(arguments, AssessArguments(output_dir=str(out), **settings), phase)  # type: ignore[arg-type]

    def test_they_run_apart(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        with pytest.raises(ValueError, match="holds no answers; run `python pipeline/assess.py generate` first"):
            self.run(out, "judge")
        names = ["xstest", "sst2"]
        data = [f"{name}={suite_rows.WRITERS[name](tmp_path)}" for name in names]
        self.run(out, "generate", tiny_model_dir, suites=[",".join(names)], suite_data=data, max_new_tokens=4)
        assert sorted(path.name for path in out.iterdir()) == [
            "answers-sst2.jsonl", "answers-xstest.jsonl", "settings.json"
        ]  # fmt: skip
        with pytest.raises(ValueError, match="no such file; run `python pipeline/assess.py judge` first"):
            self.run(out, "report")
        assert self.run(out, "judge") == {}
        results = self.run(out, "report")
        assert results == json.loads((out / "results.json").read_text())
        assert set(results["suites"]) == {"xstest", "sst2"}
        assert results["suites"]["xstest"]["over_refusal"]["by"]["homonyms"]["n"] == 1
        assert results["settings"]["suites"]["xstest"]["judge"]["name"] == "refusal_xstest"

        with pytest.raises(ValueError, match=r"holds verdicts of another judge \(its name, template_sha256 differs\)"):
            self.run(out, "judge", judges=["xstest=refusal_advbench"])
        (out / "verdicts-xstest.jsonl").unlink()
        self.run(out, "judge", judges=["xstest=refusal_advbench"])
        assert self.run(out, "report")["settings"]["suites"]["xstest"]["judge"]["name"] == "refusal_advbench"
        tiny.write_jsonl(tmp_path / "sst2.jsonl", [{"sentence": "another film", "label": 1}])
        with pytest.raises(ValueError, match=r"--suite_data sst2=.*: not the rows that were asked"):
            self.run(out, "judge")

    def test_the_paper_protocol_leaves_its_record(
        self, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """All harmful suites, with a baseline judge in place of the 7B one."""
        names = ["beavertails", "harmbench", "sorrybench"]
        results = self.run(
            tmp_path / "out", "all", tiny_model_dir, suites=names, protocol="paper", max_new_tokens=4,
            suite_data=[f"{name}={suite_rows.WRITERS[name](tmp_path)}" for name in names],
            judges=[f"{name}=refusal_advbench" for name in names],
        )  # fmt: skip
        for name in names:
            settings = results["settings"]["suites"][name]
            assert settings["protocol"] == "paper"
            assert settings["bos_tokens"] == 0  # this tokenizer adds none, and the Alpaca prompt has none
            assert settings["n"] == results["suites"][name]["harmful_score"]["n"] == 4
        assert set(results["suites"]["harmbench"]["harmful_score"]["by"]) == {"weather", "kitchen", "copyright"}
        assert "CC-BY-NC-4.0" in summary(results)
        assert "kite" not in capsys.readouterr().out

    def test_what_is_left_out_and_unparsed_is_said(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        data = [f"harmbench={suite_rows.harmbench(tmp_path)}"]
        self.run(out, "generate", tiny_model_dir, suites=["harmbench"], suite_data=data, max_new_tokens=4)
        self.run(out, "judge", judges=["harmbench=refusal_xstest"])
        lines = read_lines(out / "verdicts-harmbench.jsonl")
        lines[0] |= {"verdict": "unparsed", "injected": 2}
        (out / "verdicts-harmbench.jsonl").unlink()
        append_lines(out / "verdicts-harmbench.jsonl", lines)
        results = self.run(out, "report")
        score = results["suites"]["harmbench"]["harmful_score"]
        assert (score["n"], score["unparsed"], score["injected"]) == (2, 1, 1)
        shown = summary(results)
        assert "1 unparsed verdicts" in shown
        assert "1 answers with marks of the judge's prompt, neutralised" in shown
        assert "left out: 1 copyright behaviours" in shown
        (out / "verdicts-harmbench.jsonl").unlink()
        append_lines(out / "verdicts-harmbench.jsonl", [line | {"verdict": "unparsed"} for line in lines])
        with pytest.raises(ValueError, match="none of its 3 verdicts could be parsed"):
            self.run(out, "report")

    def test_a_task_of_the_harness_without_it_names_the_command(
        self, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name))
        with pytest.raises(ValueError, match=r"pip install -e '\.\[lm-eval\]'"):
            self.run(tmp_path, "generate", tiny_model_dir, lm_eval_tasks=["kites"])

    def test_a_task_of_the_harness(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install -e '.[lm-eval]'")
        rows = [{"sentence": f"The kite number {i} was fine.", "label": i % 2} for i in range(6)]
        task = {
            "task": "kites", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
            "dataset_kwargs": {"data_files": {"test": str(tiny.write_jsonl(tmp_path / "kites.jsonl", rows))}},
            "doc_to_text": "Sentiment of: {{sentence}}", "doc_to_choice": ["negative", "positive"],
            "doc_to_target": "label", "metric_list": [{"metric": "acc"}],
        }  # fmt: skip
        (tmp_path / "kites.yaml").write_text(json.dumps(task))
        results = self.run(
            tmp_path / "out", "all", tiny_model_dir, suites=[], lm_eval_tasks=["kites"],
            lm_eval_include_path=str(tmp_path),
        )  # fmt: skip
        assert results["lm_eval"]["kites"]["n"] == 6
        assert 0 <= results["lm_eval"]["kites"]["acc,none"] <= 1
        assert "kites" in summary(results)
        with pytest.raises(ValueError, match="has no such task"):
            self.run(tmp_path / "out", "generate", tiny_model_dir, suites=[], lm_eval_tasks=["kits"])
