"""What the FPTT study claims, and what a user should doubt."""

import math
from collections.abc import Callable, Mapping, Sequence

from effjax.recipes.spec import Axis, Claim, Metrics

SOLVED, PLATEAU = 0.05, 0.14
"""squared errors of the adding problem that are a solution, and hardly better than always answering 1 (1/6)"""


def quality_claims(group: str, axis: Axis, arms: Sequence[str], strengths: Mapping[str, float]) -> list[Claim]:
    """Claims on what was learned.

    Args:
      group: of the arms.
      axis: what the group is judged by.
      arms: names of the arms in the group.
      strengths: name -> alpha of FPTT's arms.
    """
    op, better = (">=", "at least") if axis.goal == "max" else ("<=", "at most")
    methods, least = list(strengths), min(strengths, key=strengths.__getitem__)
    exact = [name for name in arms if name == "bptt" or name.removeprefix("bptt-")[:1].isdigit()]
    margin = 0.05 if "-permuted-" in group else 0.0

    def claim(text: str, left: Sequence[str], right: Sequence[str], margin: float = 0.0) -> Claim:
        best = lambda m, names: _best((m[f"{group}/{name}"].get(axis.metric, math.nan) for name in names), axis.goal)
        return Claim(f"{group}: {text}", lambda m: best(m, left), op, lambda m: best(m, right) + margin)

    found = _adding_claims(group, strengths) if axis.metric == "mse" else []
    found += [
        claim(
            f"updates in every part, without regulariser or with the weakest: {axis.label} {better} BPTT's"
            f"{f' + {margin:g}' if margin else ''}",
            ["chunked", least],
            ["bptt"],
            margin,
        ),
        claim(f"the regulariser helps: FPTT at its best alpha is {better} updates without it", methods, ["chunked"]),
    ]
    if len(exact) > 1:
        found.insert(-1, claim(f"... and {better} BPTT's at its best rate", ["chunked", least], exact))
    if "bptt-losses" in arms:
        text = f"the updates do it, not the losses: without regulariser they are {better} BPTT with the same losses"
        found.append(claim(text, ["chunked"], ["bptt-losses"]))
    if "bptt-small" in arms:
        text = f"smaller batches would not do: FPTT at its best alpha is {better} BPTT with as many updates"
        found.append(claim(text, methods, ["bptt-small"]))
    return found


def memory_claims(groups: Mapping[int, str]) -> list[Claim]:
    """Claims on the temporary bytes of a step, for groups of arms by the length of their sequences."""
    short, long = min(groups), max(groups)
    of = lambda c, length, arm: c[f"{groups[length]}/{arm}"]["temp_bytes"]

    def growth(arm: str) -> Callable[[Metrics], float]:
        return lambda c: of(c, long, arm) / of(c, short, arm)

    name = f"T = {long:,} against {short} ({groups[long]}, {groups[short]})"
    flat = {"fptt": "FPTT", "chunked": "an update a part", "tbptt": "truncated BPTT"}
    found = [
        Claim(f"{name}: {label}: at most 1.05 x the temporary bytes", growth(arm), "<=", lambda c: 1.05, "cost")
        for arm, label in flat.items()
    ]
    found += [
        Claim(
            f"{name}: BPTT: at least 0.75 x {long / short:g} times as many",
            growth("bptt"),
            ">=",
            lambda c: 0.75 * long / short,
            "cost",
        ),
        Claim(
            f"{groups[long]}: FPTT needs fewer temporary bytes than BPTT with remat",
            lambda c: of(c, long, "fptt"),
            "<=",
            lambda c: of(c, long, "bptt-remat"),
            "cost",
        ),
    ]
    return found


def time_claims(group: str) -> list[Claim]:
    """Claims on the time of a step."""
    step = lambda c, arm: c[f"{group}/{arm}"]["step_ms"]

    def claim(text: str, left: str, right: str, most: float) -> Claim:
        return Claim(f"{group}: {text}", lambda c: step(c, left) / step(c, right), "<=", lambda c: most, "cost")

    return [
        claim("FPTT takes at most 1.25 x BPTT's time for a sequence", "fptt", "bptt", 1.25),
        claim("... and no more than BPTT with remat, the exact gradient in little memory", "fptt", "bptt-remat", 1.0),
        claim("the regulariser takes at most a tenth more than updates without it", "fptt", "chunked", 1.1),
    ]


def _adding_claims(group: str, strengths: Mapping[str, float]) -> list[Claim]:
    mse = lambda arm: lambda m: m[f"{group}/{arm}"].get("mse", math.nan)
    solvers = {"chunked": "updates in every part without regulariser"}
    solvers |= {name: f"FPTT, alpha {alpha:g}" for name, alpha in strengths.items() if alpha <= 0.02}
    return [
        Claim(f"{group}: {label} solve{'s' * (name != 'chunked')} it", mse(name), "<=", lambda m: SOLVED)
        for name, label in solvers.items()
    ] + [Claim(f"{group}: BPTT stays on the plateau", mse("bptt"), ">=", lambda m: PLATEAU)]


def _best(values: Sequence[float], goal: str) -> float:
    """The best of the values that are numbers; NaN if none is."""
    numbers = [value for value in values if not math.isnan(value)]
    return (max if goal == "max" else min)(numbers, default=math.nan)
