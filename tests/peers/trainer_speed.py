"""BucketSampler and TokenDrop against transformers' Trainer: seconds to an accuracy, with and without compiling.

Run it on a quiet machine, from the repository, with SST-2 in EFFJAX_DATA and ``effjax[minilm]``::

    python tests/peers/run.py trainer_speed --out configs/bucket_sampler/results/trainer-intel-xeon-2-cores.json
    python tests/peers/run.py trainer_speed --preset gpu --out trainer-gpu.json

MiniLM (6 layers of 384) with one new classifier is fine-tuned whole on a part of SST-2, float32, AdamW, batches of 32
texts, a rate that falls linearly to 0, gradients clipped at norm 1: in PyTorch by ``transformers.Trainer``, which pads
each batch to its longest text, in random order or with ``group_by_length``, and in JAX on the batches of
``BucketSampler``, as they are or shortened by ``TokenDrop`` (without dropout, as its authors do), whose programs
compile ahead on threads.

Every arm is a process of its own. They train in turn, a part of the run each, while the others wait; after each part
the accuracy on held-out phrases is taken, off the clock. Before the first step all arms must give the same loss on
them. An arm has reached the accuracy at the first of these points where it is at most one point below what the Trainer
with dynamic padding ends with. ``--torch-python`` names the Python that has PyTorch and transformers where it is
another one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RATE, BATCH, LENGTH, PARTS = 5e-5, 32, 64, 6
ARMS = {
    "trainer-dynamic": "Trainer, dynamic padding",
    "trainer-grouped": "Trainer, group_by_length",
    "buckets": "BucketSampler",
    "buckets-drop": "BucketSampler + TokenDrop",
}
PRESETS = {"cpu": (1200, 256, 2), "gpu": (20000, 872, 2), "tiny": (96, 64, 1)}
"""Training rows, held-out rows, epochs."""
METRIC = {"name": "to_accuracy_s", "goal": "min", "label": "seconds to the accuracy"}
Report = Callable[[int, float, float, Callable[[], tuple[float, float]]], None]
"""(part, seconds on the clock, of these waiting for programs, function that gives loss and accuracy)."""


def clock_of(parts: int, steps: int) -> dict[int, int]:
    """The steps after which the run is looked at, and which of the parts each ends."""
    return {max(1, round(steps * part / parts)): part for part in range(1, parts + 1)}


# Arms


def run_trainer(arm: str, folder: str, seed: int, epochs: int, report: Report) -> None:
    import numpy as np
    import torch
    import transformers

    data = np.load(f"{folder}/data.npz")
    rows = {split: np.split(data[f"{split}_values"], data[f"{split}_offsets"][1:-1]) for split in ("train", "test")}
    examples = [
        {"input_ids": ids.tolist(), "labels": int(label)}
        for ids, label in zip(rows["train"], data["train_labels"], strict=True)
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{folder}/tokenizer")
    transformers.set_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(f"{folder}/base")

    def judge() -> tuple[float, float]:
        model.eval()
        losses, right = [], []
        labels = torch.tensor(data["test_labels"], dtype=torch.int64)
        with torch.inference_mode():
            for start in range(0, len(labels), 64):
                part = rows["test"][start : start + 64]
                width = max(map(len, part))
                ids = torch.tensor(np.stack([np.pad(row, (0, width - len(row))) for row in part]), dtype=torch.int64)
                mask = torch.arange(width) < torch.tensor([[len(row)] for row in part])
                logits = model(ids.to(model.device), mask.long().to(model.device)).logits.cpu()
                own = labels[start : start + 64]
                losses.append(torch.nn.functional.cross_entropy(logits, own, reduction="sum").item())
                right.append((logits.argmax(1) == own).sum().item())
        model.train()
        return sum(losses) / len(labels), sum(right) / len(labels)

    report(0, 0.0, 0.0, judge)
    begun, steps = time.perf_counter(), -(-len(examples) // BATCH) * epochs
    ends = clock_of(PARTS, steps)

    class Points(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            nonlocal begun
            if state.global_step in ends:
                now = time.perf_counter()
                report(ends[state.global_step], now - begun, 0.0, judge)
                begun += time.perf_counter() - now

    settings = transformers.TrainingArguments(
        output_dir=f"{folder}/{arm}",
        per_device_train_batch_size=BATCH,
        num_train_epochs=epochs,
        learning_rate=RATE,
        lr_scheduler_type="linear",
        group_by_length=arm == "trainer-grouped",
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    collator = transformers.DataCollatorWithPadding(tokenizer)
    trainer = transformers.Trainer(
        model, settings, train_dataset=examples, data_collator=collator, callbacks=[Points()]
    )
    trainer.train()


def run_effjax(arm: str, folder: str, seed: int, epochs: int, report: Report, shapes: int) -> None:
    import effjax
    from effjax.train import compile_ahead, keep_freed_memory

    keep_freed_memory()
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    jax.config.update("jax_compilation_cache_dir", None)
    data = np.load(f"{folder}/data.npz")
    ids = {s: effjax.data.Ragged(data[f"{s}_values"], data[f"{s}_offsets"]) for s in ("train", "test")}
    rate = 0.0 if arm == "buckets-drop" else 0.1
    model = effjax.load_pretrained(f"{folder}/base", classes=2, pool="cls", dropout=rate, attention_dropout=rate)
    network = model.module.clone(dropout=rate)
    crossed = optax.softmax_cross_entropy_with_integer_labels

    @jax.jit
    def judged(params: Any, ids: jax.Array, mask: jax.Array, labels: jax.Array, weight: jax.Array) -> Any:
        logits = network.apply({"params": params}, ids, mask)
        return (weight * crossed(logits, labels)).sum(), (weight * (logits.argmax(-1) == labels)).sum()

    columns = {"input_ids": ids["test"], "label": data["test_labels"]}
    held = list(effjax.data.PaddedBatches(columns, seed=0, epochs=1, batch_size=64, length=LENGTH))
    params = model.params

    def judge() -> tuple[float, float]:
        found = [judged(params, b["input_ids"], b["mask"], b["label"], b["weight"]) for b in held]
        loss, right = np.sum(jax.device_get(found), axis=0)
        return float(loss) / len(ids["test"]), float(right) / len(ids["test"])

    report(0, 0.0, 0.0, judge)
    begun = time.perf_counter()
    columns = {"input_ids": ids["train"], "label": data["train_labels"]}
    if arm == "buckets-drop":
        columns = effjax.transformers.token_drop_columns(columns, data["stop"], seed=seed)
    options = {"max_shapes": shapes, "cap": BATCH, "tokens": BATCH * LENGTH}
    batches = effjax.BucketSampler(columns, seed=seed, epochs=epochs, **options)
    falling = optax.linear_schedule(RATE, 0.0, batches.total_steps)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(falling, weight_decay=0.0),
        effjax.optim.scale_by_batch_size(reference=BATCH),
    )

    def step(state: Any, batch: Any) -> Any:
        params, opt, key = state
        key, own = jax.random.split(key)

        def loss(params: Any) -> jax.Array:
            rngs = {"dropout": own}
            logits = network.apply({"params": params}, batch["input_ids"], batch["mask"], train=True, rngs=rngs)
            return (batch["weight"] * crossed(logits, batch["label"])).sum() / batch["weight"].sum()

        grads = jax.grad(loss)(params)
        updates, opt = tx.update(grads, opt, params, batch_size=batch["weight"].sum())
        return optax.apply_updates(params, updates), opt, key

    state = jax.tree.map(jnp.array, params), jax.jit(tx.init)(params), jax.random.key(seed)
    ends = clock_of(PARTS, batches.total_steps)
    arguments = [(state, batch) for batch in batches.example_batches()]
    with compile_ahead(jax.jit(step, donate_argnums=0), arguments) as ahead:
        for index, batch in enumerate(batches, start=1):
            state = ahead(state, batch)
            if index in ends:
                params = jax.block_until_ready(state)[0]
                now = time.perf_counter()
                report(ends[index], now - begun, ahead.executables.compile_s, judge)
                begun += time.perf_counter() - now


# A process for each arm


def serve(arm: str, folder: str, seed: int, epochs: int, shapes: int) -> None:
    """Train; at every point answer with a line of JSON, and go on when a line comes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print

    def report(part: int, seconds: float, waited: float, judge: Callable[[], tuple[float, float]]) -> None:
        loss, accuracy = judge()
        found = {"part": part, "seconds": seconds, "waited": waited, "loss": loss, "accuracy": accuracy}
        answers.write(json.dumps(found) + "\n")
        if part < PARTS and not sys.stdin.readline():  # the first process has ended
            raise SystemExit(1)

    if arm.startswith("trainer"):
        run_trainer(arm, folder, seed, epochs, report)
    else:
        run_effjax(arm, folder, seed, epochs, report, shapes)


