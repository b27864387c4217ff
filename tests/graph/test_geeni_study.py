"""The GEENI study: the public call is the study's arm, honest choices, exact numbers on the compacted graph, resume."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax
from effjax.data.graphs import GraphData
from effjax.graph.error_nodes import active_nodes, error_scores, learned_correctness
from effjax.graph.geeni import choose_isolation, geeni_next, geeni_serve
from effjax.graph.members import ensemble_logits, member_probabilities
from effjax.recipes.geeni import VARIANTS, GeeniStudy, claims, groups, method_config
from effjax.recipes.spec import Budget, choose_arms
from effjax.study.claims import decide
from effjax.tasks.graph import node_data
from effjax.train.loop import Prepared, fit
from effjax.train.options import TrainOptions

pytestmark = pytest.mark.study

NODES, CLASSES = 150, 3
EVERY = TrainOptions(checkpoint_steps=2, read_lag=1)
SMALL = {
    "hidden": 8,
    "members": 2,
    "train_per_class": 6,
    "val_per_class": 10,
    "epochs_per_step": 5,
    "folds": 3,
    "modes": ("full",),
}


@functools.cache
def small_data():
    rng = np.random.default_rng(0)
    labels = (np.arange(NODES) % CLASSES).astype(np.int32)
    joined = np.triu(rng.random((NODES, NODES)) < np.where(labels[:, None] == labels, 0.08, 0.02), 1)
    rows, columns = np.nonzero(joined | joined.T)
    features = (rng.random((NODES, 12)) < np.where(np.arange(12) % CLASSES == labels[:, None], 0.35, 0.15)).astype(
        float
    )
    edges = columns.astype(np.int32), rows.astype(np.int32)
    split = np.split(rng.permutation(NODES).astype(np.int32), [20, 50])
    graph = GraphData(
        "small", "made", *edges, features.astype(np.float32), labels, CLASSES, *split, attacks={"x": edges}
    )
    return node_data(graph, row_normalize=True)


def study(*arms, tasks=("small",), epochs=30, **options):
    return GeeniStudy(tasks=tasks, arms=arms or ("*",), budget=Budget(epochs, "epochs"), **SMALL | options)


def build(config, name):
    arms = {f"{group.name}/{arm.name}": arm for group in groups(config) for arm in group.arms}
    return arms[name].build(small_data())


@functools.cache
def trained(name):
    program = build(study(), f"small/{name}")
    return program, fit(program, 0).state


def masks(program, state):
    """Train, validation and test nodes of a run."""
    problem = program.phases[0].aux(state)[0]
    train, val = np.asarray(problem.train), np.asarray(problem.val)
    return train, val, ~(train | val)


# Expected values, with dense matrices in NumPy.


def dense_probabilities(members, matrices, folded=False):
    """Mean of the members' softmax (or softmax of their mean), on one dense matrix per member."""
    x = np.asarray(small_data().features, np.float64)
    logits = []
    for (w0, b0, w1, b1), s in zip(zip(*(np.asarray(part) for part in members), strict=True), matrices, strict=True):
        logits.append(s @ np.maximum(s @ (x @ w0) + b0, 0) @ w1 + b1)
    logits = [np.mean(logits, axis=0)] if folded else logits
    powers = [np.exp(z - z.max(1, keepdims=True)) for z in logits]
    return np.mean([p / p.sum(1, keepdims=True) for p in powers], axis=0)


def dense_graph(send=None):
    """The normalised adjacency when messages are multiplied by ``send`` and receivers normalised anew."""
    adjacency = np.asarray(small_data().adjacency.todense(), np.float64) > 0
    degree = adjacency.sum(1)
    factor = np.ones((NODES, NODES)) if send is None else np.broadcast_to(np.asarray(send, np.float64), (NODES, NODES))
    kept = adjacency * np.where(np.eye(NODES, dtype=bool), 1, factor)
    return kept / np.sqrt(kept.sum(1)[:, None] * degree)


@pytest.mark.nightly
def test_the_public_call_is_the_study_s_arm():
    """Parameters and what is served, bit for bit."""
    for name in ("geeni-distilled", "geeni-denoised", "narrow-folded"):
        program, state = trained(name)
        key = jax.random.key(0)
        train, val, _ = effjax.tasks.draw_split(jax.random.fold_in(key, 0), small_data().labels, CLASSES, 6, 10)
        data = small_data()
        alike = effjax.graph.alike_edges(data.features, data.adjacency.pattern)
        problem = effjax.graph.GeeniProblem(
            data.features, data.adjacency, data.labels, train, val, CLASSES, alike=alike
        )
        config = method_config(study(), VARIANTS[name])
        found = effjax.geeni(key, problem, config)
        expected = geeni_serve(state, problem, config=config)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(left, right)
        score = np.mean((np.argmax(found(), 1) == data.labels)[masks(program, state)[2]])
        assert program.judged(state)["accuracy"] == pytest.approx(score)


