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
# # Recurrent networks: long sequences, little memory
#
# Takes about 15 minutes on two CPU cores.
#
# Four things, each a few cells: the cells iRNN and TARNN beside LSTMs where the answer lies far back; FPTT, which
# updates in every part of a sequence, beside backpropagation through time, with the memory that each takes; a model
# that learns from a stream and follows its changes; and the same in the code of others (`nn.RNN`, Flax NNX).

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

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import effjax

SMOKE = bool(os.environ.get("EFFJAX_SMOKE"))
jax.config.update("jax_disable_most_optimizations", SMOKE)  # a smoke run does little but compile
print(jax.devices())


def few(table):
    """A smoke run takes two of each kind."""
    return dict(list(table.items())[1:3]) if SMOKE else table


# %% [markdown]
# ## 1. A picture, then noise
# Eight rows of a handwritten digit, one a step, then noise that is fresh in every batch. The class is asked for at the
# end: whatever a cell has not kept over the noise is lost.

# %%
LENGTH = 40 if SMOKE else 200
EPOCHS = 1 if SMOKE else 20
HIDDEN = BATCH = 64

data = effjax.data.sequence_data(f"noisy-digits-{LENGTH}")
print(data.source, data.train["inputs"].shape, "of", data.length, "steps")

layers = few(
    {
        "LSTM": effjax.models.Recurrent(effjax.models.LSTMCell(HIDDEN)),
        "Chrono-LSTM": effjax.models.Recurrent(effjax.models.LSTMCell(HIDDEN, chrono_length=LENGTH)),
        "iRNN, a step size for every time": effjax.recurrent.IncrementalRNN(HIDDEN, length=LENGTH),
        "iRNN, one step size": effjax.recurrent.IncrementalRNN(HIDDEN, eta_mode="shared"),
        "TARNN, a step size for every time": effjax.recurrent.TARNN(HIDDEN, length=LENGTH, variant="euler"),
        "TARNN, step sizes from the input": effjax.recurrent.TARNN(HIDDEN, eta_mode="input", variant="euler"),
    }
)


tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))


