import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import as_users_compile
from hypothesis import example, given, settings
from hypothesis import strategies as st

from effjax.data.pipeline import ResumableIterator, prefetch_to_device
from effjax.graph.sparse.adjacency_matrices import adjacency, gcn_adjacency
from effjax.graph.sparse.sampling import NeighbourSampler, block_mean, block_sum, sample_entries

VECTORS = np.load(Path(__file__).parents[2] / "reference" / "fastrain_gnn" / "pyg_layers.npz")
X = VECTORS["x"]
NODES = len(X)
GRAPH = adjacency(*VECTORS["edge_index"], NODES)
DEGREES = np.asarray(np.diff(GRAPH.pattern.indptr))
WHOLE = (int(DEGREES.max()),) * 2
near = lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6)


def same(a, b):
    return all(x.tobytes() == y.tobytes() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def random_graph(seed=0, nodes=200, edges=1500, **options):
    rng = np.random.default_rng(seed)
    pairs = np.unique(rng.integers(0, nodes - 1, (edges, 2)), axis=0)  # the last node is isolated
    return adjacency(*pairs.T, nodes, **options)


def sage(params, x, blocks):
    for layer, block in enumerate(blocks):
        theirs, bias, own = (params[f"{layer}__{name}"] for name in ("lin_l__weight", "lin_l__bias", "lin_r__weight"))
        x = block_mean(block, x) @ theirs.T + bias[None] + x[: block.targets] @ own.T
        x = jax.nn.relu(x) if layer == 0 else x
    return x


# Against full-batch layers


@pytest.mark.parametrize("batch_size", [NODES, 6])
def test_a_fan_out_of_the_largest_degree_is_the_full_batch_layer_of_pyg(batch_size):
    params = {name[14:]: VECTORS[name] for name in VECTORS.files if name.startswith("sage_mean__p__")}
    sampler = NeighbourSampler(GRAPH, np.arange(NODES), WHOLE, batch_size=batch_size, seed=0, epochs=1)
    out, grad_x = np.zeros((NODES, 3), np.float32), np.zeros_like(X)
    grads = jax.tree.map(np.zeros_like, params)

    @jax.jit
    def pulled(params, x, batch, cotangent):
        logits, pull = jax.vjp(lambda params, x: sage(params, x, batch.blocks), params, x)
        return logits, *pull(cotangent * batch.weight[:, None])

    for batch in sampler:
        cotangent = VECTORS["cotangent"][batch.seeds]
        logits, to_params, to_x = pulled(params, X[batch.nodes], batch, cotangent)
        real = batch.weight > 0
        out[batch.seeds[real]] = np.asarray(logits)[real]
        np.add.at(grad_x, batch.nodes, np.asarray(to_x))
        grads = jax.tree.map(np.add, grads, to_params)
    assert pulled._cache_size() == 1
    near(out, VECTORS["sage_mean__out"])
    near(grad_x, VECTORS["sage_mean__grad_x"])
    for name, grad in grads.items():
        near(grad, VECTORS[f"sage_mean__g__{name}"])


def test_a_whole_weighted_sum_is_the_sparse_product():
    graph = gcn_adjacency(*VECTORS["edge_index"], NODES)
    sampler = NeighbourSampler(graph, np.arange(NODES), (WHOLE[0] + 1,), batch_size=7, seed=3, epochs=1)
    out = np.zeros_like(X)
    for batch in sampler:
        real = batch.weight > 0
        out[batch.seeds[real]] = np.asarray(block_sum(batch.blocks[0], X[batch.nodes]))[real]
    near(out, graph @ X)


@pytest.mark.parametrize("fanout", [5, 40])  # one a chain of gathers, one too wide for that
def test_sums_and_gradients_are_those_of_the_table(fanout):
    batch = NeighbourSampler(random_graph(), np.arange(200), (fanout,), batch_size=200, seed=0)[0]
    block, x = batch.blocks[0], jnp.asarray(np.random.default_rng(0).normal(size=(200, 3)), jnp.float32)
    plain = lambda values, x: jnp.einsum("tk,tkf->tf", values, x[block.neighbours])
    ours = lambda values, x: block_sum(block._replace(values=values), x)

    def pulled(form):
        y, pull = jax.vjp(form, jnp.asarray(block.values), x)
        return y, *pull(jnp.sin(y))

    for a, b in zip(*(jax.jit(pulled, static_argnums=0)(form) for form in (ours, plain)), strict=True):
        near(a, b)


# The draws


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 60))
@example(10, [2, 1, 1], 52)
def test_a_batch_is_a_part_of_the_graph(seed, fanouts, batch_size):
    graph = random_graph(nodes=60, edges=300)
    dense = np.asarray(graph.todense()) > 0
    degrees = dense.sum(1)
    sampler = NeighbourSampler(graph, np.arange(60), fanouts, batch_size=batch_size, seed=seed)
    batch = sampler[seed % 20]
    assert [block.sources for block in batch.blocks[::-1]] == list(sampler.sizes[1:])
    assert [block.targets for block in batch.blocks[::-1]] == list(sampler.sizes[:-1])
    real = int(batch.weight.sum())
    assert (batch.nodes[:real] == batch.seeds[:real]).all()
    for fanout, block in zip(fanouts, batch.blocks[::-1], strict=True):
        nodes = batch.nodes[: block.sources]
        for row in range(real):
            there = nodes[block.neighbours[row][block.mask[row]]]
            assert len(set(there.tolist())) == len(there) == min(degrees[nodes[row]], fanout)
            assert dense[nodes[row], there].all()
        assert not block.mask[real:].any()
        assert (block.values[~block.mask] == 0).all()
        flat = block.neighbours.ravel()[block.t_order]
        assert (np.diff(flat) >= 0).all()
        assert (block.t_indptr == np.searchsorted(flat, np.arange(block.sources + 1))).all()
        real = max(real, int(block.neighbours.max()) + 1)  # the targets stay, also where nobody draws the last of them
    assert len(set(batch.nodes[:real].tolist())) == real


