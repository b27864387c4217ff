"""Variable-effort inference: one model on a small version of the input first, on a larger one where it is unsure."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Integer, PyTree, Real

from effjax.core.errors import check_number
from effjax.core.tree import wide
from effjax.hardness.cascades import Asking, with_query
from effjax.hardness.dispatch import Dispatched
from effjax.hardness.host_dispatch import HostDispatch
from effjax.transformers.compressions import resize_images

__all__ = ["LevelCascade", "evaluated_cost", "level_params", "level_stages"]

Apply = Callable[..., Any]
Compress = Callable[[Any, Any], Any]
Costs = Sequence[float] | Real[np.ndarray, "levels"]


def level_stages(
    apply: Apply, levels: Sequence[Any], *, compress: Compress = resize_images
) -> list[Callable[[Any, PyTree], Any]]:
    r"""The stages of a cascade over levels, for ``HostDispatch`` and ``effjax.hardness.cascade``.

    Stage k answers where :math:`\max_c p_c \ge \tau_k`, with :math:`p = \mathrm{softmax}(f(\mathrm{compress}(x,
    \ell_k)) / T_k)` in float32; the others, and all whose logits are NaN, go on to stage k + 1. The last stage answers
    everything.

    Args:
      apply: ``(params, inputs) -> logits [rows, classes]``, for every level, traceable.
      levels: in increasing order of cost; two or three are best.
      compress: ``(inputs, level) -> inputs``.

    Returns:
      A stage for each level; they take what ``level_params`` gives.

    Raises:
      ValueError: fewer than two levels.

    Example:
      >>> import jax.numpy as jnp
      >>> stages = level_stages(lambda params, x: x.mean((1, 2)), (1, 2))
      >>> first, last = level_params(None, (0.9,))
      >>> logits, asks = stages[0](first, jnp.zeros((3, 2, 2, 2)))
      >>> asks.tolist()
      [True, True, True]
    """
    if len(levels) < 2:
        raise ValueError(f"levels={tuple(levels)} must hold two or more, the cheapest first.")

    def at(level: Any) -> Apply:
        def run(held: Any, inputs: PyTree) -> jax.Array:
            params, temperature = held
            return wide(apply(params, compress(inputs, level))) / temperature

        return run

    return [*(with_query(at(level), "max_probability") for level in levels[:-1]), at(levels[-1])]


def level_params(params: PyTree, thresholds: Sequence[float], temperatures: Sequence[float] | None = None) -> list[Any]:
    """What the stages of ``level_stages`` take: arrays, so that other thresholds compile nothing.

    Args:
      params: of the one model.
      thresholds: of the confidence, one for each level but the last. 0 answers everything, above 1 nothing.
      temperatures: of each level's softmax, such as those of ``level_temperatures``; None for 1.

    Returns:
      A list, one entry for each level.

    Raises:
      ValueError: thresholds that are negative or NaN, temperatures that are not positive, or another number of them.

    Example:
      >>> len(level_params({}, (0.9, 0.8)))
      3
    """
    if not len(thresholds):
        raise ValueError("thresholds=() must hold one for each level but the last.")
    values = []
    for i, threshold in enumerate(thresholds):
        if threshold == np.inf:
            values.append(np.float32(np.inf))
            continue
        hint = "It is a limit of a probability: 0 answers everything, above 1 nothing."
        values.append(np.float32(check_number(f"thresholds[{i}]", threshold, low=0, hint=hint)))
    count = len(values) + 1
    temperatures = (1.0,) * count if temperatures is None else tuple(temperatures)
    if len(temperatures) != count:
        raise ValueError(f"temperatures hold {len(temperatures)} for {count} levels: give one for each.")
    for i, temperature in enumerate(temperatures):
        check_number(f"temperatures[{i}]", temperature, low=0, open_low=True)
    held = [(params, np.float32(temperature)) for temperature in temperatures]
    return [*(Asking(each, -value) for each, value in zip(held[:-1], values, strict=True)), held[-1]]


class LevelCascade:
    """Answer batches level by level, each level on the smallest bucket that holds the rows which are still open.

    After every level the host reads how many rows go on, gathers them, and starts the next level's program for a batch
    of that bucket, or stops. So a level costs what its rows cost, up to the bucket; there is one program for each level
    and bucket, and none is compiled after ``warm_up``. At batch 1 it is the paper's loop.

    Args:
      apply: as for ``level_stages``.
      levels: in increasing order of cost.
      buckets: increasing batch sizes for the levels after the first; the batch is added.
      compress: ``(inputs, level) -> inputs``.
      compiler_options: as for ``HostDispatch``.

    Attributes:
      dispatch: the ``HostDispatch``; ``dispatch.launches`` counts the programs that ran.

    Example:
      >>> import jax.numpy as jnp
      >>> model = lambda params, x: params * x.mean((1, 2))
      >>> serve = LevelCascade(model, (1, 2), buckets=(1, 2))
      >>> images = jnp.array([[4.0, 0.0], [0.1, 0.0]])[:, None, None, :] * jnp.ones((2, 2, 2, 2))
      >>> found = serve(1.0, images, (0.9,))
      >>> found.answered.tolist(), evaluated_cost(found.answered, (2, 5)).tolist()
      ([0, 1], [2.0, 7.0])

    Nagarajan, Raghunathan 2023, arXiv:2312.12385. Their program counts an input that no level is sure of as wrong; here
    the largest level answers it. Compaction, buckets and temperatures are ours.
    """

    def __init__(
        self,
        apply: Apply,
        levels: Sequence[Any],
        *,
        buckets: Sequence[int],
        compress: Compress = resize_images,
        compiler_options: Mapping[str, Any] | None = None,
    ):
        self.levels = tuple(levels)
        stages = level_stages(apply, levels, compress=compress)
        self.dispatch = HostDispatch(stages, buckets=buckets, compiler_options=compiler_options)

    def __call__(
        self,
        params: PyTree,
        inputs: PyTree,
        thresholds: Sequence[float],
        temperatures: Sequence[float] | None = None,
    ) -> Dispatched:
        """Answer a batch.

        Args:
          params: of the model.
          inputs: at full size, the batch axis leading.
          thresholds: as for ``level_params``.
          temperatures: as for ``level_params``.

        Returns:
          A ``Dispatched``: ``outputs`` are logits over the temperature of the level that answered, ``answered`` is its
          place among the levels. ``failed`` rows have NaN logits at a later level, and keep the answer before it.

        Raises:
          ValueError: as for ``level_params``, or levels whose logits differ in form.
        """
        return self.dispatch(self._params(params, thresholds, temperatures), inputs)

    def stream(
        self,
        params: PyTree,
        batches: Iterable[PyTree],
        thresholds: Sequence[float],
        temperatures: Sequence[float] | None = None,
    ) -> Iterator[Dispatched]:
        """Answer batches in their order, the first level of the next one running while the host waits."""
        return self.dispatch.stream(self._params(params, thresholds, temperatures), batches)

    def warm_up(self, params: PyTree, inputs: PyTree) -> int:
        """Compile every program for batches of this shape, and run each once; returns their number."""
        return self.dispatch.warm_up(self._params(params, (1.0,) * (len(self.levels) - 1), None), inputs)

    def _params(self, params: PyTree, thresholds: Sequence[float], temperatures: Sequence[float] | None) -> list[Any]:
        if len(thresholds) != len(self.levels) - 1:
            raise ValueError(
                f"thresholds hold {len(thresholds)} for {len(self.levels)} levels: give one for each but the last."
            )
        return level_params(params, thresholds, temperatures)


def evaluated_cost(answered: Integer[Array | np.ndarray, "rows"], costs: Costs) -> Float[np.ndarray, "rows"]:
    r"""What every row cost: the sum over all levels that saw it, not only the one that answered.

    .. math:: c_i = \sum\nolimits_{k \le a_i} \mathrm{cost}_k

    Two levels pay only where more than cost_0 / cost_1 of the rows stop at the first.

    Args:
      answered: integers [rows], the place of the level that answered.
      costs: of each level: tokens, multiply-accumulates or seconds.

    Returns:
      float64 [rows].

    Raises:
      ValueError: places outside the levels.

    Example:
      >>> evaluated_cost(np.array([0, 1]), (197, 577)).tolist()
      [197.0, 774.0]
    """
    answered = np.asarray(answered)
    if answered.size and not 0 <= answered.min() <= answered.max() < len(costs):
        raise ValueError(
            f"answered runs from {answered.min()} to {answered.max()}, but costs hold {len(costs)} levels, from 0 on."
        )
    return np.cumsum(np.asarray(costs, np.float64))[answered]
