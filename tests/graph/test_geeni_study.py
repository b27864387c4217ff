"""The GEENI study: arms, honest choices, masks that fit the state, exact numbers on the compacted graph."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.data.graphs import GraphData
from effjax.recipes import geeni_arms
from effjax.recipes.geeni import ARMS, GeeniStudy, arms, axes, claims
from effjax.recipes.geeni_arms import FORMS
from effjax.recipes.spec import Budget
from effjax.tasks.graph import node_task
from effjax.train.loop import Prepared, fit

pytestmark = pytest.mark.study

NODES, CLASSES = 150, 3
SMALL = {
    "hidden": 8,
    "members": 2,
    "train_per_class": 6,
    "val_per_class": 10,
    "epochs_per_step": 5,
    "folds": 3,
    "modes": ("full",),
}


def small_graph():
    rng = np.random.default_rng(0)
    labels = (np.arange(NODES) % CLASSES).astype(np.int32)
    joined = np.triu(rng.random((NODES, NODES)) < np.where(labels[:, None] == labels, 0.08, 0.02), 1)
    rows, columns = np.nonzero(joined | joined.T)
    features = (rng.random((NODES, 12)) < np.where(np.arange(12) % CLASSES == labels[:, None], 0.35, 0.15)).astype(
        float
    )
    edges = columns.astype(np.int32), rows.astype(np.int32)
    split = np.split(rng.permutation(NODES).astype(np.int32), [20, 50])
    return GraphData(
        "small", "made", *edges, features.astype(np.float32), labels, CLASSES, *split, attacks={"x": edges}
    )


@pytest.fixture(autouse=True, scope="module")
def small_task():
    task = functools.cache(lambda name, raw: node_task(small_graph(), row_normalize=not raw))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geeni_arms, "_task", task)
        geeni_arms._alike.cache_clear()
        yield
    geeni_arms._alike.cache_clear()


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """Tiny programs: compiling takes longer than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def study(*forms, tasks=("small",), epochs=30, **options):
    return GeeniStudy(tasks=tasks, forms=forms or ARMS, budget=Budget(epochs, "epochs"), **SMALL | options)


@functools.cache
def trained(name):
    config = study(name)
    program = arms(config)[f"small/{name}"].build()
    return program, fit(program, 0, prepared=Prepared(program, config.train)).state


def test_arms_axes_and_claims():
    config = study(tasks=("small", "small/x"))
    assert set(arms(config)) == {f"{where}/{form}" for where in ("small", "small-x") for form in ARMS}
    assert set(axes(config)) == {"small", "small-x"}
    assert arms(config)["small/oracle"].role == "control"
    assert "ORACLE" in arms(config)["small/oracle"].label
    metrics = {name: {"accuracy": 0.5, **dict.fromkeys(_aucs(), 0.5)} for name in arms(config)}
    for claim in claims(config):
        assert np.isfinite(claim.left(metrics))
        assert np.isfinite(claim.right(metrics))
    few = study("single", "narrow")
    assert len(claims(few)) == 1
    oracles = [claim.text for claim in claims(config) if FORMS["oracle"].label in claim.text or "ORACLE" in claim.text]
    assert len(oracles) == 2


def _aucs():
    return ("auc_score", "auc_agreement", "auc_mutual", "auc_learned")


def test_every_seed_is_a_split_that_all_arms_share():
    config = study("single", "geeni-learned")
    states = [[arm.build().init(jax.random.key(seed)) for arm in arms(config).values()] for seed in (0, 1)]
    for one, other in states:
        for part in ("train", "val", "test"):
            np.testing.assert_array_equal(one[part], other[part])
        assert not (one["train"] & one["val"]).any()
        assert not ((one["train"] | one["val"]) & one["test"]).any()
        assert one["train"].sum() == CLASSES * SMALL["train_per_class"]
    assert (states[0][0]["train"] != states[1][0]["train"]).any()


def test_an_attacked_graph_keeps_its_split():
    config = study("single", tasks=("small/x",))
    program = arms(config)["small-x/single"].build()
    state = program.init(jax.random.key(5))
    np.testing.assert_array_equal(np.flatnonzero(state["train"]), np.sort(small_graph().train))
    np.testing.assert_array_equal(np.flatnonzero(state["test"]), np.sort(small_graph().test))


def test_members_see_different_parts_and_the_first_sees_all():
    program, state = trained("narrow")
    aux = program.derive(state)
    kept = np.asarray(aux["train_matrix"].values) > 0
    assert kept[0].all()
    assert 0.5 < kept[1].mean() < 0.95
    assert aux["features_kept"][0].all()
    assert not aux["features_kept"][1].all()
    hidden = program.params(state).kernel_0[1][~np.asarray(aux["features_kept"][1])]
    assert not np.asarray(hidden).any()


