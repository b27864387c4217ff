"""Residual blocks of image networks with gates on the layer and on its channels, run by any executor."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from effjax.core.errors import check_choice, check_number
from effjax.models.layers import Images
from effjax.models.residual_blocks import ResidualBase, pad_shortcut
from effjax.vision.gate_networks import SalienceGate
from effjax.vision.gated_executors import Executor, ResidualBlock, run_block
from effjax.vision.gates import Gate
from effjax.vision.mac_target import BlockGates, BlockMacs

__all__ = ["GatedBasicBlock", "GatedBottleneck", "recorded_gates"]

# (outputs, name=) -> a module called as module(x, train) that returns a Gate [rows, outputs].
GateFactory = Callable[..., Any]

_COLLECTION, _NAME = "intermediates", "gates"


class _GatedBlock(ResidualBase):
    """What the two blocks share: gates, shortcut, and the executor around the branch."""

    shortcut: str = "pad"
    layer: GateFactory | None = SalienceGate
    channel: GateFactory | None = None
    group: int = 1
    executor: Executor | str = "masked"

    def _channels(self) -> int:
        raise NotImplementedError

    def _branch(self, x: jax.Array, scale: jax.Array | None, train: bool) -> jax.Array:
        raise NotImplementedError

    def _macs(self, height: int, width: int, channels: int) -> tuple[float, float]:
        raise NotImplementedError

    @nn.compact
    def __call__(self, x: Images, train: bool, scale: jax.Array | None = None, only_branch: bool = False) -> jax.Array:
        check_choice("shortcut", self.shortcut, ("pad", "project"))
        x = jnp.asarray(x)
        if only_branch:
            return self._branch(x, scale, train)
        channels = self._channels()
        check_number("group", self.group, low=1, integer=True)
        if channels % self.group:
            raise ValueError(f"group={self.group} does not divide the {channels} gated channels. Use a divisor.")
        layer, channel, cost = None, None, 0.0
        if self.layer is not None:
            gate = self.layer(1, name="layer_gate")
            layer = Gate(*(part[:, 0] for part in gate(x, train)))
            cost += gate.macs(*x.shape[1:])
        if self.channel is not None:
            gate = self.channel(channels // self.group, name="channel_gate")
            channel = gate(x, train)
            cost += gate.macs(*x.shape[1:])
            scale = jnp.repeat(channel.value, self.group, axis=-1)
        beside = self._shortcut(x, train)
        once, each = self._macs(*x.shape[1:])
        sides = beside.shape[1] * beside.shape[2]
        projected = self.shortcut == "project" and beside is not x
        always = float(sides * x.shape[-1] * beside.shape[-1]) if projected else 0.0
        macs = BlockMacs(once, each, channels, always, cost)
        if layer is not None or channel is not None:
            self.sow(_COLLECTION, _NAME, BlockGates(layer, channel, macs))
        how = self.executor if isinstance(self.executor, Executor) else Executor(self.executor)
        if layer is None or how.name == "masked" or train or self.is_initializing():
            u = self._branch(x, scale, train)
            if layer is not None:
                u = layer.value.astype(u.dtype)[:, None, None, None] * u
            return nn.relu(beside + u)
        return self._executed(how, x, beside, scale, layer)

    def _executed(
        self, how: Executor, x: jax.Array, beside: jax.Array, scale: jax.Array | None, layer: Gate
    ) -> jax.Array:
        """The block in evaluation, its branch a function of this module's variables."""
        alone = self.clone(parent=None, name=None)
        inputs = {"x": x} | ({} if scale is None else {"scale": scale})
        block = ResidualBlock(
            lambda variables, rows: alone.apply(variables, rows["x"], False, rows.get("scale"), only_branch=True),
            shortcut=lambda variables, rows: beside,
            activation=nn.relu,
        )
        return run_block(block, self.variables, inputs, layer.value, executor=how)[0]

    def _shortcut(self, x: jax.Array, train: bool) -> jax.Array:
        if self.strides == 1 and x.shape[-1] == self.features:
            return x
        return pad_shortcut(x, self.features, self.strides) if self.shortcut == "pad" else self.projected(x, train)


