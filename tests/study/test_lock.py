"""One folder, one run: real processes that hold, die, and race."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from effjax.study.lock import FolderInUse, FolderLock

HOLD = """
import sys, time
from pathlib import Path
from effjax.study.lock import FolderInUse, FolderLock
folder, go, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
try:
    with FolderLock(folder, say=lambda note: print(note, flush=True)):
        print("held", flush=True)
        time.sleep(seconds)
except FolderInUse as error:
    print("refused", error, flush=True)
    sys.exit(2)
"""


def start(folder, go, seconds):
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(go), str(seconds)], stdout=subprocess.PIPE, text=True
    )


@pytest.fixture
def go(tmp_path):
    path = tmp_path / "go"
    path.touch()
    return path


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def write(folder, **changes):
    """A lock as this process would leave it, with changes."""
    with FolderLock(folder):
        content = (folder / ".lock").read_text()
    (folder / ".lock").write_text(json.dumps(json.loads(content) | changes))


def gone():
    """The number of a process that has ended."""
    done = subprocess.Popen(["true"])
    done.wait()
    return done.pid


def test_it_is_released_at_the_end_and_after_an_error(folder):
    for error in (None, KeyboardInterrupt):
        try:
            with FolderLock(folder):
                held = json.loads((folder / ".lock").read_text())
                assert (held["pid"], held["host"]) == (os.getpid(), socket.gethostname())
                if error:
                    raise error
        except KeyboardInterrupt:
            pass
        assert list(folder.iterdir()) == []


def test_a_second_process_is_told_who_holds_the_folder_and_stops_at_once(folder, go):
    with start(folder, go, 60) as holder:
        assert [holder.stdout.readline() for _ in range(2)] == ["ready\n", "held\n"]
        with start(folder, go, 0) as second:
            out, _ = second.communicate(timeout=30)
        assert second.returncode == 2
        since = json.loads((folder / ".lock").read_text())["since"]
        who = f"'{folder}' is in use by process {holder.pid} on {socket.gethostname()} since {since}."
        assert f"refused {who}" in out
        with pytest.raises(FolderInUse) as caught, FolderLock(folder):
            pass
        assert caught.value.holder["pid"] == holder.pid
        assert isinstance(caught.value, ValueError)
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    assert (folder / ".lock").exists()
    notes = []
    with FolderLock(folder, say=notes.append):
        assert json.loads((folder / ".lock").read_text())["pid"] == os.getpid()
    assert len(notes) == 1
    assert f"was held by process {holder.pid}, which is gone (it began {since})" in notes[0]
    assert not (folder / ".lock").exists()


def test_a_zombie_holds_nothing(folder, go):
    holder = start(folder, go, 60)
    assert [holder.stdout.readline() for _ in range(2)] == ["ready\n", "held\n"]
    os.kill(holder.pid, signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet buried
    with FolderLock(folder, say=lambda note: None):
        pass
    holder.communicate()


@pytest.mark.parametrize("stale", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_of_several_starters_exactly_one_wins(folder, tmp_path, stale):
    for turn in range(3):
        if stale:
            write(folder, pid=gone())
        go = tmp_path / f"go{turn}"
        racers = [start(folder, go, 60) for _ in range(4)]
        for racer in racers:
            assert racer.stdout.readline() == "ready\n"
        go.touch()
        deadline = time.monotonic() + 60
        while sum(racer.poll() is not None for racer in racers) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        winners = [racer for racer in racers if racer.poll() is None]
        assert len(winners) == 1
        assert [racer.returncode for racer in racers if racer not in winners] == [2, 2, 2]
        assert json.loads((folder / ".lock").read_text())["pid"] == winners[0].pid
        winners[0].kill()
        outputs = [racer.communicate()[0] for racer in racers]
        assert sum("takes over" in out for out in outputs) == int(stale or turn > 0)


def test_a_process_that_got_the_number_of_the_holder_is_not_the_holder(folder):
    write(folder, started="1")  # this process's number, another beginning
    notes = []
    with FolderLock(folder, say=notes.append):
        pass
    assert len(notes) == 1


def test_another_host_is_refused_with_how_to_remove_the_lock(folder):
    write(folder, host="node7", pid=gone())
    with pytest.raises(FolderInUse, match=r"on node7 since .*cannot be seen from here.*delete .*\.lock"):
        FolderLock(folder).__enter__()
    assert json.loads((folder / ".lock").read_text())["host"] == "node7"


@pytest.mark.parametrize("content", ["", '{"pid": 1', "[]", '{"pid": "x", "host": 1, "since": 1, "started": 1}'])
def test_the_rest_of_a_crash_while_writing_is_taken_over(folder, content):
    write(folder)
    (folder / ".lock").write_text(content)
    os.utime(folder / ".lock", (time.time() - 60,) * 2)
    notes = []
    with FolderLock(folder, say=notes.append):
        assert json.loads((folder / ".lock").read_text())["pid"] == os.getpid()
    assert "was held by nobody" in notes[0]


def test_the_other_processes_of_a_distributed_run_take_no_lock(folder):
    with FolderLock(folder), FolderLock(folder, first=False):
        assert (folder / ".lock").exists()
    with FolderLock(folder, first=False):
        assert not (folder / ".lock").exists()


def test_a_lock_that_somebody_removed_and_took_is_left_to_them(folder):
    with FolderLock(folder):
        (folder / ".lock").write_text(json.dumps({"pid": 1, "host": "node7", "since": "", "started": ""}))
    assert json.loads((folder / ".lock").read_text())["host"] == "node7"
