"""The study of hybrid models: who sees which rows, and own data with two models."""

import dataclasses

import jax
import numpy as np
import pytest

from effjax.core.errors import NoEffectWarning
from effjax.data.files import read_data
from effjax.recipes import pairs
from effjax.recipes.hybrid import VARIANTS, HybridStudy, _load, groups, program
from effjax.recipes.image_checkpoints import load_checkpoint
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


def own(path, **fields):
    return dataclasses.replace(STUDY, own=OwnData(path=str(path), model="mlp-3"), tasks=("own/mlp-3",), **fields)


def npz(path, rows, classes=3):
    rng = np.random.default_rng(0)
    np.savez(path, image=rng.integers(0, 255, (rows, 6, 6, 1), np.uint8), label=np.arange(rows) % classes)
    return path


def test_own_data_with_too_few_rows_for_the_threshold_say_how_many(tmp_path):
    (group,) = groups(own(npz(tmp_path / "few.npz", 30), expert="mlp-5", coverage=0.8))
    with pytest.raises(ValueError, match=r"calibration_share=0\.1 leaves 2 rows .* coverage=0\.8 needs 5"):
        group.load()
    (group,) = groups(own(npz(tmp_path / "few.npz", 30), expert="mlp-5", coverage=0.8, calibration_share=0.2))
    assert len(group.load().pair.calibration[1]) == 5


def test_models_of_own_data_are_named_as_they_were_given(tmp_path):
    path = npz(tmp_path / "own.npz", 100, 2)
    with pytest.raises(ValueError, match=r"expert='big' is not one of 'mlp', .* widths, as mlp-64"):
        groups(own(path, expert="big"))[0].load()
    study = dataclasses.replace(own(path, expert="mlp-5"), own=OwnData(path=str(path), model="small"))
    with pytest.raises(ValueError, match="model='small' is not one of"):
        groups(study)[0].load()


def test_a_model_given_by_its_weights_is_taken_as_it_is_or_with_a_new_head(tmp_path, monkeypatch):
    from effjax.models.resnet import pretrained_resnet

    rng = np.random.default_rng(0)
    images, paths = rng.integers(0, 255, (20, 32, 32, 3), np.uint8), {n: tmp_path / f"{n}.npz" for n in (10, 3)}
    for classes, path in paths.items():
        np.savez(path, image=images, label=np.arange(20) % classes)
    whole = load_checkpoint("model", "resnet_cifar10/resnet20", read_data("image", paths[10]))
    assert not whole.fresh
    trained = []

    def train(config, task, start=None):
        trained.append((task.name, start is None))
        return start

    monkeypatch.setattr(pairs, "_trained_on_images", train)
    small, _ = pairs._images(STUDY, read_data("image", path), ("resnet_cifar10/resnet20", "mlp-5"), False)
    assert trained == [("3/resnet20", False), ("3/mlp-5", True)]
    assert small.note == " The weights of resnet20 are taken with a new head, fine-tuned in 100 steps."
    wanted = pretrained_resnet("resnet20")[1]
    for found, head in ((whole.variables, True), (small.params, False)):
        same = jax.tree.map(np.array_equal, found, wanted)
        assert same["params"].pop("head") == {"kernel": head, "bias": head}
        assert all(jax.tree.leaves(same))
    # Normalised as it was trained, not by the statistics of these images.
    np.testing.assert_allclose(small.task.details["mean"], [0.485, 0.456, 0.406])
    given = OwnData(path=str(path), model="resnet_cifar10/resnet20")
    study = dataclasses.replace(STUDY, own=given, tasks=("own/resnet20",))
    weights = dataclasses.replace(study, expert="resnet_cifar10/resnet56")
    assert "router-seen" not in [arm.name for arm in groups(weights)[0].arms]
    (tmp_path / "mine.safetensors").write_bytes(b"")
    grey = npz(tmp_path / "grey.npz", 60)
    for expert, data, text in (
        ("resnet_cifar10/resnet20", grey, r"expert='resnet_cifar10/resnet20' takes images of 3 channels, and .* has 1"),
        (str(tmp_path / "mine.safetensors"), path, r"file is called 'mine', not after its architecture"),
    ):
        with pytest.raises(ValueError, match=text):
            load_checkpoint("expert", expert, read_data("image", data))


def test_an_expert_cheaper_than_the_base_model_is_told(tmp_path):
    (group,) = groups(own(npz(tmp_path / "own.npz", 100, 2), expert="mlp-2"))
    with pytest.warns(NoEffectWarning, match=r"expert='mlp-2' takes 76 multiply-adds and the base model 'mlp-3' 114"):
        assert group.load().pair.params[1]["params"]["head"]["kernel"].shape == (2, 2)


