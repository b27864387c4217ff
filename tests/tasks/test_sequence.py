"""The sequence task: losses against NumPy, evaluation that padding cannot change, and what is refused."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.core.cost import count_compiles
from effjax.data.pipeline import batches
from effjax.data.sequences import SequenceData, sequence_data
from effjax.models.sequence import GRUCell, Recurrent
from effjax.models.sequence_network import SequenceNetwork
from effjax.recurrent.through_time import fptt_step
from effjax.tasks.sequence import sequence_evaluator, sequence_loss, sequence_metric, sequence_task, task_of_functions
from effjax.tasks.sequence_networks import cell_task
from effjax.train.loop import fit
from effjax.train.options import TrainOptions
from effjax.train.sequence_trainer import through_time
from effjax.train.trainer import supervised

KEY = jax.random.key(0, impl="rbg")
loss_of = jax.jit(sequence_loss, static_argnums=0)


class Pooled(nn.Module):
    """One answer a sequence."""

    outputs: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.outputs)(x.mean(1))


class Tagged(nn.Module):
    """One answer a step."""

    vocabulary: int
    outputs: int

    @nn.compact
    def __call__(self, ids):
        return nn.Dense(self.outputs)(nn.Embed(self.vocabulary, 4)(ids))


def problem(kind, rows=10, time=5, outputs=3):
    rng = np.random.default_rng(0)
    features, vocabulary = (0, 6) if kind == "tokens" else (2, 0)

    def columns():
        if kind == "tokens":
            inputs = rng.integers(0, vocabulary, (rows, time), np.int32)
            return {"inputs": inputs, "targets": rng.integers(-1, outputs, (rows, time), np.int32)}
        inputs = rng.normal(size=(rows, time, features)).astype(np.float32)
        targets = rng.normal(size=rows).astype(np.float32) if kind == "value" else rng.integers(0, 3, rows, np.int32)
        return {"inputs": inputs, "targets": targets}

    size = 1 if kind == "value" else outputs
    return SequenceData("toy", "made up", kind, columns(), columns(), time, features, vocabulary, size, None)


def model_of(data):
    return Tagged(data.vocabulary, data.outputs) if data.kind == "tokens" else Pooled(data.outputs)


def reference(kind, outputs, targets):
    """Loss and accuracy in float64 NumPy, over the answers asked for."""
    outputs = np.asarray(outputs, np.float64)
    if kind == "value":
        return ((outputs[:, 0] - targets) ** 2).mean(), None
    log_p = outputs - np.log(np.exp(outputs).sum(-1, keepdims=True))
    asked = targets >= 0
    picked = np.take_along_axis(log_p, np.maximum(targets, 0)[..., None], -1)[..., 0]
    return -picked[asked].mean(), (outputs.argmax(-1) == targets)[asked].mean()


@pytest.mark.parametrize("kind", ["class", "value", "tokens"])
def test_losses_and_scores_equal_numpy(kind):
    data = problem(kind)
    task = sequence_task(data, model_of(data))
    variables = jax.jit(task.init)(KEY)
    infer = jax.jit(task.infer)
    outputs = infer(variables, data.train["inputs"])
    loss, accuracy = reference(kind, outputs, data.train["targets"])
    value, (state, metrics) = jax.jit(task.loss)(variables, data.train)
    assert value == pytest.approx(loss, rel=1e-5)
    assert float(metrics["loss"]) == float(value)
    assert state == {}
    assert metrics.get("accuracy") == (None if accuracy is None else pytest.approx(accuracy))
    assert loss_of(kind, outputs, data.train["targets"]) == pytest.approx(loss, rel=1e-5)

    outputs = infer(variables, data.test["inputs"])
    loss, accuracy = reference(kind, outputs, data.test["targets"])
    expected = {"mse": loss} if kind == "value" else {"accuracy": accuracy, "nll": loss}
    for size in (1, 7):
        scores = sequence_evaluator(data, task.infer, size)(variables)
        assert scores == pytest.approx(expected, rel=1e-5)
    assert task.evaluate(variables) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("kind", "metric"), [("class", "accuracy"), ("value", "mse"), ("tokens", "nll")])
def test_what_a_task_says_about_itself(kind, metric):
    data = problem(kind)
    task = sequence_task(data, model_of(data))
    assert task.metric.name == metric
    assert task.metric.name in task.evaluate(jax.jit(task.init)(KEY))
    assert task.metric.goal == ("max" if kind == "class" else "min")
    assert (task.classes, task.details["data"]) == (None if kind == "value" else 3, data)
    assert "draw" not in task.details
    asked = None if kind != "tokens" else (data.train["targets"] >= 0).sum()
    assert (task.weight and task.weight(data.train)) == asked


def test_the_metric_is_known_from_the_name():
    names = ("noisy-digits-9", "fsdd", "digits-pixels", "add-9", "copy-9", "ptb-words-9", "tiny_shakespeare-chars-9")
    assert [sequence_metric(name).name for name in names] == ["accuracy"] * 3 + ["mse"] + ["nll"] * 3
    for name in ("noisy-digits-9", "fsdd", "digits-pixels", "add-9", "copy-9", "tiny_shakespeare-chars-9"):
        data = sequence_data(name)
        assert sequence_task(data, model_of(data)).metric == sequence_metric(name)
    with pytest.raises(ValueError, match="Did you mean 'fsdd'"):
        sequence_metric("fsd")


def test_accumulated_gradients_weigh_parts_by_what_they_ask():
    data = problem("tokens")
    data.train["targets"][:5] = -1  # of the two halves one asks for nothing
    task = sequence_task(data, model_of(data))
    batch = {name: column[:10] for name, column in data.train.items()}
    states = []
    for parts in (1, 2):
        program = supervised(task, optax.sgd(1.0), batch_size=10, options=TrainOptions(accumulate=parts))
        state = jax.jit(program.init)(KEY)
        states.append(jax.jit(program.phases[0].step)(state, batch, None)[0].params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *states)


def test_the_trainer_completes_batches_that_are_drawn():
    task = sequence_task("noisy-digits-12", Pooled(10))
    batch = next(supervised(task, optax.sgd(0.1), batch_size=4).loader.open(0))
    assert batch["inputs"].shape == (4, 12, 8)


def test_a_network_in_two_functions():
    data = problem("class")
    apply = lambda variables, inputs, key, train: (inputs.mean(1) @ variables["params"], {})
    task = task_of_functions(data, "linear", lambda key: {"params": np.zeros((2, 3), np.float32)}, apply)
    assert (task.name, task.module) == ("toy/linear", None)
    assert task.evaluate(task.init(KEY))["nll"] == pytest.approx(np.log(3), rel=1e-5)
    assert jax.jit(task.loss)(task.init(KEY), data.train)[0] == pytest.approx(np.log(3), rel=1e-5)


def test_bfloat16_outputs_are_scored_in_float32():
    outputs = np.random.default_rng(0).normal(size=(64, 7)).astype(jnp.bfloat16)
    targets = np.arange(64) % 7
    loss = loss_of("class", outputs, targets)
    assert loss.dtype == jnp.float32
    assert loss == pytest.approx(reference("class", outputs, targets)[0], rel=1e-5)


def test_what_is_not_asked_has_no_loss_and_no_gradient():
    targets = np.array([[-1, 1], [-1, -1]])
    outputs = np.random.default_rng(0).normal(size=(2, 2, 3)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda o: sequence_loss("tokens", o, targets)))(outputs)
    np.testing.assert_array_equal(np.abs(gradient).sum(-1) > 0, targets >= 0)
    assert loss_of("tokens", np.ones((2, 2, 3), np.float32), np.full((2, 2), -1)) == 0


def test_evaluation_compiles_once():
    data = problem("class")
    task = sequence_task(data, model_of(data), eval_batch=4)
    variables = jax.jit(task.init)(KEY)
    with count_compiles() as log:
        first = task.evaluate(variables)
    assert log.count == 1
    with count_compiles() as log:
        assert task.evaluate(variables) == first
    assert log.names == []


def test_train_and_key_reach_a_model_with_dropout_and_statistics():
    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.BatchNorm(use_running_average=not train)(x.mean(1))
            return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))

    task = sequence_task(problem("class"), Dropped())
    variables = jax.jit(task.init)(KEY)
    train_loss = jax.jit(task.loss)
    losses = [float(train_loss(variables, task.train, jax.random.key(seed))[0]) for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    _, (state, _) = train_loss(variables, task.train, jax.random.key(1))
    assert np.abs(state["batch_stats"]["BatchNorm_0"]["mean"]).max() > 0
    value, (state, _) = jax.jit(lambda v, batch: task.loss(v, batch, train=False))(variables, task.test)
    jax.tree.map(np.testing.assert_array_equal, state["batch_stats"], variables["batch_stats"])
    assert value == pytest.approx(task.evaluate(variables)["nll"], rel=1e-5)


def test_known_answers_on_the_synthetic_problems():
    ones = lambda variables, inputs: jnp.ones((len(inputs), 1))
    assert sequence_evaluator(sequence_data("add-20"), ones)({})["mse"] == pytest.approx(1 / 6, abs=0.03)
    data = sequence_data("copy-5", test_rows=100)

    def memoryless(variables, inputs):
        blank = jnp.broadcast_to(jnp.where(jnp.arange(9) == 8, 50.0, 0.0), (*inputs.shape, 9))
        symbols = jnp.where(jnp.arange(9) == 8, -50.0, 0.0)
        return blank.at[:, -10:].set(symbols)

    scores = sequence_evaluator(data, memoryless)({})
    assert scores["nll"] == pytest.approx(10 * np.log(8) / 25, rel=1e-5)
    assert scores["accuracy"] == pytest.approx((15 + 10 / 8) / 25, abs=0.02)


def test_fresh_batches_train_a_model():
    class First(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(10)(x[:, :8].reshape(len(x), -1))

    task = sequence_task("noisy-digits-12", First())
    stream = batches(task.train, 128, seed=0, transform=task.details["draw"])

    @jax.jit
    def step(params, batch):
        gradient = jax.grad(lambda p: task.loss({"params": p}, batch)[0])(params)
        return jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)

    params = jax.jit(task.init)(KEY)["params"]
    for _ in range(40):
        params = step(params, next(stream))
    assert task.evaluate({"params": params})["accuracy"] > 0.85
    assert (task.name, task.example_inputs.shape) == ("noisy-digits-12/First", (1, 12, 8))


# Bad input


def changed(kind, column, value, split="test"):
    data = problem(kind)
    columns = {name: array.copy() for name, array in getattr(data, split).items()}
    columns[column][(3,) + (0,) * (columns[column].ndim - 1)] = value
    return data._replace(**{split: columns})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed("class", "inputs", np.nan), "split 'test': inputs hold NaN or infinity in 1 of 10 rows"),
        (changed("value", "targets", np.inf), "targets hold NaN or infinity in 1 of 10 rows"),
        (changed("class", "targets", 3, "train"), r"split 'train': targets .* must be integers in \[0, 2\]"),
        (changed("class", "targets", -1), r"in \[0, 2\]"),
        (changed("tokens", "targets", -2), r"in \[-1, 2\]"),
        (changed("tokens", "inputs", 6), r"inputs .* in \[0, 5\]"),
        (problem("class")._replace(length=9), r"inputs have shape \(10, 5, 2\); expected \('rows', 9, 2\)"),
        (problem("class")._replace(features=3), r"expected \('rows', 5, 3\)"),
        (problem("class")._replace(kind="labels"), "data.kind='labels' is not one of"),
    ],
)
def test_bad_data_are_refused_by_name(data, message):
    with pytest.raises(ValueError, match=message):
        sequence_evaluator(data, lambda variables, inputs: inputs)


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        ("class", Pooled(4), r"to shape \(1, 4\); expected \(1, 3\)"),
        ("value", Pooled(3), r"expected \(1, 1\)"),
        ("tokens", Tagged(6, 2), r"expected \(1, 5, 3\)"),
    ],
)
def test_a_model_of_other_outputs_is_refused(kind, model, message):
    with pytest.raises(ValueError, match=message):
        sequence_task(problem(kind), model)


@pytest.mark.parametrize(
    ("kind", "outputs", "targets"),
    [("class", (4, 3), (5,)), ("value", (4,), (4,)), ("value", (4, 2), (4,)), ("tokens", (4, 3), (4,))],
)
def test_shapes_that_do_not_belong_together_are_refused(kind, outputs, targets):
    with pytest.raises(ValueError, match=f"kind '{kind}' must be"):
        loss_of(kind, np.zeros(outputs, np.float32), np.zeros(targets, np.int32))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="kind='label' is not one of"):
        sequence_loss("label", jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="eval_batch=0"):
        sequence_task(problem("class"), Pooled(3), eval_batch=0)
    with pytest.raises(ValueError, match="Did you mean 'add-T'"):
        sequence_task("ad-T", Pooled(1))


# Sequences of unequal length


LENGTHS = {"train": np.array([5, 2, 4, 1, 3, 5, 2, 4, 1, 3]), "test": np.array([1, 5, 2, 4, 3, 3, 2, 1, 5, 4])}


def uneven(kind, fill=0.0, **changes):
    """``problem`` with sequences of several lengths, filled up with ``fill``, and targets of every step asked there."""
    data = problem(kind)
    splits = {}
    for split, lengths in LENGTHS.items():
        columns = dict(getattr(data, split))
        real = np.arange(5) < lengths[:, None]
        ids = columns["inputs"].ndim == 2
        columns["inputs"] = np.where(real if ids else real[..., None], columns["inputs"], int(fill) if ids else fill)
        columns["inputs"] = columns["inputs"].astype(getattr(data, split)["inputs"].dtype)
        splits[split] = columns | {"lengths": lengths.astype(np.int32)}
    return data._replace(**splits | changes)


def network_of(data):
    options = {"vocabulary": data.vocabulary, "embedding": 4} if data.vocabulary else {}
    read = "all" if data.kind == "tokens" else "last"
    return SequenceNetwork(Recurrent(GRUCell(4)), data.outputs, read=read, **options)


@pytest.mark.parametrize("kind", ["class", "value", "tokens"])
def test_a_task_tells_its_network_where_sequences_end(kind):
    data = uneven(kind)
    task = sequence_task(data, network_of(data), eval_batch=4)  # 10 rows: the last batch is filled up
    variables = jax.jit(task.init)(jax.random.key(0))
    assert sorted(task.example_inputs) == ["inputs", "lengths"]
    alone, targets = [], []
    apply = jax.jit(task.module.apply)
    for row, target, length in zip(*(data.test[name] for name in ("inputs", "targets", "lengths")), strict=True):
        alone.append(np.asarray(apply(variables, row[None, :length]))[0])
        targets.append(target[:length] if kind == "tokens" else target)
    if kind == "tokens":
        alone, targets = np.concatenate(alone), np.concatenate(targets)
    want, _ = reference(kind if kind != "tokens" else "class", np.stack(alone), np.stack(targets))
    scores = jax.device_get(task.evaluate(variables))
    np.testing.assert_allclose(scores["mse" if kind == "value" else "nll"], want, rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda variables, batch: task.loss(variables, batch)[0]))
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    jax.tree.map(same, gradient(variables, data.train), gradient(variables, uneven(kind, fill=2.0).train))


def test_lengths_are_asked_for_and_checked():
    data = uneven("class")
    with pytest.raises(ValueError, match=r"model=\w+ takes no seq_lengths, but .* differ in length.*pad='start'"):
        sequence_task(data, model_of(data))
    assert sequence_task(data._replace(pad="start"), model_of(data)).example_inputs.shape[0] == 1
    for lengths, message in (
        (np.full(10, 6), r"split 'test', column 'lengths': seq_lengths\[0\]=6"),
        (None, "one split"),
    ):
        test = {**data.test, "lengths": lengths} if lengths is not None else problem("class").test
        with pytest.raises(ValueError, match=message):
            sequence_task(data._replace(test=test), network_of(data))


def test_training_through_time_stops_at_the_ends():
    found = []
    for fill in (0.0, 3.0):
        task = cell_task(uneven("class", fill), GRUCell(4))
        make = functools.partial(fptt_step, part_length=2)
        program = through_time(task, make, optax.sgd(0.1), steps=2, batch_size=4)
        found.append(fit(program, seed=0).state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), *found)
    with pytest.raises(ValueError, match="streams=True, but the sequences differ in length"):
        through_time(task, make, optax.sgd(0.1), steps=2, batch_size=4, streams=True)
