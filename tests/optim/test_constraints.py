"""The constraints of DCL: parity in float64, masks, permutations, devices, bad input."""

import itertools
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from effjax.core.tree import wide
from effjax.optim.constraints import (
    class_counts,
    class_risk,
    consistency_kl,
    feature_moment,
    guided_risk,
    marginal_kl,
    mean_prediction,
    optimal_guide,
    prediction_entropy,
    reference_kl,
)
from effjax.optim.smoothness import logit_slope, sharpness, squared_input_gradient

REFERENCE = np.load(Path(__file__).resolve().parents[1] / "reference" / "dcl" / "constraints.npz")
PRIOR = np.array([0.2, 0.5, 0.3])


def nll(logits, labels):
    logits = wide(logits)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]


def mean_nll(logits, ref, mask):
    return guided_risk(nll(logits, ref["labels"]), jnp.zeros(len(mask)), mask)


# name -> (logits, reference, mask) -> value
NAMED = {
    "nll_mean": mean_nll,
    "entropy_mean": lambda z, ref, mask: prediction_entropy(z, mask),
    "marginal_kl_prior_to_pred": lambda z, ref, mask: marginal_kl(z, ref["prior"], mask),
    "marginal_kl_pred_to_prior": lambda z, ref, mask: marginal_kl(z, ref["prior"], mask, reverse=True),
    "class_risk": lambda z, ref, mask: class_risk(nll(z, ref["labels"]), ref["labels"], 6, mask),
    "class_risk_excess": lambda z, ref, mask: class_risk(nll(z, ref["labels"]), ref["labels"], 6, mask, excess=True),
    "consistency_kl": lambda z, ref, mask: consistency_kl(z, ref["logits2"], mask),
    "reference_kl": lambda z, ref, mask: reference_kl(z, ref["ref"], mask),
    "guided_risk": lambda z, ref, mask: guided_risk(nll(z, ref["labels"]), ref["guide"], mask, renormalise=False),
}


def reference():
    return {name: REFERENCE[name] for name in REFERENCE.files}


