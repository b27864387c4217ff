"""Thresholds, the accuracy of a hybrid at a coverage, and its cost."""

from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from effjax.core.errors import NoEffectWarning
from effjax.hardness.hybrid_losses import query_oracle
from effjax.hardness.query_rules import (
    HybridCost,
    coverage_interval,
    hybrid_curve,
    hybrid_score,
    keep_least,
    query_threshold,
    track_coverage,
    useful_buckets,
)

ROWS = np.load(Path(__file__).parents[1] / "reference" / "hybrid_models" / "evaluation.npz")
BASE, EXPERT = ROWS["s_pred"] == ROWS["targets"], ROWS["t_pred"] == ROWS["targets"]
EVERYBODY = np.ones(len(BASE), bool)
COST = HybridCost(base=float(ROWS["base_flops"]), expert=float(ROWS["global_flops"]))


score_of = jax.jit(hybrid_score)
oracle_of = jax.jit(query_oracle, static_argnums=3)
PREDICTED = tuple(ROWS[key] for key in ("s_pred", "t_pred", "targets"))


def row(keep):
    """A line of the released tables."""
    score = score_of(keep, BASE, EXPERT, EVERYBODY)
    return [*(100 * float(value) for value in score), COST.average(float(score.coverage))]


@pytest.mark.parametrize(("kind", "name"), [("gain", "margin"), ("wrong", "margin_upper"), ("disagree", "agreement")])
def test_parity_of_the_oracles(kind, name):
    asks = oracle_of(*PREDICTED, kind)
    np.testing.assert_allclose(row(~np.asarray(asks)), ROWS[f"oracle_{name}"], rtol=2e-6)


@pytest.mark.parametrize("rule", ["entropy", "gate"])
def test_parity_of_the_released_tables(rule):
    need = ROWS["s_entropy"] if rule == "entropy" else -ROWS["gate"]
    for (threshold, _), wanted in zip(ROWS[f"{rule}_thr_cov"], ROWS[f"{rule}_rows"], strict=True):
        keep = need <= np.float32(threshold if rule == "entropy" else -threshold)
        np.testing.assert_allclose(row(keep), wanted, rtol=2e-6)


def test_parity_of_exact_quantiles():
    wanted = ROWS["own_exact_quantile_rows"]
    found = jax.device_get(hybrid_curve(-ROWS["gate"], BASE, EXPERT, ROWS["coverages"].tolist()))
    np.testing.assert_allclose(100 * found.coverage, wanted[:, 0], rtol=1e-6)
    np.testing.assert_allclose(100 * found.accuracy, wanted[:, 1], rtol=1e-6)


def test_the_oracle_is_the_best_there_is():
    asks = np.asarray(oracle_of(*PREDICTED))
    assert not (asks & BASE).any()
    assert not (asks & ~EXPERT).any()
    score = score_of(~asks, BASE, EXPERT, EVERYBODY)
    assert float(score.accuracy) == pytest.approx((BASE | EXPERT).mean(), rel=1e-6)
    assert float(score.coverage) == pytest.approx(1 - (~BASE & EXPERT).mean(), rel=1e-6)


def test_all_kept_is_the_base_and_none_is_the_expert():
    found = jax.device_get(hybrid_curve(-ROWS["gate"], BASE, EXPERT, (1.0, 0.0)))
    np.testing.assert_allclose(found.accuracy, [BASE.mean(), EXPERT.mean()], rtol=1e-6)
    assert np.isnan(found.expert_accuracy[0])
    assert np.isnan(found.base_accuracy[1])
    cost = HybridCost(48.0, 215.0, router=0.3, transfer=2.0)
    assert cost.average(1.0) == 48.3
    assert cost.average(0.0) == pytest.approx(48.3 + 217.0)


@settings(max_examples=30, deadline=None)
@given(
    # Of few lengths, so that few programs serve all.
    st.sampled_from((1, 6, 40)).flatmap(lambda size: st.lists(st.integers(0, 7), min_size=size, max_size=size))
)
def test_accuracy_is_the_sum_of_its_parts(codes):
    keep, base, expert = (np.array([bool(code >> bit & 1) for code in codes]) for bit in range(3))
    score = score_of(keep, base, expert, np.ones(len(codes), bool))
    c = float(score.coverage)
    parts = c * np.nan_to_num(float(score.base_accuracy)) + (1 - c) * np.nan_to_num(float(score.expert_accuracy))
    assert float(score.accuracy) == pytest.approx(parts, abs=1e-6)
    assert float(score.accuracy) == pytest.approx(np.where(keep, base, expert).mean(), abs=1e-6)


def test_rows_without_a_label_count_nowhere():
    known = np.arange(len(BASE)) % 3 > 0
    need = ROWS["s_entropy"]
    found = hybrid_curve(need, BASE, EXPERT, (0.7,), known=known)
    alone = hybrid_curve(need[known], BASE[known], EXPERT[known], (0.7,))
    assert found.accuracy.tolist() == alone.accuracy.tolist()
    assert query_threshold(need, 0.7, known=known) == query_threshold(need[known], 0.7)


@settings(max_examples=60, deadline=None)
@given(st.integers(10, 200), st.floats(0.1, 0.9), st.integers(0, 1000))
def test_threshold_is_the_least_that_keeps_enough(rows, coverage, seed):
    need = np.random.default_rng(seed).normal(size=rows)
    found = query_threshold(need, coverage)
    assert (need <= found.value).mean() >= coverage - 1e-9
    assert (need < found.value).mean() < coverage
    assert found.coverage == (need <= found.value).mean()


