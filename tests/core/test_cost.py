"""Executables, compile counts, memory and timing."""

import json
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from effjax.core.beside import CompileError
from effjax.core.cost import Executables, count_compiles, count_params, hardware
from effjax.core.timing import Timing, paired_ratio, time_interleaved


def make_step():
    """A new function each time, as JAX shares compiled programs between jits of one function."""

    def step(state, batch):
        loss = jnp.mean((batch["x"] @ state["w"]) ** 2)
        return {"w": state["w"] - 0.1 * loss, "key": jax.random.split(state["key"])[0]}, {"loss": loss}

    return step


def make_state():
    return {"w": jnp.ones((4, 3)), "key": jax.random.key(0)}


def make_batch(rows, dtype=np.float32):
    return {"x": np.ones((rows, 4), dtype)}


def test_count_params():
    tree = {"a": jnp.ones((3, 4)), "b": [jax.ShapeDtypeStruct((5,), jnp.float32), 1.0]}
    assert count_params(tree) == 12 + 5 + 1
    assert count_params(nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Param)) == 16


def test_executables_compile_once_for_each_shape_and_never_again():
    step, state = Executables(make_step()), make_state()
    jitted = jax.jit(make_step())
    other = make_state()
    expected = []
    for rows in (2, 5, 2, 5):
        other, metrics = jitted(other, make_batch(rows))
        expected.append(metrics["loss"])
    seen = []
    for rows in (2, 5):
        state, metrics = step(state, make_batch(rows))
        seen.append(metrics["loss"])
    assert step.compiles == 2
    assert step.compile_s > 0
    spent = step.compile_s
    with count_compiles() as log:
        for rows in (2, 5):
            state, metrics = step(state, make_batch(rows))
            seen.append(metrics["loss"])
    assert log.names == []
    assert (step.compiles, step.compile_s) == (2, spent)
    np.testing.assert_array_equal(seen, expected)


@pytest.mark.promotes  # batches of several dtypes
def test_executables_share_what_jax_takes_for_the_same_type():
    step = Executables(make_step())
    step(make_state(), make_batch(2))
    step(make_state(), make_batch(2, np.float64))  # 32 bits after canonicalisation
    step(make_state(), {"x": jnp.ones((2, 4))})
    assert step.compiles == 1
    step(make_state(), make_batch(2, np.int32))
    assert step.compiles == 2
    add = Executables(lambda state, count: state + count, donate_argnums=())
    assert [float(add(1.0, count)) for count in (2, 3)] == [3.0, 4.0]
    assert add.compiles == 1


def test_executables_follow_a_change_of_state():
    step = Executables(lambda state, x: (jax.tree.map(lambda s: s + x, state), x))
    for state in ([jnp.ones(2)], [jnp.ones(3)], (jnp.ones(3), jnp.ones(3)), [jnp.ones(2)]):
        new, _ = step(state, 1.0)
        assert jax.tree.structure(new) == jax.tree.structure(state)
    assert step.compiles == 3


def test_several_shapes_are_compiled_at_the_same_time(monkeypatch):
    both, plain, told = threading.Barrier(2, timeout=20), jax.stages.Lowered.compile, []

    def compile_when_another_one_does(lowered):
        both.wait()
        return plain(lowered)

    monkeypatch.setattr("effjax.core.beside.workers", lambda: 2)
    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_when_another_one_does)
    step, state = Executables(make_step()), make_state()
    step.compile_all([(state, make_batch(rows)) for rows in (2, 5, 2)], told.append)
    assert (step.compiles, told) == (2, [2, 3])
    assert step.compile_s > 0
    with count_compiles() as log:
        for rows in (2, 5):
            state, _ = step(state, make_batch(rows))
        step.compile_all([(state, make_batch(2))])
    assert (log.count, step.compiles) == (0, 2)


