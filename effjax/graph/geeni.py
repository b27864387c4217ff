"""GEENI: ensembles of graph networks at the latency of one (Nagarajan, Raghunathan, DAC 2022, 10.1145/3489517.3530416).

A reconstruction: of the paper only abstracts could be read, and no code exists. Members (``effjax.graph.members``)
train side by side; the nodes that are probably wrong are found (``effjax.graph.error_nodes``); their messages are
stopped (``effjax.graph.isolation``); what is left is served (``effjax.graph.geeni_serving``).
"""

import dataclasses
import functools
from typing import Any, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from effjax.core.errors import (
    check_choice,
    check_number,
)
from effjax.core.products import aligned
from effjax.graph.error_nodes import (
    ErrorScores,
    active_nodes,
    error_scores,
    held_out_correctness,
    label_free_correctness,
    learned_correctness,
)
from effjax.graph.geeni_config import DECAYED, Detector, GeeniConfig, GeeniState, GeeniViews, Isolation, Stage
from effjax.graph.geeni_serving import ServedEnsemble, serve_ensemble
from effjax.graph.isolation import Mode, isolate_to_ladder, isolated_values, random_edges
from effjax.graph.members import (
    LOOPS,
    GcnMembers,
    ensemble_logits,
    ensemble_probabilities,
    fastest_members_loop,
    fold_members,
    init_members,
    mask_features,
    member_probabilities,
    members_loss,
)
from effjax.graph.problems import GeeniProblem, check_geeni_shapes
from effjax.graph.sparse.adjacency_matrices import gcn_normalize
from effjax.graph.sparse.matrix import SparseMatrix
from effjax.graph.stages import scan_epochs

__all__ = ["geeni", "geeni_init", "geeni_next", "geeni_serve", "geeni_step", "geeni_views"]

PyTree = Any
T = TypeVar("T")


def geeni(key: jax.Array, problem: GeeniProblem, config: GeeniConfig | None = None) -> ServedEnsemble:
    r"""Train an ensemble, find the nodes that it gets wrong, stop their messages, and make it ready to serve.

    .. math:: p = \tfrac{1}{K} \sum_k \mathrm{softmax}(S'\, \mathrm{relu}(S' X W_{0,k} + b_{0,k})\, W_{1,k} + b_{1,k})

    S' is S without the messages of the error nodes, its entries compacted. This is a loop over ``geeni_init``,
    ``geeni_step``, ``geeni_next`` and ``geeni_serve``, for runs that are to be saved, watched or sharded.

    Args:
      key: of initial values, dropout, the members' views and the folds of the validation nodes.
      problem: the graph; arrays as in ``GeeniProblem``.
      config: of the method; None for ``GeeniConfig()``.

    Returns:
      A ``ServedEnsemble``: called without arguments it gives the probabilities [N, C] of all nodes.

    Raises:
      ValueError: arrays of the wrong shape, masks that overlap or are empty, labels beyond the classes, edges in one
        direction only, an adjacency that is no ``gcn_normalize`` of its weights.

    Example:
      >>> import effjax
      >>> cora = effjax.node_data("cora")
      >>> train, val, test = effjax.tasks.draw_split(jax.random.key(0), cora.labels, cora.classes, 20, 30)
      >>> problem = GeeniProblem(cora.features, cora.adjacency, cora.labels, train, val, cora.classes)
      >>> served = geeni(jax.random.key(1), problem, GeeniConfig(width=4, epochs=10, fractions=(0.1,)))
      >>> served().shape
      (2708, 7)

    Nagarajan, Raghunathan 2022 (DAC). Reconstructed from its abstracts: detector, choice, normalisation and students
    are ours.
    """
    config = config or GeeniConfig()
    _check_problem(problem, config)
    config = with_measured_loop(problem, config)
    state = geeni_init(key, problem, config=config)
    for stage in config.stages:
        views = geeni_views(state, problem, config=config)
        for _ in range(config.steps(stage)):
            state, _ = _step(state, problem, views, config=config, stage=stage)
        state = geeni_next(state, problem, config=config, stage=stage)
    return geeni_serve(state, problem, config=config)


