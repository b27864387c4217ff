"""Dispatchers inside a program: equal to the masked program on served rows, and cheaper."""

import functools
import re
from pathlib import Path

import flax.linen as nn
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from effjax.core.macs import count_macs
from effjax.hardness.dispatch import (
    dispatch_buckets,
    dispatch_capacity,
    dispatch_masked,
    expert_capacity,
    request_slots,
)

REFERENCE = Path(__file__).parents[1] / "reference" / "hybrid_models"
ROWS, WIDTH, CLASSES = 16, 5, 4
KERNEL, X, BASE = (
    np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    for seed, shape in enumerate(((WIDTH, CLASSES), (ROWS, WIDTH), (ROWS, CLASSES)))
)
EVERY = {
    "capacity": functools.partial(dispatch_capacity, capacity=ROWS),
    "buckets": functools.partial(dispatch_buckets, buckets=(2, 4, 8)),
    "masked": dispatch_masked,
}


def expert(params, x):
    return x @ params


# One program for each form and set of shapes.
RUN = {name: jax.jit(functools.partial(run, expert)) for name, run in EVERY.items()}
slots_of = jax.jit(request_slots, static_argnames="capacity")


def asking(count, seed=0):
    request = np.zeros(ROWS, bool)
    request[np.random.default_rng(seed).permutation(ROWS)[:count]] = True
    return request


def expected(request, x=X, base=BASE):
    """NumPy, row by row."""
    return np.where(request[:, None], x @ KERNEL, base)


@pytest.mark.parametrize("case", range(5))
def test_parity_of_capacity(case):
    stored, own = np.load(REFERENCE / "dispatch.npz"), f"c{case}_"
    ref = {name.removeprefix(own): stored[name] for name in stored if name.startswith(own)}
    with jax.enable_x64(True):
        score = ref["score"] if ref["policy"] == "score" else None
        arrays = [ref[name] for name in ("expert_W", "x", "base_logits", "request")]
        run = jax.jit(functools.partial(dispatch_capacity, expert, capacity=int(ref["capacity"])))
        found = run(*arrays, score=score)
        slots = slots_of(arrays[3], score, capacity=int(ref["capacity"]))
        np.testing.assert_array_equal(slots, ref["slot_to_row"])
        np.testing.assert_array_equal(found.served, ref["served"])
        np.testing.assert_allclose(found.outputs, ref["out"], rtol=1e-9)
        assert np.sum(found.overflowed) == ref["overflow"]
        assert not np.any(found.failed)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("count", [0, 1, 5, ROWS])
def test_served_rows_are_the_experts_and_the_others_keep_their_bits(name, count):
    request = asking(count)
    found = jax.device_get(RUN[name](KERNEL, X, BASE, request))
    np.testing.assert_allclose(found.outputs, expected(request), rtol=1e-5)
    np.testing.assert_array_equal(found.served, request)
    np.testing.assert_array_equal(found.outputs[~request], BASE[~request])
    assert not (found.overflowed | found.failed).any()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.booleans(), min_size=ROWS, max_size=ROWS), st.integers(0, 10**6))
def test_capacity_by_score_serves_the_neediest_whatever_the_order(asks, seed):
    rng = np.random.default_rng(seed)
    request, score = np.array(asks), rng.permutation(ROWS).astype(np.float32)
    found = jax.device_get(_by_score(request, score, X, BASE))
    wanted = sorted(np.flatnonzero(request), key=lambda row: -score[row])[:6]
    assert np.flatnonzero(found.served).tolist() == sorted(wanted)
    assert found.overflowed.sum() == max(0, request.sum() - 6)
    order = rng.permutation(ROWS)
    again = _by_score(request[order], score[order], X[order], BASE[order])
    np.testing.assert_array_equal(again.outputs, found.outputs[order])


@jax.jit
def _by_score(request, score, x, base):
    return dispatch_capacity(expert, KERNEL, x, base, request, capacity=6, score=score)


def test_a_score_that_is_nan_goes_first_and_ties_go_to_the_first_row():
    score = np.array([1.0, 1.0, np.nan, 1.0], np.float32)
    assert slots_of(np.ones(4, bool), score, capacity=3).tolist() == [0, 1, 2]
    assert slots_of(np.ones(2, bool), capacity=5).tolist() == [0, 1, 2, 2, 2]
    low = np.array([-np.inf, -np.inf, 5.0], np.float32)
    assert slots_of(np.array([False, True, False]), low, capacity=2).tolist() == [1, 3]


