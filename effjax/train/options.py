"""Typed settings of the training loop."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

from effjax.core.errors import Count, NotNegative, Positive, check_choice, check_fields, check_number

__all__ = ["Budget", "MeshOptions", "TrainOptions"]

PASSING = ("mesh", "compile_cache", "prefetch", "checkpoint_seconds", "checkpoint_steps", "keep", "profile")
"""Fields of ``TrainOptions`` that may differ between two starts of one run: what is learned and what is logged are the
same, but for the last bits of a mesh of another shape."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """What every arm may spend on one run."""

    amount: Positive
    """How much of the unit."""
    unit: Literal["steps", "examples", "epochs", "device_seconds"] = "steps"
    """What is counted; device seconds are turned into steps by each arm's measured step time."""

    def __post_init__(self):
        check_fields(self, "budget.")

    def steps(self, batch_size: int, epoch_steps: Callable[[int], int] | None = None) -> int:
        """Steps of one run; device seconds must have been resolved before.

        Args:
          batch_size: examples of one step, for a budget in examples.
          epoch_steps: the steps of epoch 0, 1, ..., for a budget in epochs; it may have a fraction.

        Example:
          >>> Budget(2.5, "epochs").steps(32, lambda epoch: (10, 6, 4)[epoch])
          18
        """
        if self.unit == "epochs":
            if epoch_steps is None:
                raise ValueError("a budget in epochs needs the data's rows, which this study does not use. Use steps.")
            whole, part = divmod(self.amount, 1)
            steps = sum(epoch_steps(epoch) for epoch in range(int(whole)))
            return max(1, steps + (round(part * epoch_steps(int(whole))) if part else 0))
        if self.unit == "device_seconds":
            raise ValueError("a budget in device seconds has no number of steps before the step time is measured.")
        return max(1, int(self.amount // batch_size if self.unit == "examples" else self.amount))


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """Devices along each mesh axis; -1 on one axis takes all that remain."""

    data: int = 1
    """Devices along which a batch is split."""
    model: int = 1
    """Devices that share one model's parameters."""
    expert: int = 1
    """Devices that hold different experts."""
    rules: Literal["data", "fsdp", "tensor", "fsdp+tensor"] = "data"
    """How parameters lie on it: a copy on every device, split over data, over model, or over both."""

    def __post_init__(self):
        check_choice("mesh.rules", self.rules, ("data", "fsdp", "tensor", "fsdp+tensor"))
        sizes = {"data": self.data, "model": self.model, "expert": self.expert}
        for name, axis in (("fsdp", "data"), ("tensor", "model")):
            if name in self.rules and sizes[axis] == 1:
                raise ValueError(
                    f"mesh.rules={self.rules!r} splits parameters over mesh.{axis}, which is 1. Set mesh.{axis}."
                )
        for axis, size in sizes.items():
            if size != -1:
                check_number(f"mesh.{axis}", size, low=1, integer=True, hint="Use -1 for all remaining devices.")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"mesh={sizes}: only one axis may be -1.")

    @functools.cached_property
    def built(self) -> Any:
        """The mesh, made when it is first asked for and once; None where one device does everything."""
        from effjax.train.mesh import make_mesh

        return make_mesh(self)


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How a run is executed; none of these fields changes what is learned, but for ``dtype``."""

    accumulate: Count = 1
    """Micro-batches whose gradients are averaged for one update."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which the model computes; parameters stay float32."""
    remat: bool = False
    """Whether activations are computed again in the backward pass instead of kept."""
    donate: bool = True
    """Whether the new state takes the old state's buffers."""
    compile_cache: str | None = None
    """Folder of JAX's persistent compilation cache, in place of the one that the command keeps."""
    prefetch: Count = 2
    """Batches put on the device ahead of use."""
    read_lag: Count = 16
    """Steps between computing a metric and reading it, so that the host does not block the device."""
    log_steps: Count = 50
    """Steps averaged into one line of the log."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What is done where a loss, gradient or parameter is not finite: end the run, or drop the update and count it."""
    checkpoint_seconds: NotNegative = 30.0
    """Seconds between checkpoints of a single process."""
    checkpoint_steps: Count | None = None
    """Steps between checkpoints, in place of the seconds; several processes default to a twentieth of the run."""
    keep: Count = 2
    """Newest checkpoints kept."""
    evaluate_steps: Count | None = None
    """Steps between evaluations during training; None for none."""
    best_metric: str | None = None
    """Evaluation metric whose checkpoint of the largest value is kept too; -NAME for the smallest."""
    profile: str | None = None
    """Folder on a disk for a trace of five steps by JAX's profiler, after ten, or in a shorter run after the first; of
    several runs each has its own inside. The traced steps count, and are slower."""
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)
    """Mesh of devices."""

    def __post_init__(self):
        check_fields(self, "train.")
        if self.profile is not None and (not self.profile or "://" in self.profile):
            raise ValueError(
                f"train.profile={self.profile!r} must be a folder on a disk of each host: the profiler writes to no "
                "other. Give a local one and copy it to the bucket afterwards."
            )
        if self.best_metric is not None and self.evaluate_steps is None:
            raise ValueError(
                f"train.best_metric={self.best_metric!r} needs evaluations during training: set train.evaluate_steps."
            )
