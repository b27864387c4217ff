"""Training steps of a GCN and a GAT against PyTorch Geometric and Jraph, and one sum over the edges in each form.

Run it on a quiet machine, from the repository::

    python tests/peers/graph_speed.py --out configs/geeni/results/speed-amd-epyc-2-cores.json

Full-batch steps (forward, backward, Adam) of two-layer networks on real graphs, float32: GCN with 64 hidden units and
dropout 0.5 between the layers; GAT with 8 heads of 8, one head in the last layer, dropout 0.6 of inputs, hidden units
and attention. All arms of a graph and a network are timed in turns in one process; every number of threads has a
process of its own, as JAX's threads are those it starts with. Resident memory is the high-water mark of another process
that loads the graph with effjax (so all of them import JAX) and trains with one arm on one thread; with several numbers
of threads it stands in the rows of one. A file that is there is continued: what it holds is not measured again.
"""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from effjax.study.report import SCHEMA
from effjax.study.results import COST_FIELDS, environment, summary

RATE = 0.01
HIDDEN, HEADS = 64, 8
DROPOUT = {"gcn": 0.5, "gat": 0.6}
GRAPHS = {
    "tiny": ("cora",),
    "small": ("cora", "dblp"),
    "all": ("cora", "dblp", "amazon_computers", "coauthor_physics"),
}
NETWORKS = ("gcn", "gat")
# name: (label, role)
ARMS = {
    "effjax": ("effjax", "method"),
    "effjax-dense": ("effjax, features not sparse", "method"),
    "pyg": ("PyTorch Geometric, edge_index", "baseline"),
    "pyg-csr": ("PyTorch Geometric, CSR adjacency", "baseline"),
    "torch-sparse": ("PyTorch, CSR adjacency and CSR features", "baseline"),
    "jraph": ("Jraph", "alternative"),
}

METRIC = {"name": "both_per_s", "goal": "max", "label": "training steps per second"}


class Arm(NamedTuple):
    """A training step that returns when it is done, and what is known of it."""

    step: Callable[[], Any]
    cost: Mapping[str, Any]


def task(graph: str) -> Any:
    """The graph with labels, and 20 training nodes a class."""
    from effjax.tasks.graph import node_data

    return node_data(graph)


def training_nodes(labels: Any, classes: int) -> Any:
    labels = np.asarray(labels)
    rng = np.random.default_rng(0)
    chosen = [rng.permutation(np.flatnonzero(labels == index))[:20] for index in range(classes)]
    return np.sort(np.concatenate(chosen))


def dense_features(features: Any) -> Any:
    return np.asarray(features.todense() if hasattr(features, "todense") else features)


# JAX


