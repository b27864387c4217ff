import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.graph.sparse.adjacency_matrices import adjacency, gcn_adjacency
from effjax.graph.sparse.attention import edge_dot, edge_softmax, gat, gatv2, supergat, weighted_sums
from effjax.graph.sparse.layers import (
    appnp,
    dense,
    dropout,
    gcn,
    gcnii,
    keep_mask,
    neighbour_max,
    released_gat,
    sage,
    sgc,
)
from effjax.graph.sparse.matrix import SparseMatrix, select_entries, sparse_matrix
from effjax.graph.sparse.modules import GATConv, SAGEConv

REFERENCE = Path(__file__).resolve().parents[2] / "reference" / "fastrain_gnn"
PYG = np.load(REFERENCE / "pyg_layers.npz")
RELEASED = np.load(REFERENCE / "models_forward_grad.npz")
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}
NODES = len(PYG["x"])
CAPACITY = 100  # of all graphs, so that a model is one program; the padding takes part in every comparison

# Names in PyTorch Geometric: ours, and how the array is turned (the map is its own inverse).
RENAMED = {
    "lin__weight": ("kernel", np.transpose),
    "weight": ("kernel", np.transpose),
    "weight1": ("kernel", np.asarray),
    "lin__bias": ("bias", np.asarray),
    "bias": ("bias", np.asarray),
    "att_src": ("source", np.squeeze),
    "att_l": ("source", np.squeeze),  # of SuperGAT: the sender's
    "att_dst": ("target", np.squeeze),
    "att_r": ("target", np.squeeze),
    "att": ("attention", np.squeeze),
}
SAGE = {
    "lin_l__weight": ("kernel", np.transpose),
    "lin_l__bias": ("bias", np.asarray),
    "lin_r__weight": ("root", np.transpose),
}
GATV2 = {
    "lin_l__weight": ("source_kernel", np.transpose),
    "lin_l__bias": ("source_bias", np.asarray),
    "lin_r__weight": ("target_kernel", np.transpose),
    "lin_r__bias": ("target_bias", np.asarray),
}


def layers(model, kind="p"):
    """Parameters (``"p"``) or gradients (``"g"``) of a reference model, a mapping a layer, in our names."""
    names = RENAMED | (SAGE if model.startswith("sage") else GATV2 if model == "gatv2" else {})
    found = {}
    for key in PYG.files:
        name, _, rest = key.partition(f"__{kind}__")
        if name == model and rest:
            index, _, torch_name = rest.partition("__")
            ours, turn = names[torch_name]
            array = turn(PYG[key])
            if ours in ("source", "target", "attention"):
                array = array.reshape(PYG[key].shape[-2:])
            found.setdefault(int(index), {})[ours] = array
    return [found[index] for index in sorted(found)]


def plain(directed=False, **options):
    senders, receivers = PYG["edge_index_directed" if directed else "edge_index"]
    return adjacency(senders, receivers, NODES, **options)


def normal(directed=False, **options):
    senders, receivers = PYG["edge_index_directed" if directed else "edge_index"]
    return gcn_adjacency(senders, receivers, NODES, **options)


loops = functools.partial(plain, self_loops=True)


def stack(layer, activation, last={}):  # noqa: B006
    """Two layers, or as many as there are parameters."""

    def run(params, x, matrix):
        for index, part in enumerate(params):
            final = index == len(params) - 1
            x = layer(part, x, matrix, **(last if final else {}))
            x = x if final else activation(x)
        return x

    return run


def appnp_net(params, x, matrix):
    return appnp(dense(params[1], jax.nn.relu(dense(params[0], x))), matrix)


def gcnii_net(params, x, matrix):
    h = jax.nn.relu(dense(params[0], x))
    return dense(params[2], jax.nn.relu(gcnii(params[1], h, h, matrix, layer=1)))


