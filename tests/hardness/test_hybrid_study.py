"""The study of hybrid models: who sees which rows, and own data with two models."""

import dataclasses

import numpy as np
import pytest

from effjax.recipes.hybrid import HybridStudy, _load, groups
from effjax.recipes.pairs import parts_of
from effjax.recipes.spec import OwnData
from effjax.train.options import Budget

STUDY = HybridStudy(budget=Budget(1, "epochs"), tasks=("digits/mlp-2/mlp-4",), pair_steps=1)


def test_no_row_is_in_two_parts():
    columns = {"image": np.arange(100).reshape(100, 1, 1, 1), "label": np.arange(100) % 10}
    parts = [part["image"].ravel().tolist() for part in parts_of(STUDY, "rows", columns)]
    assert [len(part) for part in parts] == [55, 35, 10]
    assert sorted(row for part in parts for row in part) == list(range(100))
    assert [part["image"].ravel().tolist() for part in parts_of(STUDY, "rows", columns)] == parts


def test_pair_is_judged_on_rows_that_nobody_learned_from():
    pair = _load(STUDY, "digits", "mlp-2", "mlp-4").pair
    pixels = [{row.tobytes() for row in part[0]} for part in (pair.train, pair.held, pair.calibration)]
    assert len(pair.train[1]) + len(pair.held[1]) + len(pair.calibration[1]) == 1437
    assert len(pixels[0] | pixels[1] | pixels[2]) == sum(map(len, pixels))
    logits, features = pair.base(pair.params[0], pair.test[0][:3])
    assert logits.shape == (3, 10)
    assert features.shape == (3, 2)
    assert pair.expert(pair.params[1], pair.test[0][:3]).shape == (3, 10)


def test_pretrained_pairs_have_no_training_rows():
    names = lambda study: [arm.name for arm in groups(study)[0].arms]
    assert "router-seen" in names(STUDY)
    assert "router-seen" not in names(dataclasses.replace(STUDY, tasks=("cifar10/resnet20/resnet56",)))


def test_own_data_bring_the_base_and_the_expert_is_a_field(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "own.npz"
    np.savez(path, image=rng.integers(0, 255, (60, 6, 6, 1), np.uint8), label=np.arange(60) % 3)
    own = OwnData(path=str(path), model="mlp-3")
    study = dataclasses.replace(STUDY, own=own, tasks=("own/mlp-3",), expert="mlp-5", coverage=0.5)
    (group,) = groups(study)
    assert group.name == "own-mlp-3"
    pair = group.load().pair
    assert pair.task.name.endswith("/mlp-3/mlp-5")
    assert pair.params[1]["params"]["layer0"]["Dense_0"]["kernel"].shape == (36, 5)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"tasks": ("digits/mlp-2",)}, "must be DATA/BASE/EXPERT"),
        ({"router_share": 0.9, "calibration_share": 0.1}, "leave nothing of"),
        ({"coverage": 1.0}, "coverage=1.0"),
        ({"coverages": (0.5, 0.0)}, r"coverages\[1\]=0.0"),
        ({"pair_steps": 0}, "pair_steps=0"),
    ],
)
def test_bad_configs_are_named(fields, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(STUDY, **fields)
