"""Networks of the FASTRAIN study, compiled once for all arms that share them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effjax.core.cost import Executables
from effjax.graph.adjacency import adjacency, gcn_normalize
from effjax.graph.calibration import calibrate, fit_calibration
from effjax.graph.fastrain import drop_edges
from effjax.graph.sparse import SparseMatrix
from effjax.models.gnn import NodeClassifier
from effjax.tasks.graph import NodeTask, node_task

PyTree = Any


@functools.lru_cache(maxsize=4)
def load_task(name: str) -> NodeTask:
    return node_task(name)


@functools.lru_cache(maxsize=4)
def loopless(name: str) -> SparseMatrix:
    """The normalised adjacency without self-loops, along which labels are spread."""
    data = load_task(name).data
    return gcn_normalize(adjacency(data.senders, data.receivers, data.nodes))


class Network(NamedTuple):
    """A network of one depth on one graph, compiled once for all arms."""

    train: Callable[..., jax.Array]
    predict: Callable[..., jax.Array]
    init: Callable[[jax.Array], PyTree]
    examine: Callable[[bool], Executables]


class Examined(NamedTuple):
    """What a stage's network says of all nodes."""

    logits: jax.Array
    predictions: jax.Array
    confidence: jax.Array
    samples: jax.Array | None


class Settings(NamedTuple):
    """What networks depend on; arms that agree in it share them, compiled."""

    task: str
    layer: str
    initializer: str
    hidden: int
    dropout: float
    dtype: str
    samples: int
    samples_keep: float
    calibration_epochs: int
    calibration_dropout: bool


def settings_of(config: Any, task: str, layer: str | None) -> Settings:
    return Settings(
        task=task,
        layer=layer or config.layer,
        initializer="glorot" if layer else "released",
        hidden=config.hidden,
        dropout=config.dropout,
        dtype=config.train.dtype,
        samples=config.samples,
        samples_keep=config.samples_keep,
        calibration_epochs=config.calibration_epochs,
        calibration_dropout=config.calibration_dropout,
    )


@functools.lru_cache(maxsize=8)
def network(config: Settings, depth: str) -> Network:
    data = load_task(config.task)
    module = NodeClassifier(
        classes=data.classes,
        hidden=config.hidden,
        depth=3 if depth == "deep" else 2,
        layer=config.layer,
        dropout=config.dropout,
        initializer=config.initializer,
        dtype=None if config.dtype == "float32" else jnp.dtype(config.dtype),
    )

    def train(params: PyTree, features: Any, matrix: SparseMatrix, key: jax.Array) -> jax.Array:
        return module.apply({"params": params}, features, matrix, train=True, rngs={"dropout": key})

    def predict(params: PyTree, features: Any, matrix: SparseMatrix) -> jax.Array:
        return module.apply({"params": params}, features, matrix)

    def examine(sampled: bool, key: jax.Array, params: PyTree, graph: PyTree, labels, weights, keep) -> Examined:
        features, whole = graph
        matrix = whole._replace(values=jnp.where(keep, whole.values, 0))
        logits = predict(params, features, matrix)
        below = lambda key: train(params, features, matrix, key)
        fit_key, sample_key = jax.random.split(key)
        head, _ = fit_calibration(
            fit_key,
            below if config.calibration_dropout else logits,
            matrix,
            labels,
            weights,
            classes=data.classes,
            epochs=config.calibration_epochs,
            dropout=config.dropout,
        )
        confidence = jax.nn.softmax(calibrate(head, matrix, logits)).max(-1)
        # The head changes no prediction, so that samples do without it.
        sample = lambda key: predict(params, features, drop_edges(key, matrix, config.samples_keep)).argmax(-1)
        samples = jax.lax.map(sample, jax.random.split(sample_key, config.samples)) if sampled else None
        return Examined(logits, logits.argmax(-1), confidence, samples)

    @functools.cache
    def examiner(sampled: bool) -> Executables:
        return Executables(functools.partial(examine, sampled), donate_argnums=())

    init = jax.jit(lambda key: module.init(key, data.features, data.adjacency)["params"])
    return Network(train, jax.jit(predict), init, examiner)


@functools.lru_cache(maxsize=16)
def inference(config: Settings) -> Callable[..., jax.Array]:
    """Logits of some nodes, from a forward pass over the whole graph."""

    def infer(params: PyTree, inputs: tuple[jax.Array, Any, SparseMatrix]) -> jax.Array:
        nodes, features, matrix = inputs
        depth = "deep" if "conv_2" in params else "shallow"
        return network(config, depth).predict(params, features, matrix)[nodes]

    return infer