class Worker:
    """Another process of this file that trains one arm."""

    def __init__(self, arm: str, folder: str, options: argparse.Namespace, seed: int):
        here = Path(__file__).resolve().parents[2]
        epochs = PRESETS[options.preset][2]
        words = ["--serve", arm, folder, str(seed), str(epochs), str(options.max_shapes)]
        python = options.torch_python if arm.startswith("trainer") else sys.executable
        self._process = subprocess.Popen(
            [python, __file__, *words],
            env={**os.environ, "PYTHONPATH": str(here), "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def next(self, first: bool = False) -> dict[str, Any]:
        """Let the arm train to its next point, where it waits."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        if not first:
            process.stdin.write("\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(process.args)} ended with status {process.wait()}")
        return json.loads(line)

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def prepare(folder: str, rows: int, held: int) -> None:
    """The checkpoint with its classifier, its tokenizer and the tokens: the same for all arms."""
    import numpy as np

    import effjax

    model = effjax.load_pretrained("minilm", classes=2, pool="cls")
    effjax.save_pretrained(f"{folder}/base", model)
    tokenizer = effjax.load_tokenizer("minilm")
    data = effjax.load_data("sst2")
    test = "test" if "test" in data.splits else "validation"
    found: dict[str, Any] = {}
    for split, name, count in (("train", "train", rows), ("test", test, held)):
        part = data.splits[name]
        chosen = np.random.default_rng(0).permutation(len(part["label"]))[:count]
        ids = tokenizer.encode([part["sentence"][row] for row in chosen], max_length=LENGTH).input_ids
        found |= {f"{split}_values": ids.values, f"{split}_offsets": ids.offsets}
        found[f"{split}_labels"] = np.asarray(part["label"])[chosen].astype(np.int32)
    found["stop"] = effjax.transformers.stop_ids(
        tokenizer.token, tokenizer.vocab_size, rule="word", special_ids=tokenizer.special_ids
    )
    np.savez(f"{folder}/data.npz", **found)
    place = Path(folder, "tokenizer")
    place.mkdir()
    words = "\n".join(tokenizer.token(index) for index in range(tokenizer.vocab_size))
    (place / "vocab.txt").write_text(words + "\n")
    (place / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )


def measured(options: argparse.Namespace, folder: str, seed: int) -> dict[str, list[dict[str, Any]]]:
    """The points of every arm on one seed, arms in turn."""
    import numpy as np

    names = [name for name in ARMS if name in options.arms]
    workers = {name: Worker(name, folder, options, seed) for name in names}
    points = {name: [worker.next(first=True)] for name, worker in workers.items()}
    losses = [found[0]["loss"] for found in points.values()]
    np.testing.assert_allclose(losses, losses[0], rtol=2e-3, err_msg=f"before the first step: {names}")
    turn = 0
    while going := [name for name in names if points[name][-1]["part"] < PARTS]:
        for name in going if turn % 2 == 0 else reversed(going):
            points[name].append(workers[name].next())
            print(f"seed {seed}, {name}: {points[name][-1]}", flush=True)
        turn += 1
    for worker in workers.values():
        worker.end()
    return points


def numbers(points: Mapping[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """What the table shows of one seed."""
    wanted = points["trainer-dynamic"][-1]["accuracy"] - 0.01 if "trainer-dynamic" in points else 0.0
    table = {}
    for name, found in points.items():
        last = found[-1]
        reached = next((point for point in found[1:] if point["accuracy"] >= wanted), None)
        table[name] = {
            "accuracy": last["accuracy"],
            "train_s": last["seconds"] - last["waited"],
            "compile_s": last["waited"],
            "total_s": last["seconds"],
            "to_accuracy_train_s": float("nan") if reached is None else reached["seconds"] - reached["waited"],
            "to_accuracy_s": float("nan") if reached is None else reached["seconds"],
        }
    return table


def document(options: argparse.Namespace, by_seed: Mapping[int, Mapping[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    """A results.json: mean, deviation and values over the seeds; claims as the method's authors would make them."""
    from effjax.study.report import SCHEMA
    from effjax.study.results import COST_FIELDS, environment, summary

    tables = [numbers(points) for points in by_seed.values()]
    arms = {}
    for name in tables[0]:
        metrics = {metric: summary([table[name][metric] for table in tables]) for metric in tables[0][name]}
        role = "baseline" if name.startswith("trainer") else "method"
        about = {"group": "sst2-minilm", "label": ARMS[name], "role": role, "inference": {}}
        cost = dict.fromkeys(COST_FIELDS) | {key: metrics[key]["mean"] for key in ("train_s", "compile_s", "total_s")}
        arms[f"sst2-minilm/{name}"] = {"status": "ok", "metrics": metrics, "cost": cost} | about
    claims = [
        _claim(arms, ours, theirs, metric, words)
        for ours in ("buckets", "buckets-drop")
        for theirs in ("trainer-dynamic", "trainer-grouped")
        for metric, words in (("to_accuracy_s", "compiling included"), ("to_accuracy_train_s", "compiling apart"))
        if {f"sst2-minilm/{ours}", f"sst2-minilm/{theirs}"} <= arms.keys()
    ]
    words = {name: value for name, value in vars(options).items() if name not in ("out", "serve", "torch_python")}
    return {
        "schema": SCHEMA,
        "study": "trainer_speed",
        "groups": {"sst2-minilm": METRIC},
        "preset": options.preset,
        "seeds": list(by_seed),
        "budget": {"amount": PRESETS[options.preset][2], "unit": "epochs"},
        "config": None,  # no study of `effjax compare`: this script alone
        "arms": arms,
        "claims": claims,
        "cost_claims": [],
        "points": {str(seed): points for seed, points in by_seed.items()},
        "environment": environment() | {"options": words},
    }


def _claim(arms: Mapping[str, Any], ours: str, theirs: str, metric: str, words: str) -> dict[str, Any]:
    left, right = (arms[f"sst2-minilm/{name}"]["metrics"][metric]["mean"] for name in (ours, theirs))
    text = f"sst2-minilm: {ARMS[ours]} reaches the accuracy no later than {ARMS[theirs]}, {words}"
    return {"text": text, "left": left, "op": "<=", "right": right, "holds": bool(left <= right)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="rows and epochs")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="arms to run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of order and dropout")
    parser.add_argument("--max-shapes", type=int, default=3, help="of BucketSampler")
    parser.add_argument("--torch-python", default=sys.executable, help="a Python with torch and transformers")
    parser.add_argument("--out", type=Path, help="file for the numbers, JSON")
    parser.add_argument("--serve", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        arm, folder, seed, epochs, shapes = options.serve
        return serve(arm, folder, int(seed), int(epochs), int(shapes))
    with tempfile.TemporaryDirectory() as folder:
        rows, held, _ = PRESETS[options.preset]
        prepare(folder, rows, held)
        by_seed = {}
        for seed in options.seeds:
            by_seed[seed] = measured(options, folder, seed)
            found = document(options, by_seed)
            for name, arm in found["arms"].items():
                print(name, {metric: round(values["mean"], 3) for metric, values in arm["metrics"].items()}, flush=True)
            if options.out:
                options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
