"""What the numbers of a study decide: which arms compete, what to take, and where clocks disagree."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from effjax.study.claims import paired, value
from effjax.study.frontier import pareto

Arms = Mapping[str, Mapping[str, Any]]

APART = 0.01
"""Share by which two measured times must differ before an order between them is reported."""

LESS_MEMORY = 0.05
"""Share by which peak memory must be lower to be worth a line."""


def members(results: Mapping[str, Any], group: str) -> dict[str, Mapping[str, Any]]:
    """The arms of a group, by their full name."""
    return {name: arm for name, arm in results["arms"].items() if arm["group"] == group}


def ranked(arms: Arms, metric: Mapping[str, str]) -> list[str]:
    """Names, best first by the metric; those without a number last."""
    sign = 1 if metric["goal"] == "min" else -1

    def rank(name: str) -> float:
        found = value(arms[name], metric["name"])
        return sign * found if math.isfinite(found) else math.inf

    return sorted(arms, key=rank)


def level(arms: Arms, metric: Mapping[str, str]) -> list[str]:
    """The best arm, and those that no more than one standard error of the paired difference separates from it.

    Args:
      arms: of one group.
      metric: ``{"name", "goal", "label"}``.

    Returns:
      Names, best first; of arms that ended well in every seed. For a single seed no error is known: the best arm,
      and those that equal it.
    """
    good = {name: arm for name, arm in arms.items() if arm["status"] == "ok" and _known(value(arm, metric["name"]))}
    order = ranked(good, metric)
    sign = 1 if metric["goal"] == "max" else -1

    def near(name: str) -> bool:
        behind, error = paired(good[order[0]], good[name], metric["name"])
        return sign * behind <= error

    return [name for name in order if near(name)]


def candidates(arms: Arms) -> dict[str, Mapping[str, Any]]:
    """The arms that one could take.

    Not a control, which isolates a claim and may use what nobody has. And no single run of a sweep: which one is best
    is known after all of them, so that the sweep stands for them, at the price of all.
    """
    inside = {name for arm in arms.values() for name in arm.get("members", ())}
    return {name: arm for name, arm in arms.items() if arm["role"] != "control" and name not in inside}


def short(name: str, arms: Arms) -> str:
    """An arm's name without its group, as code."""
    return f"`{name.removeprefix(arms[name]['group'] + '/')}`"


def listed(words: Sequence[str]) -> str:
    """Words joined by commas and a last 'and'.

    Example:
      >>> listed(["a", "b", "c"])
      'a, b and c'
    """
    return " and ".join(part for part in [", ".join(words[:-1]), *words[-1:]] if part)


def number(found: float | None) -> str:
    """Three or four significant digits; a dash for null.

    Example:
      >>> number(12345.6), number(0.123456), number(None)
      ('12,346', '0.1235', '-')
    """
    if found is None or not _known(found):
        return "-"
    if abs(found) >= 1e9:
        return f"{found:.3g}"
    if abs(found) >= 1000:
        return f"{found:,.0f}"
    return f"{found:.4g}" if abs(found) >= 0.1 or found == 0 else f"{found:.3g}"


def seconds(found: float) -> str:
    """Seconds, with two significant digits at least."""
    return f"{found:,.0f} s" if found >= 100 else f"{found:.3g} s" if found >= 10 else f"{found:.2g} s"


def spread(arm: Mapping[str, Any], metric: str) -> str:
    """``mean ± std`` of a metric, or a dash."""
    found = arm["metrics"].get(metric)
    if found is None or found["mean"] is None:
        return "diverged" if arm["status"] == "diverged" else "-"
    deviation = f" ± {number(found['std'])}" if len(found["values"]) > 1 else ""
    return f"{number(found['mean'])}{deviation}"


def _known(found: float | None) -> bool:
    return found is not None and math.isfinite(found)


# Where two clocks disagree


def clocks(arms: Arms, metric: Mapping[str, str]) -> list[str]:
    """Sentences where training time and total time order the arms differently, among those that compete.

    Compared are the arms level with the best. Where nothing differs among them, compared are they and all on a front
    of quality against either time.
    """
    timed = {name: arm for name, arm in candidates(arms).items() if _timed(arm)}
    best = level(timed, metric)
    fronts: list[str] = []
    for clock in ("train_s", "total_s"):
        points = {name: (arm["cost"][clock], value(arm, metric["name"])) for name, arm in timed.items()}
        fronts += pareto(points, metric["goal"])
    for names in (best, dict.fromkeys([*best, *fronts])):
        some = {name: timed[name] for name in names}
        said = [sentence for sentence in (_fastest(some, metric), _orders(some)) if sentence]
        if said:
            # A worse arm may be faster still.
            faster = {_by_time(timed, clock)[0] for clock in ("train_s", "total_s")} - some.keys()
            if faster and _fastest(some, metric):
                said[0] = f"Among {listed([short(name, arms) for name in some])}, {said[0]}"
            return said
    return []


