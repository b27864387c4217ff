"""Layers over whole sequences: one call for all of them, that of ``flax.linen.RNN``."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from effjax.core.tree import wide

__all__: list[str] = []

PyTree = Any
Lengths = Integer[Array | np.ndarray, "series"]


class OverTime(nn.Module):
    """A layer over whole sequences, called as ``flax.linen.RNN`` is, and so at home in ``nn.Bidirectional``.

    A layer defines ``run``, which goes forward in time.
    """

    def __call__(
        self,
        x: Float[Array | np.ndarray, "rows steps inputs"],
        initial_carry: PyTree = None,
        *,
        init_key: jax.Array | None = None,
        seq_lengths: Lengths | None = None,
        return_carry: bool = False,
        time_major: bool = False,
        reverse: bool = False,
        keep_order: bool = False,
    ) -> Any:
        """The layer over a batch of sequences.

        Args:
          x: ``[batch, time, features]``, or ``[time, batch, features]`` with ``time_major``.
          initial_carry: the carry to start from, such as the one returned for the part of a stream before.
          init_key: PRNG key of a first carry that is drawn; most start from zeros.
          seq_lengths: integers ``[batch]``, the steps of each sequence; what follows them is padding. The carry is that
            at the end of each sequence, and the carry given in where a length is 0. Outputs at the padding mean
            nothing.
          return_carry: return the last carry too.
          time_major: whether time comes first, in the inputs and the outputs.
          reverse: go from each sequence's end to its start; outputs are in that order.
          keep_order: with ``reverse``, give the outputs in the order of the inputs.

        Returns:
          The outputs, or with ``return_carry`` the carry and the outputs.

        Raises:
          ValueError: inputs without a batch axis, lengths of another kind, or outside [0, time] where their values are
            known, or a carry that does not fit.
        """
        if jnp.ndim(x) != 3:
            wanted = "[time, batch, features]" if time_major else "[batch, time, features]"
            raise ValueError(
                f"x has shape {jnp.shape(x)}; expected {wanted}. A single sequence is x[None], a batch of 1."
            )
        xs = jnp.asarray(x) if time_major else jnp.swapaxes(x, 0, 1)
        lengths = None
        if seq_lengths is not None:
            lengths = check_lengths(seq_lengths, xs.shape[1], len(xs))
            self.check_padding()
        if reverse:
            xs = flipped(xs, lengths)
        carry, ys = self.run(xs, initial_carry, lengths if return_carry else None, init_key)
        if reverse and keep_order:
            ys = flipped(ys, lengths)
        ys = ys if time_major else jnp.swapaxes(ys, 0, 1)
        return (carry, ys) if return_carry else ys

    def run(self, xs: jax.Array, carry: PyTree, lengths: jax.Array | None, key: jax.Array | None) -> tuple[PyTree, Any]:
        """The carry after ``lengths`` steps (None: all), and the outputs, of inputs ``[time, batch, features]``."""
        raise NotImplementedError

    def check_padding(self) -> None:
        """Raise ``ValueError`` if the padding of one sequence would change the states of another."""


def check_lengths(lengths: Any, rows: int, steps: int, *, least: int = 0) -> jax.Array:
    """``seq_lengths`` as int32 ``[rows]``, if they are integers from ``least`` to ``steps``, as far as is known."""
    known = not isinstance(lengths, jax.core.Tracer) and getattr(lengths, "is_fully_addressable", True)
    array = np.asarray(lengths) if known else lengths
    if array.shape != (rows,) or not jnp.issubdtype(array.dtype, jnp.integer):
        way = " Of a mask that is True at the steps they are mask.sum(1)." if array.ndim == 2 else ""
        raise ValueError(
            f"seq_lengths is {array.dtype.name}{list(array.shape)}; expected one integer for each of the {rows} "
            f"sequences.{way}"
        )
    if isinstance(array, np.ndarray) and (bad := np.flatnonzero((array < least) | (array > steps))).size:
        raise ValueError(
            f"seq_lengths[{bad[0]}]={array[bad[0]]} must be in [{least}, {steps}]: the batch has {steps} time steps."
        )
    return jnp.asarray(lengths).astype(jnp.int32)


def flipped(xs: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """``xs`` ``[time, batch, ...]`` with every sequence turned round, its padding still at the end."""
    if lengths is None:
        return jnp.flip(xs, 0)
    index = (jnp.arange(len(xs) - 1, -1, -1)[:, None] + lengths[None, :]) % len(xs)
    return jnp.take_along_axis(xs, index[..., None], 0)


def at_end(states: jax.Array, lengths: jax.Array | None, first: jax.Array | None = None) -> jax.Array:
    """The last state of every sequence of ``[time, batch, ...]``; where a length is 0, ``first`` (None: zeros)."""
    if lengths is None:
        return states[-1]
    over = lambda values: values.reshape(-1, *[1] * (states.ndim - 2))
    last = jnp.take_along_axis(states, over(jnp.maximum(lengths - 1, 0))[None], 0)[0]
    first = jnp.zeros_like(last) if first is None else first.astype(last.dtype)
    return jnp.where(over(lengths > 0), last, first)


def fitted_carry(carry: PyTree, like: PyTree, cell: str) -> PyTree:
    """The carry in the dtypes of ``like``, or wider ones, if structure and shapes are the same."""
    if jax.tree.structure(carry) != jax.tree.structure(like):
        given, wanted = (jax.tree.map(lambda leaf: list(jnp.shape(leaf)), tree) for tree in (carry, like))
        raise ValueError(
            f"initial_carry has arrays of the shapes {given}, but the carry of {cell} those of {wanted}, in such a "
            "structure. Give what return_carry=True returns, or the cell's initialize_carry."
        )
    return jax.tree_util.tree_map_with_path(_fitted_leaf, carry, like)


def _fitted_leaf(path: tuple[Any, ...], leaf: Any, like: jax.Array) -> jax.Array:
    name = f"initial_carry{jax.tree_util.keystr(path)}"
    if jnp.shape(leaf) != like.shape:
        raise ValueError(
            f"{name} has shape {jnp.shape(leaf)}, but the inputs and parameters ask for a state of {like.shape}. Was "
            "it carried over from another batch size or another width?"
        )
    array = jnp.asarray(leaf)
    if jnp.issubdtype(like.dtype, jnp.integer):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} is {array.dtype.name}; expected integers, the number of steps done.")
        return array.astype(like.dtype)
    if jnp.iscomplexobj(array) and not jnp.issubdtype(like.dtype, jnp.complexfloating):
        raise ValueError(f"{name} is {array.dtype.name}, but the state is real. Is it the carry of an LRU?")
    return wide(array).astype(jnp.promote_types(array.dtype, like.dtype))
