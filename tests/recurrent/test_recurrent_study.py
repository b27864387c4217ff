"""The studies of recurrent cells: every layer builds and learns, claims, options reach the layers, bad input."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from effjax.recipes import irnn, tarnn
from effjax.recipes.recurrent import LAYERS, RecurrentStudy, _program, axis
from effjax.recipes.spec import Budget
from effjax.train.loop import fit
from effjax.train.options import TrainOptions

SMALL = RecurrentStudy(
    tasks=("noisy-digits-12",), cells=tuple(LAYERS), hidden=4, budget=Budget(2), seeds=(0,), batch_size=8, train_rows=32
)


@pytest.mark.parametrize("cell", LAYERS)
def test_every_layer_takes_a_step(cell):
    program = _program(SMALL, "noisy-digits-12", cell)
    state = jax.eval_shape(program.init, jax.random.key(0))
    batch = next(program.batches(0))
    assert batch["inputs"].shape == (8, 12, 8)
    after, metrics = jax.eval_shape(program.step, state, batch, None)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert metrics["loss"].shape == ()
    assert jax.eval_shape(program.infer, program.params(state), program.example_inputs).shape == (8, 10)


@pytest.mark.parametrize(("task", "shape"), [("tiny_shakespeare-chars-20", (8, 20, None)), ("add-20", (8, 1))])
def test_tokens_are_read_at_every_step_and_values_at_the_end(task, shape):
    program = _program(dataclasses.replace(SMALL, read="mean"), task, "tarnn-euler")
    outputs = jax.eval_shape(
        program.infer,
        program.params(jax.eval_shape(program.init, jax.random.key(0))),
        program.example_inputs[:8],
    )
    assert outputs.shape == tuple(want or got for want, got in zip(shape, outputs.shape, strict=True))


def test_operands_and_chunks_reach_the_layers():
    options = TrainOptions(dtype="bfloat16", remat=True)
    config = dataclasses.replace(SMALL, train=options, unroll=2)
    for name in ("irnn", "tarnn-euler", "lru"):
        assert LAYERS[name].make(config, 100).dtype == jnp.bfloat16
    assert LAYERS["lstm"].make(config, 100).cell.dtype == jnp.bfloat16
    for name in ("irnn", "lstm", "chrono-lstm"):
        assert LAYERS[name].make(config, 100).chunk == 10
        assert LAYERS[name].make(dataclasses.replace(config, chunk=7), 100).chunk == 7
        assert LAYERS[name].make(config, 100).unroll == 2
    assert LAYERS["chrono-lstm"].make(config, 100).cell.chrono_length == 100


def test_dropout_differs_from_step_to_step():
    program = _program(dataclasses.replace(SMALL, dropout=0.5), "noisy-digits-12", "rnn")
    batch = next(program.batches(0))
    state = jax.jit(program.init)(jax.random.key(0, impl="rbg"))
    loss = jax.jit(lambda state: program.step(state, batch, None)[1]["loss"])
    first, again = loss(state), loss(state)
    later = loss({**state, "step": state["step"] + 1})
    assert first == again
    assert first != later


@pytest.mark.parametrize(("recipe", "config"), [(irnn, irnn.IrnnStudy), (tarnn, tarnn.TarnnStudy)])
def test_claims_follow_the_numbers(recipe, config):
    study = config(budget=Budget(2))
    arms = recipe.arms(study)
    assert {arm.role for arm in arms.values()} == {"baseline", "method", "control", "alternative"}
    good = {name: {"accuracy": 0.1 if name.endswith("/lstm") else 0.9} for name in arms}
    claims = [claim for claim in recipe.claims(study) if claim.of == "metrics"]
    holds = lambda claim, m: (claim.left(m) >= claim.right(m)) if claim.op == ">=" else claim.left(m) <= claim.right(m)
    assert all(holds(claim, good) for claim in claims)
    bad = {name: {"accuracy": 0.9 if name.endswith("/lstm") else 0.1} for name in arms}
    assert not any(holds(claim, bad) for claim in claims[:3])
    assert math.isnan(claims[0].left({name: {} for name in arms}))
    few = recipe.claims(dataclasses.replace(study, cells=("lstm",)))
    assert len(few) == 1


def test_axes():
    assert [axis(task).metric for task in ("noisy-digits-9", "add-9", "ptb-words-9")] == ["accuracy", "mse", "nll"]


BAD = {
    "cell": ({"cells": ("lstmm",)}, r"cells='lstmm'.*lstm"),
    "clip": ({"clip": 0.0}, r"clip=0.0"),
    "read": ({"read": "first"}, r"read='first'"),
    "hidden": ({"hidden": 0}, r"hidden=0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **options)


@pytest.mark.slow
def test_irnn_remembers_behind_noise_where_the_lstm_forgets():
    found = {}
    for cell in ("irnn", "lstm"):
        config = irnn.IrnnStudy(cells=(cell,), budget=Budget(25, "epochs"), seeds=(0,))
        program = irnn.arms(config)[f"noisy-digits-200/{cell}"].build()
        found[cell] = program.evaluate(fit(program, 0).state)["accuracy"]
    assert found["irnn"] >= 0.85
    assert found["lstm"] <= 0.2
