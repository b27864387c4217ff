import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.data.packing import PackedBatches, best_fit
from effjax.data.pipeline import ResumableIterator
from effjax.data.ragged import Ragged


def texts(n=120, seed=0):
    rng = np.random.default_rng(seed)
    ids = Ragged.of([rng.integers(1, 50, size) for size in rng.integers(1, 30, n)])
    return {"input_ids": ids, "token_type_ids": Ragged(ids.values % 2, ids.offsets), "label": np.arange(n)}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(1, 12), max_size=40), st.sampled_from([None, 1, 3]))
def test_best_fit_equals_its_definition(lengths, limit):
    rows = best_fit(np.array(lengths, int), 12, max_segments=limit)
    filled, items = [], []
    for length, row in zip(lengths, rows, strict=True):
        fits = [r for r in range(len(filled)) if filled[r] + length <= 12 and (limit is None or items[r] < limit)]
        if not fits:
            assert row == len(filled)
            filled.append(0)
            items.append(0)
        else:  # the fullest; which of equal ones is left open
            assert row in fits
            assert filled[row] == max(filled[r] for r in fits)
        filled[row] += length
        items[row] += 1


@pytest.mark.parametrize("max_segments", [None, 2])
def test_a_batch_holds_its_texts_apart(max_segments):
    columns = texts()
    data = PackedBatches(columns, seed=0, epochs=2, length=32, batch_size=8, max_segments=max_segments, pad_id=9)
    assert data.shapes == ((8, 32),)
    assert max_segments is None or data.segments == 2
    seen = []
    for batch in data:
        assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
            **dict.fromkeys(("input_ids", "token_type_ids", "segment_ids", "position_ids"), ("int32", (8, 32))),
            **{
                "mask": ("bool", (8, 32)),
                "weight": ("float32", (8, data.segments)),
                "label": ("int32", (8, data.segments)),
            },
        }
        np.testing.assert_array_equal(batch["mask"], batch["segment_ids"] > 0)
        assert (batch["input_ids"][~batch["mask"]] == 9).all()
        for row in range(8):
            for segment in range(data.segments):
                at = batch["segment_ids"][row] == segment + 1
                if not batch["weight"][row, segment]:
                    assert not at.any()
                    continue
                label = batch["label"][row, segment]
                seen.append(int(label))
                ids = columns["input_ids"][label]
                assert batch["input_ids"][row][at].tolist() == ids.tolist()
                assert batch["token_type_ids"][row][at].tolist() == (ids % 2).tolist()
                assert batch["position_ids"][row][at].tolist() == list(range(len(ids)))
                assert np.diff(np.flatnonzero(at)).max(initial=1) == 1
    assert sorted(seen) == sorted([*range(120), *range(120)])
    assert seen[:120] != seen[120:]


def test_a_limit_of_segments_fixes_the_shapes_whatever_the_seed():
    one = PackedBatches({"input_ids": [[1, 2, 3]]}, seed=0, epochs=1, length=8, batch_size=1, max_segments=5)
    assert next(one)["weight"].tolist() == [[1, 0, 0, 0, 0]]


def test_packing_leaves_little_padding():
    data = PackedBatches(texts(2000), seed=0, epochs=1, length=64, batch_size=8)
    assert data.processed_tokens < 1.03 * data.real_tokens


def test_resuming_and_processes():
    make = lambda **options: PackedBatches(texts(), seed=2, epochs=2, length=40, batch_size=4, **options)
    data = make()
    assert isinstance(data, ResumableIterator)
    for _ in range(3):
        next(data)
    state = json.loads(json.dumps(data.get_state()))
    rest = list(data)
    parts = [make(process_index=p, process_count=2) for p in range(2)]
    for part in parts:
        part.set_state(state)
    for batch in rest:
        halves = [next(part) for part in parts]
        assert same({name: np.concatenate([half[name] for half in halves]) for name in batch}, batch)
    other = PackedBatches(texts(), seed=2, epochs=2, length=48, batch_size=4)
    with pytest.raises(ValueError, match="length is 40 in the state and 48 here"):
        other.set_state(state)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"capacity=20: \d+ of 120 items are longer"):
        PackedBatches(texts(), seed=0, epochs=1, length=20)
    with pytest.raises(ValueError, match="8 rows does not divide among process_count=3"):
        PackedBatches(texts(), seed=0, epochs=1, batch_size=8, process_index=0, process_count=3)
    with pytest.raises(ValueError, match="max_segments=0 must be"):
        PackedBatches(texts(), seed=0, epochs=1, max_segments=0)
