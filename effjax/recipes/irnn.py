"""The iRNN study: long memory with one small matrix, beside the cells that a user would take instead."""

import dataclasses

from effjax.recipes.recurrent import (
    LAYERS,
    RecurrentStudy,
    bound,
    no_worse,
    recurrent_arms,
    recurrent_axes,
)
from effjax.recipes.spec import Arm, Axis, Claim, Sweep

CELLS = (
    "rnn",
    "lstm",
    "gru",
    "fastrnn",
    "fastrnn-per-time",
    "fastgrnn",
    "antisymmetric",
    "cornn",
    "lru",
    "lru-long",
    "lru-4",
    "min-gru",
    "chrono-lstm",
    "irnn",
    "irnn-3",
    "irnn-zero-3",
    "irnn-shared",
    "irnn-equilibrium",
    "dual-ode",
)

ROLES = {
    "lstm": "baseline",
    "irnn": "method",
    "irnn-3": "method",
    "irnn-zero-3": "method",
    "irnn-equilibrium": "method",
    "dual-ode": "method",
    "irnn-shared": "control",
    "fastrnn-per-time": "control",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class IrnnStudy(RecurrentStudy):
    """Config of the iRNN study."""

    cells: tuple[str, ...] = CELLS
    """arms, by the names of effjax.recipes.recurrent.LAYERS"""


def arms(config: IrnnStudy) -> dict[str, Arm]:
    """Every cell on every task, as ``task/cell``."""
    return recurrent_arms(config, ROLES)


def sweeps(config: IrnnStudy) -> dict[str, Sweep]:
    """None: every cell has the same learning rate."""
    return {}


def axes(config: IrnnStudy) -> dict[str, Axis]:
    """What each task is judged by."""
    return recurrent_axes(config)


def claims(config: IrnnStudy) -> list[Claim]:
    """On noise, iRNN remembers where the LSTM forgets; what the step sizes of its own contribute; its rivals."""
    return [claim for task in config.tasks for claim in _claims(task, set(config.cells))]


def _claims(task: str, cells: set[str]) -> list[Claim]:
    found = []
    if task.startswith("noisy-digits-"):
        found += [bound(task, "irnn", ">=", 0.85)] if "irnn" in cells else []
        found += [bound(task, "lstm", "<=", 0.2)] if "lstm" in cells else []
    found += [no_worse(task, "irnn", rival) for rival in ("lstm", "chrono-lstm", "lru-4") if {"irnn", rival} <= cells]
    if {"irnn", "irnn-shared"} <= cells:
        found.append(no_worse(task, "irnn-shared", "irnn", "positions need not be learned: "))
    return found + ([_smaller(task)] if {"irnn", "lstm"} <= cells else [])


def _smaller(task: str) -> Claim:
    return Claim(
        f"{task}: {LAYERS['irnn'].label} has at most half of the LSTM's parameters",
        lambda c: c[f"{task}/irnn"]["params"] / c[f"{task}/lstm"]["params"],
        "<=",
        lambda c: 0.5,
        of="cost",
    )
