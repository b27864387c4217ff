"""Weights read from the file in parts, onto a mesh, and written one tensor at a time."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from effjax.models import load_pretrained, save_pretrained
from effjax.models.convert import find_weights
from effjax.models.mapped import Source, map_safetensors, placed


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


class Recorded(np.ndarray):
    """Says how many numbers were asked for."""

    asked: list

    def __getitem__(self, index):
        found = np.asarray(self)[index]
        Recorded.asked.append(found.size)
        return found


@pytest.mark.parametrize(("axes", "parts"), [(("model", "data"), 8), ((None, "model"), 2), ((), 1)])
def test_every_part_is_read_once_and_nothing_else(mesh, axes, parts):
    Recorded.asked = []
    whole = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    leaf = jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)
    found = placed(Source({None: whole.view(Recorded)}, "x"), leaf, sharding)
    assert [64 // parts] * parts == Recorded.asked
    assert (found.sharding, found.dtype) == (sharding, jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(found, np.float32), whole)
    Recorded.asked = []
    stack = {layer: (whole + layer).view(Recorded) for layer in range(2)}
    sharding = NamedSharding(mesh, PartitionSpec(None, *axes))
    found = placed(Source(stack, "x"), jax.ShapeDtypeStruct((2, 8, 8), jnp.float32), sharding)
    assert [64 // parts] * 2 * parts == Recorded.asked
    np.testing.assert_array_equal(found, np.stack([whole, whole + 1]))
    by_layer = placed(
        Source(stack, "x"), jax.ShapeDtypeStruct((2, 8, 8), jnp.float32), NamedSharding(mesh, PartitionSpec("model"))
    )
    np.testing.assert_array_equal(by_layer, found)


def test_a_part_that_is_not_finite_is_named(mesh):
    whole = np.ones((8, 8), np.float32)
    whole[5, 1] = np.inf
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    with pytest.raises(ValueError, match="head/kernel holds NaN or infinity"):
        placed(Source({None: whole}, "head/kernel"), jax.ShapeDtypeStruct((8, 8), jnp.float32), sharding)


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_a_model_on_a_mesh_has_the_bits_of_one_device_and_is_saved_as_it_was(mesh, tmp_path, scan):
    one = load_pretrained("stories260k", scan_layers=scan, param_dtype=jnp.bfloat16)
    many = load_pretrained("stories260k", scan_layers=scan, param_dtype=jnp.bfloat16, mesh=mesh, rules="fsdp+tensor")
    assert jax.tree.structure(one.params) == jax.tree.structure(many.params)
    for left, right in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))
    layer = many.params["layers" if scan else "layer_3"]["mlp"]["up"]["kernel"]
    assert layer.addressable_shards[0].data.size == layer.size // 8
    save_pretrained(tmp_path, many, dtype=jnp.float32)
    written, read = load_file(tmp_path / "model.safetensors"), load_file(find_weights("stories260k"))
    assert written.keys() <= read.keys()
    for name, tensor in written.items():
        np.testing.assert_array_equal(tensor, read[name].astype(jnp.bfloat16).astype(np.float32))


def write(path, header, data=b"\0" * 16):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_tensors_of_every_type_lie_where_the_header_says(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {
        "odd": np.array([True, False, True]),
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "brain": np.arange(4).astype(jnp.bfloat16),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(3, np.float32),
    }
    save_file(tensors, path)
    found = map_safetensors(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        np.testing.assert_array_equal(np.asarray(found[name], np.float32), np.asarray(tensor, np.float32))
    found.release()
    np.testing.assert_array_equal(found["half"], tensors["half"])


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 32]}, "'x' does not lie in the file"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 16]}, "does not lie in the file"),
        ({"dtype": "F4", "shape": [4], "data_offsets": [0, 16]}, "of type F4"),
        ({"dtype": "F32", "shape": [4]}, "data_offsets"),
        (3, "not subscriptable"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, entry, words):
    path = tmp_path / "x.safetensors"
    write(path, {"x": entry})
    with pytest.raises(ValueError, match=rf"{path} is damaged or no safetensors file \(.*{words}"):
        map_safetensors(path)
    for content in (b"", b"\0" * 7, (10**9).to_bytes(8, "little"), (50).to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged or no safetensors file"):
            map_safetensors(path)


def test_bad_calls(mesh, tmp_path):
    with pytest.raises(ValueError, match="rules='fsdp' without mesh"):
        load_pretrained("stories260k", rules="fsdp")
    three = jax.make_mesh((3,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:3])
    with pytest.raises(ValueError, match=r"embedding' of shape \(.*\) has 64 rows along the 'model' axis of 3"):
        load_pretrained("stories260k", mesh=three, rules="tensor")
    with pytest.raises(ValueError, match=r"'layerz' matches none"):
        load_pretrained("stories260k", mesh=mesh, rules=(("layerz", ("data",)),))


@pytest.mark.nightly
@pytest.mark.promotes
@pytest.mark.parametrize("method", ["lora", "cola"])
def test_a_run_on_a_mesh_is_that_of_one_device_and_goes_on_elsewhere(method, tmp_path):
    """The small twin of what ``tests/peers/sharded_load.py`` does with a billion parameters."""
    path = Path(__file__).parents[1] / "peers" / "sharded_load.py"
    script = runpy.run_path(str(path))
    words = ["--folder", str(tmp_path / "model"), "--size", "small", "--dtype", "float32", "--steps", "3"]
    script["write"](tmp_path / "model", "small")

    def run(out, *more):
        options = script["parsed"]([*words, "--methods", method, "--out", str(tmp_path / out), *more])
        peaks = script["Peaks"]()
        model, mesh, found = script["load"](options, peaks)
        return found | script["train"](model, mesh, method, options, peaks)

    one = run("one", "--data", "1", "--model", "1")
    assert one["losses"][2] < one["losses"][1] < one["losses"][0]
    eight = run("eight")
    assert eight["bytes_per_device"] < one["bytes"] / 6
    assert run("cut", "--stop", "2")["stopped"] == 2
    shutil.copytree(tmp_path / "cut", tmp_path / "again")
    four = run("cut", "--data", "2", "--model", "2")
    both = ["--methods", method, "--out", str(tmp_path / "again"), "--data", "2", "--model", "1", "--rules", "fsdp"]
    report = tmp_path / "report.json"
    command = [sys.executable, str(path), *words, *both, "--processes", "2", "--report", str(report)]
    subprocess.run(command, capture_output=True, check=True)
    two = json.loads(report.read_text())[0][method]
    for found in (eight, four, two):
        assert found["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert found["adapters"] == pytest.approx(one["adapters"], rel=1e-4)
