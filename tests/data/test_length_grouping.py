import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.data.bucket_sampler import BucketSampler
from effjax.data.length_grouping import PaddedBatches, length_grouped_order
from effjax.data.ragged import Ragged


def texts(n=300):
    rng = np.random.default_rng(0)
    return {
        "input_ids": Ragged.of([rng.integers(1, 50, size) for size in 2 + rng.geometric(0.15, n)]),
        "row": np.arange(n),
    }


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=90), st.integers(1, 8), st.integers(0, 5))
def test_the_order_is_hugging_faces(lengths, batch_size, seed):
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    mega = max(min(len(lengths) // (4 * batch_size), 50), 1) * batch_size
    groups = [sorted(order[i : i + mega], key=lambda k: -lengths[k]) for i in range(0, len(order), mega)]
    leader = int(np.argmax([lengths[group[0]] for group in groups]))
    groups[0][0], groups[leader][0] = groups[leader][0], groups[0][0]
    found = length_grouped_order(np.array(lengths), batch_size, rng=np.random.default_rng(seed))
    assert found.tolist() == [k for group in groups for k in group]
    assert lengths[found[0]] == max(lengths)


def test_the_rivals_hold_every_text_and_pad_as_they_say():
    columns = texts()
    longest = int(columns["input_ids"].lengths.max())
    static = PaddedBatches(columns, seed=0, epochs=2, batch_size=32, length=64)
    dynamic = PaddedBatches(columns, seed=0, epochs=2, batch_size=32)
    grouped = PaddedBatches(columns, seed=0, epochs=2, batch_size=32, group_by_length=True)
    buckets = BucketSampler(columns, seed=0, epochs=2, cap=32)
    for data in (static, dynamic, grouped):
        assert data.steps_per_epoch == (10, 10)
        assert data.real_tokens == buckets.real_tokens
        for epoch in range(2):
            batches = [data[10 * epoch + i] for i in range(10)]
            rows = np.concatenate([batch["row"][batch["weight"] > 0] for batch in batches])
            assert sorted(rows) == list(range(300))
    assert static.shapes == ((32, 64),)
    assert all(length % 8 == 0 and length < longest + 8 for _, length in dynamic.shapes)
    tokens = [data.processed_tokens for data in (static, dynamic, grouped, buckets)]
    assert tokens == sorted(tokens, reverse=True)


def test_resuming():
    data = PaddedBatches(texts(), seed=0, epochs=1, batch_size=32, group_by_length=True)
    next(data)
    state = json.loads(json.dumps(data.get_state()))
    second = next(data)
    data.set_state(state)
    assert np.array_equal(next(data)["input_ids"], second["input_ids"])
    with pytest.raises(ValueError, match="group_by_length is True in the state and False here"):
        PaddedBatches(texts(), seed=0, epochs=1, batch_size=32).set_state(state)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"length=20: \d+ of 300 examples are longer"):
        PaddedBatches(texts(), seed=0, epochs=1, length=20)
    with pytest.raises(ValueError, match="saves nothing with length=64"):
        PaddedBatches(texts(), seed=0, epochs=1, length=64, group_by_length=True)
