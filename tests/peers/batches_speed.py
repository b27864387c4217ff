"""Ways to batch texts, predicted from two measured shapes and held against clocks: seconds in all, compiling included.

Run it on a quiet machine, from the repository, with SST-2 and IMDB in EFFJAX_DATA::

    python tests/peers/run.py batches_speed --part shapes ahead --out batches.json
    python tests/peers/run.py batches_speed --part runs grid --out batches.json

A BERT of 2 layers and width 128, from scratch, float32, AdamW, batches of 32 texts. Short texts are phrases of SST-2,
cut at 64 tokens, long ones reviews of IMDB, cut at 256; more rows than there are repeat some.

``shapes`` measures what ``measure_costs`` finds from two shapes of each kind, then every shape by itself: compiled
alone, all of a kind at once, and a step. ``ahead`` measures one run with its programs compiled at the first step that
needs them, all before the first step, and ahead on threads. ``runs`` trains whole runs with each way, programs compiled
anew, in a seeded order, as far as the time goes; started again it goes on. ``grid`` prints how many cells of the grid
``choose_batches`` gets right. No program comes from JAX's folder. A part is added to a file that is there.
"""

import argparse
import gc
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 32
KINDS = {"short": ("sst2", 64, 8), "long": ("imdb2k", 256, 32)}
"""Data set, most tokens, and what boundaries and dynamic padding are multiples of."""
ROWS = (250, 1000, 4000, 12000, 50000)
EPOCHS = (1, 3, 10)
RUNS = (
    ("short", 250, 1),
    ("long", 250, 1),
    ("short", 1000, 1),
    ("short", 1000, 3),
    ("short", 4000, 1),
    ("long", 500, 2),
    ("short", 4000, 3),
)
WAYS = ("static", "dynamic", "buckets", "packing")
LABELS = {
    "needed": "each at the first step that needs it",
    "first": "all before the first step",
    "ahead": "ahead, on a thread",
}
METRIC = {"name": "total_s", "goal": "min", "label": "seconds in all"}
RIGHT = 1.05
"""A choice is right where its measured seconds are at most so many times those of the best way."""


# The grid, from numbers alone


def cell_lengths(histogram: Mapping[str, int], rows: int) -> np.ndarray:
    """Lengths of so many rows: a seeded draw from those of the data set, the longest among them."""
    lengths = np.repeat(np.array(list(map(int, histogram))), list(histogram.values()))
    drawn = np.random.default_rng(rows).choice(lengths, rows, replace=rows > len(lengths))
    drawn[0] = lengths.max()
    return drawn


def measured_seconds(shapes: Mapping[str, Any], steps: Mapping[tuple[int, int], float]) -> float:
    """Seconds of a run from what every shape was measured to take, between measured row counts on a line."""

    def step(rows: int, length: int) -> float:
        known = {int(r): s for name, s in shapes["step_s"].items() for r, n in [name.split("x")] if int(n) == length}
        if rows in known:
            return known[rows]
        low, *_, high = sorted(known)
        return known[low] + (known[high] - known[low]) * (rows - low) / (high - low)

    (few, first), (many, all_of_them) = ((int(n), s) for n, s in shapes["compile_s"].items())
    compiling = first + (all_of_them - first) * (len(steps) - few) / (many - few)
    return compiling + sum(count * step(*shape) for shape, count in steps.items())


def grid(
    part: Mapping[str, Any], rows: tuple[int, ...] = ROWS, epochs: tuple[int, ...] = EPOCHS
) -> list[dict[str, Any]]:
    """Every cell: what is chosen and predicted from two shapes, and what each way takes by the measured shapes."""
    from effjax.data import StepCosts, choose_batches

    found = []
    for kind, (_, longest, multiple) in KINDS.items():
        shapes = part[kind]
        costs = StepCosts(**shapes["costs"])
        for count in rows:
            lengths = cell_lengths(shapes["lengths"], count)
            for passes in epochs:
                choice = choose_batches(
                    lengths, costs, epochs=passes, batch_size=BATCH, length=longest, multiple=multiple
                )
                measured = {way: measured_seconds(shapes, choice.steps[way]) for way in WAYS}
                best = min(measured, key=lambda way: measured[way])
                found.append(
                    {
                        "texts": kind,
                        "rows": count,
                        "epochs": passes,
                        "chosen": choice.best,
                        "best": best,
                        "over_best": measured[choice.best] / measured[best],
                        "predicted_s": choice.seconds,
                        "measured_s": measured,
                        "boundaries": choice.boundaries,
                    }
                )
    return found


