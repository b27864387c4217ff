"""The generic loop: exact resume, signals, non-finite losses, compile counts, the hooks."""

import dataclasses
import os
import signal
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import BATCH, toy, uneven, uneven_shapes

from effjax.core.cost import count_compiles
from effjax.data.pipeline import batches
from effjax.train.checkpoint import CheckpointError
from effjax.train.logging import read_jsonl
from effjax.train.loop import NonFiniteError, Preempted, Prepared, fit
from effjax.train.options import MeshOptions, TrainOptions
from effjax.train.program import Loader, Phase

EVERY = TrainOptions(checkpoint_steps=7, log_steps=5, read_lag=4)


def assert_same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


class _StopAt:
    """Send this process SIGTERM once the loop has reported ``step``."""

    def __init__(self, step):
        self.step = step

    def __call__(self, done):
        if done >= self.step:
            self.step = 10**9
            os.kill(os.getpid(), signal.SIGTERM)


def test_training_reduces_the_loss_and_reports_means():
    result = fit(toy(200), 0)
    assert result.train["loss"] < 25
    assert result.train_s > 0
    assert np.linalg.norm(result.state["params"]["w"] - np.arange(5)) < 1.0


def test_a_seed_is_reproducible_and_seeds_differ():
    assert_same(fit(toy(), 3).state, fit(toy(), 3).state)
    assert not np.array_equal(fit(toy(), 3).state["params"]["w"], fit(toy(), 4).state["params"]["w"])


@pytest.mark.parametrize("stop", [4, 16, 33])
def test_sigterm_saves_and_the_next_run_continues_bitwise(tmp_path, stop):
    whole = fit(toy(), 0, options=EVERY, directory=tmp_path / "whole")
    with pytest.raises(Preempted, match="of 40"):
        fit(toy(), 0, options=EVERY, directory=tmp_path / "cut", on_steps=_StopAt(stop))
    resumed = fit(toy(), 0, options=EVERY, directory=tmp_path / "cut")
    assert_same(resumed.state, whole.state)
    assert resumed.train == whole.train
    assert list(read_jsonl(tmp_path / "cut" / "log.jsonl")) == list(read_jsonl(tmp_path / "whole" / "log.jsonl"))


def test_sigterm_without_a_directory_still_stops():
    with pytest.raises(Preempted, match="nothing was saved"):
        fit(toy(), 0, on_steps=_StopAt(4), options=EVERY)


def test_signal_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    fit(toy(3), 0)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_finished_run_is_not_redone(tmp_path):
    first = fit(toy(), 0, options=EVERY, directory=tmp_path)
    calls = []
    again = fit(toy(), 0, options=EVERY, directory=tmp_path, on_steps=calls.append)
    assert not calls
    assert_same(first.state, again.state)
    assert again.train == first.train
    assert again.train_s == first.train_s


def test_the_step_compiles_once_for_all_seeds_and_never_after_warm_up():
    program = toy(20)
    prepared = Prepared(program, TrainOptions())
    fit(program, 0, prepared=prepared)
    with count_compiles() as log:
        fit(program._replace(phases=(program.phases[0]._replace(steps=60),)), 1, prepared=prepared)
    assert prepared.compiles == program.compiles == 1
    assert "step" not in log.names


def test_all_batch_shapes_are_compiled_before_the_first_step_also_on_resume(tmp_path):
    program = uneven()
    whole, told = fit(program, 0, directory=tmp_path / "whole"), []
    with pytest.raises(Preempted):
        fit(program, 0, options=EVERY, directory=tmp_path / "cut", on_steps=_StopAt(5))
    prepared = Prepared(program, EVERY)
    resumed = fit(
        program,
        0,
        options=EVERY,
        prepared=prepared,
        directory=tmp_path / "cut",
        compile_first=True,
        on_compile=lambda done, total: told.append((done, total, prepared.compiles)),
        on_steps=lambda done: told.append(done),
    )
    assert told[:3] == [(0, 2, 0), (1, 2, 1), (2, 2, 2)]
    assert prepared.compiles == program.compiles == 2
    assert_same(resumed.state, whole.state)
    with count_compiles() as log:  # another seed, the same executables, told of no compilation
        fit(program, 1, options=EVERY, prepared=prepared, on_compile=lambda done, total: told.append("again"))
    assert "step" not in log.names
    assert "again" not in told


