"""SI-CNN: parity with the reference of its formulation, invariants, counts, surgery on networks, bad input."""

import functools
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.core.macs import count_macs
from effjax.models.inverted_residual import InvertedResidual
from effjax.models.mobilenet import mobilenet
from effjax.models.residual_blocks import BasicBlock, Bottleneck, PreactivationBlock
from effjax.models.resnet import ResNet
from effjax.vision.anchors import anchor_mask, sample_anchors, spatially_interpolate, upsample_nearest, upsample_tent
from effjax.vision.si_block import CheapPath, SIBlock, SIConfig, alternating_offsets
from effjax.vision.si_cnn import BlockSite, block_sites, interpolated, warm_start

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "si_cnn"
BLOCKS = sorted(path.stem.removeprefix("block_") for path in REFERENCE.glob("block_*.npz"))
RARE = ("hard_s1", "hard_s4_relu")  # what is in them is in other tests too
KEY = jax.random.key(0, impl="rbg")  # quicker to compile than the default


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def filled(module, *inputs):
    """Variables of a module, all random, without compiling its initialisation."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda key, *inputs: module.init(key, *inputs, train=False), KEY, *inputs)
    draw = lambda path, leaf: (
        rng.uniform(0.5, 1.5, leaf.shape) if "var" in str(path) else rng.normal(0, 0.4, leaf.shape)
    )
    return jax.tree_util.tree_map_with_path(lambda path, leaf: np.float32(draw(path, leaf)), shapes)


def assert_close(left, right, atol=1e-5):
    np.testing.assert_allclose(left, right, rtol=0, atol=atol)


# Parity


def block_of(cfg, dtype):
    """The reference's block as modules; its norms are folded, so that they stand in kernels and biases."""
    kinds = {4032: "dw3_g2", 4050: "dw3_pw", 0: "identity"}  # named by their multiply-accumulates
    features, none = cfg["C"], {"norm": "none", "dtype": dtype}
    act = cfg["act"]
    core = InvertedResidual(features, hidden=cfg["E"], kernel=cfg["k"], activation=act, skip=False, **none)
    return SIBlock(
        core,
        CheapPath(features, kinds.get(cfg["cheap"], "dw3"), **none),
        stride=cfg["stride"],
        alpha=cfg["alpha"],
        sample=cfg["sample"],
        interpolation=cfg["interp"],
        residual=cfg["residual"],
    )


def folded(p):
    layer = lambda name, kernel: {"kernel": p[kernel] * p[f"{name}/scale"][None, None, None], "bias": p[f"{name}/bias"]}
    core = {name: layer(short, f"{short}/w") for name, short in (("expand", "expand"), ("depthwise", "dw"))}
    if "cheap/pw" in p:
        cheap = {"depthwise": {"kernel": p["cheap/dw"]}, "pointwise": layer("cheap", "cheap/pw")}
    elif "cheap/dw" in p:
        cheap = {"depthwise": layer("cheap", "cheap/dw")}
    else:
        cheap = {"scale": p["cheap/scale"], "bias": p["cheap/bias"]}
    gate = {"gate": {"kernel": p["gate/w"][:, None], "bias": p["gate/b"][None]}} if "gate/w" in p else {}
    alpha = {"alpha": p["alpha"]} if "alpha" in p else {}
    return {"core": core | {"project": layer("project", "project/w")}, "cheap": cheap, **gate, **alpha}


