"""The router of hybrid models: which inputs to ask the expert about, from what the base model computed anyway."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from effjax.core.errors import check_choice, check_number
from effjax.core.tree import wide

__all__ = ["Router", "router_features", "router_need"]

TOP = 10


def router_features(
    logits: Float[Array | np.ndarray, "rows classes"], *, top: int = TOP
) -> Float[Array, "rows features"]:
    r"""What a router reads of the base model's logits.

    The entropy of :math:`p = \mathrm{softmax}(\mathrm{logits})`, then all differences of its k largest values in
    decreasing order:

    .. math:: \Big[-\sum\nolimits_c p_c \log p_c, \; p_{(1)} - p_{(1)}, \; p_{(1)} - p_{(2)}, \; \dots, \;
        p_{(k)} - p_{(k)}\Big]

    Args:
      logits: computed in float32 at least: of a bfloat16 softmax near 1 the differences tie.
      top: k; fewer classes give fewer.

    Returns:
      [rows, 1 + k k].

    Raises:
      ValueError: logits that are not [rows, classes], or ``top`` below 2.

    Example:
      >>> router_features(jnp.zeros((3, 20))).shape
      (3, 101)
    """
    check_number("top", top, low=2, integer=True)
    if jnp.ndim(logits) != 2:
        raise ValueError(f"logits have shape {jnp.shape(logits)}; [rows, classes] is needed.")
    logs = jax.nn.log_softmax(wide(logits))
    p = jnp.exp(logs)
    entropy = -jnp.sum(p * jnp.where(logs == -jnp.inf, 0.0, logs), axis=1, keepdims=True)
    best = jax.lax.top_k(p, min(top, p.shape[1]))[0]
    differences = best[:, :, None] - best[:, None, :]
    flat = differences.reshape(len(p), best.shape[1] ** 2)
    return jnp.concatenate([entropy, flat], axis=1)


class NormLayers(nn.Module):
    """Dense layers, each followed by a norm and ReLU.

    Args:
      widths: of the layers.
      norm: ``'layer'``, ``'batch'`` (statistics of the batch in training, running ones otherwise) or ``'none'``.
      dtype: compute dtype; None for that of inputs and parameters together.

    Returns:
      When called with x [rows, features]: [rows, widths[-1]].

    Example:
      >>> NormLayers((8, 4)).init_with_output(jax.random.key(0), jnp.zeros((2, 3)))[0].shape
      (2, 4)
    """

    widths: Sequence[int]
    norm: Literal["layer", "batch", "none"] = "layer"
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "rows features"], train: bool = False) -> jax.Array:
        check_choice("norm", self.norm, ("layer", "batch", "none"))
        for place, width in enumerate(self.widths):
            x = nn.Dense(width, dtype=self.dtype, name=f"dense{place}")(x)
            if self.norm == "layer":
                x = nn.LayerNorm(dtype=self.dtype, name=f"norm{place}")(x)
            elif self.norm == "batch":
                settings = {"momentum": 0.9, "epsilon": 1e-5, "dtype": self.dtype, "name": f"norm{place}"}
                x = nn.BatchNorm(use_running_average=not train, **settings)(x)
            x = nn.relu(x)
        return x


class Router(nn.Module):
    r"""A small network that says how much an input needs the expert.

    .. math:: \mathrm{need} = w^\top h(u), \qquad u = [\mathrm{router\_features}(\mathrm{logits}), t(\mathrm{features})]

    with h and t dense layers with norms and ReLU.

    Args:
      widths: layers of h. The paper's code has (classes, 64, classes).
      feature_widths: layers of t.
      norm: ``'layer'``, which is the same for a batch of one; ``'batch'`` as in the paper's code; or ``'none'``.
      outputs: 1 for the need; 2 for the logits of "the base is right" and "the expert is right".
      top: of ``router_features``, which are float32 whatever the dtype.
      dtype: compute dtype of the layers; None for that of features and parameters together.

    Returns:
      When called with ``logits`` [rows, classes] and ``features`` [rows, width] or None: need [rows], or [rows, 2] for
      two outputs; float32 at least.

    Example:
      >>> need, _ = Router().init_with_output(jax.random.key(0), jnp.zeros((2, 10)), jnp.zeros((2, 32)))
      >>> need.shape
      (2,)

    Kag, Fedorov, Gangrade, Whatmough, Saligrama, "Efficient Edge Inference by Selective Query", ICLR 2023. Theirs says
    "keep at the base", the opposite sign.
    """

    widths: Sequence[int] = (128, 64)
    feature_widths: Sequence[int] = (128, 64)
    norm: Literal["layer", "batch", "none"] = "layer"
    outputs: int = 1
    top: int = TOP
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self,
        logits: Float[Array | np.ndarray, "rows classes"],
        features: Float[Array | np.ndarray, "rows width"] | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        check_number("outputs", self.outputs, low=1, high=2, integer=True)
        seen = router_features(logits, top=self.top)
        if features is not None:
            further = NormLayers(self.feature_widths, self.norm, self.dtype, name="t")(wide(features), train)
            seen = jnp.concatenate([seen, further], axis=1)
        seen = NormLayers(self.widths, self.norm, self.dtype, name="h")(seen, train)
        found = wide(nn.Dense(self.outputs, dtype=self.dtype, name="head")(seen))
        return found[:, 0] if self.outputs == 1 else found


def router_need(router: nn.Module) -> Callable[[Any, jax.Array, jax.Array | None], jax.Array]:
    r"""The need of a trained router, as ``with_query`` takes it.

    Of two outputs (``Router(outputs=2)``) it is the gain

    .. math:: P(g = y \mid x) - P(b = y \mid x)

    above which, by a price per query, asking pays.

    Args:
      router: the module.

    Returns:
      ``(variables, logits, features) -> need [rows]``.

    Example:
      >>> router = Router(outputs=2)
      >>> variables = router.init(jax.random.key(0), jnp.zeros((1, 3)))
      >>> router_need(router)(variables, jnp.zeros((2, 3)), None).shape
      (2,)
    """

    def need(variables: Any, logits: Any, features: Any) -> jax.Array:
        found: Any = router.apply(variables, logits, features)
        return as_need(found)

    return need


def as_need(outputs: jax.Array) -> jax.Array:
    """One number for each row, of one output or two."""
    if outputs.ndim == 1:
        return outputs
    right = jax.nn.sigmoid(outputs)
    return right[:, 1] - right[:, 0]
