"""The FASTRAIN study: its method arm is the public call, runs resume exactly, stages end early, no label leaks."""

import dataclasses
import functools
import itertools
import os
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_graph import write_small_cora

from effjax.graph.fastrain import fastrain, fastrain_params
from effjax.recipes.fastrain import MAIN, FastrainStudy, groups
from effjax.recipes.spec import Budget
from effjax.train.loop import Preempted, Prepared, fit
from effjax.train.options import TrainOptions

pytestmark = pytest.mark.study

STAGES, STEPS, EPOCHS = 3, 3, 15
STUDY = FastrainStudy(
    budget=Budget(STAGES * STEPS * EPOCHS, "epochs"),
    stages=STAGES,
    epochs_per_step=EPOCHS,
    per_class=(3,),
    hidden=8,
    threshold=0.3,
    deep_below=0.08,
    samples=2,
    calibration_epochs=3,
    top_k=5,
    clusters=20,
    pool=4,
    learning_rate=0.1,
    guard_agreement=0.1,
    plateau=1.0,  # no loss falls by all of itself: every stage ends after two steps
)
# The rest of the run's settings must not matter: read and save in every step.
EVERY = TrainOptions(checkpoint_steps=1, read_lag=1, keep=1)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = write_small_cora(tmp_path_factory.mktemp("graph") / "small.npz")
    return dataclasses.replace(STUDY, tasks=(path,))


@pytest.fixture(scope="module")
def group(study):
    """The only group, its data loaded."""
    [group] = groups(study)
    assert group.name == "small-3"
    return SimpleNamespace(loaded=group.load(), arms={arm.name: arm for arm in group.arms})


@pytest.fixture(scope="module")
def built(group):
    return functools.cache(lambda name: group.arms[name].build(group.loaded))


@pytest.fixture(scope="module")
def walked(built):
    """All states of a run of ``fastrain-plateau``: one after every step, and one after every stage."""
    program = built("fastrain-plateau")
    state, states = program.init(jax.random.key(0)), []
    step = jax.jit(program.phases[0].step)
    for phase in program.phases:
        aux = phase.aux(state)
        for _ in range(phase.steps):
            states.append(state)
            state, metrics = step(state, None, aux)
            assert np.isfinite(metrics["loss"])
            if phase.over(state):
                break
        state = phase.leave(state)
    return program, [*states, state], step


@pytest.fixture(scope="module")
def prepared(walked):
    return Prepared(walked[0], EVERY)


def avals(tree):
    shapes = jax.eval_shape(lambda leaves: leaves, tree)
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), shapes)


def same(a, b):
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(raw(x), raw(y)), a, b)


def test_every_arm_is_there():
    names = [arm.name for arm in groups(STUDY)[0].arms]
    assert len(names) == len(set(names)) == 23
    assert set(MAIN) < set(names)


@pytest.mark.nightly
def test_the_public_call_gives_the_bits_of_the_arm_with_a_plateau(study, group):
    key, loaded = jax.random.key(5), group.loaded
    state = fit(group.arms["fastrain-plateau"].build(loaded), 5).state
    _, init, apply = loaded.networks[None]
    problem = loaded.problem._replace(mask=loaded.drawn(key))
    found = fastrain(key, init, apply, problem, study.method(plateau=study.plateau))
    same(found.params, fastrain_params(state))
    np.testing.assert_array_equal(found.labels, state.labels)
    np.testing.assert_array_equal(found.added, state.added)
    np.testing.assert_array_equal(found.scores.argmax(-1), state.predictions[-1])
    assert found.epochs == tuple(state.epochs.tolist())
    assert (np.asarray(found.added) == STAGES - 1).any()


class StopAfter:
    """Send this process SIGTERM once the loop has reported ``count`` steps."""

    def __init__(self, count):
        self.left = count

    def __call__(self, reached):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.nightly
def test_a_run_resumes_exactly_within_its_second_stage(walked, prepared, tmp_path):
    program, states, _ = walked
    with pytest.raises(Preempted):
        fit(program, 0, options=EVERY, prepared=prepared, directory=tmp_path, on_steps=StopAfter(3))  # of stages of two
    resumed = fit(program, 0, options=EVERY, prepared=prepared, directory=tmp_path)
    assert resumed.steps == STAGES * 2
    same(resumed.state, states[-1])


def test_a_plateau_ends_a_stage_and_the_rest_costs_nothing(walked, prepared):
    program, states, _ = walked
    assert program.total_steps == STAGES * STEPS
    result = fit(program, 0, options=EVERY, prepared=prepared)
    assert result.steps == len(states) - 1 == STAGES * 2
    assert result.state.epochs.tolist() == [2 * EPOCHS] * STAGES
    same(result.state, states[-1])


def test_a_run_keeps_its_shapes_and_compiles_what_it_declares(built, walked):
    program, states, step = walked
    assert all(avals(state) == avals(states[0]) for state in states)
    assert bool(states[0].deep)
    assert not bool(states[-1].deep)
    assert 2 <= step._cache_size() <= program.compiles
    found = program.judged(states[-1])
    assert all(np.isfinite(value) for value in found.values())
    assert {"accuracy", "accuracy_1", "precision_1", "added_2", "edges_kept", "epochs"} <= set(found)


