"""The Global layer study: a shallow network with Global layers, beside the deep one and beside itself without them."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from effjax.core.errors import Count, Limits, Natural, NotNegative, Positive, Rate
from effjax.data.augment import random_crop_flip
from effjax.data.sets import load
from effjax.models.layers import DepthwiseConv, norm_layer
from effjax.models.residual_blocks import BasicBlock
from effjax.models.resnet import ResNet
from effjax.recipes.images import smaller_images
from effjax.recipes.spec import Arm, Claim, Group, Role, StudyConfig
from effjax.tasks.image import image_task
from effjax.tasks.task import Metric, Task
from effjax.train.loaders import column_loader
from effjax.train.program import Program
from effjax.train.trainer import supervised
from effjax.vision.global_layer import FieldMaps, GlobalLayer
from effjax.vision.global_nets import resnet_global
from effjax.vision.pde import PdeConfig

MODALITY, OWN_PRESET = "image", "own"
METRIC = Metric("accuracy", "max", "test accuracy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlobalLayerStudy(StudyConfig):
    """Config of the Global layer study."""

    arms: tuple[str, ...] = ("*", "!form-*")
    """Names or shell patterns of the arms to run; a pattern that begins with ! leaves arms out."""
    tasks: tuple[str, ...] = ("cifar10",)
    """Data sets of images."""
    shrink: Count = 1
    """Pixels along each side that are averaged to one."""
    widths: tuple[Count, ...] = (16, 32, 64, 64)
    """Channels of the stages of the shallow network; the deep one has the first three."""
    blocks: Count = 1
    """Blocks of each stage of the shallow network."""
    deep_blocks: Count = 5
    """Blocks of each stage of the deep network; 5 make ResNet-32."""
    steps: Annotated[int, Limits(low=2)] = 5
    """Steps of the equation in the arms with several."""
    train_rows: Count | None = None
    """Training images used; all when None."""
    test_rows: Count | None = None
    """Test images used; all when None."""
    batch_size: Count = 128
    """Examples of one step."""
    inference_batch: Count = 128
    """Examples of the call by which inference is timed."""
    augment: bool = True
    """Whether images are shifted by up to an eighth of their side, and mirrored."""
    learning_rate: Positive = 0.1
    """Highest learning rate of SGD."""
    schedule: Literal["one-cycle", "steps"] = "one-cycle"
    """How the rate goes on: up for a fifth of the run and down by a cosine; or divided by ten at half and at three
    quarters of the run."""
    momentum: Rate = 0.9
    """Momentum of SGD, Nesterov's."""
    weight_decay: NotNegative = 6e-5
    """Weight decay, on all parameters, as in the paper's code."""
    clip: NotNegative = 0.0
    """Largest norm of the gradient; 0 for none."""


_COSTS = (
    Claim("global", "<=", "deep", of="trained_params", times=0.5),
    Claim("global", "<=", "deep", of="inference_macs_per_example", times=0.5),
    Claim("global", "<=", "deep", of="inference_call_ms", times=0.5),
    Claim("global", "<=", "deep", of="step_ms", times=0.5),
    Claim("global", "<=", "form-grouped", of="step_ms", times=0.5, why="the depthwise convolutions are not XLA's"),
    Claim("global", "<=", "form-factors", of="step_ms", why="the gradient by hand is faster"),
    Claim("global-many", "<=", "form-factors-many", of="step_ms", why="the gradient by hand is faster"),
)
CLAIMS = {
    "*": (
        Claim("global", "no worse", "deep", plus=-0.01, why="what the paper claims"),
        Claim("global", "no worse", "shallow", standard_errors=1.0, why="the layer is worth something"),
        Claim("global", "no worse", "depthwise", standard_errors=1.0, why="the equation does what filters do not"),
        Claim("global", "no worse", "large-kernel", why="it beats one large filter for each channel"),
        Claim("global-many", "no worse", "global", standard_errors=1.0, why="more steps help"),
        Claim("signed", "no worse", "global", standard_errors=1.0, why="velocities of both signs help"),
        *_COSTS,
    )
}


def groups(config: GlobalLayerStudy) -> list[Group]:
    """One for each data set."""
    return [Group(name, METRIC, functools.partial(_load, config, name), list(_arms(config))) for name in config.tasks]


def _load(config: GlobalLayerStudy, name: str) -> Callable[[nn.Module], Task]:
    """``module -> task``, on the same images."""
    data = config.data(name, MODALITY)
    data = load(data) if isinstance(data, str) else data
    if config.shrink > 1:
        data = smaller_images(data, config.shrink)
    rows = {"train_rows": config.train_rows, "test_rows": config.test_rows}

    def made(make: Callable[..., nn.Module]) -> Task:
        module = make(classes=len(data.classes), dtype=jnp.dtype(config.train.dtype), remat=config.train.remat)
        task = image_task(data, module, **rows)
        return task._replace(example_inputs=task.test["image"][: config.inference_batch])

    return made


