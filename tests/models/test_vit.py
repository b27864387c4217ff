"""Vision transformers: the official multi-resolution vectors, sizes, forms of one function, folders."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from effjax.core.cost import count_params
from effjax.models.convert import import_weights
from effjax.models.vit import ViT, named_vit
from effjax.models.vit_files import load_vit, save_vit
from effjax.models.vit_layouts import split_projections, timm_rules
from effjax.transformers.flexible_patches import resize_patch_kernel
from effjax.transformers.position_tables import position_rows, position_selector

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "icpc"
# Where gradients of the reference lie in our parameters; the first third of qkv's is the query's.
GRADIENTS = {
    "pos_embed": "position",
    "cls_token": "class_token",
    "patch_embed/proj/bias": "patch_bias",
    "blocks/0/mlp/fc1/bias": "layer_0/mlp/up/bias",
    "norm/weight": "norm/scale",
}


@functools.cache
def official():
    with np.load(REFERENCE / "vit_multi_resolution.npz") as reference:
        held = dict(reference)
    grid, patch, hidden, layers, heads, classes, _ = held["config"].tolist()
    model = ViT(
        classes=classes,
        patch=patch,
        grid=(grid, grid),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=2 * hidden,
        positions=position_selector("crop"),
        dtype=jnp.float64,
    )
    tensors = {
        name.removeprefix("param/").replace("/", "."): value.astype(np.float64)
        for name, value in held.items()
        if name.startswith("param/")
    }
    with jax.enable_x64():
        shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, grid * patch, grid * patch, 3)))
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float64), shapes["params"])
        params = import_weights(split_projections(Path("reference"), tensors), target, timm_rules(model))
    return model, params, held


@pytest.mark.parametrize(
    "size",
    [
        "size96x64",
        *(
            pytest.param(size, marks=pytest.mark.nightly)
            for size in ("size32x32", "size96x96", "size80x80", "size64x64", "size48x48", "size48x80")
        ),
    ],
)
def test_equals_the_official_model_at_every_size(size):
    model, params, reference = official()
    images = reference[f"{size}/image_u8"].transpose(0, 2, 3, 1) / 255
    labels = reference["labels"]

    def loss(params):
        logits = model.apply({"params": params}, images)
        return -jax.nn.log_softmax(logits)[np.arange(len(labels)), labels].mean(), logits

    with jax.enable_x64():
        (value, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logits, reference[f"{size}/logits"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(value, reference[f"{size}/loss"], rtol=0, atol=1e-12)
    at = lambda path: functools.reduce(lambda tree, name: tree[name], path.split("/"), gradient)
    for name, path in GRADIENTS.items():
        np.testing.assert_allclose(at(path), reference[f"{size}/grad/{name}"], rtol=0, atol=1e-12, err_msg=name)
    qkv = np.concatenate([at(f"layer_0/attention/{part}/bias") for part in ("query", "key", "value")])
    np.testing.assert_allclose(qkv, reference[f"{size}/grad/blocks/0/attn/qkv/bias"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(at("head/kernel").T, reference[f"{size}/grad/head/weight"], rtol=0, atol=1e-12)
    height, width = (side // 16 for side in images.shape[1:3])
    others = np.delete(np.arange(37), position_rows((6, 6), (height, width)))
    np.testing.assert_array_equal(np.asarray(gradient["position"])[0, others], 0)


# Published numbers of parameters, with 1000 classes.
COUNTS = {
    "vit_tiny_patch16_224": 5_717_416,
    "vit_small_patch16_224": 22_050_664,
    "vit_base_patch16_224": 86_567_656,
    "vit_base_patch16_384": 86_859_496,
    "vit_base_patch32_224": 88_224_232,
    "vit_large_patch16_224": 304_326_632,
    "deit_base_distilled_patch16_224": 87_338_192,
}


@pytest.mark.parametrize(
    "name",
    [name if "base_patch16" in name else pytest.param(name, marks=pytest.mark.nightly) for name in COUNTS],
)
def test_named_sizes_have_the_published_numbers_of_parameters(name):
    model = named_vit(name, scan_layers=True)
    side = model.grid[0] * model.patch
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    assert count_params(shapes) == COUNTS[name]
    assert jax.eval_shape(model.apply, shapes, images).shape == (1, 1000)


TINY = ViT(classes=3, patch=4, grid=(2, 2), hidden_size=8, num_layers=1, num_heads=2)
TWO = TINY.clone(num_layers=2)
IMAGES = np.random.default_rng(0).normal(size=(3, 8, 8, 2)).astype(np.float32)


@functools.cache
def params_of(model, channels=2):
    side = tuple(side * model.patch for side in model.grid)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *side, channels), jnp.float32))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape).astype(np.float32), shapes["params"])


@functools.cache
def program(model, patch):
    return jax.jit(lambda params, images, keep: model.apply({"params": params}, images, patch=patch, keep=keep))


def run(model, params, images=IMAGES, *, patch=None, keep=None):
    return np.asarray(program(model, patch)(params, images, keep))


@functools.cache
def plain():
    return run(TINY, params_of(TINY))


def test_padding_the_sequence_changes_nothing():
    padded = run(TINY.clone(token_multiple=8), params_of(TINY))
    np.testing.assert_allclose(padded, plain(), rtol=1e-5, atol=1e-6)


def test_scanned_layers_are_the_same_layers():
    params = dict(params_of(TWO))
    expected = run(TWO, params)
    stack = [params.pop(f"layer_{i}") for i in range(2)]
    params["layers"] = jax.tree.map(lambda *leaves: np.stack(leaves), *stack)
    np.testing.assert_allclose(run(TWO.clone(scan_layers=True), params), expected, rtol=1e-5, atol=1e-6)


def test_a_small_image_is_the_large_one_without_its_other_patches():
    params = params_of(TINY.clone(grid=(3, 3)))
    large = np.random.default_rng(2).normal(size=(3, 12, 12, 2)).astype(np.float32)
    corner = run(TINY.clone(grid=(3, 3), positions=position_selector("crop")), params, large[:, :8, :4])
    kept = run(TINY.clone(grid=(3, 3)), params, large, keep=np.array([0, 3]))
    np.testing.assert_allclose(corner, kept, rtol=1e-5, atol=1e-6)
    rows = np.array([[0, 3], [1, 2], [8, 4]])
    each = run(TINY.clone(grid=(3, 3)), params, large, keep=rows)
    np.testing.assert_allclose(each[0], kept[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        each[1], run(TINY.clone(grid=(3, 3)), params, large, keep=rows[1])[1], rtol=1e-5, atol=1e-6
    )


def test_larger_patches_of_an_enlarged_image_are_the_same_tokens():
    model = TINY.clone(patch_kernel=resize_patch_kernel)
    enlarged = jax.image.resize(IMAGES.reshape(3, 2, 4, 2, 4, 2), (3, 2, 8, 2, 8, 2), "bilinear", antialias=False)
    found = run(model, params_of(TINY), np.asarray(enlarged).reshape(3, 16, 16, 2), patch=8)
    np.testing.assert_allclose(found, plain(), rtol=1e-4, atol=1e-5)


def test_an_empty_batch():
    images = jax.ShapeDtypeStruct((0, 8, 8, 2), jnp.float32)
    assert jax.eval_shape(TINY.apply, {"params": params_of(TINY)}, images).shape == (0, 3)


def test_pools():
    mean = TINY.clone(pool="mean", class_token=False, classes=None)
    params = params_of(mean)
    assert params["position"].shape == (1, 4, 8)
    features = run(mean, params)
    np.testing.assert_allclose(
        ((features - params["norm"]["bias"]) / params["norm"]["scale"]).mean(1), 0, atol=1e-5
    )  # normed after the mean
    # Without positions the mean of the patches does not know their order.
    blind = {**params, "position": np.zeros_like(params["position"])}
    turned = IMAGES.reshape(3, 2, 4, 8, 2)[:, ::-1].reshape(IMAGES.shape)
    np.testing.assert_allclose(run(mean, blind, turned), run(mean, blind), rtol=1e-4, atol=1e-5)
    both = TINY.clone(pool="distilled", distillation_token=True)
    params = params_of(both)
    one = {**params, "distillation_head": jax.tree.map(np.zeros_like, params["distillation_head"])}
    two = {**params, "head": jax.tree.map(np.zeros_like, params["head"])}
    np.testing.assert_allclose(run(both, one) + run(both, two), run(both, params), rtol=1e-4, atol=1e-5)


def test_bfloat16_computes_narrow_and_answers_wide():
    model = TINY.clone(dtype=jnp.bfloat16)
    logits = run(model, params_of(TINY))
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, plain(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("model", "images", "options", "words"),
    [
        (TINY, IMAGES[:, :6], {}, "6 x 8 pixels do not divide into patches of 4 x 4.*8 x 8"),
        (TINY, IMAGES[:, :4], {}, r"1 x 2 patches.*positions are for 2 x 2.*position_selector"),
        (TINY.clone(positions=position_selector()), np.zeros((1, 12, 8, 2), np.float32), {}, r"grid\[0\]=3"),
        (TINY.clone(positions=lambda table, grid: table[:, 1:]), IMAGES, {}, r"positions gives \(1, 4, 8\)"),
        (TINY, IMAGES, {"patch": 2}, "patch=2.*resize_patch_kernel"),
        (TINY, IMAGES[0], {}, r"images\[None\]"),
        (TINY, IMAGES, {"keep": np.array([4])}, "keep runs from 4 to 4"),
        (TINY, IMAGES, {"keep": np.array([0.5])}, "expected integers"),
        (TINY, IMAGES, {"keep": np.zeros((2, 1), int)}, "keep has 2 rows for 3 images"),
        (TINY.clone(pool="first"), IMAGES, {}, "pool='first'"),
        (TINY.clone(class_token=False), IMAGES, {}, "pool='cls' needs class_token=True"),
        (TINY.clone(pool="distilled"), IMAGES, {}, "needs distillation_token=True"),
        (TINY.clone(num_heads=3), IMAGES, {}, "num_heads=3 must divide"),
        (TINY.clone(classes=0), IMAGES, {}, "classes=0"),
    ],
)
def test_refuses(model, images, options, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(functools.partial(model.init, **options), jax.random.key(0), images)


@pytest.mark.parametrize("name", ["vit_bse_patch16_224", "vit_base", "vit_base_distilled_patch16_224", "swin_tiny"])
def test_names_that_are_none(name):
    with pytest.raises(ValueError, match=f"name='{name}' is no vision transformer"):
        named_vit(name)


def test_a_name_whose_image_is_no_multiple_of_the_patch():
    with pytest.raises(ValueError, match="do not divide"):
        named_vit("vit_base_patch16_230")


MODELS = {
    "huggingface": TWO.clone(grid=(2, 3)),
    "timm": TINY.clone(pool="mean", class_token=False),
    "timm-distilled": TINY.clone(pool="distilled", distillation_token=True, scan_layers=True, num_layers=2),
    "huggingface-without-head": TINY.clone(classes=None),
}


@pytest.mark.parametrize("kind", MODELS)
def test_folders_come_back_as_they_were(kind, tmp_path):
    model = MODELS[kind]
    params = params_of(model)
    save_vit(tmp_path, model, params, layout=kind.partition("-")[0])
    found = load_vit(tmp_path, scan_layers=model.scan_layers)
    assert found.module == model.clone(intermediate_size=32)
    assert not found.initialised
    jax.tree.map(np.testing.assert_array_equal, found.params, params)


def test_the_names_in_the_folders(tmp_path):
    params = params_of(TWO)
    save_vit(tmp_path / "a", TWO, params)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    kernel = tensors["vit.embeddings.patch_embeddings.projection.weight"]
    np.testing.assert_array_equal(kernel, params["patch_kernel"].transpose(3, 2, 0, 1))
    query = tensors["vit.encoder.layer.1.attention.attention.query.weight"]
    np.testing.assert_array_equal(query, params["layer_1"]["attention"]["query"]["kernel"].T)
    save_vit(tmp_path / "b", TWO, params, layout="timm", dtype=jnp.bfloat16)
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    joint = tensors["blocks.1.attn.qkv.weight"]
    assert joint.dtype == jnp.bfloat16
    np.testing.assert_array_equal(joint[:8], np.asarray(query, jnp.bfloat16))
    assert joint.shape == (24, 8)


def test_another_number_of_classes_gets_a_new_head(tmp_path):
    save_vit(tmp_path, TINY, params_of(TINY), config={"id2label": {"0": "a", "1": "b", "2": "c"}})
    found = load_vit(tmp_path, classes=5, key=jax.random.key(1), positions=position_selector("interp"))
    assert found.initialised == ("head/bias", "head/kernel")
    assert found.params["head"]["kernel"].shape == (8, 5)
    assert float(jnp.std(found.params["head"]["kernel"])) > 0
    np.testing.assert_array_equal(found.params["position"], params_of(TINY)["position"])
    assert found.config["id2label"]["2"] == "c"
    same = load_vit(tmp_path, classes=3)
    assert not same.initialised


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder of each layout."""
    folders = {layout: tmp_path_factory.mktemp(layout) for layout in ("huggingface", "timm")}
    for layout, folder in folders.items():
        save_vit(folder, TINY, params_of(TINY), layout=layout)
    return folders


