"""Seconds of AxFormer's search with and without its stores, and of the whole, the gated and the sliced model.

Run it on a quiet machine, from the repository::

    python tests/peers/run.py axformer_speed --out configs/axformer/results/speed-intel-xeon-2-cores.json

The model has random weights: a search on them takes as long as any, and of a model only the shapes count for its time.
The sliced models lack every other block, every other head and group, or both. Times of models are taken in turns.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np
from runs import results, table

from effjax.train.logging import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="4x64", help="layers x width; 64 columns a head, at least 4 heads")
    parser.add_argument("--length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--rows", type=int, default=256, help="texts that are searched on")
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 32, 128), help="texts answered at once")
    parser.add_argument("--target", type=float, default=0.5, help="share of a batch's time to search for")
    parser.add_argument("--rounds", type=int, default=20, help="samples of every model")
    parser.add_argument("--out", type=Path, help="file for the numbers, JSON")
    words = parser.parse_args()
    found = measured(words)
    for group, rows in found.items():
        print(table(group, rows))
    if words.out:
        write_json(words.out, results("axformer_speed", found, words))


def measured(words: argparse.Namespace) -> dict:
    from effjax.models.bert import Bert, BertClassifier

    layers, width = map(int, words.model.split("x"))
    encoder = Bert(1000, width, layers, max(4, width // 64), 4 * width, max_positions=max(128, words.length))
    module = BertClassifier(encoder, classes=2)
    draws = np.random.default_rng(0)
    ids = draws.integers(0, 1000, (words.rows, words.length)).astype(np.int32)
    params = jax.jit(module.init)(jax.random.key(0), ids[:1])["params"]
    labels = draws.integers(0, 2, words.rows)
    group_size = encoder.intermediate_size // 8
    found = {"search": searches(module, params, ids, labels, group_size)}
    specs = chosen(module, params, ids, labels, group_size, words)
    return found | {f"answer-{rows}": models(module, params, ids[:rows], specs, words) for rows in words.batches}


def searches(module, params, ids, labels, group_size) -> dict:
    from effjax.transformers.axformer import axformer
    from effjax.transformers.axformer_rules import AxformerConfig
    from effjax.transformers.evaluator import GatedEvaluator
    from effjax.transformers.prune_spec import all_gates, prune_shape
    from effjax.transformers.validation import prune_batches

    shape, batches = prune_shape(module, group_size=group_size), prune_batches({"input_ids": ids}, labels)
    found = {}
    for name, cache_bytes, keywords in (
        ("plain", 0, {}),
        ("stored", 2**34, {}),
        ("stored and early end", 2**34, {"abort": True}),
        ("stored and 4 ahead", 2**34, {"speculate": 4}),
    ):
        evaluator = GatedEvaluator(module, params, batches, cache_bytes=cache_bytes)
        evaluator(all_gates(shape))  # compiles
        begun = time.perf_counter()
        result = axformer(evaluator, shape, config=AxformerConfig(hard=False), **keywords)
        seconds = time.perf_counter() - begun
        tests, run = len(result.trace), evaluator.layers_run
        found[name] = {"ms": 1e3 * seconds, "tests": tests, "layers_run": run, "compiles": evaluator.compiles}
    return found


def chosen(module, params, ids, labels, group_size, words) -> dict:
    """What goes: every other block, every other part, and what a search to a latency finds on one batch size."""
    from effjax.transformers.block_costs import latency_of_blocks
    from effjax.transformers.cost_search import prune_to_cost
    from effjax.transformers.evaluator import GatedEvaluator
    from effjax.transformers.prune_spec import PruneSpec, prune_shape
    from effjax.transformers.validation import prune_batches

    shape = prune_shape(module, group_size=group_size)
    odd = tuple(range(1, shape.layers, 2))
    parts = {
        "heads": tuple((layer, head) for layer in range(shape.layers) for head in range(1, shape.heads, 2)),
        "groups": tuple((layer, group) for layer in range(shape.layers) for group in range(1, shape.groups, 2)),
    }
    costs = latency_of_blocks(module, rows=words.batches[-1], length=words.length, group_size=group_size)
    evaluator = GatedEvaluator(module, params, prune_batches({"input_ids": ids[:128]}, labels[:128]))
    found = prune_to_cost(evaluator, shape, costs, target=words.target * costs.of(PruneSpec(shape)), tries=1)
    return {
        "blocks": PruneSpec(shape, attention=odd, mlp=odd),
        "parts": PruneSpec(shape, **parts),
        f"search to {words.target:.0%} of batch {words.batches[-1]}": found.spec,
    }


def models(module, params, ids, specs, words) -> dict:
    """Of the whole, the sliced and the gated models; ``realised``: of the removed operations, what the clock shows."""
    from effjax.core.timing import time_interleaved
    from effjax.transformers.gated import gated_apply
    from effjax.transformers.slicing import slice_model

    jitted, gated = jax.jit(module.apply), jax.jit(gated_apply(module))
    calls, kept = {"whole": lambda: jitted({"params": params}, ids)}, {"whole": 1.0}
    for name, spec in specs.items():
        small, sliced = slice_model(module, params, spec)
        run, gates = jax.jit(small.apply), spec.gates()
        calls[name] = lambda run=run, sliced=sliced: run({"params": sliced}, ids)
        calls[f"{name} gated"] = lambda gates=gates: gated(params, {"input_ids": ids}, gates)
        kept |= dict.fromkeys((name, f"{name} gated"), spec.kept_macs(words.length))
    times = {name: timing.median_ms for name, timing in time_interleaved(calls, rounds=words.rounds).items()}
    share = lambda name: times[name] / times["whole"]
    return {
        name: {
            "ms": times[name],
            "of_whole": share(name),
            "kept_macs": kept[name],
            "realised": (1 - share(name)) / (1 - kept[name]) if kept[name] < 1 else 1.0,
        }
        for name in calls
    }


if __name__ == "__main__":
    main()