@pytest.mark.parametrize("name", NAMED)
def test_parity_of_values_and_gradients(name):
    with jax.enable_x64(True):
        ref = reference()
        value = lambda z: NAMED[name](z, ref, ref["mask"])
        run = jax.jit(jax.grad(lambda z: (value(z).sum(), value(z)), has_aux=True))
        slopes, found = run(ref["logits"])
        np.testing.assert_allclose(found, ref[f"{name}/value"], rtol=1e-9)
        np.testing.assert_allclose(slopes, ref[f"{name}/grad_logits"], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("stop_first", [False, True])
def test_parity_of_the_second_view(stop_first):
    with jax.enable_x64(True):
        ref = reference()
        name = "consistency_kl_stopgrad_first" if stop_first else "consistency_kl"
        value = lambda p, q: consistency_kl(p, q, ref["mask"], stop_first=stop_first)
        first, second = jax.jit(jax.grad(value, argnums=(0, 1)))(ref["logits"], ref["logits2"])
        np.testing.assert_allclose(second, ref[f"{name}/grad_logits2"], rtol=1e-8, atol=1e-12)
        assert bool(np.any(first)) != stop_first


def test_parity_of_the_guide_and_of_feature_moments():
    with jax.enable_x64(True):
        ref = reference()

        @jax.jit
        def run(budget):
            losses = nll(ref["logits"], ref["labels"])
            guide = optimal_guide(losses, budget, ref["mask"])
            return guide, guided_risk(losses, guide, ref["mask"])

        for budget in (0.0, 0.25, 0.5):
            guide, risk = run(budget)
            np.testing.assert_allclose(guide, ref[f"guide_opt_{budget}/g"], atol=1e-12)
            np.testing.assert_allclose(risk, ref[f"guide_opt_{budget}/risk"], rtol=1e-9)
        moments = lambda z: feature_moment(z, ref["labels"], ref["class_mean_target"], ref["mask"])
        slopes, found = jax.jit(jax.grad(lambda z: (moments(z).sum(), moments(z)), has_aux=True))(ref["features"])
        np.testing.assert_allclose(found, ref["feature_moment/value"], rtol=1e-9)
        np.testing.assert_allclose(slopes, ref["feature_moment/grad_features"], rtol=1e-8, atol=1e-12)


# What all row-wise constraints share: (logits, other, labels, mask, axis) -> value.
def every(logits, other, labels, mask, axis=None):
    losses = nll(logits, jnp.maximum(labels, 0))
    distances = jnp.linalg.norm(wide(logits) - wide(other), axis=1)
    return {
        "entropy": prediction_entropy(logits, mask, axis=axis),
        "marginal": marginal_kl(logits, PRIOR, mask, axis=axis),
        "marginal_tangent": marginal_kl(logits, PRIOR, mask, around=jnp.array([0.3, 0.3, 0.4]), axis=axis),
        "risk": class_risk(losses, labels, 3, mask, axis=axis),
        "excess": class_risk(losses, labels, 3, mask, excess=True, axis=axis),
        "counts": class_counts(labels, 3, mask, axis=axis),
        "consistency": consistency_kl(logits, other, mask, axis=axis),
        "reference": reference_kl(logits, jax.nn.softmax(wide(other)), mask, axis=axis),
        "guided": guided_risk(losses, jax.nn.sigmoid(other[:, 0]), mask, axis=axis),
        "moment": feature_moment(logits, labels, jnp.ones((3, 3)), mask, axis=axis),
        "slope": logit_slope(logits, other, distances, mask, axis=axis),
        "steepness": squared_input_gradient(lambda x: nll(x, jnp.maximum(labels, 0)), logits, mask, axis=axis),
    }


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    logits, other = (2 * rng.normal(size=(2, count, 3))).astype(np.float32)
    return logits, other, rng.integers(-1, 3, count, dtype=np.int32), rng.random(count) < 0.7


EVERY = jax.jit(every)
MARGINAL = jax.jit(lambda z, **options: marginal_kl(z, PRIOR, **options))


def assert_close(left, right):
    for name in left:
        np.testing.assert_allclose(left[name], right[name], rtol=2e-5, atol=1e-6, err_msg=name)


def test_rows_that_do_not_take_part_change_nothing():
    logits, other, labels, mask = rows(16)
    alone = EVERY(logits[mask], other[mask], labels[mask], np.ones(int(mask.sum()), bool))
    assert_close(EVERY(logits, other, labels, mask), alone)
    # Whatever they hold, neither values nor gradients see it.
    filled = [np.where(mask[:, None], x, np.float32(bad)) for x, bad in ((logits, 1e4), (other, np.nan))]
    assert_close(EVERY(*filled, labels, mask), alone)
    total = lambda *z: sum(v.sum() for name, v in every(*z, labels, mask).items() if name != "slope")
    for slopes in jax.device_get(jax.jit(jax.grad(total, (0, 1)))(*filled)):
        assert np.isfinite(slopes).all()
        assert not slopes[~mask].any()


def test_order_of_rows_does_not_matter():
    data = rows(16)
    turned = [x[np.random.default_rng(5).permutation(16)] for x in data]
    assert_close(EVERY(*data), EVERY(*turned))


@pytest.mark.parametrize("how", ["jit", "shard_map"])
def test_rows_over_eight_devices(how):
    data = rows(16)
    expected = EVERY(*data)
    # A mean of the devices' divergences would be another number.
    parts = [MARGINAL(data[0][i : i + 2], mask=data[3][i : i + 2]) for i in range(0, 16, 2)]
    assert abs(np.mean(parts) - float(expected["marginal"])) > 0.02
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in data]
    if how == "jit":
        assert_close(EVERY(*sharded), expected)
    else:
        run = jax.shard_map(partial(every, axis="data"), mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)
        assert_close(jax.jit(run)(*sharded), expected)


