"""report.png: per group quality against total seconds, training seconds and memory; the arms' names; losses; curves."""

import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from effjax.core.storage import Folder, write_bytes
from effjax.study.advice import chosen, members, ranked, spread
from effjax.study.axes import COLOURS, plain_axis
from effjax.study.claims import value
from effjax.study.curves import curve_panels, curves_in, panel_rows
from effjax.study.frontier import pareto

MARKERS = {"method": "D", "baseline": "o", "alternative": "s", "control": "^", "sweep": "P"}
NUMBER_HEIGHT, MARK = 13, 5  # pixels
NEAR = 8  # pixels within which points share one label
LISTED = 14  # names per column
QUALITY = 4.2  # inches, the height of the panels of quality
PANEL = 3.8  # inches, of a row of curves
FAR = 3.0  # medians of the distances from the best, beyond which an arm lies outside the frame


Labels = Mapping[int, tuple[tuple[float, float], str]]
"""Per number of an arm the point that it stands beside, and the arm's role."""


class Cost(NamedTuple):
    """What a panel shows along x."""

    name: str
    label: str
    factor: float = 1.0


COSTS = (
    Cost("total_s", "total seconds: compile + train + evaluate"),
    Cost("train_s", "training seconds"),
    Cost("peak_bytes", "peak MB of a step", 1e-6),
)


def draw(results: Mapping[str, Any], curves: Mapping[str, Any], path: Folder) -> None:
    """Write the picture as a PNG file."""
    write_bytes(path, picture(results, curves))


def picture(results: Mapping[str, Any], curves: Mapping[str, Any]) -> bytes:
    """The picture as the bytes of a PNG file, made without a display."""
    file = io.BytesIO()
    figure(results, curves).savefig(file, dpi=100, format="png")
    return file.getvalue()


def figure(results: Mapping[str, Any], curves: Mapping[str, Any]):
    """The picture as a figure of matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class Shown(Figure):
        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, dpi=100, format="png")
            return file.getvalue()

    groups = {group: members(results, group) for group in results["groups"]}
    groups = {group: arms for group, arms in groups.items() if arms}
    texts = {group: curves_in(results, group) for group in groups}
    heights = [_height(arms, curves, texts[group]) for group, arms in groups.items()]
    whole = Shown(figsize=(13.5, sum(heights) + 0.5), layout="constrained")
    FigureCanvasAgg(whole)
    trained = any(map(_trained, groups.values()))
    note = "    ring: the arm to take; line: the front" if trained else ""
    whole.suptitle(f"{results['study']}: {results['preset']}{note}", fontsize=13)
    parts = whole.subfigures(len(groups), 1, squeeze=False, height_ratios=heights, hspace=0.03)
    labels: list[tuple[Any, Labels]] = []
    for (part,), (group, arms) in zip(parts, groups.items(), strict=True):
        labels += _group(part, group, arms, results["groups"][group], curves, texts[group])
    whole.draw_without_rendering()  # now the points have their places, and keep them: layout is most of the time
    whole.set_layout_engine("none")
    for panel, numbers in labels:
        _number(panel, numbers)
    return whole


def _height(arms: Mapping[str, Any], curves: Mapping[str, Any], texts: Mapping[str, Any]) -> float:
    if not _trained(arms):
        return 1.0 + 0.36 * len(arms)
    return QUALITY + PANEL * panel_rows(texts) + _list_height(arms, curves)


def _list_height(arms: Mapping[str, Any], curves: Mapping[str, Any]) -> float:
    """Of the arms' names, with the training curves beside them if there are any."""
    return 3.4 if _curves_of(arms, curves) else 0.3 + 0.2 * _tall(len(arms), 3)


def _trained(arms: Mapping[str, Any]) -> bool:
    return any(arm["metrics"] for arm in arms.values())


