"""The rule that predicts or abstains: fit, predict, promises, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import effjax
from effjax.core.errors import NoEffectWarning

LABELS = np.random.default_rng(0).integers(0, 5, 3000)


def made(seed=0):
    """Logits that are right in about 9 of 10 rows, the more sharply the surer."""
    rng = np.random.default_rng(seed)
    strength = rng.exponential(3.0, (3000, 1))
    return (strength * np.eye(5)[LABELS] + rng.normal(size=(3000, 5)) * 0.7).astype(np.float32)


LOGITS = made()


@pytest.mark.parametrize(
    "options",
    [
        {"selective_risk": 0.05},
        {"selective_risk": 0.05, "method": "sgr"},
        {"joint_error": 0.05},
        {"joint_error": 0.05, "method": "conformal"},
        {"selective_risk": 0.05, "method": "search"},
        {"coverage": 0.6},
    ],
)
def test_held_out_counts_are_what_the_rule_does(options):
    rule = effjax.selective(LOGITS[:2000], LABELS[:2000], **options)
    answers = np.asarray(rule.predict(LOGITS[:2000]))
    taken = answers >= 0
    assert rule.threshold.accepted == taken.sum() > 0
    assert rule.threshold.errors == (taken & (answers != LABELS[:2000])).sum()
    np.testing.assert_array_equal(answers[taken], LOGITS[:2000].argmax(1)[taken])
    found = rule.measure(LOGITS[2000:], LABELS[2000:])
    answers = np.asarray(rule.predict(LOGITS[2000:]))
    wrong = ((answers >= 0) & (answers != LABELS[2000:])).sum()
    np.testing.assert_allclose(found, [(answers >= 0).mean(), wrong / (answers >= 0).sum(), wrong / 1000], rtol=1e-6)
    (measure, target), *_ = options.items()
    realised = getattr(found, measure)
    assert realised > 0.5 if measure == "coverage" else realised < 0.07
    assert str(rule).startswith("log_odds >= ")
    assert rule.threshold.target == target


def test_any_logits_in_five_lines():
    """As scikit-learn's probabilities come: float64, no JAX in sight."""
    probabilities = np.exp(LOGITS.astype(np.float64))
    probabilities /= probabilities.sum(1, keepdims=True)
    rule = effjax.selective(np.log(probabilities[:2000]), LABELS[:2000].astype(np.int64), selective_risk=0.05)
    wanted = effjax.selective(LOGITS[:2000], LABELS[:2000], selective_risk=0.05)
    np.testing.assert_array_equal(rule.predict(np.log(probabilities)), wanted.predict(LOGITS))


@pytest.mark.parametrize("score", ["max_probability", "margin", "negative_entropy", "max_logit", "abstain_logit"])
def test_other_confidences(score):
    rule = effjax.selective(LOGITS[:2000], np.minimum(LABELS[:2000], 3), coverage=0.5, score=score)
    answers = np.asarray(rule.predict(LOGITS[2000:]))
    assert 0.4 < (answers >= 0).mean() < 0.6
    classes = 4 if score == "abstain_logit" else 5
    assert rule.classes == classes
    assert answers.max() == classes - 1


def test_inside_a_program_on_a_mesh_and_row_by_row():
    rule = effjax.selective(LOGITS[:2000], LABELS[:2000], joint_error=0.05)
    wanted = rule.predict(LOGITS)
    mesh = jax.make_mesh((8,), ("data",))
    spread = jax.device_put(LOGITS, NamedSharding(mesh, P("data")))
    np.testing.assert_array_equal(jax.jit(rule.predict)(spread), wanted)
    np.testing.assert_array_equal(jax.vmap(rule.predict)(LOGITS[:50]), np.asarray(wanted)[:50])
    assert rule.predict(LOGITS[0]).shape == ()
    assert rule.predict(LOGITS[:0]).shape == (0,)
    assert jax.eval_shape(rule.predict, LOGITS.astype(jnp.bfloat16)).dtype == jnp.int32
    traced = jax.jit(rule.measure)(spread, LABELS)
    np.testing.assert_allclose(traced, rule.measure(LOGITS, LABELS), rtol=1e-6)


