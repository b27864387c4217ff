"""The selective study: its curves."""

import dataclasses

import jax
import numpy as np
import pytest

from effjax.recipes.selective import CURVES, SelectiveStudy, groups
from effjax.tasks.image import standardised, unit_images
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
