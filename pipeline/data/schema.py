"""From stored rows to conversations: five common formats in, one checked list of chat messages out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.data.rows import bad_rows
from pipeline.data.sources import read_rows

Message = dict[str, str]
"""One turn: ``{"role": "system" | "user" | "assistant", "content": text}``."""

Keep = Literal["all", "safe", "unsafe"]
Answer = Literal["response", "refusal", "only"]


@dataclass(frozen=True)
class Conversation:
    """A checked conversation: an optional system turn, then user and assistant in turn, ending with assistant."""

    id: str
    messages: tuple[Message, ...]
    is_safe: bool | None = None

    @property
    def key(self) -> str:
        """sha256 of the messages: equal for rows of equal content, whatever file they stand in."""
        return hashlib.sha256(json.dumps(self.messages, sort_keys=True).encode()).hexdigest()


def read_conversations(
    spec: str,
    *,
    flag: str,
    keep: Keep = "all",
    system_prompt: str | None = None,
    answer: Answer = "response",
) -> list[Conversation]:
    """Reads ``spec`` (see ``sources.read_rows``) as conversations; the format is that of its first row.

    Args:
        spec: where the rows are.
        flag: the command-line flag ``spec`` was given to, for messages.
        keep: of rows that carry ``is_safe``, keep all, those where it is true, or those where it is false.
        system_prompt: a system turn for every conversation that has none.
        answer: of prompt + response rows that also hold a ``refusal``: take the response; or the refusal, and all
            rows, because ``is_safe`` rates the response; or neither ("only": an error).

    Raises:
        ValueError: an unknown format, two answers a row, bad rows (all of them, one a line, up to 20), or no row left.
    """
    rows = read_rows(spec, flag=flag)
    form = _detect(rows[0].fields, rows[0].id)
    if form.rates_safety and "refusal" in rows[0].fields:
        if answer == "only":
            raise ValueError(
                f"--{flag} {spec}: its rows hold a response and a refusal, and nothing says which is to be learned: "
                "remove one of the two keys"
            )
        if answer == "refusal":
            form = _Format(("prompt", "refusal"), _prompt_refusal)
    rates_safety = form.rates_safety and "is_safe" in rows[0].fields
    conversations, problems = [], []
    for row in rows:
        try:
            is_safe = _truth(row.fields, "is_safe") if rates_safety else None
            if is_safe is not None and keep != "all" and is_safe != (keep == "safe"):
                continue
            messages = form.read(row.fields)
            _check_turns(messages)
        except _RowError as error:
            problems.append(f"{row.id}: {error}")
            continue
        if system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system_prompt}, *messages]
        conversations.append(Conversation(row.id, tuple(messages), is_safe))
    if problems:
        raise bad_rows(problems)
    if not conversations:
        raise ValueError(f"--{flag} {spec}: none of its {len(rows)} rows has is_safe {str(keep == 'safe').lower()}")
    return conversations


class _RowError(Exception):
    """What is wrong with one row; ``read_conversations`` adds the row's id."""


@dataclass(frozen=True)
class _Format:
    keys: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], list[Message]]
    rates_safety: bool = False


def _messages(fields: Mapping[str, Any]) -> list[Message]:
    return _turns(fields, "messages", role_key="role", content_key="content", roles=_CHAT_ROLES)


def _prompt_completion(fields: Mapping[str, Any]) -> list[Message]:
    def side(key: str, role: str) -> list[Message]:
        if isinstance(fields.get(key), list):
            return _turns(fields, key, role_key="role", content_key="content", roles=_CHAT_ROLES)
        return [{"role": role, "content": _text(fields, key)}]

    return side("prompt", "user") + side("completion", "assistant")


def _prompt_response(fields: Mapping[str, Any]) -> list[Message]:
    return [_user(_text(fields, "prompt")), {"role": "assistant", "content": _text(fields, "response")}]


def _prompt_refusal(fields: Mapping[str, Any]) -> list[Message]:
    return [_user(_text(fields, "prompt")), {"role": "assistant", "content": _text(fields, "refusal")}]


