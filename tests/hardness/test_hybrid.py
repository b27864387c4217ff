"""Hybrid models: parity of router and losses, the stages of training, and what they leave alone."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax
from effjax.core.errors import NoEffectWarning
from effjax.hardness.cascades import confidence_need
from effjax.hardness.dispatch import dispatch_masked
from effjax.hardness.host_dispatch import HostDispatch
from effjax.hardness.hybrid import (
    hybrid,
    hybrid_batch,
    hybrid_data,
    hybrid_examples,
    hybrid_init,
    hybrid_next,
    hybrid_stages,
    hybrid_step,
)
from effjax.hardness.hybrid_config import HybridBatch, HybridConfig, HybridExamples, HybridNetworks
from effjax.hardness.hybrid_losses import (
    coverage_penalty,
    hybrid_weights,
    query_oracle,
    router_loss,
    weighted_cross_entropy,
)
from effjax.hardness.query_rules import hybrid_curve
from effjax.hardness.router import Router, router_features, router_need

REFERENCE = Path(__file__).parents[1] / "reference" / "hybrid_models"
LOSS = np.load(REFERENCE / "loss.npz")
ROUTER = np.load(REFERENCE / "router.npz")
KEY = jax.random.key(0)

# One program for each set of shapes and choices.
oracle_of = jax.jit(query_oracle, static_argnums=3)
router_loss_of = jax.jit(router_loss)
entropy_of = jax.jit(weighted_cross_entropy)
penalty_of = jax.jit(coverage_penalty, static_argnames=("coverage", "kind"))
need_of = jax.jit(lambda router, variables, *seen: router_need(router)(variables, *seen), static_argnums=0)


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


# Parity


def release(name, layers):
    """The released module's arrays in the layout of ours; their last layer says "keep", ours "ask"."""
    got = lambda where, what: ROUTER[f"hybrid{name}__{where}.{what}"]
    found = {}
    for part, (source, count) in layers.items():
        tree = found.setdefault(part, {})
        for place in range(count):
            dense, norm = f"{source}.{3 * place}", f"{source}.{3 * place + 1}"
            tree[f"dense{place}"] = {"kernel": got(dense, "weight").T, "bias": got(dense, "bias")}
            tree[f"norm{place}"] = {"scale": got(norm, "weight"), "bias": got(norm, "bias")}
    found["head"] = {"kernel": -got("routing.9", "weight").T, "bias": -got("routing.9", "bias")}
    return found


LAYERS = {"t": ("transform_ft", 2), "h": ("routing", 3)}


def statistics(name):
    """Running means and variances."""
    got = lambda where, what: ROUTER[f"hybrid{name}__{where}.running_{what}"]
    return {
        part: {
            f"norm{place}": {what: got(f"{source}.{3 * place + 1}", what) for what in ("mean", "var")}
            for place in range(count)
        }
        for part, (source, count) in LAYERS.items()
    }


def close(found, wanted, **bounds):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **({"rtol": 1e-9} | bounds)), found, wanted)


def test_parity_of_the_router():
    router = Router(widths=(20, 64, 20), norm="batch")
    with jax.enable_x64(True):
        logits, features = ROUTER["s_logits"], ROUTER["s_features"]
        close(jax.jit(router_features)(logits), ROUTER["hybrid_logit_features"], atol=1e-14)
        params, before = release("", LAYERS), statistics("")
        found = jax.jit(router.apply)({"params": params, "batch_stats": before}, logits, features)
        close(-np.asarray(found), ROUTER["hybrid_eval_out"][:, 0])

        def run(params, logits, features):
            found, moved = router.apply(
                {"params": params, "batch_stats": before}, logits, features, train=True, mutable=["batch_stats"]
            )
            return -found @ ROUTER["hybrid_cotangent"][:, 0], (found, moved)

        grads, (found, moved) = jax.jit(jax.grad(run, (0, 1, 2), has_aux=True))(params, logits, features)
        close(-np.asarray(found), ROUTER["hybrid_train_out"][:, 0])
        wanted = release("_grad", LAYERS)  # minus twice is plus: of the last layer both its place and its sign turn
        close(grads[0], wanted, atol=1e-12)
        close(grads[1], ROUTER["hybrid_grad_input0"], atol=1e-12)
        close(grads[2], ROUTER["hybrid_grad_input1"], atol=1e-12)
        # PyTorch keeps the unbiased variance.
        rows = len(logits)
        unbiased = lambda old, new: old * 0.9 + (new - 0.9 * old) * rows / (rows - 1)
        own = {part: dict(layers) for part, layers in jax.device_get(moved["batch_stats"]).items()}
        for part, layers in own.items():
            for name, held in layers.items():
                own[part][name] = {"mean": held["mean"], "var": unbiased(before[part][name]["var"], held["var"])}
        close(own, statistics("_after"))


