"""The SI-CNN study: blocks that compute on anchors, against the dense network and others that cost as little.

Tasks on *noise* are there for the clock: single blocks, and whole networks at the resolution of ImageNet.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.core.errors import Count, Natural, NotNegative, Positive, Rate, near
from effjax.data.augment import random_crop_flip
from effjax.data.sets import DataSet, load
from effjax.models.image_models import IMAGE_MODELS, image_model
from effjax.models.inverted_residual import BlockRow, InvertedResidual, InvertedResidualNet
from effjax.models.residual_blocks import BasicBlock
from effjax.models.resnet import ResNet
from effjax.recipes.equal_macs import forward_macs, narrower, on_smaller_images
from effjax.recipes.images import smaller_images
from effjax.recipes.spec import Arm, Claim, Group, Role, StudyConfig
from effjax.tasks.custom import task as own_task
from effjax.tasks.image import image_task
from effjax.tasks.task import Metric, Task
from effjax.train.loaders import column_loader
from effjax.train.program import Program
from effjax.train.trainer import supervised
from effjax.vision.si_block import CheapPath, SIBlock, SIConfig, alternating_offsets
from effjax.vision.si_cnn import interpolated

MODALITY = "image"
ACCURACY = Metric("accuracy", "max", "test accuracy")
LOSS = Metric("loss", "min", "test loss")
_NOISE = re.compile(r"noise-([1-9]\d*)")
_BLOCK = re.compile(r"block-([1-9]\d*)-([1-9]\d*)")
_WIDTHS = re.compile(r"(resnet|inverted)((?:-[1-9]\d*)+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiCnnStudy(StudyConfig):
    """Config of the SI-CNN study."""

    tasks: tuple[str, ...] = ("cifar10/inverted-8-16-24",)
    """Data set and network: cifar10/mobilenet_v2_cifar, ...; a width may stand behind, mobilenet_v2_cifar-0.5;
    inverted-8-16 has two inverted residual blocks per stage of these widths, resnet-8-16 one basic block. On noise of
    a size, noise-224/mobilenet_v2, or a single inverted residual block, noise-56/block-24-3 (24 channels, 3 x 3)."""
    stride: Count = 2
    """Pixels from one anchor to the next."""
    policy: Literal["residual_stride1", "residual_stride1_min14", "stride1", "all"] = "residual_stride1"
    """Which blocks are interpolated."""
    expansion: Count = 6
    """Hidden channels of the blocks of inverted-... and block-..., in units of their input's."""
    shrink: Count = 1
    """Factor by which the images' height and width are reduced, by means of blocks."""
    crop: Natural = 0
    """Pixels by which training images are shifted at random, half of them mirrored; 0 for neither."""
    train_rows: Count | None = None
    """Number of training images; all when None."""
    test_rows: Count | None = None
    """Number of test images; all when None."""
    batch_size: Count = 128
    """Examples of one step."""
    infer_batch: Count = 64
    """Images of one timed call of inference."""
    learning_rate: Positive = 0.1
    """Largest learning rate, after a warm-up; it ends at 0, by a cosine."""
    warmup: Rate = 0.1
    """Share of the run in which the learning rate rises from 0."""
    momentum: Rate = 0.9
    """Nesterov momentum of SGD."""
    weight_decay: NotNegative = 1e-4
    """Weight decay of kernels."""

    def __post_init__(self):
        super().__post_init__()
        for task in self.tasks:
            if task.count("/") != 1:
                raise ValueError(f"tasks={task!r} must be DATA/MODEL, such as 'cifar10/mobilenet_v2_cifar-0.5'.")
            check_network(task.partition("/")[2], block=_is_noise(task))
        self.blocks()  # refuses a stride of 1

    def blocks(self, **changes: Any) -> SIConfig:
        """Settings of an arm's blocks."""
        return dataclasses.replace(SIConfig(stride=self.stride), **changes)


class Variant(NamedTuple):
    """An arm that interpolates.

    Attributes:
      label: the words of the report.
      role: as in ``Arm``.
      changes: of ``SIConfig``.
    """

    label: str
    role: Role
    changes: Mapping[str, Any] = {}


VARIANTS = {
    "si": Variant("SI", "method"),
    "si-alternating": Variant("SI, offsets of anchors alternate", "method", {"offsets": alternating_offsets(2)}),
    "si-soft": Variant("SI, soft blend", "method", {"alpha": "soft"}),
    "si-gated": Variant("SI, gate per pixel", "method", {"alpha": "gated"}),
    "si-avg": Variant("SI, means of cells", "method", {"sample": "avg"}),
    "si-nearest": Variant("SI, nearest anchor", "control", {"interpolation": "nearest"}),
    "si-identity": Variant("SI, cheap path: norm alone", "method", {"cheap": "identity"}),
    "si-g4": Variant("SI, cheap path with 1x1 in 4 groups", "method", {"cheap": "dw3_g4"}),
    "si-pw": Variant("SI, cheap path with 1x1", "method", {"cheap": "dw3_pw"}),
    "si-3": Variant("SI, stride 3", "method", {"stride": 3}),
    "low": Variant("no cheap path, alpha = 1", "control", {"cheap": None}),
}
ON_BLOCKS = ("si", "si-identity", "si-3", "low")

