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
# # Graphs: few labels, one graph, fast
#
# Takes about 6 minutes on two CPU cores.
#
# Cora is a graph of 2,708 papers that cite each other, in seven fields. The field of a handful is known; what are the
# others? Five steps: a graph network in plain JAX and Optax; what makes its steps fast; FASTRAIN, self-training that
# adapts depth, edges and labels to the size of its training set; GEENI, an ensemble at the cost of one network that
# stops the messages of nodes it is unsure of; and graphs of your own, from Jraph or too large for one batch.

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
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import effjax

SMOKE = bool(os.environ.get("EFFJAX_SMOKE"))
EPOCHS = 60 if SMOKE else 300
print(jax.devices())

# %% [markdown]
# ## 1. A graph network
# `node_data` loads a graph and builds its matrices: features (words of the abstracts, 1.3 % of them not zero, kept
# sparse) and the normalised adjacency with self-loops. `NodeClassifier` is a Linen module; `layer=` is `gcn`, `sage`,
# `gat`, `gatv2`, `appnp`, ... Everything else is Optax as usual.

# %%
cora = effjax.node_data("cora")
train, val, test = effjax.tasks.draw_split(jax.random.key(0), cora.labels, cora.classes, 8, 30)
print(f"{cora.data.nodes} nodes, {cora.adjacency.nnz} entries of the adjacency, {int(train.sum())} labels for training")


def fit(model, epochs=EPOCHS, seed=0):
    """Full-batch training; every epoch is one step."""
    params = model.init(jax.random.key(seed), cora.features, cora.adjacency)["params"]
    tx = effjax.graph.adam_l2()  # as the citation benchmarks have it

    def loss(params, key, features, adjacency):
        logits = model.apply({"params": params}, features, adjacency, train=True, rngs={"dropout": key})
        return effjax.graph.masked_cross_entropy(logits, cora.labels, train)

    @jax.jit
    def run(params, key, features, adjacency):  # the graph is an argument: as a constant XLA would fold it
        def epoch(carry, key):
            params, opt = carry
            value, grads = jax.value_and_grad(loss)(params, key, features, adjacency)
            updates, opt = tx.update(grads, opt, params)
            return (optax.apply_updates(params, updates), opt), value

        (params, _), losses = jax.lax.scan(epoch, (params, tx.init(params)), jax.random.split(key, epochs))
        return params, losses

    start = time.perf_counter()
    params, losses = jax.block_until_ready(run(params, jax.random.key(1), cora.features, cora.adjacency))
    seconds = time.perf_counter() - start
    logits = model.apply({"params": params}, cora.features, cora.adjacency)
    return logits, losses, seconds


accuracies = {}
for layer in ("mlp", "gcn") if SMOKE else ("mlp", "gcn", "sage", "gat", "appnp"):
    logits, losses, seconds = fit(effjax.models.NodeClassifier(classes=cora.classes, layer=layer))
    accuracies[layer] = float(effjax.graph.masked_accuracy(logits, cora.labels, test))
    print(f"{layer:6} accuracy {accuracies[layer]:.3f}, {seconds:.1f} s with compilation")

# %% [markdown]
# No training at all: spreading the known labels along the edges, and Correct & Smooth on top of a network.

# %%
plain = effjax.graph.gcn_normalize(effjax.graph.adjacency(cora.data.senders, cora.data.receivers, cora.data.nodes))
known = jnp.where(train, cora.labels, 0)
spread = effjax.graph.label_propagation(plain, known, train, cora.classes)
print("label propagation", float(effjax.graph.masked_accuracy(spread, cora.labels, test)))

# %% [markdown]
# ## 2. What makes a step fast
# The products with the graph are the work. On CPUs a scatter is slow once the graph leaves the cache, and the fast
# kernel for CSR matrices is lost in derivatives and under `vmap`; `spmm` keeps it. Below, one product and its gradient
# with each kernel, on a graph of 20,000 nodes with 20 neighbours each. `fastest_spmm` measures and tells which to take.

