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
from effjax.models.convert import module_name, read_tensors
from effjax.models.decoder import generate
from effjax.models.pretrained import load_pretrained, save_pretrained

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "transformers"
SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
HEADS = {"roberta": {"classes": 3, "pool": "cls"}, "electra": {"classes": 3, "pool": "cls"}}


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


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "opt", "llama"])
def test_outputs_are_those_of_transformers_and_files_survive(name, tmp_path):
    scan = name in ("bert", "llama")
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
    with pytest.raises(ValueError, match=r"classifier.weight -> head/kernel: shape \(16, 4\).* has \(16, 2\)"):
        load_pretrained(tmp_path / "new", classes=2)
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
        ({"model_type": "t5"}, "model_type='t5' is not one of bert, electra"),
        ({"model_type": "llama", "hidden_act": "silu"}, "lacks 'rms_norm_eps'"),
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
    configure(folder, rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0})
    with pytest.raises(ValueError, match="scaled rotary positions"):
        load_pretrained(folder)


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
