"""The language modelling task: windows, the loss over real tokens, evaluation, bad input."""

import jax
import numpy as np
import pytest

from effjax.data.sets import DataSet
from effjax.models.decoder import Decoder
from effjax.tasks.language import lm_task
from effjax.train.grad import accumulated


def dataset(text, splits=("train", "validation")):
    return DataSet("toy", {split: {"text": [text]} for split in splits}, (), "", "made up", "text")


@pytest.fixture(scope="module")
def stories():
    task = lm_task(length=48, train_rows=6, test_rows=5, eval_batch=2)
    return task, task.init(jax.random.key(0))


def test_stories260k_knows_some_shakespeare_and_the_loss_is_the_evaluation(stories):
    task, variables = stories
    assert task.train["input_ids"].shape == (6, 48)
    assert (task.train["input_ids"] == 1).any()  # paragraphs begin with <s>
    value, (state, metrics) = jax.jit(task.loss)(variables, task.test)
    value = float(value)
    assert (state, float(metrics["loss"])) == ({}, value)
    found = task.evaluate(variables)
    assert found["nll"] == pytest.approx(value, rel=1e-5)
    assert 3 < found["nll"] < np.log(512)
    logits = np.asarray(jax.jit(task.infer)(variables, task.test), np.float64)[:, :-1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert -np.take_along_axis(log_p, task.test["input_ids"][:, 1:, None], -1).mean() == pytest.approx(value, rel=1e-4)


def test_padding_and_dummy_rows_change_nothing(stories):
    task, variables = stories
    ids = task.train["input_ids"][:2]
    padded = {
        "input_ids": np.pad(ids, ((0, 1), (0, 8))),
        "mask": np.pad(np.ones_like(ids, bool), ((0, 1), (0, 8))),
        "weight": np.array([1, 1, 0], np.float32),
    }
    loss = jax.jit(lambda batch: task.loss(variables, batch)[0])
    assert loss(padded) == pytest.approx(float(loss({"input_ids": ids})), rel=1e-6)


def test_parts_of_a_batch_are_weighted_by_their_tokens(stories):
    task, variables = stories
    ids = task.train["input_ids"][:4]
    lengths = np.array([48, 48, 9, 5])
    batch = {
        "input_ids": ids,
        "mask": np.arange(48) < lengths[:, None],
        "weight": np.array([1, 1, 1, 0], np.float32),
    }
    assert task.weight(batch) == 47 + 47 + 8
    assert task.weight({"input_ids": ids}) == 4 * 47
    value_and_grad = jax.value_and_grad(lambda v, b: task.loss(v, b), has_aux=True)
    whole, parts = (jax.jit(accumulated(value_and_grad, k, weight=task.weight))(variables, batch) for k in (1, 2))
    assert float(parts[0][0]) == pytest.approx(float(whole[0][0]), rel=1e-5)
    for a, b in zip(jax.tree.leaves(parts[1]), jax.tree.leaves(whole[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_rows_are_a_fixed_choice_of_consecutive_windows(stories):
    task, _ = stories
    every = lm_task(length=48).train["input_ids"]
    places = [int(np.flatnonzero((every == row).all(1))[0]) for row in task.train["input_ids"]]
    assert places == sorted(places)
    assert places[-1] > 100


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        ("sms_spam", {"length": 1000}, r"length=1000 must be .*512 positions"),
        (dataset("Once."), {}, r"toy\[train\] has \d+ tokens, fewer than one window of length=128"),
        (dataset("Once.", ("train",)), {}, "needs 'text' in 'validation'"),
        (dataset("Once upon a time"), {"length": 4, "train_rows": 99}, "train_rows=99"),
        (dataset("Once"), {"model": Decoder(9, 8, 1, 2, 16, 32)}, "give its tokenizer"),
    ],
)
def test_bad_input_is_named(data, arguments, message):
    with pytest.raises(ValueError, match=message):
        lm_task(data, **arguments)
