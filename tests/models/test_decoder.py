"""The causal language model: causality, rotary positions, shared heads, the cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.models.attention import rope_angles, rotate
from effjax.models.decoder import Decoder, generate

SIZES = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 4,
    "intermediate_size": 24,
    "max_positions": 12,
}
OPT = {"norm": "layer", "mlp": "relu", "positions": "learned", "position_offset": 2, "use_bias": True}
KINDS = {
    "llama": {"num_kv_heads": 2, "tie_embeddings": False},
    "llama-scan": {"num_kv_heads": 1, "rope_style": "interleaved", "num_layers": 2, "scan_layers": True, "remat": True},
    "opt": OPT,
}
IDS = np.random.default_rng(0).integers(3, 30, (2, 8)).astype(np.int32)


@functools.cache
def started(kind):
    module = Decoder(**{**SIZES, **KINDS[kind]})
    shapes = jax.eval_shape(module.init, jax.random.key(0), IDS)["params"]
    draws = np.random.default_rng(1)
    return module, jax.tree.map(lambda leaf: draws.normal(0.1, 0.3, leaf.shape).astype(np.float32), shapes)


@functools.cache
def logits_of(kind):
    module, params = started(kind)
    return jax.jit(functools.partial(module.apply, {"params": params}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_sees_itself_and_what_came_before(kind):
    before = logits_of(kind)(IDS)
    changed = logits_of(kind)(np.concatenate([IDS[:, :5], IDS[:, 5:6] % 29 + 1, IDS[:, 6:]], axis=1))
    np.testing.assert_array_equal(changed[:, :5], before[:, :5])
    assert (np.abs(changed - before).max((0, 2))[5:] > 1e-4).all()


@pytest.mark.parametrize("kind", KINDS)
def test_cached_decoding_equals_the_whole_forward_pass(kind):
    module, params = started(kind)
    result = jax.jit(generate, static_argnums=(0, 3))(module.apply, params, IDS[:, :4], 5)
    assert result.shape == (2, 9)
    np.testing.assert_array_equal(result[:, :4], IDS[:, :4])
    # Teacher forcing: one pass over the result predicts each of its tokens from those before.
    whole = logits_of(kind)(result[:, :8])
    np.testing.assert_array_equal(whole[:, 3:].argmax(-1), result[:, 4:])


@pytest.mark.parametrize("kind", ["llama-scan", "opt"])
def test_padding_and_packing_change_nothing(kind):
    logits = logits_of(kind)
    lengths = (5, 3)
    mask = np.arange(8) < np.array(lengths)[:, None]
    padded, whole = logits(np.where(mask, IDS, 0), mask), logits(IDS)
    packed = np.tile(np.concatenate([IDS[0, :5], IDS[1, :3]]), (2, 1))
    together = logits(packed, segment_ids=np.tile(np.repeat([1, 2], lengths), (2, 1)))
    for i, n in enumerate(lengths):
        np.testing.assert_allclose(padded[i, :n], whole[i, :n], atol=1e-5)
        np.testing.assert_allclose(together[0, 5 * i : 5 * i + n], whole[i, :n], atol=1e-5)
    assert np.isfinite(logits(IDS, np.zeros_like(mask))).all()


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_rotary_scores_depend_on_the_distance_alone(style):
    query, key = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
    at = jax.jit(lambda x, position: rotate(x, *rope_angles(position[None, None], 8, 100.0), style))
    score = lambda p, q: np.vdot(at(query, jnp.int32(p)), at(key, jnp.int32(q)))
    np.testing.assert_allclose([score(5, 8), score(40, 43)], score(0, 3), atol=1e-5)
    assert abs(score(0, 9) - score(0, 3)) > 1e-2
    np.testing.assert_array_equal(at(query, jnp.int32(0)), query)


def test_rotary_styles_differ_by_a_permutation():
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 8)).astype(np.float32)
    angles = rope_angles(jnp.arange(3)[None], 8, 100.0)
    order = np.arange(8).reshape(4, 2).T.ravel()
    turn = jax.jit(rotate, static_argnums=3)
    interleaved = turn(x, *angles, "interleaved")
    np.testing.assert_allclose(turn(x[..., order], *angles, "half"), interleaved[..., order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "keywords", "message"),
    [
        ({"max_positions": 7}, {}, "input_ids of length 8 is longer than max_positions=7"),
        ({}, {"cache_length": 13}, "cache_length=13"),
        ({}, {"cache_length": 8, "mask": np.ones((2, 8), bool)}, "neither mask nor segment_ids"),
        ({"num_kv_heads": 3}, {}, "num_kv_heads=3"),
        ({"rope_style": "split"}, {}, "rope_style='split'"),
        ({"mlp": "swish"}, {}, "mlp='swish'"),
        ({"norm": "batch"}, {}, "norm='batch'"),
        ({"positions": "alibi"}, {}, "positions='alibi'"),
    ],
)
def test_bad_input_is_refused_while_tracing(fields, keywords, message):
    module = Decoder(**{**SIZES, **fields})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda key: module.init(key, IDS, **keywords), jax.random.key(0))


def test_generate_refuses_more_tokens_than_positions():
    module, params = started("llama")
    for steps, message in ((0, "steps=0"), (6, "cache_length=13")):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda params, steps=steps: generate(module.apply, params, IDS, steps), params)