def _timed(arm: Mapping[str, Any]) -> bool:
    return arm["status"] == "ok" and all(_known(arm["cost"].get(clock)) for clock in ("train_s", "total_s"))


def _by_time(arms: Arms, clock: str) -> list[str]:
    return sorted(arms, key=lambda name: arms[name]["cost"][clock])


def _swapped(arms: Arms, one: str, other: str) -> bool:
    """Whether ``one`` trains faster and ``other`` is faster in total, both by more than the clock's grain."""
    a, b = arms[one]["cost"], arms[other]["cost"]
    return a["train_s"] < (1 - APART) * b["train_s"] and b["total_s"] < (1 - APART) * a["total_s"]


def _fastest(arms: Arms, metric: Mapping[str, str]) -> str:
    one, other = (_by_time(arms, clock)[:1] for clock in ("train_s", "total_s"))
    if not one or not _swapped(arms, one[0], other[0]):
        return ""
    one, other = one[0], other[0]
    a, b = arms[one]["cost"], arms[other]["cost"]
    reached = [spread(arms[name], metric["name"]) for name in (one, other)]
    equal = len(level({name: arms[name] for name in (one, other)}, metric)) == 2
    unlike = "" if equal else f" Their {metric['label']} differs: {listed(reached)}."
    return (
        f"{short(one, arms)} trains fastest ({seconds(a['train_s'])}) but {_apart_from_training(a, b)}: in total "
        f"{short(other, arms)} is faster ({seconds(b['total_s'])} against {seconds(a['total_s'])}). "
        f"{short(one, arms)} {pays(arms[one], arms[other])}.{unlike}"
    )