def test_texts_are_read_by_each_network_with_its_own_tokens(tmp_path, monkeypatch):
    trained = pairs._trained_on_texts
    fresh = lambda task: jax.jit(task.init)(jax.random.key(0))  # only one of the two is trained, to save time
    both = lambda config, task: trained(config, task) if task.name.endswith("1x8") else fresh(task)
    monkeypatch.setattr(pairs, "_trained_on_texts", both)
    path = tmp_path / "reviews.csv"
    words = ("dull", "great")
    path.write_text("review,verdict\n" + "\n".join(f"film {row} is {words[row % 2]},{row % 2}" for row in range(80)))
    own = OwnData(path=str(path), model="encoder-1x8", columns=(("text", "review"), ("label", "verdict")))
    fields = {"own": own, "tasks": ("reviews/encoder-1x8",), "expert": "encoder-1x16", "max_length": 12}
    study = dataclasses.replace(STUDY, **fields)
    (group,) = groups(study)
    pair = group.load().pair
    assert pair.task.name.endswith("/encoder-1x8/encoder-1x16")
    inputs, labels = pair.test
    assert sorted(inputs) == ["base", "expert"]
    assert inputs["base"]["input_ids"].shape == (len(labels), 12)
    logits, features = jax.jit(pair.base)(pair.params[0], inputs)
    assert (logits.shape, features.shape) == ((len(labels), 2), (len(labels), 8))
    head = pair.params[0]["params"]["head"]
    np.testing.assert_allclose(logits, features @ head["kernel"] + head["bias"][None, :], rtol=1e-5, atol=1e-6)
    assert jax.eval_shape(pair.expert, pair.params[1], inputs).shape == (len(labels), 2)
    texts = [{row.tobytes() for row in part[0]["base"]["input_ids"]} for part in (pair.held, pair.calibration)]
    assert not texts[0] & texts[1]


def test_scores_and_sets_of_other_kinds_are_refused():
    with pytest.raises(ValueError, match="of modality 'graph'; pairs are of image or text"):
        _load(STUDY, "graphs/cora", "mlp-2", "mlp-4")


def test_the_networks_run_once_on_a_set_whoever_asks(monkeypatch):
    loaded = _load(STUDY, "digits", "mlp-2", "mlp-4")
    calls = []
    run = pairs.hybrid_examples
    monkeypatch.setattr(pairs, "hybrid_examples", lambda *a, **k: (calls.append(len(a[2])), run(*a, **k))[1])
    arms = {arm.name: arm.build(loaded) for arm in groups(STUDY)[0].arms}
    for name in ("margin", "router", "router-logits"):
        state = arms[name].init(jax.random.key(0))
        if name != "margin":
            assert (arms[name].phases[0].aux(state).features is None) == (name == "router-logits")
        assert 0 < arms[name].evaluate(state)["accuracy"] < 1
    assert calls == [len(loaded.pair.test[1]), len(loaded.pair.held[1])]


def test_a_base_that_was_trained_again_is_asked_again():
    loaded = _load(STUDY, "digits", "mlp-2", "mlp-4")
    arms = {arm.name: arm.build(loaded) for arm in groups(STUDY)[0].arms}
    for name, again in (("router", False), ("alternating", True)):
        state = arms[name].init(jax.random.key(0))
        base = jax.tree.map(jax.numpy.zeros_like, state.params.base)  # now it calls every digit a zero
        found = arms[name].evaluate(state._replace(params=state.params._replace(base=base)))
        assert (found["base"] == np.mean(loaded.pair.test[1] == 0)) == again
        assert found["expert"] == loaded.seen("test").expert_correct.mean()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"tasks": ("digits/mlp-2",)}, "must be DATA/BASE/EXPERT"),
        ({"router_share": 0.9, "calibration_share": 0.1}, "leave nothing of"),
        ({"coverage": 1.0}, "coverage=1.0"),
        ({"coverages": (0.5, 0.0)}, r"coverages\[1\]=0.0"),
        ({"pair_steps": 0}, "pair_steps=0"),
        ({"max_length": 2}, "max_length=2"),
    ],
)
def test_bad_configs_are_named(fields, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(STUDY, **fields)


def test_curves_begin_and_end_at_the_models_alone_and_the_router_is_paid_for():
    pair = _load(STUDY, "digits", "mlp-2", "mlp-4")
    found = {}
    for name in ("margin", "router"):
        made = program(STUDY, VARIANTS[name], pair)
        state = made.init(jax.random.key(0))
        metrics, found[name] = made.measured(state)
        by_coverage, by_cost = found[name]["accuracy_coverage"], found[name]["accuracy_cost"]
        np.testing.assert_allclose(by_coverage.y[[0, -1]], [metrics["expert"], metrics["base"]], rtol=1e-6)
        assert by_coverage.points == {"base alone": (1.0, metrics["base"]), "expert alone": (0.0, metrics["expert"])}
        at = {round(c, 2): y for c, y in zip(by_coverage.x, by_coverage.y, strict=True)}
        assert [at[c] for c in (0.9, 0.8, 0.7, 0.5)] == pytest.approx(
            [metrics[f"accuracy_{c}"] for c in (90, 80, 70, 50)]
        )
        np.testing.assert_array_equal(by_cost.y, by_coverage.y[::-1])
    # 64 pixels, 2 or 4 units, 10 classes; and every weight of the router's layers once.
    base, expert = 64 * 2 + 2 * 10, 64 * 4 + 4 * 10
    assert found["margin"]["accuracy_cost"].points["base alone"][0] == pytest.approx(base / expert)
    np.testing.assert_allclose(found["margin"]["accuracy_cost"].x, base / expert + np.linspace(0, 1, 21))
    weights = sum(leaf.size for leaf in jax.tree.leaves(state.params.router) if leaf.ndim == 2)
    np.testing.assert_allclose(found["router"]["accuracy_cost"].x, (base + weights) / expert + np.linspace(0, 1, 21))
