"""The batches of one epoch as the authors' program makes them; written out from it, and held to its vectors.

Nagarajan and Raghunathan, Findings of EMNLP 2023. Each batch is padded to its own longest example, so there are many
shapes and no dummy rows.
"""

import numpy as np

# The edges of the buckets, and the largest batch of each that an 11 GB card holds with a base-size model.
BOUNDARIES = (*range(5, 126, 5), 128)
BATCH_SIZES = (
    *(2525, 1250, 800, 575, 450, 350, 300, 250, 225, 175, 150, 125, 125),
    *(125, 100, 100, 75, 75, 75, 50, 50, 50, 50, 50, 50, 50),
)


def cap(epoch: int) -> int:
    """The largest batch of an epoch: 64, then 256, 512, 1024, ..."""
    return 64 if epoch == 0 else 64 * 2 ** (epoch + 1)


def plan(lengths: np.ndarray, *, epoch: int, seed: int) -> list[list[int]]:
    """The rows of every batch.

    What does not fill a batch of its bucket is gathered in ascending order of the buckets, and leaves as soon as there
    are as many rows as the present bucket's batch has.
    """
    rng = np.random.RandomState(seed + epoch)
    sizes = [min(size, cap(epoch)) for size in BATCH_SIZES]
    bucket = np.searchsorted(BOUNDARIES, lengths)
    groups, residues = [], []
    for number, size in enumerate(sizes):
        rows = np.flatnonzero(bucket == number).tolist()
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
    return groups