@functools.partial(jax.jit, static_argnums=0)
def step(network, params, state, batch):
    def loss(params):
        logits = network.apply(params, batch["inputs"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


@functools.partial(jax.jit, static_argnums=0)
def accuracy(network, params, inputs):
    return (network.apply(params, inputs).argmax(1) == data.test["targets"]).mean()


def train_classifier(network, seed=0):
    """Parameters, and the accuracy on the test pictures after every epoch."""
    params = network.init(jax.random.key(seed), data.test["inputs"][:1])
    state = tx.init(params)
    rng = np.random.default_rng(seed)
    curve = []
    for _ in range(EPOCHS):
        order = rng.permutation(len(data.train["targets"]))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            rows = {name: column[order[start : start + BATCH]] for name, column in data.train.items()}
            params, state = step(network, params, state, data.draw(rows, start, rng))
        curve.append(float(accuracy(network, params, data.test["inputs"])))
    return params, curve


networks = {name: effjax.models.SequenceNetwork(layer, data.outputs) for name, layer in layers.items()}
trained = {name: train_classifier(network) for name, network in networks.items()}

# %%
later = np.roll(data.test["inputs"], LENGTH // 20, axis=1)  # noise from the end comes first: the picture starts later
print(f"{'':38}{'parameters':>10}{'test accuracy':>15}{f'picture {LENGTH // 20} steps later':>26}")
for name, (params, curve) in trained.items():
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    moved = accuracy(networks[name], params, later)
    print(f"{name:38}{size:10,}{curve[-1]:15.3f}{moved:26.3f}")

COLOURS = ("#7f8c8d", "#2c3e50", "#c0392b", "#e5989b", "#2980b9", "#27ae60")
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
for (name, (params, curve)), colour in zip(trained.items(), COLOURS, strict=False):
    left.plot(range(1, EPOCHS + 1), curve, label=name, color=colour, marker=".")
    eta = params["params"]["layer"].get("eta")
    if eta is not None:
        right.plot(np.broadcast_to(eta[..., 0], LENGTH), color=colour)
left.axhline(1 / data.outputs, color="#7f8c8d", linestyle=":", label="chance")
left.set_xlabel("epoch")
left.set_ylabel("test accuracy")
left.set_ylim(0, 1)
left.xaxis.get_major_locator().set_params(integer=True)
right.axvspan(0, 7.5, color="#f6e58d", alpha=0.6)
right.text(9, right.get_ylim()[0], "the picture, then noise", va="bottom")
right.set_xlabel("time step")
right.set_ylabel("learned step size")
figure.legend(loc="outside lower center", ncols=4)
plt.show()

# %% [markdown]
# The curves on the right explain those on the left: with a step size for every time a cell opens while the picture
# passes and closes after it. Such a step size is a positional parameter. It binds the network to one length and one
# place of the signal: the last column moves the picture by a few steps and leaves nothing of the gain. With one step
# size for all times iRNN stays near chance. What needs no position and no new cell is an LSTM whose forget gates start
# as Chrono says; compare with that, and not with the plain LSTM, as the papers do. It was never shown a moved picture
# either, and suffers too, but less.

# %% [markdown]
# ## 2. FPTT beside backpropagation through time
# `fptt_step`, `bptt_step` and `tbptt_step` take one problem, a cell and a loss, and an optimizer. FPTT cuts a sequence
# into parts and updates in each. Only the state goes on to the next part, so that nothing is stored beyond one. The
# task is the adding problem: 200 random numbers, two of them marked, and their sum is asked for at the end.

# %%
STEPS = 200
ROWS = 32

add = effjax.data.sequence_data(f"add-{STEPS}")
cell = effjax.models.LSTMCell(32)
head = nn.Dense(1)
carry = cell.initialize_carry(jax.random.key(0), (ROWS, add.features))


@jax.jit
def init(key):
    weights = cell.init(key, carry, jnp.zeros((ROWS, add.features)))["params"]
    return {**weights, "head": head.init(key, carry[0])["params"]}


def loss(params, last, target, part):
    error = head.apply({"params": params["head"]}, last)[:, 0] - target
    return part.progress * jnp.mean(error**2)  # early parts have seen little: their errors count less


problem = effjax.recurrent.SequenceProblem(
    cell.advance,  # one time step but for the products with the inputs,
    loss,
    encode=cell.project,  # which are computed for all steps of a part at once
    terminal=True,  # one target per sequence
    time_axis=1,
)
base = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(5e-3))
tethered = effjax.fptt(base, alpha=0.02)

# %% [markdown]
# Memory first, for sequences of up to 10,000 steps: what XLA reserves for one training step besides parameters and
# data. Nothing needs to run for that. The rival with the exact gradient is rematerialisation: it stores one state a
# part and computes each part twice.


# %%
def temporary_bytes(make, tx, steps, **settings):
    train = make(problem, tx, **settings)
    params = jax.eval_shape(init, jax.random.key(0))
    xs, target = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((ROWS, steps, add.features), (ROWS,)))
    compiled = jax.jit(train).lower(jax.eval_shape(tx.init, params), params, carry, xs, target).compile()
    return compiled.memory_analysis().temp_size_in_bytes


lengths = (100, 1000) if SMOKE else (100, 1000, 10_000)
ways = few(
    {
        "BPTT": lambda steps: temporary_bytes(effjax.recurrent.bptt_step, base, steps),
        "BPTT with remat": lambda steps: temporary_bytes(
            effjax.recurrent.bptt_step, base, steps, part_length=round(steps**0.5), remat=True
        ),
        "FPTT, parts of 20 steps": lambda steps: temporary_bytes(
            effjax.recurrent.fptt_step, tethered, steps, part_length=20
        ),
        "FPTT, 10 parts": lambda steps: temporary_bytes(effjax.recurrent.fptt_step, tethered, steps, parts=10),
    }
)
memory = {name: [way(steps) / 2**20 for steps in lengths] for name, way in ways.items()}
for name, used in memory.items():
    print(f"{name:26}" + "".join(f"{size:9.1f} MiB" for size in used))

# %% [markdown]
# Then what is learned, from the same fresh examples. Updates in every part are one half of FPTT, the regulariser that
# tethers them to their average is the other; the same updates without it are the control.

# %%
UPDATES = 20 if SMOKE else 1000
arms = few(
    {
        "BPTT": (effjax.recurrent.bptt_step, base, {}),
        "10 updates a sequence": (effjax.recurrent.fptt_step, base, {"parts": 10}),
        r"FPTT: with regulariser, $\alpha$ = 0.02": (effjax.recurrent.fptt_step, tethered, {"parts": 10}),
        r"FPTT: with regulariser, $\alpha$ = 0.5": (
            effjax.recurrent.fptt_step,
            effjax.fptt(base, alpha=0.5),
            {"parts": 10},
        ),
        "BPTT of the same 10 losses": (effjax.recurrent.bptt_step, base, {"parts": 10}),
        "truncated BPTT": (effjax.recurrent.tbptt_step, base, {"parts": 10}),
    }
)


def errors(make, tx, settings, seed=0):
    """Squared error at the end of the sequences, at every update."""
    train = jax.jit(make(problem, tx, **settings), donate_argnums=(0, 1))
    params = init(jax.random.key(seed))
    state = tx.init(params)
    rng = np.random.default_rng(seed)
    found = []
    for i in range(UPDATES):
        batch = add.draw({name: column[:ROWS] for name, column in add.train.items()}, i, rng)
        state, params, _, metrics = train(state, params, carry, batch["inputs"], batch["targets"])
        found.append(metrics.loss[-1])
    return np.array(found)


curves = {name: errors(*arm) for name, arm in arms.items()}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
for (name, used), colour in zip(memory.items(), ("#2c3e50", "#2980b9", "#c0392b", "#e5989b"), strict=False):
    left.loglog(lengths, used, marker="o", label=name, color=colour)
left.set_xlabel("steps of a sequence")
left.set_ylabel("temporary memory of a training step, MiB")
left.legend()
window = max(1, UPDATES // 20)
colours = ("#2c3e50", "#27ae60", "#c0392b", "#e5989b", "#2980b9", "#7f8c8d")
for (name, found), colour in zip(curves.items(), colours, strict=False):
    smooth = np.convolve(found, np.ones(window) / window, mode="valid")
    right.semilogy(np.arange(len(smooth)) + window, smooth, label=f"{name}: {smooth[-1]:.3f}", color=colour)
right.axhline(1 / 6, color="#bbbbbb", linestyle=":")
right.set_xlabel(f"batches of {ROWS} sequences of {STEPS} steps")
right.set_ylabel(f"squared error, mean of {window} batches")
right.legend(fontsize=8)
figure.tight_layout()
plt.show()

# %% [markdown]
# On the left, parts of fixed length need the same memory whatever the length of the sequence. Remat comes close, with
# the exact gradient, for one more forward pass. FPTT saves memory, not time: every step is computed forward and
# backward.
#
# On the right (one seed), updates in every part leave the plateau of always answering 1 (dotted) long before BPTT does,
# on the same number of sequences. The updates do that; the regulariser delays it, the more so the larger $\alpha$ is
# (the paper takes 0.1 to 0.5; under Adam that outweighs the loss wherever the loss is flat). And once BPTT is off the
# plateau, one exact gradient a sequence ends lower than ten partial ones at the same learning rate. So start with a
# plain optimizer in `fptt_step`, let its rate decay, and put `effjax.fptt` around it where frequent updates become
# unstable.

# %% [markdown]
# ## 3. Learning from a stream
# `fptt_online` learns from one part at a time; parameters, optimizer and state are all that is kept. Eight readers go
# through tiny Shakespeare once, 32 characters at a time. Half-way every small letter is replaced by another one, the
# same in all that follows, and nobody tells the network.

# %%
READERS, PART = 8, 32
PARTS = 24 if SMOKE else 2400
CHANGE = PARTS // 2

text = effjax.data.sequence_data(f"tiny_shakespeare-chars-{PART}", train_rows=PARTS * READERS, streams=READERS)
print(text.source)
letters = np.arange(text.vocabulary)
letters[-26:] = np.random.default_rng(0).permutation(letters[-26:])  # the small letters have the last 26 ids
stream = []
for i in range(PARTS):
    rows = slice(i * READERS, (i + 1) * READERS)
    part = text.train["inputs"][rows], text.train["targets"][rows]
    stream.append(part if i < CHANGE else tuple(letters[ids] for ids in part))

reader = effjax.models.GRUCell(128)


def start(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    embedding = jax.random.normal(keys[0], (text.vocabulary, 32))
    weights = reader.init(keys[1], jnp.zeros((READERS, 128)), embedding[:READERS])["params"]
    return {**weights, "embedding": embedding, "head": jax.random.normal(keys[2], (128, text.outputs)) / 128**0.5}


def next_character(params, states, targets, part):
    return optax.softmax_cross_entropy_with_integer_labels(states @ params["head"], targets).mean()


def learner(tx):
    encode = lambda params, ids: reader.project(params, params["embedding"][ids])
    problem = effjax.recurrent.SequenceProblem(reader.advance, next_character, encode=encode, time_axis=1)
    return jax.jit(effjax.recurrent.fptt_online(problem, tx))


def read(learn, state, parts):
    """Loss on every part before it is learned from, and (optimizer state, params, carry) at the end."""
    found = []
    for inputs, targets in parts:
        *state, metrics = learn(*state, inputs, targets)
        found.append(metrics.loss)
    return np.array(found), state


adam = optax.adam(2e-3)
adapt, keep = learner(adam), learner(optax.set_to_zero())
blank = jnp.zeros((READERS, 128))
fresh = lambda seed, tx: [tx.init(start(seed)), start(seed), blank]

before, half_way = read(adapt, fresh(0, adam), stream[:CHANGE])
after = {
    "goes on learning": read(adapt, half_way, stream[CHANGE:])[0],
    "frozen at the change": read(keep, [optax.EmptyState(), *half_way[1:]], stream[CHANGE:])[0],
    "begins at the change": read(adapt, fresh(1, adam), stream[CHANGE:])[0],
}
regularised = effjax.fptt(adam, alpha=0.02)
losses = read(learner(regularised), fresh(0, regularised), stream)[0]
print(f"mean loss before the change: Adam {before.mean():.3f}, with FPTT's regulariser {losses[:CHANGE].mean():.3f}")
print(
    f"after it: Adam {after['goes on learning'].mean():.3f}, with FPTT's regulariser {losses[CHANGE:].mean():.3f}, "
    f"frozen {after['frozen at the change'].mean():.3f}, begun anew {after['begins at the change'].mean():.3f}"
)

# %%
block = max(1, PARTS // 60)
blocks = lambda losses: losses.reshape(-1, block).mean(1)
places = (np.arange(PARTS // block) + 0.5) * block * READERS * PART / 1000
figure, axis = plt.subplots(figsize=(9, 4.5))
axis.plot(places[: CHANGE // block], blocks(before), color="#c0392b", label="before the change")
for (name, losses), colour in zip(after.items(), ("#c0392b", "#7f8c8d", "#2980b9"), strict=True):
    axis.plot(places[CHANGE // block :], blocks(losses), label=name, color=colour)
axis.axvline(CHANGE * READERS * PART / 1000, color="#2c3e50", linestyle=":", label="the stream changes")
axis.set_xlabel("thousand characters read, each once")
axis.set_ylabel("nats per character, before learning from it")
axis.legend()
plt.show()

# %% [markdown]
# ## 4. In the code of others
# **Linen.** The cells are `nn.RNNCellBase`: `nn.RNN`, `nn.Bidirectional` and scans of your own take them. The layers
# over whole sequences have the same parameters and equal them; they are faster, as the products with the inputs leave
# the loop.

# %%
pictures = data.test["inputs"][:8]
rnn = nn.RNN(effjax.recurrent.TARNNCell(HIDDEN, length=LENGTH))
weights = rnn.init(jax.random.key(0), pictures)["params"]
layer = effjax.recurrent.TARNN(HIDDEN, length=LENGTH)
difference = rnn.apply({"params": weights}, pictures) - layer.apply({"params": weights["cell"]}, pictures)
print(f"largest difference {np.abs(difference).max():.1e}")

# %% [markdown]
# `effjax.recurrent.scan_time` runs any step over a sequence. With `chunk` the backward pass stores one state per
# chunk and computes the rest again; the gradient stays exact. (The layers have the same argument.
# There the inputs' products stay, and are most of what is left.)

# %%
xs = jnp.zeros((1000, ROWS, add.features))
weights = jax.eval_shape(cell.init, jax.random.key(0), carry, xs[0])
for chunk in (None, 32) if SMOKE else (None, 8, 32, 128):

    def last(weights, xs, chunk=chunk):
        one = lambda weights, carry, x: (cell.apply(weights, carry, x)[0], None)
        (_, h), _ = effjax.recurrent.scan_time(one, weights, carry, xs, chunk=chunk)
        return h.sum()

    size = jax.jit(jax.grad(last)).lower(weights, xs).compile().memory_analysis().temp_size_in_bytes
    print(f"chunk={chunk!s:5}{size / 2**20:8.1f} MiB for {len(xs)} steps")

# %% [markdown]
# **Flax NNX.** `nnx.bridge.ToNNX` makes a layer part of an NNX model.


# %%
class Classifier(nnx.Module):
    def __init__(self, example, classes, rngs):
        layer = effjax.recurrent.TARNN(HIDDEN, eta_mode="input", variant="euler")
        self.states = nnx.bridge.ToNNX(layer, rngs=rngs).lazy_init(example)
        self.head = nnx.Linear(HIDDEN, classes, rngs=rngs)

    def __call__(self, x):
        return self.head(self.states(x)[:, -1])


@nnx.jit
def nnx_step(model, optimizer, inputs, targets):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(inputs), targets).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


model = Classifier(data.train["inputs"][:1], data.outputs, nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
signal, targets = data.train["inputs"], data.train["targets"]  # the pictures without noise: 8 steps
for i in range(20 if SMOKE else 200):
    rows = np.random.default_rng(i).integers(0, len(targets), BATCH)
    value = nnx_step(model, optimizer, signal[rows], targets[rows])
score = (model(data.test["inputs"][:, :8]).argmax(1) == data.test["targets"]).mean()
print(f"test accuracy {score:.3f} on the pictures without noise")

# %% [markdown]
# And the training steps take NNX models: a cell is any pure function of parameters, state and input.


# %%
class Adder(nnx.Module):
    def __init__(self, rngs):
        self.cell = nnx.GRUCell(2, 32, rngs=rngs)
        self.head = nnx.Linear(32, 1, rngs=rngs)


graph, weights, rest = nnx.split(Adder(nnx.Rngs(0)), nnx.Param, ...)
model_of = lambda weights: nnx.merge(graph, weights, rest)
problem = effjax.recurrent.SequenceProblem(
    cell=lambda weights, carry, x: model_of(weights).cell(carry, x),
    loss=lambda weights, last, y, part: part.progress * ((model_of(weights).head(last)[:, 0] - y) ** 2).mean(),
    terminal=True,
    time_axis=1,
)
train = jax.jit(effjax.recurrent.fptt_step(problem, tethered, parts=10))
state = tethered.init(weights)
for i in range(5):
    batch = add.draw({name: column[:ROWS] for name, column in add.train.items()}, i, np.random.default_rng(i))
    state, weights, _, metrics = train(state, weights, jnp.zeros((ROWS, 32)), batch["inputs"], batch["targets"])
print(f"losses of the {len(metrics.loss)} parts:", *(f"{value:.3f}" for value in metrics.loss))

# %% [markdown]
# ## The whole comparisons
# `effjax compare irnn:smoke`, `effjax compare tarnn:smoke` and `effjax compare fptt:smoke` run these methods against
# LSTMs, other long-memory cells and parallel recurrences, measure what each costs, and say which claims hold.
