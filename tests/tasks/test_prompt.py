"""Classification by prompts: what is scored, the loss, bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.data.sets import load
from effjax.tasks.prompt import prompt_task


def some(rows):
    data = load("sms_spam")
    splits = {
        split: {name: values[:rows] for name, values in columns.items()} for split, columns in data.splits.items()
    }
    return dataclasses.replace(data, splits=splits)


@pytest.fixture(scope="module")
def task():
    return prompt_task(some(7), max_length=40, scan_layers=True, eval_batch=7)


def test_label_words_alone_are_scored_and_the_end_is_kept(task):
    words = ("No", "Yes")
    for row in range(3):
        for choice, word in enumerate(words):
            ids, scored = (task.train[name][row, choice] for name in ("input_ids", "scored"))
            assert ids[0] == 1  # the first token of every sequence
            assert task.tokenizer.decode(ids[scored]).strip() == word
            assert "Yes or No?" in task.tokenizer.decode(ids[~scored & (ids != task.tokenizer.pad_id)])


def test_scores_are_the_mean_likelihood_of_the_label_words(task):
    variables = task.init(jax.random.key(0))
    batch = {name: column[:2] for name, column in task.train.items()}
    (value, (_, metrics)), scores = jax.jit(lambda v, b: (task.loss(v, b), task.infer(v, b)))(variables, batch)
    ids, scored = batch["input_ids"][1, 0], batch["scored"][1, 0]
    logits = jax.nn.log_softmax(jax.jit(task.module.apply)(variables, ids[None])[0])
    places = np.flatnonzero(scored)
    np.testing.assert_allclose(scores[1, 0], logits[places - 1, ids[places]].mean(), rtol=1e-5)
    expected = -jnp.take_along_axis(jax.nn.log_softmax(scores), batch["label"][:, None], 1).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert task.evaluate(variables)["accuracy"] in np.arange(8) / 7  # seven test rows
    assert metrics["accuracy"] == (scores.argmax(1) == batch["label"]).mean()


def test_rows_are_chosen_and_dummy_rows_change_nothing(task):
    few = prompt_task(some(7), max_length=40, scan_layers=True, train_rows=3, test_rows=2)
    places = [np.flatnonzero((task.train["input_ids"] == row).all((1, 2)))[0] for row in few.train["input_ids"]]
    assert places == sorted(places)
    assert (len(places), len(few.test["label"])) == (3, 2)
    variables = task.init(jax.random.key(0))
    plain = {name: column[:2] for name, column in task.train.items()}
    padded = {name: np.concatenate([column, np.zeros_like(column[:1])]) for name, column in plain.items()}
    padded["weight"] = np.array([1, 1, 0], np.float32)
    losses = [float(jax.jit(task.loss)(variables, batch)[0]) for batch in (plain, padded)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="train_rows=9"):
        prompt_task(some(7), max_length=40, train_rows=9)
    with pytest.raises(ValueError, match="data"):
        prompt_task("tiny_shakespeare")
    with pytest.raises(ValueError, match="512 positions"):
        prompt_task(some(4), max_length=600)
