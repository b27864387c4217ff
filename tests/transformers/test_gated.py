"""Gated transformers: parity with the authors' modules, hard attention, one program, devices, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pruned_bert
import pytest

from effjax.models.convert import export_weights
from effjax.models.decoder import Decoder
from effjax.models.pruned import keep_largest
from effjax.transformers.gated import (
    axformer_step,
    gated_apply,
    sample_losses,
)
from effjax.transformers.prune_spec import all_gates, prune_shape

pytestmark = pytest.mark.promotes  # Flax mixes the dtypes of activations and statistics

CASES = ("dense", "hard", "hard_all", "ffn_block", "attn_block", "both_blocks_last", "heads", "groups", "mixed")


def _without_gradient(function):
    return lambda *args: (function(*args), (None, None))


@pytest.mark.parametrize("constants", ["small_k", "official_constants"])
def test_gated_model_is_the_authors(constants):
    data = pruned_bert.read(f"forward_{constants}")
    with jax.enable_x64(True):
        module, params, group_size, top_k, rules = pruned_bert.model(data, jnp.float64)
        inputs, labels = pruned_bert.inputs_of(data), data["labels"].astype(np.int32)
        apply = gated_apply(module, top_k=top_k)

        # The gradients of one set of constants are enough, as their program is slow to compile.
        wrapped = functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        wrapped = wrapped if constants == "small_k" else _without_gradient

        @jax.jit
        @wrapped
        def loss(params, gates):
            logits = apply(params, inputs, gates)
            losses = sample_losses(logits, labels)
            return losses.mean(), (logits, losses)

        for name in CASES:
            case = f"case/{name}"
            gates = pruned_bert.spec_of(data, case, module, group_size, top_k).gates()
            (value, (logits, losses)), (grads, slopes) = loss(params, jax.tree.map(jnp.asarray, gates))
            np.testing.assert_allclose(logits, data[f"{case}/logits"], rtol=0, atol=1e-12)
            np.testing.assert_allclose(losses, data[f"{case}/samplewise_loss"], rtol=0, atol=1e-12)
            np.testing.assert_allclose(value, data[f"{case}/loss"], rtol=0, atol=1e-12)
            theirs = {key.removeprefix(f"{case}/grad/"): value for key, value in data.items() if f"{case}/grad/" in key}
            ours = export_weights(grads, rules) if theirs and grads is not None else {}
            for key, value in theirs.items() if ours else ():
                np.testing.assert_allclose(ours[key.replace("/", ".")], value, rtol=0, atol=1e-12, err_msg=key)
            if name == "dense" and slopes is not None:
                assert all(np.isfinite(leaf).all() for leaf in slopes)
                assert np.abs(slopes.heads).min() > 0
                assert np.abs(slopes.groups).min() > 0
                assert not np.abs(slopes.hard).any()
        assert loss._cache_size() == 1


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return (x / x.sum(-1, keepdims=True)).astype(np.float32)


def test_hard_attention_keeps_the_largest_and_normalises_nothing():
    p = softmax(np.random.default_rng(0).normal(size=(3, 2, 4, 9)))
    p[0, ..., 5:] = 0  # five real tokens
    for top_k in (1, 3, 5, 9, 30):
        found = np.asarray(jax.jit(keep_largest, static_argnums=1)(p, top_k))
        ordered = -np.sort(-p, axis=-1)
        np.testing.assert_allclose(found.sum(-1), ordered[..., :top_k].sum(-1), rtol=1e-6)
        assert ((found == p) | (found == 0)).all()
        assert (found.sum(-1) <= 1 + 1e-6).all()
        if top_k >= 5:
            np.testing.assert_array_equal(found[0], p[0])  # at least as many as real tokens: the same bits
        if top_k >= 9:
            np.testing.assert_array_equal(found, p)
    share = np.asarray(keep_largest(p, 0.34))
    assert ((share > 0).sum(-1) == np.array([2, 4, 4])[:, None, None]).all()  # of 5 and of 9, rounded up
    assert (np.asarray(keep_largest(np.array([0.3, 0.3, 0.4], np.float32), 2)) > 0).sum() == 3  # equals stay
    for wrong in (0, -1, 1.5, 0.0, True):
        with pytest.raises((ValueError, TypeError), match="top_k"):
            keep_largest(p, wrong)


def small(dtype=jnp.float32):
    data = pruned_bert.read("forward_small_k")
    module, params, group_size, top_k, _ = pruned_bert.model(data, jnp.float32)
    module = module.clone(encoder=module.encoder.clone(dtype=dtype))
    return data, module, params, prune_shape(module, group_size=group_size), top_k


def test_short_rows_ignore_hard_attention_to_the_bit():
    data, module, params, shape, top_k = small()
    inputs, on = pruned_bert.inputs_of(data), all_gates(shape)
    apply = jax.jit(gated_apply(module, top_k=top_k))
    whole, hard = (apply(params, inputs, on._replace(hard=np.full_like(on.hard, value))) for value in (0, 1))
    assert inputs["mask"][1].sum() == top_k - 1
    assert apply._cache_size() == 1
    np.testing.assert_array_equal(hard[1], whole[1])
    assert np.abs(hard - whole)[0].max() > 1e-3


def test_losses_in_bfloat16_are_wide():
    data, module, params, shape, top_k = small(jnp.bfloat16)
    batch = (pruned_bert.inputs_of(data), data["labels"].astype(np.int32))
    apply, gates = gated_apply(module, top_k=top_k), all_gates(shape)
    scores = jax.jit(functools.partial(axformer_step, apply))(params, gates, batch)
    assert scores.losses.dtype == jnp.float32
    np.testing.assert_allclose(scores.losses, data["case/dense/samplewise_loss"], atol=0.2)


def test_inputs_that_a_model_does_not_read_are_refused():
    module = Decoder(12, 8, 2, 2, 8, max_positions=8)
    shape = prune_shape(module, group_size=4)
    gates, ids = all_gates(shape), jnp.zeros((1, 3), int)
    run = lambda inputs: gated_apply(module)({"embeddings": {}}, inputs, gates)
    with pytest.raises(ValueError, match="must be a mapping with input_ids and any of mask"):
        run({"input_ids": ids, "token_type_ids": ids})
    with pytest.raises(ValueError, match="must be a mapping"):
        run({"ids": ids})
    with pytest.raises(ValueError, match="labels have shape"):
        sample_losses(jnp.zeros((3, 2)), jnp.zeros((3, 1), int))
