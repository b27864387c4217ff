"""Parts trained whole beside adapters, layers side by side in one module, folders saved by hand, links on a mesh."""

import functools
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from effjax.finetune.chain import cola_init, cola_merge, cola_next, cola_value_and_grad
from effjax.finetune.chain_config import ColaConfig
from effjax.finetune.chain_links import cola_export, cola_links
from effjax.finetune.lora import lora_init, lora_merge, lora_params, lora_scales
from effjax.finetune.lora_config import LoraConfig, LoraRule
from effjax.finetune.lora_files import load_lora, load_lora_modules, save_lora
from effjax.finetune.lora_linen import lora_apply
from effjax.finetune.restart import link_schedule
from effjax.finetune.rivals import plora_next, rac_lora
from effjax.train.checkpoint import Checkpoints

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def drawn(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), tree)


def assert_same(left, right, **close):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), **close), left, right)


# A head beside the adapters.


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(nn.tanh(nn.Dense(8, name="up")(x)))


X = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
PARAMS = drawn(jax.eval_shape(Network().init, jax.random.key(0), X)["params"])
LORA = LoraConfig(LoraRule("up/kernel", rank=2), whole="^head/")
NAMES = {"up/kernel": "up", "head/kernel": "classifier"}


def loss(params, x):
    return jnp.mean((lora_apply(Network().apply)({"params": params}, x) - 1.0) ** 2)


def numpy_network(params, x):
    up, head = params["up"], params["head"]
    hidden = np.tanh(x @ np.asarray(up["kernel"]) + np.asarray(up["bias"])[None])
    return hidden @ np.asarray(head["kernel"]) + np.asarray(head["bias"])[None]


@pytest.fixture(scope="module")
def trained():
    """A chain of two links whose head is trained all along, and its heads before and after the knot."""
    config = ColaConfig(LORA, knots=(2,), keep_links=True)
    tx, knot = optax.adam(0.05), None
    state = cola_init(jax.random.key(0), PARAMS, config)
    start = jax.tree.map(np.asarray, state.base)
    knot, opt_state = cola_next(tx, config), jax.jit(tx.init)(state.lora)

    @jax.jit
    def step(state, opt_state):
        value, grads = cola_value_and_grad(loss, config)(state, X)
        updates, opt_state = tx.update(grads, opt_state, state.lora)
        return state._replace(lora=optax.apply_updates(state.lora, updates)), opt_state, value

    heads, values = [], []
    for t in range(4):
        if t == 2:
            heads.append(np.asarray(state.lora["head/kernel"]["whole"]))
            state, opt_state = knot(state, opt_state)
            heads.append(np.asarray(state.lora["head/kernel"]["whole"]))
        state, opt_state, value = step(state, opt_state)
        values.append(float(value))
    return config, state, start, heads, values


def test_a_head_is_trained_beside_a_chain_and_no_knot_moves_it(trained):
    config, state, start, heads, values = trained
    assert values == sorted(values, reverse=True)
    assert np.abs(heads[0] - start["head"]["kernel"]).max() > 0.01
    np.testing.assert_array_equal(heads[0], heads[1])
    assert_same(state.base["head"], start["head"])  # the base holds the first one still
    merged = cola_merge(state, config)
    np.testing.assert_array_equal(merged["head"]["kernel"], state.lora["head/kernel"]["whole"])
    np.testing.assert_array_equal(merged["up"]["bias"], start["up"]["bias"])
    export = cola_export(cola_links(state, config))
    assert export["up/kernel"]["a"].shape == (8, 4)
    with_export = lora_merge(start, export, 1.0)
    np.testing.assert_allclose(numpy_network(with_export, X), numpy_network(merged, X), atol=1e-5)
    assert not (set(lora_scales(state.lora, LORA)) & {"head/kernel", "head/bias"})


def test_its_folder_holds_the_head(trained, tmp_path):
    config, state, start, _, _ = trained
    export = cola_export(cola_links(state, config))
    save_lora(tmp_path / "a", export, 1.0, NAMES, task_type="SEQ_CLS")
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["modules_to_save"] == ["classifier"]
    again, read = load_lora(tmp_path / "a", start, NAMES, whole=True)
    assert_same(again, export)
    assert read.whole == ("^head/bias$", "^head/kernel$") or read.whole == ("^head/kernel$", "^head/bias$")
    assert lora_scales(again, read) == {"up/kernel": 1.0}
    assert_same(load_lora_modules(tmp_path / "a", start, NAMES)["head"], cola_merge(state, config)["head"])


