"""Neighbour sampling with a static fan-out, for graphs that do not fit full-batch (Hamilton, Ying, Leskovec 2017).

The sampler runs on the host in NumPy; a batch is a few tables of fixed shapes, so a training step compiles once.
"""

import functools
import itertools
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import ArrayLike

from effjax.core.cursor import Cursor
from effjax.core.errors import check_number
from effjax.core.shapes import pad_to
from effjax.core.tree import wide_dtype
from effjax.data.pipeline import Batches
from effjax.graph.sparse.matrix import SparseMatrix, SparsePattern, check_matrix
from effjax.graph.sparse.products import spmm

__all__ = ["NeighbourSampler", "block_mean", "block_sum"]

# Up to this fan-out the forward pass is a chain of gathers and additions, which XLA fuses into one loop.
_UNROLLED = 32


class Block(NamedTuple):
    """One hop of messages: every target node and a fixed number of slots for its neighbours.

    Targets are the first rows of the sources, in the same order.

    Attributes:
      neighbours: int32 [targets, fanout], rows of the sources.
      mask: bool [targets, fanout], False where a slot is empty.
      values: float32 [targets, fanout], the entries of the sampled matrix times degree / sampled; 0 in empty slots.
      t_indptr: int32 [sources + 1], where the slots of each source begin in ``t_order``.
      t_order: int32 [targets * fanout], the slots ordered by source: what makes gradients free of scatters.
    """

    neighbours: Int[Array | np.ndarray, "targets fanout"]
    mask: Bool[Array | np.ndarray, "targets fanout"]
    values: Float[Array | np.ndarray, "targets fanout"]
    t_indptr: Int[Array | np.ndarray, "sources_and_1"]
    t_order: Int[Array | np.ndarray, "slots"]

    @property
    def targets(self) -> int:
        """Rows that receive."""
        return self.neighbours.shape[0]

    @property
    def sources(self) -> int:
        """Rows that send."""
        return self.t_indptr.shape[0] - 1


class SampledBatch(NamedTuple):
    """What one step needs.

    Attributes:
      seeds: int32 [B], node numbers; those of the first rows of ``nodes`` too.
      weight: float32 [B], 1 for a seed, 0 for a dummy that fills the last batch of an epoch. It bears the number of a
        real seed, but its output means nothing.
      nodes: int32 [sources of ``blocks[0]``], the nodes whose features go in; the tail is padding.
      blocks: in the order of the layers, the farthest hop first.
    """

    seeds: np.ndarray
    weight: np.ndarray
    nodes: np.ndarray
    blocks: tuple[Block, ...]


def block_mean(block: Block, x: Float[Array | np.ndarray, "sources features"]) -> Float[Array, "targets features"]:
    r"""Mean over the sampled neighbours: an unbiased estimate of the mean over all; 0 where there are none.

    .. math:: y_i = \frac{1}{|M_i|} \sum_{k \in M_i} x_{n_{ik}}, \qquad M_i = \{k : \mathrm{mask}_{ik}\}

    Args:
      block: of a ``SampledBatch``.
      x: rows of the sources; a target's own are ``x[:block.targets]``.

    Returns:
      [targets, features], of the dtype of ``x``, summed in float32 at least.

    Raises:
      ValueError: ``x`` has not as many rows as the block has sources.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import adjacency
      >>> star = adjacency([1, 2, 3], [0, 0, 0], 4)
      >>> batch = next(NeighbourSampler(star, [0, 2], (3,), batch_size=2, seed=0, shuffle=False))
      >>> x = jnp.asarray([[9.0], [1.0], [2.0], [3.0]])
      >>> block_mean(batch.blocks[0], x[batch.nodes]).tolist()
      [[2.0], [0.0]]
    """
    mask = jnp.asarray(block.mask, jnp.float32)
    return _combine(block, mask / jnp.maximum(mask.sum(1, keepdims=True), 1), x)


