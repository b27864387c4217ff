"""Selective prediction beside torch-uncertainty and MAPIE: equal numbers, and no less coverage for the same promise."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.hardness.confidence import confidence_score, prediction_errors
from effjax.hardness.risk_coverage import augrc, aurc, coverage_at_selective_risk, risk_coverage_curve
from effjax.hardness.thresholds import binomial_p_value, ltt_threshold

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]


def predictions(n=5000, classes=10, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.exponential(2.5, (n, 1)) * np.eye(classes)[labels] + rng.normal(size=(n, classes))
    return logits.astype(np.float32), labels


def test_areas_and_coverages_as_torch_uncertainty():
    """Theirs are trapezoids from coverage 1 / n on, divided by 1 - 1 / n, which our curve gives too."""
    torch = pytest.importorskip("torch")
    metrics = pytest.importorskip("torch_uncertainty.metrics.classification")
    logits, labels = predictions()
    probabilities = torch.softmax(torch.tensor(logits, dtype=torch.float64), -1)

    def theirs(metric):
        metric.update(probabilities, torch.tensor(labels))
        return float(metric.compute())

    errors, _ = prediction_errors(logits, labels)
    confidence = confidence_score(logits)
    curve = risk_coverage_curve(confidence, errors)
    assert curve.last.all()  # no ties: theirs depend on how these are sorted
    n = len(labels)
    over = lambda heights: jnp.trapezoid(heights, curve.coverage) / (1 - 1 / n)
    np.testing.assert_allclose(over(curve.selective_risk), theirs(metrics.AURC()), rtol=1e-4)
    np.testing.assert_allclose(over(curve.joint_error), theirs(metrics.AUGRC()), rtol=1e-4)
    np.testing.assert_allclose(aurc(confidence, errors), theirs(metrics.AURC()), atol=2 / n)
    np.testing.assert_allclose(augrc(confidence, errors), theirs(metrics.AUGRC()), atol=2 / n)
    for risk in (0.01, 0.05):
        found = coverage_at_selective_risk(confidence, errors, risk)
        np.testing.assert_allclose(found, theirs(metrics.CovAtxRisk(risk_threshold=risk)), rtol=1e-6)


def test_ties_do_not_depend_on_the_order_here():
    torch = pytest.importorskip("torch")
    metrics = pytest.importorskip("torch_uncertainty.metrics.classification")
    rng = np.random.default_rng(1)
    p = np.round(rng.uniform(0.5, 1, 400), 1)
    probabilities, labels = np.stack([p, 1 - p], 1), (rng.random(400) > p).astype(int)

    def both(order):
        metric = metrics.AURC()
        metric.update(torch.tensor(probabilities[order]), torch.tensor(labels[order]))
        return float(metric.compute()), float(aurc(jnp.asarray(p[order], jnp.float32), labels[order] != 0))

    theirs, ours = zip(*(both(order) for order in (np.argsort(labels), np.argsort(-labels))), strict=True)
    np.testing.assert_allclose(ours[0], ours[1], rtol=1e-6)
    assert abs(theirs[0] - theirs[1]) > 0.01


def test_p_values_and_coverage_beside_mapie():
    controller = pytest.importorskip("mapie.risk_control")
    rng = np.random.default_rng(2)
    p = rng.beta(2, 1, 3000)
    right = rng.random(3000) < p
    grid = np.linspace(0.0, 0.99, 100)
    made = controller.BinaryClassificationController(
        lambda x: np.stack([1 - x, x], 1), "precision", 0.9, confidence_level=0.9, list_predict_params=grid
    )
    made.calibrate(p, right.astype(int))
    accepted = (p[:, None] >= grid[None, :]).sum(0)
    wrong = (~right[:, None] & (p[:, None] >= grid[None, :])).sum(0)
    theirs = np.ravel(made.p_values)
    some = accepted > 0
    # Theirs rounds accepted x risk up, so that a rounding error in the last digit counts an error that was not made.
    exact, one_more = (binomial_p_value(wrong + more, accepted, 0.1)[some] for more in (0, 1))
    assert (theirs[some] >= exact * (1 - 1e-6) - 1e-12).all()
    assert (theirs[some] <= one_more * (1 + 1e-6) + 1e-12).all()
    assert np.isclose(theirs[some], exact, rtol=1e-6, atol=1e-12).mean() > 0.5
    found = ltt_threshold(p, ~right, selective_risk=0.1, delta=0.1)
    best = float(np.min(made.valid_predict_params))
    print(f"coverage: here {found.coverage:.4f}, MAPIE {np.mean(p >= best):.4f}")
    assert found.coverage >= np.mean(p >= best)


def test_speed_beside_torch_uncertainty():
    """A million predictions; printed, not asserted."""
    torch = pytest.importorskip("torch")
    metrics = pytest.importorskip("torch_uncertainty.metrics.classification")
    logits, labels = predictions(1_000_000, 2)
    probabilities, targets = torch.softmax(torch.tensor(logits), -1), torch.tensor(labels)
    errors, _ = prediction_errors(logits, labels)
    confidence = jax.block_until_ready(confidence_score(logits))
    ours = jax.jit(aurc)
    ours(confidence, errors).block_until_ready()

    def theirs():
        metric = metrics.AURC()
        metric.update(probabilities, targets)
        return metric.compute()

    for name, run in (("effjax", lambda: ours(confidence, errors).block_until_ready()), ("torch-uncertainty", theirs)):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        print(f"{name}: {1e3 * np.median(times):.0f} ms")
