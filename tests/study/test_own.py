"""`compare` on a user's own networks and data, read from a CSV: stopped and continued, and what is refused."""

import csv
import json
import os
import signal
import threading
import time
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import numpy as np
import optax
import pytest
from flax import nnx

from effjax.recipes.spec import Claim
from effjax.study.compare import compare
from effjax.tasks.custom import task
from effjax.train.options import Budget, TrainOptions
from effjax.train.signals import Preempted
from effjax.train.trainer import supervised


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(2, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.drop, self.last = nnx.Dropout(0.1, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))


NETWORKS = {
    "nnx": lambda: Nnx,
    "equinox": lambda: lambda key: eqx.nn.MLP(2, 2, 8, 1, key=key),
    "linen": lambda: nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)]),
}


def points():
    """Columns of a CSV, as one reads them."""
    rng = np.random.default_rng(0)
    lines = ["a,b,kind", *(f"{a:.4f},{b:.4f},{int(a * b > 0)}" for a, b in rng.normal(size=(200, 2)))]
    rows = list(csv.DictReader(lines))
    x = np.array([[float(row["a"]), float(row["b"])] for row in rows], np.float32)
    label = np.array([int(row["kind"]) for row in rows], np.int32)
    return {"train": {"x": x[:150], "label": label[:150]}, "test": {"x": x[150:], "label": label[150:]}}


def compared(mine, out):
    options = TrainOptions(checkpoint_steps=32, log_steps=5)
    return compare(
        task=mine,
        arms={
            "sgd": optax.sgd(0.1),
            "adam": supervised(mine, optax.adam(0.01), options=options),
            "cosine": lambda steps: optax.sgd(optax.cosine_decay_schedule(0.3, steps)),
        },
        budget=64,
        seeds=(0, 1),
        options=options,
        out=out,
        quiet=True,
    )


def stop_once_found(folder: Path, pattern: str):
    """Send this process SIGTERM once a path of the folder matches."""
    while not list(folder.glob(pattern)):
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGTERM)


# How the others become tasks is tested with tasks; what follows is the same code.
KINDS = [pytest.param(kind, marks=[pytest.mark.nightly] * (kind != "nnx")) for kind in NETWORKS]


@pytest.mark.study
@pytest.mark.parametrize("kind", KINDS)
def test_three_arms_on_a_network_of_ones_own_stopped_and_continued(kind, tmp_path):
    mine, cut = task(NETWORKS[kind](), points(), name=f"mine-{kind}"), tmp_path / "cut"
    whole = compared(mine, tmp_path / "whole")
    watch = threading.Thread(target=stop_once_found, args=(cut, ".work/arms/*/adam/0/checkpoints/*"), daemon=True)
    watch.start()
    with pytest.raises(Preempted):
        compared(mine, cut)
    watch.join()
    done = {path: path.stat().st_mtime_ns for path in cut.rglob("done.json")}
    assert done  # the arm before is finished and kept
    again = compared(mine, cut)
    assert {name: arm["metrics"] for name, arm in again["arms"].items()} == {
        name: arm["metrics"] for name, arm in whole["arms"].items()
    }
    assert again["groups"] == {f"mine-{kind}": {"name": "accuracy", "goal": "max", "label": "test accuracy"}}
    assert (cut / "report.png").exists()
    assert f"mine-{kind}/sgd" in again["arms"]


def small():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 2)).astype(np.float32)
    columns = {"x": x, "label": (x[:, 0] > 0).astype(np.int32)}
    init = lambda key: {"w": np.zeros((2, 2), np.float32)}
    return task((init, lambda params, x: x @ params["w"]), {"train": columns, "test": columns}, name="small")


def test_budgets_claims_and_arms_that_do_nothing(tmp_path):
    mine = small()
    found = compare(
        task=mine,
        arms={"sgd": optax.sgd(0.5), "same": lambda steps: optax.sgd(0.5), "still": optax.sgd(0.0)},
        budget=Budget(3, "epochs"),
        batch_size=16,
        seeds=(0,),
        claims=[Claim("sgd", ">=", "still"), Claim("sgd", ">=", "nobody"), Claim("still", ">=", 0.99)],
        out=tmp_path,
        quiet=True,
    )
    assert found["idle"] == [["small/sgd", "small/same"]]
    assert [(claim["text"], claim["holds"]) for claim in found["claims"]] == [
        ("the test accuracy of sgd is at least that of still", True),
        ("the test accuracy of still is at least 0.99", False),
    ]
    assert found["budget"] == {"amount": 3, "unit": "epochs"}
    steps = json.loads((tmp_path / "curves.json").read_text())["small/sgd"]["0"]["step"]
    assert steps[-1] == 12
    again = compare(
        task=mine,
        arms={"sgd": optax.sgd(0.5), "same": optax.sgd(0.5), "still": optax.sgd(0.0)},
        budget=Budget(3, "epochs"),
        batch_size=16,
        seeds=(0,),
        out=tmp_path,
        quiet=True,
    )
    assert again["arms"] == found["arms"]
    with pytest.raises(ValueError, match=r"holds another comparison:\s+config.batch_size: 16 there, 32 here"):
        compare(
            task=mine,
            arms={"sgd": optax.sgd(0.5), "same": optax.sgd(0.5), "still": optax.sgd(0.0)},
            budget=Budget(3, "epochs"),
            batch_size=32,
            seeds=(0,),
            out=tmp_path,
            quiet=True,
        )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "needs a study such as 'samuel:smoke', or task, arms and budget"),
        ({"task": small(), "arms": {"a": optax.sgd(0.1)}}, ValueError, "budget is missing"),
        ({"task": small(), "arms": {}, "budget": 5}, ValueError, "leaves nothing to compare"),
        ({"task": small(), "arms": {"a/b": optax.sgd(0.1)}, "budget": 5}, ValueError, "'a/b' cannot be a name"),
        ({"task": small(), "arms": {"a": 3}, "budget": 5}, TypeError, r"arms\['a'\] is a int"),
        ({"task": "digits", "arms": {"a": 3}, "budget": 5}, TypeError, "task is a str; make one by effjax.task"),
        ({"study": "samuel:smoke", "budget": 5}, ValueError, "a study has its own"),
        (
            {
                "task": small(),
                "arms": {"a": supervised(small(), optax.sgd(0.1))},
                "budget": 5,
                "options": TrainOptions(accumulate=2),
            },
            ValueError,
            "the arm 'a' is a Program, which has its own",
        ),
        (
            {
                "task": small(),
                "arms": {"a": optax.sgd(0.1)},
                "budget": 5,
                "options": TrainOptions(dtype="bfloat16"),
            },
            ValueError,
            "train.dtype='bfloat16', but 'small' was made with dtype='float32'",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, error, message, tmp_path):
    with pytest.raises(error, match=message):
        compare(**arguments, out=tmp_path / "out", quiet=True)
    assert not list(tmp_path.rglob("results.json"))


def test_compiling_the_evaluation_is_no_cost_of_the_arm_that_comes_first(tmp_path):
    calls = []

    def evaluate(variables):
        calls.append(time.sleep(0 if calls else 0.5))
        return judged(variables)

    mine = small()
    judged, mine = mine.evaluate, mine._replace(evaluate=evaluate)
    arms = {"first": optax.sgd(0.1), "second": optax.sgd(0.2)}
    results = compare(task=mine, arms=arms, budget=4, seeds=(0,), out=tmp_path / "out", quiet=True)
    assert len(calls) == 3
    assert all(arm["cost"]["evaluate_s"] < 0.4 for arm in results["arms"].values())