def test_every_subset_is_equally_likely():
    draws = 6000
    entries, mask = sample_entries(np.array([0, 5]), np.zeros(draws, int), 2, np.random.default_rng(0))
    assert mask.all()
    codes, counts = np.unique(np.sort(entries, 1) @ [10, 1], return_counts=True)
    assert len(codes) == 10
    assert ((counts - draws / 10) ** 2 / (draws / 10)).sum() < 27.9  # chi-square, 9 degrees, p = 0.001


@pytest.mark.parametrize("combine", [block_mean, block_sum])
def test_the_estimators_are_unbiased(combine):
    graph = gcn_adjacency(*VECTORS["edge_index"], NODES)
    sampler = NeighbourSampler(graph, np.arange(NODES), (2,), batch_size=NODES, seed=0, shuffle=False)
    run = jax.jit(lambda batch, x: combine(batch.blocks[0], x))
    draws = np.stack([run(batch, X[batch.nodes]) for batch in (sampler[i] for i in range(400))])
    if combine is block_sum:
        truth = np.asarray(graph @ X)
    else:
        dense = np.asarray(graph.todense()) > 0
        truth = dense @ X / dense.sum(1, keepdims=True)
    error = np.abs(draws.mean(0) - truth) / (draws.std(0) / 20 + 1e-6)
    assert draws.std(0).max() > 0.1
    assert error.max() < 4.5


def test_isolated_nodes_padding_and_a_graph_without_edges():
    padded, plain = random_graph(capacity=4000), random_graph()
    for index in (0, 7):
        batches = [NeighbourSampler(g, np.arange(200), (4, 3), batch_size=50, seed=1)[index] for g in (padded, plain)]
        assert same(*batches)
    empty = NeighbourSampler(adjacency([], [], 4), [3, 1], (2, 2), batch_size=2, seed=0, shuffle=False)
    batch = next(empty)
    assert not any(block.mask.any() for block in batch.blocks)
    x = np.ones((4, 3), np.float32)[batch.nodes]
    assert (np.asarray(block_mean(batch.blocks[0], x)) == 0).all()
    assert (np.asarray(block_sum(batch.blocks[0], x)) == 0).all()


