"""Answers per second of hybrid models by every dispatcher, beside the masked program and PyTorch's boolean indexing.

Run it on a quiet machine, from the repository::

    python tests/peers/run.py hybrid_speed --out configs/hybrid/results/speed-amd-epyc-2-cores.json

Two pairs. *resnet*: ResNet-20 asks ResNet-56 about CIFAR-10 images (``EFFJAX_DATA``, ``EFFJAX_MODELS``), a third of its
cost. *mlp*: a linear base model asks five layers of 1,024 units, some 240 times its cost, with random weights on noise.
A row asks where its margin is small: the threshold of each share is fitted on one half of the rows, accuracies are
those of the other half, and times of its batches. All arms of a pair and a share are timed in turns in one process;
PyTorch runs on as many threads.
"""

import argparse
import functools
import inspect
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

METRIC = {"name": "images_per_s", "goal": "max", "label": "images per second"}
CLASSES, SIZE = 10, 3072
# Of XLA's two libraries of matrix products on CPUs the one that is faster on few rows, and slower on many.
EIGEN = {"xla_cpu_experimental_ynn_fusion_type": ""}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# name: (label, role)
ARMS = {
    "expert": ("always the expert", "baseline"),
    "masked": ("base and expert on all rows, masked", "baseline"),
    "capacity": ("fixed capacity", "method"),
    "buckets": ("buckets in the program", "method"),
    "buckets-eigen": ("buckets in the program, products by Eigen", "method"),
    "host": ("bucket chosen by the host", "method"),
    "host-eigen": ("bucket chosen by the host, products by Eigen", "method"),
    "stream": ("bucket chosen by the host, a batch ahead", "method"),
    "queue": ("queue over batches", "method"),
    "torch-expert": ("PyTorch, always the expert", "baseline"),
    "torch": ("PyTorch, boolean indexing", "alternative"),
}


class Pair(NamedTuple):
    """Two models in JAX, and in PyTorch if it is there.

    Attributes:
      base: ``(params, inputs) -> logits``.
      expert: the same.
      params: of both.
      torch: ``() -> (base, expert)``, modules on inputs as ours.
    """

    base: Callable[..., Any]
    expert: Callable[..., Any]
    params: tuple[Any, Any]
    torch: Callable[[], tuple[Any, Any]] | None


def images(pair: str) -> tuple[Any, Any]:
    """Normalised test images [rows, 32, 32, 3] in a fixed random order, and their labels; noise for the MLPs."""
    import numpy as np

    from effjax.data.sets import load

    rng = np.random.default_rng(0)
    if pair == "mlp":
        return rng.normal(size=(8192, 32, 32, 3)).astype(np.float32), rng.integers(0, CLASSES, 8192)
    test = load("cifar10").splits["test"]
    order = rng.permutation(len(test["label"]))
    scaled = (np.asarray(test["image"], np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    return scaled[order], np.asarray(test["label"])[order]


def resnet_pair() -> Pair:
    from effjax.models.resnet import pretrained_resnet

    (small, few), (large, many) = pretrained_resnet("resnet20"), pretrained_resnet("resnet56")
    return Pair(small.apply, large.apply, (few, many), lambda: (torch_resnet("resnet20"), torch_resnet("resnet56")))


def mlp_pair() -> Pair:
    import numpy as np

    rng = np.random.default_rng(0)
    widths = [(SIZE, CLASSES), (SIZE, 1024), *[(1024, 1024)] * 4, (1024, CLASSES)]
    kernels = [rng.normal(size=width).astype(np.float32) / np.sqrt(width[0], dtype=np.float32) for width in widths]

    def run(kernels: Sequence[Any], x: Any) -> Any:
        import jax

        x = x.reshape(len(x), -1)
        for kernel in kernels[:-1]:
            x = jax.nn.relu(x @ kernel)
        return x @ kernels[-1]

    def torch_pair() -> tuple[Any, Any]:
        import torch

        layers = [torch.nn.Linear(*kernel.shape, bias=False) for kernel in kernels]
        for layer, kernel in zip(layers, kernels, strict=True):
            layer.weight.data = torch.from_numpy(kernel.T.copy())
        deep = [part for layer in layers[1:-1] for part in (layer, torch.nn.ReLU())]
        return torch.nn.Sequential(torch.nn.Flatten(), layers[0]), torch.nn.Sequential(
            torch.nn.Flatten(), *deep, layers[-1]
        )

    return Pair(run, run, (kernels[:1], kernels[1:]), torch_pair)


PAIRS = {"mlp": mlp_pair, "resnet": resnet_pair}


def torch_resnet(name: str) -> Any:
    """The CIFAR ResNet of He et al. in PyTorch, from the same file as ours."""
    import torch
    import torch.nn.functional as F
    from safetensors.numpy import load_file

    from effjax.models.convert import find_weights
    from effjax.models.resnet import SIZES

    class Block(torch.nn.Module):
        def __init__(self, channels: int, features: int, stride: int):
            super().__init__()
            self.conv1 = torch.nn.Conv2d(channels, features, 3, stride, 1, bias=False)
            self.bn1 = torch.nn.BatchNorm2d(features)
            self.conv2 = torch.nn.Conv2d(features, features, 3, 1, 1, bias=False)
            self.bn2 = torch.nn.BatchNorm2d(features)
            self.stride, self.extra = stride, (features - channels) // 2

        def forward(self, x: Any) -> Any:
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            x = x[:, :, :: self.stride, :: self.stride]
            return F.relu(y + F.pad(x, (0, 0, 0, 0, self.extra, self.extra)))

    class Network(torch.nn.Module):
        def __init__(self, blocks: int):
            super().__init__()
            self.conv1, self.bn1 = torch.nn.Conv2d(3, 16, 3, 1, 1, bias=False), torch.nn.BatchNorm2d(16)
            channels = 16
            for stage, features in enumerate((16, 32, 64), start=1):
                parts = []
                for block in range(blocks):
                    parts.append(Block(channels, features, 2 if stage > 1 and block == 0 else 1))
                    channels = features
                setattr(self, f"layer{stage}", torch.nn.Sequential(*parts))
            self.linear = torch.nn.Linear(64, CLASSES)

        def forward(self, x: Any) -> Any:
            x = F.relu(self.bn1(self.conv1(x.permute(0, 3, 1, 2))))
            return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))

    network = Network(SIZES[name]).eval()
    tensors = load_file(find_weights(f"resnet_cifar10/{name}"))
    held = {key: torch.from_numpy(array.astype("float32")) for key, array in tensors.items()}
    network.load_state_dict(held, strict=False)
    if missing := set(network.state_dict()) - set(held) - {k for k in network.state_dict() if "num_batches" in k}:
        raise ValueError(f"{name}: the file lacks {sorted(missing)}.")
    return network.to(memory_format=torch.channels_last)


