"""The arms of the FASTRAIN study: staged runs whose state keeps its shapes, which resume exactly and see no labels."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.data.graphs import graph_data
from effjax.graph.fastrain import nnz_ladder, train_stage
from effjax.graph.self_training import self_training
from effjax.recipes import fastrain_arms, fastrain_network
from effjax.recipes.fastrain import ARMS, FastrainStudy, arms, axes, claims, sweeps
from effjax.recipes.fastrain_arms import Group, evaluate_stages
from effjax.recipes.fastrain_forms import FORMS
from effjax.recipes.spec import Budget
from effjax.tasks.graph import node_task
from effjax.train.options import TrainOptions

pytestmark = pytest.mark.study

STAGES, STEPS, EPOCHS = 3, 3, 15


@pytest.fixture(scope="module", autouse=True)
def small_graph():
    """The best connected nodes of Cora in place of all."""
    whole = graph_data("cora")
    nodes = np.sort(np.argsort(-np.bincount(whole.receivers), kind="stable")[:300])
    place = np.full(whole.nodes, -1, np.int32)
    place[nodes] = np.arange(300)
    senders, receivers = place[whole.senders], place[whole.receivers]
    inside = (senders >= 0) & (receivers >= 0)
    features = np.zeros(whole.features.shape, np.float32)
    features[np.repeat(np.arange(whole.nodes), np.diff(whole.features.indptr)), whole.features.columns] = 1
    small = whole._replace(
        senders=senders[inside],
        receivers=receivers[inside],
        features=features[nodes],
        labels=whole.labels[nodes],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastrain_network, "load_task", functools.cache(lambda name: node_task(small)))
        for function in (fastrain_network.loopless, fastrain_network.network, fastrain_network.inference):
            function.cache_clear()
        yield
    for function in (fastrain_network.loopless, fastrain_network.network, fastrain_network.inference):
        function.cache_clear()


STUDY = FastrainStudy(
    budget=Budget(STAGES * STEPS * EPOCHS, "epochs"),
    stages=STAGES,
    epochs_per_step=EPOCHS,
    per_class=(3,),
    hidden=8,
    threshold=0.6,
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


def built(name, **fields):
    return arms(dataclasses.replace(STUDY, **fields))[f"cora-3/{name}"].build()


def avals(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, jax.typeof(leaf).weak_type), tree)


def walk(program, state, done=0, step=None):
    """All states of a run from ``state`` after ``done`` steps on."""
    step = step or jax.jit(program.step)
    aux, states = program.derive(state), [state]
    for number in range(done + 1, program.total_steps + 1):
        state, metrics = step(state, None, aux)
        assert np.isfinite(metrics["loss"])
        new = program.between(state, number)
        aux = aux if new is state else program.derive(new)
        state = new
        states.append(state)
    return states


@functools.cache
def walked(name):
    program = built(name)
    step = jax.jit(program.step)
    return program, walk(program, program.init(jax.random.key(0)), step=step), step


def same(a, b):
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(raw(x), raw(y)), a, b)


@pytest.mark.parametrize("name", ARMS)
def test_states_keep_their_shapes(name):
    program = built(name)
    state = program.init(jax.random.key(0))
    if name == "lp":
        aux = program.derive(state)
    else:
        data, form = fastrain_network.load_task("cora"), FORMS[name]
        matrix = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), data.adjacency) if form.pool else data.adjacency
        aux = {form.depths[0]: (data.features, matrix)}
    after, metrics = jax.eval_shape(program.step, state, next(program.batches(0)), aux)
    kinds = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)
    assert kinds(after) == kinds(jax.eval_shape(program.init, jax.random.key(0)))
    assert metrics["loss"].shape == ()


def test_a_whole_run_keeps_its_shapes_and_resumes_exactly():
    _, states, step = walked("fastrain-plateau")
    assert all(avals(state) == avals(states[0]) for state in states)
    assert int(states[-1]["stage"]) == STAGES
    assert bool(states[0]["deep"])
    assert not bool(states[-1]["deep"])
    # Saved, read by a process that has done nothing yet, and continued.
    for done in (1, STEPS, STEPS + 1):
        raw = {name: leaf for name, leaf in states[done].items() if name not in ("key", "start")}
        saved = jax.tree.map(jnp.asarray, jax.device_get(raw))
        again = built("fastrain-plateau")
        restored = saved | {key: states[done][key] for key in ("key", "start")}
        same(walk(again, restored, done, step)[-1], states[-1])


def test_a_plateau_ends_a_stage_and_the_rest_of_the_run_does_nothing():
    program, states, _ = walked("fastrain-plateau")
    assert program.total_steps == STAGES * STEPS
    assert [int(state["stage"]) for state in states] == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
    assert int(states[-1]["epochs"]) == STAGES * 2 * EPOCHS
    same(states[-1], states[2 * STAGES])


def test_a_run_compiles_what_it_declares():
    program, states, step = walked("fastrain-plateau")
    assert 2 <= step._cache_size() <= program.compiles
    assert program.compiles == 2 * len(nnz_ladder(fastrain_network.load_task("cora").adjacency.nnz))
    # Without pruning there are two: deep and shallow.
    assert built("no-pgp").compiles == 2
    assert built("st-deep").compiles == 1
    found = program.evaluate(states[-1])
    assert all(np.isfinite(value) for value in found.values())
    assert {"accuracy", "accuracy_1", "precision_1", "added_2", "edges_kept", "epochs"} <= set(found)


def test_the_training_set_grows_and_the_graph_shrinks():
    _, states, _ = walked("fastrain-plateau")
    given = np.asarray(states[0]["added"]) == 0
    for before, after in itertools.pairwise(states):
        inside = np.asarray(before["weights"]) > 0
        assert (np.asarray(after["weights"])[inside] == 1).all()
        np.testing.assert_array_equal(np.asarray(after["labels"])[inside], np.asarray(before["labels"])[inside])
        np.testing.assert_array_equal(np.asarray(after["added"]) == 0, given)
        assert not (np.asarray(after["edges"]) & ~np.asarray(before["edges"])).any()
    assert (np.asarray(states[-1]["weights"]) > 0).sum() > given.sum()
    assert not np.asarray(states[-1]["edges"]).all()
    truth = np.asarray(fastrain_network.load_task("cora").labels)
    np.testing.assert_array_equal(np.asarray(states[-1]["labels"])[given], truth[given])


def test_hidden_labels_cannot_leak(monkeypatch):
    program, states, step = walked("fastrain-plateau")
    known = states[0]["added"] == 0
    data = fastrain_network.load_task("cora")
    rng = np.random.default_rng(0)
    scrambled = jnp.where(known, data.labels, rng.integers(0, data.classes, data.data.nodes)).astype(jnp.int32)
    assert bool((scrambled != data.labels).any())
    monkeypatch.setattr(fastrain_network, "load_task", lambda name: data._replace(labels=scrambled))
    monkeypatch.setattr(fastrain_arms, "draw_labelled", lambda *_: known)
    other = built("fastrain-plateau")
    same(walk(other, other.init(jax.random.key(0)), step=step)[-1], states[-1])
    assert other.evaluate(states[-1])["accuracy"] != program.evaluate(states[-1])["accuracy"]


def test_arms_of_a_seed_share_their_labelled_nodes():
    masks = {}
    for name in ("shallow", "fastrain", "lp", "appnp"):
        for seed in (0, 1):
            state = built(name).init(jax.random.key(seed))
            masks[name, seed] = np.asarray(state["mask"] if name == "lp" else state["added"] == 0)
    for name in ("fastrain", "lp", "appnp"):
        np.testing.assert_array_equal(masks[name, 0], masks["shallow", 0])
    assert (masks["shallow", 0] != masks["shallow", 1]).any()


def test_without_its_parts_it_is_plain_self_training():
    bare = FORMS["fastrain"]._replace(depth="shallow", keep=0.9, filtered=False, pruned=False)
    assert bare == FORMS["st-shallow"]._replace(label=bare.label, role=bare.role)
    run = fastrain_arms._Run(STUDY, Group("cora", 3), bare._replace(keep=1.0), fastrain_network.load_task("cora"))
    program, data = run.program(), run.task
    first = program.init(jax.random.key(0))
    last = walk(program, first)[-1]
    network = run.networks["shallow"]

    @jax.jit
    def trained(labels, mask, stage):
        params = run.fresh(first["start"], False)
        key, weights = jax.random.fold_in(first["key"], stage), mask.astype(jnp.float32)
        opt = run.tx.init(params)
        sample = lambda key: data.adjacency
        epochs = STEPS * EPOCHS
        return train_stage(network.train, run.tx, params, opt, data.features, sample, labels, weights, key, epochs)[0]

    history = []

    def train(labels, mask, stage):
        history.append((labels, mask, stage))
        return trained(labels, mask, stage)

    def predict(params):
        labels, mask, stage = history[-1]
        state = {**first, "stage": jnp.int32(stage), "labels": labels, "weights": mask.astype(jnp.float32)}
        examined = network.examine(False)(*run.examination(state, params))
        # Only the largest probability and its class are asked for.
        return jax.nn.one_hot(examined.predictions, data.classes) * examined.confidence[:, None]

    found = self_training(
        train, predict, first["labels"], first["added"] == 0, stages=STAGES, threshold=STUDY.threshold
    )
    np.testing.assert_array_equal(found.labels, last["labels"])
    np.testing.assert_array_equal(found.added, last["added"])
    same(found.params, last["params"])


def test_stages_are_evaluated_on_the_nodes_without_a_label():
    truth = jnp.array([0, 1, 0, 1, -1])
    state = {
        "added": jnp.array([0, 1, 1, -1, 1]),
        "labels": jnp.array([0, 1, 1, -1, 0]),
        "predictions": jnp.array([[1, 1, 1, 0, 0], [0, 1, 0, 1, 0]]),
    }
    assert evaluate_stages(truth, state, 2) == pytest.approx(
        {"accuracy": 1.0, "accuracy_1": 1 / 3, "precision_1": 0.5, "added_1": 0.4}
    )
    nothing = {**state, "added": jnp.array([0, -1, -1, -1, -1])}
    assert evaluate_stages(truth, nothing, 2)["precision_1"] == 1.0


@pytest.mark.parametrize(
    ("form", "most"),
    [
        (FORMS["m3s"]._replace(smoothed=True), STUDY.top_k),
        (FORMS["fastrain-guard"]._replace(depth="shallow", weighted=True, pool=True), 3 * STUDY.guard_growth),
    ],
    ids=["m3s, correct and smooth", "guard, weights, pool"],
)
def test_other_forms_run_to_their_end(form, most):
    program = fastrain_arms.program(STUDY, Group("cora", 3), form)
    states = walk(program, program.init(jax.random.key(0)))
    assert all(avals(state) == avals(states[0]) for state in states)
    assert 0.1 < program.evaluate(states[-1])["accuracy"] < 1
    chosen = np.asarray(states[-1]["labels"])[np.asarray(states[-1]["added"]) == 1]
    assert np.bincount(chosen, minlength=7).max() <= most
    assert len(chosen) > 0
    weights = np.asarray(states[-1]["weights"])
    assert ((weights > 0) & (weights < 1)).any() == form.weighted


def test_evaluation_in_the_middle_and_inference():
    program, states, _ = walked("fastrain-plateau")
    assert 0 < program.evaluate(states[1])["accuracy"] < 1
    logits = program.infer(program.params(states[-1]), program.example_inputs)
    predictions = np.asarray(states[-1]["predictions"][-1])
    # Inference reads the whole graph, the run a pruned one.
    assert (np.asarray(logits.argmax(-1)) == predictions).mean() > 0.9
    assert len(program.params(states[0])) == 3
    assert len(program.params(states[-1])) == 2


def test_claims_need_their_arms_only():
    seeds = {"accuracy": [0.7, 0.6], "precision_1": [0.8, 0.8]}
    numbers = {name: {"accuracy": 0.7, "train_s": 1.0, "values": seeds} for name in arms(STUDY)}
    found = claims(STUDY)
    assert len({claim.text for claim in found}) == len(found)
    for claim in found:
        assert np.isfinite(claim.left(numbers))
        assert np.isfinite(claim.right(numbers))
    assert claims(dataclasses.replace(STUDY, arms=("shallow", "lp"))) == []
    assert sweeps(STUDY) == {}
    study = dataclasses.replace(STUDY, large=("dblp",), large_arms=("st-deep", "fastrain"))
    assert sorted(axes(study)) == ["cora-3", "dblp-3"]
    assert [name for name in arms(study) if name.startswith("dblp")] == ["dblp-3/st-deep", "dblp-3/fastrain"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arms": ("fastrian",)}, "fastrain"),
        ({"per_class": ()}, "nothing to compare"),
        ({"per_class": (0,)}, "per_class=0"),
        ({"threshold": 1.2}, r"threshold=1\.2"),
        ({"tasks": ("cora",), "large": ("cora",)}, "tasks and in large"),
        ({"train": TrainOptions(accumulate=2)}, "accumulate=2"),
    ],
)
def test_bad_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(STUDY, **fields)


def test_a_class_without_nodes_is_refused(monkeypatch):
    data = fastrain_network.load_task("cora")
    monkeypatch.setattr(fastrain_network, "load_task", lambda name: data._replace(classes=9))
    with pytest.raises(ValueError, match="class 7 has no node"):
        built("fastrain")