def test_held_out_nodes_are_never_seeds_and_every_training_node_is_one_once_an_epoch():
    train = np.random.default_rng(0).permutation(200)[:47]
    labels = np.full(200, 10**6)
    labels[train] = 1
    sampler = NeighbourSampler(random_graph(), train, (3, 3), batch_size=10, seed=0, epochs=3)
    assert len(sampler) == 15
    assert sampler.batches_per_epoch == 5
    batches = list(sampler)
    for batch in batches:
        assert (labels[batch.seeds] == 1).all()  # dummies too
    for epoch in range(3):
        each = [batch.seeds[batch.weight > 0] for batch in batches[5 * epoch : 5 * epoch + 5]]
        assert sorted(np.concatenate(each)) == sorted(train)
    assert batches[4].weight.sum() == 7
    assert not same(batches[0], batches[5])


# As an iterator


def test_resume_is_exact_and_another_seed_differs():
    make = lambda **options: NeighbourSampler(
        random_graph(), np.arange(100), (3, 2), **{"batch_size": 30, "seed": 5, "epochs": 2} | options
    )
    whole = list(make())
    cut = make()
    assert isinstance(cut, ResumableIterator)
    for _ in range(3):
        next(cut)
    state = json.loads(json.dumps(cut.get_state()))
    other = make()
    other.set_state(state)
    for ours, theirs in zip(other, whole[3:], strict=True):
        assert same(ours, theirs)
    assert not same(make(seed=6)[0], whole[0])
    with prefetch_to_device(make()) as ahead:
        assert same(jax.tree.map(np.asarray, next(ahead)), whole[0])
    with pytest.raises(ValueError, match="batch_size is 30 in the state and 20 here"):
        make(batch_size=20).set_state(state)
    with pytest.raises(ValueError, match=re.escape("fanouts is [3, 2] in the state and [3] here")):
        NeighbourSampler(random_graph(), np.arange(100), (3,), batch_size=30, seed=5, epochs=2).set_state(state)
    with pytest.raises(ValueError, match="graph is"):
        NeighbourSampler(random_graph(1), np.arange(100), (3, 2), batch_size=30, seed=5, epochs=2).set_state(state)


# On the device


@pytest.mark.promotes
@pytest.mark.optimized
def test_no_scatter_of_messages_on_cpu():
    batch = NeighbourSampler(random_graph(), np.arange(100), (5,), batch_size=50, seed=0)[0]
    x = jnp.ones((batch.blocks[0].sources, 3))
    gradient = jax.jit(jax.grad(lambda x, block: jnp.sum(block_mean(block, x) ** 2)))
    text = gradient.lower(x, batch.blocks[0]).compile(compiler_options=as_users_compile()).as_text()
    assert "csr_sparse_dense" in text
    assert " scatter(" not in text
    block = batch.blocks[0]
    plain = jax.jit(jax.grad(lambda x: jnp.sum((x[block.neighbours] * block.mask[..., None]).sum(1) ** 2)))
    assert " scatter(" in plain.lower(x).compile(compiler_options=as_users_compile()).as_text()


def test_half_precision_is_summed_in_single():
    graph = adjacency(np.arange(1, 301), np.zeros(300, int), 301)
    batch = NeighbourSampler(graph, [0], (300,), batch_size=1, seed=0)[0]
    x = jnp.ones((301, 1), jnp.bfloat16)
    total = block_sum(batch.blocks[0], x)
    assert (total.dtype, float(total[0, 0])) == (jnp.bfloat16, 300.0)
    assert jax.jit(jax.grad(lambda x: block_sum(batch.blocks[0], x).sum().astype(float)))(x).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": [0, 20]}, r"seeds hold 20 and 0 more numbers outside \[0, 19\]"),
        ({"seeds": [1, 1]}, "of which 1 differ"),
        ({"seeds": []}, "at least one"),
        ({"seeds": np.ones(NODES, bool)}, "np.flatnonzero"),
        ({"fanouts": (3, 0)}, r"fanouts\[1\]=0"),
        ({"fanouts": ()}, "no hop"),
        ({"batch_size": 3}, "batch_size=3 is larger than the data"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_input(change, words):
    arguments = {"matrix": GRAPH, "seeds": [0, 1], "fanouts": (2,), "batch_size": 2, "seed": 0} | change
    with pytest.raises(ValueError, match=words):
        NeighbourSampler(**arguments)


def test_features_of_another_size_are_refused():
    batch = NeighbourSampler(GRAPH, [0], (2,), batch_size=1, seed=0)[0]
    with pytest.raises(ValueError, match=r"x has shape \(20, 6\), but the block has 3 sources"):
        block_mean(batch.blocks[0], X)
