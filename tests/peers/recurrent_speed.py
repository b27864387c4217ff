"""Throughput of the recurrent cells against PyTorch: the same cells as Python loops, and PyTorch's fused layers.

Run it on a quiet machine, from the repository::

    python tests/peers/recurrent_speed.py --out configs/irnn/results/speed-amd-epyc-2-cores.json

All arms of a size are timed in turns in one process on the same threads, forward and training (forward, backward, SGD
update), from inputs ``[batch, time, features]`` to states ``[batch, time, hidden]`` in float32. effjax's loops train in
two forms, as they are by default and with ``chunk=1``, which computes each step twice to store less.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RATE = 1e-3

METRIC = {"name": "train_tokens_per_s", "goal": "max", "label": "training tokens per second"}


class Size(NamedTuple):
    batch: int
    time: int
    hidden: int
    features: int

    @property
    def name(self) -> str:
        return f"b{self.batch}-t{self.time}-h{self.hidden}"


SIZES = {
    "tiny": (Size(4, 6, 8, 3),),
    "small": (Size(64, 200, 64, 8),),
    "all": (
        Size(64, 200, 64, 8),
        Size(1, 1000, 64, 8),  # a stream
        Size(64, 100, 256, 32),
        Size(32, 128, 512, 64),
        Size(128, 784, 128, 1),
    ),
}

LABELS = {
    "rnn": "RNN",
    "lstm": "LSTM",
    "gru": "GRU",
    "fastrnn": "FastRNN",
    "fastgrnn": "FastGRNN",
    "antisymmetric": "AntisymmetricRNN",
    "cornn": "coRNN",
    "irnn": "iRNN, K=1",
    "irnn-3": "iRNN, K=3",
    "tarnn-euler": "TARNN, Euler",
    "tarnn-convex": "TARNN, convex",
    "lru": "LRU",
    "min-gru": "minGRU",
}
FUSED = ("rnn", "lstm", "gru")


def layers(size: Size, chunk: int | None = None) -> dict[str, Any]:
    """effjax's layers ``[batch, time, features] -> [batch, time, hidden]``; with ``chunk`` those that have a loop."""
    from effjax.models.linear_recurrence import LRU, MinGRU
    from effjax.models.sequence import GRUCell, LSTMCell, Recurrent, RNNCell
    from effjax.models.sequence_rivals import AntisymmetricRNNCell, CoRNNCell, FastGRNNCell, FastRNNCell
    from effjax.recurrent.irnn import IncrementalRNN
    from effjax.recurrent.tarnn import TARNN

    hidden, length = size.hidden, size.time
    looped = {
        "rnn": Recurrent(RNNCell(hidden), chunk=chunk),
        "lstm": Recurrent(LSTMCell(hidden), chunk=chunk),
        "gru": Recurrent(GRUCell(hidden), chunk=chunk),
        "fastrnn": Recurrent(FastRNNCell(hidden), chunk=chunk),
        "fastgrnn": Recurrent(FastGRNNCell(hidden), chunk=chunk),
        "antisymmetric": Recurrent(AntisymmetricRNNCell(hidden), chunk=chunk),
        "cornn": Recurrent(CoRNNCell(hidden), chunk=chunk),
        "irnn": IncrementalRNN(hidden, length=length, chunk=chunk),
        "irnn-3": IncrementalRNN(hidden, K=3, length=length, chunk=chunk),
        "tarnn-euler": TARNN(hidden, variant="euler", length=length, chunk=chunk),
        "tarnn-convex": TARNN(hidden, variant="convex", length=length, chunk=chunk),
    }
    return looped if chunk else looped | {"lru": LRU(hidden), "min-gru": MinGRU(hidden)}


