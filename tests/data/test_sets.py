import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from effjax.data import sets
from effjax.data.ragged import pad_ragged
from effjax.data.registry import BUILTIN_NAMES, NAMES
from effjax.data.sets import BUILTIN, load

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
BUILTIN_ROWS = {
    "digits": {"train": 1437, "test": 360},
    "fashion_mnist": {"train": 12_000, "test": 3_000},
    "fsdd": {"train": 1_200, "test": 300},
    "sms_spam": {"train": 4_000, "test": 1_171},
    "tiny_shakespeare": {"train": 1, "validation": 1, "test": 1},
}


@pytest.fixture(autouse=True)
def _no_folder(monkeypatch):
    monkeypatch.delenv("EFFJAX_DATA", raising=False)
    sets._load_files.cache_clear()
    sets._load_hub.cache_clear()


def write(path: Path, columns: dict, features: dict | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return path


def grey(n: int, value: int = 7) -> dict:
    return {"image": [bytes([value]) * 784] * n, "label": [i % 10 for i in range(n)]}


# Built in


@pytest.mark.parametrize("name", BUILTIN_ROWS)
def test_built_in_rows(name):
    data = load(name)
    assert {split: len(next(iter(columns.values()))) for split, columns in data.splits.items()} == BUILTIN_ROWS[name]
    assert data.source.startswith("built-in (")
    assert all(f"{rows} rows" in data.source for rows in BUILTIN_ROWS[name].values())


@pytest.mark.parametrize(("name", "size"), [("digits", 8), ("fashion_mnist", 28)])
def test_built_in_images(name, size):
    data = load(name)
    for columns in data.splits.values():
        image, label = columns["image"], columns["label"]
        assert image.dtype == np.uint8
        assert image.shape == (len(label), size, size, 1)
        assert image.max() == 255
        assert label.dtype == np.int32
        assert set(label.tolist()) == set(range(10))
    assert len(data.classes) == 10


def test_built_in_fashion_mnist_is_balanced():
    for columns in load("fashion_mnist").splits.values():
        assert len(set(np.bincount(columns["label"]))) == 1


def test_digits_are_scikit_learns():
    scikit = pytest.importorskip("sklearn.datasets").load_digits()
    splits = load("digits").splits
    images = np.concatenate([splits[split]["image"] for split in splits])[..., 0]
    labels = np.concatenate([splits[split]["label"] for split in splits])
    held = sorted(zip(map(bytes, images), labels.tolist(), strict=True))
    expected = np.rint(scikit.images * 255 / 16).astype(np.uint8)
    assert held == sorted(zip(map(bytes, expected), scikit.target.tolist(), strict=True))


def test_built_in_audio():
    train = load("fsdd").splits["train"]
    assert [len(wave) for wave in train["audio"]] == train["length"].tolist()
    assert train["audio"][0].dtype == np.float32
    assert 0.1 < max(np.abs(wave).max() for wave in train["audio"]) <= 1
    assert set(train["take"].tolist()) == set(range(5, 25))
    batch = pad_ragged(train["audio"][:4], 4000)
    assert batch.shape == (4, 4000)
    kept = min(4000, len(train["audio"][0]))
    np.testing.assert_array_equal(batch[0, :kept], train["audio"][0][:kept])
    assert not batch[0, kept:].any()


@pytest.mark.parametrize(("name", "nodes", "classes"), [("cora", 2708, 7), ("graphs/citeseer", 3327, 6)])
def test_built_in_graphs(name, nodes, classes):
    data = load(name)
    graph = data.splits["graph"]
    assert data.name.startswith("graphs/")
    assert len(graph["y"]) == nodes
    assert len(data.classes) == classes
    assert len(graph["train_idx"]) == 20 * classes
    edges = set(map(tuple, graph["edge_index"].T.tolist()))
    assert all((b, a) in edges and a != b for a, b in edges)
    # Only what the MIT sources hold: the geom-gcn splits have no licence.
    assert not [key for key in graph if key.startswith("geom_")]


def test_texts_are_the_callers_own_and_arrays_are_read_only():
    first = load("sms_spam").splits["train"]
    first["text"].clear()
    first["label"] = None
    again = load("sms_spam").splits["train"]
    assert len(again["text"]) == 4000
    with pytest.raises(ValueError, match="read-only"):
        again["label"][0] = 1


def test_built_in_files_are_listed_small_and_licensed():
    listed = dict(reversed(line.split()) for line in (BUILTIN / "SHA256SUMS").read_text().splitlines())
    held = {str(p.relative_to(BUILTIN)): p for p in BUILTIN.rglob("*") if p.suffix in (".parquet", ".npz")}
    assert listed == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in held.items()}
    assert max(path.stat().st_size for path in held.values()) < 4e6
    assert sum(path.stat().st_size for path in BUILTIN.rglob("*") if path.is_file()) < 20e6
    assert {re.sub(r"(/(train|validation|test).*)|(\.npz)$", "", name) for name in held} == set(BUILTIN_NAMES)
    notices = (BUILTIN / "README.md").read_text()
    for name in BUILTIN_NAMES:
        assert f"## {name}" in notices or f", {name}\n" in notices
        assert f"| `{name}` |" in notices
    for words in ("Zalando SE", "BSD 3-Clause", "AS IS", "Thomas Kipf", "Zhilin Yang", "holds takes 5 to 24"):
        assert words in notices
    assert "ShareAlike 4.0" in (BUILTIN / "fsdd/LICENSE-CC-BY-SA-4.0.txt").read_text()


