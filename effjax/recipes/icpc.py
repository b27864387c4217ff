"""The ICPC study: transformers that train on several sizes, beside one size and other ways to fewer tokens.

Spectrograms of spoken digits are images too, time along the rows; texts are in ``icpc_texts``.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.core.errors import Count, Limits, Natural, NotNegative, Positive, Rate, Share
from effjax.core.shapes import pad_to
from effjax.data.augment import random_crop_flip
from effjax.data.sequences import sequence_data
from effjax.data.sets import DataSet, load
from effjax.models.vit import ViT, named_vit
from effjax.recipes.icpc_measures import CURVES, METRIC, check_held_out, level_measures
from effjax.recipes.icpc_texts import MODALITY, is_text, text_group
from effjax.recipes.spec import Arm, Claim, Group, Role, StudyConfig
from effjax.recipes.texts import check_epochs
from effjax.tasks.image import image_task, standardised, unit_images
from effjax.tasks.task import Task
from effjax.train.loaders import column_loader
from effjax.train.program import Program
from effjax.train.trainer import supervised
from effjax.transformers.compressions import resize_images
from effjax.transformers.flexible_patches import random_patches, resize_patch_kernel
from effjax.transformers.icpc import MixedLevels, icpc
from effjax.transformers.level_sampling import level_tokens
from effjax.transformers.position_tables import How, position_selector

__all__ = ["CLAIMS", "MODALITY", "OWN_MODEL", "IcpcStudy", "groups"]

OWN_MODEL = {"image": "vit-64-4", "text": "encoder-2x64"}
_NAME = re.compile(r"vit-([1-9]\d*)-([1-9]\d*)")
Size = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class IcpcStudy(StudyConfig):
    """Config of the ICPC study."""

    tasks: tuple[str, ...] = ("fashion_mnist/vit-64-4",)
    """Data set and model: fashion_mnist/vit-64-4 (width 64, 4 layers), cifar10/vit_small_patch4_32 (a name of timm's),
    spoken_digits/vit-64-2 (spectrograms of recordings), sst2/encoder-2x64 or sst2/minilm (texts)."""
    patch: Count = 4
    """Side of a patch of vit-WIDTH-DEPTH, in pixels."""
    pixels: Count | None = None
    """Side to which images are resized at full size; None leaves them as they are."""
    scales: tuple[Share, ...] = (0.43, 0.57, 0.71, 0.86, 1.0)
    """Levels as shares of the full sides, rounded to whole patches, increasing; the last is 1."""
    shares: tuple[Count, ...] = (1, 1, 1, 1, 1)
    """Rows of each level among as many neighbouring rows of a batch."""
    dropped: tuple[Annotated[float, Limits(low=0, high=1)], ...] = (1.0, 0.5, 0.0)
    """Levels of texts, as shares of their stop words that are left out, decreasing; the last is 0."""
    max_length: Count = 64
    """Tokens of a text; longer ones are truncated."""
    max_shapes: Count = 4
    """Number of batch shapes of texts."""
    tokens: Count = 8192
    """Most padded tokens of a batch of texts."""
    late: Rate = 0.2
    """Share of a run at its end that the arm icpc-late trains on the full size."""
    kept: Share = 0.5
    """Share of the patches that the arm patch-dropout keeps in training."""
    loss: Share = 0.005
    """Accuracy that the cascade of the smallest and the full size may lose."""
    certify: Literal["ltt", "conformal", "search"] = "ltt"
    """How its threshold is found, on every other test image: with a guarantee, on average, or without one."""
    crop: Natural = 0
    """Pixels by which training images are shifted at random, half of them mirrored; 0 for neither."""
    train_rows: Count | None = None
    """Number of training images; all when None."""
    test_rows: Count | None = None
    """Number of test images; all when None."""
    batch_size: Count = 100
    """Examples of one step; a multiple of the sum of shares. Of texts it is rounded down to a multiple of 8."""
    learning_rate: Positive = 1.5e-3
    """Largest learning rate of AdamW, after a warm-up; it ends at 0, by a cosine. Of texts it falls from the
    start, linearly."""
    warmup: Rate = 0.1
    """Share of the run in which the learning rate rises from 0."""
    weight_decay: NotNegative = 0.05
    """Weight decay of matrices; positions and special tokens have none."""

    def __post_init__(self):
        super().__post_init__()
        for task in self.tasks:
            if task.count("/") != 1:
                raise ValueError(f"tasks={task!r} must be DATA/MODEL, such as 'fashion_mnist/vit-64-4'.")
            if not is_text(self, task) and not _NAME.fullmatch(task.partition("/")[2]):
                named_vit(task.partition("/")[2])
            if is_text(self, task):
                check_epochs(self)
        if list(self.scales) != sorted(set(self.scales)) or len(self.scales) < 2 or self.scales[-1] != 1:
            raise ValueError(f"scales={self.scales} must be two or more increasing shares that end with 1.")
        if len(self.shares) != len(self.scales):
            raise ValueError(f"shares={self.shares} must hold one integer for each of scales={self.scales}.")
        if list(self.dropped) != sorted(set(self.dropped), reverse=True) or len(self.dropped) < 2 or self.dropped[-1]:
            raise ValueError(f"dropped={self.dropped} must be two or more decreasing shares that end with 0.")
        if self.batch_size % sum(self.shares):
            raise ValueError(f"batch_size={self.batch_size} is no multiple of the sum of shares={self.shares}.")


_TEXTS = (
    Claim("icpc", ">=", "full", of="small", plus=0.02, why="at the shortest texts"),
    Claim("icpc", ">=", "full", plus=-0.01),
    Claim("icpc", ">=", "icpc-random", why="it matters which words go"),
    Claim("icpc", ">=", "full-short", why="in as many tokens"),
    Claim("icpc", "<=", "full", of="macs_per_example", times=0.9),
    Claim("icpc", "<=", 0.005, of="cascade_loss"),
)
CLAIMS = {
    "*-encoder-*": _TEXTS,
    "*-minilm": _TEXTS,
    "*-vit*": (
        Claim("icpc", "<=", "full", of="macs_per_example", times=0.67),
        Claim("icpc", "<=", "full", of="step_ms", times=0.8),
        Claim("icpc", ">=", "full", of="small", plus=0.3, why="at the smallest size"),
        Claim("icpc", "<=", 0.04, of="spread"),
        Claim("icpc", ">=", "full", plus=-0.02),
        Claim("icpc-late", ">=", "full", plus=-0.02),
        Claim("icpc-interp", ">=", "full-short", why="in as many multiply-adds"),
        Claim("icpc-interp", ">=", "icpc", why="positions that keep their place"),
        Claim("icpc", "<=", 0.65, of="cascade_cost"),
        Claim("icpc", "<=", 0.01, of="cascade_loss"),
    ),
}


def groups(config: IcpcStudy) -> list[Group]:
    """One for each data set and model."""
    return [text_group(config, name) if is_text(config, name) else _image_group(config, name) for name in config.tasks]


def _image_group(config: IcpcStudy, name: str) -> Group:
    load = functools.partial(_load, config, name)
    return Group(name.replace("/", "-"), METRIC, load, list(_arms(config)), curves=CURVES)


class Loaded(NamedTuple):
    """What the arms of a group share.

    Attributes:
      data: the images.
      model: the transformer, for the full size, and positions for it alone.
      sizes: of the levels, in pixels.
      logits: ``(model, size) -> (variables, images) -> logits``, compiled once for equal models.
    """

    data: DataSet
    model: ViT
    sizes: tuple[Size, ...]
    logits: Callable[[ViT, Size], Callable[..., jax.Array]]


def _load(config: IcpcStudy, name: str) -> Loaded:
    data_name, model = name.split("/")
    sounds = data_name == "spoken_digits" and config.own is None
    data = _spectrograms() if sounds else config.data(data_name, "image")
    data = load(data) if isinstance(data, str) else data
    rows = len(data.splits["test"]["label"])
    check_held_out(config, min(rows, config.test_rows or rows))
    height, width = data.splits["train"]["image"].shape[1:3]
    if config.pixels:
        height = width = config.pixels
    fields = {"classes": len(data.classes), "dtype": jnp.dtype(config.train.dtype), "remat": config.train.remat}
    model = config.model(model)
    if found := _NAME.fullmatch(model):
        hidden, layers = int(found[1]), int(found[2])
        transformer = ViT(
            patch=config.patch, hidden_size=hidden, num_layers=layers, num_heads=max(1, hidden // 16), **fields
        )
    else:
        transformer = named_vit(model, **fields)
    patch = transformer.patch
    if height % patch or width % patch:
        raise ValueError(f"images of {height} x {width} pixels do not divide into patches of {patch}. Set patch.")
    sizes = tuple(
        (max(1, round(height * scale / patch)) * patch, max(1, round(width * scale / patch)) * patch)
        for scale in config.scales
    )
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"scales={config.scales} give the sizes {sizes} in patches of {patch}: leave out equal ones.")
    transformer = transformer.clone(grid=(height // patch, width // patch))

    def logits(model: ViT, size: Size) -> Callable[..., jax.Array]:
        return jax.jit(lambda variables, images: model.apply(variables, resize_images(images, size)))

    cached: Any = functools.cache(logits)
    return Loaded(data, transformer, sizes, cached)


def _spectrograms() -> DataSet:
    """Spoken digits as images: log-mel frames along the rows, standardised."""
    data, words = sequence_data("fsdd"), load("fsdd")
    splits = {}
    for split, columns in (("train", data.train), ("test", data.test)):
        frames = np.asarray(columns["inputs"])
        rows = frames.shape[1] // 4 * 4
        splits[split] = {"image": frames[:, :rows, :, None], "label": np.asarray(columns["targets"], np.int32)}
    return DataSet("spoken_digits", splits, words.classes, words.licence, words.source, "image")


# The arms

# A share of the steps, and the view of the images in them.
Part = tuple[float, Callable[[Loaded, ViT], nn.Module]]


class _Chosen(nn.Module):
    """A transformer in training on patches of several sides, or on some of its patches; in evaluation as it is."""

    module: ViT
    whole: Size
    patches: tuple[int, ...] = ()
    shares: tuple[int, ...] = ()
    kept: int = 0

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> Any:
        if train and self.patches:
            run = lambda module, pair: module(resize_images(pair[0], self.whole), patch=pair[1], train=True)
            pairs = lambda images, patch: (images, patch)
            return icpc(run, self.patches, shares=self.shares, compress=pairs)(self.module, images)
        keep = None
        if train and self.kept:
            total = self.module.grid[0] * self.module.grid[1]
            keep = random_patches(self.make_rng("dropout"), images.shape[0], total, self.kept)
        return self.module(resize_images(images, self.whole), train=train, keep=keep)


def _arms(config: IcpcStudy) -> Iterator[Arm]:
    def arm(name: str, role: Role, label: str, how: How, *parts: Part) -> Arm:
        return Arm(name, role, functools.partial(_program, config, how, parts), label)

    full = lambda loaded, model: _Chosen(model, loaded.sizes[-1])
    mixed = lambda loaded, model: MixedLevels(model, loaded.sizes, config.shares, whole=loaded.sizes[-1])
    at = lambda place: lambda loaded, model: _Chosen(model, loaded.sizes[place])
    yield arm("full", "baseline", "full size only", "interp", (1.0, full))
    yield arm("full-short", "baseline", "full size only, as many tokens as ICPC", "interp", (0.0, full))
    yield arm("icpc", "method", "ICPC, positions by crop (as in the paper)", "crop", (1.0, mixed))
    others: tuple[How, ...] = ("interp", "spread", "fractional")
    for how in others:
        yield arm(f"icpc-{how}", "method", f"ICPC, positions by {how}", how, (1.0, mixed))
    late = ((1 - config.late, mixed), (config.late, full))
    yield arm("icpc-late", "method", "ICPC by interp, full size at the end", "interp", *late)
    steps = len(config.scales) - 2
    ladder = [(0.5, at(0)), *((0.3 / steps, at(1 + place)) for place in range(steps)), (0.2 if steps else 0.5, full)]
    yield arm("progressive", "alternative", "progressive resizing", "interp", *ladder)

    def flexible(loaded: Loaded, model: ViT) -> nn.Module:
        sides = _patches(loaded, model)
        return _Chosen(model, loaded.sizes[-1], patches=sides, shares=_dividing(config.batch_size, len(sides)))

    yield arm("flexible-patches", "alternative", "larger patches (FlexiViT)", "interp", (1.0, flexible))
    some = lambda loaded, model: _Chosen(
        model, loaded.sizes[-1], kept=max(1, round(config.kept * model.grid[0] * model.grid[1]))
    )
    yield arm("patch-dropout", "alternative", "fewer patches (PatchDropout)", "interp", (1.0, some))


def _patches(loaded: Loaded, model: ViT) -> tuple[int, ...]:
    """The own side of a patch and larger ones that divide the image, at most four in all."""
    height, width = loaded.sizes[-1]
    sides = range(model.patch, min(height, width) // 2 + 1)
    return tuple(side for side in sides if height % side == 0 and width % side == 0)[:4]


def _dividing(rows: int, count: int) -> tuple[int, ...]:
    """Shares of ``count`` patches whose sum divides the batch: 1 each, and for the own one what is over."""
    whole = next((total for total in range(count, rows + 1) if rows % total == 0), count)
    return (whole - count + 1, *(1,) * (count - 1))


def _program(config: IcpcStudy, how: How, parts: Sequence[Part], loaded: Loaded) -> Program:
    """Phases of one training, of the given shares, each on its own view of the images; a share of 0 is a short run."""
    selector = position_selector(how, table_grid=loaded.model.grid, prefix=loaded.model.prefix)
    model = loaded.model.clone(positions=selector, patch_kernel=resize_patch_kernel)
    draw = None
    if config.crop:
        draw = lambda batch, step, rng: {**batch, "image": random_crop_flip(batch["image"], rng, padding=config.crop)}
    rows = {"train_rows": config.train_rows, "test_rows": config.test_rows}
    own = {"dtype": jnp.dtype(model.dtype).name, "remat": model.remat}
    tasks = [image_task(loaded.data, make(loaded, model), **rows)._replace(**own) for _, make in parts]
    # Compiled, initialising leaves the forward pass out.
    tasks = [task._replace(init=jax.jit(task.init)) for task in tasks]
    loader = column_loader(tasks[0].train, config.batch_size, transform=draw)
    steps = config.budget.steps(config.batch_size, loader.epoch_steps)
    shares = [share for share, _ in parts]
    if shares == [0.0]:
        steps, shares = max(1, round(steps * _token_share(config, loaded))), [1.0]
    edges = [round(steps * sum(shares[:place])) for place in range(len(shares))] + [steps]
    tx = _adamw(config, steps)
    programs = [supervised(task, tx, steps=steps, loader=loader, options=config.train) for task in tasks]
    phases = [
        program.phases[0]._replace(steps=last - first)
        for program, first, last in zip(programs, edges[:-1], edges[1:], strict=True)
        if last > first
    ]
    evaluate = functools.partial(_measured, config, loaded, tasks[-1], model)
    return programs[-1]._replace(phases=tuple(phases), evaluate=evaluate)


def _token_share(config: IcpcStudy, loaded: Loaded) -> float:
    tokens = [level_tokens(size, loaded.model.patch) for size in loaded.sizes]
    return float(np.average(tokens, weights=config.shares) / tokens[-1])


def _adamw(config: IcpcStudy, steps: int) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, int(config.warmup * steps), steps)
    # By the path: positions and tokens have as many axes as matrices, but only kernels are decayed.
    kernels = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.ndim > 1 and "kernel" in jax.tree_util.keystr(path[-1:]), params
    )
    return optax.adamw(rate, weight_decay=config.weight_decay, mask=kernels)


# Measures


def _measured(config: IcpcStudy, loaded: Loaded, task: Task, model: ViT, state: Any) -> Mapping[str, Any]:
    """Accuracy at every size, and of the cascade of the smallest and the full size."""
    variables = {"params": state.variables["params"]["module"]}
    logits = np.stack([_logits(loaded.logits(model, size), variables, task) for size in loaded.sizes], 1)
    labels = np.asarray(task.test["label"])
    tokens = [level_tokens(size, model.patch, prefix=model.prefix) for size in loaded.sizes]
    names = [f"{height}" + (f"x{width}" if width != height else "") for height, width in loaded.sizes]
    return level_measures(config, logits, labels, tokens, names)


def _logits(run: Callable[..., jax.Array], variables: Mapping[str, Any], task: Task, size: int = 250) -> np.ndarray:
    images, rows = task.test["image"], len(task.test["label"])
    size = min(size, rows)
    ready = lambda batch: standardised(unit_images(batch), task.details)
    starts = range(0, rows, size)
    parts = [run(variables, ready(pad_to(images[start : start + size], size))) for start in starts]
    return np.concatenate(jax.device_get(parts))[:rows]
