"""The launch recipes, as far as one machine allows: the SLURM one under an ``srun`` of two tasks."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from effjax.train.mesh import start_distributed

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "configs" / "launch"

SRUN = """#!/usr/bin/env bash
for task in 0 1; do
  SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_NTASKS=2 SLURM_STEP_NODELIST=127.0.0.1 SLURM_PROCID=$task \\
    SLURM_LOCALID=$task "$@" & pids="$pids $!"
done
trap 'kill -TERM $pids' TERM
worst=0
for pid in $pids; do
  while :; do
    wait "$pid"; code=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  [ $code -gt $worst ] && worst=$code
done
exit $worst
"""


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def cluster(tmp_path):
    """Variables under which ``slurm.sbatch`` finds a cluster of two tasks."""
    program(tmp_path / "bin" / "srun", SRUN)
    program(tmp_path / "bin" / "scontrol", f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    return {
        **os.environ,
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "EFFJAX_ENV": str(tmp_path / "env"),
    }


def submit(cluster, *words):
    command = ["bash", str(LAUNCH / "slurm.sbatch"), *words]
    return subprocess.Popen(command, env=cluster, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (75, True)])
def test_every_task_gets_the_words_and_75_requeues(cluster, tmp_path, code, requeued):
    program(tmp_path / "env" / "bin" / "effjax", f'#!/bin/sh\necho "$SLURM_PROCID [$4] $*"\nexit {code}\n')
    job = submit(cluster, "samuel:smoke", "--out", "a folder")
    said = sorted(job.communicate(timeout=30)[0].splitlines())
    words = "compare samuel:smoke --out a folder --distributed --train.mesh.data -1"
    assert said == [f"{task} [a folder] {words}" for task in (0, 1)]
    assert job.returncode == code
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"


@pytest.mark.nightly
@pytest.mark.study
def test_two_tasks_are_one_run_that_stops_is_requeued_and_goes_on(cluster, tmp_path):
    program(tmp_path / "env" / "bin" / "effjax", f'#!/bin/sh\nexec {sys.executable} -m effjax "$@"\n')
    out = tmp_path / "out"
    words = ["samuel:smoke", "--settings", "shift", "--grid", "0.1", "--arms", "samuel", "--seeds", "0"]
    words += ["--budget.amount", "3000", "--out", str(out)]
    cluster |= {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    job = submit(cluster, *words)
    while job.poll() is None and not list(out.glob(".work/arms/*/*/*/log.jsonl")):
        time.sleep(0.05)
    (task, *_) = [int(pid) for pid in _children(job.pid) if "effjax" in _command(pid)]
    os.kill(task, signal.SIGTERM)
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 75, said
    assert (tmp_path / "requeued").exists()
    job = submit(cluster, *words)
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert json.loads((out / "results.json").read_text())["arms"]


def _children(pid):
    """All processes below one."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return found + [below for child in found for below in _children(child)]


def _command(pid):
    return Path(f"/proc/{pid}/cmdline").read_text()


def test_the_manifest_is_one_run_per_host_with_its_restarts():
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    (jobs,) = found["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == rows * columns // chips
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert (pod["restartPolicy"], job["backoffLimit"]) == ("Never", 0)  # podFailurePolicy asks for it
    (script,) = container["args"]
    assert "--distributed --train.mesh.data -1" in script
    names = {entry["name"] for entry in container["env"]}
    assert set(re.findall(r"\$\{?([A-Z]+)", script)) <= names


def test_the_words_of_the_page_make_a_study_whose_parameters_are_split():
    from effjax.study.resolve import resolve

    page = (LAUNCH / "README.md").read_text()
    (words,) = re.findall(r"tpu_pod.sh (cola:paper .*?)\n```", page, flags=re.DOTALL)
    words = words.replace("\\\n", " ").split()
    assert "--train.mesh.data -1" in (LAUNCH / "tpu_pod.sh").read_text()
    config = resolve(words[0], [*words[1:], "--train.mesh.data", "-1"]).config
    assert (config.train.mesh.rules, config.train.remat, config.train.dtype) == ("fsdp", True, "bfloat16")


def test_the_tables_of_the_page_are_those_of_the_committed_files():
    from runs_pods import MAKERS, filled

    page = (LAUNCH / "README.md").read_text()
    assert all(f"<!-- {name} -->" in page for name in MAKERS)
    assert filled(page) == page


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
def test_the_scripts_pass_shellcheck():
    scripts = [str(path) for path in LAUNCH.glob("*.s*")]
    assert len(scripts) == 2
    subprocess.run(["shellcheck", "-s", "bash", *scripts], check=True)


def test_a_process_that_must_join_others_and_cannot_says_how(monkeypatch):
    for name in ("SLURM_JOB_ID", "JAX_COORDINATOR_ADDRESS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"--distributed: .*JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"):
        start_distributed(required=True)
