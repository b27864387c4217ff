"""A transformer under gates: its outputs, and the losses of every sample."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.core.tree import wide
from effjax.models.parts import parts
from effjax.models.pruned import Gates

__all__ = ["Scores", "axformer_step", "gated_apply", "sample_losses"]

PyTree = Any
Apply = Callable[..., Any]
Loss = Callable[[Any, Any], jax.Array]


class Scores(NamedTuple):
    """What the search reads of a model.

    Attributes:
      losses: [rows], one loss of 0 or more for each validation sample.
      predicted: int [rows], the predicted classes; None where outputs are no logits of classes.
      complete: False where the evaluation ended early; losses that were not computed are 0 then.
    """

    losses: Any
    predicted: Any = None
    complete: bool = True


def sample_losses(
    outputs: Float[Array | np.ndarray, "rows *length classes"], labels: Int[Array | np.ndarray, "rows *length"]
) -> Float[Array, "rows"]:
    r"""Cross-entropy of every sample, in nats; of sequences the mean over their known labels.

    .. math:: \ell_i = -\log \mathrm{softmax}(z_i)_{y_i}

    Args:
      outputs: logits.
      labels: classes, or the next tokens of a language model; -1 is unknown and counts nowhere.

    Returns:
      float32 (float64 of float64 logits) [rows]; 0 where nothing is known.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      >>> sample_losses(jnp.zeros((2, 4)), jnp.array([3, -1])).round(4).tolist() == [jnp.log(4.0).round(4).item(), 0.0]
      True
    """
    if jnp.shape(outputs)[:-1] != jnp.shape(labels):
        raise ValueError(
            f"labels have shape {jnp.shape(labels)}; expected {jnp.shape(outputs)[:-1]}, as outputs are "
            f"{jnp.shape(outputs)}. For other losses give loss=(outputs, labels) -> [rows]."
        )
    outputs, labels = wide(outputs), jnp.asarray(labels)
    known = labels >= 0
    chosen = jnp.take_along_axis(outputs, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    each = jnp.where(known, jax.nn.logsumexp(outputs, axis=-1) - chosen, 0)
    axes = tuple(range(1, labels.ndim))
    return each.sum(axes) / jnp.maximum(known.sum(axes), 1).astype(each.dtype)


def gated_apply(module: nn.Module, *, top_k: int | float = 30) -> Apply:
    """A model of ``effjax.models`` as a function of its parameters, its inputs and its gates.

    Args:
      module: ``Bert``, ``BertClassifier`` or ``Decoder``.
      top_k: of hard attention, see ``keep_largest``.

    Returns:
      ``(params, inputs, gates) -> outputs``, in evaluation; ``inputs`` are the module's arguments by name
      (``input_ids``, ``mask``, ...). Differentiable in the gates; wherever they are all on, the module's outputs.

    Example:
      >>> from effjax.models import Bert
      >>> from effjax.transformers.prune_spec import PruneShape, PruneSpec
      >>> module = Bert(30, 8, num_layers=2, num_heads=2, intermediate_size=8)
      >>> ids = jnp.ones((1, 3), int)
      >>> params = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
      >>> gates = PruneSpec(PruneShape(layers=2, heads=2, groups=1), mlp=(1,)).gates()
      >>> jax.eval_shape(gated_apply(module), params, {"input_ids": ids}, gates).shape
      (1, 3, 8)
    """
    cut = parts(module, top_k=top_k)

    def apply(params: PyTree, inputs: Mapping[str, Any], gates: Gates) -> jax.Array:
        x = cut.embed(params, inputs)
        layers = (cut.stack(params), jax.tree.map(jnp.asarray, gates))
        body = lambda x, layer: (cut.layer(layer[0], x, inputs, layer[1]), None)
        x, _ = jax.lax.scan(body, x, layers)
        return cut.head(params, x, inputs)

    return apply


def axformer_step(
    apply: Apply, params: PyTree, gates: Gates, batch: tuple[PyTree, PyTree], *, loss: Loss = sample_losses
) -> Scores:
    """Score one batch of a gated model: the traceable part of the search.

    Args:
      apply: ``(params, inputs, gates) -> outputs``: of ``gated_apply``, or your own model, which reads the gates.
      params: its parameters.
      gates: switches, arrays of 0 and 1: other values need no other program.
      batch: (inputs, labels).
      loss: ``(outputs, labels) -> [rows]``, 0 or more.

    Returns:
      ``Scores`` of the batch.

    Raises:
      ValueError: a loss that is not one number for each row.

    Example:
      >>> apply = lambda params, x, gates: x * gates.mlp[0]
      >>> gates = Gates(jnp.ones(1), jnp.ones(1), jnp.ones((1, 1)), jnp.ones((1, 1)), jnp.zeros(1))
      >>> axformer_step(apply, None, gates, (jnp.array([[0.0, 9.0]]), jnp.array([1]))).predicted.tolist()
      [1]
    """
    inputs, labels = batch
    return score_outputs(loss, apply(params, inputs, gates), labels)


def score_outputs(loss: Loss, outputs: Any, labels: Any) -> Scores:
    """The ``Scores`` of a batch from a model's outputs."""
    losses = loss(outputs, labels)
    rows = jnp.shape(jax.tree.leaves(labels)[0])[0]
    if jnp.shape(losses) != (rows,):
        raise ValueError(
            f"loss returns shape {jnp.shape(losses)} for {rows} rows; expected ({rows},), one number each."
        )
    logits = isinstance(outputs, jax.Array) and outputs.ndim == 2 and jnp.ndim(labels) == 1
    return Scores(losses, outputs.argmax(-1).astype(jnp.int32) if logits else None)
