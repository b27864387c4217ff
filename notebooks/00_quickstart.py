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
# # Quickstart: SAMUEL in an Optax chain
#
# Takes about 2 minutes on two CPU cores.
#
# A stream of real images changes three times without notice. A cosine schedule has by then lowered its rate for good;
# SAMUEL keeps five learning rates alive and follows whichever pays now.

# %%
import glob
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("effjax") is None:  # a wheel beside this notebook, or the clone that it belongs to
    place = next(iter(sorted(glob.glob("effjax-*.whl"))), "..")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"{place}[notebooks]"], check=True)

# %%
import os
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from IPython.display import display

import effjax

STEPS = 240 if os.environ.get("EFFJAX_SMOKE") else 1200
print(jax.devices())

# %% [markdown]
# ## Real data that drift
# Fashion-MNIST travels with effjax. In each quarter of the run the pixels are shuffled by another permutation, so the
# network has to learn anew.

# %%
data = effjax.load_data("fashion_mnist")
images = data.splits["train"]["image"].reshape(-1, 784).astype(np.float32) / 255 - 0.29
labels = data.splits["train"]["label"]
print(data.source)

permutations = [np.arange(784), *(np.random.default_rng(i).permutation(784) for i in range(1, 4))]
rows = np.random.default_rng(0).integers(0, len(labels), size=(STEPS, 64))


def batch(step):
    order = permutations[4 * step // STEPS]
    return {"x": images[rows[step]][:, order], "y": labels[rows[step]]}


# %% [markdown]
# ## A network and its loss
# Plain functions on a pytree: nothing here knows about SAMUEL.


# %%
def init(key, sizes=(784, 64, 10)):
    keys = jax.random.split(key, len(sizes) - 1)
    return [jax.random.normal(k, (i, o)) * (2 / i) ** 0.5 for k, i, o in zip(keys, sizes[:-1], sizes[1:], strict=True)]


def loss(params, batch):
    hidden = jax.nn.relu(batch["x"] @ params[0])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params[1], batch["y"]).mean()


# %% [markdown]
# ## One run with a cosine schedule


# %%
def chain(rate):
    return optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate, momentum=0.9))


def train(tx, params):
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for i in range(STEPS):
        params, state, value = step(params, state, batch(i))
        losses.append(value)
    return np.array(losses)


cosine = train(chain(optax.cosine_decay_schedule(0.3, STEPS)), init(jax.random.key(0)))

# %% [markdown]
# ## SAMUEL over the same chain
# `chain` becomes the base: a function of the learning rate. Parameters get a leading expert axis, the update takes the
# experts' losses as `value`, and `samuel_sync` follows `apply_updates`.

# %%
RATES = (1.0, 0.1, 0.01, 0.001, 0.0001)
tx = effjax.samuel(chain, RATES, period=STEPS // 16, total_steps=STEPS)
losses_and_grads = effjax.optim.samuel_value_and_grad(loss, loop="vmap")


@jax.jit
def step(params, state, batch):
    losses, grads = losses_and_grads(params, batch)
    updates, state = tx.update(grads, state, params, value=losses)
    params = effjax.optim.samuel_sync(state, optax.apply_updates(params, updates))
    return params, state, (losses[state.current_expert], effjax.optim.samuel_probabilities(state))


params = effjax.optim.samuel_init(init(jax.random.key(0)), experts=len(RATES))
state = tx.init(params)
records = []
for i in range(STEPS):
    params, state, record = step(params, state, batch(i))
    records.append(record)
samuel_loss, probabilities = (np.array(column) for column in zip(*records, strict=True))

# %%
smooth = lambda x: np.convolve(x, np.ones(20) / 20, mode="valid")
figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 7), sharex=True)
top.plot(smooth(cosine), label=f"cosine from 0.3, mean {cosine.mean():.3f}", color="#7f8c8d")
top.plot(smooth(samuel_loss), label=f"SAMUEL, mean {samuel_loss.mean():.3f}", color="#c0392b")
top.set_ylabel("loss before each update")
top.set_yscale("log")
top.legend()
bottom.stackplot(range(STEPS), probabilities.T, labels=[f"rate {rate:g}" for rate in RATES])
bottom.set_ylabel("expert probability")
bottom.set_xlabel("step")
bottom.legend(loc="center right")
plt.show()

# %% [markdown]
# ## One copy of the parameters, in an NNX loop
# With memory for one network only, `samuel_one_gradient` scores candidate rates by forward passes.
# `nnx.Optimizer.update` forwards the loss.

# %%
model = nnx.Sequential(nnx.Linear(784, 64, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(64, 10, rngs=nnx.Rngs(1)))
optimizer = nnx.Optimizer(
    model, effjax.optim.samuel_one_gradient(optax.adam, (1e-2, 3e-3, 1e-3), every=10), wrt=nnx.Param
)


@nnx.jit
def nnx_step(model, optimizer, batch):
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    def loss_of(parameters):
        logits = nnx.merge(graph, parameters, rest)(batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    value, grads = jax.value_and_grad(loss_of)(parameters)
    optimizer.update(model, grads, value_fn=loss_of)
    return value


for i in range(STEPS // 4):
    value = nnx_step(model, optimizer, batch(i))
print(f"loss {value:.3f} at rate {optax.tree.get(optimizer.opt_state, 'learning_rate')[...]:g}")

# %% [markdown]
# ## The whole comparison
# `effjax compare samuel:smoke` runs SAMUEL against grids, schedules and tuning-free optimizers, measures what each
# costs, and says which claims hold.

# %% [markdown]
# ## On your own model and data
# A task takes a Linen, NNX or Equinox module and arrays; an arm is an Optax optimizer, or a function of the number of
# steps for schedules. The table and the plot below come from the same code as every study: several seeds, measured
# seconds and memory, and at the end what to take. Run the cell again and it continues where it was.


# %%
class Mine(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.out = nnx.Linear(784, 32, rngs=rngs), nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


own = {
    split: {"x": rows["image"][:2000].reshape(-1, 784).astype(np.float32) / 255 - 0.29, "label": rows["label"][:2000]}
    for split, rows in data.splits.items()
}
task = effjax.task(Mine, own, loss="cross_entropy", name="mine")
found = effjax.compare(
    task=task,
    arms={
        "sgd": optax.sgd(0.1, momentum=0.9),
        "cosine": lambda steps: optax.sgd(optax.cosine_decay_schedule(0.3, steps), momentum=0.9),
        "adam": optax.adam(1e-3),
    },
    budget=STEPS // 4,
    seeds=(0, 1),
    out=tempfile.mkdtemp(),
    quiet=True,
)
display(found)
