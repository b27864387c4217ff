"""Claims decided from results, and their sentences."""

import fnmatch
import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from effjax.recipes.spec import Claim

Arms = Mapping[str, Mapping[str, Any]]

COST_WORDS = {
    "params": "number of parameters",
    "trained_params": "number of trained parameters",
    "peak_bytes": "peak memory of a step",
    "temp_bytes": "temporary memory of a step",
    "step_ms": "step time",
    "macs_per_example": "number of multiply-adds",
    "train_s": "training time",
    "total_s": "total time",
    "compile_s": "compile time",
    "compiles": "number of executables",
    "tokens": "number of tokens",
    "inference_call_ms": "time of an inference call",
    "inference_macs_per_example": "number of multiply-adds of an inference",
}
METRIC_WORDS = {
    "processed_tokens": "number of processed tokens",
    "precision_1": "precision of the first pseudolabels",
    "auc_learned": "AUC of the learned detector",
    "auc_score": "AUC of the score",
    "auc_agreement": "AUC of score and agreement",
    "auc_mutual": "AUC of the mutual information",
}


def is_timed(claim: Claim) -> bool:
    """Whether a claim is decided by costs, which differ from run to run, and not by metrics alone."""
    return claim.until is not None or claim.of in COST_WORDS or claim.as_ratio_of in COST_WORDS


def decide(
    claims: Mapping[str, Sequence[Claim]],
    arms: Arms,
    metrics: Mapping[str, Mapping[str, str]],
    *,
    timed: bool,
) -> list[dict[str, Any]]:
    """Decide the claims of one kind.

    Args:
      claims: by a shell pattern on the group's name; of a group all patterns count that match.
      arms: of results.json, by ``group/arm``.
      metrics: per group ``{"name", "goal", "label"}``.
      timed: those decided by costs, or those decided by metrics alone.

    Returns:
      Per claim ``{"group", "text", "left", "op", "right", "holds", "arms"}``, the last the names of all that it is
      about, and ``"undecided"`` with the reason where a number is missing; such a claim does not hold. A claim about
      arms that are not there is left out.
    """
    found = []
    for group, metric in metrics.items():
        for claim in _claims_of(claims, group):
            if is_timed(claim) == timed and (timed or was_trained(arms)):
                decided = _Decision(claim, group, metric, arms).result()
                found += [] if decided is None else [decided]
    return found


def was_trained(arms: Arms) -> bool:
    """Whether arms were trained, and not their cost alone measured; all of them may have diverged."""
    return any(arm["metrics"] or arm["status"] == "diverged" for arm in arms.values())


def _claims_of(claims: Mapping[str, Sequence[Claim]], group: str) -> Iterator[Claim]:
    for pattern, some in claims.items():
        if fnmatch.fnmatchcase(group, pattern):
            yield from some


