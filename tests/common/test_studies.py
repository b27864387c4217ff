"""What every study must do: finish its smoke preset, declare its compiles, build its paper preset."""

import json
import math

import jax
import pytest
from study_cases import PAPER, PAPER_ARMS, TINY
from study_runs import compile_cache, finish, start  # noqa: F401

import effjax
from effjax.study.resolve import presets, resolve
from effjax.study.results import COST_FIELDS, OPTIONAL_COST_FIELDS
from effjax.train.loop import Prepared

STEMS = sorted(effjax.METHODS)


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
