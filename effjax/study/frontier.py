"""The arms that no other arm beats in both quality and cost."""

import math
from collections.abc import Mapping


def pareto(points: Mapping[str, tuple[float, float]], goal: str) -> list[str]:
    """Names of the undominated ``(cost, quality)`` points, cheapest first; NaN is never on the frontier.

    Example:
      >>> pareto({"a": (1.0, 0.9), "b": (2.0, 0.8), "c": (3.0, 0.95)}, "max")
      ['a', 'c']
    """
    sign = 1.0 if goal == "max" else -1.0
    best = -math.inf
    frontier = []
    finite = {name: point for name, point in points.items() if all(map(math.isfinite, point))}
    for name, (_, quality) in sorted(finite.items(), key=lambda item: (item[1][0], -sign * item[1][1])):
        if sign * quality > best:
            best = sign * quality
            frontier.append(name)
    return frontier
