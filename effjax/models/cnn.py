"""A small convolutional classifier."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from effjax.core.tree import wide
from effjax.models.layers import Images, call, check_images, norm_layer

__all__ = ["CNN"]


class _Layer(nn.Module):
    channels: int
    norm: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(
            self.channels,
            (3, 3),
            strides=2,
            padding=1,
            use_bias=self.norm == "none",
            kernel_init=nn.initializers.he_normal(),
            dtype=self.dtype,
            name="conv",
        )(x)
        return nn.relu(norm_layer(self.norm, self.channels, train=train, dtype=self.dtype, name="norm")(x))


class CNN(nn.Module):
    """Plain convolutions for images of 28 to 32 pixels, quick on a CPU.

    ``h_i = relu(norm(conv3x3_stride2(h_{i-1})))``, ``logits = W mean_{height, width}(h_n) + b``.
    Strides halve the resolution, so that no map of the full resolution is ever computed.

    Args:
      channels: output channels of each convolution.
      classes: number of outputs.
      norm: ``"none"`` (convolutions have biases), ``"group"`` or ``"batch"``.
      dtype: compute dtype; parameters and statistics are float32.
      remat: recompute each layer in the backward pass.

    Returns:
      When called with ``x`` [batch, height, width, channels]: logits [batch, classes], float32 at
      least; with ``capture=True`` the pair (logits, {"layer0": ..., "pooled": ...}).

    Raises:
      ValueError: unknown ``norm``.
      TypeError: images of integers.

    Example:
      >>> model = CNN(channels=(8, 16))
      >>> (logits, out), _ = model.init_with_output(jax.random.key(0), jnp.zeros((2, 28, 28, 1)), capture=True)
      >>> logits.shape, out["layer1"].shape
      ((2, 10), (2, 7, 7, 16))
    """

    channels: tuple[int, ...] = (32, 64, 128)
    classes: int = 10
    norm: str = "none"
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: Images, *, train: bool = False, capture: bool = False
    ) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
        x = check_images(x).astype(self.dtype)
        out = {}
        for index, channels in enumerate(self.channels):
            layer = _Layer(channels, self.norm, self.dtype, name=f"layer{index}")
            out[f"layer{index}"] = x = call(layer, x, train, remat=self.remat)
        out["pooled"] = x = x.mean((1, 2))
        logits = wide(nn.Dense(self.classes, dtype=self.dtype, name="head")(x))
        return (logits, out) if capture else logits
