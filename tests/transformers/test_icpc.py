"""Positions of several sizes from one table, what is shown when, compressions, and training on a mixture of levels."""

import itertools
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy import stats

from effjax.data.ragged import Ragged
from effjax.transformers.compressions import compress_spectrogram, compress_text, compressed_text_columns, resize_images
from effjax.transformers.flexible_patches import random_patches, resize_patch_kernel
from effjax.transformers.icpc import MixedLevels, icpc
from effjax.transformers.level_sampling import (
    join_groups,
    level_batch,
    level_groups,
    level_tokens,
    progressive_level,
    sample_level,
)
from effjax.transformers.position_tables import position_rows, position_selector, select_positions

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "icpc"
GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9))


def test_crop_reads_the_rows_of_the_official_selector():
    with np.load(REFERENCE / "position_selection.npz") as reference:
        assert len(reference.files) > 100
        for name in reference.files:
            grid, _, size = name.partition("/")
            side = int(grid.removeprefix("grid"))
            height, width = (int(part[1:]) for part in size.split("_"))
            np.testing.assert_array_equal(position_rows((side, side), (height, width)), reference[name])


@settings(deadline=None, max_examples=60)
@given(GRIDS, st.data())
def test_rows(table_grid, data):
    grid = tuple(data.draw(st.integers(1, most)) for most in table_grid)
    prefix = data.draw(st.integers(0, 2))
    crop = position_rows(table_grid, grid, prefix=prefix)
    spread = position_rows(table_grid, grid, "spread", prefix=prefix)
    for rows in (crop, spread):
        assert rows[:prefix].tolist() == list(range(prefix))
        assert len(set(rows.tolist())) == len(rows) == prefix + grid[0] * grid[1]
        assert rows.dtype == np.int32
        assert rows.max() < prefix + table_grid[0] * table_grid[1]
    half = Fraction(1, 2)
    for index, (r, c) in enumerate(itertools.product(*map(range, grid))):
        assert crop[prefix + index] == prefix + r * table_grid[1] + c
        place = [int((i + half) * most / few) for i, most, few in zip((r, c), table_grid, grid, strict=True)]
        assert spread[prefix + index] == prefix + place[0] * table_grid[1] + place[1]
    smaller = tuple(data.draw(st.integers(1, most)) for most in grid)
    assert set(position_rows(table_grid, smaller, prefix=prefix)) <= set(crop)
    full = np.arange(prefix + table_grid[0] * table_grid[1])
    for how in ("crop", "spread"):
        np.testing.assert_array_equal(position_rows(table_grid, table_grid, how, prefix=prefix), full)
    corner = tuple(data.draw(st.integers(0, most - few)) for most, few in zip(table_grid, grid, strict=True))
    moved = position_rows(table_grid, grid, prefix=prefix, corner=corner)
    np.testing.assert_array_equal(moved[prefix:] - crop[prefix:], corner[0] * table_grid[1] + corner[1])


@pytest.mark.parametrize("how", ["crop", "spread", "interp", "fractional"])
def test_every_way_is_the_table_itself_at_full_size(how):
    table = np.random.default_rng(0).normal(size=(1, 1 + 6, 3)).astype(np.float32)
    np.testing.assert_array_equal(select_positions(table, (2, 3), how=how, table_grid=(2, 3)), table)


@pytest.mark.parametrize(("how", "antialias"), [("interp", 1), ("fractional", 0)])
def test_resized_tables_equal_the_bilinear_resize_of_torch(how, antialias):
    with np.load(REFERENCE / "bilinear_resize.npz") as reference, jax.enable_x64():
        picture = reference["in32"][0]
        table = np.concatenate([np.full((2, 2), 7.0), picture.reshape(2, -1).T])
        for side in (20, 12):
            found = select_positions(table, (side, side), how=how, prefix=2)
            expected = reference[f"in32/to{side}/antialias{antialias}"][0].reshape(2, -1).T
            np.testing.assert_array_equal(found[:2], 7.0)
            np.testing.assert_allclose(found[2:], expected, rtol=0, atol=1e-12)