def geeni_init(key: jax.Array, problem: GeeniProblem, *, config: GeeniConfig) -> GeeniState:
    """The state before the first step; traceable.

    Args:
      key: of the run.
      problem: the graph.
      config: of the method.

    Returns:
      A ``GeeniState``.

    Raises:
      ValueError: arrays of the wrong shape, or no ``alike`` edges for denoised members.
    """
    _check_shapes(problem, config)
    return _initial(key, problem.features.shape, problem.classes, config)


@functools.partial(jax.jit, static_argnums=(1, 2, 3), inline=True)
def _initial(key: jax.Array, shape: tuple[int, int], classes: int, config: GeeniConfig) -> GeeniState:
    tx, (nodes, width) = _optimizer(config), shape
    members = init_members(jax.random.fold_in(key, 1), config.members, width, config.width, classes)
    students, students_opt, targets, isolation = None, None, None, None
    if config.students:
        students = init_members(_epochs_key(key), config.students, width, config.student_width, classes)
        students_opt = tx.init(students)
        targets = jnp.zeros((nodes, classes))
    if config.isolate:
        isolation = Isolation(jnp.zeros(nodes), jnp.ones(nodes), jnp.zeros((), jnp.int32))
    return GeeniState(
        key=key,
        epoch=jnp.zeros((), jnp.int32),
        members=members,
        opt=tx.init(members),
        students=students,
        students_opt=students_opt,
        targets=targets,
        isolation=isolation,
    )


def geeni_views(state: GeeniState, problem: GeeniProblem, *, config: GeeniConfig) -> GeeniViews:
    """What each member sees in training, drawn from the state's key: the same before every step.

    The first member sees everything.

    Args:
      state: of ``geeni_init``.
      problem: the graph.
      config: of the method.

    Returns:
      ``GeeniViews``: the edges and features of every member.
    """
    matrix, weights = member_graphs(problem, config)
    return _views(state.key, matrix, weights, state.members.kernel_0.shape[1], config)


@functools.partial(jax.jit, static_argnums=(3, 4), inline=True)
def _views(key: jax.Array, matrix: SparseMatrix, weights: jax.Array, width: int, config: GeeniConfig) -> GeeniViews:
    pattern = matrix.pattern
    if config.members > 1 and config.edge_keep_rate < 1:
        subsets = jax.random.fold_in(key, 2)
        draw = lambda k: random_edges(jax.random.fold_in(subsets, k), pattern, config.edge_keep_rate)
        kept = jnp.stack([pattern.valid] + [draw(k) for k in range(1, config.members)])
        matrix = gcn_normalize(SparseMatrix(pattern, aligned(weights, kept) * kept.astype(weights.dtype)))
    return GeeniViews(matrix, _features_kept(key, width, config))


def geeni_step(
    state: GeeniState, problem: GeeniProblem, views: GeeniViews, *, config: GeeniConfig, stage: Stage = "members"
) -> tuple[GeeniState, dict[str, jax.Array]]:
    """``config.epochs_per_step`` full-batch epochs of the members or of the students; traceable.

    Args:
      state: of ``geeni_init`` or of the step before.
      problem: the graph.
      views: of ``geeni_views``.
      config: of the method; static.
      stage: what is trained; static.

    Returns:
      The state, and ``{"loss": mean cross-entropy per network and epoch}``.

    Raises:
      ValueError: a stage that ``config.stages`` lacks.
    """
    check_choice("stage", stage, config.stages)
    loop = check_choice("loop", config.loop, LOOPS)
    ours = stage == "members"

    def loss(networks: GcnMembers, key: jax.Array) -> jax.Array:
        seen = mask_features(networks, views.features) if ours else networks
        matrix, dropout = (views.matrix, config.dropout) if ours else (problem.adjacency, config.student_dropout)
        logits = ensemble_logits(seen, problem.features, matrix, dropout=dropout, key=key, loop=loop)
        if ours:
            return members_loss(logits, problem.labels, problem.train)
        return distil_loss(logits, held("targets", state.targets))

    fields = ("opt", "members") if ours else ("students_opt", "students")
    opt, networks = (getattr(state, name) for name in fields)
    opt, networks, values = scan_epochs(
        _epochs_key(state.key),
        loss,
        _optimizer(config),
        opt,
        networks,
        epochs=config.epochs_per_step,
        first=state.epoch,
    )
    changes = dict(zip(fields, (opt, networks), strict=True))
    epoch = state.epoch + config.epochs_per_step
    return state._replace(epoch=epoch, **changes), {"loss": jnp.mean(values) / networks.size}


