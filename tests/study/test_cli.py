"""The command line in this process: verbs, messages, exit codes."""

import json
import os
import subprocess
import sys

import pytest

from effjax.cli import main

ARMS = ["--arms", "sgd-*", "cosine-*", "samuel", "uniform", "one-gradient"]
TINY = ["--budget.amount", "20", "--grid", "0.1", *ARMS, "--train.log-steps", "5"]

pytestmark = pytest.mark.study


def test_methods_lists_names(capsys):
    assert main(["methods", "sam*"]) == 0
    assert "effjax.samuel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "samule"], "Did you mean 'samuel'"),
        (["compare", "samuel:smoke", "--tasks", "digitz/mlp"], "digits"),
        (["compare", "samuel:smoke", "--experts", "0.1"], "is one expert"),
        (["compare", "samuel:smoke", "--experts", "0.1", "-0.1"], "experts=-0.1"),
        (["compare", "samuel:smoke", "--experts", "0.1", "0.1"], "repeat"),
        (["compare", "samuel:smoke", "--batch-size", "100000"], "100000"),
        (["compare", "samuel:smoke", "--train.mesh.data", "7"], "needs 7 devices and 1 are there"),
        (["methods", "nothing"], "matches none"),
        (["report", "nowhere"], "does not exist"),
        (["export", "nowhere", "--out", "x"], "does not exist"),
        (["train", "samuel:smoke"], "--arm is missing"),
        (["train", "samuel:smoke", "--arm", "digits-mlp-64-shift/sgd"], "Did you mean"),
    ],
)
def test_bad_input_is_one_readable_message(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(words)
    except SystemExit as stop:  # how the override parser ends
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["compare", "samuel:smoke", "--seeds", "3"]) == 2
    assert 'tyro is not installed. pip install "effjax[study]"' in capsys.readouterr().err


def test_methods_fit_the_terminal_and_a_closed_pipe_is_no_error():
    environment = {**os.environ, "COLUMNS": "60"}
    command = f"set -o pipefail; {sys.executable} -m effjax methods | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("samuel ")
    assert len(done.stdout.rstrip()) <= 60


def test_compare_twice_only_writes_the_report_again(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", "samuel:smoke", *TINY, "--out", str(out)]) == 0
    first = (out / "results.json").read_text()
    (out / "report.md").unlink()
    assert main(["compare", "samuel:smoke", *TINY, "--out", str(out)]) == 0
    assert "is finished" in capsys.readouterr().err
    assert (out / "results.json").read_text() == first
    assert (out / "report.md").exists()
    assert main(["report", str(out)]) == 0
    assert "# samuel: smoke" in capsys.readouterr().out
    assert main(["compare", "samuel:smoke", *TINY, "--seeds", "5", "--out", str(out)]) == 2
    assert "seeds" in capsys.readouterr().err


def test_cost_only_trains_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", "samuel:smoke", *TINY, "--cost-only", "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    for arm in results["arms"].values():
        assert arm["metrics"] == {}
        assert arm["cost"]["step_ms"] > 0
    assert (out / "report.png").exists()


def test_a_budget_in_device_seconds_gives_cheap_arms_more_steps(tmp_path):
    out = tmp_path / "out"
    words = [*TINY, "--budget.unit", "device_seconds", "--budget.amount", "0.05"]
    assert main(["compare", "samuel:smoke", *words, "--out", str(out)]) == 0
    curves = json.loads((out / "curves.json").read_text())
    last = {name.split("/")[1]: runs["0"]["step"][-1] for name, runs in curves.items()}
    assert last["sgd-0.1"] > last["samuel"]


def test_train_logs_resumes_and_exports(tmp_path, capsys):
    from safetensors.numpy import load_file

    words = ["train", "samuel:smoke", *TINY, "--arm", "digits-mlp-64-shift/samuel", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["accuracy"] > 0
    assert main(words) == 0  # finished: nothing is trained again
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "w.safetensors")]) == 0
    weights = load_file(tmp_path / "w.safetensors")
    assert weights["params/head/kernel"].shape == (64, 10)
    assert main([*words, "--seed", "3"]) == 2
    assert "holds another run" in capsys.readouterr().err