def test_other_methods_leave_the_head_trained():
    lora = lora_init(jax.random.key(0), PARAMS, LORA)
    updates, _ = (tx := rac_lora(optax.sgd(1.0))).update(lora, tx.init(lora), lora)
    np.testing.assert_array_equal(updates["head/kernel"]["whole"], -np.asarray(PARAMS["head"]["kernel"]))
    assert not np.asarray(updates["up/kernel"]["a"]).any()
    config, tx = ColaConfig(LORA, knots=(1,)), optax.sgd(0.1)
    state = cola_init(jax.random.key(0), jax.tree.map(jnp.copy, PARAMS), config)
    momentum = {"up/kernel": jnp.zeros((8, 8))}
    state, *_ = plora_next(tx, config)(state, momentum, tx.init(state.lora))
    np.testing.assert_array_equal(state.lora["head/kernel"]["whole"], PARAMS["head"]["kernel"])


def test_what_cannot_be_trained_whole():
    init = functools.partial(lora_init, jax.random.key(0))
    with pytest.raises(ValueError, match=r"up/kernel has an adapter too"):
        init(PARAMS, LoraConfig("up/kernel", whole="kernel"))
    with pytest.raises(ValueError, match=r"whole: 'hat' matches none"):
        init(PARAMS, LoraConfig(LoraRule("up/kernel", 2), whole="hat"))
    with pytest.raises(ValueError, match=r"head/bias is int32; give arrays of floating numbers"):
        init(PARAMS | {"head": {"bias": np.zeros(2, np.int32)}}, LORA)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PARAMS)
    with pytest.raises(ValueError, match=r"head/bias has no values"):
        jax.eval_shape(lambda: init(shapes, LORA))
    lora = init(PARAMS, LORA)
    with pytest.raises(ValueError, match=r"head/kernel, trained whole, has shape \(8, 2\), but \(8, 3\) in params"):
        lora_params(PARAMS | {"head": {"kernel": np.zeros((8, 3)), "bias": np.zeros(2)}}, lora, 1.0)


# Norms and tables, stacked too.

BLOCKS = {
    "embeddings": {"embedding": np.zeros((5, 4), "f")},
    "layers": {"norm": {"scale": np.zeros((2, 4), "f"), "bias": np.zeros((2, 4), "f")}}
    | {"up": {"kernel": np.zeros((2, 4, 6), "f")}},
}


def block_names(path, layer):
    if path == "embeddings/embedding":
        return "embed"
    return None if layer is None else f"layers.{layer}.{path.split('/')[1]}"


def test_norms_and_tables_are_saved_whole(tmp_path):
    params = drawn(BLOCKS)
    config = LoraConfig(LoraRule("up/kernel", 2), whole=("norm", "^embeddings"))
    lora = lora_init(jax.random.key(0), params, config)
    save_lora(tmp_path / "a", lora, config, block_names)
    tensors = load_file(tmp_path / "a" / TENSORS)
    np.testing.assert_array_equal(tensors["base_model.model.layers.1.norm.bias"], params["layers"]["norm"]["bias"][1])
    np.testing.assert_array_equal(tensors["base_model.model.embed.weight"], params["embeddings"]["embedding"])
    again, _ = load_lora(tmp_path / "a", BLOCKS, block_names, whole=True)
    assert_same(dict(sorted(again.items())), dict(sorted(lora.items())))
    lame = {name: tensor for name, tensor in tensors.items() if "layers.1.norm" not in name}
    save_file(lame, tmp_path / "a" / TENSORS)
    with pytest.raises(ValueError, match=r"holds 1 of the 2 layers of layers/norm/.* whole"):
        load_lora(tmp_path / "a", BLOCKS, block_names, whole=True)


# Query, key and value in one module.

FUSED = {name: {"kernel": np.zeros((6, 4), "f")} for name in ("query", "key", "value")}
FUSED_NAMES = {f"{name}/kernel": f"attn[{i}/3]" for i, name in enumerate(FUSED)}


