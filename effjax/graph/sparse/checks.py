"""Checks of shapes and dtypes, made while tracing or on the host: compiled code holds none of them."""

from types import EllipsisType
from typing import Any

import jax.numpy as jnp
import numpy as np

_KINDS = {
    "bool": (jnp.bool_,),
    "integers": (jnp.integer,),
    "numbers": (jnp.number, jnp.bool_),
    "floating": (jnp.floating,),
    "bool or floating": (jnp.bool_, jnp.floating),
}
_LENGTHS: dict[int | EllipsisType | None, str] = {None: "any", ...: "..."}


def check_array(
    argument: str, array: Any, shape: tuple[int | EllipsisType | None, ...], kind: str = "numbers", hint: str = ""
) -> Any:
    """Return ``array`` if its shape and dtype are right; else raise ``ValueError``. Nothing is broadcast.

    Args:
      argument: the argument's name, for the message.
      array: a NumPy, JAX or traced array, or a list.
      shape: lengths of the axes; None for any length, a final ``...`` for any further axes.
      kind: of the dtype, a key of ``_KINDS``.
      hint: what to do instead, appended to the message.

    Example:
      >>> check_array("labels", np.zeros((3, 1), int), (3,), "integers")
      Traceback (most recent call last):
      ValueError: labels is int64[3, 1]; integers [3] are needed.
    """
    found = np.shape(array)
    dtype = array.dtype if hasattr(array, "dtype") else np.asarray(array).dtype
    lengths = [length for length in shape if length is not ...]
    fits = len(found) >= len(lengths) if shape and shape[-1] is ... else len(found) == len(lengths)
    fits &= all(wanted in (None, length) for wanted, length in zip(lengths, found, strict=False))
    if not fits or not any(jnp.issubdtype(dtype, legal) for legal in _KINDS[kind]):
        listed = ", ".join(_LENGTHS.get(length, str(length)) for length in shape)
        raise ValueError(
            f"{argument} is {dtype}{list(found)}; {kind} [{listed}] are needed.{f' {hint}' if hint else ''}"
        )
    return array
