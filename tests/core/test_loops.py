"""The loop forms agree, and `auto` picks one by measuring."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import loops, timing
from effjax.core.cost import count_compiles
from effjax.core.loops import fastest_loop, stacked_map

X = jnp.arange(12.0).reshape(3, 4)


def scale(x, factor):
    return {"y": jnp.sin(x["x"]) * factor, "n": x["n"] + 1}


@pytest.mark.parametrize("loop", ["auto", "vmap", "map", "unroll"])
@pytest.mark.parametrize("jitted", [False, True])
def test_forms_agree(loop, jitted):
    def run(x, n, factor):
        return stacked_map(scale, {"x": x, "n": n}, factor, size=3, loop=loop)

    out = (jax.jit(run) if jitted else run)(X, jnp.arange(3), 2.0)
    np.testing.assert_allclose(out["y"], 2 * np.sin(X), rtol=1e-6)
    assert out["n"].tolist() == [1, 2, 3]
    assert out["n"].dtype == jnp.int32


def test_keys_may_be_stacked():
    keys = jax.random.split(jax.random.key(0), 3)
    expected = jax.vmap(jax.random.normal)(keys)
    for loop in loops.LOOPS:
        np.testing.assert_array_equal(stacked_map(jax.random.normal, keys, size=3, loop=loop), expected)


@pytest.mark.parametrize("slow", ["vmap", "map", "unroll"])
def test_a_slow_form_is_not_taken_and_soon_dropped(slow, monkeypatch):
    runs = dict.fromkeys(loops._FORMS, 0)
    thunks = {}  # in the order in which the forms are measured

    def clock(thunk, calls):
        name = thunks.setdefault(thunk, [*runs][min(len(thunks), 2)])
        runs[name] += calls
        return 10.0 if name == slow else 1.0

    monkeypatch.setattr(timing, "_time_thunk", clock)
    choice = fastest_loop(lambda x: jnp.sin(x), jax.ShapeDtypeStruct((3, 4), jnp.float32), size=3)
    assert choice != slow
    # The first form measured has no rival yet and stays in the race.
    assert runs[slow] == 1 or slow == next(iter(loops._FORMS))


def test_the_answer_is_kept_per_function_and_shapes():
    def fn(x):
        return jnp.cos(x)

    aval = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    first = fastest_loop(fn, aval, size=3)
    with count_compiles() as log:
        assert fastest_loop(fn, aval, size=3) == first
    assert log.count == 0
    fastest_loop(fn, jax.ShapeDtypeStruct((3, 5), jnp.float32), size=3)
    assert len(loops._chosen[fn]) == 2
    known = len(loops._chosen)
    del fn
    gc.collect()
    jax.clear_caches()
    gc.collect()
    assert len(loops._chosen) <= known


def test_one_slice_needs_no_loop():
    with count_compiles() as log:
        assert fastest_loop(jnp.sin, jax.ShapeDtypeStruct((1, 4), jnp.float32), size=1) == "unroll"
    assert log.count == 0


def test_functions_without_hash_are_measured_every_time():
    class Unhashable:
        __hash__ = None

        def __call__(self, x):
            return x

    assert fastest_loop(Unhashable(), jax.ShapeDtypeStruct((2, 4), jnp.float32), size=2) in loops.LOOPS


def test_closures_over_traced_values_are_refused_with_the_way_out():
    @jax.jit
    def run(x, factor):
        return stacked_map(lambda row: row * factor, x, size=3)

    with pytest.raises(ValueError, match="Pass them as arguments, or name the loop"):
        run(X, jnp.float32(2.0))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="loop='scan' is not one of"):
        stacked_map(jnp.sin, X, size=3, loop="scan")
    with pytest.raises(ValueError, match=r"stacked\['x'\] has shape \(3, 4\), but its leading axis must be size=2"):
        stacked_map(jnp.sin, {"x": X}, size=2)
    with pytest.raises(ValueError, match="size=0"):
        fastest_loop(jnp.sin, X, size=0)
