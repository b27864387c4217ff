"""What every study must do: run to its end, resume exactly, declare its compiles, build its paper preset."""

import fnmatch
import json
import math
import os
import signal

import jax
import numpy as np
import pytest
from study_cases import PAPER, PAPER_ARMS, RESUMED, TINY
from study_runs import finish, start

import effjax
from effjax.study import metering
from effjax.study.compare import compare
from effjax.study.resolve import presets, resolve
from effjax.study.results import COST_FIELDS, OPTIONAL_COST_FIELDS
from effjax.train.loop import Preempted, Prepared, fit
from effjax.train.options import TrainOptions

STEMS = sorted(effjax.METHODS)


def test_every_method_has_a_row():
    assert set(STEMS) == set(TINY) == set(PAPER) == set(PAPER_ARMS) == set(RESUMED)


@pytest.mark.parametrize("stem", STEMS)
def test_presets_are_all_there(stem):
    assert {"smoke", "cpu", "gpu", "paper"} <= set(presets(stem))


@pytest.mark.once
@pytest.mark.parametrize("stem", STEMS)
def test_every_claim_is_about_arms_of_some_preset(stem):
    """A claim whose arms no preset holds would be left out in silence."""
    decided, stated = set(), set()
    for preset in presets(stem):
        study = resolve(f"{stem}:{preset}")
        names = {group.name: [*(arm.name for arm in group.arms), *group.sweeps] for group in study.groups()}
        everywhere = [f"{group}/{name}" for group in names for name in names[group]]
        for pattern, claims in study.claims.items():
            for group in fnmatch.filter(names, pattern):
                stated |= {(claim.arm, claim.than) for claim in claims}
                decided |= {(claim.arm, claim.than) for claim in claims if _about(claim, group, everywhere)}
    assert stated - decided == set()


def _about(claim, group, names):
    sides = [claim.arm, claim.than if isinstance(claim.than, str) else claim.arm, claim.until or claim.arm]
    patterns = [side.removeprefix("best ").removeprefix("sum ").split("|") for side in sides]
    full = lambda part: part if "/" in part else f"{group}/{part}"
    return all(any(fnmatch.filter(names, full(part)) for part in parts) for parts in patterns)


@pytest.mark.nightly
@pytest.mark.parametrize("stem", STEMS)
def test_a_step_of_every_arm_keeps_the_shapes_of_its_state(stem):
    words = list(TINY[stem])
    if "--arms" in words:
        first = words.index("--arms")
        last = next((place for place in range(first + 1, len(words)) if words[place].startswith("--")), len(words))
        words[first + 1 : last] = ["*"]
    group = resolve(f"{stem}:smoke", words).groups()[0]
    task = group.load()
    for arm in group.arms:
        check_shapes(arm.build(task), arm.name)
    assert len(group.arms) > 2


def check_shapes(program, name):
    """The state keeps its shapes and dtypes, by tracing alone."""
    kinds = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    phase, before = program.phases[0], jax.eval_shape(program.init, jax.random.key(0))
    aux = phase.aux(program.init(jax.random.key(0))) if phase.aux else None
    batch = next(program.loader.open(0)) if program.has_batches else None
    after, metrics = jax.eval_shape(phase.step, before, batch, aux)
    assert kinds(after) == kinds(before), name
    assert metrics["loss"].shape == (), name


# Books, report and picture do not depend on JAX's version; what a study trains is in the other matrices. By day some
# stems of every family, the others with `-m nightly`.
BY_DAY = {"samuel", "cola", "irnn", "selective", "si_cnn", "tarnn"}
WHOLE = [
    pytest.param(stem, marks=[pytest.mark.once] * (stem != "samuel") if stem in BY_DAY else [pytest.mark.nightly])
    for stem in STEMS
]


