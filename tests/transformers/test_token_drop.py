from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.core.errors import NoEffectWarning
from effjax.data.ragged import Ragged
from effjax.transformers.token_drop import STOP_WORDS, stop_ids, stop_ids_top_k, token_drop, token_drop_columns

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "tokendrop_bucketsampler"
TABLE = np.array([-1, 0, 1, 2, -1, -1, 3, -1])  # ids 1, 2, 3 and 6 may go
SEQUENCES = st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=30), min_size=1, max_size=12)


def texts(seed=0, n=200):
    rng = np.random.default_rng(seed)
    return Ragged.of([rng.integers(0, 8, size) for size in rng.integers(3, 40, n)])


@pytest.mark.parametrize("name", ["electra", "roberta"])
def test_equals_the_official_program_given_its_order(name):
    with np.load(REFERENCE / f"token_drop_{name}.npz") as reference:
        ids = Ragged(reference["input_ids"], reference["offsets"])
        short, kept = token_drop(
            ids, reference["stop_of_id"], seed=0, epoch=0, period=int(reference["period"]), order=reference["order"]
        )
        np.testing.assert_array_equal(short.values, reference["out_input_ids"])
        np.testing.assert_array_equal(short.offsets, reference["out_offsets"])
        if name == "electra":
            types = Ragged(reference["token_type_ids"], reference["offsets"]).keep(kept)
            np.testing.assert_array_equal(types.values, reference["out_token_type_ids"])


@settings(deadline=None, max_examples=60)
@given(SEQUENCES, st.integers(0, 5), st.integers(2, 7))
def test_invariants(sequences, epoch, period):
    ids = Ragged.of(sequences)
    table = TABLE if any(TABLE[id] >= 0 for row in sequences for id in row) else np.zeros(8, int)
    short, kept = token_drop(ids, table, seed=1, epoch=epoch, period=period)
    np.testing.assert_array_equal(short.values, ids.values[kept])  # so every row is a subsequence
    assert (table[ids.values[~kept]] >= 0).all()
    for before, after in zip(ids, short, strict=True):
        n = len(before)
        assert len(after) == n - min(n % period, int((table[before] >= 0).sum()), n - 1)
        # All copies of a word go, leftmost first, before another word is touched: one at most is left in part.
        counts = {word: np.sum(table[before] == word) for word in set(table[before]) - {-1}}
        partly = [word for word in counts if 0 < np.sum(table[after] == word) < counts[word]]
        assert len(partly) <= 1
        gone = [word for word in counts if word not in table[after]]
        stays = np.array([id for id in before if table[id] not in gone])
        for word in partly:
            first = np.flatnonzero(table[stays] == word)[: counts[word] - np.sum(table[after] == word)]
            stays = np.delete(stays, first)
        assert stays.tolist() == after.tolist()
    on_grid = short.take(np.flatnonzero(short.lengths % period == 0))
    if (table[on_grid.values] >= 0).any():
        np.testing.assert_array_equal(
            token_drop(on_grid, table, seed=9, epoch=0, period=period)[0].values, on_grid.values
        )


def test_the_draw_depends_on_seed_epoch_and_example_alone():
    ids = texts()
    whole, _ = token_drop(ids, TABLE, seed=3, epoch=1)
    order = np.random.default_rng(0).permutation(len(ids))
    for rows in (order, np.arange(100, 200), order[:7]):
        part, _ = token_drop(ids.take(rows), TABLE, seed=3, epoch=1, row_ids=rows)
        expected = whole.take(rows)
        np.testing.assert_array_equal(part.values, expected.values)
        np.testing.assert_array_equal(part.offsets, expected.offsets)
    for seed, epoch in ((3, 2), (4, 1)):
        other, _ = token_drop(ids, TABLE, seed=seed, epoch=epoch)
        np.testing.assert_array_equal(other.lengths, whole.lengths)  # so a plan made ahead is exact
        assert (other.values != whole.values).any()


def test_every_droppable_word_goes_equally_often():
    ids = Ragged.of([[0, 1, 2, 3, 6, 0]] * 4000)  # 6 mod 5: one of the four goes
    _, kept = token_drop(ids, TABLE, seed=0, epoch=0)
    gone = 4000 - kept.reshape(4000, 6).sum(0)
    assert gone[[0, 5]].tolist() == [0, 0]
    assert abs(gone[1:5] - 1000).max() < 120  # four standard deviations


