"""Weights in and out of safetensors: layouts, complaints, and files that are not what they claim."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from effjax.models.convert import Rule, export_weights, find_weights, import_weights, load_weights, save_weights

RULES = (
    Rule("conv{i}.weight", "params/layer{i}/kernel", "conv"),
    Rule("bert.layer.{i}.attention.{part}.weight", "params/layer{i}/{part}_proj/kernel", "dense"),
    Rule("norm.running_mean", "batch_stats/norm/mean"),
    Rule("norm.num_batches_tracked", None),
)


@pytest.fixture
def variables():
    key = jax.random.key(0)
    return {
        "params": {
            "layer1": {"kernel": jax.random.normal(key, (3, 3, 2, 5)), "query_proj": {"kernel": jnp.ones((4, 6))}},
        },
        "batch_stats": {"norm": {"mean": jnp.arange(5.0)}},
    }


@pytest.fixture
def tensors(variables):
    return export_weights(variables, RULES)


def test_layouts(variables, tensors):
    kernel = np.asarray(variables["params"]["layer1"]["kernel"])
    assert set(tensors) == {"conv1.weight", "bert.layer.1.attention.query.weight", "norm.running_mean"}
    assert tensors["conv1.weight"].shape == (5, 2, 3, 3)
    assert tensors["conv1.weight"][4, 1, 0, 2] == kernel[0, 2, 1, 4]
    assert tensors["bert.layer.1.attention.query.weight"].shape == (6, 4)
    assert all(tensor.flags["C_CONTIGUOUS"] for tensor in tensors.values())


@pytest.mark.parametrize("rules", [RULES, None])
def test_round_trip_is_exact(tmp_path, variables, rules):
    path = tmp_path / "model.safetensors"
    save_weights(path, variables, rules)
    loaded = load_weights(path, jax.eval_shape(lambda: variables), rules)
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    (tmp_path / "ordinary").touch()
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_narrow_files_become_the_models_dtype(tmp_path, variables, tensors):
    path = tmp_path / "half.safetensors"
    for narrow in (np.float16, jnp.bfloat16):
        save_file({name: tensor.astype(narrow) for name, tensor in tensors.items()}, path)
        loaded = load_weights(path, variables, RULES)
        assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype("float32")}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2), loaded, variables)


def test_ignored_tensors_are_dropped(variables, tensors):
    tensors["norm.num_batches_tracked"] = np.int64(7) + np.zeros((), np.int64)
    jax.tree.map(np.testing.assert_array_equal, import_weights(tensors, variables, RULES), variables)


def test_all_problems_stand_in_one_message(variables, tensors):
    del tensors["norm.running_mean"]
    tensors["fc.weight"] = np.zeros((2, 2), np.float32)
    tensors["conv1.weight"] = np.zeros((5, 2, 3), np.float32)
    tensors["bert.layer.1.attention.query.weight"] = np.zeros((4, 6), np.float32)
    with pytest.raises(ValueError, match="here does not hold the weights") as error:
        import_weights(tensors, variables, RULES, origin="here")
    message = str(error.value)
    assert "missing: norm.running_mean -> batch_stats/norm/mean" in message
    assert "unexpected: fc.weight" in message
    assert "conv1.weight -> params/layer1/kernel: shape (5, 2, 3) has not the 4 axes" in message
    assert "shape (6, 4) in our layout, but the model has (4, 6)" in message


def test_numbers_of_another_kind_and_double_targets_are_refused(variables, tensors):
    integers = {**tensors, "norm.running_mean": np.arange(5, dtype=np.uint8)}
    with pytest.raises(ValueError, match="dtype uint8, but the model has float32"):
        import_weights(integers, variables, RULES)
    rules = (*RULES, Rule("norm.mean", "batch_stats/norm/mean"))
    with pytest.raises(ValueError, match="filled by another tensor before"):
        import_weights({**tensors, "norm.mean": np.zeros(5, np.float32)}, variables, rules)


def test_long_lists_are_cut(variables, tensors):
    extra = {f"extra{i}": np.zeros(1, np.float32) for i in range(20)}
    with pytest.raises(ValueError, match="and 12 more"):
        import_weights({**tensors, **extra}, variables, RULES)


def test_a_leaf_without_a_rule_is_not_saved_silently(tmp_path, variables):
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="no rule names batch_stats/norm/mean"):
        save_weights(path, variables, RULES[:2])
    with pytest.raises(ValueError, match="both named 'same'"):
        export_weights({"a": jnp.ones(1), "b": jnp.ones(1)}, (Rule("same", "a"), Rule("same", "b")))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file(tmp_path, variables, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_weights(path, variables)
    before = path.read_bytes()

    def half_written(tensors, where, metadata):
        where.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.numpy.save_file", half_written)
    with pytest.raises(OSError, match="disk full"):
        save_weights(path, variables)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(FileNotFoundError, match="Create it first"):
        save_weights(tmp_path / "absent" / "model.safetensors", variables)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
def test_damaged_files_are_refused_by_name(tmp_path, variables, damage):
    path = tmp_path / "model.safetensors"
    save_weights(path, variables)
    path.write_bytes({"truncated": path.read_bytes()[:-3], "foreign": b"\x80\x04K\x01." * 20, "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or no safetensors file"):
        load_weights(path, variables)


def test_where_weights_are_looked_for(tmp_path, variables, monkeypatch):
    folder = tmp_path / "family"
    folder.mkdir()
    monkeypatch.setenv("EFFJAX_MODELS", str(tmp_path))
    save_weights(folder / "small.safetensors", variables)
    assert (
        find_weights("family/small") == find_weights("family") == find_weights(folder) == folder / "small.safetensors"
    )
    save_weights(folder / "large.safetensors", variables)
    with pytest.raises(FileNotFoundError, match="it holds large, small"):
        find_weights("family")
    save_weights(folder / "model.safetensors", variables)
    assert find_weights(folder).name == "model.safetensors"
    with pytest.raises(FileNotFoundError, match=r"Did you mean .*'family/small'.*set EFFJAX_MODELS"):
        find_weights("famly/small")
    monkeypatch.delenv("EFFJAX_MODELS")
    assert find_weights("resnet_cifar10/resnet20").parent.name == "resnet_cifar10"
    with pytest.raises(FileNotFoundError, match="resnet_cifar10/resnet20"):
        find_weights("resnet_cifar10/resnet32")


def test_file_is_what_hugging_face_expects(tmp_path, variables):
    from safetensors import safe_open

    path = tmp_path / "model.safetensors"
    save_weights(path, variables, RULES)
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert load_file(path)["conv1.weight"].shape == (5, 2, 3, 3)
