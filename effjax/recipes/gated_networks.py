"""Residual networks for the study of dynamic inference: made by name and counted, and the controls of equal work."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.errors import near
from effjax.core.macs import count_macs
from effjax.core.tree import wide
from effjax.data.sets import load
from effjax.models.resnet import SIZES, ResNet, pretrained_resnet
from effjax.tasks.image import image_task, unit_images
from effjax.tasks.task import Task
from effjax.vision.gate_networks import ConstantGate
from effjax.vision.gated_blocks import GatedBasicBlock, recorded_gates
from effjax.vision.mac_target import (
    BlockMacs,
)
from effjax.vision.skip_estimate import break_even

PyTree = Any
PRETRAINED = "pretrained-"
EVAL_BATCH = 250


class Loaded(NamedTuple):
    """What the arms of a group share.

    Attributes:
      task: with the network without gates.
      make: fields of ``GatedBasicBlock`` to the network.
      names: of its blocks.
      macs: of each block, without gates.
      shapes: of each block's input, [height, width, channels].
      gated: places of the blocks that may have a layer gate: all but the first of every stage, which change the shape.
      static: multiply-adds of the network without gates.
      start: trained variables; None for fresh ones.
    """

    task: Task
    make: Callable[..., ResNet]
    names: tuple[str, ...]
    macs: tuple[BlockMacs, ...]
    shapes: tuple[tuple[int, int, int], ...]
    gated: tuple[int, ...]
    static: float
    start: Mapping[str, PyTree] | None

    @property
    def branches(self) -> np.ndarray:
        """Multiply-adds that every block with a layer gate can save."""
        return np.array(
            [self.macs[place].once + self.macs[place].channel * self.macs[place].channels for place in self.gated]
        )


# The network


def load_network(config: Any, name: str) -> Loaded:
    """Data and network of a task such as ``cifar10/pretrained-resnet20`` or ``fashion_mnist/resnet-8-16``."""
    data, _, model = name.partition("/")
    data, model = config.data(data, "image"), config.model(model)
    data = load(data) if isinstance(data, str) else data
    stages, widths = _sizes(config, model)
    fields = {"classes": len(data.classes), "dtype": jnp.dtype(config.train.dtype), "remat": config.train.remat}
    make = functools.partial(_network, stages, widths, fields)
    rows = {"train_rows": config.train_rows, "test_rows": config.test_rows, "eval_batch": EVAL_BATCH}
    task = image_task(data, make(layer=None), **rows)._replace(name=f"{data.name}/{model}")
    start = pretrained_resnet(model.removeprefix(PRETRAINED))[1] if model.startswith(PRETRAINED) else None
    if start is not None and (len(data.classes) != 10 or np.shape(task.example_inputs)[-1] != 3):
        raise ValueError(
            f"tasks={name!r}: the pretrained networks tell 10 classes of color images. Use resnet-16-32-64."
        )
    places = [(stage, block) for stage, count in enumerate(stages, start=1) for block in range(count)]
    gated = [place for place, (_, block) in enumerate(places) if block] or list(range(len(places)))
    macs, shapes, whole = _counted(task, functools.partial(make, everywhere=True))
    names = tuple(f"stage{stage}_block{block}" for stage, block in places)
    return Loaded(task, make, names, macs, shapes, tuple(gated), whole, start)


def _network(
    stages: Sequence[int], widths: Sequence[int], fields: Mapping[str, Any], everywhere: bool = False, **gates: Any
) -> ResNet:
    """The network whose blocks have these gates; the first of a stage has no layer gate where others follow it."""
    block = functools.partial(GatedBasicBlock, **gates)
    always = block if everywhere or max(stages) == 1 else functools.partial(block, layer=None)
    factories = tuple((always, *[block] * (count - 1)) for count in stages)
    return ResNet(stages=factories, widths=tuple(widths), **fields)


def _sizes(config: Any, model: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Blocks and channels of every stage."""
    size = model.removeprefix(PRETRAINED)
    if size in SIZES:
        return (SIZES[size],) * 3, (16, 32, 64)
    if not re.fullmatch(r"resnet(-[1-9]\d*)+", model):
        legal = [*SIZES, *(f"{PRETRAINED}{name}" for name in SIZES)]
        raise ValueError(
            f"tasks: the model {model!r} is not one of {', '.join(legal)}, nor has it widths, as resnet-8-16."
            f"{near(model, legal)}"
        )
    widths = tuple(map(int, model.split("-")[1:]))
    return (config.depth,) * len(widths), widths


