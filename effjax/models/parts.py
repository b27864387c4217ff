"""A transformer in parts: embeddings, one layer, and what comes after, as functions of the parameters."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.models.attention import attention_mask, token_positions
from effjax.models.bert import Bert, BertClassifier
from effjax.models.decoder import Decoder
from effjax.models.embeddings import check_tokens
from effjax.models.pruned import Gates
from effjax.models.transformer import Layer, LayerSpec

PyTree = Any
Inputs = Mapping[str, Any]
_KNOWN = ("input_ids", "mask", "token_type_ids", "position_ids", "segment_ids")


class Parts(NamedTuple):
    """What ``module.apply`` does, cut where one layer ends; ``inputs`` are the module's arguments by name.

    Attributes:
      spec: sizes and choices of a layer.
      num_layers: depth.
      embed: ``(params, inputs) -> x``, what the first layer gets.
      layer: ``(layer_params, x, inputs, gates) -> x``; gates of one layer, or None for the layer as it is.
      head: ``(params, x, inputs) -> outputs``.
      stack: ``params -> layers``, parameters of the layers with a leading layer axis.
      taps: like ``layer``, but ``-> (x, taps)``: ``context`` and ``hidden`` too, what both output layers read.
    """

    spec: LayerSpec
    num_layers: int
    embed: Callable[..., jax.Array]
    layer: Callable[..., jax.Array]
    head: Callable[..., jax.Array]
    stack: Callable[[PyTree], PyTree]
    taps: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def parts(module: nn.Module, *, top_k: int | float | None = None) -> Parts:
    """The parts of a ``Bert``, ``BertClassifier`` or ``Decoder`` with whole layers.

    Args:
      module: the model.
      top_k: what the gate ``hard`` switches on, see ``keep_largest``; None for a gate without effect.

    Returns:
      ``Parts``, in evaluation: without dropout.

    Raises:
      TypeError: another module.
      ValueError: a model that is pruned already.
    """
    if not isinstance(module, Bert | BertClassifier | Decoder):
        raise TypeError(
            f"module={type(module).__name__} is none of Bert, BertClassifier, Decoder. Of another model give a "
            "function (params, inputs, gates) -> outputs that reads the gates itself."
        )
    body = module.encoder if isinstance(module, BertClassifier) else module
    if body.layer_shapes is not None:
        raise ValueError("module is pruned already: layer_shapes are given. Give the whole model.")
    if getattr(body, "full_layers", ()):
        raise ValueError(
            f"module has full_layers={body.full_layers}: layers of two kinds, with and without a sliding window, which "
            "are not cut into parts. Give a model whose layers are alike."
        )
    own = (lambda params: params["encoder"]) if isinstance(module, BertClassifier) else (lambda params: params)
    spec = body.layer_spec()._replace(top_k=top_k)

    def embed(params: PyTree, inputs: Inputs) -> jax.Array:
        _check_inputs(inputs, body)
        types = (inputs.get("token_type_ids"),) if isinstance(body, Bert) else ()
        positions = _positions(inputs)
        embeddings: Any = body.make_embeddings()
        return embeddings.apply({"params": own(params)["embeddings"]}, inputs["input_ids"], positions, *types)

    def around(inputs: Inputs) -> tuple[Any, Any]:
        seen = attention_mask(inputs.get("mask"), inputs.get("segment_ids"))
        return seen, body.angles(_positions(inputs)) if isinstance(body, Decoder) else None

    def layer(layer_params: PyTree, x: jax.Array, inputs: Inputs, gates: Gates | None = None) -> jax.Array:
        # Without gates hard attention is off.
        used = spec if gates is not None else spec._replace(top_k=None)
        return Layer(used).apply({"params": layer_params}, x, *around(inputs), 0, gates)[0]

    def taps(
        layer_params: PyTree, x: jax.Array, inputs: Inputs, gates: Gates | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        used = spec if gates is not None else spec._replace(top_k=None)
        variables = {"params": layer_params}
        layer: Any = Layer(used)
        (x, _), sown = layer.apply(variables, x, *around(inputs), 0, gates, mutable=["taps"])
        return x, {"context": sown["taps"]["attention"]["context"][0], "hidden": sown["taps"]["mlp"]["hidden"][0]}

    def head(params: PyTree, x: jax.Array, inputs: Inputs) -> jax.Array:
        if isinstance(module, BertClassifier):
            rest = {name: value for name, value in params.items() if name != "encoder"}
            classifier: Any = module
            return classifier.apply({"params": rest}, x, inputs.get("mask"), method="classify")
        return _decode(module, params, x) if isinstance(module, Decoder) else x

    def stack(params: PyTree) -> PyTree:
        held = own(params)
        if body.scan_layers:
            return held["layers"]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(held[f"layer_{i}"] for i in range(body.num_layers)))

    return Parts(spec, body.num_layers, embed, layer, head, stack, taps)


def _decode(module: Decoder, params: PyTree, x: jax.Array) -> Float[Array, "batch length vocab"]:
    norm: Any = module.make_norm()
    embeddings: Any = module.make_embeddings()
    head: Any = module.make_head()
    x = norm.apply({"params": params["norm"]}, x)
    if module.tie_embeddings:
        logits = embeddings.apply({"params": params["embeddings"]}, x, method="attend")
    else:
        logits = head.apply({"params": params["head"]}, x)
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def _positions(inputs: Inputs) -> jax.Array:
    given = inputs.get("position_ids")
    return token_positions(inputs["input_ids"], inputs.get("segment_ids")) if given is None else given


def _check_inputs(inputs: Inputs, body: Any) -> None:
    legal = _KNOWN if isinstance(body, Bert) else tuple(name for name in _KNOWN if name != "token_type_ids")
    if not isinstance(inputs, Mapping) or "input_ids" not in inputs or set(inputs) - set(legal):
        given = sorted(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise ValueError(f"inputs={given} must be a mapping with input_ids and any of {', '.join(legal[1:])}.")
    rest = inputs.get("mask"), inputs.get("segment_ids")
    check_tokens(inputs["input_ids"], body.max_positions, *rest, vocab_size=body.vocab_size)
