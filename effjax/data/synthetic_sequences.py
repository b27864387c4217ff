"""Synthetic sequences that need a long memory, in NumPy: the adding and the copy problem, and padding with noise.

Each function takes a generator, so that fresh examples for every batch and a fixed test set come from one place.
"""

import math

import numpy as np

from effjax.core.errors import check_number

SYMBOLS = 10  # ids of the copy problem: eight data symbols, the blank and the delimiter
BLANK, DELIMITER = 8, 9
COPIED = 10  # symbols to remember


def add_examples(rows: int, length: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    r"""The adding problem: the sum of two marked values.

    .. math:: x_t = (u_t, m_t), \quad u_t \sim U[0, 1), \quad
              m_i = m_j = 1 \text{ with } i < \lfloor T/2 \rfloor \le j, \quad y = u_i + u_j

    Answering 1 at all times has the mean squared error 1/6.

    Args:
      rows: examples.
      length: T, 2 or more.
      rng: drawn from.

    Returns:
      ``inputs`` float32 [rows, length, 2] and ``targets`` float32 [rows].

    Raises:
      ValueError: ``rows`` < 1 or ``length`` < 2.

    Example:
      >>> examples = add_examples(4, 6, np.random.default_rng(0))
      >>> examples["inputs"][..., 1].sum(1).tolist()
      [2.0, 2.0, 2.0, 2.0]

    Source: Hochreiter and Schmidhuber 1997; this form is Kag and Saligrama's (ICML 2021).
    """
    check_number("rows", rows, low=1, integer=True)
    check_number("length", length, low=2, integer=True, hint="Two values are marked.")
    inputs = np.zeros((rows, length, 2), np.float32)
    inputs[..., 0] = rng.random((rows, length), np.float32)
    half, row = length // 2, np.arange(rows)
    first, second = rng.integers(0, half, rows), rng.integers(half, length, rows)
    inputs[row, first, 1] = inputs[row, second, 1] = 1
    return {"inputs": inputs, "targets": inputs[row, first, 0] + inputs[row, second, 0]}


def copy_examples(rows: int, lag: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The copy problem: ten symbols, to be repeated ``lag`` steps after the last of them.

    Of ``lag + 20`` steps, the inputs are 10 symbols of 0..7, ``lag - 1`` blanks (8), the delimiter (9) and
    10 blanks; the targets are ``lag + 10`` blanks and the 10 symbols.

    Args:
      rows: examples.
      lag: T, 1 or more.
      rng: drawn from.

    Returns:
      ``inputs`` and ``targets`` int32 [rows, lag + 20].

    Raises:
      ValueError: ``rows`` or ``lag`` < 1.

    Example:
      >>> examples = copy_examples(1, 3, np.random.default_rng(0))
      >>> examples["inputs"][0, 10:].tolist()
      [8, 8, 9, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8]
      >>> bool((examples["targets"][0, 13:] == examples["inputs"][0, :10]).all())
      True

    Source: Arjovsky, Shah, Bengio 2016, arXiv:1511.06464.
    """
    check_number("rows", rows, low=1, integer=True)
    check_number("lag", lag, low=1, integer=True)
    symbols = rng.integers(0, BLANK, (rows, COPIED), np.int32)
    inputs = np.full((rows, lag + 2 * COPIED), BLANK, np.int32)
    targets = inputs.copy()
    inputs[:, :COPIED] = targets[:, -COPIED:] = symbols
    inputs[:, lag + COPIED - 1] = DELIMITER
    return {"inputs": inputs, "targets": targets}


def copy_memoryless_nll(lag: int) -> float:
    """Least cross-entropy of the copy problem without memory, in nats per step: ``10 ln 8 / (lag + 20)``.

    Such an answer is the blank for ``lag + 10`` steps, then all eight symbols alike; 1/8 of the symbols are right.

    Args:
      lag: T, 1 or more.

    Returns:
      The mean over all steps.

    Raises:
      ValueError: ``lag`` < 1.

    Example:
      >>> round(copy_memoryless_nll(100), 4)
      0.1733
    """
    check_number("lag", lag, low=1, integer=True)
    return COPIED * math.log(BLANK) / (lag + 2 * COPIED)


def append_noise(signal: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """``signal`` followed by independent standard normal noise, up to ``length`` steps.

    Args:
      signal: [rows, steps, features].
      length: steps afterwards.
      rng: drawn from, row after row.

    Returns:
      float32 [rows, length, features].

    Raises:
      ValueError: ``length`` is below the steps of ``signal``.

    Example:
      >>> noised = append_noise(np.ones((2, 3, 4)), 5, np.random.default_rng(0))
      >>> noised.shape, bool((noised[:, :3] == 1).all())
      ((2, 5, 4), True)

    Source: Chang, Chen, Haber, Chi 2019, arXiv:1902.09689 (noise-padded CIFAR-10).
    """
    rows, steps, features = signal.shape
    check_number("length", length, low=steps, integer=True, hint=f"The signal has {steps} steps.")
    out = np.empty((rows, length, features), np.float32)
    out[:, :steps] = signal
    for row in out:  # in place: the noise of a test set is many times its signal
        rng.standard_normal(dtype=np.float32, out=row[steps:])
    return out
