"""Global layer: a feature map that an advection-diffusion equation spreads (Kag, Saligrama, CVPR 2022)."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from effjax.core.depthwise import depthwise_conv
from effjax.core.errors import check_choice, check_number
from effjax.models.layers import ACTIVATIONS, Images, check_images
from effjax.vision.pde import PdeConfig, PdeMaps, held, pde_solve

__all__ = ["FieldMaps", "GlobalLayer", "global_layer"]

Map = Float[Array | np.ndarray, "*batch height width channels"]
Field = Callable[[Any], tuple[Any, Any]]
# (features, norm=, dtype=, name=) -> a module called as module(x, train) that returns two maps.
FieldFactory = Callable[..., nn.Module]
# (features, strides=, norm=, dtype=, name=) -> a module called as module(x, train).
BlockFactory = Callable[..., nn.Module]

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {**ACTIVATIONS, "tanh": jnp.tanh}
_KINDS = ("depthwise", "separable", "pointwise", "full", "identity")


def global_layer(
    x: Map,
    velocity: Field,
    diffusivity: Field | tuple[float, float] = (1.0, 1.0),
    init: Callable[[Any], Any] | None = None,
    config: PdeConfig | None = None,
    *,
    source: bool = True,
    previous: Literal["source", "init"] = "source",
    velocity_input: Literal["init", "source"] = "init",
    finish: Callable[[Any], Any] | None = None,
    residual: bool = False,
) -> jax.Array:
    r"""What ``K`` steps of an equation make of a feature map, whose velocities are computed from the map itself.

    .. math::
        \frac{\partial h}{\partial t} = D \Delta h + \mathrm{div}(v h) + f, \qquad
        h^0 = \mathrm{init}(x), \quad f = x, \quad v = \mathrm{velocity}(h^0), \quad D = \mathrm{diffusivity}(h^0)

    and the result is ``finish(h^K)``. Channels do not mix in the equation. One step is a cross of five points whose
    weights depend on the input and the place; K steps reach a diamond of radius K.

    The parts are functions, so that modules of any library serve; ``GlobalLayer`` is the Linen form.

    Args:
      x: ``[..., height, width, channels]``.
      velocity: from a map to two maps, along the rows and along the columns.
      diffusivity: the same, with values that are not negative; or two numbers.
      init: the first map; None takes x. Where it changes the shape, its output is the source too.
      config: a ``PdeConfig``; None for its defaults. With ``K=0`` neither velocity nor diffusivity is called.
      source: whether f is added all the time.
      previous: the map one step before the first, f or the first map; the implicit scheme has none.
      velocity_input: what ``velocity`` is given, the first map or f.
      finish: of the last map, such as normalisation and activation; None for nothing.
      residual: whether f is added at the end.

    Returns:
      A map of the shape of the first map.

    Raises:
      ValueError: an unknown choice, ``previous="init"`` for the implicit scheme, or what ``pde_solve`` refuses.

    Example:
      >>> x = jnp.ones((2, 8, 8, 3))
      >>> y = global_layer(x, lambda h: (jnp.tanh(h), jnp.tanh(-h)), config=PdeConfig(K=5))
      >>> y.shape
      (2, 8, 8, 3)

    Reference: Kag, Saligrama, "Condensing CNNs with Partial Differential Equations", CVPR 2022, read from the authors'
    code and poster. Reflecting borders, the implicit scheme and the bound on velocities are ours.
    """
    config = config or PdeConfig()
    check_choice("previous", previous, ("source", "init"))
    check_choice("velocity_input", velocity_input, ("init", "source"))
    if config.scheme == "implicit" and previous == "init":
        raise ValueError("previous='init' would do nothing with scheme='implicit', which has no map one step before.")
    h = x if init is None else init(x)
    f = x if jnp.shape(h) == jnp.shape(x) else h
    if config.K:
        u, v = velocity(f if velocity_input == "source" else h)
        Dx, Dy = diffusivity(h) if callable(diffusivity) else diffusivity
        before = None if previous == "init" or config.scheme == "implicit" else f
        out = pde_solve(PdeMaps(u, v, Dx, Dy), h, before, f if source else None, config)
    else:
        out = h
    out = out if finish is None else finish(out)
    return jnp.asarray(out + f if residual else out)


class FieldMaps(nn.Module):
    """Two maps from one, along the rows and along the columns: velocities, or diffusivities.

    ``a = act(norm_a(conv_a(g)))``, ``b = act(norm_b(conv_b(g)))``; with ``dot`` both are
    ``act(norm_a(conv_a(g)) * act(norm_b(conv_b(g))))``.

    Args:
      features: channels, those of g.
      conv: ``"depthwise"``, ``"separable"`` (depthwise, then 1x1), ``"pointwise"``, ``"full"``, ``"identity"``; or a
        block's factory ``(features, norm=, dtype=, name=) -> module``, called as ``module(g, train)``.
      kernel: size of the depthwise and of the full convolution, odd.
      use_bias: of the convolutions.
      dot: whether the two maps are multiplied and equal.
      epsilon: of the norms; ``"channels"`` is the number of channels. The authors' CIFAR networks have it, by what
        looks like an oversight; it keeps the maps small, so that the layer starts near ``h + 2 dt f``.
      activation: ``"relu"``, ``"relu6"``, ``"hard_swish"``, ``"silu"``; or ``"tanh"``, for velocities that have a sign.
      impl: of depthwise convolutions, as for ``effjax.core.depthwise.depthwise_conv``.
      norm: ``"batch"``, ``"batch-1e-3"``, ``"group"`` or ``"none"``.
      dtype: compute dtype; parameters and statistics are float32.

    Returns:
      When called as ``maps(g, train)`` with g [batch, height, width, channels]: two arrays like g.

    Raises:
      ValueError: an unknown choice, or an even kernel.

    Example:
      >>> g = jnp.ones((1, 4, 4, 6))
      >>> (u, v), variables = jax.eval_shape(FieldMaps(6).init_with_output, jax.random.key(0), g)
      >>> u.shape, variables["params"]["conv_a"]["kernel"].shape
      ((1, 4, 4, 6), (3, 3, 1, 6))

    Source: Kag, Saligrama 2022, CVPR (pp. 610-619).
    """

    features: int
    conv: str | BlockFactory = "depthwise"
    kernel: int = 3
    use_bias: bool = False
    dot: bool = False
    epsilon: float | str = "channels"
    activation: str = "relu"
    impl: str = "auto"
    norm: str = "batch"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, g: Images, train: bool = False) -> tuple[jax.Array, jax.Array]:
        act = _activation(self.activation)
        if isinstance(self.epsilon, str):
            check_choice("epsilon", self.epsilon, ("channels",))
            epsilon = float(self.features)
        else:
            epsilon = check_number("epsilon", self.epsilon, low=0, open_low=True)
        normed = functools.partial(_norm, self.norm, self.features, epsilon=epsilon, train=train, dtype=self.dtype)
        a, b = (normed(name=f"norm_{one}")(self._conv(g, train, f"conv_{one}")) for one in "ab")
        if self.dot:
            a = b = act(a * act(b))
            return a, b
        return act(a), act(b)

    def _conv(self, g: Any, train: bool, name: str) -> jax.Array:
        if not isinstance(self.conv, str):
            return self.conv(self.features, norm=self.norm, dtype=self.dtype, name=name)(g, train)
        check_choice("conv", self.conv, _KINDS)
        if self.conv == "identity":
            return jnp.asarray(g).astype(self.dtype)
        made = (self.features, self.conv, self.kernel, self.use_bias, self.impl, self.dtype)
        return _MapConv(*made, name=name)(g)


class _MapConv(nn.Module):
    """The convolution of one map, drawn as in the authors' code: N(0, 2 / (channels k k)), depthwise too."""

    features: int
    kind: str
    kernel: int
    use_bias: bool
    impl: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, g: Images) -> jax.Array:
        if check_number("kernel", self.kernel, low=1, integer=True) % 2 == 0:
            raise ValueError(f"kernel={self.kernel} has no middle. Give an odd one.")
        y = jnp.asarray(g).astype(self.dtype)
        if self.kind in ("depthwise", "separable"):
            weight = self._weight("kernel", self.kernel, 1, y.shape[-1])
            y = held(depthwise_conv(held(y), weight, padding=self.kernel // 2, impl=self.impl))
        if self.kind in ("separable", "pointwise"):
            y = y @ self._weight("pointwise", 1, y.shape[-1], self.features)[0, 0]
        if self.kind == "full":
            weight = self._weight("kernel", self.kernel, y.shape[-1], self.features)
            numbers = ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(y, weight, (1, 1), "SAME", dimension_numbers=numbers)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
            y = y + bias[None, None, None, :]
        return y

    def _weight(self, name: str, size: int, inputs: int, outputs: int) -> jax.Array:
        draw = nn.initializers.normal(math.sqrt(2 / (outputs * size * size)))
        return self.param(name, draw, (size, size, inputs, outputs)).astype(self.dtype)


class GlobalLayer(nn.Module):
    """Global layer as a block of a network; the equations are those of ``global_layer``.

    ``act(norm(h^K))``, and with ``residual`` plus the source. It takes the place of blocks that only widen the view:
    ``ResNet(stages=((block, GlobalLayer), ...))``.

    Args:
      features: channels.
      strides: of ``init_fn``; 1 without it.
      norm: ``"batch"``, ``"batch-1e-3"``, ``"group"`` or ``"none"``; handed on.
      dtype: compute dtype; parameters and statistics are float32. More than three steps are solved in float32.
      init_fn: factory of the block that makes the first map, ``(features, strides=, norm=, dtype=, name=) -> module``
        called as ``module(x, train)``; None for the input itself.
      velocity: factory ``(features, norm=, dtype=, name=) -> module``, called as ``module(g, train)``, which returns
        two maps; ``functools.partial(FieldMaps, activation="tanh")`` is one.
      diffusivity: the same, with maps that are not negative; or two numbers.
      pde: how the equation is solved. With ``K=0`` there are no maps: ``act(norm(init(x)))``.
      source: as in ``global_layer``.
      previous: as in ``global_layer``.
      velocity_input: as in ``global_layer``.
      activation: after the last norm; as for ``FieldMaps``.
      residual: as in ``global_layer``.

    Returns:
      When called as ``layer(x, train)`` with x [batch, height, width, channels]: a map of ``features`` channels.

    Raises:
      ValueError: features or strides that ``init_fn`` would have to change and is not there to, an unknown choice, or
        what ``pde_solve`` refuses.
      TypeError: images of integers.

    Example:
      >>> layer = GlobalLayer(8, pde=PdeConfig(K=2))
      >>> y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((2, 6, 6, 8)))
      >>> y.shape, sorted(variables["params"])
      ((2, 6, 6, 8), ['diffusivity', 'norm_out', 'velocity'])

    Reference: as for ``global_layer``.
    """

    features: int
    strides: int = 1
    norm: str = "batch"
    dtype: DTypeLike = jnp.float32
    init_fn: BlockFactory | None = None
    velocity: FieldFactory = FieldMaps
    diffusivity: FieldFactory | tuple[float, float] = FieldMaps
    pde: PdeConfig = PdeConfig()
    source: bool = True
    previous: Literal["source", "init"] = "source"
    velocity_input: Literal["init", "source"] = "init"
    activation: str = "relu"
    residual: bool = False

    @nn.compact
    def __call__(self, x: Images, train: bool = False) -> jax.Array:
        made = {"norm": self.norm, "dtype": self.dtype}
        x = check_images(x).astype(self.dtype)
        init = None
        if self.init_fn is not None:
            block = self.init_fn(self.features, strides=self.strides, **made, name="init_fn")
            init = lambda x: block(x, train)
        elif self.strides != 1 or self.features != x.shape[-1]:
            raise ValueError(
                f"features={self.features} and strides={self.strides} change the input of shape {x.shape}: without "
                "init_fn the layer keeps it. Give a block as init_fn, or the input's channels and strides=1."
            )
        given = self.diffusivity
        if not isinstance(given, tuple):
            factory, given = given, lambda h: factory(self.features, **made, name="diffusivity")(h, train)
        norm = _norm(self.norm, self.features, epsilon=None, train=train, dtype=self.dtype, name="norm_out")
        return global_layer(
            x,
            lambda g: self.velocity(self.features, **made, name="velocity")(g, train),
            given,
            init,
            self.pde,
            source=self.source,
            previous=self.previous,
            velocity_input=self.velocity_input,
            finish=lambda h: _activation(self.activation)(norm(h)),
            residual=self.residual,
        )


def _activation(name: str) -> Callable[[jax.Array], jax.Array]:
    return _ACTIVATIONS[check_choice("activation", name, _ACTIVATIONS)]


def _norm(
    kind: str, channels: int, *, epsilon: float | None, train: bool, dtype: DTypeLike, name: str
) -> Callable[[Any], jax.Array]:
    """As ``norm_layer``, with an epsilon of its own; None for the kind's."""
    check_choice("norm", kind, ("batch", "batch-1e-3", "group", "none"))
    if kind == "none":
        return lambda x: x
    if epsilon is None:
        epsilon = 1e-3 if kind == "batch-1e-3" else 1e-5
    if kind == "group":
        return nn.GroupNorm(num_groups=math.gcd(channels, 8), epsilon=epsilon, dtype=dtype, name=name)
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=epsilon, dtype=dtype, name=name)
