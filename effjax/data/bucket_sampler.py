"""BucketSampler: length-aware batches of few static shapes (Nagarajan, Raghunathan 2023, Findings of EMNLP).

Every epoch is planned before the run starts, in NumPy, from ``(lengths, seed, epoch)`` alone: so the shapes to compile
and the number of steps are known, and every host has the same plan.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Integer

from effjax.core.errors import check_number
from effjax.core.shapes import check_ladder, fit_ladder
from effjax.data.ladders import cheapest_ladder
from effjax.data.planned import BatchPlan, Columns, PlannedBatches
from effjax.data.step_costs import StepCosts, check_costs

__all__ = ["BucketSampler", "plan_epoch"]


def plan_epoch(
    lengths: Integer[np.ndarray, "n"],
    *,
    epoch: int,
    seed: int,
    boundaries: Sequence[int],
    batch_sizes: Sequence[int],
    cap: int | None = None,
    labels: Integer[np.ndarray, "n"] | None = None,
    merge: bool = True,
) -> list[BatchPlan]:
    r"""Batches of one epoch, each of a shape :math:`(B_b, L_b)`, every example once.

    Bucket b holds the lengths in :math:`(L_{b-1}, L_b]` and is cut, shuffled, into batches of

    .. math:: B_b = \min(\mathrm{cap}, S_b)

    rows. What is left of it is carried upward (residual batch merging): it joins the residue of the next bucket and,
    once there are :math:`B` of them, takes that bucket's shape. Only what is left after the top bucket gets dummy rows,
    in the cheapest shape that holds it. The batches come in random order.

    Args:
      lengths: tokens of every example, special tokens included.
      epoch: from 0; with ``seed`` it fixes the order.
      seed: 0 or more.
      boundaries: :math:`L_b`, strictly increasing; the last one holds the longest example.
      batch_sizes: :math:`S_b`, one per boundary, not increasing.
      cap: largest batch of this epoch; None for no limit.
      labels: class of every example, to spread each over the batches of a bucket (stratified shuffle).
      merge: carry residues upward; else every bucket's last batch gets dummy rows.

    Returns:
      The plan: the same on every host.

    Raises:
      ValueError: an example longer than the last boundary, or arguments out of range.

    Example:
      >>> plan = plan_epoch(np.array([3, 9, 4, 2, 8]), epoch=0, seed=0, boundaries=(4, 12), batch_sizes=(2, 2))
      >>> sorted((batch.length, batch.size, batch.valid) for batch in plan)
      [(4, 2, 1), (4, 2, 2), (12, 2, 2)]

    The paper's code pads a batch to its own longest example and emits merged batches of odd sizes, which XLA would
    compile one by one.

    Source: Nagarajan, Raghunathan 2023, Findings of EMNLP (2023.findings-emnlp.782).
    """
    lengths, boundaries, sizes = _check_plan(lengths, epoch, seed, boundaries, batch_sizes, cap)
    rng = np.random.default_rng((seed, epoch, 0))
    members = _by_bucket(lengths, boundaries, rng.permutation(len(lengths)))
    if labels is not None:
        members = [_spread(rng, rows, labels[rows]) for rows in members]
    plan, carry, shapes = [], np.zeros(0, np.int64), []
    for length, size, rows in zip(boundaries, sizes, members, strict=True):
        if not len(rows):
            continue
        shapes.append((size, length))
        whole = len(rows) // size * size
        plan += [BatchPlan(length, size, batch) for batch in rows[:whole].reshape(-1, size)]
        carry = np.concatenate([carry, rows[whole:]])
        while len(carry) >= size or (len(carry) and not merge):
            plan.append(BatchPlan(length, size, carry[:size]))
            carry = carry[size:]
    if len(carry):
        fitting = [(b * n, n, b) for b, n in shapes if b >= len(carry) and n >= lengths[carry].max()]
        _, length, size = min(fitting)
        plan.append(BatchPlan(length, size, carry))
    return [plan[i] for i in rng.permutation(len(plan))]


def _check_plan(
    lengths: np.ndarray, epoch: int, seed: int, boundaries: Sequence[int], batch_sizes: Sequence[int], cap: int | None
) -> tuple[np.ndarray, tuple[int, ...], list[int]]:
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or not lengths.size or lengths.min() < 0:
        raise ValueError(
            f"lengths is {lengths.dtype}{list(lengths.shape)}; it must be one axis of integers of 0 or more, and not "
            "empty."
        )
    check_number("epoch", epoch, low=0, integer=True)
    check_number("seed", seed, low=0, integer=True)
    boundaries = check_ladder(boundaries, argument="boundaries")
    if lengths.max() > boundaries[-1]:
        raise ValueError(
            f"{int((lengths > boundaries[-1]).sum())} of {len(lengths)} examples are longer than the last boundary "
            f"{boundaries[-1]}; the longest, row {int(lengths.argmax())}, has {lengths.max()} tokens. Add a boundary "
            "(the model must have as many positions) or truncate when tokenising."
        )
    sizes = [int(check_number(f"batch_sizes[{i}]", s, low=1, integer=True)) for i, s in enumerate(batch_sizes)]
    if len(sizes) != len(boundaries) or sizes != sorted(sizes, reverse=True):
        raise ValueError(
            f"batch_sizes={sizes} must hold one size for each of the {len(boundaries)} boundaries, and never rise with "
            "the length: a merged batch takes the shape of the longer bucket."
        )
    if cap is not None:
        check_number("cap", cap, low=1, integer=True)
        sizes = [min(cap, size) for size in sizes]
    return lengths, boundaries, sizes


def _by_bucket(lengths: np.ndarray, boundaries: Sequence[int], order: np.ndarray) -> list[np.ndarray]:
    """The rows of every bucket, in the order given."""
    bucket = np.searchsorted(boundaries, lengths)[order]
    ends = np.cumsum(np.bincount(bucket, minlength=len(boundaries)))
    return np.split(order[np.argsort(bucket, kind="stable")], ends[:-1])


def _spread(rng: np.random.Generator, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Shuffled rows in a new order: the members of every class at even distances."""
    place = np.empty(len(rows))
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        place[mine] = (np.arange(len(mine)) + rng.random()) / len(mine)
    return rows[np.argsort(place)]


