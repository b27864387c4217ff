"""The ICPC study: its settings, and which parameters it decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.recipes.icpc import IcpcStudy, _adamw, _dividing
from effjax.recipes.icpc_measures import check_held_out, level_measures
from effjax.train.options import Budget


def study(**fields):
    return IcpcStudy(budget=Budget(4), **fields)


def test_positions_and_tokens_are_not_decayed():
    tx = _adamw(study(warmup=0.0, weight_decay=0.5, learning_rate=0.1), 10)
    params = {
        "module": {
            "position": np.ones((1, 3, 2), np.float32),
            "class_token": np.ones((1, 1, 2), np.float32),
            "patch_kernel": np.ones((2, 2, 1, 2), np.float32),
            "head": {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)},
        }
    }

    @jax.jit
    def step(params):
        # Without a gradient only decay moves anything: by 0.1 * 0.5.
        return tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)[0]["module"]

    updates = step(params)
    for name in ("position", "class_token"):
        np.testing.assert_array_equal(updates[name], 0)
    np.testing.assert_array_equal(updates["head"]["bias"], 0)
    for kernel in (updates["patch_kernel"], updates["head"]["kernel"]):
        np.testing.assert_allclose(kernel, -0.05, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tasks": ("fashion_mnist",)}, "DATA/MODEL"),
        ({"tasks": ("fashion_mnist/swin-64-4",)}, "is no vision transformer"),
        ({"scales": (0.5, 0.9)}, "end with 1"),
        ({"scales": (1.0,), "shares": (1,)}, "two or more"),
        ({"scales": (0.7, 0.5, 1.0), "shares": (1, 1, 1)}, "increasing"),
        ({"shares": (1, 1)}, "one integer for each"),
        ({"batch_size": 64}, "batch_size=64 is no multiple"),
        ({"loss": 0.0}, "loss=0.0"),
        ({"dropped": (0.0, 0.5)}, "decreasing"),
        ({"dropped": (0.5, 0.1)}, "end with 0"),
        ({"tasks": ("sst2/encoder-1x8",)}, "whole 'epochs'"),
    ],
)
def test_settings_that_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        study(**fields)


@pytest.mark.parametrize(("rows", "count", "shares"), [(100, 3, (2, 1, 1)), (60, 3, (1, 1, 1)), (7, 2, (6, 1))])
def test_shares_of_patches_divide_any_batch(rows, count, shares):
    assert _dividing(rows, count) == shares


def test_the_cascade_is_judged_on_other_rows_than_its_threshold():
    """Of every second row: sure and right at the small size, or unsure and wrong where the full size is right."""
    easy, hard = [[5.0, 0.0], [5.0, 0.0]], [[0.1, 0.0], [0.0, 5.0]]
    logits = np.array([easy, easy, hard, hard] * 10, np.float32)
    labels = np.array([0, 0, 1, 1] * 10)
    found = level_measures(study(certify="search", loss=0.01), logits, labels, (1.0, 4.0), ("2", "4"))
    assert (found["small"], found["accuracy"], found["accuracy_2"], found["spread"]) == (0.5, 1.0, 0.5, 0.5)
    assert (found["cascade_accuracy"], found["cascade_loss"]) == (1.0, 0.0)
    assert found["cascade_cost"] == found["cascade_least"] == 0.25 + 0.5
    assert found["cascade_harm"] == 0.5
    assert found["sizes"].x == [0.25, 1.0]


@pytest.mark.parametrize(("certify", "rows"), [("ltt", 1194), ("conformal", 396)])
def test_too_few_test_rows_for_the_guarantee_are_refused_before_training(certify, rows):
    config = study(certify=certify)
    with pytest.raises(ValueError, match=rf"certify='{certify}': {rows} test rows are too few for loss=0.005"):
        check_held_out(config, rows)
    check_held_out(config, rows + 2)
    check_held_out(study(certify="search"), 2)
