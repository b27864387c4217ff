"""A study that is killed continues to the same results; one that is told to stop says how to go on."""

import json
import random
import signal
import time

import pytest
from study_runs import finish, start

pytestmark = pytest.mark.once

SMALL = ["--settings", "shift", "--grid", "0.1", "--arms", "samuel", "--seeds", "0", "1"]


@pytest.mark.study
def test_killed_at_random_moments_it_continues_to_the_same_results(tmp_path):
    """One study: the kill concerns the loop, the checkpoints and the folder, whatever is trained."""
    words = ["samuel:smoke", *SMALL, "--budget.amount", "80"]
    words += ["--train.checkpoint-seconds", "0.1", "--train.log-steps", "10"]
    code, _, err = finish(start(*words, "--out", tmp_path / "whole"))
    assert code == 0, err
    rng = random.Random()
    kills, finished_before = 0, set()
    for _ in range(2):  # a second kill shows that finished arms are not redone
        process = start(*words, "--out", tmp_path / "cut")
        process.wait_for(lambda: list((tmp_path / "cut" / ".work").glob("arms/*/*/*")))
        time.sleep(rng.uniform(0.0, 2.0))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        done = {p: p.stat().st_mtime_ns for p in (tmp_path / "cut" / ".work").rglob("done.json")}
        assert finished_before <= set(done.items())  # finished arms are not redone
        finished_before = set(done.items())
    code, _, err = finish(start(*words, "--out", tmp_path / "cut"))
    assert code == 0, err
    assert kills
    whole, cut = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "cut"))
    assert whole["claims"] == cut["claims"]
    for name, arm in whole["arms"].items():
        assert arm["metrics"] == cut["arms"][name]["metrics"], name


@pytest.mark.study
def test_sigterm_exits_with_the_resume_code_and_another_config_is_refused(tmp_path):
    words = ["samuel:smoke", *SMALL, "--out", tmp_path / "out"]
    process = start(*words, "--budget.amount", "200000")
    process.wait_for(lambda: list((tmp_path / "out" / ".work").glob("arms/*/*/*/checkpoints")))
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 75, err
    assert "the same command continues" in err
    code, _, err = finish(start(*words, "--budget.amount", "300"))
    assert code == 2
    assert "budget.amount: 200000" in err
    assert "300" in err
