"""Books of a study: summaries, sweeps, claims, the frontier, the report."""

import json
import math

import pytest

from effjax.recipes.spec import Axis, Budget, Claim, Sweep, time_to
from effjax.study.frontier import pareto
from effjax.study.plots import draw
from effjax.study.report import number, read_results, render
from effjax.study.results import arm_result, decide, environment, summary, sweep_result
from effjax.train.logging import write_json


def run(loss, seconds=1.0, status="ok"):
    return {"status": status, "metrics": {"loss": loss} if status == "ok" else {}, "train_s": seconds, "compiles": 1}


COST = {"params": 3, "step_ms": 2.0, "peak_bytes": 10**6, "examples_per_s": 5.0, "macs_per_example": 7.0}


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


def test_a_sweep_costs_all_its_runs_and_never_picks_a_diverged_one():
    found = sweep_result(Sweep(["a", "b", "c"], "loss", "min", "g", "sweep"), arms())
    assert found["best"] == "b"
    assert found["cost"]["train_s"] == 3.0
    assert found["metrics"]["loss"]["mean"] == pytest.approx(0.6)


def test_a_curve_and_tokens_stand_beside_the_cost_only_where_they_are():
    plain = arm_result([run(1.0)], COST)
    assert "curve" not in plain
    assert "tokens" not in plain["cost"]
    curve = {"step": [1, 2], "train_s": [0.5, 1.0], "loss": [3.0, 1.0]}
    arm = arm_result([run(1.0) | {"curve": curve}, run(0, status="diverged")], {**COST, "tokens": 5})
    assert arm["curve"] == [curve, None]
    assert arm["cost"]["tokens"] == 5
    both = arm_result([run(1.0) | {"curve": curve}] * 2, COST)
    claims = [
        Claim("in time", lambda c: time_to(c["a"], "loss", c["a"]["loss"], "min"), "<=", lambda c: 1.0, of="cost"),
        Claim("a run that fails has no time", lambda c: time_to(c["b"], "loss", 3.0), "<=", lambda c: 9.0, of="cost"),
    ]
    assert [claim["holds"] for claim in decide(claims, {"a": both, "b": arm}, "cost")] == [True, False]


def test_claims_are_decided_by_numbers_and_nan_never_holds():
    claims = [
        Claim("b beats a", lambda m: m["b"]["loss"], "<=", lambda m: m["a"]["loss"]),
        Claim("a beats b", lambda m: m["a"]["loss"], "<=", lambda m: m["b"]["loss"]),
        Claim("c is good", lambda m: m["c"]["loss"], "<=", lambda m: 9.0),
        Claim("fast", lambda c: c["a"]["step_ms"], "<=", lambda c: 1.0, of="cost"),
    ]
    assert [claim["holds"] for claim in decide(claims, arms(), "metrics")] == [True, False, False]
    assert [claim["holds"] for claim in decide(claims, arms(), "cost")] == [False]


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


def results():
    failing = {"text": "it is free", "left": 2.0, "op": "<=", "right": 1.0, "holds": False}
    return {
        "schema": 1,
        "study": "toy",
        "preset": "smoke",
        "seeds": [0, 1],
        "budget": {"amount": 10, "unit": "steps"},
        "arms": json.loads(json.dumps(arms())),
        "claims": [failing],
        "environment": environment(),
    }


def test_the_report_shows_a_failing_claim_and_a_diverged_arm():
    text = render(results(), {"g": Axis("loss", "min", "the loss")}, [])
    assert "**DOES NOT HOLD** | it is free" in text
    assert "Diverged" in text
    assert "0.6 ± " in text
    assert "None" not in text.replace("commit None", "")


def test_the_plot_is_drawn_without_a_display(tmp_path):
    curves = {"b": {"0": {"step": [1, 2], "loss": [1.0, 0.5]}}}
    draw(results(), {"g": Axis("loss", "min", "the loss")}, curves, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_foreign_results_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="effjax compare"):
        read_results(tmp_path / "results.json")
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks"):
        read_results(tmp_path / "results.json")
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        read_results(tmp_path / "results.json")


def test_numbers_are_short():
    assert [number(x) for x in (None, math.nan, 0.0, 12345.6, 0.123456, 0.00012345)] == [
        "-",
        "-",
        "0",
        "12,346",
        "0.1235",
        "0.000123",
    ]


def test_budget_counts_steps():
    assert Budget(1000, "examples").steps(64) == 15
    assert Budget(7).steps(64) == 7
    assert Budget(2.5, "epochs").steps(64, [4, 3, 2].__getitem__) == 8
    assert Budget(0.1, "epochs").steps(64, lambda epoch: 3) == 1
    with pytest.raises(ValueError, match="epochs needs the data's rows"):
        Budget(3, "epochs").steps(64)
    with pytest.raises(ValueError, match="before the step time is measured"):
        Budget(1.0, "device_seconds").steps(64)
