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
# # Networks for images that compute less
#
# Takes about 5 minutes on two CPU cores.
#
# Three ways to spend less on an image, and what each looks like on pictures: one Global layer in place of many blocks,
# blocks that compute on a grid of anchors, and gates that decide for every image which blocks run. Fashion-MNIST, on
# two CPU cores. What they gain and lose is in the cards of `global_layer`, `si_cnn` and `dynamic_inference`.

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
from effjax.core.macs import count_macs
from effjax.models import BasicBlock, ResNet

SMOKE = bool(os.environ.get("EFFJAX_SMOKE"))
jax.config.update("jax_disable_most_optimizations", SMOKE)  # a smoke run does little but compile
STEPS = 3 if SMOKE else 400

# %% [markdown]
# ## 1. What a Global layer does
# Its map obeys an advection-diffusion equation whose velocities and diffusivities come from the features. Below a spot:
# carried up and to the left, and spread, by 20 explicit steps; and spread by one implicit step, which reaches the whole
# map. And a picture, under a diffusivity that is small where the picture has edges: flat parts become flatter, outlines
# stay.

# %%
data = effjax.load_data("fashion_mnist")
photos = jnp.asarray(data.splits["test"]["image"][:1000], jnp.float32) / 255
photos = photos.reshape(len(photos), 28, 28, 1)


def edges(h):
    along = lambda axis: jnp.exp(-(((jnp.roll(h, -1, axis) - jnp.roll(h, 1, axis)) / 0.2) ** 2))
    return along(1), along(2)


still = lambda h: (jnp.zeros_like(h), jnp.zeros_like(h))
drift = lambda h: (jnp.full_like(h, 1.0), jnp.full_like(h, 0.5))
steps = effjax.vision.PdeConfig(K=20, border="reflect")
implicit = effjax.vision.PdeConfig(scheme="implicit", dt=20.0, border="reflect")
rows, columns = jnp.mgrid[:28, :28]
spot = jnp.exp(-((rows - 18) ** 2 + (columns - 14) ** 2) / 4)[None, :, :, None]
shown = {
    "a spot": spot,
    "20 explicit steps": effjax.global_layer(spot, drift, (0.5, 0.5), config=steps, source=False),
    "one implicit step": effjax.global_layer(spot, still, (0.5, 0.5), config=implicit, source=False),
    "a picture": photos[:1],
    "diffusivity by edges": effjax.global_layer(photos[:1], still, edges, config=steps, source=False),
    "diffusivity 0.5": effjax.global_layer(photos[:1], still, (0.5, 0.5), config=steps, source=False),
}


