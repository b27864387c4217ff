"""FASTRAIN-GNN: fast and accurate self-training of graph neural networks (Nagarajan, Raghunathan 2023, TMLR).

``fastrain`` is a short loop over ``fastrain_init``, ``fastrain_step`` and ``fastrain_next``, which a training loop with
checkpoints may call itself. The parts stand in ``effjax.graph.stages``. The paper's text could not be read; the
functions follow the authors' program.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effjax.graph.calibration import calibrate, fit_calibration
from effjax.graph.fastrain_config import Apply, FastrainConfig, FastrainResult, FastrainState, Init, StageGraph
from effjax.graph.problems import NodeProblem, check_node_problem, checked_node_problem
from effjax.graph.pseudolabels import cluster_labels, guard_pseudolabels, most_confident, pseudolabel_weights
from effjax.graph.sparse.adjacency_matrices import loopless_adjacency
from effjax.graph.sparse.matrix import SparseMatrix
from effjax.graph.sparse.propagation import correct_and_smooth
from effjax.graph.stages import (
    Stage,
    drop_count,
    drop_edges,
    drop_edges_exactly,
    edge_pool,
    evaluate_stages,
    pick_subset,
    prune_edges,
    select_pseudolabels,
    select_to_ladder,
    stage_plan,
    train_stage,
)

__all__ = [
    "fastrain",
    "fastrain_graph",
    "fastrain_init",
    "fastrain_next",
    "fastrain_params",
    "fastrain_scores",
    "fastrain_step",
]

PyTree = Any
_DEFAULT = FastrainConfig()


def fastrain(
    key: jax.Array, init: Init, apply: Apply, problem: NodeProblem, config: FastrainConfig = _DEFAULT
) -> FastrainResult:
    r"""Self-training with all four optimisations; the stages are a loop on the host.

    A stage trains a network on the labelled set T (``train_stage``), deep or shallow and with as many edges dropped as
    ``stage_plan`` says; calibrates its confidence (``fit_calibration``); gives a pseudolabel to the nodes that are
    confident and whose predictions on sampled graphs agree (``select_pseudolabels``); and removes edges between members
    of T that it predicts to differ (``prune_edges``):

    .. math::
        T \leftarrow T \cup \{i : c_i > \tau,\ \hat y_i^{(1)} = \dots = \hat y_i^{(m)}\}, \qquad
        A \leftarrow A \setminus \{(i, j) : i, j \in T,\ \hat y_i \ne \hat y_j\}

    Args:
      key: of everything random.
      init: ``(key, deep) -> params``; traceable. The deep network has a layer more.
      apply: ``(params, features, adjacency, *, key=None) -> logits [N, C]``, in training mode where ``key`` is given;
        traceable. Pass the same function again and it is not compiled again.
      problem: the graph and its labels.
      config: settings.

    Returns:
      A ``FastrainResult``; ``scores.argmax(1)`` are the predictions.

    Raises:
      ValueError: a class without a label, or a label out of range.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> labels, mask = jnp.array([0, -1, 1, -1]), jnp.array([True, False, True, False])
      >>> problem = NodeProblem(jnp.eye(4), gcn_adjacency([0, 1, 2, 3], [1, 0, 3, 2], 4), labels, mask, 2)
      >>> found = fastrain(
      ...     jax.random.key(0), lambda key, deep: jnp.zeros((4, 2)),
      ...     lambda params, x, graph, *, key=None: graph @ (x @ params), problem,
      ...     FastrainConfig(stages=2, epochs=50, threshold=0.5, calibration_epochs=5),
      ... )
      >>> found.scores.argmax(1).tolist(), found.added.tolist()
      ([0, 0, 1, 1], [0, 1, 0, 1])

    Against the authors' program: 300 epochs per stage for 2000 (``epochs``), edges dropped by independent draws for an
    exact count (``exact_drop``), and the frozen network calibrated without its dropout (``calibration_dropout``).
    Source: Nagarajan, Raghunathan 2023, TMLR (OpenReview 1IYJfwJtjQ), and the authors' program.
    """
    problem = checked_node_problem(problem)
    state = fastrain_init(key, init, problem, config)
    for _ in range(config.stages):
        graph = fastrain_graph(state, problem, config)
        for _ in range(config.steps):
            state, _ = _train(state, graph, apply, _step_config(config))
            if config.plateau is not None and state.over:
                break
        state = fastrain_next(state, init, apply, problem, config)
    scores = fastrain_scores(state, apply, problem, config)
    pruned = select_to_ladder(problem.adjacency, np.asarray(state.edges)) if config.pruned else problem.adjacency
    epochs = tuple(state.epochs.tolist())
    return FastrainResult(fastrain_params(state), bool(state.deep), scores, state.labels, state.added, pruned, epochs)


def fastrain_init(
    key: jax.Array, init: Init, problem: NodeProblem, config: FastrainConfig, *, labelled: int | None = None
) -> FastrainState:
    """The state before the first stage; traceable where ``labelled`` is given.

    Args:
      key: of everything random. It is split in three, and the first part is not used: draw the labelled nodes with it
        where they are random too.
      init: see ``fastrain``.
      problem: the graph and its labels.
      config: settings.
      labelled: number of nodes in ``problem.mask``; None counts them.

    Returns:
      A ``FastrainState``. No label outside the mask is in it.

    Raises:
      ValueError: a problem whose shapes do not fit, a mask without nodes, or labels outside [0, classes).

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> graph, mask = gcn_adjacency([0, 1], [1, 0], 2), jnp.array([True, True])
      >>> problem = NodeProblem(jnp.eye(2), graph, jnp.array([0, 1]), mask, 2)
      >>> state = fastrain_init(jax.random.key(0), lambda key, deep: jnp.zeros((2, 2)), problem, FastrainConfig())
      >>> state.added.tolist(), int(state.stage)
      ([0, 0], 0)
    """
    check_node_problem(problem)
    _, start, rest = jax.random.split(key, 3)
    mask = problem.mask
    plan = _plan(problem, config, int(jnp.sum(mask)) if labelled is None else labelled)
    state = FastrainState(
        params=(),
        opt=(),
        labels=jnp.where(mask, problem.labels, -1).astype(jnp.int32),
        weights=mask.astype(jnp.float32),
        added=jnp.where(mask, 0, -1).astype(jnp.int32),
        edges=jnp.ones(problem.adjacency.nnz, bool),
        predictions=jnp.zeros((config.stages, mask.shape[0]), jnp.int32),
        start=start,
        key=rest,
        stage=jnp.int32(0),
        epochs=jnp.zeros(config.stages, jnp.int32),
        **_planned(problem, plan),
    )
    return _restart(state, init, config, _drawn(start, init, plan.deep), plan.deep)


def fastrain_graph(state: FastrainState, problem: NodeProblem, config: FastrainConfig) -> StageGraph:
    """What the steps of a state's stage read: the pruned graph, or the pool of its subsets. Runs on the host.

    Args:
      state: at the start of a stage.
      problem: the graph and its labels.
      config: settings.

    Returns:
      A ``StageGraph`` for ``fastrain_step``.
    """
    matrix = problem.adjacency
    if config.pruned:
        matrix = select_to_ladder(matrix, np.asarray(state.edges))
    if config.pool:
        seed = np.asarray(jax.random.key_data(jax.random.fold_in(state.key, state.stage)))
        matrix = edge_pool(np.random.default_rng(seed), matrix, float(state.keep_rate), config.pool)
    return StageGraph(problem.features, matrix, bool(state.deep))


def fastrain_step(
    state: FastrainState, graph: StageGraph, apply: Apply, config: FastrainConfig
) -> tuple[FastrainState, dict[str, jax.Array]]:
    """``epochs_per_step`` epochs of a stage; traceable, ``apply`` and ``config`` static.

    Args:
      state: of ``fastrain_init`` or ``fastrain_next``.
      graph: of ``fastrain_graph`` for this stage.
      apply: see ``fastrain``.
      config: settings.

    Returns:
      The new state and ``{"loss"}``. Where ``state.over`` the stage has reached its plateau.
    """
    place = _place(config, graph.deep)
    opt, params, losses = train_stage(
        jax.random.fold_in(state.key, state.stage),
        apply,
        config.tx,
        state.opt[place],
        state.params[place],
        features=graph.features,
        sample=functools.partial(_sample, state, graph, config),
        labels=state.labels,
        weights=state.weights,
        epochs=config.epochs_per_step,
        first=state.epochs[state.stage],
    )
    loss = losses.mean()
    state = state._replace(
        params=_put(state.params, place, params),
        opt=_put(state.opt, place, opt),
        epochs=state.epochs.at[state.stage].add(config.epochs_per_step),
        over=state.over if config.plateau is None else loss > (1 - config.plateau) * state.loss,
        loss=loss,
    )
    return state, {"loss": loss}


def fastrain_next(
    state: FastrainState, init: Init, apply: Apply, problem: NodeProblem, config: FastrainConfig
) -> FastrainState:
    """From the end of a stage to the start of the next: calibrate, label, prune, plan, draw parameters.

    Runs on the host. After the last stage it notes the predictions only: to calibrate and label once more, as the
    authors do, would change nothing.

    Args:
      state: after the stage's last ``fastrain_step``.
      init: see ``fastrain``.
      apply: see ``fastrain``.
      problem: the graph; its labels and mask are not read.
      config: settings.

    Returns:
      The new state, of the same shapes.
    """
    stage = int(state.stage)
    if stage == config.stages - 1:
        predictions = fastrain_scores(state, apply, problem, config).argmax(-1).astype(jnp.int32)
        return state._replace(predictions=state.predictions.at[stage].set(predictions), stage=jnp.int32(stage + 1))
    params = fastrain_params(state)
    found = _examined(state, params, apply, problem, config)
    state = _labelled(state, found, _selected(state, found, problem, config), problem, config)
    plan = _plan(problem, config, int(jnp.sum(state.weights > 0)))
    if config.start != "warm" or bool(state.deep) != plan.deep:
        key = state.start if config.start == "same" else jax.random.fold_in(state.start, stage)
        params = _drawn(key, init, plan.deep)
    state = state._replace(stage=jnp.int32(stage + 1), **_planned(problem, plan))
    return _restart(state, init, config, params, plan.deep)


def fastrain_params(state: FastrainState) -> PyTree:
    """Parameters of the network that the state's stage trains. Runs on the host.

    Args:
      state: at any stage.

    Returns:
      The parameters that ``init`` made, as trained so far.
    """
    return state.params[int(state.deep) if len(state.params) == 2 else 0]


def fastrain_scores(state: FastrainState, apply: Apply, problem: NodeProblem, config: FastrainConfig) -> jax.Array:
    """Logits [N, C] of the network as it stands, on the pruned graph; with ``smoothed``, smoothed probabilities.

    Args:
      state: after any step.
      apply: ``(params, features, adjacency) -> logits [N, C]``.
      problem: the graph and its labels.
      config: settings.

    Returns:
      [N, C]; an argmax over the last axis predicts.
    """
    matrix = problem.adjacency
    matrix = matrix._replace(values=jnp.where(state.edges, matrix.values, 0))
    scores = _predict(apply, fastrain_params(state), problem.features, matrix)
    if config.smoothed:
        mask = state.added == 0
        labels = jnp.where(mask, state.labels, 0)
        scores = correct_and_smooth(loopless_adjacency(problem.adjacency), jax.nn.softmax(scores), labels, mask)
    return scores


def fastrain_metrics(
    state: FastrainState, apply: Apply, problem: NodeProblem, config: FastrainConfig
) -> dict[str, float]:
    """How good a run is, at its end or in its midst. Runs on the host.

    Args:
      state: of the run.
      apply: see ``fastrain``.
      problem: the graph, with all labels.
      config: settings.

    Returns:
      Those of ``evaluate_stages``, up to the present stage; with ``pruned`` the share ``edges_kept`` of the edges, with
      a ``plateau`` the ``epochs`` of all stages.
    """
    predictions = state.predictions[: int(state.stage)]
    if len(predictions) < config.stages:  # in the middle of a run
        now = fastrain_scores(state, apply, problem, config).argmax(-1).astype(jnp.int32)
        predictions = jnp.concatenate([predictions, now[None]])
    found = evaluate_stages(problem.labels, state.labels, state.added, predictions)
    found |= {"edges_kept": float(jnp.mean(state.edges))} if config.pruned else {}
    return found | ({} if config.plateau is None else {"epochs": float(state.epochs.sum())})


# A stage's plan and parameters


def _plan(problem: NodeProblem, config: FastrainConfig, labelled: int) -> Stage:
    nodes = problem.adjacency.shape[0]
    found = stage_plan(nodes, problem.classes, labelled, deep_below=config.deep_below)
    deep = found.deep if config.depth == "plan" else config.depth == "deep"
    return Stage(deep, found.keep_rate if config.keep_rate == "plan" else config.keep_rate)


def _planned(problem: NodeProblem, plan: Stage) -> dict[str, Any]:
    """The fields of the state that a plan decides."""
    return {
        "deep": jnp.asarray(plan.deep),
        "keep_rate": jnp.float32(plan.keep_rate),
        "dropped": jnp.int32(drop_count(problem.adjacency.nnz, plan.keep_rate)),
        "loss": jnp.float32(jnp.inf),
        "over": jnp.asarray(False),
    }


def _place(config: FastrainConfig, deep: bool) -> int:
    """Where the network of this depth stands in ``FastrainState.params``."""
    return int(deep) if config.depth == "plan" else 0


def _put(row: tuple[PyTree, ...], place: int, new: PyTree) -> tuple[PyTree, ...]:
    return (*row[:place], new, *row[place + 1 :])


def _restart(state: FastrainState, init: Init, config: FastrainConfig, params: PyTree, deep: bool) -> FastrainState:
    """The state with these parameters and a new optimizer; the network of the other depth is zero."""
    row = (params,)
    if config.depth == "plan":
        other = jax.eval_shape(lambda key: init(key, not deep), state.start)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), other)
        row = (zeros, params) if deep else (params, zeros)
    return state._replace(params=row, opt=tuple(config.tx.init(each) for each in row))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _drawn(key: jax.Array, init: Init, deep: bool) -> PyTree:
    return init(key, deep)


def _sample(state: FastrainState, graph: StageGraph, config: FastrainConfig, key: jax.Array) -> SparseMatrix:
    """The graph of an epoch."""
    matrix = graph.adjacency
    if config.pool:
        return pick_subset(key, matrix)
    if config.keep_rate == 1.0:
        return matrix
    if config.exact_drop:
        # The same share of the pruned graph as of the whole one.
        return drop_edges_exactly(key, matrix, state.dropped * matrix.pattern.size // len(state.edges))
    return drop_edges(key, matrix, state.keep_rate)


# Pseudolabels


class _Examination(NamedTuple):
    """The settings that ``_examine`` is compiled for; configs that agree in them share its executable."""

    classes: int
    samples: int
    sample_keep_rate: float
    calibration_epochs: int
    calibration_dropout: bool
    head_dropout: float


class _Examined(NamedTuple):
    """What a stage's network says of all nodes."""

    logits: jax.Array
    predictions: jax.Array
    confidence: jax.Array
    sampled: jax.Array | None


