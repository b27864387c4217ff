"""What every study must do: finish its smoke preset, survive kill -9, declare its compiles, build its paper preset."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import jax
import pytest
from study_cases import PAPER, PAPER_ARMS, TINY

import effjax
from effjax.study.resolve import presets, resolve
from effjax.study.results import COST_FIELDS, OPTIONAL_COST_FIELDS
from effjax.train.loop import Prepared

STEMS = sorted(effjax.METHODS)
EFFJAX = [sys.executable, "-m", "effjax.cli"]
OFFLINE = {**os.environ, "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory):
    """One folder of compiled programs for all the processes that a study is started in."""
    OFFLINE["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    OFFLINE["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def start(*words):
    return subprocess.Popen(
        [*EFFJAX, "compare", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=OFFLINE
    )


def finish(process, timeout=300):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def test_every_method_has_a_row():
    assert set(STEMS) == set(TINY) == set(PAPER) == set(PAPER_ARMS)


@pytest.mark.parametrize("stem", STEMS)
def test_presets_are_all_there(stem):
    assert {"smoke", "cpu", "gpu", "paper"} <= set(presets(stem))


@pytest.mark.study
@pytest.mark.parametrize("stem", STEMS)
def test_smoke_preset_finishes_and_writes_everything(stem, tmp_path):
    code, out, err = finish(start(f"{stem}:smoke", "--out", tmp_path / "out"))
    assert code == 0, err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    check_schema(results, stem)
    for claim in results["claims"]:
        assert claim["text"] in out
    report = (tmp_path / "out" / "report.md").read_text()
    assert all(claim["text"] in report for claim in results["claims"])
    assert (tmp_path / "out" / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not (tmp_path / "out" / ".work").exists()
    assert "left]" in err  # progress with the time left


def check_schema(results, stem):
    assert results["schema"] == 1
    assert results["study"] == results["method"] == stem
    study = resolve(f"{stem}:{results['preset']}")
    for name, arm in results["arms"].items():
        assert set(arm["cost"]) - set(OPTIONAL_COST_FIELDS) == set(COST_FIELDS)
        assert arm["status"] in ("ok", "diverged")
        for metric in arm["metrics"].values():
            assert set(metric) == {"mean", "std", "values"}
            assert len(metric["values"]) == len(results["seeds"])
            assert arm["status"] == "diverged" or all(math.isfinite(value) for value in metric["values"])
        if name in study.arms():
            assert arm["cost"]["compiles"] >= 1
    for claim in results["claims"]:
        assert set(claim) == {"text", "left", "op", "right", "holds"}
        if claim["left"] is not None and claim["right"] is not None:
            true = claim["left"] <= claim["right"] if claim["op"] == "<=" else claim["left"] >= claim["right"]
            assert claim["holds"] == true
    assert {"packages", "hardware", "commit", "date"} <= set(results["environment"])


@pytest.mark.study
@pytest.mark.parametrize("stem", STEMS)
def test_killed_at_random_moments_it_continues_to_the_same_results(stem, tmp_path):
    words = [f"{stem}:smoke", *TINY[stem], "--train.checkpoint-seconds", "0.01", "--train.log-steps", "10"]
    code, _, err = finish(start(*words, "--out", tmp_path / "whole"))
    assert code == 0, err
    rng = random.Random()
    kills, finished_before = 0, set()
    for _ in range(2 if stem == "samuel" else 1):  # a second kill shows that finished arms are not redone
        process = start(*words, "--out", tmp_path / "cut")
        while process.poll() is None and not list((tmp_path / "cut" / ".work").glob("arms/*/*/*")):
            time.sleep(0.02)
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
    words = ["samuel:smoke", *TINY["samuel"], "--out", tmp_path / "out"]
    process = start(*words, "--budget.amount", "200000")
    while process.poll() is None and not list((tmp_path / "out" / ".work").glob("arms/*/*/*/checkpoints")):
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 75, err
    assert "the same command continues" in err
    code, _, err = finish(start(*words, "--budget.amount", "300"))
    assert code == 2
    assert "budget.amount: 200000" in err
    assert "300" in err


@pytest.mark.study
@pytest.mark.parametrize("stem", STEMS)
def test_paper_preset_builds_and_takes_a_step(stem):
    arms = resolve(f"{stem}:paper", PAPER[stem]).arms()
    for name in PAPER_ARMS[stem]:
        program = arms[name].build()
        prepared = Prepared(program, resolve(f"{stem}:paper", PAPER[stem]).config.train)
        state = prepared.init(jax.random.key(0))
        aux = program.derive(state) if program.derive else None
        state, metrics = prepared.step(state, next(program.batches(0)), aux)
        assert math.isfinite(metrics["loss"])
        assert prepared.step.compiles <= program.compiles
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
            lambda x: (x.shape, x.dtype), prepared.abstract
        )
