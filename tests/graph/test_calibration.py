"""The calibration head: parity with the authors' program, and what it must never change."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.graph.calibration import (
    calibrate,
    calibration_init,
    calibration_loss,
    fit_calibration,
    intra_distance,
)
from effjax.graph.measures import brier_score, expected_calibration_error, masked_cross_entropy
from effjax.graph.sparse.matrix import sparse_matrix
from effjax.graph.stages import adam_l2

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "fastrain_gnn"
KEY = jax.random.key(0)


@functools.cache
def vectors():
    with np.load(REFERENCE / "calibration.npz") as file:
        return dict(file)


def matrix():
    found = vectors()
    return sparse_matrix(found["adj_row"], found["adj_col"], found["adj_val"], (40, 40))


def head(prefix):
    part = lambda layer, name: jnp.asarray(vectors()[f"{prefix}scaling_model__gc{layer}__{name}"])
    return {f"conv_{i}": {"kernel": part(i + 1, "weight"), "bias": part(i + 1, "bias")} for i in range(2)}


def problem():
    found = vectors()
    return jnp.asarray(found["base_logits"]), jnp.asarray(found["y"]), jnp.asarray(found["train_mask"], jnp.float32)


def test_calibrated_logits_and_losses_are_the_authors():
    found, (logits, labels, weights) = vectors(), problem()
    calibrated = calibrate(head("p__"), logits, matrix())
    np.testing.assert_allclose(calibrated, found["calibrated_logits"], rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(masked_cross_entropy(calibrated, labels, weights), found["ce"], rtol=1e-5)
    np.testing.assert_allclose(intra_distance(calibrated, labels, weights), found["intra_distance"], rtol=1e-5)
    np.testing.assert_allclose(calibration_loss(calibrated, labels, weights), found["total"], rtol=1e-5)
    probabilities = jax.nn.softmax(calibrated)
    everybody = jnp.ones(40)
    np.testing.assert_allclose(
        expected_calibration_error(probabilities, labels, weights), found["ece_train"], rtol=1e-5
    )
    np.testing.assert_allclose(
        expected_calibration_error(probabilities, labels, everybody), found["ece_all"], rtol=1e-5
    )
    np.testing.assert_allclose(brier_score(probabilities, labels, everybody), found["brier_all"], rtol=1e-5)


def test_five_steps_of_calibration_are_the_authors():
    found, (logits, labels, weights), graph = vectors(), problem(), matrix()
    tx = adam_l2(1e-3, 5e-3)
    params = head("p__")
    opt = tx.init(params)
    loss = lambda params: calibration_loss(calibrate(params, logits, graph), labels, weights)
    step = jax.jit(jax.value_and_grad(loss))
    for number in range(5):
        value, grads = step(params)
        np.testing.assert_allclose(value, found[f"cal_loss_{number}"], rtol=1e-5)
        if number == 0:
            close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)
            jax.tree.map(close, grads, head("g__"))
        updates, opt = tx.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), params, head("p_after5__"))


def test_predictions_never_change():
    logits = 20 * jax.random.normal(KEY, (40, 4))
    graph = matrix()
    scaled = jax.jit(lambda key: calibrate(jax.tree.map(lambda x: 10 * x, calibration_init(key, 4)), logits, graph))
    for seed in range(5):
        calibrated = scaled(jax.random.key(seed))
        np.testing.assert_array_equal(calibrated.argmax(1), logits.argmax(1))
        assert not np.allclose(calibrated, logits)


def test_fitting_lowers_the_loss_and_repeats_itself():
    logits, labels, weights = problem()
    fit = jax.jit(lambda key: fit_calibration(key, logits, matrix(), labels, weights, epochs=60, dropout=0.0))
    params, losses = fit(KEY)
    assert losses[-1] < losses[0] - 0.01
    jax.tree.map(np.testing.assert_array_equal, params, fit(KEY)[0])


def test_a_network_in_training_is_run_in_every_epoch():
    logits, labels, weights = problem()
    noisy = lambda key: logits * jax.random.bernoulli(key, 0.5, logits.shape)
    _, steady = fit_calibration(KEY, lambda key: logits, matrix(), labels, weights, classes=4, epochs=4)
    _, fixed = fit_calibration(KEY, logits, matrix(), labels, weights, epochs=4)
    _, other = fit_calibration(KEY, noisy, matrix(), labels, weights, classes=4, epochs=4)
    np.testing.assert_array_equal(steady, fixed)
    assert float(jnp.abs(other - fixed).min()) > 1e-3
    with pytest.raises(ValueError, match="classes=None"):
        fit_calibration(KEY, noisy, matrix(), labels, weights)


def test_only_training_nodes_teach():
    logits, labels, weights = problem()
    hidden = jnp.where(weights > 0, labels, -7)
    fit = jax.jit(lambda labels: fit_calibration(KEY, logits, matrix(), labels, weights, epochs=5)[0])
    jax.tree.map(np.testing.assert_array_equal, fit(labels), fit(hidden))


def test_measures_of_calibration():
    sure, labels = jnp.eye(3), jnp.arange(3)
    assert float(expected_calibration_error(sure, labels, jnp.ones(3))) == 0
    assert float(brier_score(sure, labels, jnp.ones(3))) == 0
    assert float(expected_calibration_error(sure, (labels + 1) % 3, jnp.ones(3))) == 1
    assert float(brier_score(sure, (labels + 1) % 3, jnp.ones(3))) == 2
    # A node of weight 0 does not count.
    assert float(brier_score(sure, jnp.array([0, 1, 0]), jnp.array([1.0, 1.0, 0.0]))) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: calibration_init(KEY, 1), "classes=1"),
        (lambda: fit_calibration(KEY, *problem()[:1], matrix(), *problem()[1:], dropout=1.0), r"dropout=1\.0"),
        (lambda: expected_calibration_error(jnp.eye(2), jnp.arange(2), jnp.ones(2), bins=0), "bins=0"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
