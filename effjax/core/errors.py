"""Argument checks whose messages say what was given, what is legal, and the way out."""

import difflib
import functools
import math
import types
import typing
from collections.abc import Collection, Iterable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["NoEffectWarning"]


class NoEffectWarning(UserWarning):
    """A setting that changes nothing: a pattern without matches, a ladder larger than the data."""


def near(name: object, legal: Iterable[object], n: int = 3) -> str:
    """` Did you mean a, b?` for the names of ``legal`` closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(str(name), map(str, legal), n=n, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(item) for item in close)}?" if close else ""


def check_choice(argument: str, value: Any, legal: Collection[Any]) -> Any:
    """Return ``value`` if it is one of ``legal``; else raise ``ValueError`` with the nearest name."""
    if value not in legal:
        listed = ", ".join(repr(item) for item in legal)
        raise ValueError(f"{argument}={value!r} is not one of {listed}.{near(value, legal)}")
    return value


def check_number(
    argument: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
    integer: bool = False,
    hint: str = "",
) -> Any:
    """Return ``value`` if it is a finite number in the interval; else raise ``ValueError``/``TypeError``.

    Args:
      argument: the argument's name, for the message.
      value: a Python number or a scalar array (booleans are refused). Of a traced scalar, whose
        value is not known yet, only the type is checked.
      low: smallest legal value; excluded when ``open_low``.
      high: largest legal value; excluded when ``open_high``.
      open_low: whether ``low`` itself is illegal.
      open_high: whether ``high`` itself is illegal.
      integer: require an integer.
      hint: what to do instead, appended to the message.
    """
    kind = "an integer" if integer else "a number"
    if isinstance(value, bool) or not _is_number(value, integer):
        raise TypeError(f"{argument}={value!r} must be {kind}, not {type(value).__name__}.{_space(hint)}")
    if isinstance(value, jax.core.Tracer):
        return value
    number = value.item() if hasattr(value, "item") else value  # no program for a comparison
    above = number > low if open_low else number >= low
    below = number < high if open_high else number <= high
    if not (above and below and math.isfinite(number)):
        left = "(" if open_low or low == -math.inf else "["
        right = ")" if open_high or high == math.inf else "]"
        raise ValueError(f"{argument}={value!r} must be {kind} in {left}{low}, {high}{right}.{_space(hint)}")
    return value


def check_shape(argument: str, value: Any, shape: tuple[int, ...], hint: str = "") -> None:
    """Raise ``ValueError`` unless an array has this shape: nothing is broadcast.

    Example:
      >>> check_shape("labels", jnp.zeros((3, 1)), (3,), "One for each row.")
      Traceback (most recent call last):
      ValueError: labels have shape (3, 1); expected (3,). One for each row.
    """
    if tuple(jnp.shape(value)) != tuple(shape):
        has = "have" if argument.rstrip("]'\"").endswith("s") else "has"
        raise ValueError(f"{argument} {has} shape {tuple(jnp.shape(value))}; expected {tuple(shape)}.{_space(hint)}")


def check_series(x: Any, argument: str = "x") -> None:
    """Raise ``ValueError`` unless ``x`` is a batch of series, [batch, time, features].

    Example:
      >>> check_series(jnp.zeros((20, 3)))
      Traceback (most recent call last):
      ValueError: x has shape (20, 3); expected [batch, time, features]. One series is a batch of one: x[None].
    """
    if len(jnp.shape(x)) != 3:
        hint = f" One series is a batch of one: {argument}[None]." if len(jnp.shape(x)) == 2 else ""
        raise ValueError(f"{argument} has shape {jnp.shape(x)}; expected [batch, time, features].{hint}")


class Limits(NamedTuple):
    """The interval of a number, as a mark in its type: ``Annotated[int, Limits(low=1)]``; see ``check_number``."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    hint: str = ""


Count = Annotated[int, Limits(low=1)]
Natural = Annotated[int, Limits(low=0)]
Positive = Annotated[float, Limits(low=0, open_low=True)]
NotNegative = Annotated[float, Limits(low=0)]
Share = Annotated[float, Limits(low=0, high=1, open_low=True)]
"""Above 0, at most 1."""
Fraction = Annotated[float, Limits(low=0, high=1)]
Rate = Annotated[float, Limits(low=0, high=1, open_high=True)]
"""From 0, below 1: a momentum, a dropout rate."""


def check_fields(config: Any, prefix: str = "") -> None:
    """Check a config's numbers and choices against its types: ``Annotated`` with ``Limits``, and ``Literal``.

    Elements of tuples are checked one by one, None only where the type allows it.

    Raises:
      ValueError: a value out of range; the message names the field, the value and what is legal.
      TypeError: a value of another type.

    Example:
      >>> class Config(NamedTuple):
      ...     rates: tuple[Positive, ...]
      >>> check_fields(Config((0.1, 0.0)))
      Traceback (most recent call last):
      ValueError: rates[1]=0.0 must be a number in (0, inf).
    """
    for name, kind in _hints(type(config)).items():
        _check_field(f"{prefix}{name}", getattr(config, name), kind)


_hints = functools.cache(functools.partial(typing.get_type_hints, include_extras=True))


def _check_field(name: str, value: Any, kind: Any) -> None:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        limits = [mark for mark in parts[1:] if isinstance(mark, Limits)]
        for mark in limits:
            check_number(name, value, integer=parts[0] is int, **mark._asdict())
        if not limits:
            _check_field(name, value, parts[0])
    elif origin is typing.Literal:
        check_choice(name, value, parts)
    elif origin is tuple and isinstance(value, tuple):
        for index, item in enumerate(value):
            _check_field(f"{name}[{index}]", item, parts[0] if parts[-1] is ... else parts[index])
    elif origin in (typing.Union, types.UnionType) and value is not None:
        literals = [part for part in parts if typing.get_origin(part) is typing.Literal]
        others = [part for part in parts if part not in (*literals, types.NoneType)]
        if literals and (isinstance(value, str) or not others):
            check_choice(name, value, [choice for part in literals for choice in typing.get_args(part)])
        else:
            for part in others:
                _check_field(name, value, part)


def _is_number(value: Any, integer: bool) -> bool:
    if isinstance(value, int if integer else (int, float)):
        return True
    kinds = (jnp.integer,) if integer else (jnp.integer, jnp.floating)
    return getattr(value, "shape", None) == () and any(jnp.issubdtype(value.dtype, kind) for kind in kinds)


def _space(hint: str) -> str:
    return f" {hint}" if hint else ""
