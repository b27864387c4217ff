"""Least-squares repair: the output layers of pruned blocks are refitted to the whole model, without gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.errors import check_number
from effjax.core.tree import with_leaves
from effjax.models.bert import BertClassifier
from effjax.models.embeddings import norm_module
from effjax.models.parts import Parts, parts
from effjax.models.pruned import Gates
from effjax.transformers.prune_spec import PruneSpec, all_gates, check_made_for
from effjax.transformers.validation import PruneBatch

__all__ = ["repair_outputs"]

PyTree = Any
_OUTPUTS = {"attention": ("context", "output"), "mlp": ("hidden", "down")}


def repair_outputs(
    module: nn.Module, params: PyTree, spec: PruneSpec, batches: Sequence[PruneBatch], *, ridge: float = 1e-3
) -> PyTree:
    r"""Refit W_O and W_down, and their biases, of the blocks that lost heads or groups.

    Block after block, with what the pruned block's output layer reads X, its residual stream r, and those of the whole
    model X', r',

    .. math:: \min_W \| X W - (X' W' + r' - r) \|^2 + \lambda \bar x^2 \| W - W' \|^2

    over the real tokens, with :math:`\bar x^2` the mean of the diagonal of :math:`X^\top X`: the stream after the block
    comes as close to the whole model's as the kept columns allow. In float64 on the host.

    Args:
      module: ``Bert``, ``BertClassifier`` or ``Decoder``.
      params: its parameters, layers not scanned.
      spec: what is removed.
      batches: of ``prune_batches``: inputs to fit on; labels are not read. A few times as many tokens as a block has
        neurons are enough.
      ridge: lambda, above 0.

    Returns:
      Parameters of the whole model's form, for ``slice_model`` with the same spec.

    Raises:
      ValueError: a spec of another model, scanned layers, no batch, or a ridge that is not above 0.

    Example:
      >>> from effjax.models import Bert
      >>> from effjax.transformers.validation import prune_batches
      >>> from effjax.transformers.prune_spec import prune_shape
      >>> module = Bert(30, 8, num_layers=2, num_heads=2, intermediate_size=16)
      >>> ids = np.arange(24).reshape(4, 6)
      >>> params = jax.jit(module.init)(jax.random.key(0), ids)["params"]
      >>> spec = PruneSpec(prune_shape(module, group_size=4), groups=((0, 1),))
      >>> batches = prune_batches({"input_ids": ids}, np.zeros(4, int), batch_size=4)
      >>> repaired = repair_outputs(module, params, spec, batches)
      >>> bool((repaired["layer_0"]["mlp"]["down"]["kernel"] != params["layer_0"]["mlp"]["down"]["kernel"]).any())
      True

    Reference: the closed form in place of the mask tuning of Kwon et al. 2022 (arXiv 2204.09656), who fit one number
    for each kept element.
    """
    check_number("ridge", ridge, low=0, open_low=True)
    check_made_for(module, spec)
    if not batches:
        raise ValueError("batches are empty. Give at least one, of prune_batches.")
    body: Any = module.encoder if isinstance(module, BertClassifier) else module
    if body.scan_layers:
        raise ValueError(
            "params of scanned layers are not repaired. Give the module and params with scan_layers=False."
        )
    cut = parts(module, top_k=spec.top_k)
    held = params["encoder"] if isinstance(module, BertClassifier) else params
    run = _runner(cut)
    whole = [jax.jit(cut.embed)(params, batch.inputs) for batch in batches]
    pruned, repaired = whole, {}
    gates, every = spec.gates(), all_gates(spec.shape)
    for index in range(cut.num_layers):
        name = f"layer_{index}"
        dense, own = held[name], held[name]
        on, off = (jax.tree.map(lambda gate, index=index: gate[index], tree) for tree in (every, gates))
        targets = [run(dense, x, batch.inputs, on) for x, batch in zip(whole, batches, strict=True)]
        for block, removed in (("attention", spec.heads), ("mlp", spec.groups)):
            gone = index in (spec.attention if block == "attention" else spec.mlp)
            if gone or not any(layer == index for layer, _ in removed):
                continue
            taken = [run(own, x, batch.inputs, off) for x, batch in zip(pruned, batches, strict=True)]
            own = _refitted(own, block, taken, targets, [_weights(batch) for batch in batches], ridge)
        taken = [run(own, x, batch.inputs, off) for x, batch in zip(pruned, batches, strict=True)]
        whole, pruned = [found["x"] for found in targets], [found["x"] for found in taken]
        repaired[name] = own
    fixed = {**held, **repaired}
    return {**params, "encoder": fixed} if isinstance(module, BertClassifier) else fixed


def _runner(cut: Parts) -> Callable[..., dict[str, jax.Array]]:
    """A layer's output, what its output layers read, and the streams that they add to."""
    spec = cut.spec

    @jax.jit
    def run(layer: PyTree, x: jax.Array, inputs: Any, gates: Gates) -> dict[str, jax.Array]:
        gates = jax.tree.map(jnp.asarray, gates)
        after, taps = cut.taps(layer, x, inputs, gates)
        output = layer["attention"]["output"]
        added = taps["context"] @ output["kernel"] + (output["bias"][None, None] if spec.use_bias else 0)
        middle = x + gates.attention.astype(x.dtype) * added.astype(x.dtype)
        if not spec.norm_first:
            norm = norm_module(spec.norm, spec.norm_eps, spec.dtype, None)
            middle = norm.apply({"params": layer["attention"]["norm"]}, middle)
        return {"x": after, "before attention": x, "before mlp": middle, **taps}

    return run


def _refitted(
    layer: PyTree,
    block: str,
    taken: Sequence[dict[str, jax.Array]],
    targets: Sequence[dict[str, jax.Array]],
    weights: Sequence[np.ndarray],
    ridge: float,
) -> PyTree:
    tap, name = _OUTPUTS[block]
    dense = layer[block][name]
    first = np.asarray(dense["kernel"], np.float64)
    if "bias" in dense:
        first = np.concatenate([first, np.asarray(dense["bias"], np.float64)[None]])
    size = len(first)
    gram, cross = np.zeros((size, size)), np.zeros((size, first.shape[1]))
    for mine, whole, weight in zip(taken, targets, weights, strict=True):
        rows = weight.ravel() > 0
        flat = lambda array, rows=rows: np.asarray(array, np.float64).reshape(-1, array.shape[-1])[rows]
        ones = np.ones((int(rows.sum()), size - mine[tap].shape[-1]))
        inputs, wanted = (np.concatenate([flat(found[tap]), ones], axis=1) for found in (mine, whole))
        stream = flat(whole[f"before {block}"]) - flat(mine[f"before {block}"])
        gram += inputs.T @ inputs
        cross += inputs.T @ ((wanted - inputs) @ first + stream)
    scale = ridge * np.trace(gram) / max((np.diagonal(gram) > 0).sum(), 1)
    if scale == 0:
        return layer
    fitted = first + np.linalg.solve(gram + scale * np.eye(size), cross)
    rows = dense["kernel"].shape[0]
    leaves = {f"{block}/{name}/kernel": jnp.asarray(fitted[:rows], dense["kernel"].dtype)}
    if "bias" in dense:
        leaves[f"{block}/{name}/bias"] = jnp.asarray(fitted[rows], dense["bias"].dtype)
    return with_leaves(layer, leaves)


def _weights(batch: PruneBatch) -> np.ndarray:
    """1 at the real tokens of the real rows."""
    real = np.asarray(batch.rows) >= 0
    mask = batch.inputs.get("mask")
    tokens = np.ones(np.shape(batch.inputs["input_ids"]), bool) if mask is None else np.asarray(mask, bool)
    return (tokens & real[:, None]).astype(np.float64)