def _apart_from_training(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """What else than stepping the slower one spends its time on."""
    compiling, other = _difference(a, b, "compile_s"), _difference(a, b, "evaluate_s")
    parts = []
    if compiling > 0 or other <= 0:
        parts.append(f"compiles for {seconds(a['compile_s'])}" if _known(a.get("compile_s")) else "")
    if other > max(0.0, 0.1 * compiling):
        parts.append(f"evaluates for {seconds(a['evaluate_s'])}")
    return listed(list(filter(None, parts))) or f"spends {seconds(a['total_s'] - a['train_s'])} beside it"


def _difference(a: Mapping[str, Any], b: Mapping[str, Any], name: str) -> float:
    return a[name] - b[name] if _known(a.get(name)) and _known(b.get(name)) else 0.0


def pays(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """From which number of examples on the arm that trains faster is faster in total too.

    The seconds of a run are ``fixed + examples * seconds per example``, with what is spent beside training (compiling,
    evaluating) fixed: the two are equal at ``(fixed_one - fixed_other) / (per_example_other - per_example_one)``.

    Args:
      one: the arm that trains faster.
      other: the arm that is faster in total.

    Example:
      >>> arm = lambda train, total: {"cost": {"train_s": train, "total_s": total, "examples": 1000}}
      >>> pays(arm(5.0, 65.0), arm(8.0, 28.0))
      'pays from about 13,300 examples on (13.3 times this run)'
    """
    a, b = one["cost"], other["cost"]
    counts = [cost.get("examples") for cost in (a, b)]
    if not all(_known(count) and count > 0 for count in counts):
        counts = [_examples(one)] * 2  # one budget: as many examples
    mine, theirs = a["train_s"] / counts[0], b["train_s"] / counts[1]
    if mine >= theirs:
        return "never pays: per example it is no faster"
    fixed = (a["total_s"] - a["train_s"]) - (b["total_s"] - b["train_s"])
    needed = fixed / (theirs - mine)
    times = f"{needed / counts[0]:.3g} times this run"
    return (
        f"pays from about {_rounded(needed)} examples on ({times})" if counts[0] != 1 else f"pays from about {times} on"
    )


def _examples(arm: Mapping[str, Any]) -> float:
    """The examples of a run as its steady pace tells; 1 where that is not known."""
    pace = arm["cost"].get("examples_per_s")
    return pace * arm["cost"]["train_s"] / arm.get("runs", 1) if _known(pace) and pace > 0 else 1


def _rounded(count: float) -> str:
    digits = 3 - len(f"{count:.0f}")
    return f"{round(count, min(0, digits)):,.0f}"


def _orders(arms: Arms) -> str:
    """Both orders, where more differs than the fastest."""
    train, total = (_by_time(arms, clock) for clock in ("train_s", "total_s"))
    pairs = [(a, b) for i, a in enumerate(train) for b in train[i + 1 :] if _swapped(arms, a, b)]
    if not [pair for pair in pairs if pair != (train[0], total[0])]:
        return ""
    orders = [", ".join(short(name, arms) for name in order) for order in (train, total)]
    return f"Fastest first, by training time: {orders[0]}; by total time: {orders[1]}."


# What to take


def take(results: Mapping[str, Any], group: str) -> list[str]:
    """What to take in a group, and for which size it holds: sentences for a list."""
    metric, arms = results["groups"][group], members(results, group)
    if not any(arm["metrics"] for arm in arms.values()):
        return _cheapest(arms)
    taken, clock = chosen(arms, metric)
    if taken is None:
        return ["No arm ended well in every seed: there is nothing to take."]
    good = level(candidates(arms), metric)
    several = len(results["seeds"]) > 1
    best, label = good[0], metric["label"]
    within = f"within one standard error of the best {label}" if several else f"with the best {label}"
    others = listed([short(name, arms) for name in good if name != taken])
    time = {"total_s": "total time", "train_s": "training time (the total is not known)"}.get(clock or "")
    if time and others:
        why = f"the least {time} of the arms {within} (the others: {others})"
    elif several:
        why = f"no other arm is {within}"
    else:
        why = f"the best {label}"
    lines = [f"Take {_described(taken, arms, metric)}: {why}."]
    if taken != best:
        lines.append(f"Best {label}: {_described(best, arms, metric)}.")
    lines += _least_memory(arms, good, taken, metric, within)
    lines += _cheaper(arms, metric, taken, clock)
    controls = [short(name, arms) for name in level(arms, metric) if arms[name]["role"] == "control"]
    if controls:
        plural = len(controls) > 1
        lines.append(
            f"The control{'s' * plural} {listed(controls)} {'are' if plural else 'is'} {within} too; a control "
            "is there for comparison and is not advised."
        )
    if not several:
        lines.append("One seed: no spread is known, and a difference may be chance.")
    return lines


def chosen(arms: Arms, metric: Mapping[str, str]) -> tuple[str | None, str | None]:
    """The arm to take, and the cost that chose it among those level with the best.

    Returns:
      The name, None where no arm ended well; and ``'total_s'``, or ``'train_s'`` where the total is not known for all,
      or None where neither is: then it is the best arm.
    """
    good = level(candidates(arms), metric)
    for clock in ("total_s", "train_s"):
        times = {name: arms[name]["cost"].get(clock) for name in good}
        if good and all(map(_known, times.values())):
            return min(good, key=times.__getitem__), clock
    return (good[0] if good else None), None


def _described(name: str, arms: Arms, metric: Mapping[str, str]) -> str:
    arm, cost = arms[name], arms[name]["cost"]
    what = [f"{metric['label']} {spread(arm, metric['name'])}"]
    if _known(cost.get("total_s")):
        what.append(f"{seconds(cost['total_s'])} in total")
    if _known(cost.get("train_s")):
        what.append(f"{seconds(cost['train_s'])} of training")
    if _known(cost.get("peak_bytes")):
        what.append(f"{number(cost['peak_bytes'] / 1e6)} MB at the peak")
    if "runs" in arm:
        best = short(arm["best"], arms) if arm["best"] in arms else arm["best"]
        what.append(f"all {arm['runs']} runs of the sweep; the best is {best}")
    return f"{short(name, arms)} ({'; '.join([arm['label'], ', '.join(what)]) if arm['label'] else ', '.join(what)})"


def _least_memory(arms: Arms, good: Sequence[str], taken: str, metric: Mapping[str, str], within: str) -> list[str]:
    peaks = {name: arms[name]["cost"].get("peak_bytes") for name in good}
    if len(peaks) < 2 or not all(map(_known, peaks.values())):
        return []
    least = min(good, key=peaks.__getitem__)
    if peaks[least] > (1 - LESS_MEMORY) * peaks[taken]:
        return [f"No arm {within} needs notably less memory."]
    return [f"Least memory {within}: {_described(least, arms, metric)}."]


def _cheaper(arms: Arms, metric: Mapping[str, str], taken: str, clock: str | None) -> list[str]:
    """The arms on the front that are cheaper and worse."""
    good = {
        name: arm for name, arm in candidates(arms).items() if arm["status"] == "ok" and _known(arm["cost"].get(clock))
    }
    if taken not in good:
        return []
    times = {name: arm["cost"][clock] for name, arm in good.items()}
    front = pareto({name: (times[name], value(arm, metric["name"])) for name, arm in good.items()}, metric["goal"])
    cheaper = [name for name in front if times[name] < (1 - APART) * times[taken]]
    some = [
        f"{short(name, arms)} ({seconds(times[name])}, {spread(arms[name], metric['name'])})" for name in cheaper[-4:]
    ]
    return [f"Cheaper and worse: {listed(some)}."] if some else []


def _cheapest(arms: Arms) -> list[str]:
    """Where only costs were measured."""
    lines = []
    for of, words, shown in (
        ("step_ms", "Fastest step", lambda found: f"{number(found)} ms"),
        ("peak_bytes", "Least peak memory", lambda found: f"{number(found / 1e6)} MB"),
    ):
        costs = {name: arm["cost"].get(of) for name, arm in arms.items() if _known(arm["cost"].get(of))}
        if costs:
            order = sorted(costs, key=costs.__getitem__)
            lines.append(
                f"{words}: {short(order[0], arms)} ({shown(costs[order[0]])}"
                + (f"; most: {short(order[-1], arms)}, {shown(costs[order[-1]])})." if len(order) > 1 else ").")
            )
    return [*lines, "Nothing was trained: what the arms learn is not known."]