def flat_params(layer: Any, size: Size) -> dict[str, Any]:
    """The layer's parameters as NumPy arrays by their last name; biases and gains random, so that each one counts."""
    import jax
    import numpy as np

    x = np.zeros((1, size.time, size.features), np.float32)
    params = jax.jit(layer.init)(jax.random.key(0, impl="rbg"), x)["params"]
    rng = np.random.default_rng(0)
    flat = {path[-1].key: np.array(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    return {
        name: leaf + rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype) if leaf.ndim < 2 else leaf
        for name, leaf in flat.items()
    }


def jax_variables(layer: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    """The layer's variables from ``flat_params``."""
    import jax.numpy as jnp

    tree = {name: jnp.asarray(leaf) for name, leaf in params.items()}
    return {"params": {"cell": tree} if hasattr(layer, "cell") else tree}


def loops() -> dict[str, Callable[[Mapping[str, Any], Any], Any]]:
    """The same layers in PyTorch, as loops in Python.

    Every kernel that multiplies the same vector is part of one product a step, for the inputs and for the state, as in
    PyTorch's own cells; a step takes the input's product itself.
    """
    import torch

    def over_time(step, carry, x):
        ys = []
        for t in range(x.shape[1]):
            carry, y = step(carry, x[:, t], t)
            ys.append(y)
        return torch.stack(ys, 1)

    def zeros(p, x, width=None):
        return x.new_zeros(x.shape[0], width or p["U"].shape[-1])

    def rnn(p, x):
        def step(h, x, t):
            h = torch.tanh(torch.addmm(p["b"], x, p["W"]) + h @ p["U"])
            return h, h

        return over_time(step, zeros(p, x), x)

    def lstm(p, x):
        def step(carry, x, t):
            c, h = carry
            i, f, g, o = (torch.addmm(p["b"], x, p["W"]) + h @ p["U"]).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            return (c, h), h

        h = zeros(p, x, len(p["U"]))
        return over_time(step, (h, h), x)

    def gru(p, x):
        def step(h, x, t):
            xr, xz, xn = torch.addmm(p["b"], x, p["W"]).chunk(3, -1)
            hr, hz, hn = (h @ p["U"]).chunk(3, -1)
            z = torch.sigmoid(xz + hz)
            h = (1 - z) * torch.tanh(xn + torch.sigmoid(xr + hr) * (hn + p["c"])) + z * h
            return h, h

        return over_time(step, zeros(p, x, len(p["U"])), x)

    def fastrnn(p, x):
        alpha, beta = torch.sigmoid(p["alpha"]), torch.sigmoid(p["beta"])

        def step(h, x, t):
            h = alpha * torch.tanh(torch.addmm(p["b"], x, p["W"]) + h @ p["U"]) + beta * h
            return h, h

        return over_time(step, zeros(p, x), x)

    def fastgrnn(p, x):
        zeta, nu = torch.sigmoid(p["zeta"]), torch.sigmoid(p["nu"])

        def step(h, x, t):
            pre = x @ p["W"] + h @ p["U"]
            z = torch.sigmoid(pre + p["bias_gate"])
            h = z * h + (zeta * (1 - z) + nu) * torch.tanh(pre + p["bias_update"])
            return h, h

        return over_time(step, zeros(p, x), x)

    def antisymmetric(p, x, epsilon=0.05, gamma=0.01):
        kernel = p["U"].T - p["U"] - gamma * torch.eye(len(p["U"]), device=x.device)

        def step(h, x, t):
            h = h + epsilon * torch.tanh(torch.addmm(p["b"], x, p["W"]) + h @ kernel)
            return h, h

        return over_time(step, zeros(p, x), x)

    def cornn(p, x, dt=0.034, gamma=1.3, epsilon=12.7):
        def step(carry, x, t):
            y, v = carry
            drive = torch.tanh(torch.addmm(p["b"], x, p["W"]) + torch.cat((v, y), -1) @ p["U"])
            v = v + dt * (drive - gamma * y - epsilon * v)
            y = y + dt * v
            return (y, v), y

        return over_time(step, (zeros(p, x), zeros(p, x)), x)

    def irnn(p, x):
        def step(h, x, t):
            pre, z = torch.addmm(p["b"], x, p["W"]), h
            for eta in p["eta"][t]:
                y = z + h
                z = z + eta * (torch.relu(y @ p["U"] + pre) - p["alpha"] * y)
            return z, z

        return over_time(step, zeros(p, x), x)

    def tarnn(p, x, convex):
        inputs = torch.cat((p["W1"], p["B1"], p["Wg"]), -1)
        bias = torch.cat((p["b1"], torch.zeros_like(p["b1"]), p["bg"]))
        state = torch.cat((p["U2"], p["B2"], p["Ug"], p["U1"]), -1)

        def step(carry, x, t):
            h, before = carry
            pre, drive, gate = torch.addmm(bias, x, inputs).chunk(3, -1)
            pre_h, drive_h, gate_h, inner = (h @ state).chunk(4, -1)
            pre, drive, gate = pre + pre_h + before @ p["W2"], drive + drive_h, torch.sigmoid(gate + gate_h)
            z = h
            for k, eta in enumerate(p["eta"][t]):
                field = torch.relu((z @ p["U1"] if k else inner) + pre) - z - h + drive
                z = (1 - eta) * z + eta * field if convex else z + eta * gate * field
            h = (1 - gate) * h + gate * z if convex else z
            return (h, x), h

        return over_time(step, (zeros(p, x, len(p["U1"])), x[:, 0]), x)

    def lru(p, x):
        eigenvalues = torch.exp(torch.complex(-torch.exp(p["nu"]), torch.exp(p["theta"])))
        scale = torch.sqrt(1 - eigenvalues.abs() ** 2)
        inputs = torch.cat((p["B_re"] * scale, p["B_im"] * scale, p["D"]), -1)
        width, read = len(p["nu"]), torch.cat((p["C_re"], -p["C_im"]), 0)

        def step(h, x, t):
            real, imaginary, skip = (x @ inputs).split((width, width, inputs.shape[-1] - 2 * width), -1)
            h = eigenvalues * h + torch.complex(real, imaginary)
            return h, torch.cat((h.real, h.imag), -1) @ read + skip

        return over_time(step, torch.complex(zeros(p, x, width), zeros(p, x, width)), x)

    def min_gru(p, x):
        def step(h, x, t):
            z, candidate = torch.addmm(p["b"], x, p["W"]).chunk(2, -1)
            z = torch.sigmoid(z)
            h = (1 - z) * h + z * candidate
            return h, h

        return over_time(step, zeros(p, x, p["W"].shape[-1] // 2), x)

    return {
        "rnn": rnn,
        "lstm": lstm,
        "gru": gru,
        "fastrnn": fastrnn,
        "fastgrnn": fastgrnn,
        "antisymmetric": antisymmetric,
        "cornn": cornn,
        "irnn": irnn,
        "irnn-3": irnn,
        "tarnn-euler": lambda p, x: tarnn(p, x, False),
        "tarnn-convex": lambda p, x: tarnn(p, x, True),
        "lru": lru,
        "min-gru": min_gru,
    }


def fused(name: str, params: Mapping[str, Any]) -> Any:
    """PyTorch's own layer, which runs all steps in one call, with these parameters."""
    import torch

    kernels = {key: torch.from_numpy(value.T.copy()) for key, value in params.items()}
    layer = {"rnn": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[name](
        len(params["W"]), len(params["U"]), batch_first=True
    )
    hidden_bias = torch.zeros_like(kernels["b"])
    if name == "gru":
        hidden_bias[-len(kernels["c"]) :] = kernels["c"]
    values = (kernels["W"], kernels["U"], kernels["b"], hidden_bias)
    with torch.no_grad():
        for parameter, value in zip(layer.parameters(), values, strict=True):
            parameter.copy_(value)
    return layer


class Arm(NamedTuple):
    """What is timed: functions without arguments that return when the work is done, and what is known of the step."""

    forward: Callable[[], Any] | None
    train: Callable[[], Any]
    cost: Mapping[str, Any]


def jax_arm(layer: Any, params: Mapping[str, Any], x: Any, forward: bool = True) -> Arm:
    import jax
    import jax.numpy as jnp
    import optax

    from effjax.core.cost import Executables, count_params

    tx = optax.sgd(RATE)
    loss = lambda variables, x: jnp.mean(layer.apply(variables, x) ** 2)

    def update(state, x):
        variables, opt_state = state
        value, grads = jax.value_and_grad(loss)(variables, x)
        updates, opt_state = tx.update(grads, opt_state, variables)
        return (optax.apply_updates(variables, updates), opt_state), value

    variables, x = jax_variables(layer, params), jnp.asarray(x)
    apply = jax.jit(layer.apply).lower(variables, x).compile() if forward else None
    step = Executables(update)
    state = jax.tree.map(jnp.copy, (variables, tx.init(variables)))
    step.compile(state, x)

    def train() -> None:
        nonlocal state
        state, value = step(state, x)
        jax.block_until_ready(value)

    analysis = step.analysis()
    cost = {"params": count_params(params), "compile_s": step.compile_s, "compiles": step.compiles}
    cost |= {"peak_bytes": analysis.peak_bytes, "temp_bytes": analysis.temp_bytes}
    return Arm((lambda: jax.block_until_ready(apply(variables, x))) if forward else None, train, cost)


def torch_arm(apply: Callable[[Any], Any], parameters: Sequence[Any], x: Any) -> Arm:
    import torch

    tx = torch.optim.SGD(parameters, RATE)
    done = torch.cuda.synchronize if x.is_cuda else lambda: None

    def forward() -> None:
        with torch.no_grad():
            apply(x)
        done()

    def train() -> None:
        tx.zero_grad()
        apply(x).square().mean().backward()
        tx.step()
        done()

    return Arm(forward, train, {"params": sum(parameter.numel() for parameter in parameters)})


def arms_of(size: Size, device: str) -> dict[str, tuple[str, str, Arm]]:
    """Row -> label, role, arm."""
    import numpy as np
    import torch

    where = torch.device("cuda" if device == "gpu" else "cpu")
    x = np.random.default_rng(1).normal(size=(size.batch, size.time, size.features)).astype(np.float32)
    x_torch = torch.from_numpy(x).to(where)
    python, recomputing = loops(), layers(size, chunk=1)
    arms = {}
    for name, layer in layers(size).items():
        params = flat_params(layer, size)
        arms[f"{name}-effjax"] = f"{LABELS[name]}, effjax", "method", jax_arm(layer, params, x)
        if name in recomputing:
            arm = jax_arm(recomputing[name], params, x, forward=False)
            arms[f"{name}-chunk1"] = f"{LABELS[name]}, effjax, chunk=1", "method", arm
        weights = {key: torch.tensor(value, device=where, requires_grad=True) for key, value in params.items()}
        loop = lambda x, name=name, weights=weights: python[name](weights, x)
        arms[f"{name}-loop"] = (
            f"{LABELS[name]}, PyTorch loop",
            "baseline",
            torch_arm(loop, [*weights.values()], x_torch),
        )
        if name in FUSED:
            module = fused(name, params).to(where)
            whole = torch_arm(lambda x, module=module: module(x)[0], [*module.parameters()], x_torch)
            arms[f"{name}-fused"] = f"{LABELS[name]}, PyTorch fused", "alternative", whole
    return arms


def measure(size: Size, device: str, rounds: int, min_time: float) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The arms of one size as in a results.json, and their timings: mode -> row -> ``Timing``."""
    from effjax.core.timing import time_interleaved
    from effjax.study.results import COST_FIELDS, summary

    arms = arms_of(size, device)
    timings = {}
    for mode in ("forward", "train"):
        runs = {row: getattr(arm, mode) for row, (_, _, arm) in arms.items() if getattr(arm, mode)}
        timings[mode] = time_interleaved(runs, rounds=rounds, warmup=1, min_time=min_time)
    tokens = size.batch * size.time
    results = {}
    for row, (label, role, arm) in arms.items():
        metrics = {}
        for mode, timed in timings.items():
            if row not in timed:
                continue
            rates = summary([1e3 * tokens / sample for sample in timed[row].samples_ms])
            quartiles = {"q25": timed[row].q75_ms, "median": timed[row].median_ms, "q75": timed[row].q25_ms}
            metrics[f"{mode}_tokens_per_s"] = rates | {key: 1e3 * tokens / ms for key, ms in quartiles.items()}
        step_ms = timings["train"][row].median_ms
        cost = dict.fromkeys(COST_FIELDS) | dict(arm.cost)
        cost |= {"step_ms": step_ms, "examples_per_s": 1e3 * size.batch / step_ms}
        about = {"group": size.name, "label": label, "role": role}
        results[f"{size.name}/{row}"] = {"status": "ok", "metrics": metrics, "cost": cost, "inference": {}, **about}
    return results, timings


def claims_of(size: Size, timings: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Ratios of throughput within the rounds, at least 1 where effjax does not lose."""
    from effjax.core.timing import paired_ratio

    def ratio(mode: str, name: str, peer: str) -> float:
        """Of effjax's faster form."""
        timed = timings[mode]
        ours = [timed[row] for row in (f"{name}-effjax", f"{name}-chunk1") if row in timed]
        return max(paired_ratio(timed[f"{name}-{peer}"], one) for one in ours)

    where = f"batch {size.batch}, {size.time} steps, {size.hidden} units: "
    numbers = {}
    for mode, verb in (("train", "trains"), ("forward", "runs")):
        ratios = {name: ratio(mode, name, "loop") for name in LABELS}
        least = min(ratios, key=ratios.__getitem__)
        text = f"{where}every cell {verb} at least as fast as its PyTorch loop (least gain: {LABELS[least]})"
        numbers[text] = ratios[least]
        for name in ("lstm", "gru"):
            text = f"{where}the {LABELS[name]} {verb} at least as fast as PyTorch's fused one"
            numbers[text] = ratio(mode, name, "fused")
    return [
        {"text": text, "left": value, "op": ">=", "right": 1.0, "holds": bool(value >= 1)}
        for text, value in numbers.items()
    ]


def benchmark(sizes: str, device: str, rounds: int, min_time: float, threads: int) -> Iterator[dict[str, Any]]:
    """What goes into the results file, after each size."""
    import torch

    from effjax.study.report import SCHEMA
    from effjax.study.results import environment

    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")  # of GPUs: TensorFloat-32, which is JAX's default there
    where = environment()
    where["packages"]["torch"] = torch.__version__
    arms, claims = {}, []
    for size in SIZES[sizes]:
        found, timings = measure(size, device, rounds, min_time)
        arms |= found
        claims += claims_of(size, timings)
        yield {
            "schema": SCHEMA,
            "study": "recurrent_speed",
            "groups": dict.fromkeys((arm["group"] for arm in arms.values()), METRIC),
            "preset": sizes,
            "seeds": [0],
            "budget": {"amount": rounds, "unit": "rounds"},
            "config": None,  # no study of `effjax compare`: this script alone
            "arms": arms,
            "claims": claims,
            "environment": where | {"threads": threads},
        }
        print(f"{size.name}: done", flush=True)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the results file")
    parser.add_argument("--sizes", choices=tuple(SIZES), default="all")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="by default the accelerator, if JAX finds one")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--min-time", type=float, default=0.03, help="seconds a sample lasts at least")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(words)
    if hasattr(os, "sched_setaffinity"):  # before JAX starts its threads, one a core
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    import jax

    if options.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    device = jax.default_backend()
    if options.device not in (None, device):
        parser.error(f"--device {options.device}, but JAX finds only a {device}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for results in benchmark(options.sizes, device, options.rounds, options.min_time, options.threads):
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    for claim in results["claims"]:
        print(f"{'holds' if claim['holds'] else 'FAILS':5} {claim['left']:6.2f} {claim['text']}")


if __name__ == "__main__":
    main()