_CLAIMS = (
    Claim("si", ">=", "dense", plus=-0.01),
    Claim("si", ">=", "narrow", why="better than fewer channels at equal cost"),
    Claim("si", ">=", "small", why="better than smaller images at equal cost"),
    Claim("si", ">=", "low", why="the cheap path carries detail"),
    Claim("si-alternating", ">=", "si", why="every pixel is an anchor somewhere"),
    Claim("si", "<=", "dense", of="step_ms", times=0.67),
    Claim("si", "<=", "dense", of="inference_call_ms", times=0.67),
)
_NOISE_CLAIMS = (
    Claim("si", "<=", "dense", of="step_ms", as_ratio_of="macs_per_example", times=1.1, why="the saving is real"),
    Claim("si", "<=", "dense", of="inference_call_ms", times=0.75),
)
_BLOCK_CLAIMS = (
    Claim("si", "<=", "dense", of="inference_call_ms", times=0.5, why="forward"),
    Claim("si", "<=", "dense", of="step_ms", times=0.5, why="forward and backward"),
)


def claims(config: SiCnnStudy) -> dict[str, tuple[Claim, ...]]:
    """What the method file asks for, by group."""
    kind = lambda task: _BLOCK_CLAIMS if _is_block(task) else _NOISE_CLAIMS if _is_noise(task) else _CLAIMS
    return {task.replace("/", "-"): kind(task) for task in config.tasks}


def _is_noise(task: str) -> bool:
    return bool(_NOISE.fullmatch(task.partition("/")[0]))


def _is_block(task: str) -> bool:
    return bool(_BLOCK.fullmatch(task.partition("/")[2]))


def groups(config: SiCnnStudy) -> list[Group]:
    """Every task."""
    return [_group(config, name) for name in config.tasks]


def _group(config: SiCnnStudy, name: str) -> Group:
    block = _is_block(name)
    arms = _block_arms(config, name) if block else _arms(config)
    load_it = functools.partial(_load_block if block else _load, config, name)
    return Group(name.replace("/", "-"), LOSS if block else ACCURACY, load_it, list(arms))


# Whole networks


class Loaded(NamedTuple):
    """What the arms of a group share.

    Attributes:
      data: the images.
      network: the dense one.
      shape: of an image.
      macs: ``() -> multiply-accumulates`` of the interpolated network ``si`` for one image; traced once.
    """

    data: DataSet
    network: nn.Module
    shape: tuple[int, ...]
    macs: Callable[[], int]


def _load(config: SiCnnStudy, name: str) -> Loaded:
    data_name, model = name.split("/")
    if noise := _NOISE.fullmatch(data_name):
        data = _noise(config, int(noise[1]))
    else:
        data = config.data(data_name, MODALITY)
        data = load(data) if isinstance(data, str) else data
        model = config.model(model)
    if config.shrink > 1:
        data = smaller_images(data, config.shrink)
    network = _network(config, check_network(model), len(data.classes))
    shape = data.splits["train"]["image"].shape[1:]
    macs = functools.cache(lambda: forward_macs(_interpolated(config, network, shape, {}), shape))
    return Loaded(data, network, shape, macs)


def _noise(config: SiCnnStudy, size: int) -> DataSet:
    """Images of noise in 1000 classes, for the clock alone."""
    rng, rows = np.random.default_rng(0), max(config.batch_size, config.infer_batch)
    images = rng.integers(0, 256, (rows, size, size, 3), dtype=np.uint8)
    columns = {"image": images, "label": (np.arange(rows) % 1000).astype(np.int32)}
    classes = tuple(map(str, range(1000)))
    return DataSet(f"noise-{size}", {"train": columns, "test": columns}, classes, "none", "random numbers", "image")


def check_network(name: str, *, block: bool = False) -> str:
    """Return the name of a network if there is one, or of a block where those may be; else raise ``ValueError``.

    Example:
      >>> check_network("mobilenet_v2_cifar-0.5")
      'mobilenet_v2_cifar-0.5'
    """
    model, _, width = name.partition("-")
    known = model in _NAMED and (not width or bool(re.fullmatch(r"\d*\.?\d+", width)))
    if known or _WIDTHS.fullmatch(name) or (block and _BLOCK.fullmatch(name)):
        return name
    listed = ", ".join(map(repr, _NAMED))
    raise ValueError(f"model={name!r} is not one of {listed}, nor inverted-8-16 or resnet-8-16.{near(name, _NAMED)}")


_NAMED = tuple(name for name in IMAGE_MODELS if name not in ("mlp", "cnn"))