def test_rows_that_are_not_read_get_no_gradient():
    table = np.random.default_rng(0).normal(size=(1 + 16, 2)).astype(np.float32)
    weights = np.random.default_rng(1).normal(size=(1 + 4, 2)).astype(np.float32)
    rows = position_rows((4, 4), (2, 2), "spread")
    loss = lambda table: (weights * select_positions(table, (2, 2), how="spread")).sum()
    gradient = np.asarray(jax.jit(jax.grad(loss))(table))
    np.testing.assert_array_equal(gradient[rows], weights)
    np.testing.assert_array_equal(np.delete(gradient, rows, 0), 0)


def test_narrow_tables_stay_narrow_and_are_summed_wide():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(16, 2)), jnp.bfloat16)
    for how in ("crop", "interp"):
        found = select_positions(table, (1, 1), how=how, prefix=0)
        assert found.dtype == jnp.bfloat16
    exact = select_positions(table.astype(jnp.float32), (1, 1), how="interp", prefix=0)
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


def test_selectors_made_alike_are_equal():
    assert position_selector("crop") == position_selector("crop")
    assert hash(position_selector("crop")) == hash(position_selector("crop"))
    assert position_selector("crop") != position_selector("interp")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: position_rows((3, 3), (4, 2)), r"grid\[0\]=4 must be an integer in \[1, 3\].*how='interp'"),
        (lambda: position_rows((3, 3), (2, 2), corner=(2, 0)), r"leaves the table of 3 x 3.*\(1, 1\)"),
        (lambda: position_rows((3, 3), (2, 2), "spread", corner=(1, 0)), "is for how='crop'"),
        (lambda: position_rows((3, 3), (2, 2), "interp"), "how='interp' is not one of"),
        (lambda: select_positions(np.zeros((8, 2), np.float32), (2, 2)), "7 rows after the prefix=1"),
        (lambda: select_positions(np.zeros((8, 2), np.float32), (2, 2), table_grid=(2, 4)), r"table_grid=\(2, 4\)"),
        (lambda: select_positions(np.zeros((9, 2), np.float32), (4, 2), prefix=0), r"grid\[0\]=4"),
        (lambda: select_positions(np.zeros((9, 2), np.float32), (0, 2), prefix=0, how="interp"), r"grid\[0\]=0"),
        (lambda: select_positions(np.zeros(9, np.float32), (2, 2)), "table has shape"),
        (lambda: position_selector("nearest"), "how='nearest' is not one of"),
    ],
)
def test_positions_refuse(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("antialias", [0, 1])
def test_images_are_resized_as_torch_does(antialias):
    with np.load(REFERENCE / "bilinear_resize.npz") as reference, jax.enable_x64():
        for name in ("in32/to20", "in32/to112", "in8/to9"):
            side = int(name.partition("/to")[2])
            images = reference[name.partition("/")[0]].transpose(0, 2, 3, 1)
            found = jax.jit(lambda images, side=side: resize_images(images, side, antialias=bool(antialias)))(images)
            expected = reference[f"{name}/antialias{antialias}"].transpose(0, 2, 3, 1)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_integer_images_keep_their_scale():
    images = np.array([[200, 100], [0, 100]], np.uint8).reshape(1, 2, 2, 1)
    found = resize_images(images, 2)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, images)


def test_spectrograms_shrink_in_time_and_frequency():
    ramp = np.arange(8, dtype=np.float32)[None, :, None] + 100 * np.arange(4, dtype=np.float32)[None, None, :]
    found = compress_spectrogram(ramp, (4, 2))
    # A triangle as wide as two new frames is symmetric inside, so that it keeps a ramp.
    np.testing.assert_allclose(found[0, 1:3, 0] - found[0, 1:2, 0], [0, 2], atol=1e-4)
    np.testing.assert_allclose(found.mean(), ramp.mean(), rtol=1e-6)
    with_channels = compress_spectrogram(np.stack([ramp, -ramp], -1), (4, 2))
    np.testing.assert_allclose(with_channels[..., 1], -found, rtol=1e-6)


STOPS = np.array([-1, 0, 1, 2, -1, -1, 3, -1])
TEXTS = st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=20), min_size=1, max_size=6)


