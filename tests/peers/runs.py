"""The form of results.json for benchmarks that are no studies, so that cards show their numbers."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

METRIC = {"name": "ms", "goal": "min", "label": "milliseconds"}


def results(
    study: str, tables: Mapping[str, Mapping[str, Mapping[str, float]]], options: argparse.Namespace
) -> dict[str, Any]:
    """Tables by group, arm and metric, each number measured once.

    Args:
      study: name of the benchmark.
      tables: ``{group: {arm: {metric: number}}}``.
      options: of the command line.
    """
    from effjax.study.results import COST_FIELDS, SCHEMA, environment

    once = lambda number: {"mean": float(number), "std": 0.0, "values": [float(number)]}
    arms = {
        f"{group}/{arm}": {
            **{"status": "ok", "group": group, "label": arm, "role": "method", "inference": {}},
            "metrics": {name: once(number) for name, number in row.items()},
            "cost": dict.fromkeys(COST_FIELDS),
        }
        for group, table in tables.items()
        for arm, row in table.items()
    }
    words: Mapping[str, Any] = {name: value for name, value in vars(options).items() if name != "out"}
    return {
        "schema": SCHEMA,
        "study": study,
        "groups": dict.fromkeys(tables, METRIC),
        "preset": "speed",
        "seeds": [0],
        "budget": {"amount": options.rounds, "unit": "rounds"},
        "config": None,  # no study of `effjax compare`: this script alone
        "arms": arms,
        "claims": [],
        "cost_claims": [],
        "environment": environment() | {"options": words},
    }


def table(title: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """A group as Markdown."""
    names: Sequence[str] = list(next(iter(rows.values())))
    lines = [f"{title}\n", f"| arm | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {arm} | {' | '.join(f'{row[name]:.3g}' for name in names)} |" for arm, row in rows.items()]
    return "\n".join(lines) + "\n"