def _arms(config: GlobalLayerStudy) -> Iterator[Arm]:
    def arm(name: str, role: Role, label: str, make: Callable[..., nn.Module]) -> Arm:
        return Arm(name, role, functools.partial(_trained, config, make), label)

    def shallow(name: str, role: Role, label: str, layer: Callable[..., nn.Module] | None) -> Arm:
        make = functools.partial(resnet_global, config.blocks, config.widths, layer)
        return arm(name, role, label, make)

    def layer(name: str, label: str, role: Role = "method", **fields: Any) -> Arm:
        return shallow(name, role, label, functools.partial(GlobalLayer, **fields))

    many, K = functools.partial(PdeConfig, K=config.steps), config.steps
    maps = functools.partial
    project = functools.partial(BasicBlock, shortcut="project")
    stages = min(3, len(config.widths))
    deep = functools.partial(ResNet, (config.deep_blocks,) * stages, config.widths[:stages], project)
    yield arm("deep", "baseline", f"ResNet-{2 * stages * config.deep_blocks + 2}", deep)
    yield shallow("shallow", "control", "shallow ResNet without Global layers", None)
    yield shallow("depthwise", "control", "depthwise layers of equal parameters instead", DepthwiseLayers)
    yield shallow("large-kernel", "alternative", "one depthwise 7x7 layer instead", LargeKernel)
    yield layer("no-steps", "Global layers of no step: norm and ReLU", "control", pde=PdeConfig(K=0))
    yield layer("global", "ResNet-Global, K=1")
    yield layer("global-many", f"ResNet-Global, K={K}", pde=many())
    yield layer("constant", "K=1, D=1", diffusivity=(1.0, 1.0))
    small = maps(FieldMaps, epsilon=1e-5)
    yield layer("small-epsilon", "K=1, usual epsilon", velocity=small, diffusivity=small)
    signed = maps(FieldMaps, activation="tanh")
    yield layer("signed", "K=1, velocities of both signs, limited", velocity=signed, pde=PdeConfig(clamp=True))
    yield layer("reflect", f"K={K}, reflecting borders", pde=many(border="reflect"))
    implicit = PdeConfig(scheme="implicit", dt=1.0, border="reflect", clamp=True)
    yield layer("implicit", "K=1, D=1, implicit, dt=1", diffusivity=(1.0, 1.0), velocity=signed, pde=implicit)
    factors = "seven factors, derivatives by JAX"
    yield layer("form-factors", f"K=1, {factors}", pde=PdeConfig(form="factors"))
    yield layer("form-factors-many", f"K={K}, {factors}", pde=many(form="factors"))
    grouped = maps(FieldMaps, impl="conv")
    yield layer("form-grouped", "K=1, XLA's grouped convolutions", velocity=grouped, diffusivity=grouped)


class DepthwiseLayers(nn.Module):
    """The control: as many parameters as a Global layer, in four depthwise 3x3 layers with shortcuts.

    ``x = x + relu(norm(depthwise(x)))`` four times, then ``relu(norm(x))``.
    """

    features: int
    strides: int = 1
    norm: str = "batch"
    dtype: DTypeLike = jnp.float32
    kernel: int = 3
    layers: Natural = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = functools.partial(norm_layer, self.norm, self.features, train=train, dtype=self.dtype)
        for index in range(self.layers):
            conv = DepthwiseConv(self.kernel, use_bias=False, dtype=self.dtype, name=f"conv{index}")
            x = x + nn.relu(norm(name=f"norm{index}")(conv(x)))
        return nn.relu(norm(name="norm_out")(x))


LargeKernel = functools.partial(DepthwiseLayers, kernel=7, layers=1)


def _trained(
    config: GlobalLayerStudy, make: Callable[..., nn.Module], task_of: Callable[[Callable[..., nn.Module]], Task]
) -> Program:
    task = task_of(make)
    side = task.train["image"].shape[1]
    transform = functools.partial(_augmented, max(1, side // 8)) if config.augment else None
    loader = column_loader(task.train, config.batch_size, transform=transform)
    steps = config.budget.steps(config.batch_size, loader.epoch_steps)
    program = supervised(task, _sgd(config, steps), steps=steps, loader=loader, options=config.train)
    return program._replace(trained=lambda state: state.params)


def _augmented(padding: int, batch: Mapping[str, Any], index: int, rng: np.random.Generator) -> dict[str, Any]:
    return {**batch, "image": random_crop_flip(batch["image"], rng, padding=padding)}


def _sgd(config: GlobalLayerStudy, steps: int) -> optax.GradientTransformation:
    rate = config.learning_rate
    if config.schedule == "steps":
        falling = optax.piecewise_constant_schedule(rate, {steps // 2: 0.1, 3 * steps // 4: 0.1})
    else:
        falling = optax.warmup_cosine_decay_schedule(rate / 25, rate, max(1, steps // 5), steps)
    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(falling, config.momentum, nesterov=True),
    )
