"""What every optimizer must satisfy, whatever it computes."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optimizer_cases import CASES, REFUSALS, parameters, quadratic, stepper

from effjax.core.cost import count_compiles

DTYPES = (jnp.float32, jnp.bfloat16)


@pytest.fixture(params=CASES)
def name(request):
    return request.param


@functools.cache
def begin(name, dtype=jnp.float32):
    return begin_with(name, CASES[name].make(), dtype)


def begin_with(name, tx, dtype=jnp.float32):
    case = CASES[name]
    params = case.start(parameters(dtype))
    return case, params, tx.init(params), jax.jit(stepper(case, tx))


def kinds(tree):
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)


def assert_equal(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_refused(name, combination, run):
    """The row of ``REFUSALS`` decides between an error with its words and a run that works."""
    reason = REFUSALS.get((name, combination))
    if reason is None:
        return run()
    with pytest.raises(ValueError, match=reason):
        run()
    return None


def test_refusals_name_cases_and_combinations():
    combinations = {"multi_steps", "inject_hyperparams", "partition", "masked", "vmap"}
    assert {case for case, _ in REFUSALS} <= set(CASES)
    assert {combination for _, combination in REFUSALS} <= combinations


@pytest.mark.once
def test_unknown_keywords_are_ignored(name):
    _, params, state, step = begin(name)
    assert_equal(step(params, state), step(params, state, unheard_of=jnp.ones(())))


def test_second_call_does_not_compile(name):
    _, params, state, step = begin_with(name, CASES[name].make())
    params, state, _ = jax.block_until_ready(step(params, state))
    with count_compiles() as log:
        for _ in range(6):
            params, state, _ = step(params, state)
    assert log.count == 0, log.names


def test_converges_in_one_scan(name):
    case, params, state, step = begin(name)

    def body(carry, _):
        params, state, _ = step(*carry)
        return (params, state), None

    (params, state), _ = jax.lax.scan(body, (params, state), length=150)
    start = quadratic(parameters())
    assert quadratic(case.evaluate(state, params)) < 0.01 * start


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_are_stable(name, dtype):
    _, params, state, step = begin(name, dtype)
    before = kinds((params, state))
    for _ in range(6):
        params, state, updates = step(params, state)
        assert kinds(updates) == kinds(params)
        assert kinds((params, state)) == before
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(params))


def test_bfloat16_stays_near_float32(name):
    case = CASES[name]
    ends = []
    for dtype in DTYPES:
        _, params, state, step = begin(name, dtype)
        for _ in range(60):
            params, state, _ = step(params, state)
        ends.append(float(quadratic(case.evaluate(state, params))))
    assert abs(ends[0] - ends[1]) < 0.03 * float(quadratic(parameters()))


def test_init_traces_and_tells_the_truth(name):
    case = CASES[name]
    tx, params = case.make(), case.start(parameters())
    assert kinds(jax.eval_shape(tx.init, params)) == kinds(tx.init(params))


@pytest.mark.once
def test_buffers_may_be_donated(name):
    case, params, state, step = begin(name)
    donating = jax.jit(stepper(case, case.make()), donate_argnums=(0, 1))
    kept = params, state
    # The state may not hold the very buffers of the parameters, or one buffer twice.
    params, state = jax.tree.map(jnp.copy, params), case.make().init(jax.tree.map(jnp.copy, params))
    for _ in range(6):
        params, state, _ = donating(params, state)
        *kept, _ = step(*kept)
    assert_equal((params, state), tuple(kept))


def test_map_params_reaches_what_is_shaped_like_the_parameters(name):
    case, params, state, _ = begin(name)
    seen = []
    mapped = optax.tree.map_params(case.make(), lambda leaf: seen.append(leaf.shape) or leaf, state)
    assert kinds(mapped) == kinds(state)
    # Moments and buffers come by whole copies of the parameter tree.
    assert not seen or len(seen) % len(jax.tree.leaves(params)) == 0


def test_learning_rate_can_be_read(name):
    case, params, state, step = begin(name)
    _, state, _ = step(params, state)
    rate = optax.tree.get(state, "learning_rate")
    assert (rate is not None) == case.learning_rate
    assert rate is None or (rate.shape == () and rate.dtype == jnp.float32 and rate > 0)


# Both Pythons resolve to one Optax, so that one of them is enough for its wrappers.
@pytest.mark.once
def test_inside_multi_steps(name):
    case = CASES[name]

    def run():
        tx = optax.MultiSteps(case.make(), every_k_schedule=2)
        _, params, state, step = begin_with(name, tx)
        _, plain, plain_state, plain_step = begin(name)
        for t in range(12):
            params, state, _ = step(params, state)
            if t % 2:
                plain, plain_state, _ = plain_step(plain, plain_state)
        # The accumulated gradient of a constant batch is the gradient.
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    assert_refused(name, "multi_steps", run)


def inject(case, keyword, value):
    """``optax.inject_hyperparams`` reads a signature, which the cases' factories do not show."""

    def factory(**given):
        return case.make(**given)

    parameter = inspect.Parameter(keyword, inspect.Parameter.KEYWORD_ONLY)
    factory.__signature__ = inspect.Signature([parameter])
    return optax.inject_hyperparams(factory)(**{keyword: value})


