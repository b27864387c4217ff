"""``train.profile``: which steps are traced, that a run which stops ends its trace, and what is refused."""

import dataclasses

import jax
import pytest
from toy import toy

from effjax.train.loop import NonFiniteError, fit
from effjax.train.options import PASSING, TrainOptions
from effjax.train.trace import Trace


@pytest.fixture
def profiler(monkeypatch):
    """What the profiler is told, in order."""
    said = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: said.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: said.append("stop"))
    return said


def traced(profiler, began, total):
    """The steps, counted from 1, during which the trace is on."""
    trace, on = Trace("folder", began, total), []
    for done in range(began, total):
        trace.before(done)
        on += [done + 1] if profiler[-1:] == ["folder"] else []
        trace.after(done + 1, 0)
    return on


@pytest.mark.parametrize(
    ("began", "total", "steps"),
    [(0, 100, [11, 12, 13, 14, 15]), (40, 100, [51, 52, 53, 54, 55]), (0, 4, [2, 3, 4]), (0, 1, [1]), (7, 7, [])],
)
def test_the_steps_in_the_trace(profiler, tmp_path, monkeypatch, began, total, steps):
    monkeypatch.chdir(tmp_path)
    assert traced(profiler, began, total) == steps
    assert profiler == (["folder", "stop"] if steps else [])


def test_a_run_is_traced_and_one_that_breaks_ends_its_trace(profiler, tmp_path):
    folder = str(tmp_path / "trace")
    options = TrainOptions(profile=folder, read_lag=1)
    fit(toy(20), 0, options=options)
    assert profiler == [folder, "stop"]
    profiler.clear()
    with pytest.raises(NonFiniteError):
        fit(toy(20, poison=11), 0, options=options)
    assert profiler == [folder, "stop"]


def test_a_trace_changes_no_identity_and_needs_a_disk():
    assert "profile" in PASSING
    assert TrainOptions().profile is None
    with pytest.raises(ValueError, match=r"train.profile='gs://b/x' must be a folder on a disk .*copy it"):
        dataclasses.replace(TrainOptions(), profile="gs://b/x")


@pytest.mark.nightly
def test_the_profiler_writes_what_tools_read(tmp_path):
    fit(toy(20), 0, options=TrainOptions(profile=str(tmp_path)))
    (found,) = tmp_path.rglob("*.xplane.pb")
    assert found.stat().st_size > 1000
