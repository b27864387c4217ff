"""README, results page and cards tell what the committed results say, and the Python blocks of all pages run."""

import json
import operator
import re
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import effjax
from effjax.study.claims import decide
from effjax.study.readme import BEGIN, END, methods_table, replace_card_tables, replace_table, results_table
from effjax.study.report import SCHEMA, read_results
from effjax.study.resolve import configs_folder, resolve

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
RESULTS = sorted((ROOT / "configs").glob("*/results/*.json"))


@pytest.mark.parametrize(("page", "table"), [("README.md", methods_table), ("docs/results.md", results_table)])
def test_tables_are_generated_from_the_committed_results(page, table):
    text = (ROOT / page).read_text()
    assert replace_table(text, table(configs_folder())) == text


def test_the_readme_is_short_and_shows_every_method():
    assert len(README.splitlines()) <= 150
    assert all(f"](configs/{stem}/README.md)" in README for stem in effjax.METHODS)


@pytest.fixture
def configs(tmp_path):
    """One study with one result: plain takes 4.0 s, quick 1.0."""
    (tmp_path / "samuel" / "results").mkdir(parents=True)
    arms = {
        f"mine/{name}": {"group": "mine", "metrics": {"s": {"mean": s}}, "cost": {}}
        for name, s in (("plain", 4.0), ("quick", 1.0))
    }
    hardware = {"platform": "cpu", "cpu": "Some CPU", "cores": 2}
    results = {"study": "samuel", "preset": "cpu", "config": {}, "claims": [], "cost_claims": [], "arms": arms}
    results |= {"schema": SCHEMA, "seeds": [0], "budget": {}, "groups": {"mine": {}}}
    (tmp_path / "samuel" / "presets.py").touch()
    path = tmp_path / "samuel" / "results" / "here.json"
    path.write_text(json.dumps(results | {"environment": {"hardware": hardware}}))
    return tmp_path


@pytest.mark.parametrize(
    ("saves", "expected"),
    [("{quick s} s, not {plain s}", "1 s, not 4"), ("{quick s / plain s %} of it", "25 % of it"), ("{nobody s}", None)],
)
def test_a_headline_has_the_numbers_of_its_results(configs, saves, expected):
    card = f"# Title\n\n<!-- headline here mine\nsaves: {saves}\nquality: good\nloses: never\n-->\n"
    (configs / "samuel" / "README.md").write_text(card)
    if expected is None:
        with pytest.raises(ValueError, match="no 'mine/nobody' with 's'"):
            methods_table(configs)
        return
    link = "[cpu](configs/samuel/results/here.json), Some CPU, 2 cores"
    assert f"| [Title](configs/samuel/README.md) | {expected} | good | never | {link} |" in methods_table(configs)


def test_a_card_needs_a_headline(configs):
    (configs / "samuel" / "README.md").write_text("# Title\n\nText.\n")
    with pytest.raises(ValueError, match=r"samuel/README\.md must begin with its title and a headline"):
        methods_table(configs)


def test_markers_are_needed():
    with pytest.raises(ValueError, match="markers"):
        replace_table("no table here", "| |")
    assert replace_table(f"a {BEGIN} old {END} b", "new") == f"a {BEGIN}\nnew\n{END} b"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_committed_results_say_where_they_come_from_and_decide_their_claims(path):
    results = read_results(path)
    assert results["environment"]["commit"]
    assert results["environment"]["hardware"]["platform"]
    compare = {">=": operator.ge, "<=": operator.le}
    for claim in (*results["claims"], *results.get("cost_claims", ())):
        assert claim["holds"] == compare[claim["op"]](claim["left"], claim["right"])
    if results["config"] is None:  # a benchmark against other libraries, no study
        return
    study = resolve(f"{results['study']}:{results['preset']}")
    assert {name: study.metrics[name] for name in results["groups"]} == results["groups"]
    for kind, timed in (("claims", False), ("cost_claims", True)):
        decided = decide(study.claims, results["arms"], results["groups"], timed=timed)
        assert json.loads(json.dumps(decided)) == results[kind]


def test_plain_claims_of_committed_results_compare_the_means_of_the_seeds():
    """Read from the sentence and the seeds' values alone, without the code that decides claims."""
    plain, checked = re.compile(r"the (.+) of (\S+) is (at most|at least) that of (\S+)$"), 0
    for path in RESULTS:
        results = read_results(path)
        if results["config"] is None:  # a benchmark against other libraries, no study
            continue
        for claim in results["claims"]:
            found, metric = plain.match(claim["text"].rpartition(": ")[2]), results["groups"][claim["group"]]
            if found is None or found[1] != metric["label"]:
                continue
            arms = [results["arms"].get(f"{claim['group']}/{name}") for name in (found[2], found[4])]
            values = [arm["metrics"][metric["name"]]["values"] for arm in arms if arm]
            if len(values) < 2 or any(None in column for column in values):
                continue
            left, right = map(statistics.fmean, values)
            assert (claim["left"], claim["right"]) == pytest.approx((left, right)), claim["text"]
            assert claim["holds"] == (left <= right if found[3] == "at most" else left >= right), claim["text"]
            checked += 1
    assert checked > 20


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


# The README's blocks by day, those of the other pages by night.
LAUNCH = ROOT / "configs" / "launch" / "README.md"
PAGES = [*CARDS, LAUNCH, *(path for path in sorted((ROOT / "docs").glob("*.md")) if "```python" in path.read_text())]
PAGES = [pytest.param(path, marks=pytest.mark.nightly, id=f"{path.parent.name}-{path.stem}") for path in PAGES]


@pytest.mark.parametrize("path", [pytest.param(ROOT / "README.md", id="main"), *PAGES])
def test_python_blocks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where blocks write
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)
    assert blocks
    names = {"__name__": path.stem}  # the blocks of a page follow one another
    with jax.numpy_rank_promotion("allow"):  # as users have it
        for block in blocks:
            exec(compile(block, str(path), "exec"), names)


def test_the_readme_has_exactly_two_set_up_lines():
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(lines) == 2
    assert "effjax compare samuel:smoke" in lines[0]
    assert "pytest" in lines[1]


@pytest.mark.nightly
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="needs the extra docs")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(ROOT / "docs"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "_pages" / "api" / "optim.html").exists()


def links(path):
    """Targets of the links and pictures of a page that are files."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL))
    return {link.partition("#")[0] for link in found if not re.match(r"[a-z]+:|#", link)}


@pytest.mark.parametrize("path", [ROOT / "README.md", LAUNCH, *CARDS, *(ROOT / "docs").glob("*.md")], ids=str)
def test_links_lead_to_files(path):
    assert [link for link in links(path) if not (path.parent / link).exists()] == []