GCN, GAT = stack(gcn, jax.nn.relu), stack(gat, jax.nn.elu, {"concat": False})
scaled = lambda params, x, matrix, **options: supergat(
    params, x, matrix, mode="scaled", heads=1 if options else 2, **options
)
MODELS = {
    "gcn": (GCN, normal),
    "gcn_weighted": (GCN, lambda **options: normal(weights=PYG["edge_weight"], **options)),
    "gcn_directed": (GCN, functools.partial(normal, directed=True)),
    "gat": (GAT, loops),
    "gat_directed": (GAT, functools.partial(loops, directed=True)),
    "gatv2": (stack(gatv2, jax.nn.elu, {"concat": False}), loops),
    "sage_mean": (stack(sage, jax.nn.relu), plain),
    "sage_max": (stack(functools.partial(sage, reduce="max"), jax.nn.relu), plain),
    "sage_mean_directed": (stack(sage, jax.nn.relu), functools.partial(plain, directed=True)),
    "appnp": (appnp_net, normal),
    "sgc_K2": (stack(sgc, jax.nn.relu), normal),
    "gcnii": (gcnii_net, normal),
    "supergat_mx": (stack(supergat, jax.nn.elu, {"concat": False}), loops),
    "supergat_sd": (stack(scaled, jax.nn.elu, {"concat": False}), loops),
}


@pytest.fixture(params=MODELS)
def model(request):
    return request.param


@functools.partial(jax.jit, static_argnums=0)
def run(name, params, x, matrix):
    """Output, gradients of the parameters, gradient of x, against the reference's cotangent."""
    out, pull = jax.vjp(lambda params, x: MODELS[name][0](params, x, matrix), params, x)
    return out, *pull(jnp.asarray(PYG["cotangent"], out.dtype))


def assert_close(left, right, **tolerance):
    for path, leaf in jax.tree_util.tree_leaves_with_path(left):
        other = dict(jax.tree_util.tree_leaves_with_path(right))[path]
        np.testing.assert_allclose(leaf, other, err_msg=str(path), **{**TOLERANCE, **tolerance})
    assert jax.tree.structure(left) == jax.tree.structure(right)


def test_outputs_and_all_gradients_are_pytorch_geometric_s(model):
    matrix = MODELS[model][1](capacity=CAPACITY)
    out, to_params, to_x = run(model, layers(model), PYG["x"], matrix)
    np.testing.assert_allclose(out, PYG[f"{model}__out"], **TOLERANCE)
    np.testing.assert_allclose(to_x, PYG[f"{model}__grad_x"], **TOLERANCE)
    assert_close(to_params, layers(model, "g"))


def test_dropped_edges_are_as_edges_taken_out(model):
    """Entries set to zero, and entries taken out."""
    matrix = MODELS[model][1](capacity=CAPACITY)
    rows, columns = np.asarray(matrix.pattern.rows), np.asarray(matrix.pattern.columns)
    drop = (np.random.default_rng(0).uniform(size=matrix.nnz) < 0.3) & (rows != columns)
    params, x = layers(model), PYG["x"]
    masked = run(model, params, x, matrix._replace(values=np.where(drop, 0, matrix.values)))
    compacted = select_entries(matrix, ~drop, capacity=CAPACITY)
    assert int(compacted.pattern.size) < int(matrix.pattern.size)
    assert_close(run(model, params, x, compacted), masked)
    assert np.abs(masked[0] - run(model, params, x, matrix)[0]).max() > 1e-3


def test_nodes_may_be_permuted(model):
    matrix, rng = MODELS[model][1](), np.random.default_rng(0)
    order = rng.permutation(NODES)
    place = np.argsort(order)
    rows, columns = place[np.asarray(matrix.pattern.rows)], place[np.asarray(matrix.pattern.columns)]
    moved = sparse_matrix(rows, columns, matrix.values, matrix.shape, capacity=CAPACITY)
    there = run(model, layers(model), PYG["x"][order], moved)[0]
    np.testing.assert_allclose(there, PYG[f"{model}__out"][order], **TOLERANCE)


def test_graph_without_edges(model):
    matrix = adjacency([], [], NODES, capacity=CAPACITY)
    out, to_params, to_x = run(model, layers(model), PYG["x"], matrix)
    assert np.isfinite(out).all()
    assert np.isfinite(to_x).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(to_params))
    if model in ("gcn", "gat", "gatv2", "supergat_mx"):  # nothing arrives: the last bias
        np.testing.assert_allclose(out, np.broadcast_to(layers(model)[1]["bias"], out.shape))


