"""The time left: it counts down, stands still while compiling, and is never nonsense."""

import io
import re

import pytest

from effjax.study.progress import Progress, clock_face


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


def run(progress, clock, label, work, *, compiling, per_unit, parts=10):
    """One run of an arm as the loop reports it, with the time left after each report."""
    start = progress._done
    progress.say(f"{label}: compiling")
    clock.now += compiling
    progress.say(label)
    left = []
    for part in range(parts + 1):
        progress.reach(start + work * part / parts)
        left.append(progress.left())
        clock.now += per_unit * work / parts
    return left


def test_the_time_left_is_that_of_the_work_and_not_of_the_compiling(clock):
    progress = Progress(quiet=True, clock=clock)
    progress.plan(3000.0)
    assert progress.left() is None
    left = run(progress, clock, "a", 1000.0, compiling=600.0, per_unit=0.01)
    assert left[0] is None  # nothing is known yet
    assert left[1:] == pytest.approx([30.0 - part for part in range(1, 11)])


def test_while_compiling_or_measuring_it_stands_still(clock):
    progress = Progress(quiet=True, clock=clock)
    progress.plan(3000.0)
    run(progress, clock, "a", 1000.0, compiling=5.0, per_unit=0.01)
    progress.say("measuring the cost of b")
    before = progress.left()
    for _ in range(5):
        clock.now += 60.0
        assert progress.left() == before == pytest.approx(20.0)
    left = run(progress, clock, "b", 1000.0, compiling=60.0, per_unit=0.01)
    assert left[-1] == pytest.approx(10.0)


def test_between_reports_it_counts_down_and_stops_at_zero(clock):
    progress = Progress(quiet=True, clock=clock)
    progress.plan(100.0)
    progress.reach(0.0)
    clock.now += 10.0
    progress.reach(50.0)
    assert progress.left() == pytest.approx(10.0)
    clock.now += 4.0
    assert progress.left() == pytest.approx(6.0)
    clock.now += 60.0  # the device is late
    assert progress.left() == 0.0


def test_an_expected_time_serves_until_the_pace_is_known(clock):
    progress = Progress(quiet=True, clock=clock)
    progress.plan(90_000.0, expected_s=1e-3)  # milliseconds
    progress.say("compiling")
    clock.now += 300.0
    assert progress.left() == 90.0
    progress.reach(0.0)
    clock.now += 20.0
    progress.reach(10_000.0)  # twice as slow as expected
    assert progress.left() == pytest.approx(160.0)


def test_what_earlier_runs_did_is_in_no_pace(clock):
    progress = Progress(quiet=True, clock=clock)
    progress.plan(1000.0, done=900.0)
    progress.say("resuming")
    progress.reach(950.0)  # from a checkpoint, at no cost
    clock.now += 5.0
    progress.reach(960.0)
    assert progress.left() == pytest.approx(20.0)


def test_lines_elsewhere_name_the_share_and_the_time_left(clock):
    stream = io.StringIO()
    with Progress(stream=stream, clock=clock, every=10.0) as progress:
        progress.say("preparing g")
        progress.plan(1000.0)
        run(progress, clock, "g/a, seed 0", 500.0, compiling=30.0, per_unit=0.1)
        progress.compiling("g/b")(1, 3)
        progress.compiling("g/b")(3, 3)
    assert stream.getvalue().splitlines() == [
        "preparing g",
        "[  0%] g/a, seed 0: compiling",
        "[  0%] g/a, seed 0",
        "[ 15%, 0:01:25 left] g/a, seed 0",
        "[ 30%, 0:01:10 left] g/a, seed 0",
        "[ 45%, 0:00:55 left] g/a, seed 0",
        "[ 50%, 0:00:50 left] g/b: compiling batch shape 2 of 3",
        "[ 50%, 0:00:50 left] g/b",
    ]


def test_quiet_shows_nothing(clock):
    stream = Terminal()
    with Progress(stream=stream, clock=clock, quiet=True) as progress:
        progress.plan(10.0)
        progress.say("a")
        progress.reach(5.0)
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_with_the_same_time_left(clock):
    stream = Terminal()
    with Progress(stream=stream, clock=clock) as progress:
        progress.plan(1000.0)
        run(progress, clock, "g/a", 250.0, compiling=500.0, per_unit=0.1)
        progress.say("compiling g/b")
        clock.now += 1000.0
        progress._bar.refresh()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    last = re.split(r"[\r\n]+", shown.strip())[-1]
    assert "compiling g/b" in last
    assert "25%" in last
    assert last.rstrip().endswith("left 0:01:15")


@pytest.mark.parametrize(
    ("seconds", "face"), [(0.0, "0:00:00"), (0.1, "0:00:01"), (59.5, "0:01:00"), (3661, "1:01:01"), (None, "-:--:--")]
)
def test_clock_face(seconds, face):
    assert clock_face(seconds) == face
