"""The arms of the COLA study: what a knot does in each, what is trained, the head beside the chain."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from effjax.core.cost import count_params
from effjax.data.bucket_sampler import BucketSampler
from effjax.recipes import cola_arms as ways
from effjax.recipes.bucket_sampler import planned_run
from effjax.recipes.cola import OTHERS, ColaStudy, arms, claims
from effjax.recipes.cola_arms import Run, Settings
from effjax.recipes.cola_tasks import Adaptation
from effjax.recipes.spec import Budget
from effjax.tasks.text import text_task

STUDY = ColaStudy(tasks=("digits/mlp-8",), budget=Budget(12), batch_size=8, links=(2, 3), summed=(3,))
SETTINGS = Settings(2, 2.0, 1e-2, 1e-2, 1e-2, 1e-2, 2, 0.0, None, 8, 1)


@functools.cache
def at_knot(name):
    """The program, and its state before and after the first knot of three links."""
    program = arms(STUDY)[f"digits-mlp-8/{name}"].build()
    (before,) = trained(program, 4)
    assert program.between is None or program.between(before, 3) is before
    return program, before, program.between(jax.tree.map(jnp.copy, before), 4)


def trained(program, *counts):
    """The states after so many steps."""
    state, batches, step = jax.jit(program.init)(jax.random.key(0)), program.batches(0), jax.jit(program.step)
    found = {0: state}
    for count in range(1, max(counts) + 1):
        state, metrics = step(state, next(batches), None)
        found[count] = state
    assert np.isfinite(metrics["loss"])
    return [found[count] for count in counts]


def outputs(program, state):
    return program.infer(program.params(state), program.example_inputs)


@pytest.mark.parametrize("name", ["cola-3", "relora", "resets"])
def test_a_knot_does_not_move_the_network(name):
    program, before, after = at_knot(name)
    np.testing.assert_allclose(outputs(program, after), outputs(program, before), rtol=1e-4, atol=1e-5)
    tied = all((adapter["b"] == 0).all() for adapter in after["trained"]["lora"].values())
    assert tied == (name != "resets")


def test_what_restarts_at_a_knot():
    moments = lambda state: state["opt"]["lora"][0]
    rates = lambda state: int(state["opt"]["lora"][-1].count)
    for name, count in (("cola-3", 4), ("resets", 4), ("per-link", 0)):
        _, before, after = at_knot(name)
        assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(moments(before).mu)) > 0
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(moments(after)))
        assert (rates(before), rates(after)) == (4, count)


def test_periodic_lora_unloads_half_of_its_first_link():
    program, before, after = at_knot("periodic")
    kernel = lambda state: program.params(state)["params"]["head"]["kernel"]
    start = kernel(trained(program, 0, 1)[0])
    np.testing.assert_allclose(kernel(after) - start, 0.5 * (kernel(before) - start), atol=1e-6)


@pytest.mark.parametrize("compare", ["quality", "overhead"])
def test_states_keep_their_shapes(compare):
    for name, arm in arms(dataclasses.replace(STUDY, compare=compare)).items():
        program = arm.build()
        state = jax.eval_shape(program.init, jax.random.key(0))
        after, metrics = jax.eval_shape(program.step, state, next(program.batches(0)), None)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state), (
            name
        )
        assert metrics["loss"].shape == ()


def test_arms_train_as_much_as_they_say():
    built = {name.partition("/")[2]: arm.build() for name, arm in arms(STUDY).items()}
    sizes = {
        name: count_params(program.trained(jax.eval_shape(program.init, jax.random.key(0))))
        for name, program in built.items()
    }
    one = sizes["lora"]
    assert {sizes[name] for name in ("cola-2", "cola-3", "relora", "resets", "periodic")} == {one}
    assert sizes["lora-x3"] == 3 * one
    assert sizes["galore"] == 64 * 8 + 8 * 10
    assert sizes["full"] == sizes["galore"] + 8 + 10
    start, end = trained(built["galore"], 0, 2)
    assert not np.array_equal(outputs(built["galore"], start), outputs(built["galore"], end))


@pytest.fixture(scope="module")
def text():
    """A task with a head, on a fresh encoder in place of a pretrained one."""
    task = text_task("sms_spam", "encoder-1x8", max_length=16, train_rows=32, test_rows=8, dropout=0.0)
    return Adaptation(
        name=task.name,
        source=task.source,
        init=lambda key: task.init(key)["params"],
        loss=task.loss,
        infer=task.infer,
        evaluate=task.evaluate,
        columns={},
        example_inputs=task.example_inputs,
        head=("head",),
        targets="(query|value)/kernel$",
        names=lambda path, layer: path.removesuffix("/kernel").replace("/", "."),
        text=task,
    )


def bucketed(text, way):
    study = dataclasses.replace(STUDY, budget=Budget(1, "epochs"), seeds=(0,))
    plan = lambda seed, epochs: BucketSampler(text.text.train, seed=seed, epochs=epochs, max_shapes=1, cap=8)
    return ways.program(text, SETTINGS, Run(*planned_run(plan, study)), way)


def test_the_head_trains_beside_the_chain_and_never_restarts(text, tmp_path):
    program = bucketed(text, lambda ground: ways.chain(ground, 2))
    assert program.total_steps == 4
    assert program.compiles == len(program.shapes()) == 1
    start, before = trained(program, 0, 2)
    after = program.between(jax.tree.map(jnp.copy, before), 2)
    kernel = lambda state: state["trained"]["head"]["head"]["kernel"]
    assert not np.array_equal(kernel(before), kernel(start))
    for part in ("trained", "opt"):
        for old, new in zip(jax.tree.leaves(before[part]["head"]), jax.tree.leaves(after[part]["head"]), strict=True):
            np.testing.assert_array_equal(old, new)
    assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(after["opt"]["head"])) > 0
    program.folder(after, tmp_path / "adapter")
    head = load_file(tmp_path / "adapter" / "head.safetensors")
    np.testing.assert_array_equal(head["head/kernel"], kernel(after))
    with pytest.raises(ValueError, match="no layout of Hugging Face"):
        program.folder(after, tmp_path / "merged", merged=True)


def test_the_head_alone_is_all_that_is_trained(text):
    program = bucketed(text, ways.head)
    state = jax.eval_shape(program.init, jax.random.key(0))
    assert set(state["trained"]) == set(state["opt"]) == {"head"}
    assert jax.eval_shape(program.step, state, program.shapes()[0].batch, None)[0] == state


def test_bad_settings():
    with pytest.raises(ValueError, match="One link is LoRA"):
        ColaStudy(budget=Budget(10), links=(1,))
    with pytest.raises(ValueError, match="evaluate"):
        ColaStudy(budget=Budget(10), compare="stacked")
    with pytest.raises(ValueError, match="DATA/MODEL"):
        ColaStudy(budget=Budget(10), tasks=("digits",))
    with pytest.raises(ValueError, match="others"):
        ColaStudy(budget=Budget(10), others=("dora",))
    study = dataclasses.replace(STUDY, tasks=("digits/cnn",))
    with pytest.raises(ValueError, match="mlp-64-64"):
        arms(study)["digits-cnn/lora"].build()


def test_claims_name_arms_that_are_there():
    for study in (STUDY, dataclasses.replace(STUDY, compare="overhead")):
        numbers = {name: {"accuracy": 0.5, "step_ms": 1.0, "peak_bytes": 1.0} for name in arms(study)}
        assert claims(study)
        for claim in claims(study):
            assert claim.left(numbers) in (0.5, 1.0)
    assert set(OTHERS) - {"head"} <= {name.partition("/")[2] for name in arms(STUDY)}