# Measuring


class Texts:
    """Tokens and a small BERT for one kind of texts."""

    def __init__(self, kind: str):
        from effjax.tasks import text_task

        data, self.longest, self.multiple = KINDS[kind]
        rows = 7000 if kind == "short" else None
        self.task = text_task(data, "encoder-2x128", max_length=self.longest, train_rows=rows, test_rows=64)

    @property
    def lengths(self) -> np.ndarray:
        return self.task.train["input_ids"].lengths

    def columns(self, rows: int) -> dict[str, Any]:
        """So many rows, the longest among them."""
        lengths = self.lengths
        chosen = np.random.default_rng(rows).choice(len(lengths), rows, replace=rows > len(lengths))
        chosen[0] = lengths.argmax()
        return {"input_ids": self.task.train["input_ids"].take(chosen), "label": self.task.train["label"][chosen]}

    def start(self) -> Any:
        import jax
        import optax

        self.tx = optax.adamw(3e-4)
        params = jax.jit(self.task.init)(jax.random.key(0))["params"]
        return params, jax.jit(self.tx.init)(params), jax.random.key(1)

    def step(self) -> Callable[..., Any]:
        """A new function each time, so that nothing is compiled yet."""
        import jax
        import optax

        def step(state: Any, batch: Any) -> Any:
            params, opt, key = state
            key, own = jax.random.split(key)
            loss = lambda params: self.task.loss({"params": params}, batch, own)[0]
            value, grads = jax.value_and_grad(loss)(params)
            updates, opt = self.tx.update(grads, opt, params)
            return (optax.apply_updates(params, updates), opt, key), value

        return jax.jit(step)

    def batches(self, way: str, columns: Mapping[str, Any], epochs: int, costs: Any = None, **more: Any) -> Any:
        """The batches of one way, as ``choose_batches`` predicts them."""
        from effjax.data import BucketSampler, PackedBatches, PaddedBatches

        shared = {"seed": 0, "epochs": epochs, "pad_id": self.task.tokenizer.pad_id}
        if way == "static":
            return PaddedBatches(columns, batch_size=BATCH, length=self.longest, **shared)
        if way == "dynamic":
            return PaddedBatches(columns, batch_size=BATCH, length_multiple=self.multiple, **shared)
        if way == "buckets":
            more = more or {"max_shapes": "auto", "costs": costs}
            fixed = {"tokens": BATCH * self.longest, "cap": BATCH, "multiple": 1, "length_multiple": self.multiple}
            return BucketSampler(columns, **fixed, **shared, **more)
        lengths = columns["input_ids"].lengths
        size = max(1, round(BATCH * float(lengths.mean()) / self.longest))
        segments = self.longest // int(lengths.min())
        return PackedBatches(columns, length=self.longest, batch_size=size, max_segments=segments, **shared)


def example(batches: Any, size: int, length: int) -> Any:
    """A batch of a shape, whatever its rows hold."""
    batch = batches[0]
    rows = np.zeros(size, int)
    wide = lambda x: (
        np.resize(x[rows], (size, length)) if x.ndim > 1 and x.shape[1] == batch["mask"].shape[1] else x[rows]
    )
    return {name: wide(np.asarray(column)) for name, column in batch.items()}


def seconds_of(calls: Mapping[str, tuple[Any, tuple[Any, Any]]], rounds: int) -> dict[str, float]:
    """Median seconds of each step, all of them in turn, so that a drifting clock hits all alike."""
    import jax

    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 1):  # the first one is a warm-up
        for name, (step, arguments) in calls.items():
            begun = time.perf_counter()
            jax.block_until_ready(step(*arguments))
            if index:
                times[name].append(time.perf_counter() - begun)
    return {name: float(np.median(found)) for name, found in times.items()}


