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
# # Transformers made smaller: AxFormer
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/effjax/effjax/blob/main/notebooks/60_transformers.ipynb)
#
# A small encoder learns to tell spam from short messages. `effjax.axformer` then tries what it can do without: a block,
# a head, a group of neurons at a time, judged on messages that it was not trained on. No gradients are needed.

# %%
import sys

if "google.colab" in sys.modules:
    # %pip install -q "effjax[study,text] @ git+https://github.com/effjax/effjax"
    pass

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
    axformer_report,
    mask_params,
    prune_batches,
    prune_shape,
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
