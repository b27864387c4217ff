"""The same layers as PyTorch Geometric's, with its weights, on Cora: outputs and gradients."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.graph.sparse.adjacency_matrices import adjacency, gcn_adjacency
from effjax.graph.sparse.attention import gat
from effjax.graph.sparse.layers import gcn, sage
from effjax.study.readme import replace_card_tables
from effjax.study.report import read_results
from effjax.tasks.graph import node_data

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def nn():
    return pytest.importorskip("torch_geometric.nn")


@pytest.fixture(scope="module")
def cora():
    return node_data("cora", sparse_below=0.0)


def weights(layer):
    """The layer's parameters in our names and layout."""
    found = {name: np.asarray(leaf.detach().numpy()) for name, leaf in layer.named_parameters()}
    ours = {
        "lin.weight": ("kernel", np.transpose),
        "lin_l.weight": ("kernel", np.transpose),
        "lin_l.bias": ("bias", np.asarray),
        "lin_r.weight": ("root", np.transpose),
        "bias": ("bias", np.asarray),
        "att_src": ("source", np.squeeze),
        "att_dst": ("target", np.squeeze),
    }
    return {ours[name][0]: jnp.asarray(ours[name][1](leaf)) for name, leaf in found.items()}


@pytest.mark.parametrize("name", ["gcn", "gat", "sage", "sage-max"])
def test_outputs_and_gradients_on_cora(nn, cora, name):
    import torch

    senders, receivers = cora.data.senders, cora.data.receivers
    features, nodes = np.array(cora.features), cora.data.nodes
    torch.manual_seed(0)
    if name == "gcn":
        theirs, ours, matrix = nn.GCNConv(features.shape[1], 16), gcn, gcn_adjacency(senders, receivers, nodes)
    elif name == "gat":
        theirs, ours = nn.GATConv(features.shape[1], 4, heads=8), gat
        matrix = adjacency(senders, receivers, nodes, self_loops=True)
    else:
        reduce = "max" if name == "sage-max" else "mean"
        theirs = nn.SAGEConv(features.shape[1], 16, aggr=reduce)
        ours = lambda params, x, matrix: sage(params, x, matrix, reduce=reduce)
        matrix = adjacency(senders, receivers, nodes)
    if name == "sage-max":
        # No ties: of n equal maxima PyTorch gives each 1 / n of the gradient, but 1 / (n + 1) where they are zero.
        features = features + np.random.default_rng(1).random(features.shape, np.float32)
    x = torch.tensor(features, requires_grad=True)
    out = theirs(x, torch.tensor(np.stack([senders, receivers]), dtype=torch.long))
    cotangent = np.random.default_rng(0).normal(size=out.shape).astype(np.float32)
    out.backward(torch.from_numpy(cotangent))

    @jax.jit
    def run(params, x, matrix):
        out, pull = jax.vjp(lambda params, x: ours(params, x, matrix), params, x)
        return out, *pull(cotangent)

    found, to_params, to_x = run(weights(theirs), features, matrix)
    np.testing.assert_allclose(found, out.detach().numpy(), **TOLERANCE)
    np.testing.assert_allclose(to_x, x.grad.numpy(), **TOLERANCE)
    for parameter in theirs.parameters():
        parameter.data = parameter.grad
    for leaf, wanted in weights(theirs).items():
        np.testing.assert_allclose(to_params[leaf], wanted, rtol=1e-3, atol=1e-4, err_msg=leaf)


@pytest.mark.usefixtures("nn")
def test_benchmark_writes_results_that_cards_can_show(tmp_path):
    words = ["--graphs", "tiny", "--rounds", "2", "--min-time", "0", "--thread-counts", "1"]
    script = Path(__file__).with_name("graph_speed.py")
    subprocess.run([sys.executable, script, "--out", tmp_path / "speed.json", *words], check=True)
    results = read_results(tmp_path / "speed.json")
    assert results["failed"] == {}
    for network, names in (("gcn", 6), ("gat", 5), ("forms", 4)):
        assert sum(arm["group"] == f"cora-{network}-1t" for arm in results["arms"].values()) == names
    assert all(claim["holds"] == (claim["left"] >= 1) for claim in results["claims"])
    marker = "<!-- table speed\nrows: effjax, pyg\nGCN = cora-gcn-1t step_ms\n-->\n<!-- end of table -->"
    card = replace_card_tables(marker, tmp_path)
    assert "| PyTorch Geometric, edge_index |" in card
