"""The protocol of a recurrent cell whose products with the inputs can be taken out of the loop over time."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

PyTree = Any
Params = Mapping[str, jax.Array]
Table = Mapping[str, tuple[nn.initializers.Initializer, tuple[int, ...]]]
"""Parameters by name: how each starts, and its shape."""


class Cell(nn.RNNCellBase):
    """A recurrent cell in three parts: weights, products with the inputs, and what is left to do in the loop.

    It runs in ``nn.RNN`` like any cell. A loop that calls ``project`` once for all time steps and ``advance`` in each
    gives the same states in less time. A cell defines ``table`` (or ``weights``), ``project``, ``advance`` and
    ``initialize_carry``, and has a field ``features``.
    """

    def __call__(self, carry: PyTree, x: jax.Array | np.ndarray) -> tuple[PyTree, jax.Array]:
        params = self.weights(x.shape[-1])
        return self.advance(params, carry, self.project(params, x))

    @nn.compact
    def weights(self, inputs: int) -> Params:
        """The parameters, for inputs of that width."""
        return {name: self.param(name, init, shape) for name, (init, shape) in self.table(inputs).items()}

    @nn.nowrap
    def table(self, inputs: int) -> Table:
        """The initializer and the shape of every parameter, in the order in which they are drawn."""
        raise NotImplementedError

    @nn.nowrap
    def project(self, params: Params, xs: jax.Array | np.ndarray) -> PyTree:
        """What ``advance`` takes of the inputs ``[..., inputs]``, for any number of them at once."""
        raise NotImplementedError

    @nn.nowrap
    def advance(self, params: Params, carry: PyTree, projected: PyTree) -> tuple[PyTree, jax.Array]:
        """One step in time: the new carry, and the output ``[*batch, features]``."""
        raise NotImplementedError

    @nn.nowrap
    def check_steps(self, steps: int) -> None:
        """Raise ``ValueError`` unless the cell can take that many steps in a row."""

    @nn.nowrap
    def check_padding(self) -> None:
        """Raise ``ValueError`` if the padding of one sequence would change the states of another."""

    @property
    def num_feature_axes(self) -> int:
        return 1