class BucketSampler(PlannedBatches):
    r"""Batches from narrow buckets of length, in few static shapes known before the run starts.

    Bucket b holds the examples of more than :math:`L_{b-1}` and up to :math:`L_b` tokens; in epoch e its batches have

    .. math:: B_b(e) = \min\left( \mathrm{cap}(e), \lfloor \mathrm{tokens} / L_b \rfloor_m \right)

    rows, rounded down to a multiple m. What does not fill a batch is carried to the next bucket's shape, see
    ``plan_epoch``; at most one batch of an epoch has dummy rows. Where one learning rate meets batches of several
    sizes, ``scale_by_batch_size`` scales the updates.

    Args:
      columns: token ids and labels, or ``epoch -> columns``, as for ``PlannedBatches``.
      seed: of the order.
      epochs: passes over the data; a number, for all are planned ahead.
      boundaries: the :math:`L_b`; by default those that pad these data least within ``max_shapes``.
      max_shapes: compile budget: most ``(B, L)`` in the run. A growing ``cap`` spends more of it per boundary. Or
        ``"auto"``: the boundaries whose predicted seconds, compiling included, are least (``cheapest_ladder``).
      costs: of compiling and of a step, for ``"auto"``: measured by ``effjax.train.measure_costs``, on several
        processes the same in all.
      tokens: padded tokens of a batch, at most.
      batch_sizes: largest batch for each of ``boundaries``, not increasing, instead of those that ``tokens`` gives.
      cap: largest batch; a sequence gives one per epoch, and its last goes on. Large early caps mean few optimizer
        steps and cost accuracy on small data.
      multiple: m, of which every batch size and cap is a multiple: 8 times the data shards suits vector units.
      length_multiple: every default boundary is a multiple of it; 8 suits vector units where rows are long.
      stratify: name of an integer column whose classes are spread evenly over the batches of a bucket.
      merge: carry residues upward, see ``plan_epoch``.
      **options: ``pad_id``, ``pad_values``, ``process_index`` and ``process_count`` of ``PlannedBatches``.

    Raises:
      ValueError: examples longer than the last boundary, more shapes than ``max_shapes``, batch sizes that do not
        divide among the processes, ``"auto"`` without costs or together with boundaries, costs without ``"auto"``, or
        arguments out of range.

    Warns:
      NoEffectWarning: boundaries that no example reaches.

    Example:
      >>> ids = [[5, 6], [7], [8, 9, 4], [3]]
      >>> data = BucketSampler({"input_ids": ids}, seed=0, epochs=1, boundaries=(2, 4), multiple=1, cap=2)
      >>> data.shapes, data.total_steps, data.processed_tokens, data.real_tokens
      (((2, 2), (2, 4)), 2, 12, 7)
      >>> sorted(next(data))
      ['input_ids', 'mask', 'weight']

    The paper (Nagarajan and Raghunathan, Findings of EMNLP 2023) has 26 buckets, batch sizes measured on its card,
    caps 64, 256, 512, ... by epoch and dynamic shapes; its program keeps the cap at 64 unless tokens are dropped as
    well. Static shapes, the ladder and the stratified shuffle are ours.
    """

    def __init__(
        self,
        columns: Columns | Callable[[int], Columns] | Any,
        *,
        seed: int,
        epochs: int,
        boundaries: Sequence[int] | None = None,
        max_shapes: int | Literal["auto"] = 9,
        costs: StepCosts | None = None,
        tokens: int = 8192,
        batch_sizes: Sequence[int] | None = None,
        cap: int | Sequence[int] = 64,
        multiple: int = 8,
        length_multiple: int = 1,
        stratify: str | None = None,
        merge: bool = True,
        **options: Any,
    ):
        super().__init__(columns, seed=seed, epochs=epochs, **options)
        _check_shapes(max_shapes, costs, boundaries)
        check_number("multiple", multiple, low=1, integer=True)
        caps = _check_caps(cap, epochs, multiple)
        labels = None if stratify is None else _classes(self._columns(0), stratify)
        pooled = np.concatenate(self._lengths)
        if boundaries is None:
            if batch_sizes is not None:
                raise ValueError(f"batch_sizes={batch_sizes} belong to boundaries. Give those too, or tokens instead.")
            fitted = {"tokens": tokens, "multiple": multiple, "caps": caps, "length_multiple": length_multiple}
            if costs is not None:
                _batch_sizes(tokens, (pooled.max(),), multiple)  # refuses too few tokens
                # The lengths of several epochs count as one epoch: compiling weighs as much more.
                whole = costs._replace(compile_s=costs.compile_s * len(self._lengths))
                boundaries = cheapest_ladder(pooled, whole, **fitted)
            else:
                assert max_shapes != "auto"  # checked above
                boundaries = _fit_boundaries(pooled, max_shapes, **fitted)
        else:
            boundaries = check_ladder(boundaries, argument="boundaries")
            if pooled.max() <= boundaries[-1]:
                check_ladder(boundaries, int(pooled.max()), argument="boundaries")  # warns of idle ones
        batch_sizes = _batch_sizes(tokens, boundaries, multiple) if batch_sizes is None else list(batch_sizes)

        def plan(epoch: int) -> list[BatchPlan]:
            return plan_epoch(
                self._epoch_lengths(epoch),
                epoch=epoch,
                seed=seed,
                boundaries=boundaries,
                batch_sizes=batch_sizes,
                cap=caps[epoch],
                labels=labels,
                merge=merge,
            )

        self._set_plan(plan, boundaries=list(boundaries), batch_sizes=batch_sizes, caps=caps)
        if max_shapes != "auto" and len(self.shapes) > max_shapes:
            raise ValueError(
                f"max_shapes={max_shapes}, but boundaries={boundaries} with caps {sorted(set(caps))} make "
                f"{len(self.shapes)} shapes (rows, tokens): {self.shapes}. Give fewer boundaries, one cap, or "
                f"max_shapes={len(self.shapes)}."
            )

    def label_entropy(self, column: str = "label") -> dict[str, float]:
        """How much narrow buckets skew the classes in a batch.

        Args:
          column: an integer column.

        Returns:
          Entropies of the class proportions in nats: ``data`` of the whole set, ``mean`` and ``least`` over batches.
          Where the mean is far below ``data``, ``stratify`` helps.
        """
        labels = _classes(self._columns(0), column)
        counts = np.stack([np.bincount(labels[plan.rows], minlength=labels.max() + 1) for plan in self._batches])
        each = _entropy(counts)
        return {"data": float(_entropy(counts.sum(0))), "mean": float(each.mean()), "least": float(each.min())}


