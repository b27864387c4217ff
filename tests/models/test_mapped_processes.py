"""A model loaded and saved by two processes, each of which reads its own parts of the files."""

import json
import shutil
import socket

import pytest
from commands import Command

from effjax.core.folders import model_folder
from effjax.models.convert import read_tensors

CODE = """
import json, os, sys
from effjax.train.mesh import start_distributed
start_distributed()
import jax, jax.numpy as jnp, numpy as np
from effjax.models import load_pretrained, mapped, save_pretrained
read, part = [], mapped._part
def counted(*arguments):
    read.append(part(*arguments))
    return read[-1]
mapped._part = counted
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
model = load_pretrained(sys.argv[1 + jax.process_index()], scan_layers=True, mesh=mesh, rules="fsdp")
kernels = [leaf.size for leaf in jax.tree.leaves(model.params)]
norm = jax.jit(lambda params: sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(params)))(model.params)
save_pretrained(sys.argv[3], model)
print(json.dumps({"read": sum(array.size for array in read), "all": sum(kernels), "norm": float(norm)}), flush=True)
"""


def pair(*words):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_NUM_CPU_DEVICES": "2"}
    both = [Command(*words, target=CODE, environment={**shared, "JAX_PROCESS_ID": str(index)}) for index in range(2)]
    said = [process.communicate(timeout=200) for process in both]
    return [process.returncode for process in both], said


@pytest.mark.nightly
@pytest.mark.study
def test_each_process_reads_half_and_a_missing_file_stops_both(tmp_path):
    folder = model_folder("stories260k", "*.safetensors")
    codes, said = pair(folder, folder, tmp_path / "saved")
    assert codes == [0, 0], said
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in said)
    assert first["norm"] == second["norm"]
    # Kernels are read by halves; norms, which are not split, by both.
    assert 0.5 <= first["read"] / first["all"] < 0.51
    before, after = read_tensors(folder / "model.safetensors"), read_tensors(tmp_path / "saved" / "model.safetensors")
    assert all((before[name] == tensor).all() for name, tensor in after.items())
    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").unlink()
    codes, said = pair(folder, tmp_path / "broken", tmp_path / "none")
    assert codes == [1, 1]
    assert "process 1 of this run was refused; its message says why." in said[0][1]
    assert "holds no model.safetensors" in said[1][1]
