"""Hugging Face folders in and out: parity with transformers, real checkpoints and their figures, damage."""

import functools
import json
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from effjax.core.folders import model_folder
from effjax.data.tokens import load_tokenizer
from effjax.models.attention import RopeScaling
from effjax.models.convert import module_name, read_tensors
from effjax.models.decoder import generate
from effjax.models.pretrained import load_pretrained, save_pretrained

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "transformers"
SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
HEADS = {"roberta": {"classes": 3, "pool": "cls"}, "electra": {"classes": 3, "pool": "cls"}}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}
HEADS["distilbert"] = HEADS["electra"]


@pytest.fixture
def bert(tmp_path):
    """A folder that a test may change."""
    return shutil.copytree(REFERENCE / "bert", tmp_path / "bert")


def rewrite(folder, change):
    """Replace the tensors of a folder by ``change(tensors)``."""
    path = folder / "model.safetensors"
    save_file({name: np.ascontiguousarray(t) for name, t in change(read_tensors(path)).items()}, path)


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize(
    "name",
    ["bert", "roberta", "electra", "opt", "llama", "distilbert", "gpt2", "mistral", "qwen2", "qwen3", "llama3"],
)
def test_outputs_are_those_of_transformers_and_files_survive(name, tmp_path):
    scan = name in ("bert", "llama", "gpt2", "mistral", "qwen3")
    model = load_pretrained(REFERENCE / name, scan_layers=scan, **HEADS.get(name, {}))
    data = np.load(REFERENCE / name / "expected.npz")
    inputs = [data[key] for key in ("input_ids", "mask", "token_type_ids") if key in data]
    output = jax.jit(model.module.apply)({"params": model.params}, *inputs)
    real = data["mask"] if output.ndim == 3 else slice(None)
    np.testing.assert_allclose(output[real], data["output"][real], atol=1e-5)
    assert model.initialised == ()

    save_pretrained(tmp_path, model, dtype=jnp.float16)
    written, origin = (read_tensors(folder / "model.safetensors") for folder in (tmp_path, model.folder))
    assert_equal(written, origin)
    assert json.loads((tmp_path / "config.json").read_text()) == model.config
    assert_equal(load_pretrained(tmp_path, scan_layers=scan, **HEADS.get(name, {})).params, model.params)


def test_layers_unrolled_and_stacked_hold_the_same_weights():
    whole, stacked = (load_pretrained(REFERENCE / "bert", scan_layers=scan) for scan in (False, True))
    layers = [whole.params[f"layer_{i}"] for i in range(2)]
    assert_equal(stacked.params["layers"], jax.tree.map(lambda *leaves: np.stack(leaves), *layers))
    assert_equal(stacked.params["embeddings"], whole.params["embeddings"])
    for model, path, layer in ((whole, "layer_1/mlp/up/kernel", None), (stacked, "layers/mlp/up/kernel", 1)):
        name = model.module_name(path, layer)
        assert name == "encoder.layer.1.intermediate.dense"
        assert module_name(path, model.rules, layer) == module_name(f"encoder/{path}", model.rules, layer) == name
        with pytest.raises(ValueError, match="layer="):
            module_name(path, model.rules, None if layer else 1)
        with pytest.raises(ValueError, match="no rule"):
            module_name("layer_1/mlp/side/kernel", model.rules)


def test_a_new_classifier_is_drawn_and_said_so(bert, caplog, tmp_path):
    model = load_pretrained(bert, classes=4, pool="cls")
    assert model.initialised == ("head/bias", "head/kernel")
    assert "has no head/bias, head/kernel: drawn at random" in caplog.text
    assert np.abs(model.params["head"]["kernel"]).max() > 0
    other = load_pretrained(bert, classes=4, pool="cls", key=jax.random.key(1)).params
    assert np.abs(other["head"]["kernel"] - model.params["head"]["kernel"]).max() > 0
    assert_equal(other["pooler"], model.params["pooler"])

    save_pretrained(tmp_path / "new", model)
    assert {"bert.pooler.dense.weight", "classifier.weight"} < set(read_tensors(tmp_path / "new/model.safetensors"))
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert len(config["id2label"]) == 4
    again = load_pretrained(tmp_path / "new", classes=4, pool="cls", dropout=0.0)
    assert again.initialised == ()
    assert again.module.encoder.dropout == 0.0
    assert_equal(again.params, model.params)
    encoder = load_pretrained(tmp_path / "new")
    assert_equal(encoder.params, model.params["encoder"])
    caplog.clear()
    fewer = load_pretrained(tmp_path / "new", classes=2, pool="cls")  # the encoder is kept, the head drawn anew
    assert "holds a head for 4 classes: a new one for 2" in caplog.text
    assert fewer.initialised == ("head/bias", "head/kernel")
    assert fewer.params["head"]["kernel"].shape == (16, 2)
    assert_equal(fewer.params["encoder"], model.params["encoder"])
    assert_equal(fewer.params["pooler"], model.params["pooler"])
    with pytest.raises(ValueError, match="encoders classify"):
        load_pretrained(REFERENCE / "opt", classes=2)