@pytest.mark.parametrize("name", ["gcn", "sage_mean"])
def test_sparse_features_are_the_dense_ones(name):
    x = np.where(np.abs(PYG["x"]) > 0.8, PYG["x"], 0)
    at = np.nonzero(x)
    sparse, matrix = sparse_matrix(*at, x[at], x.shape, capacity=100), MODELS[name][1](capacity=CAPACITY)

    @jax.jit
    def sparsely(params, sparse, matrix):
        out, pull = jax.vjp(lambda params: MODELS[name][0](params, sparse, matrix), params)
        return out, *pull(jnp.asarray(PYG["cotangent"]))

    out, to_params = sparsely(layers(name), sparse, matrix)
    wanted = run(name, layers(name), x, matrix)
    np.testing.assert_allclose(out, wanted[0], **TOLERANCE)
    assert_close(to_params, wanted[1])


# The released code


def released(name, kind):
    """Parameters or gradients of a model of the released code, heads side by side."""
    found = {}
    for key in RELEASED.files:
        model, _, rest = key.partition(f"__{kind}__")
        if model == name and rest:
            layer, _, part = rest.rpartition("__")
            found.setdefault(layer, {})[part] = RELEASED[key]
    if name.endswith("GCN"):
        order = ("gc1", "gc3", "gc2") if "gc3" in found else ("gc1", "gc2")
        return [{"kernel": found[part]["weight"], "bias": found[part]["bias"]} for part in order]
    heads = [[f"{stem}_{head}" for head in range(3)] for stem in ("attention", "attention1")]
    groups = [group for group in heads if group[0] in found] + [["out_att"]]
    return [{"kernel": np.concatenate([found[part]["W"] for part in group], axis=1)} for group in groups]


@pytest.mark.parametrize("name", ["shallowGCN", "deepGCN", "shallowGAT", "deepGAT"])
def test_the_released_networks(name):
    mask = RELEASED["train_mask"]
    matrix = sparse_matrix(RELEASED["adj_row"], RELEASED["adj_col"], RELEASED["adj_val"], (40, 40))
    network = GCN if name.endswith("GCN") else stack(released_gat, lambda x: x)

    def loss(params):
        logits = network(params, RELEASED["X"], matrix)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, RELEASED["y"])
        return jnp.sum(each * mask) / mask.sum(), logits

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(released(name, "p"))
    np.testing.assert_allclose(logits, RELEASED[f"{name}__logits"], **TOLERANCE)
    np.testing.assert_allclose(value, RELEASED[f"{name}__loss"], **TOLERANCE)
    assert_close(gradients, released(name, "g"))


# Attention


def random_edges(nodes, count, seed):
    rng = np.random.default_rng(seed)
    at = rng.choice(nodes * nodes, size=count, replace=False)
    return sparse_matrix(at // nodes, at % nodes, None, (nodes, nodes), capacity=64)


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 900), st.integers(0, 60), st.integers(0, 10**6))
def test_softmax_is_stable_however_far_logits_spread(spread, count, seed):
    matrix = random_edges(9, count, seed)
    rng = np.random.default_rng(seed)
    rows = np.asarray(matrix.pattern.rows)
    # Whole rows far below others, and single entries far below their row.
    logits = spread * (rng.normal(size=(9, 2))[rows] + rng.choice([0, 0, 1], size=(len(rows), 2)))
    logits = (logits + rng.normal(size=logits.shape)).astype(np.float32)
    found = softmax(matrix.pattern, logits)
    wanted = np.zeros(logits.shape)
    for row in np.unique(rows[:count]):
        at = np.flatnonzero(rows[:count] == row)
        terms = np.exp(logits[at].astype(np.float64) - logits[at].max(0))
        wanted[at] = terms / terms.sum(0)
    np.testing.assert_allclose(found, wanted, rtol=2e-5 * max(1, spread / 10), atol=1e-6)


softmax = jax.jit(edge_softmax)


def test_gradient_of_the_softmax_where_bounds_were_refined():
    pattern = adjacency([0, 1, 2, 0], [1, 1, 1, 2], 3).pattern
    logits = np.array([[1.0], [2.0], [-3.0], [-700.0]], np.float32)
    weights = np.array([1.0, 3.0, -2.0, 5.0], np.float32)
    found = jax.jit(jax.grad(lambda logits: jnp.sum(weights[:, None] * edge_softmax(pattern, logits))))(logits)
    row = jax.jit(jax.grad(lambda logits: jnp.sum(weights[:3] * jax.nn.softmax(logits))))(logits[:3, 0])
    np.testing.assert_allclose(np.asarray(found)[:, 0], [*np.asarray(row), 0], rtol=1e-5, atol=1e-7)


