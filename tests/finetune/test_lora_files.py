"""Adapter folders: a folder of PEFT, round trips, and what is refused."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from effjax.finetune.lora import lora_init, lora_merge, lora_scales
from effjax.finetune.lora_config import LoraConfig, LoraRule
from effjax.finetune.lora_files import load_lora, load_lora_modules, save_lora

PEFT = Path(__file__).resolve().parents[1] / "reference" / "peft"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
NAMES = {
    "conv/kernel": "conv",
    **{f"block_{i}/{name}/kernel": f"blocks.{i}.{name}" for i in range(2) for name in ("up", "down")},
}
SHAPES = {"conv": (3, 3, 3, 6), "up": (6, 10), "down": (10, 6)}
PARAMS = {"conv": {"kernel": np.zeros(SHAPES["conv"], "f")}} | {
    f"block_{i}": {name: {"kernel": np.zeros(SHAPES[name], "f"), "bias": np.zeros(1)} for name in ("up", "down")}
    for i in range(2)
}
# The same network with its blocks stacked, as nn.scan holds them.
STACKED = {"conv": PARAMS["conv"]} | {
    "blocks": {name: {"kernel": np.zeros((2, *SHAPES[name]), "f")} for name in ("up", "down")}
}


def stacked_names(path, layer):
    if path == "conv/kernel":
        return "conv"
    return f"blocks.{layer}.{path.split('/')[1]}"


def adapters(params, config):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: lora_init(jax.random.key(0), params, config))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


def fields_of(folder):
    return json.loads((folder / CONFIG).read_text())


def edited(tmp_path, **fields):
    """A copy of PEFT's folder with other fields in its config."""
    folder = tmp_path / "edited"
    shutil.copytree(PEFT, folder)
    (folder / CONFIG).write_text(json.dumps(fields_of(folder) | fields))
    return folder


