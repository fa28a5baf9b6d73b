"""The data order: a function of seed and step, the same rows a step for any split, every row once an epoch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.cache import EncodedPool, encode_pool
from pipeline.data.chat import ChatEncoder
from pipeline.data.packing import pack
from pipeline.data.pools import mix, overlaps
from pipeline.data.schema import Conversation
from pipeline.data.streams import Layout, Stream
from tests.tiny import tiny_tokenizer


def conversations(name: str, count: int) -> list[Conversation]:
    return [
        Conversation(
            f"{name}:{i}",
            ({"role": "user", "content": f"{name} {i}"}, {"role": "assistant", "content": "tea " * (i % 4 + 1)}),
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> EncodedPool:
    encoder = ChatEncoder(tiny_tokenizer(), max_length=64)
    return encode_pool(conversations("row", 11), encoder, tmp_path_factory.mktemp("cache"))


def test_an_epoch_holds_every_row_once_and_the_last_batch_wraps_round(pool: EncodedPool) -> None:
    stream = Stream("train", pool, Layout(rows=4, accumulation=1, ranks=1), seed=3)
    seen = np.concatenate([stream.global_batch(step) for step in range(11)])  # 44 rows, four epochs
    for epoch in range(4):
        assert Counter(seen[epoch * 11 : (epoch + 1) * 11]) == Counter(range(11))
    assert stream.steps(epochs=1) == 3
    assert stream.steps(epochs=4) == 11


def test_a_global_batch_larger_than_the_pool_repeats_rows_evenly(pool: EncodedPool) -> None:
    stream = Stream("train", pool, Layout(rows=11, accumulation=3, ranks=1), seed=3)
    assert set(Counter(stream.global_batch(0)).values()) == {3}


def test_any_split_of_a_global_batch_holds_the_same_rows(pool: EncodedPool) -> None:
    wanted = Stream("train", pool, Layout(8, 1, 1), seed=5)
    for layout in (Layout(1, 8, 1), Layout(1, 4, 2), Layout(2, 1, 4)):
        stream = Stream("train", pool, layout, seed=5)
        for step in (0, 7):
            parts = [stream.micro_batch(step, index) for index in range(layout.micro_batches)]
            assert np.concatenate(parts).tolist() == wanted.global_batch(step).tolist()
            assert stream.trained_tokens(step) == wanted.trained_tokens(step)


def test_draws_depend_on_seed_step_and_micro_batch_and_on_nothing_else(pool: EncodedPool) -> None:
    one, other = (Stream("harmful", pool, Layout(2, 2, ranks), seed=1) for ranks in (1, 4))
    draws = {(step, index): one.sample(step, index, 1)[0] for step in range(6) for index in range(4)}
    assert draws == {(step, index): other.sample(step, index, 1)[0] for step, index in draws}
    assert len(set(draws.values())) > 3
    assert any(
        Stream("harmful", pool, Layout(2, 2, 1), seed=2).sample(s, i, 1)[0] != row for (s, i), row in draws.items()
    )
    assert sorted(one.sample(0, 0, 11)) == list(range(11)), "no repetition while the pool allows it"


def test_a_packed_row_keeps_texts_apart_and_trains_only_the_users(pool: EncodedPool) -> None:
    batch = pack([pool[0], pool[1]], [pool[2]])
    lengths = [len(pool[i].input_ids) for i in range(3)]
    assert batch.bounds == (0, lengths[0], sum(lengths[:2]), sum(lengths))
    assert batch.reference_start == sum(lengths[:2])
    assert batch.reference_bounds == (0, lengths[2])
    assert batch.position_ids[0].tolist() == [i for length in lengths for i in range(length)]
    assert torch_equal_next(batch)
    assert int(batch.predict.max()) < batch.reference_start
    assert len(batch.targets) == int(pool.trained[:2].sum())


def torch_equal_next(batch: object) -> bool:
    return bool((batch.input_ids[0, batch.predict + 1] == batch.targets).all())  # type: ignore[attr-defined]


def test_poison_ratio_takes_the_asked_share_by_seed() -> None:
    user, attack = conversations("user", 50), conversations("attack", 20)
    rows = mix(user, attack, sample_num=40, poison_ratio=0.25, seed=1)
    assert Counter(row.id.split(":")[0] for row in rows) == {"user": 30, "attack": 10}
    assert rows == mix(user, attack, sample_num=40, poison_ratio=0.25, seed=1)
    assert rows != mix(user, attack, sample_num=40, poison_ratio=0.25, seed=2)
    assert len(mix(user, attack, sample_num=None, poison_ratio=0.5, seed=1)) == 40, "the most that both pools can fill"
    with pytest.raises(ValueError, match="takes 30 rows of --attack_data, which has 20"):
        mix(user, attack, sample_num=60, poison_ratio=0.5, seed=1)


def test_rows_shared_between_pools_are_named(tmp_path: Path) -> None:
    user = conversations("user", 5)
    found = overlaps({"train": user, "eval:a": conversations("other", 3), "harmful": user[3:]})
    assert len(found) == 1
    assert "share 2 rows" in found[0]
    assert "user:3" in found[0]