def delta(tensors, scale):
    a, b = (tensors[f"base_model.model.attn.lora_{factor}.weight"].astype(np.float64) for factor in "AB")
    return scale * (b @ a).T  # [in, 3 out]


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_of_parts_are_one_of_the_module(tmp_path, rslora):
    rules = (LoraRule("query/kernel", 2, 3.0), LoraRule("value/kernel", 1, 5.0))
    config = LoraConfig(rules, rslora=rslora)
    lora = drawn(lora_init(jax.random.key(0), FUSED, config))
    save_lora(tmp_path / "a", lora, config, FUSED_NAMES)
    fields = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert (fields["target_modules"], fields["r"]) == (["attn"], 3)
    scale = fields["lora_alpha"] / fields["r"] ** (0.5 if rslora else 1)
    whole = delta(load_file(tmp_path / "a" / TENSORS), scale)
    scales = lora_scales(lora, config)
    for i, name in enumerate(FUSED):
        own = lora.get(f"{name}/kernel", {"a": np.zeros((6, 1)), "b": np.zeros((1, 4))})
        right = scales.get(f"{name}/kernel", 0.0) * np.asarray(own["a"], float) @ np.asarray(own["b"], float)
        np.testing.assert_allclose(whole[:, 4 * i : 4 * i + 4], right, rtol=1e-5, atol=1e-6)
    again, read = load_lora(tmp_path / "a", FUSED, FUSED_NAMES)
    assert again.keys() == lora.keys()  # without an adapter of nothing for the key
    assert again["value/kernel"]["a"].shape == (6, 1)
    for path, s in lora_scales(again, read).items():
        own = (again[path]["a"] @ again[path]["b"]) * s
        np.testing.assert_allclose(own, (lora[path]["a"] @ lora[path]["b"]) * scales[path], rtol=1e-5, atol=1e-6)


def test_an_adapter_of_the_whole_module_has_one_a(tmp_path):
    config = LoraConfig(LoraRule("kernel", 2))
    a = np.random.default_rng(0).normal(size=(6, 2)).astype("f")
    lora = {
        path: drawn({"a": a, "b": np.zeros((2, 4), "f")}, i) | {"a": jnp.asarray(a)}
        for i, path in enumerate(FUSED_NAMES)
    }
    save_lora(tmp_path / "a", lora, config, FUSED_NAMES)
    assert load_file(tmp_path / "a" / TENSORS)["base_model.model.attn.lora_A.weight"].shape == (2, 6)
    again, _ = load_lora(tmp_path / "a", FUSED, FUSED_NAMES)
    assert_same(again, lora)
    fresh = {path: {"a": entry["a"], "b": jnp.zeros((2, 4))} for path, entry in lora.items()}
    save_lora(tmp_path / "a", fresh, config, FUSED_NAMES)
    assert_same(load_lora(tmp_path / "a", FUSED, FUSED_NAMES)[0], fresh)  # nothing is trained yet, all is kept
    with pytest.raises(ValueError, match=r"lora_B \(12, 2\), but .* \(15, 2\)"):
        load_lora(
            tmp_path / "a",
            {name: {"kernel": np.zeros((6, 5), "f")} for name in FUSED},
            FUSED_NAMES | {"value/kernel": "b"},
        )
    with pytest.raises(ValueError, match=r"'attn\[3/3\]' must be a part from 0 to 2"):
        save_lora(tmp_path / "b", lora, config, FUSED_NAMES | {"key/kernel": "attn[3/3]"})
    with pytest.raises(ValueError, match="lies beside others in 'attn'"):
        save_lora(tmp_path / "b", {}, 1.0, FUSED_NAMES, modules={"query": FUSED["query"]})


# Folders saved by hand.


@pytest.fixture
def by_hand(tmp_path):
    """A function that renames the tensors of a folder with adapters and a head."""
    config = LoraConfig(LoraRule("up/kernel", 2), whole="^head/")
    lora = drawn(lora_init(jax.random.key(0), PARAMS, config))
    save_lora(tmp_path / "a", lora, config, NAMES)

    def renamed(rename, more=(), **fields):
        path = tmp_path / "a" / TENSORS
        tensors = {rename(name): tensor for name, tensor in load_file(path).items()}
        save_file(tensors | dict.fromkeys(more, np.ones((1, 1), "f")), path)
        written = json.loads((tmp_path / "a" / CONFIG).read_text()) | fields
        (tmp_path / "a" / CONFIG).write_text(json.dumps(written))
        return tmp_path / "a"

    return renamed, lora


