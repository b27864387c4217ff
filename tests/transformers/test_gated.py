"""Gated transformers: parity with the authors' modules, hard attention, one program, devices, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pruned_bert
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from effjax.models.convert import export_weights
from effjax.models.decoder import Decoder
from effjax.models.pruned import keep_largest
from effjax.transformers.gated import (
    GatedEvaluator,
    axformer_step,
    gated_apply,
    prune_batches,
    sample_losses,
)
from effjax.transformers.prune_spec import PruneShape, PruneSpec, all_gates, prune_shape

pytestmark = pytest.mark.promotes  # Flax mixes the dtypes of activations and statistics

CASES = ("dense", "hard", "hard_all", "ffn_block", "attn_block", "both_blocks_last", "heads", "groups", "mixed")


def _without_gradient(function):
    return lambda *args: (function(*args), None)


@pytest.mark.parametrize("constants", ["small_k", "official_constants"])
def test_gated_model_is_the_authors(constants):
    data = pruned_bert.read(f"forward_{constants}")
    with jax.enable_x64(True):
        module, params, group_size, top_k, rules = pruned_bert.model(data, jnp.float64)
        inputs, labels = pruned_bert.inputs_of(data), data["labels"].astype(np.int32)
        apply = gated_apply(module, top_k=top_k)

        # The gradients of one set of constants are enough, as their program is slow to compile.
        wrapped = functools.partial(jax.value_and_grad, has_aux=True) if constants == "small_k" else _without_gradient

        @jax.jit
        @wrapped
        def loss(params, gates):
            logits = apply(params, inputs, gates)
            losses = sample_losses(logits, labels)
            return losses.mean(), (logits, losses)

        for name in CASES:
            case = f"case/{name}"
            gates = pruned_bert.spec_of(data, case, module, group_size, top_k).gates()
            (value, (logits, losses)), grads = loss(params, gates)
            np.testing.assert_allclose(logits, data[f"{case}/logits"], rtol=0, atol=1e-12)
            np.testing.assert_allclose(losses, data[f"{case}/samplewise_loss"], rtol=0, atol=1e-12)
            np.testing.assert_allclose(value, data[f"{case}/loss"], rtol=0, atol=1e-12)
            theirs = {key.removeprefix(f"{case}/grad/"): value for key, value in data.items() if f"{case}/grad/" in key}
            ours = export_weights(grads, rules) if theirs and grads is not None else {}
            for key, value in theirs.items() if ours else ():
                np.testing.assert_allclose(ours[key.replace("/", ".")], value, rtol=0, atol=1e-12, err_msg=key)
        assert loss._cache_size() == 1
