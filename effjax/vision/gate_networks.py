"""Networks that decide which layers and channels of an image are worth running."""

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from effjax.core.errors import check_choice, check_number, check_shape
from effjax.core.tree import wide
from effjax.models.layers import Images, norm_layer
from effjax.vision.gates import Gate, Kind, gate_of, gumbel_gate, relu1_gate, ste_gate, takes_noise

__all__ = ["AIGGate", "ConstantGate", "GivenGate", "PolicyNet", "SalienceGate", "SkipNetGate", "given_gates"]

_he = nn.initializers.variance_scaling(0.02, "fan_in", "normal")  # a tenth of He's deviation
_OPEN = {"relu1": 1.0, "ste": 2.0, "gumbel": 2.0, "hard_concrete": 2.0}
NOISE = "dropout"
"""The stream of random numbers that gates draw from: the one that every trainer feeds."""


class SalienceGate(nn.Module):
    r"""L-Net (one output) and C-Net (one for each group of channels): mean over the image, one dense layer, a gate.

    .. math:: s = \phi(\mathrm{GAP}(x)\, W + b)

    Args:
      outputs: number of gates.
      kind: phi: ``"relu1"``, ``"ste"``, ``"gumbel"`` or ``"hard_concrete"``.
      scale: ``"none"``; ``"abs"`` multiplies an open gate by ``clip(|z|, 0, 1)``; ``"head"`` by the sigmoid of a second
        dense layer. Not for relu1 and hard-concrete gates, whose values are scales already.
      threshold: of relu1.
      bias: b at the start; None for an open gate: 1 for relu1, 2 for logits.

    Returns:
      When called as ``gate(x, train)`` with x [rows, height, width, channels]: a ``Gate`` [rows, outputs], float32
      whatever the dtype of x, so that no gate flips by rounding.

    Raises:
      ValueError: an unknown kind or scale, or settings that do not fit.

    Example:
      >>> variables = {"params": {"dense": {"kernel": jnp.ones((1, 1)), "bias": jnp.array([-1.0])}}}
      >>> images = jnp.array([0.5, 2.0]).reshape(2, 1, 1, 1)
      >>> SalienceGate().apply(variables, images, False).open.ravel().tolist()
      [0.0, 1.0]
    """

    outputs: int = 1
    kind: Kind = "ste"
    scale: Literal["none", "abs", "head"] = "none"
    threshold: float = 0.0
    bias: float | None = None

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Gate:
        check_choice("scale", self.scale, ("none", "abs", "head"))
        gate = gate_of(self.kind, threshold=self.threshold)
        if self.scale != "none" and self.kind in ("relu1", "hard_concrete"):
            raise ValueError(f"scale={self.scale!r} with kind={self.kind!r}, whose values are scales. Leave it out.")
        pooled = wide(x).mean((1, 2))
        bias = _OPEN[self.kind] if self.bias is None else self.bias
        logits = self._dense("dense", bias, pooled.dtype)(pooled)
        noise = None
        if train and takes_noise(self.kind):
            noise = jax.random.logistic(self.make_rng(NOISE), logits.shape, logits.dtype)
        found = gate(logits, noise)
        if self.scale == "none":
            return found
        scale = jnp.clip(jnp.abs(logits), 0.0, 1.0)
        if self.scale == "head":
            scale = jax.nn.sigmoid(self._dense("scale", 2.0, pooled.dtype)(pooled))
        return found._replace(value=found.value * scale)

    def _dense(self, name: str, bias: float, dtype: Any) -> nn.Dense:
        start = nn.initializers.constant(bias)
        return nn.Dense(self.outputs, kernel_init=_he, bias_init=start, dtype=dtype, name=name)

    def macs(self, height: int, width: int, channels: int) -> float:
        """Multiply-accumulates for one example."""
        return float(channels * self.outputs * (2 if self.scale == "head" else 1))


