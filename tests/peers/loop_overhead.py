"""What the training loop itself costs: empty steps, the device's idle share, checkpoints, and steps on 1 to 8 devices.

Run it from the repository on a quiet machine; it takes about two minutes::

    python tests/peers/loop_overhead.py --out configs/launch/loop.json

- **Empty steps.** A model of eight numbers: all the time is the host's. A loop by hand over batches that are ready,
  then ``effjax.train.fit`` without and with a folder.
- **Idle share.** A text study: the share of ``train_s`` in which the device does not work, 1 - steps x (median time of
  a step that is waited for) / ``train_s``.
- **Checkpoints.** A state of 100 MB, saved every tenth step: seconds for which a save holds the loop (until the state
  has been copied), and the time added to the run in all, writing included.
- **Weak scaling.** The same rows for each of 1, 2, 4, 8 virtual devices. They share the cores of one machine, so n
  devices should take n times as long, if one fills the cores; what is more is the cost of cutting and of collectives.
  It says nothing of networks.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any


def program_of(steps: int, rows: int = 8, width: int = 8, large: int = 0):
    """A step that adds a mean; ``large`` further numbers are state."""
    import jax.numpy as jnp
    import numpy as np

    from effjax.tasks.task import Metric, Task
    from effjax.train.loaders import column_loader
    from effjax.train.program import Phase, Program

    data = {"x": np.ones((1024, width), np.float32)}
    task = Task(
        **{"name": "empty", "source": "ones", "metric": Metric("loss", "min", "loss"), "init": lambda key: {}},
        **{"loss": None, "infer": None, "evaluate": lambda params: {}, "train": data, "example_inputs": data["x"][:1]},
    )

    def init(key):
        more = {"large": jnp.ones(large)} if large else {}
        return {"params": {"w": jnp.zeros(width), **more}}

    def step(state, batch, aux):
        mean = batch["x"].mean(0)
        more = {name: leaf * 1.0001 for name, leaf in state["params"].items() if name != "w"}
        return {"params": {"w": state["params"]["w"] + mean, **more}}, {"loss": mean.sum()}

    loader = column_loader(data, rows)
    return Program(task, init, (Phase(step, steps),), lambda state: state["params"], loader)


def empty_steps(steps: int = 10_000) -> dict[str, float]:
    """Microseconds of a step by hand and by ``fit``."""
    import jax

    from effjax.train import TrainOptions, fit
    from effjax.train.prepared import Prepared

    program, options = program_of(steps), TrainOptions(checkpoint_seconds=1e6)
    prepared = Prepared(program, options)
    state, source = prepared.init(jax.random.key(0)), program.loader.open(0)
    batches = [jax.device_put(next(source)) for _ in range(64)]
    step = prepared.step(program.phases[0])
    state, _ = step(state, batches[0], None)
    start = time.perf_counter()
    for index in range(steps):
        state, _ = step(state, batches[index % 64], None)
    jax.block_until_ready(state)
    found = {"by_hand_us": 1e6 * (time.perf_counter() - start) / steps}
    fit(program.within(100), 0, options=options)
    found["fit_us"] = 1e6 * fit(program, 0, options=options, prepared=prepared).train_s / steps
    with tempfile.TemporaryDirectory() as folder:
        result = fit(program, 0, options=options, prepared=prepared, directory=folder, identity={})
    found["fit_with_a_folder_us"] = 1e6 * result.train_s / steps
    return found | {"steps": steps, "fit_steps_per_s": 1e6 / found["fit_us"]}


def idle_share(steps: int = 60) -> dict[str, float]:
    """Of an encoder of 2 layers and width 64 on texts of 64 tokens, 32 at a time."""
    import jax
    import optax

    from effjax.data.ragged import padded_columns
    from effjax.tasks.text import text_task
    from effjax.train import TrainOptions, fit, supervised
    from effjax.train.prepared import Prepared

    task = text_task("sms_spam", "encoder-2x64", max_length=64, train_rows=1000, test_rows=50)
    task = task._replace(train=padded_columns(task.train, 64, task.tokenizer.pad_id))
    program, options = supervised(task, optax.adam(1e-3), steps=steps, batch_size=32), TrainOptions()
    prepared = Prepared(program, options)
    fit(program.within(5), 0, options=options)
    state, source, times = prepared.init(jax.random.key(0)), program.loader.open(0), []
    step = prepared.step(program.phases[0])
    train_s = []
    for _ in range(3):
        train_s.append(fit(program, 0, options=options, prepared=prepared).train_s)
        for _ in range(steps // 3):
            batch = jax.device_put(next(source))
            jax.block_until_ready((state, batch))
            start = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, batch, None))
            times.append(time.perf_counter() - start)
    alone, whole = statistics.median(times), statistics.median(train_s) / steps
    return {"step_ms": 1e3 * alone, "step_in_fit_ms": 1e3 * whole, "idle_share": 1 - alone / whole}


def checkpoints(steps: int = 60, every: int = 10, megabytes: int = 100) -> dict[str, float]:
    """Seconds that a save holds the loop, and what saving adds to a run."""
    from effjax.train import TrainOptions, fit
    from effjax.train.checkpoint import Checkpoints
    from effjax.train.prepared import Prepared

    program, held, save = program_of(steps, large=megabytes * 250_000), [], Checkpoints.save

    def timed(self, *arguments, **options):
        start = time.perf_counter()
        save(self, *arguments, **options)
        held.append(time.perf_counter() - start)

    walls = {}
    Checkpoints.save = timed
    try:
        for name, spacing in (("without", 10**6), ("with", every)):
            options = TrainOptions(checkpoint_steps=spacing)
            prepared = Prepared(program, options)
            fit(program.within(2), 0, options=options)
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                fit(program, 0, options=options, prepared=prepared, directory=folder, identity={})
                walls[name] = time.perf_counter() - start
    finally:
        Checkpoints.save = save
    saves = steps // every
    stalls = held[1:]  # the first is that of the run that saves only its end
    return {
        **{"megabytes": megabytes, "saves": saves, "held_s": statistics.median(stalls)},
        "added_s_per_save": (walls["with"] - walls["without"]) / (saves - 1),
    }


def weak_scaling(steps: int = 20, rows: int = 8) -> dict[str, dict[str, float]]:
    """Milliseconds of a step, for each number of devices; batch rows per device stay."""
    import jax
    import optax

    from effjax.data.ragged import padded_columns
    from effjax.tasks.text import text_task
    from effjax.train import MeshOptions, TrainOptions, supervised
    from effjax.train.prepared import Prepared

    task = text_task("sms_spam", "encoder-2x64", max_length=64, train_rows=1000, test_rows=50)
    task = task._replace(train=padded_columns(task.train, 64, task.tokenizer.pad_id))
    runs = {}
    for devices in (1, 2, 4, 8):
        program = supervised(task, optax.adam(1e-3), steps=steps, batch_size=rows * devices)
        prepared = Prepared(program, TrainOptions(mesh=MeshOptions(data=devices)))
        state, batch = prepared.init(jax.random.key(0)), prepared.put(next(program.loader.open(0)))
        runs[devices] = [prepared.step(program.phases[0]), state, batch, []]
    for index in range(steps + 2):
        for run in runs.values():
            start = time.perf_counter()
            run[1], _ = jax.block_until_ready(run[0](run[1], run[2], None))
            if index >= 2:
                run[3].append(1e3 * (time.perf_counter() - start))
    ms = {devices: statistics.median(run[3]) for devices, run in runs.items()}
    return {str(n): {"step_ms": ms[n], "over_n_times_one": ms[n] / (n * ms[1])} for n in ms}


PARTS = {
    "empty_steps": empty_steps,
    "idle_share": idle_share,
    "checkpoints": checkpoints,
    "weak_scaling": weak_scaling,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    from effjax.study.results import environment

    found: dict[str, Any] = {}
    for name in options.only:
        found[name] = PARTS[name]()
        print(name, json.dumps(found[name]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(found | {"environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