class Share(NamedTuple):
    """A share of the rows that asks, as fitted.

    Attributes:
      threshold: of the need.
      accuracy: of the hybrid, of the base and of the expert on the other half.
      asked: the share there.
    """

    threshold: float
    accuracy: tuple[float, float, float]
    asked: float


def fitted(pair: Pair, x: Any, labels: Any, shares: Sequence[float]) -> dict[float, Share]:
    """Thresholds from the first half, accuracies of the second."""
    import jax
    import numpy as np

    from effjax.hardness.cascades import confidence_need
    from effjax.hardness.query_rules import query_threshold

    def logits(apply: Callable[..., Any], params: Any) -> Any:
        run = jax.jit(apply)
        parts = [np.asarray(run(params, x[start : start + 500])) for start in range(0, len(x) - len(x) % 500, 500)]
        return np.concatenate(parts)

    base, expert = (logits(apply, params) for apply, params in zip((pair.base, pair.expert), pair.params, strict=True))
    labels = labels[: len(base)]
    need, half = np.asarray(confidence_need(base)), len(base) // 2
    right = [found.argmax(1)[half:] == labels[half:] for found in (base, expert)]
    found = {}
    for share in shares:
        threshold = query_threshold(need[:half], 1 - share).value
        asks = need[half:] > threshold
        accuracy = (np.where(asks, right[1], right[0]).mean(), right[0].mean(), right[1].mean())
        found[share] = Share(threshold, tuple(map(float, accuracy)), float(asks.mean()))
    return found