@pytest.mark.parametrize(
    ("name", "dtype", "atol"),
    [
        *(pytest.param(name, "float64", 1e-10, marks=[pytest.mark.nightly] * (name in RARE)) for name in BLOCKS),
        pytest.param("hard_dw3", "float32", 2e-5, marks=pytest.mark.nightly),
    ],
)
def test_blocks_match_the_reference(name, dtype, atol):
    with jax.enable_x64(True), np.load(REFERENCE / f"block_{name}.npz") as file:
        cfg = json.loads(str(file["cfg"]))
        data = {key: np.asarray(file[key], dtype) for key in file.files if key != "cfg"}
        params = {key.removeprefix("param/"): value for key, value in data.items() if key.startswith("param/")}
        block = block_of(cfg, jnp.dtype(dtype))

        @jax.jit
        def run(params, x):
            y, back = jax.vjp(lambda params, x: block.apply({"params": folded(params)}, x, False), params, x)
            return y, *back(jnp.asarray(data["cotangent"]))

        y, grads, grad_x = run(params, data["x"])
        scale = 1 if dtype == "float64" else max(1, np.abs(data["y"]).max())
        assert y.dtype == dtype
        assert_close(y, data["y"], atol * scale)
        assert_close(grad_x, data["grad_x"], atol * max(1, np.abs(data["grad_x"]).max()))
        for key, grad in grads.items():
            assert_close(grad, data[f"grad/{key}"], atol * max(1, np.abs(data[f"grad/{key}"]).max()))


def test_upsampling_matches_the_reference():
    with jax.enable_x64(True), np.load(REFERENCE / "upsample.npz") as file:
        cases = [{key: file[f"{j}/{key}"] for key in ("a", "s", "cotangent")} for j in range(5)]
        strides = [int(case["s"]) for case in cases]

        @jax.jit
        def run(anchors, cotangents):
            found = []
            for a, s, c in zip(anchors, strides, cotangents, strict=True):
                tent, back = jax.vjp(lambda a, s=s, c=c: upsample_tent(a, s, c.shape[1:3]), a)
                found.append((tent, upsample_nearest(a, s, c.shape[1:3]), back(c)[0]))
            return found

        found = run([case["a"] for case in cases], [case["cotangent"] for case in cases])
        for j, results in enumerate(found):
            for key, result in zip(("out_tent", "out_nearest", "grad_a"), results, strict=True):
                assert_close(result, file[f"{j}/{key}"], 1e-12)


# Anchors

MAPS = [((7, 8), 2, (0, 0)), ((8, 7), 2, (1, 0)), ((9, 10), 3, (2, 1)), ((5, 5), 4, (0, 3)), ((4, 6), 1, (0, 0))]


@functools.cache
def interpolations():
    """Anchors, and their interpolations, of every map of ``MAPS``."""
    anchors = [
        normal(i, 2, *(len(range(o, size, s)) for o, size in zip(offset, shape, strict=True)), 3)
        for i, (shape, s, offset) in enumerate(MAPS)
    ]

    @jax.jit
    def run(anchors):
        options = [(s, shape, offset) for shape, s, offset in MAPS]
        pairs = zip(anchors, options, strict=True)
        return [
            (upsample_tent(a, s, shape, offset=o), upsample_nearest(a, s, shape, offset=o))
            for a, (s, shape, o) in pairs
        ]

    return list(zip(anchors, jax.device_get(run(anchors)), strict=True))


@pytest.mark.parametrize("index", range(len(MAPS)))
def test_interpolation_is_numpy_s_along_each_axis(index):
    (shape, s, offset), (a, (tent, nearest)) = MAPS[index], interpolations()[index]
    wanted = a
    for axis, (size, first) in enumerate(zip(shape, offset, strict=True), start=1):
        places = (np.arange(size) - first) / s
        along = lambda line, places=places: np.interp(places, np.arange(len(line)), line)
        wanted = np.apply_along_axis(along, axis, wanted)
    assert_close(tent, wanted, 1e-6)
    assert np.abs(tent).max() <= np.abs(a).max()
    rows, columns = (
        np.clip(np.ceil((np.arange(size) - first) / s - 0.5), 0, count - 1).astype(int)
        for size, first, count in zip(shape, offset, a.shape[1:3], strict=True)
    )
    np.testing.assert_array_equal(nearest, a[:, rows][:, :, columns])
    mask = anchor_mask(shape, s, offset=offset)
    for up in (tent, nearest):  # anchors stay, to the bit
        np.testing.assert_array_equal(up[:, mask].reshape(a.shape), a)


