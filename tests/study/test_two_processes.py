"""``effjax compare`` over two processes: the results of one, and SIGTERM to one stops both."""

import json
import signal
import socket

import pytest
from commands import Command

WORDS = ["samuel:smoke", "--settings", "shift", "--grid", "0.1", "--arms", "samuel", "--seeds", "0"]


def start(out, steps, processes=2, devices=1, more=((), ())):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["compare", *WORDS, "--budget.amount", steps, "--train.mesh.data", "-1", "--out", out]
    shared = {"JAX_NUM_CPU_DEVICES": str(devices)}
    if processes > 1:
        shared |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)}
    return [
        Command(*words, *more[index], environment={**shared, "JAX_PROCESS_ID": str(index)})
        for index in range(processes)
    ]


def finish(processes):
    done = [process.communicate() for process in processes]
    return [process.returncode for process in processes], done


def metrics(out):
    results = json.loads((out / "results.json").read_text())
    return {name: arm["metrics"] for name, arm in results["arms"].items()}, results["claims"]


@pytest.mark.study
def test_two_processes_find_what_one_process_with_two_devices_finds(tmp_path):
    codes, said = finish(start(tmp_path / "one", 20, processes=1, devices=2))
    assert codes == [0], said
    codes, said = finish(start(tmp_path / "two", 20))
    assert codes == [0, 0], said
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one")
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}


@pytest.mark.study
def test_sigterm_to_one_of_two_stops_both_and_both_continue(tmp_path):
    out = tmp_path / "out"
    processes = start(out, 20000)
    processes[0].wait_for(lambda: list(out.glob(".work/arms/*/*/*/log.jsonl")))
    processes[1].send_signal(signal.SIGTERM)
    codes, said = finish(processes)
    assert codes == [75, 75], said
    assert not (out / ".lock").exists()
    assert (out / ".work" / "cost.json").exists()


@pytest.mark.study
def test_a_refusal_in_one_process_ends_both(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".lock").write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "now", "started": "1"}))
    codes, said = finish(start(out, 60))
    assert codes == [2, 2]
    assert "is in use by process 1 on elsewhere" in said[0][1]
    assert "process 0 of this run was refused" in said[1][1]


@pytest.mark.nightly
@pytest.mark.study
def test_parameters_split_over_two_processes_learn_what_they_learn_in_one(tmp_path):
    split = ("--train.mesh.rules", "fsdp")
    codes, said = finish(start(tmp_path / "one", 20, processes=1, devices=2, more=(split,)))
    assert codes == [0], said
    codes, said = finish(start(tmp_path / "two", 20, more=(split, split)))
    assert codes == [0, 0], said
    (one, _), (two, _) = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for arm in one:
        for name, found in one[arm].items():
            assert two[arm][name]["values"] == pytest.approx(found["values"], rel=1e-5), name


@pytest.mark.nightly
@pytest.mark.study
def test_processes_with_different_settings_all_stop_and_name_them(tmp_path):
    codes, said = finish(start(tmp_path / "out", 20, more=((), ("--momentum", "0.5"))))
    assert codes == [2, 2]
    for _, errors in said:
        assert "process 1 of this run was started with other settings than process 0: " in errors
        assert "momentum is 0.9 in process 0, 0.5 in the other" in errors
    assert not (tmp_path / "out" / "results.json").exists()
