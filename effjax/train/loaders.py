"""Loaders: columns in a seeded order, and batches that are planned ahead."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from effjax.core.errors import check_number
from effjax.data.pipeline import batches
from effjax.data.planned import PlannedBatches
from effjax.train.program import BatchShape, Loader

__all__ = ["column_loader", "planned_loader"]

Plan = Callable[[int, int], PlannedBatches]
"""(seed, epochs) -> all batches of a run."""


def column_loader(
    columns: Any, batch_size: int, *, shuffle: bool = True, transform: Callable[..., Any] | None = None
) -> Loader:
    """Batches of equal size over rows in a seeded order, a new one in every epoch.

    Args:
      columns: arrays with one row per example, or another source of ``effjax.data.pipeline.Batches``.
      batch_size: rows of one step, over all processes.
      shuffle: whether the order is random.
      transform: ``(batch, step, rng) -> batch`` on the host.

    Returns:
      A ``Loader``.

    Raises:
      ValueError: fewer rows than one batch.

    Example:
      >>> loader = column_loader({"x": np.arange(8)}, 4)
      >>> next(loader.open(0))["x"].shape, loader.epoch_steps(0)
      ((4,), 2)
    """
    rows = len(jax.tree.leaves(columns)[0]) if isinstance(columns, dict) else len(columns)
    hint = f"The training data have {rows} rows."
    check_number("batch_size", batch_size, low=1, high=rows, integer=True, hint=hint)
    return Loader(
        lambda seed: batches(columns, batch_size, seed=seed, shuffle=shuffle, transform=transform),
        batch_size,
        lambda epoch: rows // batch_size,
    )


def planned_loader(plan: Plan, seeds: Sequence[int], epochs: int, batch_size: int) -> tuple[Loader, int]:
    """Batches that are planned ahead, of few shapes, in as many steps for every seed.

    Args:
      plan: ``(seed, epochs) -> batches``.
      seeds: of the study.
      epochs: passes over the data.
      batch_size: of the batches that the learning rate is meant for.

    Returns:
      The ``Loader``, and the steps of a run.
    """
    plans = [plan(seed, epochs) for seed in seeds]
    steps = max(planned.total_steps for planned in plans)

    def opened(seed: int) -> PlannedBatches:
        planned = plan(seed, epochs)
        # Packed texts may fill a row less than with another seed; such a run goes on into one more epoch.
        return planned if planned.total_steps >= steps else plan(seed, epochs + 1)

    return Loader(opened, batch_size, shapes=tuple(_batch_shapes(plans))), steps


def _batch_shapes(plans: Sequence[PlannedBatches]) -> list[BatchShape]:
    """Every shape of every seed's plan, as the first comes to them; how often each comes there."""
    found: dict[tuple[int, int], BatchShape] = {}
    for planned in plans:
        used = planned.use_of_shapes
        for shape, index in planned.first_uses.items():
            steps, examples = used[shape]
            count = steps if planned is plans[0] else 0
            found.setdefault(shape, BatchShape(planned[index], count, examples / steps, shape[0] * shape[1]))
    return list(found.values())


def examples_in(batch: Any) -> jax.Array | np.ndarray | float:
    """Real examples of a batch: the sum of its column ``weight``, or its rows where it has none."""
    if isinstance(batch, dict) and "weight" in batch:
        return batch["weight"].sum()
    return int(np.shape(jax.tree.leaves(batch)[0])[0])


def token_counts(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Step metrics of a batch of texts: positions that the model processes, and those that are no padding."""
    return {"tokens": float(batch["input_ids"].size), "real_tokens": batch["mask"].sum()}
