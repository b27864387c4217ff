"""Claims: what is compared, what is left out, what cannot be decided, and how it reads."""

import math

import pytest

from effjax.recipes.spec import Arm, Claim, Group, Sweep, choose_arms
from effjax.study.claims import decide, is_timed, paired, seconds_to
from effjax.tasks.task import Metric

LOSS = {"name": "loss", "goal": "min", "label": "mean loss"}
ACCURACY = {"name": "accuracy", "goal": "max", "label": "test accuracy"}


def arm(role="baseline", status="ok", curve=None, cost=(), **metrics):
    found = {
        name: {"values": values, "mean": None if None in values else sum(values) / len(values)}
        for name, values in metrics.items()
    }
    return {"role": role, "status": status, "metrics": found, "cost": dict(cost)} | ({"curve": curve} if curve else {})


ARMS = {
    "g/sgd-1": arm(loss=[3.0, 5.0], cost={"train_s": 2.0, "step_ms": 4.0}),
    "g/sgd-2": arm(loss=[2.0, 2.0], cost={"train_s": 3.0, "step_ms": 6.0}),
    "g/sweep": arm("sweep", loss=[2.0, 2.0], cost={"train_s": 5.0}),
    "g/new": arm("method", loss=[1.0, 2.0], detail=[0.5, 0.5], other=[0.2, 0.4], cost={"train_s": 4.0, "step_ms": 5.0}),
    "g/lost": arm(status="diverged", loss=[1.0, None], cost={"train_s": 1.0}),
}


def one(claim, arms=ARMS, metric=LOSS, timed=None):
    found = decide({"*": [claim]}, arms, {"g": metric}, timed=is_timed(claim) if timed is None else timed)
    return found[0] if found else None


@pytest.mark.parametrize(
    ("claim", "left", "right", "holds", "text"),
    [
        (Claim("new", "<=", "sgd-2"), 1.5, 2.0, True, "the mean loss of new is at most that of sgd-2"),
        (Claim("new", ">=", "sgd-2"), 1.5, 2.0, False, "the mean loss of new is at least that of sgd-2"),
        (
            Claim("new", "<=", "best sgd-*", times=0.5, plus=0.25),
            1.5,
            1.25,
            False,
            "the mean loss of new is at most 0.5 times that of the best of sgd-*, plus 0.25",
        ),
        (Claim("best new|sgd-1", "<=", 1.5), 1.5, 1.5, True, "the mean loss of the best of new, sgd-1 is at most 1.5"),
        (
            Claim("new", "<=", "sum sgd-*", of="train_s", why="one run"),
            4.0,
            5.0,
            True,
            "one run: the training time of new is at most that of all sgd-* together",
        ),
        (
            Claim("new", "<=", "sweep", of="train_s"),
            4.0,
            5.0,
            True,
            "the training time of new is at most that of sweep",
        ),
        (Claim("new", "no worse", "sgd-2", plus=-0.6), 1.5, 2.6, True, None),
        (
            Claim("new", "<=", "sgd-2", standard_errors=-1),
            -0.5,
            -0.5,
            True,
            "the mean loss of new is below that of sgd-2 by at least one standard error of the paired difference",
        ),
        (
            Claim("new", "<=", "sgd-1", standard_errors=1),
            -2.5,
            0.5,
            True,
            "the mean loss of new is not above that of sgd-1 by more than one standard error of the paired difference",
        ),
        (
            Claim("new", "<=", "new", of="detail", than_of=("other", "loss")),
            0.5,
            0.3,
            False,
            "the detail of new is at most the best of its other and mean loss",
        ),
        (
            Claim("sgd-2", ">=", "sgd-1", of="train_s", times=0.9, as_ratio_of="step_ms"),
            1.5,
            1.35,
            True,
            "the training time of sgd-2, divided by that of sgd-1, is at least 0.9 times the same ratio of the step "
            "time",
        ),
    ],
)
def test_numbers_and_sentences(claim, left, right, holds, text):
    found = one(claim)
    assert (found["left"], found["right"]) == (pytest.approx(left), pytest.approx(right))
    assert found["holds"] is holds
    assert "undecided" not in found
    assert text is None or found["text"] == text


def test_no_worse_turns_round_with_the_goal():
    arms = {"g/a": arm(accuracy=[0.9]), "g/b": arm(accuracy=[0.91])}
    claim = Claim("a", "no worse", "b", plus=0.0)
    assert one(claim, arms, ACCURACY)["op"] == ">="
    assert not one(claim, arms, ACCURACY)["holds"]
    assert one(claim._replace(plus=-0.02), arms, ACCURACY)["holds"]
    arms = {"g/a": arm(loss=[0.9]), "g/b": arm(loss=[0.91])}
    assert one(claim, arms)["op"] == "<="
    assert one(claim, arms)["holds"]


@pytest.mark.parametrize(
    "claim", [Claim("new", "<=", "gone"), Claim("best x*", "<=", 1.0), Claim("new", "<=", "a", until="b")]
)
def test_claims_about_arms_that_do_not_run_are_left_out(claim):
    assert one(claim) is None


def test_a_pattern_never_takes_a_sweep_for_one_of_its_members():
    assert one(Claim("new", "<=", "best s*"))["right"] == 2.0
    assert one(Claim("new", "<=", "sum s*", of="train_s"))["right"] == 5.0


