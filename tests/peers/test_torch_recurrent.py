"""The recurrent layers against PyTorch: equal outputs and gradients of equal weights, and the speed benchmark runs."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.study.readme import replace_card_tables
from effjax.study.report import read_results

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]


def _script():
    spec = importlib.util.spec_from_file_location("recurrent_speed", Path(__file__).with_name("recurrent_speed.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


speed = _script()
SIZE = speed.Size(5, 9, 8, 3)
LAYERS = speed.layers(SIZE)
X = np.random.default_rng(2).normal(size=(SIZE.batch, SIZE.time, SIZE.features)).astype(np.float32)
WEIGHTS = np.random.default_rng(3).normal(size=(SIZE.batch, SIZE.time, SIZE.hidden)).astype(np.float32)


def ours(name):
    """Outputs, and gradients of their weighted sum by the parameter's name."""
    layer = LAYERS[name]
    params = speed.flat_params(layer, SIZE)

    @jax.jit
    def run(params):
        loss = lambda params: jnp.sum(WEIGHTS * layer.apply(speed.jax_variables(layer, params), X))
        return layer.apply(speed.jax_variables(layer, params), X), jax.grad(loss)(params)

    return params, *run(params)


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(want).max()))


@pytest.mark.parametrize("name", LAYERS)
def test_loop_has_our_outputs_and_gradients(name):
    torch = pytest.importorskip("torch")
    params, outputs, gradients = ours(name)
    weights = {key: torch.tensor(value, requires_grad=True) for key, value in params.items()}
    theirs = speed.loops()[name](weights, torch.from_numpy(X))
    np.testing.assert_allclose(outputs, theirs.detach(), rtol=0, atol=1e-5)
    (theirs * torch.from_numpy(WEIGHTS)).sum().backward()
    for key, leaf in weights.items():
        assert_close(gradients[key], leaf.grad.numpy())


@pytest.mark.parametrize("name", speed.FUSED)
def test_fused_layer_has_our_outputs_and_gradients(name):
    torch = pytest.importorskip("torch")
    params, outputs, gradients = ours(name)
    layer = speed.fused(name, params)
    theirs = layer(torch.from_numpy(X))[0]
    np.testing.assert_allclose(outputs, theirs.detach(), rtol=0, atol=1e-5)
    (theirs * torch.from_numpy(WEIGHTS)).sum().backward()
    assert_close(gradients["W"], layer.weight_ih_l0.grad.numpy().T)
    assert_close(gradients["U"], layer.weight_hh_l0.grad.numpy().T)
    assert_close(gradients["b"], layer.bias_ih_l0.grad.numpy())


def test_benchmark_writes_results_that_cards_can_show(tmp_path):
    pytest.importorskip("torch")
    *_, results = speed.benchmark("tiny", "cpu", rounds=2, min_time=0.0, threads=1)
    (tmp_path / "speed.json").write_text(json.dumps(results))
    arms = read_results(tmp_path / "speed.json")["arms"]
    assert len(arms) == 2 * len(LAYERS) + len(speed.layers(SIZE, chunk=1)) + len(speed.FUSED)
    for name, arm in arms.items():
        assert ("forward_tokens_per_s" in arm["metrics"]) != name.endswith("-chunk1")
        for metric in arm["metrics"].values():
            assert 0 < metric["q25"] <= metric["median"] <= metric["q75"]
            assert len(metric["values"]) == 2
    assert all(claim["holds"] == (claim["left"] >= 1) for claim in results["claims"])
    assert results["environment"]["packages"]["torch"]
    marker = "<!-- table speed\nrows: lstm-effjax, lru-loop, gru-fused\n4 x 6 = b4-t6-h8 train_tokens_per_s\n-->\n{}"
    card = replace_card_tables(marker.format("<!-- end of table -->"), tmp_path)
    assert "| LSTM, effjax |" in card
    assert "| LRU, PyTorch loop |" in card
    assert "| GRU, PyTorch fused |" in card
