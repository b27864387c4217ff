# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Knowing what is hard
#
# Takes about 1 minute on two CPU cores.
#
# A small network is right on most inputs and wrong on some. Four ways to live with that: let it abstain, with a
# guarantee; put a bigger network behind it and ask only where that pays; let it learn from the bigger one what it can
# learn; and train it under constraints on its predictions. All on Fashion-MNIST, on two CPU cores.

# %%
import glob
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("effjax") is None:  # a wheel beside this notebook, or the clone that it belongs to
    place = next(iter(sorted(glob.glob("effjax-*.whl"))), "..")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"{place}[notebooks]"], check=True)

# %%
import functools
import os
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import effjax
from effjax import hardness

SMOKE = bool(os.environ.get("EFFJAX_SMOKE"))
jax.config.update("jax_disable_most_optimizations", SMOKE)  # a smoke run does little but compile
EPOCHS = 1 if SMOKE else 10
print(jax.devices())

# %% [markdown]
# ## 1. A small network and a big one
# Of the training images, 7,000 train both networks. 2,500 are kept for the router of section 3, and 2,500 for
# thresholds: what decides where to trust a network must be data that it has not been fitted on.

# %%
data = effjax.load_data("fashion_mnist")
images = {name: jnp.asarray(rows["image"], jnp.float32).reshape(-1, 784) / 255 for name, rows in data.splits.items()}
labels = {name: jnp.asarray(rows["label"]) for name, rows in data.splits.items()}
parts = {name: slice(*ends) for name, ends in {"fit": (0, 7000), "route": (7000, 9500), "hold": (9500, 12000)}.items()}
x = {name: images["train"][part] for name, part in parts.items()} | {"test": images["test"]}
y = {name: labels["train"][part] for name, part in parts.items()} | {"test": labels["test"]}

small = effjax.models.MLP((8,), classes=10)
big = effjax.models.MLP((1024, 1024), classes=10)


def train(model, loss, *columns, epochs=EPOCHS, seed=0, learning_rate=2e-3):
    """Parameters after some epochs of Adam on ``loss(logits, *columns)``."""
    params = model.init(jax.random.key(seed), x["fit"][:1])
    tx = optax.adam(learning_rate)

    @jax.jit
    def step(params, state, inputs, *batch):
        grads = jax.grad(lambda params: loss(model.apply(params, inputs), *batch))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, rng = tx.init(params), np.random.default_rng(seed)
    for _ in range(epochs):
        for rows in rng.permutation(len(x["fit"]))[: len(x["fit"]) // 100 * 100].reshape(-1, 100):
            params, state = step(params, state, x["fit"][rows], *(column[rows] for column in columns))
    return params


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


params = {name: train(model, cross_entropy, y["fit"]) for name, model in (("small", small), ("big", big))}
logits = {
    (name, part): jax.jit(model.apply)(params[name], x[part])
    for name, model in (("small", small), ("big", big))
    for part in ("fit", "hold", "test")
}
for name in ("small", "big"):
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params[name]))
    accuracy = (logits[name, "test"].argmax(1) == y["test"]).mean()
    print(f"{name:6} {numbers:>9,} parameters, test accuracy {accuracy:.3f}")

# %% [markdown]
# ## 2. Abstain, with a guarantee
# `effjax.selective` takes logits of held-out images and a target: here that at most 10 % of the answers be wrong. It
# finds the lowest threshold of confidence for which the held-out images certify this: if the error rate at a threshold
# were above the target, so few errors would be seen with probability `delta` at most. No training is involved, and any
# network's logits will do. On new images the promise holds with probability 95 %; the coverage is what it costs.

# %%
rule = effjax.selective(logits["small", "hold"], y["hold"], selective_risk=0.1)
print(rule)
answers = rule.predict(logits["small", "test"])  # -1 where it abstains
print("first answers:", answers[:12])
found = rule.measure(logits["small", "test"], y["test"])
print(f"on the test images: coverage {found.coverage:.3f}, wrong among the answers {found.selective_risk:.3f}")
print("held-out images needed to certify 1 %, if none of them is wrong:", hardness.calibration_examples(0.01))

