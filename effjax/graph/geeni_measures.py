"""How good a GEENI ensemble is, and how well its wrong nodes are told from its right ones (a reconstruction)."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effjax.core.errors import check_choice, check_number
from effjax.core.products import aligned
from effjax.graph.error_nodes import error_auc, error_scores, label_free_correctness, spread_errors
from effjax.graph.geeni import GeeniProblem, geeni_serve, held, member_graphs, served_members, shared_graph
from effjax.graph.geeni_config import GeeniConfig, GeeniState
from effjax.graph.isolation import random_edges
from effjax.graph.measures import masked_accuracy
from effjax.graph.members import (
    GcnMembers,
    ensemble_logits,
    ensemble_probabilities,
    fold_members,
    member_probabilities,
)
from effjax.graph.sparse.adjacency_matrices import gcn_normalize, loopless_adjacency
from effjax.graph.sparse.matrix import SparseMatrix
from effjax.graph.sparse.propagation import correct_and_smooth

_correct_and_smooth = jax.jit(correct_and_smooth)


def geeni_metrics(
    state: GeeniState,
    problem: GeeniProblem,
    test: Bool[Array, "nodes"],
    *,
    config: GeeniConfig,
    after: Literal["drop-edges", "correct-smooth"] | None = None,
) -> dict[str, Float[Array, ""] | float]:
    """What the served ensemble is worth on the test nodes. Runs on the host.

    Args:
      state: after ``geeni_next`` of the last stage.
      problem: the graph, with the labels of the test nodes.
      test: bool [N].
      config: of the method.
      after: what a rival does with the probabilities before its accuracy is taken: 'drop-edges' takes their mean over
        edge subsets (``over_edge_subsets``), 'correct-smooth' propagates the known labels (``correct_and_smooth``).

    Returns:
      By name: 'accuracy' of ``geeni_serve``; where several networks are served their mean 'accuracy_member' and
      'accuracy_ensemble', both without isolation; with students 'accuracy_teacher', of the ensemble they imitate; with
      isolation 'auc_' and each detector (``detector_aucs``), 'edges_removed' (share of the entries of S) and 'isolated'
      (share of the nodes that send nothing).
    """
    whole = dataclasses.replace(config, isolate=None, soft=False)
    members, (matrix, _) = served_members(state, config=config), member_graphs(problem, config)
    score = lambda found: masked_accuracy(found, problem.labels, test)
    served = geeni_serve(state, problem, config=config)
    metrics: dict[str, jax.Array | float] = {"accuracy": score(_afterwards(after, served(), state, problem, config))}
    if members.size > 1:
        metrics["accuracy_member"] = _member_accuracy(members, problem, matrix, test)
        metrics["accuracy_ensemble"] = score(geeni_serve(state, problem, config=whole)())
    if config.students:
        teacher = dataclasses.replace(whole, students=0, folded=False)
        metrics["accuracy_teacher"] = score(geeni_serve(state, problem, config=teacher)())
    if config.isolate:
        isolation, subsets = held("isolation", state.isolation), over_edge_subsets(state, problem, config=config)
        others = {config.isolate: isolation.correctness}
        aucs = _detector_aucs(members, problem, matrix, test, subsets=subsets, others=others)
        metrics |= {f"auc_{name}": value for name, value in aucs.items()}
        metrics["edges_removed"] = 1 - int(served.matrix.pattern.size) / int(matrix.pattern.size)
        metrics["isolated"] = jnp.mean(isolation.active == 0)
    return metrics


def _afterwards(
    after: str | None, found: jax.Array, state: GeeniState, problem: GeeniProblem, config: GeeniConfig
) -> jax.Array:
    check_choice("after", after, (None, "drop-edges", "correct-smooth"))
    if after == "drop-edges":
        return jnp.mean(over_edge_subsets(state, problem, config=config), axis=0)
    if after == "correct-smooth":
        known = problem.train | problem.val
        return _correct_and_smooth(loopless_adjacency(problem.adjacency), found, problem.labels, known)
    return found


@jax.jit
def _member_accuracy(members: GcnMembers, problem: GeeniProblem, matrix: SparseMatrix, mask: jax.Array) -> jax.Array:
    logits = ensemble_logits(members, problem.features, matrix)
    return jnp.mean(masked_accuracy(logits, problem.labels, mask))


def over_edge_subsets(
    state: GeeniState, problem: GeeniProblem, *, config: GeeniConfig
) -> Float[Array, "count nodes classes"]:
    """``edge_subset_probabilities`` of what is served, without isolation, drawn from the state's key."""
    members, (matrix, weights) = served_members(state, config=config), member_graphs(problem, config)
    members = fold_members(members) if config.folded else members
    key = jax.random.fold_in(jax.random.fold_in(state.key, 4), 1)
    return _edge_subsets(
        key, members, problem.features, matrix._replace(values=weights), keep_rate=config.edge_keep_rate
    )


