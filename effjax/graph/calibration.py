"""Calibrated confidence of node classifiers: the CaGCN head (Wang, Liu, Shi, Yang 2021, NeurIPS, arXiv:2109.14285)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.core.errors import check_number
from effjax.graph.measures import masked_cross_entropy, node_weights
from effjax.graph.sparse.checks import check_array
from effjax.graph.sparse.layers import dropout as random_dropout
from effjax.graph.sparse.matrix import SparseMatrix, check_matrix
from effjax.graph.stages import adam_l2, scan_epochs

__all__ = ["calibrate", "fit_calibration"]

PyTree = Any


def calibration_init(key: jax.Array, classes: int, hidden: int = 16) -> PyTree:
    """Parameters of the head, a GCN ``classes -> hidden -> 1``, drawn from U(-1/sqrt(out), 1/sqrt(out)).

    Example:
      >>> calibration_init(jax.random.key(0), 7)["conv_1"]["kernel"].shape
      (16, 1)
    """
    check_number("classes", classes, low=2, integer=True)
    check_number("hidden", hidden, low=1, integer=True)
    sizes = ((classes, hidden), (hidden, 1))
    return {f"conv_{index}": _uniform(k, *sizes[index]) for index, k in enumerate(jax.random.split(key))}


def calibrate(
    params: PyTree,
    logits: Float[Array, "nodes classes"],
    adjacency: SparseMatrix,
    *,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> Float[Array, "nodes classes"]:
    r"""Logits scaled node by node, by a factor that the neighbourhood's logits decide.

    .. math::
        L' = L \cdot \log(e^t + 1.1), \qquad t = S\, \mathrm{relu}(S L W_0 + b_0)\, W_1 + b_1

    The factor is above :math:`\log 1.1`, so no prediction changes, only the confidence in it.

    Args:
      params: of ``calibration_init``.
      logits: L, of the network to be calibrated.
      adjacency: S, normalised with self-loops.
      dropout: rate on the hidden layer, in training.
      key: of the dropout; needed where the rate is above 0.

    Returns:
      Calibrated logits.

    Raises:
      ValueError: an adjacency that is not square, or logits of other nodes or classes.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> logits = jnp.array([[2.0, 1.0], [0.0, 3.0]])
      >>> head = calibration_init(jax.random.key(0), 2)
      >>> calibrate(head, logits, gcn_adjacency([0, 1], [1, 0], 2)).argmax(1).tolist()
      [0, 1]
    """
    check_matrix("adjacency", adjacency, square=True)
    check_array("logits", logits, (adjacency.shape[0], params["conv_0"]["kernel"].shape[0]), "floating")
    return _scaled(params, adjacency, logits, adjacency @ logits, dropout, key)


def intra_distance(
    logits: Float[Array, "nodes classes"], labels: Int[Array, "nodes"], weights: Float[Array, "nodes"]
) -> Float[Array, ""]:
    r"""CaGCN's regulariser: right predictions should be sure, wrong ones unsure.

    .. math::
        \frac{\sum_i w_i\, d_i}{\sum_i w_i}, \qquad
        d_i = \begin{cases} 1 - p_{(1)} + p_{(2)} & \hat y_i = z_i \\ p_{(1)} - p_{(2)} & \text{else} \end{cases}

    with the two largest probabilities of the node.

    Args:
      logits: calibrated.
      labels: z.
      weights: 1 for members of the training set, 0 for others.

    Example:
      >>> float(intra_distance(jnp.zeros((1, 2)), jnp.array([0]), jnp.ones(1)))
      1.0
    """
    weights, labels = node_weights(logits, labels, weights)
    first, second = jnp.moveaxis(jax.lax.top_k(jax.nn.softmax(logits), 2)[0], -1, 0)
    right = jnp.argmax(logits, -1) == labels
    distances = jnp.where(right, 1 - first + second, first - second)
    return jnp.sum(weights * distances) / jnp.maximum(jnp.sum(weights), 1e-9)


def calibration_loss(
    logits: Float[Array, "nodes classes"],
    labels: Int[Array, "nodes"],
    weights: Float[Array, "nodes"],
    strength: float = 0.5,
) -> Float[Array, ""]:
    """Cross-entropy of calibrated logits plus ``strength`` times their ``intra_distance``."""
    return masked_cross_entropy(logits, labels, weights) + strength * intra_distance(logits, labels, weights)


def fit_calibration(
    key: jax.Array,
    logits: Float[Array, "nodes classes"] | Callable[[jax.Array], Float[Array, "nodes classes"]],
    adjacency: SparseMatrix,
    labels: Int[Array, "nodes"],
    weights: Float[Array, "nodes"],
    *,
    classes: int | None = None,
    epochs: int = 200,
    learning_rate: float = 1e-3,
    weight_decay: float = 5e-3,
    strength: float = 0.5,
    dropout: float = 0.5,
) -> tuple[PyTree, Float[Array, "epochs"]]:
    """Train the head on the training nodes, the network frozen; traceable.

    Args:
      key: of the head's start and of dropout.
      logits: of the network, once for all epochs; or ``key -> logits``, which is called in every epoch. The latter is
        the authors' program, which forgets to switch the frozen network's dropout off and so runs it 200 times.
      adjacency: the whole graph's.
      labels: z.
      weights: 1 for members of the training set, 0 for others.
      classes: C; needed where ``logits`` is a function.
      epochs: how many, static.
      learning_rate: of Adam.
      weight_decay: L2, added to the gradient.
      strength: of the ``intra_distance``.
      dropout: rate on the head's hidden layer.

    Returns:
      The head's parameters, and the loss of every epoch.

    Raises:
      ValueError: a function without ``classes``, or numbers out of range.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> logits, labels = jnp.array([[2.0, 1.0], [0.0, 3.0]]), jnp.array([0, 1])
      >>> head, losses = fit_calibration(
      ...     jax.random.key(0), logits, gcn_adjacency([0, 1], [1, 0], 2), labels, jnp.ones(2), epochs=3
      ... )
      >>> losses.shape
      (3,)

    Source: Wang, Liu, Shi, Yang 2021, NeurIPS, arXiv:2109.14285.
    """
    check_number("epochs", epochs, low=1, integer=True)
    check_number("dropout", dropout, low=0, high=1, open_high=True)
    nodes = check_matrix("adjacency", adjacency, square=True).shape[0]
    check_array("labels", labels, (nodes,), "integers")
    check_array("weights", weights, (nodes,), "bool or floating")
    if not callable(logits):
        classes = logits.shape[-1]
    elif classes is None:
        raise ValueError("classes=None, but logits is a function, which does not tell. Give the number of classes.")
    network = _spread(logits, adjacency)
    start, rest = jax.random.split(key)
    params = calibration_init(start, classes)
    tx = adam_l2(learning_rate, weight_decay)

    def loss(params: PyTree, key: jax.Array) -> jax.Array:
        below, own = jax.random.split(key)
        calibrated = _scaled(params, adjacency, *network(below), dropout, own)
        return calibration_loss(calibrated, labels, weights, strength)

    _, params, losses = scan_epochs(rest, loss, tx, tx.init(params), params, epochs=epochs)
    return params, losses


def _uniform(key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
    kernel, bias = jax.random.split(key)
    limit = outputs**-0.5
    draw = lambda key, shape: jax.random.uniform(key, shape, minval=-limit, maxval=limit)
    return {"kernel": draw(kernel, (inputs, outputs)), "bias": draw(bias, (outputs,))}


def _spread(
    logits: jax.Array | Callable[[jax.Array], jax.Array], adjacency: SparseMatrix
) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """``key -> (L, S L)``; of fixed logits the product is made once."""
    if callable(logits):
        return lambda key: (found := logits(key), adjacency @ found)
    spread = adjacency @ logits
    return lambda key: (logits, spread)


def _scaled(
    params: PyTree, adjacency: SparseMatrix, logits: jax.Array, spread: jax.Array, dropout: float, key: jax.Array | None
) -> jax.Array:
    first, second = params["conv_0"], params["conv_1"]
    hidden = jax.nn.relu(spread @ first["kernel"] + first["bias"][None])
    if dropout:
        if key is None:
            raise ValueError(f"dropout={dropout} needs a key. Pass one, or leave dropout out when evaluating.")
        hidden = random_dropout(key, hidden, dropout)
    temperature = adjacency @ (hidden @ second["kernel"]) + second["bias"][None]
    return logits * jnp.logaddexp(temperature, jnp.log(1.1))  # finite for any temperature
