"""MLP, CNN and ResNet: the published architecture, its weights, and blocks given by the caller."""

import functools
import io
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from effjax.core.cost import count_params
from effjax.data.sets import DataSet
from effjax.models.cnn import CNN
from effjax.models.convert import export_weights, find_weights
from effjax.models.mlp import MLP
from effjax.models.resnet import RESNET_CIFAR10_RULES, SIZES, BasicBlock, ResNet, pretrained_resnet, resnet
from effjax.tasks.image import image_task

SHARED = Path(__file__).resolve().parents[2] / "../shared"
IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


def shapes(model, image=IMAGE):
    return jax.eval_shape(model.init, jax.random.key(0), image)


# An independent ResNet in NumPy, float64, channels first, straight from the tensors of the file.


def convolve(x, kernel, stride):
    height, width = x.shape[2] // stride, x.shape[3] // stride
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    taps = [
        np.einsum(
            "nchw,oc->nohw",
            padded[:, :, i : i + stride * height : stride, j : j + stride * width : stride],
            kernel[:, :, i, j],
            optimize=True,
        )
        for i in range(3)
        for j in range(3)
    ]
    return sum(taps)


def reference_logits(tensors, images):
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    take = lambda name: tensors[name][:, None, None]

    def norm(x, name):
        scale = take(f"{name}.weight") / np.sqrt(take(f"{name}.running_var") + 1e-5)
        return (x - take(f"{name}.running_mean")) * scale + take(f"{name}.bias")

    x = np.maximum(norm(convolve(images.transpose(0, 3, 1, 2), tensors["conv1.weight"], 1), "bn1"), 0)
    for stage in (1, 2, 3):
        for block in range(sum(name.startswith(f"layer{stage}.") and "conv1" in name for name in tensors)):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = np.maximum(norm(convolve(x, tensors[f"{name}.conv1.weight"], stride), f"{name}.bn1"), 0)
            y = norm(convolve(y, tensors[f"{name}.conv2.weight"], 1), f"{name}.bn2")
            if stride == 2:
                x = np.pad(x[:, :, ::2, ::2], ((0, 0), (y.shape[1] // 4,) * 2, (0, 0), (0, 0)))
            x = np.maximum(x + y, 0)
    return x.mean((2, 3)) @ tensors["linear.weight"].T + tensors["linear.bias"]


def test_packaged_network_equals_an_independent_implementation():
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3))
    model, variables = pretrained_resnet("resnet20")
    logits = jax.jit(model.apply)(variables, images.astype(np.float32))
    expected = reference_logits(load_file(find_weights("resnet_cifar10/resnet20")), images)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_packaged_network_goes_back_to_the_same_tensors():
    _, variables = pretrained_resnet("resnet20")
    original = load_file(find_weights("resnet_cifar10/resnet20"))
    exported = export_weights(variables, RESNET_CIFAR10_RULES)
    assert exported.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(exported[name], tensor.astype(np.float32), err_msg=name)


def cifar10_test(rows):
    path = SHARED / "data/cifar10/test.parquet"
    if not path.is_file():
        pytest.skip("CIFAR-10 may not be redistributed; its folder ../shared is absent")
    import PIL.Image
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path).slice(0, rows)
    images = [np.asarray(PIL.Image.open(io.BytesIO(row["bytes"]))) for row in table["image"].to_pylist()]
    columns = {"image": np.stack(images), "label": np.asarray(table["label"], np.int32)}
    return DataSet("cifar10", {"train": columns, "test": columns}, tuple("0123456789"), "", "", "image")


@pytest.mark.nightly
@pytest.mark.optimized  # it runs longer than it compiles
def test_stated_accuracy_on_a_thousand_images():
    task = image_task(cifar10_test(1000), "resnet20")
    scores = task.evaluate(pretrained_resnet("resnet20")[1])
    assert scores["accuracy"] == pytest.approx(0.916, abs=0.0011)
    assert scores["nll"] == pytest.approx(0.39505, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "accuracy"), [("resnet20", 0.9180), ("resnet32", 0.9256), ("resnet44", 0.9308), ("resnet56", 0.9339)]
)
def test_stated_accuracy(name, accuracy, monkeypatch):
    if not (SHARED / "models/resnet_cifar10").is_dir():
        pytest.skip("the deeper networks lie in ../shared/models, which is absent")
    monkeypatch.setenv("EFFJAX_MODELS", str(SHARED / "models"))
    task = image_task(cifar10_test(8000), name)
    assert task.evaluate(pretrained_resnet(name)[1])["accuracy"] == pytest.approx(accuracy, abs=0.00013)


@pytest.mark.parametrize(("name", "params"), list(zip(SIZES, (269_722, 464_154, 658_586, 853_018), strict=True)))
def test_published_parameter_counts(name, params):
    assert count_params(shapes(resnet(name))["params"]) == params


def test_misspelled_name_gets_the_right_one():
    with pytest.raises(ValueError, match="Did you mean 'resnet20'"):
        resnet("resnet-20")


def test_missing_weights_say_what_to_set(monkeypatch):
    monkeypatch.delenv("EFFJAX_MODELS", raising=False)
    with pytest.raises(FileNotFoundError, match="EFFJAX_MODELS"):
        pretrained_resnet("resnet56")


