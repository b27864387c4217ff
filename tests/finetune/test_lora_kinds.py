"""LoRA on every kind of layer: shapes of the factors, factored outputs and gradients against dense kernels."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax.finetune.chain import cola_extend, cola_init
from effjax.finetune.chain_config import ColaConfig
from effjax.finetune.lora import lora_init, lora_merge, lora_params, lora_scales
from effjax.finetune.lora_config import LoraConfig, LoraRule
from effjax.finetune.lora_layers import lora_hooks, lora_kernels
from effjax.finetune.lora_layout import Layout, layout
from effjax.finetune.lora_linen import lora_apply

KEY = jax.random.key(0, impl="rbg")
X = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
IDS = np.array([[1, 4, 4], [0, 6, 1]])


class Attention(nn.Module):
    bias: bool = True
    length: int = 0

    @nn.compact
    def __call__(self, x):
        block = lambda name: nn.MultiHeadDotProductAttention(2, use_bias=self.bias, name=name)
        if not self.length:
            return block("attention")(x)
        layers = nn.scan(_Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.length)
        return layers(self.bias, name="layers")(x, None)[0]


class _Layer(nn.Module):
    bias: bool

    @nn.compact
    def __call__(self, x, _):
        x = nn.LayerNorm()(x)
        return x + nn.MultiHeadDotProductAttention(2, use_bias=self.bias, name="attention")(x), None


class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(7, 8, name="table")
        return table.attend(jnp.tanh(table(ids)))


ATTENTION = {f"attention/{name}": ((8, 2), (2, 8)) for name in ("query", "key", "value", "out")}
SCANNED = {f"layers/{path}": ((3, *a), (3, *b)) for path, (a, b) in ATTENTION.items()}
# module, input, rule's settings, shapes of a and b by the kernel's module
LINEN = {
    "DenseGeneral": (nn.DenseGeneral((2, 5)), X, {}, {"": ((8, 2), (2, 10))}),
    "DenseGeneral, no bias": (nn.DenseGeneral((2, 5), use_bias=False), X, {"outputs": 2}, {"": ((8, 2), (2, 10))}),
    "DenseGeneral, two inputs": (nn.DenseGeneral(4, axis=(-2, -1)), X, {}, {"": ((24, 2), (2, 4))}),
    "DenseGeneral, first axis": (nn.DenseGeneral((2, 5), axis=1), X, {}, {"": ((3, 2), (2, 10))}),
    "attention": (Attention(), X, {}, ATTENTION),
    "attention, no bias": (Attention(False), X, {}, ATTENTION),
    "attention, scanned": (Attention(True, 3), X, {}, SCANNED),
    "attention, scanned, no bias": (Attention(False, 3), X, {}, SCANNED),
    "Einsum": (nn.Einsum((8, 2, 5), "btd,dhw->bhtw"), X, {"outputs": 2}, {"": ((8, 2), (2, 10))}),
    "Einsum, outputs first": (nn.Einsum((2, 5, 8), "...d,hwd->...hw"), X, {"inputs": 2}, {"": ((10, 2), (2, 8))}),
    "Embed": (Tied(), IDS, {}, {"table": ((7, 2), (2, 8))}),
    "Conv, one axis": (nn.Conv(4, (3,)), X, {}, {"": ((24, 2), (2, 4))}),
}


def filled(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), shapes)


def dense(lora, params, scales):
    """Kernels plus what NumPy makes of the factors, by path: what every form must agree with."""
    kernels = {}
    for path, ab in lora.items():
        update = np.einsum("...ir,...ro->...io", ab["a"], ab["b"])
        kernels[path] = params[path] + scales[path] * update.reshape(params[path].shape)
    return kernels


def flat(tree):
    return {"/".join(map(str, path)): leaf for path, leaf in nnx.traversals.flatten_mapping(tree).items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def outcomes(forward, merged, params, lora, kernels):
    """Outputs and gradients of the factors, in factored form; the output on merged and on dense kernels, and the
    gradient of the dense ones."""
    loss = lambda y: jnp.sum(jnp.sin(y))
    factored = jax.value_and_grad(lambda lora: (loss(y := forward(params, lora)), y), has_aux=True)
    (_, y), grads = factored(lora)
    dense_loss = jax.value_and_grad(lambda kernels: (loss(y := merged(params, kernels)), y), has_aux=True)
    (_, want), kernel_grads = dense_loss(kernels)
    return y, grads, want, kernel_grads


def check(forward, on_kernels, params, lora, scales):
    kernels = dense(lora, flat(params), scales)
    y, grads, want, kernel_grads = outcomes(forward, on_kernels, params, lora, kernels)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    for path, ab in lora.items():  # of W + s a b: da = s dW b^T, db = s a^T dW
        lead, inputs, outputs = ab["b"].shape[:-2], ab["a"].shape[-2], ab["b"].shape[-1]
        gradient = np.asarray(kernel_grads[path]).reshape(*lead, inputs, outputs) * scales[path]
        for factor, expected in (("a", gradient @ ab["b"].mT), ("b", ab["a"].mT @ gradient)):
            np.testing.assert_allclose(grads[path][factor], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
            assert np.abs(expected).max() > 1e-3
    return y


@pytest.mark.parametrize("kind", LINEN)
def test_linen_layers(kind):
    module, x, axes, expected = LINEN[kind]
    params = filled(jax.eval_shape(module.init, KEY, x)["params"])
    config = LoraConfig(LoraRule("(kernel|embedding)$", 2, 6.0, **axes))
    lora = filled(jax.eval_shape(lambda: lora_init(KEY, params, config)), 1)
    found = {path.rpartition("/")[0]: (ab["a"].shape, ab["b"].shape) for path, ab in lora.items()}
    assert found == expected
    scales = lora_scales(lora, config)
    forward = lambda params, lora: lora_apply(module.apply)({"params": lora_params(params, lora, scales)}, x)

    def on_kernels(params, kernels):
        whole = nnx.traversals.unflatten_mapping({tuple(k.split("/")): v for k, v in (flat(params) | kernels).items()})
        return module.apply({"params": whole}, x)

    check(forward, on_kernels, params, lora, scales)
    merged = flat(lora_merge(params, lora, scales))
    for path, kernel in dense(lora, flat(params), scales).items():
        np.testing.assert_allclose(merged[path], kernel, rtol=1e-5, atol=1e-6)


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.einsum = nnx.Einsum("btd,dhw->bthw", (8, 2, 5), (2, 5), rngs=rngs)
        self.general = nnx.LinearGeneral((2, 5), 4, axis=(-2, -1), rngs=rngs)
        self.linear = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.linear(self.general(self.einsum(self.attention(x))))


def test_nnx_layers():
    graph, shapes = nnx.split(lora_hooks(nnx.eval_shape(Nnx)))
    params = nnx.to_pure_dict(filled(shapes))
    config = LoraConfig(LoraRule("kernel$", 2, 6.0))
    lora = filled(jax.eval_shape(lambda: lora_init(KEY, params, config)), 1)
    expected = ATTENTION | {"einsum": ((8, 2), (2, 10)), "general": ((10, 2), (2, 4)), "linear": ((4, 2), (2, 3))}
    assert {path.rpartition("/")[0]: (ab["a"].shape, ab["b"].shape) for path, ab in lora.items()} == expected
    scales = lora_scales(lora, config)
    run = lambda params: nnx.merge(graph, nnx.State(params))(X)
    forward = lambda params, lora: run(lora_kernels(params, lora, scales))

    def on_kernels(params, kernels):
        return run(
            nnx.traversals.unflatten_mapping({tuple(k.split("/")): v for k, v in (flat(params) | kernels).items()})
        )

    check(forward, on_kernels, params, lora, scales)


class Equinox(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    table: eqx.nn.Embedding

    def __call__(self, ids):
        x = jax.vmap(self.table)(ids)
        return self.attention(x, x, x)


def test_equinox_partition():
    model = eqx.filter_eval_shape(
        lambda key: Equinox(eqx.nn.MultiheadAttention(2, 8, key=key), eqx.nn.Embedding(7, 8, key=key)), KEY
    )
    arrays, static = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    arrays = filled(arrays)
    config = LoraConfig((LoraRule("attention/.*/weight", 2, 6.0), LoraRule("table/weight", 3)))
    lora = filled(jax.eval_shape(lambda: lora_init(KEY, arrays, config)), 1)
    assert (lora["table/weight"]["a"].shape, lora["table/weight"]["b"].shape) == ((8, 3), (3, 7))
    scales = lora_scales(lora, config)
    model, ids = eqx.combine(arrays, static), jnp.asarray(IDS[0])
    factored = jax.jit(lambda lora: lora_kernels(model, lora, scales)(ids))(lora)
    merged = jax.jit(lambda lora: eqx.combine(lora_merge(arrays, lora, scales), static)(ids))(lora)
    np.testing.assert_allclose(factored, merged, rtol=1e-5, atol=1e-5)
    assert np.abs(merged - jax.jit(lambda ids: model(ids))(ids)).max() > 0.1


def test_a_chain_on_attention_merges_what_it_trained():
    params = filled(jax.eval_shape(Attention().init, KEY, X)["params"])
    config = ColaConfig(LoraRule("(query|out)/kernel", 2, 4.0), knots=(1,))
    state = jax.jit(lambda: cola_init(jax.random.key(0), params, config))()
    state = state._replace(lora=filled(state.lora, 1))
    base = flat(jax.jit(lambda state: cola_extend(state, config).base)(state))
    for path, kernel in dense(state.lora, flat(params), dict.fromkeys(state.lora, 2.0)).items():
        np.testing.assert_allclose(base[path], kernel, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({"kernel": (8, 2, 4), "bias": (2, 4)}, Layout(0, 1, 2)),
        ({"kernel": (2, 4, 8), "bias": (8,)}, Layout(0, 2, 1)),
        ({"kernel": (3, 8, 4), "bias": (3, 4)}, Layout(1, 1, 1)),
        ({"kernel": (3, 8, 2, 4), "bias": (3, 2, 4)}, Layout(1, 1, 2)),
        ({"kernel": (3, 3, 8, 4), "bias": (4,)}, Layout(0, 3, 1, 2)),
        ({"kernel": (5, 3, 3, 8, 4), "bias": (5, 4)}, Layout(1, 3, 1, 2)),
        ({"kernel": (3, 3, 8, 4)}, Layout(0, 3, 1, 2)),
        ({"x/kernel": (3, 8, 4), "norm/scale": (3, 8)}, Layout(1)),
        ({"x/kernel": (3, 8, 4), "y/kernel": (3, 4, 8)}, Layout(1)),
        ({"kernel": (1, 7, 8, 4)}, Layout(0, 3, 1, 2)),
        ({"kernel": (8, 8, 4), "bias": (8, 4)}, None),
        ({"kernel": (8, 2, 4)}, None),
        ({"kernel": (3, 32, 2, 4)}, None),  # query, key and value as one
        ({"x/kernel": (8, 2, 4), "other/kernel": (8, 8), "other/bias": (8,)}, None),
        ({"x/kernel": (8, 2, 4), "other/kernel": (8, 8)}, None),
    ],
)
def test_axes_are_told_or_asked_for(shapes, expected):
    path = next(iter(shapes))
    if expected is not None:
        assert layout(path, LoraRule("kernel"), shapes) == expected
        return
    with pytest.raises(ValueError, match=r"may be a stack of layers, or one layer .* outputs=2"):
        layout(path, LoraRule("kernel"), shapes)
    assert layout(path, LoraRule("kernel", outputs=2), shapes) == Layout(len(shapes[path]) - 3, 1, 2)
    assert layout(path, LoraRule("kernel", inputs=1), shapes) == Layout(len(shapes[path]) - 2, 1, 1)


def refused(module, x, words, **axes):
    params = filled(jax.eval_shape(module.init, KEY, x)["params"])
    config = LoraConfig(LoraRule("kernel$", 2, **axes))
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(
            lambda lora: lora_apply(module.apply)({"params": lora_params(params, lora, 1.0)}, x),
            lora_init(KEY, params, config),
        )


def test_refusals():
    refused(nn.DenseGeneral(5, batch_dims=(0,)), X, "batch_dims", inputs=1)
    refused(nn.Einsum((3, 8, 5), "btd,tde->bte"), X, "no split into axes", inputs=2)
    refused(nn.DenseGeneral((2, 5)), X, "10 outputs, a has shape", inputs=1)
    with pytest.raises(ValueError, match=r"rank=9 .* \(8 in, 10 out\). Choose a rank in \[1, 8\]"):
        lora_init(KEY, {"kernel": np.ones((8, 2, 5)), "bias": np.ones((2, 5))}, LoraConfig(LoraRule("kernel", 9)))
    with pytest.raises(ValueError, match=r"inputs=2, outputs=2 of the rule .* too few axes"):
        lora_init(KEY, {"kernel": np.ones((8, 2, 5))}, LoraConfig(LoraRule("kernel", 1, inputs=2, outputs=2)))
    with pytest.raises(ValueError, match="inputs=2 must exceed window=2"):
        LoraRule("kernel", window=2, inputs=2)
    with pytest.raises(ValueError, match="Convolutions of Equinox have no adapter"):
        lora_init(KEY, {"weight": np.ones((4, 3, 3, 3))}, LoraConfig("weight"))
    with pytest.raises(ValueError, match=r"holds no nnx\.Linear, nnx\.LinearGeneral or nnx\.Einsum"):
        lora_hooks(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