def test_groups_and_claims():
    config = study(tasks=("small", "small/x"))
    made = groups(config)
    assert [group.name for group in made] == ["small", "small-x"]
    for group in made:
        assert [arm.name for arm in group.arms] == list(VARIANTS)
        oracle = next(arm for arm in group.arms if arm.name == "oracle")
        assert oracle.role == "control"
        assert "ORACLE" in oracle.label
    values = lambda name: {"mean": 0.5, "values": [0.5]}
    metrics = {name: values(name) for name in ("accuracy", *(f"auc_{d}" for d in _LABEL_FREE), "auc_learned")}
    arms = lambda names: {
        f"{group}/{name}": {"metrics": metrics, "cost": {}, "role": VARIANTS[name].role, "status": "ok"}
        for group in ("small", "small-x")
        for name in names
    }
    about = {group.name: group.metric._asdict() for group in made}
    decided = decide(claims(config), arms(VARIANTS), about, timed=False)
    assert len(decided) == 2 * 15
    assert not any("undecided" in claim for claim in decided)
    gains = {claim["group"]: claim["right"] for claim in decided if "oracle" in claim["text"]}
    assert gains == {"small": pytest.approx(0.52), "small-x": pytest.approx(0.53)}
    assert len(decide(claims(config), arms(("single", "narrow")), about, timed=False)) == 2


_LABEL_FREE = ("score", "agreement", "mutual")


def test_every_seed_is_a_split_that_all_arms_share():
    config = study("single", "geeni-learned")
    found = []
    for seed in (0, 1):
        programs = [build(config, f"small/{name}") for name in ("single", "geeni-learned")]
        one, other = (masks(program, program.init(jax.random.key(seed))) for program in programs)
        for left, right in zip(one, other, strict=True):
            np.testing.assert_array_equal(left, right)
        assert not (one[0] & one[1]).any()
        assert one[0].sum() == CLASSES * SMALL["train_per_class"]
        found.append(one)
    assert (found[0][0] != found[1][0]).any()


def test_an_attacked_graph_keeps_its_split():
    program = build(study("single", tasks=("small/x",)), "small-x/single")
    train, val, _ = masks(program, program.init(jax.random.key(5)))
    np.testing.assert_array_equal(np.flatnonzero(train), np.sort(small_data().data.train))
    np.testing.assert_array_equal(np.flatnonzero(val), np.sort(small_data().data.val))


def test_members_see_different_parts_and_the_first_sees_all():
    program, state = trained("geeni-learned")
    _, views = program.phases[0].aux(state)
    kept = np.asarray(views.matrix.values) > 0
    assert kept[0].all()
    assert 0.5 < kept[1].mean() < 0.95
    assert views.features[0].all()
    assert not views.features[1].all()
    assert not np.asarray(program.params(state).kernel_0[1][~np.asarray(views.features[1])]).any()


@pytest.mark.parametrize("name", ["geeni-learned", "geeni-denoised", "geeni-distilled"])
def test_isolation_is_chosen_once_and_fits_the_state(name):
    program, state = trained(name)
    before = jax.eval_shape(program.init, jax.random.key(0))
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(state) == shapes(before)
    train, val, _ = masks(program, state)
    send = np.asarray(state.isolation.active)
    assert (send[train | val] == 1).all()  # labelled nodes always send
    metrics = program.judged(state)
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["isolated"] == pytest.approx(np.mean(send == 0))
    assert (metrics["edges_removed"] > 0) == bool((send == 0).any())


@pytest.mark.parametrize("name", ["geeni-learned", "geeni-folded"])
def test_accuracy_of_the_compacted_graph_is_that_of_the_dense_formula(name):
    # Folding comes after training: both serve the same networks.
    program, state = build(study(), f"small/{name}"), trained("geeni-learned")[1]
    train, _, test = masks(program, state)
    send = np.where(train | (np.arange(NODES) % 4 > 0), 1.0, 0.0)
    state = state._replace(isolation=state.isolation._replace(active=jnp.asarray(send, jnp.float32)))
    metrics = program.judged(state)
    members, graph = program.params(state), dense_graph(send)
    expected = dense_probabilities(members, [graph] * SMALL["members"], name == "geeni-folded")
    served = geeni_serve(state, program.phases[0].aux(state)[0], config=method_config(study(), VARIANTS[name]))
    np.testing.assert_allclose(served(), expected, atol=1e-5)
    right = np.argmax(expected, 1) == np.asarray(small_data().labels)
    assert metrics["accuracy"] == pytest.approx(right[test].mean())
    whole, isolated = np.count_nonzero(dense_graph()), np.count_nonzero(graph)
    assert metrics["edges_removed"] == pytest.approx(1 - isolated / whole)