def _group(
    part, group: str, arms, metric: Mapping[str, str], curves: Mapping[str, Any], texts: Mapping[str, Any]
) -> list[tuple[Any, Labels]]:
    """Draw a group; return the panels whose points get numbers, with these."""
    if not _trained(arms):
        _cost_only(part.subplots(1, 2), group, arms)
        return []
    order = ranked(arms, metric)
    numbers = {name: index + 1 for index, name in enumerate(order)}
    costs = [cost for cost in COSTS if any(_finite(arm["cost"].get(cost.name)) for arm in arms.values())]
    lines = _curves_of(arms, curves)
    heights = [QUALITY, _list_height(arms, curves), *([PANEL * panel_rows(texts)] if texts else [])]
    rows = part.subfigures(len(heights), 1, height_ratios=heights)
    if texts:
        curve_panels(rows[2], texts, arms, numbers)
    frame = _Frame({name: value(arms[name], metric["name"]) for name in order}, arms, metric)
    note = f"   (worse than the frame: {ranges([numbers[name] for name in frame.outside])})" if frame.outside else ""
    rows[0].suptitle(f"{group}{note}", fontsize=12)
    panels = rows[0].subplots(1, max(1, len(costs)), squeeze=False, sharey=True)[0]
    labels = [
        (panel, _quality(panel, arms, metric, frame, numbers, cost))
        for panel, cost in zip(panels, costs or [None], strict=True)
    ]
    panels[0].set_ylabel(f"{metric['label']}\n({'lower' if metric['goal'] == 'min' else 'higher'} is better)")
    if not lines:
        _names(rows[1].subplots(1, 1), arms, metric, order, 3)
        return labels
    columns = math.ceil(len(order) / LISTED)
    names, panel = rows[1].subplots(1, 2, width_ratios=[1.1 if columns == 1 else 1.6, 1])
    _names(names, arms, metric, order, columns)
    return [*labels, (panel, _curves(panel, lines, arms, numbers))]


def _finite(found: float | None) -> bool:
    return found is not None and math.isfinite(found)


class _Frame:
    """The range of y: the arms that compete, so that one that failed does not squeeze the rest."""

    def __init__(self, quality: Mapping[str, float], arms: Mapping[str, Any], metric: Mapping[str, str]):
        known = {name: found for name, found in quality.items() if math.isfinite(found)}
        low = metric["goal"] == "min"
        spans = lambda some, times: low and len(some) > 1 and 0 < times * min(some.values()) < max(some.values())
        if spans(known, 30):
            near = _competing({name: math.log(found) for name, found in known.items()}, min)
            self.inside = {name: known[name] for name in near}
        else:
            self.inside = known
        self.log = spans(self.inside, 10)
        if not self.log:
            self.inside = _competing(self.inside, min if low else max)
        self.outside = set(known) - set(self.inside)
        found = list(self.inside.values()) or [0.0, 1.0]
        ends = list(found)
        for name, middle in self.inside.items():
            summary = arms[name]["metrics"][metric["name"]]
            std = summary["std"] or 0.0
            ends += [middle - std, middle + std, *(seed for seed in summary["values"] if _finite(seed))]
        if self.log:
            ends = [end for end in ends if end > 0.2 * min(found)]
            self.limits = (min(ends) / 1.3, max(ends) * 1.3)
        else:
            margin = 0.05 * (max(ends) - min(ends)) or 0.05 * abs(ends[0]) or 1.0
            self.limits = (min(ends) - margin, max(ends) + margin)


def _competing(quality: Mapping[str, float], best: Callable[..., float]) -> dict[str, float]:
    """What is not much further from the best than half of the others are."""
    top = best(quality.values(), default=0.0)
    behind = {name: abs(found - top) for name, found in quality.items()}
    limit = FAR * statistics.median([far for far in behind.values() if far > 0] or [0.0])
    return {name: found for name, found in quality.items() if behind[name] <= limit}


