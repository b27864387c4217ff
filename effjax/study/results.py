"""results.json: its schema, assembled from finished runs, claims decided, environment recorded."""

import datetime
import importlib.metadata
import itertools
import math
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import effjax
from effjax.core.cost import hardware, programs_from_folder
from effjax.study.claims import value
from effjax.study.curves import mean_curves

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "datasets", "grain", "jraph")

COST_FIELDS = (
    "params",
    "macs_per_example",
    "xla_flops_per_step",
    "peak_bytes",
    "step_ms",
    "examples_per_s",
    "compile_s",
    "compiles",
    "train_s",
    "evaluate_s",
    "total_s",
)

OPTIONAL_COST_FIELDS = ("temp_bytes", "tokens", "examples", "trained_params", "between_ms")
"""The part of ``peak_bytes`` that is scratch. And where the arm's Program tells: positions processed in one run,
padding included, and examples; numbers that the optimizer moves; the first work between two phases, such as a knot."""


def summary(values: Sequence[float]) -> dict[str, Any]:
    """``{"mean", "std", "values"}`` over seeds; the sample standard deviation, 0 for one seed."""
    finite = all(math.isfinite(value) for value in values)
    std = statistics.stdev(values) if finite and len(values) > 1 else (0.0 if finite else math.nan)
    return {"mean": statistics.fmean(values), "std": std, "values": list(values)}


def arm_result(runs: Sequence[Mapping[str, Any]], cost: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """One entry of ``arms`` from the runs of its seeds.

    Args:
      runs: per seed ``{"status", "metrics", "train_s", "compiles"}``, with ``"curve"`` where there were
        evaluations during training, and ``"curves"`` where an evaluation gives them; empty when only cost was measured.
      cost: what the cost meter measured once for the arm.
      name: of the arm, for messages.
    """
    diverged = [run for run in runs if run["status"] == "diverged"]
    names = sorted({metric for run in runs for metric in run["metrics"]})
    metrics = {metric: summary([run["metrics"].get(metric, math.nan) for run in runs]) for metric in names}
    merged: dict[str, Any] = {field: cost.get(field) for field in COST_FIELDS}
    merged |= {field: cost[field] for field in OPTIONAL_COST_FIELDS if field in cost}
    if runs:
        merged["train_s"] = statistics.fmean(run["train_s"] for run in runs)
        merged["evaluate_s"] = statistics.fmean(run["evaluate_s"] for run in runs)
        merged["compiles"] = max(run["compiles"] for run in runs)
        merged["total_s"] = merged["compile_s"] + merged["train_s"] + merged["evaluate_s"]
    result = {
        "status": "diverged" if diverged else "ok",
        "metrics": metrics,
        "cost": merged,
        "inference": dict(cost.get("inference", {})),
    }
    curves = [run.get("curve") for run in runs]
    result |= {"curve": curves} if any(curves) else {}
    # A seed that diverged has no evaluation.
    averaged = mean_curves(name, [run.get("curves", {}) for run in runs if run["status"] != "diverged"])
    result |= {"curves": averaged} if averaged else {}
    return result | ({"why": diverged[0]["why"]} if diverged and "why" in diverged[0] else {})


def sweep_result(
    members: Sequence[str], arms: Mapping[str, Mapping[str, Any]], metric: str, goal: str
) -> dict[str, Any]:
    """The best member of a sweep (chosen by its mean over seeds) at the price of all members."""
    sign = 1 if goal == "min" else -1

    def score(name: str) -> float:
        found = value(arms[name], metric)
        return sign * found if math.isfinite(found) else math.inf

    best = min(members, key=score)
    chosen = arms[best]
    return {
        **chosen,
        "cost": {**chosen["cost"], **_summed(members, arms)},
        "best": best,
        "runs": len(members),
        "members": list(members),
    }


def _summed(members: Sequence[str], arms: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Seconds of all members together; null where one is not known."""
    totals = {}
    for name in ("train_s", "evaluate_s", "compile_s", "total_s"):
        seconds = [arms[member]["cost"].get(name) for member in members]
        totals[name] = None if None in seconds else math.fsum(seconds)
    return totals


def idle_arms(fingerprints: Mapping[str, Sequence[int | None]]) -> list[list[str]]:
    """Arms of one group whose trained parameters are equal to the last bit in every seed.

    What tells them apart did nothing.

    Args:
      fingerprints: per arm one number per seed, of its parameters; None where they are not known.

    Returns:
      Lists of two or more names.

    Example:
      >>> idle_arms({"a": [1, 2], "b": [1, 3], "c": [1, 2]})
      [['a', 'c']]
    """
    known = {name: tuple(numbers) for name, numbers in fingerprints.items() if numbers and None not in numbers}
    by_numbers = lambda name: known[name]
    groups = itertools.groupby(sorted(known, key=by_numbers), key=by_numbers)
    order = list(fingerprints)
    return [sorted(names, key=order.index) for names in (list(some) for _, some in groups) if len(names) > 1]


def environment() -> dict[str, Any]:
    """Packages, hardware, commit (null outside git), date; ``compile_cache`` where programs came from JAX's folder."""
    packages: dict[str, str | None] = {"python": platform.python_version(), "effjax": effjax.__version__}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "packages": packages,
        "hardware": hardware(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **({"compile_cache": True} if programs_from_folder() else {}),
    }


def commit() -> str | None:
    """The checkout's commit, with ``+changes`` if tracked files differ from it; None outside git."""
    here = Path(effjax.__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", str(here / "__init__.py")) is None:
        return None
    head = git("rev-parse", "HEAD")
    return f"{head}+changes" if head and git("status", "--porcelain", "--untracked-files=no") else head