_step = jax.jit(geeni_step, static_argnames=("config", "stage"))


def geeni_next(state: GeeniState, problem: GeeniProblem, *, config: GeeniConfig, stage: Stage) -> GeeniState:
    """From one stage to the next, after the last step of ``stage``. Runs on the host.

    The members leave targets for the students, if there are any. Whoever is served leaves the isolation.

    Args:
      state: after the last step.
      problem: the graph.
      config: of the method.
      stage: that is over.

    Returns:
      The state, of unchanged structure.

    Raises:
      ValueError: a stage that ``config.stages`` lacks.
    """
    check_choice("stage", stage, config.stages)
    if stage != config.stages[-1]:
        ensemble = _seeing(state, config)
        return state._replace(targets=_targets(ensemble, problem))
    if config.isolate is None:
        return state
    matrix, weights = member_graphs(problem, config)
    key = jax.random.fold_in(jax.random.fold_in(state.key, 4), 0)
    members = served_members(state, config=config)
    return state._replace(isolation=_choose(key, members, problem, matrix, weights, config=config))


def geeni_serve(state: GeeniState, problem: GeeniProblem, *, config: GeeniConfig) -> ServedEnsemble:
    """The trained ensemble, isolated, compacted and, if asked for, folded. Runs on the host.

    Args:
      state: after ``geeni_next`` of the last stage.
      problem: the graph.
      config: of the method.

    Returns:
      A ``ServedEnsemble``; its matrix is padded to one of a few sizes, so that few programs are compiled.
    """
    matrix, weights = member_graphs(problem, config)
    if config.isolate:
        isolation = held("isolation", state.isolation)
        mode = config.modes[int(isolation.mode)]
        matrix = isolate_to_ladder(matrix, isolation.active, mode=mode, weights=weights)
    members = served_members(state, config=config)
    members = fold_members(members) if config.folded else members
    return serve_ensemble(members, problem.features, matrix, precompute=config.precompute)


def served_members(state: GeeniState, *, config: GeeniConfig) -> GcnMembers:
    """The networks that are served: the students, or the members with the features that they do not see masked."""
    if config.students:
        return held("students", state.students)
    return _seeing(state, config)


def held(name: str, part: T | None) -> T:
    """A part of the state that is there if the config asks for it."""
    if part is None:
        raise ValueError(f"state.{name} is None, but config needs it. Make the state by geeni_init with this config.")
    return part


def member_graphs(problem: GeeniProblem, config: GeeniConfig) -> tuple[SparseMatrix, Float[Array, "..."]]:
    """S of the members, and A before normalisation: [nnz], or [K, nnz] where some of them are denoised."""
    matrix = problem.adjacency
    weights = matrix.pattern.valid.astype(jnp.float32) if problem.weights is None else problem.weights
    if not config.denoised_members:
        return matrix, weights
    alike = _alike(problem, config).astype(weights.dtype) * weights
    if config.members > 1:
        whole = config.members - config.denoised_members
        alike = jnp.stack([weights] * whole + [alike] * config.denoised_members)
    return gcn_normalize(SparseMatrix(matrix.pattern, alike)), alike


def with_measured_loop(problem: GeeniProblem, config: GeeniConfig) -> GeeniConfig:
    """The config with the fastest loop over the members in place of ``loop='auto'``. Runs on the host."""
    if config.loop != "auto":
        return config
    state = geeni_init(jax.random.key(0), problem, config=config)
    views = geeni_views(state, problem, config=config)
    loop = fastest_members_loop(state.members, problem.features, views.matrix)
    return dataclasses.replace(config, loop=loop)


# Students


def distil_targets(members: GcnMembers, problem: GeeniProblem) -> Float[Array, "nodes classes"]:
    """What students imitate: the ensemble's probabilities, and the label itself at the training nodes. Traceable.

    Args:
      members: the trained ensemble.
      problem: its graph.

    Returns:
      [N, C]; rows sum to 1.
    """
    hot = jax.nn.one_hot(problem.labels, problem.classes)
    found = ensemble_probabilities(ensemble_logits(members, problem.features, problem.adjacency))
    return jnp.where(problem.train[:, None], hot, found)


_targets = jax.jit(distil_targets)


