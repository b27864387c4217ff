"""How backbones, adapters and states lie on a mesh of eight devices, and that what is learned does not depend on it."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from effjax.core.partition import by_rows, spread
from effjax.core.tree import leaf_paths
from effjax.finetune.lora import LoraConfig, LoraRule, lora_init
from effjax.models import Bert, BertClassifier, Bottleneck, Decoder, NodeClassifier, ResNet, ViT
from effjax.tasks.adapted import lora_task
from effjax.tasks.language import lm_task
from effjax.train.loop import Prepared, fit
from effjax.train.mesh import shard, shardings
from effjax.train.options import MeshOptions, TrainOptions
from effjax.train.trainer import supervised

KEY = jax.random.key(0)
IDS = jax.ShapeDtypeStruct((8, 4), jnp.int32)
SIZES = {
    "vocab_size": 32,
    "hidden_size": 8,
    "num_layers": 2,
    "num_heads": 4,
    "intermediate_size": 16,
    "max_positions": 8,
}
IMAGES = jax.ShapeDtypeStruct((8, 8, 8, 3), jnp.float32)


def mesh_of(data=4, model=2):
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def specs(tree, rules, mesh=None):
    found = shardings(tree, rules, mesh or mesh_of())
    return {name: tuple(leaf.spec) for name, leaf in zip(leaf_paths(tree), jax.tree.leaves(found), strict=True)}


def expect(found, **patterns):
    """Names end in the pattern's words; every leaf that no pattern names is replicated."""
    wanted = {name.replace("__", "/"): spec for name, spec in patterns.items()}
    for name, spec in found.items():
        match = next((wanted[end] for end in wanted if name.endswith(end)), ())
        assert spec == match, name


def test_a_scanned_decoder_by_layout():
    params = jax.eval_shape(Decoder(**SIZES, scan_layers=True).init, KEY, IDS)["params"]
    out, into = (None, None, "model"), (None, "model", None)
    names = {"query__kernel": out, "key__kernel": out, "value__kernel": out, "up__kernel": out, "gate__kernel": out}
    rows = {"output__kernel": into, "down__kernel": into, "word__embedding": ("model", None)}
    expect(specs(params, "tensor"), **names, **rows)
    out, into = (None, "data", "model"), (None, "model", "data")
    names = dict.fromkeys(names, out)
    expect(specs(params, "fsdp+tensor"), **names, output__kernel=into, down__kernel=into, word__embedding=into[1:])
    found = specs(params, "fsdp")
    assert found["layers/mlp/up/kernel"] == (None, None, "data")
    assert found["layers/mlp/down/kernel"] == (None, "data", None)
    assert found["norm/scale"] == ()
    assert set(specs(params, "data").values()) == {()}


def test_the_other_backbones_under_tensor():
    bert = jax.eval_shape(BertClassifier(Bert(**SIZES), 2).init, KEY, IDS)["params"]
    found = specs(bert, "tensor")
    assert found["encoder/layer_1/attention/query/bias"] == ("model",)
    assert found["encoder/layer_1/mlp/down/kernel"] == ("model", None)
    assert found["encoder/layer_1/mlp/down/bias"] == found["encoder/layer_1/mlp/norm/scale"] == ()
    vit = ViT(classes=4, patch=4, grid=(2, 2), hidden_size=8, num_layers=1, num_heads=4)
    found = specs(jax.eval_shape(vit.init, KEY, IMAGES)["params"], "tensor")
    assert found["layer_0/attention/value/kernel"] == (None, "model")
    assert found["patch_kernel"] == ()
    resnet = jax.eval_shape(ResNet(stages=(1, 1), widths=(4, 8)).init, KEY, IMAGES)
    out, into = (None, None, None, "model"), (None, None, "model", None)
    expect(specs(resnet, "tensor"), block0__conv1__kernel=out, block0__conv2__kernel=into)
    resnet = jax.eval_shape(ResNet(stages=(1,), widths=(8,), block=Bottleneck).init, KEY, IMAGES)
    expect(specs(resnet, "tensor"), block0__conv2__kernel=out, block0__conv3__kernel=into)
    gnn = {f"conv_{index}": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)} for index in (0, 1)}
    expect(specs(gnn, "tensor"), conv_0__kernel=(None, "model"), conv_1__kernel=("model", None))
    assert NodeClassifier.__dataclass_fields__["depth"].default == 2


