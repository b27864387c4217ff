"""Latency of served GEENI ensembles against one network of the same width, and the accuracy of what is served.

Run it on a quiet machine, from the repository::

    python tests/peers/geeni_latency.py --out configs/geeni/results/latency-amd-epyc-2-cores.json

One call gives the probabilities of all nodes. All forms of a graph are timed in turns in one process. The networks are
trained as in the study (``effjax.recipes.geeni``), by the public functions. A row with an accuracy serves the very
weights and graph it was measured with; the others isolate the nodes trusted least by the score.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

GRAPHS = {"small": ("cora",), "all": ("cora", "amazon_photo", "coauthor_cs")}
HIDDEN, MEMBERS = 64, 4

METRIC = {"name": "least_ms", "goal": "min", "label": "least ms per forward pass"}


class Row(NamedTuple):
    """What is timed, and what is known of it."""

    label: str
    role: str
    call: Callable[[], Any]
    macs: int
    entries: int
    accuracies: tuple[float, ...] = ()


class Trained(NamedTuple):
    """An arm of the study after training, one seed."""

    config: Any
    problem: Any
    state: Any
    members: Any
    test: Any


def trained(data: Any, form: str, hidden: int, seeds: int, epochs: int) -> list[Trained]:
    """``effjax.geeni`` as the study runs it, with the study's splits, and its state kept."""
    import jax

    import effjax
    from effjax.graph.geeni import served_members
    from effjax.recipes.geeni import VARIANTS, GeeniStudy, method_config
    from effjax.recipes.spec import Budget

    study = GeeniStudy(hidden=hidden, budget=Budget(epochs, "epochs"))
    config = method_config(study, VARIANTS[form])
    step = jax.jit(effjax.graph.geeni_step, static_argnames=("config", "stage"))
    found = []
    for seed in range(seeds):
        key = jax.random.key(seed)
        per_class = (study.train_per_class, study.val_per_class)
        train, val, test = effjax.tasks.draw_split(jax.random.fold_in(key, 0), data.labels, data.classes, *per_class)
        problem = effjax.graph.GeeniProblem(data.features, data.adjacency, data.labels, train, val, data.classes)
        state = effjax.graph.geeni_init(key, problem, config=config)
        for stage in config.stages:
            views = effjax.graph.geeni_views(state, problem, config=config)
            for _ in range(config.steps(stage)):
                state, _ = step(state, problem, views, config=config, stage=stage)
            state = effjax.graph.geeni_next(state, problem, config=config, stage=stage)
        found.append(Trained(config, problem, state, served_members(state, config=config), test))
    return found


def served_graph(arm: Trained) -> Any:
    """The arm's graph without the messages that it has learned to stop."""
    import numpy as np

    from effjax.graph.isolation import isolate

    matrix = arm.problem.adjacency
    if arm.state.isolation is None:
        return matrix
    active = np.asarray(arm.state.isolation.active != 0)
    return isolate(matrix, active, mode=arm.config.modes[int(arm.state.isolation.mode)])


def least_certain(arm: Trained, share: float) -> Any:
    """The graph with a share of the nodes isolated."""
    import numpy as np

    from effjax.graph.error_nodes import active_nodes, error_scores
    from effjax.graph.isolation import isolate
    from effjax.graph.members import ensemble_logits, member_probabilities

    problem = arm.problem
    logits = ensemble_logits(arm.members, problem.features, problem.adjacency)
    score = error_scores(member_probabilities(logits)).score
    return isolate(problem.adjacency, np.asarray(active_nodes(score, share, problem.train | problem.val)))