def distil_loss(
    logits: Float[Array, "members nodes classes"], targets: Float[Array, "nodes classes"]
) -> Float[Array, ""]:
    """Sum over the networks of their mean cross-entropy with the targets, over ALL nodes, in nats.

    Example:
      >>> round(float(distil_loss(jnp.zeros((2, 1, 4)), jnp.array([[0.5, 0.5, 0.0, 0.0]]))), 4)
      2.7726
    """
    return -jnp.sum(jnp.mean(jnp.sum(targets[None] * jax.nn.log_softmax(logits), axis=2), axis=1))


# The isolation


def choose_isolation(
    key: jax.Array,
    members: GcnMembers,
    problem: GeeniProblem,
    matrix: SparseMatrix | None = None,
    weights: Float[Array, "..."] | None = None,
    *,
    config: GeeniConfig,
) -> Isolation:
    """The isolation that is best at the validation nodes; none if none is better than that. Traceable.

    Candidates are all ``modes`` with all ``fractions`` (or ``powers``); of equal ones the first, the gentlest, counts.
    The learned detector is judged fold by fold by one that has not seen the fold (``held_out_correctness``).

    Args:
      key: of the folds.
      members: that are to be served, not folded.
      problem: the graph; the labels of nodes outside ``train`` and ``val`` are not read, except by 'oracle'.
      matrix: S of the members, of ``member_graphs``; None for ``problem.adjacency``.
      weights: A before normalisation, of the same shape; None for ``problem.weights``.
      config: of the method; static.

    Returns:
      An ``Isolation``.

    Raises:
      ValueError: ``config.isolate`` is None.
    """
    detector = config.isolate
    if detector is None:
        raise ValueError(f"isolate=None chooses nothing. Name a detector: {', '.join(get_args(Detector))}.")
    matrix = problem.adjacency if matrix is None else matrix
    weights = problem.weights if weights is None else weights
    scores = error_scores(member_probabilities(ensemble_logits(members, problem.features, matrix)))
    folds = jax.random.permutation(key, problem.labels.shape[0]) % config.folds
    correctness, judges = _correctness(scores, problem, matrix, folds, detector=detector, config=config)
    known = problem.train | problem.val
    actives = jax.vmap(lambda each: _candidates(each, known, config))(judges)  # [folds or 1, candidates, N]
    judged = problem.val[None] & ((folds[None] == jnp.arange(config.folds)[:, None]) | (len(judges) == 1))
    judged = judged[: len(judges)]
    answering = fold_members(members) if config.folded else members

    def right(matrix: SparseMatrix) -> jax.Array:
        found = ensemble_probabilities(ensemble_logits(answering, problem.features, matrix))
        return jnp.argmax(found, axis=1) == problem.labels

    def isolated(active: jax.Array, mode: Mode) -> SparseMatrix:
        return matrix._replace(values=isolated_values(matrix, active, mode=mode, weights=weights))

    def count(mode: Mode, one: tuple[jax.Array, jax.Array]) -> jax.Array:
        active, judged = one
        return jnp.sum(judged & right(isolated(active, mode)))

    every = (actives.reshape(-1, actives.shape[-1]), jnp.repeat(judged, actives.shape[1], axis=0))
    counts = []
    for mode in config.modes:
        counts.append(jnp.sum(jax.lax.map(functools.partial(count, mode), every).reshape(actives.shape[:2]), axis=0))
    table = jnp.stack(counts, axis=1)  # candidates by mode
    best = jnp.argmax(table)
    better = jnp.max(table) > jnp.sum(problem.val & right(matrix))
    active = jnp.where(better, _candidates(correctness, known, config)[best // len(counts)], 1.0)
    return Isolation(correctness, active, (best % len(counts)).astype(jnp.int32))


_choose = jax.jit(choose_isolation, static_argnames="config")


def shared_graph(matrix: SparseMatrix) -> SparseMatrix:
    """The graph of the first member, which views and neighbours are read from."""
    return matrix if matrix.values.ndim == 1 else matrix._replace(values=matrix.values[0])


def _correctness(
    scores: ErrorScores,
    problem: GeeniProblem,
    matrix: SparseMatrix,
    folds: Int[Array, "nodes"],
    *,
    detector: Detector,
    config: GeeniConfig,
) -> tuple[jax.Array, jax.Array]:
    """[N], and [folds, N] that has not seen the fold it is judged by (or [1, N] if it sees no labels at all)."""
    matrix = shared_graph(matrix)
    if detector == "learned":
        seen = dataclasses.replace(problem, adjacency=matrix)
        options = {"fold_count": config.folds, "ridge": config.ridge}
        return learned_correctness(scores, seen, folds, **options), held_out_correctness(scores, seen, folds, **options)
    if detector == "oracle":
        found = (scores.label == problem.labels).astype(jnp.float32)
    else:
        found = label_free_correctness(scores, matrix)[detector]
    return found, found[None]


def _candidates(correctness: jax.Array, known: Bool[Array, "nodes"], config: GeeniConfig) -> jax.Array:
    """[candidates, N]: by what the messages of every node are multiplied; nodes of known label always send."""
    if config.isolate == "oracle":
        return jnp.where(known, 1.0, correctness)[None]
    if config.soft:
        return jnp.stack([jnp.where(known, 1.0, correctness**power) for power in config.powers])
    active = [active_nodes(correctness, fraction, known) for fraction in config.fractions]
    return jnp.stack(active).astype(jnp.float32)


# Training


def _optimizer(config: GeeniConfig) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(config.weight_decay, mask=DECAYED), optax.adam(config.learning_rate))


def _epochs_key(key: jax.Array) -> jax.Array:
    return jax.random.fold_in(key, 3)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _seeing(state: GeeniState, config: GeeniConfig) -> GcnMembers:
    """The members without the features that they do not see."""
    width = state.members.kernel_0.shape[1]
    return mask_features(state.members, _features_kept(state.key, width, config))


def _features_kept(key: jax.Array, width: int, config: GeeniConfig) -> jax.Array:
    subsets, shape = jax.random.fold_in(key, 2), (config.members, width)
    return jax.random.bernoulli(jax.random.fold_in(subsets, 0), config.feature_keep_rate, shape).at[0].set(True)


# Checks


def _check_shapes(problem: GeeniProblem, config: GeeniConfig) -> None:
    check_geeni_shapes(problem)
    check_number("problem.classes", problem.classes, low=1, integer=True)
    if config.denoised_members:
        _alike(problem, config)


def _alike(problem: GeeniProblem, config: GeeniConfig) -> jax.Array:
    """The edges that denoised members see."""
    if problem.alike is None:
        raise ValueError(
            f"denoised={config.denoised} needs problem.alike, the edges between alike nodes. Pass "
            "alike=alike_edges(features, adjacency.pattern)."
        )
    return problem.alike


def _check_problem(problem: GeeniProblem, config: GeeniConfig) -> None:
    """What shapes do not tell; for arrays that can be read."""
    _check_shapes(problem, config)
    train, val, labels = (np.asarray(part) for part in (problem.train, problem.val, problem.labels))
    if (train & val).any():
        raise ValueError(f"{(train & val).sum()} nodes are in problem.train and in problem.val. Take them out of one.")
    if not train.any():
        raise ValueError("problem.train has no node. Label some.")
    if config.isolate and not val.any():
        raise ValueError(
            f"problem.val has no node, by which isolate={config.isolate!r} could be judged. Label some nodes that are "
            "not trained on, or use isolate=None."
        )
    known = labels[train | val]
    if known.min() < 0 or known.max() >= problem.classes:
        raise ValueError(
            f"problem.labels of labelled nodes lie in [{known.min()}, {known.max()}]; classes={problem.classes} allows "
            f"[0, {problem.classes - 1}]. Take nodes without a class out of train and val."
        )
    pattern, weights = problem.adjacency.pattern, member_graphs(problem, dataclasses.replace(config, denoised=0.0))[1]
    symmetric = np.array_equal(pattern.t_rows, pattern.columns) and np.array_equal(pattern.t_indptr, pattern.indptr)
    if config.members > 1 and config.edge_keep_rate < 1 and not symmetric:
        raise ValueError(
            f"edge_keep_rate={config.edge_keep_rate} draws both directions of an edge together, but problem.adjacency "
            "has edges in one direction only. Add the others, or use edge_keep_rate=1."
        )
    expected = gcn_normalize(SparseMatrix(pattern, weights)).values
    if not np.allclose(problem.adjacency.values, expected, rtol=1e-4, atol=1e-6):
        raise ValueError(
            "problem.adjacency is not gcn_normalize of problem.weights"
            f"{'=1' if problem.weights is None else ''}, by which subsets of the edges are normalised. Build it with "
            "gcn_adjacency, and pass weights= if its edges have weights."
        )
