import csv
import gzip
import io
import json
import re
import zipfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.data import npz_files, tables
from effjax.data.tables import missing, numbers, read_splits, read_table


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.csv", "body,kind\nWin now,spam\nHi,ham\n"),
        ("mark.csv", b"\xef\xbb\xbfbody,kind\nWin now,spam\nHi,ham\n"),
        ("crlf.csv", "body,kind\r\nWin now,spam\r\nHi,ham\r\n"),
        ("blank.csv", "body,kind\nWin now,spam\n\nHi,ham\n\n\n"),
        ("quotes.csv", '"body","kind"\n"Win now","spam"\n"Hi","ham"'),
        ("semicolon.csv", "body;kind\nWin now;spam\nHi;ham\n"),
        ("bar.txt", "body|kind\nWin now|spam\nHi|ham\n"),
        ("tab.csv", "body\tkind\nWin now\tspam\nHi\tham\n"),
        ("tab.tsv", "body\tkind\nWin now\tspam\nHi\tham\n"),
        ("UPPER.CSV", "body,kind\nWin now,spam\nHi,ham\n"),
        ("wide.csv", "body,kind\nWin now,spam\nHi,ham\n".encode("utf-16")),
        ("packed.csv.gz", gzip.compress(b"body,kind\nWin now,spam\nHi,ham\n", mtime=0)),
        ("lines.jsonl", '{"body": "Win now", "kind": "spam"}\n{"kind": "ham", "body": "Hi"}\n'),
        ("lines.ndjson", '{"body": "Win now", "kind": "spam"}\r\n\r\n{"kind": "ham", "body": "Hi"}'),
        ("lines.json", '{"body": "Win now", "kind": "spam"}\n{"kind": "ham", "body": "Hi"}\n'),
        ("array.json", '[{"body": "Win now", "kind": "spam"},\n {"body": "Hi", "kind": "ham"}]'),
        ("columns.json", '{"body": ["Win now", "Hi"], "kind": ["spam", "ham"]}'),
    ],
)
def test_texts_of_every_format(tmp_path, name, content):
    table = read_table(write(tmp_path / name, content))
    assert table.columns == {"body": ["Win now", "Hi"], "kind": ["spam", "ham"]}
    assert table.rows == 2


def test_a_field_with_every_separator_inside_quotes(tmp_path):
    path = write(tmp_path / "a.csv", 'a;b\n"x, y; z|w\n""q"" é";1\n\'t;2\n')
    assert read_table(path).columns == {"a": ['x, y; z|w\n"q" é', "'t"], "b": ["1", "2"]}


def test_numbers_of_a_text_file_stay_as_written(tmp_path):
    path = write(tmp_path / "a.csv", "code,n\n007,1.50\n010,NA\n")
    assert read_table(path).columns == {"code": ["007", "010"], "n": ["1.50", "NA"]}


def test_quotes_as_plain_characters(tmp_path):
    path = write(tmp_path / "sms.tsv", 'kind\tbody\nham\t"Hello\nspam\tWin "now\n')
    with pytest.raises(ValueError, match=r"sms\.tsv: the record from line 2 on is not CSV .* give quotes=False"):
        read_table(path)
    assert read_table(path, quotes=False).columns["body"] == ['"Hello', 'Win "now']


def test_the_separator_of_a_long_file(tmp_path):
    # The first 256 KiB end inside the quotes of a field full of commas.
    rows = [f'"{"a,b;" * 20_000}";{number}' for number in range(4)]
    found = read_table(write(tmp_path / "a.csv", "\n".join(["text;n", *rows]))).columns
    assert found["n"] == ["0", "1", "2", "3"]


def test_long_fields(tmp_path):
    before = csv.field_size_limit()
    long = "x" * 200_000
    assert read_table(write(tmp_path / "a.csv", f"a,b\n{long},1\n")).columns["a"] == [long]
    assert csv.field_size_limit() == before


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(
        st.tuples(*[st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20)] * 2),
        min_size=1,
        max_size=6,
    ),
    delimiter=st.sampled_from(",;\t|"),
    # Of lone line ends Python's writer quotes only those of its own.
    style=st.sampled_from([(csv.QUOTE_ALL, "\n"), (csv.QUOTE_ALL, "\r\n"), (csv.QUOTE_MINIMAL, "\r\n")]),
)
def test_csv_round_trip(tmp_path_factory, rows, delimiter, style):
    quoting, newline = style
    # A row of the header's shape for the separator to be told by.
    rows = [("plain", "words"), *rows]
    written = io.StringIO(newline="")
    writer = csv.writer(written, delimiter=delimiter, quoting=quoting, lineterminator=newline)
    writer.writerows([("first", "second"), *rows])
    path = write(tmp_path_factory.getbasetemp() / ("a.tsv" if delimiter == "\t" else "a.csv"), written.getvalue())
    found = read_table(path).columns
    assert found == {"first": [row[0] for row in rows], "second": [row[1] for row in rows]}


