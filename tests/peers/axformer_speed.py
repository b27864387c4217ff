"""Seconds of AxFormer's search with and without its stores, and of the whole, the gated and the sliced model.

Run it on a quiet machine, from the repository::

    python tests/peers/run.py axformer_speed --model 4x64 --rows 512 --out speed.json

The model has random weights: a search on them takes as long as any, and of a model only the shapes count for its time.
The sliced models lack every other block, every other head and group, or both. Times of models are taken in turns.
"""

import argparse
import json
import time

import jax
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="4x64", help="layers x width; 64 columns a head, at least 4 heads")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 32, 128))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", default="")
    words = parser.parse_args()
    found = {"device": jax.devices()[0].device_kind, **vars(words), **measured(words)}
    print(json.dumps(found, indent=1))
    if words.out:
        with open(words.out, "w") as file:
            json.dump(found, file, indent=1)


def measured(words: argparse.Namespace) -> dict:
    from effjax.models.bert import Bert, BertClassifier

    layers, width = map(int, words.model.split("x"))
    encoder = Bert(1000, width, layers, max(4, width // 64), 4 * width, max_positions=max(128, words.length))
    module = BertClassifier(encoder, classes=2)
    draws = np.random.default_rng(0)
    ids = draws.integers(0, 1000, (words.rows, words.length)).astype(np.int32)
    params = jax.jit(module.init)(jax.random.key(0), ids[:1])["params"]
    labels = draws.integers(0, 2, words.rows)
    return {
        "search": searches(module, params, ids, labels, encoder.intermediate_size // 8),
        "models": models(module, params, ids, encoder.intermediate_size // 8, words),
    }


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
        ("stored, early end", 2**34, {"abort": True}),
        ("stored, 4 ahead", 2**34, {"speculate": 4}),
    ):
        evaluator = GatedEvaluator(module, params, batches, cache_bytes=cache_bytes)
        evaluator(all_gates(shape))  # compiles
        begun = time.perf_counter()
        result = axformer(evaluator, shape, config=AxformerConfig(hard=False), **keywords)
        seconds = time.perf_counter() - begun
        tests, run = len(result.trace), evaluator.layers_run
        found[name] = {"seconds": seconds, "tests": tests, "layers_run": run, "compiles": evaluator.compiles}
    return found


def models(module, params, ids, group_size, words) -> dict:
    from effjax.core.timing import time_interleaved
    from effjax.transformers.gated import gated_apply
    from effjax.transformers.prune_spec import PruneSpec, prune_shape
    from effjax.transformers.slicing import slice_model

    shape = prune_shape(module, group_size=group_size)
    odd = tuple(range(1, shape.layers, 2))
    parts = {
        "heads": tuple((layer, head) for layer in range(shape.layers) for head in range(1, shape.heads, 2)),
        "groups": tuple((layer, group) for layer in range(shape.layers) for group in range(1, shape.groups, 2)),
    }
    blocks = {"attention": odd, "mlp": odd}
    specs = {name: PruneSpec(shape, **fields) for name, fields in (("blocks", blocks), ("parts", parts))}
    found: dict = {name: {"kept_macs": spec.kept_macs(words.length)} for name, spec in specs.items()}
    apply = gated_apply(module)
    for rows in words.batches:
        batch, calls = ids[:rows], {}
        jitted = jax.jit(module.apply)
        calls["whole"] = lambda batch=batch, jitted=jitted: jitted({"params": params}, batch)
        for name, spec in specs.items():
            small, sliced = slice_model(module, params, spec)
            run, gated, gates = jax.jit(small.apply), jax.jit(apply), spec.gates()
            calls[name] = lambda batch=batch, run=run, sliced=sliced: run({"params": sliced}, batch)
            calls[f"{name}, gated"] = lambda batch=batch, gated=gated, gates=gates: gated(
                params, {"input_ids": batch}, gates
            )
        timings = time_interleaved(calls, rounds=words.rounds)
        medians = {name: timing.median_ms for name, timing in timings.items()}
        found[f"batch {rows}, ms"] = medians
        found[f"batch {rows}, realised"] = {
            name: (1 - medians[name] / medians["whole"]) / (1 - spec.kept_macs(words.length))
            for name, spec in specs.items()
        }
    return found


if __name__ == "__main__":
    main()
