"""Global layer: parity with the authors' code, the counts of the networks, bad input."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core.cost import count_params
from effjax.core.macs import count_jaxpr_macs
from effjax.models.inverted_residual import InvertedResidual
from effjax.models.residual_blocks import BasicBlock, Bottleneck
from effjax.models.resnet import ResNet
from effjax.vision.global_layer import FieldMaps, GlobalLayer, global_layer
from effjax.vision.global_nets import mobilenet_global, resnet_global
from effjax.vision.pde import PdeConfig

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "global_layer"
KEY = jax.random.key(0, impl="rbg")  # quicker to compile than the default
ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh}
BLOCKS = (
    *("cifar_k1", "cifar_k3_basicblock", "k1_dot", "k1_smalleps", "k2_dx2_dy1_dt01", "k2_f_for_g", "k2_nosource"),
    *("k2_uv_fullconv_dxy_pw", "k2_uv_identity", "k3_h0_h", "k5_constD_res_silu"),
    *("gr_mbv2", "gr_learnedD_k3", "gr_mbv3_stride2", "gr_effb0_dot_dx2"),
)
_MODULES = {
    **{"convg": "velocity/conv_a", "convg1": "velocity/conv_b", "bng": "velocity/norm_a", "bng1": "velocity/norm_b"},
    **{"convDx": "diffusivity/conv_a", "convDy": "diffusivity/conv_b"},
    **{"bnDx": "diffusivity/norm_a", "bnDy": "diffusivity/norm_b", "bn_out": "norm_out"},
    **{f"init_h.conv{i}": f"init_fn/conv{i}" for i in (1, 2)},
    **{f"init_h.bn{i}": f"init_fn/norm{i}" for i in (1, 2)},
}
_INVERTED = {
    **{"init_h.conv_pw": "init_fn/expand", "init_h.conv_dw": "init_fn/depthwise", "init_h.conv_pwl": "init_fn/project"},
    **{
        "init_h.bn1": "init_fn/expand_norm",
        "init_h.bn2": "init_fn/depthwise_norm",
        "init_h.bn3": "init_fn/project_norm",
    },
    **{"init_h.se.conv_reduce": "init_fn/squeeze/reduce", "init_h.se.conv_expand": "init_fn/squeeze/expand"},
}


def vectors(name):
    return dict(np.load(REFERENCE / f"{name}.npz"))


def nhwc(array):
    return np.moveaxis(array, 1, -1)


def converted(data, group, modules):
    """Parameters, or what has their names, by our paths."""
    found = {}
    for key, value in data.items():
        if not key.startswith(f"{group}/"):
            continue
        module, _, leaf = key.removeprefix(f"{group}/").rpartition(".")
        if leaf == "num_batches_tracked":
            continue
        path = modules[module]
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
            value = value[0, 0] if path.endswith(("reduce", "squeeze/expand")) else value
        names = {"weight": "kernel" if value.ndim > 1 else "scale", "running_mean": "mean", "running_var": "var"}
        found[f"{path}/{names.get(leaf, leaf)}"] = value
    return found


def nested(flat):
    tree = {}
    for path, value in flat.items():
        *folders, leaf = path.split("/")
        functools.reduce(lambda node, name: node.setdefault(name, {}), folders, tree)[leaf] = jnp.asarray(value)
    return tree


def flattened(tree):
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def renamed(flat, pointwise):
    """``FieldMaps`` calls the kernel of a 1x1 convolution by its own name."""
    swap = lambda path: path.replace("kernel", "pointwise") if path.startswith(pointwise) else path
    return {swap(path): value for path, value in flat.items()}


_CONVS = {
    "": {},
    "FullConv": {"conv": "full", "use_bias": True},
    "PwConv": {"conv": "pointwise", "use_bias": True},
    "identity": {"conv": "identity"},
}


def cifar_layer(cfg):
    act = "silu" if cfg["use_silu"] else "relu"
    shared = {"activation": act, "dot": cfg.get("use_dot", False)}
    if not cfg.get("use_diff_eps", True):
        shared["epsilon"] = 1e-5
    fields = lambda kind: functools.partial(FieldMaps, **shared, **_CONVS[kind])
    return GlobalLayer(
        cfg["planes"],
        init_fn=BasicBlock if cfg["cell_type"] == "BasicBlock" else None,
        velocity=fields(cfg["custom_uv"]),
        diffusivity=(cfg["cDx"], cfg["cDy"]) if cfg["constant_Dxy"] else fields(cfg["custom_dxy"]),
        pde=PdeConfig(K=cfg["K"], dt=cfg["dt"], dx=cfg["dx"], dy=cfg["dy"]),
        source=not cfg["no_f"],
        previous="init" if cfg["init_h0_h"] else "source",
        velocity_input="source" if cfg.get("use_f_for_g") else "init",
        activation=act,
        residual=cfg["use_res"],
        dtype=jnp.float64,
    )


# K, kernel, hidden channels, stride, activation, and what differs.
_IMAGENET = {
    "gr_mbv2": (1, 3, 48, 1, "relu", (1.0, 1.0), False, {}),
    "gr_learnedD_k3": (3, 3, 32, 1, "silu", None, False, {}),
    "gr_mbv3_stride2": (2, 5, 40, 2, "hard_swish", (1.0, 1.0), False, {}),
    "gr_effb0_dot_dx2": (1, 5, 48, 1, "silu", (2.0, 2.0), True, {"dx": 2, "dy": 2, "dt": 0.1}),
}


def imagenet_layer(name):
    K, kernel, hidden, strides, act, D, dot, options = _IMAGENET[name]
    fields = functools.partial(FieldMaps, kernel=kernel, activation=act, epsilon=1e-5, dot=dot)
    block = functools.partial(InvertedResidual, hidden=hidden, kernel=kernel, activation=act, squeeze=2 if dot else 0)
    return GlobalLayer(
        8,
        strides=strides,
        init_fn=block,
        velocity=fields,
        diffusivity=fields if D is None else D,
        pde=PdeConfig(K=K, **options),
        activation=act,
        dtype=jnp.float64,
    )


def close(left, right, tolerance=1e-9):
    np.testing.assert_allclose(left, right, rtol=0, atol=tolerance * max(1.0, np.abs(right).max()))


def applied(name):
    """The layer of a file of vectors, its variables, and how the file's names become ours."""
    data = vectors(name)
    cfg = json.loads(str(data["cfg"]))
    cifar = cfg["kind"] == "cifar"
    modules = {**_MODULES, **({} if cifar else _INVERTED)}
    pointwise = "diffusivity/conv" if cifar and cfg["custom_dxy"] == "PwConv" else "none"
    ours = lambda group: renamed(converted(data, group, modules), pointwise)
    layer = cifar_layer(cfg) if cifar else imagenet_layer(name)
    return data, layer, {"params": nested(ours("param")), "batch_stats": nested(ours("buf_before"))}, ours


