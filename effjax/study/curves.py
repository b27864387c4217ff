"""Curves of evaluations: checked, averaged over seeds, told in the report and drawn in panels of their own."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from effjax.recipes.spec import CurveText
from effjax.study.axes import COLOURS, plain_axis
from effjax.train.program import Curve

NUMBERED = 14  # curves of a panel that get their arm's number


def curve_json(arm: str, name: str, curve: Curve) -> dict[str, Any]:
    """A curve of one seed as the books keep it, checked.

    Args:
      arm: for the message.
      name: of the curve.
      curve: from ``Program.evaluate``.

    Raises:
      ValueError: no vectors of one length of two or more, x that does not increase, or a point that is no pair.

    Example:
      >>> curve_json("ce", "risk", Curve([0.5, 1.0], [0.1, 0.2]))
      {'x': [0.5, 1.0], 'y': [0.1, 0.2]}
    """
    x, y = (np.asarray(part, np.float64) for part in (curve.x, curve.y))
    where = f"curve {name!r} of {arm}"
    if x.ndim != 1 or x.shape != y.shape or len(x) < 2:
        raise ValueError(f"{where}: x has shape {x.shape} and y {y.shape}; give two vectors of one length, 2 or more.")
    if not np.isfinite(x).all() or not (np.diff(x) > 0).all():
        raise ValueError(f"{where}: x must increase and be finite: one fixed grid of the study.")
    points = {}
    for point, place in curve.points.items():
        if np.shape(place) != (2,):
            raise ValueError(f"{where}: point {point!r} has shape {np.shape(place)}; give (x, y).")
        points[point] = [float(part) for part in place]
    return {"x": x.tolist(), "y": y.tolist(), **({"points": points} if points else {})}


def mean_curves(arm: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per name the mean curve of an arm and its spread; empty where it has none.

    Args:
      arm: for the message.
      runs: one mapping from names to ``curve_json`` for each seed that ended well.

    Returns:
      ``{name: {"x", "mean", "std", "points"}}``; the sample standard deviation, 0 for one seed. NaN where a seed has
      none.

    Raises:
      ValueError: seeds whose curves lie on different grids.
    """
    found = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        curves = [run[name] for run in runs if name in run]
        x = curves[0]["x"]
        if len(curves) < len(runs) or any(curve["x"] != x for curve in curves):
            raise ValueError(
                f"curve {name!r} of {arm} has another x, or none, with another seed: seeds cannot be averaged. Read "
                "the curve on one fixed grid, by interpolation or at given coverages."
            )
        columns = [[_number(y) for y in column] for column in zip(*(curve["y"] for curve in curves), strict=True)]
        found[name] = {
            "x": x,
            "mean": [statistics.fmean(column) for column in columns],
            "std": [_deviation(column) for column in columns],
        }
        places = [curve["points"] for curve in curves if "points" in curve]
        if places:
            found[name]["points"] = {
                point: [
                    statistics.fmean(_number(place[point][axis]) for place in places if point in place)
                    for axis in (0, 1)
                ]
                for point in dict.fromkeys(point for place in places for point in place)
            }
    return found


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _deviation(column: Sequence[float]) -> float:
    if not all(map(math.isfinite, column)):
        return math.nan
    return statistics.stdev(column) if len(column) > 1 else 0.0


