"""The arms of the FPTT study: what each step does to the state, what is evaluated, and what the claims say."""

import dataclasses
import functools
import itertools
import math
import operator

import jax
import numpy as np
import optax
import pytest

from effjax.data.sequences import sequence_data
from effjax.models.sequence import LSTMCell, Recurrent
from effjax.recipes.fptt import OTHERS, FpttStudy, arms, axes, claims, sweeps
from effjax.recipes.fptt_network import CELLS, network
from effjax.recipes.spec import Budget
from effjax.tasks.sequence import sequence_loss

DIGITS, TEXT = "digits-permuted-lstm-6", "tiny_shakespeare-chars-10-lstm-6"
STUDY = FpttStudy(
    tasks=("digits-permuted", "tiny_shakespeare-chars-10", "add-12"),
    budget=Budget(6),
    hidden=(6,),
    parts=4,
    batch_size=8,
    train_rows=32,
    test_rows=16,
    bptt_rates=(0.01,),
)


@functools.cache
def built(name, **fields):
    return arms(dataclasses.replace(STUDY, **fields))[name].build()


def trained(program, steps):
    """The states before and after each step, and the steps' metrics."""
    states, metrics, step, source = (
        [jax.jit(program.init)(jax.random.key(0))],
        [],
        jax.jit(program.step),
        program.batches(0),
    )
    for _ in range(steps):
        state, row = step(states[-1], next(source), None)
        states.append(state)
        metrics.append(row)
    return states, metrics


def test_states_keep_their_shapes():
    names = [f"{DIGITS}/{name}" for name in ("bptt", "bptt-losses", "bptt-small", "tbptt", "chunked", "fptt-epochs")]
    costs = dataclasses.replace(STUDY, compare="overhead", tasks=("digits-permuted",))
    programs = {name: built(name) for name in [*names, f"{TEXT}/tbptt", f"{TEXT}/fptt-0.02"]}
    for name, program in {**programs, "remat": arms(costs)[f"{DIGITS}/bptt-remat"].build()}.items():
        state = jax.eval_shape(program.init, jax.random.key(0))
        after, metrics = jax.eval_shape(program.step, state, next(program.batches(0)), None)
        kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        assert kinds(after) == kinds(state), name
        assert metrics["loss"].shape == (), name


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("task", ["digits-permuted", "tiny_shakespeare-chars-10"])
def test_every_cell_fits(cell, task):
    study = dataclasses.replace(STUDY, cells=(cell,), tasks=(task,))
    program = arms(study)[f"{task}-{cell}-6/fptt-0.02"].build()
    state = jax.eval_shape(program.init, jax.random.key(0))
    assert jax.eval_shape(program.step, state, next(program.batches(0)), None)[1]["loss"].shape == ()
    infer = lambda state, inputs: program.infer(program.params(state), inputs)
    outputs = jax.eval_shape(infer, state, program.example_inputs)
    assert outputs.shape == ((8, 10) if task == "digits-permuted" else (8, 10, 65))


def test_the_network_is_an_lstm_over_the_whole_sequence():
    data = sequence_data("add-12", train_rows=4, test_rows=4)
    net = network(data, "lstm", 6)
    params = jax.jit(net.init)(jax.random.key(0))
    layer = jax.jit(Recurrent(LSTMCell(6)).apply)
    states = layer({"params": {"cell": params["cell"]}}, data.test["inputs"])
    want = states[:, -1] @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(jax.jit(net.infer)(params, data.test["inputs"]), want, rtol=1e-5, atol=1e-6)