def test_empty_batch_is_no_statistic_and_no_nan():
    logits, other, labels, _ = rows(16)
    for count, mask in ((0, np.ones(0, bool)), (16, np.zeros(16, bool))):
        found = jax.device_get(EVERY(logits[:count], other[:count], labels[:count], mask))
        quiet = {name: value for name, value in found.items() if not name.startswith("marginal")}
        assert all((value == 0).all() for value in quiet.values()), quiet
        assert all(np.isfinite(value).all() for value in found.values())


def test_bfloat16_is_computed_in_float32():
    logits, other, labels, mask = rows(16)
    half = [x.astype(jnp.bfloat16) for x in (logits, other)]
    found = EVERY(*half, labels, mask)
    assert {value.dtype for value in found.values()} == {jnp.dtype("float32")}
    exact = EVERY(*[x.astype(np.float32) for x in half], labels, mask)
    # A gradient in bfloat16 inputs is itself in bfloat16, and so is the guide.
    for name in ("steepness", "guided"):
        np.testing.assert_allclose(found.pop(name), exact.pop(name), rtol=0.02)
    assert_close(found, exact)


def test_classes_that_cannot_be_are_no_nan():
    logits = np.array([[0.0, 1.0, -np.inf], [1.0, 0.0, -np.inf]], np.float32)
    for value in (prediction_entropy, lambda z: consistency_kl(z, z + 1.0), lambda z: marginal_kl(z, PRIOR)):
        found, slopes = jax.jit(jax.value_and_grad(value))(logits)
        assert np.isfinite(found)
        assert np.isfinite(np.asarray(slopes)[:, :2]).all()
    entropy = jax.jit(prediction_entropy)
    np.testing.assert_allclose(entropy(logits), entropy(logits[:, :2]), rtol=1e-6)


GUIDE = jax.jit(optimal_guide)


@settings(max_examples=30, deadline=None)
@given(
    # Of few lengths, so that few programs serve all.
    st.sampled_from((1, 5, 12)).flatmap(lambda size: st.lists(st.integers(0, 5), min_size=size, max_size=size)),
    st.floats(0, 0.95),
)
def test_guide_spends_its_budget_on_the_largest_losses(values, budget):
    losses = np.array(values, np.float32)
    guide = np.asarray(GUIDE(losses, budget))
    np.testing.assert_allclose(guide.sum(), budget * len(values), rtol=1e-5, atol=1e-5)
    kept = losses[guide < 1]
    assert all(losses[i] >= kept.min() for i in np.flatnonzero(guide > 0))
    assert ((guide > 0) & (guide < 1)).sum() <= 1


def test_guided_risk_falls_as_the_budget_grows():
    losses = np.random.default_rng(0).exponential(size=40).astype(np.float32)
    risk = jax.jit(lambda budget: guided_risk(losses, optimal_guide(losses, budget)))
    found = [float(risk(budget)) for budget in np.linspace(0, 0.95, 12)]
    np.testing.assert_allclose(found[0], losses.mean(), rtol=1e-6)
    assert all(b <= a + 1e-6 for a, b in itertools.pairwise(found))
    # The mean of the smaller half, which a sort gives too.
    np.testing.assert_allclose(risk(0.5), np.sort(losses)[:20].mean(), rtol=1e-5)


def test_tangent_of_the_marginal_is_unbiased_over_parts():
    logits, _, _, _ = rows(64)
    around = np.asarray(jax.jit(mean_prediction)(logits))
    parts = logits.reshape(16, 4, 3)
    of_parts = jax.jit(lambda parts, **options: jax.vmap(lambda z: marginal_kl(z, PRIOR, **options))(parts))
    whole, expected = jax.jit(jax.value_and_grad(lambda z: marginal_kl(z, PRIOR)))(logits)
    np.testing.assert_allclose(np.mean(of_parts(parts, around=around)), whole, rtol=1e-4)
    assert np.mean(of_parts(parts)) > float(whole) + 0.05
    slopes = jax.jit(jax.grad(lambda z: of_parts(z, around=around).mean()))(parts)
    np.testing.assert_allclose(np.reshape(slopes, (64, 3)), expected, rtol=1e-3, atol=1e-6)


