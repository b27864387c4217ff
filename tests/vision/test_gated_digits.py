"""The table of digits in the specification of dynamic inference: what scales and target rates do to gates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.data.sets import load
from effjax.models.resnet import ResNet
from effjax.vision import GatedBasicBlock, SalienceGate, gate_statistics, mac_fraction, recorded_gates


def trained_on_digits(scale, penalty, steps=300):
    """Six blocks of 16 channels with L-Net and C-Net on 8 x 8 digits: test accuracy, share of the work, patterns."""
    rows = {name: (np.float32(s["image"]) / 16, np.int32(s["label"])) for name, s in load("digits").splits.items()}
    (x, y), (x_test, y_test) = rows["train"], rows["test"]
    gate = functools.partial(SalienceGate, kind="ste", scale=scale, bias=1.0)
    model = ResNet(stages=(6,), widths=(16,), block=functools.partial(GatedBasicBlock, layer=gate, channel=gate))
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def loss(params, stats, x, y, t):
        variables = {"params": params, "batch_stats": stats}
        logits, changed = model.apply(variables, x, train=True, mutable=["batch_stats", "intermediates"])
        fit = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return fit + jnp.where(t < steps // 3, 0, penalty(recorded_gates(changed))), changed["batch_stats"]

    @jax.jit
    def step(params, stats, opt, x, y, t):
        grads, stats = jax.grad(loss, has_aux=True)(params, stats, x, y, t)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), stats, opt

    variables = jax.jit(model.init)(jax.random.key(0), x[:1])
    params, stats, opt = variables["params"], variables["batch_stats"], tx.init(variables["params"])
    rng = np.random.default_rng(0)
    for t in range(steps):
        chosen = rng.integers(len(y), size=128)
        params, stats, opt = step(params, stats, opt, x[chosen], y[chosen], np.int32(t))
    held = {"params": params, "batch_stats": stats}
    logits, changed = jax.jit(lambda v, x: model.apply(v, x, mutable=["intermediates"]))(held, x_test)
    gates = recorded_gates(changed)
    accuracy = (np.asarray(logits).argmax(1) == y_test).mean()
    return accuracy, float(mac_fraction(gates)), gate_statistics(gates)["patterns"]


def both_rates(gates):
    """4 max(0, open - 0.5)^2, of layers and of channels."""
    means = [jnp.stack([jnp.mean(one[place].open) for one in gates]).mean() for place in (0, 1)]
    return sum(4 * jnp.maximum(0, mean - 0.5) ** 2 for mean in means)


@pytest.mark.nightly
@pytest.mark.optimized  # it runs longer than it compiles
def test_the_table_of_digits():
    """Of the method file: a scale keeps the accuracy, and without one the patterns depend on the digit."""
    accuracy, work, _ = trained_on_digits("abs", both_rates)
    assert accuracy >= 0.97
    assert work <= 0.65
    _, work, patterns = trained_on_digits("none", both_rates)
    assert patterns >= 8
    assert work <= 0.45
