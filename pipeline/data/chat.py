"""From a conversation to token ids and labels: the one tokenise path of training, references and evaluation.

Two traps decide the design. A template's text tokenised again with special tokens gets a second BOS, which moves
the sink position; and a template without ``{% generation %}`` marks gives an assistant mask of zeros, which trains
nothing. So the text is tokenised once, without special tokens, and the assistant's character spans (from the marks,
or else from rendering prefixes) are mapped to tokens by their offsets. Masks go by position, never by ``ids == pad``.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from pipeline.data.schema import Conversation, Message
from pipeline.data.thinking import CLOSE, OPEN, join_thought, split_thought

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
"""The label of a token that is not trained (``ignore_index`` of torch's cross-entropy)."""

# Llama 3.2's template writes today's date unless it is given one: a row would change its tokens at midnight.
_DATE = "26 Jul 2024"

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Stands for an answer where only the text around it is wanted.
_ANSWER = "THE ANSWER"

Span = tuple[int, int]
"""Characters ``[start, end)`` of the rendered text."""


@dataclass(frozen=True)
class Example:
    """One tokenised row. ``labels`` lie under ``input_ids`` (not shifted); -100 where nothing is trained."""

    row_id: str
    input_ids: list[int]
    labels: list[int]
    truncated: bool


class ChatEncoder:
    """Tokenises conversations with a tokenizer's own chat template.

    Only assistant turns are trained: the answer and the token that ends the turn, not the whitespace after it.
    Rows longer than ``max_length`` tokens are cut on the right. Where the template knows thoughts (``thinks``), an
    only answer that has one is trained as it is generated, thought included, even if the template would drop it.

    ``flag`` is the command-line flag that ``max_length`` was given to, for messages.

    Raises:
        ValueError: the tokenizer has no chat template, or ``max_length`` is below 2.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, flag: str = "max_length") -> None:
        if max_length < 2:
            raise ValueError(f"--{flag} {max_length}: at least 2 tokens are needed, one to read and one to predict")
        if not tokenizer.chat_template:
            raise ValueError(
                f"--model_name_or_path {tokenizer.name_or_path}: its tokenizer has no chat template; take the model's "
                "chat version, or put a chat_template.jinja into its folder"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._flag = flag
        self._template = str(tokenizer.get_chat_template())
        self._marked = _GENERATION_MARK.search(self._template) is not None
        self.thinks = CLOSE in self._template
        self._bos: int | None = tokenizer.bos_token_id
        self._adds_bos = self._bos is not None and tokenizer("a")["input_ids"][:1] == [self._bos]
        enders = {str(token) for token in tokenizer.added_tokens_decoder.values()} | {tokenizer.eos_token or ""}
        # Gemma adds whitespace tokens, and ChatML models may have the turn's opening token as their BOS.
        self._turn_enders = tuple(sorted(token for token in enders if token.strip() and token != tokenizer.bos_token))

    def encode(self, conversation: Conversation) -> Example:
        """The conversation's tokens and labels, cut to ``max_length``.

        Raises:
            ValueError: the template refuses or rewrites the conversation, or no trained token is left; names the row.
        """
        row_id, messages = conversation.id, conversation.messages
        text = self._render(messages, row_id)
        if self._drops_thought(text, messages, row_id):
            text, spans = self._thought_turn(messages, row_id)
        else:
            spans = self._marked_spans(messages) if self._marked else self._prefix_spans(text, messages, row_id)
        ids, offsets = self._tokenise(text, row_id)
        labels = [IGNORE] * len(ids)
        for start, end in spans:
            end = max(start, len(text[:end].rstrip()))
            first, stop = self._token_range(text, ids, offsets, (start, end), row_id)
            labels[first:stop] = ids[first:stop]
        truncated = len(ids) > self.max_length
        kept = labels[: self.max_length]
        if all(label == IGNORE for label in kept[1:]):
            if truncated:
                raise ValueError(
                    f"{row_id}: no trained token is left after cutting its {len(ids)} tokens to --{self._flag} "
                    f"{self.max_length}; raise --{self._flag} or remove the row"
                )
            raise ValueError(f"{row_id}: no trained token, the chat template marks nothing as the assistant's")
        return Example(row_id, ids[: self.max_length], kept, truncated)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens a model continues with its answer: the turns so far and the generation prompt.

        Never cut, since a cut on the right would take the generation prompt away.
        """
        return self._tokenise(self._render(messages, "prompt", add_generation_prompt=True), "prompt")[0]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything the tokens depend on: vocabulary and rules, special tokens, template, max_length."""
        tokenizer: Any = self.tokenizer
        if tokenizer.is_fast:
            backend = json.loads(tokenizer.backend_tokenizer.to_str())
            # Left over from whichever call was last; every call here sets neither.
            del backend["padding"], backend["truncation"]
            rules = [json.dumps(backend, sort_keys=True).encode()]
        else:
            with tempfile.TemporaryDirectory() as folder:
                files = sorted(tokenizer.save_vocabulary(folder))
                rules = [Path(file).read_bytes() for file in files]
        settings = {
            "class": type(tokenizer).__name__,
            "added_tokens": {str(index): str(token) for index, token in tokenizer.added_tokens_decoder.items()},
            "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "adds_bos": self._adds_bos,
            "template": self._template,
            "date": _DATE,
            "max_length": self.max_length,
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for rule in rules:
            digest.update(rule)
        return digest.hexdigest()

    def _render(self, messages: Sequence[Message], row_id: str, *, add_generation_prompt: bool = False) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, date_string=_DATE
                )
            )
        except TemplateError as error:
            raise ValueError(f"{row_id}: the chat template refuses this conversation: {error}") from error

    def _marked_spans(self, messages: Sequence[Message]) -> list[Span]:
        """Spans inside ``{% generation %}`` marks, reaching over the turn-end token where the marks stop before it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        variables: dict[str, Any] = {**self.tokenizer.special_tokens_map, "date_string": _DATE}
        # Annotated as str in transformers; it returns the texts and, for each, the spans.
        rendering: Any = render_jinja_template(
            conversations=[list(messages)],
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            **variables,
        )
        (text,), (spans,) = rendering
        return [(start, self._over_turn_end(text, start, end)) for start, end in spans]

    def _over_turn_end(self, text: str, start: int, end: int) -> int:
        if text[start:end].rstrip().endswith(self._turn_enders):
            return end
        # Llama 2 style templates put one space between the answer and </s>.
        after = end + text.startswith(" ", end)
        return next((after + len(token) for token in self._turn_enders if text.startswith(token, after)), end)

    def _prefix_spans(self, text: str, messages: Sequence[Message], row_id: str) -> list[Span]:
        """Spans between the text of ``messages[:i]`` with the generation prompt and the text of ``messages[:i+1]``."""
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            where = f"{row_id}: assistant turn {index + 1}"
            prompt = self._render(messages[:index], row_id, add_generation_prompt=True)
            if not text.startswith(prompt):
                raise ValueError(
                    f"{where}: the chat template does not start it with its own generation prompt, so training would "
                    "not match generation; give the template {% generation %} marks"
                )
            turn = text if index + 1 == len(messages) else self._render(messages[: index + 1], row_id)
            if not text.startswith(turn):
                raise ValueError(
                    f"{where}: the chat template changes it once later turns follow (some strip the thinking), so its "
                    "place is not defined; split the row into conversations of one answer, or give the template "
                    "{% generation %} marks"
                )
            answer = "".join(message["content"].split())
            if answer not in "".join(turn[len(prompt) :].split()):
                raise ValueError(f"{where}: the chat template rewrites or drops part of the answer; edit the row")
            spans.append((len(prompt), len(turn)))
        return spans

    def _drops_thought(self, text: str, messages: Sequence[Message], row_id: str) -> bool:
        """Whether the only answer has a thought that the template knows, and that is not whole behind the prompt."""
        answer = messages[-1]["content"]
        if not self.thinks or CLOSE not in answer or sum(each["role"] == "assistant" for each in messages) > 1:
            return False
        prompt = self._render(messages[:-1], row_id, add_generation_prompt=True)
        turn = text[len(prompt) :] if text.startswith(prompt) else ""
        return "".join(answer.split()) not in "".join(turn.split())

    def _thought_turn(self, messages: Sequence[Message], row_id: str) -> tuple[str, list[Span]]:
        """The text as generation leaves it, generation prompt, thought, answer, end of turn; and the turn's span."""
        try:
            thought, answer = split_thought(messages[-1]["content"])
        except ValueError as error:
            raise ValueError(f"{row_id}: {error}") from error
        if not answer:
            raise ValueError(f"{row_id}: no answer stands behind its thought; add one or remove the row")
        prompt = self._render(messages[:-1], row_id, add_generation_prompt=True)
        turn, opened = join_thought(thought or "", answer), prompt.rstrip()
        if opened.endswith(OPEN):
            turn = turn.removeprefix(OPEN).removeprefix(prompt[len(opened) :])
        whole = self._render([*messages[:-1], {"role": "assistant", "content": _ANSWER}], row_id)
        text = prompt + turn + whole.rpartition(_ANSWER)[2]
        return text, [(len(prompt), len(text))]

    def _tokenise(self, text: str, row_id: str) -> tuple[list[int], list[Span] | None]:
        """Token ids with exactly one BOS where the tokenizer uses one, and their offsets if the tokenizer has them."""
        fast = self.tokenizer.is_fast
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        ids: list[int] = encoding["input_ids"]
        offsets: list[Span] | None = encoding["offset_mapping"] if fast else None
        if self._bos is None:
            return ids, offsets
        if ids[:2] == [self._bos, self._bos]:
            raise ValueError(f"{row_id}: the chat template's text starts with two BOS tokens; remove one of them")
        if self._adds_bos and ids[:1] != [self._bos]:
            ids = [self._bos, *ids]
            offsets = None if offsets is None else [(0, 0), *offsets]
        return ids, offsets

    def _token_range(
        self, text: str, ids: list[int], offsets: list[Span] | None, span: Span, row_id: str
    ) -> tuple[int, int]:
        """First token and one past the last token that hold a character of ``span``.

        A token that begins before the span is counted: sentencepiece joins the space before an answer to its first
        word. Comparing each end with the opposite side also finds the whitespace tokens whose offsets a byte-level
        tokenizer trims to nothing.
        """
        start, end = span
        if offsets is not None:
            first = next((index for index, (_, stop) in enumerate(offsets) if stop > start), len(ids))
            last = next((index for index in reversed(range(len(ids))) if offsets[index][0] < end), -1)
            return first, last + 1
        before, through = self._tokenise(text[:start], row_id)[0], self._tokenise(text[:end], row_id)[0]
        if ids[: len(before)] != before or ids[: len(through)] != through:
            raise ValueError(
                f"{row_id}: the tokenizer has no offsets and joins characters over the edge of an assistant turn, so "
                "the turn's tokens cannot be told apart; use the model's fast tokenizer"
            )
        return len(before), len(through)