def _entropy(counts: np.ndarray) -> np.ndarray | np.floating:
    shares = counts / counts.sum(-1, keepdims=True)
    return -np.sum(shares * np.log(np.where(shares > 0, shares, 1)), axis=-1)


def _check_shapes(max_shapes: Any, costs: StepCosts | None, boundaries: Sequence[int] | None) -> None:
    if isinstance(max_shapes, str):
        if max_shapes != "auto":
            raise ValueError(f"max_shapes={max_shapes!r} must be a number of 1 or more, or 'auto'.")
        check_costs(costs)
        if boundaries is not None:
            raise ValueError(f"max_shapes='auto' chooses the boundaries: leave out boundaries={list(boundaries)}.")
        return
    check_number("max_shapes", max_shapes, low=1, integer=True)
    if costs is not None:
        raise ValueError(f"costs are for max_shapes='auto', and max_shapes={max_shapes}. Leave out one of them.")


def _check_caps(cap: int | Sequence[int], epochs: int, multiple: int) -> list[int]:
    given = list(cap) if isinstance(cap, Sequence | np.ndarray) else [cap]
    if not given:
        raise ValueError("cap=() holds no batch size. Give one for all epochs, or one per epoch.")
    for value in given:
        check_number("cap", value, low=multiple, integer=True, hint=f"A batch has at least multiple={multiple} rows.")
        if value % multiple:
            raise ValueError(f"cap={value} must be a multiple of multiple={multiple}: {value // multiple * multiple}.")
    return [int(given[min(epoch, len(given) - 1)]) for epoch in range(epochs)]


