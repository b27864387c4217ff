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
    part = lambda layer, name: vectors()[f"{prefix}scaling_model__gc{layer}__{name}"]
    return {f"conv_{i}": {"kernel": part(i + 1, "weight"), "bias": part(i + 1, "bias")} for i in range(2)}


def problem():
    found = vectors()
    return jax.device_put((found["base_logits"], found["y"], found["train_mask"].astype(np.float32)))


def test_calibrated_logits_and_losses_are_the_authors():
    found, (logits, labels, weights) = vectors(), problem()
    everybody = jnp.ones(40)

    @jax.jit
    def measured(params, logits):
        calibrated = calibrate(params, logits, matrix())
        losses = [f(calibrated, labels, weights) for f in (masked_cross_entropy, intra_distance, calibration_loss)]
        probabilities = jax.nn.softmax(calibrated)
        errors = [expected_calibration_error(probabilities, labels, mask) for mask in (weights, everybody)]
        return calibrated, (*losses, *errors, brier_score(probabilities, labels, everybody))

    calibrated, numbers = measured(head("p__"), logits)
    np.testing.assert_allclose(calibrated, found["calibrated_logits"], rtol=1e-5, atol=2e-6)
    names = ("ce", "intra_distance", "total", "ece_train", "ece_all", "brier_all")
    for name, number in zip(names, numbers, strict=True):
        np.testing.assert_allclose(number, found[name], rtol=1e-5, err_msg=name)


def test_five_steps_of_calibration_are_the_authors():
    found, (logits, labels, weights), graph = vectors(), problem(), matrix()
    tx = adam_l2(1e-3, 5e-3)
    params = head("p__")
    opt = tx.init(params)
    loss = lambda params: calibration_loss(calibrate(params, logits, graph), labels, weights)

    @jax.jit
    def step(params, opt):
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt = tx.update(grads, opt, params)
        return value, grads, optax.apply_updates(params, updates), opt

    for number in range(5):
        value, grads, params, opt = step(params, opt)
        np.testing.assert_allclose(value, found[f"cal_loss_{number}"], rtol=1e-5)
        if number == 0:
            close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)
            jax.tree.map(close, grads, head("g__"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), params, head("p_after5__"))


def test_predictions_never_change():
    logits = jax.device_put(np.random.default_rng(0).normal(scale=20, size=(40, 4)).astype(np.float32))
    graph = matrix()
    scaled = jax.jit(lambda key: calibrate(jax.tree.map(lambda x: 10 * x, calibration_init(key, 4)), logits, graph))
    for seed in range(5):
        calibrated = np.asarray(scaled(jax.random.key(seed)))
        np.testing.assert_array_equal(calibrated.argmax(1), np.asarray(logits).argmax(1))
        assert not np.allclose(calibrated, logits)


def test_fitting_lowers_the_loss_and_repeats_itself():
    logits, labels, weights = problem()
    fit = jax.jit(lambda key: fit_calibration(key, logits, matrix(), labels, weights, epochs=60, dropout=0.0))
    params, losses = jax.tree.map(np.asarray, fit(KEY))
    assert losses[-1] < losses[0] - 0.01
    jax.tree.map(np.testing.assert_array_equal, params, fit(KEY)[0])


def test_a_network_in_training_is_run_in_every_epoch():
    logits, labels, weights = problem()
    noisy = lambda key: logits * jax.random.bernoulli(key, 0.5, logits.shape)

    @jax.jit
    def losses():
        fit = lambda network: fit_calibration(KEY, network, matrix(), labels, weights, classes=4, epochs=4)[1]
        return fit(lambda key: logits), fit(logits), fit(noisy)

    steady, fixed, other = map(np.asarray, losses())
    np.testing.assert_array_equal(steady, fixed)
    assert np.abs(other - fixed).min() > 1e-3
    with pytest.raises(ValueError, match="classes=None"):
        fit_calibration(KEY, noisy, matrix(), labels, weights)


def test_only_training_nodes_teach():
    logits, labels, weights = problem()
    hidden = np.where(np.asarray(weights) > 0, labels, -7)
    fit = jax.jit(lambda labels: fit_calibration(KEY, logits, matrix(), labels, weights, epochs=5)[0])
    jax.tree.map(np.testing.assert_array_equal, fit(labels), fit(hidden))


def test_measures_of_calibration():
    sure, labels, everybody = np.eye(3, dtype=np.float32), np.arange(3, dtype=np.int32), np.ones(3, np.float32)
    error, score = jax.jit(expected_calibration_error), jax.jit(brier_score)
    assert float(error(sure, labels, everybody)) == 0
    assert float(score(sure, labels, everybody)) == 0
    assert float(error(sure, (labels + 1) % 3, everybody)) == 1
    assert float(score(sure, (labels + 1) % 3, everybody)) == 2
    # A node of weight 0 does not count.
    assert float(score(sure, np.array([0, 1, 0], np.int32), np.array([1, 1, 0], np.float32))) == 0


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