def _examined(
    state: FastrainState, params: PyTree, apply: Apply, problem: NodeProblem, config: FastrainConfig
) -> _Examined:
    how = _Examination(problem.classes, *(getattr(config, name) for name in _Examination._fields[1:]))
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.stage), config.steps)
    graph = (problem.features, problem.adjacency)
    return _examine(apply, how, key, params, graph, state.labels, state.weights, state.edges)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _examine(apply, how, key, params, graph, labels, weights, edges) -> _Examined:
    features, whole = graph
    matrix = whole._replace(values=jnp.where(edges, whole.values, 0))
    logits = apply(params, features, matrix)
    fit_key, sample_key = jax.random.split(key)
    head, _ = fit_calibration(
        fit_key,
        (lambda key: apply(params, features, matrix, key=key)) if how.calibration_dropout else logits,
        matrix,
        labels,
        weights,
        classes=how.classes,
        epochs=how.calibration_epochs,
        dropout=how.head_dropout,
    )
    confidence = jax.nn.softmax(calibrate(head, logits, matrix)).max(-1)
    # The head changes no prediction, so that samples do without it.
    sample = lambda key: apply(params, features, drop_edges(key, matrix, how.sample_keep_rate)).argmax(-1)
    sampled = jax.lax.map(sample, jax.random.split(sample_key, how.samples)) if how.samples else None
    return _Examined(logits, logits.argmax(-1), confidence, sampled)


