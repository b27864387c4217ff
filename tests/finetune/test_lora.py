"""LoRA: parity, the invariants of an adapter, that nothing of the kernel's size is formed, devices, bad input."""

import dataclasses
import functools
import math
import re
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from effjax.finetune.lora import lora_init, lora_merge, lora_params, lora_scales, lora_shardings, scale_lora_b
from effjax.finetune.lora_config import LoraConfig, LoraRule
from effjax.finetune.lora_layers import lora_hooks, lora_kernels
from effjax.finetune.lora_linen import lora_apply

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "cola"
KEY, OTHER_KEY = (jax.random.key(seed, impl="rbg") for seed in (0, 1))  # quicker to compile than the default
X = jnp.asarray(np.random.default_rng(2).normal(size=(5, 8)), jnp.float32)
RULES = (LoraRule("up/kernel", rank=4, alpha=8.0), LoraRule("down/kernel", rank=2, alpha=3.0))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.gelu(nn.Dense(16, name="up")(x))
        return x + nn.Dense(8, name="down")(h), None


class Net(nn.Module):
    form: str = "loop"

    @nn.compact
    def __call__(self, x):
        if self.form == "loop":
            for i in range(2):
                x, _ = Block(name=f"layer_{i}")(x)
            return x
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True, "dropout": True}}
        if self.form == "vmap":
            return nn.vmap(Block, in_axes=None, axis_size=2, **axes)(name="layers")(x)[0].sum(0)
        block = nn.remat(Block) if self.form == "remat-scan" else Block
        return nn.scan(block, length=2, **axes)(name="layers")(x, None)[0]


