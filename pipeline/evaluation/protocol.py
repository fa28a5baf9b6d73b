"""From a prompt to the tokens a model is given, and from its tokens to the answer that is judged.

`chat`: the model's own template; a task's input follows its instruction as in the training rows (data/schema.py).
`paper`: the settings of the public Surgery code. Harmful prompts stand in the Alpaca prompt, tokenised with the
tokenizer's own special tokens and cut on the right at 512 tokens (a long one loses its "### Response:"); tasks stand
in the model's template behind a system turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.data.chat import ChatEncoder
from pipeline.data.schema import Message
from pipeline.evaluation.suite import Prompt, Protocol, Suite
from pipeline.evaluation.templates import fill, read_template

PAPER_MAX_PROMPT = 512  # tokens
PAPER_SYSTEM = "You are a helpful assistant."
RESPONSE = "### Response:"


@dataclass(frozen=True)
class Asked:
    """A prompt as the model gets it: its token ids, and whether the protocol cut them."""

    ids: list[int]
    cut: bool = False


class Renderer:
    """Asks the prompts of one suite under one protocol."""

    def __init__(self, suite: Suite, protocol: Protocol, encoder: ChatEncoder, system_prompt: str | None) -> None:
        self._encoder, self._system = encoder, system_prompt
        # Suites that the public code does not have are asked as chat.
        self.form = suite.paper if protocol == "paper" else "chat"
        self.protocol: Protocol = "chat" if self.form == "chat" else "paper"

    def ask(self, prompt: Prompt) -> Asked:
        """Errors: ValueError naming the prompt, if the chat template refuses it."""
        if self.form == "alpaca":
            text = fill(read_template("alpaca.txt"), instruction=prompt.text)
            ids: list[int] = self._encoder.tokenizer(text, verbose=False)["input_ids"]
            return Asked(ids[:PAPER_MAX_PROMPT], cut=len(ids) > PAPER_MAX_PROMPT)
        try:
            return Asked(self._encoder.encode_prompt(self._messages(prompt)))
        except ValueError as error:
            raise ValueError(f"{prompt.id}: {error}") from error

    def answer(self, generated: str) -> str:
        """What is judged of a decoded answer."""
        if self.form == "alpaca":  # the public code takes the text between the first marker and the next
            generated = generated.partition(RESPONSE)[0]
        return generated.strip()

    def _messages(self, prompt: Prompt) -> Sequence[Message]:
        user, system = prompt.text, self._system
        if self.form == "task":
            system = PAPER_SYSTEM if system is None else system
            user += f"\n\n### Input:\n{prompt.input}" if prompt.input else ""
        elif prompt.input:
            user = f"{user.rstrip()}\n{prompt.input}"
        turns = [] if system is None else [{"role": "system", "content": system}]
        return [*turns, {"role": "user", "content": user}]
