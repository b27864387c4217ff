"""The selective study: its curves, own data, and pretrained networks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.data.sets import DataSet
from effjax.models.resnet import ResNet
from effjax.recipes import selective as recipe
from effjax.recipes.selective import CURVES, SelectiveStudy, groups
from effjax.recipes.spec import OwnData
from effjax.recipes.streams import stream_measures
from effjax.study.resolve import resolve
from effjax.tasks.image import image_task, standardised, unit_images
from effjax.train.options import Budget

STUDY = SelectiveStudy(
    budget=Budget(2),
    tasks=("digits/mlp-4",),
    pool=1,
    calibration_rows=300,
    joint_errors=(0.2,),
    batch_size=16,
    arms=("ce", "gamblers"),
)


@pytest.fixture(scope="module")
def shared():
    (group,) = groups(STUDY)
    return group, group.load()


def test_curves_are_the_risk_of_the_answered_at_each_coverage(shared):
    group, loaded = shared
    assert group.curves == CURVES
    made = next(arm for arm in group.arms if arm.name == "gamblers").build(loaded)
    state = jax.jit(made.init)(jax.random.key(0))
    metrics, curves = made.measured(state)
    test = made.task.test
    variables = {"params": state.params}
    outputs = np.asarray(
        loaded.wider(1).module.apply(variables, standardised(unit_images(test["image"]), made.task.details))
    )
    wrong = outputs[:, :10].argmax(1) != test["label"]
    # Untrained, so no two rows tie; the largest probability over the classes, and less the output of abstention.
    shifted = np.exp(outputs[:, :10] - outputs[:, :10].max(1, keepdims=True))
    for name, surest in (
        ("risk_coverage", np.sort(shifted / shifted.sum(1, keepdims=True), 1)[:, -1]),
        ("own_risk_coverage", -np.exp(outputs[:, 10]) / np.exp(outputs).sum(1)),
    ):
        order = np.argsort(-surest, kind="stable")
        for coverage, risk in zip(curves[name].x, curves[name].y, strict=True):
            taken = int(np.ceil(coverage * len(wrong) - 1e-9))
            assert risk == pytest.approx(wrong[order[:taken]].mean(), abs=0.02), (name, coverage)
        assert curves[name].y[-1] == pytest.approx(1 - metrics["accuracy"])
        assert curves[name].x[-1] == 1.0


def test_the_saddle_and_every_other_arm_give_the_first_curve(shared):
    _, loaded = shared
    (every,) = groups(dataclasses.replace(STUDY, arms=("*",)))
    made = {arm.name: arm.build(loaded) for arm in every.arms if arm.name in ("osp-saddle", "ce")}
    for name, one in made.items():
        assert list(one.measured(jax.jit(one.init)(jax.random.key(0)))[1]) == ["risk_coverage"], name


def own(path, *words):
    """As ``effjax compare selective --data PATH`` has it."""
    return resolve("selective", ["--seeds", "0", *words], OwnData(path=str(path)))


def images(rows, classes=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 255, (rows, 7, 5, 1), np.uint8), np.arange(rows) % classes


def npz(folder, rows, classes=2):
    path = folder / "own.npz"
    image, label = images(rows, classes)
    np.savez(path, image=image, label=label)
    return path


def test_a_fifth_of_own_training_rows_is_held_out(tmp_path):
    study = own(npz(tmp_path, 500))
    assert study.preset == "own"
    shared = study.groups()[0].load()
    assert len(shared.calibration["label"]) == 80
    assert (len(shared.task.train["label"]), len(shared.task.test["label"])) == (320, 100)
    assert shared.task.train["image"].shape[1:] == (7, 5, 1)


@pytest.mark.parametrize("rows", [200, 30])
def test_too_few_rows_for_a_joint_error_say_what_could_be_certified(tmp_path, rows):
    path = npz(tmp_path, rows)
    with pytest.raises(ValueError, match=r"cannot certify joint_errors of 0\.05 .*: 59 are needed") as refused:
        own(path).groups()[0].load()
    advice = str(refused.value).partition("or give joint_errors=")[2].rstrip(".").split()
    assert own(path, "--joint-errors", *advice).groups()[0].load().task.classes == 2


def test_a_preset_for_other_data_forgets_its_numbers_of_rows(tmp_path):
    study = resolve("selective:cpu", [], OwnData(path=str(npz(tmp_path, 500))))
    assert (study.config.calibration_rows, study.config.train_rows) == (None, None)
    with pytest.raises(ValueError, match=r"pool=2 does not divide images of 7 x 5\. Use 1"):
        study.groups()[0].load()


def test_a_class_that_the_test_images_lack_is_no_matter(tmp_path):
    (x, y), (x_test, y_test) = images(300, 3), images(60, 2, seed=1)
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    group = own(tmp_path / "own.npz", "--arms", "ce").groups()[0]
    made = group.arms[0].build(group.load())
    metrics, curves = made.measured(jax.jit(made.init)(jax.random.key(0)))
    assert made.task.classes == 3
    assert np.isfinite([*metrics.values(), *curves["risk_coverage"].y]).all()


def test_an_unknown_model_is_named(tmp_path):
    study = resolve("selective", [], OwnData(path=str(npz(tmp_path, 500)), model="small"))
    with pytest.raises(ValueError, match=r"model='small' is not one of 'mlp', .* widths, as mlp-64"):
        study.groups()[0].load()


def test_pretrained_networks_give_features_and_thresholds_come_from_test_images(monkeypatch):
    rng = np.random.default_rng(0)
    draw = lambda rows: {
        "image": rng.integers(0, 255, (rows, 32, 32, 3), np.uint8),
        "label": np.arange(rows) % 10,
    }
    data = DataSet("cifar10", {"train": draw(40), "test": draw(80)}, tuple("abcdefghij"), "x", "made up", "image")
    module = ResNet(stages=(1, 1), widths=(4, 8))
    variables = jax.jit(lambda key: module.init(key, jnp.zeros((1, 32, 32, 3)), train=False))(jax.random.key(0))
    monkeypatch.setattr(recipe, "load", lambda name: data)
    monkeypatch.setattr(recipe, "pretrained_resnet", lambda name: (module, variables))
    study = dataclasses.replace(
        STUDY, tasks=("cifar10/pretrained-resnet20",), calibration_rows=30, train_rows=16, joint_errors=(0.2,)
    )
    shared = groups(study)[0].load()
    sizes = [len(columns["label"]) for columns in (shared.task.train, shared.calibration, shared.task.test)]
    assert sizes == [16, 30, 50]
    assert shared.task.train["image"].shape[1:] == (1, 1, 8)
    # The network's own last layer makes its logits of them.
    head = jax.tree.map(np.asarray, variables["params"]["head"])
    features = shared.task.test["image"][:, 0, 0]
    left = np.setdiff1d(np.arange(80), recipe.fixed_rows("calibration_rows", 30, 80))
    inputs = standardised(unit_images(data.splits["test"]["image"][left]), image_task(data, "mlp").details)
    logits = jax.jit(lambda x: module.apply(variables, x, train=False))(inputs)
    np.testing.assert_allclose(features @ head["kernel"] + head["bias"], logits, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(shared.task.test["label"], data.splits["test"]["label"][left])
    with pytest.raises(ValueError, match="leaves none of the 80 test images to report on"):
        groups(dataclasses.replace(study, calibration_rows=80))[0].load()
    with pytest.raises(ValueError, match="take the images of cifar10 with pool=1"):
        groups(dataclasses.replace(study, pool=2))[0].load()


def test_rows_without_a_label_count_in_no_measure():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(60, 4)).astype(np.float32), rng.integers(0, 4, 60)
    hidden = np.where(np.arange(60) % 3 == 0, -1, labels)
    found = recipe._measures(STUDY, logits, hidden)
    wanted = recipe._measures(STUDY, logits[hidden >= 0], hidden[hidden >= 0])
    np.testing.assert_allclose(found.pop("risk_coverage").y, wanted.pop("risk_coverage").y, rtol=1e-6)
    assert {k: float(v) for k, v in found.items()} == pytest.approx({k: float(v) for k, v in wanted.items()})
    assert float(found["accuracy"]) == pytest.approx((logits.argmax(1) == labels)[hidden >= 0].mean())


def test_a_stream_is_played_by_thresholds_of_the_network():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 700)
    logits = (rng.exponential(2.0, (700, 1)) * np.eye(4)[labels] + rng.normal(size=(700, 4))).astype(np.float32)
    found = stream_measures(logits, labels, 600, (0.0, 0.3))
    mistakes, abstentions = (np.asarray(found[f"stream_{name}"].y) for name in ("mistakes", "abstentions"))
    excess = np.asarray(found["stream_excess"].y)
    # One learner answers less and errs less; the other tolerates every threshold and plays the lowest ones.
    wrong = 1000 * (logits.argmax(1) != labels).mean()
    assert mistakes[0] < 0.5 * mistakes[1] < mistakes[1] < wrong
    assert abstentions[0] > 1.5 * abstentions[1]
    assert (mistakes + abstentions <= 1000).all()
    # The regret to the best threshold is within the bound of a learner that one threshold would suffice.
    assert np.nanmax(np.abs(excess)) <= 1000 * 3 * np.sqrt(600 * np.log(20)) / 600
    assert 0 < found["stream_rivals"] <= 1
    hidden = np.append(labels, [-1] * 9)
    again = stream_measures(np.append(logits, logits[:9], 0), hidden, 600, (0.0, 0.3))
    np.testing.assert_array_equal(again["stream_mistakes"].y, mistakes)


def test_a_stream_longer_than_the_test_images_is_refused_before_training():
    with pytest.raises(ValueError, match="stream_rounds=100000, but 360 test images have a label"):
        groups(dataclasses.replace(STUDY, stream_rounds=100_000))[0].load()
    for tolerances in ((0.1,), (0.1, 0.0), (0.0, 0.0)):
        with pytest.raises(ValueError, match="must be two or more rates in ascending order"):
            dataclasses.replace(STUDY, tolerances=tolerances)
    assert set(groups(dataclasses.replace(STUDY, stream_rounds=10))[0].curves) > set(CURVES)
