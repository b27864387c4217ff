"""The study of dynamic inference: gated networks beside dense, static and random ones of equal work."""

import dataclasses
import functools
import itertools
from typing import Annotated, Any

from effjax.core.errors import Count, Fraction, Limits, NotNegative, Positive, Share
from effjax.recipes.executor_speed import make_shape, speed_claims, speed_groups
from effjax.recipes.gated_networks import Loaded, estimates, load_network
from effjax.recipes.gated_training import Arms, Variant
from effjax.recipes.spec import Arm, Claim, Group, StudyConfig
from effjax.tasks.task import Metric
from effjax.vision.gate_networks import AIGGate, GivenGate, SalienceGate, SkipNetGate

MODALITY, OWN_MODEL = "image", "resnet-16-32-64"
METRIC = Metric("accuracy", "max", "test accuracy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicInferenceStudy(StudyConfig):
    """Config of the study of dynamic inference."""

    tasks: tuple[str, ...] = ("cifar10/pretrained-resnet20",)
    """Data set and network: pretrained-resnet20 starts from trained weights, resnet20 from fresh ones, resnet-8-16 has
    stages of 8 and 16 channels. None where executors alone are timed."""
    depth: Count = 3
    """Blocks of every stage, in networks named by their widths."""
    train_rows: Count | None = None
    """Training images used; all when None."""
    test_rows: Count | None = None
    """Test images used; all when None."""
    batch_size: Count = 64
    """Images of one step."""
    learning_rate: Positive = 1e-3
    """Learning rate of Adam at the start; it falls linearly to 0."""
    gate_rate: Positive = 1e-2
    """The same for the gates."""
    mac_target: Share = 0.5
    """Multiply-adds that are left, as a share of the network's."""
    penalty_weight: NotNegative = 20.0
    """Weight of the penalty on multiply-adds above the target."""
    warm_up: Fraction = 0.2
    """Share of the run without pressure on the gates."""
    anneal: Fraction = 0.4
    """Share of the run in which the target falls."""
    gate_channels: Count = 4
    """Channels that share a gate."""
    drop_penalty: NotNegative = 10.0
    """BlockDrop's penalty of a wrong answer."""
    drop_curriculum: Fraction = 0.3
    """Share of the run in which BlockDrop's policy comes to decide about all blocks, the last ones first."""
    clock_batches: tuple[Count, ...] = ()
    """Batches on which the trained networks are timed, by the ladder and without gates."""
    rungs: Annotated[int, Limits(low=2)] = 8
    """Sizes of the ladder that is timed."""
    shapes: tuple[str, ...] = ()
    """Blocks on which executors are timed, each a group of its own: basic-64-16 has 64 channels on maps of 16 x 16;
    bottleneck-1024-14, mlp-1024."""
    shape_blocks: Count = 2
    """Blocks of these networks."""
    batches: tuple[Count, ...] = (32, 256)
    """Batches on which executors are timed."""
    open_rates: tuple[Share, ...] = (0.1, 0.25, 0.5, 0.75, 1.0)
    """Shares of open examples at which the ladder is timed."""

    def __post_init__(self):
        super().__post_init__()
        if self.warm_up + self.anneal > 1:
            raise ValueError(
                f"warm_up={self.warm_up} and anneal={self.anneal} are more than the run. Give at most 1 together."
            )
        if not self.tasks and not self.shapes:
            raise ValueError("tasks=() and shapes=() leave nothing to compare. Give a task, or a shape to time.")
        for task in self.tasks:
            if len(list(filter(None, task.split("/")))) < 2:
                raise ValueError(f"tasks={task!r} must be DATA/NETWORK, such as 'cifar10/pretrained-resnet20'.")
        for name in self.shapes:
            make_shape(name, 0, 0, "float32")  # refuses names


_LNET = functools.partial(SalienceGate, kind="ste")
VARIANTS: dict[str, Variant] = {
    "dense": Variant("no gates", "baseline"),
    "static": Variant("static, fewer blocks", "baseline", GivenGate, given="static"),
    "layers": Variant("L-Net, straight-through", "method", _LNET, loss="mac"),
    "layers-scaled": Variant(
        "L-Net, straight-through, scale head", "method", functools.partial(_LNET, scale="head"), loss="mac"
    ),
    "layers-gumbel": Variant("L-Net, Gumbel", "method", functools.partial(SalienceGate, kind="gumbel"), loss="mac"),
    "layers-hard-concrete": Variant(
        "L-Net, hard concrete", "method", functools.partial(SalienceGate, kind="hard_concrete"), loss="mac"
    ),
    "layers-relu1": Variant(
        "L-Net, clipped (as re-implemented)",
        "method",
        functools.partial(SalienceGate, kind="relu1", threshold=0.01, bias=0.9),
        loss="mac",
    ),
    "channels": Variant("C-Net, straight-through", "method", channel=_LNET, loss="mac"),
    "layers-channels": Variant("LC-Net, straight-through", "method", _LNET, _LNET, loss="mac"),
    "one-shot": Variant("one-shot policy, straight-through", "method", GivenGate, given="one-shot", loss="mac"),
    "aig": Variant("ConvNet-AIG", "alternative", AIGGate, loss="rate"),
    "skipnet": Variant("SkipNet's gates, first stage", "alternative", SkipNetGate, loss="mac"),
    "block-drop": Variant("BlockDrop's policy gradient", "alternative", GivenGate, given="block-drop"),
    "random": Variant("random gates", "control", GivenGate, given="random"),
}


def claims(config: DynamicInferenceStudy) -> dict[str, tuple[Claim, ...]]:
    """Equal work first: a gated network must beat a static one that costs as much."""
    gated = ("layers", "layers-scaled", "one-shot")
    near = config.mac_target + 0.05
    found = (
        *(Claim(arm, ">=", "static", why="equal multiply-adds") for arm in gated),
        Claim("layers", ">=", "random", why="the gates know which images"),
        Claim("layers", ">=", "aig", plus=-0.005),
        Claim("layers", ">=", "dense", plus=-0.02),
        Claim("layers", "<=", near, of="mac_fraction"),
        Claim("layers", ">=", 8, of="patterns", why="dynamic, not pruned"),
        *(
            Claim("layers", "<=", 0.75, of=f"time_ratio_{batch}", why="skipping shows on the clock")
            for batch in config.clock_batches
        ),
    )
    own = {name.replace("/", "-"): found for name in config.tasks}
    return own | speed_claims(config)


def groups(config: DynamicInferenceStudy) -> list[Group]:
    """Every task, and every shape that is timed."""
    trained = [
        Group(
            name.replace("/", "-"),
            METRIC,
            functools.partial(load_network, config, name),
            [
                Arm(arm, variant.role, functools.partial(_program, config, variant), variant.label)
                for arm, variant in VARIANTS.items()
            ],
            about=functools.partial(_about, config),
        )
        for name in config.tasks
    ]
    return [*trained, *speed_groups(config)]


def _program(config: DynamicInferenceStudy, variant: Variant, loaded: Loaded) -> Any:
    return Arms(config, variant, loaded).program()


def _about(config: DynamicInferenceStudy, loaded: Loaded) -> list[str]:
    batches = config.clock_batches or (32,)
    return list(itertools.chain.from_iterable(estimates(loaded, batch) for batch in batches))
