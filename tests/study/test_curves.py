"""Curves of evaluations: in the results, in the report and its picture, over a stop; bad ones refused by name."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made import arm, results

from effjax.recipes.spec import CurveText
from effjax.study.axes import COLOURS
from effjax.study.compare import compare
from effjax.study.curves import about_curves, curve_json, curve_texts, mean_curves
from effjax.study.plots import figure
from effjax.study.report import render
from effjax.tasks.task import Metric, Task
from effjax.train.program import Curve, Phase, Program

GRID = [0.0, 0.5, 1.0]


def counting(evaluate):
    """A program that adds its first draw to nothing, six times."""
    task = Task(
        name="counting",
        init=lambda key: {"params": {"w": jax.random.normal(key)}},
        loss=None,
        infer=lambda variables, x: x * variables["params"]["w"],
        evaluate=None,
        metric=Metric("height", "max", "height"),
        example_inputs=np.ones((1, 1), np.float32),
        train={},
        test={},
        source="made up.",
    )
    step = lambda state, batch, aux: ({"w": state["w"], "at": state["at"] + 1}, {"loss": jnp.float32(0.5)})
    init = lambda key: {"w": jax.random.normal(key), "at": jnp.int32(0)}
    return Program(task, init, (Phase(step, 6),), lambda state: {"params": {"w": state["w"]}}, evaluate=evaluate)


def height(state):
    """A curve through the number that the seed drew."""
    w = float(state["w"])
    return {"height": w, "rise": Curve(GRID, [0.0, w, 2 * w], {"top": (1.0, 2 * w)})}


def run(evaluate, out, seeds=(0, 1), other=height):
    arms = {"first": counting(evaluate), "second": counting(other)}
    return compare(task=arms["first"].task, arms=arms, budget=6, seeds=seeds, out=out, quiet=True)


def test_curves_survive_the_end_of_an_arm_and_reach_results_report_and_picture(tmp_path):
    calls = []

    def counted(state):
        calls.append(1)
        return {**height(state), "odd": math.nan}

    def fails(state):
        raise RuntimeError("cut here")

    with pytest.raises(RuntimeError, match="cut here"):
        run(counted, tmp_path, other=fails)
    judged = len(calls)
    found = run(counted, tmp_path)
    assert len(calls) == judged  # the finished arm was not evaluated again
    first, second = found["arms"].values()
    assert first["curves"] == second["curves"]
    draws = first["metrics"]["height"]["values"]
    assert all(map(math.isnan, first["metrics"]["odd"]["values"]))  # null in the books
    curve = first["curves"]["rise"]
    assert curve["x"] == GRID
    np.testing.assert_allclose(curve["mean"], np.mean(draws) * np.array([0, 1, 2]), rtol=1e-6)
    np.testing.assert_allclose(curve["std"], np.std(draws, ddof=1) * np.array([0, 1, 2]), rtol=1e-6)
    np.testing.assert_allclose(curve["points"]["top"], [1.0, 2 * np.mean(draws)], rtol=1e-6)
    assert "rise" not in first["metrics"]
    assert json.loads((tmp_path / "results.json").read_text())["arms"]["counting/first"]["curves"] == first["curves"]
    assert "- rise: y against x." in (tmp_path / "report.md").read_text()
    assert "rise" in [panel.get_title() for panel in found.plot().axes]


def test_studies_without_curves_have_no_word_of_them(tmp_path):
    plain = lambda state: {"height": float(state["w"])}
    found = run(plain, tmp_path, seeds=(0,), other=plain)
    assert "curves" not in found
    assert not any("curves" in arm for arm in found["arms"].values())
    assert "Curves" not in (tmp_path / "report.md").read_text()


def test_a_damaged_curve_of_a_finished_arm_is_named(tmp_path):
    def fails(state):
        raise RuntimeError("cut here")

    with pytest.raises(RuntimeError, match="cut here"):
        run(height, tmp_path, other=fails)
    (path,) = tmp_path.glob(".work/arms/*/first/0/done.json")
    done = json.loads(path.read_text())
    path.write_text(json.dumps({**done, "curves": {"rise": {"x": GRID}}}))
    with pytest.raises(ValueError, match=r"done.json is not what .*\['curves'\]\['rise'\] lacks 'y'.*train this seed"):
        run(height, tmp_path)


@pytest.mark.parametrize(
    ("curve", "words"),
    [
        (Curve([0.0, 1.0], [1.0]), r"curve 'rise' of g/a: x has shape \(2,\) and y \(1,\)"),
        (Curve([[0.0, 1.0]], [[1.0, 2.0]]), r"x has shape \(1, 2\)"),
        (Curve([0.5], [0.5]), "2 or more"),
        (Curve([0.0, 0.0], [1.0, 2.0]), "x must increase"),
        (Curve([1.0, 0.0], [1.0, 2.0]), "x must increase"),
        (Curve([0.0, math.nan], [1.0, 2.0]), "x must increase and be finite"),
        (Curve([0.0, 1.0], [1.0, 2.0], {"top": (1.0,)}), r"point 'top' has shape \(1,\)"),
    ],
)
def test_bad_curves_are_refused_by_name(curve, words):
    with pytest.raises(ValueError, match=words):
        curve_json("g/a", "rise", curve)


def test_seeds_on_different_grids_are_refused():
    one, other = (curve_json("g/a", "rise", Curve([0.0, end], [1.0, 2.0])) for end in (1.0, 2.0))
    with pytest.raises(ValueError, match="curve 'rise' of g/a has another x, or none, with another seed"):
        mean_curves("g/a", [{"rise": one}, {"rise": other}])
    with pytest.raises(ValueError, match="or none, with another seed"):
        mean_curves("g/a", [{"rise": one}, {}])


def test_what_one_seed_lacks_has_no_mean():
    """NaN comes back from a file as null."""
    runs = [{"rise": {"x": GRID, "y": [1.0, None, 3.0]}}, {"rise": {"x": GRID, "y": [3.0, 2.0, 3.0]}}]
    found = mean_curves("g/a", runs)["rise"]
    np.testing.assert_allclose(found["mean"], [2.0, math.nan, 3.0])
    np.testing.assert_allclose(found["std"], [math.sqrt(2), math.nan, 0.0])


def drawn(names=("a", "b", "c")):
    """Results whose arms have a curve each; the sweep has that of its best member."""
    line = lambda end: {"x": GRID, "mean": [0.0, end / 2, end], "std": [0.0, 0.1, 0.1], "points": {"all": [1.0, 0.5]}}
    roles = {"a": "method", "b": "baseline", "c": "sweep"}
    arms = {
        name: arm([0.9 - 0.1 * i, 0.9], role=roles[name], curves={"risk": line(1.0 + i)})
        for i, name in enumerate(names)
    }
    texts = {"risk": CurveText("Risk", "coverage", "selective risk")._asdict()}
    return results(arms, curves={"g": texts})


def test_a_panel_has_the_colours_and_numbers_of_the_others_and_a_sweep_is_not_drawn_twice():
    (panel,) = [panel for panel in figure(drawn(), {}).axes if panel.get_title() == "Risk"]
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("coverage", "selective risk")
    lines = [line for line in panel.lines if len(line.get_xdata()) == 3]
    assert [line.get_color() for line in lines] == [COLOURS["method"], COLOURS["baseline"]]
    np.testing.assert_allclose(lines[1].get_ydata(), [0.0, 1.0, 2.0])
    words = {text.get_text(): text.get_position() for text in panel.texts}
    assert set(words) == {"1", "2", "all"}
    for number, end in (("1", 1.0), ("2", 2.0)):  # on its own curve
        np.testing.assert_allclose(words[number][1], end * words[number][0])
    rings = [line for line in panel.lines if line.get_marker() == "o"]
    assert [(ring.get_xdata()[0], ring.get_ydata()[0]) for ring in rings] == [(1.0, 0.5)]


def test_the_report_says_what_the_curves_are():
    text = render(drawn())
    assert "Curves in report.png (mean over seeds" in text
    assert "- Risk: selective risk against coverage." in text
    assert list(about_curves(results({"a": arm([0.5])}), "g")) == []


def test_a_curve_that_no_group_names_has_its_own_name_and_a_name_without_curve_no_panel():
    declared = {"risk": CurveText("Risk", "c", "r"), "cost": CurveText("Cost", "c", "r")}
    arms = {"a": {"curves": {"other": {}, "risk": {}}}, "b": {}}
    found = curve_texts(declared, arms)
    assert list(found) == ["risk", "other"]
    assert found["other"]["title"] == "other"


def test_more_panels_than_one_row_holds():
    found = drawn(("a", "b"))
    line = found["arms"]["g/a"]["curves"]["risk"]
    names = [f"c{i}" for i in range(5)]
    found["arms"]["g/a"]["curves"] = dict.fromkeys(names, line)
    found["curves"]["g"] = {name: CurveText(name, "x", "y")._asdict() for name in names}
    found["arms"]["g/b"].pop("curves")
    titles = [panel.get_title() for panel in figure(found, {}).axes]
    assert [title for title in titles if title] == names
