"""Answers that depend on nothing but model and prompt: not on batches, workers or interruptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from pipeline.config import ModelArguments
from pipeline.data.chat import ChatEncoder
from pipeline.evaluation import policy
from pipeline.evaluation.engine_transformers import NEAR_TIE, TransformersEngine
from pipeline.evaluation.generate import ask, generate
from pipeline.evaluation.jsonl import append_lines, read_lines
from pipeline.evaluation.model import EvaluatedModel
from pipeline.evaluation.protocol import Renderer
from pipeline.evaluation.shared_lines import make_lines
from pipeline.evaluation.suite import Prompt
from pipeline.evaluation.workers import Crew, start


@pytest.fixture(scope="module")
def encoder(tiny_model_dir: Path) -> ChatEncoder:
    return ChatEncoder(AutoTokenizer.from_pretrained(tiny_model_dir), max_length=256)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Any:
    return EvaluatedModel(ModelArguments(model_name_or_path=str(tiny_model_dir))).load()


class TestGeneration:
    prompts = policy.prompts(None, "chat").prompts[55:70]

    def answers(
        self, model: Any, encoder: ChatEncoder, path: Path, batch_size: int = 4, crew: Crew | None = None
    ) -> list[dict[str, Any]]:
        renderer = Renderer(policy.SUITE, "chat", encoder, None)
        generate(
            lambda: TransformersEngine(model, 0),
            lambda ids: renderer.answer(str(encoder.tokenizer.decode(ids, skip_special_tokens=True))),
            self.prompts,
            ask(self.prompts, renderer, max_new_tokens=8, max_length=256),
            path,
            crew or Crew(),
            batch_size=batch_size,
            max_new_tokens=8,
        )
        return read_lines(path)

    def ids(self, encoder: ChatEncoder, prompt: Prompt) -> list[int]:
        return encoder.encode_prompt([{"role": "user", "content": prompt.text}])

    def test_answer_equals_an_unbatched_greedy_loop(self, model: Any, encoder: ChatEncoder, tmp_path: Path) -> None:
        answers = {line["id"]: line for line in self.answers(model, encoder, tmp_path / "a.jsonl")}
        assert list(answers) == [prompt.id for prompt in self.prompts]
        for prompt in self.prompts:
            ids = self.ids(encoder, prompt)
            new: list[int] = []
            while len(new) < 8 and (not new or new[-1] != encoder.tokenizer.eos_token_id):
                new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
            expected = encoder.tokenizer.decode(new, skip_special_tokens=True).strip()
            assert answers[prompt.id]["answer"] == expected
            assert answers[prompt.id]["tokens"] == len(new)
            assert answers[prompt.id]["truncated"] == (new[-1] != encoder.tokenizer.eos_token_id)

    def test_interrupted_anywhere_it_writes_the_same_bytes(
        self, model: Any, encoder: ChatEncoder, tmp_path: Path
    ) -> None:
        self.answers(model, encoder, tmp_path / "whole.jsonl")
        whole = (tmp_path / "whole.jsonl").read_bytes()
        for cut in (0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1, len(whole)):
            path = tmp_path / f"cut-{cut}.jsonl"
            path.with_name(f"{path.name}.part0").write_bytes(whole[:cut])
            self.answers(model, encoder, path)
            assert path.read_bytes() == whole, cut
            assert not list(tmp_path.glob("*.part*"))

    def test_parts_of_any_number_of_workers_are_gone_on_with(
        self, model: Any, encoder: ChatEncoder, tmp_path: Path
    ) -> None:
        self.answers(model, encoder, tmp_path / "whole.jsonl")
        whole = (tmp_path / "whole.jsonl").read_bytes()
        path = tmp_path / "shared.jsonl"
        stop = Crew(1, 3)
        stop.wait = lambda ready: None  # type: ignore[method-assign]  # worker 1 of 3 does its share, then all end
        with pytest.raises(FileNotFoundError):
            self.answers(model, encoder, path, crew=stop)
        with path.with_name("shared.jsonl.part1").open("ab") as file:
            file.write(b'{"id": "torn')
        assert not path.exists()
        self.answers(model, encoder, path)
        assert path.read_bytes() == whole

    def test_finished_answers_need_no_model(self, model: Any, encoder: ChatEncoder, tmp_path: Path) -> None:
        self.answers(model, encoder, tmp_path / "a.jsonl")
        self.answers(None, encoder, tmp_path / "a.jsonl")

    def test_other_prompts_are_not_mixed_in(self, model: Any, encoder: ChatEncoder, tmp_path: Path) -> None:
        for name in ("a.jsonl", "b.jsonl.part0"):
            append_lines(tmp_path / name, [{"id": "elsewhere:1", "answer": "", "tokens": 1, "truncated": False}])
        for name in ("a.jsonl", "b.jsonl"):
            with pytest.raises(ValueError, match="lines of other prompts"):
                self.answers(model, encoder, tmp_path / name)

    def test_a_prompt_without_room_for_its_answer_is_named(self, encoder: ChatEncoder) -> None:
        long = Prompt(id="long:1", kind="task", question="", text="kite " * 300)
        with pytest.raises(ValueError, match=r"long:1: .*--max_length 256"):
            ask([long], Renderer(policy.SUITE, "chat", encoder, None), max_new_tokens=8, max_length=256)

    def test_answers_are_private(self, model: Any, encoder: ChatEncoder, tmp_path: Path) -> None:
        self.answers(model, encoder, tmp_path / "a.jsonl")
        assert (tmp_path / "a.jsonl").stat().st_mode & 0o777 == 0o600


class TestExactGreedy:
    """fp32: a batch changes nothing, not even where two tokens are as good as equal."""

    def prompts(self, encoder: ChatEncoder) -> list[list[int]]:
        texts = ["kite", "How do I bake bread?", "a " * 60, "soup and tea", "x", "What is warm?"]
        return [encoder.encode_prompt([{"role": "user", "content": text}]) for text in texts]

    def test_batch_size_order_and_padding_change_no_token(self, model: Any, encoder: ChatEncoder) -> None:
        prompts = self.prompts(encoder)
        engine = TransformersEngine(model, 0)
        alone = [engine.answer([prompt], 24)[0] for prompt in prompts]
        assert engine.answer(prompts, 24) == alone
        assert engine.answer(prompts[::-1], 24) == alone[::-1]
        assert TransformersEngine(model, 7).answer(prompts[2:], 24) == alone[2:]

    def test_a_tie_is_decided_alone(self, tiny_model_dir: Path, encoder: ChatEncoder) -> None:
        model = EvaluatedModel(ModelArguments(model_name_or_path=str(tiny_model_dir))).load()
        with torch.no_grad():  # every even token as good as the odd one after it, but for rounding
            head = model.lm_head.weight
            head[1::2] = head[::2] * (1 + 1e-7 * torch.randn(len(head) // 2, 1))
        prompts = self.prompts(encoder)
        engine = TransformersEngine(model, 0)
        alone = [engine.answer([prompt], 24)[0].ids for prompt in prompts]
        for size in (2, 3, 6):
            batched = [each.ids for i in range(0, 6, size) for each in engine.answer(prompts[i : i + size], 24)]
            assert batched == alone, size
        for prompt, ids in zip(prompts, alone, strict=True):
            for step, token in enumerate(ids):
                row = torch.tensor([prompt + ids[:step]])
                assert int(model(row, use_cache=False, logits_to_keep=1).logits[0, -1].argmax()) == token

    def test_what_a_batch_moves_is_far_below_a_near_tie(self, model: Any, encoder: ChatEncoder) -> None:
        prompts = self.prompts(encoder)
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(each)) + each for each in prompts])
        mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in prompts])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        batched = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
        alone = torch.stack([model(torch.tensor([each])).logits[0, -1] for each in prompts])
        assert (batched - alone).abs().max() < NEAR_TIE / 10


def failing(crew: Crew) -> None:
    raise ValueError("no such tea")


def test_a_worker_that_fails_ends_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    crew = start(Crew(size=2), failing)
    with pytest.raises(ValueError, match="worker 1 ended with code 2"):
        crew.wait(lambda: False)
    assert "error: worker 1: no such tea" in capfd.readouterr().out


def test_parts_that_a_kill_left_beside_the_whole_file_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_lines(path, [{"id": "tea:1"}])
    append_lines(tmp_path / "a.jsonl.part0", [{"id": "tea:1"}])
    make_lines(path, ["tea:1"], [[0]], lambda batch: [], Crew(), label="test")
    assert [each.name for each in tmp_path.iterdir()] == ["a.jsonl"]
