"""report.md and report.png from a folder's results."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effjax.recipes.spec import Axis
from effjax.study.frontier import pareto
from effjax.study.plots import draw
from effjax.study.resolve import Study
from effjax.study.results import decide, mean
from effjax.train.logging import write_text

# Optional columns: cost -> heading, factor.
_EXTRA = {
    "temp_bytes": ("temp MB", 1e-6),
    "tokens": ("M tokens", 1e-6),
    "trained_params": ("trained", 1.0),
    "between_ms": ("between ms", 1.0),
}


def write_report(out: Path, study: Study) -> None:
    """Write ``report.md`` and ``report.png`` beside ``results.json``."""
    results = read_results(out / "results.json")
    curves_path = out / "curves.json"
    curves = json.loads(curves_path.read_text()) if curves_path.exists() else {}
    cost_claims = decide(study.claims, results["arms"], "cost")
    write_text(out / "report.md", render(results, study.axes, cost_claims))
    draw(results, study.axes, curves, out / "report.png")


def read_results(path: Path) -> dict[str, Any]:
    """Read a results.json.

    Raises:
      FileNotFoundError, ValueError: it is missing, or not what this version writes.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Run `effjax compare` with --out {path.parent} first.")
    try:
        results = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    missing = {"schema", "study", "preset", "arms", "claims", "environment"} - set(results)
    if missing:
        raise ValueError(f"{path} is no effjax result: it lacks {sorted(missing)}.")
    return results


def in_table(text: str) -> str:
    """Text for a cell of a Markdown table.

    Example:
      >>> in_table("|x| of 1")
      '\\\\|x\\\\| of 1'
    """
    return text.replace("|", "\\|")


def render(results: Mapping[str, Any], axes: Mapping[str, Axis], cost_claims: Sequence[Mapping[str, Any]]) -> str:
    """The report as Markdown: claims first, then a table for each group, wall-clock and memory leading."""
    lines = [f"# {results['study']}: {results['preset']}", "", _where(results), ""]
    lines += claims_table("Claims", results["claims"])
    if any(claim not in results["claims"] for claim in cost_claims):
        lines += claims_table("Cost ratios of this run (decided by the clock)", cost_claims)
    for group, arms in by_group(results["arms"]).items():
        lines += [f"## {group}", "", *group_table(arms, axes[group]), ""]
    diverged = [name for name, arm in results["arms"].items() if arm["status"] == "diverged"]
    if diverged:
        lines += [f"Diverged (no finite loss in at least one seed): {', '.join(diverged)}.", ""]
    lines += [
        "`step` is the steady-state median with all arms of the group interleaved; `peak` is XLA's arguments + outputs "
        "- aliased + temporaries of the step, `temp` these temporaries alone; `train` is seconds of stepping for one "
        "seed without compiling, evaluating and saving; for a sweep it is the sum over its members. Of an arm whose "
        "batches differ in shape, `step` is the mean over the steps of a run; `tokens` are the positions processed in "
        "a run, padding included; `trained` are the numbers that the optimizer moves, `between` is the first work "
        "between two steps (a knot).",
        "",
    ]
    return "\n".join(lines)


def _where(results: Mapping[str, Any]) -> str:
    environment = results["environment"]
    hardware = environment["hardware"]
    packages = environment["packages"]
    budget = results["budget"]
    return (
        f"Budget {budget['amount']:g} {budget['unit']} a run, seeds {', '.join(map(str, results['seeds']))}. "
        f"{hardware_name(hardware)}; jax {packages['jax']}, optax {packages['optax']}, Python {packages['python']}; "
        f"commit {environment['commit']}; {environment['date']}. "
        f"{'; '.join(environment.get('data', []))}"
    ).strip()


def hardware_name(hardware: Mapping[str, Any]) -> str:
    """One phrase for what the results ran on."""
    if hardware["platform"] == "cpu":
        return f"{hardware['cpu']}, {hardware['cores']} cores"
    return f"{hardware['devices']} x {hardware['device_kind']}"


def claims_table(title: str, claims: Sequence[Mapping[str, Any]]) -> list[str]:
    """Claims as a Markdown table; one that does not hold is as visible as one that does."""
    if not claims:
        return []
    lines = [f"## {title}", "", "| | claim | measured | | bound |", "|---|---|---|---|---|"]
    for claim in claims:
        verdict = "holds" if claim["holds"] else "**DOES NOT HOLD**"
        left, right = number(claim["left"]), number(claim["right"])
        lines.append(f"| {verdict} | {in_table(claim['text'])} | {left} | {claim['op']} | {right} |")
    return [*lines, ""]


def by_group(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """The arms of each group, in order."""
    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, arm in arms.items():
        groups.setdefault(arm["group"], {})[name] = arm
    return groups


def group_table(arms: Mapping[str, Mapping[str, Any]], axis: Axis) -> list[str]:
    """One group's arms, best first by the axis' metric."""
    sign = 1 if axis.goal == "min" else -1

    def rank(arm):
        value = mean(arm, axis.metric)
        return sign * value if math.isfinite(value) else math.inf

    others = sorted({metric for arm in arms.values() for metric in arm["metrics"]} - {axis.metric})
    points = {name: (_cost(arm), mean(arm, axis.metric)) for name, arm in arms.items()}
    frontier = set(pareto(points, axis.goal))
    arrow = "lower is better" if axis.goal == "min" else "higher is better"
    head = ["arm", f"{axis.label} ({arrow})", *others, "train s", "step ms", "peak MB", "examples/s", "M MACs/example"]
    extra = [name for name in _EXTRA if any(name in arm["cost"] for arm in arms.values())]
    head += [_EXTRA[name][0] for name in extra]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, arm in sorted(arms.items(), key=lambda item: rank(item[1])):
        cost = arm["cost"]
        label = arm["label"] + (" *" if name in frontier else "")
        if "best" in arm:
            label += f" (best: {arms[arm['best']]['label'] if arm['best'] in arms else arm['best']})"
        cells = [in_table(label), spread(arm, axis.metric), *(spread(arm, metric) for metric in others)]
        cells += [number(cost["train_s"]), number(cost["step_ms"]), number(_scaled(cost["peak_bytes"], 1e-6))]
        cells += [number(cost["examples_per_s"]), number(_scaled(cost["macs_per_example"], 1e-6))]
        cells += [number(_scaled(cost.get(name), _EXTRA[name][1])) for name in extra]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", "\\* on the frontier of quality against training seconds."]


def _cost(arm: Mapping[str, Any]) -> float:
    seconds = arm["cost"]["train_s"]
    return math.nan if seconds is None else seconds


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def spread(arm: Mapping[str, Any], metric: str) -> str:
    """``mean ± std`` of a metric, or a dash."""
    if metric not in arm["metrics"] or arm["metrics"][metric]["mean"] is None:
        return "diverged" if arm["status"] == "diverged" else "-"
    found = arm["metrics"][metric]
    deviation = f" ± {number(found['std'])}" if len(found["values"]) > 1 else ""
    return f"{number(found['mean'])}{deviation}"


def number(value: float | None) -> str:
    """Three or four significant digits; a dash for null."""
    if value is None or not math.isfinite(value):
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"