def arms_of(pair: Pair, share: float, threshold: float, batches: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    """Functions that answer all batches; those of JAX without a queue take other batches too."""
    import jax
    import numpy as np

    from effjax.hardness.cascades import Asking, with_query
    from effjax.hardness.dispatch import dispatch_buckets, dispatch_capacity, dispatch_masked, expert_capacity
    from effjax.hardness.host_dispatch import HostDispatch
    from effjax.hardness.query_queue import QueryQueue
    from effjax.hardness.remote import RemoteExpert

    rows = len(batches[0])
    asking, expert_params = Asking(pair.params[0], np.float32(threshold)), pair.params[1]
    first = with_query(pair.base)
    ladder = [size for size in (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024) if size < rows]
    device = [jax.device_put(batch) for batch in batches]
    # Each costs a compilation: those near the share, up to the one that holds the most requests of these batches.
    asked = max(int(np.sum(jax.jit(first)(asking, x)[1])) for x in device)
    enough = min((size for size in ladder if size >= asked), default=rows)
    around = [size for size in ladder if 0.7 * share * rows <= size <= max(1.6 * share * rows, enough)]

    def inside(dispatch: Callable[..., Any], **options: Any) -> Callable[[], Any]:
        def answer(asking: Any, params: Any, x: Any) -> Any:
            outputs, request = first(asking, x)
            return dispatch(pair.expert, params, x, outputs, request)

        run = jax.jit(answer, **options)
        return lambda batches=device: [run(asking, expert_params, x).outputs for x in batches]

    host, host_eigen = (
        HostDispatch([first, pair.expert], buckets=ladder, compiler_options=options) for options in (None, EIGEN)
    )
    in_program = functools.partial(dispatch_buckets, buckets=around)
    both = [asking, expert_params]
    whole, begin = jax.jit(pair.expert), jax.jit(first)

    def queued() -> Any:
        line = QueryQueue(remote, sizes=ladder[-3:], deadline_s=60.0)
        found = []
        for x in batches:
            outputs, request = begin(asking, x)
            line.submit(x, outputs, request)
            found += line.collect()
        return [done.found.outputs for done in found + line.flush()]

    remote = RemoteExpert(functools.partial(whole, expert_params), timeout_s=600.0)
    made = {
        "expert": lambda: lambda batches=device: [whole(expert_params, x) for x in batches],
        "masked": lambda: inside(dispatch_masked),
        "capacity": lambda: inside(functools.partial(dispatch_capacity, capacity=expert_capacity(rows, share))),
        "buckets": lambda: inside(in_program),
        "buckets-eigen": lambda: inside(in_program, compiler_options=EIGEN),
        "host": lambda: lambda batches=device: [host(both, x).outputs for x in batches],
        "host-eigen": lambda: lambda batches=device: [host_eigen(both, x).outputs for x in batches],
        "stream": lambda: lambda: [found.outputs for found in host.stream(both, device)],
        "queue": lambda: queued,
        "torch-expert": lambda: torch_arm(pair, threshold, batches, always=True),
        "torch": lambda: torch_arm(pair, threshold, batches),
    }
    return {name: made[name]() for name in names}


def torch_arm(pair: Pair, threshold: float, batches: Sequence[Any], *, always: bool = False) -> Callable[[], Any]:
    import torch

    assert pair.torch is not None
    base, expert = pair.torch()
    tensors = [torch.from_numpy(batch) for batch in batches]

    @torch.inference_mode()
    def run() -> Any:
        found = []
        for x in tensors:
            if always:
                found.append(expert(x).numpy())
                continue
            outputs = base(x)
            best = torch.topk(torch.softmax(outputs, 1), 2).values
            asks = best[:, 1] - best[:, 0] > threshold
            if asks.any():
                outputs[asks] = expert(x[asks])
            found.append(outputs.numpy())
        return found

    return run


def measure(
    name: str, share: float, found: Share, batches: Sequence[Any], options: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The arms of one pair and share as in a results.json, and the claims."""
    import jax
    import numpy as np

    from effjax.core.timing import paired_ratio, time_interleaved
    from effjax.study.results import COST_FIELDS, summary

    group, pair = f"{name}-{round(100 * share)}", PAIRS[name]()
    names = [arm for arm in ARMS if arm in options.arms or options.arms == ["*"]]
    names = [arm for arm in names if torch_is_there() or not arm.startswith("torch")]
    calls = arms_of(pair, share, found.threshold, batches, names)
    answers = {arm: np.concatenate([np.asarray(part) for part in call()]) for arm, call in calls.items()}
    timings = time_interleaved(
        {arm: lambda call=call: jax.block_until_ready(call()) for arm, call in calls.items()},
        rounds=options.rounds,
        warmup=1,
    )
    # A batch that asks much takes longer: the mean says little about the worst one.
    alone = {arm: call for arm, call in calls.items() if inspect.signature(call).parameters and options.latencies}
    latencies = {arm: milliseconds(call, batches, options.latencies) for arm, call in alone.items()}
    rows, arms, claims = sum(map(len, batches)), {}, []
    for arm, timed in timings.items():
        label, role = ARMS[arm]
        metrics = {"images_per_s": summary([1000 * rows / ms for ms in timed.samples_ms])}
        if "masked" in timings:
            metrics["relative"] = summary([paired_ratio(timed, timings["masked"])])
        for percent in (50, 99) if arm in latencies else ():
            metrics[f"p{percent}_ms"] = summary([float(np.percentile(latencies[arm], percent))])
        whole = arm.endswith("expert")
        metrics["accuracy"] = summary([found.accuracy[2 if whole else 0]])
        metrics["asked"] = summary([1.0 if whole else found.asked])
        if "masked" in answers and not whole:
            metrics["largest_difference"] = summary([float(np.abs(answers[arm] - answers["masked"]).max())])
        cost = dict.fromkeys(COST_FIELDS) | {"step_ms": timed.median_ms / len(batches)}
        about = {"group": group, "label": label, "role": role}
        arms[f"{group}/{arm}"] = {"status": "ok", "metrics": metrics, "cost": cost, "inference": {}, **about}
    bars = (0.3, 0.2) if name == "mlp" and share <= 0.1 else (1.0,)
    for arm, over, bound in (
        *((arm, "masked", bar) for arm in ("buckets", "host", "buckets-eigen", "host-eigen") for bar in bars),
        ("host", "expert", 1.0),
        *((arm, "torch", 1.0) for arm in ("host", "host-eigen")),
    ):
        if arm in timings and over in timings:
            ratio = paired_ratio(timings[arm], timings[over])
            text = f"{group}: {ARMS[arm][0]} takes at most {bound:g} times as long as {ARMS[over][0]}"
            claims.append({"text": text, "left": ratio, "op": "<=", "right": bound, "holds": ratio <= bound})
    return arms, claims


def milliseconds(call: Callable[[Any], Any], batches: Sequence[Any], count: int) -> list[float]:
    """Of each of ``count`` calls, every one with the next batch alone."""
    import jax

    device, found = [jax.device_put(batch) for batch in batches], []
    for index in range(count):
        start = time.perf_counter()
        jax.block_until_ready(call([device[index % len(device)]]))
        found.append(1e3 * (time.perf_counter() - start))
    return found


def torch_is_there() -> bool:
    import importlib.util

    return importlib.util.find_spec("torch") is not None


def benchmark(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What goes into the results file, after each pair and share."""
    from effjax.study.report import SCHEMA
    from effjax.study.results import environment

    before = json.loads(options.out.read_text()) if options.add and options.out.exists() else {}
    arms: dict[str, Any] = before.get("arms", {})
    claims: list[Mapping[str, Any]] = before.get("claims", [])
    for name in options.pairs:
        x, labels = (column[: options.rows] for column in images(name))
        found = fitted(PAIRS[name](), x, labels, options.shares)
        half = len(x) // 2
        if options.batches * options.batch_size > half:
            raise SystemExit(
                f"--batches {options.batches} of {options.batch_size} rows are more than the {half} of {name}."
            )
        starts = range(half, half + options.batches * options.batch_size, options.batch_size)
        batches = [x[start : start + options.batch_size] for start in starts]
        for share in options.shares:
            more, decided = measure(name, share, found[share], batches, options)
            group = f"{name}-{round(100 * share)}"
            arms = {key: arm for key, arm in arms.items() if arm["group"] != group} | more
            claims = [claim for claim in claims if not claim["text"].startswith(f"{group}:")] + decided
            print(f"{name}, {share:.0%} asked: done", flush=True)
            yield {
                "schema": SCHEMA,
                "study": "hybrid_speed",
                "groups": dict.fromkeys((arm["group"] for arm in arms.values()), METRIC),
                "preset": "-".join(options.pairs),
                "seeds": [0],
                "budget": {"amount": options.rounds, "unit": "rounds"},
                "config": None,  # no study of `effjax compare`: this script alone
                "arms": arms,
                "claims": claims,
                "environment": environment() | {"threads": options.threads, "batch_size": options.batch_size},
            }


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the results file")
    parser.add_argument("--add", action="store_true", help="keep the other groups of a file that is there")
    parser.add_argument("--pairs", nargs="+", choices=tuple(PAIRS), default=list(PAIRS))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.2, 0.3], help="of the rows that ask")
    parser.add_argument("--arms", nargs="+", choices=("*", *ARMS), default=["*"])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=2, help="answered in one round")
    parser.add_argument("--rows", type=int, help="images used, half for thresholds; all if left out")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--latencies", type=int, default=0, help="calls of one batch each, for their percentiles")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(words)
    if hasattr(os, "sched_setaffinity"):  # before JAX starts its threads, one a core
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    if torch_is_there():
        import torch

        torch.set_num_threads(options.threads)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for results in benchmark(options):
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    for name, arm in results["arms"].items():
        relative = arm["metrics"].get("relative", {}).get("mean", float("nan"))
        print(f"{name:24} {arm['metrics']['images_per_s']['mean']:10.1f} images/s {relative:6.3f} x masked")
    for claim in results["claims"]:
        verdict = "holds" if claim["holds"] else "FAILS"
        print(f"{verdict} {claim['left']:6.3f} <= {claim['right']:.3f} {claim['text']}")


if __name__ == "__main__":
    main()