# %%
rng = np.random.default_rng(0)
nodes, degree, width = (2000 if SMOKE else 20000), 20, 64
pairs = np.unique(rng.integers(0, nodes, (nodes * degree, 2)), axis=0)
graph = effjax.graph.sparse_matrix(pairs[:, 0], pairs[:, 1], None, (nodes, nodes), buckets=True)
x = jnp.asarray(rng.normal(size=(nodes, width)), jnp.float32)
kernels = ("csr", "segment", "buckets")
milliseconds = []
for kernel in kernels:
    both = jax.jit(
        lambda graph, x, kernel=kernel: jax.vjp(lambda x: effjax.graph.spmm(graph, x, kernel=kernel), x)[1](x)
    )
    jax.block_until_ready(both(graph, x))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(both(graph, x))
        times.append(1e3 * (time.perf_counter() - start))
    milliseconds.append(min(times))
plt.figure(figsize=(4, 2))
plt.barh(kernels, milliseconds)
plt.xlabel("ms, product and gradient")
plt.show()
print("to take here:", effjax.graph.fastest_spmm(graph, width))

# %% [markdown]
# ## 3. FASTRAIN: self-training with few labels
# After a first round of training, confident predictions become labels, and a second round trains on all of them.
# FASTRAIN starts with a deeper network while labels are few, drops more edges when they are many, asks that
# predictions agree on randomly thinned graphs before they become labels, and removes edges between classes. `apply` is
# your network: any function of parameters, features, adjacency and a key.


# %%
def network(deep):
    return effjax.models.NodeClassifier(classes=cora.classes, depth=3 if deep else 2)


def init(key, deep):
    return network(deep).init(key, cora.features, cora.adjacency)["params"]


def apply(params, features, adjacency, *, key=None):
    rngs = None if key is None else {"dropout": key}
    return network(len(params) == 3).apply({"params": params}, features, adjacency, train=key is not None, rngs=rngs)


sets = range(1 if SMOKE else 3)
rows = {"GCN": [], "FASTRAIN": []}
for seed in sets:
    labelled = effjax.tasks.draw_labelled(jax.random.key(seed), cora.labels, cora.classes, 8)
    hidden = ~labelled & (cora.labels >= 0)
    problem = effjax.graph.NodeProblem(cora.features, cora.adjacency, cora.labels, labelled, cora.classes)
    config = effjax.graph.FastrainConfig(stages=2 if SMOKE else 4, epochs=EPOCHS, epochs_per_step=30)
    found = effjax.fastrain(jax.random.key(seed), init, apply, problem, config)
    train = labelled
    rows["GCN"].append(float(effjax.graph.masked_accuracy(fit(network(False))[0], cora.labels, hidden)))
    rows["FASTRAIN"].append(float(effjax.graph.masked_accuracy(found.scores, cora.labels, hidden)))
    print(
        f"set {seed}: GCN {rows['GCN'][-1]:.3f}, FASTRAIN {rows['FASTRAIN'][-1]:.3f}, "
        f"{int((found.added > 0).sum())} pseudolabels, "
        f"{1 - int(found.adjacency.pattern.size) / cora.adjacency.nnz:.1%} of the edges pruned"
    )
plt.figure(figsize=(4, 3))
values = np.array(list(rows.values()))
plt.plot(list(rows), values, "o-", label=[f"labelled set {seed}" for seed in range(values.shape[1])])
plt.ylabel("accuracy on unlabelled nodes")
plt.xlabel("method")
plt.title("8 labels per class")
plt.legend(fontsize=8)
plt.show()

# %% [markdown]
# Labelled sets differ by more than methods do, hence a line for each. `effjax compare fastrain` does this over four
# graphs with every part switched off in turn, label propagation, Correct & Smooth, M3S and APPNP; its card
# (`configs/fastrain/README.md`) says where FASTRAIN does not pay.
#
# ## 4. GEENI: an ensemble at the price of one network
# Four narrow members, side by side in the columns of one product, cost about as much as one wide network. Nodes that
# the ensemble is unsure of then stop sending messages: they still get a prediction, and their edges are gone.

# %%
train, val, test = effjax.tasks.draw_split(jax.random.key(0), cora.labels, cora.classes, 20, 30)
members = effjax.graph.init_members(jax.random.key(0), 4, cora.features.shape[1], 16, cora.classes)
tx = effjax.graph.adam_l2()


@jax.jit
def train_members(members, features, adjacency):
    def loss(members, key):
        logits = effjax.graph.ensemble_logits(members, features, adjacency, dropout=0.5, key=key)
        return effjax.graph.members_loss(logits, cora.labels, train)

    def epoch(carry, key):
        members, opt = carry
        updates, opt = tx.update(jax.grad(loss)(members, key), opt, members)
        return (optax.apply_updates(members, updates), opt), None

    return jax.lax.scan(epoch, (members, tx.init(members)), jax.random.split(jax.random.key(1), EPOCHS))[0][0]


