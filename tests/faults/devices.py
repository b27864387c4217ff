"""One device, then eight, then one: a study that is stopped and continued on another mesh (default 3)."""

import collections
import json
import signal
import time

from tools import Command, Row, matching, rng, workplace, write_study

CHECKPOINTS = ".work/arms/*/*/*/checkpoints/[0-9]*"

CLOSE = 1e-3
"""Largest relative difference of a metric: sums over eight parts round otherwise."""


def run(times: int = 3) -> list[Row]:
    chance, counts, furthest = rng(), collections.Counter(), 0.0
    with workplace() as folder:
        toml = write_study(folder, "samuel")
        words = ("compare", toml, "--budget.amount", "400", "--train.checkpoint-steps", "20")

        def start(out, devices):
            return Command(*words, "--train.mesh.data", devices, "--out", out, devices=devices)

        assert start(folder / "whole", 1).end().code == 0
        whole = metrics(folder / "whole")
        for turn in range(times):
            out = folder / f"out{turn}"
            codes = []
            for devices in (1, 8):
                command = start(out, devices)
                known = len(matching(out, CHECKPOINTS))
                while command.running() and len(matching(out, CHECKPOINTS)) <= known:
                    time.sleep(0.002)
                time.sleep(chance.uniform(0.0, 0.5))
                command.hit(signal.SIGTERM)
                codes.append(command.end().code)
            last = start(out, 1).end()
            codes.append(last.code)
            print(f"1, 8, 1 devices: {codes}", flush=True)
            if codes != [75, 75, 0]:
                counts["wrong"] += 1
                print(f"WRONG {last.said[-500:]}", flush=True)
                continue
            found = metrics(out)
            furthest = max(furthest, *(abs(found[name] / value - 1) for name, value in whole.items()))
    bad = " WRONG" if counts["wrong"] or furthest > CLOSE else ""
    return [
        Row(
            "1, 8, 1 devices by `--train.mesh.data`",
            f"{times} runs",
            f"{times - counts['wrong']}/{times} finished, metrics within {furthest:.0e} of one device{bad}",
        )
    ]


def metrics(out) -> dict[tuple, float]:
    arms = json.loads((out / "results.json").read_text())["arms"]
    return {(arm, name): found["mean"] for arm, one in arms.items() for name, found in one["metrics"].items()}
