"""The encoder and its classifier: masks, packing, depth as a loop, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.models.attention import attend
from effjax.models.bert import Bert, BertClassifier

SIZES = {"vocab_size": 30, "hidden_size": 16, "num_layers": 1, "num_heads": 4, "intermediate_size": 24}
IDS = np.random.default_rng(0).integers(3, 30, (3, 8)).astype(np.int32)
MASK = np.arange(8) < np.array([[8], [5], [0]])


def stack(params):
    """The parameters of a scanned model from those of an unrolled one."""
    layers = [params[name] for name in sorted(params) if name.startswith("layer_")]
    rest = {name: value for name, value in params.items() if not name.startswith("layer_")}
    return {**rest, "layers": jax.tree.map(lambda *leaves: np.stack(leaves), *layers)}


@functools.cache
def classifier(pool="mean", **fields):
    module = BertClassifier(Bert(**{**SIZES, **fields}), classes=3, pool=pool)
    shapes = jax.eval_shape(module.init, jax.random.key(0), IDS)["params"]
    # Drawn by NumPy, which has nothing to compile, and large, so that attention is far from uniform.
    draws = np.random.default_rng(1)
    return module, jax.tree.map(lambda leaf: draws.normal(0.1, 0.3, leaf.shape).astype(np.float32), shapes)


@functools.cache
def logits_of(pool="mean"):
    module, params = classifier(pool)
    return jax.jit(functools.partial(module.apply, {"params": params}), static_argnames="segments")


def test_rows_without_tokens_are_finite_forward_and_backward():
    module, params = classifier()

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params, mask):
        logits = module.apply({"params": params}, IDS, mask)
        return (logits * jnp.arange(3.0)[None]).sum(), logits

    for mask in (MASK, np.zeros_like(MASK)):
        (_, logits), gradients = loss(params, mask)
        assert np.isfinite(logits).all()
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    np.testing.assert_allclose(logits, np.broadcast_to(params["head"]["bias"], (3, 3)), atol=1e-6)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_padding_changes_nothing(pool):
    logits = logits_of(pool)
    padded = np.where(MASK, IDS, 1)
    reference = logits(IDS, MASK)
    np.testing.assert_allclose(logits(padded, MASK), reference, atol=1e-6)
    assert np.abs(logits(np.where(MASK, IDS + 1, 1) % 30, MASK) - reference)[:2].max() > 1e-3


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_packed_texts_are_as_texts_alone(pool):
    rows = [IDS[0, :5], IDS[1, :3], IDS[2, :2]]
    packed = np.concatenate([*rows, [0, 0]])[None]
    segments = np.repeat([1, 2, 3, 0], [5, 3, 2, 2])[None]
    positions = np.concatenate([np.arange(n) for n in (5, 3, 2, 2)])[None]
    logits = logits_of(pool)
    result = logits(packed, segments > 0, segment_ids=segments, segments=4)
    assert result.shape == (1, 4, 3)
    alone = logits(np.array([np.pad(row, (0, 8 - len(row))) for row in rows]), np.arange(8) < [[5], [3], [2]])
    np.testing.assert_allclose(result[0, :3], alone, atol=1e-5)
    explicit = logits(packed, segments > 0, segment_ids=segments, position_ids=positions, segments=4)
    np.testing.assert_array_equal(explicit, result)
    assert np.isfinite(result[0, 3]).all()


def test_scanned_and_recomputed_layers_are_the_same_function():
    params = classifier(num_layers=2)[1]["encoder"]
    unrolled = jax.jit(Bert(**{**SIZES, "num_layers": 2}).apply)({"params": params}, IDS, MASK)
    scanned = Bert(**{**SIZES, "num_layers": 2}, scan_layers=True, remat=True)
    result = jax.jit(scanned.apply)({"params": stack(params)}, IDS, MASK)
    np.testing.assert_allclose(result, unrolled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_explicit_softmax_equals_the_fused_one_with_finite_gradients(causal):
    draws = np.random.default_rng(0)
    query, key, value = (draws.normal(size=(3, 8, heads, 6)).astype(np.float32) for heads in (4, 2, 2))

    @jax.jit
    def both(query, key, value, mask):
        run = functools.partial(attend, mask=mask, causal=causal)
        explicit = lambda query, key, value: (run(query, key, value, drop=lambda p: p) ** 2).sum()
        fused = lambda query, key, value: (run(query, jnp.repeat(key, 2, 2), jnp.repeat(value, 2, 2)) ** 2).sum()
        grouped = lambda query, key, value: (run(query, key, value) ** 2).sum()
        return [jax.value_and_grad(f, (0, 1, 2))(query, key, value) for f in (explicit, fused, grouped)]

    results = both(query, key, value, MASK[:, None, None, :])
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), other, results[0])


def test_attention_dropout_alone_acts_in_training():
    module, params = classifier(dropout=0.0)
    module = module.clone(dropout=0.0)
    apply = jax.jit(
        lambda seed: module.apply(
            {"params": params}, IDS, MASK, train=True, rngs={"dropout": jax.random.key(seed, impl="rbg")}
        )
    )
    assert np.abs(apply(0) - apply(1))[:2].max() > 1e-3


NOTHING = jnp.zeros((1, 4), int)


@pytest.mark.parametrize(
    ("fields", "inputs", "keywords", "message"),
    [
        ({}, [jnp.zeros((1, 9), int)], {}, "input_ids of length 9 is longer than max_positions=8"),
        ({}, [jnp.zeros((1, 4))], {}, "must be integers"),
        ({}, [jnp.zeros(4, int)], {}, r"\[batch, length\]"),
        ({}, [NOTHING, jnp.ones((1, 5), bool)], {}, r"mask of shape \(1, 5\)"),
        ({}, [NOTHING], {"segments": 2}, "segments=2 and segment_ids belong together"),
        ({"pool": "max"}, [NOTHING], {}, "pool='max'"),
        ({"num_heads": 3}, [NOTHING], {}, "num_heads=3"),
        ({"num_layers": 0}, [NOTHING], {}, "num_layers=0"),
        ({"activation": "glu"}, [NOTHING], {}, "activation='glu'.*Did you mean"),
    ],
)
def test_bad_input_is_refused_while_tracing(fields, inputs, keywords, message):
    sizes = {name: value for name, value in fields.items() if name != "pool"}
    module = BertClassifier(Bert(**{**SIZES, "max_positions": 8, **sizes}), classes=3, pool=fields.get("pool", "mean"))
    with pytest.raises((ValueError, TypeError), match=message):
        jax.eval_shape(lambda key: module.init(key, *inputs, **keywords), jax.random.key(0))
