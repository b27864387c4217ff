"""DCL: parity of the dual rules, optimality conditions, invariants of the Lagrangian, bad input, checkpoints."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.core.cost import count_compiles
from effjax.core.errors import NoEffectWarning
from effjax.optim.constraints import class_counts, class_risk, prediction_entropy
from effjax.optim.dcl import (
    DclState,
    dcl,
    dcl_init,
    dcl_lagrangian,
    dcl_metrics,
    dcl_unreachable,
    dcl_update,
    dcl_violations,
    dcl_weights,
)
from effjax.optim.dual_ascent import Constraint, DclConfig, cyclic_level, scale_by_nupi
from effjax.train.checkpoint import Checkpoints

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "dcl"
DUALS = np.load(REFERENCE / "duals.npz")
QP = np.load(REFERENCE / "toy_qp.npz")


def one(op, level, **settings):
    """A config of the one constraint c."""
    shape = np.shape(level) if not callable(level) else ()
    return DclConfig({"c": Constraint(op, level, shape)}, **settings)


def follow(config, violations, start):
    """Multipliers and weights over a series of given violations."""

    def step(state, v):
        weights = dcl_weights(state, {"c": v}, config)["c"]
        value = dcl_lagrangian(state, 0.0, {"c": v}, config)
        state = dcl_update(state, {"c": v}, config)
        return state, (state.multipliers["c"], weights, value)

    first = dcl_init(config)._replace(multipliers={"c": jnp.asarray(start)})
    run = jax.jit(lambda first, violations: jax.lax.scan(step, first, violations)[1])
    return jax.device_get(run(first, violations))


ETA, MOST, RHO = (float(DUALS[name]) for name in ("eta", "lam_max", "al_rho"))
RULES = {
    "projected_ascent": {"dual": optax.sgd(ETA), "limit": MOST},
    "ema_ascent": {"dual": optax.chain(optax.ema(float(DUALS["ema_beta"])), optax.sgd(ETA)), "limit": MOST},
    "nupi": {
        "dual": optax.chain(
            scale_by_nupi(*(float(DUALS[f"nupi_{name}"]) for name in ("kp", "ki", "nu"))), optax.sgd(ETA)
        ),
        "limit": None,
    },
    "al_multiplier": {"dual": optax.sgd(RHO), "penalty": RHO, "limit": None},
}


@pytest.mark.parametrize("name", RULES)
def test_parity_of_the_dual_rules(name):
    with jax.enable_x64(True):
        config = one("<=", np.zeros(3), **RULES[name])
        lam, weights, value = follow(config, DUALS["violations"], DUALS["lam0"])
        # Optax keeps the ema's bias correction in float32.
        tolerance = {"rtol": 1e-6, "atol": 1e-7} if name == "ema_ascent" else {"rtol": 1e-10, "atol": 1e-12}
        np.testing.assert_allclose(lam, DUALS[name], **tolerance)
        assert bool((lam >= 0).all())
        if name == "al_multiplier":
            np.testing.assert_allclose(weights, DUALS["al_primal_weight"], rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(value, DUALS["al_value"], rtol=1e-10, atol=1e-12)


def test_parity_of_the_levels():
    with jax.enable_x64(True):
        period = int(DUALS["budget_period"])
        most, least, decay = (float(DUALS[f"budget_{name}"]) for name in ("max", "min", "gamma"))
        level = cyclic_level(most, least, period, decay)
        of = jax.jit(jax.vmap(level))
        np.testing.assert_allclose(of(np.arange(30)), DUALS["budget"], rtol=1e-9)
        # By the formula: t = 0, T - 1, T, 2T.
        last = most + (least - most) * (1 - np.cos(np.pi * 6 / 7)) / 2
        found = of(np.array([0, period - 1, period, 2 * period]))
        np.testing.assert_allclose(found, [most, last, decay * most, decay**2 * most], rtol=1e-12)


# The quadratic program: 0.5 ||theta - a||^2 subject to W theta <= b.

QP_CONFIG = one("<=", QP["b"], dual=optax.sgd(float(QP["lr_dual"])), limit=None)


def qp_objective(theta, state, config=QP_CONFIG):
    values = {"c": jnp.asarray(QP["W"]) @ theta}
    return dcl_lagrangian(state, 0.5 * jnp.sum((theta - QP["a"]) ** 2), values, config), values


def qp_run(steps, alternating=False, config=QP_CONFIG):
    tx = optax.chain(dcl(config), optax.sgd(float(QP["lr_primal"])))

    def step(carry, _):
        theta, state = carry
        grads, values = jax.grad(lambda t, s: qp_objective(t, s, config), has_aux=True)(theta, state)
        updates, after = tx.update(grads, state, theta, values=values)
        theta = optax.apply_updates(theta, updates)
        if alternating:
            # The multipliers' step again, from where it began, by values at the new parameters.
            _, after = tx.update(grads, state, theta, values=qp_objective(theta, state, config)[1])
        return (theta, after), (theta, optax.tree.get(after, "multipliers")["c"])

    theta = jnp.zeros_like(QP["a"])
    run = jax.jit(lambda start: jax.lax.scan(step, start, length=steps))
    return jax.device_get(run((theta, tx.init(theta))))


@pytest.mark.parametrize("order", ["simultaneous", "alternating_primal_dual"])
def test_parity_on_the_quadratic_program(order):
    with jax.enable_x64(True):
        _, (theta, lam) = qp_run(60, alternating=order != "simultaneous")
        np.testing.assert_allclose(theta, QP[f"{order}/theta"], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(lam, QP[f"{order}/lambda"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_optimality_conditions(penalty):
    with jax.enable_x64(True):
        config = one("<=", QP["b"], dual=optax.sgd(float(QP["lr_dual"])), limit=None, penalty=penalty)
        (theta, state), _ = qp_run(3000, config=config)
        lam = optax.tree.get(state, "multipliers")["c"]
        np.testing.assert_allclose(theta, QP["theta_star"], atol=1e-6)
        np.testing.assert_allclose(lam, QP["lambda_star"], atol=1e-6)
        violations = QP["W"] @ np.asarray(theta) - QP["b"]
        assert violations.max() < 1e-6
        assert np.abs(np.asarray(lam) * violations).max() < 1e-6
        assert lam[1] == 0.0  # the inactive one
        np.testing.assert_allclose(0.5 * ((theta - QP["a"]) ** 2).sum(), QP["obj_star"], atol=1e-6)


def test_entropy_is_largest_at_a_tilted_distribution():
    ref = np.load(REFERENCE / "maxent.npz")
    support = ref["support"].astype(np.float32)
    config = one("==", float(ref["target_mean"]), dual=optax.sgd(0.05))
    tx = optax.chain(dcl(config), optax.sgd(0.5))

    def objective(z, state):
        values = {"c": jnp.sum(jax.nn.softmax(z) * support)}
        return dcl_lagrangian(state, -prediction_entropy(z[None, :]), values, config), values

    def step(carry, _):
        z, state = carry
        grads, values = jax.grad(objective, has_aux=True)(z, state)
        updates, state = tx.update(grads, state, z, values=values)
        return (optax.apply_updates(z, updates), state), None

    run = jax.jit(lambda start: jax.lax.scan(step, start, length=4000)[0])
    z, state = run((jnp.zeros(6), tx.init(jnp.zeros(6))))
    odds = np.exp(np.asarray(z))
    np.testing.assert_allclose(odds / odds.sum(), ref["p_star"], atol=1e-4)
    np.testing.assert_allclose(jax.jit(prediction_entropy)(np.asarray(z)[None, :]), ref["entropy_star"], atol=1e-4)
    # The multiplier of an equality has a sign: raising the mean costs, so that it is minus the tilt.
    np.testing.assert_allclose(optax.tree.get(state, "multipliers")["c"], -ref["tilt"], atol=1e-3)


def test_nupi_is_the_augmented_lagrangian():
    """For an equality, by the plain Lagrangian and by the augmented one, the multipliers first."""
    with jax.enable_x64(True):
        rho, eta = 0.8, 0.1
        a, row = QP["a"], QP["W"][0]
        runs = {
            "nupi": one("==", 0.3, dual=optax.chain(scale_by_nupi(rho / eta), optax.sgd(eta)), limit=None),
            "augmented": one("==", 0.3, dual=optax.sgd(eta), penalty=rho, limit=None),
        }
        found = {}
        for name, config in runs.items():
            theta, state = jnp.zeros_like(a), dcl_init(config)
            if name == "nupi":  # mu_0 = lam_0 - w v_0, and the first step has no change to add
                first = dcl_violations(state, {"c": row @ theta}, config)["c"]
                state = state._replace(multipliers={"c": rho * first})

            def step(carry, _, config=config):
                theta, state = carry
                state = dcl_update(state, {"c": row @ theta}, config)
                loss = lambda t: dcl_lagrangian(state, 0.5 * jnp.sum((t - a) ** 2), {"c": row @ t}, config)
                theta = theta - 0.1 * jax.grad(loss)(theta)
                return (theta, state), theta

            run = jax.jit(lambda start, step=step: jax.lax.scan(step, start, length=25)[1])
            found[name] = run((theta, state))
        np.testing.assert_allclose(found["nupi"], found["augmented"], atol=1e-12)


# Invariants


def test_without_multipliers_it_is_the_plain_optimizer():
    config = one("<=", 5.0)
    loss = lambda w: jnp.sum((w - 1.0) ** 2)
    params = np.array([0.0, 2.0], np.float32)
    plain, ours = optax.adam(0.1), optax.chain(optax.adam(0.1), dcl(config))
    state = ours.init(params)
    expected = jax.jit(lambda w: plain.update(jax.grad(loss)(w), plain.init(w), w)[0])(params)

    @jax.jit
    def step(w, state):
        grads = jax.grad(lambda w: dcl_lagrangian(state, loss(w), {"c": w.sum()}, config))(w)
        return ours.update(grads, state, w, values={"c": w.sum()})

    updates, state = step(params, state)
    np.testing.assert_array_equal(updates, expected)
    assert optax.tree.get(state, "multipliers")["c"] == 0.0


@pytest.mark.parametrize("op", ["<=", ">=", "=="])
@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_gradients_of_the_lagrangian(op, penalty):
    config = one(op, 1.0, penalty=penalty, start=0.5)
    state = dcl_init(config)
    value = lambda c, lam: dcl_lagrangian(state._replace(multipliers={"c": lam}), 3.0, {"c": c}, config)
    slopes = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))
    weights = jax.jit(lambda c: dcl_weights(state, {"c": c}, config)["c"])
    for c in (0.2, 1.4):
        violation = {"<=": c - 1.0, ">=": 1.0 - c, "==": c - 1.0}[op]
        weight = 0.5 + penalty * violation
        if op != "==":
            weight = max(weight, 0.0)
        found, (slope, ascent) = slopes(np.float32(c), np.float32(0.5))
        np.testing.assert_allclose(slope, weight * (-1.0 if op == ">=" else 1.0), rtol=1e-5)
        np.testing.assert_allclose(weights(np.float32(c)), weight, rtol=1e-5)
        np.testing.assert_allclose(ascent, violation if weight or not penalty else -0.5 / penalty, rtol=1e-5)
        textbook = 0.5 * violation if not penalty else (weight**2 - 0.25) / (2 * penalty)
        np.testing.assert_allclose(found, 3.0 + textbook, rtol=1e-5)


def test_an_inactive_constraint_has_no_multiplier():
    lam, _, _ = follow(one("<=", 0.0, dual=optax.sgd(0.1), start=0.5), np.full(20, -0.1), 0.05)
    assert bool((lam >= 0).all())
    assert (np.diff(lam) <= 0).all()
    assert lam[-1] == 0.0


def test_a_class_that_the_batch_lacks_keeps_its_multiplier():
    config = DclConfig({"risk": Constraint("<=", 0.2, (3,))}, start=1.0)
    losses, labels = np.array([1.0, 0.0, 2.0], np.float32), np.array([0, 0, 2])

    @jax.jit
    def step(state):
        values, present = {"risk": class_risk(losses, labels, 3)}, {"risk": class_counts(labels, 3) > 0}
        value = dcl_lagrangian(state, 0.0, values, config, present=present)
        return dcl_update(state, values, config, present=present), value

    states, lagrangians = [dcl_init(config)], []
    for _ in range(3):
        state, value = step(states[-1])
        states.append(state)
        lagrangians.append(value)
    lam = np.asarray(states[-1].multipliers["risk"])
    assert lam[1] == 1.0
    # The running mean of the absent class starts when it comes: its first step is that of a new run.
    late = jax.jit(lambda state: dcl_update(state, {"risk": jnp.full(3, 0.7)}, config))(states[-1])
    np.testing.assert_allclose(np.asarray(late.multipliers["risk"])[1], 1.0 + 0.05 * 0.5, rtol=1e-6)
    assert lam[0] > 1.0
    assert lam[2] > lam[0]
    # Nor does its level count in the loss: 1 * (0.5 - 0.2) + 1 * (2 - 0.2).
    np.testing.assert_allclose(lagrangians[0], 2.1, rtol=1e-6)


def test_moves_are_due_after_the_warmup_and_every_few_steps():
    config = one("<=", 0.0, dual=optax.sgd(1.0), every=3, warmup=2, restart=8, start=0.5)
    lam, _, _ = follow(config, np.full(12, 1.0), 0.5)
    assert lam.tolist() == [0.5, 0.5, 0.5, 1.5, 1.5, 1.5, 2.5, 0.5, 0.5, 1.5, 1.5, 1.5]


def test_levels_follow_their_schedule_without_recompilation():
    config = one("<=", cyclic_level(1.0, 0.0, 4), dual=optax.sgd(1.0))
    step = jax.jit(lambda state: dcl_update(state, {"c": 1.0}, config))
    state = step(dcl_init(config))
    with count_compiles() as log:
        for _ in range(3):
            state = step(state)
    assert log.count == 0
    # The sum of 1 - eps over a period: 1 - eps is 0, then (1 - cos(pi t / 4)) / 2.
    np.testing.assert_allclose(
        state.multipliers["c"], sum((1 - np.cos(np.pi * t / 4)) / 2 for t in range(4)), rtol=1e-5
    )


def test_a_level_out_of_reach_is_reported_and_gives_way_at_a_price():
    config = one(">=", np.array([2.0, 0.5]), dual=optax.sgd(0.5), limit=4.0)
    state = dcl_init(config)
    step = jax.jit(lambda state: dcl_update(state, {"c": jnp.array([1.0, 1.0])}, config))
    for _ in range(10):
        state = step(state)
    assert dcl_unreachable(state, config)["c"].tolist() == [True, False]
    assert state.multipliers["c"].tolist() == [4.0, 0.0]
    # u = lam / a, where c = eps + u is met: lam = a (2 - 1).
    priced = one(">=", 2.0, dual=optax.sgd(0.5), price=3.0)
    lam, _, _ = follow(priced, np.full(60, 1.0), 0.0)
    np.testing.assert_allclose(lam[-1], 3.0, rtol=1e-4)
    assert not dcl_unreachable(dcl_init(priced), priced)["c"]


def test_state_is_float32_and_metrics_are_scalars():
    config = DclConfig({"a": Constraint("<=", 1.0), "b": Constraint(">=", 0.5, (3,))})
    values = {"a": np.full((), 1.5, jnp.bfloat16), "b": np.array([0.25, 1.0, 0.0], jnp.bfloat16)}

    @jax.jit
    def run(values):
        state = dcl_update(dcl_init(config), values, config)
        value = dcl_lagrangian(state, jnp.bfloat16(1.0), values, config)
        return state, value, dcl_metrics(state, values, config)

    state, value, found = run(values)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    assert value.dtype == jnp.float32
    assert {name: round(float(value), 4) for name, value in found.items()} == {
        "a_violation": 0.5, "a_multiplier": 0.025, "b_violation": 0.5, "b_multiplier": 0.025,
    }  # fmt: skip


def test_seeds_under_vmap():
    config = one("<=", 0.0, dual=optax.sgd(0.1))
    states = jax.jit(jax.vmap(lambda _: dcl_init(config)))(np.arange(3))
    run = jax.jit(jax.vmap(lambda s, v: dcl_update(s, {"c": v}, config)))
    states = run(states, np.array([1.0, 2.0, -1.0], np.float32))
    np.testing.assert_allclose(states.multipliers["c"], [0.1, 0.2, 0.0], rtol=1e-6)


def test_multipliers_are_in_the_checkpoint(tmp_path):
    config = DclConfig({"a": Constraint("<=", 0.1), "b": Constraint("<=", 0.1, (2,))})
    tx = optax.chain(dcl(config), optax.adam(0.1))
    params = {"w": jnp.ones(2)}

    @jax.jit
    def step(state, params):
        return tx.update(params, state, params, values={"a": params["w"].sum(), "b": params["w"]})

    _, state = step(tx.init(params), params)
    saved = Checkpoints(tmp_path, {"study": "dcl"})
    saved.save(1, state, {})
    saved.close()
    again = Checkpoints(tmp_path, {"study": "dcl"})
    _, restored, _ = again.restore(jax.eval_shape(lambda: state))
    again.close()
    for a, b in zip(*(jax.tree.leaves(step(s, params)) for s in (state, restored)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing_to_constrain_warns():
    with pytest.warns(NoEffectWarning, match="DCL changes nothing"):
        DclConfig({})


C = DclConfig({"entropy": Constraint(">=", 1.0), "risk": Constraint("<=", 0.1, (2,))})
GOOD = {"entropy": jnp.ones(()), "risk": jnp.ones(2)}
BAD = {
    "op": (lambda: Constraint("<", 1.0), "op='<' is not one of '<=', '>=', '=='"),
    "level": (lambda: Constraint("<=", float("nan")), "level=nan must be finite"),
    "level shape": (lambda: Constraint("<=", np.ones(3), (2,)), "level has shape (3,); give one number"),
    "scheduled level": (
        lambda: dcl_update(dcl_init(one("<=", lambda t: jnp.ones(2))), {"c": 1.0}, one("<=", lambda t: jnp.ones(2))),
        "level has shape (2,)",
    ),
    "not a constraint": (lambda: DclConfig({"entropy": 1.0}), "constraints['entropy']=1.0 must be a Constraint"),
    "limit": (lambda: DclConfig({}, limit=0.0), "limit=0.0 must be a number in (0, inf)"),
    "start": (lambda: DclConfig(C.constraints, start=60.0), "start=60.0 must be a number in [0, 50.0]"),
    "every": (lambda: DclConfig(C.constraints, every=0), "every=0 must be an integer in [1, inf)"),
    "no values": (lambda: dcl(C).update(GOOD, dcl_init(C)), "dcl needs the values of ['entropy', 'risk']"),
    "misspelled": (lambda: dcl_update(dcl_init(C), {**GOOD, "entropi": 1.0}, C), "Did you mean 'entropy'?"),
    "missing": (lambda: dcl_update(dcl_init(C), {"risk": jnp.ones(2)}, C), "values has no 'entropy'"),
    "shape": (
        lambda: dcl_update(dcl_init(C), {**GOOD, "risk": jnp.ones((2, 1))}, C),
        "values['risk'] has shape (2, 1); expected (2,)",
    ),
    "present": (
        lambda: dcl_update(dcl_init(C), GOOD, C, present={"risk": jnp.ones(2)}),
        "present['risk'] is float32; give bools",
    ),
    "state": (lambda: dcl_update(optax.adam(1.0).init(1.0), GOOD, C), "must be the DclState of dcl_init"),
    "no state": (lambda: dcl_lagrangian(optax.adam(1.0).init(1.0), 0.0, GOOD, C), "holds 0 DclState"),
    "nu": (lambda: scale_by_nupi(nu=1.0), "nu=1.0 must be a number in (-1, 1)"),
    "period": (lambda: cyclic_level(1.0, 0.5, 0), "period=0 must be an integer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    run, words = BAD[case]
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        run()


def test_a_value_that_is_not_finite_shows():
    state = dcl_update(dcl_init(C), {**GOOD, "entropy": jnp.nan}, C)
    assert isinstance(state, DclState)
    assert not bool(jnp.isfinite(state.multipliers["entropy"]))
    assert bool(jnp.isfinite(state.multipliers["risk"]).all())
