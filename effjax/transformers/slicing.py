"""Weights of what a ``PruneSpec`` removes are really gone: smaller matrices, fewer blocks, a folder to serve from."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.tree import path_name
from effjax.models.bert import BertClassifier
from effjax.models.pretrained import Pretrained
from effjax.models.pruned import Gates, LayerShape
from effjax.transformers.prune_spec import PruneSpec, check_made_for

__all__ = ["mask_params", "slice_model", "slice_pretrained"]

PyTree = Any
# The axis of a kernel that shrinks; a bias shrinks with the columns.
_COLUMNS = {"attention/query", "attention/key", "attention/value", "mlp/up", "mlp/gate"}
_ROWS = {"attention/output", "mlp/down"}


def slice_model(module: nn.Module, params: PyTree, spec: PruneSpec) -> tuple[nn.Module, PyTree]:
    r"""A smaller model that computes what the gated one does.

    Of a layer without the heads in R and the groups in S the columns of W_Q, W_K, W_V and the rows of W_O that belong
    to R go, and the columns of W_up (W_gate) and the rows of W_down of S. Output biases stay, as they do with all
    heads or groups gone; with a block its bias goes too. Post-LN: a removed block leaves its norm. Pre-LN: nothing.

    Args:
      module: ``Bert``, ``BertClassifier`` or ``Decoder`` with whole layers.
      params: its parameters, or any tree of the same form: gradients, shapes of ``jax.eval_shape``.
      spec: what to remove; an empty one gives the module's bits.

    Returns:
      The module with ``layer_shapes``, whose layers are not scanned, and its parameters under ``layer_{i}``.

    Raises:
      ValueError: a spec of a model of another shape, or parameters of another model.

    Example:
      >>> from effjax.models import Bert
      >>> from effjax.transformers.prune_spec import prune_shape
      >>> module = Bert(30, 8, num_layers=2, num_heads=2, intermediate_size=16)
      >>> params = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 3), int))["params"]
      >>> spec = PruneSpec(prune_shape(module, group_size=4), attention=(0,), groups=((1, 0), (1, 3)))
      >>> small, params = slice_model(module, params, spec)
      >>> small.layer_shapes[1].intermediate, params["layer_1"]["mlp"]["up"]["kernel"].shape
      (8, (8, 8))
      >>> sorted(params["layer_0"]["attention"])
      ['norm']
    """
    shape = check_made_for(module, spec)
    body = module.encoder if isinstance(module, BertClassifier) else module
    held = params["encoder"] if isinstance(module, BertClassifier) else params
    layers = {f"layer_{i}": _layer_of(held, i, body.scan_layers) for i in range(shape.layers)}
    whole = {name: value for name, value in held.items() if name != "layers" and not name.startswith("layer_")}
    sliced = {**whole, **{name: _sliced(layer, i, spec) for i, (name, layer) in enumerate(layers.items())}}
    shapes = layer_shapes(spec, body.layer_spec().head_width)
    small = body.clone(layer_shapes=shapes, scan_layers=False)
    if isinstance(module, BertClassifier):
        return module.clone(encoder=small), {**params, "encoder": sliced}
    return small, sliced


def mask_params(module: nn.Module, params: PyTree, gates: Gates) -> PyTree:
    """Parameters of the whole shape with which the module gives what the gated one does: for one task of fixed shapes.

    Rows of W_O and W_down are multiplied by the gates of their heads and groups, those and the biases by the blocks'.
    Saves nothing; hard attention is not in the weights, ``gates.hard`` is not read. Traceable.

    Args:
      module: ``Bert``, ``BertClassifier`` or ``Decoder`` with whole layers.
      params: its parameters.
      gates: arrays of 0 and 1.

    Returns:
      A tree like ``params``.

    Example:
      >>> from effjax.models import Bert
      >>> from effjax.transformers.prune_spec import prune_shape
      >>> module = Bert(30, 8, num_layers=2, num_heads=2, intermediate_size=16)
      >>> shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 3), int))["params"]
      >>> params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
      >>> gates = PruneSpec(prune_shape(module, group_size=4), mlp=(1,)).gates()
      >>> float(jnp.abs(mask_params(module, params, gates)["layer_1"]["mlp"]["down"]["kernel"]).sum())
      0.0
    """
    body: Any = module.encoder if isinstance(module, BertClassifier) else module
    held = params["encoder"] if isinstance(module, BertClassifier) else params
    names = ["layers"] if body.scan_layers else [f"layer_{i}" for i in range(body.num_layers)]
    masked = {}
    for index, name in enumerate(names):
        own = gates if body.scan_layers else jax.tree.map(lambda gate, index=index: gate[index], gates)
        layer = held[name]
        attention = _masked(layer["attention"], "output", own.attention, own.heads)
        masked[name] = {**layer, "attention": attention, "mlp": _masked(layer["mlp"], "down", own.mlp, own.groups)}
    fixed = {**held, **masked}
    return {**params, "encoder": fixed} if isinstance(module, BertClassifier) else fixed


def _masked(block: PyTree, name: str, gate: Any, elements: Any) -> PyTree:
    output = block[name]
    kernel = output["kernel"]
    gate, elements = (jnp.asarray(value, kernel.dtype) for value in (gate, elements))
    rows = jnp.repeat(elements, kernel.shape[-2] // elements.shape[-1], axis=-1) * gate[..., None]
    changed = {**output, "kernel": kernel * rows[..., None]}
    if "bias" in output:
        changed["bias"] = output["bias"] * gate[..., None]
    return {**block, name: changed}


def slice_pretrained(pretrained: Pretrained, spec: PruneSpec, params: PyTree | None = None) -> Pretrained:
    """``slice_model`` of a model with its folder: ``save_pretrained`` writes it as a Hugging Face folder.

    The folder's ``config.json`` says ``pruned_layers``, the shapes of the layers, and the ``model_type`` begins with
    ``pruned_``: ``load_pretrained`` reads it, and programs that do not know about it refuse the type instead of
    drawing what is missing at random.

    Args:
      pretrained: of ``load_pretrained``.
      spec: what to remove.
      params: parameters in place of ``pretrained.params``: the fine-tuned ones.

    Returns:
      A ``Pretrained`` with the small module, its parameters and its configuration.

    Raises:
      ValueError: as ``slice_model``.
    """
    params = pretrained.params if params is None else params
    module, sliced = slice_model(pretrained.module, params, spec)
    body: Any = module.encoder if isinstance(module, BertClassifier) else module
    config = {**pretrained.config, "pruned_layers": [shape._asdict() for shape in body.layer_shapes]}
    rules = tuple(
        rule._replace(target=rule.target.replace("layers/", "layer_{layer}/")) if rule.target else rule
        for rule in pretrained.rules
    )
    return pretrained._replace(module=module, params=sliced, config=config, rules=rules)


def layer_shapes(spec: PruneSpec, head_size: int) -> tuple[LayerShape, ...]:
    """What a spec leaves of each layer; ``head_size`` is the width of one query head.

    Example:
      >>> from effjax.transformers.prune_spec import PruneShape
      >>> shape = PruneShape(layers=1, heads=4, groups=2, head_width=8, kv_width=8, group_size=16)
      >>> layer_shapes(PruneSpec(shape, heads=((0, 3),), hard=(0,)), 8)
      (LayerShape(heads=3, kv_heads=3, intermediate=32, top_k=30),)
    """
    shapes = []
    for layer in range(spec.shape.layers):
        kv_heads = None if layer in spec.attention else len(_kept(spec.heads, layer, spec.shape.heads))
        groups = None if layer in spec.mlp else len(_kept(spec.groups, layer, spec.shape.groups))
        heads = None if kv_heads is None else kv_heads * (spec.shape.head_width // head_size)
        intermediate = None if groups is None else groups * spec.shape.group_size
        hard = layer in spec.hard and kv_heads
        shapes.append(LayerShape(heads, kv_heads, intermediate, spec.top_k if hard else None))
    return tuple(shapes)


def _layer_of(held: PyTree, index: int, scanned: bool) -> PyTree:
    if not scanned:
        return held[f"layer_{index}"]
    cut = lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) if _abstract(leaf) else leaf[index]
    return jax.tree.map(cut, held["layers"])


def _sliced(layer: PyTree, index: int, spec: PruneSpec) -> PyTree:
    blocks = {}
    for name, gone in (("attention", spec.attention), ("mlp", spec.mlp)):
        if index in gone:
            if not spec.shape.norm_first:
                blocks[name] = {"norm": layer[name]["norm"]}
            continue
        cut = lambda path, leaf, name=name: _cut(f"{name}/{path_name(path)}", leaf, index, spec)
        block = jax.tree_util.tree_map_with_path(cut, layer[name])
        # What has no columns left is not there in the module.
        empty = lambda part: part["kernel"].shape[-1] == 0
        blocks[name] = {key: part for key, part in block.items() if "kernel" not in part or not empty(part)}
    return blocks


def _cut(path: str, leaf: Any, layer: int, spec: PruneSpec) -> Any:
    name, _, part = path.rpartition("/")
    if name not in _COLUMNS | _ROWS or (name in _ROWS and part == "bias"):
        return leaf
    size = leaf.shape[0 if name in _ROWS else -1]
    removed, count = (spec.heads, spec.shape.heads) if name[0] == "a" else (spec.groups, spec.shape.groups)
    kept = _kept(removed, layer, count)
    width = size // count
    places = (np.array(kept, int)[:, None] * width + np.arange(width)[None]).ravel()
    if len(places) == size:
        return leaf
    axis = 0 if name in _ROWS else leaf.ndim - 1
    if _abstract(leaf):
        shape = tuple(len(places) if i == axis else length for i, length in enumerate(leaf.shape))
        return jax.ShapeDtypeStruct(shape, leaf.dtype)
    # On the host, where a new shape needs no program.
    return jnp.asarray(np.take(np.asarray(leaf), places, axis=axis))


def _kept(removed: tuple[tuple[int, int], ...], layer: int, count: int) -> list[int]:
    return [index for index in range(count) if (layer, index) not in removed]


def _abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)
