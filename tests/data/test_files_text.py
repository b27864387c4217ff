import json
import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.data.facts import fingerprint
from effjax.data.files import read_data
from effjax.data.splits import hold_out
from effjax.data.text_files import text_data
from effjax.tasks.text import text_task


def messages(path, labels=("spam", "ham"), rows=10, extra=""):
    lines = [f'"message {row}, {"long " * row}",{labels[row % len(labels)]}{extra}' for row in range(rows)]
    path.write_text("\n".join([f"body,kind{',id' if extra else ''}", *lines]))
    return path


def test_texts_of_a_csv_file(tmp_path):
    data = text_data(messages(tmp_path / "messages.csv", extra=",1"), text="body", label="kind", split=0.2)
    assert data.classes == ("ham", "spam")
    assert {name: len(columns["text"]) for name, columns in data.splits.items()} == {"train": 8, "test": 2}
    for columns in data.splits.values():
        assert columns["label"].dtype == np.int32
        for text, label in zip(columns["text"], columns["label"], strict=True):
            number = int(re.match(r"message (\d+),", text)[1])
            assert label == (1 if number % 2 == 0 else 0)
    assert (data.name, data.modality) == ("messages", "text")
    assert data.source.startswith(f"{tmp_path / 'messages.csv'} (train 8, test 2, 2 classes): Rows: 8 train, 2 test. ")
    assert data.source.endswith(f" SHA-256 {data.facts.fingerprint[:12]}.")
    facts = data.facts
    assert facts.rows == {"train": 8, "test": 2}
    assert facts.classes == {"ham": (4, 1), "spam": (4, 1)}
    # "message 0, " has 11 characters, and every row 5 more: 11, 16, ..., 56 with the median 33.5
    assert facts.sizes == "Texts of 11 to 56 characters, median 33.5."
    assert facts.split.startswith("2 of 10 rows were held out to test on (20%; the same share of every class")
    assert facts.notes == ("Not read: the columns 'id'.",)
    assert json.loads(json.dumps(facts._asdict()))["classes"] == {"ham": [4, 1], "spam": [4, 1]}
    assert facts.sentences[1] == "2 classes: ham (4 + 1), spam (4 + 1)."


def test_a_text_task_takes_it(tmp_path):
    data = text_data(messages(tmp_path / "messages.csv", rows=20), text="body", label="kind")
    task = text_task(data, "encoder-1x8", max_length=8)
    assert task.classes == 2
    assert (len(task.train["label"]), len(task.test["label"])) == (16, 4)


def test_every_format_gives_the_same_data(tmp_path):
    rows = [{"body": f"é message\n{row}", "kind": ["ham", "spam"][row % 2]} for row in range(10)]
    columns = {name: [row[name] for row in rows] for name in ("body", "kind")}
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text("kind;body\n" + "".join(f'{row["kind"]};"{row["body"]}"\n' for row in rows))
    pa.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    np.savez(tmp_path / "a.npz", **{name: np.array(column) for name, column in columns.items()})
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    found = [
        text_data(tmp_path / name, text="body", label="kind")
        for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "a.npz", "saved")
    ]
    assert len({data.facts.fingerprint for data in found}) == 1
    assert sorted([*found[0].splits["train"]["text"], *found[0].splits["test"]["text"]]) == sorted(columns["body"])


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["spam", "ham"], ("ham", "spam")),
        (["7", "10"], ("7", "10")),  # by number, not by text
        (["-1", "0"], ("-1", "0")),
        (["1.0", "2.0"], ("1", "2")),
        (["True", "False"], ("False", "True")),
        (["é", "1"], ("1", "é")),
        (["1", "01"], ("01", "1")),
    ],
)
def test_labels_as_text_files_write_them(tmp_path, labels, classes):
    data = text_data(messages(tmp_path / "a.csv", labels), text="body", label="kind", split=0.5)
    assert data.classes == classes
    first = next(i for i, text in enumerate(data.splits["train"]["text"]) if int(text.split()[1][:-1]) % 2 == 0)
    named = data.classes[data.splits["train"]["label"][first]]
    assert named in (labels[0], labels[0].removesuffix(".0"))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [([True, False], ("false", "true")), ([5, 3], ("3", "5")), ([2.0, 1.0], ("1", "2")), (["b", "a"], ("a", "b"))],
)
def test_labels_of_typed_files(tmp_path, labels, classes):
    pa.parquet.write_table(pa.table({"text": list("uvwx"), "label": labels * 2}), tmp_path / "a.parquet")
    assert text_data(tmp_path / "a.parquet", split=0.5).classes == classes


