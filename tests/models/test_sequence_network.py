"""Networks around a recurrent layer: what they read, ids and vectors, dropout, bad input."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.models.sequence import LSTMCell, Recurrent
from effjax.models.sequence_network import SequenceNetwork, step_network
from effjax.recurrent.tarnn import TARNNCell

KEY = jax.random.key(0, impl="rbg")
X = np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32)
LAYER = Recurrent(LSTMCell(5))


def test_what_the_head_reads():
    last, every, mean = (SequenceNetwork(LAYER, 2, read=read) for read in ("last", "all", "mean"))
    variables = jax.jit(last.init)(KEY, X)
    outputs = every.apply(variables, X)
    assert outputs.shape == (4, 6, 2)
    np.testing.assert_allclose(last.apply(variables, X), outputs[:, -1], rtol=0, atol=1e-6)
    np.testing.assert_allclose(last.apply(variables, X[:, :3]), outputs[:, 2], rtol=0, atol=1e-6)
    np.testing.assert_allclose(mean.apply(variables, X), outputs.mean(1), rtol=0, atol=1e-6)


def test_ids_are_embedded():
    network = SequenceNetwork(LAYER, 7, read="all", vocabulary=9, embedding=4)
    ids = np.random.default_rng(0).integers(0, 9, (4, 6))
    variables = jax.jit(network.init)(KEY, ids)
    vectors = variables["params"]["embed"]["embedding"][ids]
    plain = SequenceNetwork(LAYER, 7, read="all")
    rest = {"params": {name: leaf for name, leaf in variables["params"].items() if name != "embed"}}
    np.testing.assert_allclose(network.apply(variables, ids), plain.apply(rest, vectors), rtol=0, atol=1e-6)


def test_dropout_only_in_training():
    network = SequenceNetwork(LAYER, 2, dropout=0.5)
    variables = jax.jit(network.init)(KEY, X)
    apply = lambda **options: np.asarray(network.apply(variables, X, **options))
    np.testing.assert_array_equal(apply(), SequenceNetwork(LAYER, 2).apply(variables, X))
    assert not np.allclose(apply(train=True, rngs={"dropout": KEY}), apply())


BAD = {
    "read": ({"read": "first"}, X, "read='first'"),
    "both": ({"vocabulary": 3}, X, "vocabulary=3 and embedding=None: ids need both"),
    "ids": ({"vocabulary": 3, "embedding": 2}, X, r"x has shape \(4, 6, 3\).* asks for ids"),
    "vectors": ({}, X[..., 0], r"x has shape \(4, 6\).* asks for vectors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    options, inputs, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(SequenceNetwork(LAYER, 2, **options).init, KEY, jnp.asarray(inputs))


@pytest.mark.parametrize("cell", [LSTMCell(5), TARNNCell(5, length=6)])
def test_a_network_step_by_step_is_the_network_over_sequences(cell):
    net = step_network(cell, 2, inputs=3)
    params = jax.jit(net.init)(KEY)
    whole = SequenceNetwork(Recurrent(cell), 2)
    want = whole.apply({"params": {"layer": {"cell": params["cell"]}, "head": params["head"]}}, X)
    np.testing.assert_allclose(net.infer(params, X), want, rtol=0, atol=1e-6)
    carry, xs = net.start(4), jnp.swapaxes(X, 0, 1)
    for part in (xs[:2], xs[2:]):  # encoded part by part
        encoded = net.encode(params, part)
        for time in range(len(part)):
            carry, state = net.cell(params, carry, jax.tree.map(lambda leaf, time=time: leaf[time], encoded))
    np.testing.assert_allclose(net.read(params, state), want, rtol=0, atol=1e-6)


def test_a_network_step_by_step_on_ids():
    net = step_network(
        LSTMCell(5), 7, vocabulary=9, read="all", adjust=lambda key, params: params | {"b": jnp.ones(20)}
    )
    ids = np.random.default_rng(0).integers(0, 9, (4, 6))
    params = jax.jit(net.init)(KEY)
    assert (params["cell"]["b"] == 1).all()
    whole = SequenceNetwork(Recurrent(LSTMCell(5)), 7, read="all", vocabulary=9, embedding=5)
    tree = {"layer": {"cell": params["cell"]}, "head": params["head"], "embed": params["embedding"]}
    np.testing.assert_allclose(net.infer(params, ids), whole.apply({"params": tree}, ids), rtol=0, atol=1e-6)


def test_step_network_bad_input():
    with pytest.raises(TypeError, match="cell=GRUCell cannot be taken apart"):
        step_network(nn.GRUCell(5), 2, inputs=3)
    for sizes in ({}, {"inputs": 3, "vocabulary": 4}):
        with pytest.raises(ValueError, match="give the one for vectors or the other for ids"):
            step_network(LSTMCell(5), 2, **sizes)
    net = step_network(TARNNCell(5, length=4), 2, inputs=3)
    with pytest.raises(ValueError, match="length=4, but the sequence has 6 steps"):
        net.infer(net.init(KEY), X)