@settings(deadline=None, max_examples=40)
@given(TEXTS, st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(0, 3))
def test_texts_lose_a_share_of_their_stop_words(texts, share, epoch):
    ids = Ragged.of(texts)
    short, kept = compress_text(ids, STOPS, share, seed=1, epoch=epoch)
    np.testing.assert_array_equal(short.values, ids.values[kept])
    assert (STOPS[ids.values[~kept]] >= 0).all()
    for before, after in zip(ids, short, strict=True):
        droppable = int((STOPS[before] >= 0).sum())
        assert len(before) - len(after) == min(int(share * droppable), len(before) - 1)
        partly = [word for word in set(before) if 0 < np.sum(after == word) < np.sum(before == word)]
        assert len(partly) <= 1
    last = len(ids) - 1  # drawn by its name, whatever else is there
    alone, _ = compress_text(ids.take([last]), STOPS, share, seed=1, epoch=epoch, row_ids=np.array([last]))
    np.testing.assert_array_equal(alone[0], short[last])


def test_texts_lose_other_words_in_other_epochs():
    ids = Ragged.of([[1, 2, 3, 6]] * 50)
    first, again, other = (compress_text(ids, STOPS, 0.5, seed=0, epoch=epoch)[0].values for epoch in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert set(first) == {1, 2, 3, 6}


def test_every_text_meets_every_level_and_each_epoch_has_equal_parts():
    ids = Ragged.of([[0, 1, 2, 3, 6, 4]] * 12)  # four stop words each
    columns = {"input_ids": ids, "token_type_ids": ids, "label": np.arange(12)}
    read = compressed_text_columns(columns, STOPS, (1.0, 0.5, 0.0), seed=3)
    epochs = [read(epoch) for epoch in range(3)]
    lengths = np.stack([epoch["input_ids"].lengths for epoch in epochs])
    assert (np.sort(lengths, axis=0) == np.array([[2], [4], [6]])).all()
    assert (np.sort(lengths, axis=1) == np.repeat([2, 4, 6], 4)[None]).all()
    whole = int(np.flatnonzero(lengths[0] == 4)[0])
    named, _ = compress_text(ids.take([whole]), STOPS, 0.5, seed=3, epoch=0, row_ids=np.array([whole]))
    np.testing.assert_array_equal(epochs[0]["input_ids"][whole], named[0])
    np.testing.assert_array_equal(epochs[0]["token_type_ids"].values, epochs[0]["input_ids"].values)
    assert epochs[1]["label"] is columns["label"]
    with pytest.raises(ValueError, match="one level or more"):
        compressed_text_columns(columns, STOPS, (), seed=0)


def test_levels_are_drawn_uniformly_and_by_step_alone():
    levels = (12, 16, 20, 28)
    drawn = [sample_level(levels, step, seed=3) for step in range(800)]
    assert stats.chisquare([drawn.count(level) for level in levels]).pvalue > 1e-3
    assert [sample_level(levels, step, seed=3) for step in (799, 5)] == [drawn[799], drawn[5]]
    # Neighbouring steps and seeds are independent.
    pairs = np.histogram2d(np.digitize(drawn[:-1], levels[1:]), np.digitize(drawn[1:], levels[1:]), bins=4)[0]
    assert stats.chi2_contingency(pairs).pvalue > 1e-3
    assert drawn != [sample_level(levels, step, seed=4) for step in range(800)]
    weighted = [sample_level(levels, step, seed=3, weights=(0, 1, 1, 2)) for step in range(800)]
    assert stats.chisquare([weighted.count(level) for level in levels[1:]], [200, 200, 400]).pvalue > 1e-3


def test_there_are_as_many_programs_as_levels():
    step = jax.jit(lambda images, level: resize_images(images, level).sum(), static_argnums=1)
    images = np.ones((1, 4, 4, 1), np.float32)
    for index in range(20):
        level = sample_level((1, 2, 4), index, seed=0)
        assert step(images, level) == pytest.approx(level**2)
    assert step._cache_size() == 3


def test_progressive_resizing_climbs_once():
    steps = [progressive_level((16, 20, 24, 28), step, 100) for step in range(101)]
    assert steps == sorted(steps)
    assert steps[:50] == [16] * 50
    assert steps[80:] == [28] * 21
    assert [steps.count(level) for level in (20, 24)] == [10, 10]  # of 30 steps, a third for each interval but the last
    assert progressive_level((16, 28), 0, 1, delay=0, last=1) == 28


@pytest.mark.parametrize("shares", [(1, 3), (2, 1, 1)])
def test_groups_share_a_batch_and_join_again(shares):
    batch = {"x": np.arange(16.0, dtype=np.float32).reshape(8, 2), "y": np.arange(8)}
    parts = level_groups(batch, shares)
    assert [len(part["y"]) for part in parts] == [2 * share for share in shares]
    rows = np.concatenate([part["y"] for part in parts])
    assert sorted(rows) == list(range(8))
    for part in parts:
        np.testing.assert_array_equal(part["x"], batch["x"][part["y"]])
    joined = join_groups(parts, shares)
    jax.tree.map(np.testing.assert_array_equal, joined, batch)


def test_an_empty_batch():
    images = jax.ShapeDtypeStruct((0, 4, 4, 2), jnp.float32)
    mixed = icpc(network, (2, 4), shares=(1, 3))
    assert jax.eval_shape(mixed, np.ones((2, 3), np.float32), images).shape == (0, 3)
    spectrogram = jax.ShapeDtypeStruct((0, 4, 4), jnp.float32)
    assert jax.eval_shape(lambda x: compress_spectrogram(x, (2, 2)), spectrogram).shape == (0, 2, 2)


def test_groups_of_a_sharded_batch_stay_on_their_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, P("data"))
    batch = jax.device_put(np.arange(32.0, dtype=np.float32).reshape(16, 2), sharding)
    shares = (1, 1, 2)

    def step(batch):
        parts = [part * (index + 1) for index, part in enumerate(level_groups(batch, shares))]
        return join_groups(parts, shares)

    compiled = jax.jit(step, in_shardings=sharding, out_shardings=sharding).lower(batch).compile()
    text = compiled.as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
    factors = np.tile([1, 2, 3, 3], 4)[:, None]
    np.testing.assert_array_equal(compiled(batch), np.asarray(batch) * factors)


