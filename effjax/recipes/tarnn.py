"""The TARNN study: a time constant of input and state, with step sizes of each time step and without."""

import dataclasses

from effjax.recipes.recurrent import MODALITY, RecurrentStudy, recurrent_groups
from effjax.recipes.spec import Claim, Group, Role

__all__ = ["CLAIMS", "MODALITY", "TarnnStudy", "groups"]

ROLES: dict[str, Role] = {
    "lstm": "baseline",
    **dict.fromkeys(
        ("tarnn-euler", "tarnn-convex", "tarnn-euler-3", "tarnn-euler-input", "tarnn-convex-input"), "method"
    ),
    **dict.fromkeys(("tarnn-euler-shared", "tarnn-convex-shared"), "control"),
}

CLAIMS = {
    "noisy-digits-*": (Claim("tarnn-euler", ">=", 0.88), Claim("lstm", "<=", 0.2)),
    "*": (
        *(Claim("tarnn-euler", "no worse", rival) for rival in ("lstm", "chrono-lstm", "lru-4", "irnn")),
        Claim("tarnn-euler-input", "no worse", "tarnn-euler-shared"),
        Claim("tarnn-convex-input", "no worse", "tarnn-convex-shared"),
        Claim("tarnn-euler-input", "no worse", "chrono-lstm"),
        Claim("tarnn-euler-shared", "no worse", "tarnn-euler", why="positions need not be learned"),
        Claim("tarnn-convex-shared", "no worse", "tarnn-convex", why="positions need not be learned"),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TarnnStudy(RecurrentStudy):
    """Config of the TARNN study."""


def groups(config: TarnnStudy) -> list[Group]:
    """One group per task, one arm per layer."""
    return recurrent_groups(config, ROLES)
