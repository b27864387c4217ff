"""Argument checks: what is refused, and that the message tells the way out."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core.errors import Count, Natural, Positive, Rate, Share, check_choice, check_fields, check_number, near


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


@dataclasses.dataclass(frozen=True)
class Config:
    count: Count = 1
    rates: tuple[Positive, ...] = (0.1,)
    rows: Count | None = None
    loop: Literal["vmap", "map"] = "map"
    form: Literal["a"] | Literal["b"] = "a"
    size: tuple[Count, Natural] = (1, 0)
    momentum: Rate = 0.0
    share: Share = 1.0
    name: str = ""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 0}, r"^my\.count=0 must be an integer in \[1, inf\)"),
        ({"rates": (0.1, 0)}, r"^my\.rates\[1\]=0 must be a number in \(0, inf\)"),
        ({"rates": (0.1, float("nan"))}, r"^my\.rates\[1\]=nan"),
        ({"rows": 0}, r"^my\.rows=0"),
        ({"loop": "mpa"}, r"^my\.loop='mpa' is not one of 'vmap', 'map'. Did you mean 'map'"),
        ({"form": "c"}, r"^my\.form='c' is not one of 'a', 'b'"),
        ({"size": (0, 0)}, r"^my\.size\[0\]=0"),
        ({"size": (1, -1)}, r"^my\.size\[1\]=-1"),
        ({"momentum": 1.0}, r"^my\.momentum=1.0 must be a number in \[0, 1\)"),
        ({"share": 0.0}, r"^my\.share=0.0 must be a number in \(0, 1\]"),
    ],
)
def test_constraints_that_stand_in_the_types_are_checked(fields, message):
    check_fields(Config(rows=3, rates=(), size=(2, 0), momentum=0, form="b"))
    with pytest.raises(ValueError, match=message):
        check_fields(Config(**fields), "my.")


def test_a_value_of_another_type_is_named():
    with pytest.raises(TypeError, match=r"count=1\.5 must be an integer, not float"):
        check_fields(Config(count=1.5))
