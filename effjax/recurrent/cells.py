"""What the cells of this family share: layout, products, step sizes over time, checks.

Pure functions are time-major, ``[time, *batch, features]``, and multiply row vectors, ``h @ U``. Modules are
batch-first, as ``nn.RNN`` is. States and step sizes are float32 at least: an increment of a hundredth of the state is
below bfloat16's resolution, so ``dtype`` is that of the matrix products' operands alone.
"""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from effjax.core.errors import check_number
from effjax.core.products import add_bias, dot
from effjax.core.time_scan import fastest_unroll, scan_time
from effjax.core.tree import wide

__all__ = ["fastest_unroll", "scan_time"]

Params = Mapping[str, jax.Array]
Activation = Callable[[jax.Array], jax.Array]
Sequence = Float[Array | np.ndarray, "time *batch features"]
Hidden = Float[Array | np.ndarray, "*batch hidden"]

UNROLLED_STEPS = 8
"""Inner Euler steps beyond this many become a loop."""


def fused_dot(
    x: jax.Array | np.ndarray, kernels: Mapping[str, tuple[jax.Array, jax.Array | None]], dtype: DTypeLike | None
) -> dict[str, jax.Array]:
    """``x @ kernel + bias`` for several (kernel, bias or None), as one matrix product."""
    widths = np.cumsum([kernel.shape[-1] for kernel, _ in kernels.values()])
    products = dot(x, jnp.concatenate([kernel for kernel, _ in kernels.values()], -1), dtype)
    parts = jnp.split(products, widths[:-1], -1)
    biases = [bias for _, bias in kernels.values()]
    return {name: add_bias(part, bias) for name, part, bias in zip(kernels, parts, biases, strict=True)}


def kernel_params(module: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> dict[str, jax.Array]:
    """Kernels of ``module`` from N(0, 0.1^2), as in the authors' code."""
    return {name: module.param(name, nn.initializers.normal(0.1), shape) for name, shape in shapes.items()}


def eta_shape(K: int, mode: str, length: int | None) -> tuple[int, ...]:
    """The shape of the step sizes: ``(length, K)`` or, shared by all time steps, ``(K,)``."""
    check_number("K", K, low=1, integer=True, hint="Each input needs at least one inner step.")
    if mode == "per_time":
        if length is None:
            raise ValueError(
                "length=None, but eta_mode='per_time' trains step sizes for every time step. Give the length of the "
                "longest sequence, or choose another eta_mode."
            )
        check_number("length", length, low=1, integer=True)
        return length, K
    if length is not None:
        raise ValueError(f"length={length} would do nothing with eta_mode={mode!r}. Leave it out.")
    return (K,)


def steps_over_time(eta: jax.Array, length: int, *, argument: str = "eta") -> jax.Array:
    """Step sizes ``[length, K]`` from ``[time, K]``, whose first rows count, or ``[K]``."""
    eta = wide(eta)
    if eta.ndim not in (1, 2) or not eta.shape[-1]:
        raise ValueError(f"{argument} has shape {eta.shape}, but must be (time, K) or (K,) with K of 1 or more.")
    if eta.ndim == 1:
        return jnp.broadcast_to(eta, (length, *eta.shape))
    if len(eta) < length:
        raise ValueError(
            f"{argument} has {len(eta)} rows, one a time step, but the sequence has {length} steps. Make the cell with "
            f"length={length}, shorten the sequence, or share the step sizes over time."
        )
    return eta[:length]


def steps_at(eta: jax.Array, time: jax.Array) -> jax.Array:
    """Step sizes ``[K, *batch, 1]`` at times ``[*batch]``; NaN beyond the last row, ``[K]`` if shared by all times."""
    eta = wide(eta)
    if eta.ndim == 1:
        return eta
    return jnp.moveaxis(jnp.take(eta, time, axis=0, mode="fill", fill_value=jnp.nan), -1, 0)[..., None]


def steps_from(
    eta: jax.Array, length: int, time: jax.Array | None, lengths: jax.Array | None, *, argument: str = "eta"
) -> jax.Array:
    """Step sizes of ``length`` steps after ``time`` ``[batch]`` of them are done; None is the start.

    ``[length, K]`` as ``steps_over_time`` gives them, or of sizes for every time step ``[length, K, batch, 1]``.
    """
    if time is None or jnp.ndim(eta) < 2:
        return steps_over_time(eta, length, argument=argument)
    if not isinstance(time, jax.core.Tracer) and not isinstance(lengths, jax.core.Tracer):
        check_length(len(eta), int(jnp.max(time + (length if lengths is None else lengths), initial=0)))
    return jnp.moveaxis(steps_at(eta, time[None] + jnp.arange(length)[:, None]), 1, 0)


def steps_done(time: jax.Array | None, lengths: jax.Array | None, xs: jax.Array) -> jax.Array:
    """The number of steps done, int32 ``[batch]``, after those of ``xs`` ``[time, batch, ...]``."""
    done = jnp.zeros(xs.shape[1], jnp.int32) if time is None else time
    return done + (len(xs) if lengths is None else lengths)


def first_hidden(h0: Hidden | None, like: jax.Array, argument: str = "h0") -> jax.Array:
    """``h0``, or zeros of the shape, dtype and sharding of one time step of ``like``."""
    if h0 is None:
        return jnp.zeros_like(like[0])
    check_hidden(argument, h0, like.shape[1:])
    return jnp.asarray(h0, like.dtype)


def check_hidden(argument: str, h: Hidden, shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless the state has the shape that inputs and parameters ask for."""
    if jnp.shape(h) != tuple(shape):
        raise ValueError(
            f"{argument} has shape {jnp.shape(h)}, but the inputs and parameters ask for a state of {tuple(shape)}. "
            "Was it carried over from another batch size or another width?"
        )


def check_length(length: int | None, steps: int) -> None:
    """Raise ``ValueError`` if a sequence has more steps than a cell has step sizes; None shares them."""
    if length is not None and steps > length:
        raise ValueError(
            f"length={length}, but the sequence has {steps} steps, and each needs step sizes of its own. Make the cell "
            f"with length={steps}, shorten the sequence, or share the step sizes over time."
        )


def check_finite(argument: str, x: jax.Array | np.ndarray) -> None:
    """Raise ``ValueError`` for NaN in an array whose values are known, that is, outside ``jit`` and ``grad``."""
    if isinstance(x, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():
        bad = int(jnp.isnan(x).sum())
    if bad:
        raise ValueError(
            f"{argument} holds {bad} NaN of {x.size} values; one spoils every later state. Replace or drop them."
        )
