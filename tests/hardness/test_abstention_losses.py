"""Deep Gamblers, self-adaptive training, SelectiveNet: parity, limits, the table, bad input."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.hardness.abstention_losses import gamblers_loss, sat_init, sat_loss, sat_update, selectivenet_loss

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "selective_classification"
TOLERANCE = {"rtol": 2e-5, "atol": 1e-6}
RNG = np.random.default_rng(0)

# One program for each set of shapes and choices.
gamblers_of = jax.jit(gamblers_loss)
sat_of, update_of = jax.jit(sat_loss), jax.jit(sat_update)
selectivenet_of = jax.jit(selectivenet_loss, static_argnames="normalize")
Z = RNG.normal(size=(12, 5)).astype(np.float32)
Y = RNG.integers(0, 4, 12)


@pytest.fixture(scope="module")
def ref():
    with np.load(REFERENCE / "baseline_losses.npz") as file:
        return dict(file)


def test_gamblers_parity(ref):
    value, grad = jax.jit(jax.value_and_grad(gamblers_loss))(ref["logits"], ref["targets"], float(ref["reward"]))
    np.testing.assert_allclose(value, ref["gamblers_loss"], **TOLERANCE)
    np.testing.assert_allclose(grad, ref["gamblers_grad"], **TOLERANCE)


def test_sat_parity(ref):
    rows, classes = ref["sat_step0_table_after"].shape
    labels, seen = np.full(rows, -1), np.zeros(rows, bool)
    for step in range(4):
        labels[ref[f"sat_step{step}_index"]] = ref[f"sat_step{step}_targets"]
    table = sat_init(labels, classes)

    @jax.jit
    def run(table, index, logits, targets):
        table = sat_update(table, index, logits)
        return table, *jax.value_and_grad(lambda z: sat_loss(table, index, z, targets))(logits)

    for step in range(4):
        index, targets, logits, loss, grad, after = (
            ref[f"sat_step{step}_{name}"] for name in ("index", "targets", "logits", "loss", "grad", "table_after")
        )
        table, value, slope = run(table, index, logits, targets)
        seen[index] = True
        np.testing.assert_allclose(value, loss, **TOLERANCE)
        np.testing.assert_allclose(slope, grad, **TOLERANCE)
        np.testing.assert_allclose(np.asarray(table)[seen], after[seen], **TOLERANCE)  # theirs is 0 before a visit


@pytest.mark.parametrize(("form", "normalize"), [("paper", True), ("keras_release", False)])
def test_selectivenet_parity(ref, form, normalize):
    with jax.enable_x64():
        f, h, g = (ref[f"sn_{name}"] for name in ("f_logits", "h_logits", "g_logit"))
        options = {"coverage": float(ref["sn_c"]), "penalty": float(ref["sn_lambda"]), "alpha": float(ref["sn_alpha"])}
        loss = lambda f, h, g: selectivenet_loss(f, h, g, ref["targets"], normalize=normalize, **options)
        value, grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(f, h, g)
        np.testing.assert_allclose(value, ref[f"sn_{form}_loss"], rtol=1e-9)
        for name, grad in zip("fhg", grads, strict=True):
            np.testing.assert_allclose(grad, ref[f"sn_{form}_grad_{name}"], rtol=1e-9, atol=1e-14)


@jax.jit
def cross_entropy(z, y):
    return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()


def test_limits_are_the_cross_entropy():
    wanted = cross_entropy(Z, Y)
    np.testing.assert_allclose(gamblers_of(Z, Y, 1e12), wanted, rtol=1e-5)
    table = update_of(sat_init(Y, 4), np.arange(12), Z, momentum=1.0)
    np.testing.assert_array_equal(table, np.eye(4)[Y])
    np.testing.assert_allclose(sat_of(table, np.arange(12), Z, Y), wanted, rtol=1e-5)
    open_ = np.full(12, 60.0, np.float32)
    for alpha in (0.0, 0.5, 1.0):
        np.testing.assert_allclose(selectivenet_of(Z, Z, open_, Y, alpha=alpha), wanted, rtol=1e-5)


def test_gamblers_bets_as_the_odds_say():
    """With the right class of probability q, the best bet keeps 1 back where q o < 1 and nothing where q o > 1."""
    bet = jax.jit(jax.vmap(lambda z, y, o: gamblers_loss(z[None], y, o), in_axes=(0, None, None)))
    q = np.array([0.3, 0.7])
    kept = np.linspace(0.001, 0.999, 999)

    def expected(o):
        bets = np.stack([(1 - kept) * q[1], (1 - kept) * q[0], kept], 1)
        each = [np.asarray(bet(np.log(bets).astype(np.float32), np.array([y]), o)) for y in (0, 1)]
        return q[1] * each[0] + q[0] * each[1]

    assert np.argmin(expected(1.2)) > 900
    assert np.argmin(expected(2.0)) < 700


def test_selectivenet_pays_for_coverage_that_is_missing():
    closed = np.full(12, np.log(0.25 / 0.75), np.float32)
    penalty = selectivenet_of(Z, Z, closed, Y, coverage=0.75, penalty=16.0, alpha=1.0, normalize=True)
    np.testing.assert_allclose(penalty, np.asarray(cross_entropy(Z, Y)) + 16 * 0.5**2, rtol=1e-5)


@pytest.mark.parametrize("loss", ["gamblers", "sat", "selectivenet"])
def test_padding_and_unknown_labels_count_nowhere(loss):
    table = jnp.asarray(RNG.random((16, 4)), jnp.float32)
    run = {
        "gamblers": lambda z, y, w: gamblers_loss(z, y, weights=w),
        "sat": lambda z, y, w: sat_loss(table, np.arange(len(y)), z, y, weights=w),
        "selectivenet": lambda z, y, w: selectivenet_loss(z, z, z[:, 0], y, weights=w),
    }[loss]
    call = jax.jit(run)
    wanted = call(Z, Y, None)
    z = np.concatenate([Z, np.full((4, 5), 30.0, np.float32)])
    for y, w in (
        (np.append(Y, [-1] * 4), None),
        (np.append(Y, [0] * 4), np.repeat([1.0, 0.0], [12, 4]).astype(np.float32)),
    ):
        np.testing.assert_allclose(call(z, y, w), wanted, rtol=1e-5)
    # Of nothing, SelectiveNet still misses its coverage.
    np.testing.assert_allclose(call(Z, np.full(12, -1), None), 16 * 0.8**2 if loss == "selectivenet" else 0, rtol=1e-6)
    assert np.isfinite(jax.jit(jax.grad(run))(Z[:0], Y[:0], None)).all()
    half = call(Z.astype(jnp.bfloat16), Y, None)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, wanted, rtol=2e-2)


def test_table_keeps_its_dtype_and_passes_no_gradient():
    table = sat_init(Y, 4).astype(jnp.bfloat16)
    index = np.arange(12)
    moved = update_of(table, index, Z)
    assert moved.dtype == jnp.bfloat16
    odds = np.exp(Z[:, :4])
    full = 0.9 * np.eye(4)[Y] + 0.1 * odds / odds.sum(1, keepdims=True)
    np.testing.assert_allclose(np.asarray(moved, np.float32), full, atol=4e-3)
    through = jax.jit(jax.grad(lambda z: sat_loss(sat_update(table, index, z), index, z, Y)))(Z)
    fixed = jax.jit(jax.grad(lambda z: sat_loss(moved, index, z, Y)))(Z)
    np.testing.assert_allclose(through, fixed, rtol=1e-5, atol=1e-7)


def test_an_index_beyond_the_table_is_seen():
    table = sat_init(Y, 4)
    with pytest.raises(ValueError, match=r"index goes from 0 to 12; the table has the rows 0 to 11"):
        sat_update(table, np.array([0, 12]), Z[:2])
    index = np.array([0, 12])
    assert np.isnan(sat_of(table, index, Z[:2], Y[:2]))
    moved = update_of(table, index, Z[:2])
    np.testing.assert_array_equal(np.asarray(moved)[1:], np.asarray(table)[1:])


WRONG = {
    "reward": (lambda: gamblers_loss(Z, Y, 1.0), r"reward=1\.0 must be a number in \(1.*<= 4, the classes"),
    "labels [n, 1]": (lambda: gamblers_loss(Z, Y[:, None]), r"labels have shape \(12, 1\)"),
    "label of abstaining": (lambda: gamblers_loss(Z, Y * 0 + 4), r"labels go from 4 to 4.*\[0, 3\]"),
    "logits": (lambda: gamblers_loss(Z[:, :2], Y), r"logits have shape \(12, 2\); expected \[batch, classes \+ 1\]"),
    "table": (lambda: sat_loss(sat_init(Y, 5), np.arange(12), Z, Y), r"table has shape \(12, 5\); expected \(12, 4\)"),
    "index": (lambda: sat_loss(sat_init(Y, 4), np.arange(11), Z, Y), r"index has shape \(11,\); expected \(12,\)"),
    "momentum": (lambda: sat_update(sat_init(Y, 4), np.arange(12), Z, momentum=1.1), r"momentum=1\.1"),
    "coverage": (lambda: selectivenet_loss(Z, Z, Z[:, 0], Y, coverage=0.0), r"coverage=0\.0 must be .*\(0, 1\]"),
    "heads": (lambda: selectivenet_loss(Z, Z[:, :4], Z[:, 0], Y), r"auxiliary has shape \(12, 4\)"),
    "selector": (lambda: selectivenet_loss(Z, Z, Z[:, :1], Y), r"selector has shape \(12, 1\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input(name):
    call, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        call()
