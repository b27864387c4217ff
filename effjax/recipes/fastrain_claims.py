"""What the FASTRAIN study claims. All arms of a seed start from the same labelled nodes, so differences are paired."""

import math
from collections.abc import Collection

from effjax.recipes.spec import Claim, Metrics, paired

RIVALS = {"st-deep": "deep self-training", "st-shallow": "shallow self-training"}
PARTS = {"no-spf": "filtering", "no-pgp": "pruning", "no-dr": "dynamic regularisation", "no-ds": "dynamic sizing"}


def group_claims(group: str, arms: Collection[str]) -> list[Claim]:
    """The claims of one graph and number of labels, as far as its arms allow."""
    found = _rivals(group, arms) + _parts(group, arms) + _plateau(group, arms)
    variants = {
        "fastrain-2": "FASTRAIN with two stages",
        "fastrain-pool": "FASTRAIN with a pool of graphs",
        "fastrain-weighted": "FASTRAIN with weighted pseudolabels",
        "fastrain-guard": "FASTRAIN with the guard",
    }
    for arm, label in variants.items():
        if {"fastrain", arm} <= set(arms):
            found.append(_no_worse(group, arm, "fastrain", f"{label} is no less accurate than without"))
    if {"fastrain", "fastrain-pool"} <= set(arms):
        found.append(_ratio(group, "fastrain", "fastrain-pool", 1.0, "the pool of graphs saves time"))
    return found


def _rivals(group: str, arms: Collection[str]) -> list[Claim]:
    found = []
    for rival, label in RIVALS.items():
        if {"fastrain", rival} <= set(arms):
            found.append(_better(group, "fastrain", rival, f"FASTRAIN is more accurate than {label}"))
    if {"fastrain", "st-deep"} <= set(arms):
        text = f"{RIVALS['st-deep']} takes 1.3 x the time of FASTRAIN"
        found.append(_ratio(group, "st-deep", "fastrain", 1.3, text))
    others = [
        arm for arm in ("lp", "correct-and-smooth", "appnp", "st-appnp", "top-k", "m3s", "shallow") if arm in arms
    ]
    if "fastrain" in arms and others:
        found.append(
            Claim(
                f"{group}: FASTRAIN is at least as accurate as the best of {', '.join(others)}",
                lambda m: _value(m, group, "fastrain"),
                ">=",
                lambda m: max(_value(m, group, arm) for arm in others),
            )
        )
    if {"appnp", "st-appnp"} <= set(arms):
        found.append(_better(group, "st-appnp", "appnp", "self-training makes APPNP more accurate"))
    if {"fastrain-appnp", "st-appnp"} <= set(arms):
        text = "FASTRAIN around APPNP is no less accurate than self-training of it"
        found.append(_no_worse(group, "fastrain-appnp", "st-appnp", text))
    return found


def _parts(group: str, arms: Collection[str]) -> list[Claim]:
    found = [
        _no_worse(group, "fastrain", arm, f"{part} costs no accuracy: FASTRAIN is no less accurate than without")
        for arm, part in PARTS.items()
        if {"fastrain", arm} <= set(arms)
    ]
    if {"fastrain", "no-spf"} <= set(arms):
        text = "filtering raises the precision of the first stage's pseudolabels"
        found.append(_better(group, "fastrain", "no-spf", text, "precision_1"))
    if {"fastrain", "no-ds"} <= set(arms):
        found.append(_ratio(group, "no-ds", "fastrain", 1.1, "dynamic sizing saves a tenth of the time"))
    return found


def _plateau(group: str, arms: Collection[str]) -> list[Claim]:
    found = []
    for rival, label in RIVALS.items():
        if {"fastrain-plateau", f"{rival}-plateau"} <= set(arms):
            text = f"both stopping at a plateau, FASTRAIN is no less accurate than {label}"
            found.append(_no_worse(group, "fastrain-plateau", f"{rival}-plateau", text))
    if {"fastrain-plateau", "st-deep-plateau"} <= set(arms):
        text = f"both stopping at a plateau, {RIVALS['st-deep']} takes twice the time of FASTRAIN"
        found.append(_ratio(group, "st-deep-plateau", "fastrain-plateau", 2.0, text))
    if {"fastrain-plateau", "st-deep"} <= set(arms):
        text = f"FASTRAIN stopping at a plateau is no less accurate than {RIVALS['st-deep']} that does not stop"
        found.append(_no_worse(group, "fastrain-plateau", "st-deep", text))
        text = f"{RIVALS['st-deep']} that does not stop takes twice the time of FASTRAIN stopping at a plateau"
        found.append(_ratio(group, "st-deep", "fastrain-plateau", 2.0, text))
    return found


def _value(m: Metrics, group: str, arm: str, metric: str = "accuracy") -> float:
    return m[f"{group}/{arm}"].get(metric, math.nan)


def _better(group: str, arm: str, rival: str, text: str, metric: str = "accuracy") -> Claim:
    """That the paired difference is above 0 by a standard error of its own."""
    pair = lambda m: paired(m, f"{group}/{arm}", f"{group}/{rival}", metric)
    return Claim(
        f"{group}: {text}, by at least a standard error of the paired difference",
        lambda m: pair(m)[0],
        ">=",
        lambda m: pair(m)[1],
    )


def _no_worse(group: str, arm: str, rival: str, text: str, metric: str = "accuracy") -> Claim:
    """That the paired difference is not below 0 by more than a standard error of its own."""
    pair = lambda m: paired(m, f"{group}/{arm}", f"{group}/{rival}", metric)
    return Claim(
        f"{group}: {text}, within a standard error of the paired difference",
        lambda m: pair(m)[0],
        ">=",
        lambda m: -pair(m)[1],
    )


def _ratio(group: str, slow: str, fast: str, least: float, text: str) -> Claim:
    return Claim(
        f"{group}: {text} (ratio)",
        lambda c: c[f"{group}/{slow}"]["train_s"] / c[f"{group}/{fast}"]["train_s"],
        ">=",
        lambda c: least,
        of="cost",
    )
