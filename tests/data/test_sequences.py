"""Sequence data: what every name holds, the synthetic problems, noise, spectrograms, windows of text."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from effjax.data.pipeline import Batches
from effjax.data.sequences import NAMES, log_mel, sequence_data
from effjax.data.sets import DataSet, load
from effjax.data.synthetic_sequences import add_examples, append_noise, copy_examples, copy_memoryless_nll

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"

# name -> kind, shape and dtype of the training inputs, length, features, vocabulary, outputs, whether fresh
BUILT_IN = {
    "add-40": ("value", (1024, 40, 2), "float32", 40, 2, 0, 1, True),
    "copy-30": ("tokens", (1024, 50), "int32", 50, 0, 10, 9, True),
    "noisy-digits-20": ("class", (1437, 8, 8), "float32", 20, 8, 0, 10, True),
    "noisy-fashion_mnist-30": ("class", (12000, 28, 28), "float32", 30, 28, 0, 10, True),
    "digits-pixels": ("class", (1437, 64, 1), "float32", 64, 1, 0, 10, False),
    "digits-permuted": ("class", (1437, 64, 1), "float32", 64, 1, 0, 10, False),
    "fashion_mnist-pixels": ("class", (12000, 784, 1), "float32", 784, 1, 0, 10, False),
    "fashion_mnist-permuted": ("class", (12000, 784, 1), "float32", 784, 1, 0, 10, False),
    "fsdd": ("class", (1200, 72, 32), "float32", 72, 32, 0, 10, False),
    "tiny_shakespeare-chars-100": ("tokens", (10038, 100), "int32", 100, 0, 65, 65, False),
}
ELSEWHERE = {
    "noisy-mnist-40": ("class", (60000, 28, 28), "float32", 40, 28, 0, 10, True),
    "noisy-cifar10-40": ("class", (300, 32, 96), "float32", 40, 96, 0, 10, True),
    "mnist-pixels": ("class", (60000, 784, 1), "float32", 784, 1, 0, 10, False),
    "mnist-permuted": ("class", (300, 784, 1), "float32", 784, 1, 0, 10, False),
    "cifar10-pixels": ("class", (300, 1024, 3), "float32", 1024, 3, 0, 10, False),
    "cifar10-permuted": ("class", (300, 1024, 3), "float32", 1024, 3, 0, 10, False),
    "hmp_accel-256": ("class", (629, 256, 3), "float32", 256, 3, 0, 14, False),
    "ptb-words-300": ("tokens", (3098, 300), "int32", 300, 0, 10000, 10000, False),
}


@pytest.fixture(autouse=True)
def no_folder(monkeypatch):
    monkeypatch.delenv("EFFJAX_DATA", raising=False)


def check(name, kind, shape, dtype, length, features, vocabulary, outputs, fresh, **rows):
    data = sequence_data(name, **rows)
    assert (data.kind, data.length, data.features, data.vocabulary, data.outputs) == (
        kind,
        length,
        features,
        vocabulary,
        outputs,
    )
    assert (data.name, bool(data.source), data.draw is not None) == (name, True, fresh)
    assert data.train["inputs"].shape == shape
    batch = {column: values[:8] for column, values in data.train.items()}
    drawn = data.draw(batch, 0, np.random.default_rng(0)) if fresh else batch
    for columns in (drawn, data.test):
        inputs, targets = columns["inputs"], columns["targets"]
        assert inputs.shape == (len(inputs), length, features) if features else (len(inputs), length)
        assert inputs.dtype == dtype
        assert targets.shape == ((len(inputs), length) if kind == "tokens" else (len(inputs),))
        assert targets.dtype == ("float32" if kind == "value" else "int32")
        if kind != "value":
            assert targets.min() >= 0
            assert targets.max() < outputs
        if not features:
            assert inputs.min() >= 0
            assert inputs.max() < vocabulary
    return data


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in(name):
    check(name, *BUILT_IN[name])


SLOW = {"noisy-cifar10-40"}  # drawn from all of CIFAR-10


def head(path, target, rows=300):
    """The first rows of a file: to decode all 60,000 pictures takes ten seconds."""
    target.parent.mkdir(exist_ok=True)
    first = next(parquet.ParquetFile(path).iter_batches(rows))
    parquet.write_table(pa.Table.from_batches([first]), target)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly] * (name in SLOW)) for name in ELSEWHERE]
)
def test_of_the_shared_folder(name, monkeypatch, tmp_path):
    folder = name.removeprefix("noisy-").split("-")[0]
    if not (SHARED / folder).is_dir():
        pytest.skip(f"../shared/data/{folder} is not here")
    whole = folder != "cifar10" or name in SLOW
    monkeypatch.setenv("EFFJAX_DATA", str(SHARED if whole else tmp_path))
    if not whole:
        for path in (SHARED / folder).glob("*.parquet"):
            head(path, tmp_path / folder / path.name)
    rows = ELSEWHERE[name][1][0]
    check(name, *ELSEWHERE[name], **({"train_rows": rows, "test_rows": 20} if rows == 300 else {}))


def test_every_registered_name_is_tried():
    stems = {name.removesuffix("-T") for name in NAMES}
    tried = {name if name in NAMES else name.rpartition("-")[0] for name in [*BUILT_IN, *ELSEWHERE]}
    assert tried == stems


# Synthetic problems


@pytest.mark.parametrize("length", [2, 3, 50])
def test_add_marks_one_value_in_each_half(length):
    examples = add_examples(500, length, np.random.default_rng(0))
    values, marks = examples["inputs"][..., 0], examples["inputs"][..., 1]
    assert set(np.unique(marks)) == {0, 1} if length > 2 else {1}
    np.testing.assert_array_equal(marks[:, : length // 2].sum(1), 1)
    np.testing.assert_array_equal(marks[:, length // 2 :].sum(1), 1)
    np.testing.assert_allclose(examples["targets"], (values * marks).sum(1), rtol=1e-6)
    assert set(marks[:, : length // 2].argmax(1)) == set(range(length // 2))
    assert set(marks[:, length // 2 :].argmax(1)) == set(range(length - length // 2))


def test_add_answering_one_costs_a_sixth():
    errors = (sequence_data("add-10", test_rows=20_000).test["targets"] - 1) ** 2
    assert abs(errors.mean() - 1 / 6) < 4 * errors.std() / math.sqrt(len(errors))


def test_copy_layout():
    lag = 7
    examples = copy_examples(300, lag, np.random.default_rng(0))
    inputs, targets = examples["inputs"], examples["targets"]
    assert inputs.shape == targets.shape == (300, lag + 20)
    assert set(np.unique(inputs[:, :10])) == set(range(8))
    assert set(np.unique(inputs[:, 10 : lag + 9])) == {8}
    assert set(np.unique(inputs[:, lag + 9])) == {9}
    assert set(np.unique(inputs[:, lag + 10 :])) == {8}
    assert set(np.unique(targets[:, : lag + 10])) == {8}
    np.testing.assert_array_equal(targets[:, lag + 10 :], inputs[:, :10])


def test_copy_memoryless_nll_is_that_of_the_best_constant_answer_a_step():
    targets = copy_examples(20_000, 5, np.random.default_rng(0))["targets"]
    counts = np.stack([np.bincount(step, minlength=9) for step in targets.T]) / len(targets)
    nll = -np.where(counts, counts * np.log(np.maximum(counts, 1e-9)), 0).sum(1).mean()
    assert nll == pytest.approx(copy_memoryless_nll(5), rel=1e-3)


def test_synthetic_tests_are_fixed_and_differ_from_the_pool():
    first, second = (sequence_data("add-10", train_rows=50, test_rows=50) for _ in range(2))
    np.testing.assert_array_equal(first.test["inputs"], second.test["inputs"])
    assert not (first.test["inputs"] == first.train["inputs"]).all()


# Noise


def test_noise_is_standard_normal_and_leaves_the_signal():
    signal = np.full((50, 4, 3), 7, np.float32)
    noised = append_noise(signal, 200, np.random.default_rng(0))
    noise = noised[:, 4:].astype(np.float64)
    assert noised.dtype == np.float32
    np.testing.assert_array_equal(noised[:, :4], signal)
    assert abs(noise.mean()) < 4 / math.sqrt(noise.size)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / noise.size)
    correlation = np.corrcoef(noise.reshape(50, -1))
    assert np.abs(correlation - np.eye(50)).max() < 6 / math.sqrt(noise[0].size)
    np.testing.assert_array_equal(append_noise(signal, 4, np.random.default_rng(0)), signal)


@pytest.mark.parametrize("name", ["noisy-digits-12", "add-12", "copy-12"])
def test_batches_are_fresh_and_reproducible(name):
    data = sequence_data(name, train_rows=16)
    stream, again = (Batches(data.train, 16, seed=3, shuffle=False, transform=data.draw) for _ in range(2))
    first, second = stream[0], stream[1]
    for column in first:
        np.testing.assert_array_equal(first[column], again[0][column])
    other_seed = Batches(data.train, 16, seed=4, shuffle=False, transform=data.draw)[0]
    for other in (second, other_seed):  # no row comes again
        assert not (first["inputs"][:, None] == other["inputs"]).reshape(16, 16, -1).all(-1).any()
    if name.startswith("noisy"):  # the same rows: the pictures stay, only the noise is new
        np.testing.assert_array_equal(first["inputs"][:, :8], data.train["inputs"])
        np.testing.assert_array_equal(first["targets"], second["targets"])
        assert np.abs(np.corrcoef(first["inputs"][:, 8:].ravel(), second["inputs"][:, 8:].ravel())[0, 1]) < 0.2


def test_noisy_test_rows_carry_the_standardised_pictures():
    data, pictures = sequence_data("noisy-digits-10"), load("digits").splits
    mean, std = pictures["train"]["image"].mean(), pictures["train"]["image"].std()
    expected = (pictures["test"]["image"][..., 0] - mean) / std
    np.testing.assert_allclose(data.test["inputs"][:, :8], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(data.test["targets"], pictures["test"]["label"])
    assert len(sequence_data("noisy-fashion_mnist-28").test["targets"]) == 2000
    assert len(sequence_data("noisy-fashion_mnist-28", test_rows=2500).test["targets"]) == 2500


# Pictures


def test_pixels_are_row_major_and_permuted_by_one_order():
    plain, permuted = sequence_data("digits-pixels"), sequence_data("digits-permuted")
    rows = sequence_data("noisy-digits-8").train["inputs"]
    np.testing.assert_array_equal(plain.train["inputs"][..., 0], rows.reshape(-1, 64))
    order = np.random.default_rng(92).permutation(64)
    for split in ("train", "test"):
        np.testing.assert_array_equal(getattr(plain, split)["inputs"][:, order], getattr(permuted, split)["inputs"])
    assert plain.train["inputs"].mean() == pytest.approx(0, abs=1e-4)
    assert plain.train["inputs"].std() == pytest.approx(1, abs=1e-4)


def test_rows_are_a_fixed_random_choice_in_stored_order():
    data = sequence_data("fashion_mnist-pixels", train_rows=500, test_rows=9)
    again = sequence_data("fashion_mnist-pixels", train_rows=500)
    assert (len(data.train["targets"]), len(data.test["targets"])) == (500, 9)
    assert set(data.train["targets"]) == set(range(10))
    np.testing.assert_array_equal(data.train["inputs"], again.train["inputs"])


# Recordings


def test_log_mel_equals_a_plain_fourier_sum():
    wave = np.random.default_rng(0).uniform(-1, 1, 1000).astype(np.float32)
    corners = 700 * (10 ** (np.linspace(0, 2595 * math.log10(1 + 4000 / 700), 34) / 2595) - 1)
    n, k = np.arange(200), np.arange(129)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * n / 199)
    got = log_mel(wave)
    assert got.shape == (11, 32)
    assert got.dtype == np.float32
    for i in (0, 4, 10):
        sums = (hann * wave[80 * i : 80 * i + 200]) @ np.exp(-2j * np.pi * np.outer(n, k) / 256)
        for band in (0, 1, 16, 31):
            triangle = np.interp(k * 31.25, corners[band : band + 3], [0, 1, 0])
            assert triangle.sum() > 0
            expected = math.log(1e-6 + (triangle * np.abs(sums) ** 2).sum())
            assert got[i, band] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_log_mel_finds_a_tone_and_takes_short_recordings():
    tone = np.sin(2 * np.pi * 1000 * np.arange(4000) / 8000)
    corners = 700 * (10 ** (np.linspace(0, 2595 * math.log10(1 + 4000 / 700), 34) / 2595) - 1)
    assert set(log_mel(tone).argmax(1)) == {int(np.abs(corners[1:-1] - 1000).argmin())}
    assert log_mel(np.ones(5)).shape == (1, 32)
    with pytest.raises(ValueError, match=r"wave has shape \(2, 300\)"):
        log_mel(np.ones((2, 300)))


def recordings(monkeypatch, *lengths):
    rng = np.random.default_rng(0)
    series = [rng.normal(3, [1, 2, 5], (length, 3)).astype(np.float32) for length in lengths]
    columns = {"acc": series, "label": np.arange(len(series), dtype=np.int32) % 14}
    data = DataSet("hmp_accel", {"train": columns, "test": columns}, tuple("abcdefghijklmn"), "", "made up", "series")
    monkeypatch.setattr("effjax.data.sequences.load", lambda name: data)
    return series


def test_recordings_are_standardised_then_cut_or_padded_at_the_end(monkeypatch):
    series = recordings(monkeypatch, 30, 5, 300)
    data = sequence_data("hmp_accel-20")
    every = np.concatenate(series)
    for row, samples in zip(data.train["inputs"], series, strict=True):
        expected = ((samples - every.mean(0)) / every.std(0))[:20]
        np.testing.assert_allclose(row[: len(expected)], expected, rtol=1e-3, atol=1e-4)
        assert (row[len(expected) :] == 0).all()


def test_the_frames_of_spoken_digits_cover_nearly_all_recordings():
    lengths = np.concatenate([columns["length"] for columns in load("fsdd").splits.values()])
    assert (1 + (lengths - 200) // 80 <= 72).mean() >= 0.96
    data = sequence_data("fsdd")
    real = data.train["inputs"][(data.train["inputs"] != 0).any(-1)]
    np.testing.assert_allclose(real.mean(0), 0, atol=0.1)
    np.testing.assert_allclose(real.std(0), 1, atol=0.1)


# Texts


def test_targets_are_the_next_characters():
    data = sequence_data("tiny_shakespeare-chars-64", train_rows=50)
    text = load("tiny_shakespeare").splits["train"]["text"][0]
    characters = np.array(sorted(set(text)))
    assert "".join(characters[data.train["inputs"].ravel()]) == text[: 50 * 64]
    assert "".join(characters[data.train["targets"].ravel()]) == text[1 : 50 * 64 + 1]
    held_out = load("tiny_shakespeare").splits["test"]["text"][0]
    windows = (len(held_out) - 1) // 64
    assert "".join(characters[data.test["inputs"].ravel()]) == held_out[: windows * 64]


def test_streams_continue_from_batch_to_batch():
    streams = 6
    data = sequence_data("tiny_shakespeare-chars-50", streams=streams)
    batches = Batches(data.train, streams, seed=0, epochs=1, shuffle=False)
    first, second = batches[0], batches[1]
    np.testing.assert_array_equal(first["targets"][:, :-1], first["inputs"][:, 1:])
    np.testing.assert_array_equal(first["targets"][:, -1], second["inputs"][:, 0])
    # All streams, one after the other, are the text.
    text = load("tiny_shakespeare").splits["train"]["text"][0]
    ids = data.train["inputs"].reshape(-1, streams, 50).swapaxes(0, 1).ravel()
    characters = np.array(sorted(set(text)))
    assert "".join(characters[ids]) == text[: len(ids)]
    assert len(text) - len(ids) <= streams * 50
    # The held-out text does not depend on how the training text is cut.
    np.testing.assert_array_equal(data.test["inputs"], sequence_data("tiny_shakespeare-chars-50").test["inputs"])
    few = sequence_data("tiny_shakespeare-chars-50", streams=streams, train_rows=12)
    np.testing.assert_array_equal(few.train["inputs"], data.train["inputs"][:12])


def text_set(monkeypatch, name, train, test):
    splits = {"train": {"text": train}, "test": {"text": test}}
    monkeypatch.setattr("effjax.data.sequences.load", lambda _: DataSet(name, splits, (), "", "made up", "text"))


def test_words_end_sentences_and_unknown_ones_are_unk(monkeypatch):
    text_set(monkeypatch, "ptb", ["a <unk> b", "b a"], ["a c", "b"])
    data = sequence_data("ptb-words-2")
    words = sorted({"a", "b", "<unk>", "<eos>"})
    text = [words[i] for i in data.train["inputs"].ravel()]
    assert text == ["a", "<unk>", "b", "<eos>", "b", "a"]
    assert [words[i] for i in data.test["inputs"].ravel()] == ["a", "<unk>", "<eos>", "b"]
    assert (data.vocabulary, data.outputs) == (4, 4)


def test_unknown_characters_are_refused(monkeypatch):
    text_set(monkeypatch, "tiny_shakespeare", ["abcabc"], ["abxyab"])
    with pytest.raises(ValueError, match=r"2 tokens that the training text lacks, such as \['x', 'y'\]"):
        sequence_data("tiny_shakespeare-chars-2")


# Bad input


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("add", {}, "lacks its number of steps T: 'add-T' means add-200"),
        ("noisy-digits", {}, "'noisy-digits-T'"),
        ("copy-long", {}, "'copy-T'"),
        ("add-T", {}, "lacks its number"),
        ("add-1", {}, r"T=1 must be an integer in \[2"),
        ("copy-0", {}, r"T=0 must be an integer in \[1"),
        ("noisy-digits-7", {}, r"T=7 .* The 8 rows of a picture come first"),
        ("digit-pixels", {}, "Did you mean 'digits-pixels'"),
        ("digits-pixels-5", {}, "is not a registered"),
        ("digits-pixels", {"train_rows": 1438}, r"train_rows=1438 .* None takes all"),
        ("add-5", {"test_rows": 0}, "test_rows=0"),
        ("fsdd", {"streams": 4}, "streams=4 cuts a text, which 'fsdd' is not"),
        ("tiny_shakespeare-chars-10", {"streams": 0}, "streams=0"),
        ("tiny_shakespeare-chars-10", {"streams": 8, "train_rows": 12}, "must be a multiple of streams=8"),
        ("tiny_shakespeare-chars-100000", {}, "too few for a window of T=100000"),
    ],
)
def test_bad_input_is_refused_by_name(name, options, message):
    with pytest.raises(ValueError, match=message):
        sequence_data(name, **options)


def test_missing_sets_say_what_to_do():
    with pytest.raises(FileNotFoundError, match="set EFFJAX_DATA to a folder"):
        sequence_data("hmp_accel-256")