def test_a_folder_of_peft_gives_its_outputs():
    with np.load(PEFT / "model.npz") as file:
        ref = dict(file)
    params = {"conv": {"kernel": ref["conv.weight"].transpose(2, 3, 1, 0)}}
    for i in range(2):
        params[f"block_{i}"] = {name: {"kernel": ref[f"blocks.{i}.{name}.weight"].T} for name in ("up", "down")}
    lora, config = load_lora(PEFT, params, NAMES)
    scales = lora_scales(lora, config)
    assert (scales["conv/kernel"], scales["block_1/up/kernel"], scales["block_0/down/kernel"]) == (2.0, 3.0, 3.0)
    assert config.dropout == 0.1
    merged = lora_merge(params, lora, scales)
    x = ref["x"].transpose(0, 2, 3, 1)
    conv = jax.lax.conv_general_dilated(
        x, merged["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    h = conv.mean((1, 2)) + ref["conv.bias"][None]
    for i in range(2):
        up, down = (merged[f"block_{i}"][name]["kernel"] for name in ("up", "down"))
        narrow = jax.nn.relu(h @ up + ref[f"blocks.{i}.up.bias"][None])
        h = h + narrow @ down + ref[f"blocks.{i}.down.bias"][None]
    np.testing.assert_allclose(h, ref["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rslora", [False, True])
def test_round_trip(tmp_path, dtype, rslora):
    rules = (LoraRule("down/kernel", 2, 3.0), LoraRule("block_0/up/kernel", 4, 8.0), LoraRule("kernel", 3, 0.7))
    config = LoraConfig(rules, dropout=0.1, rslora=rslora, dtype=dtype)
    lora = adapters(PARAMS, config)
    save_lora(tmp_path / "a", lora, config, NAMES, base_model="some/base", task_type="CAUSAL_LM")
    again, read = load_lora(tmp_path / "a", PARAMS, NAMES, dtype=dtype)
    assert_same(dict(sorted(again.items())), dict(sorted(lora.items())))
    assert (read.rslora, read.dropout, read.dtype) == (rslora, 0.1, dtype)
    want = lora_scales(lora, config)
    assert lora_scales(again, read) == pytest.approx(want, rel=1e-9)
    fields = fields_of(tmp_path / "a")
    assert (fields["base_model_name_or_path"], fields["task_type"]) == ("some/base", "CAUSAL_LM")
    assert fields["target_modules"] == sorted(NAMES.values())
    assert (fields["r"], fields["lora_alpha"]) == (2, 3)
    assert fields["rank_pattern"] == {"^conv": 3, r"^blocks\.0\.up": 4, r"^blocks\.1\.up": 3}
    assert fields["alpha_pattern"] == {"^conv": 0.7, r"^blocks\.0\.up": 8, r"^blocks\.1\.up": 0.7}
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [CONFIG, TENSORS]


def test_stacks_are_written_layer_by_layer(tmp_path):
    config = LoraConfig((LoraRule("(up|down)/kernel", 2), LoraRule("conv", 3)))
    lora = adapters(STACKED, config)
    save_lora(tmp_path / "a", lora, config, stacked_names)
    again, _ = load_lora(tmp_path / "a", STACKED, stacked_names)
    assert_same(again, {path: lora[path] for path in again})
    assert len(again) == len(lora) == 3
    # An unrolled model reads the same folder, and a table does as well as a function.
    flat, _ = load_lora(tmp_path / "a", PARAMS, NAMES)
    np.testing.assert_array_equal(flat["block_1/up/kernel"]["a"], lora["blocks/up/kernel"]["a"][1])
    table = {"conv/kernel": "conv"} | {f"blocks/{n}/kernel": (f"blocks.0.{n}", f"blocks.1.{n}") for n in ("up", "down")}
    save_lora(tmp_path / "b", lora, config, table)
    assert (tmp_path / "b" / TENSORS).read_bytes() == (tmp_path / "a" / TENSORS).read_bytes()


def test_scales_stand_in_for_a_config_and_equinox_kernels_for_flax_ones(tmp_path):
    config = LoraConfig(LoraRule("weight", 2))
    params = {"up": {"weight": np.zeros((10, 6), "f"), "bias": np.zeros(10)}}
    lora = adapters(params, config)
    assert lora["up/weight"]["a"].shape == (6, 2)
    save_lora(tmp_path / "a", lora, 1.0, {"up/weight": "up"})
    assert fields_of(tmp_path / "a")["lora_alpha"] == 2
    again, read = load_lora(tmp_path / "a", params, {"up/weight": "up"})
    assert_same(again, lora)
    assert lora_scales(again, read) == {"up/weight": 1.0}


def test_a_folder_is_replaced_whole(tmp_path, monkeypatch):
    config = LoraConfig(LoraRule("conv/kernel", 2))
    lora = adapters(PARAMS, config)
    save_lora(tmp_path / "a", lora, config, NAMES)
    monkeypatch.setattr("safetensors.numpy.save", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_lora(tmp_path / "a", lora, config, NAMES)
    assert [path.name for path in (tmp_path / "a").iterdir()] == [TENSORS]
    with pytest.raises(FileNotFoundError, match="interrupted"):
        load_lora(tmp_path / "a", PARAMS, NAMES)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("use_dora", True), ("bias", "all")),
        *(("init_lora_weights", "pissa_niter_4"), ("peft_type", "IA3"), ("trainable_token_indices", [1])),
    ],
)
def test_settings_that_are_not_supported(tmp_path, field, value):
    with pytest.raises(ValueError, match=f"{field}=.* only plain LoRA"):
        load_lora(edited(tmp_path, **{field: value}), PARAMS, NAMES)


def test_adapters_of_another_model(tmp_path):
    names = {path: name.replace("blocks", "layers") for path, name in NAMES.items()}
    with pytest.raises(ValueError, match=r"another model .* 4 of its 5 .*'blocks\.0\.down'.*mean 'layers\.0\.down'"):
        load_lora(PEFT, PARAMS, names)
    wide = PARAMS | {"conv": {"kernel": np.zeros((3, 3, 3, 7), "f")}}
    with pytest.raises(ValueError, match=r"conv has lora_A \(3, 3, 3, 3\) and lora_B \(6, 3, 1, 1\).* another size"):
        load_lora(PEFT, wide, NAMES)
    with pytest.raises(ValueError, match=r"the config's rank 5"):
        load_lora(edited(tmp_path, rank_pattern={"down": 5}), PARAMS, NAMES)


def test_layers_that_a_stack_cannot_hold(tmp_path):
    config = LoraConfig((LoraRule("block_0/up/kernel", 2),))
    save_lora(tmp_path / "a", adapters(PARAMS, config), config, NAMES)
    with pytest.raises(ValueError, match=r"adapts 1 of the 2 layers of blocks/up/kernel.* scan_layers=False"):
        load_lora(tmp_path / "a", STACKED, stacked_names)


def test_damaged_and_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"holds no {CONFIG}"):
        load_lora(tmp_path, PARAMS, NAMES)
    folder = edited(tmp_path)
    whole = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{TENSORS} is damaged"):
        load_lora(folder, PARAMS, NAMES)
    (folder / TENSORS).unlink()
    with pytest.raises(FileNotFoundError, match=f"{TENSORS} does not exist"):
        load_lora(folder, PARAMS, NAMES)
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="a pickle"):
        load_lora(folder, PARAMS, NAMES)
    for text, words in (("{", "is not JSON"), ("[]", "holds a list")):
        (folder / CONFIG).write_text(text)
        with pytest.raises(ValueError, match=words):
            load_lora(folder, PARAMS, NAMES)


