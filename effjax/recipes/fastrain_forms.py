"""The arms of the FASTRAIN study by name: which of its parts each has, and its rivals."""

from typing import Any, Literal, NamedTuple


class Form(NamedTuple):
    """One arm.

    Attributes:
      label: the name shown in the report.
      role: as in ``Arm``.
      depth: of every stage, 'plan' for dynamic sizing.
      keep: share of edges that an epoch keeps, 'plan' for dynamic regularisation.
      filtered: whether sampled predictions must agree.
      pruned: whether edges between differing predictions go.
      stages: None for the study's.
      select: how pseudolabels are chosen.
      plateau: whether a stage ends when the loss hardly falls.
      pool: whether epochs take their graph from a pool.
      weighted: whether pseudolabels weigh as much as they are sure.
      guarded: whether the first pseudolabels are held back where they look bad.
      layer: None for the study's.
      smoothed: whether Correct & Smooth follows.
    """

    label: str
    role: Literal["baseline", "method", "control", "alternative"]
    depth: Literal["plan", "deep", "shallow"] = "plan"
    keep: float | Literal["plan"] = "plan"
    filtered: bool = True
    pruned: bool = True
    stages: int | None = None
    select: Literal["threshold", "top-k", "m3s"] = "threshold"
    plateau: bool = False
    pool: bool = False
    weighted: bool = False
    guarded: bool = False
    layer: str | None = None
    smoothed: bool = False

    @property
    def depths(self) -> tuple[str, ...]:
        """Depths that a run may have."""
        return ("deep", "shallow") if self.depth == "plan" else (self.depth,)


def _self_training(label: str, depth: str, **fields: Any) -> Form:
    fixed = {"depth": depth, "keep": 0.9, "filtered": False, "pruned": False}
    return Form(label, fields.pop("role", "baseline"), **(fixed | fields))


_FASTRAIN = Form("FASTRAIN", "method")
_PLAIN = {"keep": 1.0, "stages": 1}

FORMS: dict[str, Form] = {
    "shallow": _self_training("GCN, 2 layers", "shallow", **_PLAIN),
    "deep": _self_training("GCN, 3 layers", "deep", **_PLAIN),
    "st-shallow": _self_training("self-training, 2 layers", "shallow"),
    "st-deep": _self_training("self-training, 3 layers", "deep"),
    "fastrain": _FASTRAIN,
    "no-spf": _FASTRAIN._replace(label="FASTRAIN without filtering", role="control", filtered=False),
    "no-pgp": _FASTRAIN._replace(label="FASTRAIN without pruning", role="control", pruned=False),
    "no-dr": _FASTRAIN._replace(label="FASTRAIN without dynamic regularisation", role="control", keep=0.9),
    "no-ds": _FASTRAIN._replace(label="FASTRAIN without dynamic sizing (deep)", role="control", depth="deep"),
    "st-shallow-plateau": _self_training("self-training, 2 layers, plateau", "shallow", plateau=True),
    "st-deep-plateau": _self_training("self-training, 3 layers, plateau", "deep", plateau=True),
    "fastrain-plateau": _FASTRAIN._replace(label="FASTRAIN, plateau", plateau=True),
    "fastrain-pool": _FASTRAIN._replace(label="FASTRAIN, pool of graphs", pool=True),
    "fastrain-2": _FASTRAIN._replace(label="FASTRAIN, two stages", stages=2),
    "fastrain-weighted": _FASTRAIN._replace(label="FASTRAIN, weighted pseudolabels", weighted=True),
    "fastrain-guard": _FASTRAIN._replace(label="FASTRAIN, guarded", guarded=True),
    "fastrain-appnp": _FASTRAIN._replace(label="FASTRAIN around APPNP", depth="shallow", layer="appnp"),
    "top-k": _self_training("top-k self-training", "shallow", role="alternative", keep=1.0, stages=2, select="top-k"),
    "m3s": _self_training("M3S", "shallow", role="alternative", keep=1.0, select="m3s"),
    "lp": _self_training("label propagation", "shallow", role="alternative", **_PLAIN, layer="lp"),
    "correct-and-smooth": _self_training(
        "GCN, Correct & Smooth", "shallow", role="alternative", **_PLAIN, smoothed=True
    ),
    "appnp": _self_training("APPNP", "shallow", role="alternative", **_PLAIN, layer="appnp"),
    "st-appnp": _self_training("self-training of APPNP", "shallow", role="alternative", layer="appnp"),
}
"""Arms by name."""