def test_a_diverged_arm_leaves_its_claim_undecided_and_out_of_the_best():
    found = one(Claim("lost", "<=", "new"))
    assert not found["holds"]
    assert found["undecided"] == "g/lost diverged"
    assert math.isnan(found["left"])
    assert one(Claim("new", "<=", "best lost|sgd-2"))["right"] == 2.0
    assert one(Claim("new", "<=", "sgd-1", of="nowhere"))["undecided"] == "nowhere is not known for every arm"


def test_the_best_is_the_most_of_a_metric_that_rises_but_the_least_of_a_cost():
    arms = {f"g/sgd-{rate}": arm(accuracy=[rate / 10], cost={"step_ms": 10.0 * rate}) for rate in (1, 2)}
    arms["g/new"] = arm(accuracy=[0.3], cost={"step_ms": 15.0})
    assert one(Claim("new", ">=", "best sgd-*"), arms, ACCURACY)["right"] == 0.2
    assert one(Claim("new", "<=", "best sgd-*", of="step_ms"), arms, ACCURACY)["right"] == 10.0
    assert one(Claim("best sgd-*", "<=", "new", of="step_ms"), arms, ACCURACY)["left"] == 10.0


def test_a_run_that_measured_costs_alone_decides_claims_on_costs_alone():
    arms = {name: {**found, "metrics": {}, "status": "ok"} for name, found in ARMS.items()}
    assert one(Claim("new", "<=", "sgd-2"), arms) is None
    assert one(Claim("new", "<=", "sgd-2", of="step_ms"), arms)["holds"]


def test_claims_reach_arms_of_other_groups_and_follow_the_group_s_name():
    arms = ARMS | {"long/new": arm(cost={"temp_bytes": 10}), "short/new": arm(cost={"temp_bytes": 10})}
    metrics = {"long": LOSS, "short": LOSS}
    claims = {"long": [Claim("long/new", "<=", "short/new", of="temp_bytes", times=1.05)]}
    found = decide(claims, arms, metrics, timed=True)
    assert [(claim["group"], claim["holds"]) for claim in found] == [("long", True)]
    assert "short/new" in found[0]["text"]


def test_time_until_another_arm_s_last_value_seed_by_seed():
    curve = lambda *points: {"train_s": [s for s, _ in points], "accuracy": [a for _, a in points]}
    arms = {
        "g/slow": arm(curve=[curve((1, 0.5), (4, 0.8)), curve((1, 0.6), (6, 0.7))], accuracy=[0.8, 0.7]),
        "g/fast": arm(curve=[curve((1, 0.7), (2, 0.9)), curve((1, 0.7), (2, 0.7))], accuracy=[0.9, 0.7]),
        "g/never": arm(curve=[curve((1, 0.1), (2, 0.2)), curve((1, 0.7), (2, 0.7))], accuracy=[0.2, 0.7]),
    }
    found = one(Claim("fast", "<=", "slow", until="slow"), arms, ACCURACY)
    assert (found["left"], found["right"]) == (1.5, 5.0)
    assert found["text"] == "fast takes no more training time than slow to the test accuracy that slow ends with"
    assert one(Claim("never", "<=", "slow", until="slow"), arms, ACCURACY)["undecided"]
    assert math.isnan(seconds_to(arms["g/never"]["curve"][0], "accuracy", 0.5, "max"))


def test_a_paired_difference_needs_both_arms_in_every_seed():
    assert paired(ARMS["g/new"], ARMS["g/sgd-1"], "loss") == (-2.5, 0.5)
    assert math.isnan(paired(ARMS["g/new"], ARMS["g/lost"], "loss")[0])
    assert paired(arm(loss=[2.0]), arm(loss=[1.0]), "loss") == (1.0, 0.0)


def group(*names, **sweeps):
    arms = [Arm(name, "baseline", lambda task: None) for name in names]
    found = {name: Sweep(pattern, name) for name, pattern in sweeps.items()}
    return Group("g", Metric(**LOSS), lambda: None, arms, found)


def test_arms_are_chosen_by_pattern_and_empty_sweeps_go():
    groups = [group("a-1", "a-2", "b", all="a-*", none="c-*")]
    chosen = lambda *patterns: [arm.name for arm in choose_arms(groups, patterns)[0].arms]
    assert chosen("*") == ["a-1", "a-2", "b"]
    assert chosen("a-*", "!a-1") == ["a-2"]
    assert chosen("!b") == ["a-1", "a-2"]
    assert list(choose_arms(groups, ("*",))[0].sweeps) == ["all"]
    assert list(choose_arms(groups, ("b",))[0].sweeps) == []
    with pytest.raises(ValueError, match="'a-3' matches none of a-1, a-2, b"):
        chosen("a-3")
    with pytest.raises(ValueError, match="leaves nothing to compare"):
        chosen("b", "!b")


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "leaves no task to compare"),
        ([group("a"), group("a")], "the group 'g' would come twice"),
        ([group("a", "b", "a")], "the arm of g 'a' would come twice"),
        ([group("a", a="*")], "the arm of g 'a' would come twice"),
    ],
)
def test_names_that_would_overwrite_one_another_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        choose_arms(groups, ("*",))