# Where a set is looked up


def test_folder_in_the_environment_comes_before_the_built_in_set(tmp_path, monkeypatch):
    write(tmp_path / "fashion_mnist/train-00000-of-00002.parquet", grey(20))
    write(tmp_path / "fashion_mnist/train-00001-of-00002.parquet", grey(30, value=9))
    write(tmp_path / "fashion_mnist/test.parquet", grey(10))
    monkeypatch.setenv("EFFJAX_DATA", str(tmp_path))
    data = load("fashion_mnist")
    assert data.source == "EFFJAX_DATA (train 50 rows, test 10 rows)"
    assert data.splits["train"]["image"][[0, 20], 0, 0, 0].tolist() == [7, 9]
    assert load("digits").source.startswith("built-in")
    assert load("fashion_mnist", root=BUILTIN).source.startswith("root (train 12000 rows")


def test_the_source_says_where_shards_are_missing(tmp_path, monkeypatch):
    write(tmp_path / "fashion_mnist/train-00000-of-00003.parquet", grey(20))
    write(tmp_path / "fashion_mnist/train-00002-of-00003.parquet", grey(20))
    write(tmp_path / "fashion_mnist/test-00000-of-00001.parquet", grey(10))
    said = "(train 40 rows from 2 of 3 files, test 10 rows)"
    assert load("fashion_mnist", root=tmp_path).source == f"root {said}"
    monkeypatch.setattr(sets, "BUILTIN", tmp_path)
    assert load("fashion_mnist").source == f"built-in {said}"  # as of a wheel, which holds some of the shards
    with pytest.raises(FileNotFoundError, match="or choose a built-in set: fashion_mnist"):
        load("fsdd")


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "mnist/train.parquet", grey(10))
    assert len(load("mnist", root=tmp_path).splits["train"]["label"]) == 10
    write(path, grey(20))
    assert len(load("mnist", root=tmp_path).splits["train"]["label"]) == 20


def test_npz_splits(tmp_path):
    (tmp_path / "mnist").mkdir()
    np.savez(tmp_path / "mnist/train.npz", image=np.zeros((4, 28, 28), np.uint8), label=np.arange(4))
    train = load("mnist", root=tmp_path).splits["train"]
    assert train["image"].shape == (4, 28, 28, 1)
    assert train["label"].dtype == np.int32