def test_sharpness_of_a_quadratic():
    curvature = np.array([1.0, 9.0], np.float32)
    loss = lambda w: 0.5 * jnp.sum(curvature * w**2)
    # Along the gradient g: r ||g|| + r^2/2 g'Hg / ||g||^2.
    w, r = np.array([1.0, -0.5]), 0.1
    g = np.array([1.0, -4.5])
    expected = r * np.linalg.norm(g) + r**2 / 2 * (curvature * g**2).sum() / (g**2).sum()
    run = jax.jit(jax.value_and_grad(lambda w, r: sharpness(loss, w, r)))
    found, slope = run(w.astype(np.float32), r)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    # Through a fixed direction: r H g / ||g||.
    np.testing.assert_allclose(slope, r * curvature * g / np.linalg.norm(g), rtol=1e-3)
    assert float(jax.jit(lambda w: sharpness(loss, w))(np.zeros(2, np.float32))) == 0.0


def test_smoothness_of_a_linear_map():
    weights = np.array([[1.0, 0.0], [0.0, 3.0], [2.0, 0.0]], np.float32)
    x = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    found = jax.jit(lambda x: squared_input_gradient(lambda x: (x @ weights.T).sum(1), x))(x)
    np.testing.assert_allclose(found, 9.0 + 9.0, rtol=1e-6)
    step = np.array([[0.5, 0.0]] * 5, np.float32)
    slope = jax.jit(logit_slope)(x @ weights.T, (x + step) @ weights.T, np.linalg.norm(step, axis=1))
    np.testing.assert_allclose(slope, 5.0, rtol=1e-5)


Z, Y = jnp.zeros((4, 3)), jnp.zeros(4, int)
BAD = {
    "labels [N, 1]": (lambda: class_risk(jnp.zeros(4), Y[:, None], 3), "losses have shape (4,); expected (4, 1)"),
    "float labels": (lambda: class_counts(jnp.zeros(4), 3), "labels are float32[4]; give integers [4]"),
    "other view": (lambda: consistency_kl(Z, Z[:1]), "other has shape (1, 3); expected (4, 3)"),
    "one reference": (lambda: reference_kl(Z, jnp.full((1, 3), 1 / 3)), "reference has shape (1, 3); expected (4, 3)"),
    "prior of counts": (lambda: marginal_kl(Z, jnp.array([1.0, 2.0, 1.0])), "prior has the sum 4"),
    "prior with a zero": (lambda: marginal_kl(Z, jnp.array([0.5, 0.5, 0.0])), "Smooth a count of 0"),
    "prior of other classes": (lambda: marginal_kl(Z, jnp.array([0.5, 0.5])), "prior has shape (2,); expected (3,)"),
    "token logits": (lambda: prediction_entropy(Z[None]), "Flatten other axes into rows"),
    "float mask": (lambda: prediction_entropy(Z, jnp.ones(4)), "mask is float32; give bools"),
    "short mask": (lambda: prediction_entropy(Z, jnp.ones(3, bool)), "mask has shape (3,); expected (4,)"),
    "budget": (lambda: optimal_guide(jnp.zeros(4), 1.0), "budget=1.0 must be a number in [0, 1)"),
    "guide": (lambda: guided_risk(jnp.zeros(4), jnp.zeros((4, 1))), "guide has shape (4, 1); expected (4,)"),
    "means": (lambda: feature_moment(Z, Y, jnp.zeros((3, 2))), "features have shape (4, 3) and means (3, 2)"),
    "radius": (lambda: sharpness(jnp.sum, jnp.ones(2), 0.0), "radius=0.0 must be a number in (0"),
    "losses of inputs": (lambda: squared_input_gradient(lambda x: x, Z), "losses(inputs) has shape (4, 3)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    run, words = BAD[case]
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        run()