class Compiler:
    """Stands between lowering and XLA: what it holds back or refuses, by the rows of the batch."""

    def __init__(self, monkeypatch, workers=1):
        plain = jax.stages.Lowered.compile
        self.held, self.refused, self.begun = {}, (), []

        def compile_(lowered):
            rows = lowered.in_avals[0][1]["x"].shape[0]
            self.begun.append(rows)
            if rows in self.held:
                assert self.held[rows].wait(20)
            if rows in self.refused:
                raise ValueError(f"no room for {rows} rows\nand a second line")
            return plain(lowered)

        monkeypatch.setattr("effjax.core.beside.workers", lambda: workers)
        monkeypatch.setattr(jax.stages.Lowered, "compile", compile_)


def test_a_call_waits_for_its_own_program_alone_and_gives_the_same_bits(monkeypatch):
    compiler = Compiler(monkeypatch)
    compiler.held = {5: threading.Event()}
    beside, plain = Executables(make_step()), Executables(make_step())
    beside.compile_beside([(make_state(), make_batch(rows)) for rows in (2, 5, 2)])
    assert (beside.compiles, beside.pending) == (0, 2)
    state, first = beside(make_state(), make_batch(2))  # while the other one is held back
    spent = beside.compile_s
    beside(make_state(), make_batch(2))
    assert (beside.compiles, beside.pending, beside.compile_s) == (1, 1, spent)
    compiler.held[5].set()
    state, second = beside(state, make_batch(5))
    assert (beside.compiles, beside.pending, compiler.begun) == (2, 0, [2, 5])
    assert beside.compile_s > spent
    other, expected = plain(make_state(), make_batch(2))
    np.testing.assert_array_equal(first["loss"], expected["loss"])
    np.testing.assert_array_equal(second["loss"], plain(other, make_batch(5))[1]["loss"])


def test_a_program_that_cannot_be_compiled_is_an_error_of_the_next_call(monkeypatch):
    compiler = Compiler(monkeypatch)
    compiler.refused = (5,)
    step, state = Executables(make_step()), make_state()
    step.compile_beside([(state, make_batch(rows)) for rows in (5, 2, 7)])
    step.compile(state, make_batch(2))  # the one thread has passed the first by then
    with pytest.raises(
        CompileError, match=r"program for float32\[5, 4\] could not .*: ValueError: no room for 5 rows$"
    ):
        step(state, make_batch(2))
    assert (step.compiles, step.pending) == (1, 0)
    step(state, make_batch(2))  # what is compiled runs on
    with pytest.raises(CompileError, match=r"float32\[5, 4\]"):
        step.compile_all([(make_state(), make_batch(5))])


def test_what_has_not_begun_is_left_out_and_no_thread_stays(monkeypatch):
    compiler = Compiler(monkeypatch)
    compiler.held = {2: threading.Event()}
    step, state = Executables(make_step()), make_state()
    step.compile_beside([(state, make_batch(rows)) for rows in (2, 5, 7)])
    threading.Timer(0.05, compiler.held[2].set).start()
    step.cancel()
    step.cancel()
    assert (compiler.begun, step.compiles, step.pending) == ([2], 0, 0)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("effjax-compile")]
    step(state, make_batch(5))  # as ever
    assert step.compiles == 1


def test_compile_ahead_with_abstract_arguments_runs_nothing():
    step = Executables(make_step())
    abstract = jax.eval_shape(make_state)
    for rows in (2, 5):
        compiled = step.compile(abstract, {"x": jax.ShapeDtypeStruct((rows, 4), jnp.float32)})
    assert isinstance(compiled, jax.stages.Compiled)
    state = make_state()
    with count_compiles() as log:
        for rows in (2, 5):
            state, _ = step(state, make_batch(rows))
    assert (log.count, step.compiles) == (0, 2)