def jax_arm(graph: str, network: str, name: str) -> Arm:
    import jax.numpy as jnp
    import optax

    from effjax.core.cost import Executables, count_params
    from effjax.graph.measures import masked_cross_entropy
    from effjax.models.gnn import NodeClassifier

    data = task(graph)
    features = data.features if name == "effjax" else jnp.asarray(dense_features(data.features))
    mask = jnp.zeros(len(data.labels), bool).at[training_nodes(data.labels, data.classes)].set(True)
    if name == "jraph":
        edges = jraph_graph(data)
        init, apply = jraph_network(network, data.classes)
        variables = init(jax.random.key(0, impl="rbg"), features.shape[1])
    else:
        edges = data.adjacency
        model = NodeClassifier(data.classes, HIDDEN, layer=network, heads=HEADS, dropout=DROPOUT[network])
        variables = jax.jit(model.init)(jax.random.key(0, impl="rbg"), features, edges)
        apply = lambda v, x, edges, key: model.apply(v, x, edges, train=True, rngs={"dropout": key})
    tx = optax.adam(RATE)

    def update(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        variables, opt_state, key = state
        x, edges, labels, mask = batch
        key, now = jax.random.split(key)
        loss = lambda v: masked_cross_entropy(apply(v, x, edges, now), labels, mask)
        value, grads = jax.value_and_grad(loss)(variables)
        updates, opt_state = tx.update(grads, opt_state, variables)
        return (optax.apply_updates(variables, updates), opt_state, key), value

    batch = (features, edges, data.labels, mask)
    state = (variables, tx.init(variables), jax.random.key(1))
    program = Executables(update)
    program.compile(state, batch)

    def step() -> None:
        nonlocal state
        state, value = program(state, batch)
        jax.block_until_ready(value)

    analysis = program.analysis()
    cost = {"params": count_params(variables), "compile_s": program.compile_s, "compiles": program.compiles}
    return Arm(step, cost | {"peak_bytes": analysis.peak_bytes, "temp_bytes": analysis.temp_bytes})


def jraph_graph(data: Any) -> tuple[Any, Any]:
    """Senders and receivers with self-edges, sorted by receiver."""
    pattern = data.adjacency.pattern
    return pattern.columns, pattern.rows


def jraph_network(network: str, classes: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Initial parameters and logits of the two-layer network, from Jraph's layers."""
    import jax.numpy as jnp
    import jraph

    heads = (HEADS, 1) if network == "gat" else (1, 1)
    widths = (HIDDEN // heads[0], classes)
    glorot = jax.nn.initializers.glorot_uniform()

    def drop(key, x):
        keep = jax.random.bernoulli(key, 1 - DROPOUT[network], x.shape)
        return jnp.where(keep, x / (1 - DROPOUT[network]), 0)

    def init(key, features):
        params = []
        for count, width in zip(heads, widths, strict=True):
            shape = (features, count * width)
            params.append({"kernel": glorot(key, shape), "bias": jnp.zeros(count * width if count > 1 else width)})
            if network == "gat":
                params[-1] |= {"source": glorot(key, (count, width)), "target": glorot(key, (count, width))}
            features = count * width
        return params

    def gcn(layer, graph):
        update = lambda x: x @ layer["kernel"]
        convolved = jraph.GraphConvolution(update, symmetric_normalization=True)(graph)
        return convolved.nodes + layer["bias"]

    def gat(layer, graph, key, concat):
        count, width = layer["source"].shape

        def logits(sent, received, edges):
            scores = jnp.sum(sent * layer["source"] + received * layer["target"], -1, keepdims=True)
            return jax.nn.leaky_relu(scores, 0.2)

        # Jraph's layer has no dropout of the attention; here it drops whole messages of a head, at the same cost.
        query = lambda x: (x @ layer["kernel"]).reshape(-1, count, width)
        update = lambda x: x.reshape(len(x), -1) if concat else jnp.mean(x, axis=1)
        return jraph.GAT(query, logits, update)(graph).nodes + layer["bias"]

    def apply(params, x, edges, key):
        first, second, third = jax.random.split(key, 3)
        nodes = x.shape[0]
        graph = jraph.GraphsTuple(
            nodes=x,
            edges=None,
            senders=edges[0],
            receivers=edges[1],
            globals=None,
            n_node=jnp.array([nodes]),
            n_edge=jnp.array([len(edges[0])]),
        )
        if network == "gcn":
            x = drop(first, jax.nn.relu(gcn(params[0], graph)))
            return gcn(params[1], graph._replace(nodes=x))
        x = jax.nn.elu(gat(params[0], graph._replace(nodes=drop(first, x)), second, True))
        return gat(params[1], graph._replace(nodes=drop(third, x)), second, False)

    return init, apply


# PyTorch


def torch_arm(graph: str, network: str, name: str) -> Arm:
    import torch
    import torch.nn.functional as F

    data = task(graph)
    pattern = data.adjacency.pattern
    nodes, labels = len(data.labels), torch.from_numpy(np.asarray(data.labels).astype(np.int64))
    chosen = torch.from_numpy(training_nodes(data.labels, data.classes))
    tensor = lambda array: torch.from_numpy(np.array(array))
    csr = torch.sparse_csr_tensor(
        tensor(pattern.indptr).long(), tensor(pattern.columns).long(), tensor(data.adjacency.values), (nodes, nodes)
    )
    edge_index = torch.stack([tensor(data.data.senders), tensor(data.data.receivers)]).long()
    edges = edge_index if name == "pyg" else csr
    if name == "torch-sparse":
        stored = data.features
        x = torch.sparse_csr_tensor(
            tensor(stored.pattern.indptr).long(),
            tensor(stored.pattern.columns).long(),
            tensor(stored.values),
            stored.shape,
        )
        network = _TorchSparse(stored.shape[1], data.classes)
    else:
        x = tensor(dense_features(data.features))
        network = _pyg_network(network, x.shape[1], data.classes, normalize=name == "pyg")
    tx = torch.optim.Adam(network.parameters(), RATE)
    network.train()

    def step() -> None:
        tx.zero_grad()
        F.cross_entropy(network(x, edges)[chosen], labels[chosen]).backward()
        tx.step()

    step()  # what is cached, and whether this PyTorch can do it
    return Arm(step, {"params": sum(parameter.numel() for parameter in network.parameters())})


def _pyg_network(network: str, features: int, classes: int, normalize: bool) -> Any:
    """``normalize``: from an edge_index without self-loops, cached; else the given matrix has both."""
    import torch
    import torch.nn.functional as F
    from torch_geometric.nn import GATConv, GCNConv

    rate = DROPOUT[network]

    class GCN(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = GCNConv(features, HIDDEN, cached=normalize, normalize=normalize)
            self.last = GCNConv(HIDDEN, classes, cached=normalize, normalize=normalize)

        def forward(self, x, edges):
            x = F.dropout(F.relu(self.first(x, edges)), rate, self.training)
            return self.last(x, edges)

    class GAT(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = GATConv(features, HIDDEN // HEADS, HEADS, dropout=rate, add_self_loops=normalize)
            self.last = GATConv(HIDDEN, classes, 1, concat=False, dropout=rate, add_self_loops=normalize)

        def forward(self, x, edges):
            x = F.elu(self.first(F.dropout(x, rate, self.training), edges))
            return self.last(F.dropout(x, rate, self.training), edges)

    return {"gcn": GCN, "gat": GAT}[network]()


def _TorchSparse(features: int, classes: int) -> Any:
    """The GCN without PyTorch Geometric: sparse products alone."""
    import torch
    import torch.nn.functional as F

    class GCN(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = torch.nn.Linear(features, HIDDEN), torch.nn.Linear(HIDDEN, classes)

        def forward(self, x, a):
            x = a @ (x @ self.first.weight.T) + self.first.bias
            x = F.dropout(F.relu(x), DROPOUT["gcn"], self.training)
            return a @ (x @ self.last.weight.T) + self.last.bias

    return GCN()


# Measuring


def legal(graph: str, network: str) -> list[str]:
    """The arms of a graph and a network."""
    sparse = hasattr(task(graph).features, "todense")
    drop = set() if sparse else {"effjax-dense", "torch-sparse"}
    drop |= {"torch-sparse"} if network == "gat" else set()
    return [name for name in ARMS if name not in drop]


def make(graph: str, network: str, name: str) -> Arm:
    return (jax_arm if name in ("effjax", "effjax-dense", "jraph") else torch_arm)(graph, network, name)


def measure(graph: str, network: str, rounds: int, min_time: float) -> dict[str, Any]:
    """Row -> arm of a results.json, with the samples of a step in milliseconds."""
    from effjax.core.timing import time_interleaved

    arms, failed = {}, {}
    for name in legal(graph, network):
        try:
            arms[name] = make(graph, network, name)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            failed[name] = str(error).partition("\n")[0]
    timings = time_interleaved(
        {name: arm.step for name, arm in arms.items()}, rounds=rounds, warmup=2, min_time=min_time
    )
    found = {}
    for name, timed in timings.items():
        found[name] = {"samples_ms": timed.samples_ms, "cost": {**arms[name].cost, "step_ms": timed.median_ms}}
    return {"timed": found, "failed": failed}


def memory(row: str) -> float:
    """High-water mark of the resident memory of a process that trains with the arm of a row, in MiB."""
    group, _, name = row.partition("/")
    graph, network, threads = group.removesuffix("t").rsplit("-", 2)
    words = [sys.executable, __file__, "--resident", f"{graph}/{network}/{name}", "--threads", threads]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1]) / 2**10


def resident(which: str) -> None:
    arm = make(*which.split("/"))
    for _ in range(3):
        arm.step()
    # Of this program alone: ru_maxrss would be at least what the process was before it became this program.
    print(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def forms(graph: str, rounds: int, min_time: float) -> dict[str, Any]:
    """Milliseconds of ``A @ x`` [N, 64] and of it with its gradient, for every kernel."""
    from effjax.core.timing import time_interleaved
    from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
    from effjax.graph.sparse.products import KERNELS, spmm

    data = task(graph).data
    matrix = gcn_adjacency(data.senders, data.receivers, data.nodes, buckets=True)
    x = jax.random.normal(jax.random.key(0), (data.nodes, HIDDEN))
    runs = {}
    for kernel in KERNELS:
        if kernel == "dense" and data.nodes > 15_000:
            continue
        product = jax.jit(lambda matrix, x, kernel=kernel: spmm(matrix, x, kernel=kernel))
        both = jax.jit(lambda matrix, x, kernel=kernel: jax.vjp(lambda x: spmm(matrix, x, kernel=kernel), x)[1](x))
        runs[kernel, "forward"] = lambda f=product: jax.block_until_ready(f(matrix, x))
        runs[kernel, "both"] = lambda f=both: jax.block_until_ready(f(matrix, x))
    timed = time_interleaved(runs, rounds=rounds, warmup=2, min_time=min_time)
    found: dict[str, Any] = {}
    for (kernel, way), samples in timed.items():
        found.setdefault(kernel, {})[way] = samples.samples_ms
    return found


def worker(options: argparse.Namespace) -> None:
    """Print what one process measured, as JSON."""
    import torch

    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {}
    for graph in GRAPHS[options.graphs]:
        found[f"{graph}/forms"] = forms(graph, options.rounds, options.min_time)
        for network in NETWORKS:
            found[f"{graph}/{network}"] = measure(graph, network, options.rounds, options.min_time)
            print(f"{options.threads} threads, {graph}, {network}: done", file=sys.stderr, flush=True)
    print(json.dumps(found))


def rates(samples_ms: Sequence[float]) -> dict[str, Any]:
    low, median, high = np.quantile(samples_ms, [0.25, 0.5, 0.75])
    return summary([1e3 / ms for ms in samples_ms]) | {"q25": 1e3 / high, "median": 1e3 / median, "q75": 1e3 / low}


def results(found: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """What a process printed, as the parts of a results.json: arms, claims, and why an arm failed."""
    arms, claims, failed = {}, [], {}
    for where, measured in found.items():
        group = f"{where.replace('/', '-')}-{threads}t"
        if where.endswith("/forms"):
            for form, ways in measured.items():
                metrics = {f"{way}_per_s": rates(samples) for way, samples in ways.items()}
                role = "method" if form == "csr" else "alternative"
                arms[f"{group}/{form}"] = _row(group, form, role, metrics, {"step_ms": float(np.median(ways["both"]))})
            continue
        for name, timed in measured["timed"].items():
            metrics = {"steps_per_s": rates(timed["samples_ms"])}
            arms[f"{group}/{name}"] = _row(group, *ARMS[name], metrics, timed["cost"])
        failed |= {f"{group}/{name}": why for name, why in measured["failed"].items()}
        claims.append(claim(where, threads, measured["timed"]))
    return {"arms": arms, "claims": claims, "failed": failed}


def _row(group: str, label: str, role: str, metrics: Mapping[str, Any], cost: Mapping[str, Any]) -> dict[str, Any]:
    about = {"group": group, "label": label, "role": role}
    return {
        "status": "ok",
        "metrics": metrics,
        "cost": dict.fromkeys(COST_FIELDS) | dict(cost),
        "inference": {},
        **about,
    }


def claim(where: str, threads: int, timed: Mapping[str, Any]) -> dict[str, Any]:
    """The least median ratio, round by round, of a PyTorch arm's time to effjax's."""
    ours = np.array(timed["effjax"]["samples_ms"])
    peers = {name: row for name, row in timed.items() if ARMS[name][1] == "baseline"}
    ratios = {name: float(np.median(np.array(row["samples_ms"]) / ours)) for name, row in peers.items()}
    best = min(ratios, key=ratios.__getitem__)
    graph, network = where.split("/")
    text = (
        f"{graph}, {threads} thread{'s' * (threads > 1)}: a {network.upper()} training step takes no longer than with "
        f"{ARMS[best][0]}, the fastest of PyTorch's"
    )
    return {"text": text, "left": ratios[best], "op": ">=", "right": 1.0, "holds": ratios[best] >= 1}


def benchmark(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What goes into the results file, after every number of threads and every row's memory."""
    where = environment()
    where["packages"] |= {name: importlib.metadata.version(name) for name in ("torch", "torch_geometric", "jraph")}
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "study": "graph_speed",
        "groups": {},
        "preset": options.graphs,
        "seeds": [0],
        "budget": {"amount": options.rounds, "unit": "rounds"},
        "config": None,  # no study of `effjax compare`: this script alone
        "arms": {},
        "claims": [],
        "failed": {},
    }
    if options.out.exists():
        document = json.loads(options.out.read_text())
        document["environment"].setdefault("continued", []).append(where)  # the rows before keep theirs
    else:
        document["environment"] = where
    for threads in options.thread_counts:
        if any(arm["group"].endswith(f"-{threads}t") for arm in document["arms"].values()):
            continue
        words = [sys.executable, __file__, "--worker", "--threads", str(threads), "--graphs", options.graphs]
        words += ["--rounds", str(options.rounds), "--min-time", str(options.min_time)]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        more = results(json.loads(done.stdout.splitlines()[-1]), threads)
        document |= {
            key: document[key] + part if isinstance(part, list) else document[key] | part for key, part in more.items()
        }
        document["groups"] = dict.fromkeys((arm["group"] for arm in document["arms"].values()), METRIC)
        yield document
    for row, arm in document["arms"].items():
        metrics = arm["metrics"]
        if "steps_per_s" in metrics and "resident_mb" not in metrics and arm["group"].endswith("-1t"):
            metrics["resident_mb"] = summary([memory(row)])
            yield document


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="the results file")
    parser.add_argument("--graphs", choices=tuple(GRAPHS), default="all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--min-time", type=float, default=0.03, help="seconds a sample lasts at least")
    parser.add_argument("--thread-counts", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--resident", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes it starts
    jax.config.update("jax_platforms", "cpu")
    warnings.filterwarnings("ignore", module="torch")  # its CSR support calls itself a beta
    if options.worker or options.resident:
        if hasattr(os, "sched_setaffinity"):  # before JAX starts its threads, one a core
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
        worker(options) if options.worker else resident(options.resident)
        return
    if options.out is None:
        parser.error("--out is needed")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for document in benchmark(options):
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    for one in document["claims"]:
        print(f"{'holds' if one['holds'] else 'FAILS':5} {one['left']:6.2f} {one['text']}")


if __name__ == "__main__":
    main()