def test_encoded_images(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    blobs = []
    for row in pixels:
        image.fromarray(row).save(buffer := io.BytesIO(), "png")
        blobs.append({"bytes": buffer.getvalue(), "path": "a.png"})
    write(tmp_path / "cifar10/train.parquet", {"image": blobs, "label": [0, 1, 2]})
    np.testing.assert_array_equal(load("cifar10", root=tmp_path).splits["train"]["image"], pixels)


def test_a_misspelled_name_suggests_the_right_one():
    with pytest.raises(ValueError, match=r"name='fasion_mnist'.*Did you mean 'fashion_mnist'"):
        load("fasion_mnist")
    with pytest.raises(ValueError, match="Did you mean 'citeseer'"):
        load("citeser")


@pytest.mark.parametrize("name", ["ptb", "pubmed"])
def test_a_missing_set_says_where_it_looked_and_what_to_do(name, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"EFFJAX_DATA \(not set\), the built-in sets.*set EFFJAX_DATA.*hf:"):
        load(name)
    monkeypatch.setenv("EFFJAX_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=re.escape(f"EFFJAX_DATA ({tmp_path})")):
        load(name)
    with pytest.raises(FileNotFoundError, match=r"Looked in: root .*choose a built-in set: digits"):
        load(name, root=tmp_path)


def test_a_given_root_is_the_only_place(tmp_path):
    with pytest.raises(FileNotFoundError, match="'digits' was not found"):
        load("digits", root=tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load("digits", root=tmp_path / "absent")


def test_a_folder_that_is_absent_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFJAX_DATA", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match=r"EFFJAX_DATA='.*absent' is not a folder"):
        load("digits")


def test_an_empty_folder_names_the_files_it_should_hold(tmp_path):
    (tmp_path / "mnist").mkdir()
    with pytest.raises(FileNotFoundError, match=r"mnist holds no split .*train-00000-of-00002\.parquet"):
        load("mnist", root=tmp_path)


# Damaged and foreign files


def refuse(tmp_path: Path, name: str, columns: dict, message: str, features: dict | None = None) -> None:
    path = write(tmp_path / name / "train.parquet", columns, features)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: .*{message}"):
        load(name, root=tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_truncated_parquet(tmp_path, keep):
    path = tmp_path / "fashion_mnist/test.parquet"
    path.parent.mkdir()
    whole = (BUILTIN / "fashion_mnist/test.parquet").read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: damaged, or not a Parquet file"):
        load("fashion_mnist", root=tmp_path)


def test_parquet_with_broken_pages(tmp_path):
    path = tmp_path / "fashion_mnist/test.parquet"
    path.parent.mkdir()
    whole = bytearray((BUILTIN / "fashion_mnist/test.parquet").read_bytes())
    whole[1000:200_000] = bytes(199_000)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: damaged"):
        load("fashion_mnist", root=tmp_path)


def test_wrong_columns(tmp_path):
    refuse(tmp_path, "mnist", {"pixels": [b"\0" * 784], "label": [0]}, r"lacks \['image'\]; expected the columns")
    refuse(tmp_path, "sms_spam", {"text": [1, 2], "label": [0, 1]}, "column 'text' holds int64; expected text")
    refuse(tmp_path, "trec", {"text": ["a"], "label": ["x"]}, "column 'label' holds str; expected numbers")
    refuse(tmp_path, "ag_news", {"text": ["a"], "label": [0.5]}, "column 'label' holds float64; expected integers")
    refuse(tmp_path, "imdb2k", {"text": ["a", None], "label": [0, 1]}, "column 'text' has 1 empty rows of 2")
    refuse(tmp_path, "ptb", {"text": pa.array([], pa.string())}, "holds no rows")


def test_wrong_image_size(tmp_path):
    refuse(
        tmp_path, "mnist", {"image": [b"\0" * 784, b"\0" * 100], "label": [0, 1]}, "column 'image': row 1 has 100 bytes"
    )


def test_images_that_are_none(tmp_path):
    pytest.importorskip("PIL.Image")
    junk = [{"bytes": b"no image", "path": "a.png"}]
    refuse(tmp_path, "cifar10", {"image": junk, "label": [0]}, "column 'image': row 0 is not a readable picture")


def test_labels_out_of_range(tmp_path):
    refuse(tmp_path, "mnist", {**grey(2), "label": [0, 10]}, r"labels lie in \[0, 10\]; this set has the labels 0\.\.9")
    refuse(tmp_path, "sms_spam", {"text": ["a"], "label": [-1]}, r"labels lie in \[-1, -1\]")


def test_labels_beyond_32_bits_do_not_wrap(tmp_path):
    labels = np.array([1, 0, 2**32 + 1])
    for kind in ("parquet", "npz"):
        folder = tmp_path / kind / "sst2"
        folder.mkdir(parents=True)
        columns = {"sentence": np.array(["a", "b", "c"]), "label": labels}
        if kind == "parquet":
            pq.write_table(pa.table(columns), folder / "train.parquet")
        else:
            np.savez(folder / "train.npz", **columns)
        with pytest.raises(ValueError, match="column 'label' runs from 0 to 4294967297, which does not fit int32"):
            load("sst2", root=tmp_path / kind)


def test_numbers_are_no_pictures(tmp_path):
    (tmp_path / "digits").mkdir()
    pq.write_table(pa.table({"image": [1.5, 2.5], "label": [0, 1]}), tmp_path / "digits/train.parquet")
    with pytest.raises(ValueError, match=r"column 'image': has shape \[2\]; expected \[n, height, width\]"):
        load("digits", root=tmp_path)


def test_a_picture_that_would_lose_something_is_refused(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.full((32, 32, 4), 100, np.uint8)).save(buffer := io.BytesIO(), "png")
    rows = {"image": [{"bytes": buffer.getvalue(), "path": None}], "label": [0]}
    refuse(tmp_path, "cifar10", rows, "column 'image': row 0 is transparent in places")
    image.fromarray(np.full((8, 8, 3), 100, np.uint8)).save(buffer := io.BytesIO(), "png")
    rows = {"image": [{"bytes": buffer.getvalue(), "path": None}], "label": [0]}
    refuse(tmp_path, "cifar10", rows, r"column 'image' holds uint8\[1, 8, 8, 3\]; expected uint8\['n', 32, 32, 3\]")


def test_registered_sets_load_without_datasets_and_without_a_cache(tmp_path):
    """Importing the library takes longer than reading every built-in set, and it writes what it reads to a cache."""
    script = (
        "import sys; from effjax.data.sets import load; load('sms_spam'); load('fashion_mnist'); load('digits');"
        "print('datasets' in sys.modules)"
    )
    environment = {**os.environ, "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert not (tmp_path / "hf").exists()


def test_shards_of_other_classes_are_refused(tmp_path):
    for part, names in enumerate((list("abcdefghij"), list("abcdefghik"))):
        write(tmp_path / f"mnist/train-0000{part}-of-00002.parquet", grey(2), {"label": {"names": names}})
    with pytest.raises(ValueError, match="name its classes differently"):
        load("mnist", root=tmp_path)


def test_unreadable_feature_metadata_is_refused(tmp_path):
    path = tmp_path / "mnist/train.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table(grey(2)).replace_schema_metadata({"huggingface": "{no json"}), path)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: its Hugging Face feature metadata cannot be read"):
        load("mnist", root=tmp_path)


def test_foreign_class_names(tmp_path):
    refuse(tmp_path, "mnist", grey(2), "names 2 classes; this set has 10", {"label": {"names": ["a", "b"]}})


def test_nan_in_a_float_column(tmp_path):
    columns = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "score": [1.0, float("nan")]}
    refuse(tmp_path, "glue/stsb", columns, "column 'score' has 1 NaN or infinite values of 2")


def test_recordings_of_another_length(tmp_path):
    columns = {"audio_mulaw": [b"\x80" * 5], "n_samples": [4], "label": [0], "speaker": [0]}
    refuse(tmp_path, "fsdd", columns, "row 0 holds 5 samples and declares 4")


def refuse_npz(path: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: .*{message}"):
        load(name, root=path.parents[1])


def test_npz_with_objects_is_never_unpickled(tmp_path):
    (tmp_path / "mnist").mkdir()
    path = tmp_path / "mnist/train.npz"
    np.savez(path, image=np.array([{"a": 1}], object), label=np.zeros(1, int))
    refuse_npz(path, "mnist", "not an .npz archive of plain arrays .*Pickled objects are never loaded")


@pytest.mark.parametrize("content", [b"", b"junk", "npy", "half"])
def test_npz_that_is_none(tmp_path, content):
    (tmp_path / "graphs").mkdir()
    path = tmp_path / "graphs/cora.npz"
    whole = (BUILTIN / "graphs/cora.npz").read_bytes()
    if content == "npy":
        np.save(buffer := io.BytesIO(), np.zeros(3))
        content = buffer.getvalue()
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    refuse_npz(path, "cora", "damaged")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": None}, "arrays 'edge_index'"),
        ({"y": np.zeros((2, 2), int)}, r"classes 'y' have shape \[2, 2\]; expected one axis"),
        ({"edge_index": np.zeros((3, 4), int)}, r"'edge_index' of shape \[2, E\]"),
        ({"edge_index": np.array([[0], [5000]])}, "node numbers below N=2708"),
        ({"train_idx": np.array([-1])}, "node numbers below N=2708 in 'train_idx'"),
        ({"x_indptr": np.zeros(5, int)}, "'x_indptr' of N"),
        ({"x_shape": None}, "together"),
        ({"x_data": np.array([np.nan])}, "no NaN or infinity in 'x_data'"),
        ({"x_data": np.ones(3, np.float32)}, "'x_data' as long as"),
        ({"x": np.ones((3, 5), np.float32)}, "dense features"),
        ({"geom_train": np.zeros((10, 5), np.uint8)}, "bit-packed masks"),
    ],
)
def test_foreign_graphs(tmp_path, change, message):
    with np.load(BUILTIN / "graphs/cora.npz") as archive:
        arrays = {**archive, **change}
    (tmp_path / "graphs").mkdir()
    path = tmp_path / "graphs/cora.npz"
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})
    refuse_npz(path, "cora", message)


def test_a_graph_of_ones_own_with_dense_features(tmp_path):
    (tmp_path / "graphs").mkdir()
    x = np.random.default_rng(0).random((4, 6), np.float32)
    np.savez(tmp_path / "graphs/pubmed.npz", edge_index=np.array([[0, 1], [1, 0]]), y=np.array([0, 1, 2, 1]), x=x)
    data = load("pubmed", root=tmp_path)
    assert data.classes == ("0", "1", "2")
    np.testing.assert_array_equal(data.splits["graph"]["x"], x)


# The hub


def fake_hub(monkeypatch, answer):
    import datasets

    calls = []

    def load_dataset(path, config=None):
        calls.append((path, config))
        if isinstance(answer, Exception):
            raise answer
        return datasets.DatasetDict(answer(datasets))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_registered_set_comes_from_the_hub_with_our_columns(monkeypatch):
    def answer(datasets):
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(10)})
        rows = {"img": [np.full((32, 32, 3), i, np.uint8) for i in range(3)], "label": [0, 1, 2]}
        return {"train": datasets.Dataset.from_dict(rows, features)}

    calls = fake_hub(monkeypatch, answer)
    data = load("cifar10")
    assert calls == [("uoft-cs/cifar10", None)]
    assert data.source == "Hugging Face uoft-cs/cifar10 (train 3 rows)"
    assert data.splits["train"]["image"][:, 0, 0, 0].tolist() == [0, 1, 2]


