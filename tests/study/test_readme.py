"""The README tells what the committed results say, and its Python blocks run."""

import operator
import re
from pathlib import Path

import pytest

import effjax
from effjax.study.readme import BEGIN, END, replace_card_tables, replace_table, results_table
from effjax.study.report import read_results
from effjax.study.resolve import configs_folder, resolve_saved
from effjax.study.results import decide

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
RESULTS = sorted((ROOT / "configs").glob("*/results/*.json"))


def test_the_table_is_generated_from_the_committed_results():
    assert replace_table(README, results_table(configs_folder())) == README


def test_markers_are_needed():
    with pytest.raises(ValueError, match="markers"):
        replace_table("no table here", "| |")
    assert replace_table(f"a {BEGIN} old {END} b", "new") == f"a {BEGIN}\nnew\n{END} b"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_committed_results_say_where_they_come_from_and_decide_their_claims(path):
    results = read_results(path)
    assert results["environment"]["commit"]
    assert results["environment"]["hardware"]["platform"]
    if results["config"] is None:  # a benchmark against other libraries, no study
        compare = {">=": operator.ge, "<=": operator.le}
        assert all(claim["holds"] == compare[claim["op"]](claim["left"], claim["right"]) for claim in results["claims"])
        return
    study = resolve_saved(results["study"], results["preset"], results["config"])
    trained = any(arm["metrics"] for arm in results["arms"].values())
    assert results["claims"] == decide(study.claims, results["arms"], "metrics" if trained else "cost")


CARDS = [ROOT / "configs" / stem / "README.md" for stem in effjax.METHODS]


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_the_tables_of_a_card_are_generated_from_its_results(path):
    card = path.read_text()
    assert "<!-- table " in card
    assert replace_card_tables(card, path.parent / "results") == card


def test_a_tables_marker_must_make_sense():
    results = ROOT / "configs" / "samuel" / "results"
    marker = "<!-- table cpu-amd-epyc-2-cores\n{}\n-->\n<!-- end of table -->"
    with pytest.raises(ValueError, match="rows: arm"):
        replace_card_tables(marker.format("accuracy = digits-mlp-64-offline accuracy"), results)
    with pytest.raises(ValueError, match="'nobody' is in none"):
        replace_card_tables(marker.format("rows: nobody\naccuracy = digits-mlp-64-offline accuracy"), results)


@pytest.mark.parametrize("path", [ROOT / "README.md", *CARDS], ids=lambda path: path.parent.name)
def test_python_blocks_run(path):
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(path), "exec"), {"__name__": "readme"})


def test_the_readme_has_exactly_two_set_up_lines():
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(lines) == 2
    assert "effjax compare samuel:smoke" in lines[0]
    assert "pytest" in lines[1]