def test_students_are_narrow_and_imitate_the_wide_ensemble():
    config = study(epochs=60, learning_rate=0.05, student_share=2.0)
    program = build(config, "small/narrow-distilled")
    assert [phase.steps for phase in program.phases] == [12, 24]
    state = fit(program, 0).state
    assert state.epoch == 60 + 120
    width = SMALL["hidden"] // SMALL["members"]
    assert program.params(state).kernel_0.shape[::2] == (SMALL["members"], width)
    assert state.members.kernel_0.shape[::2] == (SMALL["members"], SMALL["hidden"])
    seen = program.phases[0].aux(state)[1].features
    members = state.members._replace(kernel_0=np.where(np.asarray(seen)[:, :, None], state.members.kernel_0, 0))
    teacher = dense_probabilities(members, [dense_graph()] * SMALL["members"])
    train, _, test = masks(program, state)
    labels = np.asarray(small_data().labels)
    expected = np.where(train[:, None], np.eye(CLASSES)[labels], teacher)
    np.testing.assert_allclose(state.targets, expected, atol=1e-5)
    answer = dense_probabilities(program.params(state), [dense_graph()] * SMALL["members"], folded=True)
    assert (answer.argmax(1) == teacher.argmax(1)).mean() > 0.9
    metrics = program.judged(state)
    assert metrics["accuracy_teacher"] == pytest.approx((teacher.argmax(1) == labels)[test].mean())
    assert metrics["accuracy"] == pytest.approx((answer.argmax(1) == labels)[test].mean())


def test_test_labels_are_read_by_the_oracle_alone():
    program, state = trained("geeni-learned")
    problem, _ = program.phases[0].aux(state)
    test = masks(program, state)[2]
    hidden = dataclasses.replace(problem, labels=np.where(test, -1, problem.labels))
    for name in ("geeni-learned", "geeni-score", "geeni-soft", "oracle"):
        config = method_config(study(), VARIANTS[name])
        chosen, blind = (geeni_next(state, some, config=config, stage="members") for some in (problem, hidden))
        same = all(np.array_equal(*pair) for pair in zip(chosen.isolation, blind.isolation, strict=True))
        assert same == (name != "oracle"), name


def test_isolation_is_declined_where_it_does_not_help():
    config = study(fractions=(1.0,), modes=("full",))  # all nodes but the labelled ones fall silent, or none
    program, state = trained("geeni-learned")
    problem, _ = program.phases[0].aux(state)
    train, val, _ = masks(program, state)
    members, labels = program.params(state), np.asarray(small_data().labels)
    right = {}
    for name, send in (("whole", None), ("silent", 1.0 * (train | val))):
        found = dense_probabilities(members, [dense_graph(send)] * SMALL["members"])
        right[name] = int((found.argmax(1) == labels)[val].sum())
    assert right["whole"] != right["silent"]
    outcomes = set()
    # The other way round, too: labels that the silent graph gets right and the whole graph gets wrong.
    silent = dense_probabilities(members, [dense_graph(1.0 * (train | val))] * SMALL["members"]).argmax(1)
    for some in (labels, np.where(val, silent, labels)):
        method = method_config(config, VARIANTS["geeni-score"])
        judged = dataclasses.replace(problem, labels=some.astype(np.int32))
        chosen = geeni_next(state, judged, config=method, stage="members").isolation
        whole = dense_probabilities(members, [dense_graph()] * SMALL["members"]).argmax(1)
        better = (silent == some)[val].sum() > (whole == some)[val].sum()
        np.testing.assert_array_equal(chosen.active, 1.0 * (train | val) if better else np.ones(NODES))
        outcomes.add(bool(better))
    assert outcomes == {True, False}


