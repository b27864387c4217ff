"""What a step of the paper presets sends between 64 devices, by layout, and how long it should take on pods.

Run it from the repository; it allocates no parameters, compiles about ten programs and takes some minutes::

    python tests/peers/pod_plan.py --out configs/launch/pods.json

The steps of ``cola:paper`` (OPT-1.3B and Llama-2-7B, adapters and prompts of the preset) and ``icpc:paper`` (ViT-B/16
at 384 pixels) are compiled for a mesh of 64 virtual CPU devices, from shapes alone, layers scanned and recomputed. The
collectives of the compiled program are counted and compared with what the layout should send. The programs are in
float32, as XLA widens bfloat16 before it sends on a CPU: parameters and activations in bfloat16 are half the bytes.

The prediction is one, and no measurement: per chip

    compute = flops / (MFU peak),   memory = 2 bytes (uses of a parameter) / bandwidth,   network = bytes sent / link

and a step takes between the longest of them (all of it hidden) and their sum (none of it).
"""

import argparse
import functools
import json
import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

DEVICES = 64
MFU = 0.5
"""Share of the peak that matrix products reach."""

# The published config.json of each model.
OPT = {
    **{"model_type": "opt", "vocab_size": 50272, "hidden_size": 2048, "num_hidden_layers": 24, "ffn_dim": 8192},
    **{"num_attention_heads": 32, "max_position_embeddings": 2048, "word_embed_proj_dim": 2048, "pad_token_id": 1},
    **{"activation_function": "relu", "do_layer_norm_before": True, "dropout": 0.1, "attention_dropout": 0.0},
}
LLAMA = {
    **{"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "rms_norm_eps": 1e-5},
    **{"num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 11008, "hidden_act": "silu"},
    **{"max_position_embeddings": 4096, "tie_word_embeddings": False},
}


class Chip(NamedTuple):
    """Public figures of one chip, and where they stand."""

    teraflops: float  # bfloat16, dense
    gigabytes: float
    bandwidth: float  # GB/s of memory
    link: float  # GB/s that one chip sends to the others of its slice or node
    far: float  # the same where more chips than one node take part
    node: int
    source: str


CHIPS = {
    "v5e": Chip(197, 16, 819, 200, 200, 256, "https://cloud.google.com/tpu/docs/v5e (1600 Gbps)"),
    "v5p": Chip(459, 95, 2765, 600, 600, 8960, "https://cloud.google.com/tpu/docs/v5p (4800 Gbps)"),
    "H100": Chip(
        *(989, 80, 3350, 450, 50, 8, "https://www.nvidia.com/en-us/data-center/h100/ (NVLink 900 GB/s both ways, "),
    ),
}
CHIPS["H100"] = CHIPS["H100"]._replace(source=CHIPS["H100"].source + "a 400 Gb/s adapter per GPU between nodes)")


class Case(NamedTuple):
    """A model on a mesh; ``rows`` of ``length`` tokens, or images, for each device of the axis ``data``."""

    model: str
    layout: str
    data: int
    parts: int = 1


CASES = (
    Case("opt-1.3b", "data", 64),
    Case("opt-1.3b", "fsdp", 64),
    Case("llama-2-7b", "fsdp", 64),
    Case("llama-2-7b", "fsdp+tensor", 16, 4),
    Case("vit_base_patch16_384", "data", 64),
    Case("vit_base_patch16_384", "fsdp", 64),
)


class Step(NamedTuple):
    """One training step, from shapes alone.

    Attributes:
      run: ``(state, opt, batch) -> (state, opt, loss)``.
      state: what is updated, with the frozen base.
      opt: the optimizer's state.
      batch: for one device of ``data``.
      base: the parameters, by path.
      tokens: of one device of ``data``.
      hidden: width of the activations.
      trained: whether gradients of the base are formed.
      attention: heads times positions of a row.
      logits: outputs for each token that the loss reads, 0 where they are few.
    """

    run: Any
    state: Any
    opt: Any
    batch: Any
    base: dict[str, Any]
    tokens: int
    hidden: int
    trained: bool
    attention: int
    logits: int


@functools.cache
def step_of(model: str) -> Step:
    return _vision() if model.startswith("vit") else _cola({"opt-1.3b": OPT, "llama-2-7b": LLAMA}[model])


def _paths(tree: Any) -> dict[str, Any]:
    import jax

    from effjax.core.tree import leaf_paths

    return dict(zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True))


def _cola(config: dict[str, Any]) -> Step:
    """A step of the preset's chain, on prompts with two label words."""
    import jax
    import jax.numpy as jnp
    import optax

    from effjax.finetune import ColaConfig, LoraConfig, LoraRule, cola_init, cola_value_and_grad, lora_apply
    from effjax.models.families import FAMILIES
    from effjax.study.resolve import presets

    paper = presets("cola")["paper"]
    kind, sizes = FAMILIES[config["model_type"]].build(config)
    module = kind(**{**sizes, "dropout": 0.0, "attention_dropout": 0.0, "scan_layers": True, "remat": True})
    ids = jax.ShapeDtypeStruct((2, paper.max_length), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
    lora = LoraConfig(LoraRule("(query|value)/kernel$", paper.rank, paper.scale * paper.rank))
    chain = ColaConfig(lora, knots=(1,))
    tx, apply = optax.adamw(paper.learning_rate), lora_apply(module.apply)
    state = jax.eval_shape(lambda key, params: cola_init(key, params, chain), jax.random.key(0), params)

    def loss(params, batch):
        ids, scored, label = batch
        logits = apply({"params": params}, ids)
        likelihood = -optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
        mean = jnp.where(scored[:, 1:], likelihood, 0).sum(-1) / jnp.maximum(scored[:, 1:].sum(-1), 1)
        return optax.softmax_cross_entropy_with_integer_labels(mean.reshape(-1, 2), label).mean()

    def run(state, opt, batch):
        value, grads = cola_value_and_grad(loss, chain)(state, batch)
        updates, opt = tx.update(grads, opt, state.lora)
        return state._replace(lora=optax.apply_updates(state.lora, updates)), opt, value

    rows = 2 * paper.batch_size
    shape = lambda *sizes, dtype=jnp.int32: jax.ShapeDtypeStruct(sizes, dtype)
    batch = (shape(rows, paper.max_length), shape(rows, paper.max_length, dtype=bool), shape(paper.batch_size))
    opt = jax.eval_shape(tx.init, state.lora)
    tokens = rows * paper.max_length
    sizes = (config["hidden_size"], False, config["num_attention_heads"] * paper.max_length, config["vocab_size"])
    return Step(run, state, opt, batch, _paths(params), tokens, *sizes)


def _vision(images: int = 8) -> Step:
    """A step on images of the full size; 8 for a device are the preset's batch on 64."""
    import jax
    import jax.numpy as jnp
    import optax

    from effjax.models.vit import named_vit
    from effjax.study.resolve import presets

    paper = presets("icpc")["paper"]
    module = named_vit(paper.tasks[0].partition("/")[2], classes=10).clone(scan_layers=True, remat=True)
    pixels = jax.ShapeDtypeStruct((images, paper.pixels, paper.pixels, 3), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), pixels)["params"]
    tx = optax.adamw(paper.learning_rate, weight_decay=paper.weight_decay)

    def run(params, opt, batch):
        def loss(params):
            logits = module.apply({"params": params}, batch[0])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    batch = (pixels, jax.ShapeDtypeStruct((images,), jnp.int32))
    length, opt = (paper.pixels // 16) ** 2 + 1, jax.eval_shape(tx.init, params)
    sizes = (module.hidden_size, True, length * module.num_heads, 0)
    return Step(run, params, opt, batch, _paths(params), images * length, *sizes)


def compiled(case: Case) -> tuple[dict[str, Any], int]:
    """The collectives of the step on the case's mesh, in float32, and its multiply-adds on all devices."""
    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from effjax.core.collectives import by_kind, collectives
    from effjax.core.macs import count_jaxpr_macs
    from effjax.models.mesh_rules import mesh_shardings

    step = step_of(case.model)
    devices = jax.devices()[: case.data * case.parts]
    kinds = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((case.data, case.parts), ("data", "model"), axis_types=kinds, devices=devices)
    put = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    place = lambda tree: jax.tree.map(put, tree, mesh_shardings(tree, case.layout, mesh))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    widen = lambda leaf: jax.ShapeDtypeStruct((case.data * leaf.shape[0], *leaf.shape[1:]), leaf.dtype, sharding=rows)
    state, opt, batch = place(step.state), place(step.opt), jax.tree.map(widen, step.batch)
    stays = (jax.tree.map(lambda leaf: leaf.sharding, (state, opt)), None)
    out = (*stays[0], stays[1])
    with jax.set_mesh(mesh):
        traced = jax.jit(step.run, donate_argnums=(0, 1), out_shardings=out).trace(state, opt, batch)
        program = traced.lower().compile()
    found = collectives(program)
    largest = [f"{one.times} x {one.kind} {', '.join(one.shapes)} over {one.devices}" for one in found[:6]]
    macs = count_jaxpr_macs(traced.jaxpr)
    return {"collectives": by_kind(found), "largest": largest}, int(macs.expected)


def expected(case: Case) -> dict[str, float]:
    """Bytes that one device should send in a step, in float32 as compiled: by what they are for.

    Under ``fsdp`` every split kernel of a layer is gathered forward, and backward once for its recomputation and the
    gradient of its input; tables of embeddings and outputs once. Gradients of what is trained are summed over ``data``.
    Under ``tensor`` activations are summed over ``model``: after attention and MLP, where attention is recomputed, and
    in the backward pass where both begin.
    """
    step, n, m = step_of(case.model), case.data, case.parts
    layers = [leaf for path, leaf in step.base.items() if path.startswith("layers/")]
    gathered = sum(4 * math.prod(leaf.shape) * uses for leaf, uses in _uses(step, case)) / m * (n - 1) / n
    sent = {"parameters": gathered if "fsdp" in case.layout else 0.0}
    sent["gradients"] = 2 * (n - 1) / n * sum(4 * math.prod(leaf.shape) for leaf in _trained(step))
    depth = layers[0].shape[0]
    sent["activations"] = 5 * depth * 4 * step.tokens * step.hidden * 2 * (m - 1) / m if m > 1 else 0.0
    return sent


def _trained(step: Step) -> list[Any]:
    """What gradients are formed of: the base, or the adapters."""
    return list(step.base.values() if step.trained else _paths(step.state.lora).values())


def _uses(step: Step, case: Case) -> list[tuple[Any, int]]:
    """The kernels that a layout splits over ``data``, and how often a step uses each."""
    from jax.sharding import AbstractMesh

    from effjax.models.mesh_rules import mesh_shardings

    mesh = AbstractMesh((case.data, case.parts), ("data", "model"))
    found = mesh_shardings(dict(step.base), "fsdp" if case.parts == 1 else "fsdp+tensor", mesh)
    split = [path for path, sharding in found.items() if any(axis is not None for axis in sharding.spec)]
    uses = lambda path: 2 if path.startswith("layers/") else 1
    return [(step.base[path], uses(path)) for path in split]


def memory(case: Case) -> dict[str, float]:
    """Gigabytes of one device: bfloat16 for a frozen base and activations, float32 for what is trained."""
    step, n, m = step_of(case.model), case.data, case.parts
    width = 4 if step.trained else 2
    size = sum(math.prod(leaf.shape) for leaf in step.base.values())
    split = (n if "fsdp" in case.layout else 1) * (m if "tensor" in case.layout else 1)
    depth = next(leaf.shape[0] for path, leaf in step.base.items() if path.startswith("layers/"))
    layer = sum(math.prod(leaf.shape[1:]) for path, leaf in step.base.items() if path.startswith("layers/"))
    wide = max(leaf.shape[-1] for path, leaf in step.base.items() if path.startswith("layers/mlp/up"))
    adapters = sum(4 * math.prod(leaf.shape) for leaf in _paths(step.opt).values())
    parts = {
        "parameters": size * width / split,
        "optimizer": adapters / (split if step.trained else 1),
        "gradients": size * 4 / split if step.trained else adapters / 2,
        "kept activations": 2 * depth * step.tokens * step.hidden,
        "one layer": 2 * step.tokens * (8 * step.hidden + 4 * wide // m) + 2 * 2 * layer / m,
        "attention": 3 * 2 * step.tokens * step.attention / m,
        "logits": 3 * 4 * step.tokens * step.logits / m,
    }
    return {name: found / 1e9 for name, found in parts.items()}


def predicted(case: Case, chip: Chip, macs_per_device: float) -> dict[str, Any]:
    """Milliseconds of a step on a kind of chip, between two bounds, and gigabytes."""
    chips = case.data * case.parts
    sent = expected(case)
    if step_of(case.model).trained and "fsdp" in case.layout:
        sent["gradients"] /= 2  # a reduce-scatter, where XLA makes one
    narrow = (sent["parameters"] + sent["activations"]) / 2 + sent["gradients"]
    reads = sum(2 * math.prod(leaf.shape) * uses for leaf, uses in _uses(step_of(case.model), case)) / case.parts
    times = {
        "compute_ms": 2e3 * macs_per_device / (MFU * chip.teraflops * 1e12),
        "memory_ms": 1e3 * 2 * reads / (chip.bandwidth * 1e9),
        "network_ms": 1e3 * narrow / ((chip.link if chips <= chip.node else chip.far) * 1e9),
    }
    gigabytes = sum(memory(case).values())
    return {
        "examples": 8 * case.data,
        **{name: round(found, 2) for name, found in times.items()},
        "least_ms": round(max(times.values()), 1),
        "most_ms": round(sum(times.values()), 1),
        "gigabytes": round(gigabytes, 2),
        "fits": gigabytes < 0.9 * chip.gigabytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    jax.config.update("jax_num_cpu_devices", DEVICES)
    report: dict[str, Any] = {"devices": DEVICES, "mfu": MFU, "jax": jax.__version__, "collectives": {}}
    report |= {"predictions": {}, "chips": {name: chip._asdict() for name, chip in CHIPS.items()}}
    for case in CASES:
        name = f"{case.model} {case.layout} {case.data} x {case.parts}"
        if options.only not in name:
            continue
        start = time.perf_counter()
        found, macs = compiled(case)
        sent = sum(kind["sent_bytes"] for kind in found["collectives"].values())
        should = expected(case)
        found |= {"expected_bytes": {part: round(size) for part, size in should.items() if size}}
        found |= {"sent_bytes": sent, "sent_over_expected": round(sent / max(1.0, sum(should.values())), 3)}
        found |= {"macs_per_device": macs // DEVICES, "memory_gigabytes": memory(case)}
        report["collectives"][name] = found
        print(f"{name}: {time.perf_counter() - start:.0f} s", json.dumps(found, indent=1), flush=True)
        for chips in (8, 64, 256):
            other = case._replace(data=chips // case.parts)
            for kind, chip in CHIPS.items():
                row = predicted(other, chip, macs / DEVICES)
                report["predictions"].setdefault(name, {})[f"{chips} {kind}"] = row
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
