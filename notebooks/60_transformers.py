# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Transformers made smaller
#
# Takes about 2 minutes on two CPU cores.
#
# A small encoder learns to tell spam from short messages. `effjax.axformer` then tries what it can do without: a block,
# a head, a group of neurons at a time, judged on messages that it was not trained on. No gradients are needed. At the
# end `effjax.icpc`: one vision transformer for images of several sizes, which spends effort by difficulty.

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

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

import effjax
from effjax.data.ragged import padded_columns
from effjax.train import fit, supervised
from effjax.transformers import (
    AxformerConfig,
    GatedEvaluator,
    PruneSpec,
    axformer_report,
    macs_of_blocks,
    mask_params,
    prune_batches,
    prune_shape,
    prune_to_cost,
    slice_model,
)

SMOKE = bool(os.environ.get("EFFJAX_SMOKE"))
STEPS = 100 if SMOKE else 400
print(jax.devices())

# %% [markdown]
# ## A fine-tuned model
# The last messages of the training set are held out for the search. The test set is for the result alone.

# %%
task = effjax.text_task("sms_spam", "encoder-2x32", max_length=24, train_rows=1500, test_rows=500)
columns = padded_columns(task.train, 24, task.tokenizer.pad_id)
train, held = ({name: column[part] for name, column in columns.items()} for part in (slice(0, 1250), slice(1250, None)))
trained = fit(supervised(task._replace(train=train), optax.adam(2e-3), steps=STEPS), seed=0).state
print(task.evaluate({"params": trained.params}))

# %% [markdown]
# ## The search
# Gates are data: all that is tried runs through one compiled program. By the authors' rule more than half of the
# messages must not be hurt. On an accurate model it removes almost nothing, as any removal raises the tiny losses of
# most messages a little; without the rule a good part goes.

# %%
labels = held.pop("label")
evaluator = GatedEvaluator(task.module, trained.params, prune_batches(held, labels))
shape = prune_shape(task.module, group_size=16)
found = {}
for agreement in (0.5, 0.0):
    config = AxformerConfig(agreement=agreement, hard=False)
    found[agreement] = effjax.axformer(evaluator, shape, config=config)
    print(f"agreement {agreement}:", axformer_report(found[agreement], labels), sep="\n")
print("programs:", evaluator.compiles)

# %% [markdown]
# ## What went where
# White is gone: of each layer the attention block, its heads, the feed-forward block and its groups of neurons.

# %%
figure, axes = plt.subplots(1, len(found), figsize=(10, 2.2), sharey=True)
for axis, (agreement, result) in zip(axes, found.items(), strict=True):
    gates = result.spec.gates()
    heads, groups = gates.attention[:, None] * gates.heads, gates.mlp[:, None] * gates.groups
    rows = np.concatenate([gates.attention[:, None], heads, gates.mlp[:, None], groups], axis=1)
    axis.imshow(rows, cmap="Blues", vmin=0, vmax=1.5, aspect="auto")
    axis.set_title(f"agreement {agreement}")
    axis.set_xticks([0, 1, 1 + shape.heads, 2 + shape.heads], ["attention", "heads", "mlp", "groups"], rotation=30)
    axis.set_yticks(range(shape.layers), [f"layer {layer}" for layer in range(shape.layers)])
plt.show()

# %% [markdown]
# ## To a stated cost
# Whoever serves the model knows what it may cost. `prune_to_cost` removes what raises the loss least for what it saves,
# here counted in operations; `latency_of_blocks` measures milliseconds instead. Below the loss of the whole model the
# search even gains: that is what the paper is about.

