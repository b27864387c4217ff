"""FASTRAIN in one call: the four optimisations around a user's own network."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int

from effjax.core.errors import check_number
from effjax.graph.calibration import calibrate, fit_calibration
from effjax.graph.fastrain import (
    compact_to_ladder,
    drop_edges,
    fastrain_optimizer,
    prune_edges,
    select_pseudolabels,
    stage_plan,
    train_stage,
)
from effjax.graph.self_training import guard_pseudolabels
from effjax.graph.sparse import SparseMatrix

PyTree = Any
_OPTIMIZER = fastrain_optimizer()
_PIECE = 50  # epochs between two looks at the loss; with fewer, Adam's slow start looks like the end


class Fastrain(NamedTuple):
    """What ``fastrain`` leaves.

    Attributes:
      params: of the last stage's network.
      logits: [N, C], its outputs on the pruned graph.
      labels: int32 [N], true and pseudolabels the last stage was trained on; -1 for all other nodes.
      added: int32 [N], the stage that labelled a node: 0 for given labels, -1 for none.
      adjacency: the pruned graph, compacted.
      epochs: of every stage.
    """

    params: PyTree
    logits: jax.Array
    labels: jax.Array
    added: jax.Array
    adjacency: SparseMatrix
    epochs: tuple[int, ...]


def fastrain(
    key: jax.Array,
    init: Callable[[jax.Array, bool], PyTree],
    apply: Callable[[PyTree, Any, SparseMatrix, jax.Array | None], jax.Array],
    features: Any,
    adjacency: SparseMatrix,
    labels: Int[Array, "nodes"],
    mask: Bool[Array, "nodes"],
    classes: int,
    *,
    stages: int = 4,
    epochs: int = 300,
    plateau: float | None = None,
    threshold: float = 0.8,
    samples: int = 10,
    samples_keep: float = 0.9,
    prune: bool = True,
    growth: float | None = None,
    calibration_epochs: int = 200,
    tx: optax.GradientTransformation = _OPTIMIZER,
) -> Fastrain:
    r"""Self-training with all four optimisations; the stages are a loop on the host, each stage one program.

    A stage trains a network on the labelled set T (``train_stage``), deep or shallow and with as many edges dropped as
    ``stage_plan`` says; calibrates its confidence (``fit_calibration``); gives a pseudolabel to the nodes that are
    confident and whose predictions on sampled graphs agree (``select_pseudolabels``); and removes edges between members
    of T that it predicts to differ (``prune_edges``). Every stage starts from the same draw of parameters.

    The study (``effjax compare fastrain``) runs the same functions with checkpoints, rivals and single parts switched
    off. Against the authors' program: 300 epochs of a stage for 2000, edges dropped by independent draws for an exact
    count, and the frozen network calibrated without dropout.

    Args:
      key: of everything random.
      init: ``(key, deep) -> params``; the deep network has a layer more.
      apply: ``(params, features, adjacency, key) -> logits [N, C]``; in training mode where ``key`` is not None. Pass
        the same function again and it is not compiled again.
      features: passed on to ``apply``.
      adjacency: normalised, with self-loops (``gcn_adjacency``).
      labels: classes in [0, C) where ``mask``; not read elsewhere.
      mask: nodes with a true label.
      classes: C.
      stages: how often to train.
      epochs: of a stage.
      plateau: a stage ends early when the mean loss of 50 epochs is not smaller than that of the 50 before by more than
        this share of it (0.3 in the study); None trains all epochs, as the paper does.
      threshold: calibrated probability above which a prediction may become a label.
      samples: predictions on sampled graphs that must agree; 0 for none.
      samples_keep: share of the edges that such a graph keeps.
      prune: remove edges between differing members of T.
      growth: for few labels, beyond the paper: a stage labels at most so many times the labelled nodes of a class
        (``guard_pseudolabels``; 5 in the study, which gains ten points of accuracy with one or two labels a class).
        None sets no limit.
      calibration_epochs: of the calibration head.
      tx: optimizer of a stage.

    Returns:
      A ``Fastrain``; ``logits.argmax(1)`` are the predictions.

    Raises:
      ValueError: a class without a label, a label out of range, or numbers out of range.

    Example:
      >>> from effjax.graph.adjacency import gcn_adjacency
      >>> graph = gcn_adjacency([0, 1, 2, 3], [1, 0, 3, 2], 4)
      >>> found = fastrain(
      ...     jax.random.key(0), lambda key, deep: jnp.zeros((4, 2)),
      ...     lambda params, x, graph, key: graph @ (x @ params), jnp.eye(4), graph,
      ...     jnp.array([0, -1, 1, -1]), jnp.array([True, False, True, False]), 2,
      ...     stages=2, epochs=50, threshold=0.5, calibration_epochs=5,
      ... )
      >>> found.logits.argmax(1).tolist(), found.added.tolist()
      ([0, 0, 1, 1], [0, 1, 0, 1])

    Source: Nagarajan, Raghunathan 2023, TMLR (OpenReview 1IYJfwJtjQ), and the authors' program.
    """
    for name, value in (("stages", stages), ("epochs", epochs), ("calibration_epochs", calibration_epochs)):
        check_number(name, value, low=1, integer=True)
    check_number("samples", samples, low=0, integer=True)
    check_number("threshold", threshold, low=0, high=1)
    check_number("samples_keep", samples_keep, low=0, high=1, open_low=True)
    if growth is not None:
        check_number("growth", growth, low=0)
    if plateau is not None:
        check_number("plateau", plateau, low=0, high=1)
    labels, mask = _checked(labels, mask, classes)
    nodes = mask.shape[0]
    added, edges, pruned = jnp.where(mask, 0, -1), jnp.ones(adjacency.nnz, bool), adjacency
    train_key, init_key = jax.random.split(key)
    lasted = []
    for stage in range(stages):
        plan = stage_plan(nodes, classes, int(mask.sum()))
        stage_key, examine_key = jax.random.split(jax.random.fold_in(train_key, stage))
        params = init(init_key, plan.deep)
        train = functools.partial(_train, features=features, adjacency=pruned, keep=plan.keep, labels=labels, mask=mask)
        params, trained = _stage(train, apply, tx, params, epochs, plateau, stage_key)
        lasted.append(trained)
        if stage == stages - 1:
            break
        known = (labels, mask)
        found = _examine(apply, samples, calibration_epochs, examine_key, params, features, pruned, known, samples_keep)
        new = select_pseudolabels(found.confidence, mask, threshold, found.samples)
        if growth is not None:
            sure = select_pseudolabels(found.confidence, mask, threshold)
            shown = (found.confidence, found.predictions, mask, classes, found.samples)
            new = guard_pseudolabels(new, sure, *shown, growth=growth)
        labels, mask = jnp.where(new, found.predictions, labels), mask | new
        added = jnp.where(new, stage + 1, added)
        if prune:
            edges = prune_edges(adjacency.pattern, edges, found.predictions, mask)
            pruned = compact_to_ladder(adjacency, np.asarray(edges))
    logits = _evaluate(apply, params, features, pruned)
    return Fastrain(params, logits, labels, added, pruned, tuple(lasted))


class _Examined(NamedTuple):
    predictions: jax.Array
    confidence: jax.Array
    samples: jax.Array | None


def _stage(train, apply, tx, params, epochs, plateau, key):
    """Trained parameters, and after how many epochs."""
    opt, before = tx.init(params), None
    piece = epochs if plateau is None else _PIECE
    for first in range(0, epochs, piece):
        count = min(piece, epochs - first)
        params, opt, loss = train(apply, tx, count, params, opt, key, first)
        if plateau is not None and first and loss >= (1 - plateau) * before:
            break
        before = loss
    return params, first + count


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _train(apply, tx, epochs, params, opt, key, first, *, features, adjacency, keep, labels, mask):
    sample = lambda key: drop_edges(key, adjacency, keep)
    weights = mask.astype(jnp.float32)
    params, opt, losses = train_stage(
        apply, tx, params, opt, features, sample, labels, weights, key, epochs, first=first
    )
    return params, opt, losses.mean()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _examine(apply, samples, epochs, key, params, features, adjacency, known, keep):
    labels, mask = known
    fit_key, sample_key = jax.random.split(key)
    logits = apply(params, features, adjacency, None)
    head, _ = fit_calibration(fit_key, logits, adjacency, labels, mask.astype(jnp.float32), epochs=epochs)
    confidence = jax.nn.softmax(calibrate(head, adjacency, logits)).max(-1)
    predict = lambda key: apply(params, features, drop_edges(key, adjacency, keep), None).argmax(-1)
    sampled = jax.lax.map(predict, jax.random.split(sample_key, samples)) if samples else None
    return _Examined(logits.argmax(-1), confidence, sampled)


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(apply, params, features, adjacency):
    return apply(params, features, adjacency, None)


def _checked(labels: Any, mask: Any, classes: int) -> tuple[jax.Array, jax.Array]:
    """Labels that are -1 outside the mask, so that nothing hidden can be read."""
    labels, mask = np.asarray(labels), np.asarray(mask)
    if labels.ndim != 1 or labels.shape != mask.shape or mask.dtype != bool:
        raise ValueError(
            f"labels has shape {labels.shape} and mask {mask.dtype}{list(mask.shape)}; integers [N] and bool [N] are "
            "needed."
        )
    given = labels[mask]
    wrong = given[(given < 0) | (given >= classes)]
    if wrong.size:
        raise ValueError(f"labels holds {wrong[0]} inside the mask; classes are 0..{classes - 1}.")
    empty = np.setdiff1d(np.arange(classes), given)
    if empty.size:
        raise ValueError(
            f"mask holds no node of the classes {empty.tolist()}, and self-training cannot find a class that it has "
            "never seen. Label at least one node of each, or renumber the classes."
        )
    return jnp.asarray(np.where(mask, labels, -1), jnp.int32), jnp.asarray(mask)