def test_adapters_and_moments_follow_the_kernels():
    params = jax.eval_shape(Decoder(**SIZES).init, KEY, IDS)["params"]
    config = LoraConfig(LoraRule(r"attention/(query|output)/kernel", 2))
    lora = jax.eval_shape(lambda key, params: lora_init(key, params, config), KEY, params)
    moments = jax.eval_shape(optax.adam(1e-3).init, lora)
    for tree in (lora, moments[0].mu, moments[0].nu):
        found = specs(tree, "tensor")
        assert found["layer_0/attention/query/kernel/a"] == found["layer_0/attention/output/kernel/b"] == ()
        assert found["layer_0/attention/query/kernel/b"] == (None, "model")
        assert found["layer_0/attention/output/kernel/a"] == ("model", None)
    # Of a rank that does not divide, a stack of narrow adapters is left to every device of ``data``.
    split, large = (None, None, "model"), AbstractMesh((16, 4), ("data", "model"))
    assert spread("layers/query/kernel/b", (32, 8, 4096), split, large, "data") == split
    with pytest.raises(ValueError, match="no free axis is a multiple of the 16 devices"):
        spread("query/kernel/b", (72, 4096), split[1:], large, "data")
    factored = jax.eval_shape(optax.adafactor(1e-3, min_dim_size_to_factor=4).init, params)
    assert {spec for name, spec in specs(factored, "fsdp+tensor").items() if "/v_row/" in f"/{name}"} == {()}


def step_of(model, tx):
    def step(params, opt, ids):
        def loss(params):
            logits = model.apply({"params": params}, ids)
            return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    return jax.jit(step)


@pytest.mark.parametrize(
    "layout", ["fsdp+tensor", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("data", "fsdp", "tensor"))]
)
def test_a_loop_of_ones_own_learns_what_one_device_learns(layout):
    model, tx = Decoder(**{**SIZES, "num_layers": 1}), optax.adam(1e-2)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 32, (8, 4), np.int32)
    shapes = jax.eval_shape(model.init, KEY, IDS)["params"]
    start = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes)
    step, mesh, losses = step_of(model, tx), mesh_of(), []
    rows = NamedSharding(mesh, PartitionSpec("data"))
    for params, batch in ((start, ids), (shard(start, layout, mesh), jax.device_put(ids, rows))):
        opt = jax.jit(tx.init)(params)
        with jax.set_mesh(mesh) if losses else contextlib.nullcontext():
            for _ in range(2):
                params, opt, loss = step(params, opt, batch)
        losses.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    kernel = params["layer_0"]["mlp"]["up"]["kernel"]
    parts = {"data": 1, "fsdp": 4, "tensor": 2, "fsdp+tensor": 8}[layout]
    assert kernel.addressable_shards[0].data.size == kernel.size // parts


