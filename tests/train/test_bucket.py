"""Runs whose folder is a bucket: through etils, fsspec, Orbax and TensorStore, against a bucket in memory."""

import json
from unittest import mock

import numpy as np
import pytest
from bucket import bucket
from toy import toy

from effjax.study.compare import compare
from effjax.study.resolve import resolve
from effjax.study.results_view import Results
from effjax.train.checkpoint import CheckpointError
from effjax.train.logging import JsonlLog, read_jsonl
from effjax.train.loop import fit
from effjax.train.options import TrainOptions


@pytest.fixture
def objects():
    with bucket() as found:
        yield found


class Killed(BaseException): ...


def kill(done):
    if done >= 8:
        raise Killed


def test_a_run_in_a_bucket_continues_bitwise_with_a_whole_log(objects, tmp_path):
    options = TrainOptions(checkpoint_steps=3, log_steps=2, read_lag=1)
    whole = fit(toy(11), 0, options=options, directory=tmp_path / "whole")
    with pytest.raises(Killed), mock.patch.object(JsonlLog, "close"):  # a kill closes nothing
        fit(toy(11), 0, options=options, directory="gs://my-bucket/run", on_steps=kill)
    assert "my-bucket/run/checkpoints/6/commit_success.txt" in objects
    assert not any(name.startswith("gs:") for name in (path.name for path in tmp_path.iterdir()))
    again = fit(toy(11), 0, options=options, directory="gs://my-bucket/run")
    np.testing.assert_array_equal(again.state["params"]["w"], whole.state["params"]["w"])
    assert list(read_jsonl("gs://my-bucket/run/log.jsonl")) == list(read_jsonl(tmp_path / "whole" / "log.jsonl"))
    with pytest.raises(CheckpointError, match=r"gs://my-bucket/run/checkpoints/11 belongs to another run"):
        fit(toy(11), 1, options=options, directory="gs://my-bucket/run")


@pytest.mark.nightly
@pytest.mark.study
def test_compare_in_a_bucket_finds_what_it_finds_on_a_disk(objects, tmp_path):
    words = ["--settings", "shift", "--budget.amount", "20", "--grid", "0.1", "--arms", "sgd-*", "--seeds", "0"]
    study = resolve("samuel:smoke", words)
    here = compare(study, out=tmp_path / "out", quiet=True)
    there = compare(study, out="gs://my-bucket/run", quiet=True)
    assert {name: arm["metrics"] for name, arm in there["arms"].items()} == {
        name: arm["metrics"] for name, arm in here["arms"].items()
    }
    assert sorted(objects) == sorted(f"my-bucket/run/{path.name}" for path in (tmp_path / "out").iterdir())
    assert Results.read("gs://my-bucket/run") == json.loads(objects["my-bucket/run/results.json"])
    again = compare(study, out="gs://my-bucket/run", quiet=True)
    assert again["claims"] == there["claims"]