def test_class_names_of_the_file(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a", "never"])}
    )
    rows = datasets.Dataset.from_dict({"text": list("uvwx"), "label": [0, 1, 0, 1]}, features=features)
    hidden = datasets.Dataset.from_dict({"text": ["y"], "label": [-1]}, features=features)
    datasets.DatasetDict({"train": rows, "validation": rows, "test": hidden}).save_to_disk(tmp_path / "saved")
    data = text_data(tmp_path / "saved")
    assert data.classes == ("z", "a", "never")
    assert data.splits["train"]["label"].tolist() == [0, 1, 0, 1]
    assert data.facts.classes["never"] == (0, 0)
    assert data.facts.split == "The rows of 'validation' (4), as stored, are tested on."
    assert "Not read: the split 'test', whose labels are hidden (-1)." in data.facts.notes
    assert "4 of 4 test texts stand among the training texts too." in data.facts.notes


def test_pairs_and_scores(tmp_path):
    rows = [f"a{row},b{row},{row / 4}" for row in range(8)]
    (tmp_path / "a.csv").write_text("\n".join(["one,two,stars", *rows]))
    data = text_data(tmp_path / "a.csv", text="one", text_b="two", score="stars", split=0.25)
    train = data.splits["train"]
    assert sorted(train) == ["score", "sentence1", "sentence2"]
    assert train["score"].dtype == np.float32
    assert [f"b{text[1:]}" for text in train["sentence1"]] == train["sentence2"]
    assert [int(text[1:]) / 4 for text in train["sentence1"]] == train["score"].tolist()
    assert data.classes == ()
    assert data.facts.split.endswith("(25%; drawn with seed 0).")
    assert len(data.splits["test"]["score"]) == 2


def test_a_test_file(tmp_path):
    train = messages(tmp_path / "train.csv", rows=3)  # one row of the class "ham", which a test file allows
    test = messages(tmp_path / "other.csv", rows=2)
    data = text_data(train, text="body", label="kind", test=test)
    assert data.facts.classes == {"ham": (1, 1), "spam": (2, 1)}
    assert data.facts.split == "The test rows (2) are the files' own."
    strange = messages(tmp_path / "strange.csv", labels=("spam", "hamm"))
    with pytest.raises(ValueError, match=r"classes \['hamm'\] do not occur in the training rows. Did you mean 'ham'"):
        text_data(train, text="body", label="kind", test=strange)
    (tmp_path / "other.csv").write_text("text,kind\nx,ham\n")
    with pytest.raises(ValueError, match=r"text='body' is not a column of .*other\.csv.* It has: 'text', 'kind'"):
        text_data(train, text="body", label="kind", test=test)
    with pytest.raises(ValueError, match=r"split=0\.3 and test=.*give one of them"):
        text_data(train, text="body", label="kind", test=test, split=0.3)


def refuse(path, message, **columns):
    with pytest.raises(ValueError, match=message):
        text_data(path, **({"text": "body", "label": "kind"} | columns))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": "bodi"}, r"text='bodi' is not a column of .*a\.csv. Did you mean 'body'\? It has: 'body', 'kind'"),
        ({"label": "kin"}, r"label='kin' is not a column .* Did you mean 'kind'"),
        ({"text_b": "other"}, "text_b='other' is not a column"),
        ({"label": None}, r"which column is the label\? Name it: label=COLUMN. It has: 'body', 'kind'"),
        ({"score": "kind"}, "label='kind' and score='kind': give one of them"),
        ({"label": None, "score": "kind"}, r"score='kind' .*10 rows .*without a number; the first holds 'spam'"),
        ({"text": "kind"}, "give a column of its own to each"),
        ({"split": 0.0}, r"split=0\.0 must be a number in \(0, 1\)"),
        ({"split": 1.5}, r"split=1\.5 must be a number in \(0, 1\)"),
        ({"seed": -1}, "seed=-1 must be an integer"),
    ],
)
def test_refused_columns(tmp_path, columns, message):
    refuse(messages(tmp_path / "a.csv"), message, **columns)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a,x", " ,y", ",x"], r"text='body' of .*: 2 rows \(1, 2; the first row is 0\) without a text"),
        (["a,x", "b,", "c,x"], r"label='kind' of .*: 1 row \(1; the first row is 0\) without a label"),
        (["a,x", "b,nan", "c,NaN"], r"2 rows \(1, 2; .*without a label"),
        (["a,x", "b,x"], "every row is of class 'x'. There is nothing to tell apart"),
        (["a,x", "b,x", "c,y"], r"class 'y' has one row only, .* give a test file \(test=FILE\)"),
        (["a,x", "b,y"], "classes 'x', 'y' have one row only"),
        (["a,0.5", "b,1.5"], r"holds 2 numbers such as 0\.5, which are no classes. .*score='kind'"),
        (["a,4294967297", "b,1"], "runs from 1 to 4294967297, beyond int32"),
        (["a,x", "b,x ", "c,y"], "classes 'x' and 'x ' differ in spaces only"),
    ],
)
def test_refused_rows(tmp_path, rows, message):
    (tmp_path / "a.csv").write_text("\n".join(["body,kind", *rows]))
    refuse(tmp_path / "a.csv", message)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": [1, 2], "kind": ["x", "y"]}, "text='body' of .*: holds int64, not texts"),
        ({"body": [["a"], ["b"]], "kind": ["x", "y"]}, "2 rows .* with a list, not a text. Join lists of words"),
        ({"body": ["a", "b"], "kind": [[0, 1], [1]]}, "2 rows .* with a list of labels. .*not labels per token"),
        ({"body": ["a", None], "kind": ["x", "y"]}, r"1 row \(1; the first row is 0\) without a text"),
        ({"body": ["a", "b"], "kind": [1.0, float("nan")]}, r"1 row \(1; .*without a label"),
        ({"body": ["a", "b"], "kind": ["x", 1]}, r"values of several kinds, \['int', 'str'\]"),
    ],
)
def test_refused_values(tmp_path, columns, message):
    (tmp_path / "a.json").write_text(json.dumps(columns).replace("NaN", "null"))
    refuse(tmp_path / "a.json", message)