def test_parity_of_the_losses():
    with jax.enable_x64(True):
        labels = LOSS["targets"]
        asks = np.asarray(oracle_of(LOSS["s_logits"].argmax(-1), LOSS["t_logits"].argmax(-1), labels))
        np.testing.assert_array_equal(~asks, LOSS["oracle"].astype(bool))
        need = -LOSS["hybrid_gate_logit"][:, 0]
        value, grad = jax.jit(jax.value_and_grad(router_loss))(need, asks)
        np.testing.assert_allclose(value, LOSS["loss_router_clf"], rtol=2e-6)
        np.testing.assert_allclose(-np.asarray(grad), LOSS["grad_router_clf_hybrid_gate"][:, 0], rtol=2e-6)
        penalty = functools.partial(coverage_penalty, coverage=float(LOSS["cov"]), kind="released")
        value, grad = jax.jit(jax.value_and_grad(penalty))(need)
        np.testing.assert_allclose(value, LOSS["loss_router_cov"], rtol=1e-9)
        np.testing.assert_allclose(-np.asarray(grad), LOSS["grad_router_cov_hybrid_gate"][:, 0], rtol=1e-9)

        weights = np.asarray(hybrid_weights(asks)[0]).astype(float)
        smoothed = functools.partial(weighted_cross_entropy, smoothing=float(LOSS["smoothing"]))
        run = jax.jit(jax.value_and_grad(smoothed))
        value, grad = run(LOSS["s_logits"], labels, weights)
        np.testing.assert_allclose(value, LOSS["own_ce_per_example"], rtol=1e-9)
        np.testing.assert_allclose(grad, LOSS["own_grad_ce_per_example"], rtol=1e-9, atol=1e-15)
        # What the released code computes: all weights are their mean.
        lost = np.full(len(labels), weights.mean())
        np.testing.assert_allclose(run(LOSS["s_logits"], labels, lost)[0], LOSS["loss_ce"], rtol=1e-9)


# Losses


def test_oracles_of_every_case():
    base, expert, labels = np.array([0, 0, 1, 1, 1, 0]), np.array([0, 1, 0, 1, 2, 0]), np.array([0, 0, 0, 0, 0, -1])
    run = lambda kind: np.asarray(oracle_of(base, expert, labels, kind)).astype(int).tolist()
    assert run("gain") == [0, 0, 1, 0, 0, 0]
    assert run("wrong") == [0, 0, 1, 1, 1, 0]
    assert run("disagree") == [0, 1, 1, 0, 1, 0]


def test_weights_sum_to_one_and_the_coverage():
    base, expert = hybrid_weights(np.array([True, False, False, False, True]))
    assert np.mean(np.asarray(base)) == pytest.approx(1.6)
    assert np.mean(np.asarray(expert)) == pytest.approx(1.4)
    slopes = jax.jit(jax.grad(lambda r: hybrid_weights(r)[0].sum()))(np.ones(2, np.float32))
    assert slopes.tolist() == [0.0, 0.0]


