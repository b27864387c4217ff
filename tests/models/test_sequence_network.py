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
    apply = lambda network, x: np.asarray(jax.jit(network.apply)(variables, x))
    outputs = apply(every, X)
    assert outputs.shape == (4, 6, 2)
    np.testing.assert_allclose(apply(last, X), outputs[:, -1], rtol=0, atol=1e-6)
    np.testing.assert_allclose(apply(last, X[:, :3]), outputs[:, 2], rtol=0, atol=1e-6)
    np.testing.assert_allclose(apply(mean, X), outputs.mean(1), rtol=0, atol=1e-6)


def test_ids_are_embedded():
    network = SequenceNetwork(LAYER, 7, read="all", vocabulary=9, embedding=4)
    ids = np.random.default_rng(0).integers(0, 9, (4, 6))
    variables = jax.jit(network.init)(KEY, ids)
    vectors = np.asarray(variables["params"]["embed"]["embedding"])[ids]
    plain = SequenceNetwork(LAYER, 7, read="all")
    rest = {"params": {name: leaf for name, leaf in variables["params"].items() if name != "embed"}}
    found, want = jax.jit(network.apply)(variables, ids), jax.jit(plain.apply)(rest, vectors)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-6)


def test_dropout_only_in_training():
    network = SequenceNetwork(LAYER, 2, dropout=0.5)
    variables = jax.jit(network.init)(KEY, X)
    plain = SequenceNetwork(LAYER, 2)

    @jax.jit
    def run(variables, key):
        dropped = network.apply(variables, X, train=True, rngs={"dropout": key})
        return network.apply(variables, X), plain.apply(variables, X), dropped

    still, without, dropped = run(variables, KEY)
    np.testing.assert_array_equal(still, without)
    assert not np.allclose(dropped, still)


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
        jax.eval_shape(SequenceNetwork(LAYER, 2, **options).init, KEY, inputs)


@pytest.mark.parametrize("cell", [LSTMCell(5), TARNNCell(5, length=6)])
def test_a_network_step_by_step_is_the_network_over_sequences(cell):
    net = step_network(cell, 2, inputs=3)
    params = jax.jit(net.init)(KEY)
    whole = SequenceNetwork(Recurrent(cell), 2)
    want = jax.jit(whole.apply)({"params": {"layer": {"cell": params["cell"]}, "head": params["head"]}}, X)
    np.testing.assert_allclose(jax.jit(net.infer)(params, X), want, rtol=0, atol=1e-6)

    @jax.jit
    def by_steps(params, xs):
        carry = net.start(4)
        for part in (xs[:2], xs[2:]):  # encoded part by part
            encoded = net.encode(params, part)
            for time in range(len(part)):
                carry, state = net.cell(params, carry, jax.tree.map(lambda leaf, time=time: leaf[time], encoded))
        return net.read(params, state)

    np.testing.assert_allclose(by_steps(params, X.swapaxes(0, 1)), want, rtol=0, atol=1e-6)


def test_a_network_step_by_step_on_ids():
    net = step_network(
        LSTMCell(5), 7, vocabulary=9, read="all", adjust=lambda key, params: params | {"b": jnp.ones(20)}
    )
    ids = np.random.default_rng(0).integers(0, 9, (4, 6))
    params = jax.jit(net.init)(KEY)
    assert (np.asarray(params["cell"]["b"]) == 1).all()
    whole = SequenceNetwork(Recurrent(LSTMCell(5)), 7, read="all", vocabulary=9, embedding=5)
    tree = {"layer": {"cell": params["cell"]}, "head": params["head"], "embed": params["embedding"]}
    found, want = jax.jit(net.infer)(params, ids), jax.jit(whole.apply)({"params": tree}, ids)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-6)


def test_step_network_bad_input():
    with pytest.raises(TypeError, match="cell=GRUCell cannot be taken apart"):
        step_network(nn.GRUCell(5), 2, inputs=3)
    for sizes in ({}, {"inputs": 3, "vocabulary": 4}):
        with pytest.raises(ValueError, match="give the one for vectors or the other for ids"):
            step_network(LSTMCell(5), 2, **sizes)
    net = step_network(TARNNCell(5, length=4), 2, inputs=3)
    with pytest.raises(ValueError, match="length=4, but the sequence has 6 steps"):
        jax.eval_shape(lambda: net.infer(net.init(KEY), X))