def test_executables_donate_the_state_and_say_so_in_the_memory():
    def analysis(**kwargs):
        step = Executables(make_step(), **kwargs)
        state = {"w": jnp.ones((4, 3)), "key": jax.random.key(0)}
        step(state, make_batch(2))
        return state, step.analysis()

    state, donated = analysis()
    assert state["w"].is_deleted()
    state, kept = analysis(donate_argnums=())
    assert not state["w"].is_deleted()
    state_bytes = 4 * 3 * 4 + 2 * 4
    assert (donated.alias_bytes, kept.alias_bytes) == (state_bytes, 0)
    assert donated.argument_bytes == state_bytes + 2 * 4 * 4
    assert kept.peak_bytes - donated.peak_bytes == state_bytes + kept.temp_bytes - donated.temp_bytes


def test_a_used_up_state_is_an_error_not_a_compilation():
    step, state = Executables(make_step()), make_state()
    step(state, make_batch(2))
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        step(state, make_batch(2))
    with pytest.raises(TypeError, match="not a valid JAX type"):
        step(make_state(), {"x": "text"})
    assert step.compiles == 1


def test_analysis_reports_flops_but_not_of_loops_and_takes_the_largest():
    w = jnp.ones((32, 32))
    plain = Executables(lambda x: x @ w, donate_argnums=())
    with pytest.raises(RuntimeError, match="Nothing is compiled yet"):
        plain.analysis()
    plain(jnp.ones((8, 32)))
    assert plain.analysis().flops == 2 * 8 * 32 * 32
    plain(jnp.ones((64, 32)))
    plain(jnp.ones((8, 32)))
    assert plain.analysis().flops == 2 * 64 * 32 * 32
    assert plain.analysis(jnp.ones((8, 32))).flops == 2 * 8 * 32 * 32
    assert plain.analysis().output_bytes == 64 * 32 * 4
    looped = Executables(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: x @ w, x), donate_argnums=())
    looped(jnp.ones((8, 32)))
    assert looped.analysis().flops is None
    assert looped.analysis().bytes_accessed is None
    assert looped.analysis().peak_bytes > 0


def test_state_keeps_its_shardings_on_a_mesh():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    shardings = {"w": split, "step": whole}
    state = jax.device_put({"w": jnp.ones((4, 3)), "step": jnp.zeros(())}, shardings)

    def step(state, x):
        return {"w": state["w"] * x.sum(), "step": state["step"] + 1}, {"loss": x.mean()}

    run = Executables(step, out_shardings=(shardings, None))
    batch = jax.device_put(jnp.ones((4, 2)), split)
    state, _ = run(state, batch)
    with count_compiles() as log:
        for _ in range(3):
            state, _ = run(state, batch)
    assert log.names == []
    assert run.compiles == 1
    assert state["w"].sharding.is_equivalent_to(split, 2)
    state, _ = run(state, jax.device_put(jnp.ones((4, 2)), whole))  # another sharding: one more
    assert run.compiles == 2


@pytest.mark.optimized
@pytest.mark.slow  # timed: it wants the machine for itself
def test_a_call_costs_little_more_than_jit():
    state = {f"layer{i}": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)} for i in range(10)}

    def step(state, batch):
        return jax.tree.map(lambda p: 0.9 * p + batch["x"][0], state), {"loss": batch["y"][0]}

    batch = {"x": jnp.ones(4), "y": jnp.ones(4)}
    copy = lambda: jax.tree.map(jnp.copy, state)
    times = time_interleaved(
        {
            "jit": (jax.jit(step, donate_argnums=0), copy(), [batch]),
            "executables": (Executables(step), copy(), [batch]),
        },
        rounds=30,
        min_time=1e-3,
    )
    # The least times are the machine's; what is above them is its other guests.
    assert min(times["executables"].samples_ms) - min(times["jit"].samples_ms) < 0.030


