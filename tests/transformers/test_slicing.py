"""Pruned models are smaller and compute what the gated ones do; their folders are read back."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core.cost import count_params
from effjax.models.bert import Bert, BertClassifier
from effjax.models.convert import read_tensors, save_weights
from effjax.models.decoder import Decoder, generate
from effjax.models.families import FAMILIES
from effjax.models.pretrained import load_pretrained, save_pretrained
from effjax.transformers.gated import gated_apply
from effjax.transformers.prune_spec import PruneSpec, prune_shape
from effjax.transformers.slicing import mask_params, slice_model, slice_pretrained

pytestmark = pytest.mark.promotes  # Flax mixes the dtypes of activations and statistics

IDS = np.random.default_rng(0).integers(3, 30, (2, 7)).astype(np.int32)
MASK = np.arange(7) < np.array([[7], [4]])
MODELS = {
    "bert": BertClassifier(Bert(30, 16, 3, 4, 24), classes=3),
    "scanned": BertClassifier(Bert(30, 16, 3, 4, 24, scan_layers=True), classes=3, pool="cls"),
    "llama": Decoder(30, 16, 3, 4, 24, max_positions=8, num_kv_heads=2, tie_embeddings=False),
    "opt": Decoder(30, 16, 3, 4, 24, max_positions=8, norm="layer", mlp="relu", positions="learned", use_bias=True),
}
# Blocks gone, blocks with nothing left but the output bias, parts, hard attention.
PLACES = {
    "attention": (0,),
    "mlp": (2,),
    "heads": ((1, 1), *((2, index) for index in range(4))),
    "groups": ((0, 0), (0, 2), *((1, index) for index in range(3))),
    "hard": (1,),
}


@functools.cache
def drawn(name):
    """Parameters drawn by NumPy, which has nothing to compile."""
    shapes = jax.eval_shape(MODELS[name].init, jax.random.key(0), IDS)["params"]
    draws = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: draws.normal(0.1, 0.3, leaf.shape).astype(np.float32), shapes)


def spec_of(name):
    shape = prune_shape(MODELS[name], group_size=8)
    places = {**PLACES, "heads": tuple(place for place in PLACES["heads"] if place[1] < shape.heads)}
    return PruneSpec(shape, **places, top_k=3)


def inputs_of(name):
    return {"input_ids": IDS, "mask": MASK}


NIGHTLY = pytest.mark.nightly


GRADIENTS = [pytest.param(name, True, marks=NIGHTLY) for name in MODELS]


@pytest.mark.parametrize(("name", "gradients"), [("bert", False), ("llama", False), *GRADIENTS])
def test_sliced_model_equals_the_gated_one_and_so_do_its_gradients(name, gradients):
    module, params, spec = MODELS[name], drawn(name), spec_of(name)
    small, sliced = slice_model(module, params, spec)
    apply, inputs = gated_apply(module, top_k=3), inputs_of(name)
    target = np.random.default_rng(2).normal(size=jax.eval_shape(small.apply, {"params": sliced}, **inputs).shape)
    target = np.where(MASK[..., None], target, 0).astype(np.float32) if target.ndim == 3 else target.astype(np.float32)
    # By day only the values, as programs of gradients are slow to compile.
    grad = functools.partial(jax.grad, has_aux=True) if gradients else lambda loss: loss

    @jax.jit
    def both(params, sliced):
        loss = lambda outputs: ((outputs * target).sum(), outputs)
        gated = grad(lambda params: loss(apply(params, inputs, spec.gates())))(params)
        return gated, grad(lambda params: loss(small.apply({"params": params}, **inputs)))(sliced)

    (grads, outputs), (own_grads, own) = both(params, sliced)
    real = MASK if outputs.ndim == 3 else slice(None)
    np.testing.assert_allclose(own[real], outputs[real], atol=1e-5)
    if not gradients:
        return
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))
    expected = slice_model(module, grads, spec)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), own_grads, expected)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_removed_is_counted_by_closed_form(name):
    module, spec = MODELS[name], spec_of(name)
    shapes = jax.eval_shape(module.init, jax.random.key(0), IDS)["params"]
    sliced = slice_model(module, shapes, spec)[1]
    assert count_params(shapes) - count_params(sliced) == spec.removed_params
    small = slice_model(module, shapes, spec)[0]
    built = jax.eval_shape(small.init, jax.random.key(0), IDS)["params"]
    assert jax.tree.map(np.shape, built) == jax.tree.map(np.shape, sliced)
    shape = spec.shape
    if name == "bert":  # the method file's: head 4 D dh + 3 dh, group 2 D G + G, blocks 4 D D + 4 D and 2 D F + F + D
        assert [shape.params_of(kind) for kind in ("head", "group", "attention", "mlp")] == [268, 264, 1088, 808]
        assert PruneSpec(shape).kept_macs(7) == 1
        everything = PruneSpec(shape, attention=(0, 1, 2), mlp=(0, 1, 2))
        assert abs(everything.kept_macs(7)) < 1e-12


@pytest.mark.parametrize("name", ["scanned", pytest.param("opt", marks=NIGHTLY)])
def test_masked_weights_are_the_gated_model(name):
    module, params, spec = MODELS[name], drawn(name), dataclasses.replace(spec_of(name), hard=())
    gates = spec.gates()
    whole = jax.jit(lambda params, gates: module.apply({"params": mask_params(module, params, gates)}, IDS, MASK))
    small, sliced = slice_model(module, params, spec)
    own = jax.jit(lambda params: small.apply({"params": params}, IDS, MASK))(sliced)
    real = MASK if own.ndim == 3 else slice(None)
    np.testing.assert_allclose(whole(params, gates)[real], own[real], atol=1e-5)


def test_an_empty_spec_gives_the_bits_of_the_whole_model():
    module = MODELS["bert"].clone(encoder=MODELS["bert"].encoder.clone(num_layers=1))
    whole = drawn("bert")
    params = {**whole, "encoder": {part: value for part, value in whole["encoder"].items() if part[-1] not in "12"}}
    small, sliced = slice_model(module, params, PruneSpec(prune_shape(module, group_size=8)))
    jax.tree.map(np.testing.assert_array_equal, sliced, params)
    run = lambda module: jax.jit(module.apply)({"params": params}, IDS, MASK)
    np.testing.assert_array_equal(run(small), run(module))


@pytest.mark.nightly
def test_a_chain_of_adapters_trains_a_sliced_model():
    """COLA on what is left: adapters of the small shapes, a knot, and merged weights that slice as before."""
    from effjax.finetune import ColaConfig, LoraRule, cola_extend, cola_init, cola_merge

    module, params, spec = MODELS["bert"], drawn("bert"), spec_of("bert")
    small, sliced = slice_model(module, params, spec)
    config = ColaConfig(LoraRule("(query|value|up)/kernel", rank=2), knots=(1,))
    state = cola_init(jax.random.key(0), sliced, config)
    assert {path.split("/")[1] for path in state.lora} == {"layer_0", "layer_1"}  # of layer 2 nothing is left
    assert state.lora["encoder/layer_1/attention/query/kernel"]["b"].shape == (2, 12)  # three of four heads
    run = jax.jit(lambda params: small.apply({"params": params}, IDS, MASK))
    whole = run(sliced)
    np.testing.assert_array_equal(run(cola_merge(state, config)), whole)
    moved = state._replace(lora=jax.tree.map(lambda leaf: leaf + 0.1, state.lora))
    trained = run(cola_merge(moved, config))
    assert np.abs(trained - whole).max() > 1e-2
    tied = cola_extend(moved, config)
    assert int(tied.link) == 1
    np.testing.assert_allclose(run(cola_merge(tied, config)), trained, atol=1e-4)


def test_a_pruned_decoder_generates_from_its_cache():
    module, params, spec = MODELS["llama"], drawn("llama"), spec_of("llama")
    small, sliced = slice_model(module, params, spec)
    found = jax.jit(functools.partial(generate, small.apply, steps=2))(sliced, IDS[:, :4])
    forward = jax.jit(lambda ids: small.apply({"params": sliced}, ids))
    ids = np.concatenate([IDS[:, :4], np.zeros((2, 2), np.int32)], axis=1)
    for length in (4, 5):
        ids[:, length] = np.asarray(forward(ids))[:, length - 1].argmax(-1)
    np.testing.assert_array_equal(found, ids)


@pytest.mark.parametrize("source", ["bert", pytest.param("llama", marks=NIGHTLY)])
def test_a_folder_of_a_pruned_model_is_read_back(source, tmp_path):
    module = Bert(30, 16, 2, 4, 24, max_positions=8) if source == "bert" else None
    if source == "llama":
        whole = load_pretrained("stories260k")
        spec = PruneSpec(prune_shape(whole.module, group_size=43), attention=(4,), mlp=(1,), heads=((0, 1),), hard=(2,))
    else:
        config = {
            "model_type": "bert",
            **{
                "vocab_size": 30,
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 24,
            },
            **{"max_position_embeddings": 8, "type_vocab_size": 2},
        }
        origin = tmp_path / "origin"
        origin.mkdir()
        (origin / "config.json").write_text(json.dumps(config))
        _write_bert(origin, module)
        whole = load_pretrained(origin, classes=3, pool="cls")
        spec = PruneSpec(prune_shape(whole.module, group_size=8), attention=(0,), heads=((1, 1),), groups=((0, 2),))
    small = slice_pretrained(whole, spec)
    save_pretrained(tmp_path / "small", small)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["model_type"] == f"pruned_{source}"
    assert len(config["pruned_layers"]) == spec.shape.layers
    again = load_pretrained(tmp_path / "small", **({"classes": 3, "pool": "cls"} if source == "bert" else {}))
    assert again.module == small.module
    assert not again.initialised
    jax.tree.map(np.testing.assert_array_equal, again.params, small.params)
    held = read_tensors(tmp_path / "small" / "model.safetensors")
    assert sum(tensor.size for tensor in held.values()) == count_params(whole.params) - spec.removed_params
    for wrong, message in (
        ({"model_type": source}, "belong together"),
        ({"pruned_layers": None}, "belong together"),
        ({"pruned_layers": config["pruned_layers"][:1]}, "layer_shapes hold 1 layers"),
        ({"pruned_layers": [{"heads": 1}] * spec.shape.layers}, "must be an object with heads"),
        ({"pruned_layers": [{**layer, "top_k": 1.5} for layer in config["pruned_layers"]]}, "top_k=1.5"),
    ):
        (tmp_path / "small" / "config.json").write_text(json.dumps({**config, **wrong}))
        with pytest.raises(ValueError, match=message):
            load_pretrained(tmp_path / "small")
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="scan_layers=True needs layers of one shape"):
        load_pretrained(tmp_path / "small", scan_layers=True)


def _write_bert(folder, module):
    shapes = jax.eval_shape(module.init, jax.random.key(0), IDS)["params"]
    draws = np.random.default_rng(3)
    params = jax.tree.map(lambda leaf: draws.normal(size=leaf.shape).astype(np.float32), shapes)
    rules = [rule for rule in FAMILIES["bert"].rules("bert.", {}) if rule.target is not None]
    save_weights(folder / "model.safetensors", params, rules)


def test_specs_of_other_models_are_refused():
    module, params = MODELS["bert"], drawn("bert")
    spec = spec_of("bert")
    wrong = [
        ({"layers": 4}, "layers=4, here 3"),
        ({"heads": 2, "head_width": 8, "kv_width": 8}, "heads=2, here 4"),
        ({"group_size": 7}, "group_size=7, here"),
        ({"group_size": 0}, "sizes that are not known"),
        ({"norm_first": True}, "norm_first=True, here False"),
    ]
    for change, message in wrong:
        other = PruneSpec(dataclasses.replace(spec.shape, **change))
        with pytest.raises(ValueError, match=message):
            slice_model(module, params, other)
    small, sliced = slice_model(module, params, spec)
    with pytest.raises(ValueError, match="pruned already"):
        slice_model(small, sliced, spec)
    with pytest.raises(TypeError, match="none of Bert"):
        prune_shape(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"group_size=5 must divide intermediate_size=24\. Near ones that do: 3, 4, 6"):
        prune_shape(module, group_size=5)


def test_specs_are_saved_as_json(tmp_path):
    spec = spec_of("bert")
    spec.save(tmp_path / "spec.json")
    assert PruneSpec.load(tmp_path / "spec.json") == spec
    assert hash(spec) == hash(PruneSpec.from_json(spec.to_json()))
    assert PruneSpec.of_gates(spec.gates(), spec.shape, top_k=3) == spec
    text = spec.to_json()
    for damaged, message in (
        (text[:-9], "no JSON"),
        ("{}", "no prune spec"),
        (text.replace('"mlp"', '"mlpp"'), "damaged prune spec"),
        (text.replace('"layers": 3', '"layers": 1'), "must be"),
        (text.replace('"top_k": 3', '"top_k": 0'), "top_k=0"),
    ):
        (tmp_path / "spec.json").write_text(damaged)
        with pytest.raises(ValueError, match=f"spec.json: .*{message}"):
            PruneSpec.load(tmp_path / "spec.json")
    for places, message in (
        ({"mlp": (3,)}, "mlp: 3 must be a layer below 3"),
        ({"heads": ((0, 4),)}, r"heads: \(0, 4\) must be"),
        ({"groups": (1,)}, r"groups: 1 must be \(layer, group\)"),
        ({"attention": (1, 1)}, "names one element twice"),
    ):
        with pytest.raises(ValueError, match=message):
            PruneSpec(spec.shape, **places)