def damaged(sound, tmp_path, *, config=None, tensors=None, layout="huggingface"):
    shutil.copytree(sound[layout], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
    if tensors is not None:
        path = tmp_path / "model.safetensors"
        held = load_file(path)
        tensors(held)
        save_file(held, path)
    return tmp_path


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"config": {"model_type": "swin"}}, "model_type='swin' is not one of"),
        ({"config": {"image_size": 10}}, "do not divide into patches of 4"),
        ({"config": {"image_size": "8"}}, "image_size='8' must be a number of pixels"),
        ({"config": {"patch_size": [4, 2]}}, "patches that are no squares"),
        ({"config": {"num_hidden_layers": 10**6}}, "says 1000000 layers"),
        ({"config": {"num_attention_heads": 3}}, "describes no model that can be built.*num_heads=3"),
        ({"config": {"qkv_bias": False}}, "qkv_bias=False is not supported"),
        ({"config": {"hidden_size": 16}}, "misfitting"),
        ({"tensors": lambda held: held.pop("vit.layernorm.weight")}, r"missing: vit.layernorm.weight -> norm/scale"),
        ({"tensors": lambda held: held.update(more=np.zeros(1, np.float32))}, "unexpected: more"),
        ({"layout": "timm", "config": {"architecture": "swin_tiny"}}, "name='swin_tiny' is no vision transformer"),
        (
            {"layout": "timm", "config": {"model_args": {"init_values": 1.0}}},
            "model_args init_values are not supported",
        ),
        ({"layout": "timm", "config": {"global_pool": "map", "model_args": {}}}, "global_pool='map'"),
        (
            {
                "layout": "timm",
                "tensors": lambda held: held.update({"blocks.0.attn.qkv.bias": np.zeros(4, np.float32)}),
            },
            "must hold three equal parts",
        ),
    ],
)
def test_foreign_folders_are_refused(damage, words, sound, tmp_path):
    with pytest.raises(ValueError, match=words):
        load_vit(damaged(sound, tmp_path, **damage))


def test_what_a_layout_has_no_place_for():
    params = params_of(TINY)
    for model, layout, words in (
        (TINY.clone(pool="mean"), "huggingface", "Save it with layout='timm'"),
        (TINY.clone(layer_norm_eps=1e-12), "timm", "layer_norm_eps=1e-12"),
        (TINY.clone(distillation_token=True), "timm", "Use 'huggingface'"),
        (TINY.clone(num_layers=2), "timm", "params: layer_1"),
        (TINY, "keras", "layout='keras'"),
    ):
        with pytest.raises(ValueError, match=words):
            save_vit("nowhere", model, params, layout=layout)
    with pytest.raises(ValueError, match="patch_kernel"):
        save_vit("nowhere", TINY, {"params": params})
