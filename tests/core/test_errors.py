"""Argument checks: what is refused, and that the message tells the way out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core.errors import check_choice, check_number, near


def test_near_names_close_matches_only():
    assert near("learning_rat", ["learning_rate", "steps"]) == " Did you mean 'learning_rate'?"
    assert near("zzz", ["learning_rate", "steps"]) == ""


def test_check_choice():
    assert check_choice("loop", "map", ("vmap", "map")) == "map"
    with pytest.raises(ValueError, match=r"loop='vmpa' is not one of 'vmap', 'map'\. Did you mean 'vmap'"):
        check_choice("loop", "vmpa", ("vmap", "map"))


@pytest.mark.parametrize("value", [0, 0.5, 1, np.float32(0.5), np.int64(1), jnp.float32(0.5), jnp.bfloat16(0.5)])
def test_check_number_returns_the_value_unchanged(value):
    assert check_number("rate", value, low=0, high=1) is value


@pytest.mark.parametrize(
    ("value", "limits", "interval"),
    [
        (-1, {"low": 0}, r"\[0, inf\)"),
        (0, {"low": 0, "open_low": True}, r"\(0, inf\)"),
        (1.0, {"high": 1, "open_high": True}, r"\(-inf, 1\)"),
        (2_000_000, {"low": 1, "high": 1_000_000}, r"\[1, 1000000\]"),
        (float("nan"), {}, r"\(-inf, inf\)"),
        (float("inf"), {}, r"\(-inf, inf\)"),
    ],
)
def test_check_number_names_the_interval(value, limits, interval):
    with pytest.raises(ValueError, match=rf"rate={value} must be a number in {interval}\. Lower it\."):
        check_number("rate", value, hint="Lower it.", **limits)


@pytest.mark.parametrize("value", [True, np.bool_(True), "1", None, np.ones(3), jax.random.key(0)])
def test_check_number_refuses_other_types(value):
    with pytest.raises(TypeError, match=r"(?s)rate=.* must be a number, not"):
        check_number("rate", value)


@pytest.mark.parametrize("value", [1.0, np.float32(1), jnp.float32(1)])
def test_check_number_refuses_floats_for_integers(value):
    with pytest.raises(TypeError, match=r"steps=.* must be an integer"):
        check_number("steps", value, integer=True)


def test_check_number_lets_traced_scalars_through_and_still_checks_their_type():
    # inject_hyperparams calls a factory with traced hyper-parameters.
    assert jax.jit(lambda rate: check_number("rate", rate, low=0))(-1.0) == -1.0
    with pytest.raises(TypeError, match="rate="):
        jax.jit(lambda rate: check_number("rate", rate))(jnp.ones(2))