def test_rows_without_a_label_count_nowhere():
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    labels, weights = np.array([0, -1, 2, -1]), np.array([1.0, 5.0, 2.0, 5.0], np.float32)
    value = entropy_of(logits, labels, weights)
    logs = log_softmax(logits)
    assert float(value) == pytest.approx(-(logs[0, 0] + 2 * logs[2, 2]) / 2, rel=1e-5)
    moved = logits.copy()
    moved[1] = 9.0
    assert float(entropy_of(moved, labels, weights)) == float(value)
    need, asks = np.array([1.0, np.nan, -1.0], np.float32), np.ones(3, bool)
    assert float(router_loss_of(need, asks, np.array([True, False, True]))) == pytest.approx(
        np.log1p(np.exp([-1.0, 1.0])).mean(), rel=1e-5
    )
    for empty in (
        router_loss_of(np.zeros(0, np.float32), np.zeros(0, bool)),
        router_loss_of(need, asks, np.zeros(3, bool)),
        entropy_of(logits, np.full(4, -1), weights),
    ):
        assert float(empty) == 0


@pytest.mark.parametrize(
    ("form", "wanted"), [("linear", 0.7 - 0.25), ("squared", (0.7 - 0.25) ** 2), ("released", 0.0)]
)
def test_penalties(form, wanted):
    need = np.full(6, np.log(3.0), np.float32)  # kept with probability 1/4
    assert float(penalty_of(need, coverage=0.7, kind=form)) == pytest.approx(wanted, abs=1e-6)
    enough = float(penalty_of(-need, coverage=0.7, kind=form))
    assert enough == pytest.approx(np.log(3) - 0.7 if form == "released" else 0.0, abs=1e-6)


def test_scalars_are_float32_whatever_the_logits():
    half = jax.ShapeDtypeStruct((8, 3), jnp.bfloat16)
    kind = lambda run, *others: jax.eval_shape(run, half, *others).dtype
    assert kind(lambda half: router_loss(half[:, 0], half[:, 1] > 0)) == jnp.float32
    assert kind(lambda half: coverage_penalty(half[:, 0], 0.5)) == jnp.float32
    assert kind(lambda half: weighted_cross_entropy(half, jnp.zeros(8, int), jnp.ones(8))) == jnp.float32
    assert kind(router_features) == jnp.float32
    assert kind(lambda half: Router((4,), (4,)).init_with_output(KEY, half, half)[0]) == jnp.float32


# The method


def features_of(x):
    return jnp.stack([x[:, 0], jnp.abs(x[:, 1]), x[:, 0] * x[:, 1], x[:, 1]], 1)


def base_apply(params, x, *, key=None):
    return features_of(x) @ params["kernel"], features_of(x)


def expert_apply(params, x, *, key=None):
    """Right where the second input is positive, and wrong on purpose elsewhere."""
    right = jax.nn.one_hot(_label(x), 2) * params["scale"]
    return jnp.where(x[:, 1:] > 0, right, -right)


def _label(x):
    return (x[:, 0] * x[:, 1] > 0).astype(np.int32)


NETWORKS = HybridNetworks(base_apply, expert_apply, Router((16,), (16,)))
PARAMS = (
    {"kernel": np.array([[-1.0, 1.0], [0, 0], [0, 0], [0, 0]], np.float32)},
    {"scale": np.full((), 3.0, np.float32)},
)
X, OTHERS = (
    np.random.default_rng(seed).normal(size=(rows, 2)).astype(np.float32) for seed, rows in ((1, 1200), (2, 896))
)
Y = _label(X)
HELD, CALIBRATION = (X[:900], Y[:900]), (X[900:], Y[900:])
CONFIG = HybridConfig(coverage=0.75, epochs=30, batch_size=128)


@pytest.fixture(scope="module")
def trained():
    return hybrid(KEY, NETWORKS, PARAMS, *HELD, calibration=CALIBRATION, config=CONFIG)


