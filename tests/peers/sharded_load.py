"""A decoder of random parameters, loaded in shards on eight devices and trained: memory by phase, losses, resuming.

Run it from the repository. The folder of weights is written if it is not there (``1b``: 1.1 billion parameters, 2.2 GB
in bfloat16; ``100m``; ``small``)::

    python tests/peers/sharded_load.py --folder decoder-1b                         # loading alone
    python tests/peers/sharded_load.py --folder decoder-1b --steps 3 --narrow      # three steps of LoRA and of COLA
    python tests/peers/sharded_load.py --folder decoder-1b --steps 3 --out run     # the same, saved after every step
    python tests/peers/sharded_load.py --folder decoder-1b --steps 3 --out run --stop 2
    python tests/peers/sharded_load.py --folder decoder-1b --steps 3 --out run --data 2 --model 2   # goes on there
    python tests/peers/sharded_load.py --folder decoder-1b --steps 3 --out run --data 2 --model 1 --processes 2

The memory is what the kernel counts for the process (VmHWM, with mapped pages of the files), less what it had before,
its peak set back between phases. On a CPU the devices' memory is the host's: what every device has a copy of counts
eight times. Training is ``effjax.train.fit`` of a program of ``cola_task``, as in the study. XLA has no product of
bfloat16 on a CPU and widens all kernels before the loop over layers; ``--narrow`` keeps that inside the loop, as it is
where the hardware has such products.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

SIZES = {
    "1b": ({"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}, 32000),
    "100m": ({"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}, 8192),
    "small": ({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}, 256),
}
KEY_HEADS = {"1b": 4, "100m": 4, "small": 2}
NARROW = "--xla_disable_hlo_passes=while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion"


def write(folder: Path, size: str) -> None:
    """A Llama of random weights, a tensor at a time, in shards of a layer each."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    config = SIZES[size][0] | {
        "model_type": "llama",
        "vocab_size": SIZES[size][1],
        "num_key_value_heads": KEY_HEADS[size],
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


class Peaks:
    """Peak memory of phases, in bytes above what there was at the start."""

    def __init__(self):
        self._before = memory("VmRSS")
        self.found: dict[str, int] = {}

    def end(self, phase: str) -> None:
        """Note the peak of a phase and begin the next."""
        self.found[phase] = max(memory("VmHWM") - self._before, self.found.get(phase, 0))
        Path("/proc/self/clear_refs").write_text("5")


def load(options: argparse.Namespace, peaks: Peaks):
    """The model on its mesh, and what loading took."""
    import jax
    import jax.numpy as jnp

    from effjax.models import load_pretrained
    from effjax.train import MeshOptions

    rules = options.rules if options.data * options.model > 1 else "data"
    mesh = MeshOptions(data=options.data, model=options.model, rules=rules)
    start = time.perf_counter()
    placed = {} if mesh.built is None else {"mesh": mesh.built, "rules": rules}
    dtype = jnp.dtype(options.dtype)
    model = load_pretrained(options.folder, scan_layers=True, remat=True, dtype=dtype, param_dtype=dtype, **placed)
    jax.block_until_ready(model.params)
    seconds = time.perf_counter() - start
    peaks.end("load")
    leaves = jax.tree.leaves(model.params)
    size = sum(leaf.nbytes for leaf in leaves)
    first = jax.local_devices()[0]
    held = [shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards if shard.device == first]
    return (
        model,
        mesh,
        {
            "rules": rules,
            "mesh": [options.data, options.model],
            "parameters": sum(leaf.size for leaf in leaves),
            "bytes": size,
            "largest_leaf_bytes": max(leaf.nbytes for leaf in leaves),
            "bytes_per_device": sum(held),
            "load_peak_over_bytes": round(peaks.found["load"] / size, 3),
            "load_seconds": round(seconds, 1),
        },
    )


