"""AxFormer's search: the authors' traces, the same result by every way, guards, bad input."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pruned_bert
import pytest
from jax.sharding import AxisType

from effjax.models.decoder import Decoder
from effjax.transformers.axformer import axformer, axformer_report
from effjax.transformers.axformer_rules import AxformerConfig, axformer_init, axformer_next, loss_weights
from effjax.transformers.evaluator import GatedEvaluator
from effjax.transformers.gated import Scores, gated_apply
from effjax.transformers.prune_spec import Element, PruneShape, PruneSpec, all_gates, prune_shape
from effjax.transformers.significance import bootstrap_gain, halves, paired_gain
from effjax.transformers.validation import prune_batches

pytestmark = pytest.mark.promotes  # Flax mixes the dtypes of activations and statistics

KINDS = ("hard", "mlp", "group", "attention", "head")


@functools.cache
def reference(name):
    data = pruned_bert.read(f"greedy_search_trace_{name}")
    module, params, group_size, top_k, _ = pruned_bert.model(data)
    labels = data["labels"].astype(np.int32)
    return data, module, params, prune_shape(module, group_size=group_size), top_k, labels


def evaluator(name, rows=150, batch_size=80, own=False, **options):
    data, module, params, _, top_k, labels = reference(name)
    inputs = {column: values[:rows] for column, values in pruned_bert.inputs_of(data).items()}
    batches = prune_batches(inputs, labels[:rows], batch_size=batch_size)
    if own:
        return GatedEvaluator(gated_apply(module, top_k=top_k), params, batches, **options)
    return GatedEvaluator(module, params, batches, top_k=top_k, **options)


def config_of(name, **fields):
    return AxformerConfig(loss_batch=int(reference(name)[0]["config"][10]), top_k=reference(name)[4], **fields)


def rows_of(trace):
    """The columns of the reference's trace."""
    return [
        (KINDS.index(t.element.kind), *t.element[1:], t.loss, t.count, t.accepted, t.best, t.descends) for t in trace
    ]


@pytest.mark.parametrize("name", [pytest.param("a", marks=pytest.mark.nightly), "b"])
def test_search_is_the_authors(name):
    data, module, _, shape, top_k, _ = reference(name)
    scorer = evaluator(name)
    found = axformer(scorer, shape, config=config_of(name))
    trace, theirs = np.array(rows_of(found.trace)), data["trace"]
    np.testing.assert_array_equal(trace[:, [0, 1, 2, 4, 5, 7]], theirs[:, [0, 1, 2, 4, 5, 7]])
    np.testing.assert_allclose(trace[:, [3, 6]], theirs[:, [3, 6]], atol=1e-5)
    np.testing.assert_allclose(found.base.losses, data["base_samplewise_loss"], atol=1e-5)
    assert found.spec == pruned_bert.spec_of(data, "final", module, shape.group_size, top_k)
    assert found.base_loss == pytest.approx(float(data["base_loss"]), abs=1e-5)
    check_invariants(found, shape)
    assert scorer.compiles == 1


def check_invariants(found, shape, descend=1.1):
    best = [found.base_loss, *(trial.best for trial in found.trace), found.loss]
    assert all(after <= before for before, after in itertools.pairwise(best))
    assert len(found.trace) <= shape.layers * (3 + shape.heads + shape.groups)
    for place, trial in enumerate(found.trace):
        if trial.accepted:
            assert trial.loss < trial.best
            assert trial.count > len(found.base.losses) // 2
        assert trial.accepted == (not trial.failed)
        if trial.element.kind in ("group", "head"):  # after its block, which was rejected at a loss not too large
            block = {"group": "mlp", "head": "attention"}[trial.element.kind]
            (before,) = [t for t in found.trace[:place] if t.element == Element(block, trial.element.layer)]
            assert not before.accepted
            assert before.loss < descend * before.best
    accepted = [trial.element for trial in found.trace if trial.accepted]
    assert functools.reduce(PruneSpec.adding, accepted, PruneSpec(shape, top_k=found.spec.top_k)) == found.spec


FEW = {"rows": 16, "batch_size": 8}


@functools.cache
def stored():
    return evaluator("a", **FEW)


@functools.cache
def plain():
    """As a function, an evaluator stores nothing."""
    scorer = stored().with_params(reference("a")[2])
    return axformer(lambda gates: scorer(gates), reference("a")[3], config=config_of("a"))


def decisions(result):
    return [(trial.element, trial.accepted, trial.descends) for trial in result.trace]


NIGHTLY = pytest.mark.nightly
LAYER = 2 * 8 * 24 * 24 * 4  # bytes of the states before one layer


