"""Tasks from a user's own network and data: every kind of network, and what is refused."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effjax.tasks.custom import Score, task
from effjax.train.loop import fit
from effjax.train.options import TrainOptions
from effjax.train.trainer import supervised

ROWS = 48


def columns(rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 3)).astype(np.float32)
    return {"x": x, "label": (x.sum(1) > 0).astype(np.int32)}


def data():
    return {"train": columns(), "test": columns(21, 1)}


class Linen(nn.Module):
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dense(2)(nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.drop, self.last = nnx.Dropout(0.2, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))


class Eqx(eqx.Module):
    layers: eqx.nn.MLP
    drop: eqx.nn.Dropout

    def __init__(self, key):
        self.layers, self.drop = eqx.nn.MLP(3, 2, 4, 1, key=key), eqx.nn.Dropout(0.2)

    def __call__(self, x, key=None):
        return self.layers(self.drop(x, key=key))


BARE = (lambda key: {"w": jax.random.normal(key, (3, 2))}, lambda params, x: x @ params["w"])
NETWORKS = {
    "linen": Linen(0.2),
    "nnx": Nnx,
    "nnx-made": Nnx(nnx.Rngs(0)),
    "equinox": Eqx,
    "equinox-made": Eqx(jax.random.key(0)),
    "functions": BARE,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_of_network_trains_and_is_judged_without_dropout(name):
    problem = task(NETWORKS[name], data())
    program = supervised(problem, optax.adam(0.05), steps=40, batch_size=16)
    state = fit(program, 0).state
    before, after = (program.judged(s) for s in (jax.jit(program.init)(jax.random.key(0)), state))
    assert after["loss"] < 0.7 * before["loss"]
    assert program.judged(state) == after  # no dropout left on
    outputs = jax.jit(problem.infer)(program.params(state), data()["test"]["x"])
    assert after["accuracy"] == pytest.approx(np.mean(np.argmax(outputs, 1) == data()["test"]["label"]))


@pytest.mark.parametrize(("name", "collection"), [("linen", "batch_stats"), ("nnx", "nnx")])
def test_running_statistics_move_in_training_only(name, collection):
    problem = task(NETWORKS[name], data())
    program = supervised(problem, optax.sgd(0.0), steps=5, batch_size=16)
    start, end = jax.jit(program.init)(jax.random.key(0)), fit(program, 0).state
    means = [
        leaf
        for leaf in jax.tree.leaves(
            jax.tree.map(lambda a, b: _moved(a, b), start.model[collection], end.model[collection])
        )
        if leaf
    ]
    assert means
    jax.tree.map(np.testing.assert_array_equal, start.params, end.params)


def _moved(a, b):
    return jnp.issubdtype(a.dtype, jnp.floating) and bool((np.asarray(a) != np.asarray(b)).any())


def test_made_networks_start_from_their_own_parameters_and_makers_from_the_seed():
    kernel = lambda name, seed: jax.tree.leaves(task(NETWORKS[name], data()).init(jax.random.key(seed))["params"])
    for made, maker in (("nnx-made", "nnx"), ("equinox-made", "equinox")):
        assert all(np.array_equal(a, b) for a, b in zip(kernel(made, 0), kernel(made, 1), strict=True))
        assert not all(np.array_equal(a, b) for a, b in zip(kernel(maker, 0), kernel(maker, 1), strict=True))


def test_weights_leave_rows_out_of_the_loss_and_the_gradient():
    weighted = {**columns(8), "weight": np.array([1, 1, 0, 1, 0, 0, 1, 0], np.float32)}
    problem = task(BARE, {"train": weighted, "test": weighted})
    params = jax.jit(problem.init)(jax.random.key(0))
    loss = lambda params, batch: problem.loss(params, batch)[0]
    kept = {name: column[weighted["weight"] > 0] for name, column in weighted.items()}
    for whole, part in zip(
        *(jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(params, b)) for b in (weighted, kept)), strict=True
    ):
        np.testing.assert_allclose(whole, part, rtol=1e-6)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_accumulation_weighs_parts_by_their_real_examples(micro_batches):
    weighted = {**columns(8), "weight": np.array([1, 1, 1, 0, 1, 0, 0, 0], np.float32)}
    problem = task(BARE, {"train": weighted, "test": weighted})
    states = []
    for accumulate in (1, micro_batches):
        options = TrainOptions(accumulate=accumulate)
        program = supervised(problem, optax.sgd(0.3), steps=3, batch_size=8, options=options)
        states.append(fit(program, 0, options=options).state.params["w"])
    np.testing.assert_allclose(*states, rtol=1e-5)


def test_a_loss_and_a_metric_of_ones_own():
    rows = {"a": np.ones((6, 2), np.float32), "b": np.ones((6, 1), np.float32), "target": np.arange(6.0)}
    apply = lambda params, inputs: (inputs["a"] @ params)[:, 0] + inputs["b"][:, 0]
    problem = task(
        (lambda key: jnp.ones((2, 1)), apply),
        {"train": rows, "test": rows},
        loss=lambda outputs, batch: jnp.abs(outputs - batch["target"]),
        metric=Score("within_one", "max", lambda outputs, batch: jnp.abs(outputs - batch["target"]) <= 1),
        inputs=("a", "b"),
    )
    found = problem.evaluate(problem.init(jax.random.key(0)))
    assert found == {"loss": pytest.approx(np.abs(3 - np.arange(6)).mean()), "within_one": 0.5}
    assert problem.metric == ("within_one", "max", "test within one")


def test_squared_error_of_one_output_or_a_column():
    rows = {"x": np.ones((6, 2), np.float32), "target": np.arange(6, dtype=np.float32)}
    for apply in (lambda params, x: x @ params, lambda params, x: (x @ params)[:, 0]):
        problem = task((lambda key: jnp.ones((2, 1)), apply), {"train": rows, "test": rows}, loss="squared_error")
        assert problem.evaluate(problem.init(jax.random.key(0)))["loss"] == pytest.approx(
            np.mean((2 - np.arange(6)) ** 2)
        )


def changed(**splits):
    return {name: {**columns(), **splits.get(name, {})} for name in ("train", "test")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": {"train": columns()}}, "must hold 'train' and 'test'"),
        ({"data": changed(test={"extra": np.ones(ROWS)})}, r"'train' has the columns \['label', 'x'\]"),
        ({"data": changed(train={"x": np.full((ROWS, 3), np.nan)})}, "holds NaN or infinity in 48 rows, the first 0"),
        ({"data": changed(train={"label": np.zeros(5, int)})}, "columns of the lengths"),
        ({"data": changed(train={"label": np.full(ROWS, 2**40)})}, "integers beyond 32 bits"),
        ({"data": changed(train={"label": np.full(ROWS, -1)})}, "needs integers .* from 0 on"),
        (
            {"data": changed(train={"label": np.ones((ROWS, 1), int)}, test={"label": np.ones((ROWS, 1), int)})},
            "needs integers",
        ),
        ({"data": changed(train={"label": np.full(ROWS, 7)})}, "labels go up to 7, and Linen has 2 outputs. Give it 8"),
        ({"data": changed(train={"x": np.array(["a"] * ROWS)})}, "give numbers"),
        ({"inputs": "labl"}, "no column 'labl'.*Did you mean 'label'"),
        ({"loss": "crossentropy"}, "Did you mean 'cross_entropy'"),
        ({"loss": lambda outputs, batch: jnp.mean(outputs)}, r"loss returns shape \(\) for 2 rows.*one number per row"),
        ({"loss": lambda outputs, batch: outputs[:, 0] - batch["y"]}, "loss does not fit the outputs of Linen.*'y'"),
        ({"data": changed(**{s: {"weight": np.ones((ROWS, 1))} for s in ("train", "test")})}, r"'weight'. is float"),
        (
            {"data": changed(**{s: {"weight": np.full(ROWS, -1.0)} for s in ("train", "test")})},
            "one number of 0 or more",
        ),
        (
            {"data": changed(test={"label": np.full(ROWS, -1)}), "loss": lambda o, b: o[:, 0], "metric": "accuracy"},
            "would count unknown labels as wrong",
        ),
        ({"metric": Score("m", "max", lambda o, b: o)}, r"metric returns shape \(2, 2\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(arguments, message):
    with pytest.raises(ValueError, match=message):
        task(arguments.pop("module", Linen()), arguments.pop("data", data()), **arguments)


def test_a_network_of_no_known_kind():
    with pytest.raises(TypeError, match=r"module is a str\. Give a Linen module, an NNX module"):
        task("resnet", data())