def _quality(panel, arms, metric, frame: _Frame, numbers: Mapping[str, int], cost: Cost | None) -> Labels:
    """Every arm as a point with its number; bars are one standard deviation over seeds, small dots the seeds."""
    points = {}
    for name, quality in frame.inside.items():
        spent = arms[name]["cost"].get(cost.name) if cost else numbers[name]
        if _finite(spent):
            points[name] = (spent * (cost.factor if cost else 1.0), quality)
    _scale_x(panel, [spent for spent, _ in points.values()], log=cost is not None)
    if frame.log:
        panel.set_yscale("log")
    panel.set_ylim(*frame.limits)
    for name, (spent, quality) in points.items():
        role, found = arms[name]["role"], arms[name]["metrics"][metric["name"]]
        large = role in ("method", "sweep")
        seeds = [seed for seed in found["values"] if _finite(seed)]
        if len(seeds) > 1:
            panel.errorbar(
                spent, quality, yerr=found["std"] or None, color=COLOURS[role], capsize=2, elinewidth=0.9, alpha=0.6
            )
            panel.plot([spent] * len(seeds), seeds, ".", color=COLOURS[role], markersize=3.5, alpha=0.7, zorder=2)
        panel.plot(
            spent,
            quality,
            MARKERS[role],
            color=COLOURS[role],
            markersize=8 if large else 6,
            zorder=3,
            markeredgecolor="white",
            markeredgewidth=0.6,
        )
    advised = chosen(arms, metric)[0]
    if advised in points:
        panel.plot(*points[advised], "o", markersize=15, markerfacecolor="none", markeredgecolor="black", zorder=2)
    front = pareto(points, metric["goal"]) if cost else []
    if len(front) > 1:
        panel.step(*zip(*(points[name] for name in front), strict=True), where="post", color="#bbbbbb", zorder=0)
    plain_axis(panel.xaxis, *panel.get_xlim(), log=panel.get_xscale() == "log")
    plain_axis(panel.yaxis, *frame.limits, log=frame.log)
    panel.set_xlabel(cost.label if cost else "rank")
    panel.grid(alpha=0.25)
    return {numbers[name]: (point, arms[name]["role"]) for name, point in points.items()}


def _scale_x(panel, spent: Sequence[float], *, log: bool) -> None:
    """Limits with a margin, logarithmic if it may be and the costs differ by far."""
    low, high = min(spent, default=0.0), max(spent, default=1.0)
    if log and 0 < 4 * low < high:
        panel.set_xscale("log")
        panel.set_xlim(low / (high / low) ** 0.06, high * (high / low) ** 0.1)
    else:
        margin = (high - low) or abs(high) or 1.0
        panel.set_xlim(low - 0.06 * margin, high + 0.1 * margin)


def ranges(numbers: Sequence[int]) -> str:
    """Numbers as a short list.

    Example:
      >>> ranges([1, 2, 3, 5, 8, 9])
      '1-3, 5, 8, 9'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(parts)


def _number(panel, labels: Labels) -> None:
    """Write the arms' numbers beside their points: one label for points that nearly cover each other."""
    dpi = panel.figure.dpi
    clusters: list[tuple[float, float, list[int]]] = []
    for number, (point, _) in labels.items():
        x, y = panel.transData.transform(point)
        near = next((c for c in clusters if abs(c[0] - x) < NEAR and abs(c[1] - y) < NEAR), None)
        if near:
            near[2].append(number)
        else:
            clusters.append((x, y, [number]))
    taken = [(x - MARK, x + MARK, y) for x, y, _ in clusters]
    for x, y, numbers in clusters:
        text = ranges(numbers)
        left, width = x + 8, 7.0 * len(text)
        shifts = (step * sign for step in range(0, 200, 2) for sign in (1, -1))
        shift = next(
            shift
            for shift in shifts
            if not any(
                abs(y + shift - other) < NUMBER_HEIGHT and left < end and start < left + width
                for start, end, other in taken
            )
        )
        taken.append((left, left + width, y + shift))
        point, role = labels[numbers[0]]
        roles = {labels[number][1] for number in numbers}
        panel.annotate(
            text,
            point,
            xytext=(6, shift * 72 / dpi + 2),
            textcoords="offset points",
            fontsize=9,
            color=COLOURS[role] if len(roles) == 1 else "black",
            annotation_clip=False,
            zorder=4,
            in_layout=False,
        )


def _tall(count: int, columns: int) -> int:
    """Rows of a list of names."""
    return max(10, math.ceil(count / columns))