def test_batch_shapes_compile_beside_the_run_with_the_same_bits(monkeypatch):
    program, options, told, seen = uneven(), dataclasses.replace(EVERY, read_lag=1), [], []
    whole = fit(program, 0, compile_first=True)
    prepared = Prepared(program, options)
    held, plain = threading.Event(), jax.stages.Lowered.compile

    def compile_(lowered):
        if lowered.in_avals[0][1]["x"].shape[0] < BATCH:
            assert held.wait(20)
        return plain(lowered)

    def on_steps(done):
        seen.append(done)
        if done == 2:  # the third batch is the first of the other shape
            held.set()

    monkeypatch.setattr("effjax.core.beside.workers", lambda: 2)
    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_)
    on_compile = lambda done, total: told.append((done, total))
    found = fit(program, 0, options=options, prepared=prepared, on_compile=on_compile, on_steps=on_steps)
    assert told == [(0, 2), (2, 2)]
    assert (prepared.compiles, len(seen)) == (2, 40)
    assert_same(found.state, whole.state)


def test_a_run_that_fails_leaves_no_thread_that_compiles(monkeypatch):
    program = uneven()
    prepared = Prepared(program, EVERY)
    monkeypatch.setattr("effjax.core.beside.workers", lambda: 1)

    def stop(done):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fit(program, 0, options=EVERY, prepared=prepared, on_steps=stop)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("effjax-compile")]
    assert_same(fit(program, 0, options=EVERY, prepared=prepared).state, fit(program, 0, compile_first=True).state)


def test_a_batch_shape_that_was_not_declared_is_an_error():
    with pytest.raises(ValueError, match=r"step 3 compiled .*'x': \(4, 5\).*loader's shapes must declare it"):
        fit(uneven(shapes=uneven_shapes()[:1]), 0)


def test_training_seconds_hold_no_compilation(monkeypatch):
    now, left = [0.0], []
    monkeypatch.setattr(
        "effjax.train.loop.time", SimpleNamespace(perf_counter=lambda: now[0], monotonic=time.monotonic)
    )

    def leave(state):
        """It takes 1100 seconds; 1000 of them, JAX says, were a compilation."""
        jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 1000.0)
        now[0] += 1100.0
        left.append(state)
        return state

    result = fit(toy(parts=(1, 1, 1), leave=leave), 0)
    # Less the real seconds of real compilations.
    assert 100 * len(left) - 50 < result.train_s <= 100 * len(left)


def test_donation_gives_the_same_numbers():
    assert_same(
        fit(toy(), 0, options=TrainOptions(donate=True)).state, fit(toy(), 0, options=TrainOptions(donate=False)).state
    )


def test_non_finite_loss_names_the_window_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 18 \(last finite at step 17\).*checkpoint: 14") as caught:
        fit(toy(poison=17), 0, options=EVERY, directory=tmp_path)
    assert caught.value.train_s > 0
    # The good checkpoint restores, and the same error comes back instead of a poisoned run.
    with pytest.raises(NonFiniteError, match="step 18"):
        fit(toy(poison=17), 0, options=EVERY, directory=tmp_path)


def test_non_finite_loss_can_be_skipped_and_is_counted():
    result = fit(toy(poison=17), 0, options=TrainOptions(nonfinite="skip"))
    assert result.skipped == 1
    assert np.isfinite(result.state["params"]["w"]).all()
    assert np.isfinite(result.train["loss"])


def _poisoned_parameters(poison: int | None):
    """A program whose loss is always finite; where a batch is poisoned the parameters after it are not."""
    program = toy(poison=poison)
    step = program.phases[0].step

    def hidden(state, batch, aux):
        bad = jnp.isnan(batch["x"]).any()
        new, metrics = step(state, {**batch, "x": jnp.nan_to_num(batch["x"])}, aux)
        return {**new, "params": {"w": jnp.where(bad, jnp.nan, new["params"]["w"])}}, metrics

    return program._replace(phases=(program.phases[0]._replace(step=hidden),))