def test_names_of_older_and_other_files_are_read(bert):
    expected = load_pretrained(bert).params
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def rename(name):
        return "bert." + functools.reduce(lambda text, pair: text.replace(*pair), old.items(), name)

    extra = {"bert.embeddings.position_ids": np.arange(16), "cls.predictions.decoder.weight": np.ones((40, 16))}
    rewrite(bert, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()} | extra)
    assert_equal(load_pretrained(bert).params, expected)


def test_shards(bert):
    expected = load_pretrained(bert).params
    tensors = read_tensors(bert / "model.safetensors")
    names = sorted(tensors)
    places = {name: f"model-0000{1 + (i > 9)}-of-00002.safetensors" for i, name in enumerate(names)}
    for place in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == place}, bert / place)
    (bert / "model.safetensors").unlink()
    index = bert / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert_equal(load_pretrained(bert).params, expected)
    (bert / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names model-00002-of-00002.safetensors, which is not beside it"):
        load_pretrained(bert)
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(ValueError, match="outside its folder"):
        load_pretrained(bert)
    index.write_text("[]")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        load_pretrained(bert)


def test_missing_and_unexpected_tensors_stand_in_one_message(bert):
    def change(tensors):
        del tensors["encoder.layer.1.output.dense.weight"]
        layer_9 = {"encoder.layer.9.output.dense.weight": np.zeros((16, 24), np.float32)}
        return {**tensors, **layer_9, "adapter.down": np.zeros(3, np.float32)}

    rewrite(bert, change)
    for scan in (False, True):
        with pytest.raises(ValueError, match=r"model\.safetensors does not hold the weights") as error:
            load_pretrained(bert, scan_layers=scan)
        message = str(error.value)
        path = "layers" if scan else "layer_1"
        assert f"missing: encoder.layer.1.output.dense.weight -> {path}/mlp/down/kernel" in message
        assert "unexpected: adapter.down, encoder.layer.9.output.dense.weight" in message


def test_damaged_folders(bert):
    weights = bert / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"bert/model\.safetensors is damaged"):
        load_pretrained(bert)
    shutil.copy(REFERENCE / "bert" / "model.safetensors", weights)
    for changes, message in (
        ({"position_embedding_type": "relative_key"}, "'relative_key' of 'bert' is not supported, only 'absolute'"),
        ({"model_type": "t5"}, "model_type='t5' is not one of bert, distilbert, electra"),
        ({"model_type": "llama", "dim": 16}, "lacks 'n_layers'"),
    ):
        configure(bert, **changes)
        with pytest.raises(ValueError, match=message):
            load_pretrained(bert)
    (bert / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json is no model's config\.json"):
        load_pretrained(bert)
    (bert / "config.json").unlink()
    with pytest.raises(FileNotFoundError):
        load_pretrained(bert)


def test_scaled_rotary_positions_are_refused(tmp_path):
    folder = shutil.copytree(REFERENCE / "llama", tmp_path / "llama")
    for rope, words in (
        ({"rope_type": "yarn", "factor": 8.0}, "type 'yarn' are not supported, only default, linear and llama3"),
        ({"rope_type": "llama3", "factor": 8.0}, "type 'llama3' lack 'low_freq_factor'"),
        ({"type": "linear", "factor": "8"}, "factor='8' of the rotary positions must be above 0"),
        (LLAMA3 | {"low_freq_factor": 4}, "low_freq_factor=4 must be below high_freq_factor=4"),
    ):
        configure(folder, rope_parameters=rope)
        with pytest.raises(ValueError, match=words):
            load_pretrained(folder)
    for rope, scaling in (
        ({"type": "linear", "factor": 2.0}, RopeScaling(2.0)),
        (LLAMA3, RopeScaling(8.0, 1, 4, 16)),  # the positions of the config, where nothing else is said
    ):
        configure(folder, rope_parameters=rope)
        assert load_pretrained(folder).module.rope_scaling == scaling


def test_slower_rotary_positions_by_hand():
    turn = lambda *turns: 2 * np.pi * np.array(turns, np.float32) / 64  # frequencies of so many turns in 64 positions
    found = jax.jit(RopeScaling(8.0, 1.0, 4.0, 64).slowed)(turn(8.0, 4.0, 2.5, 1.0, 0.1))
    np.testing.assert_allclose(found, turn(8.0, 4.0, 2.5 * (0.5 + 0.5 / 8), 1.0 / 8, 0.1 / 8), rtol=1e-6)


def test_parameters_of_another_model_or_dtype(tmp_path):
    model = load_pretrained(REFERENCE / "bert", param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    save_pretrained(tmp_path, model)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    adapted = {**model.params, "lora_a": np.zeros(3)}
    with pytest.raises(ValueError, match=r"params: lora_a are not as in the model.*adapters merged"):
        save_pretrained(tmp_path, model, adapted)


def test_names_that_are_nowhere(monkeypatch):
    monkeypatch.delenv("EFFJAX_MODELS", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'effjax\[minilm\]'"):
        load_pretrained("minilm")
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'stories260k'.*set EFFJAX_MODELS"):
        load_pretrained("storys260k")


STORY = (
    "Once upon a time, there was a little dog named Max. Max loved to play in the park with his friend Lily. One day, "
    'they saw a big red ball. Lily said, "Let\'s play with the ball!" Max was very happy. They played all day and then '
    "went home."
)


def test_stories_model_tells_and_knows_stories():
    model, tokenizer = load_pretrained("stories260k", scan_layers=True), load_tokenizer("stories260k")
    start = "Once upon a time, there was a little girl named Lily."
    ids = tokenizer.encode([start], max_length=64).input_ids[0][None]
    told = tokenizer.decode(jax.jit(generate, static_argnums=(0, 3))(model.module.apply, model.params, ids, 45)[0])
    assert told.startswith(f"{start} She loved to play outside in the park. One day, she saw a big, red ball. ")

    words = STORY.split()
    random.Random(0).shuffle(words)
    tokens = tokenizer.encode([STORY, " ".join(words)], max_length=128).input_ids
    batch, real = tokens.pad([0, 1], 96), np.arange(1, 96) < tokens.lengths[:, None]
    logits = jax.jit(model.module.apply)({"params": model.params}, batch)[:, :-1]
    costs = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch[:, 1:, None], -1)[..., 0]
    told, shuffled = (costs * real).sum(1) / real.sum(1)
    assert 0.8 < told < 1.4
    assert shuffled > 4


@pytest.fixture(scope="module")
def minilm():
    """Texts -> unit vectors, the mean over tokens of the last layer."""
    try:
        model_folder("minilm", "model.safetensors")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    model, tokenizer = load_pretrained("minilm", scan_layers=True), load_tokenizer("minilm")

    @jax.jit
    def mean(ids, mask):
        hidden = model.module.apply({"params": model.params}, ids, mask)
        vectors = (hidden * mask[..., None]).sum(1) / mask.sum(1)[:, None]
        return vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)

    def embed(texts, batch=64):
        tokens = tokenizer.encode(texts, max_length=128).input_ids
        order = np.argsort(-tokens.lengths, kind="stable")
        out = np.zeros((len(texts), 384), np.float32)
        for begin in range(0, len(texts), batch):
            rows = np.resize(order[begin : begin + batch], min(batch, len(texts)))
            length = int(-(-tokens.lengths[rows].max() // 16) * 16)
            out[rows] = mean(tokens.pad(rows, length), np.arange(length) < tokens.lengths[rows, None])
        return out

    return model, embed


@pytest.mark.everywhere  # only there are the weights installed
def test_minilm_sentence_vectors(minilm, tmp_path):
    model, embed = minilm
    guitar, plays, market = embed(
        ["A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell sharply today."]
    )
    np.testing.assert_allclose([guitar @ plays, guitar @ market], [0.67, -0.05], atol=0.006)
    save_pretrained(tmp_path, model)
    written, origin = (read_tensors(folder / "model.safetensors") for folder in (tmp_path, model.folder))
    assert_equal(written, {name: tensor for name, tensor in origin.items() if not name.endswith("position_ids")})
    assert (tmp_path / "tokenizer.json").read_bytes() == (model.folder / "tokenizer.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("split", "spearman"), [("validation", 0.867), ("test", 0.820)])
def test_minilm_ranks_sentence_pairs(minilm, split, spearman):
    from scipy.stats import spearmanr

    from effjax.data.sets import load

    if not (SHARED / "data").is_dir():
        pytest.skip("needs ../shared/data/glue/stsb")
    rows = load("glue/stsb", root=SHARED / "data").splits[split]
    left, right = (minilm[1](rows[column]) for column in ("sentence1", "sentence2"))
    assert spearmanr((left * right).sum(1), rows["score"]).statistic == pytest.approx(spearman, abs=0.001)


def logits(folder, **fields):
    model = load_pretrained(folder, **fields)
    return np.asarray(model.module.apply({"params": model.params}, jnp.array([[1, 5, 7, 3]])))


@pytest.fixture
def llama(tmp_path):
    """A folder that a test may change, its output layer untied."""
    folder = shutil.copytree(REFERENCE / "llama", tmp_path / "llama")
    tensors = read_tensors(folder / "model.safetensors")
    head = np.random.default_rng(0).normal(size=tensors["model.embed_tokens.weight"].shape).astype(np.float32)
    rewrite(folder, lambda tensors: {**tensors, "lm_head.weight": head})
    configure(folder, tie_word_embeddings=False)
    return folder


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_an_output_layer_of_its_own_counts_whatever_the_config_says(name, tmp_path, caplog):
    folder = shutil.copytree(REFERENCE / name, tmp_path / name)
    tensors = read_tensors(folder / "model.safetensors")
    table = next(tensor for key, tensor in tensors.items() if key.endswith("embed_tokens.weight"))
    rewrite(folder, lambda tensors: {**tensors, "lm_head.weight": table[::-1]})
    configure(folder, tie_word_embeddings=False)
    right = logits(folder)
    configure(folder, tie_word_embeddings=True)
    np.testing.assert_array_equal(logits(folder), right)
    assert "a lm_head.weight of its own" in caplog.text
    save_pretrained(tmp_path / "again", load_pretrained(folder))  # and is saved as such
    np.testing.assert_array_equal(logits(tmp_path / "again"), right)
    caplog.clear()
    rewrite(folder, lambda tensors: {**tensors, "lm_head.weight": table})  # a copy of the table
    configure(folder, tie_word_embeddings=None if name == "opt" else True)
    assert not caplog.text
    assert "head" not in load_pretrained(folder).params
    rewrite(folder, lambda tensors: {**tensors, "lm_head.weight": np.concatenate([table, table])})
    assert "head" not in load_pretrained(folder).params
    assert "cannot be the output" in caplog.text


def test_the_index_says_where_a_tensor_is_read(bert):
    expected = load_pretrained(bert).params
    tensors = read_tensors(bert / "model.safetensors")
    (bert / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {name: f"model-0000{1 + (i > 9)}-of-00002.safetensors" for i, name in enumerate(names)}
    first, second = ({n: t for n, t in tensors.items() if places[n] == p} for p in sorted(set(places.values())))
    stale = {name: np.zeros_like(tensor) for name, tensor in first.items()}
    save_file(first, bert / "model-00001-of-00002.safetensors")
    save_file(second | stale, bert / "model-00002-of-00002.safetensors")
    index = bert / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert_equal(load_pretrained(bert).params, expected)
    index.write_text(json.dumps({"weight_map": {n: p for n, p in places.items() if n != names[0]}}))
    with pytest.raises(ValueError, match=f"{names[0]}' in two files"):
        load_pretrained(bert)
    index.write_text(json.dumps({"weight_map": places | {names[-1]: "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ValueError, match="which does not hold them"):
        load_pretrained(bert)
    index.write_text(json.dumps({"weight_map": places | {names[0]: "m" * 300}}))
    with pytest.raises(ValueError, match="outside its folder"):
        load_pretrained(bert)
    for text in ("[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}', "[" * 100_000):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"model.safetensors.index.json is (damaged|not JSON)"):
            load_pretrained(bert)


def test_prefixes_of_wrappers_carry_no_meaning(llama):
    right, tensors = logits(llama), read_tensors(llama / "model.safetensors")
    for rename in (
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.language_model.{name}",
        lambda name: name.replace("layers.0", "layers.0._orig_mod"),
    ):
        rewrite(llama, lambda _, rename=rename: {rename(name): tensor for name, tensor in tensors.items()})
        np.testing.assert_array_equal(logits(llama), right)
    rewrite(llama, lambda _: tensors | {"_orig_mod.model.norm.weight": tensors["model.norm.weight"]})
    with pytest.raises(ValueError, match="one tensor under several names"):
        load_pretrained(llama)


def test_null_means_the_default(llama, bert):
    right = logits(llama)
    for field in ("head_dim", "attention_bias", "mlp_bias", "rope_scaling", "attention_dropout"):
        configure(llama, **{field: None})
    np.testing.assert_array_equal(logits(llama), right)
    configure(bert, layer_norm_eps=1e-12, hidden_dropout_prob=0.1)
    expected = load_pretrained(bert)
    configure(bert, layer_norm_eps=None, hidden_dropout_prob=None)
    assert load_pretrained(bert).module == expected.module


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", "2"),
        ("num_hidden_layers", 10**6),
        ("num_hidden_layers", 10**30),
        ("hidden_size", 16.5),
        ("hidden_size", [16]),
        ("num_attention_heads", 3),
        ("num_attention_heads", 0),
        ("vocab_size", True),
        ("layer_norm_eps", "1e-5"),
        ("hidden_dropout_prob", 1.5),
        ("hidden_act", 7),
        ("hidden_act", "swoosh"),
        ("pad_token_id", "0"),
        ("id2label", 3),
        ("quantization_config", {"quant_method": "fp8"}),
        ("model_type", ["bert"]),
    ],
)
def test_settings_of_another_type_name_file_and_field(bert, field, value):
    configure(bert, **{field: value})
    with pytest.raises(ValueError, match=r"config\.json") as error:
        load_pretrained(bert)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"model_type": null}'])
def test_a_config_that_is_none(bert, content):
    (bert / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is .*Fetch it again"):
        load_pretrained(bert)
    (bert / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_pretrained(bert)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_tensors_of_eight_bits_are_read(llama, dtype, tmp_path):
    tensors = read_tensors(llama / "model.safetensors")
    narrow = {name: tensor.astype(dtype) if "proj" in name else tensor for name, tensor in tensors.items()}
    rewrite(llama, lambda _: {name: tensor.astype(np.float32) for name, tensor in narrow.items()})
    right = logits(llama)
    rewrite(llama, lambda _: narrow)
    np.testing.assert_array_equal(logits(llama), right)
    save_pretrained(tmp_path / "own", load_pretrained(llama), dtype=dtype)
    assert np.isfinite(logits(tmp_path / "own")).all()
    rewrite(llama, lambda _: narrow | {"model.layers.0.mlp.up_proj.weight_scale": np.ones(1, np.float32)})
    with pytest.raises(ValueError, match=r"unexpected: model.layers.0.mlp.up_proj.weight_scale"):
        load_pretrained(llama)


def test_weights_that_are_not_finite_are_refused(bert):
    def spoil(tensors):
        tensor = tensors["pooler.dense.bias"] if "pooler.dense.bias" in tensors else next(iter(tensors.values()))
        name = next(name for name in tensors if name.endswith("query.bias"))
        return tensors | {name: np.full_like(tensors[name], np.nan), "pooler.dense.bias": tensor}

    rewrite(bert, spoil)
    with pytest.raises(ValueError, match=r"query.bias -> .*: holds NaN or infinity"):
        load_pretrained(bert)


def test_a_larger_vocabulary_adds_rows(llama, bert, tmp_path):
    model, more = load_pretrained(llama), load_pretrained(llama, vocab_size=99)
    old, new = (tree.params["embeddings"]["word"]["embedding"] for tree in (model, more))
    np.testing.assert_array_equal(new[: len(old)], old)
    np.testing.assert_allclose(
        new[len(old) :], np.broadcast_to(old.mean(0), new[len(old) :].shape), rtol=1e-3, atol=2e-5
    )
    assert more.params["head"]["kernel"].shape[1] == 99 == more.config["vocab_size"]
    np.testing.assert_allclose(logits(llama, vocab_size=99)[..., : len(old)], logits(llama), rtol=1e-5, atol=1e-6)
    save_pretrained(tmp_path / "more", more)
    assert_equal(load_pretrained(tmp_path / "more").params, more.params)
    assert load_pretrained(bert, vocab_size=64).module.vocab_size == 64
    with pytest.raises(ValueError, match=r"vocab_size=3: .* none can be left out"):
        load_pretrained(llama, vocab_size=3)


@pytest.mark.parametrize(
    ("names", "way"),
    [
        (["pytorch_model.bin"], "Pickled weights are never read"),
        (["model-00001-of-00002.safetensors"], "fetch model.safetensors.index.json"),
        (["model.fp16.safetensors"], "Rename its weights"),
        ([], "fetch the whole folder"),
    ],
)
def test_a_folder_without_the_file_says_what_it_holds(bert, names, way):
    (bert / "model.safetensors").unlink()
    for name in names:
        (bert / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=f"It holds .*config.json.*{way}") as error:
        load_pretrained(bert)
    assert all(name in str(error.value) for name in names)
    (bert / "vocab.txt").write_text("a")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json. It holds .*vocab.txt. Make tokenizer.json"):
        load_tokenizer(bert)
    with pytest.raises(FileNotFoundError, match=r"is a file. Give its folder"):
        load_pretrained(bert / "config.json")