def test_kinds_of_json_values(tmp_path):
    rows = [
        {"i": 1, "f": 1, "b": True, "s": "x", "l": [1, 2], "m": 1},
        {"i": 2, "f": 0.5, "b": False, "s": None, "l": []},
    ]
    found = read_table(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))).columns
    assert found["i"].dtype == np.int64
    assert found["f"].tolist() == [1.0, 0.5]
    assert found["b"].dtype == bool
    assert (found["s"], found["l"], found["m"]) == (["x", None], [[1, 2], []], [1, None])


def test_parquet_keeps_kinds_and_class_names(tmp_path):
    features = datasets.Features(
        {"t": datasets.Value("string"), "l": datasets.ClassLabel(names=["ham", "spam"]), "n": datasets.Value("int32")}
    )
    rows = datasets.Dataset.from_dict({"t": ["a", "b"], "l": [1, 0], "n": [3, None]}, features=features)
    pa.parquet.write_table(rows.data.table, tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "saved")
    for table in (read_table(tmp_path / "a.parquet"), read_table(tmp_path / "saved")):
        assert (table.columns["t"], table.columns["l"].tolist(), table.columns["n"]) == (["a", "b"], [1, 0], [3, None])
        assert table.class_names == {"l": ("ham", "spam")}


def test_npz(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones((2, 3)), t=np.array(["a", "b"]))
    found = read_table(tmp_path / "a.npz").columns
    assert found["x"].shape == (2, 3)
    assert found["t"] == ["a", "b"]


