"""The compiled training step on CPU: CSR kernels in both directions, no scatter over the edges, under batches too."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import as_users_compile

from effjax.graph.measures import masked_cross_entropy
from effjax.graph.sparse.attention import weighted_sums
from effjax.graph.sparse.layers import gcn
from effjax.models.gnn import NodeClassifier
from effjax.tasks.graph import node_data

KERNEL = "cpu_csr_sparse_dense_ffi"
SHAPE = r"(%[\w.-]+) = \w+\[([\d,]*)\]"
pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the CSR kernel is the CPU's")


@pytest.fixture(scope="module")
def cora():
    return node_data("cora")


def step(model, variables, task, key):
    loss = lambda v: masked_cross_entropy(
        model.apply(v, task.features, task.adjacency, train=True, rngs={"dropout": key}), task.labels, task.labels >= 0
    )
    return jax.value_and_grad(loss)(variables)


def started(task, **options):
    model = NodeClassifier(task.classes, hidden=16, heads=2, **options)
    init = jax.jit(model.init)
    return model, lambda seed: init(jax.random.key(seed, impl="rbg"), task.features, task.adjacency)


def arrays(task):
    """The part of a task that goes into a program as arguments."""
    return task.features, task.adjacency, task.labels


def program(task, function, *arguments):
    """Compiled, with the graph as an argument."""
    run = lambda inputs, *rest: function(
        task._replace(features=inputs[0], adjacency=inputs[1], labels=inputs[2]), *rest
    )
    return jax.jit(run).lower(arrays(task), *arguments).compile(compiler_options=as_users_compile())


def scatters(text, rows):
    """The scatters of at least so many updates."""
    sizes = {name: [int(size) for size in shape.split(",") if size] for name, shape in re.findall(SHAPE, text)}
    operands = re.findall(r" scatter\(([^)]*)\)", text)
    updates = [re.findall(r"%[\w.-]+", names)[-1] for names in operands]
    return [name for name in updates if max(sizes[name], default=0) >= rows]


# Products with the features (forward, and to the kernel), and with the edges: GCN two in each direction; GAT in both
# layers one a head in each direction (2 heads, then 1), sums of exponentials, and gradients of what makes the logits.
KERNELS = {"gcn": 2 + 2 * 2, "gat": 2 + 2 * 3 + 2 + 4, "sage": 4 + 4, "appnp": 2 + 2, "supergat": 2 + 3 + 3}


@pytest.mark.optimized
@pytest.mark.parametrize("layer", ["gcn", "gat", "sage", "appnp", "supergat"])
def test_training_step_runs_on_the_kernel_both_ways_without_a_scatter(cora, layer):
    model, init = started(cora, layer=layer)
    key = jax.random.key(1, impl="rbg")
    compiled = program(cora, lambda task, v: step(model, v, task, key), init(0))
    text = compiled.as_text()
    assert text.count(f'custom_call_target="{KERNEL}"') >= KERNELS[layer]
    assert scatters(text, cora.adjacency.nnz) == []


@pytest.mark.optimized
def test_the_check_finds_a_scatter(cora):
    pattern = cora.adjacency.pattern
    sums = jax.jit(lambda x: jax.ops.segment_sum(x[pattern.columns], pattern.rows, 2708))
    lowered = sums.lower(jnp.ones((2708, 4)))
    assert scatters(lowered.compile(compiler_options=as_users_compile()).as_text(), cora.adjacency.nnz)


@pytest.mark.parametrize("layer", ["gcn", "gat"])
@pytest.mark.parametrize("loop", ["vmap", "map"])
def test_members_of_an_ensemble_keep_the_kernel(cora, layer, loop):
    model, init = started(cora, layer=layer)
    key = jax.random.key(1, impl="rbg")
    members = [init(seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)

    def run(task, stacked):
        one = lambda v: step(model, v, task, key)
        return jax.vmap(one)(stacked) if loop == "vmap" else jax.lax.map(one, stacked)

    compiled = program(cora, run, stacked)
    text = compiled.as_text()
    assert text.count(f'custom_call_target="{KERNEL}"') >= KERNELS[layer]
    assert scatters(text, cora.adjacency.nnz) == []
    if loop == "vmap":
        alone = program(cora, lambda task, v: step(model, v, task, key), members[1])(arrays(cora), members[1])
        together = jax.tree.map(lambda leaf: leaf[1], compiled(arrays(cora), stacked))
        # Random bits under vmap are others for some generators, so only the first member's loss is compared closely.
        np.testing.assert_allclose(together[0], alone[0], rtol=0.05)


def test_batched_features_and_weights_equal_one_at_a_time(cora):
    matrix = cora.adjacency
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 2708, 4)), jnp.float32)
    kernels = jnp.asarray(rng.normal(size=(3, 4, 2)), jnp.float32)
    batched = jax.jit(jax.vmap(lambda kernel, x: gcn({"kernel": kernel}, x, matrix)))(kernels, x)
    for index in range(3):
        alone = gcn({"kernel": kernels[index]}, x[index], matrix)
        np.testing.assert_allclose(batched[index], alone, rtol=1e-4, atol=1e-5)
    weights = jnp.asarray(rng.normal(size=(3, matrix.nnz, 2)), jnp.float32)
    heads = x.reshape(3, 2708, 2, 2)
    batched = jax.jit(jax.vmap(lambda w, x: weighted_sums(matrix.pattern, w, x)))(weights, heads)
    for index in range(3):
        alone = weighted_sums(matrix.pattern, weights[index], heads[index])
        np.testing.assert_allclose(batched[index], alone, rtol=1e-4, atol=1e-4)


def test_no_edge_sized_constant_is_baked_in(cora):
    """Graphs are arguments: a program of another graph of the same capacity is the same program."""
    model, init = started(cora, layer="gat")
    v = init(0)
    run = jax.jit(lambda v, x, a: model.apply(v, x, a))
    run(v, cora.features, cora.adjacency)
    dropped = cora.adjacency.values.at[:100].set(0)
    run(v, cora.features, cora.adjacency._replace(values=dropped))
    assert run._cache_size() == 1
