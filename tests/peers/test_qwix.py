"""Pruned models in 8 bits by Qwix: the weights of the sliced matrices are a quarter as large."""

import jax
import numpy as np
import pytest

from effjax.models.bert import Bert, BertClassifier
from effjax.transformers.prune_spec import PruneSpec, prune_shape
from effjax.transformers.slicing import slice_model

pytestmark = [pytest.mark.peers, pytest.mark.promotes, pytest.mark.filterwarnings("default")]


def test_a_sliced_model_is_quantised_as_any_other():
    qwix = pytest.importorskip("qwix")
    module = BertClassifier(Bert(100, 64, num_layers=2, num_heads=4, intermediate_size=128), classes=2)
    ids = np.random.default_rng(0).integers(0, 100, (8, 12)).astype(np.int32)
    params = jax.jit(module.init)(jax.random.key(0), ids)["params"]
    shape = prune_shape(module, group_size=32)
    small, sliced = slice_model(module, params, PruneSpec(shape, mlp=(1,), heads=((0, 1),), groups=((0, 0),)))
    rules = [qwix.QuantizationRule(module_path="encoder/layer_.*", weight_qtype="int8")]
    quantised = qwix.quantize_model(small, qwix.PtqProvider(rules))
    shapes = jax.eval_shape(quantised.init, jax.random.key(0), ids)["params"]
    own = qwix.quantize_params(sliced, shapes)
    whole, narrow = small.apply({"params": sliced}, ids), quantised.apply({"params": own}, ids)
    np.testing.assert_allclose(narrow, whole, atol=0.02 * float(np.abs(whole).max()))
    assert np.abs(narrow - whole).max() > 0
    kernel = own["encoder"]["layer_0"]["attention"]["query"]["kernel"]
    stored = jax.tree.leaves(kernel)
    assert any(leaf.dtype == np.int8 and leaf.shape == (64, 48) for leaf in stored)