def test_the_training_set_grows_and_the_graph_shrinks(group, walked):
    _, states, _ = walked
    given = np.asarray(states[0].added) == 0
    for before, after in itertools.pairwise(states):
        inside = np.asarray(before.weights) > 0
        assert (np.asarray(after.weights)[inside] == 1).all()
        np.testing.assert_array_equal(np.asarray(after.labels)[inside], np.asarray(before.labels)[inside])
        np.testing.assert_array_equal(np.asarray(after.added) == 0, given)
        assert not (np.asarray(after.edges) & ~np.asarray(before.edges)).any()
    assert (np.asarray(states[-1].weights) > 0).sum() > given.sum()
    assert not np.asarray(states[-1].edges).all()
    truth = np.asarray(group.loaded.problem.labels)
    np.testing.assert_array_equal(np.asarray(states[-1].labels)[given], truth[given])


def test_hidden_labels_cannot_leak(group, walked):
    program, states, _ = walked
    known, problem = states[0].added == 0, group.loaded.problem
    drawn = np.random.default_rng(0).integers(0, problem.classes, len(problem.labels))
    scrambled = jnp.where(known, problem.labels, drawn).astype(jnp.int32)
    assert bool((scrambled != problem.labels).any())
    # The labelled nodes are drawn from all labels, so that the same ones are given here.
    Fixed = type("Fixed", (type(group.loaded),), {"drawn": lambda self, key: known})
    other = group.arms["fastrain-plateau"].build(
        Fixed(*group.loaded._replace(problem=problem._replace(labels=scrambled)))
    )
    same(fit(other, 0).state, states[-1])
    assert other.judged(states[-1])["accuracy"] != program.judged(states[-1])["accuracy"]


def test_arms_of_a_seed_share_their_labelled_nodes(built):
    masks = {}
    for name in ("shallow", "fastrain", "lp", "appnp"):
        for seed in (0, 1):
            state = built(name).init(jax.random.key(seed))
            masks[name, seed] = np.asarray(state["mask"] if name == "lp" else state.added == 0)
    for name in ("fastrain", "lp", "appnp"):
        np.testing.assert_array_equal(masks[name, 0], masks["shallow", 0])
    assert (masks["shallow", 0] != masks["shallow", 1]).any()


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"depth": "shallow", "keep_rate": 1.0, "select": "m3s", "samples": 0, "smoothed": True}, STUDY.top_k),
        ({"depth": "shallow", "weighted": True, "pool": 4, "growth": STUDY.guard_growth}, 3 * STUDY.guard_growth),
    ],
    ids=["m3s, correct and smooth", "guard, weights, pool"],
)
def test_settings_that_no_arm_combines_run_to_their_end(study, group, changes, most):
    loaded = group.loaded
    _, init, apply = loaded.networks[None]
    problem = loaded.problem._replace(mask=loaded.drawn(jax.random.key(0)))
    config = study.method(**changes)
    run = lambda config: fastrain(jax.random.key(0), init, apply, problem, config)
    found, truth, hidden = run(config), np.asarray(problem.labels), np.asarray(~problem.mask)
    first = np.asarray(found.added) == 1
    chosen = np.asarray(found.labels)[first]
    assert 0 < np.bincount(chosen, minlength=7).max() <= most
    # Nodes are chosen well: their labels are right more often than those that the same network gives to all nodes.
    plain = run(dataclasses.replace(config, stages=1, smoothed=False)).scores.argmax(1)
    assert (chosen == truth[first]).mean() > (np.asarray(plain) == truth)[hidden].mean() + 0.1


def test_evaluation_in_the_middle_and_inference(walked):
    program, states, _ = walked
    assert 0 < program.judged(states[1])["accuracy"] < 1
    logits = program.task.infer(program.params(states[-1]), program.task.example_inputs)
    predictions = np.asarray(states[-1].predictions[-1])
    # Inference reads the whole graph, the run a pruned one.
    assert (np.asarray(logits.argmax(-1)) == predictions).mean() > 0.9
    assert len(program.params(states[0])["params"]) == 3
    assert len(program.params(states[-1])["params"]) == 2


def test_large_graphs_get_few_arms():
    study = dataclasses.replace(STUDY, large=("dblp",), large_arms=("st-deep", "fastrain"))
    names = {group.name: [arm.name for arm in group.arms] for group in groups(study)}
    assert sorted(names) == ["cora-3", "dblp-3"]
    assert names["dblp-3"] == ["st-deep", "fastrain"]
    assert len(names["cora-3"]) == 23


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"large_arms": ("fastrian",)}, "fastrain"),
        ({"per_class": ()}, "nothing to compare"),
        ({"per_class": (0,)}, "per_class=0"),
        ({"threshold": 1.2}, r"threshold=1\.2"),
        ({"tasks": ("cora",), "large": ("cora",)}, "tasks and in large"),
        ({"pool": 0}, "pool=0"),
    ],
)
def test_bad_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(STUDY, **fields)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"accumulate": 2}, "accumulate=2"), ({"remat": True}, "remat=True"), ({"dtype": "bfloat16"}, "dtype='bfloat16'")],
)
def test_options_that_would_do_nothing_are_refused(study, group, options, message):
    other = dataclasses.replace(study, train=TrainOptions(**options))
    arms = {arm.name: arm for arm in groups(other)[0].arms}
    with pytest.raises(ValueError, match=message):
        arms["lp"].build(group.loaded)


def test_a_class_without_nodes_is_refused(study, tmp_path):
    with np.load(study.tasks[0]) as file:
        arrays = dict(file)
    arrays["y"] = np.where(arrays["y"] == 6, 8, arrays["y"])
    np.savez(tmp_path / "gap.npz", **arrays)
    [group] = groups(dataclasses.replace(study, tasks=(str(tmp_path / "gap.npz"),)))
    with pytest.raises(ValueError, match="class 6 has no node"):
        group.load()