def test_an_update_that_breaks_the_parameters_is_skipped_though_its_loss_is_finite(tmp_path):
    result = fit(_poisoned_parameters(17), 0, options=TrainOptions(nonfinite="skip"), directory=tmp_path)
    assert result.skipped == 1
    assert np.isfinite(result.state["params"]["w"]).all()
    lines = read_jsonl(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines if "skipped" in line] == [18]


def test_parameters_that_are_not_finite_are_never_returned_as_a_success():
    with pytest.raises(NonFiniteError, match="the parameters at step 40 are not finite"):
        fit(_poisoned_parameters(39), 0)


def test_batches_that_end_early_are_named():
    rows = {"x": np.ones((16, 5), np.float32), "y": np.ones(16, np.float32)}
    program = toy(10, opened=lambda seed: batches(rows, BATCH, seed=seed, epochs=2))
    with pytest.raises(ValueError, match="ended after 4 of 10 steps"):
        fit(program, 0)


def test_phases_leave_and_begin_on_the_host():
    left, begun = [], []

    def leave(state):
        left.append(float(jnp.sum(state["params"]["w"])))
        return state | {"params": {"w": jnp.zeros_like(state["params"]["w"])}}

    def aux(state):
        begun.append(float(jnp.sum(state["params"]["w"])))
        return jnp.zeros(())

    result = fit(toy(parts=(10, 0, 10), leave=leave, aux=aux), 0)
    assert len(left) == 3  # a phase without steps is left too
    assert left[1] == 0
    assert begun[1:] == [0.0]
    assert result.steps == 20
    np.testing.assert_array_equal(result.state["params"]["w"], 0)


def test_a_phase_that_is_over_executes_no_further_step():
    program = toy(parts=(50, 50), over=lambda state: jnp.sum(state["params"]["w"]) > 0)
    reached = []
    result = fit(program, 0, options=TrainOptions(read_lag=1), on_steps=reached.append)
    by_hand = toy(1000)
    state, data, lengths, count = by_hand.init(jax.random.key(0)), by_hand.loader.open(0), [], 0
    while len(lengths) < 2:
        state, _ = jax.jit(by_hand.phases[0].step)(state, next(data), None)
        count += 1
        if np.sum(state["params"]["w"]) > 0:
            lengths.append(count)
            count = 0
    assert result.steps == sum(lengths) < 20
    assert lengths[1] == 1
    np.testing.assert_allclose(result.state["params"]["w"], state["params"]["w"], rtol=1e-5)
    assert reached[-1] == 100  # the progress counts what was saved


@pytest.mark.parametrize("stop", [4, 12, 13, 14, 20])
def test_a_run_of_phases_continues_bitwise_in_a_phase_and_at_its_border(tmp_path, stop):
    def program():
        halve = jax.jit(lambda state: state | {"params": {"w": state["params"]["w"] / 2}})
        return toy(parts=(13, 9, 18), leave=halve, aux=lambda state: jnp.sum(state["params"]["w"]))

    options = dataclasses.replace(EVERY, read_lag=1)
    whole = fit(program(), 0, options=options, directory=tmp_path / "whole")
    with pytest.raises(Preempted, match=f"stopped after step {stop} of 40"):
        fit(program(), 0, options=options, directory=tmp_path / "cut", on_steps=_StopAt(stop))
    resumed = fit(program(), 0, options=options, directory=tmp_path / "cut")
    assert_same(resumed.state, whole.state)
    assert resumed.train == whole.train


def test_a_checkpoint_of_other_phases_is_refused(tmp_path):
    with pytest.raises(Preempted):
        fit(toy(parts=(10, 30)), 0, options=EVERY, directory=tmp_path, on_steps=_StopAt(20))
    with pytest.raises(CheckpointError, match=r"phases of \[10, 30\] steps, in phase 1; this run has .*\[40\]"):
        fit(toy(40), 0, options=EVERY, directory=tmp_path)