def test_weights_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"resnet20\.safetensors does not hold the weights.*head/kernel"):
        pretrained_resnet("resnet20", classes=100)


# Blocks as arguments


class Scaled(nn.Module):
    """A block with one parameter, to be seen in a plan."""

    features: int
    strides: int
    norm: str
    dtype: object

    @nn.compact
    def __call__(self, x, train):
        gain = self.param("gain", nn.initializers.ones, ())
        x = x[:, :: self.strides, :: self.strides, :1] * gain.astype(self.dtype)
        return jnp.broadcast_to(x, (*x.shape[:3], self.features))


def test_blocks_are_the_callers():
    variables = shapes(ResNet(stages=(1, 2), widths=(4, 8), block=Scaled))
    assert set(variables["params"]) == {
        "stem_conv", "stem_norm", "stage1_block0", "stage2_block0", "stage2_block1", "head",
    }  # fmt: skip
    assert set(variables["params"]["stage2_block1"]) == {"gain"}
    mixed = shapes(ResNet(stages=((BasicBlock, Scaled), 1), widths=(4, 8)))["params"]
    assert "conv1" in mixed["stage1_block0"]
    assert set(mixed["stage1_block1"]) == {"gain"}
    assert "conv1" in mixed["stage2_block0"]


def test_projection_shortcut_only_where_the_shape_changes():
    block = functools.partial(BasicBlock, shortcut="project")
    params = shapes(ResNet(stages=(1, 2), widths=(4, 8), block=block))["params"]
    have = {name for name, block in params.items() if "conv_shortcut" in block}
    assert have == {"stage2_block0"}


def test_pad_shortcut_is_option_a():
    block = BasicBlock(features=8, strides=2)
    x = np.arange(1, 65, dtype=np.float32).reshape(1, 4, 4, 4)
    variables = jax.eval_shape(lambda: block.init(jax.random.key(0), x, False))
    silent = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), variables)
    y = block.apply(silent, x, False)
    np.testing.assert_array_equal(y[..., 2:6], x[:, ::2, ::2])
    assert not y[..., :2].any()
    assert not y[..., 6:].any()


def test_illegal_settings_are_named():
    image = jnp.zeros((1, 8, 8, 3))
    for model, message in (
        (ResNet(stages=(1, 1), widths=(4,)), "stages=.* and widths="),
        (ResNet(stages=(1,), widths=(4,), norm="layer"), "norm='layer' is not one of 'batch', .*'group', 'none'"),
        (ResNet(stages=(1,), widths=(4,), stem="imagnet"), "Did you mean 'imagenet'"),
        (ResNet(stages=(1,), widths=(4,), block=functools.partial(BasicBlock, shortcut="A")), "shortcut='A'"),
        (ResNet(stages=(1, 1), widths=(8, 4)), "features=4 must be at least the input's 8 channels"),
        (CNN((4,), norm="btach"), "Did you mean 'batch'"),
    ):
        with pytest.raises(ValueError, match=message):
            shapes(model, image)


# All backbones

SMALL = [
    MLP((8, 4), classes=3),
    CNN((4, 8), classes=3, norm="batch"),
    ResNet(stages=(1, 1), widths=(4, 8), classes=3),
]
by_type = pytest.mark.parametrize("model", SMALL, ids=lambda model: type(model).__name__)


@by_type
def test_captured_stages(model):
    image = jnp.ones((2, 8, 8, 3))
    variables = jax.jit(model.init)(jax.random.key(0, impl="rbg"), image)
    logits, out = jax.jit(functools.partial(model.apply, capture=True))(variables, image)
    np.testing.assert_allclose(logits, jax.jit(model.apply)(variables, image), rtol=1e-5, atol=1e-6)
    assert {name: leaf.shape for name, leaf in out.items()} == {
        "MLP": {"layer0": (2, 8), "layer1": (2, 4)},
        "CNN": {"layer0": (2, 4, 4, 4), "layer1": (2, 2, 2, 8), "pooled": (2, 8)},
        "ResNet": {"stem": (2, 8, 8, 4), "stage1": (2, 8, 8, 4), "stage2": (2, 4, 4, 8), "pooled": (2, 8)},
    }[type(model).__name__]


@by_type
def test_remat_changes_the_program_and_nothing_else(model):
    image = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    variables = jax.jit(model.init)(jax.random.key(0, impl="rbg"), image)

    def program(model):
        def loss(params):
            logits, state = model.apply({**variables, "params": params}, image, train=True, mutable=["batch_stats"])
            return (logits**2).sum(), state

        return jax.grad(loss, has_aux=True)

    plain, remat = program(model), program(model.clone(remat=True))
    params = variables["params"]
    assert "prevent_cse" in str(jax.make_jaxpr(remat)(params))
    assert "prevent_cse" not in str(jax.make_jaxpr(plain)(params))
    assert shapes(model.clone(remat=True), image) == shapes(model, image)
    for a, b in zip(jax.tree.leaves(jax.jit(plain)(params)), jax.tree.leaves(jax.jit(remat)(params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