def test_the_router_asks_where_the_base_is_wrong_and_the_expert_right(trained):
    """The expert of the first pair errs where the base does, so that asking gains nothing; not that of the second."""
    flipped = HybridNetworks(base_apply, lambda params, x, *, key=None: expert_apply(params, -x), Router((16,), (16,)))
    for networks, found in (
        (NETWORKS, trained),
        (flipped, hybrid(KEY, flipped, PARAMS, *HELD, calibration=CALIBRATION, config=CONFIG)),
    ):
        held = hybrid_examples(found.state, OTHERS, _label(OTHERS), networks, batch_size=128)
        need = need_of(networks.router, found.state.params.router, held.logits, held.features)
        curve = lambda need, held=held: hybrid_curve(need, held.base_correct, held.expert_correct, (0.75, 0.5))
        learned, margin, best = (
            np.asarray(curve(one).accuracy)
            for one in (need, jax.jit(confidence_need)(held.logits), held.oracle.astype(np.float32))
        )
        assert (learned >= margin - 0.005).all()
        assert learned[1] >= best[1] - 0.05
        if networks is flipped:
            assert learned[1] >= margin[1] + 0.15


def test_threshold_keeps_the_share_and_the_request_is_its_own(trained):
    assert trained.threshold.rows == 300
    assert trained.threshold.coverage == pytest.approx(0.75, abs=1 / 300)
    assert (~trained.examples.request).mean() == trained.threshold.coverage
    assert trained.state.threshold == np.float32(trained.threshold.value)


def test_training_is_reproduced_by_its_parts_bit_for_bit(trained):
    again = hybrid(KEY, NETWORKS, PARAMS, *HELD, calibration=CALIBRATION, config=CONFIG)
    jax.tree.map(np.testing.assert_array_equal, again, trained)


def test_known_answers_of_the_expert_stand_in_for_it(trained):
    alone = NETWORKS._replace(expert=None)
    right = np.asarray(jax.jit(expert_apply)(PARAMS[1], X)).argmax(-1) == Y
    state = hybrid_init(KEY, alone, (PARAMS[0], None), X, config=CONFIG)
    found = hybrid_examples(state, X, Y, alone, expert_correct=right, batch_size=128)
    whole = hybrid_examples(trained.state, X, Y, NETWORKS, batch_size=128)
    base = np.argmax(X[:, :1] * [-1.0, 1.0], 1)
    np.testing.assert_array_equal(found.oracle, (base != Y) & right)
    np.testing.assert_array_equal(found.oracle, whole.oracle)
    stages, params = hybrid_stages(alone, state)
    assert len(stages) == len(params) == 1


def test_a_pass_takes_every_row_once_in_an_order_of_its_own():
    config = HybridConfig(batch_size=25)
    state, _, _ = state_and_batches(config)
    data = HybridBatch(np.arange(60), np.arange(60, dtype=np.int32), np.zeros(60, bool))
    draw = jax.jit(functools.partial(hybrid_batch, config=config))
    passes = []
    for epoch in range(2):
        batches = [draw(state._replace(count=np.int32(3 * epoch + place)), data) for place in range(3)]
        labels = [np.asarray(batch.labels) for batch in batches]
        seen = np.concatenate([one[one >= 0] for one in labels])
        assert sorted(seen.tolist()) == list(range(60))
        assert [int((one >= 0).sum()) for one in labels] == [25, 25, 10]
        passes.append(seen.tolist())
    assert passes[0] != passes[1]


def test_what_is_served_is_what_was_fitted(trained):
    stages, params = hybrid_stages(NETWORKS, trained.state)
    serve = HostDispatch(stages, buckets=(8, 32))
    x = X[:64]
    found = serve(params, x)
    masked = jax.jit(lambda params, x: dispatch_masked(stages[1], params[1], x, *stages[0](params[0], x)))(params, x)
    np.testing.assert_allclose(found.outputs, masked.outputs, rtol=1e-6)
    held = hybrid_examples(trained.state, x, Y[:64], NETWORKS)
    np.testing.assert_array_equal(found.served, held.request)
    assert 0 < found.served.sum() < 40


def state_and_batches(config, networks=NETWORKS):
    state = hybrid_init(KEY, networks, PARAMS, X, config=config)
    examples = hybrid_examples(state, X[:64], Y[:64], networks)
    return state, examples, HybridBatch(X[:64], Y[:64], np.arange(64) % 2 == 0)


ALTERNATING = HybridConfig(rounds=1, base_tx=optax.sgd(0.5), expert_tx=optax.sgd(0.5))
step = jax.jit(hybrid_step, static_argnames=("networks", "config", "stage"))