def test_isolation_is_judged_by_detectors_that_have_not_seen_the_labels():
    program, state = trained("geeni-learned")
    problem, _ = program.phases[0].aux(state)
    fractions = (0.1, 0.3, 0.6)
    config = method_config(study(fractions=fractions), VARIANTS["geeni-learned"])
    members, matrix = program.params(state), problem.adjacency
    labels, (train, val, _) = np.asarray(problem.labels), masks(program, state)
    score = lambda *inputs: error_scores(member_probabilities(ensemble_logits(*inputs)))
    scores = jax.jit(score)(members, problem.features, matrix)

    @jax.jit
    def trust(checked, folds):
        judged = dataclasses.replace(problem, val=checked)
        return learned_correctness(scores, judged, folds, fold_count=config.folds, ridge=config.ridge)

    def right(trust, nodes, fraction):
        send = 1.0 * np.asarray(active_nodes(trust, fraction, jnp.asarray(train | val)))
        found = dense_probabilities(members, [dense_graph(send)] * SMALL["members"])
        return int((found.argmax(1) == labels)[nodes].sum()), send

    whole = int((dense_probabilities(members, [dense_graph()] * 2).argmax(1) == labels)[val].sum())
    choose, choices = jax.jit(choose_isolation, static_argnames="config"), []
    for seed in range(4):
        key = jax.random.key(seed)
        folds = jax.random.permutation(key, NODES) % config.folds
        seen = trust(problem.val, folds)
        blind = [trust(problem.val & (folds != fold), folds) for fold in range(config.folds)]
        parts = [val & np.asarray(folds == fold) for fold in range(config.folds)]
        honest = [sum(right(t, part, f)[0] for t, part in zip(blind, parts, strict=True)) for f in fractions]
        flattered = [right(seen, val, f)[0] for f in fractions]
        best = int(np.argmax(honest))
        expected = right(seen, val, fractions[best])[1] if honest[best] > whole else np.ones(NODES)
        found = choose(key, members, problem, config=config)
        np.testing.assert_array_equal(found.active, expected)
        choices.append((honest, flattered, whole))
    better = lambda counts, whole: int(np.argmax(counts)) if max(counts) > whole else None
    assert any(better(honest, whole) != better(flattered, whole) for honest, flattered, whole in choices), choices


@pytest.mark.parametrize(
    "name",
    [
        "single-drop-edges",
        "correct-smooth",
        "distilled",
        "jaccard",
        pytest.param("narrow-folded", marks=pytest.mark.nightly),
    ],
)
def test_rivals_train_and_learn(name):
    program, state = trained(name)
    score = program.judged(state)["accuracy"]
    if name == "correct-smooth":  # whose smoothing alone does much: more than the network alone
        network, alone = trained("single")
        assert score > network.judged(alone)["accuracy"] + 0.05
    else:
        assert score > program.judged(program.init(jax.random.key(0)))["accuracy"] + 0.15
    nodes, features, matrix = program.task.example_inputs
    assert program.task.infer(program.params(state), (nodes[:7], features, matrix)).shape == (7, CLASSES)


@pytest.fixture(scope="module")
def prepared():
    return Prepared(trained("geeni-distilled")[0], EVERY)


@pytest.mark.parametrize("stop", [6, 8], ids=["at the border", "among the students'"])
def test_a_run_continues_bit_for_bit(stop, prepared, tmp_path):
    program, whole = trained("geeni-distilled")
    assert [phase.steps for phase in program.phases] == [6, 6]

    class Killed(Exception):
        pass

    def kill(done):
        if done > stop:
            raise Killed

    with pytest.raises(Killed):
        fit(program, 0, options=EVERY, prepared=prepared, directory=tmp_path, on_steps=kill)
    left = []
    resumed = fit(program, 0, options=EVERY, prepared=prepared, directory=tmp_path, on_steps=left.append)
    assert left[0] == stop + 1
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed.state), strict=True):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"dtype": "bfloat16"}, {"remat": True}])
def test_options_that_would_do_nothing_are_refused(options):
    with pytest.raises(ValueError, match=rf"train\.{next(iter(options))}=.*Leave it at"):
        build(study(train=TrainOptions(**options)), "small/geeni-learned")


def test_bad_configs():
    with pytest.raises(ValueError, match="hidden=9 does not divide among members=2"):
        study(hidden=9)
    with pytest.raises(ValueError, match=r"'geeni-learnt' matches none of .*Did you mean 'geeni-learned'"):
        choose_arms(groups(study()), ("geeni-learnt",))
    with pytest.raises(ValueError, match=r"fractions\[0\]=0.0 must be a number in \(0, 1\].*Zero is always"):
        study(fractions=(0.0, 0.1))
    with pytest.raises(ValueError, match=r"student_share=0 must be"):
        study(student_share=0)
    with pytest.raises(ValueError, match=r"tasks='a/b/c' must be a graph, or GRAPH/ATTACK"):
        study(tasks=("a/b/c",))


def test_the_attacked_graphs_load():
    folder = Path(__file__).resolve().parents[2] / "../shared/data"
    if not folder.is_dir():
        pytest.skip("the attacked graphs are not in the package")
    data = node_data("cora_attacked", attack="meta_0.15", root=folder)
    clean = node_data("cora_attacked", root=folder)
    assert data.adjacency.nnz > clean.adjacency.nnz
    assert data.name == "cora_attacked-meta_0.15"