class _Decision:
    """One claim on one group."""

    def __init__(self, claim: Claim, group: str, metric: Mapping[str, str], arms: Arms):
        if claim.op == "no worse":
            larger = metric["goal"] == "max"
            claim = claim._replace(op=">=" if larger else "<=", plus=claim.plus if larger else -claim.plus)
        self.claim, self.group, self.metric, self.arms = claim, group, metric, arms
        self.of = claim.of or metric["name"]

    def result(self) -> dict[str, Any] | None:
        claim = self.claim
        sides = [claim.arm, *([claim.than] if isinstance(claim.than, str) else [])]
        named = [self._members(side) for side in (*sides, *([claim.until] if claim.until else []))]
        if not all(named):
            return None
        left, right = self._numbers()
        holds = left <= right if claim.op == "<=" else left >= right
        decided = {
            "group": self.group,
            "text": self.sentence(),
            "left": left,
            "op": claim.op,
            "right": right,
            "holds": bool(holds),
            "arms": list(dict.fromkeys(name for names in named for name in names)),
        }
        if not math.isfinite(left) or not math.isfinite(right):
            decided["undecided"] = self._reason([name for names in named for name in names])
        return decided

    def _numbers(self) -> tuple[float, float]:
        """Both sides; NaN where a number is missing."""
        claim = self.claim
        left = self._side(claim.arm, lambda arm: value(arm, self.of))
        if not isinstance(claim.than, str):
            return left, claim.times * claim.than + claim.plus
        if claim.standard_errors is not None:
            mean, error = paired(self._one(claim.arm), self._one(claim.than), self.of)
            return mean, claim.standard_errors * error
        if claim.until is not None:
            seconds = functools.partial(self._seconds_until, until=claim.until)
            return self._side(claim.arm, seconds), self._side(claim.than, seconds)
        if claim.as_ratio_of:
            other = functools.partial(value, name=claim.as_ratio_of)
            ratio = left / (self._side(claim.than, lambda arm: value(arm, self.of)) or math.nan)
            bound = self._side(claim.arm, other) / (self._side(claim.than, other) or math.nan)
            return ratio, claim.times * bound
        names = claim.than_of or (self.of,)
        right = self._best([self._side(claim.than, lambda arm, of=of: value(arm, of)) for of in names])
        return left, claim.times * right + claim.plus

    def _side(self, side: str, number: Callable[[Mapping[str, Any]], float]) -> float:
        values = [number(self.arms[name]) for name in self._members(side)]
        if side.startswith("sum "):
            return math.fsum(values)
        return self._best(values)

    def _best(self, values: Sequence[float]) -> float:
        """The best number of a side.

        A claim compares like with like: both sides take the extreme that the group's goal, or a cost, asks for.
        """
        numbers = [number for number in values if math.isfinite(number)]
        most = self.of not in COST_WORDS and self.metric["goal"] == "max"
        return (max if most else min)(numbers, default=math.nan)

    def _one(self, side: str) -> Mapping[str, Any]:
        return self.arms[self._members(side)[0]]

    def _members(self, side: str) -> list[str]:
        pattern = side.removeprefix("best ").removeprefix("sum ")
        found = []
        for part in pattern.split("|"):
            full = part if part.count("/") else f"{self.group}/{part}"
            found += [
                name
                for name, arm in self.arms.items()
                if fnmatch.fnmatchcase(name, full) and (arm["role"] != "sweep" or name == full) and name not in found
            ]
        return found

    def _seconds_until(self, arm: Mapping[str, Any], until: str) -> float:
        target = self._one(until).get("curve") or []
        own = arm.get("curve") or []
        if not own or len(own) != len(target):
            return math.nan
        name, goal = self.metric["name"], self.metric["goal"]
        times = [
            math.nan if mine is None or end is None else seconds_to(mine, name, end[name][-1], goal)
            for mine, end in zip(own, target, strict=True)
        ]
        return sum(times) / len(times)

    def _reason(self, names: Sequence[str]) -> str:
        diverged = [name for name in names if self.arms[name]["status"] == "diverged"]
        if diverged:
            return f"{', '.join(diverged)} diverged"
        return f"{self.of} is not known for every arm"

    # The sentence

    def sentence(self) -> str:
        claim = self.claim
        if claim.until is not None:
            text = self._until(claim.until)
        elif claim.standard_errors is not None:
            text = self._paired(claim.standard_errors)
        else:
            text = self._bound()
        return f"{claim.why}: {text}" if claim.why else text

    def _until(self, until: str) -> str:
        claim = self.claim
        most = "no more" if claim.op == "<=" else "no less"
        return (
            f"{_named(claim.arm)} takes {most} training time than {_named(claim.than)} to the "
            f"{self.metric['label']} that {_named(until)} ends with"
        )

    def _paired(self, errors: float) -> str:
        """Above by an error, below by an error, or not on the wrong side by more than an error."""
        claim = self.claim
        upward = claim.op == ">="
        strict = (errors > 0) == upward
        if strict:
            side, margin = ("above" if upward else "below"), "at least"
        else:
            side, margin = ("not below" if upward else "not above"), "more than"
        return (
            f"the {self._words(self.of)} of {_named(claim.arm)} is {side} that of {_named(claim.than)} by {margin} one "
            "standard error of the paired difference"
        )

    def _bound(self) -> str:
        claim = self.claim
        subject = f"the {self._words(self.of)} of {_named(claim.arm)}"
        bound = "at most" if claim.op == "<=" else "at least"
        times = "" if claim.times == 1 else f"{claim.times:g} times "
        plus = f", {'plus' if claim.plus > 0 else 'minus'} {abs(claim.plus):g}" if claim.plus else ""
        if not isinstance(claim.than, str):
            return f"{subject} is {bound} {claim.times * claim.than + claim.plus:g}"
        if claim.as_ratio_of:
            other = self._words(claim.as_ratio_of)
            return (
                f"{subject}, divided by that of {_named(claim.than)}, is {bound} {times}the same ratio of the {other}"
            )
        if claim.than_of:
            others = " and ".join(self._words(name) for name in claim.than_of)
            return f"{subject} is {bound} {times}the best of its {others}{plus}"
        return f"{subject} is {bound} {times}that of {_named(claim.than)}{plus}"

    def _words(self, name: str) -> str:
        if name == self.metric["name"]:
            return self.metric["label"]
        return COST_WORDS.get(name) or METRIC_WORDS.get(name, name.replace("_", " "))