def _counted(task: Task, make: Callable[..., ResNet]) -> tuple[tuple[BlockMacs, ...], tuple[Any, ...], float]:
    """Multiply-adds of every block, its input's shape, and multiply-adds of the whole, by tracing alone."""
    macs: list[BlockMacs] = []
    shapes: list[tuple[int, int, int]] = []

    class Seen(ConstantGate):
        def macs(self, height: int, width: int, channels: int) -> float:
            shapes.append((height, width, channels))
            return 0.0

    module = make(layer=Seen)
    variables = jax.eval_shape(task.init, jax.random.key(0))
    images = jax.eval_shape(unit_images, task.example_inputs)

    def run(variables: PyTree, x: jax.Array) -> jax.Array:
        logits, changed = module.apply(variables, x, mutable=["intermediates"])
        macs[:] = [gates.macs for gates in recorded_gates(changed)]
        return logits

    shapes.clear()
    jax.eval_shape(run, variables, images)
    whole = count_macs(task.infer, variables, task.example_inputs).most
    return tuple(macs), tuple(shapes), float(whole or 0)


def estimates(loaded: Loaded, batch: int) -> list[str]:
    """Where skipping a block can pay, in a sentence for each shape of block and kind of machine."""
    found = {}
    for macs, (height, width, channels) in zip(loaded.macs, loaded.shapes, strict=True):
        cost, bytes_ = macs.once + macs.channel * macs.channels, 4.0 * height * width * channels
        for device in dict.fromkeys((jax.default_backend(), "gpu")):
            about = break_even(cost, bytes_, device=device if device in ("cpu", "tpu") else "gpu", batch=batch)
            where = {"cpu": "one CPU core", "tpu": "a TPU v5e"}.get(device, "an H200")
            sentence = f"estimate for a block of {height}x{width}x{channels} on {where} at batch {batch}: {about}"
            found[sentence] = None
    return list(found)


def static_pattern(loaded: Loaded, target: float) -> np.ndarray:
    """Gates of a static network of about the target's work, bools [gated blocks]: the last ones close first."""
    costs, open_ = loaded.branches, np.ones(len(loaded.gated), bool)
    best, distance = open_.copy(), abs(1 - target)
    for place in _by_turns(loaded):
        open_[place] = False
        fraction = 1 - float(costs[~open_].sum()) / loaded.static
        if abs(fraction - target) < distance:
            best, distance = open_.copy(), abs(fraction - target)
    return best


def _by_turns(loaded: Loaded) -> list[int]:
    """Places among the gated blocks: of every stage its last, then of every stage the one before."""
    stage = [loaded.names[place].partition("_")[0] for place in loaded.gated]
    after = [stage[place:].count(one) for place, one in enumerate(stage)]
    return sorted(range(len(stage)), key=lambda place: (after[place], -place))


def random_rate(loaded: Loaded, target: float) -> float:
    """Chance of an open layer at which random gates spend the target."""
    return float(np.clip(1 - (1 - target) * loaded.static / loaded.branches.sum(), 0, 1))


def drawn_gates(images: jax.Array, blocks: int, rate: float) -> jax.Array:
    """Random gates [rows, blocks] that depend on the image alone."""
    kind = images.dtype
    bits = images if jnp.issubdtype(kind, jnp.integer) else jax.lax.bitcast_convert_type(wide(images), jnp.uint32)
    flat = bits.reshape(images.shape[0], -1).astype(jnp.uint32)
    odd = jnp.arange(flat.shape[1], dtype=jnp.uint32) * jnp.uint32(2654435761) | jnp.uint32(1)
    seeds = jnp.sum(flat * odd[None], axis=1, dtype=jnp.uint32)
    draw = lambda seed: jax.random.uniform(jax.random.fold_in(jax.random.key(0), seed), (blocks,))
    return (jax.vmap(draw)(seeds) < rate).astype(jnp.float32)