def _batch_sizes(tokens: int, boundaries: Sequence[int], multiple: int) -> list[int]:
    longest = boundaries[-1]
    check_number(
        "tokens",
        tokens,
        low=multiple * longest,
        integer=True,
        hint=f"A batch holds multiple={multiple} rows of the longest boundary {longest}.",
    )
    return [tokens // length // multiple * multiple for length in boundaries]


def _fit_boundaries(
    lengths: np.ndarray, max_shapes: int, *, length_multiple: int, tokens: int, multiple: int, caps: Sequence[int]
) -> tuple[int, ...]:
    """The ladder of most rungs that makes at most ``max_shapes`` shapes."""
    check_number("length_multiple", length_multiple, low=1, integer=True)
    distinct = len(np.unique(np.maximum(-(-lengths // length_multiple), 1)))
    shapes = 0
    for count in range(min(max_shapes, distinct), 0, -1):
        rungs = fit_ladder(lengths, count, multiple=length_multiple)
        sizes = _batch_sizes(tokens, rungs, multiple)
        shapes = len({(min(cap, size), length) for length, size in zip(rungs, sizes, strict=True) for cap in caps})
        if shapes <= max_shapes:
            return rungs
    raise ValueError(
        f"max_shapes={max_shapes} is too few even for one boundary: its {len(set(caps))} caps make {shapes} shapes. "
        f"Give one cap, or max_shapes={shapes} or more."
    )


def _classes(columns: Mapping[str, Any], name: str) -> np.ndarray:
    column = columns.get(name)
    if not isinstance(column, np.ndarray) or column.dtype.kind not in "biu" or column.ndim != 1 or column.min() < 0:
        raise ValueError(
            f"Column {name!r} must hold one class of 0 or more for each example; the columns are {sorted(columns)}."
        )
    return column