# Each of their switches is in another file too.
_NIGHTLY = ("cifar_k1", "cifar_k3_basicblock", "k1_smalleps", "gr_mbv2")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly] * (name in _NIGHTLY)) for name in BLOCKS]
)
def test_parity_of_a_layer(name):
    with jax.enable_x64(True):
        data, layer, variables, ours = applied(name)

        @jax.jit
        def run(variables, x):
            out, changed = layer.apply(variables, x, True, mutable=["batch_stats"])
            return out, changed["batch_stats"]

        out, after = run(variables, nhwc(data["x"]))
    close(out, nhwc(data["out_train"]))
    check_statistics(flattened(after), ours("buf_before"), ours("buf_after"), out.size // out.shape[-1], data, layer)


def check_statistics(after, before, wanted, rows, data, layer):
    """PyTorch keeps the variance with n - 1, Flax with n."""
    inner = data["x"].size // data["x"].shape[1]  # pixels before the strides of the first block
    assert set(after) == set(wanted)
    for path, value in after.items():
        n = inner if path.startswith("init_fn/expand_norm") else rows
        fresh = (np.asarray(value) - 0.9 * before[path]) * (n / (n - 1) if path.endswith("var") else 1)
        close(0.9 * before[path] + fresh, wanted[path])


_WITH_GRADIENTS = ("cifar_k3_basicblock",)  # the others come with `-m nightly`


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly] * (name not in _WITH_GRADIENTS)) for name in BLOCKS]
)
def test_parity_of_gradients_and_of_evaluation(name):
    with jax.enable_x64(True):
        data, layer, variables, ours = applied(name)
        cotangent = nhwc(data["cotangent"])

        def scalar(params, x, train):
            out, _ = layer.apply(variables | {"params": params}, x, train, mutable=["batch_stats"])
            return jnp.sum(out * cotangent), out

        @jax.jit
        def gradients(params, x):
            train, _ = jax.grad(scalar, (0, 1), has_aux=True)(params, x, True)
            return train, jax.grad(scalar, 1, has_aux=True)(params, x, False)

        (grads, grad_x), (grad_x_eval, out_eval) = gradients(variables["params"], nhwc(data["x"]))
    close(out_eval, nhwc(data["out_eval"]))
    close(grad_x, nhwc(data["grad_x_train"]))
    close(grad_x_eval, nhwc(data["grad_x_eval"]))
    grads, wanted = flattened(grads), ours("grad_train")
    assert set(grads) == set(wanted)
    for path, value in wanted.items():
        close(grads[path], value)


