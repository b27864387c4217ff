"""Checkpoints as people have them: settings left out, wrapped names, more tokens, modules by name, advice."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from safetensors.numpy import save_file

from effjax.finetune.lora import lora_init
from effjax.finetune.lora_config import LoraConfig, LoraRule
from effjax.models.convert import Rule, export_weights, import_weights, read_tensors
from effjax.models.decoder import Decoder
from effjax.models.mesh_rules import mesh_shardings
from effjax.models.pretrained import grow_vocabulary, is_decoder, load_pretrained, save_pretrained
from effjax.transformers.prune_spec import PruneSpec, prune_shape
from effjax.transformers.slicing import slice_pretrained

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "transformers"
DECODERS = ("opt", "llama", "gpt2", "mistral", "qwen2", "qwen3", "llama3")


@pytest.fixture
def copy(tmp_path):
    """A function that copies a folder, which a test may change: its tensors and its config by functions."""

    def copied(name, tensors=lambda tensors: tensors, **config):
        folder = shutil.copytree(REFERENCE / name, tmp_path / name, dirs_exist_ok=True)
        path = folder / "model.safetensors"
        changed = tensors(read_tensors(REFERENCE / name / "model.safetensors"))
        save_file({key: np.ascontiguousarray(tensor) for key, tensor in changed.items()}, path)
        settings = json.loads((REFERENCE / name / "config.json").read_text()) | config
        (folder / "config.json").write_text(
            json.dumps({key: value for key, value in settings.items() if value != "left out"})
        )
        return folder

    return copied


def assert_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def leave_out(*names):
    return dict.fromkeys(names, "left out")


def test_what_a_config_leaves_out_is_the_familys_own(copy):
    bert = load_pretrained(REFERENCE / "bert").module
    names = ("layer_norm_eps", "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "type_vocab_size")
    assert load_pretrained(copy("bert", **leave_out(*names, "pad_token_id"))).module == bert
    assert load_pretrained(copy("gpt2", **leave_out("activation_function"))).module.mlp == "gelu_new"


def test_null_of_a_count_has_its_own_meaning(copy):
    module = load_pretrained(copy("mistral", sliding_window=None)).module
    assert module.sliding_window is None  # and not 4096, the default
    assert load_pretrained(copy("mistral", **leave_out("sliding_window"))).module.sliding_window == 4096
    # As many heads of keys as of queries.
    with pytest.raises(ValueError, match=r"k_proj.* but the model has \(16, 32\)"):
        load_pretrained(copy("mistral", num_key_value_heads=None))


@pytest.mark.parametrize(
    ("name", "rename"),
    [
        ("bert", lambda name: f"model.bert.{name}"),
        ("bert", lambda name: f"net.encoder.{name}"),
        ("distilbert", lambda name: f"model.{name}"),
        ("llama", lambda name: f"model.{name}"),
        ("qwen2", lambda name: name.removeprefix("model.")),
    ],
)
def test_prefixes_of_modules_around_the_model(copy, name, rename, tmp_path):
    right = load_pretrained(REFERENCE / name)
    folder = copy(name, lambda tensors: {rename(key): tensor for key, tensor in tensors.items()})
    found = load_pretrained(folder)
    assert_equal(found.params, right.params)
    save_pretrained(tmp_path / "plain", found)  # the pooler that the module lacks is carried over
    assert_equal(load_pretrained(tmp_path / "plain").params, right.params)
    both = lambda tensors: {**tensors, **{f"net.{key}": tensor for key, tensor in tensors.items()}}
    with pytest.raises(ValueError, match="unexpected: net"):
        load_pretrained(copy(name, both))


@pytest.mark.parametrize("name", DECODERS)
def test_every_family_has_its_targets_and_layouts(name):
    model = load_pretrained(REFERENCE / name)
    assert is_decoder(REFERENCE / name)
    wanted = {"query", "value"} | ({"key"} if name == "gpt2" else set())
    lora = lora_init(jax.random.key(0), model.params, LoraConfig(LoraRule(model.target_kernels(), rank=2)))
    assert lora.keys() == {f"layer_{i}/attention/{part}/kernel" for i in range(2) for part in wanted}
    assert {path.split("/")[-2] for path in lora if "query" in path or "value" in path} == {"query", "value"}
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    places = mesh_shardings(model.params, "fsdp+tensor", mesh)["layer_1"]
    axes = lambda *path: tuple(jax.tree.reduce(lambda found, key: found[key], path, places).spec)
    assert axes("attention", "query", "kernel") == axes("mlp", "up", "kernel") == ("data", "model")
    assert axes("attention", "output", "kernel") == axes("mlp", "down", "kernel") == ("model", "data")
    if name in ("gpt2", "qwen2"):
        assert axes("attention", "value", "bias") == ("model",)


def test_modules_by_name():
    model = load_pretrained(REFERENCE / "distilbert", classes=3, pool="cls")
    assert not is_decoder(REFERENCE / "distilbert")
    pattern = model.target_kernels("out_lin", "ffn.lin1")
    assert pattern == r"^(encoder/layer_\d+/attention/output|encoder/layer_\d+/mlp/up)/kernel$"
    stacked = load_pretrained(REFERENCE / "gpt2", scan_layers=True)
    assert stacked.target_kernels("mlp.c_proj") == "^(layers/mlp/down)/kernel$"
    assert stacked.module_name("layers/attention/value/kernel", 1) == "transformer.h.1.attn.c_attn[2/3]"
    with pytest.raises(ValueError, match=r"no module ends with 'q_lim'. Did you mean 'q_lin'"):
        model.target_kernels("q_lim")


def test_layers_side_by_side_in_one_tensor():
    whole = np.arange(24, dtype=np.float32).reshape(2, 12)
    rules = tuple(Rule("qkv.weight", f"{name}/kernel", part=(i, 3)) for i, name in enumerate("qkv"))
    target = {name: {"kernel": jax.ShapeDtypeStruct((2, 4), jnp.float32)} for name in "vqk"}
    found = import_weights({"qkv.weight": whole}, target, rules)
    assert found["k"]["kernel"].tolist() == whole[:, 4:8].tolist()
    assert_equal(export_weights(found, rules), {"qkv.weight": whole})
    with pytest.raises(ValueError, match=r"qkv.weight lack a part"):
        export_weights({"q": found["q"]}, rules)
    with pytest.raises(ValueError, match=r"qkv.weight -> q/kernel: .* is not 3 layers side by side"):
        import_weights({"qkv.weight": whole[:, :11]}, target, rules)


def test_a_pruned_model_of_layers_side_by_side_is_saved_and_read(tmp_path):
    model = load_pretrained(REFERENCE / "gpt2")
    spec = PruneSpec(prune_shape(model.module, group_size=8), heads=((0, 1),), groups=((1, 0),))
    small = slice_pretrained(model, spec)
    save_pretrained(tmp_path, small)
    assert read_tensors(tmp_path / "model.safetensors")["transformer.h.0.attn.c_attn.weight"].shape == (16, 36)
    again = load_pretrained(tmp_path)
    assert again.module == small.module
    assert_equal(again.params, small.params)


def test_tokens_beyond_the_table_are_refused_and_a_table_grows(caplog):
    model = load_pretrained(REFERENCE / "llama")
    ids = np.array([[1, 41]], np.int32)
    with pytest.raises(ValueError, match=r"input_ids run from 1 to 41, but the table has rows for 0 to 39.*=42"):
        model.module.apply({"params": model.params}, ids)
    with pytest.raises(ValueError, match=r"input_ids run from -1 to 39"):
        model.module.apply({"params": model.params}, ids - 40 + 38)
    larger, params = grow_vocabulary(model, 42), model.params
    assert (larger.module.vocab_size, larger.config["vocab_size"]) == (42, 42)
    table, head = larger.params["embeddings"]["word"]["embedding"], larger.params["head"]["kernel"]
    np.testing.assert_array_equal(table[:40], params["embeddings"]["word"]["embedding"])
    np.testing.assert_allclose(table[40:], np.tile(np.asarray(table[:40]).mean(0), (2, 1)), atol=1e-6)
    np.testing.assert_allclose(head[:, 41], np.asarray(params["head"]["kernel"]).mean(1), atol=1e-6)
    assert larger.params["layer_0"]["mlp"]["up"]["kernel"] is params["layer_0"]["mlp"]["up"]["kernel"]
    with pytest.raises(ValueError, match=r"vocab_size=39 .*none can go"):
        grow_vocabulary(model, 39)
    encoder = grow_vocabulary(load_pretrained(REFERENCE / "bert", classes=2), 41)
    assert encoder.params["encoder"]["embeddings"]["word"]["embedding"].shape == (41, 16)
    assert encoder.module.encoder.vocab_size == 41
    assert encoder.params["head"]["kernel"].shape == (16, 2)


def test_a_model_without_types_takes_none():
    model = load_pretrained(REFERENCE / "distilbert")
    ids = np.ones((1, 2), np.int32)
    with pytest.raises(ValueError, match="type_vocab_size=0"):
        jax.eval_shape(lambda: model.module.apply({"params": model.params}, ids, None, ids))


def test_windows_that_differ_between_layers():
    with pytest.raises(ValueError, match=r"full_layers=\(0,\) have no sliding window"):
        load_pretrained(REFERENCE / "qwen2", scan_layers=True)
    module = load_pretrained(REFERENCE / "qwen2").module
    assert (module.sliding_window, module.full_layers) == (3, (0,))
    with pytest.raises(ValueError, match="sliding_window=0"):
        Decoder(9, 8, 1, 1, 8, 8, sliding_window=0).init(jax.random.key(0), np.ones((1, 2), np.int32))


def test_layer_types(copy):
    both = ["sliding_attention", "sliding_attention"]
    module = load_pretrained(copy("qwen2", layer_types=both), scan_layers=True).module
    assert (module.sliding_window, module.full_layers) == (3, ())
    assert load_pretrained(copy("qwen2", use_sliding_window=False)).module.sliding_window is None
    for kinds in (["sliding_attention"], ["chunked_attention"] * 2, [3, 4]):
        with pytest.raises(ValueError, match="must name full_attention or sliding_attention for each of the 2 layers"):
            load_pretrained(copy("qwen2", layer_types=kinds))


def without_head(tensors):
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


@pytest.mark.parametrize(
    ("name", "change", "config", "advice"),
    [
        ("llama", lambda t: t, {"vocab_size": 50}, "Its table has 40 rows, and config.json says vocab_size=50"),
        ("llama", without_head, {}, "If its output layer is tied to the embeddings, set tie_word_embeddings to true"),
        ("llama", lambda t: {f"a{i}": x for i, x in enumerate(t.values())}, {}, "have other names than those of"),
        ("llama", lambda t: t | {"model.norm.weight": np.ones(3, "f")}, {}, "are not of one model, or a part is lost"),
        (
            "gpt2",
            lambda t: t | {"h.0.attn.c_attn.lora_A.weight": np.ones(3, "f")},
            {},
            "merge them in PEFT",
        ),
        ("llama", lambda t: t | {"model.norm.weight_scale": np.ones(1, "f")}, {}, "Dequantise the model"),
    ],
)
def test_advice_fits_the_case(copy, name, change, config, advice):
    with pytest.raises(ValueError, match="does not hold the weights") as error:
        load_pretrained(copy(name, change, **config))
    assert advice in str(error.value)
