"""Token columns as people hold them: padded before, labels per token, lists, tables, streams, more epochs."""

import datasets
import numpy as np
import pytest

from effjax.data.bucket_sampler import BucketSampler
from effjax.data.length_grouping import PaddedBatches
from effjax.data.packing import PackedBatches
from effjax.data.pipeline import Batches
from effjax.data.ragged import Ragged, padded_columns
from effjax.transformers.token_drop import stop_ids_top_k, token_drop, token_drop_columns

IDS = [[5, 6, 7], [8, 9], [3, 4, 5, 6, 7], [2]] * 4
TAGS = [[-100, *row[1:]] for row in IDS]


def bucketed(columns, **options):
    return BucketSampler(columns, seed=0, epochs=1, tokens=64, cap=4, multiple=1, **options)


MAKERS = {
    "buckets": bucketed,
    "padded": lambda columns, **options: PaddedBatches(columns, seed=0, epochs=1, batch_size=4, **options),
    "packed": lambda columns, **options: PackedBatches(columns, seed=0, epochs=1, batch_size=2, length=9, **options),
}
table = datasets.Dataset.from_dict
HELD = {
    "lists": dict,
    "table": table,
    "part of a table": lambda columns: table({name: [rows[0], *rows] for name, rows in columns.items()}).select(
        range(1, 17)
    ),
    "examples": lambda columns: [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
}


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("maker", MAKERS)
def test_numbers_for_each_token_are_padded_with_what_is_no_class(maker, held):
    columns = {
        "input_ids": IDS,
        "labels": TAGS,
        "ner_tags": IDS,
        "token_type_ids": [[1] * len(row) for row in IDS],
        "special_tokens_mask": [[0] * len(row) for row in IDS],
    }
    for options, fill in (({}, -100), ({"pad_values": {"labels": -1}}, -1)):
        data = MAKERS[maker](HELD[held](columns), **options)
        seen = 0
        for batch in data:
            real = batch["mask"]
            fills = {"labels": fill, "ner_tags": -100, "token_type_ids": 0, "special_tokens_mask": 1, "input_ids": 0}
            for name, value in fills.items():
                assert batch[name].shape == real.shape
                assert (batch[name][~real] == value).all()
            np.testing.assert_array_equal(batch["ner_tags"][real], batch["input_ids"][real])
            assert ((batch["labels"] == batch["input_ids"]) | (batch["labels"] == -100))[real].all()
            seen += int(real.sum())
        assert seen == data.real_tokens == 44


def test_rows_of_one_length():
    batch = next(bucketed({"input_ids": [[1, 2, 3]] * 8, "labels": [[-100, 2, 3]] * 8}, boundaries=(5,)))
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, -100]] * 4
    packed = padded_columns({"input_ids": Ragged.of([[1, 2]]), "labels": Ragged.of([[1, 2]])}, 3)
    assert packed["labels"].tolist() == [[1, 2, -100]]


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("held", [*HELD, "arrays"])
@pytest.mark.parametrize("left", [False, True])
def test_what_attention_mask_masks_is_padding(maker, held, left):
    fill = (
        (lambda row, value: [value] * (8 - len(row)) + row)
        if left
        else lambda row, value: row + [value] * (8 - len(row))
    )
    columns = {
        "input_ids": [fill(row, 0) for row in IDS],
        "attention_mask": [fill([1] * len(row), 0) for row in IDS],
        "labels": [fill(row, -100) for row in TAGS],
    }
    source = {name: np.array(rows) for name, rows in columns.items()} if held == "arrays" else HELD[held](columns)
    data, plain = MAKERS[maker](source), MAKERS[maker]({"input_ids": IDS, "labels": TAGS})
    assert data.real_tokens == 44
    for batch, right in zip(data, plain, strict=True):
        assert batch.keys() == right.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], right[name])


@pytest.mark.parametrize("held", HELD)
def test_several_labels_of_a_row(held):
    for kind in (int, float, bool):
        several = np.eye(7).astype(kind)[np.arange(16) % 7]
        data = bucketed(HELD[held]({"input_ids": IDS, "labels": several.tolist()}))
        batch = next(data)
        assert batch["labels"].shape == (4, 7)
        assert (batch["labels"][batch["weight"] > 0].sum(1) == 1).all()
    # Beside a Ragged an array is one vector a row, whatever its width.
    ids = Ragged.of([[1, 2]] * 4)
    assert next(bucketed({"input_ids": ids, "labels": np.eye(2)[[0, 1, 0, 1]]}, boundaries=(3,)))["labels"].shape == (
        4,
        2,
    )


@pytest.mark.parametrize("maker", MAKERS)
def test_more_epochs_than_first_asked(maker):
    makers = {"buckets": BucketSampler, "padded": PaddedBatches, "packed": PackedBatches}
    options = {
        "buckets": {"tokens": 64, "cap": (1, 2, 4), "multiple": 1, "boundaries": (2, 5)},
        "padded": {"batch_size": 2},
        "packed": {"batch_size": 2, "max_segments": 3},
    }[maker]
    make = lambda epochs, **more: makers[maker]({"input_ids": IDS}, seed=0, epochs=epochs, **options, **more)
    short, long, whole = make(2), make(4), list(make(4))
    done = list(short)
    long.set_state(short.get_state())
    for batch, right in zip([*done, *long], whole, strict=True):
        assert all(np.array_equal(batch[name], right[name]) for name in right)
    with pytest.raises(ValueError, match="epochs is 4 in the state and 2 here"):
        short.set_state(long.get_state())
    with pytest.raises(ValueError, match="pad_id is 0 in the state and 3 here"):
        make(4, pad_id=3).set_state(short.get_state())