_NET_MODULES = {
    **{"conv1": "stem_conv", "bn1": "stem_norm", "fc": "head"},
    **{
        f"layer{s}.0.{a}{i}": f"stage{s}_block0/{b}{i}"
        for s in (1, 2, 3, 4)
        for a, b in (("conv", "conv"), ("bn", "norm"))
        for i in (1, 2)
    },
    **{f"layer{s}.0.downsample.0": f"stage{s}_block0/conv_shortcut" for s in (2, 3, 4)},
    **{f"layer{s}.0.downsample.1": f"stage{s}_block0/norm_shortcut" for s in (2, 3, 4)},
    **{f"global{s}.{name}": f"stage{s}_block1/{path}" for s in (1, 2, 3) for name, path in _MODULES.items()},
}


def converted_net(data, group):
    found = converted(data, group, _NET_MODULES)
    flip = lambda path, value: value.T if path == "head/kernel" else value
    return {path: flip(path, value) for path, value in found.items()}


@pytest.mark.parametrize("gradients", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_parity_of_a_network(gradients):
    data = vectors("net_pdenet_tiny")
    model = resnet_global(widths=(4, 6, 8, 8), classes=5, dtype=jnp.float64)
    with jax.enable_x64(True):
        stats = nested(converted_net(data, "buf_before"))

        def loss(params, x):
            variables = {"params": params, "batch_stats": stats}
            logits, _ = model.apply(variables, x, train=True, mutable=["batch_stats"])
            rows = jnp.arange(len(logits))
            return -jax.nn.log_softmax(logits)[rows, data["y"]].mean(), logits

        run = jax.jit(jax.value_and_grad(loss, has_aux=True) if gradients else loss)
        found = run(nested(converted_net(data, "param")), nhwc(data["x"]))
        value, logits = found[0] if gradients else found
    close(logits, data["logits_train"])
    close(value, data["loss_train"])
    if gradients:
        wanted, grads = converted_net(data, "grad_train"), flattened(found[1])
        assert set(grads) == set(wanted)
        for path, gradient in wanted.items():
            close(grads[path], gradient)


def layered(**fields):
    return functools.partial(GlobalLayer, **fields)


def mapped(**fields):
    return layered(velocity=functools.partial(FieldMaps, **fields))


_PROJECTED = functools.partial(BasicBlock, shortcut="project")
_BOTTLENECK = functools.partial(Bottleneck, expansion=1)
NETS = {
    "resnet_3stage_m5_c10": lambda: ResNet((5, 5, 5), block=_PROJECTED),
    "resnet_4stage_m1_noglobal_c10": lambda: resnet_global(layer=None),
    "resnet_global_4stage_m1_K1_c100": lambda: resnet_global(classes=100),
    "resnet_global_4stage_m1_K5_c10": lambda: resnet_global(layer=layered(pde=PdeConfig(K=5))),
    "resnet_global_4stage_m2_K1_c10": lambda: resnet_global(2),
    "resnet_global_3stage_m1_c10": lambda: resnet_global(widths=(16, 32, 64)),
    "resnet_global_4stage_m1_constD_c10": lambda: resnet_global(layer=layered(diffusivity=(1.0, 1.0))),
    "resnet_global_4stage_m1_uv_DwConv_c10": lambda: resnet_global(layer=mapped(use_bias=True)),
    "resnet_global_4stage_m1_uv_PwConv_c10": lambda: resnet_global(layer=mapped(conv="pointwise", use_bias=True)),
    "resnet_global_4stage_m1_uv_FullConv_c10": lambda: resnet_global(layer=mapped(conv="full", use_bias=True)),
    "resnet_global_4stage_m1_uv_identity_c10": lambda: resnet_global(layer=mapped(conv="identity")),
    "resnet_global_4stage_m1_uv_BasicBlock_c10": lambda: resnet_global(layer=mapped(conv=BasicBlock)),
    "resnet_global_4stage_m1_uv_Bottleneck_c10": lambda: resnet_global(layer=mapped(conv=_BOTTLENECK)),
    "wrn_40_4_global_m1_c10": lambda: resnet_global(widths=(64, 128, 256), layer=layered(init_fn=BasicBlock)),
    "global_mobilenetv2_100_c1000": lambda: mobilenet_global("mobilenet_v2"),
    "global_mobilenetv3_large_100_c1000": lambda: mobilenet_global("mobilenet_v3_large"),
    "global_efficientnet_b0_c1000": lambda: mobilenet_global("efficientnet_b0"),
}
_COUNTED = (
    "resnet_global_4stage_m1_K1_c100",
    "resnet_global_4stage_m1_uv_FullConv_c10",
    "global_mobilenetv2_100_c1000",
)
COUNTS = json.loads((REFERENCE / "counts.json").read_text())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly] * (name not in _COUNTED)) for name in NETS]
)
def test_counts_are_those_of_the_released_code(name):
    x = jax.ShapeDtypeStruct((1, COUNTS[name]["input"], COUNTS[name]["input"], 3), jnp.float32)
    jaxpr, (_, variables) = jax.make_jaxpr(NETS[name]().init_with_output, return_shape=True)(KEY, x)
    assert count_params(variables["params"]) == COUNTS[name]["params"]
    # Drawing parameters takes no product.
    assert count_jaxpr_macs(jaxpr).most == COUNTS[name]["conv_linear_macs"]


