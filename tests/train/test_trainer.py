"""The one trainer: what optimizers are given, accumulation, running statistics, keys, and options it refuses."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.optim.one_gradient import samuel_one_gradient
from effjax.tasks.custom import task
from effjax.train.grad import accumulated
from effjax.train.loaders import column_loader, examples_in
from effjax.train.loop import NonFiniteError, fit
from effjax.train.options import TrainOptions
from effjax.train.trainer import check_options, supervised


class Net(nn.Module):
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(4)(x))
        return nn.Dense(2)(nn.Dropout(self.dropout, deterministic=not train)(nn.tanh(x)))


def data(**more):
    x = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
    return {"x": x, "label": (x[:, 0] > 0).astype(np.int32), **more}


def problem(dropout=0.0, **more):
    return task(Net(dropout), {"train": data(**more), "test": data(**more)})


def one_step(program, seed=0):
    state = program.init(jax.random.key(seed))
    batch = next(program.loader.open(seed))
    return state, batch, program.phases[0].step(state, batch, None)


def spy(seen):
    """An optimizer that notes what it is given."""

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return jax.tree.map(lambda g: -0.1 * g, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_optimizer_is_given_the_loss_and_a_function_of_it_with_the_same_statistics(accumulate):
    seen = {}
    weight = np.array([1, 0, 1, 1] * 8, np.float32)
    mine = problem(weight=weight)
    program = supervised(mine, spy(seen), steps=1, batch_size=8, options=TrainOptions(accumulate=accumulate))
    state, batch, (after, metrics) = one_step(program)
    assert seen["batch_size"] == batch["weight"].sum()
    assert seen["value"] == metrics["loss"]
    np.testing.assert_allclose(seen["value_fn"](state.params), seen["value"], rtol=1e-6)
    assert seen["value_fn"](jax.tree.map(jnp.zeros_like, state.params)) == pytest.approx(np.log(2), rel=1e-5)
    np.testing.assert_allclose(after.params["Dense_1"]["bias"], -0.1 * seen["grad"]["Dense_1"]["bias"], rtol=1e-6)
    assert np.any(after.model["batch_stats"]["BatchNorm_0"]["mean"] != 0)


def test_a_line_search_of_ours_runs_with_running_statistics():
    tx = samuel_one_gradient(optax.sgd, (0.3, 0.1), every=2)
    state = fit(supervised(problem(0.1), tx, steps=6, batch_size=8), 0).state
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_gradients_that_are_not_finite_are_skipped_though_loss_and_parameters_are_finite():
    mine = problem()

    def loss(variables, batch, key=None, **options):
        value, aux = mine.loss(variables, batch, key, **options)
        return value + jnp.sqrt(0 * optax.tree.norm(variables["params"])), aux  # the root's slope at 0

    program = supervised(
        mine._replace(loss=loss), optax.set_to_zero(), steps=3, batch_size=8, options=TrainOptions(nonfinite="skip")
    )
    with pytest.raises(NonFiniteError, match="all 3 updates were skipped"):
        fit(program, 0, options=TrainOptions(nonfinite="skip"))


def test_dropout_differs_between_steps_and_seeds_and_comes_again():
    program = supervised(problem(0.5), optax.sgd(0.0), steps=1, batch_size=8)
    state, batch, (after, metrics) = one_step(program)
    step = program.phases[0].step
    assert step(after, batch, None)[1]["loss"] != metrics["loss"]
    assert step(state, batch, None)[1]["loss"] == metrics["loss"]
    other = state._replace(key=jax.random.key(7))
    assert step(other, batch, None)[1]["loss"] != metrics["loss"]


def test_a_task_that_is_one_batch_is_seen_whole():
    rows = data()
    mine = problem()._replace(full_batch=True, train=rows)
    program = supervised(mine, optax.sgd(0.1), steps=2)
    assert not program.has_batches
    by_rows = supervised(problem(), optax.sgd(0.1), steps=2, loader=column_loader(rows, len(rows["x"]), shuffle=False))
    for left, right in zip(*(jax.tree.leaves(fit(p, 0).state.params) for p in (program, by_rows)), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6)
    with pytest.raises(ValueError, match=r"train\.accumulate=2: a step of 'Net' is no mean over rows"):
        supervised(mine, optax.sgd(0.1), options=TrainOptions(accumulate=2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (TrainOptions(dtype="bfloat16"), "train.dtype='bfloat16', but 'Net' was made with dtype='float32'"),
        (TrainOptions(remat=True), "train.remat=True, but 'Net' was made with remat=False"),
    ],
)
def test_options_that_the_task_was_not_made_with_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        supervised(problem(), optax.sgd(0.1), options=options)
    made = dataclasses.asdict(options)
    check_options(options, problem()._replace(dtype=made["dtype"], remat=made["remat"]))


def test_batches_must_fit_the_data_and_parts_the_batch():
    with pytest.raises(ValueError, match=r"batch_size=64 must be .*The training data have 32 rows"):
        supervised(problem(), optax.sgd(0.1), batch_size=64)
    program = supervised(problem(), optax.sgd(0.1), batch_size=9, options=TrainOptions(accumulate=2))
    with pytest.raises(ValueError, match="accumulate=2 does not divide the batch of 9 rows"):
        one_step(program)


def test_parts_weigh_as_many_examples_as_they_hold():
    """Seven of eight dummy rows in the second part: equal weights would halve the gradient of the first."""
    x, weight = np.arange(8.0, dtype=np.float32), np.array([1, 1, 1, 1, 0, 0, 0, 1], np.float32)

    def value_and_grad(w, batch):
        loss = lambda w: (batch["weight"] * w * batch["x"]).sum() / jnp.maximum(batch["weight"].sum(), 1)
        value, grads = jax.value_and_grad(loss)(w)
        return (value, {"seen": batch["weight"].sum(), "count": jnp.int32(1)}), grads

    whole = value_and_grad(2.0, {"x": x, "weight": weight})
    for parts in (2, 4):
        (value, aux), grads = accumulated(value_and_grad, parts)(2.0, {"x": x, "weight": weight})
        assert value == pytest.approx(whole[0][0])
        assert grads == pytest.approx((0 + 1 + 2 + 3 + 7) / 5)
        assert aux["count"] == 1
    assert examples_in({"x": x}) == 8
    assert examples_in({"x": x, "weight": weight}) == 5
