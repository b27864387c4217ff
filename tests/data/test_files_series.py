import json

import numpy as np
import pytest

from effjax.data.files import read_data
from effjax.data.series import series_data


def steps(path, lengths=(3, 5, 2, 4), order=None, change=None):
    """Series i has the label a or b in turn, and the values 10 i + t, -t."""
    rows = [
        [f"s{series}", step, 10 * series + step, -step, "ab"[series % 2]]
        for series, length in enumerate(lengths)
        for step in range(length)
    ]
    rows = rows if order is None else [rows[row] for row in order(len(rows))]
    if change is not None:
        change(rows)
    path.write_text("\n".join(["id,time,x,y,label", *(",".join(map(str, row)) for row in rows)]))
    return path


def split_rows(data):
    return {name: len(getattr(data, name)["targets"]) for name in ("train", "test")}


def test_a_table_of_steps(tmp_path):
    data = series_data(steps(tmp_path / "runs.csv"), split=0.5, standardize=False)
    assert (data.name, data.kind, data.length, data.features, data.outputs) == ("runs", "class", 5, 2, 2)
    assert split_rows(data) == {"train": 2, "test": 2}
    for columns in (data.train, data.test):
        assert columns["inputs"].dtype == np.float32
        for inputs, target, length in zip(columns["inputs"], columns["targets"], columns["lengths"], strict=True):
            series = round(inputs[0, 0]) // 10
            assert (target, length) == (series % 2, (3, 5, 2, 4)[series])
            expected = np.zeros((5, 2))
            expected[:length] = [[10 * series + step, -step] for step in range(length)]
            np.testing.assert_array_equal(inputs, expected)
    assert data.facts.sizes == "Series of 2 to 5 steps, median 3.5, 2 features."
    assert data.facts.notes == ("3 of 4 series were filled with zeros at the end to 5 steps.",)
    assert data.facts.split.startswith("2 of 4 series were held out")
    assert data.facts.classes == {"a": (1, 1), "b": (1, 1)}


def test_the_time_column_orders_the_steps(tmp_path):
    straight = series_data(steps(tmp_path / "a.csv"), split=0.5)
    mixed = series_data(
        steps(tmp_path / "b.csv", order=lambda n: sorted(range(n), key=lambda i: (i * 7) % n)), split=0.5
    )
    rows = lambda data: sorted(map(repr, np.concatenate([data.train["inputs"], data.test["inputs"]]).tolist()))
    assert len(rows(straight)) == len(rows(mixed)) == 4
    unscaled = [series_data(tmp_path / name, split=0.5, standardize=False, time="time") for name in ("a.csv", "b.csv")]
    assert rows(unscaled[0]) == rows(unscaled[1])
    dates = tmp_path / "dates.csv"
    lines = (tmp_path / "b.csv").read_text().split("\n")
    cells = [line.split(",") for line in lines[1:]]
    dates.write_text("\n".join([lines[0], *(f"{c[0]},2024-01-0{int(c[1]) + 1},{','.join(c[2:])}" for c in cells)]))
    assert rows(series_data(dates, split=0.5, standardize=False)) == rows(unscaled[0])


