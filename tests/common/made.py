"""Results made by hand, for the tests of what is written from them."""

import math
import statistics

ENVIRONMENT = {
    "packages": {"jax": "0.10.2", "optax": "0.2.8", "python": "3.11.7"},
    "hardware": {"platform": "cpu", "cpu": "AMD EPYC", "cores": 1},
    "commit": None,
    "date": "2026-11-30T00:00:00+00:00",
}


def arm(values, train=1.0, compiling=1.0, peak=1e6, *, role="baseline", group="g", label="", examples=None, **more):
    """An arm of one metric, ``accuracy``; NaN among its values is a seed that diverged."""
    diverged = any(map(math.isnan, values))
    summary = {
        "mean": None if diverged else statistics.fmean(values),
        "std": None if diverged else statistics.stdev(values) if len(values) > 1 else 0.0,
        "values": [None if math.isnan(value) else value for value in values],
    }
    cost = {
        "params": 3,
        "step_ms": 2.0,
        "train_s": train,
        "compile_s": compiling,
        "evaluate_s": 0.5,
        "total_s": train + compiling + 0.5,
        "peak_bytes": peak,
        "examples_per_s": None,
        "macs_per_example": 7e6,
    }
    if examples is not None:
        cost["examples"] = examples
    return {
        "group": group,
        "label": label,
        "role": role,
        "status": "diverged" if diverged else "ok",
        "metrics": {"accuracy": summary},
        "cost": cost,
        "inference": {},
        **more,
    }


def results(arms, *, seeds=(0, 1), goal="max", **more):
    """Results of one group, ``g``, from its arms by their short names."""
    return {
        "schema": 2,
        "study": "toy",
        "preset": "smoke",
        "seeds": list(seeds),
        "budget": {"amount": 1200, "unit": "steps"},
        "config": {},
        "groups": {"g": {"name": "accuracy", "goal": goal, "label": "test accuracy"}},
        "arms": {f"g/{name}": found for name, found in arms.items()},
        "claims": [],
        "cost_claims": [],
        "idle": [],
        "data": ["digits (train 1437 rows)"],
        "environment": ENVIRONMENT,
        **more,
    }


def claim(text, holds, *arms, **more):
    """A decided claim about arms of ``g``."""
    names = [f"g/{name}" for name in arms]
    return {"group": "g", "text": text, "left": 2.0, "op": "<=", "right": 1.0, "holds": holds, "arms": names, **more}
