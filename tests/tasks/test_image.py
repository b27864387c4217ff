"""The image task: evaluation that padding cannot change, the loss, and data that is refused."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core.cost import count_compiles
from effjax.data.sets import DataSet
from effjax.models.cnn import CNN
from effjax.models.mlp import MLP
from effjax.tasks.image import image_task

KEY = jax.random.key(0, impl="rbg")


def dataset(images, labels, classes=3):
    columns = {"image": np.asarray(images), "label": np.asarray(labels)}
    return DataSet("toy", {"train": columns, "test": columns}, tuple("abcdefghij"[:classes]), "", "", "image")


def toy(rows=10, dtype=np.uint8):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (rows, 8, 8, 1)).astype(dtype)
    return dataset(images / 255 if dtype is not np.uint8 else images, rng.integers(0, 3, rows))


@pytest.fixture(scope="module")
def small():
    task = image_task(toy(), MLP((4,), classes=3))
    return task, jax.jit(task.init)(KEY)


def test_images_are_normalised_as_a_model_was_trained(small):
    task, variables = small
    other = image_task(toy(), task.module, statistics=((0.25,), (0.5,)))
    x = (task.test["image"].astype(np.float32) / 255 - 0.25) / 0.5
    wanted = task.module.apply(variables, jnp.asarray(x))
    np.testing.assert_allclose(other.infer(variables, task.test["image"]), wanted, rtol=1e-4, atol=1e-5)
    assert (other.details["mean"], other.details["std"]) == (0.25, 0.5)


def test_evaluation_equals_the_plain_mean_whatever_the_batch(small):
    task, variables = small
    logits = np.asarray(task.infer(variables, task.test["image"]), np.float64)
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, task.test["label"][:, None], 1)[:, 0]
    for size in (1, 3, 4, 10, 64):
        scores = image_task(toy(), task.module, eval_batch=size).evaluate(variables)
        assert scores["accuracy"] == (logits.argmax(-1) == task.test["label"]).mean()
        assert scores["nll"] == pytest.approx(nll.mean(), rel=1e-5)


def test_evaluation_compiles_once(small):
    _, variables = small
    task = image_task(toy(), MLP((4,), classes=3), eval_batch=4)
    with count_compiles() as log:
        first = task.evaluate(variables)
    assert log.count == 1
    with count_compiles() as log:
        assert task.evaluate(variables) == first
    assert log.names == []


def test_loss_is_the_smoothed_cross_entropy(small):
    plain, variables = small
    images, labels = plain.train["image"], plain.train["label"]
    p = np.asarray(jax.nn.log_softmax(plain.infer(variables, images)))
    for smoothing in (0.0, 0.3):
        task = image_task(toy(), plain.module, label_smoothing=smoothing)
        q = np.eye(3)[labels] * (1 - smoothing) + smoothing / 3
        loss, (state, metrics) = jax.jit(task.loss)(variables, task.train)
        assert loss == pytest.approx(-(q * p).sum(-1).mean(), rel=1e-5)
        assert state == {}
        assert metrics["loss"] == loss
        assert metrics["accuracy"] == pytest.approx((p.argmax(-1) == labels).mean())


def test_batch_statistics_change_in_training_only():
    task = image_task(toy(), CNN((4,), classes=3, norm="batch"))
    variables = jax.jit(task.init)(KEY)
    assert set(variables) == {"params", "batch_stats"}
    _, (state, _) = jax.jit(task.loss)(variables, task.train)
    assert set(state) == {"batch_stats"}
    moved = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), state["batch_stats"], variables["batch_stats"]
    )
    assert min(jax.tree.leaves(moved)) > 0
    loss, (state, _) = jax.jit(lambda v, b: task.loss(v, b, train=False))(variables, task.train)
    jax.tree.map(np.testing.assert_array_equal, state["batch_stats"], variables["batch_stats"])
    assert loss == pytest.approx(task.evaluate(variables)["nll"], rel=1e-5)


def test_pixels_are_normalised_on_the_device():
    tasks = [image_task(toy(dtype=dtype), MLP((), classes=3)) for dtype in (np.uint8, np.float32)]
    variables = jax.jit(tasks[0].init)(KEY)
    np.testing.assert_allclose(*(task.infer(variables, task.test["image"]) for task in tasks), rtol=1e-4, atol=1e-5)
    task = tasks[0]
    pixels = (task.train["image"] / 255.0 - task.details["mean"]) / task.details["std"]
    assert pixels.mean() == pytest.approx(0, abs=1e-5)
    assert pixels.std() == pytest.approx(1, abs=1e-5)
    head = variables["params"]["head"]
    np.testing.assert_allclose(
        task.infer(variables, task.train["image"]),
        pixels.reshape(10, -1) @ head["kernel"] + head["bias"][None],
        rtol=1e-3,
    )


def test_dropout_takes_the_key():
    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1)))

    task = image_task(toy(), Dropped())
    variables = jax.jit(task.init)(KEY)
    loss = jax.jit(lambda key: task.loss(variables, task.train, key)[0])
    losses = [float(loss(jax.random.key(seed))) for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_bfloat16_and_remat_reach_a_named_model():
    task = image_task(toy(), "cnn", dtype="bfloat16", remat=True)
    assert (task.module.dtype, task.module.remat, task.module.classes) == (jnp.bfloat16, True, 3)
    shapes = jax.eval_shape(task.init, KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    assert jax.eval_shape(task.loss, shapes, task.train)[0].dtype == jnp.float32


def test_rows_are_a_fixed_random_choice():
    images = np.zeros((90, 2, 2, 1), np.uint8)
    data = dataset(images, np.repeat(np.arange(3), 30))
    task = image_task(data, MLP((), classes=3), train_rows=30, test_rows=7)
    assert [len(task.train["label"]), len(task.test["label"])] == [30, 7]
    assert set(task.train["label"]) == {0, 1, 2}
    again = image_task(data, MLP((), classes=3), train_rows=30)
    np.testing.assert_array_equal(task.train["label"], again.train["label"])


def test_built_in_digits_are_learnt():
    task = image_task("digits", "mlp")

    @jax.jit
    def step(params):
        gradient = jax.grad(lambda p: task.loss({"params": p}, task.train)[0])(params)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient)

    params = jax.jit(task.init)(KEY)["params"]
    before = task.evaluate({"params": params})
    for _ in range(25):
        params = step(params)
    after = task.evaluate({"params": params})
    assert before["nll"] > math.log(10) * 0.8
    assert after["accuracy"] > 0.9
    assert after["nll"] < 0.4


def bad_image(value):
    images = np.zeros((4, 2, 2, 1), np.float32)
    images[2, 1, 1, 0] = value
    return dataset(images, [0, 1, 2, 0])


IMAGES = np.zeros((4, 2, 2, 1), np.uint8)


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        (bad_image(np.nan), {}, "1 of 4 images hold NaN or infinity"),
        (bad_image(np.inf), {}, "1 of 4 images hold NaN or infinity"),
        (dataset(IMAGES, [0, 1, 2, 3]), {}, r"0 to 3\) must be integers in \[0, 2\]"),
        (dataset(IMAGES, [0, 1, -1, 2]), {}, "-1 to 2"),
        (dataset(IMAGES, [0.0, 1.0, 1.0, 2.0]), {}, "float64.*must be integers"),
        (dataset(IMAGES.astype(np.int64), [0, 1, 1, 2]), {}, "must be uint8, or floating"),
        (dataset(IMAGES[:3], [0, 1, 1, 2]), {}, r"image \(3, 2, 2, 1\) and label \(4,\)"),
        (dataset(IMAGES[:0], []), {}, "at least one row"),
        (toy(), {"train_rows": 11}, r"train_rows=11 must be an integer in \[1, 10\]"),
        (toy(), {"test_rows": 0}, "test_rows=0"),
        (toy(), {"label_smoothing": 1.0}, "label_smoothing=1.0"),
        (toy(), {"eval_batch": 0}, "eval_batch=0"),
        (toy(), {"dtype": "bfloat"}, "Did you mean 'bfloat16'"),
        (toy(), {"statistics": ((0.5, 0.5), (0.5, 0.5))}, r"statistics: the mean has shape \(2,\); expected \(1,\)"),
        (toy(), {"model": "resnet-20"}, "Did you mean 'resnet20'"),
        (toy(), {"model": MLP((4,), classes=5)}, r"returns shape \(1, 5\).*has 3 classes"),
        (toy(), {"model": MLP((4,), classes=3), "remat": True}, r"Set them on the module: MLP\("),
        ("digit", {}, "Did you mean 'digits'"),
        ("sms_spam", {}, "needs 'image' and 'label' in 'train'"),
    ],
)
def test_bad_input_is_named(data, arguments, message):
    with pytest.raises(ValueError, match=message):
        image_task(data, **{"model": "mlp", **arguments})


def test_labels_are_never_broadcast_and_unknown_ones_count_nowhere(small):
    task, variables = small
    images, labels = task.train["image"], task.train["label"]
    with pytest.raises(ValueError, match=r"batch\['label'\] has shape \(10, 1\); expected \(10,\)"):
        task.loss(variables, {"image": images, "label": labels[:, None]})
    unknown = np.where(np.arange(10) % 2, labels, -1)
    right = task.loss(variables, {"image": images[1::2], "label": labels[1::2]})[1][1]
    found = task.loss(variables, {"image": images, "label": unknown})[1][1]
    assert float(found["loss"]) == pytest.approx(float(right["loss"]), rel=1e-6)
    assert float(found["accuracy"]) == pytest.approx(float(right["accuracy"]), rel=1e-6)