@pytest.mark.parametrize("name", EVERY)
def test_answers_that_are_nan_leave_the_base_and_are_counted(name):
    request = asking(6)
    bad = int(np.flatnonzero(request)[2])
    broken = lambda params, x: jnp.where(x[:, :1] == X[bad, 0], jnp.nan, x @ params)
    found = jax.device_get(jax.jit(functools.partial(EVERY[name], broken))(KERNEL, X, BASE, request))
    assert np.flatnonzero(found.failed).tolist() == [bad]
    np.testing.assert_array_equal(found.outputs[bad], BASE[bad])
    assert int(found.served.sum()) == 5
    assert not found.served[bad]


@pytest.mark.parametrize("name", EVERY)
def test_gradients_reach_the_expert_by_served_rows_alone(name):
    request = asking(5)
    loss = lambda params, base: jnp.sum(EVERY[name](expert, params, X, base, request).outputs ** 2)
    grads = jax.jit(jax.grad(loss, (0, 1)))(KERNEL, BASE)
    rows = X[request]
    np.testing.assert_allclose(grads[0], 2 * rows.T @ (rows @ KERNEL), rtol=1e-4)
    np.testing.assert_allclose(grads[1], np.where(request[:, None], 0, 2 * BASE), rtol=1e-5)


def test_vmap_of_capacity_and_its_refusal_for_buckets():
    many = np.stack([asking(3, seed) for seed in range(4)])
    run = lambda request, name: EVERY[name](expert, KERNEL, X, BASE, request).outputs
    found = jax.jit(jax.vmap(functools.partial(run, name="capacity")))(many)
    np.testing.assert_allclose(found, np.stack([expected(row) for row in many]), rtol=1e-5)
    with pytest.raises(ValueError, match="under vmap over 4 would run every bucket"):
        jax.jit(jax.vmap(functools.partial(run, name="buckets")))(many)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("name", EVERY)
def test_batch_of_one_and_empty_batch(name, rows):
    found = RUN[name](KERNEL, X[:rows], BASE[:rows], np.ones(rows, bool))
    np.testing.assert_allclose(found.outputs, (X @ KERNEL)[:rows], rtol=1e-5)
    assert found.served.tolist() == [True] * rows


def test_dtypes_hold_both_models():
    half = BASE.astype(jnp.bfloat16)
    for name, run in RUN.items():
        for count in (0, 4):
            found = run(KERNEL, X, half, asking(count))
            assert found.outputs.dtype == jnp.float32, name
            kept = ~asking(count)
            np.testing.assert_array_equal(np.asarray(found.outputs)[kept], half[kept].astype(np.float32))


def test_trees_of_inputs_and_outputs():
    pair = lambda params, x: {"logits": x["ids"] @ params, "best": (x["ids"] @ params).argmax(-1)}
    base = {"logits": BASE, "best": BASE.argmax(-1).astype(np.int32)}
    request = asking(5)
    run = jax.jit(functools.partial(dispatch_buckets, pair, buckets=(8,)))
    found = run(KERNEL, {"ids": X, "mask": X > 0}, base, request)
    np.testing.assert_array_equal(found.outputs["best"], expected(request).argmax(-1))