def test_the_state_of_a_text_goes_on():
    program = built(f"{TEXT}/tbptt", learning_rate=0.0)
    (*_, after), metrics = trained(program, 2)
    source = program.batches(0)
    first, second = next(source), next(source)
    np.testing.assert_array_equal(first["targets"][:, -1], second["inputs"][:, 0])
    net = network(sequence_data("tiny_shakespeare-chars-10"), "lstm", 6)

    @jax.jit
    def whole(params):
        ids, targets = (np.concatenate([first[name], second[name]], 1).T for name in ("inputs", "targets"))
        carry, states = jax.lax.scan(functools.partial(net.cell, params), net.start(8), net.encode(params, ids))
        return carry, sequence_loss("tokens", net.read(params, states[10:]), targets[10:])

    carry, loss = whole(after["params"])
    # The parts are of 2, 2, 2, 2 and 2 steps, so that their mean is that of all tokens.
    np.testing.assert_allclose(metrics[-1]["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(after["carry"][1], carry[1], rtol=1e-5, atol=1e-6)


def test_a_sequence_with_one_target():
    small = {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 1e-2, "clip": 1e-2}
    program = built(f"{DIGITS}/chunked", **small, decay_at=(0.5,))
    states, metrics = trained(program, 6)
    assert "carry" not in states[-1]
    # It starts from zeros, and the loss shown is that of the last part, without a weight.
    source = program.batches(0)
    next(source)
    batch = next(source)
    outputs = jax.jit(program.infer)(program.params(states[1]), batch["inputs"])
    np.testing.assert_allclose(metrics[1]["loss"], sequence_loss("class", outputs, batch["targets"]), rtol=2e-3)
    # Four updates in each, and the rate falls after half of the sequences.
    assert optax.tree.get(states[-1]["opt"], "count") == 6 * 4
    moved = [
        float(optax.tree.norm(jax.tree.map(np.subtract, after["params"], before["params"])))
        for before, after in itertools.pairwise(states)
    ]
    assert min(moved[:3]) > 4 * max(moved[3:])


def test_fptt_is_evaluated_at_its_average_which_it_takes_over_at_the_end_of_an_epoch():
    program = built(f"{DIGITS}/fptt-epochs")
    state = trained(program, 1)[0][-1]
    found = program.evaluate(state)
    assert set(found) == {"accuracy", "nll", "accuracy_w", "nll_w"}
    assert found["nll"] != found["nll_w"]
    np.testing.assert_array_equal(program.params(state)["head"]["bias"], state["opt"].wbar["head"]["bias"])
    assert [done for done in range(1, 9) if program.between(state, done) is not state] == [4, 8]
    after = program.between(state, 4)
    np.testing.assert_array_equal(after["params"]["head"]["bias"], state["opt"].wbar["head"]["bias"])
    assert optax.tree.norm(after["opt"].lam) == 0 < optax.tree.norm(state["opt"].lam)


def test_every_arm_sees_as_many_sequences():
    programs = [built(f"{DIGITS}/{name}") for name in ("bptt", "bptt-0.01", "bptt-small", "chunked", "fptt-0.5")]
    assert {program.total_steps * program.batch_size for program in programs} == {6 * 8}
    assert [program.total_steps for program in programs] == [6, 6, 24, 6, 6]


def test_memory_of_a_step_does_not_grow_with_time():
    study = dataclasses.replace(STUDY, compare="memory", parts=None, part_length=10, tasks=("add-50", "add-1000"))

    def temporary(name):
        program = arms(study)[name].build()
        state = jax.eval_shape(program.init, jax.random.key(0))
        step = jax.jit(program.step, donate_argnums=0).lower(state, next(program.batches(0)), None)
        return step.compile().memory_analysis().temp_size_in_bytes

    # Room for a loss a part, which is little beside a real width.
    assert temporary("add-1000-lstm-6/fptt") <= temporary("add-50-lstm-6/fptt") + 4 * 1000


def test_texts_have_no_arms_that_would_repeat_another():
    names = {name.partition("/")[2] for name in arms(STUDY) if name.startswith(TEXT)}
    assert names.isdisjoint({"bptt-losses", "bptt-small"})
    assert {"bptt", "tbptt", "chunked", "fptt-epochs", "fptt-0.02"} <= names


def decide(study, score, **costs):
    """Whether each claim holds where an arm has the score ``score(arm)`` and a step costs ``costs[arm]``."""
    numbers = {
        name: dict.fromkeys(("accuracy", "mse", "nll"), score(name.partition("/")[2]))
        | dict.fromkeys(("step_ms", "temp_bytes"), costs.get(name.partition("/")[2], 1.0))
        for name in (*arms(study), *sweeps(study))
    }
    compare = {"<=": operator.le, ">=": operator.ge}
    return {claim.text: compare[claim.op](claim.left(numbers), claim.right(numbers)) for claim in claims(study)}


def test_claims_on_quality():
    digits = dataclasses.replace(STUDY, tasks=("digits-permuted",))
    scores = {"bptt": 0.7, "bptt-0.01": 0.8, "bptt-losses": 0.75, "bptt-small": 0.9, "chunked": 0.85, "fptt-0.02": 0.7}
    held = decide(digits, lambda arm: scores.get(arm, math.nan))
    assert [text.partition(": ")[2].split(":")[0] for text, holds in held.items() if not holds] == [
        "the regulariser helps",
        "smaller batches would not do",
    ]
    assert len(held) == 5
    assert not any(decide(digits, lambda arm: math.nan).values())
    add = dataclasses.replace(STUDY, tasks=("add-12",))
    held = decide(add, lambda arm: {"chunked": 0.01, "bptt": 0.16, "bptt-0.01": 0.15, "fptt-0.02": 0.1}.get(arm, 0.2))
    solved = {text: holds for text, holds in held.items() if "solve" in text or "plateau" in text}
    assert list(solved.values()) == [True, False, True]
    assert {axis.metric for axis in axes(STUDY).values()} == {"accuracy", "nll", "mse"}


def test_claims_on_costs():
    time = dataclasses.replace(STUDY, compare="overhead", tasks=("add-12",))
    assert list(decide(time, lambda arm: 0.0, fptt=1.2, bptt=1.0).values()) == [True, False, False]
    memory = dataclasses.replace(STUDY, compare="memory", tasks=("add-20", "add-100"), parts=None, part_length=10)
    held = decide(memory, lambda arm: 0.0, fptt=2.0)
    assert [holds for text, holds in held.items()] == [True, True, True, False, False]
    assert not sweeps(memory)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"part_length": 5}, "give one of the two"),
        ({"parts": None}, "give one of the two"),
        ({"parts": 1}, "parts=1 must be an integer in"),
        ({"cells": ("lstn",)}, "Did you mean 'lstm'"),
        ({"alphas": ()}, r"alphas=\(\) leaves nothing"),
        ({"decay_at": (1.0,)}, "decay_at=1.0"),
        ({"others": ("bptt-loses",)}, "Did you mean 'bptt-losses'"),
        ({"budget": Budget(5, "device_seconds")}, "must not be time"),
        ({"train": dataclasses.replace(STUDY.train, accumulate=2)}, "train.accumulate=2"),
        ({"compare": "memory", "tasks": ("digits-pixels",)}, "end in their length"),
    ],
)
def test_bad_configs(fields, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(STUDY, **fields)
    assert set(OTHERS) == set(STUDY.others)