def test_tensors_that_are_no_plain_adapter(tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = edited(tmp_path)
    tensors = load_file(folder / TENSORS)
    save_file(tensors | {"base_model.model.conv.lora_magnitude_vector": np.ones(1)}, folder / TENSORS)
    with pytest.raises(ValueError, match=r"1 tensors are not named .*magnitude"):
        load_lora(folder, PARAMS, NAMES)
    del tensors["base_model.model.conv.lora_B.weight"]
    save_file(tensors, folder / TENSORS)
    with pytest.raises(ValueError, match=r"1 modules have one of the two only \['conv'\]"):
        load_lora(folder, PARAMS, NAMES)
    with pytest.raises(ValueError, match="is no regular expression"):
        load_lora(edited(tmp_path / "b", rank_pattern={"(": 1}), PARAMS, NAMES)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({}, "'block_0/down/kernel' has no name. Add it"),
        (NAMES | {"conv/kernel": "blocks.0.up"}, "two kernels are named 'blocks.0.up'"),
        (NAMES | {"conv/kernel": ("conv",)}, "has no name"),
    ],
)
def test_bad_names(tmp_path, names, words):
    config = LoraConfig(LoraRule("kernel", 2))
    with pytest.raises(ValueError, match=words):
        save_lora(tmp_path / "a", adapters(PARAMS, config), config, names)
    assert not (tmp_path / "a").exists()


def test_kernels_and_folders_without_a_place(tmp_path):
    config = LoraConfig(LoraRule("kernel", 2, window=1))
    lora = adapters({"kernel": np.zeros((3, 4, 5))}, config)
    with pytest.raises(ValueError, match="two-dimensional convolutions"):
        save_lora(tmp_path / "a", lora, config, {"kernel": "conv"})
    with pytest.raises(FileNotFoundError, match="Create it first"):
        save_lora(tmp_path / "missing" / "a", lora, config, {"kernel": "conv"})


# A head beside the adapters.

HEADED = PARAMS | {"head": {"kernel": np.arange(12, dtype="f").reshape(6, 2), "bias": np.array([1.0, 2.0], "f")}}
HEAD_NAMES = NAMES | {"head/kernel": "classifier"}


def headed(tmp_path):
    config = LoraConfig(LoraRule("down/kernel", 2))
    lora = adapters(HEADED, config)
    head = {"head": HEADED["head"]}
    save_lora(tmp_path / "a", lora, config, HEAD_NAMES, task_type="SEQ_CLS", modules=head)
    return tmp_path / "a", lora


def test_a_classifiers_adapters_carry_its_head(tmp_path):
    folder, lora = headed(tmp_path)
    fields, tensors = fields_of(folder), load_file(folder / TENSORS)
    assert fields["modules_to_save"] == ["classifier"]
    np.testing.assert_array_equal(tensors["base_model.model.classifier.weight"], HEADED["head"]["kernel"].T)
    fresh = jax.tree.map(np.zeros_like, HEADED)
    with pytest.warns(UserWarning, match="also holds classifier, trained whole.*load_lora_modules"):
        again, _ = load_lora(folder, fresh, HEAD_NAMES)
    assert_same(again, lora)
    whole = load_lora_modules(folder, fresh, HEAD_NAMES)
    assert_same(whole["head"], HEADED["head"])
    assert whole["conv"]["kernel"] is fresh["conv"]["kernel"]


def test_folders_of_peft_with_a_head_are_read(tmp_path):
    folder, _ = headed(tmp_path)
    (folder / CONFIG).write_text(json.dumps(fields_of(folder) | {"modules_to_save": ["classifier", "score"]}))
    with pytest.warns(UserWarning, match="also holds classifier"):
        load_lora(folder, HEADED, HEAD_NAMES)
    (folder / CONFIG).write_text(json.dumps(fields_of(folder) | {"modules_to_save": None}))
    with pytest.raises(ValueError, match=r"2 tensors are not named .*classifier"):
        load_lora(folder, HEADED, HEAD_NAMES)


