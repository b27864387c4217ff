"""The online learner: parity with recorded draws, bounds, log weights, bad input."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.hardness.online import VueConfig, threshold_experts, vue, vue_act, vue_init, vue_regret, vue_update

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "selective_classification"
KEY = jax.random.key(0)


@pytest.mark.parametrize(("scheme", "feedback"), [(1, "coin"), (2, "abstention")])
@pytest.mark.parametrize("x64", [True, False])
def test_parity_with_the_recorded_coins_and_draws(scheme, feedback, x64):
    with np.load(REFERENCE / f"vue_prod_scheme{scheme}.npz") as file, jax.enable_x64(x64):
        ref = dict(file)
        config = VueConfig(tolerance=float(ref["theta"]), feedback=feedback)
        assert ref["p_and_eta"][0] == 0.1

        def step(state, row):
            predictions, label, coin, drawn = row
            acted = vue_act(state, predictions, config, coin=coin, drawn=drawn)
            state = vue_update(state, predictions, acted, label, config)
            return state, (acted.action, jnp.where(state.alive, state.log_weights, -jnp.inf))

        drawn = np.maximum(ref["sampled_expert"], 0)
        rows = (ref["expert_predictions"], ref["labels"], ref["coin"], drawn)
        run = jax.jit(lambda state, rows: jax.lax.scan(step, state, rows))
        state, (actions, log_weights) = run(vue_init(KEY, 20), rows)
        alive = np.asarray(state.alive)
        np.testing.assert_array_equal(actions, ref["actions"])
        np.testing.assert_array_equal(state.mistakes, ref["removal_counts"])
        np.testing.assert_allclose(
            np.exp(np.asarray(log_weights)[::10]),
            ref["weights"],
            rtol=1e-9 if x64 else 2e-5,
            atol=1e-300 if x64 else 1e-9,
        )
        found = vue_regret(ref["expert_predictions"], ref["labels"], np.asarray(actions))
        stats = dict(zip(ref["final_stats_names"], ref["final_stats"], strict=True))
        assert found.mistakes == ref["learner_mistakes"] == stats["mistakes"]
        assert found.abstentions == ref["learner_abstentions"] == stats["abstentions"]
        assert (found.best_mistakes, found.best_abstentions) == (stats["opt_mistakes"], stats["opt_abstentions"])
        assert found.excess_abstentions == stats["abstentions"] - stats["mma_abstentions"]
        assert found.excess_mistakes == stats["mistakes"] - stats["amm_mistakes"]
        assert alive.sum() == stats["n_alive"]


def stream(rounds=500, experts=30, seed=0):
    """One expert that never errs and abstains in a third of the rounds; the others err and abstain at rates."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, rounds)
    errs, abstains = rng.uniform(0.01, 0.3, experts), rng.uniform(0.0, 0.5, experts)
    errs[7], abstains[7] = 0.0, 0.3
    draw = rng.random((rounds, experts))
    wrong = (labels[:, None] + rng.integers(1, 3, (rounds, experts))) % 3
    right = np.repeat(labels[:, None], experts, 1)
    return np.where(draw < abstains, -1, np.where(draw < abstains + errs * (1 - abstains), wrong, right)).astype(
        np.int8
    ), labels


@pytest.fixture(scope="module")
def runs():
    predictions, labels = stream()
    rounds, experts = predictions.shape
    rate = float(np.sqrt(np.log(experts) / rounds))
    keys = jax.random.split(KEY, 200)

    def many(answer):
        config = VueConfig(rate=rate, answer=answer)
        state, acted = jax.jit(jax.vmap(lambda key: vue(key, predictions, labels, config)))(keys)
        return state._replace(key=None), acted

    best = (predictions[:, 7] < 0).sum()
    return predictions, labels, rate, best, jax.device_get({answer: many(answer) for answer in ("sample", "greedy")})


def counts(acted, labels):
    actions = np.asarray(acted.action)
    return ((actions >= 0) & (actions != labels[None, :])).sum(1), (actions < 0).sum(1)


def test_an_expert_that_never_errs_stays_and_the_regret_is_bounded(runs):
    predictions, labels, rate, best, found = runs
    rounds, experts = predictions.shape
    state, acted = found["sample"]
    assert state.alive[:, 7].all()
    assert not state.alive.all()
    mistakes, abstentions = counts(acted, labels)
    excess = mistakes + abstentions - best
    noise = 3 * excess.std() / np.sqrt(len(excess))
    assert excess.mean() <= rate * rounds + np.log(experts) / rate + rate * best + noise
    assert mistakes.mean() < 0.5 * 0.15 * rounds  # an average expert errs in some 15 % of its answers
    np.testing.assert_allclose(acted.coin.mean(), rate, rtol=0.05)


