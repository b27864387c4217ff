"""Image classifiers by name: published counts, an independent implementation, weights of other libraries, bad input."""

import dataclasses
import functools
import hashlib
import io
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core.cost import count_params
from effjax.core.macs import count_jaxpr_macs
from effjax.core.tree import path_name
from effjax.data.sets import DataSet
from effjax.models.convert import export_weights, write_tensors
from effjax.models.image_models import (
    IMAGE_MODELS,
    fold_batch_norms,
    image_model,
    layout_rules,
    load_image_model,
    new_head,
    pretrained_mobilenet,
)
from effjax.models.inverted_residual import BlockRow, InvertedResidual, InvertedResidualNet
from effjax.models.layers import DepthwiseConv, Pointwise
from effjax.models.mobilenet import DepthwiseSeparable
from effjax.models.mobilenet_weights import tflite_tensors
from effjax.models.residual_blocks import Bottleneck, PreactivationBlock
from effjax.models.resnet import ResNet
from effjax.tasks.image import image_task

SHARED = Path(__file__).resolve().parents[2] / "../shared"


@functools.cache
def traced(name):
    """The module, the shapes of its variables, and the multiply-accumulates of one image."""
    model = image_model(name)
    size = 224 if model.classes == 1000 else 32
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    jaxpr, (_, shapes) = jax.make_jaxpr(model.init_with_output, return_shape=True)(jax.random.key(0), image)
    return model, shapes, count_jaxpr_macs(jaxpr).most


def squeeze_macs(model):
    return sum(2 * row.hidden * row.squeeze for rows in model.stages for row in rows)


# Parameters and multiply-accumulates of torchvision's and timm's networks; WRN-40-4's and 28-10's of their PyTorch
# port. Then, in millions and without squeeze-excite, what studies of efficient networks quote. Last, the digests of
# torchvision's and timm's names and shapes, statistics included.
PUBLISHED = {
    "mobilenet_v2": (3_504_872, 300_774_272, 300.8, ("d613ea65450d5318", "5a95ee06712e31e9")),
    "mobilenet_v3_large": (5_483_032, 216_589_760, 215.1, ("2af4cb8a399e8d82", "3dba8ad57b7701f1")),
    "efficientnet_b0": (5_288_548, 385_814_752, 385.2, ("b5ec7b4b5e4fedbb", "f62a5c98a74c6670")),
    "mobilenet_v1": (4_231_976, 568_740_352, 568.7, (None, "04cf17640bb96433")),
    "resnet50": (25_557_032, 4_089_184_256, None, ("cf11dad974eadeaa", "cf11dad974eadeaa")),
    "mobilenet_v3_small": (2_542_856, 56_510_400, None, ("c5aae8a56256fe35", "fefefaa6b0100de1")),
    "resnet18": (11_689_512, 1_814_073_344, None, ("2bb53b15765c4651", "2bb53b15765c4651")),
    "resnet18_cifar": (11_173_962, 555_422_720, None, ()),
    "wrn_40_4": (8_949_210, None, None, ()),
    "wrn_28_10": (36_479_194, None, None, ()),
}
QUICK = ("mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "resnet50")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.nightly) for name in PUBLISHED]
)
def test_published_counts_and_names(name):
    model, shapes, macs = traced(name)
    params, published_macs, quoted, digests = PUBLISHED[name]
    assert count_params(shapes["params"]) == params
    assert published_macs in (None, macs)
    if quoted is not None:
        assert (macs - squeeze_macs(model)) / 1e6 == pytest.approx(quoted, abs=0.05)
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    for layout, digest in zip(("torchvision", "timm"), digests, strict=False):
        if digest is not None:
            tensors = export_weights(zeros, layout_rules(name, model, layout))
            lines = sorted(f"{name} {tensor.shape}" for name, tensor in tensors.items())
            assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == digest, layout


def test_all_names_make_modules_and_small_images_keep_an_eighth():
    for name in IMAGE_MODELS:
        assert image_model(name, classes=7).classes == 7
    for name in IMAGE_MODELS:
        if name.endswith("_cifar") and not name.startswith("resnet"):
            small, large = image_model(name), image_model(name.removesuffix("_cifar"))
            total = lambda model: model.stem_strides * int(np.prod([r.strides for rows in model.stages for r in rows]))
            assert (total(small), total(large)) == (8, 32), name
            widths = lambda model: [row.features for rows in model.stages for row in rows]
            assert widths(small) == widths(large)
    strides = [[row.strides for row in rows] for rows in image_model("mobilenet_v2_cifar").stages]
    assert [own[0] for own in strides] == [1, 1, 2, 2, 1, 2, 1]
    assert all(later == 1 for own in strides for later in own[1:])


