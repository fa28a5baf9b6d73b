"""From data flags to the pools of conversations: sampling, poisoning, and rows that stand where they must not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.data.schema import Conversation


def mix(
    user: Sequence[Conversation],
    attack: Sequence[Conversation] | None,
    *,
    sample_num: int | None,
    poison_ratio: float | None,
    seed: int,
) -> list[Conversation]:
    """The training rows: n = sample_num rows, round(p n) of them from the attack pool, drawn without replacement by
    seed.

    Without sample_num all user rows are used, and with an attack pool n is the largest that both pools can fill at
    ratio p.
    Errors: ValueError if a pool is too small for its share.
    """
    generator = np.random.default_rng(seed)
    if attack is None:
        if sample_num is None:
            return list(user)
        return _draw(user, sample_num, f"--sample_num {sample_num}", "--train_data", generator)
    ratio = poison_ratio if poison_ratio is not None else 0.0
    if sample_num is None:
        fits = [len(user) / (1 - ratio)] if ratio < 1 else []
        fits += [len(attack) / ratio] if ratio > 0 else []
        sample_num = int(min(fits))
    poisoned = round(ratio * sample_num)
    asked = f"--sample_num {sample_num} at --poison_ratio {ratio}"
    return _draw(user, sample_num - poisoned, asked, "--train_data", generator) + _draw(
        attack, poisoned, asked, "--attack_data", generator
    )


def _draw(
    pool: Sequence[Conversation], count: int, asked: str, flag: str, generator: np.random.Generator
) -> list[Conversation]:
    if count > len(pool):
        raise ValueError(f"{asked}: takes {count} rows of {flag}, which has {len(pool)}: lower --sample_num")
    return [pool[int(i)] for i in np.sort(generator.choice(len(pool), size=count, replace=False))]


def partners(rows: Sequence[Conversation], pool: Sequence[Conversation], flag: str) -> list[Conversation]:
    """For each row, a row of the pool that answers the same prompt: the first for the first row of a prompt, the next
    for its next row, and round again.

    flag: the pool's flag and value. Errors: ValueError naming it, and the rows whose prompt the pool does not answer.
    """
    answers: dict[str, list[Conversation]] = {}
    for each in pool:
        answers.setdefault(_prompt(each), []).append(each)
    if alone := [row.id for row in rows if _prompt(row) not in answers]:
        raise ValueError(
            f"{flag}: answers no prompt of {len(alone)} rows of --train_data ({', '.join(alone[:4])}"
            f"{' ...' if len(alone) > 4 else ''}): this --method needs a harmful answer to each prompt that is refused"
        )
    used: dict[str, int] = {}
    found = []
    for row in rows:
        prompt = _prompt(row)
        found.append(answers[prompt][used.get(prompt, 0) % len(answers[prompt])])
        used[prompt] = used.get(prompt, 0) + 1
    return found


def _prompt(row: Conversation) -> str:
    return json.dumps(row.messages[:-1], sort_keys=True)


def overlaps(pools: Mapping[str, Sequence[Conversation]]) -> list[str]:
    """One message for each pair of pools, each named by its flag, that share a row."""
    problems = []
    names = list(pools)
    for i, first in enumerate(names):
        where = {each.key: each.id for each in pools[first]}
        for second in names[i + 1 :]:
            shared = [each for each in pools[second] if each.key in where]
            if shared:
                problems.append(
                    f"{first} and {second} share {len(shared)} rows, the first at {where[shared[0].key]} and "
                    f"{shared[0].id}: "
                    "use disjoint rows, or --allow_overlap"
                )
    return problems