def _named(side: str | float) -> str:
    """An arm, or the best or the sum of several, in words."""
    if not isinstance(side, str):
        return f"{side:g}"
    some = side.removeprefix("sum ").removeprefix("best ").replace("|", ", ")
    if side.startswith("sum "):
        return f"all {some} together"
    return f"the best of {some}" if side.startswith("best ") else some


def costs_of(arm: Mapping[str, Any]) -> dict[str, Any]:
    """The costs of an arm of results.json; those of inference by names such as ``inference_call_ms``."""
    return {**{f"inference_{name}": found for name, found in arm.get("inference", {}).items()}, **arm["cost"]}


def value(arm: Mapping[str, Any], name: str) -> float:
    """A metric's mean over seeds, a cost, or a cost of inference; NaN where it is null or absent.

    Example:
      >>> value({"metrics": {"accuracy": {"mean": 0.5}}, "cost": {"step_ms": 2.0}}, "step_ms")
      2.0
    """
    found = arm["metrics"][name]["mean"] if name in arm["metrics"] else costs_of(arm).get(name)
    return math.nan if found is None else found


def paired(arm: Mapping[str, Any], rival: Mapping[str, Any], metric: str) -> tuple[float, float]:
    """Mean over seeds of the difference between two arms, and its standard error (0 for one seed).

    Example:
      >>> one, other = ({"metrics": {"accuracy": {"values": v}}} for v in ([0.75, 1.0], [0.5, 0.5]))
      >>> paired(one, other, "accuracy")
      (0.375, 0.125)
    """
    columns = [some["metrics"].get(metric, {}).get("values", []) for some in (arm, rival)]
    if not columns[0] or len(columns[0]) != len(columns[1]) or None in (*columns[0], *columns[1]):
        return math.nan, math.nan
    differences = [a - b for a, b in zip(*columns, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return statistics.fmean(differences), error


def seconds_to(curve: Mapping[str, Sequence[float]], metric: str, target: float, goal: str) -> float:
    """Training seconds until an evaluation first reaches ``target``; NaN if none does.

    Args:
      curve: columns of one run's evaluations.
      metric: of the evaluation.
      target: the value to reach.
      goal: whether it is reached from below ('max') or above ('min').

    Example:
      >>> seconds_to({"train_s": [1.0, 2.0], "accuracy": [0.5, 0.9]}, "accuracy", 0.8, "max")
      2.0
    """
    sign = 1 if goal == "max" else -1
    points = zip(curve["train_s"], curve[metric], strict=True)
    reached = (seconds for seconds, found in points if found is not None and sign * found >= sign * target)
    return next(reached, math.nan)