def test_interpolation_equals_an_image_library_s_and_a_normalised_convolution():
    a, (tent, _) = interpolations()[0]
    shape, s, _ = MAPS[0]
    mask = anchor_mask(shape, s)
    sparse = np.zeros((2, *shape, 3), np.float32)
    sparse[:, mask] = a.reshape(2, -1, 3)
    kernel = np.outer(*[1 - np.abs(np.arange(1 - s, s)) / s] * 2).astype(np.float32)
    both = np.concatenate([sparse, np.broadcast_to(mask[None, :, :, None], sparse.shape)], 0).transpose(0, 3, 1, 2)

    @jax.jit
    def run(a, sparse):
        scale, translation = np.full(2, s, np.float32), np.full(2, 0.5 * (1 - s), np.float32)
        moved = jax.image.scale_and_translate(a, (2, *shape, 3), (1, 2), scale, translation, "linear", antialias=False)
        return moved, jax.lax.conv(sparse, kernel[None, None], (1, 1), "SAME")

    moved, spread = run(a, both.reshape(-1, 1, *shape).astype(np.float32))
    assert_close(tent, moved, 1e-6)
    values, weights = np.split(np.asarray(spread).reshape(4, 3, *shape).transpose(0, 2, 3, 1), 2)
    assert_close(tent, values / weights, 1e-6)


def test_interpolation_keeps_constants_and_ramps_and_commutes_with_maps_of_the_channels():
    y, x = np.mgrid[:9, :10].astype(np.float32)
    ramp = (1 + 2 * y - 3 * x)[None, :, :, None]
    w, b = normal(2, 3, 3), normal(3, 3)
    a = interpolations()[0][0]

    @jax.jit
    def run(a):
        one = upsample_tent(jnp.full((1, 3, 4, 1), 0.1, jnp.float32), 3, (9, 10))
        up = upsample_tent(sample_anchors(ramp, 3), 3, (9, 10))
        mapped = jnp.einsum("nhwc,cd->nhwd", a, w) + b[None, None, None]
        return one, up, upsample_tent(mapped, 2, (7, 8))

    one, up, mapped = run(a)
    assert (np.asarray(one) == np.float32(0.1)).all()
    assert_close(np.asarray(up)[:, :7], ramp[:, :7], 1e-4)  # up to the last anchors
    assert_close(mapped, interpolations()[0][1][0] @ w + b, 1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.data())
def test_shapes_of_all_maps(height, width, stride, data):
    x = jax.ShapeDtypeStruct((2, height, width, 3), jnp.bfloat16)
    if stride > min(height, width):
        with pytest.raises(ValueError, match=rf"stride={stride} is larger than the (height|width)"):
            jax.eval_shape(lambda x: sample_anchors(x, stride), x)
        return
    offset = data.draw(st.tuples(*[st.integers(0, stride - 1)] * 2))
    for mode in ("lattice", "avg"):
        a = jax.eval_shape(lambda x, mode=mode: sample_anchors(x, stride, mode=mode, offset=offset), x)
        grid = [len(range(first, size, stride)) for first, size in zip(offset, (height, width), strict=True)]
        assert a.shape == (2, *grid, 3)
        assert a.dtype == jnp.bfloat16
    up = jax.eval_shape(lambda a: upsample_tent(a, stride, (height, width), offset=offset), a)
    assert (up.shape, up.dtype) == (x.shape, x.dtype)


def test_cells_average_the_pixels_that_there_are():
    x = normal(4, 1, 5, 7, 2)
    found = jax.jit(lambda x: sample_anchors(x, 3, mode="avg", offset=(1, 0)))(x)
    wanted = [[x[:, i : i + 3, j : j + 3].mean((1, 2)) for j in (0, 3, 6)] for i in (1, 4)]
    assert_close(found, np.transpose(wanted, (2, 0, 1, 3)), 1e-6)


# The block


def core(a):
    return jnp.tanh(1.5 * a) - 0.3


