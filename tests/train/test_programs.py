"""The folder of compiled programs: where it is, what turns it off, and that a second start compiles nothing."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core.cost import Executables
from effjax.train import costs, programs
from effjax.train.ahead import compile_ahead
from effjax.train.costs import measure_costs

BATCH = ({"input_ids": np.zeros((2, 8), np.int32)},)


def place(**variables):
    return programs._place(variables, None)


def test_where_the_folder_is_and_what_turns_it_off(tmp_path, monkeypatch):
    own = programs._processor()
    monkeypatch.setenv("HOME", "/home/me")
    assert str(place()) == f"/home/me/.cache/effjax/programs/{own}"
    assert str(place(XDG_CACHE_HOME="/c")) == f"/c/effjax/programs/{own}"
    assert str(place(EFFJAX_COMPILE_CACHE="/mine")) == f"/mine/{own}"
    assert [place(EFFJAX_COMPILE_CACHE=word) for word in ("off", "OFF", "0", "no", "false")] == [None] * 5
    assert programs._place({"EFFJAX_COMPILE_CACHE": "off"}, tmp_path) == tmp_path / own  # asked for by name
    # JAX has a folder already, here the tests' own: its owner decides.
    assert jax.config.jax_compilation_cache_dir
    before = jax.config.jax_compilation_cache_max_size
    assert programs.keep_programs(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    assert jax.config.jax_compilation_cache_max_size == before
    with pytest.raises(ValueError, match="max_mib=0"):
        programs.keep_programs(tmp_path, max_mib=0)


SCRIPT = """
import effjax.train, sys, os
print(effjax.train.keep_programs(max_mib=5))
assert "jax" not in sys.modules  # a listing of methods need not wait for it
import jax
from effjax.core.cost import programs_from_folder
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
double = lambda x: x + x
print(jax.config.jax_compilation_cache_max_size, jax.jit(double)(1.0), programs_from_folder())
jax.clear_caches()  # as at another start
print(jax.jit(double)(1.0), programs_from_folder())
"""


def test_programs_are_found_again(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
    environment |= {"EFFJAX_COMPILE_CACHE": str(tmp_path / "kept"), "JAX_PLATFORMS": "cpu"}
    started = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert started.returncode == 0, started.stderr
    folder, size, first, before, second, after = started.stdout.split()
    assert folder == str(tmp_path / "kept" / programs._processor())
    assert (size, first, before, second) == (str(5 * 2**20), "2.0", "0", "2.0")
    assert int(after) > 0


def test_measured_costs_come_from_two_shapes_and_donate_nothing(monkeypatch):
    step = jax.jit(lambda table, batch: table + table[batch["input_ids"]].sum(), donate_argnums=(0,))
    table = jnp.ones(10)
    arguments = [(table, {"input_ids": np.zeros((32, length), np.int32)}) for length in (8, 64)]
    found = measure_costs(step, arguments, rounds=1)
    assert not table.is_deleted()
    assert min(found) >= 0
    assert found.compile_s > 0
    # What the clocks say, and what follows from it.
    compiled, timed = iter([(3.0, 2.0), (5.0, 2.0)]), []
    monkeypatch.setattr("effjax.train.costs._compile", lambda step, args: (step.compile(*args), next(compiled))[1])
    monkeypatch.setattr("effjax.train.costs._times", lambda *given: timed.append(given) or [0.01, 0.08])
    monkeypatch.setattr("effjax.train.costs.cores", lambda: 8)
    monkeypatch.setattr("effjax.train.costs.workers", lambda: 6)
    found = measure_costs(step, arguments, rounds=7)
    assert (found.compile_s, found.at_once, timed[0][2]) == (4.0, 4.0, 7)  # each keeps two of eight cores busy
    assert [found.of_step(32, length) for length in (8, 64)] == pytest.approx([0.01, 0.08])


def test_seconds_that_the_folder_saved_count_as_compiling():
    class Step(Executables):
        def compile(self, *args):
            jax.monitoring.record_event_duration_secs("/jax/compilation_cache/compile_time_saved_sec", 30.0)

    seconds, busy = costs._compile(Step(len), (0,))
    assert 30.0 <= seconds < 31.0
    assert busy == 1.0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: measure_costs(len, [([],), ([],)]), ValueError, "holds no batch, a mapping with 'input_ids'"),
        (lambda: measure_costs(len, [BATCH, BATCH]), ValueError, r"\[\(2, 8\), \(2, 8\)\]; two of different lengths"),
        (lambda: measure_costs(len, [BATCH, BATCH], rounds=0), ValueError, "rounds=0"),
        (lambda: compile_ahead(1.0, []), TypeError, "step=1.0 is no function"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
