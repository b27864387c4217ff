"""BucketSampler: length-aware batches of few static shapes (Nagarajan, Raghunathan 2023, Findings of EMNLP).

Every epoch is planned before the run starts, in NumPy, from ``(lengths, seed, epoch)`` alone: so the shapes to compile
and the number of steps are known, and every host has the same plan.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Integer

from effjax.core.errors import check_number
from effjax.core.shapes import check_ladder, fit_ladder, pad_to
from effjax.data.pipeline import Batch, _process
from effjax.data.ragged import Ragged, narrow_integers

__all__ = ["BucketSampler", "official_cap", "plan_epoch", "plan_epoch_official"]

Columns = Mapping[str, Any]

# The paper's code: bucket edges, and the largest batch of each that an 11 GB card holds with a base-size model.
OFFICIAL_BOUNDARIES: tuple[int, ...] = (*range(5, 126, 5), 128)
OFFICIAL_BATCH_SIZES: tuple[int, ...] = (
    *(2525, 1250, 800, 575, 450, 350, 300, 250, 225, 175, 150, 125, 125),
    *(125, 100, 100, 75, 75, 75, 50, 50, 50, 50, 50, 50, 50),
)


def official_cap(epoch: int) -> int:
    """The paper's cap of the batch size: 64 in epoch 0, then 256, 512, 1024, ...

    Example:
      >>> [official_cap(epoch) for epoch in range(4)]
      [64, 256, 512, 1024]
    """
    check_number("epoch", epoch, low=0, integer=True)
    return 64 if epoch == 0 else 64 * 2 ** (epoch + 1)


class BatchPlan(NamedTuple):
    """One batch of a plan.

    Attributes:
      length: tokens of a row, padding included.
      size: rows, dummy ones included.
      rows: int64 ``[valid]``, the examples; ``size - valid`` dummy rows follow them.
    """

    length: int
    size: int
    rows: Int[np.ndarray, "valid"]

    @property
    def valid(self) -> int:
        """Rows that hold an example."""
        return len(self.rows)


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
      batch_sizes: :math:`S_b`, one a boundary, not increasing.
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

    The paper's code pads a batch to its own longest example and emits merged batches of odd sizes (that is
    ``plan_epoch_official``), which XLA would compile one by one.
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


def plan_epoch_official(
    lengths: Integer[np.ndarray, "n"],
    *,
    epoch: int,
    seed: int,
    boundaries: Sequence[int] = OFFICIAL_BOUNDARIES,
    batch_sizes: Sequence[int] = OFFICIAL_BATCH_SIZES,
    cap: int | None = None,
) -> list[BatchPlan]:
    """Batches of one epoch exactly as the authors' program makes them: many shapes, no dummy rows.

    Residues are gathered in ascending order of buckets and emitted when as many as the present bucket's batch size are
    there; a batch is padded to its own longest example.

    Args:
      lengths: tokens of every example.
      epoch: from 0.
      seed: ``RandomState(seed + epoch)`` shuffles.
      boundaries: upper ends of the buckets.
      batch_sizes: largest batch of each.
      cap: largest batch of this epoch; by default ``official_cap(epoch)``.

    Returns:
      The plan; ``length`` is the longest example's.

    Raises:
      ValueError: see ``plan_epoch``.

    Example:
      >>> plan = plan_epoch_official(np.array([3, 9, 4, 2, 8]), epoch=0, seed=0)
      >>> [(batch.length, batch.size) for batch in plan]
      [(9, 5)]
    """
    cap = official_cap(epoch) if cap is None else cap
    lengths, boundaries, sizes = _check_plan(lengths, epoch, seed, boundaries, batch_sizes, cap)
    rng = np.random.RandomState(seed + epoch)
    groups: list[list[int]] = []
    residues: list[list[int]] = []
    for size, members in zip(sizes, _by_bucket(lengths, boundaries, np.arange(len(lengths))), strict=True):
        rows = members.tolist()
        rng.shuffle(rows)
        whole = len(rows) // size * size
        groups += [rows[start : start + size] for start in range(0, whole, size)]
        residues.append(rows[whole:])
    pending: list[int] = []
    for size, residue in zip(sizes, residues, strict=True):
        for row in (None, *residue):  # first without a row: this bucket's smaller size may be reached already
            pending += [] if row is None else [row]
            if len(pending) >= size:
                groups.append(pending)
                pending = []
    if pending:
        groups.append(pending)
    rng.shuffle(groups)
    arrays = [np.asarray(group, np.int64) for group in groups]
    return [BatchPlan(int(lengths[rows].max()), len(rows), rows) for rows in arrays]


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


class PlannedBatches(Iterator[Batch]):
    """Token batches of a run whose epochs are all planned ahead; a subclass says how.

    By index and as a resumable iterator, like ``effjax.data.pipeline.Batches``: global batch ``i`` is the same on any
    number of processes, and process ``p`` of ``P`` gets the ``p``-th of ``P`` equal contiguous parts of its rows. It is
    also a grain random-access source.

    Args:
      columns: ``input_ids``, a ``Ragged`` or sequences of integers; optionally ``token_type_ids`` like it; and arrays
        of numbers with a row an example (``label``). Or a Hugging Face ``Dataset`` of such columns. Or
        ``epoch -> columns``, for data that change from epoch to epoch (``token_drop``): it must return the same for
        the same epoch, for it is called at the start to plan and again when the epoch is reached.
      seed: of the order.
      epochs: passes over the data.
      pad_id: what ``input_ids`` are padded with.
      process_index: this process; by default ``jax.process_index()``.
      process_count: how many there are; by default ``jax.process_count()``.

    A batch holds ``input_ids`` int32 [B, L], ``mask`` bool [B, L] (True at real tokens), ``weight`` float32 [B] (0 in
    dummy rows, which have no real token) and the other columns, zero in dummy rows. A loss is
    ``(weight * each).sum() / weight.sum()`` over the global batch.
    """

    def __init__(
        self,
        columns: Columns | Callable[[int], Columns],
        *,
        seed: int,
        epochs: int,
        pad_id: int = 0,
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        check_number("seed", seed, low=0, integer=True)
        check_number("epochs", epochs, low=1, integer=True, hint="Every epoch is planned before the first one.")
        self._part, self._parts = _process(process_index, process_count)
        self._pad_id = check_number("pad_id", pad_id, low=0, integer=True)
        self._epochs = epochs
        if callable(columns):
            self._read, self._fixed = columns, None
        else:
            self._read, self._fixed = None, _check_columns(columns)
        self._cache: dict[int, dict[str, Any]] = {}
        self._lengths: list[np.ndarray] = []  # of every epoch, or once where the columns are fixed
        self._lengths = [self._columns(e)["input_ids"].lengths for e in range(epochs if self._read else 1)]
        rows = [len(lengths) for lengths in self._lengths]
        if len(set(rows)) > 1:
            raise ValueError(f"columns(epoch) holds {rows} rows in the epochs. Keep their number: shorten, never drop.")
        self._settings: dict[str, Any] = {"rows": rows[0], "seed": seed, "epochs": epochs, "pad_id": pad_id}
        self._digest = zlib.crc32(self._columns(0)["input_ids"].values)
        self._next = 0

    def _set_plan(self, plan: Callable[[int], list[Any]], **settings: Any) -> None:
        """Plan every epoch; ``settings`` are what the state must agree in, JSON-able."""
        plans = [plan(epoch) for epoch in range(self._epochs)]
        self._batches = [batch for batches in plans for batch in batches]
        self._ends = np.cumsum([len(batches) for batches in plans])
        odd = next((batch.size for batch in self._batches if batch.size % self._parts), None)
        if odd:
            raise ValueError(
                f"A global batch of {odd} rows does not divide among process_count={self._parts}. Choose batch sizes "
                f"that are multiples of {self._parts}."
            )
        for batch in self._batches:
            self._digest = zlib.crc32(batch.rows, self._digest)
        self._settings |= {**settings, "plan": f"{self._digest:08x}"}

    @property
    def total_steps(self) -> int:
        """Batches of the whole run."""
        return len(self._batches)

    @property
    def steps_per_epoch(self) -> tuple[int, ...]:
        """Batches of each epoch."""
        return tuple(np.diff(self._ends, prepend=0).tolist())

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Every ``(rows, tokens)`` of a global batch in the run: one executable each."""
        return tuple(sorted({(batch.size, batch.length) for batch in self._batches}, key=lambda shape: shape[::-1]))

    @property
    def use_of_shapes(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Steps and examples of the run in each of ``shapes``."""
        found = dict.fromkeys(self.shapes, (0, 0))
        for batch in self._batches:
            steps, examples = found[batch.size, batch.length]
            found[batch.size, batch.length] = (steps + 1, examples + len(batch.rows))
        return found

    @property
    def real_tokens(self) -> int:
        """Tokens of the run, padding left out."""
        sums = [int(lengths.sum()) for lengths in self._lengths]
        return sum(sums) if self._read else sums[0] * self._epochs

    @property
    def processed_tokens(self) -> int:
        """Tokens of the run, padding and dummy rows included; over ``real_tokens`` it is the price of padding."""
        return sum(batch.size * batch.length for batch in self._batches)

    def example_batches(self) -> Iterator[Batch]:
        """One batch of the run for every shape, to compile all executables before the first step."""
        for size, length in self.shapes:
            plans = enumerate(self._batches)
            yield self[next(i for i, plan in plans if (plan.size, plan.length) == (size, length))]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"index={index} is outside [0, {len(self) - 1}].")
        columns = self._columns(int(np.searchsorted(self._ends, index, side="right")))
        return self._gather(columns, self._batches[index])

    def _epoch_lengths(self, epoch: int) -> np.ndarray:
        return self._lengths[epoch if self._read else 0]

    def _gather(self, columns: Mapping[str, Any], plan: Any) -> Batch:
        share = plan.size // self._parts
        rows = plan.rows[self._part * share : (self._part + 1) * share]
        lengths = pad_to(columns["input_ids"].lengths[rows], share)
        batch = {"mask": np.arange(plan.length) < lengths[:, None], "weight": np.ones(len(rows), np.float32)}
        for name, column in columns.items():
            if isinstance(column, Ragged):
                value = self._pad_id if name == "input_ids" else 0
                batch[name] = pad_to(column.pad(rows, plan.length, value), share, value=value)
            else:
                batch[name] = column[rows]
        return {name: pad_to(array, share) for name, array in batch.items()}

    def _columns(self, epoch: int) -> dict[str, Any]:
        if self._fixed is not None:
            return self._fixed
        cache = self._cache  # read once: grain may call from several threads
        if epoch not in cache:
            columns = _check_columns(self._read(epoch))
            if self._lengths and not np.array_equal(columns["input_ids"].lengths, self._lengths[epoch]):
                raise ValueError(
                    f"columns({epoch}) returned other lengths than when the run was planned. It must depend on the "
                    "epoch alone: draw with a generator made from a seed and the epoch."
                )
            # Two epochs, for reading ahead across their boundary.
            cache = self._cache = {**dict(list(cache.items())[-1:]), epoch: columns}
        return cache[epoch]

    def __iter__(self) -> "PlannedBatches":
        return self

    def __next__(self) -> Batch:
        if self._next >= len(self):
            raise StopIteration
        batch = self[self._next]
        self._next += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands, with what fixes its order; JSON-able."""
        return {"next": self._next, **self._settings}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken; any number of processes may continue it.

        Raises:
          ValueError: the state belongs to another order, with the difference.
        """
        own = self.get_state()
        if set(state) != set(own):
            raise ValueError(
                f"state={dict(state)!r} is not a state of {type(self).__name__}, which holds {sorted(own)}."
            )
        differing = [
            f"{key} is {state[key]!r} in the state and {own[key]!r} here"
            for key in own
            if key != "next" and state[key] != own[key]
        ]
        if differing:
            raise ValueError(f"The state belongs to other data or settings: {'; '.join(differing)}.")
        self._next = check_number("state['next']", state["next"], low=0, high=len(self), integer=True)


class BucketSampler(PlannedBatches):
    r"""Batches from narrow buckets of length, in few static shapes known before the run starts.

    Bucket b holds the examples of more than :math:`L_{b-1}` and up to :math:`L_b` tokens; in epoch e its batches have

    .. math:: B_b(e) = \min\left( \mathrm{cap}(e), \lfloor \mathrm{tokens} / L_b \rfloor_m \right)

    rows, rounded down to a multiple m. What does not fill a batch is carried to the next bucket's shape, see
    ``plan_epoch``; at most one batch of an epoch has dummy rows. Where batches of unlike sizes meet one learning rate,
    ``scale_by_batch_size`` scales the updates.

    Args:
      columns: see ``PlannedBatches``: token ids and labels, or ``epoch -> columns``.
      seed: of the order.
      epochs: passes over the data; all are planned at once.
      boundaries: the :math:`L_b`; by default those that pad these data least within ``max_shapes``.
      max_shapes: compile budget: most ``(B, L)`` in the run. A growing ``cap`` spends more of it per boundary.
      tokens: padded tokens of a batch, at most.
      batch_sizes: largest batch for each of ``boundaries``, not increasing, instead of those that ``tokens`` gives.
      cap: largest batch; a sequence gives one an epoch, and its last goes on. Large early caps mean few optimizer
        steps and cost accuracy on small data.
      multiple: m, of which every batch size and cap is a multiple: 8 times the data shards suits vector units.
      length_multiple: every default boundary is a multiple of it; 8 suits vector units where rows are long.
      stratify: name of an integer column whose classes are spread evenly over the batches of a bucket.
      merge: carry residues upward, see ``plan_epoch``.
      **options: ``pad_id``, ``process_index`` and ``process_count`` of ``PlannedBatches``.

    Raises:
      ValueError: examples longer than the last boundary, more shapes than ``max_shapes``, batch sizes that do not
        divide among the processes, or arguments out of range.

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
    caps 64, 256, 512, ... by epoch and dynamic shapes, see ``plan_epoch_official`` and ``official_cap``; its program
    keeps the cap at 64 unless tokens are dropped as well. Static shapes, the ladder and the stratified shuffle are
    ours.
    """

    def __init__(
        self,
        columns: Columns | Callable[[int], Columns],
        *,
        seed: int,
        epochs: int,
        boundaries: Sequence[int] | None = None,
        max_shapes: int = 9,
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
        check_number("max_shapes", max_shapes, low=1, integer=True)
        check_number("multiple", multiple, low=1, integer=True)
        caps = _check_caps(cap, epochs, multiple)
        labels = None if stratify is None else _classes(self._columns(0), stratify)
        pooled = np.concatenate(self._lengths)
        if boundaries is None:
            if batch_sizes is not None:
                raise ValueError(f"batch_sizes={batch_sizes} belong to boundaries. Give those too, or tokens instead.")
            boundaries = _fit_boundaries(pooled, max_shapes, length_multiple, tokens, multiple, caps)
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
        if len(self.shapes) > max_shapes:
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


def _entropy(counts: np.ndarray) -> np.ndarray:
    shares = counts / counts.sum(-1, keepdims=True)
    return -np.sum(shares * np.log(np.where(shares > 0, shares, 1)), axis=-1)


def _check_caps(cap: int | Sequence[int], epochs: int, multiple: int) -> list[int]:
    given = [cap] if np.ndim(cap) == 0 else list(cap)
    if not given:
        raise ValueError("cap=() holds no batch size. Give one for all epochs, or one an epoch.")
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
    lengths: np.ndarray, max_shapes: int, length_multiple: int, tokens: int, multiple: int, caps: Sequence[int]
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


def _check_columns(source: Any) -> dict[str, Any]:
    """``input_ids`` (and ``token_type_ids``) as ``Ragged``, all else as arrays of 32 bits."""
    columns = _of_table(source) if hasattr(source, "with_format") else dict(source)
    if "input_ids" not in columns:
        raise ValueError(f"columns={sorted(columns)} lack 'input_ids', the token ids. Tokenise the texts first.")
    columns.pop("attention_mask", None)  # written by Hugging Face tokenizers; ``mask`` replaces it
    for name in ("input_ids", "token_type_ids"):
        if columns.get(name) is None:
            columns.pop(name, None)
        elif not isinstance(columns[name], Ragged):
            columns[name] = Ragged.of(columns[name])
    ids = columns["input_ids"]
    for name, column in columns.items():
        if len(column) != len(ids):
            raise ValueError(f"columns[{name!r}] has {len(column)} rows and 'input_ids' {len(ids)}. They must agree.")
        if isinstance(column, Ragged):
            if not np.array_equal(column.offsets, ids.offsets):
                raise ValueError(f"columns[{name!r}] and 'input_ids' have rows of other lengths. They must agree.")
        else:
            columns[name] = _narrow(name, np.asarray(column))
    if not len(ids):
        raise ValueError("columns hold no rows.")
    if not ids.lengths.all():
        empty = np.flatnonzero(ids.lengths == 0)
        raise ValueError(
            f"'input_ids' is empty in {len(empty)} of {len(ids)} rows, the first at {empty[0]}. Drop those texts, or "
            "add special tokens."
        )
    return columns


def _narrow(name: str, column: np.ndarray) -> np.ndarray:
    if column.dtype.kind not in "biuf" or (column.dtype.kind == "f" and not np.isfinite(column).all()):
        raise ValueError(
            f"columns[{name!r}] is {column.dtype}{list(column.shape)}; expected finite numbers, one row an example. "
            "Leave the column out, or repair it."
        )
    if column.dtype.itemsize <= 4:
        return column
    return column.astype(np.float32) if column.dtype.kind == "f" else narrow_integers(name, column, np.int32)


def _of_table(table: Any) -> dict[str, Any]:
    """The columns of a Hugging Face ``Dataset``, its lists without a Python object a token."""
    arrow = table.with_format("arrow")[:]
    columns = {}
    for name in arrow.column_names:
        column = arrow[name].combine_chunks()
        if hasattr(column, "flatten") and hasattr(column, "offsets"):
            offsets = column.offsets.to_numpy().astype(np.int64)
            columns[name] = Ragged(column.flatten().to_numpy(), offsets - offsets[0])
        else:
            columns[name] = column.to_numpy(zero_copy_only=False)
    return columns
