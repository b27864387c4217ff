"""Steps of fine-tuning against Hugging Face: LoRA with PEFT, full fine-tuning and inference with transformers.

Run it on a quiet machine, from the repository::

    python tests/peers/run.py finetune_speed --out configs/cola/results/speed-intel-xeon-2-cores.json
    python tests/peers/run.py finetune_speed --rows "bert/lora/*" --before ../an-older-checkout --out speed.json
    python tests/peers/run.py finetune_speed --preset gpu --out speed-gpu.json

The same weights, float32, on both sides: a BERT of MiniLM's size (6 layers of 384, 12 heads) with a classifier of two
classes, and a decoder of Llama's type (6 layers of 512, 8 heads that share 4 of keys and values, 16,384 tokens: 26
million numbers). LoRA has rank 8 on query and value. Rows of texts are half to wholly full, the rest is padding;
dropout is 0; AdamW. PyTorch runs eagerly, with the attention that transformers chooses.

Every arm is a process of its own, and they step in turn while the others wait: times are medians over the rounds. The
first loss of all arms must agree. Memory is the most that was resident during the steps, less what the process held
with its libraries alone. ``--torch-python`` names the Python that has PyTorch where it is another one. A file that is
there is continued: rows that it holds are not measured again.
"""

import argparse
import fnmatch
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RANK, ALPHA, RATE = 8, 16.0, 1e-4
NETWORKS = ("bert", "llama")
MODES = ("lora", "full", "forward")
PRESETS = {
    "cpu": ("8x64", "32x64", "8x128", "4x256"),
    "gpu": ("8x128", "64x128", "32x512"),
    "tiny": ("2x16",),
}
METRIC = {"name": "steps_per_s", "goal": "max", "label": "steps per second"}
ARMS = {
    "effjax": "effjax, freed memory kept",
    "effjax-default": "effjax, allocator of the system",
    "before": "effjax before, allocator of the system",
    "peft": "PEFT / transformers",
}


