"""Cascades of two or more models, the rules by which they ask, and the dispatcher whose buckets the host chooses."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core.cost import count_compiles
from effjax.hardness.cascades import Asking, cascade, confidence_need, with_query
from effjax.hardness.dispatch import dispatch_buckets, dispatch_capacity, dispatch_masked
from effjax.hardness.host_dispatch import HostDispatch

ROWS, WIDTH, CLASSES = 16, 5, 4


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


KERNEL, X, BASE = normal(10, WIDTH, CLASSES), normal(1, ROWS, WIDTH), normal(2, ROWS, CLASSES)
FORMS = {"masked": dispatch_masked, "buckets": functools.partial(dispatch_buckets, buckets=(6,))}


def expert(params, x):
    return x @ params


def asking(count, seed=0):
    request = np.zeros(ROWS, bool)
    request[np.random.default_rng(seed).permutation(ROWS)[:count]] = True
    return request


def ladder_of_models():
    apply = lambda params, x: x @ params
    kernels = [normal(seed, WIDTH, CLASSES) for seed in (3, 4, 5)]
    stages = [with_query(apply), with_query(apply, "entropy"), apply]
    return stages, [Asking(kernels[0], np.float32(-0.5)), Asking(kernels[1], np.float32(0.7)), kernels[2]]


def by_hand(params, x):
    """Row by row in NumPy: the outputs, and who answered."""
    p = lambda logits: np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    outputs, who = [], []
    for row in x:
        first, second, third = (row @ kernel for kernel in (params[0].params, params[1].params, params[2]))
        best = np.sort(p(first))[::-1]
        if best[1] - best[0] <= params[0].threshold:
            place, found = 0, first
        elif -(p(second) * np.log(p(second))).sum() <= params[1].threshold:
            place, found = 1, second
        else:
            place, found = 2, third
        outputs.append(found)
        who.append(place)
    return np.stack(outputs), np.array(who)


@pytest.mark.parametrize("form", ["masked", "buckets", "host"])
def test_cascade_of_three(form):
    stages, params = ladder_of_models()
    if form == "host":
        run = HostDispatch(stages, buckets=(2, 4, 8))
    else:
        run = jax.jit(lambda params, x: cascade(stages, params, x, dispatch=FORMS[form]))
    seen = set()
    for seed in range(16):
        x = normal(seed, ROWS, WIDTH)
        found, (outputs, who) = run(params, x), by_hand(params, x)
        np.testing.assert_array_equal(found.answered, who)
        np.testing.assert_allclose(found.outputs, outputs, rtol=1e-4, atol=1e-5)
        seen |= set(who.tolist())
    assert seen == {0, 1, 2}


def test_cascade_by_capacity_counts_what_overflows_on_every_level():
    stages, params = ladder_of_models()
    levels = [functools.partial(dispatch_capacity, capacity=size) for size in (5, 2)]
    found = jax.device_get(jax.jit(lambda params, x: cascade(stages, params, x, dispatch=levels))(params, X))
    _, who = by_hand(params, X)
    np.testing.assert_array_equal(found.answered[~found.overflowed], who[~found.overflowed])
    assert (found.answered[found.overflowed] < who[found.overflowed]).all()
    assert ((who >= 1).sum(), (who == 2).sum()) == (6, 4)
    assert [int((found.answered == place).sum()) for place in range(3)] == [11, 3, 2]


def test_padding_rows_of_a_cascade_do_not_ask():
    """Two rows ask, in a bucket of eight: of its empty places none may take room from them further down."""
    need = lambda router, logits, features: router[0] + 0 * logits[:, 0] if logits.shape[0] < ROWS else logits[:, 0]
    grow = lambda params, x: x * params
    stages = [with_query(grow, need), with_query(grow, need), grow]
    x = np.full((ROWS, 2), -1.0, np.float32)
    x[[5, 9]] = 1.0
    levels = [functools.partial(dispatch_buckets, buckets=(8,)), functools.partial(dispatch_capacity, capacity=2)]
    params = [Asking(1.0, 0.0), Asking(2.0, 0.0, np.ones(1, np.float32)), 3.0]
    found = jax.device_get(jax.jit(lambda params, x: cascade(stages, params, x, dispatch=levels))(params, x))
    assert found.answered[[5, 9]].tolist() == [2, 2]
    assert not found.overflowed.any()
    # Nor may they call for a larger bucket: the last model says how many rows it was given.
    stages[2] = lambda params, x: jnp.full_like(x, x.shape[0])
    levels = [functools.partial(dispatch_buckets, buckets=sizes) for sizes in ((8,), (2, 8))]
    found = jax.jit(lambda params, x: cascade(stages, params, x, dispatch=levels))(params, x)
    assert np.asarray(found.outputs)[[5, 9], 0].tolist() == [2, 2]


def test_host_dispatch_runs_no_expert_where_nobody_asks_and_the_least_bucket_otherwise():
    stages, params = ladder_of_models()
    two = HostDispatch([stages[0], stages[2]], buckets=(2, 4))
    given = [params[0]._replace(threshold=np.float32(0.0)), params[2]]
    assert two(given, X).answered.tolist() == [0] * ROWS
    assert not two.launches
    everybody = [params[0]._replace(threshold=np.float32(-1.0)), params[2]]
    two(everybody, X)
    assert dict(two.launches) == {(1, ROWS): 1}


@pytest.mark.optimized
def test_flops_and_text_of_a_bucket_are_those_of_its_rows():
    wide = normal(0, 64, 64)
    deep = lambda params, x: x @ params @ params @ params.T
    serve = HostDispatch([with_query(lambda params, x: x @ params), deep], buckets=(8, 16))
    given = [Asking(wide, -0.5), wide], jax.ShapeDtypeStruct((128, 64), jnp.float32)
    flops = {}
    for size in (8, 16, 128):
        compiled = serve.program(*given, size=size).compile()
        flops[size] = compiled.cost_analysis()["flops"]
        products = re.findall(r"f32\[(\d+),64\]\S* (?:dot|custom-call)\(", compiled.as_text())
        assert not products or set(products) == {str(size)}
    assert flops[8] < 3 * 2 * 8 * 64 * 64 + 60_000
    assert flops[16] - flops[8] == pytest.approx(3 * 2 * 8 * 64 * 64, rel=0.05)


def test_nothing_compiles_over_a_thousand_batches():
    serve = HostDispatch([with_query(expert), lambda params, x: x @ params], buckets=(1, 2, 4, 8))
    inside = jax.jit(functools.partial(FORMS["buckets"], expert))
    params = [Asking(KERNEL, np.float32(-0.5)), KERNEL]
    batches = [np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32) for _ in range(2)]
    asks = [asking(count, seed) for count in range(ROWS + 1) for seed in range(3)]
    assert serve.warm_up(params, batches[0]) == 6
    inside(KERNEL, batches[0], BASE, asks[0])
    thresholds = [np.float32(t) for t in np.linspace(-1, 0, 50)]
    with count_compiles() as log:
        for index in range(1000):
            x = batches[index % 2]
            serve([params[0]._replace(threshold=thresholds[index % 50]), KERNEL], x)
            inside(KERNEL, x, BASE, asks[index % len(asks)])
    assert log.names == []
    assert len({size for _, size in serve.launches}) == 5


def test_a_stream_keeps_the_order_and_equals_single_calls():
    stages, params = ladder_of_models()
    batches = [normal(seed, ROWS, WIDTH) for seed in range(5)]
    one = HostDispatch(stages, buckets=(4, 8))
    for ahead in (0, 2):
        for found, x in zip(one.stream(params, batches, ahead=ahead), batches, strict=True):
            np.testing.assert_array_equal(found.outputs, one(params, x).outputs)
    assert list(one.stream(params, [])) == []


def test_host_dispatch_of_one_row_none_and_of_mixed_dtypes():
    stages, params = ladder_of_models()
    serve = HostDispatch(stages, buckets=(2,))
    assert serve(params, X[:1]).outputs.shape == (1, CLASSES)
    assert serve(params, X[:0]).outputs.shape == (0, CLASSES)
    half = HostDispatch([with_query(lambda params, x: (x @ params).astype(jnp.bfloat16)), expert], buckets=(2,))
    for threshold in (1.0, -2.0):
        assert half([Asking(KERNEL, threshold), KERNEL], X).outputs.dtype == jnp.float32


def test_compiler_options_reach_the_programs_of_later_stages():
    stages, params = ladder_of_models()
    odd = HostDispatch(stages, buckets=(4,), compiler_options={"no_such_option_of_xla": "1"})
    with pytest.raises(Exception, match="no_such_option_of_xla"):
        odd([params[0]._replace(threshold=-2.0), *params[1:]], X)


def test_host_dispatch_keeps_answers_where_the_expert_gives_nan():
    broken = lambda params, x: (x @ params).at[0].set(jnp.nan)
    serve = HostDispatch([with_query(expert), broken], buckets=(ROWS,))
    found = jax.device_get(serve([Asking(KERNEL, -2.0), KERNEL], X))
    assert np.flatnonzero(found.failed).tolist() == [0]
    np.testing.assert_allclose(found.outputs[0], (X @ KERNEL)[0], rtol=1e-5)


@pytest.mark.parametrize("rule", ["margin", "entropy", "max_probability"])
def test_confidence_rules(rule):
    logits = np.array([[4.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.1, 0.0, 0.05], [-np.inf, 3.0, 0.0]])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    best = -np.sort(-p, axis=1)
    logs = np.log(np.where(p > 0, p, 1))
    wanted = {"margin": best[:, 1] - best[:, 0], "max_probability": -best[:, 0], "entropy": -(p * logs).sum(1)}
    need = jax.jit(confidence_need, static_argnums=1)
    np.testing.assert_allclose(need(logits, rule), wanted[rule], rtol=1e-5, atol=1e-6)
    assert np.isnan(need(np.array([[np.nan, 0.0, 0.0]] * 4), rule)).all()


def test_confidence_of_bfloat16_logits_is_computed_in_float32():
    need = jax.jit(confidence_need)(np.array([[6.0, 0.0], [6.25, 0.0]], jnp.bfloat16))
    assert need.dtype == jnp.float32
    first, second = need.tolist()
    assert first > second


def test_nan_asks():
    stage = with_query(lambda params, x: x)
    _, asks = jax.jit(stage)(Asking(None, np.float32(1.0)), np.array([[np.nan, 0.0], [1.0, 0.0]], np.float32))
    assert asks.tolist() == [True, False]


BAD = [
    (lambda: HostDispatch([with_query(expert)], buckets=(2,)), "stages hold 1"),
    (
        lambda: HostDispatch([with_query(expert), lambda p, x: x], buckets=(2,))([Asking(KERNEL, 9.0), None], X),
        r"the expert answers 16 rows with float32\[16, 5\]",
    ),
    (lambda: HostDispatch([with_query(expert), expert], buckets=(2,))([KERNEL], X), "params hold 1 for 2 stages"),
    (lambda: cascade([expert], [KERNEL], X, dispatch=dispatch_masked), "stages hold 1 and params 1"),
    (lambda: cascade([expert] * 3, [KERNEL] * 3, X, dispatch=[dispatch_masked]), "dispatch holds 1 for 3 stages"),
    (lambda: confidence_need(BASE, "margins"), "Did you mean 'margin'"),
    (lambda: confidence_need(BASE[:, :1]), r"logits have shape \(16, 1\)"),
    (lambda: with_query(expert, "energy"), "need='energy' is not one of"),
    (
        lambda: with_query(expert, lambda router, logits, features: logits)(Asking(KERNEL, 0.0), X),
        r"need has shape \(16, 4\)",
    ),
]


@pytest.mark.parametrize(("call", "text"), BAD)
def test_bad_input_is_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()