def _names(panel, arms: Mapping[str, Any], metric: Mapping[str, str], order: Sequence[str], columns: int) -> None:
    """The arms' numbers, names and quality, best first, in columns."""
    panel.axis("off")
    tall = _tall(len(order), columns)
    width = {1: 95, 2: 46, 3: 52}[min(columns, 3)]  # characters
    for index, name in enumerate(order):
        arm = arms[name]
        label = arm["label"] or name
        reached = spread(arm, metric["name"])
        room = width - len(reached)
        label = label if len(label) <= room else label[: room - 1].rstrip() + "…"
        x, y = (index // tall) / columns, 1 - (index % tall + 0.5) / tall
        text = f"{index + 1}  {label}:  {reached}"
        panel.plot(
            x + 0.01, y, MARKERS[arm["role"]], color=COLOURS[arm["role"]], markersize=5, transform=panel.transAxes
        )
        panel.text(
            x + 0.025,
            y,
            text,
            transform=panel.transAxes,
            fontsize=9,
            color=COLOURS[arm["role"]],
            va="center",
            in_layout=False,
        )
    panel.set_xlim(0, 1)
    panel.set_ylim(0, 1)


def _curves_of(arms: Mapping[str, Any], curves: Mapping[str, Any]) -> dict[str, tuple[list[float], list[float]]]:
    """Per arm the steps and the mean training loss over seeds, as far as every seed has them."""
    lines = {}
    for name in arms:
        runs = list(curves.get(name, {}).values())
        length = min((len(run["step"]) for run in runs), default=0)
        if length and not any(loss is None for run in runs for loss in run["loss"][:length]):
            lines[name] = (
                runs[0]["step"][:length],
                [statistics.fmean(run["loss"][i] for run in runs) for i in range(length)],
            )
    return lines


def _curves(panel, lines: Mapping[str, tuple[list[float], list[float]]], arms, numbers: Mapping[str, int]) -> Labels:
    """Training loss over steps, mean over seeds: the methods in front."""
    lowest, first = math.inf, 0.0
    for name, (steps, loss) in lines.items():
        role = arms[name]["role"]
        loud = role == "method"
        lowest, first = min(lowest, *loss), max(first, loss[0])
        panel.plot(
            steps,
            loss,
            color=COLOURS[role],
            alpha=0.95 if loud else 0.45,
            linewidth=1.6 if loud else 0.9,
            zorder=3 if loud else 1,
        )
    if 0 < lowest < first:
        panel.set_yscale("log")
        panel.set_ylim(0.7 * lowest, 4 * first)
    plain_axis(panel.yaxis, *panel.get_ylim(), log=panel.get_yscale() == "log")
    plain_axis(panel.xaxis, *panel.get_xlim(), log=False)
    panel.set_xlim(0, 1.15 * max(steps[-1] for steps, _ in lines.values()))
    ends = {name: (steps[-1], loss[-1]) for name, (steps, loss) in lines.items()}
    for role in dict.fromkeys(arms[name]["role"] for name in lines):
        panel.plot([], [], color=COLOURS[role], label=role)
    panel.set_xlabel("step")
    panel.set_ylabel("training loss (mean over seeds)")
    panel.legend(fontsize=9)
    panel.grid(alpha=0.25)
    named = sorted(ends, key=numbers.__getitem__) if len(ends) <= LISTED else ()
    return {numbers[name]: (ends[name], arms[name]["role"]) for name in named}


def _cost_only(panels, group: str, arms: Mapping[str, Any]) -> None:
    """Two panels of bars, step time and peak memory, where nothing was trained."""
    for panel, cost in zip(
        panels, (Cost("step_ms", "step, ms"), Cost("peak_bytes", "peak MB of a step", 1e-6)), strict=True
    ):
        found = {name: arm["cost"].get(cost.name) for name, arm in arms.items()}
        found = {name: spent * cost.factor for name, spent in found.items() if _finite(spent)}
        for row, (name, spent) in enumerate(found.items()):
            panel.barh(row, spent, color=COLOURS[arms[name]["role"]], height=0.6, alpha=0.85)
            panel.annotate(
                f"{spent:,.4g}" if spent < 1e4 else f"{spent:,.0f}",
                (spent, row),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        panel.set_yticks(range(len(found)), [arms[name]["label"] or name for name in found], fontsize=9)
        panel.invert_yaxis()
        panel.margins(x=0.15)
        plain_axis(panel.xaxis, *panel.get_xlim(), log=False)
        panel.set_xlabel(cost.label)
        panel.grid(alpha=0.25, axis="x")
    panels[0].set_title(group, fontsize=11, loc="left")
    panels[1].tick_params(labelleft=False)