def program_of(model, mesh, method: str, steps: int):
    """LoRA or COLA on one batch of random tokens; COLA's knot is after the first step."""
    import jax.numpy as jnp
    import numpy as np
    import optax

    from effjax.finetune import ColaConfig, LoraConfig, cola_next
    from effjax.optim.by_part import by_part
    from effjax.tasks.adapted import cola_task, lora_task, next_link
    from effjax.tasks.task import Metric, Task
    from effjax.train import TrainOptions, supervised
    from effjax.train.trainer import with_knots

    rows = np.random.default_rng(1).integers(0, model.config["vocab_size"], (8, 32), np.int32)

    def loss(variables, batch, key=None, *, train=True):
        ids = batch["input_ids"]
        logits = model.module.apply({"params": variables["params"]}, ids)[:, :-1].astype(jnp.float32)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()
        return value, ({}, {"loss": value})

    dtype = jnp.dtype(model.module.dtype).name
    task = Task(
        **{"name": "decoder", "source": "random tokens", "metric": Metric("nll", "min", "nats"), "loss": loss},
        **{"init": lambda key: {"params": model.params}, "infer": None, "evaluate": lambda variables: {}},
        **{"train": {"input_ids": rows}, "example_inputs": rows[:1], "dtype": dtype, "remat": True},
    )
    options = TrainOptions(mesh=mesh, checkpoint_steps=1, read_lag=1, log_steps=1, dtype=dtype, remat=True)
    tx = optax.adam(1e-2)
    targets, knots = "attention/(query|value)/kernel", (1,)
    own = lora_task(task, LoraConfig(targets))
    if method == "cola":
        config = ColaConfig(targets, knots=knots)
        own = cola_task(task, config)
    program = supervised(own, by_part({"lora": tx}), steps=steps, batch_size=8, options=options)
    if method == "cola":
        program = with_knots(program, knots, next_link(cola_next(tx, config)))
    return program, options


class Stopped(Exception):
    """After the step that ``--stop`` names."""


def train(model, mesh, method: str, options: argparse.Namespace, peaks: Peaks) -> dict:
    """Losses of the run, and a sum over its adapters, which tells two runs apart."""
    import jax
    import numpy as np

    from effjax.train import fit
    from effjax.train.logging import read_jsonl

    program, settings = program_of(model, mesh, method, options.steps)
    folder = options.out / method if options.out else None

    def watch(done: int) -> None:
        peaks.end(f"{method}, to step {done}")
        if done == options.stop:
            raise Stopped

    start = time.perf_counter()
    try:
        # A step is saved after it has been watched, so the run goes on from the one before.
        result = fit(program, 0, options=settings, directory=folder, identity={"method": method}, on_steps=watch)
    except Stopped:
        return {"stopped": options.stop}
    seconds = time.perf_counter() - start
    peaks.end(f"{method}, end")
    total = jax.jit(lambda tree: sum(abs(leaf).sum() for leaf in jax.tree.leaves(tree)))(result.state.params["lora"])
    losses = [record["loss"] for record in read_jsonl(folder / "log.jsonl")] if folder else []
    losses = losses or [result.train["loss"]]  # their mean, where no log was kept
    return {"losses": losses, "adapters": float(np.asarray(total)), "seconds": round(seconds, 1)}


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--rules", default="fsdp+tensor")
    parser.add_argument("--data", type=int, default=4)
    parser.add_argument("--model", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1, help="that share the devices")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--narrow", action="store_true")
    parser.add_argument("--steps", type=int, default=0, help="of LoRA and of COLA")
    parser.add_argument("--methods", nargs="+", default=["lora", "cola"])
    parser.add_argument("--stop", type=int, default=None, help="after this step of each")
    parser.add_argument("--out", type=Path, default=None, help="checkpoints and logs")
    parser.add_argument("--report", type=Path, default=None, help="JSON file that what was found is added to")
    options = parser.parse_args(words)
    if options.stop and options.out is None:
        parser.error("--stop needs --out")
    return options


def main() -> None:
    options = parsed()
    if not (options.folder / "config.json").exists():
        write(options.folder, options.size)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if options.narrow:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {NARROW}"
    if options.processes > 1 and "JAX_PROCESS_ID" not in os.environ:
        sys.exit(in_processes(options.processes))
    import jax

    from effjax.train.mesh import start_distributed

    jax.config.update("jax_num_cpu_devices", options.data * options.model // options.processes)
    start_distributed()
    jax.block_until_ready(jax.numpy.zeros(8))
    peaks = Peaks()
    model, mesh, found = load(options, peaks)
    for method in options.methods if options.steps else ():
        found[method] = train(model, mesh, method, options, peaks)
    found["host_peak_megabytes"] = {phase: round(size / 1e6) for phase, size in peaks.found.items()}
    found |= {"narrow": options.narrow, "saved": options.out is not None, "processes": options.processes}
    if jax.process_index() == 0:
        print(json.dumps(found, indent=1))
        if options.report:
            from effjax.study.results import environment

            runs = json.loads(options.report.read_text()) if options.report.exists() else []
            options.report.write_text(json.dumps([*runs, found | {"environment": environment()}], indent=1) + "\n")


def in_processes(count: int) -> int:
    """This command in several processes; the first one speaks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    shared = os.environ | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    started = [
        subprocess.Popen([sys.executable, *sys.argv], env=shared | {"JAX_PROCESS_ID": str(index)})
        for index in range(count)
    ]
    return max(process.wait() for process in started)


if __name__ == "__main__":
    main()