def test_the_kept_are_exactly_as_many_and_the_least():
    need, kept_of = np.array([0.4, 0.1, np.nan, 0.3, 0.1, 0.2], np.float32), jax.jit(keep_least, static_argnums=1)
    for coverage, kept in ((0.0, []), (0.1, [1]), (0.3, [1, 4]), (0.5, [1, 4, 5]), (1.0, list(range(6)))):
        assert np.flatnonzero(kept_of(need, coverage)).tolist() == kept


def test_threshold_transfers_to_other_rows():
    """Over many calibration sets the coverage is right on average, and its interval holds it as often as promised."""
    rng, held = np.random.default_rng(0), []
    inside = 0
    for _ in range(400):
        need, other = rng.normal(size=(2, 500))
        kept = int((other <= query_threshold(need, 0.7).value).sum())
        held.append(kept / 500)
        low, high = coverage_interval(rng.binomial(500, 0.7), 500)
        inside += low <= 0.7 <= high
    assert np.mean(held) == pytest.approx(0.7, abs=0.004)
    assert inside / 400 >= 0.94


def test_edges_of_the_interval():
    assert coverage_interval(0, 10)[0] == 0.0
    assert coverage_interval(10, 10)[1] == 1.0
    low, high = coverage_interval(30, 100, confidence=0.9)
    binomial = __import__("scipy.stats", fromlist=["binom"]).binom
    assert binomial.sf(29, 100, low) == pytest.approx(0.05)
    assert binomial.cdf(30, 100, high) == pytest.approx(0.05)


def test_constant_needs_keep_everything_and_say_so():
    with pytest.warns(NoEffectWarning, match=r"100 of 100 rows have the value 0.3, so the threshold keeps 100.0%"):
        found = query_threshold(np.full(100, 0.3), 0.7)
    assert (found.coverage, found.tied) == (1.0, 100)
    assert np.sum(keep_least(np.zeros(10, np.float32), 0.7)) == 7


def test_the_controller_settles_on_the_budget_under_shift():
    def step(threshold, need):
        asks = need > threshold
        return track_coverage(threshold, asks, 0.8, rate=0.2), asks.mean()

    needs = np.random.default_rng(0).normal(size=(400, 64)) + np.where(np.arange(400) < 200, 0.0, 1.5)[:, None]
    run = jax.jit(lambda needs: jax.lax.scan(step, jnp.float32(0.0), needs)[1])
    asked = np.asarray(run(needs.astype(np.float32)))
    assert asked[100:200].mean() == pytest.approx(0.2, abs=0.01)
    assert asked[300:].mean() == pytest.approx(0.2, abs=0.01)
    assert asked[200] > 0.5
    assert float(track_coverage(1.0, np.zeros(0, bool), 0.8)) == 1.0


def test_cost_of_the_papers_charts():
    same = HybridCost(48.0, 215.0)
    read = [69, 91, 112, 134, 155, 177]
    np.testing.assert_allclose(same.average(np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])), read, atol=0.6)
    cloud = HybridCost(200.0, 2000.0)
    np.testing.assert_allclose(cloud.average(np.array([0.9, 0.3])), [400, 1600])
    assert cloud.coverage(1000.0) == pytest.approx(0.6)
    assert cloud.coverage(1e6) == 0.0
    assert cloud.break_even() == pytest.approx(0.1)
    assert cloud.average(cloud.break_even()) == pytest.approx(2000.0)


def test_flat_buckets_are_dropped():
    seconds = {8: 1.0, 16: 1.01, 24: 1.02, 32: 1.5, 48: 1.55, 64: 3.0}
    assert useful_buckets(seconds) == (24, 48, 64)
    assert useful_buckets(seconds, saving=0.0) == (8, 16, 24, 32, 48, 64)
    assert useful_buckets({256: 2.0}) == (256,)


BAD = [
    (lambda: query_threshold(np.ones(9), 0.0), r"coverage=0.0 must be a number in \(0, 1\)"),
    (lambda: query_threshold(np.ones(9), 1.2), "coverage=1.2"),
    (lambda: query_threshold(np.ones((9, 1)), 0.5), r"need has shape \(9, 1\)"),
    (lambda: query_threshold(np.ones(9), 0.95), "9 rows, too few for coverage=0.95. Give at least 20"),
    (lambda: query_threshold(np.ones(0), 0.5), "0 rows, too few"),
    (lambda: query_threshold(np.array([1.0, np.nan]), 0.5), "need is NaN in 1 of 2 rows"),
    (lambda: query_threshold(np.ones(9), 0.5, known=np.ones((9, 1), bool)), r"known has shape \(9, 1\)"),
    (lambda: hybrid_score(EVERYBODY, BASE[:, None], EXPERT, EVERYBODY), r"base_correct has shape \(2000, 1\)"),
    (lambda: keep_least(np.ones(3, np.float32), 2.0), "coverage=2.0"),
    (lambda: coverage_interval(5, 4), "kept=5"),
    (lambda: track_coverage(0.0, np.ones(3, bool), 0.5, rate=0.0), "rate=0.0"),
    (lambda: HybridCost(1.0, 2.0).average(1.5), r"coverage=1.5 must lie in \[0, 1\]"),
    (lambda: HybridCost(1.0, 2.0, router=1.0).coverage(1.5), "budget=1.5 is below the 2 that base and router"),
    (lambda: useful_buckets({}), "seconds={} is empty"),
]


@pytest.mark.parametrize(("call", "text"), BAD)
def test_bad_input_is_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()