def cheap(x):
    return 0.2 * x + 1.0


X = normal(5, 2, 7, 8, 3)


def test_anchors_have_the_core_s_value_and_others_lie_between_both_paths():
    logits = normal(6, 3)

    @jax.jit
    def run(x, logits):
        block = functools.partial(spatially_interpolate, core, cheap, x, residual=False, offset=(1, 0))
        extremes = [block(jnp.full(3, value)) for value in (jnp.inf, -jnp.inf)]
        a = core(sample_anchors(x, 2, offset=(1, 0)))
        return block(logits), *extremes, a, upsample_tent(a, 2, (7, 8), offset=(1, 0)), block(logits, alpha="soft")

    y, interpolation, cheap_only, a, up, soft = map(np.asarray, run(X, logits))
    mask = anchor_mask((7, 8), 2, offset=(1, 0))
    np.testing.assert_array_equal(y[:, mask].reshape(a.shape), a)
    assert_close(interpolation, up, 1e-6)
    low = np.asarray(cheap(X))
    assert_close(cheap_only[:, ~mask], low[:, ~mask], 1e-6)
    sigmoid = 1 / (1 + np.exp(-logits))
    assert_close(y[:, ~mask], (sigmoid * up + (1 - sigmoid) * low)[:, ~mask], 1e-6)
    assert_close(soft, sigmoid * up + (1 - sigmoid) * low, 1e-6)


def test_logits_learn_from_the_pixels_between_anchors_alone():
    mask = anchor_mask((7, 8), 2)

    @jax.jit
    def run(logits, seen):
        y = lambda logits: spatially_interpolate(core, cheap, jnp.asarray(X), logits)
        return jax.vjp(y, logits)[1](jnp.broadcast_to(seen[None, :, :, None], X.shape).astype(jnp.float32))[0]

    assert (np.asarray(run(jnp.zeros(3), mask)) == 0).all()
    assert (np.asarray(run(jnp.zeros(3), ~mask)) != 0).all()


def test_shifts_by_the_stride_go_through_and_others_do_not():
    """The lattice is the price: features move with the image in steps of the stride only."""
    x = normal(7, 1, 12, 12, 2)
    run = jax.jit(lambda x: spatially_interpolate(core, cheap, x, jnp.zeros(2)))
    inside = slice(2, 8)
    y = np.asarray(run(x))[:, inside, inside]
    moved = lambda by: np.roll(run(np.roll(x, by, (1, 2))), (-by, -by), (1, 2))[:, inside, inside]
    assert_close(moved(2), y, 1e-6)
    assert np.abs(moved(1) - y).max() > 0.1


def test_maps_of_gates_vmap_narrow_dtypes_and_small_batches():
    gates = normal(8, 2, 7, 8, 1)
    block = functools.partial(spatially_interpolate, core, cheap)

    @jax.jit
    def run(x, gates):
        whole = block(x, gates, alpha="soft")
        each = jax.vmap(lambda x, gate: block(x[None], gate[None], alpha="soft")[0])(x, gates)
        narrow = block(x.astype(jnp.bfloat16), jnp.zeros(3, jnp.float32))
        return (
            whole,
            each,
            narrow,
            block(x, jnp.zeros(3)),
            block(x[:0], jnp.zeros(3)),
            block(x[:1, ..., :1], jnp.zeros(1)),
        )

    whole, each, narrow, wide, none, one = run(X, gates)
    assert_close(whole, each, 1e-6)
    assert narrow.dtype == jnp.bfloat16
    assert 0 < np.abs(np.float32(narrow) - wide).max() < 0.05
    assert none.shape == (0, 7, 8, 3)
    assert_close(one, np.asarray(wide)[:1, ..., :1], 1e-6)