def curve_texts(declared: Mapping[str, CurveText], arms: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """What the curves of a group's arms are called; one that the group does not name has its own name."""
    given = dict.fromkeys(name for arm in arms.values() for name in arm.get("curves", {}))
    names = [*(name for name in declared if name in given), *(name for name in given if name not in declared)]
    return {name: declared.get(name, CurveText(name, "x", "y"))._asdict() for name in names}


def curves_in(results: Mapping[str, Any], group: str) -> dict[str, dict[str, str]]:
    """The panels of a group: name to title and labels."""
    return results.get("curves", {}).get(group, {})


def about_curves(results: Mapping[str, Any], group: str) -> Iterator[str]:
    """The paragraph of the report."""
    texts = curves_in(results, group)
    if not texts:
        return
    several = len(results["seeds"]) > 1
    spread = "mean over seeds, with a band of one standard deviation around the methods" if several else "one seed"
    yield f"Curves in report.png ({spread}; the numbers are in results.json, in `curves` of each arm):"
    yield "\n".join(f"- {text['title']}: {text['y']} against {text['x']}." for text in texts.values())


# Drawing


def panel_rows(texts: Mapping[str, Any]) -> int:
    """Rows of panels."""
    return math.ceil(len(texts) / _columns(texts)) if texts else 0


def _columns(texts: Mapping[str, Any]) -> int:
    """Panels in a row: three, but four panels are two rows of two."""
    return 2 if len(texts) == 4 else min(len(texts), 3)


def curve_panels(part: Any, texts: Mapping[str, Any], arms: Mapping[str, Any], numbers: Mapping[str, int]) -> None:
    """Draw one panel for each curve into a subfigure."""
    panels = part.subplots(panel_rows(texts), _columns(texts), squeeze=False).ravel()
    for panel, (name, text) in zip(panels, texts.items(), strict=False):
        lines = {arm: arms[arm]["curves"][name] for arm in numbers if name in _own_curves(arms[arm])}
        _panel(panel, text, lines, arms, numbers)
    for panel in panels[len(texts) :]:
        panel.axis("off")


def _own_curves(arm: Mapping[str, Any]) -> Mapping[str, Any]:
    """A sweep has those of its best member, which are drawn already."""
    return {} if arm["role"] == "sweep" else arm.get("curves", {})


def _panel(panel: Any, text: Mapping[str, str], lines: Mapping[str, Any], arms, numbers: Mapping[str, int]) -> None:
    for name, line in lines.items():
        role = arms[name]["role"]
        loud = role == "method"
        mean, std = _floats(line["mean"]), _floats(line["std"])
        panel.plot(
            line["x"],
            mean,
            color=COLOURS[role],
            alpha=0.95 if loud else 0.6,
            linewidth=1.6 if loud else 1.0,
            zorder=3 if loud else 2,
        )
        if loud and np.nanmax(std, initial=0) > 0:
            panel.fill_between(
                line["x"], mean - std, mean + std, color=COLOURS[role], alpha=0.12, linewidth=0, zorder=1
            )
    _points(panel, lines)
    _inline_numbers(panel, lines, arms, numbers)
    plain_axis(panel.xaxis, *panel.get_xlim(), log=False)
    plain_axis(panel.yaxis, *panel.get_ylim(), log=False)
    panel.set_title(text["title"], fontsize=11)
    panel.set_xlabel(text["x"])
    panel.set_ylabel(text["y"])
    panel.grid(alpha=0.25)


def _inline_numbers(panel: Any, lines: Mapping[str, Any], arms, numbers: Mapping[str, int]) -> None:
    """Each arm's number on its own curve, every one at another place along x: curves often meet at their ends."""
    named = list(lines)[:NUMBERED]
    for place, name in enumerate(named):
        x, mean = np.asarray(lines[name]["x"]), _floats(lines[name]["mean"])
        at = x[0] + (x[-1] - x[0]) * (0.15 + 0.7 * (place + 0.5) / len(named))
        panel.text(
            at,
            np.interp(at, x, mean),
            str(numbers[name]),
            color=COLOURS[arms[name]["role"]],
            fontsize=8,
            ha="center",
            va="center",
            zorder=5,
            bbox={"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        )


def _points(panel: Any, lines: Mapping[str, Any]) -> None:
    """Named points as rings; the name beside the first arm's alone, the best one's."""
    drawn, named = set(), set()
    for line in lines.values():
        for name, place in line.get("points", {}).items():
            x, y = _floats(place)
            if (key := (name, round(float(x), 9), round(float(y), 9))) in drawn or not np.isfinite([x, y]).all():
                continue
            drawn.add(key)
            panel.plot(x, y, "o", markersize=7, markerfacecolor="white", markeredgecolor="black", zorder=4)
            if name not in named:
                named.add(name)
                left, under = x < sum(panel.get_xlim()) / 2, y > sum(panel.get_ylim()) / 2
                panel.annotate(
                    name,
                    (x, y),
                    xytext=(9 if left else -9, -3 if under else 3),
                    textcoords="offset points",
                    ha="left" if left else "right",
                    va="top" if under else "bottom",
                    fontsize=9,
                    zorder=6,
                )


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([_number(value) for value in values], np.float64)