def test_a_head_that_would_be_lost_or_does_not_fit(tmp_path):
    config = LoraConfig(LoraRule("down/kernel", 2))
    for kind in ("SEQ_CLS", "TOKEN_CLS"):
        with pytest.raises(ValueError, match=f"task_type='{kind}' without modules: .* head would be lost"):
            save_lora(tmp_path / "b", adapters(HEADED, config), config, HEAD_NAMES, task_type=kind)
    with pytest.raises(ValueError, match=r"conv/kernel of shape .* no part of a dense layer"):
        save_lora(tmp_path / "b", adapters(HEADED, config), config, HEAD_NAMES, modules={"conv": HEADED["conv"]})
    with pytest.raises(ValueError, match="'head/kernel' of modules has no name"):
        save_lora(tmp_path / "b", adapters(HEADED, config), config, NAMES, modules={"head": HEADED["head"]})
    folder, _ = headed(tmp_path)
    wide = HEADED | {"head": {"kernel": np.zeros((6, 3), "f"), "bias": np.zeros(3, "f")}}
    with pytest.raises(ValueError, match=r"head/(bias|kernel) has shape .* the model has"):
        load_lora_modules(folder, wide, HEAD_NAMES)
    with pytest.raises(ValueError, match="'classifier' whole, which this model has not"):
        load_lora_modules(folder, HEADED, NAMES)
    with pytest.raises(ValueError, match=r"holds none of \['head'\], which modules_to_save"):
        load_lora(edited(tmp_path, modules_to_save=["head"]), PARAMS, NAMES)
    with pytest.raises(ValueError, match="holds adapters alone"):
        load_lora_modules(PEFT, PARAMS, NAMES)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_rslora", "false"),
        ("use_rslora", 1),
        ("r", "3"),
        ("r", 0),
        ("r", 3.5),
        ("lora_alpha", None),
        ("lora_alpha", "6"),
        ("lora_alpha", float("nan")),
        ("lora_dropout", 1.5),
        ("rank_pattern", ["down"]),
        ("rank_pattern", {"down": "2"}),
        ("alpha_pattern", {"up": -1}),
        ("modules_to_save", "classifier"),
        ("use_dora", 0.0),
        ("peft_type", ["LORA"]),
    ],
)
def test_settings_of_another_type_are_named(tmp_path, field, value):
    if value is None:  # absent and null are PEFT's default
        assert load_lora(edited(tmp_path, **{field: value}), PARAMS, NAMES)
        return
    with pytest.raises(ValueError, match=f"{CONFIG}: {field}="):
        load_lora(edited(tmp_path, **{field: value}), PARAMS, NAMES)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensor: (tensor * 1000).astype(np.int32), "holds int32, not floats"),
        (lambda tensor: np.full_like(tensor, np.nan), "holds NaN or infinity"),
        (lambda tensor: np.full_like(tensor, np.inf), "holds NaN or infinity"),
    ],
)
def test_adapters_of_integers_or_nan_are_refused(tmp_path, change, words):
    folder = edited(tmp_path)
    tensors = load_file(folder / TENSORS)
    first = next(iter(tensors))
    save_file(tensors | {first: change(tensors[first])}, folder / TENSORS)
    with pytest.raises(ValueError, match=f"{TENSORS}: the tensor '{first}' {words}"):
        load_lora(folder, PARAMS, NAMES)


def test_layers_of_several_axes_are_written_as_the_matrices_that_peft_knows(tmp_path):
    params = {
        "query": {"kernel": np.zeros((6, 2, 5), "f"), "bias": np.zeros((2, 5), "f")},
        "out": {"kernel": np.zeros((2, 5, 6), "f"), "bias": np.zeros(6, "f")},
        "table": {"embedding": np.zeros((7, 6), "f")},
    }
    names = {"query/kernel": "attention.query", "out/kernel": "attention.out", "table/embedding": "word"}
    config = LoraConfig(LoraRule("kernel$", 2))
    lora = adapters(params, config)
    save_lora(tmp_path / "a", lora, config, names)
    tensors = load_file(tmp_path / "a" / TENSORS)
    shapes = [tensors[f"base_model.model.attention.{name}.weight"].shape for name in ("query.lora_A", "query.lora_B")]
    assert shapes == [(2, 6), (10, 2)]
    assert_same(load_lora(tmp_path / "a", params, names)[0], lora)
    config = LoraConfig(LoraRule("embedding$", 2))
    with pytest.raises(ValueError, match="table/embedding is a table of embeddings"):
        save_lora(tmp_path / "b", adapters(params, config), config, names)
