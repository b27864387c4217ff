"""The COLA study: the public calls give what its arm gives; what a knot does in each arm; the head beside the chain."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from effjax.core.cost import count_params
from effjax.recipes.cola import ColaStudy, groups
from effjax.recipes.spec import choose_arms
from effjax.train.options import Budget, TrainOptions

STUDY = ColaStudy(tasks=("digits/mlp-8",), budget=Budget(12), batch_size=8, links=(2, 3), summed=(3,))
TEXT = ColaStudy(
    tasks=("sms_spam/encoder-1x8",),
    budget=Budget(1, "epochs"),
    seeds=(0,),
    batch_size=8,
    partial_batches=True,
    rival_links=2,
    rank=2,
    max_length=16,
    train_rows=30,
    test_rows=8,
)


@functools.cache
def loaded(study):
    (group,) = groups(study)
    return {arm.name: arm for arm in group.arms}, group.load()


@functools.cache
def built(name, study=STUDY):
    arms, task = loaded(study)
    return arms[name].build(task)


copied = jax.jit(functools.partial(jax.tree.map, jnp.copy))


@functools.cache
def at_knot(name):
    """The program, and its state before and after the first knot of three links."""
    program = built(name)
    (before,) = trained(program, program.phases[0].steps)
    return program, before, program.phases[0].leave(copied(before))


def trained(program, *counts):
    """The states after so many steps."""
    state, data, step = (
        jax.jit(program.init)(jax.random.key(0)),
        program.loader.open(0),
        jax.jit(program.phases[0].step),
    )
    found = {0: state}
    for count in range(1, max(counts) + 1):
        state, metrics = step(state, next(data), None)
        found[count] = state
        assert np.isfinite(metrics["loss"])
    return [found[count] for count in counts]


def outputs(program, state):
    infer = jax.jit(lambda state: program.task.infer(program.params(state), program.task.example_inputs))
    return np.asarray(infer(state))


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_knots_come_after_equal_links_and_phases_share_one_step():
    for name, lengths in (("cola-3", [4, 4, 4]), ("cola-2", [6, 6]), ("resets", [4, 4, 4]), ("lora", [12])):
        phases = built(name).phases
        assert [phase.steps for phase in phases] == lengths
        assert len({phase.step for phase in phases}) == built(name).compiles == 1
        assert [phase.leave is not None for phase in phases] == [True] * (len(lengths) - 1) + [False]


@pytest.mark.parametrize("name", ["cola-3", "relora", "resets"])
def test_a_knot_does_not_move_the_network(name):
    program, before, after = at_knot(name)
    np.testing.assert_allclose(outputs(program, after), outputs(program, before), rtol=1e-4, atol=1e-5)
    tied = all((np.asarray(adapter["b"]) == 0).all() for adapter in after.params["lora"].values())
    assert tied == (name != "resets")


def test_what_restarts_at_a_knot():
    moments = lambda state: state.opt["lora"][0]
    rates = lambda state: int(state.opt["lora"][-1].count)
    for name, count in (("cola-3", 4), ("resets", 4), ("per-link", 0)):
        _, before, after = at_knot(name)
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(moments(before).mu)) > 0
        assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(moments(after)))
        assert (rates(before), rates(after)) == (4, count)


def test_periodic_lora_unloads_half_of_its_first_link():
    program, before, after = at_knot("periodic")
    kernel = lambda state: np.asarray(program.params(state)["params"]["head"]["kernel"])
    start = kernel(trained(program, 0, 1)[0])
    np.testing.assert_allclose(kernel(after) - start, 0.5 * (kernel(before) - start), atol=1e-6)


def test_arms_train_as_much_as_they_say():
    sizes = {
        name: count_params(built(name).trained(jax.eval_shape(built(name).init, jax.random.key(0))))
        for name in loaded(STUDY)[0]
    }
    one = sizes["lora"]
    same = ("cola", "cola-2", "cola-3", "relora", "resets", "periodic", "materialised")
    assert {sizes[name] for name in same} == {one}
    assert sizes["lora-x3"] == 3 * one
    assert sizes["galore"] == 64 * 8 + 8 * 10
    assert sizes["full"] == sizes["galore"] + 8 + 10
    start, end = trained(built("galore"), 0, 2)
    assert not np.array_equal(outputs(built("galore"), start), outputs(built("galore"), end))


def test_materialised_adapters_train_as_factored_ones_do():
    factored, formed = (trained(built(name), 3)[0].params["lora"] for name in ("lora", "materialised"))
    for a, b in zip(jax.tree.leaves(factored), jax.tree.leaves(formed), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_the_head_trains_beside_the_chain_and_never_restarts(tmp_path):
    program = built("cola", TEXT)
    assert program.total_steps == 4
    assert program.compiles == len(program.shapes) == 1
    start, before = trained(program, 0, 2)
    after = program.phases[0].leave(copied(before))
    kernel = lambda state: state.params["head"]["head"]["kernel"]
    assert not np.array_equal(kernel(before), kernel(start))
    for old, new in ((before.params, after.params), (before.opt, after.opt)):
        assert_equal(old["head"], new["head"])
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(after.opt["head"])) > 0
    program.export(after, tmp_path / "adapter")
    head = load_file(tmp_path / "adapter" / "head.safetensors")
    np.testing.assert_array_equal(head["head/kernel"], kernel(after))
    with pytest.raises(ValueError, match="no layout of Hugging Face"):
        program.export(after, tmp_path / "merged", merged=True)
    with pytest.raises(ValueError, match="has no adapters"):
        built("full", TEXT).export(after, tmp_path / "full")


def test_the_head_alone_is_all_that_is_trained():
    program = built("head", TEXT)
    state = jax.eval_shape(program.init, jax.random.key(0))
    assert set(state.params) == set(state.opt) == {"head"}
    assert jax.eval_shape(program.phases[0].step, state, program.shapes[0].batch, None)[0] == state


def test_dummy_rows_do_not_change_an_accumulated_step():
    """30 texts in batches of 8: the last batch has two dummy rows, which lie in one of its parts."""
    states = []
    for accumulate in (1, 4):
        study = dataclasses.replace(TEXT, train=TrainOptions(accumulate=accumulate))
        program = built("lora", study)
        batch = next(batch for batch in program.loader.open(0) if (batch["weight"] == 0).any())
        assert batch["weight"].tolist() == [1.0] * 6 + [0.0] * 2
        state, metrics = jax.jit(program.phases[0].step)(jax.jit(program.init)(jax.random.key(0)), batch, None)
        states.append((metrics["loss"], jax.tree.leaves(state.opt["lora"][0].mu)))
    np.testing.assert_allclose(*(loss for loss, _ in states), rtol=1e-5)
    assert max(np.abs(leaf).max() for leaf in states[0][1]) > 1e-5
    for whole, parts in zip(*(moments for _, moments in states), strict=True):
        np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-8)


def test_bad_settings():
    with pytest.raises(ValueError, match="One link is LoRA"):
        ColaStudy(budget=Budget(10), links=(1,))
    with pytest.raises(ValueError, match="DATA/MODEL"):
        ColaStudy(budget=Budget(10), tasks=("digits",))
    with pytest.raises(ValueError, match="'dora' matches none of"):
        choose_arms(groups(STUDY), ("lora", "dora"))
    (group,) = groups(dataclasses.replace(STUDY, tasks=("digits/cnn",)))
    with pytest.raises(ValueError, match="mlp-64-64"):
        group.load()
    with pytest.raises(ValueError, match="counts whole 'epochs'"):
        built("lora-buckets", dataclasses.replace(TEXT, budget=Budget(10)))
    with pytest.raises(ValueError, match="no texts of different lengths"):
        built("lora", dataclasses.replace(STUDY, partial_batches=True, budget=Budget(1, "epochs")))
    with pytest.raises(ValueError, match=r"train.dtype='bfloat16', but"):
        built("lora", dataclasses.replace(STUDY, train=TrainOptions(dtype="bfloat16")))


def test_groups_are_batch_sizes_where_those_are_given():
    study = dataclasses.replace(STUDY, batch_sizes=(4, 8))
    assert [group.name for group in groups(study)] == ["digits-mlp-8-batch-4", "digits-mlp-8-batch-8"]
    four, _ = groups(study)
    lora = next(arm for arm in four.arms if arm.name == "lora").build(loaded(STUDY)[1])
    assert next(lora.loader.open(0))["label"].shape == (4,)
