"""Sequence data by name: pictures read pixel by pixel or padded with noise, recordings, texts, synthetic problems.

Inputs come standardised and of one length, ready for a recurrent network.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from effjax.core.errors import check_number, near
from effjax.core.shapes import pad_to
from effjax.data.facts import Facts
from effjax.data.pipeline import Transform
from effjax.data.ragged import pad_ragged
from effjax.data.sets import DataSet, load
from effjax.data.splits import fixed_rows
from effjax.data.synthetic_sequences import SYMBOLS, add_examples, append_noise, copy_examples

__all__ = ["SequenceData", "sequence_data"]

Columns = dict[str, np.ndarray]
Kind = Literal["class", "value", "tokens"]

_IMAGES = ("digits", "fashion_mnist", "mnist", "cifar10")
_MEASURED_ROWS = 10_000
_PERMUTATION_SEED = 92
_POOL_SEED, _TEST_SEED = 0, 1
_FSDD_FRAMES = 72


class SequenceData(NamedTuple):
    """A sequence problem in memory.

    Attributes:
      name: as given to ``sequence_data``.
      source: where the data came from.
      kind: ``"class"``, one label per sequence; ``"value"``, one number per sequence; ``"tokens"``, one id per step.
      train: ``inputs`` float32 [rows, time, features], or int32 ids [rows, time]; ``targets`` int32 [rows]
        (class), float32 [rows] (value) or int32 [rows, time], -1 where nothing is asked (tokens). ``draw``
        completes them; of the noisy sets, whose noise would not fit into memory, ``inputs`` hold the signal only. Where
        sequences differ in length there is an int32 column ``lengths`` [rows] too.
      test: the same columns, held out, complete and fixed.
      length: steps of a sequence.
      features: size of an input vector; 0 where inputs are ids.
      vocabulary: number of input ids; 0 where inputs are vectors.
      outputs: number of classes, 1 (value), or size of the output vocabulary.
      draw: ``(batch, index, rng) -> batch``, the ``transform`` of ``effjax.data.pipeline.Batches``: fresh noise
        or fresh examples for every training batch. None where the rows are used as stored.
      facts: what a report says of data read from the user's own files; None of a named problem.
      pad: where sequences shorter than ``length`` are filled up, ``"end"`` or ``"start"``.
    """

    name: str
    source: str
    kind: Kind
    train: Columns
    test: Columns
    length: int
    features: int
    vocabulary: int
    outputs: int
    draw: Transform | None
    facts: Facts | None = None
    pad: Literal["end", "start"] = "end"

    @property
    def told_lengths(self) -> bool:
        """Whether a network must be told where sequences end: they differ in length, and are filled up at the end."""
        return "lengths" in self.test and self.pad == "end"


def few_rows(data: SequenceData, *, train: int | None = None, test: int | None = None) -> SequenceData:
    """The problem with a fixed random choice of its rows, in stored order; None takes all.

    Raises:
      ValueError: more rows than there are.
    """
    found = {}
    for split, rows in (("train", train), ("test", test)):
        columns = getattr(data, split)
        if rows is not None:
            chosen = fixed_rows(f"{split}_rows", rows, len(columns["targets"]))
            columns = {name: column[chosen] for name, column in columns.items()}
        found[split] = columns
    return data._replace(**found)


class _Request(NamedTuple):
    """What a caller asked for; ``length`` is the T of the name, 0 of a name without one."""

    name: str
    length: int
    rows: dict[str, int | None]
    streams: int | None


def sequence_data(
    name: str, *, train_rows: int | None = None, test_rows: int | None = None, streams: int | None = None
) -> SequenceData:
    """Load or make a sequence problem.

    =============================  ====================================================================
    name                           a sequence
    =============================  ====================================================================
    ``add-T``                      the adding problem, T steps; fresh examples in every batch
    ``copy-T``                     the copy problem, lag T, so T + 20 steps; fresh examples in every batch
    ``noisy-IMAGES-T``             a picture row by row, then independent standard normal noise up to T steps,
                                   fresh in every training batch
    ``IMAGES-pixels``              a picture pixel by pixel, row after row
    ``IMAGES-permuted``            the same in one random order of NumPy's ``default_rng(92)``
    ``hmp_accel-T``                three axes at 32 Hz, the first T samples
    ``fsdd``                       spoken digits: the first 72 frames (0.74 s) of ``log_mel``, the whole of
                                   97 % of the recordings
    ``tiny_shakespeare-chars-T``   T characters, and the next one at every step
    ``ptb-words-T``                T words, and the next one at every step; ``<eos>`` ends a sentence
    =============================  ====================================================================

    IMAGES are digits, fashion_mnist, mnist or cifar10. Pixels are standardised per channel, recordings per
    feature, by statistics of the training rows used (of about 10,000 pictures at most), so signal and noise
    have the same scale. Recordings shorter than T are padded by zeros at the end: step t is the same moment
    in all of them, but the last state has seen padding. Texts take the vocabulary of ``train``; windows
    follow one another without overlap, and the rest of the text is left out.

    Args:
      name: one of ``effjax.data.sequences.NAMES``, with a number for T.
      train_rows: use that many training rows: the first of a text, else a fixed random choice; None for
        all. Of a synthetic problem the size of an epoch, by default 1024.
      test_rows: the same for the test rows; by default 1000 of a synthetic problem and at most 2000 of a
        noisy set, which takes ``4 * test_rows * T * features`` bytes.
      streams: cut the training text into this many parts and order the windows such that, read in order in
        batches of ``streams`` rows, row b of a batch continues row b of the batch before, and a hidden
        state can be carried over. ``test`` is always one stream.

    Returns:
      A ``SequenceData``.

    Raises:
      ValueError: an unknown name, T missing or too small, more rows than there are, ``streams`` of what is
        no text, a text shorter than one window, or unknown characters in the test text.
      FileNotFoundError: the set is not at hand; the message says what to do.

    Example:
      >>> data = sequence_data("noisy-digits-50")
      >>> data.train["inputs"].shape, data.test["inputs"].shape, data.length
      ((1437, 8, 8), (360, 50, 8), 50)
      >>> batch = {name: column[:4] for name, column in data.train.items()}
      >>> data.draw(batch, 0, np.random.default_rng(0))["inputs"].shape
      (4, 50, 8)
    """
    build, length = _parse(name)
    if streams is not None:
        check_number("streams", streams, low=1, integer=True)
        if not is_text(name):
            raise ValueError(f"streams={streams} cuts a text, which {name!r} is not. Leave it out.")
    return build(_Request(name, length, {"train": train_rows, "test": test_rows}, streams))


def sequence_kind(name: str) -> Kind:
    """The kind of a problem from its name alone: no data are read.

    Args:
      name: as for ``sequence_data``.

    Returns:
      ``"class"``, ``"value"`` or ``"tokens"``.

    Raises:
      ValueError: an unknown name, or T missing.

    Example:
      >>> [sequence_kind(name) for name in ("fsdd", "add-200", "ptb-words-300")]
      ['class', 'value', 'tokens']
    """
    build, _ = _parse(name)
    return "value" if build is _add else "tokens" if build in (_copy, *_TEXTS.values()) else "class"


def is_text(name: str) -> bool:
    """Whether a problem is a text, which can be read as ``streams``.

    Example:
      >>> is_text("ptb-words-300"), is_text("copy-50")
      (True, False)
    """
    return _parse(name)[0] in _TEXTS.values()


def _parse(name: str) -> tuple[Callable[[_Request], SequenceData], int]:
    if name in _BUILDERS and not name.endswith("-T"):
        return _BUILDERS[name], 0
    stem, _, number = name.rpartition("-")
    if f"{stem}-T" in _BUILDERS and number.isdecimal():
        return _BUILDERS[f"{stem}-T"], int(number)
    known = next((item for item in (f"{name}-T", f"{stem}-T", name) if item in _BUILDERS), None)
    if known:
        raise ValueError(f"name={name!r} lacks its number of steps T: {known!r} means {known[:-1]}200 and the like.")
    raise ValueError(
        f"name={name!r} is not a registered sequence problem.{near(name, NAMES)} Registered, with a number for T: "
        f"{', '.join(NAMES)}."
    )


def log_mel(wave: np.ndarray, *, rate: int = 8000, bands: int = 32) -> np.ndarray:
    r"""Log-mel spectrogram of one recording.

    .. math:: S_{ib} = \log \Big( 10^{-6} + \sum_k M_{bk} \Big| \sum_n w_n x_{is + n} e^{-2 \pi i k n / N} \Big|^2 \Big)

    with Hann windows w of 25 ms every s = 10 ms, N the next power of two, and M triangles of height 1
    whose corners are equally spaced on the mel scale, 2595 log10(1 + f / 700), from 0 to half the rate.

    Args:
      wave: float [samples], in [-1, 1]; one shorter than a window is padded by zeros.
      rate: samples per second.
      bands: B.

    Returns:
      float32 [frames, bands]; frames lie within the recording.

    Raises:
      ValueError: ``wave`` is not one-dimensional, ``rate`` < 100 or ``bands`` < 1.

    Example:
      >>> log_mel(np.zeros(8000, np.float32)).shape
      (98, 32)
    """
    check_number("rate", rate, low=100, integer=True)
    check_number("bands", bands, low=1, integer=True)
    if wave.ndim != 1:
        raise ValueError(f"wave has shape {wave.shape}; expected one recording, [samples].")
    window, stride = rate // 40, rate // 100
    frames = np.lib.stride_tricks.sliding_window_view(pad_to(wave, max(window, len(wave))), window)[::stride]
    size = 1 << (window - 1).bit_length()
    power = np.abs(np.fft.rfft(frames * np.hanning(window), size)) ** 2
    return np.log(1e-6 + power @ _mel_filters(rate, size, bands).T).astype(np.float32)


@functools.lru_cache(maxsize=4)
def _mel_filters(rate: int, size: int, bands: int) -> np.ndarray:
    """Triangles [bands, size // 2 + 1] over the bins of a real Fourier transform."""
    top = 2595 * np.log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1)
    bins = np.arange(size // 2 + 1) * rate / size
    rise = (bins - corners[:-2, None]) / np.diff(corners)[:-1, None]
    fall = (corners[2:, None] - bins) / np.diff(corners)[1:, None]
    return np.maximum(0, np.minimum(rise, fall))


# Synthetic problems


def _add(request: _Request) -> SequenceData:
    length = check_number("T", request.length, low=2, integer=True, hint="Two values are marked.")
    examples = functools.partial(add_examples, length=length)
    return _synthetic(request, "value", examples, length=length, features=2, vocabulary=0, outputs=1)


def _copy(request: _Request) -> SequenceData:
    lag = check_number("T", request.length, low=1, integer=True)
    examples = functools.partial(copy_examples, lag=lag)
    # The delimiter is never an answer.
    sizes = {"length": lag + 20, "features": 0, "vocabulary": SYMBOLS, "outputs": SYMBOLS - 1}
    return _synthetic(request, "tokens", examples, **sizes)


def _synthetic(request: _Request, kind: Kind, examples: Callable[..., Columns], **sizes: Any) -> SequenceData:
    def fixed(split: str, default: int, seed: int) -> Columns:
        rows = default if request.rows[split] is None else request.rows[split]
        check_number(f"{split}_rows", rows, low=1, integer=True)
        return examples(rows, rng=np.random.default_rng(seed))

    train, test = fixed("train", 1024, _POOL_SEED), fixed("test", 1000, _TEST_SEED)
    return SequenceData(
        name=request.name,
        source=f"synthetic (fresh training examples, {len(test['inputs'])} test rows)",
        kind=kind,
        train=train,
        test=test,
        draw=lambda batch, index, rng: examples(len(batch["inputs"]), rng=rng),
        **sizes,
    )


# Pictures


def _noisy(request: _Request, images: str) -> SequenceData:
    data = load(images)
    if request.rows["test"] is None:
        request = request._replace(rows=request.rows | {"test": min(2000, len(data.splits["test"]["label"]))})
    columns = _pictures(request, data)
    height = columns["test"]["inputs"].shape[1]
    for split in columns.values():  # one step per row of the picture
        split["inputs"] = split["inputs"].reshape(len(split["inputs"]), height, -1)
    length = check_number(
        "T", request.length, low=height, integer=True, hint=f"The {height} rows of a picture come first."
    )
    test = columns["test"]
    test["inputs"] = append_noise(test["inputs"], length, np.random.default_rng(_TEST_SEED))

    def draw(batch: Columns, index: int, rng: np.random.Generator) -> Columns:
        return {**batch, "inputs": append_noise(batch["inputs"], length, rng)}

    return _classes(request, data, columns, length)._replace(draw=draw)


def _pixels(request: _Request, images: str, permuted: bool) -> SequenceData:
    data = load(images)
    columns = _pictures(request, data)
    _, height, width, channels = columns["test"]["inputs"].shape
    order = np.random.default_rng(_PERMUTATION_SEED).permutation(height * width)
    for split in columns.values():
        pixels = split["inputs"].reshape(-1, height * width, channels)
        split["inputs"] = pixels.take(order, axis=1) if permuted else pixels
    return _classes(request, data, columns, height * width)


def _pictures(request: _Request, data: DataSet) -> dict[str, Columns]:
    chosen = {
        split: fixed_rows(f"{split}_rows", request.rows[split], len(data.splits[split]["label"]))
        for split in ("train", "test")
    }
    images = {split: data.splits[split]["image"][rows] for split, rows in chosen.items()}
    sample = images["train"][:: -(-len(images["train"]) // _MEASURED_ROWS)]
    mean, std = (statistic((0, 1, 2), np.float64).astype(np.float32) for statistic in (sample.mean, sample.std))
    return {
        split: {"inputs": (images[split] - mean) / std, "targets": data.splits[split]["label"][rows]}
        for split, rows in chosen.items()
    }


def _classes(request: _Request, data: DataSet, columns: dict[str, Columns], length: int) -> SequenceData:
    return SequenceData(
        name=request.name,
        source=data.source,
        kind="class",
        train=columns["train"],
        test=columns["test"],
        length=length,
        features=columns["test"]["inputs"].shape[-1],
        vocabulary=0,
        outputs=len(data.classes),
        draw=None,
    )


# Recordings


def _accelerometer(request: _Request) -> SequenceData:
    length = check_number("T", request.length, low=1, integer=True, hint="The mean recording has about 530 samples.")
    return _recordings(request, load("hmp_accel"), "acc", lambda samples: samples, length)


def _spoken_digits(request: _Request) -> SequenceData:
    return _recordings(request, load("fsdd"), "audio", log_mel, _FSDD_FRAMES)


def _recordings(
    request: _Request, data: DataSet, column: str, frames: Callable[[np.ndarray], np.ndarray], length: int
) -> SequenceData:
    """Vectors of recordings standardised per feature over all training frames, then cut or padded."""
    found, targets = {}, {}
    for split in ("train", "test"):
        rows = fixed_rows(f"{split}_rows", request.rows[split], len(data.splits[split]["label"]))
        found[split] = [frames(data.splits[split][column][row]) for row in rows]
        targets[split] = data.splits[split]["label"][rows]
    together = np.concatenate(found["train"])
    mean, std = (statistic(0, np.float64).astype(np.float32) for statistic in (together.mean, together.std))
    columns = {
        split: {
            "inputs": pad_ragged([(vectors - mean) / std for vectors in found[split]], length),
            "targets": targets[split],
        }
        for split in found
    }
    return _classes(request, data, columns, length)


# Texts


def _characters(request: _Request) -> SequenceData:
    return _text(request, load("tiny_shakespeare"), "".join)


def _words(request: _Request) -> SequenceData:
    return _text(request, load("ptb"), lambda lines: [word for line in lines for word in (*line.split(), "<eos>")])


def _text(request: _Request, data: DataSet, tokens: Callable[[Iterable[str]], Sequence[str]]) -> SequenceData:
    length = check_number("T", request.length, low=1, integer=True)
    texts = {split: tokens(data.splits[split]["text"]) for split in ("train", "test")}
    ids = {token: number for number, token in enumerate(sorted(set(texts["train"])))}
    if (unknown := set(texts["test"]) - ids.keys()) and "<unk>" not in ids:
        raise ValueError(
            f"{data.name}: the test text holds {len(unknown)} tokens that the training text lacks, such as "
            f"{sorted(unknown)[:5]}, and there is no <unk>. Take both texts from one release."
        )
    other = ids.get("<unk>")
    columns = {
        split: _windows(
            f"{data.name}, split {split!r}",
            np.fromiter((ids.get(token, other) for token in text), np.int32, len(text)),
            length,
            (request.streams or 1) if split == "train" else 1,
            split,
            request.rows[split],
        )
        for split, text in texts.items()
    }
    return SequenceData(
        name=request.name,
        source=f"{data.source}: {', '.join(f'{len(text)} tokens of {split}' for split, text in texts.items())}",
        kind="tokens",
        train=columns["train"],
        test=columns["test"],
        length=length,
        features=0,
        vocabulary=len(ids),
        outputs=len(ids),
        draw=None,
    )


def _windows(where: str, ids: np.ndarray, length: int, streams: int, split: str, rows: int | None) -> Columns:
    """Windows of equal contiguous streams, the first of every stream before the second of any."""
    windows = (len(ids) - 1) // (streams * length)
    if not windows:
        raise ValueError(
            f"{where} has {len(ids)} tokens, too few for a window of T={length} and its next token in each of "
            f"{streams} streams."
        )
    rows = streams * windows if rows is None else rows
    check_number(f"{split}_rows", rows, low=1, high=streams * windows, integer=True, hint="None takes all.")
    if rows % streams:
        raise ValueError(f"{split}_rows={rows} must be a multiple of streams={streams}.")

    def cut(start: int) -> np.ndarray:
        part = ids[start : start + streams * windows * length].reshape(streams, windows, length)
        return part.swapaxes(0, 1).reshape(-1, length)[:rows]

    return {"inputs": cut(0), "targets": cut(1)}


_TEXTS: dict[str, Callable[[_Request], SequenceData]] = {
    "tiny_shakespeare-chars-T": _characters,
    "ptb-words-T": _words,
}
_BUILDERS: dict[str, Callable[[_Request], SequenceData]] = {
    "add-T": _add,
    "copy-T": _copy,
    **{f"noisy-{images}-T": functools.partial(_noisy, images=images) for images in _IMAGES},
    **{f"{images}-pixels": functools.partial(_pixels, images=images, permuted=False) for images in _IMAGES},
    **{f"{images}-permuted": functools.partial(_pixels, images=images, permuted=True) for images in _IMAGES},
    "hmp_accel-T": _accelerometer,
    "fsdd": _spoken_digits,
    **_TEXTS,
}
NAMES: tuple[str, ...] = tuple(_BUILDERS)