def test_any_hub_set_by_name(monkeypatch):
    def answer(datasets):
        features = datasets.Features(
            {
                "words": datasets.Value("string"),
                "label": datasets.ClassLabel(names=["no", "yes"]),
                "n": datasets.Value("float64"),
            }
        )
        labelled = {"words": ["a", "b"], "label": [0, 1], "n": [0.5, 1.5]}
        hidden = {"words": ["c"], "label": [-1], "n": [2.5]}
        return {
            "train": datasets.Dataset.from_dict(labelled, features),
            "test": datasets.Dataset.from_dict(hidden, features),
        }

    calls = fake_hub(monkeypatch, answer)
    data = load("hf:someone/thing:config")
    assert calls == [("someone/thing", "config")]
    assert data.classes == ("no", "yes")
    assert list(data.splits) == ["train"]
    assert data.splits["train"]["words"] == ["a", "b"]
    assert data.splits["train"]["n"].dtype == np.float32


def test_hub_pictures_are_decoded_and_empty_texts_stay(monkeypatch):
    def answer(datasets):
        features = datasets.Features({"photo": datasets.Image(), "caption": datasets.Value("string")})
        rows = {"photo": [np.full((4, 5, 3), i, np.uint8) for i in range(2)], "caption": ["a", None]}
        return {"test": datasets.Dataset.from_dict(rows, features)}

    fake_hub(monkeypatch, answer)
    data = load("hf:someone/photos")
    assert data.modality == "image"
    assert data.splits["test"]["photo"].shape == (2, 4, 5, 3)
    assert data.splits["test"]["photo"][:, 0, 0, 0].tolist() == [0, 1]
    assert data.splits["test"]["caption"] == ["a", None]
    data.splits["test"]["caption"].clear()
    assert load("hf:someone/photos").splits["test"]["caption"] == ["a", None]