def block_sum(block: Block, x: Float[Array | np.ndarray, "sources features"]) -> Float[Array, "targets features"]:
    r"""Weighted sum over the sampled neighbours: an unbiased estimate of rows of :math:`A x`.

    .. math:: y_i = \frac{d_i}{|M_i|} \sum_{k \in M_i} a_{i n_{ik}} x_{n_{ik}}

    with :math:`d_i` the entries of row i. On ``gcn_normalize`` of an adjacency with self-loops it is a sampled graph
    convolution, exact where the fan-out covers the row.

    Args:
      block: of a ``SampledBatch``.
      x: rows of the sources.

    Returns:
      [targets, features], of the dtype of ``x``, summed in float32 at least.

    Raises:
      ValueError: ``x`` has not as many rows as the block has sources.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import adjacency
      >>> star = adjacency([1, 2, 3], [0, 0, 0], 4, weights=[1.0, 10.0, 100.0])
      >>> batch = next(NeighbourSampler(star, [0], (3,), batch_size=1, seed=0))
      >>> block_sum(batch.blocks[0], jnp.ones((4, 1))).tolist()
      [[111.0]]
    """
    return _combine(block, jnp.asarray(block.values), x)


def _combine(block: Block, weights: jax.Array, x: jax.Array | np.ndarray) -> jax.Array:
    x = jnp.asarray(x)
    if weights.shape != block.neighbours.shape:
        raise ValueError(f"block has {weights.shape} slots for neighbours {block.neighbours.shape}. Was it cut?")
    if x.ndim != 2 or x.shape[0] != block.sources:
        raise ValueError(
            f"x has shape {x.shape}, but the block has {block.sources} sources. Give a layer the output of the one "
            "before, and the first the features of batch.nodes."
        )
    dtype = wide_dtype(x.dtype)
    return _gather(jax.tree.map(jnp.asarray, block), weights.astype(dtype), x.astype(dtype)).astype(x.dtype)


@jax.custom_vjp
@jax.jit
def _gather(block: Block, weights: Array, x: Array) -> Array:
    if block.neighbours.shape[1] > _UNROLLED:
        return spmm(_matrix(block, weights), x)
    parts = [weights[:, k, None] * x[block.neighbours[:, k]] for k in range(weights.shape[1])]
    return functools.reduce(jnp.add, parts)


def _gather_forward(block, weights, x):
    return _gather(block, weights, x), (block, weights, x)


def _gather_backward(residuals, g):
    block, weights, x = residuals
    to_weights = jnp.einsum("tf,tkf->tk", g, x[block.neighbours])
    return None, to_weights, spmm(_matrix(block, weights).transpose, g)


_gather.defvjp(_gather_forward, _gather_backward)


def _matrix(block: Block, weights: Array) -> SparseMatrix:
    """The block as a sparse matrix [targets, sources]; its transpose was sorted on the host."""
    targets, fanout = weights.shape
    slots = targets * fanout
    pattern = SparsePattern(
        indptr=jnp.arange(0, slots + 1, fanout, dtype=jnp.int32),
        columns=jnp.asarray(block.neighbours).reshape(-1),
        rows=jnp.repeat(jnp.arange(targets, dtype=jnp.int32), fanout),
        t_indptr=jnp.asarray(block.t_indptr),
        t_rows=jnp.asarray(block.t_order) // fanout,
        t_order=jnp.asarray(block.t_order),
        size=jnp.int32(slots),
        buckets=None,
        shape=(targets, block.sources),
    )
    return SparseMatrix(pattern, weights.reshape(-1))


# On the host


