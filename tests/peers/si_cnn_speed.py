"""Images per second of MobileNetV2 with interpolated blocks, beside the dense network in JAX and in PyTorch.

Run it on a quiet machine, from the repository::

    python tests/peers/run.py si_cnn_speed --out configs/si_cnn/results/peers-amd-epyc-2-cores.json

MobileNetV2-1.0 on images of noise, with random weights: a call of inference, and a step forward and backward by plain
SGD with momentum. All arms are timed in turns in one process; PyTorch runs on as many threads, with images stored by
rows of channels (NHWC) and by channels (NCHW).
"""

import argparse
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

METRIC = {"name": "images_per_s", "goal": "max", "label": "images per second"}
# name: (label, role)
ARMS = {
    "dense": ("dense", "baseline"),
    "si": ("SI, all stride-1 residual blocks", "method"),
    "si-min14": ("SI, those on maps of 14 x 14 and more", "method"),
    "torch": ("PyTorch, dense, NCHW", "alternative"),
    "torch-nhwc": ("PyTorch, dense, NHWC", "alternative"),
}
POLICIES = {"si": "residual_stride1", "si-min14": "residual_stride1_min14"}
ROWS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def jax_arms(names: Sequence[str], x: Any, labels: Any) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """By group what ``time_interleaved`` takes, and the multiply-accumulates of an image."""
    import jax
    import optax

    from effjax.core.macs import count_macs
    from effjax.models.mobilenet import mobilenet
    from effjax.vision.si_cnn import interpolated

    groups: dict[str, dict[str, Any]] = {"inference": {}, "training": {}}
    macs, tx = {}, optax.sgd(1e-3, 0.9)
    for name in (name for name in names if not name.startswith("torch")):
        model = mobilenet("mobilenet_v2")
        if name in POLICIES:
            model = interpolated(model, x, POLICIES[name])
        variables = drawn(jax.eval_shape(model.init, jax.random.key(0), x[:1]))
        macs[name] = count_macs(lambda v, x, model=model: model.apply(v, x), variables, x[:1]).least
        infer = jax.jit(lambda variables, x, model=model: model.apply(variables, x))
        groups["inference"][name] = lambda infer=infer, variables=variables: infer(variables, x)

        def step(state: Any, batch: Any, model: Any = model) -> Any:
            variables, opt = state

            def loss(params: Any) -> Any:
                logits, stats = model.apply({**variables, "params": params}, batch, train=True, mutable=["batch_stats"])
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), stats

            (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
            updates, opt = tx.update(grads, opt)
            return ({"params": optax.apply_updates(variables["params"], updates), **stats}, opt), value

        state = jax.tree.map(lambda leaf: leaf.copy(), (variables, tx.init(variables["params"])))
        groups["training"][name] = (jax.jit(step, donate_argnums=0), state, [jax.device_put(x)])
    return groups, macs


def drawn(shapes: Any) -> Any:
    """Random variables of these shapes; compiling the networks' own initialisation takes longer than all the rest."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> Any:
        kernel = leaf.ndim > 1
        values = rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape) if kernel else np.ones(leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree.map(draw, shapes)


def torch_mobilenet() -> Any:
    """MobileNetV2-1.0 of torchvision, written out."""
    import torch
    from torch import nn

    def conv(channels: int, features: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True) -> list:
        found = [
            nn.Conv2d(channels, features, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(features),
        ]
        return [*found, nn.ReLU6(inplace=True)] if act else found

    class Block(nn.Module):
        def __init__(self, channels: int, features: int, stride: int, expansion: int):
            super().__init__()
            hidden = expansion * channels
            first = conv(channels, hidden) if expansion > 1 else []
            last = conv(hidden, features, act=False)
            self.branch = nn.Sequential(*first, *conv(hidden, hidden, 3, stride, hidden), *last)
            self.skip = stride == 1 and channels == features

        def forward(self, x: Any) -> Any:
            return x + self.branch(x) if self.skip else self.branch(x)

    layers, channels = conv(3, 32, 3, 2), 32
    for expansion, features, blocks, stride in ROWS:
        for index in range(blocks):
            layers.append(Block(channels, features, stride if index == 0 else 1, expansion))
            channels = features
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    torch.manual_seed(0)
    network = nn.Sequential(*layers, *conv(channels, 1280), *head)
    assert sum(parameter.numel() for parameter in network.parameters()) == 3_504_872
    return network


def torch_arms(name: str, x: Any, labels: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A call of inference, and a step."""
    import copy

    import torch

    layout = torch.channels_last if name == "torch-nhwc" else torch.contiguous_format
    images = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    network = torch_mobilenet().to(memory_format=layout)
    frozen, targets = copy.deepcopy(network).eval(), torch.from_numpy(labels).long()
    optimizer = torch.optim.SGD(network.parameters(), 1e-3, 0.9)

    @torch.inference_mode()
    def infer() -> Any:
        return frozen(images)

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(network(images), targets).backward()
        optimizer.step()

    return infer, step


def torch_is_there() -> bool:
    return importlib.util.find_spec("torch") is not None


def measure(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The arms of each group as in a results.json, and its claims."""
    import numpy as np

    from effjax.core.timing import paired_ratio, time_interleaved
    from effjax.study.results import COST_FIELDS, summary

    rng = np.random.default_rng(0)
    x = rng.normal(size=(options.batch_size, 224, 224, 3)).astype(np.float32)
    labels = rng.integers(0, 1000, options.batch_size)
    names = [name for name in ARMS if options.arms == ["*"] or name in options.arms]
    groups, macs = jax_arms(names, x, labels)
    for name in (name for name in names if name.startswith("torch") and torch_is_there()):
        for group, call in zip(groups, torch_arms(name, x, labels), strict=True):
            groups[group][name] = call
    for group, calls in groups.items():
        timings = time_interleaved(calls, rounds=options.rounds, warmup=2)
        arms, claims = {}, []
        for name, timed in timings.items():
            label, role = ARMS[name]
            metrics = {"images_per_s": summary([1000 * options.batch_size / ms for ms in timed.samples_ms])}
            if "dense" in timings:
                metrics["speed_up"] = summary([paired_ratio(timings["dense"], timed)])
            if "dense" in macs and name in macs:
                metrics["mac_saving"] = summary([1 - macs[name] / macs["dense"]])
            cost = dict.fromkeys(COST_FIELDS) | {"step_ms": timed.median_ms}
            about = {"group": group, "label": label, "role": role}
            arms[f"{group}/{name}"] = {"status": "ok", "metrics": metrics, "cost": cost, "inference": {}, **about}
        for arm, over in (("si", "dense"), ("dense", "torch-nhwc"), ("si", "torch-nhwc"), ("si", "torch")):
            if arm in timings and over in timings:
                ratio = paired_ratio(timings[arm], timings[over])
                text = f"{group}: {ARMS[arm][0]} takes at most as long as {ARMS[over][0]}"
                claims.append({"text": text, "left": ratio, "op": "<=", "right": 1.0, "holds": ratio <= 1})
        yield arms, claims


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the results file")
    parser.add_argument("--arms", nargs="+", choices=("*", *ARMS), default=["*"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(words)
    if hasattr(os, "sched_setaffinity"):  # before JAX starts its threads, one a core
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.threads :])
    if torch_is_there():
        import torch

        torch.set_num_threads(options.threads)
    from effjax.study.report import SCHEMA
    from effjax.study.results import environment

    options.out.parent.mkdir(parents=True, exist_ok=True)
    arms: dict[str, Any] = {}
    claims: list[Any] = []
    for more, decided in measure(options):
        arms |= more
        claims += decided
        results = {
            "schema": SCHEMA,
            "study": "si_cnn_speed",
            "groups": dict.fromkeys((arm["group"] for arm in arms.values()), METRIC),
            "preset": "peers",
            "seeds": [0],
            "budget": {"amount": options.rounds, "unit": "rounds"},
            "config": None,  # no study of `effjax compare`: this script alone
            "arms": arms,
            "claims": claims,
            "environment": environment() | {"threads": options.threads, "batch_size": options.batch_size},
        }
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    for name, arm in arms.items():
        speed_up = arm["metrics"].get("speed_up", {}).get("mean", float("nan"))
        print(f"{name:24} {arm['metrics']['images_per_s']['mean']:10.2f} images/s {speed_up:6.3f} x dense")
    for claim in claims:
        print(f"{'holds' if claim['holds'] else 'FAILS'} {claim['left']:6.3f} <= {claim['right']:.3f} {claim['text']}")


if __name__ == "__main__":
    main()