def test_unknown_labels_count_nowhere():
    labels = np.where(np.arange(3000) % 3 == 0, -1, LABELS)
    rule = effjax.selective(LOGITS, labels, selective_risk=0.05)
    known = labels >= 0
    alone = effjax.selective(LOGITS[known], labels[known], selective_risk=0.05)
    assert rule == alone
    assert rule.threshold.examples == 2000
    np.testing.assert_allclose(rule.measure(LOGITS, labels), rule.measure(LOGITS[known], labels[known]), rtol=1e-6)


def test_nan_is_never_accepted():
    rule = effjax.selective(LOGITS, LABELS, coverage=1.0)
    assert rule.predict(np.array([[9.0, np.nan, 0, 0, 0], [np.nan] * 5, [9, 0, 0, 0, 0]], np.float32)).tolist() == [
        -1,
        -1,
        0,
    ]


def test_constant_confidence():
    logits = np.zeros((500, 3), np.float32)
    right, wrong = np.zeros(500, int), np.arange(500) % 2
    rule = effjax.selective(logits, right, selective_risk=0.05)
    assert rule.threshold.accepted == 500
    with pytest.warns(NoEffectWarning, match="always abstains"):
        rule = effjax.selective(logits, wrong, selective_risk=0.05)
    assert rule.predict(logits).tolist() == [-1] * 500
    assert float(rule.measure(logits, wrong).coverage) == 0


def test_the_best_of_several_models_pays_for_the_choice():
    one = effjax.selective(LOGITS, LABELS, joint_error=0.03)
    ten = effjax.selective(LOGITS, LABELS, joint_error=0.03, models=10)
    assert ten.threshold.value > one.threshold.value
    assert ten.threshold.delta == one.threshold.delta == 0.05


WRONG = {
    "no target": (lambda: effjax.selective(LOGITS, LABELS), r"no target was given; expected one of selective_risk"),
    "two": (lambda: effjax.selective(LOGITS, LABELS, coverage=0.5, joint_error=0.1), "expected one of"),
    "coverage": (lambda: effjax.selective(LOGITS, LABELS, coverage=1.5), r"coverage=1\.5 must be a number in \(0, 1\]"),
    "few": (
        lambda: effjax.selective(LOGITS[:100], LABELS[:100], selective_risk=0.01, delta=0.1),
        "100 held-out predictions cannot certify selective_risk=0.01 with delta=0.1.*needs 231 at least",
    ),
    "labels [n, 1]": (
        lambda: effjax.selective(LOGITS, LABELS[:, None], joint_error=0.1),
        r"labels have shape \(3000, 1\)",
    ),
    "labels beyond": (lambda: effjax.selective(LOGITS, LABELS + 1, joint_error=0.1), r"labels go from 1 to 5"),
    "no label": (lambda: effjax.selective(LOGITS, LABELS * 0 - 1, joint_error=0.1), "none of 3000 is known"),
    "nan": (lambda: effjax.selective(LOGITS * np.nan, LABELS, joint_error=0.1), "logits hold NaN in 3000 of 3000"),
    "vector": (lambda: effjax.selective(LOGITS[:, 0], LABELS, joint_error=0.1), r"logits have shape \(3000,\)"),
    "one column": (lambda: effjax.selective(LOGITS[:, :1], LABELS, joint_error=0.1), r"at least two classes.*\(0, z\)"),
    "method": (
        lambda: effjax.selective(LOGITS, LABELS, joint_error=0.1, method="sgr"),
        "method for joint_error='sgr' is not one of 'ltt', 'conformal', 'search'",
    ),
    "delta of no promise": (
        lambda: effjax.selective(LOGITS, LABELS, coverage=0.5, delta=0.1),
        "delta=0.1, models=1: method='search' promises nothing",
    ),
    "models": (lambda: effjax.selective(LOGITS, LABELS, joint_error=0.1, models=0), "models=0 must be an integer in"),
    "other classes": (
        lambda: effjax.selective(LOGITS, LABELS, coverage=0.5).predict(LOGITS[:, :4]),
        r"logits have shape \(3000, 4\); this rule was fitted to \[\.\.\., 5\]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input(name):
    call, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        call()
