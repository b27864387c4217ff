from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.optim.batch_size import scale_by_batch_size

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "tokendrop_bucketsampler" / "lrm_adamw.npz"


def adamw(*scaling, schedule=0.1, weight_decay=0.01):
    return optax.chain(
        optax.scale_by_adam(), optax.add_decayed_weights(weight_decay), *scaling, optax.scale_by_learning_rate(schedule)
    )


def test_equals_torch_with_the_rule_as_intended():
    with np.load(REFERENCE) as reference, jax.enable_x64():
        lr0, total = float(reference["lr0"]), int(reference["total_steps"])
        tx = adamw(
            scale_by_batch_size(reference=int(reference["base_batch"])),
            schedule=lambda t: lr0 * (total - t) / total,
            weight_decay=float(reference["weight_decay"]),
        )
        w = jnp.linspace(-1.0, 1.0, reference["grads"].shape[1], dtype=jnp.float64)
        state, step = tx.init(w), jax.jit(tx.update)
        for t, (grad, rows) in enumerate(zip(reference["grads"], reference["batch_sizes"], strict=True)):
            np.testing.assert_allclose(w, reference["accum1/params"][t], rtol=1e-12, atol=1e-14)
            updates, state = step(jnp.asarray(grad), state, w, batch_size=float(rows))
            w = optax.apply_updates(w, updates)
        np.testing.assert_allclose(w, reference["accum1/params"][-1], rtol=1e-12, atol=1e-14)


def test_at_the_reference_it_is_adamw_bit_for_bit():
    grads = jax.random.normal(jax.random.key(0), (5, 7))
    ends = []
    for tx in (adamw(), adamw(scale_by_batch_size(reference=64))):
        step = jax.jit(optax.with_extra_args_support(tx).update)
        w, state = jnp.ones(7), tx.init(jnp.ones(7))
        for grad in grads:
            updates, state = step(grad, state, w, batch_size=jnp.float32(64))
            w = optax.apply_updates(w, updates)
        ends.append(np.asarray(w))
    np.testing.assert_array_equal(*ends)


@pytest.mark.parametrize(
    ("options", "rows", "factor"),
    [
        ({}, 256, 2.0),
        ({}, 16, 0.5),
        ({"power": 1.0}, 16, 0.25),
        ({"max_factor": 1.5}, 256, 1.5),
        ({"reference": 4}, 4, 1.0),
    ],
)
def test_the_factor(options, rows, factor):
    tx = scale_by_batch_size(**options)
    updates, state = tx.update({"a": jnp.ones(2), "b": None}, tx.init(None), batch_size=rows)
    assert updates["a"].tolist() == [factor] * 2
    assert jax.tree.leaves(state) == []


def test_accumulation_applies_the_factor_once():
    tx = optax.MultiSteps(optax.chain(optax.scale_by_adam(), scale_by_batch_size(reference=64), optax.scale(-1.0)), 4)
    state = tx.init(jnp.zeros(3))
    for _ in range(4):  # four micro-steps of 64 rows are one step of 256
        updates, state = tx.update(jnp.ones(3), state, batch_size=256)
    np.testing.assert_allclose(updates, -2.0, rtol=1e-5)


def test_narrow_updates_are_scaled_in_float32():
    tx = scale_by_batch_size(reference=64)
    updates, _ = tx.update(jnp.full(1, 3.0, jnp.bfloat16), tx.init(None), batch_size=65)
    assert updates.dtype == jnp.bfloat16
    assert updates[0] == jnp.bfloat16(3.0 * (65 / 64) ** 0.5)


def test_bad_input_is_named():
    tx = scale_by_batch_size()
    with pytest.raises(ValueError, match=r"needs batch_size.*tx.update\(grads, state, params, batch_size="):
        tx.update(jnp.ones(2), tx.init(None))
    with pytest.raises(ValueError, match=r"batch_size has shape \(4,\)"):
        tx.update(jnp.ones(2), tx.init(None), batch_size=jnp.ones(4))
    with pytest.raises(ValueError, match="batch_size=0 must be a number in"):
        tx.update(jnp.ones(2), tx.init(None), batch_size=0)
    with pytest.raises(ValueError, match="reference=0 must be"):
        scale_by_batch_size(reference=0)
    with pytest.raises(ValueError, match="max_factor=0 must be"):
        scale_by_batch_size(max_factor=0)
