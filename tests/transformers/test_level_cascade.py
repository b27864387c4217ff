"""Cascades over levels: who answers, at what cost, at which guaranteed loss."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, special

from effjax.core.cost import count_compiles
from effjax.core.errors import NoEffectWarning
from effjax.hardness.cascades import cascade
from effjax.hardness.dispatch import dispatch_buckets
from effjax.transformers.level_calibration import level_temperatures, level_thresholds, stop_levels
from effjax.transformers.level_cascade import LevelCascade, evaluated_cost, level_params, level_stages

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "icpc"
LEVELS = (1, 2, 4)


def network(params, images):
    return 3 * jnp.tanh(images.mean((1, 2)) @ params["kernel"] + images.shape[1] * params["bias"][None, :])


def made(rows=11, seed=0):
    rng = np.random.default_rng(seed)
    params = {"kernel": 4 * rng.normal(size=(2, 3)), "bias": 0.2 * rng.normal(size=3)}
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    return params, rng.normal(size=(rows, 4, 4, 2)).astype(np.float32)


@functools.cache
def cascaded():
    return LevelCascade(network, LEVELS, buckets=(2, 4))


def every_level(params, images):
    """Logits [rows, levels, classes] by NumPy."""
    found = []
    for level in LEVELS:
        small = np.asarray(jax.image.resize(images, (len(images), level, level, 2), "bilinear"))
        found.append(3 * np.tanh(small.mean((1, 2)) @ params["kernel"] + level * params["bias"]))
    return np.stack(found, 1)


def test_decisions_and_costs_of_the_official_loop():
    with np.load(REFERENCE / "variable_effort.npz") as reference:
        probabilities = special.softmax(reference["logits"], axis=-1)
        tokens = (reference["sizes"] // 16) ** 2 + 1
        rows = np.arange(len(reference["labels"]))
        for threshold, name in ((0.9, "thr90"), (0.75, "thr75")):
            stop = stop_levels(probabilities.max(-1), (threshold,) * 10)
            official = np.minimum(reference[f"{name}/stop_index"], 10)
            np.testing.assert_array_equal(stop, official)
            prediction = probabilities[rows, stop].argmax(-1)
            np.testing.assert_array_equal(prediction, reference[f"{name}/prediction"])
            correct = prediction == reference["labels"]
            np.testing.assert_array_equal(correct, reference[f"{name}/correct_fallback"])
            assert correct.mean() >= reference[f"{name}/correct_official"].mean()
            np.testing.assert_array_equal(evaluated_cost(stop, tokens), reference[f"{name}/tokens_evaluated"])


@pytest.mark.parametrize("rows", [11, 1])
def test_compaction_changes_no_prediction(rows):
    params, images = made(rows)
    logits = every_level(params, images)
    confidence = special.softmax(logits, -1).max(-1)
    first = float(np.median(confidence[:, 0])) + 1e-4
    limits = (first, float(np.median(confidence[confidence[:, 0] < first, 1])) - 1e-4)
    found = cascaded()(params, images, limits)
    stop = stop_levels(confidence, limits)
    assert rows == 1 or set(stop) == {0, 1, 2}
    np.testing.assert_array_equal(found.answered, stop)
    np.testing.assert_allclose(found.outputs, logits[np.arange(rows), stop], rtol=1e-4, atol=1e-5)
    assert not found.overflowed.any()


def test_levels_run_on_the_rows_that_reach_them_and_nothing_is_compiled_again():
    params, images = made()
    confidence = special.softmax(every_level(params, images), -1).max(-1)
    serve = cascaded()
    assert serve.warm_up(params, images) >= 7  # one, and three buckets for each of two levels
    before = serve.dispatch.launches.copy()
    # Three rows go on, then two of them.
    first = float(np.sort(confidence[:, 0])[3])
    second = float(np.sort(confidence[confidence[:, 0] < first, 1])[2])
    with count_compiles() as log:
        found = serve(params, images, (first, second))
    assert log.count == 0
    assert np.bincount(found.answered, minlength=3).tolist() == [8, 1, 2]
    assert serve.dispatch.launches - before == {(1, 4): 1, (2, 2): 1}


def test_extreme_thresholds_and_broken_logits():
    params, images = made()
    before = cascaded().dispatch.launches.copy()
    assert cascaded()(params, images, (0, 0)).answered.tolist() == [0] * 11
    assert cascaded().dispatch.launches == before  # the larger levels were not run at all
    assert cascaded()(params, images, (1.1, np.inf)).answered.tolist() == [2] * 11
    images[3] = np.nan
    found = cascaded()(params, images, (0, 0))
    assert np.flatnonzero(found.failed).tolist() == [3]  # it went on, in vain
    assert cascaded().dispatch.launches - before == {(1, 2): 1, (1, 11): 1, (2, 11): 1}


def test_temperatures_move_the_confidence_of_a_level():
    params, images = made()
    logits = every_level(params, images)
    temperatures = (4.0, 0.5, 2.0)
    scaled = logits / np.array(temperatures)[None, :, None]
    limits = tuple(np.median(special.softmax(scaled, -1).max(-1)[:, :2], 0))
    found = cascaded()(params, images, limits, temperatures)
    stop = stop_levels(special.softmax(scaled, -1).max(-1), limits)
    np.testing.assert_array_equal(found.answered, stop)
    np.testing.assert_allclose(found.outputs, scaled[np.arange(11), stop], rtol=1e-4, atol=1e-5)


def test_the_cascade_in_one_program_gives_the_same():
    params, images = made(8)
    stages, held = level_stages(network, LEVELS[:2]), level_params(params, (0.8,))
    run = functools.partial(cascade, stages, dispatch=functools.partial(dispatch_buckets, buckets=(4,)))
    found = jax.jit(run)(held, images)
    logits = every_level(params, images)
    stop = stop_levels(special.softmax(logits[:, :2], -1).max(-1), (0.8,))
    assert set(stop) == {0, 1}
    np.testing.assert_array_equal(found.answered, stop)
    np.testing.assert_allclose(found.outputs, logits[np.arange(8), stop], rtol=1e-4, atol=1e-5)


def test_an_empty_batch():
    params, images = made()
    found = LevelCascade(network, (1, 2), buckets=(2,))(params, images[:0], (0.5,))
    assert found.answered.shape == (0,)


def population(rng, rows):
    """Confidences and errors at three levels: the surer, the oftener right; larger levels are better."""
    ease = rng.random((rows, 1))
    confidence = np.clip(ease * 0.6 + 0.4 * rng.random((rows, 3)), 0, 1)
    return confidence, rng.random((rows, 3)) > np.array([0.45, 0.6, 0.8]) + ease * np.array([0.5, 0.38, 0.19])


def lost(confidence, errors, values):
    stop = stop_levels(confidence, values)
    return errors[np.arange(len(stop)), stop].mean() - errors[:, -1].mean()


def harmed(confidence, errors, values):
    stop = stop_levels(confidence, values)
    return (errors[np.arange(len(stop)), stop] & ~errors[:, -1]).mean()


def test_the_certified_loss_holds_on_new_data():
    rng = np.random.default_rng(0)
    truth = population(rng, 40_000)
    found = []
    for _ in range(60):
        thresholds = level_thresholds(*population(rng, 1500), loss=0.04, delta=0.1)
        assert harmed(*truth, thresholds.values) >= lost(*truth, thresholds.values)
        found.append((harmed(*truth, thresholds.values), stop_levels(truth[0], thresholds.values)))
    harm = np.array([each for each, _ in found])
    assert (harm > 0.04).mean() <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / 60)
    # It is used: most of what may be lost is, and rows stop early.
    assert harm.mean() > 0.015
    assert np.mean([(stop < 2).mean() for _, stop in found]) > 0.05


def test_conformal_thresholds_limit_the_mean_and_search_the_held_out_rows():
    rng = np.random.default_rng(1)
    truth = population(rng, 40_000)
    harm = []
    for _ in range(40):
        held = population(rng, 400)
        harm.append(harmed(*truth, level_thresholds(*held, loss=0.05, method="conformal").values))
        two = (held[0][:, 1:], held[1][:, 1:])
        assert harmed(*two, level_thresholds(*two, loss=0.05, method="search").values) <= 0.05
    assert np.mean(harm) <= 0.05 + 3 * np.std(harm) / np.sqrt(40)
    assert np.mean(harm) > 0.03


def test_thresholds_against_the_labels_are_higher():
    held = population(np.random.default_rng(2), 3000)
    last, labels = (level_thresholds(*held, loss=0.05, against=against) for against in ("last", "labels"))
    assert last.values[0] < labels.values[0]


def test_where_all_may_stop_the_threshold_is_zero_or_more():
    confidence = np.full((900, 3), 0.7)
    found = level_thresholds(confidence, np.zeros((900, 3), bool), loss=0.02)
    assert found.values == (0.7, 0.0)  # nobody reaches the second level
    assert stop_levels(confidence, found.values).tolist() == [0] * 900


def test_nothing_certified_warns_and_nobody_stops():
    errors = np.stack([np.ones(500, bool), np.zeros(500, bool)], 1)
    with pytest.warns(NoEffectWarning, match="no threshold reaches joint_error=0.02"):
        found = level_thresholds(np.full((500, 2), 0.7), errors, loss=0.02)
    assert found.values == (np.inf,)


def test_temperatures_minimise_the_loss():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(300, 2, 4)) * np.array([5.0, 0.5])[None, :, None]
    labels = np.where(rng.random(300) < 0.6, logits[:, 0].argmax(-1), rng.integers(0, 4, 300))
    labels[:20] = -1
    found = level_temperatures(logits, labels)
    for level, temperature in enumerate(found):
        known = labels >= 0

        def loss(inverse, level=level, known=known):
            logs = special.log_softmax(inverse * logits[known, level], -1)
            return -logs[np.arange(known.sum()), labels[known]].mean()

        best = optimize.minimize_scalar(loss, bounds=(1e-3, 10), method="bounded", options={"xatol": 1e-8})
        assert temperature == pytest.approx(1 / best.x, rel=1e-3)


ONES = np.ones((4, 2))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: level_params({}, (-0.1,)), ValueError, r"thresholds\[0\]=-0.1"),
        (lambda: level_params({}, (float("nan"),)), ValueError, r"thresholds\[0\]=nan"),
        (lambda: level_params({}, ()), ValueError, r"thresholds=\(\)"),
        (lambda: level_params({}, (0.5,), (1.0,)), ValueError, "temperatures hold 1 for 2 levels"),
        (lambda: level_params({}, (0.5,), (1.0, 0.0)), ValueError, r"temperatures\[1\]=0.0"),
        (lambda: level_stages(network, (1,)), ValueError, "two or more"),
        (lambda: cascaded()({}, ONES, (0.5,)), ValueError, "thresholds hold 1 for 3 levels"),
        (lambda: evaluated_cost(np.array([2]), (1, 2)), ValueError, "costs hold 2 levels"),
        (lambda: stop_levels(ONES, (0.5, 0.5)), ValueError, "3 levels"),
        (lambda: stop_levels(ONES, (-1.0,)), ValueError, r"thresholds\[0\]=-1.0"),
        (lambda: level_thresholds(ONES[:0], ONES[:0] > 0), ValueError, "one row of held-out data"),
        (lambda: level_thresholds(ONES[:, :1], ONES[:, :1] > 0), ValueError, "two levels"),
        (lambda: level_thresholds(ONES, ONES[:, :1] > 0), ValueError, "errors have shape"),
        (lambda: level_thresholds(ONES, ONES), TypeError, "bool is needed"),
        (lambda: level_thresholds(ONES, ONES < 0), ValueError, "4 held-out predictions cannot certify"),
        (lambda: level_thresholds(ONES * np.nan, ONES < 0, loss=0.9), ValueError, "NaN in 4"),
        (lambda: level_thresholds(ONES, ONES < 0, loss=0.0), ValueError, "loss=0.0"),
        (lambda: level_thresholds(ONES, ONES < 0, method="sgr"), ValueError, "method='sgr'"),
        (lambda: level_temperatures(ONES[None], np.array([-1])), ValueError, "0 known"),
        (lambda: level_temperatures(ONES[None], np.array([2])), ValueError, "up to 2"),
        (lambda: level_temperatures(ONES[None] * np.inf, np.array([0])), ValueError, "NaN or infinity"),
    ],
)
def test_refuse(call, error, words):
    with pytest.raises(error, match=words):
        call()