def edge_subset_probabilities(
    key: jax.Array,
    members: GcnMembers,
    features: SparseMatrix | Float[Array, "nodes features"],
    graph: SparseMatrix,
    *,
    keep_rate: float | jax.Array = 0.8,
    count: int = 16,
) -> Float[Array, "count nodes classes"]:
    """The ensemble's probabilities on random subsets of the edges; their variance shows which nodes hang on few edges.

    Args:
      key: of the draws.
      members: trained.
      features: X.
      graph: A with self-loops, before normalisation; values [nnz], or [K, nnz].
      keep_rate: probability of an edge.
      count: subsets.

    Returns:
      [count, N, C].

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import adjacency
      >>> from effjax.graph.members import init_members
      >>> pair = adjacency([0, 1], [1, 0], 2, self_loops=True)
      >>> members = init_members(jax.random.key(0), 2, 2, 4, 3)
      >>> edge_subset_probabilities(jax.random.key(1), members, jnp.eye(2), pair, count=5).shape
      (5, 2, 3)
    """
    check_number("count", count, low=1, integer=True)

    def one(key: jax.Array) -> jax.Array:
        kept = random_edges(key, graph.pattern, keep_rate).astype(graph.values.dtype)
        matrix = gcn_normalize(graph._replace(values=graph.values * aligned(kept, graph.values)))
        return ensemble_probabilities(ensemble_logits(members, features, matrix))

    return jax.lax.map(one, jax.random.split(key, count))


def detector_aucs(
    members: GcnMembers,
    problem: GeeniProblem,
    matrix: SparseMatrix,
    mask: Bool[Array, "nodes"],
    *,
    subsets: Float[Array, "count nodes classes"],
    others: Mapping[str, Float[Array, "nodes"]],
) -> dict[str, Float[Array, ""]]:
    """``error_auc`` of every detector; traceable.

    Args:
      members: of the ensemble whose errors are to be found.
      problem: its graph; labels are read at ``val`` and at ``mask``.
      matrix: S of the members; of values [K, nnz] the first member's tell the neighbours.
      mask: bool [N], the nodes that count, such as the test nodes.
      subsets: of ``edge_subset_probabilities``.
      others: more detectors by name, [N] each, low where a node is probably wrong.

    Returns:
      A scalar per detector: 'score', 'agreement', 'mutual' (``label_free_correctness``), 'nearby' (``spread_errors`` of
      the validation nodes), 'subsets' (variance over the edge subsets), and those of ``others``.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> from effjax.graph.members import init_members
      >>> graph, none = gcn_adjacency([0, 1], [1, 0], 3), jnp.zeros(3, bool)
      >>> problem = GeeniProblem(jnp.eye(3), graph, jnp.array([0, 1, 0]), none, none, 2)
      >>> members = init_members(jax.random.key(0), 2, 3, 4, 2)
      >>> more = {"subsets": jnp.ones((1, 3, 2)), "others": {"mine": jnp.arange(3.0)}}
      >>> sorted(detector_aucs(members, problem, graph, ~none, **more))
      ['agreement', 'mine', 'mutual', 'nearby', 'score', 'subsets']
    """
    scores = error_scores(member_probabilities(ensemble_logits(members, problem.features, matrix)))
    wrong, shared = scores.label != problem.labels, shared_graph(matrix)
    found = label_free_correctness(scores, shared) | {
        "nearby": spread_errors(shared, wrong, problem.val),
        "subsets": -jnp.sum(jnp.var(subsets, axis=0), axis=1),
        **others,
    }
    return {name: error_auc(each, wrong, mask & (problem.labels >= 0)) for name, each in found.items()}


_edge_subsets = jax.jit(edge_subset_probabilities)
_detector_aucs = jax.jit(detector_aucs)
