"""Networks around a recurrent layer: what they read, ids and vectors, dropout, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.models.sequence import LSTMCell, Recurrent
from effjax.models.sequence_network import SequenceNetwork

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