def rows_of(graph: str, seeds: int, epochs: int) -> dict[str, Row]:
    import jax

    from effjax.graph.geeni_serving import serve_ensemble
    from effjax.graph.measures import masked_accuracy
    from effjax.graph.members import (
        ensemble_logits,
        ensemble_macs,
        ensemble_probabilities,
        fold_members,
        member_probabilities,
    )
    from effjax.recipes.geeni import GeeniStudy
    from effjax.tasks.graph import node_data

    task = node_data(graph, row_normalize=graph not in GeeniStudy.raw_features)
    single, wide, narrow, tiny, distilled, one_distilled = (
        trained(task, form, hidden, seeds, epochs)
        for form, hidden in (
            ("single", HIDDEN),
            ("ensemble", HIDDEN),
            ("geeni-learned", HIDDEN),
            ("geeni-learned", HIDDEN // 2),
            ("geeni-distilled", HIDDEN),
            ("distilled", HIDDEN),
        )
    )
    matrix, dense = task.adjacency, hasattr(task.features, "ndim")
    rows = {}

    def add(
        name: str,
        label: str,
        role: str,
        arms: Sequence[Trained],
        matrix_of: Any,
        right: bool,
        fold: bool = False,
        **options: Any,
    ) -> None:
        members = [fold_members(arm.members) if fold else arm.members for arm in (arms if right else arms[:1])]
        served = [
            serve_ensemble(one, task.features, matrix_of(arm), **options)
            for one, arm in zip(members, arms, strict=False)
        ]
        accuracy = lambda one, arm: float(masked_accuracy(one(), task.labels, arm.test))
        found = tuple(accuracy(one, arm) for one, arm in zip(served, arms, strict=True)) if right else ()
        macs = ensemble_macs(members[0], task.features, served[0].matrix, propagated=served[0].propagated)
        rows[name] = Row(label, role, served[0], macs.total, served[0].matrix.nnz, found)

    whole = lambda arm: matrix
    add("single", "one GCN, 64 wide", "baseline", single, whole, True, precompute=False)
    one = jax.jit(lambda members, features, matrix: member_probabilities(ensemble_logits(members, features, matrix))[0])
    alone = [jax.tree.map(lambda leaf, k=k: leaf[k : k + 1], wide[0].members) for k in range(MEMBERS)]
    average = jax.jit(lambda found: sum(found) / MEMBERS)
    loop = lambda: average([one(member, task.features, matrix) for member in alone])
    accuracy = tuple(
        float(
            masked_accuracy(
                ensemble_probabilities(ensemble_logits(arm.members, task.features, matrix)),
                task.labels,
                arm.test,
            )
        )
        for arm in wide
    )
    macs = ensemble_macs(wide[0].members, task.features, matrix).total
    rows["loop"] = Row("4 x 64, one after another", "baseline", loop, macs, matrix.nnz, accuracy)
    add("columns", "4 x 64 in columns", "control", wide, whole, True, precompute=False)
    add(
        "columns-30",
        "4 x 64 in columns, 30 % isolated",
        "control",
        wide,
        lambda a: least_certain(a, 0.3),
        False,
        precompute=False,
    )
    add("narrow", "4 x 16 in columns", "control", narrow, whole, True, precompute=False)
    for share in (30, 50):
        label = f"4 x 16 in columns, {share} % isolated"
        add(
            f"narrow-{share}",
            label,
            "control",
            narrow,
            lambda a, s=share: least_certain(a, s / 100),
            False,
            precompute=False,
        )
    add(
        "tiny-30",
        "4 x 8 in columns, 30 % isolated",
        "control",
        tiny,
        lambda a: least_certain(a, 0.3),
        False,
        precompute=False,
    )
    for name, label, arms, fold in (
        ("geeni", "GEENI 4 x 16", narrow, False),
        ("geeni-folded", "GEENI 4 x 16, folded", narrow, True),
        ("geeni-distilled", "GEENI 4 x 16, distilled, folded", distilled, True),
        ("geeni-tiny", "GEENI 4 x 8", tiny, False),
        ("geeni-tiny-folded", "GEENI 4 x 8, folded", tiny, True),
    ):
        add(name, label, "method", arms, served_graph, True, fold, precompute=False)
    add("distilled", "one GCN, distilled from 4 x 64", "alternative", one_distilled, whole, True, precompute=False)
    if dense:
        add("single-stored", "one GCN, 64 wide, S X stored", "alternative", single, whole, True, precompute=True)
        label = "GEENI 4 x 16, distilled, folded, S X stored"
        add("geeni-stored", label, "method", distilled, served_graph, True, True, precompute=True)
    return rows


def measure(
    graph: str, rounds: int, min_time: float, seeds: int, epochs: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The arms of one graph as in a results.json, and the claims."""
    from effjax.core.timing import time_interleaved
    from effjax.study.results import COST_FIELDS, summary

    rows = rows_of(graph, seeds, epochs)
    timings = time_interleaved({name: row.call for name, row in rows.items()}, rounds=rounds, min_time=min_time)
    arms = {}
    for name, row in rows.items():
        timed = timings[name]
        quartiles = {"q25": timed.q25_ms, "median": timed.median_ms, "q75": timed.q75_ms}
        metrics = {"forward_ms": summary(timed.samples_ms) | quartiles}
        metrics |= {"least_ms": summary([min(timed.samples_ms)]), "relative": summary([_ratio(timings, name)])}
        metrics |= {"accuracy": summary(row.accuracies)} if row.accuracies else {}
        cost = dict.fromkeys(COST_FIELDS) | {"macs": row.macs, "entries": row.entries, "step_ms": timed.median_ms}
        about = {"group": graph, "label": row.label, "role": row.role}
        arms[f"{graph}/{name}"] = {"status": "ok", "metrics": metrics, "cost": cost, "inference": {}, **about}
    return arms, claims_of(graph, rows, timings)


def _ratio(timings: Mapping[str, Any], name: str, to: str = "single") -> float:
    from effjax.core.timing import paired_ratio

    return paired_ratio(timings[name], timings[to])


def claims_of(graph: str, rows: Mapping[str, Row], timings: Mapping[str, Any]) -> list[dict[str, Any]]:
    mean = lambda name: sum(rows[name].accuracies) / len(rows[name].accuracies)
    numbers = [
        (f"{rows[name].label} takes at most 1.2 times as long as one network", _ratio(timings, name), "<=", 1.2)
        for name in ("geeni", "geeni-folded", "geeni-distilled", "geeni-tiny")
    ]
    for name in ("geeni", "geeni-folded", "geeni-distilled", "geeni-tiny"):
        bound = mean("loop") - 0.005
        numbers.append(
            (f"{rows[name].label} is at most half a point below the ensemble 4 x 64", mean(name), ">=", bound)
        )
    label = rows["geeni-distilled"].label
    numbers.append((f"{label} is no worse than one network", mean("geeni-distilled"), ">=", mean("single")))
    if "geeni-stored" in rows:
        ratio = _ratio(timings, "geeni-stored", "single-stored")
        numbers.append(("with S X stored in both, GEENI takes at most 1.2 times as long", ratio, "<=", 1.2))
    return [
        {
            "text": f"{graph}: {text}",
            "left": left,
            "op": op,
            "right": right,
            "holds": bool(left <= right if op == "<=" else left >= right),
        }
        for text, left, op, right in numbers
    ]


def benchmark(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What goes into the results file, after each graph."""
    from effjax.study.report import SCHEMA
    from effjax.study.results import environment

    where = environment()
    arms, claims = {}, []
    for graph in GRAPHS[options.graphs]:
        found, decided = measure(graph, options.rounds, options.min_time, options.seeds, options.epochs)
        arms |= found
        claims += decided
        yield {
            "schema": SCHEMA,
            "study": "geeni_latency",
            "groups": dict.fromkeys((arm["group"] for arm in arms.values()), METRIC),
            "preset": options.graphs,
            "seeds": list(range(options.seeds)),
            "budget": {"amount": options.rounds, "unit": "rounds"},
            "config": None,  # no study of `effjax compare`: this script alone
            "arms": arms,
            "claims": claims,
            "environment": where | {"threads": options.threads, "epochs": options.epochs},
        }
        print(f"{graph}: done", flush=True)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the results file")
    parser.add_argument("--graphs", choices=tuple(GRAPHS), default="all")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--min-time", type=float, default=0.0, help="seconds a sample lasts at least")
    parser.add_argument("--seeds", type=int, default=3, help="splits over which accuracies are averaged")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(words)
    if hasattr(os, "sched_setaffinity"):  # before JAX starts its threads, one a core
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for results in benchmark(options):
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    for claim in results["claims"]:
        print(
            f"{'holds' if claim['holds'] else 'FAILS':5} {claim['left']:6.3f} {claim['op']} {claim['right']:.3f} "
            f"{claim['text']}"
        )


if __name__ == "__main__":
    main()
