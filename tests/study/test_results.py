"""Books of a study: summaries, sweeps, idle arms, the frontier, budgets."""

import json
import math

import pytest

from effjax.study.frontier import pareto
from effjax.study.results import arm_result, idle_arms, summary, sweep_result
from effjax.train.logging import write_json
from effjax.train.options import Budget


def run(loss, seconds=1.0, status="ok"):
    metrics = {"loss": loss} if status == "ok" else {}
    return {"status": status, "metrics": metrics, "train_s": seconds, "evaluate_s": 0.5, "compiles": 1}


COST = {
    "params": 3,
    "step_ms": 2.0,
    "peak_bytes": 10**6,
    "examples_per_s": 5.0,
    "macs_per_example": 7.0,
    "compile_s": 4.0,
}


def arms():
    return {
        "a": arm_result([run(1.0), run(3.0)], COST) | {"group": "g", "label": "A", "role": "baseline"},
        "b": arm_result([run(0.5), run(0.7)], COST) | {"group": "g", "label": "B", "role": "method"},
        "c": arm_result([run(0.1), run(0, status="diverged")], COST) | {"group": "g", "label": "C", "role": "control"},
    }


def test_summary_uses_the_sample_deviation():
    assert summary([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(math.sqrt(2)), "values": [1.0, 3.0]}
    assert summary([4.0])["std"] == 0.0


def test_a_seed_that_diverges_marks_the_arm_and_leaves_nulls(tmp_path):
    arm = arms()["c"]
    assert arm["status"] == "diverged"
    write_json(tmp_path / "x.json", arm)
    assert json.loads((tmp_path / "x.json").read_text())["metrics"]["loss"]["values"] == [0.1, None]


def test_total_time_is_compiling_once_and_the_mean_run():
    cost = arm_result([run(1.0, 2.0), run(3.0, 4.0)], COST)["cost"]
    assert (cost["train_s"], cost["evaluate_s"], cost["total_s"]) == (3.0, 0.5, 7.5)


def test_a_sweep_costs_all_its_runs_and_never_picks_a_diverged_one():
    found = sweep_result(["a", "b", "c"], arms(), "loss", "min")
    assert found["best"] == "b"
    assert found["cost"]["train_s"] == 3.0
    assert found["cost"]["total_s"] == 3 * 5.5
    assert found["metrics"]["loss"]["mean"] == pytest.approx(0.6)


def test_a_curve_and_tokens_stand_beside_the_cost_only_where_they_are():
    plain = arm_result([run(1.0)], COST)
    assert "curve" not in plain
    assert "tokens" not in plain["cost"]
    curve = {"step": [1, 2], "train_s": [0.5, 1.0], "loss": [3.0, 1.0]}
    arm = arm_result([run(1.0) | {"curve": curve}, run(0, status="diverged")], {**COST, "tokens": 5})
    assert arm["curve"] == [curve, None]
    assert arm["cost"]["tokens"] == 5


def test_arms_equal_in_every_seed_are_idle():
    numbers = {"a": [1, 2], "b": [1, 3], "c": [1, 2], "d": [None, 2], "e": [None, 2]}
    assert idle_arms(numbers) == [["a", "c"]]


@pytest.mark.parametrize(
    ("points", "goal", "expected"),
    [
        ({"a": (1, 1), "b": (2, 2), "c": (3, 1.5)}, "max", ["a", "b"]),
        ({"a": (1, 1), "b": (2, 2), "c": (3, 0.5)}, "min", ["a", "c"]),
        ({"a": (1, math.nan), "b": (2, 2)}, "max", ["b"]),
    ],
)
def test_frontier(points, goal, expected):
    assert pareto(points, goal) == expected


def test_budget_counts_steps():
    assert Budget(1000, "examples").steps(64) == 15
    assert Budget(7).steps(64) == 7
    assert Budget(2.5, "epochs").steps(64, [4, 3, 2].__getitem__) == 8
    assert Budget(0.1, "epochs").steps(64, lambda epoch: 3) == 1
    with pytest.raises(ValueError, match="epochs needs the data's rows"):
        Budget(3, "epochs").steps(64)
    with pytest.raises(ValueError, match="before the step time is measured"):
        Budget(1.0, "device_seconds").steps(64)
