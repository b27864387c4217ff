"""Two processes on one machine: one global batch order, SIGTERM to one stops both, a resumed run is bitwise equal."""

import signal
import socket
import time
from pathlib import Path

import pytest
from commands import Command

CODE = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from effjax.train.mesh import start_distributed
start_distributed()
import jax, numpy as np
from toy import toy
from effjax.data.pipeline import batches
from effjax.train.loop import Preempted, fit
from effjax.train.options import MeshOptions, TrainOptions
assert jax.process_count() == 2
rng = np.random.default_rng(0)
x = rng.normal(size=(64, 5)).astype(np.float32)
data = {{"x": x, "y": x @ np.arange(5, dtype=np.float32)}}
steps, pause, out = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
import time
program = toy(
    opened=lambda seed: batches(data, 8, seed=seed), parts=(1,) * steps, leave=lambda s: (time.sleep(pause), s)[1]
)
options = TrainOptions(mesh=MeshOptions(data=-1), checkpoint_steps=50, read_lag=2)
try:
    result = fit(program, 0, options=options, directory=out, identity={{"x": 1}})
except Preempted as stop:
    print("PREEMPTED", stop, flush=True)
    sys.exit(75)
weights = np.asarray(result.state["params"]["w"].addressable_data(0))
print("W", weights.tobytes().hex(), result.train["loss"], flush=True)
"""


def pair(*words):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_NUM_CPU_DEVICES": "1"}
    return [Command(*words, target=CODE, environment={**shared, "JAX_PROCESS_ID": str(index)}) for index in range(2)]


def finish(processes):
    done = [process.communicate(timeout=120) for process in processes]
    return [process.returncode for process in processes], done


@pytest.mark.study
def test_sigterm_to_one_stops_both_and_the_rerun_is_bitwise_equal(tmp_path):
    codes, whole = finish(pair(120, 0, tmp_path / "whole"))
    assert codes == [0, 0], whole
    processes = pair(120, 0.1, tmp_path / "cut")
    processes[0].wait_for((tmp_path / "cut" / "log.jsonl").exists)
    time.sleep(2)
    processes[1].send_signal(signal.SIGTERM)
    codes, cut = finish(processes)
    assert codes == [75, 75], cut
    assert all("PREEMPTED stopped after step" in out for out, _ in cut)
    codes, resumed = finish(pair(120, 0, tmp_path / "cut"))
    assert codes == [0, 0], resumed
    lines = {line for out, _ in whole + resumed for line in out.splitlines() if line.startswith("W ")}
    assert len(lines) == 1