@pytest.mark.parametrize("stage", ["router", "base", "expert"])
def test_a_stage_trains_its_own_network_and_leaves_the_others_bits(stage):
    state, examples, models = state_and_batches(ALTERNATING)
    batch = examples if stage == "router" else models
    after, metrics = step(state, batch, NETWORKS, config=ALTERNATING, stage=stage)
    for name in ("router", "base", "expert"):
        same = jax.tree.map(np.array_equal, getattr(state.params, name), getattr(after.params, name))
        assert all(jax.tree.leaves(same)) == (name != stage)
    assert np.isfinite(metrics["loss"])
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(after) == shapes(state)


def test_base_and_expert_learn_by_the_weights_of_their_rows():
    state, _, batch = state_and_batches(ALTERNATING)
    after, _ = step(state, batch, NETWORKS, config=ALTERNATING, stage="base")
    weights = np.where(batch.request, 1.0, 2.0)

    def loss(params):
        logs = jax.nn.log_softmax(base_apply(params, X[:64])[0])
        return -jnp.mean(weights * logs[jnp.arange(64), Y[:64]])

    wanted = PARAMS[0]["kernel"] - 0.5 * np.asarray(jax.jit(jax.grad(loss))(PARAMS[0])["kernel"])
    np.testing.assert_allclose(after.params.base["kernel"], wanted, rtol=1e-4, atol=1e-6)
    after, _ = step(state, batch, NETWORKS, config=ALTERNATING, stage="expert")
    expert = lambda p: (
        -jnp.mean(
            np.where(batch.request, 2.0, 1.0) * jax.nn.log_softmax(expert_apply(p, X[:64]))[jnp.arange(64), Y[:64]]
        )
    )
    wanted = 3.0 - 0.5 * float(jax.jit(jax.grad(expert))(PARAMS[1])["scale"])
    assert float(after.params.expert["scale"]) == pytest.approx(wanted, rel=1e-4)


def test_alternation_runs_every_stage_and_helps_the_base():
    config = HybridConfig(
        coverage=0.75, epochs=3, rounds=2, model_epochs=3, base_tx=optax.sgd(0.5), expert_tx=optax.sgd(0.1)
    )
    assert config.stages == ("router", "base", "expert", "router", "base", "expert", "router")
    held, train = (X[:300], Y[:300]), (X[300:900], Y[300:900])
    found = hybrid(KEY, NETWORKS, PARAMS, *held, calibration=CALIBRATION, config=config, train=train)
    answers = jax.jit(lambda params: base_apply(params, X[:300])[0].argmax(-1))
    accuracy = lambda params: (np.asarray(answers(params)) == Y[:300]).mean()
    assert accuracy(found.state.params.base) > accuracy(PARAMS[0]) + 0.2
    assert float(found.state.params.expert["scale"]) != 3.0
    assert [config.steps(stage, rows) for stage, rows in (("router", 300), ("base", 600), ("expert", 20))] == [6, 9, 3]
    kept = config.__class__(coverage=0.75, epochs=1, rounds=1)
    assert kept.stages == ("router", "base", "router")


def test_dual_variable_holds_the_router_to_the_coverage():
    config = HybridConfig(coverage=0.95, constraint="dual", dual_rate=0.5, router_tx=optax.adam(1e-2))
    free = HybridConfig(coverage=0.95, router_tx=optax.adam(1e-2))
    keep = {}
    for one in (config, free):
        state, examples, _ = state_and_batches(one)
        examples = examples._replace(base_correct=np.arange(64) % 2 == 0, expert_correct=np.ones(64, bool))
        for _ in range(150):
            state, metrics = step(state, examples, NETWORKS, config=one)
        keep[one.constraint], dual = float(metrics["keep"]), float(metrics["dual"])
        assert (dual > 0.1) == (one is config)
    assert keep["none"] < 0.6
    assert keep["dual"] > 0.85