def test_greedy_answers_abstain_no_more_than_the_best_but_for_the_coins(runs):
    predictions, labels, rate, best, found = runs
    state, acted = found["greedy"]
    mistakes, abstentions = counts(acted, labels)
    assert (abstentions - best <= acted.coin.sum(1)).all()  # on every path
    experts = predictions.shape[1]
    assert mistakes.mean() <= (experts - 1) * (1 - rate) / rate
    assert state.alive[:, 7].all()


def test_labels_of_answered_rounds_are_not_read(runs):
    predictions, labels, *_ = runs
    config = VueConfig(rate=0.1)
    state, acted = vue(KEY, predictions, labels, config)
    hidden = np.where(np.asarray(acted.coin), labels, -1)
    again, repeated = vue(KEY, predictions, hidden, config)
    np.testing.assert_array_equal(acted.action, repeated.action)
    np.testing.assert_array_equal(state.mistakes, again.mistakes)
    assert int(again.feedbacks) == np.sum(acted.coin)
    blind, _ = vue(KEY, predictions, np.full_like(labels, -1), config)
    assert int(blind.feedbacks) == 0
    assert np.all(blind.alive)


def test_weights_do_not_underflow():
    """An expert that abstains four thousand times loses a factor of e^126, and is still alive."""
    predictions = np.stack([np.full(4000, -1), np.zeros(4000, int)], 1).astype(np.int8)
    state, _ = vue(KEY, predictions, np.zeros(4000, int))
    rates = np.minimum(1 / np.sqrt(np.arange(1, 4001)), 0.1)
    np.testing.assert_allclose(np.asarray(state.log_weights)[0], np.log(0.5) + np.log1p(-rates).sum(), rtol=1e-4)
    assert np.asarray(state.log_weights)[0] < -100
    assert np.all(state.alive)


def test_the_last_expert_is_not_removed():
    config = VueConfig(rate=1.0, discount=0.5)
    predictions = np.array([[0, -1], [0, 0], [1, -1]])
    state, acted = vue(KEY, predictions, np.array([1, 1, 1]), config)
    assert np.all(acted.coin)
    # The first expert goes in round one; the second would in round two, which is taken back.
    assert state.alive.tolist() == [False, True]
    assert state.mistakes.tolist() == [1, 0]
    assert (int(state.feedbacks), int(state.count)) == (2, 3)
    np.testing.assert_allclose(state.log_weights, np.log([0.5, 0.5 * 0.25]), rtol=1e-5)


def test_one_expert_and_no_rounds():
    state, acted = vue(KEY, np.zeros((5, 1), np.int8), np.ones(5, int))
    assert np.all(state.alive)
    state, acted = vue(KEY, np.zeros((0, 3), np.int8), np.zeros(0, int))
    assert acted.action.shape == (0,)
    assert int(state.count) == 0


def test_a_step_is_compiled_once():
    predictions, labels = stream(20)
    config, state = VueConfig(), vue_init(KEY, 30)
    traced = []

    @jax.jit
    def step(state, predictions, label):
        traced.append(1)
        acted = vue_act(state, predictions, config)
        return vue_update(state, predictions, acted, label, config), acted.action

    actions = []
    for row, label in zip(predictions, labels, strict=True):
        state, action = step(state, row, label)
        actions.append(int(action))
    assert len(traced) == 1
    np.testing.assert_array_equal(vue(KEY, predictions, labels, config)[1].action, actions)


def test_experts_of_thresholds():
    confidence, classes = np.array([[0.9, 0.5, np.nan], [0.6, 0.7, 0.8]], np.float32), np.array([[0, 1, 2], [3, 4, 5]])
    found = threshold_experts(confidence, classes, np.array([0.55, 0.75], np.float32))
    assert found.tolist() == [[0, 0, 3, -1], [-1, -1, 4, -1], [-1, -1, 5, 5]]


P = np.zeros((4, 2), np.int8)
WRONG = {
    "rate": (lambda: VueConfig(rate=0.0), r"rate=0\.0 must be a number in \(0, 1\]"),
    "tolerance": (lambda: VueConfig(tolerance=1.0), r"tolerance=1\.0 must be a number in \[0, 1\)"),
    "feedback": (lambda: VueConfig(feedback="all"), "feedback='all' is not one of 'coin', 'abstention'"),
    "labels": (lambda: vue(KEY, P, np.zeros((4, 1), int)), r"labels have shape \(4, 1\); expected \(4,\)"),
    "predictions": (lambda: vue(KEY, P[0], np.zeros(4, int)), r"predictions have shape \(2,\); expected \[rounds"),
    "experts": (lambda: vue_init(KEY, 0), "experts=0 must be an integer in"),
    "other experts": (lambda: vue_act(vue_init(KEY, 3), P[0], VueConfig()), r"predictions have shape \(2,\)"),
    "regret": (lambda: vue_regret(P, np.array([0, -1, 0, 0]), np.zeros(4, int)), "unknown in 1 rounds"),
    "thresholds": (lambda: threshold_experts(P[0], P[0], P), r"expected \[models, rounds\], \[thresholds\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input(name):
    call, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        call()