@pytest.mark.parametrize("states", ["every", pytest.param("some", marks=NIGHTLY)])
def test_every_way_finds_the_same(states):
    """Stored states, of some layers or all, candidates ahead, and early ends save work and change no bit."""
    shape, found = reference("a")[3], plain()
    whole = 2 * shape.layers * (1 + len(found.trace))
    every = stored().with_params(reference("a")[2])
    scorer = every if states == "every" else evaluator("a", **FEW, cache_bytes=2 * LAYER)
    runs = {}
    for name, keywords in (("plain", {}), ("ahead", {"speculate": 3}), ("early", {"abort": True})):
        before = scorer.layers_run
        again = axformer(scorer, shape, config=config_of("a"), **keywords)
        runs[name] = scorer.layers_run - before
        assert again.spec == found.spec, name
        np.testing.assert_array_equal(again.final.losses, found.final.losses)
        assert decisions(again) == decisions(found), name
        if name != "early":
            assert again.trace == found.trace, name
        assert scorer.compiles == 1
    assert runs["plain"] <= runs["ahead"] < whole
    assert runs["plain"] < (0.75 if states == "every" else 1) * whole


def test_a_bad_candidate_is_not_scored_to_its_end():
    """Without its feed-forward block the model is sure and wrong: the first batch decides."""
    x = np.tile(np.array([[0.0, 1.0]], np.float32), (12, 1))
    apply = lambda params, x, gates: x * (1 - 99 * (1 - gates.mlp[0])) + 0 * gates.attention[0]
    scorer = GatedEvaluator(apply, None, prune_batches(x, np.ones(12, np.int32), batch_size=2))
    shape, config = PruneShape(1, 0, 0), AxformerConfig(hard=False, loss_batch=None)
    early, whole = (axformer(scorer, shape, config=config, abort=abort) for abort in (True, False))
    assert decisions(early) == decisions(whole) == [(Element(kind, 0), False, kind != "mlp") for kind in KINDS[1::2]]
    assert [trial.complete for trial in early.trace] == [False, True]
    assert early.trace[0].failed == ("loss",)
    scores = scorer(PruneSpec(shape, mlp=(0,)).gates(), weights=loss_weights(12, None), bound=0.5)
    assert not scores.complete
    assert (scores.losses > 0).sum() == 2


@pytest.mark.parametrize("way", ["devices", pytest.param("own", marks=NIGHTLY)])
def test_devices_and_functions_of_ones_own_find_the_same(way):
    shape, found = reference("a")[3], plain()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    scorer = evaluator("a", **FEW, **({"mesh": mesh} if way == "devices" else {"own": True}))
    again = axformer(scorer, shape, config=config_of("a"))
    assert decisions(again) == decisions(found)
    assert scorer.compiles == 1
    np.testing.assert_allclose(rows_of(again.trace), rows_of(found.trace), atol=1e-5)


def test_buckets_of_lengths_give_the_losses_of_padded_rows():
    draws = np.random.default_rng(0)
    lengths, labels = np.array([24, 10, 17, 5]), np.array([0, 1, -1, 1])
    inputs = {"ids": draws.integers(0, 9, (4, 24)), "mask": np.arange(24) < lengths[:, None]}
    batches = prune_batches(inputs, labels, batch_size=2, buckets=(12, 24))
    assert [batch.inputs["ids"].shape for batch in batches] == [(2, 12), (2, 24)]
    assert [batch.rows.tolist() for batch in batches] == [[1, 2], [0, -1]]
    table = draws.normal(size=(9, 3)).astype(np.float32)
    apply = lambda params, x, gates: (params[x["ids"]] * x["mask"][..., None]).sum(1) * gates.mlp[0]
    gates = all_gates(PruneShape(1, 0, 0))
    scorer = GatedEvaluator(apply, 0 * table, batches)
    np.testing.assert_allclose(scorer(gates).losses, np.log(3), rtol=1e-6)
    compiled, other = scorer.compiles, scorer.with_params(table)
    cut = other(gates)
    assert other.compiles == compiled == 2
    np.testing.assert_allclose(scorer(gates).losses, np.log(3), rtol=1e-6)
    padded = GatedEvaluator(apply, table, prune_batches(inputs, labels, batch_size=4))(gates)
    assert cut.losses.shape == (3,)
    np.testing.assert_allclose(cut.losses, padded.losses, atol=1e-5)
    np.testing.assert_array_equal(cut.predicted, padded.predicted)


def test_a_decoder_loses_a_block_that_only_hurts():
    module = Decoder(12, 8, 2, 2, 8, max_positions=8)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), int))["params"]
    draws = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: draws.normal(0.3, 0.5, leaf.shape).astype(np.float32), shapes)
    ids = draws.integers(0, 12, (6, 7)).astype(np.int32)
    # The next tokens are those that the model without its last feed-forward block would choose.
    shape = prune_shape(module, group_size=4)
    wanted = PruneSpec(shape, mlp=(1,))
    labels = np.asarray(jax.jit(gated_apply(module))(params, {"input_ids": ids}, wanted.gates())).argmax(-1)
    scorer = GatedEvaluator(module, params, prune_batches({"input_ids": ids}, labels.astype(np.int32), batch_size=6))
    found = axformer(scorer, shape, config=AxformerConfig(hard=False, agreement=0.5))
    assert found.trace[0].element == Element("mlp", 1)
    assert found.trace[0].accepted
    assert found.base.predicted is None