def test_count_compiles_sees_every_compilation_and_unregisters():
    def fresh(x):
        return jnp.cos(x) * 3

    x = jnp.ones(3)
    jitted = jax.jit(fresh)
    with count_compiles() as outer:
        jitted(x)
        with count_compiles() as inner:
            jax.jit(lambda x: x - 7).lower(x).compile()
        jitted(x)
    assert outer.count == 2
    assert inner.count == 1
    assert "fresh" in outer.names[0]
    assert outer.seconds > inner.seconds > 0
    jitted(jnp.ones(4))
    assert outer.count == 2


def test_count_compiles_unregisters_after_an_error():
    with pytest.raises(ZeroDivisionError), count_compiles() as log:
        _ = 1 / 0
    jax.jit(lambda x: x * 11)(2)
    assert log.count == 0


def test_time_interleaved_alternates_and_threads_the_state():
    calls = []

    def step(state, batch):
        calls.append(("step", state, batch))
        return state + 1, None

    times = time_interleaved(
        {"thunk": lambda: calls.append(("thunk",)), "step": (step, 0, ["a", "b"])}, rounds=4, warmup=1
    )
    assert [call[0] for call in calls] == ["thunk", "step"] + ["thunk", "step", "step", "thunk"] * 2
    assert [call[1:] for call in calls if call[0] == "step"] == [(0, "a"), (1, "b"), (2, "a"), (3, "b"), (4, "a")]
    assert times["thunk"].n == times["step"].n == 4


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for ``clock(seconds)``."""
    now = 0.0

    def advance(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr("effjax.core.timing.time", SimpleNamespace(perf_counter=lambda: now))
    return advance


def test_time_interleaved_measures_milliseconds(clock):
    times = time_interleaved({"fast": lambda: clock(0.002), "slow": lambda: clock(0.01)}, rounds=5, warmup=1)
    for name, milliseconds in (("fast", 2.0), ("slow", 10.0)):
        np.testing.assert_allclose(times[name][:3], milliseconds)
    np.testing.assert_allclose(paired_ratio(times["slow"], times["fast"]), 5.0)


def test_time_interleaved_repeats_short_calls(clock):
    calls = 0

    def thunk():
        nonlocal calls
        calls += 1
        clock(2**-10)

    times = time_interleaved({"thunk": thunk}, rounds=2, warmup=1, min_time=2**-7)
    assert calls == 1 + 1 + 2 * 8
    assert times["thunk"].median_ms == 1e3 * 2**-10


def test_time_interleaved_threads_donated_states():
    step = Executables(make_step())
    times = time_interleaved({"step": (step, make_state(), [make_batch(2), make_batch(5)])}, rounds=3)
    assert step.compiles == 2
    assert times["step"].median_ms > 0


@pytest.mark.parametrize(
    ("arms", "kwargs", "message"),
    [
        ({}, {}, "arms={} is empty"),
        ({"a": (make_step(), 0, [])}, {}, r"arms\['a'\]: batches is empty"),
        ({"a": print}, {"rounds": 0}, "rounds=0"),
        ({"a": print}, {"warmup": 0}, "warmup=0 .* The first call compiles"),
        ({"a": print}, {"min_time": -1}, "min_time=-1"),
    ],
)
def test_time_interleaved_refuses(arms, kwargs, message):
    with pytest.raises(ValueError, match=message):
        time_interleaved(arms, **kwargs)


def test_paired_ratio_cancels_slow_drifts():
    drift = np.linspace(1, 9, 9)
    over, under = (Timing(0, 0, 0, tuple(scale * drift)) for scale in (3.0, 2.0))
    assert paired_ratio(over, under) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="9 and 1 rounds"):
        paired_ratio(over, Timing(1, 1, 1, (1,)))


def test_hardware_is_json_and_names_the_devices():
    facts = json.loads(json.dumps(hardware()))
    assert facts["devices"] == jax.device_count()
    assert facts["platform"] == jax.default_backend()
    assert facts["cores"] >= 1
    assert facts["cpu"]
    assert facts["memory_bytes"] > 2**28
