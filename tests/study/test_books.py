"""Working files that are missing, cut short or of another shape: named, with the way out."""

import json
import re

import pytest

from effjax.study.books import NUMBER, BooksError, read_json_checked

COSTS = {"g/a": {"step_ms": NUMBER, "compiles": int}, "g/b": {"step_ms": NUMBER}}
GOOD = {"g/a": {"step_ms": 1.5, "compiles": 2}, "g/b": {"step_ms": None, "more": [1]}, "g/c": {}}
WAY_OUT = "Delete it to measure again."


def test_a_whole_file_is_read(tmp_path):
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(GOOD))
    assert read_json_checked(path, COSTS, WAY_OUT) == GOOD
    assert read_json_checked(path, ("g/a", "g/b"), WAY_OUT) == GOOD
    path.write_text('["digits"]')
    assert read_json_checked(path, list, WAY_OUT) == ["digits"]


@pytest.mark.parametrize(
    ("text", "shape", "problem"),
    [
        (None, COSTS, " is missing."),
        ("", COSTS, " is empty."),
        ('{"g/a": {"step_ms": 1.5, "comp', COSTS, " is cut short or damaged at line 1."),
        ("[1]", COSTS, "the file is a list, not an object."),
        ("{}", list, "the file is an object, not a list."),
        ('{"g/b": {"step_ms": 1}}', COSTS, "the file lacks 'g/a'."),
        ('{"g/a": {"step_ms": 1}, "g/b": {}}', COSTS, "['g/a'] lacks 'compiles'."),
        ('{"g/a": {"step_ms": "1", "compiles": 2}, "g/b": {}}', COSTS, "['g/a']['step_ms'] is text, not a number"),
        ('{"g/a": {"step_ms": 1, "compiles": true}, "g/b": {}}', COSTS, "['compiles'] is true or false, not a number."),
        ("{}", [f"arm{i}" for i in range(8)], "lacks 'arm0', 'arm1', 'arm2', 'arm3', 'arm4' and 3 more."),
    ],
)
def test_a_bad_file_is_named_with_the_way_out(tmp_path, text, shape, problem):
    path = tmp_path / "cost.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BooksError, match=rf"^{re.escape(str(path))}.*{re.escape(problem)}.*{re.escape(WAY_OUT)}$"):
        read_json_checked(path, shape, WAY_OUT)


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "done.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BooksError, match=r"done\.json is damaged: it is not text. Delete it\."):
        read_json_checked(tmp_path / "done.json", (), "Delete it.")
