"""Clock of ICPC: a training step on a mixture of sizes, and cascades by the share that stops at the first size.

Run it on a quiet machine, from the repository::

    python tests/peers/run.py icpc_speed --out configs/icpc/results/speed-intel-xeon-2-cores.json

A ViT with random weights on noise, so that only the clock means something. The threshold of each cascade is the
quantile of the confidences of this very batch that lets the wanted share stop. All arms of a table are timed in turns
in one process, medians over the rounds.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runs import results, table

from effjax.train.logging import write_json


def model_and_images(options: argparse.Namespace, rows: int) -> tuple[Callable[..., Any], Any, Any]:
    """``(apply, params, images)``."""
    import jax
    import numpy as np

    from effjax.models.vit import ViT
    from effjax.transformers.position_tables import position_selector

    side = options.pixels // options.patch
    model = ViT(
        classes=10,
        patch=options.patch,
        grid=(side, side),
        hidden_size=options.width,
        num_layers=options.depth,
        num_heads=max(1, options.width // 16),
        positions=position_selector("crop"),
        scan_layers=False,
    )
    images = np.random.default_rng(0).normal(size=(rows, options.pixels, options.pixels, 3)).astype(np.float32)
    params = jax.jit(model.init)(jax.random.key(0), images[:1])["params"]
    return lambda params, images, **_: model.apply({"params": params}, images), params, jax.device_put(images)


def sizes(options: argparse.Namespace) -> tuple[int, ...]:
    side = options.pixels // options.patch
    return tuple(options.patch * round(side * scale) for scale in options.scales)


def training(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds and tokens of a loss and its gradient: the full size, a mixture, and each size alone."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from effjax.core.timing import time_interleaved
    from effjax.transformers.compressions import resize_images
    from effjax.transformers.icpc import icpc
    from effjax.transformers.level_sampling import level_tokens

    levels = sizes(options)
    rows = options.batch // len(levels) * len(levels)
    apply, params, images = model_and_images(options, rows)
    labels = jax.nn.one_hot(np.arange(rows) % 10, 10)

    def gradient(run: Callable[..., Any]) -> Callable[[], Any]:
        loss = lambda params, images: -jnp.mean(jax.nn.log_softmax(run(params, images)) * labels)
        return functools.partial(jax.jit(jax.grad(loss)), params, images)

    at = lambda level: lambda params, images: apply(params, resize_images(images, level))
    arms = {"full size": gradient(apply), "mixture": gradient(icpc(apply, levels))}
    arms |= {f"{level} px": gradient(at(level)) for level in levels[:-1]}
    times = time_interleaved(arms, rounds=options.rounds)
    tokens = {level: level_tokens(level, options.patch) for level in levels}
    shares = {"full size": 1.0, "mixture": float(np.mean([*tokens.values()]) / tokens[levels[-1]])}
    shares |= {f"{level} px": tokens[level] / tokens[levels[-1]] for level in levels[:-1]}
    full = times["full size"].median_ms
    return {
        name: {"ms": time.median_ms, "of_full": time.median_ms / full, "tokens": shares[name]}
        for name, time in times.items()
    }


def cascades(options: argparse.Namespace, rows: int) -> dict[str, dict[str, float]]:
    """Milliseconds and tokens of answering a batch: the full size, both sizes masked, and cascades."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from effjax.core.timing import time_interleaved
    from effjax.transformers.compressions import resize_images
    from effjax.transformers.level_cascade import LevelCascade, evaluated_cost
    from effjax.transformers.level_sampling import level_tokens

    first, last = sizes(options)[0], sizes(options)[-1]
    apply, params, images = model_and_images(options, rows)
    small = jax.jit(lambda params, images: apply(params, resize_images(images, first)))
    confidence = np.sort(np.asarray(jax.nn.softmax(small(params, images)).max(-1)))
    buckets = tuple(size for size in (1, 2, 4, 8, 16, 32, 64, 128, 192) if size < rows) or (rows,)
    serve = LevelCascade(apply, (first, last), buckets=buckets)
    costs = (level_tokens(first, options.patch), level_tokens(last, options.patch))

    def masked(params: Any, images: Any) -> Any:
        logits = small(params, images)
        sure = jax.nn.softmax(logits).max(-1, keepdims=True) >= 0.9
        return jnp.where(sure, logits, apply(params, images))

    arms: dict[str, Callable[[], Any]] = {
        "full size": functools.partial(jax.jit(apply), params, images),
        "both sizes masked": functools.partial(jax.jit(masked), params, images),
    }
    tokens = {"full size": 1.0, "both sizes masked": sum(costs) / costs[-1]}
    for share in options.stops:
        on = round(rows * (1 - share))
        threshold = (float(confidence[on - 1] + 1e-7) if on else 0.0,)
        arms[f"cascade {share:.0%} stop"] = lambda threshold=threshold: serve(params, images, threshold).outputs
        answered = serve(params, images, threshold).answered
        tokens[f"cascade {share:.0%} stop"] = float(evaluated_cost(answered, costs).mean() / costs[-1])
    times = time_interleaved(arms, rounds=options.rounds)
    full = times["full size"].median_ms
    return {
        name: {"ms": time.median_ms, "of_full": time.median_ms / full, "tokens": tokens[name]}
        for name, time in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64, help="of the model")
    parser.add_argument("--depth", type=int, default=4, help="layers of the model")
    parser.add_argument("--pixels", type=int, default=28, help="side of a full image")
    parser.add_argument("--patch", type=int, default=4, help="side of a patch")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.43, 0.57, 0.71, 0.86, 1.0], help="of the sizes")
    parser.add_argument("--batch", type=int, default=100, help="rows of a training step")
    parser.add_argument("--serve", type=int, nargs="+", default=[1, 64, 256], help="rows answered at once")
    parser.add_argument("--stops", type=float, nargs="+", default=[1.0, 0.8, 0.5, 0.0], help="shares that stop")
    parser.add_argument("--rounds", type=int, default=20, help="samples of every arm")
    parser.add_argument("--out", type=Path, help="file for the numbers, JSON")
    options = parser.parse_args()
    found = {f"train-{options.batch}": training(options)}
    for rows in options.serve:
        found[f"answer-{rows}"] = cascades(options, rows)
    for group, rows in found.items():
        print(table(group, rows))
    if options.out:
        write_json(options.out, results("icpc_speed", found, options))


if __name__ == "__main__":
    main()
