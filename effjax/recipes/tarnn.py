"""The TARNN study: a time constant of input and state, with step sizes of each time step and without."""

import dataclasses

from effjax.recipes.recurrent import RecurrentStudy, bound, no_worse, recurrent_arms, recurrent_axes
from effjax.recipes.spec import Arm, Axis, Claim, Sweep

CELLS = (
    "lstm",
    "lru-4",
    "chrono-lstm",
    "irnn",
    "tarnn-euler",
    "tarnn-convex",
    "tarnn-euler-shared",
    "tarnn-convex-shared",
    "tarnn-euler-input",
    "tarnn-convex-input",
)

ROLES = {
    "lstm": "baseline",
    "tarnn-euler": "method",
    "tarnn-convex": "method",
    "tarnn-euler-3": "method",
    "tarnn-euler-input": "method",
    "tarnn-convex-input": "method",
    "tarnn-euler-shared": "control",
    "tarnn-convex-shared": "control",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TarnnStudy(RecurrentStudy):
    """Config of the TARNN study."""

    cells: tuple[str, ...] = CELLS
    """arms, by the names of effjax.recipes.recurrent.LAYERS"""


def arms(config: TarnnStudy) -> dict[str, Arm]:
    """Every cell on every task, as ``task/cell``."""
    return recurrent_arms(config, ROLES)


def sweeps(config: TarnnStudy) -> dict[str, Sweep]:
    """None: every cell has the same learning rate."""
    return {}


def axes(config: TarnnStudy) -> dict[str, Axis]:
    """What each task is judged by."""
    return recurrent_axes(config)


def claims(config: TarnnStudy) -> list[Claim]:
    """On noise, TARNN remembers where the LSTM forgets; what is left without positional step sizes; its rivals."""
    return [claim for task in config.tasks for claim in _claims(task, set(config.cells))]


def _claims(task: str, cells: set[str]) -> list[Claim]:
    found = []
    if task.startswith("noisy-digits-"):
        found += [bound(task, "tarnn-euler", ">=", 0.88)] if "tarnn-euler" in cells else []
        found += [bound(task, "lstm", "<=", 0.2)] if "lstm" in cells else []
    pairs = (
        ("tarnn-euler", "lstm"),
        ("tarnn-euler", "chrono-lstm"),
        ("tarnn-euler", "lru-4"),
        ("tarnn-euler", "irnn"),
        ("tarnn-euler-input", "tarnn-euler-shared"),
        ("tarnn-convex-input", "tarnn-convex-shared"),
        ("tarnn-euler-input", "chrono-lstm"),
    )
    found += [no_worse(task, one, other) for one, other in pairs if {one, other} <= cells]
    positional = ((f"tarnn-{variant}-shared", f"tarnn-{variant}") for variant in ("euler", "convex"))
    return found + [
        no_worse(task, one, other, "positions need not be learned: ")
        for one, other in positional
        if {one, other} <= cells
    ]