def _alpaca(fields: Mapping[str, Any]) -> list[Message]:
    instruction = _text(fields, "instruction")
    # Most Alpaca rows have an empty input, which their authors mean as none.
    if fields.get("input"):
        instruction += "\n" + _text(fields, "input")
    return [_user(instruction), {"role": "assistant", "content": _text(fields, "output")}]


def _sharegpt(fields: Mapping[str, Any]) -> list[Message]:
    messages = _turns(fields, "conversations", role_key="from", content_key="value", roles=_SHAREGPT_ROLES)
    if not fields.get("system"):
        return messages
    if messages[0]["role"] == "system":
        raise _RowError("a 'system' field beside a system turn; keep one of them")
    return [{"role": "system", "content": _text(fields, "system")}, *messages]


_FORMATS = (
    _Format(("messages",), _messages),
    _Format(("conversations",), _sharegpt),
    _Format(("prompt", "completion"), _prompt_completion),
    _Format(("prompt", "response"), _prompt_response, rates_safety=True),
    _Format(("instruction", "output"), _alpaca),
)
_CHAT_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES = {**_CHAT_ROLES, "human": "user", "gpt": "assistant"}


def _detect(fields: Mapping[str, Any], row_id: str) -> _Format:
    form = next((form for form in _FORMATS if all(key in fields for key in form.keys)), None)
    if form is None:
        expected = " | ".join(" + ".join(form.keys) for form in _FORMATS)
        raise ValueError(f"{row_id}: its keys {', '.join(map(repr, fields))} are none of the formats {expected}")
    return form


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _text(fields: Mapping[str, Any], key: str, where: str = "") -> str:
    if key not in fields or fields[key] is None:
        raise _RowError(f"{where}{key!r} is missing")
    value = fields[key]
    if not isinstance(value, str):
        raise _RowError(f"{where}{key!r} is a {type(value).__name__}, expected text")
    if not value.strip():
        raise _RowError(f"{where}{key!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # an emoji cut in two: no tokenizer takes it
        raise _RowError(f"{where}{key!r} holds half a character, {value[error.start]!a}; remove it") from error
    return value


def _truth(fields: Mapping[str, Any], key: str) -> bool:
    value = fields.get(key)
    # CSV has no booleans.
    truth = {"true": True, "1": True, "false": False, "0": False}.get(str(value).strip().lower())
    if truth is None:
        raise _RowError(f"{key!r} is {value!r}, expected true or false")
    return truth


def _turns(
    fields: Mapping[str, Any], key: str, *, role_key: str, content_key: str, roles: Mapping[str, str]
) -> list[Message]:
    turns = fields.get(key)
    if turns is None:
        raise _RowError(f"{key!r} is missing")
    if not isinstance(turns, list):
        raise _RowError(f"{key!r} is a {type(turns).__name__}, expected a list of turns")
    if not turns:
        raise _RowError(f"{key!r} is empty")
    messages = []
    for number, turn in enumerate(turns, start=1):
        where = f"{key!r} turn {number}: "
        if not isinstance(turn, dict):
            raise _RowError(
                f"{where}a {type(turn).__name__}, expected an object with {role_key!r} and {content_key!r}"
            )
        role = _text(turn, role_key, where)
        if role not in roles:
            raise _RowError(f"{where}role {role!r} is not supported (tool calls neither); expected {', '.join(roles)}")
        if turn.get("tool_calls"):
            raise _RowError(f"{where}tool calls are not supported; remove the row")
        messages.append({"role": roles[role], "content": _text(turn, content_key, where)})
    return messages


def _check_turns(messages: list[Message]) -> None:
    first = 1 if messages[0]["role"] == "system" else 0
    for index, message in enumerate(messages[first:]):
        expected = ("user", "assistant")[index % 2]
        if message["role"] != expected:
            raise _RowError(
                f"turn {first + index + 1} is {message['role']}, expected {expected}: the roles must alternate"
            )
    if messages[-1]["role"] != "assistant":
        raise _RowError("does not end with the assistant")