def test_empty_numbers_of_a_hub_set_are_refused(monkeypatch):
    fake_hub(monkeypatch, lambda datasets: {"train": datasets.Dataset.from_dict({"n": [1, None, 3]})})
    with pytest.raises(ValueError, match=r"hf:a/b\[train\]: column 'n' has 1 empty rows of 3"):
        load("hf:a/b")


@pytest.mark.parametrize("name", ["cifar10", "hf:someone/thing"])
def test_offline_is_said_clearly(name, monkeypatch):
    fake_hub(monkeypatch, ConnectionError("no network\ndetails"))
    with pytest.raises(
        FileNotFoundError, match=r"did not load: ConnectionError: no network\. Check the name"
    ) as caught:
        load(name)
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert name.removeprefix("hf:") in str(caught.value)
    assert ("was not found. Looked in" in str(caught.value)) == (name == "cifar10")


def test_a_hub_set_takes_no_root(tmp_path):
    with pytest.raises(ValueError, match="cannot hold 'hf:a/b'"):
        load("hf:a/b", root=tmp_path)


# Everything in the shared folder


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "cifar10" else n for n in NAMES])
def test_every_registered_set_of_the_shared_folder(name):
    folder = SHARED / name if not name.startswith("graphs/") else SHARED / f"{name}.npz"
    if not folder.exists():
        pytest.skip(f"{folder} is absent")
    data = load(name, root=SHARED)
    assert data.source.startswith("root (")
    assert data.licence
    for columns in data.splits.values():
        if data.modality != "graph":
            assert len({len(column) for column in columns.values()}) == 1
        if "label" in columns:
            assert len(data.classes) > columns["label"].max()
    if name == "cifar10":
        assert data.splits["train"]["image"].shape == (30_000, 32, 32, 3)
        agrees = data.splits["test"]["human_counts"].argmax(1) == data.splits["test"]["label"]
        assert agrees.mean() > 0.99


def test_cifar10_human_counts_follow_the_order_of_the_test_split(tmp_path):
    source = SHARED / "cifar10"
    if not source.exists():
        pytest.skip(f"{source} is absent")
    (tmp_path / "cifar10").mkdir()
    table = pq.read_table(source / "test.parquet").slice(0, 50)
    counts = pq.read_table(source / "test_human_counts.parquet").slice(0, 50)
    pq.write_table(table, tmp_path / "cifar10/test.parquet")
    pq.write_table(counts, tmp_path / "cifar10/test_human_counts.parquet")
    test = load("cifar10", root=tmp_path).splits["test"]
    assert (test["human_counts"].argmax(1) == test["label"]).mean() > 0.9
    shutil.copy(source / "test_human_counts.parquet", tmp_path / "cifar10")
    with pytest.raises(ValueError, match=r"test_human_counts\.parquet: its orig_index differs"):
        load("cifar10", root=tmp_path)
