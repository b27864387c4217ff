"""Chunks and unrolling change nothing but cost, and `fastest_unroll` chooses by measuring."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import timing
from effjax.core.errors import NoEffectWarning
from effjax.core.time_scan import fastest_unroll, scan_time

XS = np.random.default_rng(0).normal(size=(11, 3)).astype(np.float32)
KERNEL = np.random.default_rng(1).normal(size=(3, 3)).astype(np.float32)


def cell(kernel, h, x):
    h = jnp.tanh(h["h"] @ kernel + x["x"])
    return {"h": h}, (h, jnp.sum(h))


def run(kernel, h, xs, **options):
    return scan_time(cell, kernel, {"h": h}, {"x": xs}, **options)


def by_hand(kernel, h, xs):
    states = []
    for x in xs:
        h = jnp.tanh(h @ kernel + x)
        states.append(h)
    return {"h": h}, (jnp.stack(states), jnp.stack([jnp.sum(h) for h in states]))


def value_and_gradients(function):
    """In float64: what the function returns, and the gradients of its sum of sines."""

    def total(*args):
        value = function(*args)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(value)), value

    with jax.enable_x64(True):
        args = [jnp.asarray(arg, jnp.float64) for arg in (KERNEL, XS[0], XS)]
        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*args)


@functools.cache
def expected():
    return value_and_gradients(by_hand)


@pytest.mark.parametrize(
    "options", [{}, {"unroll": 4}, {"unroll": 20}, {"chunk": 1}, {"chunk": 4}, {"chunk": 10, "unroll": 3}], ids=str
)
def test_states_and_gradients_are_those_of_a_python_loop(options):
    got = value_and_gradients(functools.partial(run, **options))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12), got, expected())


def temporary_bytes(length, chunk):
    loss = lambda kernel, xs: jnp.sum(run(kernel, jnp.zeros((64, 3)), xs, chunk=chunk)[0]["h"])
    avals = jax.ShapeDtypeStruct((3, 3), jnp.float32), jax.ShapeDtypeStruct((length, 64, 3), jnp.float32)
    return jax.jit(jax.grad(loss)).lower(*avals).compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_root_of_the_length():
    assert temporary_bytes(900, 30) < 0.2 * temporary_bytes(900, None)
    assert temporary_bytes(900, 30) < 3 * temporary_bytes(100, 10)


def test_bad_input():
    for option in ({"unroll": 0}, {"chunk": 0}, {"chunk": -3}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}={next(iter(option.values()))}"):
            run(KERNEL, XS[0], XS, **option)
    with pytest.raises(TypeError, match="unroll=True"):
        run(KERNEL, XS[0], XS, unroll=True)
    with pytest.raises(ValueError, match="0 time steps"):
        run(KERNEL, XS[0], XS[:0])


@pytest.mark.parametrize("chunk", [11, 12])
def test_a_chunk_that_saves_nothing_warns(chunk):
    with pytest.warns(NoEffectWarning, match=f"chunk={chunk} is not below the 11 steps.*such as 3"):
        run(KERNEL, XS[0], XS, chunk=chunk)


def scan(unroll):
    return lambda kernel, xs: run(kernel, xs[0], xs, unroll=unroll)[0]


def test_the_fastest_is_chosen(monkeypatch):
    seconds, names = (3.0, 1.0, 2.0), {}  # in the order in which they are measured

    def clock(thunk, calls):
        return calls * seconds[names.setdefault(thunk, min(len(names), 2))]

    monkeypatch.setattr(timing, "_time_thunk", clock)
    monkeypatch.setattr(timing, "_HOPELESS", 10.0)
    assert fastest_unroll(scan, KERNEL, XS, candidates=(1, 2, 8)) == 2


def test_it_measures_what_it_is_given_on_zeros_of_the_shapes(monkeypatch):
    asked, seen = [], []

    def fn(unroll):
        asked.append(unroll)
        return scan(unroll)

    def clock(thunk, calls):
        seen.append(jax.tree.map(lambda leaf: (leaf.shape, float(jnp.abs(leaf).max())), thunk.args))
        thunk()
        return 1.0

    monkeypatch.setattr(timing, "_time_thunk", clock)
    assert fastest_unroll(fn, jax.ShapeDtypeStruct((3, 3), jnp.float32), XS, candidates=(2, 5)) == 2
    assert asked == [2, 5]
    assert all(arguments == (((3, 3), 0.0), ((11, 3), 0.0)) for arguments in seen)


def test_it_may_be_asked_inside_jit():
    @jax.jit
    def step(kernel, xs):
        return scan(fastest_unroll(scan, kernel, xs, candidates=(1, 2)))(kernel, xs)["h"]

    np.testing.assert_allclose(step(KERNEL, XS), run(KERNEL, XS[0], XS)[0]["h"], rtol=1e-5)


def test_bad_candidates_and_closures_are_refused():
    with pytest.raises(ValueError, match="candidates is empty"):
        fastest_unroll(scan, KERNEL, XS, candidates=())
    with pytest.raises(ValueError, match=r"candidates\[1\]=0"):
        fastest_unroll(scan, KERNEL, XS, candidates=(1, 0))
    closed = jax.jit(lambda kernel: fastest_unroll(lambda unroll: lambda xs: scan(unroll)(kernel, xs), XS))
    with pytest.raises(ValueError, match="or name the unroll"):
        closed(KERNEL)