def test_refused_one_hot_labels(tmp_path):
    np.savez(tmp_path / "a.npz", body=np.array(["a", "b"]), kind=np.eye(2))
    refuse(tmp_path / "a.npz", r"shape \(2, 2\); expected one label per row. One-hot .*argmax")


def test_refused_scores(tmp_path):
    (tmp_path / "a.csv").write_text("body,stars\na,1.5\nb,1.5\n")
    refuse(tmp_path / "a.csv", "every row holds 1.5. There is nothing to predict", label=None, score="stars")


def test_a_folder_with_splits_is_not_split_again(tmp_path):
    for name in ("train", "test"):
        messages(tmp_path / f"{name}.csv")
    assert text_data(tmp_path, text="body", label="kind").facts.rows == {"train": 10, "test": 10}
    refuse(tmp_path, r"already has the splits \['test', 'train'\]. Leave it out", split=0.5)
    (tmp_path / "train.csv").rename(tmp_path / "sub.csv")
    refuse(tmp_path, r"a folder of tables holds train\.csv")


def test_the_draw_is_the_same_every_time_and_follows_the_seed(tmp_path):
    path = messages(tmp_path / "a.csv", rows=40)
    first, again, other = (text_data(path, text="body", label="kind", seed=seed) for seed in (0, 0, 1))
    assert first.splits["test"]["text"] == again.splits["test"]["text"] != other.splits["test"]["text"]
    assert first.facts == again.facts
    assert first.facts.fingerprint != other.facts.fingerprint


def test_the_fingerprint_follows_the_content(tmp_path):
    path = messages(tmp_path / "a.csv")
    first = text_data(path, text="body", label="kind").facts.fingerprint
    path.write_text(path.read_text().replace("message 3", "message three"))
    assert text_data(path, text="body", label="kind").facts.fingerprint != first
    assert fingerprint(["a", "bc"]) != fingerprint(["ab", "c"])
    assert fingerprint({"a": [], "b": [1]}) != fingerprint({"a": [1], "b": []})
    assert fingerprint(np.zeros(2, np.int32)) != fingerprint(np.zeros(1, np.int64))
    assert len(first) == 64


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.integers(2, 30), min_size=1, max_size=5),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
    order=st.randoms(use_true_random=False),
)
def test_splits_are_disjoint_complete_and_stratified(counts, share, seed, order):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    order.shuffle(labels)
    labels = np.array(labels)
    train, test = hold_out(labels, len(labels), share, seed)
    assert sorted([*train, *test]) == list(range(len(labels)))
    assert (np.diff(train) > 0).all()
    assert (np.diff(test) > 0).all()
    for label, count in enumerate(counts):
        held = int((labels[test] == label).sum())
        assert 1 <= held <= count - 1
        assert abs(held - share * count) < 1
    np.testing.assert_array_equal(hold_out(labels, len(labels), share, seed)[1], test)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(2, 50), share=st.floats(0.01, 0.99))
def test_splits_without_classes(rows, share):
    train, test = hold_out(None, rows, share, 0)
    assert sorted([*train, *test]) == list(range(rows))
    assert min(len(train), len(test)) >= 1
    assert abs(len(test) - share * rows) < 1


def test_one_call_for_all(tmp_path):
    path = messages(tmp_path / "a.csv")
    data = read_data("text", path, text="body", label="kind", text_b=None, split=None)
    assert data.facts == text_data(path, text="body", label="kind").facts
    with pytest.raises(ValueError, match=r"modality='texts' is not one of 'text', 'image'.* Did you mean 'text'"):
        read_data("texts", path)
    with pytest.raises(
        ValueError, match=r"size=\(8, 8\) does not apply to data of modality 'text'.*It takes: text, text_b"
    ):
        read_data("text", path, size=(8, 8))
    with pytest.raises(ValueError, match=r"txt='body' does not apply .* Did you mean 'text'"):
        read_data("text", path, txt="body")


def test_a_split_that_is_not_read_is_said(tmp_path):
    rows = datasets.Dataset.from_dict({"text": list("uvwx"), "label": [0, 1, 0, 1]})
    datasets.DatasetDict({"train": rows, "test": rows, "unsupervised": rows}).save_to_disk(tmp_path / "saved")
    assert "Not read: the splits 'unsupervised'." in text_data(tmp_path / "saved").facts.notes