def test_gradient_of_narrow_logits_is_a_float32_sum():
    """A bfloat16 sum over 4,096 equal terms of 1/16 stops at 16."""
    x = jnp.ones((1, 64, 64, 1), jnp.bfloat16)
    y = lambda logits: spatially_interpolate(lambda a: 0.5 * a, lambda x: 0.25 * x, x, logits, alpha="soft").sum()
    assert float(jax.jit(jax.grad(y))(jnp.zeros(1, jnp.float32))[0]) == 64 * 64 * 0.25 * 0.25


def test_a_stride_of_one_is_the_block_itself():
    dense = BasicBlock(3)
    block = SIBlock(BasicBlock(3, skip=False), CheapPath(3), stride=1, activation=nn.relu)
    variables = filled(block, X)

    @jax.jit
    def run(variables, x):
        core = {kind: tree["core"] for kind, tree in variables.items()}
        return block.apply(variables, x, False), dense.apply(core, x, False)

    assert_close(*run(variables, X), 1e-5)


def test_counts_follow_the_formula():
    height, channels, hidden, k = 14, 24, 144, 5
    x = jax.ShapeDtypeStruct((2, height, height, channels), jnp.float32)

    def program(block, flops=False):
        variables = jax.eval_shape(lambda key, x: block.init(key, x, False), KEY, x)
        run = lambda variables, x: block.apply(variables, x, False)
        macs = count_macs(run, variables, x).most
        return (macs, jax.jit(run).lower(variables, x).cost_analysis()["flops"]) if flops else macs

    dense = InvertedResidual(channels, hidden=hidden, kernel=k)
    macs, flops = program(dense, flops=True)
    assert macs == 2 * height**2 * hidden * (2 * channels + k**2)
    for kind, work in (("dw3", 9), ("dw3_g4", 9 + channels / 4), ("dw3_pw", 9 + channels), ("identity", 0), (None, 0)):
        path = None if kind is None else CheapPath(channels, kind)
        assert program(SIBlock(dense.clone(skip=False), path)) == 2 * (
            7**2 * hidden * (2 * channels + k**2) + height**2 * channels * work
        )
    assert program(SIBlock(dense.clone(skip=False), CheapPath(channels)), flops=True)[1] < 0.35 * flops


# Networks

IMAGES = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
SMALL = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)


# si_cnn.md section 5: (height, channels, blocks) of what is interpolated, without MobileNetV3's first block, which
# expands nothing; and millions of multiply-accumulates, six of them per pixel and channel of a blend, without
# squeeze-excite.
BLENDED = {
    "mobilenet_v2": [(56, 24, 1), (28, 32, 2), (14, 64, 3), (14, 96, 2), (7, 160, 2)],
    "mobilenet_v3_large": [(56, 24, 1), (28, 40, 2), (14, 80, 3), (14, 112, 1), (7, 160, 2)],
    "efficientnet_b0": [(56, 24, 1), (28, 40, 1), (14, 80, 2), (14, 112, 2), (7, 192, 3)],
}
NETS = [
    ("mobilenet_v2", 0, 2, 190.1),
    *(
        pytest.param(*row, marks=pytest.mark.nightly)
        for row in (
            ("mobilenet_v2", 14, 2, 210.8),
            ("mobilenet_v2", 14, 3, 195.3),
            ("mobilenet_v3_large", 0, 2, 135.0),
            ("mobilenet_v3_large", 14, 2, 156.6),
            ("mobilenet_v3_large", 14, 3, 146.4),
            ("efficientnet_b0", 0, 2, 234.5),
            ("efficientnet_b0", 14, 2, 280.7),
            ("efficientnet_b0", 14, 3, 262.9),
        )
    ),
]


@pytest.mark.parametrize(("name", "least", "stride", "millions"), NETS)
def test_counts_of_whole_networks(name, least, stride, millions):
    model = mobilenet(name)
    model = model.clone(stages=tuple(tuple(row._replace(squeeze=0) for row in rows) for rows in model.stages))
    policy = "residual_stride1_min14" if least else "residual_stride1"
    if name == "mobilenet_v3_large":
        policy = lambda site: site.residual and site.size[0] >= least and site.name != "stage1_block0"
    changed = interpolated(model, IMAGES, policy, config=SIConfig(stride=stride))
    found = count_macs(lambda key, x: changed.init_with_output(key, x)[0], KEY, IMAGES).most
    maps = [(height, channels, blocks) for height, channels, blocks in BLENDED[name] if height >= least]
    assert len(changed.block.chosen) == sum(blocks for *_, blocks in maps)
    blend = sum(6 * height**2 * channels * blocks for height, channels, blocks in maps)
    assert round((found + blend) / 1e6, 1) == millions