STOP = np.array([-1] * 3 + [0] * 10)


@pytest.mark.parametrize("held", HELD)
def test_tokens_are_dropped_from_whatever_holds_them(held):
    """Ids from 3 on are stop words, period 5: rows of 3, 2, 5 and 1 tokens keep 1, 1, 5 and 1."""
    columns = HELD[held]({"input_ids": IDS, "labels": TAGS, "label": list(range(16))})
    read = token_drop_columns(columns, STOP, seed=0)
    found = read(0)
    assert found["input_ids"].lengths.tolist() == [1, 1, 5, 1] * 4
    assert found["labels"].offsets.tolist() == found["input_ids"].offsets.tolist()
    real = found["labels"].values != -100
    np.testing.assert_array_equal(found["labels"].values[real], found["input_ids"].values[real])
    data = BucketSampler(read, seed=0, epochs=2, tokens=64, cap=4, multiple=1)
    assert data.real_tokens == 2 * 32
    assert (next(data)["labels"] != 0).all()


@pytest.mark.parametrize("ids", [IDS, table({"ids": IDS})["ids"], tuple(map(np.array, IDS))])
def test_tokens_of_lists_and_columns(ids):
    assert token_drop(ids, STOP, seed=0, epoch=0)[0].lengths.tolist() == [1, 1, 5, 1] * 4
    right = stop_ids_top_k(Ragged.of(IDS), 2, vocab_size=13, special_ids=[5])
    np.testing.assert_array_equal(stop_ids_top_k(ids, 2, vocab_size=13, special_ids=[5]), right)


STREAM = table({"input_ids": IDS}).to_iterable_dataset()
SPLITS = datasets.DatasetDict(train=table({"input_ids": IDS}), test=table({"input_ids": IDS}))
WAY = r"has no length.*list\(stream.take\(n\)\)"
UNPLANNED = {
    "stream": (lambda: bucketed(STREAM), f"columns is a IterableDataset, which {WAY}"),
    "generator": (lambda: bucketed(row for row in IDS), f"columns is a generator, which {WAY}"),
    "stream of arrays": (lambda: Batches(STREAM, 4, seed=0), f"source is a IterableDataset, which {WAY}"),
    "generator of arrays": (
        lambda: Batches(({"x": i} for i in range(9)), 4, seed=0),
        f"source is a generator, which {WAY}",
    ),
    "splits": (lambda: bucketed(SPLITS), r"DatasetDict of the splits .* Choose one: columns\['train'\]"),
    "splits of arrays": (lambda: Batches(SPLITS, 4, seed=0), r"DatasetDict of .* Choose one: source\['train'\]"),
    "text": (lambda: bucketed("ids"), "columns is a str; expected columns by name"),
    "list of ids": (lambda: bucketed(IDS), "columns is a list; expected columns by name"),
    "dropped stream": (lambda: token_drop_columns(STREAM, STOP, seed=0), f"columns is a IterableDataset, which {WAY}"),
}


@pytest.mark.parametrize("case", UNPLANNED)
def test_what_cannot_be_planned_is_named(case):
    make, message = UNPLANNED[case]
    with pytest.raises(TypeError, match=message):
        make()


BAD = {
    "string labels": ({"label": ["a"] * 16}, r"columns\['label'\] holds texts, such as 'a'.*return_inverse=True"),
    "hole in a mask": (
        {"attention_mask": [[1] * len(row) for row in IDS[:-2]] + [[1, 1, 0, 1, 1], [1]]},
        "zeros between ones in 1 rows, the first is row 14",
    ),
    "mask of other numbers": ({"attention_mask": [[2] * len(row) for row in IDS]}, "runs from 2 to 2; expected 0 or 1"),
    "mask of other lengths": (
        {"attention_mask": [[1]] * 16},
        r"'attention_mask'\] and 'input_ids' have rows of other",
    ),
    "mask of nothing": ({"attention_mask": [[0] * len(row) for row in IDS]}, "'input_ids' is empty in 16 of 16 rows"),
    "labels of other lengths": ({"labels": [[1]] * 15 + [[1, 2]]}, "row 0 has 1 values for 3 tokens"),
    "a missing list": ({"labels": [[1]] * 15 + [None]}, r"columns\['labels'\] holds lists, but None in row 15"),
    "floats for each token": ({"labels": [[0.5] * len(row) for row in IDS]}, "unlike lengths that are no integers"),
    "a mask of one's own": ({"mask": TAGS}, "which every batch makes itself"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("held", ["lists", "table"])
def test_bad_columns_are_named(held, case):
    column, message = BAD[case]
    with pytest.raises(ValueError, match=message if held == "lists" or case != "a missing list" else "holds"):
        bucketed(HELD[held]({"input_ids": IDS, **column}))


def test_bad_examples_and_fills():
    with pytest.raises(ValueError, match="example 1 has"):
        bucketed([{"input_ids": [1]}, {"ids": [1]}])
    with pytest.raises(ValueError, match=r"pad_values has 'labels', but .* such columns are \['ner'\]"):
        bucketed({"input_ids": IDS, "ner": IDS}, pad_values={"labels": 1})
    with pytest.raises(ValueError, match="pad_id is for these"):
        bucketed({"input_ids": IDS}, pad_values={"input_ids": 1})
    with pytest.raises(TypeError, match="must be an integer"):
        bucketed({"input_ids": IDS, "ner": IDS}, pad_values={"ner": 1.5})