class GatedBasicBlock(_GatedBlock):
    r"""Two 3x3 convolutions with an L-Net, a C-Net or both (LC-Net).

    .. math:: y = \mathrm{relu}(\mathrm{shortcut}(x) + s_L\, N_2(C_2(s_C \odot \mathrm{relu}(N_1(C_1 x)))))

    A drop-in for the ``block`` of ``effjax.models.ResNet``, with the parameters of its basic block beside those of the
    gates, so that trained weights load.

    Args:
      features: output channels.
      strides: of the first convolution and of the shortcut.
      norm: ``"batch"``, ``"group"`` or ``"none"``.
      shortcut: where the shape changes, ``"pad"`` or ``"project"``; never skipped.
      dtype: compute dtype; gates are float32.
      layer: L-Net, a factory ``(outputs, name=) -> module`` such as ``SalienceGate`` or ``AIGGate``; None for none.
      channel: C-Net, a factory of the same kind; None for none.
      group: channels that share a gate; accelerators gain from 128 and more.
      executor: how it runs in evaluation, an ``Executor`` or its name; in training everything is run and masked.

    Returns:
      When called as ``block(x, train)`` with x [rows, height, width, channels]: the output. The gates are sown; see
      ``recorded_gates``.

    Raises:
      ValueError: settings that do not fit.

    Example:
      >>> block = GatedBasicBlock(8, channel=SalienceGate, executor="ladder")
      >>> variables = jax.eval_shape(lambda x: block.init(jax.random.key(0), x, False), jnp.ones((2, 8, 8, 8)))
      >>> sorted(variables["params"])
      ['channel_gate', 'conv1', 'conv2', 'layer_gate', 'norm1', 'norm2']

    Xia, Yin, Dai, Jha 2020 (arXiv:2007.15151), reconstructed: its text could not be had, and the form is that of a
    public re-implementation. In training BatchNorm mixes examples, so that gates of one affect the others.
    """

    def _channels(self) -> int:
        return self.features

    def _branch(self, x: jax.Array, scale: jax.Array | None, train: bool) -> jax.Array:
        h = self.conv(self.features, 3, self.strides, "conv1")(x)
        h = _scaled(nn.relu(self.normed(self.features, train, "norm1")(h)), scale)
        return self.normed(self.features, train, "norm2")(self.conv(self.features, 3, 1, "conv2")(h))

    def _macs(self, height: int, width: int, channels: int) -> tuple[float, float]:
        places = -(-height // self.strides) * -(-width // self.strides)
        return 0.0, 9.0 * places * (channels + self.features)


class GatedBottleneck(_GatedBlock):
    r"""1x1, 3x3 and 1x1 convolutions with an L-Net, a C-Net or both; the C-Net is on the 3x3 convolution's channels.

    .. math:: y = \mathrm{relu}(\mathrm{shortcut}(x) + s_L\, N_3(C_3(s_C \odot \mathrm{relu}(N_2(C_2\,
       \mathrm{relu}(N_1(C_1 x)))))))

    Args:
      features: output channels.
      strides: of the 3x3 convolution and of the shortcut.
      norm: as in ``GatedBasicBlock``.
      shortcut: as in ``GatedBasicBlock``.
      dtype: as in ``GatedBasicBlock``.
      layer: as in ``GatedBasicBlock``.
      channel: as in ``GatedBasicBlock``.
      group: as in ``GatedBasicBlock``.
      executor: as in ``GatedBasicBlock``.
      expansion: ``features`` over the channels of the 3x3 convolution.

    Returns:
      When called as ``block(x, train)``: the output.

    Raises:
      ValueError: settings that do not fit.

    Example:
      >>> make = lambda x: GatedBottleneck(16).init_with_output(jax.random.key(0), x, False)[0]
      >>> jax.eval_shape(make, jnp.ones((2, 8, 8, 8))).shape
      (2, 8, 8, 16)
    """

    shortcut: str = "project"
    expansion: int = 4

    def _channels(self) -> int:
        inner, rest = divmod(self.features, self.expansion)
        if rest or not inner:
            raise ValueError(f"features={self.features} must be a multiple of expansion={self.expansion}.")
        return inner

    def _branch(self, x: jax.Array, scale: jax.Array | None, train: bool) -> jax.Array:
        inner = self._channels()
        h = nn.relu(self.normed(inner, train, "norm1")(self.conv(inner, 1, 1, "conv1")(x)))
        h = self.conv(inner, 3, self.strides, "conv2")(h)
        h = _scaled(nn.relu(self.normed(inner, train, "norm2")(h)), scale)
        return self.normed(self.features, train, "norm3")(self.conv(self.features, 1, 1, "conv3")(h))

    def _macs(self, height: int, width: int, channels: int) -> tuple[float, float]:
        inner, places = self._channels(), -(-height // self.strides) * -(-width // self.strides)
        return float(height * width * channels * inner), float(places * (9 * inner + self.features))


def recorded_gates(variables: Mapping[str, Any]) -> list[BlockGates]:
    """The gates that the blocks of a network recorded, in the order of their names.

    Args:
      variables: the collections that ``module.apply(..., mutable=["intermediates"])`` returned.

    Returns:
      ``BlockGates`` of every block that has a gate, ``stage2_block10`` after ``stage2_block9``.

    Raises:
      ValueError: no gates were recorded.

    Example:
      >>> def run(x):
      ...     block = GatedBasicBlock(4)
      ...     variables = block.init(jax.random.key(0), x, False)
      ...     return recorded_gates(block.apply(variables, x, False, mutable=["intermediates"])[1])
      >>> [gates.layer.open.shape for gates in jax.eval_shape(run, jnp.ones((2, 4, 4, 4)))]
      [(2,)]
    """
    found = list(_walk(variables.get(_COLLECTION, {})))
    if not found:
        raise ValueError(
            f"variables hold {sorted(variables)} and no recorded gates: call apply with mutable=['intermediates'] on a "
            "network with gated blocks."
        )
    return found


def _walk(tree: Any) -> Sequence[BlockGates]:
    if not isinstance(tree, Mapping | FrozenDict):
        return []
    own = list(tree[_NAME]) if isinstance(tree.get(_NAME), tuple) else []
    names = sorted((name for name in tree if name != _NAME), key=_natural)
    return [*own, *itertools.chain.from_iterable(_walk(tree[name]) for name in names)]


@functools.cache
def _natural(name: str) -> tuple[Any, ...]:
    parts = ["".join(group) for _, group in itertools.groupby(name, str.isdigit)]
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts)


def _scaled(h: jax.Array, scale: jax.Array | None) -> jax.Array:
    return h if scale is None else scale.astype(h.dtype)[:, None, None, :] * h
