"""ReLoRA, RAC-LoRA and periodic LoRA: parity with stored vectors, what they reset and freeze, bad input."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.finetune.chain import cola_extend, cola_init
from effjax.finetune.chain_config import ColaConfig
from effjax.finetune.cola import cola, cola_state
from effjax.finetune.lora import lora_merge
from effjax.finetune.lora_config import LoraRule
from effjax.finetune.rivals import plora_unload, rac_lora, rac_precondition, relora_reset, relora_schedule

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "cola"
KEY = jax.random.key(0)
LORA = {"kernel": {"a": jax.random.normal(KEY, (6, 2)), "b": jnp.ones((2, 4))}}


@pytest.mark.parametrize("index", [0, 1])
def test_schedule_parity(index):
    data = np.load(REFERENCE / "relora_lr_schedule.npz")
    total, first, warmup, every, ratio, adjust = (
        data[f"cfg_{index}_{name}"].item()
        for name in (
            "num_training_steps",
            "first_warmup_steps",
            "restart_warmup_steps",
            "restart_every",
            "min_lr_ratio",
            "adjust_step",
        )
    )
    schedule = relora_schedule(
        2.0,
        int(total),
        int(every),
        first_warmup_steps=int(first),
        restart_warmup_steps=int(warmup),
        end_ratio=ratio,
        adjust_step=int(adjust),
    )
    rates = jax.jit(jax.vmap(schedule))(jnp.arange(61))
    np.testing.assert_allclose(rates, 2.0 * data[f"mult_{index}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prefix", ["fixed", "trainable"])
def test_merge_and_reinit_parity(prefix):
    data = {
        name.removeprefix(f"{prefix}_"): value
        for name, value in np.load(REFERENCE / "relora_merge.npz").items()
        if name.startswith(prefix)
    }
    scale = float(data["effective_scale"])
    config = ColaConfig(LoraRule("kernel", rank=2, alpha=2 * scale), knots=(1,))
    with jax.enable_x64(True):
        base = {"kernel": jnp.asarray(data["W_before"].T)}
        lora = {"kernel": {"a": jnp.asarray(data["A"].T), "b": jnp.asarray(data["B"].T)}}
        state = cola_extend(cola_init(KEY, base, config)._replace(lora=lora), config)
        np.testing.assert_allclose(state.base["kernel"].T, data["W_after"], rtol=1e-6)
        np.testing.assert_allclose(data["x"] @ state.base["kernel"] + data["bias"][None], data["y_after"], rtol=1e-6)
        a, b = state.lora["kernel"]["a"], state.lora["kernel"]["b"]
        assert np.abs(a).max() <= 1 / np.sqrt(9)
        assert (b == 0).all()


@pytest.mark.parametrize("percent", [50, 80, 90])
def test_magnitude_pruning_parity(percent):
    data = np.load(REFERENCE / "relora_merge.npz")
    tx = optax.trace(0.9)
    with jax.enable_x64(True):
        state = optax.TraceState(jnp.asarray(data["prune_in"]))
        pruned = relora_reset(KEY, tx, state, {}, ratio=percent / 100)
    np.testing.assert_array_equal(pruned.trace, data[f"prune_out_{percent}"])


def test_relora_prunes_moments_and_keeps_counts_at_a_knot():
    config = ColaConfig(LoraRule("kernel", rank=2), knots=(3,))
    base = {"kernel": jnp.zeros((64, 64))}
    lora = cola_init(KEY, base, config).lora
    for prune, ratio, share in (("magnitude", 0.9, 0.1), ("random", 0.99, 0.01)):
        tx = cola(optax.adam(1e-2), config, reset=functools.partial(relora_reset, prune=prune, ratio=ratio))
        params = {"base": base, "lora": lora}
        state = tx.init(params)
        grads = {"lora": jax.tree.map(lambda leaf: jax.random.normal(KEY, leaf.shape), lora)}
        updates, state = jax.jit(functools.partial(tx.update, tie=True))(grads, state, params)
        params = optax.apply_updates(params, updates)
        adam = state.inner[0]
        assert int(adam.count) == 1
        for moment in jax.tree.leaves((adam.mu, adam.nu)):
            assert abs(float((moment != 0).mean()) - share) < 0.03
        assert cola_state(state, params).link == 1
    with pytest.raises(ValueError, match="would reset 0 %"):
        relora_reset(KEY, optax.sgd(0.1), optax.sgd(0.1).init(lora), lora)


@pytest.mark.parametrize(("train", "expected"), [("b", "W_next_A"), ("a", "W_next_B")])
def test_rac_projection_parity(train, expected):
    data = np.load(REFERENCE / "rac_projection.npz")
    with jax.enable_x64(True):
        kernel, gradient = (jnp.asarray(data[name].T) for name in ("W", "G"))
        a, b, scale = jnp.asarray(data["A_sketch"].T), jnp.asarray(data["B_sketch"].T), 2.5
        if train == "b":
            own = {"a": a, "b": jnp.zeros((2, 8))}
            grads = {"a": jnp.zeros_like(a), "b": scale * a.T @ gradient}
        else:
            own = {"a": jnp.zeros((7, 2)), "b": b}
            grads = {"a": scale * gradient @ b.T, "b": jnp.zeros_like(b)}
        tx = optax.chain(rac_precondition(scale, train), optax.sgd(float(data["gamma"])))
        updates, _ = tx.update({"kernel": grads}, tx.init({"kernel": own}), {"kernel": own})
        lora = optax.apply_updates({"kernel": own}, updates)
        merged = lora_merge({"kernel": kernel}, lora, scale)["kernel"]
        np.testing.assert_allclose(merged.T, data[expected], rtol=1e-6, atol=1e-9)


def test_rac_lora_keeps_its_sketch_until_the_knot():
    config = ColaConfig(LoraRule("kernel", rank=2), knots=(3,))
    base = {"kernel": jnp.zeros((6, 4))}
    tx = cola(rac_lora(optax.adam(1e-1)), config)
    params = {"base": base, "lora": cola_init(KEY, base, config).lora}
    state = tx.init(params)
    sketch = params["lora"]["kernel"]["a"]
    step = jax.jit(tx.update, static_argnames="tie")
    for t in range(3):
        before = params["lora"]["kernel"]
        updates, state = step({"lora": LORA}, state, params, tie=config.ties(t))
        params = optax.apply_updates(params, updates)
        if t < 2:
            np.testing.assert_array_equal(params["lora"]["kernel"]["a"], sketch)
            assert (params["lora"]["kernel"]["b"] != before["b"]).all()
    assert (params["lora"]["kernel"]["a"] != sketch).all()
    assert np.linalg.norm(params["base"]["kernel"]) > 0
    moments = [leaf for leaf in jax.tree.leaves(state.inner) if leaf.ndim]
    assert [leaf.shape for leaf in moments] == [(2, 4), (2, 4)]


def test_plora_unloads_a_running_mean():
    base = {"kernel": jnp.zeros((6, 4)), "bias": jnp.ones(4)}
    delta = 0.5 * LORA["kernel"]["a"] @ LORA["kernel"]["b"]
    once, momentum = plora_unload(base, None, LORA, 0.5, decay=0.25)
    twice, momentum = plora_unload(once, momentum, LORA, 0.5, decay=0.25)
    np.testing.assert_allclose(once["kernel"], 0.75 * delta, rtol=1e-6)
    np.testing.assert_allclose(momentum["kernel"], (0.75 + 0.25 * 0.75) * delta, rtol=1e-6)
    np.testing.assert_allclose(twice["kernel"], (1.5 + 0.25 * 0.75) * delta, rtol=1e-6)
    np.testing.assert_array_equal(twice["bias"], base["bias"])
    plain, _ = plora_unload(base, None, LORA, 0.5, decay=0.0)
    np.testing.assert_array_equal(plain["kernel"], lora_merge(base, LORA, 0.5)["kernel"])


def test_bad_input():
    with pytest.raises(ValueError, match="decay=1"):
        plora_unload({"kernel": jnp.zeros((6, 4))}, None, LORA, 1.0, decay=1.0)
    with pytest.raises(ValueError, match="train='c'"):
        rac_precondition(1.0, "c")
    with pytest.raises(ValueError, match="needs the adapters"):
        rac_precondition(1.0).update(LORA, optax.EmptyState())
    with pytest.raises(ValueError, match="restart_warmup_steps=30"):
        relora_schedule(1.0, 100, 20, first_warmup_steps=5, restart_warmup_steps=30)
    with pytest.raises(ValueError, match="Did you mean 'random'"):
        relora_reset(KEY, optax.trace(0.9), None, {}, prune="randon")
