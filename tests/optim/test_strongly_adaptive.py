"""Covering intervals, sleeping experts and the regret they promise."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samuel_theory import covering_intervals, preconditioner_regret

from effjax.optim.strongly_adaptive import (
    strongly_adaptive_init,
    strongly_adaptive_run,
    strongly_adaptive_step,
)

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "samuel"


def square(x, data):
    a, target = data
    return 0.5 * (a @ (x - target)) ** 2


@pytest.mark.parametrize("horizon", [1, 2, 7, 8, 16, 33])
def test_covering_is_the_reference(horizon):
    np.testing.assert_array_equal(
        covering_intervals(horizon), np.load(REFERENCE / "geometric_covering.npz")[f"T{horizon}"]
    )


@pytest.mark.parametrize("horizon", [1, 6, 64, 100])
def test_every_round_is_covered_once_per_scale(horizon):
    first, last = covering_intervals(horizon).T
    lengths = last - first + 1
    assert (lengths & (lengths - 1) == 0).all()
    assert (first % lengths == 0).all()
    for t in range(1, horizon + 1):
        active = np.sort(lengths[(first <= t) & (t <= last)])
        np.testing.assert_array_equal(active, 2 ** np.arange(int(np.log2(t)) + 1))


def test_parity_with_the_written_out_algorithm():
    ref = np.load(REFERENCE / "strongly_adaptive.npz")
    intervals = [tuple(interval) for interval in ref["intervals"]]
    diameter = float(ref["D"])
    with jax.enable_x64(True):
        run = jax.jit(
            lambda data: strongly_adaptive_run(
                square, data, 3, diameter=diameter, lipschitz=diameter, rates=int(ref["Q"])
            )
        )
        played = jax.device_get(run((ref["a"], ref["target"])))
        np.testing.assert_allclose(played.point, ref["x_pred"], rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(played.loss, ref["loss"], rtol=1e-10, atol=1e-12)
        for t in range(1, len(ref["a"]) + 1):
            active = [k for k in range(6) if 2**k <= t]
            assert len(active) == ref["active_count"][t - 1]
            columns = [intervals.index((t >> k << k, ((t >> k) + 1 << k) - 1)) for k in active]
            np.testing.assert_allclose(
                played.expert_losses[t - 1][: len(active)], ref["expert_losses"][t - 1][columns], rtol=1e-10, atol=1e-12
            )
            weights, expected = played.weights[t - 1][: len(active)], ref["weights"][t - 1][columns]
            np.testing.assert_allclose(weights / weights.sum(), expected / expected.sum(), rtol=1e-10)
            assert (played.weights[t - 1][len(active) :] == 0).all()


def distance(x, target):
    """A loss whose gradient does not vanish at the target, so that Adagrad's steps shrink for ever."""
    return jnp.abs(x - target).sum() / np.sqrt(2)


def adagrad(targets, diameter):
    """One learner for the whole run."""

    def step(carry, target):
        x, squares = carry
        loss, grad = jax.value_and_grad(distance)(x, target)
        squares = squares + grad**2
        x = x - diameter / np.sqrt(2) * grad / (jnp.sqrt(squares) + 1e-12)
        x = x * jnp.minimum(1.0, diameter / 2 / jnp.maximum(jnp.linalg.norm(x), 1e-30))
        return (x, squares), loss

    return jax.lax.scan(step, (jnp.zeros(2), jnp.zeros(2)), targets)[1]


def test_regret_after_a_late_shift_is_local():
    diameter, before, rounds = 2.0, 7168, 8192
    noise = 0.1 * np.random.default_rng(0).normal(size=(rounds, 2))
    targets = (np.where(np.arange(rounds)[:, None] < before, 0.6, -0.6) + noise).astype(np.float32)

    @jax.jit
    def run(targets):
        played = strongly_adaptive_run(distance, targets, 2, diameter=diameter, lipschitz=1.0)
        return played.loss, adagrad(targets, diameter), jax.vmap(jax.grad(distance))(played.point, targets)

    losses, plain, grads = jax.device_get(run(targets))
    lasts = {}
    for first, last in [(before, rounds), (0, before), (before + 512, rounds), (2048, 4096), (before, before + 64)]:
        here = slice(first, last)
        best = np.abs(np.median(targets[here], axis=0) - targets[here]).sum() / np.sqrt(2)
        regret, rival = losses[here].sum() - best, plain[here].sum() - best
        # A constant and a logarithm are the price of not knowing where the interval begins.
        assert regret <= 2 * preconditioner_regret(grads[here], diameter) + diameter * np.log(rounds)
        lasts[first, last] = regret, rival
    regret, rival = lasts[before, rounds]
    assert regret < 0.85 * rival


@pytest.mark.parametrize("diagonal", [True, False])
def test_best_preconditioner(diagonal):
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(20, 4)) @ rng.normal(size=(4, 4))
    d, diameter = 4, 3.0
    covariance = grads.T @ grads

    def objective(h):
        return diameter * np.sqrt(d * np.trace(np.linalg.solve(h, covariance)))

    if diagonal:
        best = np.diag(np.sqrt(np.diag(covariance)))
        rivals = [np.diag(rng.uniform(0.1, 1, d)) for _ in range(200)]
    else:
        values, vectors = np.linalg.eigh(covariance)
        best = vectors * np.sqrt(values) @ vectors.T
        rivals = [r @ r.T + 1e-3 * np.eye(d) for r in rng.normal(size=(200, d, d))]
    with jax.enable_x64(True):
        claimed = float(preconditioner_regret(jnp.asarray(grads), diameter, diagonal=diagonal))
    np.testing.assert_allclose(claimed, objective(d * best / np.trace(best)), rtol=1e-10)
    assert all(objective(d * h / np.trace(h)) >= claimed * (1 - 1e-10) for h in rivals)


def test_long_runs_keep_finite_weights():
    run = jax.jit(lambda targets: strongly_adaptive_run(distance, targets, 2, diameter=2.0, lipschitz=0.01))
    played = run(np.ones((8192, 2), np.float32))
    assert np.isfinite(played.point).all()
    assert np.isfinite(played.weights).all()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="horizon=0"):
        strongly_adaptive_init(3, 0)
    with pytest.raises(ValueError, match="rates=0"):
        strongly_adaptive_init(3, 8, rates=0)
    state = strongly_adaptive_init(3, 8)
    with pytest.raises(ValueError, match="diameter=0"):
        strongly_adaptive_step(jnp.sum, state, diameter=0.0, lipschitz=1.0)
    with pytest.raises(ValueError, match="lipschitz=-1"):
        strongly_adaptive_step(jnp.sum, state, diameter=1.0, lipschitz=-1.0)
