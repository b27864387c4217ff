"""The BucketSampler study: ways to batch texts of different lengths, with the same model and the same epochs."""

import dataclasses

from effjax.core.errors import Count
from effjax.data.packing import PackedBatches
from effjax.recipes.spec import Claim, Group
from effjax.recipes.texts import MODALITY, TextArm, TextStudy, bucketed, group_name, padded, text_groups
from effjax.tasks.task import Task

__all__ = ["MODALITY", "BucketSamplerStudy", "claims", "groups"]

# Static and dynamic padding process at least this many times BucketSampler's tokens: it depends on the lengths, and on
# padding to 64.
_TIMES = {"sst2": (3.0, 2.0), "sms_spam": (2.0, 1.5)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BucketSamplerStudy(TextStudy):
    """Config of the BucketSampler study."""

    growing_caps: tuple[Count, ...] = (64, 256, 512)
    """Largest batch in each epoch, of the arm with the paper's growing batches; later epochs have the last one."""
    growing_shapes: Count = 24
    """Number of batch shapes that the arm with growing batches may use."""
    official_width: Count = 5
    """Width of the paper's buckets, in tokens."""


def groups(config: BucketSamplerStudy) -> list[Group]:
    """Every arm on every task."""

    def official(task: Task, seed: int, epochs: int):
        longest = int(task.train["input_ids"].lengths.max())
        edges = (*range(config.official_width, longest, config.official_width), longest)
        return bucketed(config, boundaries=edges, max_shapes=len(edges))(task, seed, epochs)

    def packed(task: Task, seed: int, epochs: int):
        """A batch of packed rows holds about as many texts as the batches of the other arms."""
        lengths = task.train["input_ids"].lengths
        return PackedBatches(
            task.train,
            seed=seed,
            epochs=epochs,
            length=config.max_length,
            batch_size=max(1, round(config.batch_size * float(lengths.mean()) / config.max_length)),
            max_segments=config.max_length // int(lengths.min()),
            pad_id=task.tokenizer.pad_id,
        )

    growing = bucketed(config, cap=config.growing_caps, max_shapes=config.growing_shapes)
    caps = "/".join(map(str, config.growing_caps))
    static = padded(config, length=config.max_length)
    arms = {
        "static": TextArm("baseline", f"static padding to {config.max_length}", static),
        "dynamic": TextArm("baseline", "dynamic padding (longest row, multiple of 8)", padded(config)),
        "buckets": TextArm("method", f"BucketSampler, {_shapes(config)}", bucketed(config)),
        "grouped": TextArm("alternative", "group_by_length", padded(config, group_by_length=True)),
        "packing": TextArm("alternative", "packing", packed),
        "official": TextArm("method", f"BucketSampler, width {config.official_width}", official),
        "growing": TextArm("method", f"BucketSampler, caps {caps}", growing),
        "unmerged": TextArm("control", "buckets, residues not merged", bucketed(config, merge=False)),
    }
    return text_groups(config, arms)


def claims(config: BucketSamplerStudy) -> dict[str, tuple[Claim, ...]]:
    """Fewer tokens, less time to the same extent, the same quality, few executables."""
    return {group_name(task): _claims(config, "" if config.own else task.rpartition("/")[0]) for task in config.tasks}


def _claims(config: BucketSamplerStudy, data: str) -> tuple[Claim, ...]:
    static, dynamic = _TIMES.get(data, (1.0, 1.0))
    return (
        Claim("static", ">=", "buckets", of="processed_tokens", times=static),
        Claim("dynamic", ">=", "buckets", of="processed_tokens", times=dynamic),
        Claim("buckets", ">=", "static", plus=-0.01),
        Claim("buckets", "<=", "unmerged", of="processed_tokens", why="merging does it"),
        Claim("static", ">=", "buckets", of="train_s", times=0.7, as_ratio_of="processed_tokens"),
        Claim("dynamic", ">=", "buckets", of="train_s", times=0.7, as_ratio_of="processed_tokens"),
        *(() if config.max_shapes == "auto" else (Claim("buckets", "<=", config.max_shapes, of="compiles"),)),
    )


def _shapes(config: BucketSamplerStudy) -> str:
    return "shapes by their cost" if config.max_shapes == "auto" else f"{config.max_shapes} shapes"
