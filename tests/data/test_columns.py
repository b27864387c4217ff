"""Columns of tokenised texts: what a mask leaves out, and what is refused."""

import numpy as np
import pytest
from datasets import Dataset

from effjax.data.bucket_sampler import BucketSampler
from effjax.data.columns import token_columns
from effjax.data.length_grouping import PaddedBatches
from effjax.data.packing import PackedBatches

ROWS = [[5, 6, 7], [8, 9], [3, 4, 5, 6, 7], [2]] * 4
TOKENS = sum(map(len, ROWS))


def padded(side="right"):
    """As a tokenizer with padding="max_length" gives them."""
    fill = lambda row, value: [value] * (8 - len(row)) if side == "left" else []
    back = lambda row, value: [value] * (8 - len(row)) if side == "right" else []
    wide = lambda rows, value: [fill(row, value) + row + back(row, value) for row in rows]
    ones = [[1] * len(row) for row in ROWS]
    return {
        "input_ids": wide(ROWS, 0),
        "attention_mask": wide(ones, 0),
        "token_type_ids": wide([[number % 2 for number in row] for row in ROWS], 0),
        "label": list(range(len(ROWS))),
    }


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "form", [dict, Dataset.from_dict, lambda columns: {k: np.array(v) for k, v in columns.items()}]
)
def test_what_the_mask_leaves_out_is_no_token(side, form):
    found = token_columns(form(padded(side)))
    assert [row.tolist() for row in found["input_ids"]] == ROWS
    assert [row.tolist() for row in found["token_type_ids"]] == [[n % 2 for n in row] for row in ROWS]
    assert sorted(found) == ["input_ids", "label", "token_type_ids"]


@pytest.mark.parametrize(
    "make",
    [
        lambda columns: BucketSampler(columns, seed=0, epochs=1, tokens=64, cap=4, multiple=1),
        lambda columns: PaddedBatches(columns, seed=0, epochs=1, batch_size=4),
        lambda columns: PackedBatches(columns, seed=0, epochs=1, batch_size=2, length=8),
    ],
)
def test_samplers_count_real_tokens_alone(make):
    data = make(padded())
    assert data.real_tokens == TOKENS
    for batch in data:
        assert (batch["input_ids"][batch["mask"]] != 0).all()
        assert (batch["input_ids"][~batch["mask"]] == 0).all()


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([[1, 0, 1]], r"a 0 between two 1 in row 0"),
        ([[1, 2, 1]], r"holds 2; expected 1 at tokens"),
        ([[1, 1]], r"rows of other lengths"),
        ([[0, 0, 0]], r"is empty in 1 of 1 rows"),
        ([[0.5, 1, 1]], r"one axis of integers"),
    ],
)
def test_masks_that_say_something_else(mask, words):
    with pytest.raises(ValueError, match=words):
        token_columns({"input_ids": [[5, 6, 7]], "attention_mask": mask})


def test_a_mask_of_ones_changes_nothing():
    columns = {"input_ids": ROWS, "attention_mask": [[1] * len(row) for row in ROWS]}
    assert [row.tolist() for row in token_columns(columns)["input_ids"]] == ROWS