def test_penalty_and_gain_objectives():
    config = HybridConfig(coverage=0.9, constraint="penalty", strength=50.0, router_tx=optax.adam(1e-2))
    state, examples, _ = state_and_batches(config)
    for _ in range(60):
        state, metrics = step(state, examples, NETWORKS, config=config)
    assert float(metrics["keep"]) > 0.85
    gain = HybridConfig(coverage=0.75, objective="gain", epochs=30, batch_size=128)
    two = NETWORKS._replace(router=Router((16,), (16,), outputs=2))
    found = hybrid(KEY, two, PARAMS, *HELD, calibration=CALIBRATION, config=gain)
    held = found.examples
    need = np.asarray(need_of(two.router, found.state.params.router, held.logits, held.features))
    assert need.min() >= -1
    assert need.max() <= 1
    # By a price: ask where the expert is more probably right by more than it.
    worth = need > 0.2
    assert (held.expert_correct & ~held.base_correct)[worth].sum() >= (held.base_correct & ~held.expert_correct)[
        worth
    ].sum()


def test_batch_norm_statistics_move_and_are_kept():
    networks = NETWORKS._replace(router=Router((8,), (8,), norm="batch"))
    state, examples, _ = state_and_batches(CONFIG, networks)
    after, _ = step(state, examples, networks, config=CONFIG)
    before, now = state.params.router["batch_stats"], after.params.router["batch_stats"]
    assert not np.array_equal(before["t"]["norm0"]["mean"], now["t"]["norm0"]["mean"])


