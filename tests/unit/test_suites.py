"""The suites: what they ask of invented rows in the public formats, under both protocols, and what they refuse."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pipeline.data.chat import ChatEncoder
from pipeline.evaluation import tasks
from pipeline.evaluation.protocol import PAPER_MAX_PROMPT, Renderer
from pipeline.evaluation.suite import Prompt
from pipeline.evaluation.suites import SUITES, suite_names
from pipeline.evaluation.templates import FOLDER, fill, read_template, sha256, sources
from tests import suite_rows, tiny

QUESTION, ANSWER, CONTEXT = "What is the capital of France?", "Paris.", "A geography quiz."
NOTICE = Path(__file__).parents[2] / "NOTICE"


def read(name: str, folder: Path, protocol: str = "chat") -> list[Prompt]:
    return list(SUITES[name].read(str(suite_rows.WRITERS[name](folder)), protocol).prompts)  # type: ignore[arg-type]


class TestTemplates:
    def test_every_file_is_the_one_its_source_had(self) -> None:
        listed = sources()
        assert {path.name for path in FOLDER.iterdir()} == {*listed, "SOURCES.json"}
        for name, source in listed.items():
            assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == source["sha256"], name
            assert source["licence"] in ("MIT", "Apache-2.0", "CC-BY-4.0")
            assert len(source["commit"]) == 40

    def test_the_notice_names_every_file_with_its_project_and_licence(self) -> None:
        full_names = {
            "MIT": "MIT License",
            "Apache-2.0": "Apache License, Version 2.0",
            "CC-BY-4.0": "Creative Commons Attribution 4.0",
        }
        entries = NOTICE.read_text(encoding="utf-8").split("\n\n")
        for name, source in sources().items():
            project = source["repository"].split()[0]
            (entry,) = [entry for entry in entries if f"https://github.com/{project}\n" in entry]
            assert name in entry
            assert full_names[source["licence"]] in entry

    @pytest.mark.parametrize(
        ("name", "values", "expected"),
        [  # of texts that the sources' own code rendered
            ("harmbench_standard.txt", ("behavior", "generation"), "39303b12b1f90d0d448cd14dea3130f58cf5fa0c"),
            (
                "harmbench_contextual.txt",
                ("behavior", "generation", "context"),
                "ddbfdd585379da662b0ebc524fcd33688789f104",
            ),
            ("alpaca.txt", ("instruction",), "626fca10122ec417b66430ad89a60832034f7f2e"),
        ],
    )
    def test_rendered_prompts_are_golden(self, name: str, values: tuple[str, ...], expected: str) -> None:
        texts = dict(zip(values, (QUESTION, ANSWER, CONTEXT), strict=False))
        assert sha256(fill(read_template(name), **texts)).startswith(expected)

    def test_a_place_inside_a_value_is_not_filled(self) -> None:
        assert fill("{a}|{b}|{c}", a="{b}", b="{a}{c}") == "{b}|{a}{c}|{c}"


class TestReading:
    def test_harmbench(self, tmp_path: Path) -> None:
        found = SUITES["harmbench"].read(str(suite_rows.harmbench(tmp_path)), "chat")
        assert [prompt.id for prompt in found.prompts] == [f"behaviors.csv:{line}" for line in (2, 3, 5)]
        assert sum(found.left_out.values()) == 1
        assert "copyright" in next(iter(found.left_out))
        plain, contextual, _ = found.prompts
        assert plain.text == plain.question == "Describe how to fly a kite"
        assert contextual.question == "Explain how the context's soup is made"
        assert contextual.context == "A soup of leeks."
        assert contextual.text == "A soup of leeks.\n\n---\n\nExplain how the context's soup is made"
        assert plain.category == "weather"

    def test_the_public_code_asks_harmbench_without_contexts(self, tmp_path: Path) -> None:
        found = read("harmbench", tmp_path, "paper")
        assert [prompt.text for prompt in found] == [each[0] for each in suite_rows.BEHAVIORS]
        assert not any(prompt.context for prompt in found)

    def test_beavertails_takes_safe_and_unsafe_rows_also_from_gzip(self, tmp_path: Path) -> None:
        plain = suite_rows.beavertails(tmp_path)
        packed = tmp_path / "test.jsonl.gz"
        packed.write_bytes(gzip.compress(plain.read_bytes()))
        for path in (plain, packed):
            prompts = SUITES["beavertails"].read(str(path), "chat").prompts
            assert [prompt.text for prompt in prompts] == [f"How warm is tea number {i}?" for i in range(4)]
            assert prompts[3].id == f"{path.name}:4"

    def test_xstest_has_benign_prompts_and_violations(self, tmp_path: Path) -> None:
        assert [prompt.kind for prompt in read("xstest", tmp_path)] == ["benign", "benign", "violation"]

    def test_sorrybench_has_categories(self, tmp_path: Path) -> None:
        prompts = read("sorrybench", tmp_path)
        assert {prompt.category for prompt in prompts} == {"1", "2"}
        assert prompts[0].text == "Please fold paper boat 0."

    def test_task_labels(self, tmp_path: Path) -> None:
        assert [prompt.label for prompt in read("sst2", tmp_path)] == ["negative", "positive"]
        assert [prompt.label for prompt in read("agnews", tmp_path)] == ["World", "Sports", "Business", "Sci/Tech"]
        assert [prompt.label for prompt in read("gsm8k", tmp_path)] == ["1,000", "1,001"]

    @pytest.mark.parametrize(
        ("name", "row", "message"),
        [
            (
                "beavertails",
                {"question": "tea?"},
                r"--suite_data beavertails=.*\nrows\.jsonl:2: column 'prompt' is missing",
            ),
            ("beavertails", {"prompt": " \n"}, r"^rows\.jsonl:2: 'prompt' is empty"),
            ("beavertails", {"prompt": 7}, r"^rows\.jsonl:2: 'prompt' is a int, expected text"),
            ("beavertails", {"prompt": "\ud83d"}, r"^rows\.jsonl:2: 'prompt' holds half a character"),
            ("sst2", {"sentence": "tea", "label": 2}, r"^rows\.jsonl:2: 'label' is '2', expected 0 to 1"),
            ("gsm8k", {"question": "tea?", "answer": "none"}, r"^rows\.jsonl:2: 'answer' ends without a number"),
            ("sorrybench", {"turns": [], "category": 1}, r"^rows\.jsonl:2: 'turns' is not a list of texts"),
        ],
    )
    def test_a_bad_row_is_named_by_file_and_line(
        self, name: str, row: dict[str, object], message: str, tmp_path: Path
    ) -> None:
        good = {"prompt": "a", "sentence": "a", "label": 1, "question": "a", "answer": "#### 1", "turns": ["a"]}
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in (good | {"category": 1}, row)))
        with pytest.raises(ValueError, match=message):
            SUITES[name].read(str(path), "chat")

    def test_a_missing_csv_column_is_named(self, tmp_path: Path) -> None:
        path = suite_rows.write_csv(tmp_path / "b.csv", ["Behaviour", "Tags"], [["fly", ""]])
        with pytest.raises(ValueError, match=r"b\.csv:2: column 'Behavior' is missing; it has 'Behaviour', 'Tags'"):
            SUITES["harmbench"].read(str(path), "chat")

    def test_bytes_that_are_no_text_are_named_and_not_shown(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b'{"prompt": "fine"}\n{"prompt": "secret \xff word"}\n')
        with pytest.raises(ValueError, match=r"rows\.jsonl:2: not UTF-8") as error:
            SUITES["beavertails"].read(str(path), "chat")
        assert "secret" not in str(error.value)

    def test_only_copyright_behaviours_cannot_be_judged(self, tmp_path: Path) -> None:
        path = suite_rows.harmbench(tmp_path)
        with pytest.raises(ValueError, match="none of its 1 behaviours can be judged"):
            SUITES["harmbench"].read(f"{path}[2:3]", "chat")

    @pytest.mark.parametrize("name", [name for name in SUITES if name != "policy"])
    def test_a_data_set_that_is_not_in_the_cache_names_the_fetch_command(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(ValueError, match=f"assess.py fetch --suites {name}` .*--suite_data {name}=FILE"):
            SUITES[name].read(None, "chat")

    def test_names_of_suites(self) -> None:
        assert suite_names(["policy,gsm8k", "sst2"]) == ["policy", "gsm8k", "sst2"]
        with pytest.raises(ValueError, match="--suites gsm8K: unknown; did you mean gsm8k"):
            suite_names(["gsm8K"])
        with pytest.raises(ValueError, match="stands twice"):
            suite_names(["policy,policy"])


@pytest.fixture(scope="module")
def encoder(tiny_model_dir: Path) -> ChatEncoder:
    return ChatEncoder(AutoTokenizer.from_pretrained(tiny_model_dir), max_length=512)


class TestProtocols:
    def asked(self, encoder: ChatEncoder, name: str, protocol: str, prompt: Prompt, system: str | None = None) -> str:
        renderer = Renderer(SUITES[name], protocol, encoder, system)  # type: ignore[arg-type]
        return str(encoder.tokenizer.decode(renderer.ask(prompt).ids))

    def test_paper_asks_harmful_prompts_in_the_alpaca_prompt(self, encoder: ChatEncoder, tmp_path: Path) -> None:
        prompt = read("beavertails", tmp_path)[0]
        text = self.asked(encoder, "beavertails", "paper", prompt)
        assert text == (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            f"\n\n### Instruction:\n{prompt.text}\n\n### Response:"
        )

    def test_paper_cuts_a_long_prompt_and_its_response_mark(self, encoder: ChatEncoder) -> None:
        long = Prompt(id="long", kind="violation", question="", text="kite " * 600)
        asked = Renderer(SUITES["beavertails"], "paper", encoder, None).ask(long)
        assert asked.cut
        assert len(asked.ids) == PAPER_MAX_PROMPT
        assert "### Response:" not in str(encoder.tokenizer.decode(asked.ids))

    def test_paper_takes_the_answer_up_to_the_next_mark(self, encoder: ChatEncoder) -> None:
        paper, chat = (Renderer(SUITES["beavertails"], each, encoder, None) for each in ("paper", "chat"))  # type: ignore[arg-type]
        assert paper.answer(" Warm.\n### Response: Cold.") == "Warm."
        assert chat.answer(" Warm.\n### Response: Cold.") == "Warm.\n### Response: Cold."

    def test_chat_uses_the_template_with_one_bos(self, encoder: ChatEncoder, tmp_path: Path) -> None:
        prompt = read("sst2", tmp_path)[0]
        text = self.asked(encoder, "sst2", "chat", prompt, system="Hi")
        assert text == (
            f"{tiny.BOS}{tiny.TURN_START}system\nHi{tiny.EOS}\n{tiny.TURN_START}user\n"
            "Analyze the sentiment of the input, and respond only positive or negative\na dull film"
            f"{tiny.EOS}\n{tiny.TURN_START}assistant\n"
        )

    def test_paper_asks_tasks_behind_its_system_turn(self, encoder: ChatEncoder, tmp_path: Path) -> None:
        text = self.asked(encoder, "agnews", "paper", read("agnews", tmp_path, "paper")[0])
        assert f"system\nYou are a helpful assistant.{tiny.EOS}" in text
        assert f"Sci/Tech\n\n### Input:\nNews of lands.{tiny.EOS}" in text

    def test_suites_that_the_public_code_lacks_are_asked_as_chat(self, encoder: ChatEncoder) -> None:
        renderer = Renderer(SUITES["policy"], "paper", encoder, None)
        assert renderer.protocol == "chat"


class TestRight:
    @pytest.mark.parametrize(
        ("answer", "number"),
        [
            ("The final answer is: 72", 72),
            ("1 + 1 = 2. The final answer is: $1,234.5, not 3", 1234.5),
            ("The final answer is: none of the 4", 4),
            ("The final answer is: none; 8 before", 8),
            ("It is 3 and then 12.", 12),
            ("-5", -5),
            ("none", math.inf),
        ],
    )
    def test_gsm8k_number(self, answer: str, number: float) -> None:
        assert tasks.gsm8k_number(answer) == number

    def test_labels(self) -> None:
        assert tasks.gsm8k_right("so 1000", "1,000")
        assert not tasks.gsm8k_right("so many", "1,000")
        assert tasks.sst2_right(" Positive\n", "positive")
        assert not tasks.sst2_right("positive.", "positive")
        assert tasks.agnews_right("It is SCI/TECH.", "Sci/Tech")
        assert not tasks.agnews_right("Science", "Sci/Tech")