def _network(config: SiCnnStudy, name: str, classes: int) -> nn.Module:
    """The dense network."""
    fields: dict[str, Any] = {
        "classes": classes,
        "dtype": jnp.dtype(config.train.dtype),
        "remat": config.train.remat,
    }
    if found := _WIDTHS.fullmatch(name):
        widths = tuple(map(int, found[2].strip("-").split("-")))
        if found[1] == "resnet":
            block = functools.partial(BasicBlock, shortcut="project")
            return ResNet(stages=(1,) * len(widths), widths=widths, block=block, **fields)
        return InvertedResidualNet(
            _inverted(widths, config.expansion), stem=widths[0], stem_strides=1, last=4 * widths[-1], **fields
        )
    model, _, width = name.partition("-")
    return image_model(model, **fields, **({"width": float(width)} if width else {}))


def _inverted(widths: tuple[int, ...], expansion: int) -> tuple[tuple[BlockRow, ...], ...]:
    stages, channels = [], widths[0]
    for index, width in enumerate(widths):
        first = BlockRow(width, strides=2 if index else 1, hidden=expansion * channels)
        stages.append((first, BlockRow(width, hidden=expansion * width)))
        channels = width
    return tuple(stages)


def _interpolated(
    config: SiCnnStudy, network: nn.Module, shape: tuple[int, ...], changes: Mapping[str, Any]
) -> nn.Module:
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return interpolated(network, images, config.policy, config=config.blocks(**changes))


def _arms(config: SiCnnStudy) -> Iterator[Arm]:
    def arm(name: str, role: Role, label: str, make: Callable[[Loaded], nn.Module]) -> Arm:
        return Arm(name, role, lambda loaded: _program(config, _task(config, loaded, make(loaded))), label)

    yield arm("dense", "baseline", "dense", lambda loaded: loaded.network)
    for name, (label, role, changes) in VARIANTS.items():
        make = lambda loaded, changes=changes: _interpolated(config, loaded.network, loaded.shape, changes)
        yield arm(name, role, label, make)
    cheaper = lambda make: lambda loaded: make(loaded.network, loaded.shape, loaded.macs())
    yield arm("narrow", "alternative", "dense, narrower, as many multiply-adds as SI", cheaper(narrower))
    yield arm(
        "small", "alternative", "dense on smaller images, as many multiply-adds as SI", cheaper(on_smaller_images)
    )


def _task(config: SiCnnStudy, loaded: Loaded, network: nn.Module) -> Task:
    task = image_task(loaded.data, network, train_rows=config.train_rows, test_rows=config.test_rows)
    return task._replace(example_inputs=task.test["image"][: config.infer_batch])


def _program(config: SiCnnStudy, task: Task) -> Program:
    draw = None
    if config.crop:
        draw = lambda batch, step, rng: {**batch, "image": random_crop_flip(batch["image"], rng, padding=config.crop)}
    loader = column_loader(task.train, config.batch_size, transform=draw)
    steps = config.budget.steps(config.batch_size, loader.epoch_steps)
    return supervised(task, _sgd(config, steps), steps=steps, loader=loader, options=config.train)


def _sgd(config: SiCnnStudy, steps: int) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, int(config.warmup * steps), steps)
    kernels = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    decay = optax.add_decayed_weights(config.weight_decay, kernels)
    return optax.chain(decay, optax.sgd(rate, config.momentum, nesterov=True))


# Single blocks


class Alone(nn.Module):
    """A block behind a scale and a bias of its input's channels, so that the backward pass goes through all of it.

    Both are there as in the norm that stands before a block in a network: a compiler merges what a single sum reads
    with that sum.
    """

    block: nn.Module

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return self.block(x * scale[None, None, None, :] + bias[None, None, None, :], train)


def _load_block(config: SiCnnStudy, name: str) -> dict[str, Any]:
    data_name, model = name.split("/")
    size, (channels, _) = int(data_name.partition("-")[2]), map(int, model.split("-")[1:])
    rows = max(config.batch_size, config.infer_batch)
    x = np.random.default_rng(0).normal(size=(rows, size, size, channels)).astype(np.float32)
    return {"train": {"x": x}, "test": {"x": x[: config.infer_batch]}}


def _block_arms(config: SiCnnStudy, name: str) -> Iterator[Arm]:
    channels, kernel = map(int, name.partition("/")[2].split("-")[1:])
    dtype = jnp.dtype(config.train.dtype)
    dense = InvertedResidual(channels, hidden=config.expansion * channels, kernel=kernel, dtype=dtype)

    def arm(name: str, role: Role, label: str, block: nn.Module) -> Arm:
        square = lambda outputs, batch: (outputs**2).mean((1, 2, 3))
        make = functools.partial(own_task, Alone(block), loss=square, name=name, eval_batch=config.infer_batch)
        return Arm(name, role, lambda data: _program(config, make(data)._replace(dtype=dtype.name)), label)

    yield arm("dense", "baseline", "dense", dense)
    for variant in ON_BLOCKS:
        label, role, changes = VARIANTS[variant]
        settings = config.blocks(**changes)
        cheap = None if settings.cheap is None else CheapPath(channels, settings.cheap, dtype=dtype)
        yield arm(variant, role, label, SIBlock(dense.clone(skip=False), cheap, stride=settings.stride))