# torchvision's channels for each stage, and its last layers.
@pytest.mark.parametrize(
    ("name", "width", "features", "last"),
    [
        ("mobilenet_v2", 0.35, [8, 8, 16, 24, 32, 56, 112], (16, 1280, 0)),
        ("mobilenet_v2", 0.5, [8, 16, 16, 32, 48, 80, 160], (16, 1280, 0)),
        ("mobilenet_v2", 1.4, [24, 32, 48, 88, 136, 224, 448], (48, 1792, 0)),
        ("mobilenet_v3_large", 0.35, [8, 8, 16, 32, 40, 56], (8, 336, 448)),
        ("mobilenet_v3_large", 0.75, [16, 24, 32, 64, 88, 120], (16, 720, 960)),
    ],
)
def test_widths_round_as_torchvision(name, width, features, last):
    model = image_model(name, width=width)
    assert [rows[-1].features for rows in model.stages] == features
    assert (model.stem, model.last, model.dense) == last


# An independent implementation in NumPy, float64, from the layers' equations.


def convolve(x, layer, strides=1, pads=None, depthwise=False):
    kernel = layer["kernel"]
    size = kernel.shape[0]
    before, after = pads or (size // 2, size // 2)
    padded = np.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    rows, columns = ((length - size) // strides + 1 for length in padded.shape[1:3])
    out = 0
    for i, j in np.ndindex(size, size):
        part = padded[:, i : i + strides * rows : strides, j : j + strides * columns : strides][:, :rows, :columns]
        out = out + (part * kernel[i, j, 0] if depthwise else part @ kernel[i, j])
    return out + layer.get("bias", 0.0)


def normalise(x, params, stats, epsilon):
    return (x - stats["mean"]) / np.sqrt(stats["var"] + epsilon) * params["scale"] + params["bias"]


ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "hard_swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def layers_of(variables, epsilon):
    """A network's layers by name: ``layer(x, name, act, ...)`` convolves and normalises."""
    params, stats = variables["params"], variables.get("batch_stats", {})

    def layer(place, x, name, act="", norm="", **options):
        scope = lambda tree: tree if not place else tree.get(place, {})
        y = convolve(x, scope(params)[name], **options)
        norm = norm or f"{name.removesuffix('_conv')}_norm"
        if norm in scope(params):
            y = normalise(y, scope(params)[norm], scope(stats)[norm], epsilon)
        return ACTIVATIONS[act](y) if act else y

    return layer


def inverted_residuals(model, variables, x, epsilon):
    layer = layers_of(variables, epsilon)
    same = lambda size, length, strides: (
        (s := max(size - strides, 0) if length % strides == 0 else size // 2 * 2) // 2,
        s - s // 2,
    )
    pads = lambda x, size, strides: same(size, x.shape[1], strides) if model.padding == "same" else None
    x = layer("", x, "stem_conv", model.activation, strides=model.stem_strides, pads=pads(x, 3, model.stem_strides))
    for index, rows in enumerate(model.stages, start=1):
        for position, row in enumerate(rows):
            place, act, y = f"stage{index}_block{position}", row.activation, x
            block = variables["params"][place]
            if "expand" in block:
                y = layer(place, y, "expand", act)
            y = layer(
                place, y, "depthwise", act,
                strides=row.strides, pads=pads(y, row.kernel, row.strides), depthwise=True,
            )  # fmt: skip
            if "squeeze" in block:
                reduce, expand = block["squeeze"]["reduce"], block["squeeze"]["expand"]
                inner = ACTIVATIONS["silu" if act == "silu" else "relu"]
                z = inner(y.mean((1, 2)) @ reduce["kernel"] + reduce["bias"]) @ expand["kernel"] + expand["bias"]
                gate = 1 / (1 + np.exp(-z)) if act == "silu" else np.clip(z + 3, 0, 6) / 6
                y = y * gate[:, None, None]
            first = model.block is DepthwiseSeparable
            y = layer(place, y, "project", act if first else "")
            x = x + y if not first and x.shape == y.shape else y
    if model.last:
        x = layer("", x, "last_conv", model.activation)
    x = x.mean((1, 2))
    params = variables["params"]
    if model.dense:
        x = ACTIVATIONS[model.activation](x @ params["dense"]["kernel"] + params["dense"]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def residuals(model, variables, x, epsilon):
    layer, params, stats = layers_of(variables, epsilon), variables["params"], variables["batch_stats"]
    relu = ACTIVATIONS["relu"]
    x = layer("", x, "stem_conv", "" if model.preactivation else "relu")
    for index, blocks in enumerate(model.stages, start=1):
        for position in range(blocks):
            place, strides = f"stage{index}_block{position}", 2 if index > 1 and position == 0 else 1
            block = params[place]
            if model.preactivation:
                before = lambda x, name: relu(normalise(x, params[place][name], stats[place][name], epsilon))  # noqa: B023
                z = before(x, "norm1")
                y = before(convolve(z, block["conv1"], strides), "norm2")
                y = convolve(y, block["conv2"])
                x = y + (convolve(z, block["conv_shortcut"], strides) if "conv_shortcut" in block else x)
            else:
                y = layer(place, x, "conv1", "relu", "norm1")
                y = layer(place, y, "conv2", "relu", "norm2", strides=strides)
                y = layer(place, y, "conv3", "", "norm3")
                if "conv_shortcut" in block:
                    x = layer(place, x, "conv_shortcut", "", "norm_shortcut", strides=strides)
                x = relu(x + y)
    if model.preactivation:
        x = relu(normalise(x, params["last_norm"], stats["last_norm"], epsilon))
    return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]


def drawn(model, channels, seed):
    """Variables of a model from NumPy: kernels that keep the scale, small variances, so that the epsilon counts."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 8, channels), jnp.float32))

    def leaf(path, shape):
        name = path_name(path).rpartition("/")[2]
        if name == "var":
            return rng.uniform(0.003, 0.02, shape.shape)
        if name == "scale":
            return rng.uniform(0.1, 0.2, shape.shape)
        fan = max(int(np.prod(shape.shape[:-1])), 1) if name == "kernel" else 4
        return rng.normal(size=shape.shape) * np.sqrt(2 / fan)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


ROWS = (
    (BlockRow(6, hidden=4, activation="relu"),),
    (
        BlockRow(8, strides=2, hidden=12, kernel=5, squeeze=3, activation="hard_swish"),
        BlockRow(8, hidden=10, squeeze=2, activation="relu"),
    ),
)
SILU = ((BlockRow(4, hidden=4, squeeze=2, activation="silu"), BlockRow(4, hidden=8, activation="silu")),)
SEPARABLE = ((BlockRow(6, hidden=4), BlockRow(8, strides=2, hidden=6)),)
SAME = functools.partial(InvertedResidual, padding="same")
# name -> (model, [rows, columns, channels] of an image, reference, epsilon of its norms)
NETWORKS = {
    "v3": (
        InvertedResidualNet(ROWS, 4, last=12, dense=6, classes=3, activation="hard_swish", norm="batch-1e-3"),
        (9, 9, 1),
        inverted_residuals,
        1e-3,
    ),
    "silu": (
        InvertedResidualNet(SILU, 4, 1, last=0, classes=3, activation="silu"),
        (4, 5, 2),
        inverted_residuals,
        1e-5,
    ),
    "v1": (
        InvertedResidualNet(SEPARABLE, 4, 1, last=0, classes=3, block=DepthwiseSeparable),
        (6, 6, 3),
        inverted_residuals,
        1e-5,
    ),
    "same": (
        InvertedResidualNet(
            ROWS, 4, last=0, classes=3, norm="none", padding="same", block=SAME
        ),
        (12, 12, 3),
        inverted_residuals,
        None,
    ),
    "wide": (
        ResNet((1, 2), (6, 8), PreactivationBlock, classes=3, stem_features=4, preactivation=True),
        (6, 6, 3),
        residuals,
        1e-5,
    ),
    "bottleneck": (ResNet((2, 1), (8, 12), Bottleneck, classes=3, stem_features=4), (5, 5, 3), residuals, 1e-5),
}  # fmt: skip


# Those whose batch norms follow their convolutions.
FOLDED = ("v3", "silu", "v1", "bottleneck")


def test_networks_equal_an_independent_implementation():
    """Odd sizes, one channel and a batch of one among them, and with norms folded; one program for all."""
    rng = np.random.default_rng(0)
    variables = {name: drawn(model, image[-1], 1) for name, (model, image, *_) in NETWORKS.items()}
    images = {name: rng.normal(size=(1 if name == "v3" else 2, *image)) for name, (_, image, *_) in NETWORKS.items()}
    single = functools.partial(jax.tree.map, lambda leaf: np.asarray(leaf, np.float32))

    @jax.jit
    def run(variables, images):
        found = {name: case[0].apply(variables[name], images[name]) for name, case in NETWORKS.items()}
        folded = {}
        for name in FOLDED:
            model, inner = fold_batch_norms(NETWORKS[name][0], variables[name])
            assert "batch_stats" not in inner
            folded[name] = model.apply(inner, images[name])
        return found, folded

    found, folded = run(single(variables), single(images))
    for name, (model, _, reference, epsilon) in NETWORKS.items():
        expected = reference(model, variables[name], images[name], epsilon)
        tolerance = {"rtol": 2e-4, "atol": 2e-4 * np.abs(expected).max(), "err_msg": name}
        np.testing.assert_allclose(found[name], expected, **tolerance)
        if name in FOLDED:
            np.testing.assert_allclose(folded[name], expected, **tolerance)


def test_norms_that_cannot_be_folded_are_refused():
    fold = lambda name, variables: fold_batch_norms(NETWORKS[name][0], variables)
    alone = {"params": {"block": {"out": {}}}, "batch_stats": {"block": {"out": {"mean": np.zeros(3)}}}}
    for name, variables, message in (
        ("same", {"params": {}}, "norm='none' has no batch norms to fold; its variables hold params"),
        ("wide", {"params": {}, "batch_stats": {}}, "preactivation=True normalises before it convolves"),
        ("v1", alone, "no convolution stands before block/out"),
    ):
        with pytest.raises(ValueError, match=message):
            fold(name, variables)


def test_layers_hold_the_parameters_of_ordinary_convolutions():
    x = np.random.default_rng(0).normal(size=(1, 5, 5, 4)).astype(np.float32)

    @jax.jit
    def both(key, x):
        found = []
        for ours, theirs in (
            (DepthwiseConv(3, strides=2), nn.Conv(4, (3, 3), 2, feature_group_count=4)),
            (Pointwise(6), nn.Conv(6, (1, 1))),
        ):
            variables = ours.init(key, x)
            found.append((variables, ours.apply(variables, x), theirs.apply(variables, x)))
        return found

    for variables, ours, theirs in both(jax.random.key(0, impl="rbg"), x):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        assert set(variables["params"]) == {"kernel", "bias"}


# Blocks as arguments


GIVEN = []


class Shown(nn.Module):
    """A block with no parameters, which shows what it was given."""

    features: int
    strides: int
    hidden: int
    kernel: int
    squeeze: int
    activation: str
    norm: str
    dtype: object

    @nn.compact
    def __call__(self, x, train):
        GIVEN.append((self.strides, self.hidden, self.kernel, self.squeeze, self.activation, self.norm))
        return jnp.repeat(x[:, :: self.strides, :: self.strides, :1], self.features, -1)


def test_blocks_are_the_callers_and_a_row_may_have_its_own():
    rows = ((BlockRow(4, hidden=4, block=InvertedResidual), BlockRow(6, 2, 9, 5, 3, "silu")),)
    model = InvertedResidualNet(rows, stem=4, stem_strides=1, last=0, classes=3, block=Shown)
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    GIVEN.clear()
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    assert set(shapes["params"]) == {"stem_conv", "stem_norm", "stage1_block0", "head"}
    assert GIVEN == [(2, 9, 5, 3, "silu", "batch")]
    _, out = jax.eval_shape(functools.partial(model.apply, capture=True), shapes, image)
    assert {name: leaf.shape for name, leaf in out.items()} == {
        "stem": (1, 8, 8, 4), "stage1": (1, 4, 4, 6), "pooled": (1, 6),
    }  # fmt: skip


def test_no_shortcut_where_it_is_switched_off():
    """With silent weights a block gives back its input, or nothing."""
    x = np.ones((1, 4, 4, 3), np.float32)
    for skip, expected in ((True, x), (False, 0 * x)):
        block = InvertedResidual(3, hidden=6, norm="none", skip=skip)
        shapes = jax.eval_shape(functools.partial(block.init, train=False), jax.random.key(0), x)
        silent = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
        np.testing.assert_array_equal(jax.jit(block.apply, static_argnums=2)(silent, x, False), expected)


# Weights of others


TINY = {"stages": (1, 1), "widths": (4, 6)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small residual network with five outputs, as a file with PyTorch's names."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    model = image_model("resnet20", classes=5, **TINY)
    variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), drawn(model, 3, 0))
    write_tensors(path, export_weights(variables, layout_rules("resnet20", model)))
    return path, variables


def test_new_head_keeps_all_else(saved):
    path, variables = saved
    kept, same = load_image_model(path, "resnet20", **TINY)
    assert kept.classes == 5
    jax.tree.map(np.testing.assert_array_equal, same, variables)
    other, changed = load_image_model(path, "resnet20", classes=3, key=jax.random.key(1, impl="rbg"), **TINY)
    head = changed["params"].pop("head")
    assert other.classes == 3
    assert head["kernel"].shape == (same["params"].pop("head")["kernel"].shape[0], 3)
    assert np.std(head["kernel"]) > 0
    assert not head["bias"].any()
    jax.tree.map(np.testing.assert_array_equal, changed, same)


def test_weights_of_another_model_are_refused(saved):
    load = functools.partial(load_image_model, saved[0])
    for words, message in (
        (
            ("resnet20", {**TINY, "widths": (4, 8)}),
            r"does not hold the weights of this model.*layer2\.0\.bn1\.weight",
        ),
        (("mobilenet_v1_cifar", {}), r"torchvision has no MobileNetV1\. Use layout='timm'"),
        (("mobilenet_v2", {"layout": "torch-vision"}), "Did you mean 'torchvision'"),
        (("mlp", {}), "name='mlp' is not one of"),
        (("resnet20", {**TINY, "classes": 0}), "classes=0"),
    ):
        with pytest.raises(ValueError, match=message):
            load(words[0], **words[1])
    with pytest.raises(ValueError, match="has no layer 'head'"):
        new_head(DepthwiseConv(3), {"params": {"kernel": jnp.zeros(3)}}, 2)


def test_eight_bit_weights_are_scaled_or_refused():
    tensors = {
        "logits.weight": np.array([[0, 130, 255]], np.uint8),
        "logits.weight_scale": np.array([0.5], np.float32),
        "logits.weight_zero": np.array([130], np.uint8),
        "logits.bias": np.ones(1, np.float32),
    }
    found = tflite_tensors(tensors, "file")
    assert found.keys() == {"logits.weight", "logits.bias"}
    np.testing.assert_array_equal(found["logits.weight"], [[-65, 0, 62.5]])
    with pytest.raises(ValueError, match=r"file: logits\.weight has dtype uint8, but logits\.weight_zero is not there"):
        tflite_tensors({name: tensor for name, tensor in tensors.items() if not name.endswith("zero")}, "file")


def imagenet_sample(rows, size=128):
    path = SHARED / "data/imagenet_sample128/test.parquet"
    if not path.is_file() or not (SHARED / "models/mobilenet_v1_025_128").is_dir():
        pytest.skip("the photographs may not be redistributed; ../shared is absent")
    import PIL.Image
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path).slice(0, rows)
    images = [PIL.Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in table["image"].to_pylist()]
    if size != 128:
        images = [image.resize((size, size), PIL.Image.Resampling.BILINEAR) for image in images]
    return np.stack([np.asarray(image) for image in images]), np.asarray(table["label"])


def hits(name, images, labels, batch=50):
    """Shares of photographs whose class is the first, and among the first five."""
    model, variables = pretrained_mobilenet(name)
    apply = jax.jit(lambda variables, x: jax.lax.top_k(model.apply(variables, x.astype(jnp.float32) / 127.5 - 1), 5)[1])
    found = np.concatenate([apply(variables, images[i : i + batch]) for i in range(0, len(images), batch)])
    right = found == labels[:, None] + 1
    return right[:, 0].mean(), right.any(1).mean()


@pytest.mark.nightly
@pytest.mark.optimized  # it runs longer than it compiles
@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("mobilenet_v1_025_128", 128, (0.458, 0.701)),
        ("mobilenet_v2_10_224", 128, (0.619, 0.854)),
        ("mobilenet_v2_10_224", 224, (0.728, 0.913)),
    ],
)
def test_stated_accuracy(name, size, expected, monkeypatch):
    """To one photograph in the thousand, for another order of sums."""
    images, labels = imagenet_sample(1000, size)
    monkeypatch.setenv("EFFJAX_MODELS", str(SHARED / "models"))
    np.testing.assert_allclose(hits(name, images, labels), expected, atol=0.0011)


def test_trained_weights_know_some_photographs(monkeypatch):
    """A network with a layer in the wrong place knows none of a thousand classes."""
    monkeypatch.setenv("EFFJAX_MODELS", str(SHARED / "models"))
    assert hits("mobilenet_v1_025_128", *imagenet_sample(32), batch=32)[1] > 0.5


# Bad input, and what is unusual


def test_images_that_are_none_are_refused_by_name():
    models = [image_model(name, classes=3) for name in ("cnn", "resnet20", "mobilenet_v1_cifar")]
    for model in models:
        for shape, dtype, error, message in (
            ((1, 8, 8, 3), np.uint8, TypeError, r"x has dtype uint8.*astype\('float32'\) / 255,"),
            ((1, 8, 8, 3), np.uint16, TypeError, r"x has dtype uint16.*/ 65535,"),
            ((8, 8, 3), np.float32, ValueError, r"x has shape \(8, 8, 3\).*One is a batch of one: x\[None\]"),
            ((1, 0, 8, 3), np.float32, ValueError, r"x has shape \(1, 0, 8, 3\)"),
        ):
            with pytest.raises(error, match=message):
                jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, dtype))


def test_illegal_settings_are_named():
    image = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32)
    block = lambda **fields: InvertedResidual(**{"features": 4, "hidden": 8, **fields})
    for module, message in (
        (block(hidden=0), "hidden=0 must be an integer"),
        (block(kernel=4), "kernel=4 has no middle: give an odd one, or padding='same'"),
        (block(activation="relu7"), "Did you mean .*'relu6'"),
        (block(padding="SAME"), "padding='SAME' is not one of 'symmetric', 'same'"),
        (block(squeeze=-1), "squeeze=-1 must be an integer"),
        (block(norm="batchnorm"), "Did you mean 'batch'"),
        (DepthwiseSeparable(4, hidden=8), "hidden=8, squeeze=0.*Use hidden=4"),
        (Bottleneck(6), "features=6 must be a multiple of expansion=4"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda key, x, module=module: module.init(key, x, False), jax.random.key(0), image)
    for make, message in (
        (lambda: image_model("mobilenetv2"), "Did you mean 'mobilenet_v2"),
        (lambda: image_model("mobilenet_v2", width=0), "width=0 must be a number"),
        (lambda: image_model("mobilenet_v2", strides=(1, 2)), r"strides=\(1, 2\): mobilenet_v2 has 7 stages"),
        (lambda: pretrained_mobilenet("mobilenet_v2"), "Did you mean 'mobilenet_v2_10_224'"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_task_takes_the_names():
    columns = {"image": np.zeros((4, 8, 8, 1), np.uint8), "label": np.arange(4, dtype=np.int32) % 3}
    data = DataSet("black", {"train": columns, "test": columns}, ("a", "b", "c"), "", "", "image")
    task = image_task(data, "mobilenet_v1_cifar", dtype="bfloat16", remat=True)
    assert task.name == "black/mobilenet_v1_cifar"
    assert (task.module.classes, task.module.remat, task.dtype) == (3, True, "bfloat16")
    with pytest.raises(ValueError, match="Did you mean 'mobilenet_v2"):
        image_task(data, "mobilenet-v2")
    wide = {"image": np.zeros((4, 8, 8, 1), np.uint16), "label": columns["label"]}
    with pytest.raises(ValueError, match="image has dtype uint16; it must be uint8, or floating"):
        image_task(dataclasses.replace(data, splits={"train": wide, "test": wide}), "mobilenet_v1_cifar")