def default(name):
    name = re.sub(r"(lora_[AB])\.weight", r"\1.default.weight", name)
    return name.replace("classifier.", "classifier.modules_to_save.default.")


@pytest.mark.parametrize("bare", [False, True])
def test_a_state_dict_saved_by_hand_is_read(by_hand, bare):
    renamed, lora = by_hand
    short = (lambda name: default(name).removeprefix("base_model.model.")) if bare else default
    original = "base_model.model.classifier.original_module.weight"
    folder = renamed(short, [original], modules_to_save=None, fan_in_fan_out=True)
    again, _ = load_lora(folder, PARAMS, NAMES, whole=True)
    assert_same(again, lora)


def test_several_adapters_and_a_base_are_refused(by_hand):
    renamed, _ = by_hand
    names = [f"base_model.model.up.lora_{factor}.second.weight" for factor in "AB"]
    with pytest.raises(ValueError, match=r"several adapters, \['default', 'second'\]"):
        load_lora(renamed(default, names), PARAMS, NAMES)
    with pytest.raises(ValueError, match=r"1 tensors are not named .*up.base_layer.*keep the tensors with lora_"):
        load_lora(renamed(lambda name: name.replace("second", "default"), ["up.base_layer.weight"]), PARAMS, NAMES)


# Chains.


def test_a_schedule_for_each_link():
    rate = link_schedule([optax.constant_schedule(1.0), optax.linear_schedule(2.0, 0.0, 6)], (4,), 10)
    np.testing.assert_allclose([rate(t) for t in (0, 3, 4, 7, 10)], [1.0, 1.0, 2.0, 1.0, 0.0], atol=1e-6)
    falling = link_schedule(lambda length: optax.linear_schedule(1.0, 0.0, length), (4, 6), 16)
    np.testing.assert_allclose([falling(t) for t in (2, 5, 11)], [0.5, 0.5, 0.5], atol=1e-6)
    for knots in ((4, 4), (0,), (10,)):
        with pytest.raises(ValueError, match=r"must increase from 1 on and end below steps=10"):
            link_schedule(optax.constant_schedule, knots, 10)
    with pytest.raises(ValueError, match=r"schedules: 1 of them, but knots=\(4,\) make 2 links"):
        link_schedule([optax.constant_schedule(1.0)], (4,), 10)


@pytest.fixture
def on_a_mesh():
    """A chain whose base lies on eight devices, its config and the mesh."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    place = {"up": {"kernel": P("data", "model"), "bias": P("model")}, "head": {"kernel": P("data"), "bias": P()}}
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), place, is_leaf=lambda leaf: isinstance(leaf, P))
    config = ColaConfig(LORA, knots=(1,), keep_links=True)
    return cola_init(jax.random.key(0), jax.device_put(PARAMS, shardings), config), config, mesh


def test_a_chain_lies_where_its_base_lies(on_a_mesh):
    state, config, mesh = on_a_mesh
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(state))
    assert state.lora["up/kernel"]["b"].sharding.spec == P(None, "model")
    assert state.past["up/kernel"]["a"].sharding.spec == P("data", None)
    assert state.lora["head/kernel"]["whole"].sharding.spec == P("data")
    assert_same(state, cola_init(jax.random.key(0), PARAMS, config))


@pytest.mark.nightly
def test_it_is_restored_with_its_own_shardings(on_a_mesh, tmp_path):
    state, config, _ = on_a_mesh
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(1, state, {})
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    _, again, _ = checkpoints.restore(abstract)
    checkpoints.close()
    assert jax.tree.map(lambda leaf: leaf.sharding, again) == jax.tree.map(lambda leaf: leaf.sharding, state)
    # What it holds works together.
    value, grads = jax.jit(cola_value_and_grad(loss, config))(again, X)
    right = ((numpy_network(PARAMS, X) - 1.0) ** 2).mean()
    np.testing.assert_allclose(value, right, rtol=1e-5)
    assert np.abs(grads["head/kernel"]["whole"]).max() > 0