members = train_members(members, cora.features, cora.adjacency)
# Where the mean of logits will do, the ensemble folds to ONE network, at exactly the price of one.
folded = effjax.graph.fold_members(members)
for name, network in (("four members", members), ("folded", folded)):
    answer = effjax.graph.ensemble_probabilities(effjax.graph.ensemble_logits(network, cora.features, cora.adjacency))
    macs = effjax.graph.ensemble_macs(network, cora.features, cora.adjacency).total
    print(
        f"{name}: {float(effjax.graph.masked_accuracy(answer, cora.labels, test)):.3f}, {macs / 1e6:.1f} million MACs"
    )

probabilities = effjax.graph.member_probabilities(effjax.graph.ensemble_logits(members, cora.features, cora.adjacency))
scores = effjax.graph.error_scores(probabilities)
wrong = scores.label != cora.labels
print(f"the score finds wrong nodes with an AUC of {float(effjax.graph.error_auc(scores.score, wrong, test)):.2f}")

fractions = (0, 0.05, 0.1, 0.2, 0.3)
curves = {"score": [], "ORACLE (reads test labels)": []}
for fraction in fractions:
    for name, found in (("score", scores.score), ("ORACLE (reads test labels)", -wrong.astype(jnp.float32))):
        active = effjax.graph.active_nodes(found, fraction, train | val)
        served = effjax.graph.serve_ensemble(
            members, cora.features, effjax.graph.isolate(cora.adjacency, np.asarray(active))
        )
        curves[name].append(float(effjax.graph.masked_accuracy(served(), cora.labels, test)))
plt.figure(figsize=(4, 3))
for name, values in curves.items():
    plt.plot(fractions, values, "o-", label=name)
plt.xlabel("share of nodes that stop sending")
plt.ylabel("test accuracy")
plt.legend()
plt.show()

# %% [markdown]
# With a perfect detector isolation would be worth points; with a real one little. The study (`effjax compare geeni`)
# works on the detector and lets validation nodes decide whether to isolate at all.
#
# ## 5. Graphs of your own
# Edges and features as arrays, a Jraph `GraphsTuple`, or many small graphs, padded to few shapes. Of a graph that does
# not fit, neighbours are sampled, always in the same shapes, so that nothing compiles twice; or its rows are spread
# over devices.

# %%
senders, receivers = np.array([0, 1, 1, 2, 2, 3]), np.array([1, 0, 2, 1, 3, 2])
mine = effjax.graph.gcn_adjacency(senders, receivers, 4)
model = effjax.models.NodeClassifier(classes=2, hidden=8)
variables = model.init(jax.random.key(0), jnp.eye(4), mine)
print(model.apply(variables, jnp.eye(4), mine).shape)

tuple_ = effjax.graph.to_graphs_tuple(mine, nodes=jnp.eye(4))
print(type(tuple_).__name__, tuple_.senders.shape)

batch = next(effjax.graph.NeighbourSampler(mine, [0, 1, 2], (2,), batch_size=2, seed=0))
print("sampled", effjax.graph.block_mean(batch.blocks[0], jnp.eye(4)[batch.nodes]).shape)

small = [effjax.graph.get_fully_connected_graph(n, 1, node_features=np.ones((n, 2), np.float32)) for n in (2, 3, 4)]
rungs = effjax.graph.graph_ladder((2, 4, 1), (9, 29, 3))
gate = effjax.graph.ShapeGate(
    lambda total, graph: total + (graph.nodes.sum(1) * effjax.graph.padding_masks(graph).nodes).sum()
)
batches = effjax.graph.GraphBatches(small, rungs, seed=0, epochs=1)
for example in batches.example_batches():
    gate.warm_up(jnp.float32(0), example)
print("padded", sum(float(gate(jnp.float32(0), graph)) for graph in batches), "in", gate.compiles, "shapes")

mesh = jax.make_mesh((1,), ("data",))
print(
    "sharded", (effjax.graph.shard_matrix(mine, mesh, "data") @ effjax.graph.shard_rows(np.eye(4), mesh, "data")).shape
)
