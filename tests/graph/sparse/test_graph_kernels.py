"""The compiled training step on CPU: CSR kernels in both directions, no scatter over the edges, under batches too."""

import functools
import re

import jax
import numpy as np
import pytest
from compiling import as_users_compile

from effjax.graph.measures import masked_cross_entropy
from effjax.graph.sparse.attention import weighted_sums
from effjax.graph.sparse.layers import gcn
from effjax.models.gnn import NodeClassifier
from effjax.tasks.graph import node_data

KEY = jax.random.key(1, impl="rbg")
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


@functools.cache
def started(layer, members=None):
    """A model and random parameters, of NumPy as initialisers take long to compile; with members, of each of them."""
    task = node_data("cora")
    model = NodeClassifier(task.classes, hidden=16, heads=2, layer=layer)
    shapes = jax.eval_shape(model.init, KEY, task.features, task.adjacency)
    rng = np.random.default_rng(0)
    lead = () if members is None else (members,)
    draw = lambda leaf: rng.normal(scale=0.1, size=lead + leaf.shape).astype(leaf.dtype)
    return model, jax.tree.map(draw, shapes)


def arrays(task):
    """The part of a task that goes into a program as arguments."""
    return task.features, task.adjacency, task.labels


def program(task, function, *arguments):
    """Compiled, with the graph as an argument.

    HLO is optimized as a user's is; the tests' quicker settings show only in what LLVM makes of it.
    """
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


@functools.cache
def alone(layer):
    """The compiled training step of one network."""
    model, variables = started(layer)
    return program(node_data("cora"), lambda task, v: step(model, v, task, KEY), variables)


@pytest.mark.parametrize("layer", ["gcn", "gat", "sage", "appnp", "supergat"])
def test_training_step_runs_on_the_kernel_both_ways_without_a_scatter(cora, layer):
    text = alone(layer).as_text()
    assert text.count(f'custom_call_target="{KERNEL}"') >= KERNELS[layer]
    assert scatters(text, cora.adjacency.nnz) == []


def test_the_check_finds_a_scatter(cora):
    pattern = cora.adjacency.pattern
    sums = jax.jit(lambda x: jax.ops.segment_sum(x[pattern.columns], pattern.rows, 2708))
    lowered = sums.lower(np.ones((2708, 4), np.float32))
    assert scatters(lowered.compile(compiler_options=as_users_compile()).as_text(), cora.adjacency.nnz)


@pytest.mark.parametrize(
    ("loop", "layer"),
    [("vmap", "gcn"), ("vmap", "gat"), ("map", "gcn"), pytest.param("map", "gat", marks=pytest.mark.nightly)],
)
def test_members_of_an_ensemble_keep_the_kernel(cora, layer, loop):
    model, stacked = started(layer, members=2)

    def run(task, stacked):
        one = lambda v: step(model, v, task, KEY)
        return jax.vmap(one)(stacked) if loop == "vmap" else jax.lax.map(one, stacked)

    compiled = program(cora, run, stacked)
    text = compiled.as_text()
    assert text.count(f'custom_call_target="{KERNEL}"') >= KERNELS[layer]
    assert scatters(text, cora.adjacency.nnz) == []
    if loop == "vmap":
        single = alone(layer)(arrays(cora), jax.tree.map(lambda leaf: leaf[1], stacked))
        together = compiled(arrays(cora), stacked)
        # Random bits under vmap are others for some generators, so only the loss is compared, and not closely.
        np.testing.assert_allclose(np.asarray(together[0])[1], single[0], rtol=0.05)


def test_batched_features_and_weights_equal_one_at_a_time(cora):
    matrix = cora.adjacency
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 2708, 4)).astype(np.float32)
    kernels = rng.normal(size=(3, 4, 2)).astype(np.float32)
    layer = lambda kernel, x, matrix: gcn({"kernel": kernel}, x, matrix)
    batched = jax.jit(jax.vmap(layer, (0, 0, None)))(kernels, x, matrix)
    single = jax.jit(layer)
    for index in range(3):
        alone = single(kernels[index], x[index], matrix)
        np.testing.assert_allclose(np.asarray(batched)[index], alone, rtol=1e-4, atol=1e-5)
    weights = rng.normal(size=(3, matrix.nnz, 2)).astype(np.float32)
    heads = x.reshape(3, 2708, 2, 2)
    batched = jax.jit(jax.vmap(weighted_sums, (None, 0, 0)))(matrix.pattern, weights, heads)
    single = jax.jit(weighted_sums)
    for index in range(3):
        alone = single(matrix.pattern, weights[index], heads[index])
        np.testing.assert_allclose(np.asarray(batched)[index], alone, rtol=1e-4, atol=1e-4)


def test_no_edge_sized_constant_is_baked_in(cora):
    """Graphs are arguments: a program of another graph of the same capacity is the same program."""
    model, v = started("gat")
    run = jax.jit(lambda v, x, a: model.apply(v, x, a))
    run(v, cora.features, cora.adjacency)
    dropped = np.array(cora.adjacency.values)
    dropped[:100] = 0
    run(v, cora.features, cora.adjacency._replace(values=jax.device_put(dropped)))
    assert run._cache_size() == 1