# %%
costs = macs_of_blocks(shape, length=24)
whole = costs.of(PruneSpec(shape))
shares = (0.8, 0.4) if SMOKE else (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
to_cost = [prune_to_cost(evaluator, shape, costs, target=share * whole) for share in shares]
plt.figure(figsize=(5, 2.6))
plt.plot([cost.cost / whole for cost in to_cost], [cost.loss for cost in to_cost], "o-", markersize=3, label="pruned")
plt.axhline(to_cost[0].base_loss, color="gray", linestyle=":", label="whole model")
plt.xlabel("operations, of the whole model's")
plt.ylabel("validation loss")
plt.legend()
plt.show()

# %% [markdown]
# ## A smaller model
# Slicing removes the weights. The small model gives the answers of the gated one.

# %%
spec = found[0.0].spec
small, small_params = slice_model(task.module, trained.params, spec)
ids, mask = held["input_ids"][:8], held["mask"][:8]
masked = task.module.apply({"params": mask_params(task.module, trained.params, spec.gates())}, ids, mask)
np.testing.assert_allclose(small.apply({"params": small_params}, ids, mask), masked, atol=1e-4)
print(task.evaluate({"params": mask_params(task.module, trained.params, spec.gates())}))
print(f"{spec.removed_params} of the layers' parameters are gone, {spec.kept_macs(24):.0%} of the operations stay.")

# %% [markdown]
# ## Images of several sizes
# ICPC trains one vision transformer on a mixture of sizes, here half of every batch at 16 pixels and half at 28. An
# image of fewer patches reads rows of the one table of positions: those of a corner (the paper's way), or spread.

# %%
_, axes = plt.subplots(1, 2, figsize=(5, 2.4))
for axis, how in zip(axes, ("crop", "spread"), strict=True):
    rows = effjax.transformers.position_rows((7, 7), (4, 4), how)[1:] - 1
    read = np.zeros(49)
    read[rows] = 1
    axis.imshow(read.reshape(7, 7), cmap="Blues", vmax=1.5)
    axis.set_title(f"4 x 4 patches: {how}", fontsize=9)
plt.show()

# %%
SIZES = (16, 28)
data = effjax.load_data("fashion_mnist").splits
as_images = lambda rows: np.asarray(rows["image"], np.float32).reshape(-1, 28, 28, 1) / 255 - 0.5
model = effjax.models.ViT(
    classes=10,
    patch=4,
    grid=(7, 7),
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    positions=effjax.transformers.position_selector("crop"),
)
apply = lambda params, images, *, key=None: model.apply({"params": params}, images)
mixed = effjax.icpc(apply, SIZES, shares=(1, 1))
tx = optax.adam(2e-3)


@jax.jit
def step(params, opt, images, labels):
    loss = lambda params: optax.softmax_cross_entropy_with_integer_labels(mixed(params, images), labels).mean()
    updates, opt = tx.update(jax.grad(loss)(params), opt)
    return optax.apply_updates(params, updates), opt


params = model.init(jax.random.key(0), np.zeros((1, 28, 28, 1), np.float32))["params"]
opt, rng = tx.init(params), np.random.default_rng(0)
photos, labels = as_images(data["train"]), np.asarray(data["train"]["label"], np.int32)
for _ in range(10 if SMOKE else 600):
    rows = rng.integers(len(labels), size=64)
    params, opt = step(params, opt, photos[rows], labels[rows])

# %% [markdown]
# ## Effort and accuracy
# A cascade answers from the small image where it is sure enough, and looks at the full one where it is not. What it
# costs counts both. The threshold is the knob; `effjax.transformers.level_thresholds` finds one with a guarantee.

# %%
small, full = (
    np.asarray(jax.jit(lambda p, x, size=size: apply(p, effjax.transformers.resize_images(x, size)))(params, images))
    for images in [as_images(data["test"])[:1000]]
    for size in SIZES
)
truth, tokens = np.asarray(data["test"]["label"][:1000]), np.array([4 * 4 + 1, 7 * 7 + 1])
confidence = np.asarray(jax.nn.softmax(small)).max(1)
costs, accuracies = [], []
for threshold in np.linspace(0, 1, 21):
    stops = confidence >= threshold
    answers = np.where(stops, small.argmax(1), full.argmax(1))
    cost = effjax.transformers.evaluated_cost(np.where(stops, 0, 1), tokens / tokens[1])
    costs.append(cost.mean())
    accuracies.append((answers == truth).mean())
plt.figure(figsize=(5, 3))
plt.plot(costs, accuracies, "o-", markersize=3, label="cascade")
plt.plot(1, (full.argmax(1) == truth).mean(), "s", label="full size")
plt.xlabel("tokens per image, of the full size's")
plt.ylabel("test accuracy")
plt.legend()
plt.show()
