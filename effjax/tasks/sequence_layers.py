"""Recurrent layers and cells by name: the methods, their variants, and what a user would take instead."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from effjax.core.cells import Cell
from effjax.core.errors import check_choice
from effjax.models.linear_recurrence import LRU, LRUCell, LRUStack, MinGRU, MinGRUCell
from effjax.models.sequence import GRUCell, LSTMCell, Recurrent, RNNCell
from effjax.models.sequence_rivals import AntisymmetricRNNCell, CoRNNCell, FastGRNNCell, FastRNNCell
from effjax.recurrent.dual import DualODE
from effjax.recurrent.fixed_point import EquilibriumRNN
from effjax.recurrent.irnn import IncrementalRNN, IncrementalRNNCell
from effjax.recurrent.tarnn import TARNN, TARNNCell


class SequenceLayer(NamedTuple):
    """A row of ``LAYERS``.

    Attributes:
      label: the words of tables and plots.
      cell: makes one step in time; None where the layer cannot be taken apart.
      layer: makes the layer over whole sequences; None for the cell in ``Recurrent``.
      sized: the field of cell and layer that takes the length of the sequences; empty where there is none.
      options: more fields of cell and layer.
    """

    label: str
    cell: Callable[..., Cell] | None
    layer: Callable[..., nn.Module] | None = None
    sized: str = ""
    options: Mapping[str, Any] = {}


def _irnn(label: str, sized: str = "length", **options: Any) -> SequenceLayer:
    return SequenceLayer(label, IncrementalRNNCell, IncrementalRNN, sized, options)


def _tarnn(label: str, variant: str, sized: str = "length", **options: Any) -> SequenceLayer:
    return SequenceLayer(f"TARNN, {label}", TARNNCell, TARNN, sized, {"variant": variant, **options})


_GATED, _LONG = {"gated": True}, {"r_min": 0.99, "r_max": 0.9999, "max_phase": math.pi / 10}
_SHARED, _INPUT = {"sized": "", "eta_mode": "shared"}, {"sized": "", "eta_mode": "input", "activation": jnp.tanh}

LAYERS: dict[str, SequenceLayer] = {
    "rnn": SequenceLayer("tanh RNN", RNNCell),
    "lstm": SequenceLayer("LSTM", LSTMCell),
    "chrono-lstm": SequenceLayer("Chrono-LSTM", LSTMCell, sized="chrono_length"),
    "gru": SequenceLayer("GRU", GRUCell),
    "fastrnn": SequenceLayer("FastRNN", FastRNNCell),
    "fastrnn-per-time": SequenceLayer("FastRNN, alpha and beta per time step", FastRNNCell, sized="length"),
    "fastgrnn": SequenceLayer("FastGRNN", FastGRNNCell),
    "antisymmetric": SequenceLayer("AntisymmetricRNN", AntisymmetricRNNCell),
    "antisymmetric-gated": SequenceLayer("AntisymmetricRNN, gated", AntisymmetricRNNCell, options=_GATED),
    "cornn": SequenceLayer("coRNN", CoRNNCell),
    "lru": SequenceLayer("LRU, |lambda| .9 to .999", LRUCell, LRU),
    "lru-long": SequenceLayer("LRU, |lambda| .99 to .9999", LRUCell, LRU, options=_LONG),
    "lru-4": SequenceLayer("4 LRU blocks, |lambda| .99 to .9999", None, LRUStack, options={"layers": 4, **_LONG}),
    "min-gru": SequenceLayer("minGRU, Chrono start", MinGRUCell, MinGRU, "chrono_length"),
    "irnn": _irnn("iRNN, K=1"),
    "irnn-3": _irnn("iRNN, K=3", K=3),
    # Step sizes of 0.9 from the zero start: with the default 0.01 this form forgets everything at once.
    "irnn-zero-3": _irnn("iRNN, K=3, zero start", K=3, start="zero", eta=0.9),
    "irnn-shared": _irnn("iRNN, K=1, one eta for all times", **_SHARED),
    "irnn-equilibrium": SequenceLayer("iRNN at equilibrium", None, EquilibriumRNN, options={"iterations": 20}),
    "dual-ode": SequenceLayer("iRNN, dual ODE, K=2", None, DualODE, "length"),
    "tarnn-euler": _tarnn("Euler", "euler"),
    "tarnn-convex": _tarnn("convex", "convex"),
    "tarnn-euler-3": _tarnn("Euler, K=3", "euler", K=3),
    "tarnn-euler-shared": _tarnn("Euler, one eta for all times", "euler", **_SHARED),
    "tarnn-convex-shared": _tarnn("convex, one eta for all times", "convex", **_SHARED),
    "tarnn-euler-input": _tarnn("Euler, tanh, eta of the input", "euler", **_INPUT),
    "tarnn-convex-input": _tarnn("convex, tanh, eta of the input", "convex", **_INPUT),
}


def sequence_layer(
    name: str,
    features: int,
    *,
    length: int,
    dtype: str = "float32",
    chunk: int | None = None,
    unroll: int = 1,
    remat: bool = False,
) -> nn.Module:
    """A layer of states over time, ``[batch, time, inputs]`` to ``[batch, time, features]``.

    Args:
      name: a row of ``LAYERS``, such as ``"lstm"``, ``"irnn"``, ``"tarnn-euler"`` or ``"lru-4"``.
      features: width of the state.
      length: time steps of the sequences, for step sizes and biases that depend on it.
      dtype: of the matrix products' operands, ``"float32"`` or ``"bfloat16"``; states and parameters are float32.
      chunk: time steps between stored states, the others are computed again; None stores all. Layers without a loop
        over time take no notice of it.
      unroll: time steps in one iteration of the compiled loop, where there is one.
      remat: recompute activations: in a loop over time with chunks near the root of ``length`` where ``chunk`` is None,
        elsewhere by ``nn.remat``.

    Returns:
      A Linen module for ``SequenceNetwork``.

    Raises:
      ValueError: an unknown name.

    Example:
      >>> import jax
      >>> layer = sequence_layer("irnn", 8, length=20)
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((4, 20, 2)))[0].shape
      (4, 20, 8)
    """
    row = LAYERS[check_choice("name", name, LAYERS)]
    if remat and chunk is None:
        chunk = max(1, round(length**0.5))
    loop = {"chunk": chunk, "unroll": unroll}
    if row.layer is None:
        return Recurrent(sequence_cell(name, features, length=length, dtype=dtype), **loop)
    fields = _fields(row, length, dtype)
    if "chunk" in inspect.signature(row.layer).parameters:
        return row.layer(features, **fields, **loop)
    return (nn.remat(row.layer) if remat else row.layer)(features, **fields)


def sequence_cell(name: str, features: int, *, length: int, dtype: str = "float32") -> Cell:
    """The cell of one time step of ``sequence_layer``, for a loop of one's own or for ``cell_task``.

    Args:
      name: a row of ``LAYERS`` that has a cell: not ``"lru-4"``, ``"irnn-equilibrium"`` or ``"dual-ode"``.
      features: as for ``sequence_layer``.
      length: as for ``sequence_layer``.
      dtype: as for ``sequence_layer``.

    Returns:
      An ``effjax.core.cells.Cell``.

    Raises:
      ValueError: an unknown name, or that of a layer without a cell.

    Example:
      >>> sequence_cell("chrono-lstm", 8, length=20).chrono_length
      20
    """
    cells = {key: row.cell for key, row in LAYERS.items() if row.cell is not None}
    return cells[check_choice("name", name, cells)](features, **_fields(LAYERS[name], length, dtype))


def _fields(row: SequenceLayer, length: int, dtype: str) -> dict[str, Any]:
    # Chrono biases are logarithms of times between 1 and T - 1, which need T of 3.
    sized = {row.sized: max(3, length) if row.sized == "chrono_length" else length} if row.sized else {}
    return {**row.options, **sized, "dtype": None if dtype == "float32" else jnp.dtype(dtype)}
