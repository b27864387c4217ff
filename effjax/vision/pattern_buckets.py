"""Requests sorted on the host by the pattern of blocks that they need, one static network for each pattern."""

import collections
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from effjax.core.errors import check_number, check_shape
from effjax.core.shapes import check_ladder, ladder, pad_to, smallest_fit

__all__ = ["PatternServer", "nearest_patterns"]

Bits = Float[Array | np.ndarray, "rows blocks"]
Mask = Bool[Array | np.ndarray, "rows"]


class PatternServer:
    r"""Serves requests by patterns of open blocks: one static network for each pattern, no decision inside it.

    A policy decides about every block of every image at once; the host takes for every image the pattern among a few
    that keeps open what the policy opened, sorts the images by pattern, and runs each part in the smallest size that
    holds it.

    Args:
      network: ``(params, x, pattern) -> outputs``, with ``pattern`` a tuple of bools that is known when it is traced:
        closed blocks are left out of the program.
      policy: ``(policy_params, x) -> gates [rows, blocks]``, open above 0.
      patterns: bools [patterns, blocks]; the last one must be all open, so that every image finds one.
      sizes: increasing batch sizes; one program for each pattern and size that occurs.

    Attributes:
      launches: how often each ``(pattern, size)`` was run.

    Example:
      >>> network = lambda w, x, pattern: x + sum(w for is_open in pattern if is_open)
      >>> policy = lambda t, x: x - jax.numpy.array([[0.0, t]])
      >>> serve = PatternServer(network, policy, [(True, False), (True, True)], sizes=(2, 4))
      >>> serve(10.0, 1.5, np.array([[1.0], [2.0], [0.5]], np.float32)).ravel().tolist(), dict(serve.launches)
      ([11.0, 22.0, 10.5], {(0, 2): 1, (1, 2): 1})

    Beyond the paper, after BlockDrop's one-shot policy (Wu et al. 2018, arXiv:1711.08393).
    """

    def __init__(
        self,
        network: Callable[[PyTree, Array, tuple[bool, ...]], Any],
        policy: Callable[[PyTree, Array], Array],
        patterns: Sequence[Sequence[bool]] | np.ndarray,
        *,
        sizes: Sequence[int] | None = None,
    ):
        self.patterns = np.asarray(patterns, bool)
        if self.patterns.ndim != 2 or not len(self.patterns) or not self.patterns[-1].all():
            raise ValueError(f"patterns={patterns} must be rows of bools, the last one all open.")
        self.sizes = check_ladder(ladder(8, 256) if sizes is None else sizes, argument="sizes")
        self.launches: collections.Counter[tuple[int, int]] = collections.Counter()
        self._policy = jax.jit(policy)
        self._network = jax.jit(network, static_argnums=2)

    def __call__(self, params: PyTree, policy_params: PyTree, x: np.ndarray | Array) -> np.ndarray:
        """Answer a batch of any number of rows, in its order.

        Args:
          params: of the network.
          policy_params: of the policy.
          x: images or other inputs, rows leading.

        Returns:
          The outputs as one NumPy array.

        Raises:
          ValueError: an empty batch, or gates of another shape.
        """
        x = np.asarray(x)
        check_number("rows", len(x), low=1, integer=True, hint="There is nothing to answer.")
        chosen = nearest_patterns(self.decide(policy_params, x), self.patterns)
        outputs: Any = None
        for place in np.unique(chosen):
            rows = np.flatnonzero(chosen == place)
            pattern = tuple(bool(bit) for bit in self.patterns[place])
            for part in np.split(rows, range(self.sizes[-1], len(rows), self.sizes[-1])):
                size = smallest_fit(len(part), self.sizes, argument="sizes")
                self.launches[int(place), size] += 1
                found = np.asarray(self._network(params, pad_to(x[part], size), pattern))[: len(part)]
                outputs = np.zeros((len(x), *found.shape[1:]), found.dtype) if outputs is None else outputs
                outputs[part] = found
        return outputs

    def decide(self, policy_params: PyTree, x: np.ndarray) -> np.ndarray:
        """The policy's gates, [rows, blocks]; in batches of the ladder's sizes."""
        found = []
        for start in range(0, len(x), self.sizes[-1]):
            part = x[start : start + self.sizes[-1]]
            size = smallest_fit(len(part), self.sizes, argument="sizes")
            found.append(np.asarray(self._policy(policy_params, pad_to(part, size)))[: len(part)])
        gates = np.concatenate(found)
        check_shape("gates", gates, (len(x), self.patterns.shape[1]), "One number for each row and block.")
        return gates

    @property
    def compiles(self) -> int:
        """Programs compiled so far."""
        programs: list[Any] = [self._policy, self._network]
        return sum(run._cache_size() for run in programs)


def nearest_patterns(gates: Bits, patterns: Bool[np.ndarray, "patterns blocks"]) -> np.ndarray:
    """For every row the cheapest pattern that keeps all blocks open which its gates opened.

    Args:
      gates: open above 0; NaN counts as open.
      patterns: True where a block is open, the last one all open.

    Returns:
      int [rows], places in ``patterns``.

    Example:
      >>> patterns = np.array([[True, False], [False, True], [True, True]])
      >>> nearest_patterns(np.array([[0.0, 0.5], [1.0, 1.0], [0.0, 0.0]]), patterns).tolist()
      [1, 2, 0]
    """
    wanted = ~(np.asarray(gates) <= 0)
    holds = (patterns[None] | ~wanted[:, None]).all(-1)
    return np.where(holds, patterns.sum(1)[None], patterns.shape[1] + 1).argmin(1)