def draw(pictures, titles, columns):
    rows = -(-len(pictures) // columns)
    _, axes = plt.subplots(rows, columns, figsize=(2 * columns, 2.3 * rows))
    for axis, picture, title in zip(np.ravel(axes), pictures, titles, strict=True):
        axis.imshow(np.squeeze(picture), cmap="gray")
        axis.set_title(title, fontsize=8)
        axis.axis("off")
    plt.tight_layout()
    plt.show()


draw(list(shown.values()), list(shown), 6)

# %% [markdown]
# ## 2. What an anchor lattice is
# The expensive branch of a block runs on every second pixel in each direction, and what lies between is interpolated.
# A cheap path at full resolution brings the detail back. The lattice may move from block to block, so that every pixel
# is an anchor somewhere.

# %%
anchors = effjax.vision.sample_anchors(photos[:1], 2)
tent = effjax.vision.upsample_tent(anchors, 2, (28, 28))
nearest = effjax.vision.upsample_nearest(anchors, 2, (28, 28))
lattices = [
    effjax.vision.anchor_mask((28, 28), 2, offset=offset) for offset in effjax.vision.alternating_offsets(2)[:2]
]
draw(
    [photos[0], anchors, tent, nearest, tent - photos[:1], *lattices],
    ["picture", "anchors", "interpolated", "nearest", "left to the cheap path", "lattice of one block", "of the next"],
    7,
)

# %% [markdown]
# ## 3. Four networks, trained alike
# A ResNet; the same with fewer blocks and Global layers; the same with interpolated blocks; and the same with gates,
# trained to six tenths of the work. One short run each: the cards have the honest comparisons.

# %%
train = {name: np.asarray(rows) for name, rows in data.splits["train"].items()}
block = functools.partial(BasicBlock, shortcut="project")
dense = ResNet(stages=(3, 3), widths=(8, 16), block=block)
gated = functools.partial(
    effjax.vision.GatedBasicBlock, layer=functools.partial(effjax.vision.SalienceGate, kind="ste")
)
example = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
models = {
    "dense": dense,
    "global": effjax.vision.resnet_global(1, widths=(8, 16)),
    "interpolated": effjax.vision.interpolated(dense, example),
    "gated": ResNet(stages=(3, 3), widths=(8, 16), block=gated),
}


def fit(model):
    """Adam, batches of 64; the gated network also pays for the work above its target."""
    variables = model.init(jax.random.key(0), photos[:1])
    tx = optax.adam(optax.cosine_decay_schedule(5e-3, STEPS))

    def loss(params, stats, images, labels, t):
        logits, changed = model.apply(
            {"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats", "intermediates"]
        )
        found = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        if model is models["gated"]:
            target = effjax.vision.gate_target(t, STEPS, 0.6)
            found += effjax.vision.mac_target_loss(effjax.vision.recorded_gates(changed), target, weight=20.0)
        return found, changed["batch_stats"]

    @jax.jit
    def step(params, stats, opt, images, labels, t):
        grads, stats = jax.grad(loss, has_aux=True)(params, stats, images, labels, t)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), stats, opt

    params, stats = variables["params"], variables["batch_stats"]
    opt, rng = tx.init(params), np.random.default_rng(0)
    for t in range(STEPS):
        rows = rng.integers(len(train["label"]), size=64)
        images = train["image"][rows].reshape(64, 28, 28, 1).astype(np.float32) / 255
        params, stats, opt = step(params, stats, opt, images, train["label"][rows].astype(np.int32), jnp.int32(t))
    return {"params": params, "batch_stats": stats}


truth = np.asarray(data.splits["test"]["label"][:1000])
trained = {}
for name, model in models.items():
    began = time.perf_counter()
    trained[name] = fit(model)
    seconds = time.perf_counter() - began
    infer = jax.jit(model.apply)
    right = (np.asarray(infer(trained[name], photos)).argmax(1) == truth).mean()
    macs = count_macs(model.apply, trained[name], photos[:1]).most
    print(f"{name:13s} accuracy {right:.3f}   {macs / 1e6:.2f} M multiply-adds at most   trained in {seconds:.0f} s")

# %% [markdown]
# ## 4. What the gates decided
# Which of the six blocks ran for which picture: those that needed few, and those that needed many. Where all pictures
# have one pattern, the network was pruned and is not dynamic.

# %%
_, changed = jax.jit(lambda v, x: models["gated"].apply(v, x, mutable=["intermediates"]))(trained["gated"], photos)
gates = effjax.vision.recorded_gates(changed)
opened = np.stack([np.asarray(one.layer.open) for one in gates], 1)
print(effjax.vision.gate_statistics(gates), "share of the work:", float(effjax.vision.mac_fraction(gates)))
order = np.argsort(opened.sum(1), kind="stable")
chosen = [*order[:6], *order[-6:]]
draw([photos[row] for row in chosen], ["".join("#" if gate else "." for gate in opened[row]) for row in chosen], 6)

# %% [markdown]
# ## 5. Skipping that saves time
# A mask on a branch that was computed anyway saves nothing. The executor `"ladder"` gathers the pictures whose gate is
# open and runs the branch on these alone. Same parameters, same answers; how much faster depends on how wide the blocks
# are, which `effjax.vision.break_even` estimates.

# %%
quick = ResNet(stages=(3, 3), widths=(8, 16), block=functools.partial(gated, executor=effjax.vision.Executor("ladder")))
runs = {name: jax.jit(model.apply) for name, model in {"masked": models["gated"], "ladder": quick}.items()}
answers = {name: np.asarray(run(trained["gated"], photos[:256])) for name, run in runs.items()}
np.testing.assert_allclose(answers["masked"], answers["ladder"], rtol=1e-4, atol=1e-4)
for name, run in runs.items():
    times = []
    for _ in range(1 if SMOKE else 10):
        began = time.perf_counter()
        run(trained["gated"], photos[:256]).block_until_ready()
        times.append(time.perf_counter() - began)
    print(f"{name}: {1000 * np.median(times):.1f} ms for 256 pictures")