def test_rows_without_a_label_teach_nothing():
    state, examples, _ = state_and_batches(CONFIG)
    unknown = np.where(np.arange(64) < 32, Y[:64], -1)
    examples = hybrid_examples(state, X[:64], unknown, NETWORKS)
    assert examples.known.sum() == 32
    assert not examples.base_correct[32:].any()
    half = jax.tree.map(lambda leaf: leaf[:32], examples)
    one, _ = step(state, examples, NETWORKS, config=CONFIG)
    two, _ = step(state, half, NETWORKS, config=CONFIG)
    close(one.params.router, two.params.router, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_examples_of_few_rows(rows):
    state, _, _ = state_and_batches(CONFIG)
    found = hybrid_examples(state, X[:rows], Y[:rows], NETWORKS, batch_size=3)
    assert found.logits.shape == (rows, 2)
    assert found.request.shape == found.oracle.shape == (rows,)
    whole = hybrid_examples(state, X[:rows], Y[:rows], NETWORKS)
    np.testing.assert_array_equal(found.base_correct, whole.base_correct)


def test_nobody_asks_before_a_threshold_is_fitted():
    state, examples, _ = state_and_batches(CONFIG)
    assert not examples.request.any()
    fitted = hybrid_next(state, examples, NETWORKS, config=CONFIG)
    assert np.isfinite(fitted.threshold)
    other = hybrid_next(state, examples, NETWORKS, config=CONFIG, stage="base")
    assert np.isposinf(other.threshold)
    assert not np.array_equal(other.key, state.key)


def test_router_without_features_and_of_few_classes():
    bare = HybridNetworks(lambda params, x, *, key=None: base_apply(params, x)[0], expert_apply, Router((4,)))
    few = X[:100], Y[:100]
    found = hybrid(KEY, bare, PARAMS, *few, calibration=few, config=HybridConfig(coverage=0.5, epochs=1))
    assert found.examples.features is None
    assert "t" not in found.state.params.router["params"]
    assert jax.eval_shape(router_features, jnp.zeros((2, 3))).shape == (2, 10)


ZEROS = np.zeros((3, 3), np.float32)
BAD = [
    (lambda: HybridConfig(coverage=1.0), r"coverage=1.0 must be a number in \(0, 1\)"),
    (lambda: HybridConfig(objective="gains"), "objective='gains' is not one of"),
    (lambda: HybridConfig(objective="gain", constraint="dual"), "constraint='dual' holds a probability"),
    (lambda: HybridConfig(epochs=0), "epochs=0"),
    (lambda: run(config=HybridConfig(rounds=1)), "rounds=1 trains base and expert: give train="),
    (lambda: run(labels=Y[:, None]), r"labels are int32\[1200, 1\]; integers"),
    (lambda: run(calibration=(X[:9], Y[:9]), config=HybridConfig(coverage=0.9, epochs=1)), "Give at least 10"),
    (lambda: run(labels=Y[:3]), r"inputs has shape \(1200, 2\), but there are 3 labels"),
    (lambda: run(labels=Y + 1), "labels go up to 2, but the base model has 2 classes"),
    (lambda: run(networks=NETWORKS._replace(expert=None)), "expert_correct=None, and networks.expert is None"),
    (lambda: run(x=X[:0], labels=Y[:0]), "stage='router' has no rows to learn from"),
    (lambda: hybrid_data(start(), NETWORKS, HELD, None, config=CONFIG, stage="base"), "needs train="),
    (lambda: examples_with(np.ones((64, 1), bool)), r"expert_correct has shape \(64, 1\)"),
    (lambda: run(config=HybridConfig(objective="gain", batch_size=128)), r"needs Router\(outputs=2\)"),
    (lambda: run(networks=NETWORKS._replace(router=Router((4,), (4,), outputs=2))), r"needs Router\(outputs=1\)"),
    (lambda: stage("teacher"), "stage='teacher' is not one of"),
    (lambda: stage("expert"), "expert_tx=None leaves it as it is"),
    (lambda: Router(norm="group").init(KEY, ZEROS[:1]), "norm='group' is not one of"),
    (lambda: router_features(ZEROS[:, 0]), r"logits have shape \(3,\)"),
    (lambda: query_oracle(np.zeros(3, int), np.zeros((3, 1), int), np.zeros(3, int)), r"expert has shape \(3, 1\)"),
    (lambda: query_oracle(*[np.zeros(3, int)] * 3, "margin"), "kind='margin' is not one of"),
    (
        lambda: weighted_cross_entropy(ZEROS[:, :2], np.zeros(3, int), ZEROS[:, :1]),
        r"weights have shape \(3, 1\)",
    ),
    (
        lambda: weighted_cross_entropy(ZEROS[:, :2], np.zeros((3, 1), int), ZEROS[:, 0]),
        r"labels have shape \(3, 1\)",
    ),
    (lambda: coverage_penalty(ZEROS[:, 0], 1.0), "coverage=1.0"),
]


def run(*, networks=NETWORKS, x=X, labels=Y, calibration=CALIBRATION, config=CONFIG, train=None):
    return hybrid(KEY, networks, PARAMS, x, labels, calibration=calibration, config=config, train=train)


def start():
    return state_and_batches(CONFIG)[0]


def examples_with(right):
    return hybrid_examples(start(), X[:64], Y[:64], NETWORKS, expert_correct=right)


def stage(name):
    state, _, batch = state_and_batches(CONFIG)
    return hybrid_step(state, batch, NETWORKS, config=CONFIG, stage=name)


@pytest.mark.parametrize(("call", "text"), BAD)
def test_bad_input_is_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_batches_of_the_wrong_kind_are_named():
    state, examples, batch = state_and_batches(CONFIG)
    with pytest.raises(TypeError, match="batch is a HybridBatch, but stage='router' learns from HybridExamples"):
        hybrid_step(state, batch, NETWORKS, config=CONFIG)
    with pytest.raises(TypeError, match="batch is a HybridExamples, but stage='base' learns from a HybridBatch"):
        hybrid_step(state, examples, NETWORKS, config=CONFIG, stage="base")


def test_a_base_that_gives_nan_is_named_and_constant_needs_are_told():
    nan = NETWORKS._replace(base=lambda params, x, *, key=None: (jnp.nan * base_apply(params, x)[0], features_of(x)))
    with pytest.raises(ValueError, match="need is NaN in 300 of 300 rows"):
        run(networks=nan, config=HybridConfig(epochs=1))
    same = NETWORKS._replace(base=lambda params, x, *, key=None: 0 * base_apply(params, x)[0])
    with pytest.warns(NoEffectWarning, match=r"need ties: .* so the threshold keeps 100.0%"):
        run(networks=same, config=HybridConfig(epochs=1))


def test_it_is_offered_at_the_top():
    assert effjax.hybrid is hybrid
    assert effjax.hardness.HybridExamples is HybridExamples
