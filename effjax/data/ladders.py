"""The boundaries of buckets that cost least in all, compiling included."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Integer

from effjax.core.errors import check_number
from effjax.data.step_costs import StepCosts, check_costs

__all__ = ["cheapest_ladder"]

MOST_SHAPES = 48
"""Programs that a ladder may need at most, where the costs alone decide."""


def cheapest_ladder(
    lengths: Integer[np.ndarray, "n"],
    costs: StepCosts,
    *,
    caps: Sequence[int] = (64,),
    tokens: int = 8192,
    multiple: int = 8,
    length_multiple: int = 1,
) -> tuple[int, ...]:
    r"""The boundaries whose predicted seconds of compiling and training are least.

    .. math:: \min_{c,\; r_1 < \dots < r_c} C(\mathrm{shapes}) + \sum_e \sum_j \frac{n_j}{B_j(e)}\, t(B_j(e), r_j)

    with :math:`n_j` examples in the j-th bucket, :math:`B_j(e) = \min(\mathrm{cap}(e), \lfloor \mathrm{tokens} / r_j
    \rfloor_m)` rows in a batch and the costs C and t of ``StepCosts``. Exact for this sum, by dynamic programming over
    the distinct rounded lengths and the number of programs; residues that ``BucketSampler`` carries upward are not in
    it. A pure function: equal arguments give equal boundaries on every host.

    Args:
      lengths: tokens of every example of an epoch.
      costs: of compiling and of a step.
      caps: largest batch of each epoch.
      tokens: padded tokens of a batch, at most.
      multiple: every batch size is a multiple of it.
      length_multiple: every boundary is a multiple of it.

    Returns:
      Strictly increasing boundaries; the last one holds the longest example. At most 48 programs.

    Raises:
      ValueError: no lengths, caps that need more than 48 programs even for one boundary, or arguments out of range.

    Example:
      >>> lengths = np.array([4] * 900 + [32] * 100)
      >>> cheapest_ladder(lengths, StepCosts(compile_s=5.0, token_s=1e-3), caps=(32,) * 2)
      (4, 32)
      >>> cheapest_ladder(lengths, StepCosts(compile_s=60.0, token_s=1e-3), caps=(32,) * 2)
      (32,)
    """
    check_costs(costs)
    check_number("length_multiple", length_multiple, low=1, integer=True)
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or not lengths.size or lengths.dtype.kind not in "iu" or lengths.min() < 0:
        raise ValueError(
            f"lengths is {lengths.dtype}{list(lengths.shape)}; it must be integers of 0 or more, not empty."
        )
    rungs, counts = np.unique(np.maximum(-(-lengths // length_multiple), 1) * length_multiple, return_counts=True)
    check_number("tokens", tokens, low=multiple * int(rungs[-1]), integer=True)
    sizes = [[min(cap, tokens // int(rung) // multiple * multiple) for cap in caps] for rung in rungs]
    each = [
        sum(costs.of_step(size, float(rung)) / size for size in by_epoch)
        for rung, by_epoch in zip(rungs, sizes, strict=True)
    ]
    shapes = [len(set(by_epoch)) for by_epoch in sizes]
    if shapes[-1] > MOST_SHAPES:
        raise ValueError(f"caps={tuple(caps)} need {shapes[-1]} programs for one boundary; {MOST_SHAPES} are the most.")
    ends = _least(counts, np.array(each), shapes, [costs.of_compiling(n) for n in range(1, MOST_SHAPES + 1)])
    return tuple(int(rungs[end]) for end in ends)


def _least(
    counts: Integer[np.ndarray, "m"], each: Float[np.ndarray, "m"], shapes: Sequence[int], compiling: Sequence[float]
) -> list[int]:
    """Indices of the last rung of each run of the cheapest partition.

    Args:
      counts: examples of each rung.
      each: seconds of an example that is padded to the rung.
      shapes: programs of a run that ends with the rung.
      compiling: seconds of 1, 2, ... programs.
    """
    before = np.concatenate([[0], np.cumsum(counts)])
    # seconds[n, i]: least of the first i rungs with n programs; cut[n, i]: where its last run starts.
    seconds = np.full((len(compiling) + 1, len(counts) + 1), np.inf)
    seconds[0, 0] = 0.0
    cut = np.zeros(seconds.shape, int)
    for end in range(1, len(counts) + 1):
        more = shapes[end - 1]
        own = each[end - 1] * (before[end] - before[:end])
        found = seconds[: len(compiling) + 1 - more, :end] + own
        cut[more:, end] = found.argmin(1)
        seconds[more:, end] = found.min(1)
    programs, end = int(np.argmin(seconds[1:, -1] + compiling)) + 1, len(counts)
    ends = []
    while end:
        ends.append(end - 1)
        programs, end = programs - shapes[end - 1], int(cut[programs, end])
    return ends[::-1]
