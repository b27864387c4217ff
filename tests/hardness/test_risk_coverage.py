"""Measures of selective prediction: parity, invariants, ties, padding, meshes, bad input."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from effjax.hardness.confidence import confidence_score, prediction_errors
from effjax.hardness.risk_coverage import (
    augrc,
    aurc,
    coverage_at_joint_error,
    coverage_at_selective_risk,
    excess_aurc,
    joint_error_at_coverage,
    optimal_aurc,
    risk_coverage_curve,
    selective_measures,
    selective_risk_at_coverage,
)

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "selective_classification"
TARGETS = (0.01, 0.02, 0.05, 0.1)


def by_hand(confidence, errors):
    """Thresholds, coverages, risks and joint errors at distinct confidences, one comparison at a time."""
    thresholds = np.unique(confidence)[::-1]
    accepted = np.array([(confidence >= t).sum() for t in thresholds])
    wrong = np.array([errors[confidence >= t].sum() for t in thresholds])
    return thresholds, accepted / len(errors), wrong / accepted, wrong / len(errors)


def data(name):
    with np.load(REFERENCE / f"{name}.npz") as file:
        found = dict(file)
    return found["confidence"], found["errors"].astype(bool), found


@pytest.mark.parametrize("x64", [True, False])
def test_parity_without_ties(x64):
    confidence, errors, wanted = data("rc_metrics")
    tolerance = 1e-9 if x64 else 1e-5
    with jax.enable_x64(x64):
        curve = risk_coverage_curve(confidence, errors)
        for name, ours in (("coverage", curve.coverage), ("selective_risk", curve.selective_risk)):
            np.testing.assert_allclose(ours, wanted[name], rtol=tolerance)
        np.testing.assert_allclose(curve.joint_error, wanted["generalized_risk"], rtol=tolerance)
        found = {
            "aurc_discrete": aurc(confidence, errors),
            "augrc_discrete": augrc(confidence, errors),
            "aurc_opt_discrete": optimal_aurc(errors),
            "aurc_opt_asymptotic": optimal_aurc(errors, limit=True),
            "eaurc_discrete": excess_aurc(confidence, errors),
            "eaurc_vs_asymptotic": excess_aurc(confidence, errors, limit=True),
            "fdshifts_aurc": aurc(confidence, errors, rule="trapezoid"),
            "fdshifts_augrc": augrc(confidence, errors, rule="trapezoid"),
        }
        for target in TARGETS:
            found[f"coverage_at_joint_error_{target}"] = coverage_at_joint_error(confidence, errors, target)
            found[f"coverage_at_selective_risk_{target}"] = coverage_at_selective_risk(confidence, errors, target)
        for name, value in found.items():
            np.testing.assert_allclose(value, wanted[name], rtol=tolerance, err_msg=name)


def test_parity_with_ties():
    confidence, errors, wanted = data("rc_metrics_ties")
    with jax.enable_x64(True):
        curve = risk_coverage_curve(confidence, errors)
        at = np.asarray(curve.last)[::-1]  # theirs ascends, and ends with a point at coverage 0
        for name in ("coverage", "selective_risk"):
            theirs = wanted[f"fdshifts_{name}s"][:-1]
            np.testing.assert_allclose(np.asarray(getattr(curve, name))[::-1][at], theirs, rtol=1e-9)
        np.testing.assert_allclose(aurc(confidence, errors, rule="trapezoid"), wanted["fdshifts_aurc"], rtol=1e-9)
        np.testing.assert_allclose(augrc(confidence, errors, rule="trapezoid"), wanted["fdshifts_augrc"], rtol=1e-9)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans()), min_size=1, max_size=12),
    st.sampled_from(TARGETS),
)
def test_ties_padding_and_order_as_by_hand(rows, target):
    levels, errors, where = (np.array(column) for column in zip(*rows, strict=True))
    where[0] = True
    # Always of 12 rows, so that one program serves all.
    pad = 12 - len(rows)
    confidence = np.append(levels / 4, np.full(pad, np.nan)).astype(np.float32)
    errors, where = (np.append(x, [fill] * pad).astype(bool) for x, fill in ((errors, True), (where, False)))
    order = np.random.default_rng(0).permutation(12)
    kept = confidence[where], errors[where]
    thresholds, coverage, risk, joint = by_hand(*kept)
    curve, areas = _all(confidence[order], errors[order], where[order])
    at = np.asarray(curve.last)
    np.testing.assert_array_equal(np.asarray(curve.threshold)[at], thresholds)
    np.testing.assert_allclose(np.asarray(curve.selective_risk)[at], risk, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(curve.joint_error)[at], joint, rtol=1e-6)
    widths = np.diff(np.append(0, coverage))
    np.testing.assert_allclose(areas, [(widths * risk).sum(), (widths * joint).sum()], rtol=1e-5)
    reached = np.append(0, coverage[joint <= target + 1e-9]).max()
    np.testing.assert_allclose(_at_joint(confidence, errors, target, where), reached, rtol=1e-6)


_all = jax.jit(
    lambda c, e, w: (risk_coverage_curve(c, e, where=w), jnp.stack([aurc(c, e, where=w), augrc(c, e, where=w)]))
)
_at_joint = jax.jit(lambda c, e, target, w: coverage_at_joint_error(c, e, target, where=w))


@pytest.mark.parametrize("x64", [False, True])
def test_every_kind_of_float_is_in_its_place(x64):
    """Against NumPy, bit for bit: ties, both zeros, infinities, the least floats, and NaN that does not count."""
    rng = np.random.default_rng(5)
    kinds = np.array([-np.inf, -2.5, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1e-38, 0.3, 1.0, 1.0 + 1e-7, 40.0, np.inf, np.nan])
    confidence = rng.choice(kinds, 600).astype(np.float64 if x64 else np.float32)
    errors, where = rng.random(600) < 0.4, ~np.isnan(confidence) & (rng.random(600) < 0.9)
    kept = confidence[where]
    thresholds = np.unique(kept)[::-1]
    accepted, wrong = np.array(
        [(of[:, None] & (kept[:, None] >= thresholds)).sum(0) for of in (np.ones(len(kept), bool), errors[where])]
    )
    with jax.enable_x64(x64):
        curve = jax.device_get(jax.jit(risk_coverage_curve)(confidence, errors, where=where))
    np.testing.assert_array_equal(curve.threshold[curve.last], thresholds)
    np.testing.assert_array_equal(curve.accepted[curve.last], accepted)
    np.testing.assert_array_equal(curve.errors[curve.last], wrong)
    # The rows of a group have its counts, and those that do not count have none.
    np.testing.assert_array_equal(
        curve.accepted, np.append(np.repeat(accepted, np.diff(accepted, prepend=0)), [0] * (600 - len(kept)))
    )
    assert np.isnan(curve.coverage[len(kept) :]).all()
    for ratio, of in ((curve.selective_risk, accepted), (curve.joint_error, len(kept))):
        np.testing.assert_allclose(ratio[curve.last], wrong / of, rtol=2 * np.finfo(ratio.dtype).eps)


def test_areas_have_their_extremes():
    rng = np.random.default_rng(0)
    errors = rng.random(500) < 0.3
    r = errors.mean()
    np.testing.assert_allclose(aurc(np.zeros(500, np.float32), errors), r, rtol=1e-6)  # one threshold: all or nothing
    last = (~errors + rng.random(500) / 2).astype(np.float32)
    np.testing.assert_allclose(excess_aurc(last, errors), 0, atol=1e-7)
    np.testing.assert_allclose(augrc(last, errors), r * (r + 1 / 500) / 2, rtol=1e-5)
    assert float(excess_aurc(rng.random(500, np.float32), errors)) > 0.05
    np.testing.assert_allclose(optimal_aurc(errors, limit=True), r + (1 - r) * np.log(1 - r), rtol=1e-5)
    assert float(optimal_aurc(np.ones(500, bool))) == float(optimal_aurc(np.ones(500, bool), limit=True)) == 1
    assert float(aurc(last, np.zeros(500, bool))) == 0


def test_lower_thresholds_accept_more_and_err_more():
    rng = np.random.default_rng(1)
    confidence, errors = rng.random(500, np.float32), rng.random(500) < 0.2
    curve = jax.device_get(risk_coverage_curve(confidence, errors))
    assert (np.diff(curve.coverage) >= 0).all()
    assert (np.diff(curve.joint_error) >= 0).all()
    np.testing.assert_allclose([curve.coverage[-1], curve.joint_error[-1]], [1, errors.mean()], rtol=1e-6)
    half = selective_measures(confidence, errors, float(np.asarray(curve.threshold)[249]))
    np.testing.assert_allclose([half.coverage, half.joint_error], [0.5, curve.joint_error[249]], rtol=1e-6)
    np.testing.assert_allclose(half.selective_risk, 2 * half.joint_error, rtol=1e-6)
    np.testing.assert_allclose(joint_error_at_coverage(confidence, errors, 0.5), half.joint_error)
    np.testing.assert_allclose(selective_risk_at_coverage(confidence, errors, 0.5), half.selective_risk)
    nothing = selective_measures(confidence, errors, np.inf)
    assert float(nothing.coverage) == 0
    assert np.isnan(nothing.selective_risk)


def test_the_last_crossing_counts():
    # Risks 1, 1/2, 1/3, 1/4, 2/5: above the target, below it, above it again.
    errors = np.array([True, False, False, False, True])
    for target, wanted in ((0.3, np.float32(0.8)), (0.2, 0)):
        found = coverage_at_selective_risk(np.arange(5.0, 0, -1, dtype=np.float32), errors, target)
        assert float(found) == wanted


def test_rounding_does_not_decide():
    for n in (3, 7, 49, 400, 1000):  # k errors of n are within the target k / n
        for k in (1, 2, n // 2):
            errors, where = np.arange(1000) < k, np.arange(1000) < n
            assert _at_joint(np.linspace(1, 0, 1000, dtype=np.float32), errors, k / n, where).item() == 1, (k, n)


def test_many_predictions_lose_no_error():
    n = 2**20
    errors = np.ones(n, bool)
    curve = jax.jit(risk_coverage_curve)(np.linspace(0, 1, n, dtype=np.float32), errors)
    assert np.asarray(curve.errors)[-1] == n
    np.testing.assert_allclose(jax.jit(aurc)(np.linspace(0, 1, n, dtype=np.float32), errors), 1, rtol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_arrays_give_the_same_numbers(kind):
    rng = np.random.default_rng(2)
    confidence, errors, where = (
        rng.integers(0, 50, 160).astype(np.float32),
        rng.random(160) < 0.3,
        rng.random(160) < 0.8,
    )
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    wanted = _all(confidence, errors, where)
    with jax.set_mesh(mesh):
        spread = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (confidence, errors, where)]
        found = _all(*spread)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_over_models_at_once_and_in_half_precision():
    rng = np.random.default_rng(3)
    confidence, errors = rng.random((3, 40), np.float32), rng.random((3, 40)) < 0.3
    one_by_one = [float(aurc(c, e)) for c, e in zip(confidence, errors, strict=True)]
    np.testing.assert_allclose(jax.jit(jax.vmap(aurc))(confidence, errors), one_by_one, rtol=1e-6)
    half = confidence[0].astype(jnp.bfloat16)
    found = aurc(half, errors[0])
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, aurc(half.astype(np.float32), errors[0]))


def test_few_and_no_predictions():
    one = np.ones(1, np.float32)
    assert float(aurc(one, np.array([True]))) == float(augrc(one, np.array([True]))) == 1
    empty = np.zeros(0, np.float32), np.zeros(0, bool)
    for measure in (aurc, augrc, excess_aurc):
        assert np.isnan(measure(*empty))
        assert np.isnan(measure(one, np.array([True]), where=np.array([False])))
    assert np.isnan(coverage_at_joint_error(*empty, 0.1))
    assert np.isnan(selective_risk_at_coverage(*empty, 0.1))
    assert risk_coverage_curve(*empty).coverage.shape == (0,)


def test_nan_confidence_is_seen():
    confidence, errors = np.array([0.9, np.nan, 0.5], np.float32), np.array([False, False, True])
    for found in (
        aurc(confidence, errors),
        augrc(confidence, errors, rule="trapezoid"),
        coverage_at_joint_error(confidence, errors, 0.5),
        coverage_at_selective_risk(confidence, errors, 0.5),
        joint_error_at_coverage(confidence, errors, 0.5),
    ):
        assert np.isnan(found)
    assert np.isfinite(aurc(confidence, errors, where=~np.isnan(confidence)))
    assert selective_measures(confidence, errors, 0.0).coverage.item() == np.float32(2 / 3)


C, E = np.array([0.9, 0.5], np.float32), np.array([False, True])
WRONG = {
    "errors of another shape": (lambda: aurc(C, E[:, None]), r"errors have shape \(2, 1\); expected \(2,\)"),
    "numbers for errors": (lambda: aurc(C, E.astype(int)), r"errors is int\d+; bool is needed"),
    "numbers for where": (lambda: aurc(C, E, where=C), r"where is float32; bool is needed: True for .*count"),
    "confidence of several models": (lambda: aurc(C[None], E[None]), r"confidence has shape \(1, 2\).*vmap"),
    "integers for confidence": (lambda: aurc(E.astype(int), E), r"confidence is int\d+; floating"),
    "rule": (lambda: aurc(C, E, rule="trapez"), r"rule='trapez' is not one of .*'trapezoid'\?"),
    "target": (lambda: coverage_at_joint_error(C, E, 1.2), r"target=1\.2 must be a number in \[0, 1\]"),
    "coverage": (lambda: selective_risk_at_coverage(C, E, 0.0), r"target=0\.0 must be a number in \(0, 1\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input(name):
    call, words = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=words):
        call()


def test_scores_of_logits():
    p = np.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]])
    z = np.log(p).astype(np.float32) + 3
    wanted = {
        "log_odds": np.log(p.max(1) / (1 - p.max(1))),
        "max_probability": p.max(1),
        "margin": [0.5, 0.05],
        "negative_entropy": (p * np.log(p)).sum(1),
        "max_logit": np.log(p.max(1)) + 3,
        "abstain_logit": np.log((1 - p[:, 2]) / p[:, 2]),
    }
    for score, value in wanted.items():
        np.testing.assert_allclose(score_of(z, score), value, rtol=2e-5, err_msg=score)
        np.testing.assert_allclose(score_of(z[None], score), np.reshape(value, (1, 2)), rtol=2e-5)


score_of = jax.jit(confidence_score, static_argnums=1)


def test_log_odds_rank_where_probabilities_are_all_one():
    z = np.array([[30.0, 0.0], [40.0, 0.0], [90.0, 0.0]], np.float32)
    assert len(set(score_of(z, "max_probability").tolist())) == 1
    np.testing.assert_allclose(score_of(z), [30, 40, 90], rtol=1e-6)
    half = confidence_score(z.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32


def test_scores_of_impossible_classes_and_of_nan():
    z = np.array([[0.0, -np.inf, -np.inf], [0.0, np.nan, 1.0]], np.float32)
    for score in ("log_odds", "max_probability", "margin", "negative_entropy"):
        found = np.asarray(score_of(z, score))
        assert not np.isnan(found[0]), score
        assert np.isnan(found[1]), score
    slope = jax.jit(jax.grad(lambda z: confidence_score(z, "negative_entropy")))
    assert np.isfinite(slope(np.array([0.0, 1e3, -1e3], np.float32))).all()


def test_errors_of_logits():
    z = np.array([[2.0, 1.0, 9.0], [1.0, 2.0, 9.0], [1.0, 2.0, 9.0]], np.float32)
    errors, where = prediction_errors(z, np.array([0, 0, -1]), "abstain_logit")
    assert errors.tolist() == [False, True, False]
    assert where.tolist() == [True, True, False]
    with pytest.raises(ValueError, match=r"labels have shape \(3, 1\)"):
        prediction_errors(z, np.zeros((3, 1), int))
    with pytest.raises(ValueError, match=r"labels go from 0 to 2, but must be classes in \[0, 1\]"):
        prediction_errors(z, np.array([0, 1, 2]), "abstain_logit")
    with pytest.raises(TypeError, match="labels are float64; integer"):
        prediction_errors(z, np.zeros(3))
    with pytest.raises(ValueError, match=r"logits have shape \(3, 1\).*\(0, z\)"):
        confidence_score(z[:, :1])
    with pytest.raises(ValueError, match="score='odds' is not one of"):
        confidence_score(z, "odds")


def test_lists_do():
    errors, where = prediction_errors([[2.0, 1.0], [2.0, 1.0], [0.0, 3.0]], [1, -1, 1])
    assert (errors.tolist(), where.tolist()) == ([True, False, False], [True, False, True])
    assert confidence_score([[2.0, 1.0]]).tolist() == [1.0]
    np.testing.assert_allclose(aurc([0.9, 0.8, 0.7], [False, True, True], where=[True, True, False]), 0.25)