TINY = ResNet(stages=(2, 2), widths=(4, 8))


def test_policies_choose_blocks():
    assert block_sites(TINY, SMALL) == [
        BlockSite("stage1_block0", (8, 8), (4, 4), 1),
        BlockSite("stage1_block1", (8, 8), (4, 4), 1),
        BlockSite("stage2_block0", (8, 8), (4, 8), 2),
        BlockSite("stage2_block1", (4, 4), (8, 8), 1),
    ]
    residual = ["stage1_block0", "stage1_block1", "stage2_block1"]
    wanted = {
        "residual_stride1": residual,
        "all": [*residual, "stage2_block0"],
        ("stage1_block1",): ["stage1_block1"],
    }
    for policy, names in wanted.items():
        model = interpolated(TINY, SMALL, policy)
        assert {name for name, _ in model.block.chosen} == set(names)
    variables = jax.eval_shape(model.init, KEY, SMALL)
    assert {name for name, block in variables["params"].items() if "alpha" in block} == set(names)
    large = jax.ShapeDtypeStruct((1, 15, 28, 3), jnp.float32)
    model = interpolated(TINY, large, "residual_stride1_min14")
    assert [name for name, _ in model.block.chosen] == ["stage1_block0", "stage1_block1"]


def test_offsets_alternate_and_strided_blocks_keep_theirs():
    model = interpolated(TINY, SMALL, "all", config=SIConfig(offsets=alternating_offsets(2)))
    assert {name: offset for name, (_, offset) in model.block.chosen} == {
        "stage1_block0": (0, 0),
        "stage1_block1": (1, 1),
        "stage2_block0": (0, 0),
        "stage2_block1": (0, 1),
    }
    for stride in (2, 3):
        masks = [anchor_mask((4, 7), stride, offset=offset) for offset in alternating_offsets(stride)]
        assert (np.sum(masks, 0) == 1).all()  # every pixel once
    assert model == interpolated(
        TINY, SMALL, "all", config=SIConfig(offsets=alternating_offsets(2))
    )  # equal, so compiled once


@pytest.mark.parametrize("block", [BasicBlock, functools.partial(Bottleneck, expansion=2), PreactivationBlock])
def test_blocks_of_residual_networks_are_those_of_their_branch(block):
    """The interpolated block, against its formula with the dense block's own weights."""
    model = ResNet(stages=(1,), widths=(4,), block=block, preactivation=block is PreactivationBlock)
    changed = interpolated(model, SMALL)
    variables, x = filled(changed, np.zeros(SMALL.shape, np.float32)), normal(9, 2, 8, 8, 4)
    own = {kind: tree["stage1_block0"] for kind, tree in variables.items() if "stage1_block0" in tree}
    module = changed.block(4, name="stage1_block0", norm="batch", dtype=jnp.float32).clone(parent=None)
    after = (lambda y: y) if block is PreactivationBlock else lambda y: np.maximum(y, 0)

    @jax.jit
    def run(own, x):
        core = {kind: tree["core"] for kind, tree in own.items()}
        low = CheapPath(4).apply({kind: tree["cheap"] for kind, tree in own.items()}, x, False)
        # By the dense block on anchors: its result less the shortcut, where no relu hides it.
        dense = block(4).apply(core, x[:, ::2, ::2], False)
        up = upsample_tent(module.core.apply(core, x[:, ::2, ::2], False), 2, (8, 8))
        return module.apply(own, x, False), dense, low, up

    y, dense, low, up = map(np.asarray, run(own, x))
    assert_close(y[:, ::2, ::2], dense, 1e-5)
    share = 1 / (1 + np.exp(-own["params"]["alpha"]))
    mask = anchor_mask((8, 8), 2)[None, :, :, None]
    assert_close(y, after(x + np.where(mask, up, share * up + (1 - share) * low)), 1e-5)