def test_kernels_are_gathered_and_not_activations():
    """At these sizes XLA would gather activations of all 24 rows if nothing kept them apart."""
    wide = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_layers": 1}
    model, mesh = Decoder(**{**SIZES, **wide}), mesh_of(8, 1)
    shapes = jax.eval_shape(model.init, KEY, IDS)["params"]
    placed = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    params = jax.tree.map(placed, shapes, shardings(shapes, "fsdp", mesh))
    ids = jax.ShapeDtypeStruct((24, 4), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    with jax.set_mesh(mesh):
        text = step_of(model, optax.sgd(1.0)).lower(params, optax.sgd(1.0).init(None), ids).compile().as_text()
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", text)
    assert {"64,64", "64,128", "128,64"} <= set(gathered)
    assert not re.search(r"f32\[24,[\d,]*\]", text)


def test_the_mesh_is_current_where_a_layout_splits_parameters():
    import toy

    seen = []

    def traced(state, batch, aux):
        seen.append(jax.sharding.get_abstract_mesh().axis_names)
        return {**state, "n": state["n"] + 1}, {"loss": by_rows(batch["x"]).sum()}

    for rules, names in (("data", ()), ("fsdp", ("data", "model", "expert"))):
        options = TrainOptions(mesh=MeshOptions(data=8, rules=rules))
        program = toy.toy(1)
        state = lambda key: {"params": {"w": jnp.zeros((8, 8))}, "n": jnp.int32(0)}
        program = program._replace(
            init=state, phases=(program.phases[0]._replace(step=traced),), params=lambda state: state["params"]
        )
        result = fit(program, 0, options=options)
        assert set(seen) == {names}
        seen.clear()
    assert result.state["params"]["w"].addressable_shards[0].data.shape == (1, 8)


@pytest.mark.nightly
@pytest.mark.parametrize("rules", ["fsdp", "tensor", "fsdp+tensor"])
def test_adapters_of_a_pretrained_decoder_learn_what_they_learn_on_one_device(rules):
    losses = []
    for mesh in (MeshOptions(), MeshOptions(data=2, model=2, rules=rules)):
        options = TrainOptions(mesh=mesh)
        task = lora_task(lm_task(length=16, train_rows=16, test_rows=8), LoraConfig("(query|value)/kernel"))
        program = supervised(task, optax.adam(1e-2), steps=4, batch_size=8, options=options)
        result = fit(program, 0, options=options)
        losses.append(result.train["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    kernel = result.state.model["frozen"]["layer_0"]["mlp"]["up"]["kernel"]
    parts = {"fsdp": 2, "tensor": 2, "fsdp+tensor": 4}[rules]
    assert kernel.addressable_shards[0].data.size == kernel.size // parts


@pytest.mark.nightly
def test_a_run_goes_on_under_another_layout_and_on_fewer_devices(tmp_path):
    task = lora_task(lm_task(length=16, train_rows=16, test_rows=8), LoraConfig("(query|value)/kernel"))
    program = supervised(task, optax.adam(1e-2), steps=6, batch_size=8)
    whole = fit(program, 0)

    class Killed(BaseException): ...

    def kill(done):
        if done >= 4:
            raise Killed

    settings = {"checkpoint_steps": 2, "read_lag": 1}
    first = TrainOptions(mesh=MeshOptions(data=4, model=2, rules="fsdp+tensor"), **settings)
    with pytest.raises(Killed):
        fit(program, 0, options=first, directory=tmp_path, on_steps=kill)
    second = TrainOptions(mesh=MeshOptions(data=4, rules="fsdp"), **settings)
    found = fit(program, 0, options=second, directory=tmp_path)
    for left, right in zip(jax.tree.leaves(found.state.params), jax.tree.leaves(whole.state.params), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)
    assert found.train["loss"] == pytest.approx(whole.train["loss"], rel=1e-5)


def test_arrays_of_one_device_go_where_the_state_lies():
    """A base that was trained before, and what a method makes between two phases."""
    import toy

    base = jax.device_put(np.arange(16, dtype=np.float32).reshape(8, 2), jax.devices()[3])
    program = toy.toy(2)._replace(init=lambda key: {"params": {"w": base + 1}, "key": key})
    prepared = Prepared(program, TrainOptions(mesh=MeshOptions(data=8, rules="fsdp")))
    state = prepared.init(KEY)
    np.testing.assert_array_equal(state["params"]["w"], base + 1)
    made = prepared.in_place({"params": {"w": base}, "key": jax.random.key(1)})
    np.testing.assert_array_equal(made["params"]["w"], base)
    for found in (state, made):
        assert found["params"]["w"].addressable_shards[0].data.shape == (1, 2)
        assert found["key"].sharding.device_set == set(jax.devices())
    assert prepared.in_place(made)["params"]["w"] is made["params"]["w"]


def test_a_layout_by_its_name_in_a_config():
    import toy

    options = TrainOptions(mesh=MeshOptions(data=2, model=4, rules="tensor"))
    params = jax.eval_shape(Decoder(**SIZES).init, KEY, IDS)["params"]
    zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    program = toy.toy(4)._replace(init=lambda key: {"params": zeros(), "mu": zeros(), "count": jnp.int32(0)})
    abstract = Prepared(program, options).abstract
    for part in ("params", "mu"):
        kernel = abstract[part]["layer_0"]["mlp"]["up"]["kernel"]
        assert tuple(kernel.sharding.spec) == (None, "model")
    assert tuple(abstract["count"].sharding.spec) == ()


@pytest.mark.parametrize(
    ("tree", "rules", "words"),
    [
        ({"a": np.ones(3)}, "tensor", "knows none of the 1 leaves, which begin with .'a'.*Use 'data' or 'fsdp'"),
        ({"kernel": np.ones((4, 4))}, (("kernal", ("data",)),), r"'kernal' matches none of the 1 leaves.*kernel"),
        ({"kernel": np.ones((6, 5))}, (("kernel", ("data",)),), r"'kernel' of shape \(6, 5\) has 6 rows .* 4 devices"),
        ({"kernel": np.ones((6, 5))}, (("kernel", ("rows",)),), "axis 'rows'; the mesh has data, model"),
        ({"mlp": {"up": {"kernel": np.ones((4, 5))}}}, "tensor", r"'mlp/up/kernel' of shape \(4, 5\) has 5 rows"),
        ({"kernel": np.ones((333, 333))}, "fsdp", r"no free axis is a multiple of the 4 devices of 'data'"),
        ({"a": np.ones(3)}, "fdsp", "rules='fdsp'"),
    ],
)
def test_bad_rules(tree, rules, words):
    with pytest.raises(ValueError, match=words):
        shardings(tree, rules, mesh_of())


def test_explicit_axes_are_refused_with_a_call_that_works():
    tree = {"kernel": np.ones((8, 8))}
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match=r"jax.set_mesh.*jax\.make_mesh\(\(8,\), \('data',\), axis_types="):
        shardings(tree, "fsdp", explicit)
    with pytest.raises(ValueError, match="needs the axis 'model'; the mesh has data"):
        shardings(tree, "tensor", jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)))


@pytest.mark.parametrize(
    ("fields", "words"), [({"rules": "fsdp"}, "mesh.data, which is 1"), ({"rules": "x"}, "mesh.rules='x'")]
)
def test_a_layout_that_would_do_nothing_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        MeshOptions(**fields)
