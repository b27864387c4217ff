"""Images per second of MobileNets and ResNets beside torchvision's, on the same cores.

Run it on a quiet machine, from the repository::

    python tests/peers/image_speed.py --model mobilenet_v2 --threads 1

Every arm gets the same images in turns, in one process; printed are medians and the best. *norms* is the network as
it is trained, *folded* has its batch norms in its convolutions, *grouped* has XLA's grouped convolution in place of
shifted products. PyTorch runs in its two memory formats, and traced, frozen and fused.

A program's temporary memory is given back after every call. Where it is above 32 MiB (MobileNetV2, three images or
more) Linux zeroes its pages anew each time, which can take longer than the network. Huge pages make that cheap:
``GLIBC_TUNABLES=glibc.malloc.hugetlb=1`` in the environment, for either library.
"""

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from unittest import mock

FLAGS = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def ours(name: str, images) -> dict[str, Callable[[], object]]:
    import jax

    from effjax.models import layers
    from effjax.models.image_models import image_model

    conv = layers.depthwise_conv
    arms = {}
    for arm, norm in (("norms", "batch"), ("folded", "none"), ("grouped", "batch")):
        model = image_model(name, norm=norm)
        grouped = lambda *args, **options: conv(*args, **{**options, "impl": "conv"})
        with mock.patch.object(layers, "depthwise_conv", grouped) if arm == "grouped" else contextlib.nullcontext():
            if arm == "grouped" and not hasattr(model, "stem_strides"):
                continue
            variables = jax.jit(model.init)(jax.random.key(0), images[:1])
            run = jax.jit(model.apply).lower(variables, images).compile()
        arms[arm] = lambda run=run, variables=variables: jax.block_until_ready(run(variables, images))
    return arms


def theirs(name: str, images, threads: int) -> dict[str, Callable[[], object]]:
    try:
        import torch
    except ImportError:
        return {}
    from test_image_models import libraries

    _, torchvision, _ = libraries()
    torch.set_num_threads(threads)
    given = torch.tensor(images).permute(0, 3, 1, 2)
    arms = {}
    for arm, layout in (("torch", torch.contiguous_format), ("torch channels_last", torch.channels_last)):
        net = getattr(torchvision.models, name)().eval().to(memory_format=layout)
        x = given.contiguous(memory_format=layout)
        arms[arm] = lambda net=net, x=x: net(x)
    net, x = getattr(torchvision.models, name)().eval(), given.contiguous()
    with torch.inference_mode():
        frozen = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(net, x)))
    return {**arms, "torch frozen": lambda: frozen(x)}


def seconds(
    arms: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> Iterator[tuple[str, float, float]]:
    """Arm, and the median and the least of its times, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 2):
        for name, run in arms.items():
            start = clock()
            run()
            if turn >= 2:
                times[name].append(clock() - start)
    for name, found in times.items():
        yield name, statistics.median(found), min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="mobilenet_v2")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--processor", action="store_true", help="seconds of the processor, where others use it too")
    options = parser.parse_args()
    if options.threads == 1:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    import numpy as np

    clock = time.process_time if options.processor else time.perf_counter
    for batch in options.batches:
        images = np.random.default_rng(0).normal(size=(batch, options.size, options.size, 3)).astype(np.float32)
        arms = {**ours(options.model, images), **theirs(options.model, images, options.threads)}
        inference = contextlib.nullcontext()
        with contextlib.suppress(ImportError):
            import torch

            inference = torch.inference_mode()
        with inference:
            for name, median, least in seconds(arms, options.rounds, clock):
                print(
                    f"{options.model} batch {batch} threads {options.threads} {name:20}"
                    f"{batch / median:8.1f} images/s (best {batch / least:.1f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