@pytest.mark.parametrize("name", ["geeni-learned", "geeni-denoised", "geeni-distilled"])
def test_isolation_is_chosen_once_and_fits_the_state(name):
    program, state = trained(name)
    before = jax.eval_shape(program.init, jax.random.key(0))
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(state) == shapes(before)
    send, known = np.asarray(state["send"]), np.asarray(state["train"] | state["val"])
    assert (send[known] == 1).all()  # labelled nodes always send
    assert program.between(state, 1) is state
    metrics = program.evaluate(state)
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["isolated"] == pytest.approx(np.mean(send == 0))
    assert (metrics["edges_removed"] > 0) == bool((send == 0).any())


def test_accuracy_of_the_compacted_graph_is_that_of_the_mask():
    program, state = trained("geeni-learned")
    state = state | {"send": jnp.where(state["train"] | (jnp.arange(NODES) % 4 > 0), 1.0, 0.0)}
    metrics = program.evaluate(state)
    run = program.evaluate.__self__
    aux = program.derive(state)
    masked = run._isolated(aux, state["send"], run.config.modes[int(state["mode"])])
    right = np.asarray(run._right(state, aux, masked) & state["test"])
    assert metrics["accuracy"] == pytest.approx(right.sum() / state["test"].sum())
    assert 0 < metrics["edges_removed"] < 0.25


def test_students_are_narrow_and_imitate_the_wide_ensemble():
    config = study("narrow-distilled", epochs=60, learning_rate=0.05, student_share=2.0)
    program = arms(config)["small/narrow-distilled"].build()
    state = fit(program, 0, prepared=Prepared(program, config.train)).state
    assert state["epoch"] == 60 + 120
    width = SMALL["hidden"] // SMALL["members"]
    assert program.params(state).kernel_0.shape[::2] == (SMALL["members"], width)
    assert state["members"].kernel_0.shape[::2] == (SMALL["members"], SMALL["hidden"])
    run, aux = program.evaluate.__self__, program.derive(state)
    teacher, one_hot = run._teacher(state, aux), jax.nn.one_hot(aux["labels"], CLASSES)
    expected = jnp.where(state["train"][:, None], one_hot, teacher)
    np.testing.assert_allclose(state["target"], expected, atol=1e-5)
    agree = jnp.argmax(run._answer(state, aux, aux["matrix"]), 1) == jnp.argmax(teacher, 1)
    assert agree.mean() > 0.9
    assert program.evaluate(state)["accuracy_teacher"] > 0.5


def test_test_labels_are_read_by_the_oracle_alone():
    state = trained("geeni-learned")[1]
    for name in ("geeni-learned", "oracle"):
        run = arms(study(name))[f"small/{name}"].build().evaluate.__self__
        aux = run.derive(state)
        chosen = run._choose(state, aux)
        hidden = aux | {"labels": jnp.where(state["test"], -1, aux["labels"])}
        blind = run._choose(state, hidden)
        same = all(np.array_equal(chosen[key], blind[key]) for key in chosen)
        assert same == (name != "oracle"), name


def test_declining_to_isolate():
    config = study("geeni-score", fractions=(1.0,), modes=("none",))  # all nodes but the labelled ones fall silent
    run = arms(config)["small/geeni-score"].build().evaluate.__self__
    state = trained("geeni-learned")[1]
    aux = run.derive(state)
    right = jax.jit(lambda send: run._right(state, aux, run._isolated(aux, send, "none")) & state["val"])
    before, after = right(jnp.ones(NODES)).sum(), right(1.0 * (state["train"] | state["val"])).sum()
    assert bool((run._choose(state, aux)["send"] == 1).all()) == bool(after <= before)


@pytest.mark.parametrize("name", ["single-drop-edges", "correct-smooth", "distilled", "narrow-folded", "jaccard"])
def test_rivals_train_and_learn(name):
    program, state = trained(name)
    metrics = program.evaluate(state)
    assert metrics["accuracy"] > 0.5
    nodes, features, matrix = program.example_inputs
    assert program.infer(program.params(state), (nodes[:7], features, matrix)).shape == (7, CLASSES)


def test_bad_configs():
    with pytest.raises(ValueError, match="hidden=9 does not divide among members=2"):
        study(hidden=9)
    with pytest.raises(ValueError, match=r"forms='geeni-learnt' is not one of .*Did you mean 'geeni-learned'"):
        study("geeni-learnt")
    with pytest.raises(ValueError, match=r"fractions=0.0 must be a number in \(0, 1\].*Zero is always"):
        study(fractions=(0.0, 0.1))
    with pytest.raises(ValueError, match=r"student_share=0 must be"):
        study(student_share=0)
    with pytest.raises(ValueError, match=r"tasks='a/b/c' must be a graph, or GRAPH/ATTACK"):
        study(tasks=("a/b/c",))


def test_the_attacked_graphs_load():
    folder = Path(__file__).resolve().parents[2] / "../shared/data"
    if not folder.is_dir():
        pytest.skip("the attacked graphs are not in the package")
    task = node_task("cora_attacked", attack="meta_0.15", root=folder)
    clean = node_task("cora_attacked", root=folder)
    assert task.adjacency.nnz > clean.adjacency.nnz
    assert task.name == "cora_attacked-meta_0.15"