def filled(shapes, seed=0, scale=0.3):
    """Random arrays for a tree of shapes, without compiling anything."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, scale, leaf.shape), leaf.dtype), shapes)


def start(module=None, rules=RULES, x=X, **config):
    """A module, its parameters, adapters whose b is not zero, and their scales."""
    module = module or Net()
    params = filled(jax.eval_shape(module.init, KEY, x)["params"])
    config = LoraConfig(rules, **config)
    lora = filled(jax.eval_shape(lambda: lora_init(KEY, params, config)), 1)
    return module, params, lora, lora_scales(lora, config)


@functools.partial(jax.jit, static_argnums=0)
def factored(module, params, lora, scales, x=X):
    return lora_apply(module.apply)({"params": lora_params(params, lora, scales)}, x)


@functools.partial(jax.jit, static_argnums=0)
def merged(module, params, lora, scales, x=X):
    return module.apply({"params": lora_merge(params, lora, scales)}, x)


def assert_close(left, right, rtol=2e-5, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), left, right)


@pytest.mark.parametrize("name", ["bias", "nobias"])
def test_linear_layer_equals_the_reference(name):
    with jax.enable_x64(True), np.load(REFERENCE / f"lora_linear_{name}.npz") as file:
        ref = {key: jnp.asarray(value) for key, value in file.items()}
        out, rank = ref["weight"].shape[0], int(ref["r"])
        params = {"kernel": ref["weight"].T, "bias": ref["bias"]}
        config = LoraConfig(LoraRule("kernel", rank, float(ref["alpha"])), dtype=jnp.float64)
        shapes = jax.eval_shape(lambda: lora_init(KEY, params, config))
        lora = {"kernel": {"a": ref["A"].T, "b": ref["B"].T}}
        assert jax.tree.map(jnp.shape, lora) == jax.tree.map(jnp.shape, shapes)
        scales = lora_scales(lora, config)
        assert scales["kernel"] == ref["scale"]
        layer = nn.Dense(out, param_dtype=jnp.float64)
        y, pull = jax.vjp(lambda lora, x: factored(layer, params, lora, scales, x), lora, ref["x"])
        assert_close(y, ref["y"], 1e-12, 1e-12)
        grads, grad_x = pull(ref["cotangent"])
        assert_close(grads, {"kernel": {"a": ref["grad_A"].T, "b": ref["grad_B"].T}}, 1e-12, 1e-12)
        assert_close(grad_x, ref["grad_x"], 1e-12, 1e-12)
        assert_close(lora_merge(params, lora, scales)["kernel"].T, ref["merged_weight"], 1e-12, 1e-12)
        assert_close(merged(layer, params, lora, scales, ref["x"]), ref["y_merged"], 1e-12, 1e-12)


@pytest.mark.parametrize("form", ["loop", "remat-scan", "vmap"])
def test_factored_equals_merged_in_value_and_gradient(form):
    module, params, lora, scales = start(Net(form))

    @jax.jit
    def run(lora):
        loss = lambda forward: lambda lora: (forward(module, params, lora, scales) ** 2).mean()
        return [jax.value_and_grad(loss(forward))(lora) for forward in (factored, merged)]

    (loss, grads), (want, want_grads) = run(lora)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max())
        assert (np.abs(b) > 0).all()
    if form != "loop":
        assert lora["layers/up/kernel"]["a"].shape == (2, 8, 4)


def test_new_adapters_change_nothing_and_move_b_first():
    module, params, _, scales = start()
    lora = lora_init(KEY, params, LoraConfig(RULES))
    base = jax.jit(lambda params: module.apply({"params": params}, X))(params)
    np.testing.assert_array_equal(factored(module, params, lora, scales), base)
    grads = jax.jit(jax.grad(lambda lora: (factored(module, params, lora, scales) ** 2).sum()))(lora)
    for adapter in grads.values():
        assert (adapter["a"] == 0).all()
        assert (adapter["b"] != 0).any()


def test_trainable_numbers_are_r_times_both_sides():
    _, _, lora, _ = start()
    assert sum(leaf.size for leaf in jax.tree.leaves(lora)) == 2 * (4 * (8 + 16) + 2 * (16 + 8))


def test_merge_touches_the_targets_only():
    _, params, lora, scales = start(rules=LoraRule("layer_1/up/kernel", 4))
    after = lora_merge(params, lora, scales)
    kept = jax.tree.map(lambda a, b: a is b, params, after)
    assert not kept["layer_1"]["up"].pop("kernel")
    assert all(jax.tree.leaves(kept))
    before = lora_params(params, lora, scales)
    assert before["layer_1"]["up"]["kernel"] is params["layer_1"]["up"]["kernel"]
    assert "lora_a" not in params["layer_1"]["up"]


def test_alpha_and_b_trade():
    module, params, lora, scales = start()
    halved = {path: {"a": ab["a"], "b": ab["b"] / 2} for path, ab in lora.items()}
    doubled = {path: 2 * scale for path, scale in scales.items()}
    np.testing.assert_array_equal(factored(module, params, lora, scales), factored(module, params, halved, doubled))
    traced = jax.jit(lambda scale: factored(module, params, lora, scale))(jnp.float32(1.5))
    assert_close(traced, merged(module, params, lora, 1.5))


def test_scales():
    config = LoraConfig(RULES, rslora=True)
    _, params, lora, scales = start()
    assert scales == {path: 2.0 if "up" in path else 1.5 for path in lora}
    assert lora_scales(lora, config)["layer_0/up/kernel"] == 8.0 / math.sqrt(4)
    assert lora_init(KEY, params, LoraConfig("up/kernel"))["layer_0/up/kernel"]["a"].shape == (8, 8)
    assert hash(config) == hash(dataclasses.replace(config, rules=list(RULES)))


@pytest.mark.parametrize(
    ("init", "width", "shape"),
    [
        ("peft", 1 / 16, (256, 64)),
        ("flax", math.sqrt(6) / 16, (256, 64)),
        ("peft", 1 / 16, (2, 2, 64, 32)),
        ("gaussian", math.sqrt(3) / 8, (256, 64)),
    ],
)
def test_initializers(init, width, shape):
    lora = lora_init(KEY, {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}, LoraConfig("kernel", init=init))
    a = np.asarray(lora["kernel"]["a"])
    assert a.shape == (*shape[:-1], 8)
    np.testing.assert_allclose(a.std(), width / math.sqrt(3), rtol=0.05)
    if init != "gaussian":
        np.testing.assert_allclose(np.abs(a).max(), width, rtol=0.02)


def test_initializer_of_your_own_sees_one_layer_at_a_time():
    shapes = []

    def init(key, shape, dtype):
        shapes.append(shape)
        return jax.random.normal(key, shape, dtype)

    params = {"kernel": jnp.zeros((3, 16, 8))}
    a = lora_init(KEY, params, LoraConfig(LoraRule("kernel", inputs=1), init=init, dtype=jnp.bfloat16))["kernel"]["a"]
    assert shapes == [(16, 8)]
    assert a.dtype == jnp.bfloat16
    assert (a[0] != a[1]).any()


def test_draws_do_not_depend_on_other_targets():
    params = start()[1]
    lora = lora_init(KEY, params, LoraConfig(RULES))
    alone = lora_init(KEY, params, LoraConfig(LoraRule("layer_1/up/kernel", 4)))
    np.testing.assert_array_equal(alone["layer_1/up/kernel"]["a"], lora["layer_1/up/kernel"]["a"])
    assert (lora["layer_0/up/kernel"]["a"] != lora["layer_1/up/kernel"]["a"]).any()


def test_bfloat16_base_and_adapters_keep_the_models_dtypes():
    module, params, lora, scales = start()
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    y = factored(module, base, lora, scales, X.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    want = merged(module, params, lora, scales)
    assert_close(y.astype(jnp.float32), want, 0.0, 0.03 * np.abs(want).max())
    assert lora_merge(base, lora, scales)["layer_0"]["up"]["kernel"].dtype == jnp.bfloat16
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), lora)
    assert factored(module, params, small, scales).dtype == jnp.float32
    assert lora_params(params, small, jnp.float32(2))["layer_0"]["up"]["lora_b"].dtype == jnp.bfloat16


def assert_lean(factored_form, merged_form, lora, x):
    """Equal values and gradients, fewer flops, and no product of the size of a kernel [96, 160]."""
    results, flops, products = [], [], []
    for forward in (factored_form, merged_form):
        step = jax.jit(jax.value_and_grad(lambda lora, x, forward=forward: (forward(lora, x) ** 2).mean()))
        traced = step.trace(lora, x)
        products.append(len(re.findall(r"f32\[(?:96,160|160,96)\] = dot_general", str(traced.jaxpr))))
        compiled = traced.lower().compile()
        flops.append(compiled.cost_analysis()["flops"])
        results.append(compiled(lora, x))
    for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())
    assert products[0] == 0
    assert products[1] == 4  # two layers, forward and backward: the check can fail
    assert flops[0] < 0.75 * flops[1]


BATCH = filled(jax.ShapeDtypeStruct((64, 96), jnp.float32))


def test_nothing_of_the_kernels_size_is_formed():
    module = nn.Sequential((nn.Dense(160), nn.Dense(96)))
    _, params, lora, scales = start(module, LoraRule("kernel$", 4), BATCH)
    forms = [lambda lora, x, form=form: form(module, params, lora, scales, x) for form in (factored, merged)]
    assert_lean(*forms, lora, BATCH)


@pytest.mark.parametrize(
    ("conv", "shape", "window"),
    [
        (nn.Conv(6, (3, 3), strides=2), (2, 2, 5, 5, 4), None),
        (nn.Conv(6, (3,), padding="CAUSAL", kernel_dilation=2, use_bias=False), (2, 9, 4), 1),
    ],
)
def test_convolutions(conv, shape, window):
    x = filled(jax.ShapeDtypeStruct(shape, jnp.float32))
    _, params, lora, scales = start(conv, LoraRule("kernel", 2, window=window), x)
    got, want, base = jax.jit(
        lambda x: (
            factored(conv, params, lora, scales, x),
            merged(conv, params, lora, scales, x),
            conv.apply({"params": params}, x),
        )
    )(x)
    assert_close(got, want)
    assert np.abs(got - base).max() > 0.1


def test_dropout_acts_on_the_adapters_input():
    module, size = nn.Dense(64, use_bias=False), 64
    params = {"kernel": jnp.zeros((size, size))}
    variables = {"params": lora_params(params, {"kernel": {"a": jnp.eye(size), "b": jnp.eye(size)}}, 1.0)}
    apply = lora_apply(module.apply, 0.25)
    run = jax.jit(lambda key: apply(variables, jnp.ones((50, size)), rngs={"dropout": key}))
    y = np.asarray(run(KEY))
    np.testing.assert_allclose(np.unique(y), [0.0, 1 / 0.75], rtol=1e-6)
    np.testing.assert_allclose((y == 0).mean(), 0.25, atol=0.03)
    np.testing.assert_array_equal(y, run(KEY))
    assert (y != run(OTHER_KEY)).any()
    with pytest.raises(ValueError, match=r"dropout=0\.25 needs a key"):
        apply(variables, jnp.ones((1, size)))


def test_dropout_reaches_scanned_layers():
    module, params, lora, scales = start(Net("scan"))
    variables = {"params": lora_params(params, lora, scales)}
    run = jax.jit(lambda key: lora_apply(module.apply, 0.5)(variables, X, rngs={"dropout": key}))
    assert (run(KEY) != run(OTHER_KEY)).any()


class Transposed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.ConvTranspose(4, (3,), name="grown")(nn.Dense(8, name="up")(x))


def test_adapters_that_nothing_reads_are_an_error():
    module, params, lora, scales = start(Transposed(), (LoraRule("up/kernel", 2), LoraRule("grown/kernel", 2)))
    with pytest.raises(ValueError, match=r"1 of 2 adapters were not read, e.g. that of 'grown'.*nn.ConvTranspose"):
        factored(module, params, lora, scales)
    with pytest.raises(ValueError, match="hold no adapters"):
        lora_apply(module.apply)({"params": params}, X)


def test_layers_that_cannot_use_an_adapter():
    conv, x = nn.Conv(6, (3,)), jnp.ones((2, 9, 4))
    _, params, lora, scales = start(conv, LoraRule("kernel", 2, inputs=1), x)  # no stack of 3 layers
    with pytest.raises(ValueError, match=r"a Conv of 12 inputs .* was taken for another kind.* inputs="):
        factored(conv, params, lora, scales, x)
    conv = nn.Conv(4, (3,), feature_group_count=2)
    _, params, lora, scales = start(conv, LoraRule("kernel", 2, window=1), x)
    with pytest.raises(ValueError, match="grouped or masked"):
        factored(conv, params, lora, scales, x)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: LoraConfig(()), "adapts nothing"),
        (lambda p: LoraConfig("kernel", dropout=1.0), r"dropout=1.0 must be a number in \[0.0, 1.0\)"),
        (lambda p: LoraConfig("kernel", init="pfet"), "Did you mean 'peft'"),
        (lambda p: LoraRule("kernel", rank=0), "rank=0"),
        (lambda p: LoraRule("kernel", alpha=0.0), "alpha=0.0"),
        (lambda p: lora_init(KEY, p, LoraConfig("layer_0/upp/kernel")), "Did you mean 'layer_0/up/kernel'"),
        (lambda p: lora_init(KEY, p, LoraConfig("up")), "no kernels .* 'layer_0/up/bias'"),
        (lambda p: lora_init(KEY, p, LoraConfig(LoraRule("up/kernel", 9))), r"rank=9 .* Choose a rank in \[1, 8\]"),
        (lambda p: lora_init(KEY, p, LoraConfig(LoraRule("up/kernel", 2, window=1))), "too few axes"),
        (lambda p: lora_init(KEY, p, LoraConfig(("kernel", LoraRule("up/kernel")))), "earlier pattern"),
        (lambda p: lora_params(p, {"layer_0/ip/kernel": {"a": X, "b": X}}, 1.0), "Did you mean 'layer_0/up/kernel'"),
        (lambda p: lora_merge(p, {"layer_0/up/kernel": {"a": X, "b": X}}, 1.0), r"does not fit .* \(8, 16\)"),
        (lambda p: lora_merge(p, lora_init(KEY, p, LoraConfig(RULES)), {"x": 1.0}), "scales has no entry"),
        (lambda p: lora_scales(lora_init(KEY, p, LoraConfig(RULES)), LoraConfig("up/kernel")), "no rule matches"),
        (lambda p: lora_apply(Net().apply, -0.1), "dropout=-0.1"),
        (lambda p: scale_lora_b(0.0), "ratio=0.0"),
        (lambda p: scale_lora_b().init(p), "hold no adapters"),
    ],
)
def test_bad_input(make, words):
    params = jax.eval_shape(Net().init, KEY, X)["params"]
    with pytest.raises(ValueError, match=words):
        make(params)


def test_lora_plus_is_a_learning_rate_of_its_own():
    lora = start()[2]
    grads = filled(lora, 3)
    adamw = lambda rate: optax.adamw(rate, weight_decay=0.1)
    labels = {path: {"a": "a", "b": "b"} for path in lora}
    want = optax.partition({"a": adamw(1e-3), "b": adamw(16e-3)}, labels)
    got = optax.chain(adamw(1e-3), scale_lora_b(16.0))
    # The adapters may be a part of the tree; the rest learns as without it.
    tree, gradients = {"base": X, "lora": lora}, {"base": X, "lora": grads}
    updates, _ = jax.jit(got.update)(gradients, got.init(tree), tree)
    expected, _ = jax.jit(want.update)(grads, want.init(lora), lora)
    assert_close(updates["lora"], expected, 1e-5, 1e-9)
    np.testing.assert_allclose(updates["base"], -1e-3 * (np.sign(X) + 0.1 * X), rtol=1e-4)


def test_lora_plus_in_other_wrappers():
    lora = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), start()[2])
    tx = optax.MultiSteps(optax.inject_hyperparams(scale_lora_b)(ratio=16.0), 2).gradient_transformation()
    state = tx.init(lora)
    updates = lora
    update = jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(lora, state, lora)
    assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(jnp.result_type, lora)
    assert_close(updates["layer_0/up/kernel"]["b"], 16 * lora["layer_0/up/kernel"]["b"], 0.01)


def equinox_case():
    model = jax.eval_shape(lambda key: eqx.filter(eqx.nn.MLP(96, 96, 160, 1, key=key), eqx.is_array), KEY)
    model = eqx.combine(filled(model, scale=0.1), eqx.filter_eval_shape(eqx.nn.MLP, 96, 96, 160, 1, key=KEY))
    return model, lambda model, x: jax.vmap(model)(x)


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(96, 160, rngs=rngs), nnx.Linear(160, 96, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def nnx_case():
    graph, shapes = nnx.split(lora_hooks(nnx.eval_shape(lambda: Mlp(nnx.Rngs(0)))))
    return filled(shapes, scale=0.1), lambda params, x: nnx.merge(graph, params)(x)


def plain_case():
    shapes = {
        name: {"kernel": jax.ShapeDtypeStruct(s, jnp.float32)} for name, s in (("up", (96, 160)), ("down", (160, 96)))
    }
    return filled(shapes, scale=0.1), lambda p, x: jax.nn.relu(x @ p["up"]["kernel"]) @ p["down"]["kernel"]


@pytest.mark.parametrize("make", [equinox_case, nnx_case, plain_case])
def test_kernels_in_place_equal_merged_ones_and_cost_less(make):
    params, forward = make()
    config = LoraConfig(LoraRule("(kernel|weight)$", 4))
    lora = filled(jax.eval_shape(lambda: lora_init(KEY, params, config)), 1, scale=0.1)
    scales = lora_scales(lora, config)
    assert len(lora) == 2
    forms = [lambda lora, x, put=put: forward(put(params, lora, scales), x) for put in (lora_kernels, lora_merge)]
    assert_lean(*forms, lora, BATCH)


def test_kernels_in_place_refuse_what_would_form_them():
    lora = {"kernel": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}}
    params = {"kernel": jnp.zeros((3, 2))}
    kernel = lora_kernels(params, lora, 1.0)["kernel"]
    assert (kernel.shape, kernel.ndim, kernel.dtype) == ((3, 2), 2, jnp.float32)
    np.testing.assert_array_equal(np.ones((1, 3), np.float32) @ kernel, [[3.0, 3.0]])
    np.testing.assert_array_equal(kernel @ np.ones(2, np.float32), [2.0, 2.0, 2.0])
    for use in (jnp.asarray, np.asarray, lambda k: k[0]):
        with pytest.raises(TypeError, match=r"LoraKernel of shape \(3, 2\) was"):
            use(kernel)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: nnx.Linear(3, 2, rngs=nnx.Rngs(0))))
    unhooked = nnx.merge(graph, lora_kernels(filled(shapes), lora, 1.0))
    with pytest.raises(TypeError, match="lora_hooks"):
        unhooked(jnp.ones((1, 3)))
    stack = {"kernel": {"a": jnp.ones((4, 3, 1)), "b": jnp.ones((4, 1, 2))}}
    with pytest.raises(ValueError, match="has 1 axes of a stack"):
        lora_kernels({"kernel": jnp.zeros((4, 3, 2))}, stack, 1.0)
    with pytest.raises(ValueError, match=r"holds no nnx\.Linear"):
        lora_hooks(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))


def test_adapters_are_sharded_like_the_base_and_merge_locally():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    place = lambda *axes: NamedSharding(mesh, P(*axes))
    fill = lambda tree: jax.tree.map(lambda leaf: np.random.default_rng(0).normal(size=leaf.shape).astype("f"), tree)
    shapes = {"up": (3, 16, 32), "down": (3, 32, 16), "conv": (3, 3, 8, 16)}
    specs = {"up": place(None, "data", "model"), "down": place(None, "model"), "conv": place(None, None, None, "model")}
    base = fill({name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for name, shape in shapes.items()})
    shardings = {name: {"kernel": specs[name]} for name in shapes}
    config = LoraConfig((LoraRule("conv/kernel", 4, window=2), LoraRule("(up|down)/kernel", 4)))
    lora = fill(jax.eval_shape(lambda: lora_init(jax.random.key(0), base, config)))

    own = lora_shardings(shardings, lora)
    for name, a, b in (
        ("up", P(None, "data", None), P(None, None, "model")),
        ("down", P(None, "model", None), P(None, None, None)),
        ("conv", P(None, None, None, None), P(None, "model")),
    ):
        assert (own[f"{name}/kernel"]["a"].spec, own[f"{name}/kernel"]["b"].spec) == (a, b), own[f"{name}/kernel"]
    params, placed = jax.device_put((base, lora), (shardings, own))
    merge = jax.jit(lambda p, l: lora_merge(p, l, 2.0), out_shardings=shardings, donate_argnums=0)
    merge = merge.lower(params, placed).compile()
    talk = re.findall("all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", merge.as_text())
    assert not talk, talk
    merged = merge(params, placed)
    for name, spec in specs.items():
        kernel, adapter = merged[name]["kernel"], lora[f"{name}/kernel"]
        assert kernel.sharding.is_equivalent_to(spec, kernel.ndim)
        want = base[name]["kernel"] + 2 * adapter["a"] @ adapter["b"]
        np.testing.assert_allclose(kernel, want, rtol=1e-4, atol=1e-4)
    for wrong, error in (
        ({"up": shardings["up"]}, ValueError),
        (jax.tree.map(lambda s: jax.devices()[0], shardings), TypeError),
    ):
        with pytest.raises(error, match="params_shardings"):
            lora_shardings(wrong, lora)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int32, jnp.float8_e4m3fn])
def test_a_quantised_kernel_takes_no_sum(dtype):
    params = {"kernel": jnp.ones((16, 8), dtype), "other": {"kernel": jnp.ones((16, 8), jnp.int8)}}
    lora = {"kernel": {"a": jnp.full((16, 1), 0.1), "b": jnp.ones((1, 8))}}
    with pytest.raises(ValueError, match=f"kernel is {jnp.dtype(dtype)}, a quantised kernel"):
        lora_merge(params, lora, 2.0)
    fine = {"kernel": jnp.ones((16, 8)), "other": params["other"]}  # one without an adapter stays
    assert lora_merge(fine, lora, 2.0)["other"]["kernel"].dtype == jnp.int8