def measured_shapes(kind: str, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """What two shapes tell, and what every shape takes."""
    from effjax.core.cost import Executables
    from effjax.train import measure_costs

    texts = Texts(kind)
    state = texts.start()
    columns = texts.columns(250)
    static, packed = (texts.batches(way, columns, 1) for way in ("static", "packing"))
    lengths = range(texts.multiple, texts.longest + 1, texts.multiple)
    arguments = {f"{BATCH}x{length}": (state, example(static, BATCH, length)) for length in lengths}
    names = list(arguments)
    costs = measure_costs(texts.step(), [arguments[names[0]], arguments[names[-1]]], rounds=rounds)
    say(f"{kind}: {costs}")
    alone = Executables.of(texts.step())
    packing = packed[0]
    size, length = packing["input_ids"].shape
    alone.compile(state, packing)
    first = alone.compile_s
    together = Executables.of(texts.step())
    together.compile_all(list(arguments.values()))
    say(f"{kind}: compiled one in {first:.1f} s, {len(names)} in {together.compile_s:.1f} s")
    calls = {name: (together, args) for name, args in arguments.items()}
    step_s = seconds_of({**calls, f"{size}x{length}": (alone, (state, packing))}, rounds)
    say(f"{kind}: {step_s}")
    return {
        "costs": costs._asdict(),
        # One program: the mean of the two that measure_costs compiled and the packed one.
        "compile_s": {"1": (2 * costs.compile_s + first) / 3, str(len(names)): together.compile_s},
        "step_s": step_s,
        "lengths": {str(length): count for length, count in sorted(Counter(texts.lengths.tolist()).items())},
    }


def train(batches: Any, step: Callable[..., Any], state: Any) -> Any:
    import jax

    for batch in batches:
        state, _ = step(state, batch)
    return jax.block_until_ready(state)


def ahead(say: Callable[[str], None]) -> dict[str, Any]:
    """Nine shapes on 4,000 short texts, compiled in three ways; the parameters after the run must agree in all bits."""
    import jax

    from effjax.core.cost import Executables
    from effjax.train import compile_ahead

    texts = Texts("short")
    columns, found, ends = texts.columns(4000), {}, {}
    for name in ("ahead", "first", "needed"):
        batches = texts.batches("buckets", columns, 1, max_shapes=9)
        state, step = texts.start(), texts.step()
        arguments = [(state, batch) for batch in batches.example_batches()]
        begun = time.perf_counter()
        if name == "ahead":
            with compile_ahead(step, arguments) as run:
                ends[name] = train(batches, run, state)
            waited = run.executables.compile_s
        elif name == "first":
            run = Executables.of(step)
            run.compile_all(arguments)
            ends[name], waited = train(batches, run, state), run.compile_s
        else:
            run = Executables.of(step)
            ends[name] = train(batches, run, state)
            waited = run.compile_s
        total = time.perf_counter() - begun
        found[name] = {"total_s": total, "waited_s": waited, "steps": batches.total_steps}
        say(f"{name}: {found[name]}")
    same = jax.tree.map(
        lambda *leaves: all(np.array_equal(leaves[0], x) for x in leaves[1:]), *(e[0] for e in ends.values())
    )
    found["equal_bits"] = all(jax.tree.leaves(same))
    return found


def whole_runs(
    cells: Sequence[tuple[str, int, int]], shapes: Mapping[str, Any], limit: float, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Runs of each way in each cell, compiled anew, until the time is up."""
    from effjax.core.cost import Executables
    from effjax.data import StepCosts, choose_batches

    began, made = time.perf_counter(), dict[str, Texts]()
    for kind, rows, epochs in cells:
        if kind not in made:
            made[kind] = Texts(kind)
        texts = made[kind]
        costs = StepCosts(**shapes[kind]["costs"])
        columns = texts.columns(rows)
        fixed = {"batch_size": BATCH, "length": texts.longest, "multiple": texts.multiple}
        choice = choose_batches(columns["input_ids"].lengths, costs, epochs=epochs, **fixed)
        if time.perf_counter() - began + sum(choice.seconds.values()) > limit:
            say(f"{kind} {rows} {epochs}: left out, it would take {sum(choice.seconds.values()):.0f} s")
            continue
        seconds = {}
        for way in np.random.default_rng(rows + epochs).permutation(WAYS).tolist():
            batches, state = texts.batches(way, columns, epochs, costs), texts.start()
            run = Executables.of(texts.step())
            begun = time.perf_counter()
            run.compile_all([(state, batch) for batch in batches.example_batches()])
            train(batches, run, state)
            seconds[way] = {"total_s": time.perf_counter() - begun, "compile_s": run.compile_s, "shapes": run.compiles}
            say(f"{kind} {rows} {epochs} {way}: {seconds[way]}, predicted {choice.seconds[way]:.1f}")
            del run, state
            gc.collect()
        cell = {"texts": kind, "rows": rows, "epochs": epochs, "chosen": choice.best}
        yield cell | {"predicted_s": choice.seconds, "measured": seconds}


def arms_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers that the card shows, as the arms of a results.json."""
    from effjax.study.results import COST_FIELDS

    once = lambda number: {"mean": float(number), "std": 0.0, "values": [float(number)]}
    rows: dict[str, tuple[str, dict[str, float]]] = {}
    part = document["parts"]
    for name, label in LABELS.items():
        if name in part.get("ahead", {}):
            found = part["ahead"][name]
            rows[f"compiling/{name}"] = label, {"total_s": found["total_s"], "waited_s": found["waited_s"]}
    for cell in part.get("runs", []):
        for way in WAYS:
            name = f"{cell['texts']}-{cell['rows']}-{cell['epochs']}/{way}"
            numbers = {"total_s": cell["measured"][way]["total_s"], "predicted_s": cell["predicted_s"][way]}
            rows[name] = way, numbers
    if document.get("grid"):
        cells = document["grid"]
        right = [cell["over_best"] <= RIGHT for cell in cells]
        exact = [cell["chosen"] == cell["best"] for cell in cells]
        numbers = {"right": np.mean(right), "exact": np.mean(exact), "worst": max(cell["over_best"] for cell in cells)}
        rows["grid/choice"] = f"choice in {len(cells)} cells", numbers
    return {
        name: {
            **{"status": "ok", "group": name.partition("/")[0], "label": label, "role": "method", "inference": {}},
            "metrics": {metric: once(number) for metric, number in metrics.items()},
            "cost": dict.fromkeys(COST_FIELDS),
        }
        for name, (label, metrics) in rows.items()
    }


def begun(options: argparse.Namespace) -> dict[str, Any]:
    """The results file, as it is or empty."""
    if options.out and options.out.exists():
        return json.loads(options.out.read_text())
    from effjax.study.report import SCHEMA
    from effjax.study.results import environment

    return {
        "schema": SCHEMA,
        "study": "batches_speed",
        "groups": {},
        "preset": "speed",
        "seeds": [0],
        "budget": {"amount": options.rounds, "unit": "rounds"},
        "config": None,  # no study of `effjax compare`: this script alone
        "arms": {},
        "claims": [],
        "cost_claims": [],
        "environment": environment(),
        "parts": {},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("shapes", "ahead", "runs", "grid"), nargs="+", required=True)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), help="kinds of texts of shapes")
    parser.add_argument("--rounds", type=int, default=5, help="steps timed in each shape")
    parser.add_argument("--seconds", type=float, default=280.0, help="of runs: none begins that would end later")
    parser.add_argument("--out", type=Path, help="file for the numbers, JSON; continued where it is there")
    options = parser.parse_args()
    import jax

    jax.config.update("jax_compilation_cache_dir", None)
    from effjax.train import keep_freed_memory

    keep_freed_memory()
    say = lambda line: print(line, flush=True)
    document = begun(options)
    parts = document["parts"]

    def keep() -> None:
        document["arms"] = arms_of(document)
        document["groups"] = dict.fromkeys((arm["group"] for arm in document["arms"].values()), METRIC)
        if options.out:
            options.out.write_text(json.dumps(document, indent=1) + "\n")

    if "shapes" in options.part:
        for kind in options.kinds:
            parts.setdefault("shapes", {})[kind] = measured_shapes(kind, options.rounds, say)
            keep()
    if "ahead" in options.part:
        parts["ahead"] = ahead(say)
        keep()
    if "runs" in options.part:
        parts.setdefault("runs", [])
        known = {(cell["texts"], cell["rows"], cell["epochs"]) for cell in parts["runs"]}
        wanted = [cell for cell in RUNS if cell not in known]
        for cell in whole_runs(wanted, parts["shapes"], options.seconds, say):
            parts["runs"].append(cell)
            keep()
    if "grid" in options.part:
        document["grid"] = grid(parts["shapes"])
        keep()
        for cell in document["grid"]:
            name = f"{cell['texts']} {cell['rows']} x {cell['epochs']}"
            say(f"{name}: {cell['chosen']}, {cell['over_best']:.2f} of the best, {cell['best']}")
        say(json.dumps({name: arm["metrics"] for name, arm in document["arms"].items() if name.startswith("grid/")}))


if __name__ == "__main__":
    main()
