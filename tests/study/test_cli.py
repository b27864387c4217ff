"""The command line in this process: verbs, messages, exit codes."""

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from effjax.catalogue import METHODS
from effjax.cli import main
from effjax.study.own_files import own_options
from effjax.study.resolve import resolve

ARMS = ["--arms", "sgd-*", "samuel"]
TINY = ["--settings", "shift", "--budget.amount", "20", "--grid", "0.1", *ARMS, "--train.log-steps", "5"]

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
        (["compare", "samuel:smoke", "--budget.amount", "40", "--phases", "41"], "phases=41 of a run of 40 steps"),
        (["compare", "samuel:smoke", "--budget.amount", "40", "--period-fraction", "1e-3"], "Give 0.025 or more"),
        (["compare", "samuel:smoke", "--experts", "0.1", "-0.1"], "experts[1]=-0.1"),
        (["compare", "samuel:smoke", "--experts", "0.1", "0.1"], "repeat"),
        (["compare", "samuel:smoke", "--batch-size", "100000"], "100000"),
        (["compare", "samuel:smoke", "--train.mesh.data", "9"], "needs 9 devices and 8 are there"),
        (["compare", "samuel:smoke", "--sedes", "3"], "Perhaps you meant: --seeds"),
        (["compare", "--seeds", "3"], "Missing"),
        (["compare"], "STUDY"),
        (["comparre", "samuel:smoke"], "compare"),
        (["report"], "needs one folder"),
        (["methods", "nothing"], "matches none"),
        (["report", "nowhere"], "does not exist"),
        (["export", "nowhere", "--out", "x"], "does not exist"),
        (["train", "samuel:smoke"], "--arm is missing"),
        (["train", "samuel:smoke", "--arm", "digits-mlp-64-shift/sgd"], "Did you mean"),
    ],
)
def test_bad_input_is_one_readable_message(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("effjax: ")  # the whole message; progress may stand before it
    assert message in error.splitlines()[-1]


@pytest.mark.parametrize("name", ["tyro", "msgspec", "matplotlib", "grain"])
def test_a_missing_extra_is_named_before_any_work(name, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["compare", "samuel:smoke", "--seeds", "3", "--out", str(tmp_path / "out")]) == 2
    assert f'{name} is not installed. pip install "effjax[study]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_of_a_study_lists_the_fields_of_its_config_and_help_alone_the_studies(capsys):
    for words, found in (
        (["--help"], ("compare", "train", "report", "methods", "export")),
        (["compare", "--help"], ("samuel", "smoke cpu overhead gpu paper", "--data PATH", "--cost-only")),
        (["compare", "samuel:smoke", "--help"], ("--period-fraction FLOAT", "--budget.unit", "--train.mesh.data INT")),
        (["train", "cola", "--config-help"], ("--rival-links INT", "--arm")),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        assert all(word in printed for word in found)


@pytest.mark.parametrize("stem", METHODS)
def test_no_field_of_a_study_has_the_name_of_another_option(stem):
    """All three stand beside each other on the command line, and tyro fails at a name that comes twice."""
    fields = {field.name for field in dataclasses.fields(type(resolve(stem).config))}
    others = {field.name for field in dataclasses.fields(own_options())} | {"out", "distributed", "cost_only", "seed"}
    assert not fields & others


def test_help_and_methods_start_without_jax():
    code = "import sys; from effjax.cli import main; main({}); assert not {{'jax', 'numpy'}} & set(sys.modules)"
    for words in (["methods", "sam*"], ["--version"]):
        subprocess.run([sys.executable, "-c", code.format(words)], check=True, capture_output=True)


def test_the_study_may_stand_behind_options(tmp_path, capsys):
    assert main(["compare", "--cost-only", "--out", str(tmp_path), "samuel:smoke", "--batch-size", "0"]) == 2
    assert "batch_size=0" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("error", "said", "status"),
    [
        (OSError("no descriptors left"), "no descriptors left.", 2),
        (PermissionError(13, "Permission denied", "/a/b"), "/a/b: Permission denied.", 2),
        (KeyboardInterrupt(), "stopped by Ctrl-C", 130),
    ],
)
def test_errors_of_the_system_are_one_line(monkeypatch, capsys, error, said, status):
    def fail(options):
        raise error

    monkeypatch.setattr("effjax.cli._parse", lambda words: SimpleNamespace(run=fail))
    assert main(["methods"]) == status
    written = capsys.readouterr().err
    assert said in written
    assert written.count("\n") == 1


RESULTS = {name: {} for name in ("study", "preset", "seeds", "budget", "groups", "arms", "claims", "environment")}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is no effjax result"),
        (json.dumps({"schema": 2, **RESULTS}).encode(), "is damaged"),
        (json.dumps({"schema": 2, **RESULTS, "arms": [1]}).encode(), "is damaged"),
    ],
)
def test_damaged_results_are_named(tmp_path, capsys, content, said):
    (tmp_path / "results.json").write_bytes(content)
    assert main(["report", str(tmp_path)]) == 2
    written = capsys.readouterr().err
    assert f"{tmp_path / 'results.json'} {said}" in written
    assert written.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"study": 1}', b"[" * 100_000])
def test_a_damaged_note_of_an_arm_is_named(tmp_path, capsys, content):
    (tmp_path / "arm.json").write_bytes(content)
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "a.safetensors")]) == 2
    written = capsys.readouterr().err
    assert f"{tmp_path / 'arm.json'} is" in written
    assert written.count("\n") == 1