@pytest.mark.once
def test_inside_inject_hyperparams(name):
    case = CASES[name]
    keyword, value = case.injected

    def run():
        makes = (lambda: case.make(**{keyword: value})), (lambda: inject(case, keyword, value))
        ends = []
        for make in makes:
            _, params, state, step = begin_with(name, make())
            for _ in range(8):
                params, state, _ = step(params, state)
            ends.append(params)
        for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    assert_refused(name, "inject_hyperparams", run)


def every_second(params):
    structure = jax.tree.structure(params)
    return jax.tree.unflatten(structure, [bool(i % 2) for i in range(structure.num_leaves)])


@pytest.mark.once
def test_inside_partition(name):
    case = CASES[name]

    def run():
        labels = lambda params: jax.tree.map({True: "ours", False: "other"}.get, every_second(params))
        tx = optax.partition({"ours": case.make(), "other": optax.sgd(0.1)}, labels)
        _, params, state, step = begin_with(name, tx)
        step(params, state)

    assert_refused(name, "partition", run)


@pytest.mark.once
def test_inside_masked(name):
    case = CASES[name]

    def run():
        _, params, state, step = begin_with(name, optax.masked(case.make(), every_second))
        step(params, state)

    assert_refused(name, "masked", run)


def test_under_vmap(name):
    case = CASES[name]

    def run():
        tx, alone = case.make(), begin(name)[-1]
        step = jax.jit(jax.vmap(stepper(case, tx)))
        starts = [jax.tree.map(lambda p, s=s: p + s, parameters()) for s in (0.0, 0.5)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(case.start, starts))
        states = jax.vmap(tx.init)(stacked)
        for _ in range(6):
            stacked, states, _ = step(stacked, states)
        for i, start in enumerate(starts):
            params = case.start(start)
            state = tx.init(params)
            for _ in range(6):
                params, state, _ = alone(params, state)
            for a, b in zip(jax.tree.leaves(stacked), jax.tree.leaves(params), strict=True):
                np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5)

    assert_refused(name, "vmap", run)


def test_shardings_are_stable_on_an_explicit_mesh(name):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Explicit,))
    case, alone, state, step = begin(name)
    spread = lambda p: jax.device_put(p, NamedSharding(mesh, P(*["model" if n == 8 else None for n in p.shape])))
    sharded = jax.tree.map(spread, alone)
    for _ in range(6):
        alone, state, _ = step(alone, state)
    with jax.set_mesh(mesh):
        tx = case.make()
        step, state = jax.jit(stepper(case, tx)), jax.jit(tx.init)(sharded)
        types = jax.tree.map(jax.typeof, (sharded, state))
        for _ in range(6):
            sharded, state, updates = step(sharded, state)
            assert jax.tree.map(jax.typeof, (sharded, state)) == types
            assert jax.tree.map(jax.typeof, updates) == types[0]
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(sharded), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)