class NeighbourSampler(Cursor[SampledBatch]):
    r"""Mini-batches of seed nodes with a random part of their neighbourhood, resumable, each of the same shapes.

    A node with at most ``fanout`` neighbours sends for all of them; else ``fanout`` of them are drawn without
    replacement, every subset equally likely. Hop k + 1 samples for every node that hop k reached, the seeds among
    them. Hop k has at most

    .. math:: s_0 = B, \qquad s_k = \min(N,\ s_{k-1} (1 + \mathrm{fanout}_k))

    nodes, which is what it is padded to. Batch i is a function of ``(seed, i)`` alone. By index and as a resumable
    iterator (``get_state``, ``set_state``), so ``effjax.data.pipeline.prefetch_to_device`` takes it; every process
    draws the same batches.

    Args:
      matrix: [N, N], rows receive; ``adjacency`` for ``block_mean``, and its values count in ``block_sum``.
      seeds: distinct node numbers to predict for, in training those of the training nodes and no others: labels are
        only ever read at seeds.
      fanouts: neighbours per node for each hop, the hop at the seeds first.
      batch_size: B, seeds per batch; the last of an epoch is filled up with dummies of weight 0.
      seed: of the order and of the draws.
      epochs: passes over the seeds; None repeats for ever.
      shuffle: a new order every epoch, or that of ``seeds``.

    Raises:
      ValueError: seeds that repeat or lie outside the graph, more seeds a batch than there are, a matrix that is not
        square, or arguments out of range.

    Example:
      A few steps of GraphSAGE on Cora:

      >>> from effjax.data.graphs import graph_data
      >>> from effjax.graph.sparse.adjacency_matrices import adjacency
      >>> data = graph_data("cora")
      >>> words = np.zeros(data.features.shape, np.float32)
      >>> words[np.repeat(np.arange(data.nodes), np.diff(data.features.indptr)), data.features.columns] = 1
      >>> graph = adjacency(data.senders, data.receivers, data.nodes)
      >>> sampler = NeighbourSampler(graph, data.train, (5, 5), batch_size=70, seed=0)
      >>> def sage(params, x, blocks):
      ...     for layer, (block, (own, theirs)) in enumerate(zip(blocks, params, strict=True)):
      ...         x = x[: block.targets] @ own + block_mean(block, x @ theirs)
      ...         x = jax.nn.relu(x) if layer + 1 < len(blocks) else x
      ...     return x
      >>> def loss(params, x, batch, labels):
      ...     each = -jnp.take_along_axis(jax.nn.log_softmax(sage(params, x, batch.blocks)), labels[:, None], axis=1)
      ...     return batch.weight @ each[:, 0] / batch.weight.sum()
      >>> @jax.jit
      ... def step(params, x, batch, labels):
      ...     value, grads = jax.value_and_grad(loss)(params, x, batch, labels)
      ...     return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), value
      >>> rng, losses = np.random.default_rng(0), []
      >>> widths = [(words.shape[1], 16), (16, data.classes)]
      >>> params = [tuple(jnp.asarray(rng.normal(0, a**-0.5, (2, a, b)), jnp.float32)) for a, b in widths]
      >>> for _ in range(20):
      ...     batch = next(sampler)
      ...     params, value = step(params, words[batch.nodes], batch, data.labels[batch.seeds])
      ...     losses.append(float(value))
      >>> losses[-1] < 0.5 * losses[0], step._cache_size()
      (True, 1)
    """

    def __init__(
        self,
        matrix: SparseMatrix,
        seeds: ArrayLike,
        fanouts: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        epochs: int | None = None,
        shuffle: bool = True,
    ):
        self._nodes = check_matrix("matrix", matrix, square=True).shape[0]
        seeds = _check_seeds(np.asarray(seeds), self._nodes)
        self._fanouts = tuple(
            int(check_number(f"fanouts[{hop}]", fanout, low=1, integer=True)) for hop, fanout in enumerate(fanouts)
        )
        if not self._fanouts:
            raise ValueError("fanouts=() holds no hop. Give one number of neighbours for each layer.")
        entries = int(matrix.pattern.size)  # without padding
        self._indptr = np.minimum(np.asarray(matrix.pattern.indptr), entries)
        # At least one, so that empty slots can point somewhere in a graph without edges.
        self._columns = pad_to(np.asarray(matrix.pattern.columns)[:entries], max(entries, 1))
        self._values = pad_to(np.asarray(matrix.values, np.float32)[:entries], max(entries, 1))
        self._order = Batches(
            {"seeds": seeds},
            batch_size,
            seed=seed,
            epochs=epochs,
            shuffle=shuffle,
            drop_remainder=False,
            process_index=0,
            process_count=1,
        )
        self._batch_size, self._seed = int(batch_size), seed
        self._sizes = _block_sizes(self._batch_size, self._fanouts, self._nodes)
        digest = functools.reduce(
            lambda digest, array: zlib.crc32(np.ascontiguousarray(array).data, digest),
            (seeds, self._indptr, self._columns, self._values),
            0,
        )
        self._settings = {**self._order.settings, "fanouts": list(self._fanouts), "graph": f"{digest:08x}"}

    @property
    def sizes(self) -> tuple[int, ...]:
        """Padded nodes of a batch, of the seeds and after every hop; features go in for the last."""
        return self._sizes

    @property
    def batches_per_epoch(self) -> int:
        """Batches of one pass over the seeds."""
        return self._order.batches_per_epoch

    def __len__(self) -> int:
        return len(self._order)

    def _item(self, index: int) -> SampledBatch:
        seeds = self._order[index]["seeds"]
        rng = np.random.default_rng((self._seed, index, 2))
        nodes, blocks = seeds, []
        for fanout, (targets, sources) in zip(self._fanouts, itertools.pairwise(self._sizes), strict=True):
            nodes, block = self._hop(nodes, fanout, targets, sources, rng)
            blocks.append(block)
        missing = self._batch_size - len(seeds)
        return SampledBatch(
            seeds=np.pad(seeds, (0, missing), constant_values=seeds[0]),
            weight=pad_to(np.ones(len(seeds), np.float32), self._batch_size),
            nodes=pad_to(nodes, self._sizes[-1], value=nodes[0]),
            blocks=tuple(blocks[::-1]),
        )

    def _hop(
        self, nodes: np.ndarray, fanout: int, targets: int, sources: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, Block]:
        """The nodes reached by sampling for ``nodes``, those first, and the block."""
        entries, mask = sample_entries(self._indptr, nodes, fanout, rng)
        entries = np.where(mask, entries, 0)
        there = np.where(mask, self._columns[entries], nodes[:, None])
        place = np.full(self._nodes, -1, np.int32)
        place[nodes] = np.arange(len(nodes), dtype=np.int32)
        new = np.unique(there[place[there] < 0])
        place[new] = np.arange(len(nodes), len(nodes) + len(new), dtype=np.int32)
        scale = np.diff(self._indptr)[nodes] / np.maximum(mask.sum(1), 1)
        values = np.where(mask, self._values[entries] * scale[:, None], 0).astype(np.float32)
        neighbours = pad_to(place[there], targets)
        # Sorting (source, slot) pairs as one number is several times faster than a stable argsort.
        slots = np.arange(neighbours.size, dtype=np.int64)
        pairs = np.sort(neighbours.ravel().astype(np.int64) * neighbours.size + slots)
        counts = np.bincount(neighbours.ravel(), minlength=sources)
        block = Block(
            neighbours=neighbours,
            mask=pad_to(mask, targets),
            values=pad_to(values, targets),
            t_indptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
            t_order=(pairs % neighbours.size).astype(np.int32),
        )
        return np.concatenate([nodes, new]), block