def test_boundaries_and_max_drop():
    ids = Ragged.of([[1] * n for n in (3, 8, 11, 12, 19, 40)])
    drop = lambda **options: token_drop(ids, TABLE, seed=0, epoch=0, **options)[0].lengths.tolist()
    assert drop(boundaries=(8, 12, 16, 32)) == [3, 8, 8, 12, 16, 32]
    assert drop(boundaries=(8, 12, 16, 32), max_drop=2) == [3, 8, 9, 12, 17, 38]
    assert drop(boundaries=(8, 12, 16, 32), max_drop=0.1) == [3, 8, 10, 12, 18, 36]
    assert drop(period=10) == [1, 1, 10, 10, 10, 40]  # never the last token


def test_columns_of_an_epoch():
    ids = texts()
    columns = {"input_ids": ids, "token_type_ids": Ragged(ids.values * 10, ids.offsets), "label": np.zeros(len(ids))}
    read = token_drop_columns(columns, TABLE, seed=0)
    epoch = read(1)
    np.testing.assert_array_equal(epoch["input_ids"].values * 10, epoch["token_type_ids"].values)
    np.testing.assert_array_equal(epoch["input_ids"].values, token_drop(ids, TABLE, seed=0, epoch=1)[0].values)
    assert epoch["label"] is columns["label"]
    assert set(token_drop_columns({"input_ids": ids}, TABLE, seed=0)(0)) == {"input_ids"}


def test_stop_ids():
    assert len(STOP_WORDS) == len(set(STOP_WORDS)) == 126
    assert not {"no", "nor", "not", "same", "t", ","} & set(STOP_WORDS)
    wordpiece = ["[CLS]", "the", "##the", "not", ".", "film", "a"]
    table = stop_ids(wordpiece.__getitem__, 7)
    assert [STOP_WORDS[i] if i >= 0 else None for i in table] == [None, "the", None, None, ".", None, "a"]
    assert stop_ids(wordpiece.__getitem__, 7, special_ids=[1, 4]).tolist()[1:5] == [-1] * 4
    bytelevel = ["<s>", "the", "Ġthe", "ĠThe", ".", "Ġ.", " the", "▁the"]
    table = stop_ids(bytelevel.__getitem__, 8, rule="space_word")
    assert (table >= 0).tolist() == [False, False, True, False, True, False, True, True]


def test_stop_ids_top_k():
    table = stop_ids_top_k(Ragged.of([[0, 1, 5, 5, 5, 0], [0, 2, 2, 3, 0]]), 2, vocab_size=7, special_ids=[0])
    assert table.tolist() == [-1, -1, 1, -1, -1, 0, -1]


def test_bad_input_is_named():
    ids = Ragged.of([[1, 2, 3]])
    with pytest.warns(NoEffectWarning, match="None of the 3 tokens is droppable: stop_of_id marks 1 of 5 ids"):
        token_drop(ids, np.array([-1, -1, -1, -1, 0]), seed=0, epoch=0)
    with pytest.raises(ValueError, match="run from 1 to 3, outside the 3 of the vocabulary"):
        token_drop(ids, np.zeros(3, int), seed=0, epoch=0)
    with pytest.raises(ValueError, match=r"period=1 must be an integer in \[2"):
        token_drop(ids, TABLE, seed=0, epoch=0, period=1)
    with pytest.raises(TypeError, match="max_drop"):
        token_drop(ids, TABLE, seed=0, epoch=0, max_drop=1.5)
    with pytest.raises(ValueError, match="row_ids is int64"):
        token_drop(ids, TABLE, seed=0, epoch=0, row_ids=[1, 2])
    with pytest.raises(ValueError, match=r"finds none of the 126 words .* Try rule='space_word'"):
        stop_ids(["Ġthe", "Ġfilm"].__getitem__, 2)
    with pytest.raises(ValueError, match="k=4 must be an integer"):
        stop_ids_top_k(ids, 4, vocab_size=5, special_ids=[])
    with pytest.raises(ValueError, match="rule='words' is not one of"):
        stop_ids(["the"].__getitem__, 1, rule="words")