# %% [markdown]
# What a network trades is its risk-coverage curve, and the area under it (AURC) says how well its confidence ranks its
# answers. A loss can help: one-sided prediction (`osp_loss`) trains every class's score as a decision of its own, where
# a false answer costs `mu` times a missed one.

# %%
params["osp"] = train(small, lambda logits, labels: hardness.osp_loss(logits, labels, 30.0), y["fit"])
logits["osp", "test"] = jax.jit(small.apply)(params["osp"], x["test"])
for name, label in (("small", "cross-entropy"), ("osp", "one-sided prediction"), ("big", "the big network")):
    confidence = hardness.confidence_score(logits[name, "test"], "log_odds")
    wrong, _ = hardness.prediction_errors(logits[name, "test"], y["test"], "log_odds")
    curve = hardness.risk_coverage_curve(confidence, wrong)
    plt.plot(curve.coverage, curve.selective_risk, label=f"{label}: AURC {hardness.aurc(confidence, wrong):.4f}")
plt.axhline(0.1, color="grey", linewidth=0.8, label="10 % wrong answers")
plt.xlabel("coverage: share of the images that are answered")
plt.ylabel("selective risk: share of wrong answers")
plt.legend()
plt.show()

# %% [markdown]
# ## 3. Ask the big network, where it pays
# Abstaining is not the end where something better is at hand. A router learns where the small network is wrong **and**
# the big one right: asking about an image that both get wrong buys nothing. Its rivals are rules on the small network's
# own confidence; the margin of the two largest logits is the strongest of them.


# %%
def base(params, inputs, *, key=None):
    return small.apply(params, inputs), inputs  # logits, and what the router may read besides


def expert(params, inputs, *, key=None):
    return big.apply(params, inputs)


networks = hardness.HybridNetworks(base, expert)
hybrid = effjax.hybrid(
    jax.random.key(0),
    networks,
    (params["small"], params["big"]),
    x["route"],
    y["route"],
    calibration=(x["hold"], y["hold"]),
    config=hardness.HybridConfig(coverage=0.8, epochs=2 if SMOKE else 20),
)
print("threshold for a coverage of 80 %:", hybrid.threshold)

# %%
stages, served = hardness.hybrid_stages(networks, hybrid.state)
need = {rule: hardness.confidence_need(logits["small", "test"], rule) for rule in ("margin", "entropy")}
need_of = hardness.router_need(networks.router)
need["router"] = need_of(hybrid.state.params.router, logits["small", "test"], x["test"])
right = {name: logits[name, "test"].argmax(1) == y["test"] for name in ("small", "big")}
coverages = np.linspace(0, 1, 21)
for name, score in need.items():
    curve = hardness.hybrid_curve(score, right["small"], right["big"], coverages)
    plt.plot(1 - coverages, curve.accuracy, label=name)
best = hardness.query_oracle(*(logits[name, "test"].argmax(1) for name in ("small", "big")), y["test"])
plt.axhline((right["small"] | best).mean(), color="grey", linewidth=0.8, label="an oracle")
plt.xlabel("share of the images about which the big network is asked")
plt.ylabel("test accuracy")
plt.legend()
plt.show()

# %% [markdown]
# A mask over all rows would run the big network for everything and save nothing. A dispatcher runs it on the rows that
# ask: `HostDispatch` reads one number, how many there are, and starts the program of the next larger bucket. Its
# answers are those of the masked program.

# %%
serve = hardness.HostDispatch(stages, buckets=(16, 32, 64, 128))
always = jax.jit(big.apply)
batches = list(x["test"][:3000].reshape(6, 500, -1))


def images_per_second(run):
    run(batches[0])  # compiles
    start = time.perf_counter()
    done = [jax.block_until_ready(run(batch)) for batch in batches for _ in range(1 if SMOKE else 5)]
    return sum(len(batch) for batch in batches) * len(done) / len(batches) / (time.perf_counter() - start)