def test_what_is_no_edge_may_hold_anything():
    """Scores that are not finite stay out of results and gradients where the edge was dropped."""
    pattern = adjacency([0, 1], [1, 1], 2).pattern
    edge = jax.device_put(np.array([True, False]))
    loss = lambda logits: jnp.sum(edge_softmax(pattern, logits, edge) ** 2)
    value, gradient = jax.jit(jax.value_and_grad(loss))(np.array([[3.0], [np.inf]], np.float32))
    assert float(value) == 1
    np.testing.assert_array_equal(gradient, 0)


def thrice(function, inputs):
    """The value, the gradient of a scalar of it, and the gradient of a scalar of that."""
    loss = lambda *x: jnp.sum(jnp.sin(function(*x)))
    twice = lambda *x: sum(jnp.sum(leaf**2) for leaf in jax.grad(loss, (0, 1))(*x))
    return jax.jit(lambda *x: (function(*x), jax.grad(loss, (0, 1))(*x), jax.grad(twice, (0, 1))(*x)))(*inputs)


@pytest.mark.parametrize("count", [0, 30])
def test_products_of_attention_and_their_derivatives(count):
    matrix = random_edges(7, count, 0)
    pattern, rng = matrix.pattern, np.random.default_rng(1)
    rows, columns = pattern.rows, pattern.columns
    weights, left, right = (
        rng.normal(size=size).astype(np.float32) for size in ((pattern.nnz, 2), (7, 2, 3), (7, 2, 3))
    )
    summed = lambda weights, x: jnp.zeros((7, 2, 3)).at[rows].add(weights[:, :, None] * x[columns])
    dotted = lambda left, right: jnp.sum(left[rows] * right[columns], -1)
    for ours, wanted, inputs in ((weighted_sums, summed, (weights, right)), (edge_dot, dotted, (left, right))):
        found = thrice(functools.partial(ours, pattern), inputs)
        assert_close(found, thrice(wanted, inputs), rtol=1e-4, atol=1e-4)


def test_ties_share_the_gradient_of_the_maximum():
    matrix = adjacency([0, 1, 2], [3, 3, 3], 4)
    x = np.array([[5.0], [5.0], [1.0], [9.0]], np.float32)
    maxima, gradient = jax.jit(
        lambda x: (neighbour_max(matrix, x), jax.grad(lambda x: 6 * neighbour_max(matrix, x)[3, 0])(x))
    )(x)
    np.testing.assert_array_equal(maxima, [[0], [0], [0], [5]])
    np.testing.assert_array_equal(gradient, [[3], [3], [0], [0]])


def test_maxima_of_buckets_are_those_of_the_scatter():
    rng = np.random.default_rng(0)
    # Node 0 has 30 in-neighbours, some have one or two, the last ones none; weights of zero are no edges.
    receivers = np.concatenate([np.zeros(30, int), rng.integers(1, 20, 40)])
    receivers, senders = np.unique(np.stack([receivers, rng.permutation(70) % 40]), axis=1)
    x = rng.normal(size=(40, 3)).astype(np.float32)
    found = []

    @jax.jit
    def both(matrix, x):
        out, pull = jax.vjp(lambda x: neighbour_max(matrix, x), x)
        return out, *pull(jnp.ones_like(out))

    for buckets in (False, True):
        matrix = adjacency(senders, receivers, 40, buckets=buckets)
        assert (matrix.pattern.buckets is not None) == buckets
        values = np.asarray(matrix.values) * (np.arange(matrix.nnz) % 5 > 0)
        found.append(both(matrix._replace(values=values), x))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.asarray(found[0][0])[:20].any()


def test_attention_dropout_drops_edges_of_a_head_after_the_softmax():
    params, x, matrix, key = layers("gat")[0], PYG["x"], loops(), jax.random.key(0, impl="rbg")
    pattern, rate = matrix.pattern, 0.4

    @jax.jit
    def by_hand(params, x):
        z = (x @ params["kernel"]).reshape(NODES, 2, -1)
        scores = lambda vector: jnp.sum(z * vector[None], -1)
        logits = scores(params["target"])[pattern.rows] + scores(params["source"])[pattern.columns]
        attention = edge_softmax(pattern, jax.nn.leaky_relu(logits, 0.2))
        kept = attention * keep_mask(key, attention.shape, rate) / (1 - rate)
        return weighted_sums(pattern, kept, z).reshape(NODES, -1) + params["bias"][None]

    ours = lambda params, x: (gat(params, x, matrix, rate=rate, key=key), gat(params, x, matrix))
    dropped, whole = (np.asarray(found) for found in jax.jit(ours)(params, x))
    np.testing.assert_allclose(dropped, by_hand(params, x), **TOLERANCE)
    assert np.abs(dropped - whole).max() > 0.1
    with pytest.raises(ValueError, match="key=None"):
        gat(params, x, matrix, rate=rate)