@functools.partial(jax.jit, static_argnums=0)
def _predict(apply: Apply, params: PyTree, features: Any, adjacency: SparseMatrix) -> jax.Array:
    return apply(params, features, adjacency)


def _selected(state: FastrainState, found: _Examined, problem: NodeProblem, config: FastrainConfig) -> jax.Array:
    """The nodes that get a pseudolabel."""
    mask, classes = state.weights > 0, problem.classes
    if config.select != "threshold":
        new = most_confident(~mask, found.confidence, found.predictions, classes, config.top_k)
        if config.select == "m3s":
            key = jax.random.fold_in(state.key, state.stage)
            clusters = min(config.clusters, len(mask))
            checked = cluster_labels(key, found.logits, state.labels, mask, classes, clusters=clusters)
            new = new & (checked == found.predictions)
        return new
    new = select_pseudolabels(found.confidence, mask, config.threshold, found.sampled)
    if config.growth is None:
        return new
    sure = select_pseudolabels(found.confidence, mask, config.threshold)
    limits = {"classes": classes, "agreement": config.agreement, "growth": config.growth}
    return guard_pseudolabels(new, sure, found.confidence, found.predictions, mask, sampled=found.sampled, **limits)


def _labelled(
    state: FastrainState, found: _Examined, new: jax.Array, problem: NodeProblem, config: FastrainConfig
) -> FastrainState:
    """The state with the labels, weights and edges that the new nodes bring."""
    weights = pseudolabel_weights(found.confidence, found.predictions, found.sampled) if config.weighted else 1.0
    weights = jnp.where(new, weights, state.weights).astype(jnp.float32)
    predictions = found.predictions.astype(jnp.int32)
    edges = state.edges
    if config.pruned:
        edges = prune_edges(problem.adjacency.pattern, edges, found.predictions, weights > 0)
    return state._replace(
        labels=jnp.where(new, predictions, state.labels),
        weights=weights,
        added=jnp.where(new, state.stage + 1, state.added).astype(jnp.int32),
        predictions=state.predictions.at[state.stage].set(predictions),
        edges=edges,
    )


# The one call


def _step_config(config: FastrainConfig) -> FastrainConfig:
    """What a step reads of a config; configs that agree in it share its executable."""
    read = {name: getattr(config, name) for name in ("epochs_per_step", "exact_drop", "pool", "plateau", "tx")}
    return FastrainConfig(
        **read,
        epochs=config.epochs_per_step,
        depth="plan" if config.depth == "plan" else "shallow",  # one network, whatever its depth
        keep_rate=1.0 if config.keep_rate == 1.0 else "plan",  # the rate itself is in the state
    )


@functools.partial(jax.jit, static_argnums=(2, 3), donate_argnums=0)
def _train(state, graph, apply, config) -> tuple[FastrainState, dict[str, jax.Array]]:
    return fastrain_step(state, graph, apply, config)