found = [serve(served, batch) for batch in batches]
asked = np.mean([np.asarray(one.answered) > 0 for one in found])
accuracy = (np.concatenate([np.asarray(one.outputs) for one in found]).argmax(1) == np.asarray(y["test"][:3000])).mean()
print(f"asked about {asked:.1%} of the images; accuracy {accuracy:.3f}; programs run: {dict(serve.launches)}")
print(f"dispatched  {images_per_second(lambda batch: serve(served, batch).outputs):>10,.0f} images/s")
print(f"always big  {images_per_second(functools.partial(always, params['big'])):>10,.0f} images/s")

# %% [markdown]
# ## 4. Learn from the big network what can be learnt
# Distillation has the small network copy the big one everywhere, also where it is too small to follow. DiSK lets a
# guide lift the student's probabilities on hard images while it trains, within a budget, so that these hardly move it;
# the guide is gone afterwards. Here the guide of every batch is solved for in closed form (`best_guide`); `effjax.disk`
# trains one on the teacher's features. On so small a student the labels' noise from seed to seed is large: the study
# (`effjax compare disk`) takes eight.

# %%
teacher = logits["big", "fit"]


def kd(logits, teacher, labels):
    return hardness.kd_loss(logits, teacher, temperature=2.0).mean() + 0.1 * cross_entropy(logits, labels)


def disk(logits, teacher, labels):
    top = hardness.top_logits(teacher, labels, k=3)
    guide, _ = hardness.best_guide(jax.lax.stop_gradient(logits), top, labels, budget=0.3)
    return hardness.disk_loss(logits, top, labels, guide).mean()


for name, loss in (("distillation", kd), ("DiSK, guide in closed form", disk)):
    student = train(small, loss, teacher, y["fit"])
    print(f"{name:28} {(small.apply(student, x['test']).argmax(1) == y['test']).mean():.3f}")
print(f"{'labels alone':28} {right['small'].mean():.3f}")

# %% [markdown]
# ## 5. Constraints in place of penalty weights
# Under 30 % wrong labels a network learns the noise. "Predictions on an image and on a noisy copy differ by at most
# 0.05 nat" is a level that one can name; `effjax.dcl` finds the weight of the penalty that keeps it, in the optimizer's
# state, while the network trains.

# %%
rng = np.random.default_rng(0)
noisy = jnp.where(rng.random(7000) < 0.3, rng.integers(0, 10, 7000), y["fit"])
config = effjax.optim.DclConfig({"consistency": effjax.optim.Constraint("<=", 0.05)})
wide = effjax.models.MLP((256,), classes=10)


def constrained(tx, objective, epochs=EPOCHS):
    """Test accuracy and the last state of the optimizer."""
    params = wide.init(jax.random.key(0), x["fit"][:1])
    state = tx.init(params)

    @jax.jit
    def step(params, state, key, inputs, labels):
        other = inputs + 0.3 * jax.random.normal(key, inputs.shape)

        def loss(params):
            clean, seen = wide.apply(params, inputs), wide.apply(params, other)
            values = {"consistency": effjax.optim.consistency_kl(clean, seen)}
            return objective(state, cross_entropy(clean, labels), values), values

        grads, values = jax.grad(loss, has_aux=True)(params)
        updates, state_ = tx.update(grads, state, params, values=values)
        return optax.apply_updates(params, updates), state_

    for epoch in range(epochs):
        for rows in np.random.default_rng(epoch).permutation(7000).reshape(-1, 100):
            key = jax.random.key(int(rows[0]) + 7000 * epoch)
            params, state = step(params, state, key, x["fit"][rows], noisy[rows])
    return (wide.apply(params, x["test"]).argmax(1) == y["test"]).mean(), state


plain, _ = constrained(optax.with_extra_args_support(optax.adam(2e-3)), lambda state, loss, values: loss)
tx = optax.chain(effjax.dcl(config), optax.adam(2e-3))
bound = functools.partial(effjax.optim.dcl_lagrangian, config=config)
kept, state = constrained(tx, lambda state, loss, values: bound(state, loss, values))
weight = float(optax.tree.get(state, "multipliers")["consistency"])
print(f"noisy labels, cross-entropy: {plain:.3f}; consistent within 0.05 nat: {kept:.3f}; weight found: {weight:.2f}")

# %% [markdown]
# Where next: `effjax compare selective`, `hybrid`, `disk` and `dcl` train every arm of these studies and write a table
# and a plot; with `--data` they take your own files.
