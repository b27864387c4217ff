"""Which way to batch texts costs least in all: static padding, dynamic padding, buckets or packing."""

from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer

from effjax.core.errors import check_choice, check_number
from effjax.data.bucket_sampler import plan_epoch
from effjax.data.ladders import cheapest_ladder
from effjax.data.packing import best_fit
from effjax.data.step_costs import StepCosts, check_costs

__all__ = ["BatchesChoice", "choose_batches"]

WAYS = ("static", "dynamic", "buckets", "packing")
Steps = dict[tuple[int, int], float]
"""Steps of a run in each shape (rows, tokens)."""


class BatchesChoice(NamedTuple):
    """What ``choose_batches`` found.

    Attributes:
      best: the way of the fewest seconds in all.
      seconds: of each way, compiling and training together.
      compile_s: of each way, the part that compiles.
      train_s: of each way, the part that trains.
      steps: of each way, the steps in every shape ``(rows, tokens)``.
      boundaries: of the buckets.
    """

    best: str
    seconds: dict[str, float]
    compile_s: dict[str, float]
    train_s: dict[str, float]
    steps: dict[str, Steps]
    boundaries: tuple[int, ...]

    def __str__(self) -> str:
        def line(way: str) -> str:
            shapes = len(self.steps[way])
            programs = f"{shapes} program{'s' if shapes > 1 else ''}"
            return (
                f"{way}: {self.seconds[way]:.3g} s = {self.compile_s[way]:.3g} for {programs} + {self.train_s[way]:.3g}"
            )

        return "\n".join(map(line, sorted(self.seconds, key=lambda way: self.seconds[way])))


def choose_batches(
    lengths: Integer[np.ndarray, "n"],
    costs: StepCosts,
    *,
    epochs: int,
    batch_size: int = 64,
    length: int | None = None,
    multiple: int = 8,
    tokens: int | None = None,
    ways: Collection[str] = WAYS,
) -> BatchesChoice:
    """Predict the seconds of a run, compiling included, for each way to batch its texts, and take the least.

    - ``"static"``: ``PaddedBatches(length=...)``, one program;
    - ``"dynamic"``: ``PaddedBatches()``, each batch padded to its longest row, rounded up to ``multiple``;
    - ``"buckets"``: ``BucketSampler(max_shapes="auto", costs=...)`` on boundaries that are multiples of ``multiple``;
    - ``"packing"``: ``PackedBatches`` of ``length`` tokens, rows enough for about ``batch_size`` texts a batch; to be
      left out of ``ways`` where the model knows no segments.

    The steps in every shape are those of one planned epoch, times ``epochs``; of dynamic padding those of all epochs.
    Every way sees each text once an epoch in batches of about as many texts: quality is taken to be the same.

    Args:
      lengths: tokens of every text, special ones included.
      costs: of compiling and of a step, from ``effjax.train.measure_costs``.
      epochs: passes over the data.
      batch_size: texts of a batch.
      length: tokens of a row of static padding and of packing; the longest text by default.
      multiple: dynamic padding and boundaries are multiples of it.
      tokens: most padded tokens of a batch of buckets; by default so many that ``batch_size`` always fits.
      ways: those that may be taken.

    Returns:
      The choice; ``print`` it for a line a way, the best one first. A pure function: equal on every host.

    Raises:
      ValueError: costs that are not known, texts longer than ``length``, an unknown way, or arguments out of range.

    Example:
      >>> lengths = np.random.default_rng(0).integers(4, 65, 1000)
      >>> costs = StepCosts(compile_s=5.0, token_s=2e-5, step_s=5e-3)
      >>> ways = ("static", "buckets", "packing")
      >>> print(choose_batches(lengths, costs, epochs=1, batch_size=32, ways=ways))
      packing: 5.91 s = 5 for 1 program + 0.91
      static: 6.47 s = 5 for 1 program + 1.47
      buckets: 6.47 s = 5 for 1 program + 1.47
      >>> choose_batches(lengths, costs, epochs=40, batch_size=32, ways=("static", "buckets")).best
      'buckets'
    """
    check_costs(costs)
    check_number("epochs", epochs, low=1, integer=True)
    check_number("batch_size", batch_size, low=1, integer=True)
    check_number("multiple", multiple, low=1, integer=True)
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or not lengths.size or lengths.dtype.kind not in "iu" or lengths.min() < 1:
        raise ValueError(
            f"lengths is {lengths.dtype}{list(lengths.shape)}; it must be integers of 1 or more, not empty."
        )
    if not ways:
        raise ValueError(f"ways=() leaves nothing to choose from. Give some of {', '.join(WAYS)}.")
    for way in ways:
        check_choice("ways", way, WAYS)
    longest = int(lengths.max())
    length = longest if length is None else check_number("length", length, low=longest, integer=True)
    rounded = -(-longest // multiple) * multiple
    tokens = batch_size * rounded if tokens is None else check_number("tokens", tokens, low=rounded, integer=True)
    boundaries = cheapest_ladder(
        lengths, costs, caps=(batch_size,) * epochs, tokens=tokens, multiple=1, length_multiple=multiple
    )
    steps: dict[str, Steps] = {}
    if "static" in ways:
        steps["static"] = {(batch_size, length): epochs * _batches(len(lengths), batch_size)}
    if "dynamic" in ways:
        steps["dynamic"] = _dynamic(lengths, batch_size, multiple, epochs)
    if "buckets" in ways:
        steps["buckets"] = _bucketed(lengths, boundaries, batch_size, tokens, epochs)
    if "packing" in ways:
        order = np.random.default_rng(0).permutation(len(lengths))
        rows = int(best_fit(lengths[order], length).max()) + 1
        size = max(1, round(batch_size * float(lengths.mean()) / length))
        steps["packing"] = {(size, length): epochs * _batches(rows, size)}
    parts = {way: costs.of_run(some) for way, some in steps.items()}
    seconds = {way: sum(part) for way, part in parts.items()}
    return BatchesChoice(
        min(seconds, key=lambda way: seconds[way]),
        seconds,
        {way: part[0] for way, part in parts.items()},
        {way: part[1] for way, part in parts.items()},
        steps,
        boundaries,
    )


def _batches(rows: int, size: int) -> int:
    return -(-rows // size)


def _dynamic(lengths: np.ndarray, size: int, multiple: int, epochs: int) -> Steps:
    """Random batches, each as long as its longest row rounded up; as ``PaddedBatches`` plans them with seed 0."""
    starts = np.arange(0, len(lengths), size)
    found: Counter[int] = Counter()
    for epoch in range(epochs):
        order = np.random.default_rng((0, epoch, 0)).permutation(len(lengths))
        longest = np.maximum.reduceat(lengths[order], starts)
        found.update((-(-longest // multiple) * multiple).tolist())
    return {(size, length): float(count) for length, count in sorted(found.items())}


def _bucketed(lengths: np.ndarray, boundaries: tuple[int, ...], size: int, tokens: int, epochs: int) -> Steps:
    sizes = [tokens // boundary for boundary in boundaries]
    plan = plan_epoch(lengths, epoch=0, seed=0, boundaries=boundaries, batch_sizes=sizes, cap=size)
    counts = Counter((batch.size, batch.length) for batch in plan)
    return {shape: float(epochs * count) for shape, count in sorted(counts.items())}