def sample_entries(
    indptr: Int[np.ndarray, "rows_and_1"], rows: Int[np.ndarray, "n"], fanout: int, rng: np.random.Generator
) -> tuple[Int[np.ndarray, "n fanout"], Bool[np.ndarray, "n fanout"]]:
    """Entries of rows of a sparse matrix, at most ``fanout`` each, without replacement; every subset equally likely.

    Takes time in proportion to n * fanout**2 at most, whatever the degrees are (Floyd's algorithm).

    Args:
      indptr: starts of the rows.
      rows: which rows; they may repeat.
      fanout: slots per row.
      rng: drawn from only for rows longer than ``fanout``.

    Returns:
      Numbers of entries and a mask of the slots in use, which come first.

    Example:
      >>> sample_entries(np.array([0, 2, 2]), np.array([0, 1]), 3, np.random.default_rng(0))[1].tolist()
      [[True, True, False], [False, False, False]]
    """
    starts = indptr[rows].astype(np.int64)
    degrees = indptr[np.asarray(rows) + 1] - starts
    chosen = np.broadcast_to(np.arange(fanout), (len(starts), fanout)).copy()
    long = np.flatnonzero(degrees > fanout)
    picked = np.empty((len(long), fanout), np.int64)
    for slot in range(fanout):
        last = degrees[long] - fanout + slot
        draw = rng.integers(0, last + 1)
        taken = (picked[:, :slot] == draw[:, None]).any(1)
        picked[:, slot] = np.where(taken, last, draw)
    chosen[long] = picked
    return starts[:, None] + chosen, np.arange(fanout) < degrees[:, None]


def _block_sizes(batch_size: int, fanouts: Sequence[int], nodes: int) -> tuple[int, ...]:
    sizes = [batch_size]
    for fanout in fanouts:
        sizes.append(min(nodes, sizes[-1] * (1 + fanout)))
    return tuple(sizes)


def _check_seeds(seeds: np.ndarray, nodes: int) -> np.ndarray:
    if seeds.ndim != 1 or not seeds.size or seeds.dtype.kind not in "iu":
        raise ValueError(
            f"seeds is {seeds.dtype}{list(seeds.shape)}; node numbers are needed, at least one. From a mask: "
            "np.flatnonzero(mask)."
        )
    outside = seeds[(seeds < 0) | (seeds >= nodes)]
    if outside.size:
        raise ValueError(f"seeds hold {outside[0]} and {len(outside) - 1} more numbers outside [0, {nodes - 1}].")
    if len(np.unique(seeds)) < len(seeds):
        raise ValueError(f"seeds hold {len(seeds)} numbers, of which {len(np.unique(seeds))} differ. Drop repetitions.")
    return seeds.astype(np.int32)
