"""One row for every Flax module of effjax; ``test_modules.py`` runs the matrix over them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
from effjax.hardness.router import Router
from effjax.models.bert import Bert, BertClassifier
from effjax.models.cnn import CNN
from effjax.models.decoder import Decoder
from effjax.models.gnn import NodeClassifier
from effjax.models.inverted_residual import BlockRow, InvertedResidual, InvertedResidualNet
from effjax.models.linear_recurrence import LRU
from effjax.models.mlp import MLP
from effjax.models.resnet import BasicBlock, ResNet
from effjax.models.sequence import Recurrent
from effjax.models.sequence_rivals import FastRNNCell
from effjax.models.vit import ViT
from effjax.recurrent.fixed_point import EquilibriumRNN
from effjax.recurrent.irnn import IncrementalRNN
from effjax.recurrent.tarnn import TARNNCell
from effjax.vision.global_layer import GlobalLayer
from effjax.vision.pde import PdeConfig
from effjax.vision.si_block import CheapPath, SIBlock


class ModuleCase(NamedTuple):
    """A module at a tiny size.

    Attributes:
      stem: the row of ``METHODS``, or the backbone's file name.
      make: ``dtype -> module``, parameters float32 whatever the compute dtype.
      inputs: ``batch -> inputs``, every one with the batch axis leading.
      collections: the variable collections that ``init`` creates.
      evaluate: keywords of a call in evaluation mode.
      train: keywords of a call in training mode.
      bfloat16_error: largest difference of a bfloat16 run, relative to the largest output.
    """

    stem: str
    make: Callable[[Any], nn.Module]
    inputs: Callable[[int], tuple[jax.Array, ...]]
    collections: tuple[str, ...] = ("params",)
    evaluate: Mapping[str, Any] = {"train": False}
    train: Mapping[str, Any] = {"train": True}
    bfloat16_error: float = 0.05


def images(batch: int, size: int = 16, channels: int = 3) -> tuple[jax.Array]:
    return (jax.random.normal(jax.random.key(7), (batch, size, size, channels)),)


def tokens(batch: int, length: int = 6, vocab_size: int = 30) -> tuple[jax.Array, jax.Array]:
    """Ids, and a mask that leaves each row another number of real tokens."""
    ids = jax.random.randint(jax.random.key(7), (batch, length), 0, vocab_size)
    return ids, jnp.arange(length)[None] < length - jnp.arange(batch)[:, None] % 4


def sequences(batch: int, length: int = 5, features: int = 3) -> tuple[jax.Array]:
    return (jax.random.normal(jax.random.key(7), (batch, length, features)),)


class GraphBatch(nn.Module):
    """A node classifier over a batch of features [batch, nodes, features] of one small graph with an isolated node."""

    network: nn.Module

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        graph = gcn_adjacency([0, 1, 1, 2, 3, 0], [1, 0, 2, 1, 0, 3], 5, capacity=14)
        run = nn.vmap(
            lambda network, x: network(x, graph, train),
            variable_axes={"params": None},
            split_rngs={"params": False, "dropout": True},
        )
        return run(self.network, x)


_bert = {
    "vocab_size": 30,
    "hidden_size": 8,
    "num_layers": 1,
    "num_heads": 2,
    "intermediate_size": 12,
    "max_positions": 6,
}
_small = {"stages": (1, 2), "widths": (8, 16), "classes": 5}


def classified(batch: int) -> tuple[jax.Array, jax.Array]:
    """Logits and features of a base model."""
    return jax.random.normal(jax.random.key(7), (batch, 5)), jax.random.normal(jax.random.key(8), (batch, 6))


CASES: dict[str, ModuleCase] = {
    "mlp": ModuleCase("mlp", lambda dtype: MLP((16, 8), classes=5, dtype=dtype), functools.partial(images, size=4)),
    "cnn": ModuleCase("cnn", lambda dtype: CNN((8, 16), classes=5, dtype=dtype), images),
    "cnn-group": ModuleCase("cnn", lambda dtype: CNN((8, 12), classes=5, norm="group", dtype=dtype), images),
    "resnet": ModuleCase("resnet", lambda dtype: ResNet(**_small, dtype=dtype), images, ("params", "batch_stats")),
    "resnet-imagenet": ModuleCase(
        "resnet",
        lambda dtype: ResNet(
            **_small,
            block=functools.partial(BasicBlock, shortcut="project"),
            stem="imagenet",
            norm="group",
            remat=True,
            dtype=dtype,
        ),
        functools.partial(images, size=32),
    ),
    "inverted-residual": ModuleCase(
        "inverted_residual",
        lambda dtype: InvertedResidualNet(
            ((BlockRow(8, hidden=4), BlockRow(8, strides=2, hidden=12, squeeze=4, activation="hard_swish")),),
            stem=4,
            last=0,
            classes=5,
            dtype=dtype,
        ),
        images,
        ("params", "batch_stats"),
    ),
    "vit": ModuleCase(
        "vit",
        lambda dtype: ViT(
            **{"classes": 3, "patch": 8, "grid": (2, 2), "hidden_size": 8, "num_layers": 1, "num_heads": 2},
            token_multiple=8,
            dtype=dtype,
        ),
        images,
    ),
    "bert": ModuleCase("bert", lambda dtype: BertClassifier(Bert(**_bert, dtype=dtype), 3, pool="cls"), tokens),
    "bert-scan": ModuleCase(
        "bert",
        lambda dtype: Bert(
            **{**_bert, "num_layers": 2},
            embedding_size=4,
            dropout=0.0,
            attention_dropout=0.0,
            scan_layers=True,
            remat=True,
            dtype=dtype,
        ),
        tokens,
    ),
    "decoder": ModuleCase("decoder", lambda dtype: Decoder(**_bert, num_kv_heads=1, dtype=dtype), tokens),
    "irnn": ModuleCase(
        "irnn", lambda dtype: IncrementalRNN(4, K=2, length=5, chunk=2, dtype=dtype), sequences, evaluate={}, train={}
    ),
    "irnn-equilibrium": ModuleCase(
        "irnn", lambda dtype: EquilibriumRNN(4, iterations=20, dtype=dtype), sequences, evaluate={}, train={}
    ),
    "tarnn": ModuleCase(
        "tarnn", lambda dtype: nn.RNN(TARNNCell(4, length=5, dtype=dtype)), sequences, evaluate={}, train={}
    ),
    "global_layer": ModuleCase(
        "global_layer",
        lambda dtype: GlobalLayer(3, pde=PdeConfig(K=2), diffusivity=(1.0, 0.5), dtype=dtype),
        functools.partial(images, size=4),
        ("params", "batch_stats"),
    ),
    "hybrid-router": ModuleCase("hybrid", lambda dtype: Router((8,), (4,), dtype=dtype), classified),
    "si-block": ModuleCase(
        "si_cnn",
        lambda dtype: SIBlock(
            InvertedResidual(3, hidden=6, skip=False, dtype=dtype), CheapPath(3, dtype=dtype), offset=(1, 0)
        ),
        functools.partial(images, size=5),
        ("params", "batch_stats"),
    ),
    "fastrnn": ModuleCase(
        "sequence", lambda dtype: Recurrent(FastRNNCell(4, dtype=dtype)), sequences, evaluate={}, train={}
    ),
    "fastrnn-per-time": ModuleCase(
        "sequence", lambda dtype: Recurrent(FastRNNCell(4, length=5, dtype=dtype)), sequences, evaluate={}, train={}
    ),
    "gnn": ModuleCase("gnn", lambda dtype: GraphBatch(NodeClassifier(3, 4, depth=3, dtype=dtype)), sequences),
    "gnn-gat": ModuleCase(
        "gnn", lambda dtype: GraphBatch(NodeClassifier(3, 4, layer="gat", heads=2, dtype=dtype)), sequences
    ),
    "lru": ModuleCase("sequence", lambda dtype: LRU(4, dtype=dtype), sequences, evaluate={}, train={}),
}


def start(case: ModuleCase, dtype: Any = jnp.float32) -> tuple[nn.Module, Any]:
    """The module and its variables, statistics moved away from their starting values."""
    module = case.make(dtype)
    # The default generator takes XLA's CPU backend six times as long to compile.
    key = jax.random.key(0, impl="rbg")
    variables = jax.jit(module.init)(key, *case.inputs(2))
    if len(variables) > 1:
        module_state = [name for name in variables if name != "params"]
        train = jax.jit(lambda v, *x: module.apply(v, *x, **case.train, mutable=module_state)[1])
        variables = {**variables, **train(variables, *case.inputs(8))}
    return module, variables
