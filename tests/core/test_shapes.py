"""Ladders of static shapes: coverage, monotonicity, and optimality against brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.core.errors import NoEffectWarning
from effjax.core.shapes import check_ladder, fit_ladder, ladder, pad_to, smallest_fit


def padded_total(lengths, rungs):
    return sum(smallest_fit(length, rungs) for length in lengths)


@given(st.integers(1, 300), st.integers(0, 2000), st.floats(1.05, 4), st.integers(1, 32))
def test_ladder_covers_the_range_in_growing_multiples(low, extra, growth, multiple):
    rungs = ladder(low, low + extra, growth=growth, multiple=multiple)
    assert rungs[0] - multiple < low <= rungs[0]
    assert rungs[-1] - multiple < low + extra <= rungs[-1]
    assert all(rung % multiple == 0 for rung in rungs)
    for small, large in itertools.pairwise(rungs):
        assert small < large <= growth * small + multiple + 1
    assert check_ladder(rungs) == rungs


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"low": 0, "high": 3}, r"low=0 must be an integer in \[1, inf\)"),
        ({"low": 4, "high": 3}, r"high=3 must be an integer in \[4, inf\)"),
        ({"low": 1, "high": 3, "growth": 1.0}, r"growth=1\.0 must be a number in \(1, inf\)"),
        ({"low": 1, "high": 3, "multiple": 0}, r"multiple=0"),
    ],
)
def test_ladder_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ladder(**kwargs)


@given(st.integers(0, 64), st.sets(st.integers(1, 64), min_size=1))
def test_smallest_fit_is_the_least_rung_above(size, rungs):
    rungs = sorted([*rungs, 64]) if 64 not in rungs else sorted(rungs)
    assert smallest_fit(size, rungs) == min(rung for rung in rungs if rung >= size)


def test_smallest_fit_says_what_is_too_long():
    with pytest.raises(ValueError, match=r"size=70 exceeds the top rung 64 of buckets=\(8, 64\)\. Add a rung or trunc"):
        smallest_fit(70, (8, 64), argument="buckets")
    with pytest.raises(ValueError, match="size=1 exceeds an empty ladder"):
        smallest_fit(1, ())
    with pytest.raises(TypeError, match=r"size=1\.5 must be an integer"):
        smallest_fit(1.5, (8,))


def test_check_ladder_warns_of_idle_rungs_with_counts():
    with pytest.warns(NoEffectWarning, match=r"longest size in the data is 9, so 2 of the 4 rungs are never used: \(3"):
        check_ladder((8, 16, 32, 64), 9)
    assert check_ladder([8, np.int32(16)], 16) == (8, 16)
    for wrong in ((), (8, 8), (16, 8)):
        with pytest.raises(ValueError, match="must hold at least one size and increase"):
            check_ladder(wrong)
    with pytest.raises(ValueError, match=r"buckets\[0\]=0"):
        check_ladder((0, 8), argument="buckets")
    with pytest.raises(ValueError, match="size=17 exceeds the top rung 16"):
        check_ladder((8, 16), 17)


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 5))
@pytest.mark.filterwarnings("ignore::effjax.core.errors.NoEffectWarning")
def test_fit_ladder_is_optimal(lengths, count, multiple):
    rungs = fit_ladder(lengths, count, multiple=multiple)
    assert len(rungs) <= count
    assert check_ladder(rungs, max(lengths)) == rungs
    assert all(rung % multiple == 0 for rung in rungs)
    sizes = range(multiple, rungs[-1], multiple)
    candidates = ([*lower, rungs[-1]] for n in range(count) for lower in itertools.combinations(sizes, n))
    assert padded_total(lengths, rungs) == min(padded_total(lengths, candidate) for candidate in candidates)


def test_fit_ladder_beats_doubling_on_skewed_lengths():
    lengths = np.random.default_rng(0).gamma(2.0, 30.0, 5000).astype(int) + 1
    doubling = ladder(8, int(lengths.max()))
    fitted = fit_ladder(lengths, len(doubling))
    assert padded_total(lengths, fitted) < 0.9 * padded_total(lengths, doubling)


def test_fit_ladder_warns_when_the_budget_is_too_large_and_refuses_bad_lengths():
    with pytest.warns(NoEffectWarning, match="count=8, but the lengths fill only 2 multiples of 8"):
        assert fit_ladder([3, 9], 8) == (8, 16)
    for wrong in ([], [-1], [1.5]):
        with pytest.raises(ValueError, match="lengths must be integers of 0 or more, at least one"):
            fit_ladder(wrong, 2)
    with pytest.raises(ValueError, match="count=0"):
        fit_ladder([1], 0)


@pytest.mark.parametrize("array", [np.arange(6).reshape(2, 3), jnp.arange(6).reshape(2, 3)])
def test_pad_to_keeps_kind_dtype_and_content(array):
    out = pad_to(array, 5, axis=-1, value=-1)
    assert type(out) is type(array)
    assert out.dtype == array.dtype
    np.testing.assert_array_equal(out, [[0, 1, 2, -1, -1], [3, 4, 5, -1, -1]])
    assert pad_to(array, 2) is array
    assert jax.jit(lambda x: pad_to(x, 4))(array).shape == (4, 3)


def test_pad_to_refuses_to_cut():
    with pytest.raises(ValueError, match=r"size=2 is below the length 3 of axis 1; padding never cuts"):
        pad_to(np.ones((2, 3)), 2, axis=1)
    with pytest.raises(ValueError, match=r"axis=2 does not exist in an array of shape \(2, 3\)"):
        pad_to(np.ones((2, 3)), 2, axis=2)