def test_blocks_that_halve_the_map():
    model = interpolated(TINY, SMALL, ["stage2_block0"])
    block = model.block(8, name="stage2_block0", strides=2, norm="batch", dtype=jnp.float32).clone(parent=None)
    x = normal(10, 1, 8, 8, 4)
    variables = filled(block, x)

    @jax.jit
    def run(variables, x):
        core = BasicBlock(8, 2, skip=False).apply({k: t["core"] for k, t in variables.items()}, x[:, ::2, ::2], False)
        return block.apply(variables, x, False), core

    y, a = map(np.asarray, run(variables, x))
    assert y.shape == (1, 4, 4, 8)
    assert_close(y[:, ::2, ::2], np.maximum(a, 0), 1e-5)
    with pytest.raises(ValueError, match="stage2_block0' has stride 2: only a cheap path"):
        interpolated(TINY, SMALL, "all", config=SIConfig(cheap=None))


def test_a_dense_network_s_variables_are_copied():
    dense = filled(TINY, np.zeros(SMALL.shape, np.float32))
    fresh = filled(interpolated(TINY, SMALL), np.zeros(SMALL.shape, np.float32))
    variables = warm_start(dense, fresh, logit=3.0)
    assert jax.tree.structure(fresh) == jax.tree.structure(variables)
    cheap = variables["params"]["stage2_block1"]["cheap"]
    jax.tree.map(np.testing.assert_array_equal, cheap, fresh["params"]["stage2_block1"]["cheap"])
    for kind, tree in dense.items():
        for name, block in tree.items():
            held = variables[kind][name]
            held = held.get("core", held)
            jax.tree.map(np.testing.assert_array_equal, held, block)
    assert (np.asarray(variables["params"]["stage2_block1"]["alpha"]) == 3.0).all()
    with pytest.raises(ValueError, match="1 arrays, such as 'params/other/kernel', have no place"):
        warm_start({**dense, "params": dense["params"] | {"other": {"kernel": np.ones(2)}}}, fresh)
    less = {**dense, "params": {name: tree for name, tree in dense["params"].items() if name != "head"}}
    with pytest.raises(ValueError, match="hold nothing for 'params/head/bias'"):
        warm_start(less, fresh)
    other = {**dense, "params": dense["params"] | {"head": {"kernel": normal(0, 8, 3), "bias": normal(0, 3)}}}
    with pytest.raises(ValueError, match=r"'params/head/(bias|kernel)' has shape"):
        warm_start(other, fresh)


def test_gates_are_warm_started_by_their_bias():
    array = lambda *shape: np.full(shape, 7, np.float32)
    dense = {"params": {"block": {"kernel": array(2) + 1}}}
    gate = {"kernel": array(2, 1), "bias": array(1)}
    block = {"core": {"kernel": array(2)}, "gate": gate, "cheap": {"norm": array(2)}}
    found = warm_start(dense, {"params": {"block": block}})["params"]["block"]
    assert found["core"]["kernel"].tolist() == [8.0, 8.0]
    assert found["gate"]["bias"].tolist() == [4.0]
    assert found["gate"]["kernel"].tolist() == [[7.0], [7.0]]
    assert found["cheap"]["norm"].tolist() == [7.0, 7.0]


class Plain(nn.Module):
    """A block without the field ``skip``."""

    features: int
    strides: int = 1
    norm: str = "batch"
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        return x + nn.Dense(self.features, name="dense")(x)


