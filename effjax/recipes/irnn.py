"""The iRNN study: long memory with one small matrix, beside the cells that a user would take instead."""

import dataclasses

from effjax.recipes.recurrent import MODALITY, RecurrentStudy, recurrent_groups
from effjax.recipes.spec import Claim, Group, Role

__all__ = ["CLAIMS", "MODALITY", "IrnnStudy", "groups"]

ROLES: dict[str, Role] = {
    "lstm": "baseline",
    **dict.fromkeys(("irnn", "irnn-3", "irnn-zero-3", "irnn-equilibrium", "dual-ode"), "method"),
    **dict.fromkeys(("irnn-shared", "fastrnn-per-time"), "control"),
}


CLAIMS = {
    "noisy-digits-*": (Claim("irnn", ">=", 0.85), Claim("lstm", "<=", 0.2)),
    "*": (
        *(Claim("irnn", "no worse", rival) for rival in ("lstm", "chrono-lstm", "lru-4")),
        Claim("irnn-shared", "no worse", "irnn", why="positions need not be learned"),
        Claim("irnn", "<=", "lstm", of="params", times=0.5),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class IrnnStudy(RecurrentStudy):
    """Config of the iRNN study."""


def groups(config: IrnnStudy) -> list[Group]:
    """One group per task, one arm per layer."""
    return recurrent_groups(config, ROLES)
