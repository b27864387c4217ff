"""What self-training in stages is made of: settings, state and result."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import optax

from effjax.core.errors import Count, Fraction, Natural, NotNegative, Rate, Share, check_fields
from effjax.graph.sparse.matrix import SparseMatrix
from effjax.graph.stages import (
    adam_l2,
)

__all__ = ["FastrainConfig"]

PyTree = Any
Init = Callable[[jax.Array, bool], PyTree]
Apply = Callable[..., jax.Array]
_OPTIMIZER = adam_l2()


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastrainSettings:
    """How stages are trained and their pseudolabels chosen: what the arms of a study share."""

    stages: Count = 4
    """Number of stages of self-training."""
    epochs_per_step: Count = 50
    """Epochs in one compiled step; a plateau is looked for after each step."""
    start: Literal["same", "fresh", "warm"] = "same"
    """Parameters at the start of a stage: the same draw every time (the authors'), a new one, or, where the depth is
    the same, those of the last."""
    exact_drop: bool = False
    """Drop an exact number of edges in every epoch, as the authors do, by a sort; else each with a probability."""
    threshold: Fraction = 0.8
    """Calibrated confidence above which a prediction may become a label."""
    deep_below: Fraction = 0.025
    """Share of the nodes with a label below which the network is deep, where its depth is planned."""
    samples: Natural = 10
    """Number of predictions on graphs with dropped edges that must agree; 0 filters nothing."""
    sample_keep_rate: Share = 0.9
    """Probability with which such a graph keeps an edge."""
    calibration_epochs: Count = 200
    """Epochs of the calibration head."""
    calibration_dropout: bool = False
    """Leave the frozen network's dropout on while its head is trained, as the authors' program does; the network then
    runs in every epoch of the head."""
    top_k: Count = 70
    """Nodes per class that top-k self-training labels in its only round, and M3S in each."""
    clusters: Count = 200
    """Number of clusters of M3S."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastrainConfig(FastrainSettings):
    """Settings of FASTRAIN; other values make plain self-training, top-k self-training and M3S of it.

    The other fields are those of ``FastrainSettings``.

    Attributes:
      epochs: per stage, at most; a multiple of ``epochs_per_step``.
      depth: of every stage's network; 'plan' for dynamic sizing (``stage_plan``).
      keep_rate: probability with which an epoch keeps an edge; 'plan' for dynamic regularisation.
      pool: epochs take their graph from as many subsets of the edges, drawn once per stage; None draws for each epoch.
      pruned: remove edges between members of the training set that are predicted to differ.
      select: 'threshold' gives confident nodes a label, 'top-k' the most confident of each class, 'm3s' those of them
        whose cluster agrees.
      weighted: pseudolabels weigh as much as the network is sure of them; else as much as labels.
      growth: for few labels, beyond the paper: a stage labels at most this many times the labelled nodes per class
        (``guard_pseudolabels``); None sets no limit.
      agreement: with ``growth``, the share of the confident nodes whose samples must agree, or none gets a label.
      plateau: beyond the paper: a stage ends when the mean loss of a step fell by less than this share; None trains all
        epochs. With steps of few epochs Adam's slow start looks like a plateau; 50 epochs are safe.
      head_dropout: rate on the head's hidden layer.
      smoothed: Correct & Smooth the last stage's predictions.
      tx: optimizer of a stage.

    Source: Nagarajan, Raghunathan 2023, TMLR (OpenReview 1IYJfwJtjQ).
    """

    epochs: Count = 300
    depth: Literal["plan", "deep", "shallow"] = "plan"
    keep_rate: Share | Literal["plan"] = "plan"
    pool: Count | None = None
    pruned: bool = True
    select: Literal["threshold", "top-k", "m3s"] = "threshold"
    weighted: bool = False
    growth: NotNegative | None = None
    agreement: Fraction = 0.8
    plateau: Fraction | None = None
    head_dropout: Rate = 0.5
    smoothed: bool = False
    tx: optax.GradientTransformation = _OPTIMIZER

    def __post_init__(self):
        check_fields(self)
        if self.epochs % self.epochs_per_step:
            near = max(1, round(self.epochs / self.epochs_per_step)) * self.epochs_per_step
            raise ValueError(
                f"epochs={self.epochs} is no multiple of epochs_per_step={self.epochs_per_step}. Take "
                f"epochs={near}, or epochs_per_step={self.epochs}."
            )
        if self.pool is not None and (self.exact_drop or self.keep_rate == 1.0):
            raise ValueError(
                f"pool={self.pool} with exact_drop={self.exact_drop} and keep_rate={self.keep_rate}: a pool drops an "
                "exact number of edges by itself, and needs edges to drop. Leave out one of them."
            )
        if self.growth is not None and self.select != "threshold":
            raise ValueError(f"growth={self.growth} limits select='threshold' only, not {self.select!r}.")

    @property
    def steps(self) -> int:
        """Most steps per stage."""
        return self.epochs // self.epochs_per_step


class FastrainState(NamedTuple):
    """A self-training in progress; its shapes are the same in all stages.

    Attributes:
      params: of the shallow and of the deep network where the depth is planned, those not in use zero; else of the one.
      opt: the optimizer's state for each of ``params``.
      labels: int32 [N], true and pseudolabels; -1 for all other nodes.
      weights: float32 [N], of the nodes in the loss; 0 for all but the training set.
      added: int32 [N], the stage that labelled a node: 0 for given labels, -1 for none.
      edges: bool [entries], what pruning has left of the adjacency.
      predictions: int32 [stages, N], of all nodes after each finished stage.
      start: key of the parameters.
      key: of everything else.
      stage: int32, number of finished stages.
      epochs: int32 [stages], trained so far.
      deep: bool, the depth of this stage.
      keep_rate: float32, the probability with which its epochs keep an edge.
      dropped: int32, the number of entries that its epochs drop where that is exact.
      loss: float32, mean of the last step.
      over: bool, whether the stage has reached a plateau.
    """

    params: tuple[PyTree, ...]
    opt: tuple[PyTree, ...]
    labels: jax.Array
    weights: jax.Array
    added: jax.Array
    edges: jax.Array
    predictions: jax.Array
    start: jax.Array
    key: jax.Array
    stage: jax.Array
    epochs: jax.Array
    deep: jax.Array
    keep_rate: jax.Array
    dropped: jax.Array
    loss: jax.Array
    over: jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["features", "adjacency"], meta_fields=["deep"])
@dataclasses.dataclass(frozen=True)
class StageGraph:
    """What a stage's steps read.

    Attributes:
      features: of the problem.
      adjacency: the pruned graph, compacted; with a pool its subsets.
      deep: the network's depth; static, so that each depth has an executable of its own.
    """

    features: Any
    adjacency: SparseMatrix
    deep: bool


class FastrainResult(NamedTuple):
    """What ``fastrain`` returns.

    Attributes:
      params: of the last stage's network.
      deep: whether that is the deep one.
      scores: [N, C], its logits on the pruned graph; with ``smoothed``, smoothed probabilities.
      labels: int32 [N], true and pseudolabels the last stage was trained on; -1 for all other nodes.
      added: int32 [N], the stage that labelled a node: 0 for given labels, -1 for none.
      adjacency: the pruned graph, compacted.
      epochs: of every stage.
    """

    params: PyTree
    deep: bool
    scores: jax.Array
    labels: jax.Array
    added: jax.Array
    adjacency: SparseMatrix
    epochs: tuple[int, ...]