# The rules, on losses that are given.
SHAPE = PruneShape(1, 2, 2)


def begun(base, shape=SHAPE, predicted=None, **fields):
    state = axformer_init(shape, AxformerConfig(**{"hard": False, "loss_batch": None, **fields}))
    return axformer_next(state, Scores(np.array(base, float), predicted))


def judged(state, losses, predicted=None):
    return axformer_next(state, Scores(np.array(losses, float), predicted)).trace[-1]


def test_rules_of_acceptance():
    state = begun([1.0, 1.0, 1.0, 1.0])
    assert judged(state, [0.5, 0.5, 1.0, 1.5]).accepted  # equal counts as not hurt
    assert judged(state, [0.1, 0.5, 1.1, 1.1]).failed == ("agreement",)  # half is not more than half
    assert judged(state, [1.0, 1.0, 1.0, 1.0]).failed == ("loss",)  # equal is not lower
    assert judged(state, [1.0, 1.0, 2.0, 2.0]).failed == ("loss", "agreement")
    assert judged(state, [np.nan, 0, 0, 0]).failed == ("loss",)
    tolerant = begun([1.0, 1.0, 1.0, 1.0], tolerance=0.2)
    assert judged(tolerant, [0.1, 0.5, 1.1, 1.1]).accepted
    above = begun([1.0, 1.0, 0.1, 0.1], counted_above=0.5)
    assert judged(above, [0.1, 0.1, 0.2, 0.2]).count == 2
    assert judged(above, [0.1, 0.1, 0.2, 0.2]).accepted
    loose = begun([1.0, 1.0, 1.0, 1.0], agreement=0.0)
    assert judged(loose, [0.0, 1.1, 1.1, 1.1]).accepted


def test_losses_are_compared_with_the_best_and_counted_against_the_first():
    state = begun([1.0, 1.0, 1.0])
    state = axformer_next(state, Scores(np.array([0.1, 0.4, 1.0])))
    assert state.best == pytest.approx(0.5)
    assert state.candidate.mlp == (0,)
    assert state.candidate.attention == (0,)
    # Worse than the model so far for two of three, but than the first for none.
    assert judged(state, [0.3, 0.6, 0.5]).accepted is True


def test_heads_are_tested_where_the_block_comes_close():
    state = begun([1.0, 1.0])
    near, far = (axformer_next(state, Scores(np.array(losses))) for losses in ([1.09, 1.09], [1.1, 1.1]))
    assert [e.kind for e in near.pending] == ["group", "group", "attention"]
    assert [e.kind for e in far.pending] == ["attention"]
    assert [spec.groups for spec in near.upcoming(5)] == [((0, 0),), ((0, 1),)]
    assert len(far.upcoming(5)) == 1


def test_a_budget_accepts_what_costs_little():
    state = begun([1.0, 1.0], loss_budget=0.1, agreement=0.0, tolerance=0.2)
    assert judged(state, [1.1, 1.1]).accepted
    assert not judged(state, [1.2, 1.1]).accepted
    hard = begun([1.0, 1.0], hard=True, loss_budget=0.1, tolerance=0.2)
    assert not judged(hard, [1.05, 1.05]).accepted  # it saves nothing


def test_guards_reject_chance_and_collapse():
    draws = np.random.default_rng(0)
    base = draws.uniform(0.5, 1.5, 200)
    noise = draws.normal(0, 0.1, 200)
    chance = base + noise - noise.mean() - 0.004
    real = base + draws.normal(-0.05, 0.1, 200)
    for rule in ("paired", "bootstrap", "halves"):
        state = begun(base, significance=rule, agreement=0.0)
        assert judged(state, real).accepted, rule
    for rule in ("paired", "bootstrap"):
        assert judged(begun(base, significance=rule, agreement=0.0), chance).failed == ("significance",)
    one_half = base - 0.1 * (halves(200)[0] > 0)
    assert judged(begun(base, significance="halves"), one_half).failed == ("significance",)
    both = np.repeat([0, 1], 100)
    state = begun(base, predicted=both, collapse=0.5)
    assert judged(state, real, np.zeros(200, int)).failed == ("collapse",)
    assert judged(state, real, both[::-1]).accepted


