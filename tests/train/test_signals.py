"""SIGTERM: noted where there is something to save, obeyed at once everywhere else."""

import os
import signal
import time

import numpy as np
import pytest
from commands import Command
from toy import toy

from effjax.train.loop import fit
from effjax.train.options import TrainOptions
from effjax.train.signals import Preempted, StopSignal, check_stop

EVERY = TrainOptions(checkpoint_steps=8)


def strike():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("moment", ["last step", "finishing"])
def test_a_signal_after_the_last_step_is_not_swallowed(tmp_path, moment):
    def leave(state):
        strike()
        return state

    whole = fit(toy(40), 0, options=EVERY, directory=tmp_path / "whole")
    plain = toy(40)
    if moment == "last step":
        program = plain._replace(phases=(plain.phases[0]._replace(leave=leave),))
    else:
        program = plain._replace(train_metrics=lambda means: leave(means))
    with pytest.raises(Preempted, match="stopped after step 40 of 40; the same command continues"):
        fit(program, 0, options=EVERY, directory=tmp_path / "cut")
    resumed = fit(plain, 0, options=EVERY, directory=tmp_path / "cut")
    np.testing.assert_array_equal(resumed.state["params"]["w"], whole.state["params"]["w"])
    assert resumed.train == whole.train


def test_between_runs_a_request_is_kept_until_the_outer_block_ends(tmp_path):
    arms = []

    def train_all():
        for arm in range(4):
            check_stop()
            if arm == 1:
                strike()
                continue  # as after an arm that diverged
            fit(toy(8), 0, options=EVERY, directory=tmp_path / str(arm))
            arms.append(arm)

    with pytest.raises(Preempted), StopSignal():
        train_all()
    assert arms == [0]
    check_stop()  # forgotten with the block


def test_a_request_while_shapes_are_compiled_stops_between_two_of_them(tmp_path):
    from test_loop import uneven

    told = []

    def on_compile(done, total):
        told.append(done)
        if done == 0:
            strike()

    with pytest.raises(Preempted, match="after step 0 of"):
        fit(uneven(), 0, directory=tmp_path, on_compile=on_compile)
    assert told == [0]


ENDING = """
import hashlib, sys, time
from effjax.train.signals import AT_EXIT, StopSignal, end_on_sigterm
AT_EXIT.append(lambda: print("released", flush=True))
with end_on_sigterm("stopped"):
    if sys.argv[1] in ("C", "swallowing"):
        print("ready", flush=True)
    if sys.argv[1] == "C":
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in one call, as a compilation
    elif sys.argv[1] == "swallowing":
        while True:
            try:
                time.sleep(100)
            except BaseException:
                pass
    elif sys.argv[1] == "stuck":
        with StopSignal() as stop:
            stop.unsaved()
            print("ready", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    else:
        with StopSignal() as stop:
            stop.unsaved()
            print("ready", flush=True)
            while not stop.requested:
                time.sleep(0.01)
            stop.saving()
            time.sleep(1.0)
            print("saved", flush=True)
        sys.exit(75)
"""


@pytest.mark.parametrize(
    ("what", "most", "printed"),
    [("C", 3, "released\n"), ("swallowing", 3, "released\n"), ("stuck", 15, "released\n"), ("saving", 9, "saved\n")],
)
def test_a_command_ends_with_75_whatever_it_does(what, most, printed):
    command = Command(what, target=ENDING)
    command.wait_for(lambda: command.said()[0] == "ready\n")
    time.sleep(0.3)
    begun = time.monotonic()
    command.send_signal(signal.SIGTERM)
    out, _ = command.communicate(timeout=60)
    assert command.returncode == 75
    assert out == "ready\n" + printed
    assert time.monotonic() - begun < most
