"""Tiny models that answer, with a thought or without one: trained where the test runs, to say a few sentences whatever
they are asked."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch.nn import functional as F

from pipeline.curation.dgr_request import STRENGTHS, Request
from pipeline.curation.dgr_sources import Source
from pipeline.data.chat import ChatEncoder
from pipeline.data.schema import Conversation
from pipeline.data.thinking import join_thought
from tests import tiny

# How chat templates treat a thought, written down from the models' own as facts of format.
_TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
_SPLIT = (
    "{% set ns = namespace(thought='', text=m.content) %}{% if '</think>' in m.content %}"
    "{% set ns.thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set ns.text = m.content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
_QWEN3 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}" + _SPLIT + "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.last %}{{ '<think>\n' + ns.thought + '\n</think>\n\n' }}{% endif %}{{ ns.text + '<|im_end|>\n' }}"
    "{% else %}" + _TURN + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\nOPENED' }}{% endif %}"
)
_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<\uff5cAssistant\uff5c>' + m.content.split('</think>')[-1] + eos_token }}"
    "{% elif m.role == 'user' %}{{ '<\uff5cUser\uff5c>' + m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c>OPENED' }}{% endif %}"
)
TEMPLATES = {
    "qwen3": _QWEN3.replace("OPENED", ""),
    "qwen3-thinking": _QWEN3.replace("OPENED", "<think>\n"),
    "r1": _R1.replace("OPENED", ""),
    "r1-opened": _R1.replace("OPENED", "<think>\n"),
}

THOUGHTS = (
    "A question about the house. I know a plain way to do it, so I can go through it step by step.",
    "This is harmless and useful. I can explain what to take first and what to do with it then.",
)
REPLIES = ("Gladly. Take what you need, go slowly and wait a little.", "Here you go: take your time and begin small.")
STEPS, ROWS_A_STEP, LEARNING_RATE = 240, 2, 4e-3


def sources(count: int, *, thoughts: bool) -> list[Source]:
    """Questions with a stiff answer, which the models below would never give."""
    things = ("bread", "a kite", "soup", "a shelf", "tea", "a hat", "jam", "a raft")
    return [
        Source(
            f"rows.jsonl:{i + 1}",
            ({"role": "user", "content": f"How do I make {things[i % len(things)]}?"},),
            f"The enquirer requests manufacture of item {i}; permissible." if thoughts else None,
            f"Procedure {i}: obtain materials, assemble, inspect.",
        )
        for i in range(count)
    ]


def save_reasoner(folder: Path, template: str | None) -> Path:
    """A model that thinks under one of TEMPLATES, or answers at once (None)."""
    tokenizer = tiny.tiny_tokenizer()
    if template is not None:
        tokenizer.chat_template = TEMPLATES[template]
    encoder = ChatEncoder(tokenizer, max_length=2048)
    request = Request("native", thinks=encoder.thinks, control=[tiny.EOS])
    chooser, examples = random.Random(0), []
    for each in sources(8, thoughts=encoder.thinks):
        for asked in (each.before, *(request.messages(each, s, declines=False) for s in STRENGTHS)):
            reply = chooser.choice(REPLIES)
            written = join_thought(chooser.choice(THOUGHTS), reply) if encoder.thinks else reply
            turns = (*asked, {"role": "assistant", "content": written})
            examples.append(encoder.encode(Conversation(each.id, turns)))
    model = tiny.tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for _ in range(STEPS):
        for example in chooser.sample(examples, ROWS_A_STEP):
            ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels)
            kept = labels[1:].ne(-100).nonzero().flatten()
            logits = model(input_ids=ids, logits_to_keep=kept).logits[0]
            (F.cross_entropy(logits, labels[1:][kept]) / ROWS_A_STEP).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
