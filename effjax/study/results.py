"""results.json: its schema, assembled from finished runs, claims decided, environment recorded."""

import datetime
import importlib.metadata
import math
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import effjax
from effjax.core.cost import hardware
from effjax.recipes.spec import Claim, Sweep

SCHEMA = 1

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
)

OPTIONAL_COST_FIELDS = ("temp_bytes", "tokens", "trained_params", "between_ms")
"""The part of ``peak_bytes`` that is scratch, which older results lack. And where the arm's Program tells: positions
processed in one run, padding included; numbers that the optimizer moves; the first work between two steps, such as a
knot."""


def summary(values: Sequence[float]) -> dict[str, Any]:
    """``{"mean", "std", "values"}`` over seeds; the sample standard deviation, 0 for one seed."""
    finite = all(math.isfinite(value) for value in values)
    std = statistics.stdev(values) if finite and len(values) > 1 else (0.0 if finite else math.nan)
    return {"mean": statistics.fmean(values), "std": std, "values": list(values)}


def arm_result(runs: Sequence[Mapping[str, Any]], cost: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of ``arms`` from the runs of its seeds.

    Args:
      runs: per seed ``{"status", "metrics", "train_s", "compiles"}``, with ``"curve"`` where there were
        evaluations during training; empty when only cost was measured.
      cost: what the cost meter measured once for the arm.
    """
    diverged = [run for run in runs if run["status"] == "diverged"]
    names = sorted({name for run in runs for name in run["metrics"]})
    metrics = {name: summary([run["metrics"].get(name, math.nan) for run in runs]) for name in names}
    merged = {name: cost.get(name) for name in COST_FIELDS}
    merged |= {name: cost[name] for name in OPTIONAL_COST_FIELDS if name in cost}
    if runs:
        merged["train_s"] = statistics.fmean(run["train_s"] for run in runs)
        merged["compiles"] = max(run["compiles"] for run in runs)
    result = {
        "status": "diverged" if diverged else "ok",
        "metrics": metrics,
        "cost": merged,
        "inference": dict(cost.get("inference", {})),
    }
    curves = [run.get("curve") for run in runs]
    return result | ({"curve": curves} if any(curves) else {})


def sweep_result(sweep: Sweep, arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The best member of a sweep (chosen by its mean over seeds) at the price of all members."""
    sign = 1 if sweep.goal == "min" else -1

    def score(name: str) -> float:
        value = mean(arms[name], sweep.metric)
        return sign * value if math.isfinite(value) else math.inf

    best = min(sweep.members, key=score)
    times = [arms[name]["cost"]["train_s"] for name in sweep.members]
    total = sum(times) if all(time is not None for time in times) else None
    chosen = arms[best]
    return {**chosen, "cost": {**chosen["cost"], "train_s": total}, "best": best, "runs": len(sweep.members)}


def mean(arm: Mapping[str, Any], metric: str) -> float:
    """A metric's mean over seeds, NaN where it is null or absent."""
    value = arm["metrics"].get(metric, {}).get("mean")
    return math.nan if value is None else value


def decide(claims: Sequence[Claim], arms: Mapping[str, Mapping[str, Any]], of: str) -> list[dict[str, Any]]:
    """Evaluate the claims of one kind; a comparison with NaN does not hold."""
    numbers = {
        name: {metric: mean(arm, metric) for metric in arm["metrics"]}
        | {"values": {metric: found["values"] for metric, found in arm["metrics"].items()}}
        for name, arm in arms.items()
    }
    if of == "cost":
        for name, arm in arms.items():
            numbers[name] |= {key: math.nan if value is None else value for key, value in arm["cost"].items()}
            numbers[name]["curve"] = arm.get("curve", [])
    decided = []
    for claim in claims:
        if claim.of != of:
            continue
        left, right = claim.left(numbers), claim.right(numbers)
        holds = left <= right if claim.op == "<=" else left >= right
        decided.append({"text": claim.text, "left": left, "op": claim.op, "right": right, "holds": bool(holds)})
    return decided


def environment() -> dict[str, Any]:
    """Packages, hardware, commit (null outside git) and date of this run."""
    packages = {"python": platform.python_version(), "effjax": effjax.__version__}
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