def test_standardised_by_the_training_steps(tmp_path):
    data = series_data(steps(tmp_path / "a.csv"), split=0.5)
    mask = np.arange(data.length) < data.train["lengths"][:, None]
    real = data.train["inputs"][mask]
    np.testing.assert_allclose(real.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(real.std(0), 1, rtol=1e-5)
    assert not data.train["inputs"][~mask].any()
    assert "Features were standardised by the training steps." in data.facts.notes


def test_filled_at_the_start_and_cut(tmp_path):
    path = steps(tmp_path / "a.csv")
    start = series_data(path, split=0.5, standardize=False, pad="start")
    for inputs, length in zip(start.train["inputs"], start.train["lengths"], strict=True):
        assert inputs[-1, 1] == -(length - 1)  # the last step of its own
        assert not inputs[: 5 - length].any()
    cut = series_data(path, split=0.5, standardize=False, length=3)
    assert cut.train["inputs"].shape[1] == 3
    assert max(cut.train["lengths"].max(), cut.test["lengths"].max()) == 3
    assert "2 of 4 series are longer than 3 steps and lost their last steps." in cut.facts.notes
    assert "filled with zeros at the start to 5 steps" in start.facts.notes[0]
    with pytest.raises(ValueError, match=r"pad='left' is not one of 'end', 'start'"):
        series_data(path, pad="left")


def test_lists_and_padded_arrays_give_the_same(tmp_path):
    series = [[[float(10 * i + t), -float(t)] for t in range(length)] for i, length in enumerate((3, 5, 2, 4))]
    rows = [{"values": values, "label": "ab"[i % 2]} for i, values in enumerate(series)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    padded = np.full((4, 6, 2), 99.0)
    for row, values in zip(padded, series, strict=True):
        row[: len(values)] = values
    np.savez(tmp_path / "a.npz", inputs=padded, lengths=[3, 5, 2, 4], label=np.array(list("abab")))
    found = [
        series_data(path, split=0.5) for path in (tmp_path / "a.jsonl", tmp_path / "a.npz", steps(tmp_path / "a.csv"))
    ]
    assert len({data.facts.fingerprint for data in found}) == 1


def test_series_of_one_length_have_no_lengths(tmp_path):
    np.savez(tmp_path / "a.npz", inputs=np.arange(32.0).reshape(8, 4), label=np.arange(8) % 2)
    data = read_data("sequence", tmp_path / "a.npz", split=0.25)
    assert sorted(data.train) == ["inputs", "targets"]
    assert data.test["inputs"].shape == (2, 4, 1)


def test_scores(tmp_path):
    rows = [{"values": [float(i)] * (i + 1), "height": i / 2} for i in range(8)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = series_data(tmp_path / "a.jsonl", score="height", split=0.25)
    assert (data.kind, data.outputs, data.train["targets"].dtype) == ("value", 1, np.float32)
    np.testing.assert_array_equal(data.test["targets"] * 2 + 1, data.test["lengths"])


def test_another_file_to_test_on(tmp_path):
    data = series_data(steps(tmp_path / "a.csv"), test=steps(tmp_path / "b.csv", lengths=(2, 7)))
    assert split_rows(data) == {"train": 4, "test": 2}
    assert data.length == 7
    (tmp_path / "c.csv").write_text("id,time,x,label\n1,0,1,a\n2,0,1,b\n")
    with pytest.raises(ValueError, match=r"unlike numbers of features: {'train': 2, 'test': 1}"):
        series_data(tmp_path / "a.csv", test=tmp_path / "c.csv")


def test_chosen_columns(tmp_path):
    data = series_data(steps(tmp_path / "a.csv"), values="y", split=0.5)
    assert data.features == 1
    assert "Not read: the columns 'x'." in data.facts.notes
    with pytest.raises(
        ValueError, match=r"values='z' is not a column of .*a.csv.* It has: 'id', 'time', 'x', 'y', 'label'"
    ):
        series_data(tmp_path / "a.csv", values=["x", "z"])


def change(row, column, value):
    def apply(rows):
        rows[row][column] = value

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change(1, 4, "b"), "label='label' of .*: changes within series 's0', from 'a' to 'b'. One label per series"),
        (change(1, 1, 0), "time='time' of .*: series 's0' has two steps at 0"),
        (change(1, 1, "soon"), "expected numbers or ISO 8601 dates"),
        (
            change(1, 2, "x"),
            r"column 'x' of .*: 1 row \(1; .*without a number; the first holds 'x'. Features are chosen by values=",
        ),
        (change(1, 2, ""), r"column 'x' of .*: 1 row \(1; .*without a value"),
        (change(1, 2, "nan"), "NaN or infinity"),
        (change(1, 0, ""), r"id='id' of .*: 1 row .*without a series"),
        (change(0, 4, ""), "without a label|changes within series 's0'"),
    ],
)
def test_refused_steps(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        series_data(steps(tmp_path / "a.csv", change=change))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"values": [], "label": 0}, {"values": [1.0], "label": 1}], "row 0 holds an empty series"),
        ([{"values": [1.0, None], "label": 0}, {"values": [1.0], "label": 1}], "row 0 must be a list of numbers"),
        (
            [{"values": [[1.0], [1.0, 2.0]], "label": 0}, {"values": [1.0], "label": 1}],
            "row 0 must be a list of numbers",
        ),
        ([{"values": [[1.0]], "label": 0}, {"values": [[1.0, 2.0]], "label": 1}], r"have \[1, 2\] features per step"),
        ([{"values": ["a"], "label": 0}, {"values": ["b"], "label": 1}], "holds texts. Series are of numbers"),
        ([{"values": [1.0], "label": [0]}, {"values": [1.0], "label": [1]}], "not labels per token or per step"),
        ([{"values": [1.0], "label": 0}, {"values": [1.0], "label": 1}], "classes '0', '1' have one row only"),
    ],
)
def test_refused_lists(tmp_path, rows, message):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=message):
        series_data(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"lengths": [1, 2, 3, 5]}, "row 3 says 5; expected an integer from 1 to 4"),
        ({"lengths": [0, 2, 3, 4]}, "row 0 says 0"),
        ({"lengths": [1.0, 2, 3, 4]}, "expected an integer from 1 to 4"),
        ({"inputs": np.array([[1, 2], [3, np.nan]] * 2)}, "row 1 holds NaN or infinity at step 1"),
        ({"inputs": np.zeros((4, 2, 2, 2))}, "row 0 must be a list of numbers, or of vectors"),
        ({"inputs": np.array([None] * 4)}, "array 'inputs': .*Pickled objects are never loaded"),
        ({"label": np.zeros((4, 4), int)}, r"shape \(4, 4\); expected one label per row"),
    ],
)
def test_refused_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **({"inputs": np.ones((4, 4)), "label": [0, 1, 0, 1]} | arrays))
    with pytest.raises(ValueError, match=message):
        series_data(tmp_path / "a.npz")


def test_refused_keywords(tmp_path):
    np.savez(tmp_path / "a.npz", inputs=np.ones((4, 4)), label=[0, 1, 0, 1])
    with pytest.raises(ValueError, match="'inputs' holds whole series; id= and time= are for tables of steps"):
        series_data(tmp_path / "a.npz", id="label")
    with pytest.raises(ValueError, match="lengths='n' is not a column"):
        series_data(tmp_path / "a.npz", lengths="n")
    with pytest.raises(ValueError, match="lengths='n' is for padded arrays"):
        series_data(steps(tmp_path / "a.csv"), lengths="n")
    with pytest.raises(ValueError, match="length=0 must be an integer"):
        series_data(tmp_path / "a.npz", length=0)


def test_a_constant_feature_stays_finite(tmp_path):
    np.savez(tmp_path / "a.npz", inputs=np.full((4, 7, 1), 0.1), label=[0, 1, 0, 1])
    assert np.abs(series_data(tmp_path / "a.npz").train["inputs"]).max() < 1e-6
    np.savez(tmp_path / "b.npz", inputs=np.full((4, 7, 1), 1e300), label=[0, 1, 0, 1])
    with pytest.raises(ValueError, match="holds values beyond float32"):
        series_data(tmp_path / "b.npz", standardize=False)