def test_a_block_of_one_s_own_says_what_its_branch_is():
    model = ResNet(stages=(1,), widths=(4,), block=Plain)
    with pytest.raises(ValueError, match=r"Plain has no field 'skip'.*Give branch="):
        jax.eval_shape(interpolated(model, SMALL).init, KEY, SMALL)

    class Branch(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(4, name="dense")(x)

    changed = interpolated(model, SMALL, branch=lambda block: (Branch(parent=None), None))
    variables = jax.eval_shape(changed.init, KEY, SMALL)
    assert variables["params"]["stage1_block0"]["core"]["dense"]["kernel"].shape == (4, 4)


# Bad input


def traced(*args, **options):
    return jax.eval_shape(lambda x: spatially_interpolate(*args[:2], x, *args[3:], **options), args[2])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: sample_anchors(X, 8), ValueError, "stride=8 is larger than the height 7 of the map.*at most 7"),
        (lambda: sample_anchors(X, 0), ValueError, r"stride=0 must be an integer in \[1"),
        (lambda: sample_anchors(X, 2, offset=(0, 2)), ValueError, r"offset=2 must be an integer in \[0, 1\]"),
        (lambda: sample_anchors(X, 2, mode="mean"), ValueError, "mode='mean' is not one of 'lattice', 'avg'"),
        (lambda: sample_anchors(X[0], 2), ValueError, r"shape \(7, 8, 3\); expected .*a batch of one: x\[None\]"),
        (lambda: sample_anchors((X > 0).astype(np.uint8), 2), TypeError, r"dtype uint8.*astype\('float32'\)"),
        (lambda: upsample_tent(X, 2, (12, 16)), ValueError, "a holds 7 x 8 anchors; a map of 12 x 16 .* has 6 x 8"),
        (lambda: traced(core, cheap, X), ValueError, "cheap_fn and logits go together"),
        (lambda: traced(core, None, X, np.zeros(3)), ValueError, "cheap_fn and logits go together"),
        (lambda: traced(core, cheap, X, np.zeros(1)), ValueError, r"logits have shape \(1,\); expected"),
        (lambda: traced(core, cheap, X, np.zeros((2, 7, 8))), ValueError, "logits have shape"),
        (lambda: traced(core, cheap, X, np.zeros(3), alpha="on"), ValueError, "alpha='on' is not one"),
        (
            lambda: traced(core, lambda x: x[..., :1], X, np.zeros(3)),
            ValueError,
            r"output of cheap_fn has shape \(2, 7, 8, 1\); expected \(2, 7, 8, 3\)",
        ),
        (
            lambda: traced(lambda a: a[..., :2], None, X),
            ValueError,
            "x has shape .*residual=False where the shape changes",
        ),
        (lambda: SIConfig(stride=1), ValueError, "stride=1 must be .*saves nothing"),
        (lambda: SIConfig(offsets=((0, 2),)), ValueError, r"offsets=\(\(0, 2\),\) must be .* below stride=2"),
        (lambda: SIConfig(cheap="dw5"), ValueError, "cheap='dw5' is not one of 'dw3'"),
        (lambda: SIConfig(alpha="gate"), ValueError, "alpha='gate' is not one of .*Did you mean 'gated'"),
        (lambda: interpolated(TINY, SMALL, "residual"), ValueError, "policy='residual' is not one of"),
        (lambda: interpolated(TINY, SMALL, ["stage3_block0"]), ValueError, "policy='stage3_block0' is not one of"),
        (lambda: interpolated(TINY, SMALL, "residual_stride1_min14"), ValueError, "chooses none of the 4 blocks"),
        (lambda: interpolated(nn.Dense(3), SMALL), ValueError, "model=Dense has no field 'block'"),
        (
            lambda: jax.eval_shape(CheapPath(3, "dw3_g4").init, KEY, X, False),
            ValueError,
            "4 groups do not divide 3 channels",
        ),
        (
            lambda: jax.eval_shape(interpolated(TINY, SMALL, config=SIConfig(stride=5)).init, KEY, SMALL),
            ValueError,
            "stride=5 is larger than the height 4.*leave this block dense",
        ),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()