def test_tests_of_gains_have_their_level():
    draws = np.random.default_rng(1)
    before = draws.uniform(size=(200, 60))
    after = before + draws.normal(0, 0.1, (200, 60))
    paired = np.mean([paired_gain(*rows, level=0.2) for rows in zip(before, after, strict=True)])
    drawn = np.mean([bootstrap_gain(*r, level=0.2, samples=200) for r in zip(before[:60], after[:60], strict=True)])
    assert 0.1 < paired < 0.3
    assert 0.05 < drawn < 0.4
    weights = np.r_[1.0, np.zeros(59)]  # one row that falls is all of the mean
    gain = np.r_[1.0, np.full(59, -1.0)]
    assert bootstrap_gain(gain, np.zeros(60), np.full(60, 1 / 60)) is False
    assert paired_gain(gain[:1], np.zeros(1)) is False
    assert weights.sum() == 1


def test_report_counts_rules_and_states_the_majority():
    base = Scores(np.array([1.0, 1.0, 1.0]), np.array([0, 0, 1]))

    def evaluate(gates):
        return base if gates.mlp[0] else Scores(np.array([0.5, 0.5, 0.5]), np.array([0, 0, 0]))

    found = axformer(evaluate, PruneShape(1, 0, 0), config=AxformerConfig(hard=False))
    text = axformer_report(found, np.array([0, 0, 0]))
    assert "2 tests, 1 accepted; rejected by loss 1" in text
    assert "removed: 1 mlp" in text
    assert "accuracy 0.6667 -> 1.0000; always the most frequent class: 1.0000" in text
    with pytest.raises(ValueError, match="labels have shape"):
        axformer_report(found, np.zeros(2, int))


def test_bad_input():
    state = axformer_init(SHAPE)
    for losses, message in (
        ([], "expected one for each of 1 or more"),
        ([1.0, np.nan], "1 of 2 losses"),
        ([-1.0, 1.0], "negative"),
        ([[1.0]], "expected one for each"),
    ):
        with pytest.raises(ValueError, match=message):
            axformer_next(state, Scores(np.array(losses)))
    with pytest.raises(ValueError, match="3"):
        axformer_next(begun([1.0, 1.0]), Scores(np.zeros(3)))
    with pytest.raises(ValueError, match="predicted classes, which the scores lack"):
        begun([1.0, 1.0], collapse=0.5)
    with pytest.raises(ValueError, match="counted_above=2"):
        begun([1.0, 1.0], counted_above=2.0)
    for fields, message in (
        ({"agreement": 1.0}, "agreement=1.0"),
        ({"descend": 0.9}, "descend=0.9"),
        ({"top_k": 0}, "top_k=0"),
        ({"significance": "t"}, "significance='t'"),
        ({"significance": "paired", "loss_budget": 0.1}, "loss_budget=0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            AxformerConfig(**fields)
    _, module, params, shape, _top_k, labels = reference("a")
    inputs = pruned_bert.inputs_of(reference("a")[0])
    with pytest.raises(ValueError, match="validation set is empty: of 150 rows 0"):
        prune_batches(inputs, np.full(150, -1))
    with pytest.raises(ValueError, match=r"inputs have \{150\} rows, but labels have 149"):
        prune_batches(inputs, labels[1:])
    with pytest.raises(ValueError, match="labels go up to 5, but the model has 2 classes"):
        GatedEvaluator(module, params, prune_batches(inputs, np.full(150, 5), batch_size=80))
    batches = prune_batches(inputs, labels, batch_size=80)
    with pytest.raises(ValueError, match="a model with a classifier"):
        GatedEvaluator(module.encoder, params["encoder"], batches)
    with pytest.raises(ValueError, match="without gaps or repeats"):
        GatedEvaluator(module, params, batches[:1] * 2)
    with pytest.raises(ValueError, match="batches of 150 rows do not divide among the 8 devices"):
        GatedEvaluator(
            module,
            params,
            prune_batches(inputs, labels, batch_size=150),
            mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
        )
    with pytest.raises(ValueError, match="top_k=30, but the evaluator's is 5"):
        axformer(evaluator("a"), shape)
    with pytest.raises(ValueError, match="Choose one"):
        axformer(evaluator("a"), shape, config=config_of("a"), abort=True, speculate=2)
    with pytest.raises(ValueError, match="need a GatedEvaluator"):
        axformer(lambda gates: np.ones(2), SHAPE, speculate=2)
    with pytest.raises(ValueError, match="mask is False before a real token"):
        prune_batches({"mask": np.array([[False, True]])}, np.array([0]), buckets=(1, 2))
    with pytest.raises(ValueError, match="one number each"):
        GatedEvaluator(lambda params, inputs, gates: jnp.zeros((4, 2)), None, [batch4()], loss=lambda o, y: o)(0)


def batch4():
    return prune_batches({"x": np.zeros((4, 1))}, np.zeros(4, np.int32), batch_size=4)[0]