def test_linen_nnx_and_equinox_experts():
    import equinox as eqx

    request, wanted = asking(5), expected(asking(5))
    linen = nn.Dense(CLASSES, use_bias=False)
    graph, state = nnx.split(nnx.Linear(WIDTH, CLASSES, use_bias=False, rngs=nnx.Rngs(0)))
    state["kernel"] = state["kernel"].replace(jnp.asarray(KERNEL))
    own = eqx.nn.Linear(WIDTH, CLASSES, use_bias=False, key=jax.random.key(0))
    arrays, static = eqx.partition(eqx.tree_at(lambda one: one.weight, own, jnp.asarray(KERNEL.T)), eqx.is_array)
    pairs = (
        (linen.apply, {"params": {"kernel": KERNEL}}),
        (lambda state, x: nnx.merge(graph, state)(x), state),
        (lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x), arrays),
    )
    for apply, params in pairs:
        every = jax.jit(lambda params, apply=apply: [run(apply, params, X, BASE, request) for run in EVERY.values()])
        for found in every(params):
            np.testing.assert_allclose(found.outputs, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_rows_stay_on_their_devices(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    request = asking(6)
    with jax.set_mesh(mesh):
        x, base, asks = (jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (X, BASE, request))
        for run in (
            functools.partial(dispatch_capacity, capacity=ROWS, mesh=mesh),
            functools.partial(dispatch_buckets, buckets=(1, 2), mesh=mesh),
        ):
            step = jax.jit(functools.partial(run, expert)).lower(KERNEL, x, base, asks).compile()
            found = step(KERNEL, x, base, asks)
            np.testing.assert_allclose(found.outputs, expected(request), rtol=1e-5)
            assert found.outputs.sharding.spec[0] == "data"
            text = step.as_text()
            assert not re.search(r"all-gather|all-to-all|collective-permute", text)
        own = jax.jit(functools.partial(dispatch_capacity, expert, capacity=4, mesh=mesh))(KERNEL, x, base, asks)
        by_device = request.reshape(4, -1).sum(1)
        assert np.sum(own.served) == np.minimum(by_device, 1).sum()
        with pytest.raises(ValueError, match="capacity=6 does not divide among the 4 devices"):
            dispatch_capacity(expert, KERNEL, x, base, asks, capacity=6, mesh=mesh)
        with pytest.raises(ValueError, match="15 rows do not divide"):
            dispatch_buckets(expert, KERNEL, X[:15], BASE[:15], request[:15], buckets=(2,), mesh=mesh)
        with pytest.raises(ValueError, match="axis='rows' is not one of the mesh's axes"):
            dispatch_capacity(expert, KERNEL, x, base, asks, capacity=8, mesh=mesh, axis="rows")


def test_multiply_adds_are_those_of_the_bucket():
    one = WIDTH * CLASSES
    shapes = KERNEL, X, BASE, asking(3)
    count = lambda run: count_macs(functools.partial(run, expert), *shapes)
    assert count(dispatch_masked).most == ROWS * one
    assert count(functools.partial(dispatch_capacity, capacity=4)).most == 4 * one
    buckets = count(EVERY["buckets"])
    assert (buckets.least, buckets.most) == (0, ROWS * one)


def test_capacity_bounds_the_overflow():
    rng = np.random.default_rng(0)
    asked = rng.binomial(256, 0.3, 20_000)
    assert (asked > expert_capacity(256, 0.3)).mean() < 0.002
    assert expert_capacity(256, 0.3, deviations=2.6) == 96
    assert (expert_capacity(4, 0.0), expert_capacity(4, 1.0), expert_capacity(1, 0.5)) == (4, 4, 1)


BAD = [
    (lambda: dispatch_capacity(expert, KERNEL, X, BASE, asking(2), capacity=0), "capacity=0 must be an integer in"),
    (lambda: dispatch_capacity(expert, KERNEL, X, BASE, asking(2)[:, None], capacity=2), r"request is bool\[16, 1\]"),
    (
        lambda: dispatch_masked(expert, KERNEL, X, BASE, np.ones(ROWS, np.float32)),
        r"request is float32\[16\]; bool \[rows\]",
    ),
    (lambda: dispatch_masked(expert, KERNEL, X[:3], BASE, asking(2)), r"inputs has shape \(3, 5\), but request has 16"),
    (lambda: dispatch_masked(expert, KERNEL, X, {"a": BASE[:3]}, asking(2)), r"outputs\['a'\] has shape \(3, 4\)"),
    (lambda: dispatch_masked(expert, KERNEL, {}, BASE, asking(2)), "inputs={} holds no array"),
    (lambda: dispatch_buckets(expert, KERNEL, X, BASE, asking(2), buckets=(4, 2)), r"buckets=\(4, 2\)"),
    (
        lambda: dispatch_capacity(expert, KERNEL, X, BASE, asking(2), capacity=2, score=np.ones(3, np.float32)),
        r"score has shape \(3,\)",
    ),
    (
        lambda: dispatch_capacity(lambda p, x: x, KERNEL, X, BASE, asking(2), capacity=2),
        r"the expert answers 2 rows with float32\[2, 5\]; the base model's answers ask for float32\[2, 4\]",
    ),
    (
        lambda: dispatch_buckets(lambda p, x: (x @ p).argmax(-1), KERNEL, X, BASE, asking(2), buckets=(2,)),
        "Give both models the same outputs",
    ),
    (lambda: expert_capacity(16, 1.5), "share=1.5"),
]


@pytest.mark.parametrize(("call", "text"), BAD)
def test_bad_input_is_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()