def test_token_budgets():
    assert [level_tokens(size, 16) for size in (112, 224, 384)] == [50, 197, 577]
    assert level_tokens((96, 64), 16, prefix=0) == 24
    assert sum(level_tokens(size, 16) for size in range(224, 385, 16)) == 4092
    for tokens in (50, 197, 577):
        batch = level_batch(tokens, 577 * 64, multiple=16)
        assert batch % 16 == 0
        assert tokens * batch <= 577 * 64 < tokens * (batch + 16)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sample_level((), 0, seed=0), r"levels=\(\) must hold"),
        (lambda: sample_level((1, 2), 0, seed=0, weights=(1,)), "weights="),
        (lambda: sample_level((1, 2), 0, seed=0, weights=(1, -1)), "weights="),
        (lambda: sample_level((1, 2), -1, seed=0), "step=-1"),
        (lambda: progressive_level((1, 2), 11, 10), "step=11"),
        (lambda: progressive_level((1, 2), 0, 10, delay=0.9), "last=0.2"),
        (lambda: level_groups(np.zeros(6), (1, 3)), r"6 rows does not divide.*multiple of 4"),
        (lambda: level_groups(np.zeros(4), (4, 0)), r"shares\[1\]=0"),
        (lambda: level_groups({"a": np.zeros(4), "b": np.zeros(2)}, (1, 1)), "one batch axis"),
        (lambda: join_groups([np.zeros(2)], (1, 1)), "parts hold 1 groups"),
        (lambda: join_groups([np.zeros(2), np.zeros(3)], (1, 1)), r"\[2, 3\] rows"),
        (lambda: level_tokens(30, 16), "size=30 is no multiple of patch=16; 32 is"),
        (lambda: level_batch(577, 577, multiple=8), "8 examples of 577 tokens are 4616"),
        (lambda: icpc(lambda params, x: x, ()), r"levels=\(\)"),
        (lambda: icpc(lambda params, x: x, (1, 2), shares=(1,)), r"shares=\(1,\) must hold"),
        (lambda: resize_images(np.zeros((4, 4, 1), np.float32), 2), r"images\[None\]"),
        (lambda: resize_images(np.zeros((1, 4, 4, 1), np.float32), 0), r"size\[0\]=0"),
        (lambda: compress_spectrogram(np.zeros((1, 4, 4), np.float32), (5, 4)), r"size\[0\]=5"),
        (lambda: compress_text([[9]], STOPS, 0.5, seed=0, epoch=0), "outside the 8"),
        (lambda: compress_text([[1]], STOPS, 1.5, seed=0, epoch=0), "share=1.5"),
        (lambda: resize_patch_kernel(np.zeros((2, 3, 1, 1), np.float32), 4), "kernel has shape"),
        (lambda: random_patches(jax.random.key(0), 2, 4, 5), "kept=5"),
    ],
)
def test_refuse(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("new", [3, 6])
def test_patch_kernels_solve_the_least_squares_problem(new):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(4, 4, 2, 3))
    with jax.enable_x64():
        resize = lambda x: resize_images(x, new, antialias=False)
        found = np.asarray(resize_patch_kernel(kernel, new))
        basis = np.eye(16).reshape(16, 4, 4, 1)
        matrix = np.asarray(resize(basis)).reshape(16, new * new).T  # of a whole patch, by the resize itself
    expected, *_ = np.linalg.lstsq(matrix.T, kernel.reshape(16, 6), rcond=None)
    np.testing.assert_allclose(found.reshape(new * new, 6), expected, atol=1e-12)
    if new > 4:  # an enlarged patch gives the same token
        patch = rng.normal(size=16)
        np.testing.assert_allclose(
            (matrix @ patch) @ found.reshape(new * new, 6), patch @ kernel.reshape(16, 6), atol=1e-12
        )


