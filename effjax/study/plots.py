"""report.png: a row for each group: quality against measured cost, the arms' names, and the training curves."""

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effjax.recipes.spec import Axis
from effjax.study.frontier import pareto
from effjax.study.results import mean

COLOURS = {
    "method": "#c0392b",
    "baseline": "#6c7a7d",
    "alternative": "#2471a3",
    "control": "#b7950b",
    "sweep": "#1e8449",
}
MARKERS = {"method": "D", "baseline": "o", "alternative": "s", "control": "^", "sweep": "P"}
NUMBER_WIDTH, NUMBER_HEIGHT = 15, 13  # pixels


def draw(results: Mapping[str, Any], axes: Mapping[str, Axis], curves: Mapping[str, Any], path: Path) -> None:
    """Draw the report's picture without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups: dict[str, dict[str, Any]] = {}
    for name, arm in results["arms"].items():
        groups.setdefault(arm["group"], {})[name] = arm
    ratios = [1.0, 0.5, 1.0] if curves else [1.0, 0.5]
    figure = Figure(figsize=(6.4 * sum(ratios), 5.2 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(groups), len(ratios), squeeze=False, width_ratios=ratios)
    figure.suptitle(f"{results['study']}: {results['preset']}", fontsize=13)
    for row, (group, arms) in zip(panels, groups.items(), strict=True):
        points = _points(arms, axes[group], trained=bool(curves))
        numbers = _list(row[1], arms, points, axes[group])
        _quality(row[0], group, arms, points, numbers, axes[group], trained=bool(curves))
        if curves:
            _curves(row[2], arms, curves)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=100, format="png")
    partial.replace(path)


def _points(arms: Mapping[str, Any], axis: Axis, *, trained: bool) -> dict[str, tuple[float, float]]:
    """(cost, quality) of every arm that has both; without training, (step ms, peak MB)."""
    points = {}
    for name, arm in arms.items():
        cost = arm["cost"]["train_s"] if trained else arm["cost"]["step_ms"]
        quality = mean(arm, axis.metric) if trained else (arm["cost"]["peak_bytes"] or math.nan) / 1e6
        if cost is not None and math.isfinite(quality):
            points[name] = (cost, quality)
    return points


def _list(panel, arms: Mapping[str, Any], points: Mapping[str, tuple[float, float]], axis: Axis) -> dict[str, int]:
    """Write the arms' names, best first, and return their numbers."""
    panel.axis("off")
    ranked = sorted(points, key=lambda name: points[name][1], reverse=axis.goal == "max")
    missing = [name for name in arms if name not in points]
    for index, name in enumerate([*ranked, *missing]):
        quality = f"{points[name][1]:.4g}" if name in points else "diverged"
        text = f"{index + 1:>2}  {arms[name]['label']}  {quality}"
        height = 1 - (index + 0.5) / max(18, len(arms))
        panel.text(
            0, height, text, transform=panel.transAxes, fontsize=8, color=COLOURS[arms[name]["role"]], va="center"
        )
    return {name: index + 1 for index, name in enumerate(ranked)}


def _quality(panel, group, arms, points, numbers, axis: Axis, *, trained: bool) -> None:
    """Every arm as a point with its number; bars are one standard deviation over seeds."""
    goal = axis.goal if trained else "min"
    shown = _frame(panel, points, goal)
    for name, (cost, quality) in shown.items():
        role = arms[name]["role"]
        panel.errorbar(
            cost,
            quality,
            yerr=(arms[name]["metrics"][axis.metric]["std"] if trained else 0) or None,
            fmt=MARKERS[role],
            color=COLOURS[role],
            markersize=8 if role in ("method", "sweep") else 6,
            capsize=2,
            elinewidth=1,
        )
    frontier = pareto(points, goal)
    if len(frontier) > 1:
        panel.step(*zip(*(points[name] for name in frontier), strict=True), where="post", color="#bbbbbb", zorder=0)
    _number(panel, {numbers[name]: (point, arms[name]["role"]) for name, point in shown.items()})
    outside = sorted(numbers[name] for name in points if name not in shown)
    note = f"; worse than the frame: {', '.join(map(str, outside))}" if outside else ""
    panel.set_title(f"{group}{note}", fontsize=10)
    if trained:
        panel.set_xlabel("training seconds (a sweep: all its runs)")
        panel.set_ylabel(f"{axis.label}  ({'lower' if goal == 'min' else 'higher'} is better)")
    else:
        panel.set_xlabel("step, ms")
        panel.set_ylabel("peak MB of a step")
    panel.grid(alpha=0.25, which="both")


def _frame(panel, points: Mapping[str, tuple[float, float]], goal: str) -> dict[str, tuple[float, float]]:
    """Set the axes so that diverging arms do not squeeze the rest; return the points inside."""
    costs = [cost for cost, _ in points.values()]
    if max(costs) > 4 * min(costs) > 0:
        panel.set_xscale("log")
    best = (min if goal == "min" else max)(quality for _, quality in points.values())
    behind = {name: abs(quality - best) for name, (_, quality) in points.items()}
    limit = 5 * statistics.median(behind.values()) or math.inf
    shown = {name: point for name, point in points.items() if behind[name] <= limit}
    values = [quality for _, quality in shown.values()]
    margin = 0.06 * (max(values) - min(values)) or 0.05 * abs(best) or 1.0
    panel.set_ylim(min(values) - margin, max(values) + margin)
    return shown


def _number(panel, labels: Mapping[int, tuple[tuple[float, float], str]]) -> None:
    """Write each arm's number beside its point, moved up while it would cover another number."""
    panel.figure.draw_without_rendering()
    taken: list[tuple[float, float]] = []
    for number, (point, role) in labels.items():
        x, y = panel.transData.transform(point)
        shift = 0.0
        while any(abs(y + shift - b) < NUMBER_HEIGHT and abs(x - a) < NUMBER_WIDTH for a, b in taken):
            shift += 2.0
        taken.append((x, y + shift))
        panel.annotate(
            str(number),
            point,
            xytext=(6, shift * 72 / panel.figure.dpi + 2),
            textcoords="offset points",
            fontsize=8,
            color=COLOURS[role],
            annotation_clip=False,
        )


def _curves(panel, arms: Mapping[str, Any], curves: Mapping[str, Any]) -> None:
    """Training loss over steps, mean over seeds: the methods in front."""
    lowest, first = math.inf, 0.0
    for name, arm in arms.items():
        runs = list(curves.get(name, {}).values())
        length = min((len(run["step"]) for run in runs), default=0)
        if not length or any(loss is None for run in runs for loss in run["loss"][:length]):
            continue
        loss = [statistics.fmean(run["loss"][i] for run in runs) for i in range(length)]
        loud = arm["role"] == "method"
        lowest, first = min(lowest, *loss), max(first, loss[0])
        panel.plot(
            runs[0]["step"][:length],
            loss,
            color=COLOURS[arm["role"]],
            alpha=0.95 if loud else 0.45,
            linewidth=1.8 if loud else 0.9,
            zorder=3 if loud else 1,
        )
    for role in dict.fromkeys(arm["role"] for name, arm in arms.items() if name in curves):
        panel.plot([], [], color=COLOURS[role], label=role)
    panel.set_yscale("log")
    if 0 < lowest < first:
        panel.set_ylim(0.7 * lowest, 4 * first)
    panel.set_xlabel("step")
    panel.set_ylabel("training loss (mean over seeds)")
    panel.legend(fontsize=8)
    panel.grid(alpha=0.25, which="both")