def test_a_program_whose_steps_are_left_to_the_budget():
    program = toy(parts=(None, 6, None))
    with pytest.raises(ValueError, match="phase 0 of 'toy' has no number of steps"):
        fit(program, 0)
    assert [phase.steps for phase in program.within(11).phases] == [6, 6, 5]
    assert fit(program.within(11), 0).steps == 17


def test_steps_without_batches():
    def step(state, batch, aux):
        assert batch is None
        return state + aux, {"loss": jnp.float32(0)}

    plain = toy()
    program = plain._replace(
        init=lambda key: jnp.float32(1),
        phases=(Phase(step, 5, aux=lambda state: 2 * state),),
        params=lambda state: {"w": state[None]},
        loader=Loader(None, 3),
    )
    assert float(fit(program, 0).state) == 11
    assert float(fit(program._replace(loader=None), 0).state) == 11


def test_a_best_metric_that_nobody_measures_is_refused_before_the_first_step(tmp_path):
    options = TrainOptions(evaluate_steps=8, best_metric="-scores")
    told = []
    with pytest.raises(ValueError, match=r"best_metric='-scores' is not measured; .* score\. Did you mean 'score'"):
        fit(toy(evaluate=lambda state: {"score": 1.0}), 0, options=options, directory=tmp_path, on_steps=told.append)
    assert not told


def test_evaluation_during_training_keeps_the_best_checkpoint(tmp_path):
    values = iter([0.0, 3.0, 1.0, 2.0, 5.0, 4.0, 4.0])
    options = TrainOptions(evaluate_steps=8, best_metric="-score", keep=1, checkpoint_seconds=1e9)
    fit(toy(40, evaluate=lambda state: {"score": next(values)}), 0, options=options, directory=tmp_path)
    evaluations = [r["evaluation"]["score"] for r in read_jsonl(tmp_path / "log.jsonl") if "evaluation" in r]
    assert evaluations == [3.0, 1.0, 2.0, 5.0, 4.0]
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [16, 40]


def test_the_curve_of_evaluations_continues_with_the_run(tmp_path):
    options = dataclasses.replace(EVERY, evaluate_steps=8)
    whole = fit(toy(), 0, options=options).curve
    with pytest.raises(Preempted):
        fit(toy(), 0, options=options, directory=tmp_path / "cut", on_steps=_StopAt(20))
    cut = fit(toy(), 0, options=options, directory=tmp_path / "cut")
    assert [(point["step"], point["w0"]) for point in cut.curve] == [(point["step"], point["w0"]) for point in whole]
    assert [point["step"] for point in whole] == [8, 16, 24, 32, 40]
    seconds = [point["train_s"] for point in cut.curve]
    assert seconds[0] > 0
    assert seconds == sorted(seconds)
    assert seconds[-1] <= cut.train_s
    assert fit(toy(), 0).curve == []


def test_a_run_of_another_identity_is_refused(tmp_path):
    fit(toy(10), 0, directory=tmp_path, identity={"lr": 0.1})
    with pytest.raises(CheckpointError, match=r"lr: 0\.1 there, 0\.2 here"):
        fit(toy(10), 0, directory=tmp_path, identity={"lr": 0.2})


def test_batch_not_divisible_by_devices_names_both_numbers():
    with pytest.raises(ValueError, match=f"batch_size={BATCH} is not divisible by the 3 devices"):
        fit(toy(), 0, options=TrainOptions(mesh=MeshOptions(data=3)))


def test_eight_devices_train_as_one():
    w = fit(toy(), 0, options=TrainOptions(mesh=MeshOptions(data=-1))).state["params"]["w"]
    assert len(w.sharding.device_set) == 8
    np.testing.assert_allclose(w, fit(toy(), 0).state["params"]["w"], rtol=2e-5)


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"needs 16 devices and 8 are there"):
        fit(toy(), 0, options=TrainOptions(mesh=MeshOptions(data=16)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"accumulate": 0}, "train.accumulate=0"),
        ({"dtype": "float16"}, "train.dtype='float16'"),
        ({"best_metric": "accuracy"}, "train.evaluate_steps"),
        ({"nonfinite": "ignore"}, "train.nonfinite='ignore'"),
    ],
)
def test_bad_options(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**fields)