class AIGGate(nn.Module):
    r"""The gate of ConvNet-AIG: mean, 16 units with BatchNorm and ReLU, two logits, Gumbel-softmax straight-through.

    Args:
      outputs: number of gates.
      hidden: units.
      noise_at_test: draw noise at test time too, as the authors' program does; needs a key then.

    Returns:
      When called as ``gate(x, train)``: a ``Gate`` [rows, outputs].

    Example:
      >>> make = lambda x: AIGGate(3).init_with_output(jax.random.key(0), x, False)[0]
      >>> jax.eval_shape(make, jnp.ones((2, 4, 4, 8))).open.shape
      (2, 3)

    Veit and Belongie 2018 (arXiv:1711.11503): open in about 85 % of the draws at the start.
    """

    outputs: int = 1
    hidden: int = 16
    noise_at_test: bool = False

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Gate:
        pooled = wide(x).mean((1, 2))
        h = nn.Dense(self.hidden, kernel_init=nn.initializers.he_normal(), dtype=pooled.dtype, name="fc1")(pooled)
        h = norm_layer("batch", self.hidden, train=train, dtype=pooled.dtype, name="norm")(h)
        start = lambda key, shape, dtype=jnp.float32: jnp.tile(jnp.array([0.1, 2.0], dtype), shape[0] // 2)
        small = nn.initializers.normal(1e-3)
        two = nn.Dense(2 * self.outputs, kernel_init=small, bias_init=start, dtype=pooled.dtype, name="fc2")(nn.relu(h))
        two = two.reshape(*two.shape[:-1], self.outputs, 2)
        logits = two[..., 1] - two[..., 0]
        draw = (train or self.noise_at_test) and not self.is_initializing()
        noise = jax.random.logistic(self.make_rng(NOISE), logits.shape, logits.dtype) if draw else None
        return gumbel_gate(logits, noise)

    def macs(self, height: int, width: int, channels: int) -> float:
        """Multiply-accumulates for one example."""
        return float(channels * self.hidden + self.hidden * 2 * self.outputs)


class SkipNetGate(nn.Module):
    r"""The feed-forward gates of SkipNet: small convolutions, mean, two logits; hard, straight-through softmax.

    Form I: max-pool 2, 3x3 convolution, norm, ReLU, 3x3 convolution of stride 2, norm, ReLU. Form II: one 3x3
    convolution of stride 2, norm, ReLU.

    Args:
      outputs: number of gates.
      form: ``"I"`` or ``"II"``.

    Returns:
      When called as ``gate(x, train)``: a ``Gate`` [rows, outputs].

    Raises:
      ValueError: an unknown form.

    Example:
      >>> make = lambda x: SkipNetGate(form="II").init_with_output(jax.random.key(0), x, False)[0]
      >>> jax.eval_shape(make, jnp.ones((2, 8, 8, 4))).value.shape
      (2, 1)

    Wang, Yu, Dou, Darrell, Gonzalez 2018 (arXiv:1711.09485).
    """

    outputs: int = 1
    form: Literal["I", "II"] = "I"

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Gate:
        check_choice("form", self.form, ("I", "II"))
        h, channels = wide(x), x.shape[-1]
        if self.form == "I" and min(h.shape[1:3]) >= 2:
            h = nn.max_pool(h, (2, 2), (2, 2))
        for place, strides in enumerate((1, 2) if self.form == "I" else (2,), start=1):
            h = nn.Conv(channels, (3, 3), strides, padding=1, use_bias=False, dtype=h.dtype, name=f"conv{place}")(h)
            h = nn.relu(norm_layer("batch", channels, train=train, dtype=h.dtype, name=f"norm{place}")(h))
        start = lambda key, shape, dtype=jnp.float32: jnp.tile(jnp.array([0.0, 2.0], dtype), shape[0] // 2)
        small = nn.initializers.normal(1e-2)
        dense = nn.Dense(2 * self.outputs, kernel_init=small, bias_init=start, dtype=h.dtype, name="linear")
        two = dense(h.mean((1, 2))).reshape(-1, self.outputs, 2)
        return ste_gate(two[..., 1] - two[..., 0])

    def macs(self, height: int, width: int, channels: int) -> float:
        """Multiply-accumulates for one example."""
        half = lambda length: max(1, -(-length // 2))
        if self.form == "I":
            height, width = max(1, height // 2), max(1, width // 2)
        convs = half(height) * half(width) + (height * width if self.form == "I" else 0)
        return float(9 * channels * channels * convs + channels * 2 * self.outputs)


class ConstantGate(nn.Module):
    """The same gates for every image: a static network of fewer layers, or all of them for a comparison bit for bit.

    Args:
      outputs: number of gates.
      value: of all of them, from 0 to 1.

    Returns:
      When called as ``gate(x, train)``: a ``Gate`` [rows, outputs].

    Example:
      >>> ConstantGate(value=0.0).apply({}, jnp.ones((2, 4, 4, 3)), False).open.ravel().tolist()
      [0.0, 0.0]
    """

    outputs: int = 1
    value: float = 1.0

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Gate:
        check_number("value", self.value, low=0, high=1)
        return relu1_gate(jnp.full((x.shape[0], self.outputs), self.value, jnp.float32))

    def macs(self, height: int, width: int, channels: int) -> float:
        """Multiply-accumulates for one example."""
        return 0.0


class GivenGate(nn.Module):
    """Gates that were decided outside the network: by a one-shot policy, at random, or by hand.

    They are read from the collection ``"given"`` of the variables (see ``given_gates``), and open where it is absent.

    Args:
      outputs: number of gates.

    Returns:
      When called as ``gate(x, train)``: a ``Gate`` [rows, outputs] whose value is what was given, and whose ``open``
      has its gradient.

    Raises:
      ValueError: gates for another number of rows.

    Example:
      >>> variables = {"given": {"value": jnp.array([0.0, 1.0])}}
      >>> GivenGate().apply(variables, jnp.ones((2, 4, 4, 3)), False).open.ravel().tolist()
      [0.0, 1.0]
    """

    outputs: int = 1

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Gate:
        shape = (x.shape[0], self.outputs)
        if not self.has_variable("given", "value"):
            return relu1_gate(jnp.ones(shape, jnp.float32))
        value = wide(self.get_variable("given", "value")).reshape(-1, self.outputs)
        check_shape("given gates", value, shape, "One for each row.")
        hard = jax.lax.stop_gradient((value > 0).astype(value.dtype) - value)
        return Gate(value, value + hard)

    def macs(self, height: int, width: int, channels: int) -> float:
        """Multiply-accumulates for one example."""
        return 0.0


def given_gates(gates: Float[Array | np.ndarray, "rows blocks"], names: Sequence[str]) -> dict[str, Any]:
    """The collection ``"given"`` of a network whose blocks have a ``GivenGate`` as layer gate.

    Args:
      gates: of every block.
      names: of the blocks in the network, such as ``"stage1_block0"``.

    Returns:
      A tree for ``module.apply({**variables, "given": ...}, x)``.

    Raises:
      ValueError: another number of names.

    Example:
      >>> given_gates(jnp.array([[0.0, 1.0]]), ["a", "b"])["b"]["layer_gate"]["value"].tolist()
      [1.0]
    """
    if gates.shape[1] != len(names):
        raise ValueError(f"gates have {gates.shape[1]} columns for {len(names)} blocks: give one for each.")
    return {name: {"layer_gate": {"value": gates[:, place]}} for place, name in enumerate(names)}


class PolicyNet(nn.Module):
    r"""A one-shot policy: sees the image once and decides about every block, as in BlockDrop.

    Three 3x3 convolutions of stride 2 with GroupNorm and ReLU, the mean, a dense layer of one logit for each block.

    Args:
      blocks: number of blocks.
      width: channels of the first convolution; doubled twice.
      bias: of the logits at the start.

    Returns:
      When called as ``policy(x)``: logits [rows, blocks], float32.

    Example:
      >>> make = lambda x: PolicyNet(9).init_with_output(jax.random.key(0), x)[0]
      >>> jax.eval_shape(make, jnp.ones((2, 32, 32, 3))).shape
      (2, 9)
    """

    blocks: int
    width: int = 8
    bias: float = 2.0

    @nn.compact
    def __call__(self, x: Images) -> Float[Array, "rows blocks"]:
        h = wide(x)
        for place in range(3):
            features = self.width * 2**place
            h = nn.Conv(features, (3, 3), 2, padding=1, dtype=jnp.float32, name=f"conv{place + 1}")(h)
            h = nn.relu(norm_layer("group", features, train=False, dtype=jnp.float32, name=f"norm{place + 1}")(h))
        start = nn.initializers.constant(self.bias)
        return nn.Dense(self.blocks, kernel_init=_he, bias_init=start, dtype=jnp.float32, name="dense")(h.mean((1, 2)))
