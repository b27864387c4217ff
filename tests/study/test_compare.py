"""What a comparison's folder refuses."""

import json
import os
import subprocess
import sys

import pytest

from effjax.study.compare import _Comparison
from effjax.study.progress import Progress
from effjax.study.resolve import resolve
from effjax.train.logging import write_json

TINY = ["--budget.amount", "20", "--grid", "0.1", "--others"]


def comparison(out, *words):
    return _Comparison(resolve("samuel:smoke", [*TINY, *words]), out, False, Progress(quiet=True), True)


def test_a_run_is_not_continued_on_other_data(tmp_path):
    begun = comparison(tmp_path)
    assert begun._claim_folder() is None
    write_json(begun.work / "cost.json", {})
    write_json(begun.work / "sources.json", ["digits/MLP: EFFJAX_DATA (train 5 rows)"])
    with pytest.raises(ValueError, match=r"other data:\s+there .*EFFJAX_DATA \(train 5 rows\).*\s+here .*built-in"):
        begun._costs()


def test_a_folder_of_another_config_is_refused_while_running_and_when_finished(tmp_path):
    comparison(tmp_path)._claim_folder()
    with pytest.raises(ValueError, match=r"momentum: 0\.9 there, 0\.5 here"):
        comparison(tmp_path, "--momentum", "0.5")._claim_folder()
    (tmp_path / ".work" / "identity.json").unlink()
    done = comparison(tmp_path)._identity() | {"preset": "cpu", "arms": {"a": {"metrics": {"x": 1}}}}
    (tmp_path / "results.json").write_text(json.dumps(done))
    with pytest.raises(ValueError, match="preset: 'cpu' there, 'smoke' here"):
        comparison(tmp_path)._claim_folder()


@pytest.mark.study
def test_experts_spread_over_a_mesh_learn_what_they_learn_on_one_device():
    code = """
import jax, sys
jax.config.update("jax_num_cpu_devices", 5)
from effjax.study.resolve import resolve
from effjax.train.loop import Prepared, fit
losses = []
for words in ([], ["--train.mesh.expert", "5"]):
    study = resolve("samuel:smoke", ["--budget.amount", "40", *words])
    program = study.arms()["digits-mlp-64-shift/samuel"].build()
    prepared = Prepared(program, study.config.train)
    result = fit(program, 0, options=study.config.train, prepared=prepared)
    assert prepared.step.compiles == program.compiles
    kernel = result.state["params"]["layer0"]["Dense_0"]["kernel"]
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == (5 if words else 1)
    losses.append(result.train["online_loss"])
assert abs(losses[0] / losses[1] - 1) < 1e-3, losses
print("spread")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert done.stdout.strip() == "spread", done.stderr
