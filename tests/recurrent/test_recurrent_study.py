"""The studies of recurrent cells: every layer builds and learns, claims, options reach the layers, bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.data.pipeline import batches
from effjax.data.sequences import sequence_data
from effjax.recipes import irnn, tarnn
from effjax.recipes.recurrent import RecurrentStudy, recurrent_groups
from effjax.recipes.spec import Budget, choose_arms
from effjax.recurrent.irnn import IncrementalRNN, IncrementalRNNCell
from effjax.study.claims import decide
from effjax.tasks.sequence_layers import LAYERS, sequence_cell, sequence_layer
from effjax.train.loop import fit
from effjax.train.options import TrainOptions

SMALL = RecurrentStudy(tasks=("noisy-digits-12",), hidden=4, budget=Budget(2), seeds=(0,), batch_size=8, train_rows=32)


def built(config, name, groups=lambda config: recurrent_groups(config, {})):
    """The Program of an arm of the first task."""
    group = groups(config)[0]
    return next(arm for arm in group.arms if arm.name == name).build(group.load())


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_takes_a_step(name):
    program = built(SMALL, name)
    (phase,) = program.phases
    state = jax.eval_shape(program.init, jax.random.key(0))
    batch = next(program.loader.open(0))
    assert batch["inputs"].shape == (8, 12, 8)
    after, metrics = jax.eval_shape(phase.step, state, batch, None)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert metrics["loss"].shape == ()
    task = program.task
    assert jax.eval_shape(task.infer, program.params(state), task.example_inputs).shape == (8, 10)


@pytest.mark.parametrize(("task", "shape"), [("tiny_shakespeare-chars-20", (8, 20, None)), ("add-20", (8, 1))])
def test_tokens_are_read_at_every_step_and_values_at_the_end(task, shape):
    program = built(dataclasses.replace(SMALL, read="mean", tasks=(task,)), "tarnn-euler")
    outputs = jax.eval_shape(
        program.task.infer,
        program.params(jax.eval_shape(program.init, jax.random.key(0))),
        program.task.example_inputs,
    )
    assert outputs.shape == tuple(want or got for want, got in zip(shape, outputs.shape, strict=True))


def test_operands_and_chunks_reach_the_layers():
    options = TrainOptions(dtype="bfloat16", remat=True)
    config = dataclasses.replace(SMALL, tasks=("noisy-digits-100",), train=options, unroll=2)
    layer = lambda name, **fields: built(dataclasses.replace(config, **fields), name).task.module.layer
    for name in ("irnn", "tarnn-euler", "lru"):
        assert layer(name).dtype == jnp.bfloat16
    assert layer("lstm").cell.dtype == jnp.bfloat16
    for name in ("irnn", "lstm", "chrono-lstm"):
        assert layer(name).chunk == 10
        assert layer(name, chunk=7).chunk == 7
        assert layer(name).unroll == 2
    assert layer("chrono-lstm").cell.chrono_length == 100


def test_layers_and_cells_by_name():
    assert isinstance(sequence_cell("irnn", 4, length=12), IncrementalRNNCell)
    assert sequence_cell("tarnn-convex-shared", 4, length=12).eta_mode == "shared"
    assert sequence_layer("fastrnn-per-time", 4, length=12).cell.length == 12
    with pytest.raises(ValueError, match="Did you mean 'irnn'"):
        sequence_layer("irn", 4, length=12)
    with pytest.raises(ValueError, match="name='dual-ode' is not one of"):
        sequence_cell("dual-ode", 4, length=12)


@pytest.mark.parametrize("name", ["lru-4", "min-gru", "irnn-equilibrium"])
def test_remat_reaches_layers_without_a_loop_and_keeps_the_names_of_their_parameters(name):
    texts, states = [], []
    for remat in (False, True):
        program = built(dataclasses.replace(SMALL, train=TrainOptions(remat=remat)), name)
        states.append(jax.eval_shape(program.init, jax.random.key(0)))
        texts.append(str(jax.make_jaxpr(program.phases[0].step)(states[-1], next(program.loader.open(0)), None)))
    assert ["remat" in text or "checkpoint" in text for text in texts] == [False, True]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


def test_dropout_differs_from_step_to_step():
    program = built(dataclasses.replace(SMALL, dropout=0.5), "rnn")
    batch = next(program.loader.open(0))
    state = jax.jit(program.init)(jax.random.key(0, impl="rbg"))
    loss = jax.jit(lambda state: program.phases[0].step(state, batch, None)[1]["loss"])
    first, again = loss(state), loss(state)
    later = loss(state._replace(step=state.step + 1))
    assert first == again
    assert first != later


TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))


def test_a_loop_by_hand_trains_as_the_study_does():
    layer, data = IncrementalRNN(4, length=12), sequence_data("noisy-digits-12", train_rows=32)
    program = built(SMALL, "irnn")
    state, step = jax.jit(program.init)(jax.random.key(0)), jax.jit(program.phases[0].step)

    def loss(params, batch):
        states = layer.apply({"params": params["layer"]}, batch["inputs"])
        logits = states[:, -1] @ params["head"]["kernel"] + params["head"]["bias"][None]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    @jax.jit
    def by_hand(params, opt, batch):
        updates, opt = TX.update(jax.grad(loss)(params, batch), opt, params)
        return optax.apply_updates(params, updates), opt

    params, opt = state.params, TX.init(state.params)
    stream, ours = batches(data.train, 8, seed=0, transform=data.draw), program.loader.open(0)
    for _ in range(3):
        params, opt = by_hand(params, opt, next(stream))
        state, _ = step(state, next(ours), None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, state.params)


def decided(recipe, config, score, arms=("*",)):
    """Whether each claim on metrics holds where an arm has the score ``score(arm)``."""
    groups = choose_arms(recipe.groups(config), arms)
    found = {
        f"{group.name}/{arm.name}": {
            "status": "ok",
            "role": arm.role,
            "metrics": {group.metric.name: {"mean": score(arm.name), "values": [score(arm.name)]}},
            "cost": {},
        }
        for group in groups
        for arm in group.arms
    }
    metrics = {group.name: group.metric._asdict() for group in groups}
    return decide(recipe.CLAIMS, found, metrics, timed=False)


@pytest.mark.parametrize(("recipe", "config", "count"), [(irnn, irnn.IrnnStudy, 6), (tarnn, tarnn.TarnnStudy, 11)])
def test_claims_follow_the_numbers(recipe, config, count):
    study = config(budget=Budget(2))
    assert {arm.role for arm in recipe.groups(study)[0].arms} == {"baseline", "method", "control", "alternative"}
    good = decided(recipe, study, lambda arm: 0.1 if arm == "lstm" else 0.9)
    assert len(good) == count
    assert all(claim["holds"] for claim in good)
    assert not any(claim["holds"] for claim in decided(recipe, study, lambda arm: 0.9 if arm == "lstm" else 0.1)[:3])
    assert not any(claim["holds"] for claim in decided(recipe, study, lambda arm: float("nan")))
    assert len(decided(recipe, study, lambda arm: 0.1, ("lstm",))) == 1


@pytest.mark.parametrize(("recipe", "config"), [(irnn, irnn.IrnnStudy), (tarnn, tarnn.TarnnStudy)])
def test_where_less_is_better_the_claims_turn_round(recipe, config):
    study = config(budget=Budget(2), tasks=("add-20",))
    lower = decided(recipe, study, lambda arm: 0.1 if arm == "lstm" else 0.01)
    assert lower
    assert all(claim["holds"] and claim["op"] == "<=" for claim in lower)
    higher = decided(recipe, study, lambda arm: 0.1 if arm == "lstm" else 0.2)
    assert not higher[0]["holds"]


BAD = {
    "clip": ({"clip": 0.0}, r"clip=0.0"),
    "read": ({"read": "first"}, r"read='first'"),
    "hidden": ({"hidden": 0}, r"hidden=0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **options)


def test_unknown_names_are_refused_before_data_are_read():
    with pytest.raises(ValueError, match=r"arms: 'lstmm' matches none of .*lstm"):
        choose_arms(irnn.groups(irnn.IrnnStudy(budget=Budget(2))), ("lstmm",))
    with pytest.raises(ValueError, match="Did you mean 'fsdd'"):
        irnn.groups(irnn.IrnnStudy(budget=Budget(2), tasks=("fsd",)))


@pytest.mark.slow
def test_irnn_remembers_behind_noise_where_the_lstm_forgets():
    found = {}
    for name in ("irnn", "lstm"):
        program = built(irnn.IrnnStudy(budget=Budget(1), seeds=(0,)), name, irnn.groups)
        program = program.within(25 * program.loader.epoch_steps(0))
        found[name] = program.judged(fit(program, 0).state)["accuracy"]
    assert found["irnn"] >= 0.85
    assert found["lstm"] <= 0.2
