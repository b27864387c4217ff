"""Spiking neurons: what a spike does, learning by FPTT, a stream of one, bad input. (Parity: ``test_fptt.py``.)"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.recurrent.fptt import fptt
from effjax.recurrent.ltc_spiking import LeakyReadoutCell, LTCSpikingCell
from effjax.recurrent.sequence_problem import SequenceProblem
from effjax.recurrent.through_time import fptt_step

B, T, D, H, C = 6, 12, 3, 16, 2
NEURONS, READOUT = LTCSpikingCell(H), LeakyReadoutCell(C)


def network_cell(params, carry, x):
    neurons, spikes = NEURONS.apply(params["neurons"], carry[0], x)
    o, logits = READOUT.apply(params["readout"], carry[1], spikes)
    return (neurons, o), logits


@functools.cache
def started():
    def start(key):
        keys = jax.random.split(key, 3)
        carry = NEURONS.initialize_carry(keys[0], (B, D)), READOUT.initialize_carry(keys[0], (B, H))
        neurons = NEURONS.init(keys[1], carry[0], jnp.zeros((B, D)))
        return {"neurons": neurons, "readout": READOUT.init(keys[2], carry[1], jnp.zeros((B, H)))}, carry

    return jax.jit(start)(jax.random.key(0))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_a_spike_empties_the_membrane_and_raises_the_threshold():
    params, (carry, _) = started()
    x = normal(1, B, D)
    step = jax.jit(lambda carry, x: NEURONS.apply(params["neurons"], carry, x))
    (u, s, _), out = step(carry, x)
    np.testing.assert_array_equal(s, out)
    assert set(np.unique(s)) == {0.0, 1.0}
    assert (np.asarray(u)[np.asarray(s) == 1] == 0).all()
    spiked, silent = (np.asarray(step((carry[0], np.full_like(u, value), carry[2]), x)[0][2]) for value in (1.0, 0.0))
    assert (spiked > silent).all()


def test_fptt_with_an_update_at_every_step_learns():
    params, carry = started()
    labels = np.arange(B) % C
    xs = normal(2, T, B, D) + np.float32(2) * labels[None, :, None].astype(np.float32)

    def loss(params, logits, labels, part):
        return part.progress * optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    tx = fptt(optax.chain(optax.clip_by_global_norm(1.0), optax.adamax(3e-2)))
    train = jax.jit(fptt_step(SequenceProblem(network_cell, loss, terminal=True), tx, part_length=1))
    state, losses = jax.jit(tx.init)(params), []
    for _ in range(25):
        state, params, _, metrics = train(state, params, carry, xs, labels)
        losses.append(float(metrics.loss[-1]))
    assert losses[-1] < 0.5 * losses[0]


def test_a_layer_norm_needs_no_batch():
    layer = nn.RNN(LTCSpikingCell(H, norm="layer"))
    xs = normal(3, 2, T, D)

    @jax.jit
    def start(xs):
        carry = LTCSpikingCell(H).initialize_carry(jax.random.key(0), (2, D))
        return carry, layer.init(jax.random.key(4), xs, initial_carry=carry)

    carry, params = start(xs)
    run = jax.jit(lambda carry, xs: layer.apply(params, xs, initial_carry=carry))
    alone = run(jax.tree.map(lambda leaf: np.asarray(leaf)[:1], carry), xs[:1])
    np.testing.assert_array_equal(np.asarray(run(carry, xs))[:1], alone)


def test_bad_input():
    params, (carry, _) = started()
    params = params["neurons"]["params"]
    x = NEURONS.project(params, jnp.zeros((B, D)))
    with pytest.raises(ValueError, match="norm='btach' is not one of"):
        LTCSpikingCell(H, norm="btach").advance(params, carry, x)
    with pytest.raises(ValueError, match="norm='batch' with 1 example"):
        NEURONS.advance(params, jax.tree.map(lambda leaf: leaf[:1], carry), x[:1])
    with pytest.raises(ValueError, match=r"carry s has shape \(6, 4\)"):
        NEURONS.advance(params, (carry[0], carry[1][:, :4], carry[2]), x)
    with pytest.raises(ValueError, match="carry o has shape"):
        READOUT.apply(started()[0]["readout"], jnp.zeros((B, C + 1)), jnp.zeros((B, H)))
