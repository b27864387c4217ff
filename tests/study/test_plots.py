"""The picture: which arms its frame holds, its ticks, and what is drawn for which results."""

import math

import pytest
from made import arm, results

from effjax.study.axes import plain, plain_ticks
from effjax.study.plots import draw, figure, ranges

CURVES = {"g/a": {str(seed): {"step": [0, 50, 100], "loss": [2.0, 0.5, 0.1]} for seed in (0, 1)}}


def panels(found, curves=None):
    """Its axes by the label of their x axis; those without one are the lists of names."""
    axes = figure(found, curves or {}).axes
    return {panel.get_xlabel() or f"names {index}": panel for index, panel in enumerate(axes)}


def words(panel):
    return [text.get_text() for text in panel.texts]


def arms():
    return {
        "a": arm([0.90, 0.92], train=1.0, compiling=40.0, peak=1e6, role="method", label="Method A"),
        "b": arm([0.88, 0.91], train=30.0, compiling=2.0, peak=2e6),
        "c": arm([0.89, 0.88], train=20.0, compiling=2.0, peak=3e6),
        "far": arm([0.10, 0.12], train=1.0, compiling=2.0, peak=2e6),
        "lost": arm([0.90, math.nan]),
    }


def test_total_seconds_training_seconds_and_memory_share_the_axis_of_quality():
    found = panels(results(arms()), CURVES)
    total, train, memory = (
        found[name] for name in ("total seconds: compile + train + evaluate", "training seconds", "peak MB of a step")
    )
    assert total.get_ylim() == train.get_ylim() == memory.get_ylim()
    assert total.get_ylabel() == "test accuracy\n(higher is better)"
    assert found["step"].get_ylabel() == "training loss (mean over seeds)"
    places = lambda panel: {text.get_text(): text.xy[0] for text in panel.texts}
    assert places(train) == {"1": 1.0, "2": 30.0, "3": 20.0}
    assert places(total) == {"1": 41.5, "2": 32.5, "3": 22.5}
    assert places(memory) == {"1": 1.0, "2": 2.0, "3": 3.0}


def test_an_arm_far_behind_is_outside_the_frame_and_named():
    shown = figure(results(arms()), {})
    low, high = shown.axes[0].get_ylim()
    assert 0.85 < low < 0.88
    assert 0.92 < high < 0.95
    titles = [part._suptitle.get_text() for row in shown.subfigs for part in row.subfigs if part._suptitle]
    assert titles == ["g   (worse than the frame: 4)"]
    names = [text for panel in shown.axes for text in words(panel) if ":" in text]
    assert names[0] == "1  Method A:  0.91 ± 0.0141"
    assert names[3:] == ["4  g/far:  0.11 ± 0.0141", "5  g/lost:  diverged"]


def test_every_seed_and_the_spread_are_inside_the_frame():
    wide = {"a": arm([0.2, 0.9], train=1.0), "b": arm([0.5, 0.6], train=2.0)}
    shown = figure(results(wide), {}).axes[0]
    low, high = shown.get_ylim()
    assert low < 0.55 - 0.495
    assert high > 0.55 + 0.495
    dots = [line for line in shown.lines if line.get_marker() == "."]
    assert [sorted(line.get_ydata()) for line in dots] == [[0.2, 0.9], [0.5, 0.6]]


def test_the_arm_to_take_has_a_ring_in_every_panel():
    shown = figure(results(arms()), {})
    rings = [line for panel in shown.axes for line in panel.lines if line.get_markersize() == 15]
    # `b` and `c` are behind `a` by more than an error: `a` is the one.
    assert [float(ring.get_xdata()[0]) for ring in rings] == [41.5, 1.0, 1.0]


def test_losses_over_many_powers_of_ten_are_drawn_on_a_logarithmic_axis():
    losses = {name: arm([loss], train=1.0) for name, loss in (("a", 1e-4), ("b", 2e-3), ("c", 0.1), ("d", 0.2))}
    shown = figure(results(losses, seeds=[0], goal="min"), {}).axes[0]
    assert shown.get_yscale() == "log"
    assert len(words(shown)) == 4
    near = {name: arm([loss], train=1.0) for name, loss in (("a", 0.10), ("b", 0.11), ("c", 0.12), ("d", 1e19))}
    shown = figure(results(near, seeds=[0], goal="min"), {}).axes[0]
    assert shown.get_yscale() == "linear"
    assert shown.get_ylim()[1] < 0.2


def test_points_that_cover_each_other_share_one_label():
    same = {name: arm([0.8, 0.9], train=1.0) for name in "abcde"}
    assert words(figure(results(same), {}).axes[0]) == ["1-5"]


def test_costs_alone_are_bars_of_step_time_and_memory(tmp_path):
    costs = {name: arm([0.5], peak=peak) | {"metrics": {}} for name, peak in (("a", 1e6), ("b", 5e6))}
    found = panels(results(costs))
    assert set(found) == {"step, ms", "peak MB of a step"}
    assert words(found["peak MB of a step"]) == ["1", "5"]
    draw(results(costs), {}, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [tmp_path / "p.png"]


def test_unknown_costs_leave_their_panel_out():
    for found in (some := arms()).values():
        found["cost"] |= {"total_s": None, "peak_bytes": None}
    assert [name for name in panels(results(some)) if not name.startswith("names")] == ["training seconds"]
    for found in some.values():
        found["cost"]["train_s"] = None
    assert [name for name in panels(results(some)) if not name.startswith("names")] == ["rank"]


def test_a_group_where_all_diverged_is_drawn():
    assert figure(results({"a": arm([math.nan]), "b": arm([0.5, math.nan])}), {})._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize(("low", "high"), [(0.4, 12), (1e-7, 30), (3.1, 3.9), (0.011, 0.013), (5, 80_000)])
def test_ticks_lie_on_the_axis_and_are_plain(low, high):
    ticks = plain_ticks(low, high)
    assert all(low <= tick <= high for tick in ticks)
    assert 1 <= len(ticks) <= 14
    assert not any("e" in plain(tick) or "^" in plain(tick) for tick in ticks)
    assert [float(plain(tick).replace(",", "")) for tick in ticks] == ticks


def test_no_tick_of_a_picture_has_an_exponent():
    shown = figure(results(arms()), CURVES)
    shown.draw_without_rendering()
    labels = [
        tick.get_text() for panel in shown.axes for axis in (panel.xaxis, panel.yaxis) for tick in axis.get_ticklabels()
    ]
    assert any(labels)
    assert not any("^" in label or "e" in label or "times" in label for label in labels)


def test_ranges():
    assert ranges([3, 1, 2, 7, 9, 10]) == "1-3, 7, 9, 10"
