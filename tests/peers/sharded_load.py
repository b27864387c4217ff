"""A decoder of a billion random parameters, loaded in shards on eight devices: peak memory, and steps of LoRA and COLA.

Run it from the repository; loading needs 3 GB of memory and 2 GB on the disk of ``--folder``. With ``--steps`` it had
taken 15 GB when it was stopped: eight devices that gather kernels are one memory here::

    python tests/peers/sharded_load.py --folder decoder-1b

The folder is written if it is not there. In a process of its own each, the model is loaded on a mesh of eight virtual
CPU devices in bfloat16, and, with ``--steps``, adapters are trained. The memory is what the kernel counts for the
process (VmHWM, with mapped pages of the files), less what it had before loading. On a CPU the devices' memory is the
host's, so a load that keeps no copies needs the model's bytes and one leaf's parts.
"""

import argparse
import json
import os
import time
from pathlib import Path

SIZES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "small": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}


def write(folder: Path, size: str, vocabulary: int = 32000) -> None:
    """A Llama of random weights, a tensor at a time, in shards of about half a gigabyte."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    config = SIZES[size] | {
        "model_type": "llama",
        "vocab_size": vocabulary if size == "1b" else 256,
        "num_key_value_heads": SIZES[size]["num_attention_heads"] // (8 if size == "1b" else 2),
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    width, inner = config["hidden_size"], config["intermediate_size"]
    kv = width * config["num_key_value_heads"] // config["num_attention_heads"]
    rng = np.random.default_rng(0)
    draw = lambda *shape: (0.02 * rng.standard_normal(shape, np.float32)).astype(ml_dtypes.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}

    def save(part: str, tensors: dict) -> None:
        name = f"model-{part}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, name))

    ones = np.ones(width, ml_dtypes.bfloat16)
    save("embed", {"model.embed_tokens.weight": draw(config["vocab_size"], width), "model.norm.weight": ones})
    save("head", {"lm_head.weight": draw(config["vocab_size"], width)})
    for layer in range(config["num_hidden_layers"]):
        shapes = {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (kv, width),
            "self_attn.v_proj": (kv, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }
        tensors = {f"model.layers.{layer}.{name}.weight": draw(*shape) for name, shape in shapes.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        save(f"{layer:02d}", tensors | {f"model.layers.{layer}.{name}.weight": ones for name in norms})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(config))


def memory(name: str) -> int:
    """Bytes of this process: ``VmHWM`` at most, ``VmRSS`` now, ``RssAnon`` without mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise LookupError(name)


def load(folder: Path, rules: str, steps: int) -> dict:
    """What loading takes, and what training loses."""
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    import jax.numpy as jnp
    from jax.sharding import AxisType

    from effjax.models import load_pretrained

    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    jax.block_until_ready(jnp.zeros(8))
    before, start = memory("VmRSS"), time.perf_counter()
    model = load_pretrained(
        folder, scan_layers=True, remat=True, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, mesh=mesh, rules=rules
    )
    jax.block_until_ready(model.params)
    seconds, peak = time.perf_counter() - start, memory("VmHWM") - before
    leaves = jax.tree.leaves(model.params)
    size = sum(leaf.nbytes for leaf in leaves)
    held = [sum(leaf.addressable_shards[i].data.nbytes for leaf in leaves) for i in range(8)]
    found = {
        "rules": rules,
        "parameters": sum(leaf.size for leaf in leaves),
        "bytes": size,
        "largest_leaf_bytes": max(leaf.nbytes for leaf in leaves),
        "bytes_per_device": max(held),
        "host_peak_bytes": peak,
        "host_peak_over_bytes": round(peak / size, 3),
        "seconds": round(seconds, 1),
    }
    if steps:
        found["losses"] = {name: train(model, mesh, rules, name, steps) for name in ("lora", "cola")}
        found["host_peak_bytes_with_training"] = memory("VmHWM") - before
    return found


def train(model, mesh, rules: str, method: str, steps: int) -> list[float]:
    """Losses of a few steps on one batch of random tokens; COLA's knot is after the first."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import NamedSharding, PartitionSpec

    from effjax.finetune import ColaConfig, cola_init, cola_next, cola_value_and_grad, lora_apply
    from effjax.train import shard

    tokens = np.random.default_rng(1).integers(0, model.config["vocab_size"], (8, 32), np.int32)
    batch = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data")))
    # A chain whose first link is the last is LoRA.
    config = ColaConfig("attention/(query|value)/kernel", knots=(1,) if method == "cola" else (steps + 1,))
    tx, apply = optax.adam(1e-2), lora_apply(model.module.apply)

    def loss(params, batch):
        logits = apply({"params": params}, batch)[:, :-1].astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    @jax.jit
    def step(state, opt, batch):
        value, grads = cola_value_and_grad(loss, config)(state, batch)
        updates, opt = tx.update(grads, opt, state.lora)
        return state._replace(lora=optax.apply_updates(state.lora, updates)), opt, value

    state = cola_init(jax.random.key(0), model.params, config)
    state = state._replace(lora=shard(state.lora, rules, mesh))
    opt, knot, losses = jax.jit(tx.init)(state.lora), cola_next(tx, config), []
    for index in range(steps):
        if index in config.knots:
            state, opt = knot(state, opt)
        with jax.set_mesh(mesh):  # activations keep their rows
            state, opt, value = step(state, opt, batch)
        losses.append(float(value))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--rules", default="fsdp+tensor")
    parser.add_argument("--steps", type=int, default=0, help="of LoRA and of COLA")
    options = parser.parse_args()
    if not (options.folder / "config.json").exists():
        write(options.folder, options.size)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    print(json.dumps(load(options.folder, options.rules, options.steps), indent=1))


if __name__ == "__main__":
    main()