def test_random_patches_are_distinct_and_uniform():
    chosen = np.asarray(random_patches(jax.random.key(0), 600, 6, 4))
    assert (np.diff(chosen, axis=1) > 0).all()
    assert chosen.min() == 0
    assert chosen.max() == 5
    assert stats.chisquare(np.bincount(chosen.ravel())).pvalue > 1e-3


def network(params, images, *, key=None):
    """Not linear in the images, and another function at every size."""
    noise = 0 if key is None else jax.random.normal(key, (images.shape[0], 1))
    return jnp.tanh(images.sum((1, 2)) @ params) + noise


def test_a_mixture_gives_every_group_its_level():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(8, 4, 4, 2)).astype(np.float32)
    params = rng.normal(size=(2, 3)).astype(np.float32)
    mixed = icpc(network, (2, 4), shares=(1, 3))

    def loss(params, key):
        return jnp.square(mixed(params, images)).mean(), mixed(params, images, key=key) - mixed(params, images)

    (value, noise), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, jax.random.key(0))
    # Halving with antialiasing: a triangle over four pixels, (1, 3, 3, 1) / 8, of which the border has three.
    weights = np.array([[3, 3, 1, 0], [0, 1, 3, 3]]) / 7
    small = np.einsum("ai,bj,nijc->nabc", weights, weights, images.astype(np.float64))
    totals = np.where((np.arange(8) % 4 == 0)[:, None], small.sum((1, 2)), images.astype(np.float64).sum((1, 2)))
    outputs = np.tanh(totals @ params)
    np.testing.assert_allclose(value, np.mean(outputs**2), rtol=1e-5)
    expected = totals.T @ (2 * outputs * (1 - outputs**2)) / outputs.size
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    assert len(np.unique(np.round(noise[:, 0], 4))) == 8  # groups get keys of their own


def test_a_module_trains_on_levels_and_is_evaluated_whole():
    import flax.linen as nn

    class Sides(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            scale = self.param("scale", nn.initializers.ones, ())
            return jnp.full((x.shape[0], 1), scale * (x.shape[1] + 100 * train))

    module = MixedLevels(Sides(), levels=(2, 4))
    images = np.ones((4, 4, 4, 1), np.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    assert list(variables["params"]) == ["module"]
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), variables)
    assert module.apply(variables, images).ravel().tolist() == [4] * 4
    assert module.apply(variables, images, train=True).ravel().tolist() == [102, 104, 102, 104]