def test_without_steps_there_are_no_maps():
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
    layer = GlobalLayer(3, pde=PdeConfig(K=0))
    variables = jax.eval_shape(functools.partial(layer.init, train=False), KEY, x)
    assert set(variables["params"]) == {"norm_out"}
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 2, np.float32), variables)
    out = jax.jit(lambda v, x: layer.apply(v, x, False))(variables, x)
    np.testing.assert_allclose(out, np.maximum(2 * (x - 2) / np.sqrt(2 + 1e-5) + 2, 0), rtol=1e-5, atol=1e-6)


def test_signed_velocities_carry_to_both_sides_and_relu_to_one():
    """Of a layer whose maps have biases alone, the centre of mass moves by the sign of the activation's value."""
    dot = np.zeros((1, 9, 9, 1), np.float32)
    dot[0, 4, 4, 0] = 1

    def centre(activation, bias):
        velocity = lambda h: (ACTIVATIONS[activation](bias + 0 * h), 0 * h)
        out = np.asarray(run_layer(jnp.asarray(dot), velocity))[0, :, :, 0]
        return (out.sum(1) * np.arange(9)).sum() / out.sum()

    run_layer = lambda x, velocity: global_layer(x, velocity, config=PdeConfig(K=2), previous="init", source=False)
    assert centre("relu", 0.5) < 4
    assert centre("relu", -0.5) == pytest.approx(4)
    assert centre("tanh", 0.5) < 4
    assert centre("tanh", -0.5) == pytest.approx(8 - centre("tanh", 0.5))


X = np.ones((2, 4, 4, 3), np.float32)
still = lambda h: (0 * h, 0 * h)
start = lambda layer, x=X: jax.eval_shape(functools.partial(layer.init, train=False), KEY, x)
BAD = {
    "channels": (lambda: start(GlobalLayer(4)), r"features=4 and strides=1 change the input.*init_fn"),
    "strides": (lambda: start(GlobalLayer(3, strides=2)), r"features=3 and strides=2 change the input"),
    "previous": (lambda: global_layer(X, still, previous="inti"), r"previous='inti'.*Did you mean 'init'"),
    "velocity_input": (lambda: global_layer(X, still, velocity_input="f"), r"velocity_input='f' is not one of"),
    "idle previous": (
        lambda: global_layer(X, still, config=PdeConfig(scheme="implicit"), previous="init"),
        r"previous='init' would do nothing",
    ),
    "conv": (lambda: start(GlobalLayer(3, velocity=functools.partial(FieldMaps, conv="dw"))), r"conv='dw' is not one"),
    "kernel": (
        lambda: start(GlobalLayer(3, velocity=functools.partial(FieldMaps, kernel=2))),
        r"kernel=2 has no middle",
    ),
    "epsilon": (lambda: start(GlobalLayer(3, velocity=functools.partial(FieldMaps, epsilon=0.0))), r"epsilon=0.0"),
    "activation": (lambda: start(GlobalLayer(3, activation="tanhh")), r"Did you mean 'tanh'"),
    "implicit with maps": (lambda: start(GlobalLayer(3, pde=PdeConfig(scheme="implicit"))), r"takes numbers"),
    "wide stencil": (lambda: start(GlobalLayer(3, pde=PdeConfig(dy=4))), r"dy=4 must be below the 4 columns"),
    "no block": (lambda: resnet_global(0), r"blocks=0 must be an integer in \[1"),
    "name": (lambda: mobilenet_global("mobilenet_v3"), r"or 'mobilenet_v3_large'\?"),
}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_images_of_integers_are_refused(dtype):
    with pytest.raises(TypeError, match="x has dtype uint"):
        start(GlobalLayer(3), X.astype(dtype))


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
