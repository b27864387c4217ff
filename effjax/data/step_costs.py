"""What compiling and training on batches of any shape takes, from two shapes that were measured."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from effjax.core.errors import check_number

__all__ = ["StepCosts", "fit_step_costs"]


class StepCosts(NamedTuple):
    r"""Seconds of a run as a function of its batch shapes.

    A step on B rows of L tokens, and n programs, take

    .. math:: t(B, L) = s + B\,(a L + b L^2), \qquad C(n) = c \max(1, n / p)

    where b is attention's, whose pairs grow with the square, and p programs compile in the time of one. A plain tuple
    of numbers: keep it as JSON, and every process and every start of a run decides alike.

    Attributes:
      compile_s: c, seconds of one program.
      token_s: a, seconds a token.
      step_s: s, seconds of a step whatever its size.
      pair_s: b, seconds a pair of tokens of a row.
      at_once: p, programs that compile in the time of one.

    Example:
      >>> costs = StepCosts(compile_s=5.0, token_s=1e-4, step_s=0.01, at_once=2.0)
      >>> costs.of_compiling(9), round(costs.of_step(32, 64), 4)
      (22.5, 0.2148)
      >>> compiling, training = costs.of_run({(32, 16): 100, (32, 64): 10})
      >>> compiling, round(training, 4)
      (5.0, 8.268)
    """

    compile_s: float
    token_s: float
    step_s: float = 0.0
    pair_s: float = 0.0
    at_once: float = 1.0

    def of_step(self, rows: float, length: float) -> float:
        """Seconds of a step on so many rows of so many tokens."""
        return self.step_s + rows * length * (self.token_s + self.pair_s * length)

    def of_compiling(self, shapes: int) -> float:
        """Seconds of compiling so many programs."""
        return self.compile_s * max(1.0, shapes / self.at_once)

    def of_run(self, steps: Mapping[tuple[int, int], float]) -> tuple[float, float]:
        """Seconds of compiling and of training, for a run of so many steps in each shape ``(rows, tokens)``."""
        trained = sum(count * self.of_step(*shape) for shape, count in steps.items())
        return self.of_compiling(len(steps)), trained


def check_costs(costs: StepCosts | None) -> StepCosts:
    """``costs``, if they are numbers that can be."""
    if costs is None:
        raise ValueError(
            "costs=None: what compiling and a step take is not known. Measure it, "
            "costs=effjax.train.measure_costs(step, arguments), or give numbers, "
            "costs=effjax.data.StepCosts(compile_s=..., token_s=...)."
        )
    for name, value in costs._asdict().items():
        check_number(f"costs.{name}", value, low=1.0 if name == "at_once" else 0.0)
    return costs


def fit_step_costs(
    shapes: Sequence[tuple[int, int]],
    step_s: Sequence[float],
    *,
    compile_s: float,
    at_once: float = 1.0,
    macs: Sequence[float] | None = None,
) -> StepCosts:
    r"""The costs that two measured steps have.

    The multiply-adds of a transformer are :math:`B(\alpha L + \beta L^2)`: two shapes tell :math:`\beta / \alpha`, and
    two times then tell the seconds of a step and of a multiply-add.

    Args:
      shapes: two ``(rows, tokens)`` of different lengths, best the shortest and the longest of the run.
      step_s: seconds of a step in each.
      compile_s: seconds of one program.
      at_once: programs that compile in the time of one.
      macs: multiply-adds of a step in each; None takes the work for its tokens.

    Returns:
      The costs. Where the times contradict the work (a larger step that is not slower), a step costs what the mean of
      the two does, whatever its size.

    Raises:
      ValueError: not two shapes of different lengths, or numbers that cannot be.

    Example:
      >>> costs = fit_step_costs([(32, 8), (32, 64)], [0.02, 0.132], compile_s=5.0)
      >>> round(costs.step_s, 6), round(costs.token_s * 32 * 8, 6)
      (0.004, 0.016)
    """
    if len(shapes) != 2 or shapes[0][1] == shapes[1][1]:
        raise ValueError(f"shapes={list(shapes)} must be two (rows, tokens) of different lengths.")
    for name, values in (("step_s", step_s), ("macs", macs)):
        if values is not None and len(values) != 2:
            raise ValueError(f"{name}={list(values)} must hold one number for each of the two shapes.")
    for index, seconds in enumerate(step_s):
        check_number(f"step_s[{index}]", seconds, low=0, open_low=True)
    alpha, beta = _per_row(shapes, macs)
    work = [rows * (alpha * length + beta * length**2) for rows, length in shapes]
    (small, less), (large, more) = sorted(zip(work, step_s, strict=True))
    slope = (more - less) / (large - small) if large > small else 0.0
    fixed = less - slope * small
    if slope < 0 or large == small:
        slope, fixed = 0.0, (less + more) / 2
    elif fixed < 0:
        slope, fixed = more / large, 0.0
    return check_costs(StepCosts(compile_s, slope * alpha, fixed, slope * beta, at_once))


def _per_row(shapes: Sequence[tuple[int, int]], macs: Sequence[float] | None) -> tuple[float, float]:
    """What a token and a pair of tokens cost, in multiply-adds; of tokens alone 1 and 0."""
    if macs is None:
        return 1.0, 0.0
    (rows, short), (others, long) = shapes
    first, second = macs[0] / (rows * short), macs[1] / (others * long)  # alpha + beta L
    beta = max(0.0, (second - first) / (long - short))
    return (max(0.0, first - beta * short), beta) if beta else (1.0, 0.0)