def texts(shape: str, vocabulary: int) -> tuple[Any, Any, Any]:
    """Token ids, which of them are real, and labels."""
    import numpy as np

    rows, length = map(int, shape.split("x"))
    rng = np.random.default_rng(0)
    ids = rng.integers(5, vocabulary, (rows, length)).astype(np.int32)
    mask = np.arange(length) < rng.integers(length // 2, length + 1, (rows, 1))
    return np.where(mask, ids, 0), mask, rng.integers(0, 2, rows)


# Arms: each makes a step, a function without arguments that returns the loss, or for inference a number of the output


def jax_step(row: Mapping[str, str], folder: str) -> Callable[[], float]:
    import jax
    import jax.numpy as jnp
    import optax

    from effjax.finetune import LoraConfig, LoraRule, lora_apply, lora_init, lora_params, lora_scales
    from effjax.models import load_pretrained

    bert = row["network"] == "bert"
    model = load_pretrained(folder, classes=2, pool="cls") if bert else load_pretrained(folder)
    ids, mask, labels = map(jax.device_put, texts(row["shape"], model.config["vocab_size"]))
    crossed = optax.softmax_cross_entropy_with_integer_labels

    def objective(logits: jax.Array) -> jax.Array:
        if bert:
            return crossed(logits, labels).mean()
        real = mask[:, 1:]
        return jnp.where(real, crossed(logits[:, :-1], ids[:, 1:]), 0).sum() / real.sum()

    config = LoraConfig(LoraRule("(query|value)/kernel$", RANK, ALPHA))
    lora = lora_init(jax.random.key(0), model.params, config)
    scales = lora_scales(lora, config)
    adapted = lora_apply(model.module.apply)

    def loss(trained: Any, frozen: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        if row["mode"] == "full":
            return objective(model.module.apply({"params": trained}, ids, mask))
        return objective(adapted({"params": lora_params(frozen, trained, scales)}, ids, mask))

    tx = optax.adamw(RATE, weight_decay=0.01)

    def update(trained: Any, state: Any, frozen: Any, ids: jax.Array, mask: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(trained, frozen, ids, mask)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    if row["mode"] == "forward":
        run = jax.jit(lambda params, ids, mask: model.module.apply({"params": params}, ids, mask))
        return lambda: float(jax.block_until_ready(run(model.params, ids, mask)).ravel()[0])
    full = row["mode"] == "full"
    trained = jax.tree.map(jnp.array, model.params) if full else lora
    state, frozen = tx.init(trained), None if full else model.params
    model = model._replace(params=None)
    run = jax.jit(update, donate_argnums=(0, 1))

    def step() -> float:
        nonlocal trained, state
        trained, state, value = run(trained, state, frozen, ids, mask)
        return float(value)

    return step


def torch_model(network: str) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    if network == "bert":
        config = transformers.BertConfig(
            vocab_size=30522,
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=1536,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return transformers.BertForSequenceClassification(config)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=16384,
            hidden_size=512,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            intermediate_size=1408,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
    )


def torch_step(row: Mapping[str, str], folder: str) -> Callable[[], float]:
    import peft
    import torch
    import transformers

    bert = row["network"] == "bert"
    kind = transformers.BertForSequenceClassification if bert else transformers.LlamaForCausalLM
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = kind.from_pretrained(folder).to(device)
    ids, mask, labels = texts(row["shape"], model.config.vocab_size)
    ids, mask = torch.tensor(ids, dtype=torch.int64, device=device), torch.tensor(mask, device=device)
    labels = torch.tensor(labels, device=device) if bert else ids.masked_fill(~mask, -100)
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    if row["mode"] == "forward":
        model.eval()

        def forward() -> float:
            with torch.inference_mode():
                return float(model(**inputs).logits.ravel()[0])

        return forward
    if row["mode"] == "lora":
        names = ["query", "value"] if bert else ["q_proj", "v_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE, weight_decay=0.01)

    def step() -> float:
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


# A process for each arm


def resident(field: str) -> float:
    """MiB of this process: ``VmRSS`` now, ``VmHWM`` at most."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else math.nan


def restart_peak() -> None:
    """The most resident memory is that from now on; what the allocator only holds is given back before."""
    import ctypes

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def serve(arm: str) -> None:
    """Answer the requests of the first process, one JSON a line."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print
    if arm == "effjax":
        from effjax.train import keep_freed_memory

        keep_freed_memory()
    make = torch_step if arm == "peft" else jax_step
    if arm == "peft":
        import peft  # noqa: F401
    else:
        import jax

        jax.devices()
        jax.jit(lambda x: x + 1)(1.0)
    bare, step = resident("VmRSS"), None
    for line in sys.stdin:
        request = json.loads(line)
        if "folder" in request and "row" not in request:
            torch_model(request["network"]).save_pretrained(request["folder"])
            answer = {}
        elif "row" in request:
            step = None
            restart_peak()
            step, begun = make(request["row"], request["folder"]), time.perf_counter()
            value = step()
            answer = {"first": value, "first_s": time.perf_counter() - begun}
            step()
            restart_peak()
        elif "memory" in request:
            answer = {"peak_mib": resident("VmHWM") - bare}
        else:
            assert step is not None
            begun = time.perf_counter()
            step()
            answer = {"ms": 1e3 * (time.perf_counter() - begun)}
        answers.write(json.dumps(answer) + "\n")


class Worker:
    """Another process of this file that holds one arm."""

    def __init__(self, arm: str, python: str, tree: Path):
        self._process = subprocess.Popen(
            [python, __file__, "--serve", arm],
            env={**os.environ, "PYTHONPATH": str(tree), "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(process.args)} ended with status {process.wait()}")
        return json.loads(line)

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measured(workers: Mapping[str, Worker], row: Mapping[str, str], folder: str, rounds: int) -> dict[str, Any]:
    """Numbers of all arms on one row."""
    import numpy as np

    found = {name: worker.ask(row=row, folder=folder) for name, worker in workers.items()}
    firsts = {name: one["first"] for name, one in found.items()}
    np.testing.assert_allclose(list(firsts.values()), next(iter(firsts.values())), rtol=2e-3, err_msg=str(firsts))
    samples: dict[str, list[float]] = {name: [] for name in workers}
    for index in range(rounds):
        for name in list(workers) if index % 2 == 0 else reversed(list(workers)):
            samples[name].append(workers[name].ask(step=1)["ms"])
    for name, worker in workers.items():
        q25, median, q75 = np.percentile(samples[name], [25, 50, 75])
        found[name] |= {"median_ms": median, "q25_ms": q25, "q75_ms": q75, "samples_ms": samples[name]}
        found[name] |= worker.ask(memory=1)
    return found


def results(row: Mapping[str, str], found: Mapping[str, Any]) -> dict[str, Any]:
    """A row's part of a results.json: arms and claims."""
    import numpy as np

    from effjax.study.results import COST_FIELDS, summary

    group, peer, arms = "-".join(row.values()), found.get("peft"), {}
    for name, one in found.items():
        samples = np.array(one["samples_ms"])
        ratio = float(np.median(np.array(peer["samples_ms"]) / samples)) if peer else None
        metrics = {
            "steps_per_s": summary((1e3 / samples).tolist()),
            "peak_mib": summary([one["peak_mib"]]),
            **({"speed": summary([ratio]), "memory": summary([one["peak_mib"] / peer["peak_mib"]])} if peer else {}),
        }
        cost = dict.fromkeys(COST_FIELDS) | {"step_ms": float(np.median(samples)), "compile_s": one["first_s"]}
        about = {"group": group, "label": ARMS[name], "role": "baseline" if name == "peft" else "method"}
        arms[f"{group}/{name}"] = {"status": "ok", "metrics": metrics, "cost": cost, "inference": {}} | about
    claims = []
    if peer and "effjax" in found:
        speed = arms[f"{group}/effjax"]["metrics"]["speed"]["mean"]
        text = f"{group}: effjax, freed memory kept, is at least as fast as PEFT / transformers"
        claims.append({"text": text, "left": speed, "op": ">=", "right": 1.0, "holds": speed >= 1.0})
    return {"arms": arms, "claims": claims}


def table(arms: Mapping[str, Any]) -> str:
    """Milliseconds of each arm, its speed as a multiple of PEFT's, and its memory as a share."""
    lines = []
    for name, arm in arms.items():
        metrics = {metric: f"{values['mean']:.3g}" for metric, values in arm["metrics"].items()}
        lines.append(f"{name}: {arm['cost']['step_ms']:.0f} ms, {metrics}")
    return "\n".join(lines)


def chosen(options: argparse.Namespace) -> list[dict[str, str]]:
    rows = [
        {"network": network, "mode": mode, "shape": shape}
        for network in NETWORKS
        for mode in MODES
        for shape in PRESETS[options.preset]
    ]
    found = [row for row in rows if any(fnmatch.fnmatch(_name(row), pattern) for pattern in options.rows)]
    if not found:
        raise SystemExit(f"--rows {options.rows} matches none of {[_name(row) for row in rows]}.")
    return found


def _name(row: Mapping[str, str]) -> str:
    return "/".join(row.values())


def _commit(tree: Path) -> str | None:
    found = subprocess.run(["git", "-C", str(tree), "rev-parse", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or None


def begun(options: argparse.Namespace) -> dict[str, Any]:
    """The results file, as it is or empty."""
    if options.out and options.out.exists():
        return json.loads(options.out.read_text())
    from effjax.study.results import SCHEMA, environment

    more = {"threads": options.threads, "before": _commit(options.before) if options.before else None}
    return {
        "schema": SCHEMA,
        "study": "finetune_speed",
        "groups": {},
        "preset": options.preset,
        "seeds": [0],
        "budget": {"amount": options.rounds, "unit": "rounds"},
        "config": None,  # no study of `effjax compare`: this script alone
        "arms": {},
        "claims": [],
        "environment": environment() | more,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="the shapes, texts x tokens")
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns on NETWORK/MODE/SHAPE")
    parser.add_argument("--rounds", type=int, default=11, help="samples of every arm")
    parser.add_argument("--threads", type=int, help="cores that every arm may use; all by default")
    parser.add_argument("--before", type=Path, help="an older checkout, as an arm of its own")
    parser.add_argument("--torch-python", default=sys.executable, help="a Python with torch, transformers and peft")
    parser.add_argument("--without", nargs="+", default=[], choices=sorted(ARMS), help="arms to leave out")
    parser.add_argument("--out", type=Path, help="file for the numbers, JSON; continued where it is there")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve)
    if options.threads:  # the arms' processes inherit it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.threads :])
    here = Path(__file__).resolve().parents[2]
    document = begun(options)
    wanted = [row for row in chosen(options) if "-".join(row.values()) not in document["groups"]]
    trees = {"effjax": here, "effjax-default": here, "before": options.before, "peft": here}
    pythons = {name: options.torch_python if name == "peft" else sys.executable for name in ARMS}
    arms = [name for name in ARMS if trees[name] and name not in options.without]
    workers = {name: Worker(name, pythons[name], trees[name].resolve()) for name in arms}
    maker = workers.get("peft") or Worker("peft", options.torch_python, here)
    with tempfile.TemporaryDirectory() as folder:
        for row in wanted:
            place = f"{folder}/{row['network']}"
            if not os.path.exists(place):
                maker.ask(network=row["network"], folder=place)
            part = results(row, measured(workers, row, place, options.rounds))
            document["groups"]["-".join(row.values())] = METRIC
            document["arms"] |= part["arms"]
            document["claims"] += part["claims"]
            print(table(part["arms"]), flush=True)
            if options.out:
                options.out.write_text(json.dumps(document, indent=1) + "\n")
    for worker in {*workers.values(), maker}:
        worker.end()


if __name__ == "__main__":
    main()