# Dropout


def test_dropped_numbers_are_independent():
    masks = jax.vmap(lambda key: keep_mask(key, (2000,), 0.3))

    @jax.jit
    def both():
        folded = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0)))(jnp.arange(64))  # as in training
        return masks(jax.random.split(jax.random.key(3), 64)), masks(folded)

    for kept in both():
        z = (np.asarray(kept, float) - 0.7) / np.sqrt(0.21)
        assert abs(z.mean()) * np.sqrt(z.size) < 4
        assert np.abs(z.mean(0)).max() * np.sqrt(64) < 5  # every position
        between = z @ z.T / z.shape[1]  # every pair of keys
        assert np.abs(between - np.diag(np.diag(between))).max() * np.sqrt(z.shape[1]) < 5
        for shift in (1, 2, 3, 8, 40):
            assert abs((z[:, shift:] * z[:, :-shift]).mean()) * np.sqrt(z.size) < 4


def test_sparse_dropout_stays_on_the_stored_values():
    x = sparse_matrix([0, 1], [0, 1], [1.0, 2.0], (2, 2))
    dropped = dropout(jax.random.key(0), x, 0.5)
    assert dropped.nnz == 2
    assert set(np.asarray(dropped.values).tolist()) <= {0.0, 2.0, 4.0}
    assert dropout(jax.random.key(0), x.values, 0.0) is x.values


def test_bfloat16_operands_are_summed_in_float32():
    n = 400
    star = adjacency(np.arange(1, n), np.zeros(n - 1, int), n)
    params = {"kernel": np.ones((1, 1), jnp.bfloat16), "root": np.zeros((1, 1), np.float32)}
    for layer in (gcn, sage):
        y = jax.jit(functools.partial(layer, dtype=jnp.bfloat16))(params, np.ones((n, 1), jnp.bfloat16), star)
        assert y.dtype == jnp.float32
        assert np.asarray(y)[0, 0] == (n - 1 if layer is gcn else 1)  # bfloat16 sums stop at 256


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m: gcn({"kernel": jnp.ones((9, 2))}, x, m), r"x has shape \(20, 6\), but the kernel \(9, 2\)"),
        (lambda x, m: gcn({"kernel": jnp.ones((6, 2))}, x[:5], m), "needs 20 rows"),
        (lambda x, m: sage({"kernel": jnp.ones((6, 2)), "root": jnp.ones((6, 2))}, x, m, reduce="sum"), "reduce="),
        (lambda x, m: appnp(x, m, alpha=1.0), "alpha=1.0"),
        (lambda x, m: sgc({"kernel": jnp.ones((6, 2))}, x, m, hops=0), "hops=0"),
        (lambda x, m: gcnii({"kernel": jnp.ones((6, 6))}, x, x, m, layer=0), "layer=0"),
        (lambda x, m: dropout(jax.random.key(0), x, 1.0), "rate=1.0"),
        (lambda x, m: gat(layers("gat")[0], x, m, slope=2.0), "slope=2.0"),
        (lambda x, m: gat(layers("gat")[0] | {"source": jnp.ones((2, 4))}, x, m), "10 columns"),
        (lambda x, m: supergat({"kernel": jnp.ones((6, 2))}, x, m, mode="scaled"), "heads=None"),
        (lambda x, m: SAGEConv(2, "mode").init(jax.random.key(0), x, m), "reduce='mode'"),
        (lambda x, m: GATConv(2, attention="gatt").init(jax.random.key(0), x, m), "Did you mean 'gat'"),
        (lambda x, m: GATConv(0).init(jax.random.key(0), x, m), "features=0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(jax.device_put(PYG["x"]), loops())


def test_maximum_of_sparse_features_is_refused():
    x = sparse_matrix([0], [0], None, (NODES, 6))
    params = {"kernel": jnp.ones((6, 2)), "root": jnp.ones((6, 2))}
    with pytest.raises(ValueError, match="x is sparse"):
        sage(params, x, plain(), reduce="max")
    assert isinstance(x, SparseMatrix)