def test_splits(tmp_path):
    rows = datasets.Dataset.from_dict({"t": ["a", "b"]})
    datasets.DatasetDict({"train": rows, "dev": rows}).save_to_disk(tmp_path / "saved")
    assert list(read_splits(tmp_path / "saved")) == ["train", "validation"]
    with pytest.raises(ValueError, match=r"holds the splits \['train', 'validation'\]; one table is wanted"):
        read_table(tmp_path / "saved")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, value in (("train-00000-of-00002", 1), ("train-00001-of-00002", 2), ("test", 3)):
        pa.parquet.write_table(pa.table({"n": [value]}), folder / f"{name}.parquet")
    (folder / "README.md").write_text("what it is")
    found = read_splits(folder)
    assert {name: table.columns["n"].tolist() for name, table in found.items()} == {"train": [1, 2], "test": [3]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "a,b\n", "holds no rows"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", r"line 3 has 3 fields, the header 2 \(\['a', 'b'\]\), separated by comma"),
        ("a.csv", 'a,b\n"x\ny",2\n1\n', "line 4 has 1 fields"),
        ("a.csv", 'a,b\n1,"open\n2,x\n', "the record from line 2 on is not CSV"),
        ("a.csv", "a,a\n1,2\n", r"more than one column named \['a'\]"),
        ("a.csv", "1,2\n3,4\n", r"its first line \['1', '2'\] holds numbers, not names. Add a header"),
        ("a.csv", b"a,b\nx,1\n\xe9,2\n", "line 3 is not UTF-8"),
        ("a.csv", b"PAR1 and more", "begins like Parquet, which its name does not say"),
        ("a.csv", b"PK\x03\x04 and more", "begins like a zip archive"),
        ("a.csv.gz", b"a,b\n", "cannot be read"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        ("a.jsonl", '{"a": 1}\n[2]\n', r"line 2 is '\[2\]', not an object of columns"),
        ("a.json", "[1, 2]", "expected an array of objects"),
        ("a.json", '{"a": [1, 2], "b": [1]}', "columns differ in length: {'a': 2, 'b': 1}"),
        ("a.json", "a,b\n", "is not JSON"),
        ("a.parquet", "a,b\n1,2\n", "damaged, or not a Parquet file"),
        ("a.npz", "a,b\n1,2\n", r"damaged, or not an \.npz archive"),
        ("a.xlsx", b"PK", r"cannot tell its format from its name. Files of tables end in \.csv"),
    ],
)
def test_refused_files(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: .*{message}"):
        read_table(write(tmp_path / name, content))


def test_refused_archives(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones(2), y=np.array([None, 1]))
    with pytest.raises(ValueError, match=r"array 'y': .* Pickled objects are never loaded"):
        read_table(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", x=np.ones(2), rate=8000)
    with pytest.raises(ValueError, match=r"\['rate'\] hold one value"):
        read_table(tmp_path / "b.npz")


def test_refused_places(tmp_path):
    write(tmp_path / "messages.csv", "a,b\n1,2\n")
    with pytest.raises(FileNotFoundError, match=r"is not a file or folder. Did you mean 'messages.csv'"):
        read_table(tmp_path / "mesages.csv")
    with pytest.raises(FileNotFoundError, match="is written 'hf:stanfordnlp/sst2'"):
        read_table("stanfordnlp/sst2")
    with pytest.raises(ValueError, match=r"a folder of tables holds train.csv .*found \['messages.csv'\]"):
        read_table(tmp_path)
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match="a damaged Hugging Face data set"):
        read_table(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_hub_set_without_a_network_says_what_to_do():
    with pytest.raises(FileNotFoundError, match=r"'hf:nobody/nothing' did not load: .*save_to_disk\(FOLDER\)"):
        read_table("hf:nobody/nothing")


def test_numbers_and_missing_values():
    assert numbers("n", ["1", " 2 "]).tolist() == [1, 2]
    assert numbers("n", ["1", "2.5"]).dtype == np.float64
    for column, message in (
        (["1", "x", "1_000"], r"2 rows \(1, 2; the first row is 0\) without a number; the first holds 'x'"),
        (["1", ""], r"1 row \(1; the first row is 0\) without a value"),
        (np.array([1.0, np.nan, np.inf]), r"2 rows \(1, 2; .*NaN or infinity"),
        (["nan"], "NaN or infinity"),
        (np.ones((2, 2)), "expected one number per row"),
    ):
        with pytest.raises(ValueError, match=message):
            numbers("n", column)
    assert missing(["a", " ", None, float("nan"), "0"]) == [1, 2, 3]
    assert missing(np.array([1.0, np.nan])) == [1]


def bomb(path, size=1 << 31):
    """An .npz of some MB that unpacks to ``size`` zeros."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (size,)})
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("x.npy", "w") as file,
    ):
        file.write(header.getvalue())
        for _ in range(size >> 24):
            file.write(bytes(1 << 24))
    return path


def test_what_unpacks_to_far_more_than_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(npz_files, "FREE", 1 << 24)
    monkeypatch.setattr(tables, "FREE", 1 << 24)
    with pytest.raises(
        ValueError, match=r"a.npz: damaged.*unpacks to 67,108,864 bytes, most of them in 'x'.*uncompressed"
    ):
        read_table(bomb(tmp_path / "a.npz", 1 << 26))
    np.savez(tmp_path / "b.npz", x=np.zeros(1 << 25, np.uint8))  # uncompressed it is meant
    assert len(read_table(tmp_path / "b.npz").columns["x"]) == 1 << 25
    write(tmp_path / "c.csv.gz", gzip.compress(b"a,b\n" + b"1,2\n" * (1 << 23)))
    with pytest.raises(ValueError, match=r"c\.csv\.gz: cannot be read \(it unpacks to"):
        read_table(tmp_path / "c.csv.gz")


@pytest.mark.parametrize("shape", [(1 << 43,), (10, 10**9), (3,)])
def test_a_header_that_claims_what_is_not_there(tmp_path, shape):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(16))
    with pytest.raises(ValueError, match=r"a.npz: array 'x': damaged.*its header says .* bytes, it holds 16"):
        read_table(tmp_path / "a.npz")


def test_members_that_are_no_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(ValueError, match=r"a.npz: array 'notes.txt': damaged.*no array"):
        read_table(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", "[" * 100_000),
        ("a.jsonl", "[" * 100_000),
        ("a.json", '{"a": ' * 100_000),
        ("a.json", "null"),
        ("a.json", "{}"),
        ("a.json", '{"a": ' + "9" * 5000 + "}"),
        ("a.jsonl", "{}\n{}"),
        ("a.parquet", "PAR1" + "x" * 50 + "PAR1"),
    ],
)
def test_damaged_tables_are_named_in_one_line(tmp_path, name, content):
    with pytest.raises(ValueError, match=re.escape(name)) as error:
        read_table(write(tmp_path / name, content))
    assert "\n" not in str(error.value)