@pytest.mark.study
@pytest.mark.parametrize("stem", WHOLE)
def test_a_tiny_study_writes_everything(stem, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metering, "SECONDS", 0.0)  # the fewest rounds of timing
    study = resolve(f"{stem}:smoke", TINY[stem])
    results = compare(study, out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(dict(results)))
    check_schema(results, study)
    report = (tmp_path / "out" / "report.md").read_text()
    assert all(claim["text"] in report for claim in (*results["claims"], *results["cost_claims"]))
    assert (tmp_path / "out" / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not (tmp_path / "out" / ".work").exists()
    assert "left]" in capsys.readouterr().err  # progress with the time left


# Of whole smoke presets the README's is in the default suite; the others come with `-m nightly`.
SMOKE = [pytest.param(stem, marks=pytest.mark.study if stem == "samuel" else pytest.mark.nightly) for stem in STEMS]


@pytest.mark.once
@pytest.mark.parametrize("stem", SMOKE)
def test_a_smoke_preset_runs_from_the_command_line(stem, tmp_path):
    code, out, err = finish(start(f"{stem}:smoke", "--out", tmp_path / "out"), timeout=1200)
    assert code == 0, err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    check_schema(results, resolve(f"{stem}:smoke"))
    assert all(claim["text"] in out for claim in results["claims"])


def check_schema(results, study):
    assert results["schema"] == 2
    assert results["study"] == study.stem
    assert results["groups"] == study.metrics
    for name, arm in results["arms"].items():
        assert set(arm["cost"]) - set(OPTIONAL_COST_FIELDS) == set(COST_FIELDS)
        assert arm["status"] == "ok", name
        assert results["groups"][arm["group"]]["name"] in arm["metrics"]
        for metric in arm["metrics"].values():
            assert set(metric) == {"mean", "std", "values"}
            assert len(metric["values"]) == len(results["seeds"])
            assert all(math.isfinite(value) for value in metric["values"])
        if arm["role"] != "sweep":
            assert arm["cost"]["compiles"] >= 1
            total = sum(arm["cost"][part] for part in ("compile_s", "train_s", "evaluate_s"))
            assert arm["cost"]["total_s"] == pytest.approx(total)
    assert results["claims"] or results["cost_claims"]
    for claim in (*results["claims"], *results["cost_claims"]):
        true = claim["left"] <= claim["right"] if claim["op"] == "<=" else claim["left"] >= claim["right"]
        assert claim["holds"] == true
        assert "undecided" not in claim
    assert all(len(names) > 1 and set(names) < set(results["arms"]) for names in results["idle"])
    assert {"packages", "hardware", "commit", "date", "data"} <= set(results["environment"])


class StopAt:
    """Send this process SIGTERM once the loop has reached a step."""

    def __init__(self, step):
        self.step = step

    def __call__(self, reached):
        if self.step is not None and reached >= self.step:
            self.step = None
            os.kill(os.getpid(), signal.SIGTERM)


def bits(tree):
    raw = lambda leaf: jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return [np.asarray(raw(leaf)) for leaf in jax.tree.leaves(tree)]


@pytest.mark.study
@pytest.mark.parametrize("stem", [pytest.param(stem, marks=[pytest.mark.once] * (stem != "samuel")) for stem in STEMS])
def test_a_run_that_is_cut_continues_bit_for_bit(stem, tmp_path):
    study = resolve(f"{stem}:smoke", TINY[stem])
    program = study.build(RESUMED[stem])
    options = TrainOptions(checkpoint_steps=10**6, read_lag=1, log_steps=5)
    prepared = Prepared(program, options)
    whole = fit(program, 0, options=options, prepared=prepared)
    assert prepared.compiles <= program.compiles
    lengths = [phase.steps for phase in program.phases]
    inside = max(1, program.total_steps // 3)
    border = [lengths[0]] if len(lengths) > 1 else []
    for cut in dict.fromkeys([inside, *border]):
        folder = tmp_path / str(cut)
        with pytest.raises(Preempted):
            fit(program, 0, options=options, prepared=prepared, directory=folder, on_steps=StopAt(cut))
        again = fit(program, 0, options=options, prepared=prepared, directory=folder)
        for left, right in zip(bits(again.state), bits(whole.state), strict=True):
            np.testing.assert_array_equal(left, right)
        assert again.train == whole.train
        assert again.steps == whole.steps


@pytest.mark.nightly
@pytest.mark.study
@pytest.mark.parametrize("stem", STEMS)
def test_a_paper_preset_builds(stem):
    study = resolve(f"{stem}:paper", PAPER[stem])
    for name in PAPER_ARMS[stem]:
        check_shapes(study.build(name), name)


# Compiling networks of full size takes most of the time.
@pytest.mark.nightly
@pytest.mark.parametrize("stem", STEMS)
def test_a_paper_preset_takes_a_step(stem):
    study = resolve(f"{stem}:paper", PAPER[stem])
    for name in PAPER_ARMS[stem]:
        program = study.build(name)
        prepared = Prepared(program, study.config.train)
        state, phase = prepared.init(jax.random.key(0)), program.phases[0]
        aux = phase.aux(state) if phase.aux else None
        batch = next(program.loader.open(0)) if program.has_batches else None
        state, metrics = prepared.step(phase)(state, batch, aux)
        assert math.isfinite(metrics["loss"])
        assert prepared.compiles <= program.compiles
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
            lambda x: (x.shape, x.dtype), prepared.abstract
        )
