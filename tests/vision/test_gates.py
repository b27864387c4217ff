"""Gates, the losses on them, channel groups, policies and the break-even estimate."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.vision.channel_groups import grouped_mlp, open_channels
from effjax.vision.gate_networks import AIGGate, ConstantGate, PolicyNet, SalienceGate, SkipNetGate
from effjax.vision.gates import Gate, gate_of, gumbel_gate, hard_concrete_gate, relu1_gate, ste_gate
from effjax.vision.mac_target import (
    BlockGates,
    BlockMacs,
    example_macs,
    gate_statistics,
    gate_target,
    mac_fraction,
    mac_target_loss,
    open_rate_loss,
    static_macs,
)
from effjax.vision.pattern_buckets import PatternServer, nearest_patterns
from effjax.vision.policies import (
    block_drop_curriculum,
    block_drop_loss,
    block_drop_reward,
    distil_policy_loss,
    skipnet_loss,
)
from effjax.vision.skip_estimate import DEVICES, Device, break_even

RNG = np.random.default_rng(0)
Z = np.array([-3.0, -0.01, 0.0, 0.004, 0.4, 0.999, 1.0, 2.5], np.float32)
sigmoid = lambda z: 1 / (1 + np.exp(-z.astype(np.float64)))


def slopes(gate, z=Z, part="value"):
    return jax.jit(jax.vmap(jax.grad(lambda z: getattr(gate(z), part))))(z)


# Gates


def test_relu1_has_no_gradient_where_it_clips():
    inside = (Z > 0) & (Z < 1)
    gate = jax.jit(relu1_gate)(Z)
    np.testing.assert_array_equal(gate.value, np.clip(Z, 0, 1))
    np.testing.assert_array_equal(gate.open, Z > 0)
    for part in ("value", "open"):
        np.testing.assert_array_equal(slopes(relu1_gate, part=part), inside.astype(np.float32))
    tiny = jax.jit(functools.partial(relu1_gate, threshold=0.01))(Z)
    np.testing.assert_array_equal(tiny.value[3:5], np.float32([0.0, 0.4]))


def test_straight_through_is_hard_forward_and_a_sigmoid_backward():
    gate = jax.jit(ste_gate)(Z)
    np.testing.assert_array_equal(gate.value, Z > 0)
    np.testing.assert_allclose(slopes(ste_gate), sigmoid(Z) * sigmoid(-Z), rtol=1e-5)


def test_gumbel_gates_open_as_often_as_their_probability():
    noise = np.random.default_rng(1).logistic(size=(20_000, 2)).astype(np.float32)
    z = np.broadcast_to(np.float32([0.5, -1.0]), noise.shape)
    opened = np.asarray(jax.jit(gumbel_gate)(z, noise).open)
    np.testing.assert_allclose(opened.mean(0), sigmoid(np.array([0.5, -1.0])), atol=0.02)
    np.testing.assert_array_equal(jax.jit(gumbel_gate)(Z).open, Z > 0)


def test_hard_concrete_gates_are_exactly_zero_as_often_as_their_probability():
    noise = np.random.default_rng(2).logistic(size=20_000).astype(np.float32)
    gate = jax.jit(hard_concrete_gate)(np.full(20_000, 0.3, np.float32), noise)
    value = np.asarray(gate.value)
    assert value.min() == 0
    assert value.max() == 1
    chance = sigmoid(np.array(0.3 - 2 / 3 * np.log(0.1 / 1.1)))
    np.testing.assert_allclose((value > 0).mean(), chance, atol=0.02)
    np.testing.assert_array_equal(gate.open, value > 0)
    one = np.float32([0.3])
    np.testing.assert_allclose(slopes(hard_concrete_gate, one, "open"), [chance * (1 - chance)], rtol=1e-4)


def test_gates_are_wide_whatever_the_logits_and_nan_shows():
    for kind in ("relu1", "ste", "gumbel", "hard_concrete"):
        gate = gate_of(kind)(jnp.array([0.5, jnp.nan], jnp.bfloat16))
        assert gate.value.dtype == gate.open.dtype == jnp.float32
        assert np.isnan(gate.value[1])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gate_of("sigmoid"), "kind='sigmoid' is not one of"),
        (lambda: gate_of("ste", threshold=0.1), "threshold=0.1 is of kind='relu1'"),
        (lambda: gate_of("relu1", temperature=1.0), "temperature=1.0 is of 'gumbel'"),
        (lambda: relu1_gate(Z, threshold=1.0), "threshold=1.0 must be a number in [0, 1)"),
        (lambda: gumbel_gate(Z, Z[:2]), "noise has shape (2,); expected (8,)"),
        (lambda: hard_concrete_gate(Z, stretch=(0.0, 1.1)), "stretch[0]=0.0"),
        (lambda: SalienceGate(kind="relu1", scale="abs").apply({}, IMAGES, False), "whose values are scales"),
        (lambda: ConstantGate(value=1.5).apply({}, IMAGES, False), "value=1.5 must be a number in [0, 1]"),
        (lambda: SkipNetGate(form="III").apply({}, IMAGES, False), "form='III' is not one of"),
        (lambda: mac_fraction([]), "hold no gate"),
        (lambda: mac_target_loss(BLOCKS, -0.1), "target=-0.1"),
        (lambda: open_rate_loss(BLOCKS[1:2], 0.5), "blocks hold no layer gate"),
        (lambda: open_rate_loss(BLOCKS, [0.5, 0.5, 0.5]), "targets hold 3 numbers for 2 gated layers"),
        (lambda: open_rate_loss(BLOCKS, 1.5), "targets[0]=1.5"),
        (lambda: gate_statistics(np.ones((0, 3), np.float32)), "there is nothing to count"),
        (lambda: gate_target(0, 10, 0.5, warm_up=0.8, anneal=0.5), "anneal=0.5"),
        (lambda: break_even(0, 1, device="cpu", batch=1), "macs=0"),
        (lambda: break_even(1, 1, device="npu", batch=1), "device='npu' is not one of"),
        (lambda: grouped_mlp(X, GATES, (W1, B1), W2, executor="all"), "executor='all' is not one of"),
        (lambda: grouped_mlp(X, GATES[:, :2], (W1[:, :9], B1[:9]), W2[:9]), "do not divide the 9 hidden units"),
        (lambda: grouped_mlp(X, GATES[:2], (W1, B1), W2), "gates have shape (2, 3); expected (5, 3)"),
        (lambda: open_channels(lambda p, x: x, W1, 1, X, GATES[0]), "open_channels takes one example"),
        (lambda: open_channels(lambda p, x: x, W1, None, X[:1], GATES[0]), "axes name no gated channel"),
        (lambda: PatternServer(None, None, [(True, False)]), "the last one all open"),
        (lambda: block_drop_reward(GATES, np.ones(4, bool)), "correct has shape (4,); expected (5,)"),
        (lambda: block_drop_curriculum(0, 5, 0), "blocks=0 must be an integer in [1"),
        (lambda: skipnet_loss(GATES, GATES[:, :2], X[:, 0]), "actions have shape (5, 2); expected (5, 3)"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        call()
    assert "\n" not in str(error.value)


# Networks of gates

IMAGES = RNG.uniform(size=(4, 6, 6, 2)).astype(np.float32)


def test_a_salience_gate_reads_the_mean_of_the_image():
    kernel, bias = np.float32([[2.0, -1.0], [0.5, 1.0]]), np.float32([-1.2, 0.1])
    params = {"dense": {"kernel": kernel, "bias": bias}}
    z = IMAGES.mean((1, 2)) @ kernel + bias
    gate = SalienceGate(2, kind="relu1").apply({"params": params}, IMAGES, False)
    np.testing.assert_allclose(gate.value, np.clip(z, 0, 1), rtol=1e-5, atol=1e-6)
    scaled = SalienceGate(2, scale="abs").apply({"params": params}, IMAGES, False)
    np.testing.assert_allclose(scaled.value, (z > 0) * np.clip(np.abs(z), 0, 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(scaled.open, z > 0)
    head = {**params, "scale": {"kernel": kernel, "bias": bias}}
    scaled = SalienceGate(2, scale="head").apply({"params": head}, IMAGES, False)
    np.testing.assert_allclose(scaled.value, (z > 0) * sigmoid(z), rtol=1e-4, atol=1e-6)


def test_one_channel_and_small_maps():
    tiny = np.ones((1, 1, 1, 1), np.float32)
    for make in (SalienceGate, AIGGate, SkipNetGate):
        shape = jax.eval_shape(lambda x, make=make: make().init_with_output(jax.random.key(0), x, False)[0], tiny)
        assert shape.value.shape == (1, 1)
    assert jax.eval_shape(lambda x: PolicyNet(3).init_with_output(jax.random.key(0), x)[0], tiny).shape == (1, 3)


def test_the_cost_of_gates_is_that_of_their_products():
    from effjax.core.macs import count_macs

    for make in (SalienceGate(3, scale="head"), AIGGate(3), SkipNetGate(3), SkipNetGate(3, form="II")):
        shapes = jax.eval_shape(lambda make=make: make.init(jax.random.key(0), IMAGES[:1], False))
        counted = count_macs(lambda v, x, make=make: make.apply(v, x, False), shapes, IMAGES[:1]).most
        assert make.macs(6, 6, 2) == counted


# Work and losses

OPEN = np.float32([[1, 0], [1, 1], [0, 0], [1, 0]])
CHANNEL = np.float32([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]])
BLOCKS = [
    BlockGates(Gate(OPEN[:, 0], OPEN[:, 0]), Gate(CHANNEL, CHANNEL), BlockMacs(10.0, 2.0, 6, 5.0, 1.0)),
    BlockGates(None, Gate(CHANNEL, CHANNEL), BlockMacs(0.0, 1.0, 3, 0.0, 0.0)),
    BlockGates(Gate(OPEN[:, 1], OPEN[:, 1]), None, BlockMacs(100.0, 0.0, 1, 0.0, 2.0)),
]


def test_work_by_hand():
    each = 6 + OPEN[:, 0] * (10 + 4 * CHANNEL.sum(1)) + CHANNEL.sum(1) + 2 + 100 * OPEN[:, 1]
    np.testing.assert_allclose(jax.jit(example_macs)(BLOCKS), each)
    assert static_macs(BLOCKS) == 10 + 12 + 5 + 3 + 100
    fraction = (each.mean() + 20) / 150
    np.testing.assert_allclose(mac_fraction(BLOCKS, rest=20.0), fraction, rtol=1e-6)
    loss = lambda target: mac_target_loss(BLOCKS, target, weight=3.0, rest=20.0)
    np.testing.assert_allclose([loss(0.1), loss(0.9)], [3 * (fraction - 0.1) ** 2, 0], rtol=1e-5)
    mask = np.array([True, False, True, False])
    np.testing.assert_allclose(mac_fraction(BLOCKS, mask=mask), each[mask].mean() / 130, rtol=1e-6)


def test_the_penalty_closes_gates_and_spares_those_below_the_target():
    macs = BlockMacs(once=1.0)

    def loss(z, target):
        return mac_target_loss([BlockGates(ste_gate(z), None, macs)], target)

    z = np.float32([1.0, 2.0, -1.0, 0.5])
    run = jax.jit(jax.grad(loss))
    assert (np.asarray(run(z, 0.5)) > 0).all()  # descending the gradient lowers every logit
    np.testing.assert_array_equal(run(z, 0.75), 0)


def test_open_rates_and_statistics():
    wanted = 2 * np.mean([(0.75 - 0.7) ** 2, (0.25 - 0.7) ** 2])
    np.testing.assert_allclose(open_rate_loss(BLOCKS, 0.7), wanted, rtol=1e-5)
    found = gate_statistics(BLOCKS)
    assert (found["open"], found["patterns"]) == (0.5, 3)
    assert found["variance"] == pytest.approx(np.mean([0.75 * 0.25, 0.25 * 0.75]))


def test_the_target_falls_after_the_warm_up():
    steps = jax.jit(jax.vmap(lambda step: gate_target(step, 100, 0.4, warm_up=0.2, anneal=0.5)))(np.arange(100))
    np.testing.assert_allclose(steps[:21], 1.0)
    np.testing.assert_allclose(steps[45], 0.7, rtol=1e-5)
    np.testing.assert_allclose(steps[70:], 0.4, rtol=1e-5)


# Channel groups

X = RNG.normal(size=(5, 4)).astype(np.float32)
W1, B1 = RNG.normal(size=(4, 12)).astype(np.float32), RNG.normal(size=12).astype(np.float32)
W2 = RNG.normal(size=(12, 2)).astype(np.float32)
GATES = np.float32([[1, 0, 0.5], [0, 0, 0], [1, 1, 1], [0, 0.25, 0], [0, 0, 0.1]])


@pytest.mark.parametrize("executor", ["masked", "ragged", "ladder"])
def test_grouped_mlp_equals_the_masked_products(executor):
    run = jax.jit(functools.partial(grouped_mlp, executor=executor))
    places = np.stack([X, 2 * X, -X], 1)
    for x in (X, places):
        h = np.maximum(x @ W1 + B1, 0)
        gates = np.repeat(GATES, 4, axis=1)
        wanted = (h * (gates if x.ndim == 2 else gates[:, None])) @ W2
        np.testing.assert_allclose(run(x, GATES, (W1, B1), W2), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(run(X, 0 * GATES, (W1, B1), W2), 0)


def test_open_channels_of_one_image():
    conv = lambda x, kernel: jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    params = {
        "conv1": RNG.normal(size=(3, 3, 2, 6)).astype(np.float32),
        "bias": RNG.normal(size=6).astype(np.float32),
        "conv2": RNG.normal(size=(3, 3, 6, 2)).astype(np.float32),
        "last": RNG.normal(size=2).astype(np.float32),
    }
    axes = {"conv1": -1, "bias": 0, "conv2": 2, "last": None, "gate": 0}

    def branch(params, x):
        h = jax.nn.relu(conv(x, params["conv1"]) + params["bias"][None, None, None])
        return conv(h * params["gate"][None, None, None], params["conv2"]) + params["last"][None, None, None]

    def run(gates):
        held = {**params, "gate": jnp.repeat(gates, 2)}
        return open_channels(branch, held, axes, IMAGES[:1], gates), branch(held, IMAGES[:1])

    run = jax.jit(run)
    for gates in ((0, 0, 0), (0, 0.5, 0), (1, 0, 0.25), (1, 1, 1)):
        np.testing.assert_allclose(*run(np.float32(gates)), rtol=1e-4, atol=1e-4)


# Policies


def test_requests_are_sorted_by_pattern_and_come_back_in_order():
    patterns = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1]], bool)
    network = lambda w, x, pattern: x * sum(w[place] for place, is_open in enumerate(pattern) if is_open)
    policy = lambda gates, x: jnp.take(gates, x[:, 0].astype(int), axis=0)
    gates = np.float32([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    serve = PatternServer(network, policy, patterns, sizes=(2, 4))
    x = RNG.integers(0, 4, (11, 1)).astype(np.float32)
    weights = np.float32([1, 10, 100])
    depth = np.array([1, 11, 111, 1])[x[:, 0].astype(int)]
    np.testing.assert_allclose(serve(weights, gates, x), x * depth[:, None])
    programs = serve.compiles
    np.testing.assert_allclose(serve(weights, gates, x[::-1]), (x * depth[:, None])[::-1])
    assert serve.compiles == programs
    assert serve(weights, gates, x[:1]).shape == (1, 1)
    with pytest.raises(ValueError, match="rows=0 must be an integer"):
        serve(weights, gates, x[:0])
    np.testing.assert_array_equal(nearest_patterns(gates, patterns), [0, 1, 2, 0])


def test_policy_gradients_by_hand():
    z = RNG.normal(size=(3, 2)).astype(np.float32)
    actions, reward = np.float32([[1, 0], [1, 1], [0, 0]]), np.float32([1.0, -5.0, 0.5])
    baseline = np.float32([0.5, 0.5, 0.5])
    grads = jax.jit(jax.grad(block_drop_loss))(z, actions, reward, baseline)
    np.testing.assert_allclose(grads, -(reward - baseline)[:, None] * (actions - sigmoid(z)) / 3, rtol=1e-4)
    losses = np.float32([0.1, 2.0, 0.3])
    saved = 0.05 * (1 - actions)
    later = np.stack([saved.sum(1), saved[:, 1]], 1) - losses[:, None]
    grads = jax.jit(jax.grad(skipnet_loss))(z, actions, losses)
    np.testing.assert_allclose(grads, -later * (actions - sigmoid(z)) / 3, rtol=1e-4, atol=1e-7)
    grads = jax.jit(jax.grad(distil_policy_loss))(z, actions)
    np.testing.assert_allclose(grads, (sigmoid(z) - actions) / 6, rtol=1e-4, atol=1e-7)
    right = np.array([True, False, True])
    np.testing.assert_allclose(block_drop_reward(actions, right, penalty=5.0), [0.75, -5, 1])
    free = np.array([False, True])
    grads = jax.jit(jax.grad(lambda z: block_drop_loss(z, actions, reward, baseline, free=free)))(z)
    np.testing.assert_allclose(grads[:, 1], -(reward - baseline) * (actions - sigmoid(z))[:, 1] / 3, rtol=1e-4)
    assert not np.asarray(grads[:, 0]).any()


def test_blockdrop_s_policy_decides_about_the_last_blocks_first():
    found = np.stack([jax.jit(block_drop_curriculum, static_argnums=(1, 2))(t, 8, 4) for t in range(9)])
    assert found.sum(1).tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 4]
    assert (np.diff(found.astype(int), axis=1) >= 0).all()  # once free, all after it are
    assert block_drop_curriculum(0, 0, 3).all()


# The estimate


def test_break_even_by_hand():
    device = Device(flops_per_s=1e9, bytes_per_s=1e6, step_s=0.4)
    # 2 s of products; 0.2 s of streaming, 0.4 of moving and 0.2 of copying activations; 0.1 s of deciding.
    found = break_even(1e9, 1e5, device=device, batch=4)
    assert found == pytest.approx((2.0, 0.2, 0.0, 0.4, 0.2, 0.1))
    assert found.block_s == 2.0
    assert found.rate == pytest.approx(1.7 / 2.4)
    assert found.ratio(found.rate) == pytest.approx(1.0)
    assert found.ratio(0.0) == pytest.approx(0.15)
    assert "skipping pays below 71% open" in str(found)
    heavy = break_even(1e9, 1e5, device=device, batch=4, weight_bytes=6e6)  # 1.5 s of weights, whoever is skipped
    assert heavy.ratio(0.5) == pytest.approx((0.1 + 1.5 + 0.2 + 0.2 + 0.1) / 2)
    assert heavy.rate == pytest.approx(0.2 / 0.6)
    never = break_even(1.0, 1e5, device=device, batch=1)
    assert never.rate == 0
    assert "never pays" in str(never)
    assert set(DEVICES) == {"cpu", "gpu", "tpu"}
