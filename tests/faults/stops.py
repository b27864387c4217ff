"""SIGTERM at random moments of four studies, from the first line on, and the same command again (default 100)."""

import collections
import signal
import time

from tools import STUDIES, Row, Study, rng, workplace


def run(times: int = 100) -> list[Row]:
    chance, rows = rng(), []
    with workplace() as folder:
        for name in STUDIES:
            counts, slowest = stop_until_done(Study(folder, name), -(-times // len(STUDIES)), chance)
            print(f"{name}: {dict(counts)}, slowest {slowest:.1f} s", flush=True)
            rows.append(row(name, counts, slowest))
    return rows


def stop_until_done(study: Study, times: int, chance) -> tuple[collections.Counter, float]:
    counts, slowest, cycle = collections.Counter(), 0.0, 0
    while counts["signals"] < times:
        out = study.folder / f"{study.name}-{cycle}"
        cycle += 1
        while True:
            command = study.start(out)
            hit = False
            if chance.random() < 0.75 and counts["signals"] < times:
                while not command.listening():
                    time.sleep(0.001)
                time.sleep(chance.uniform(0.0, study.seconds))
                if command.running():
                    command.hit(signal.SIGTERM)
                    hit = True
            ended = command.end()
            if not hit:
                break
            counts["signals"] += 1
            counts[f"status {ended.code}"] += 1
            slowest = max(slowest, ended.seconds)
            if ended.code != 75:
                print(f"status {ended.code} after {ended.seconds:.1f} s: {ended.said[-300:]}", flush=True)
                break
        counts["cycles"] += 1
        wrong = f"status {ended.code}: {ended.said[-300:]}" if ended.code else study.wrong(out)
        if wrong:
            counts["wrong"] += 1
            print(f"WRONG {study.name} cycle {cycle}: {wrong}", flush=True)
    return counts, slowest


def row(name: str, counts: collections.Counter, slowest: float) -> Row:
    signals, good, over = counts["signals"], counts["status 75"], counts["status 0"]
    late = f", {over} had just finished (0)" if over else ""
    bad = "" if good + over == signals and not counts["wrong"] else " WRONG"
    return Row(
        f"SIGTERM at random, {name}",
        f"{signals} signals, {counts['cycles']} runs to the end",
        f"status 75 in {good}{late}, after {slowest:.1f} s at most; {counts['cycles'] - counts['wrong']}/"
        f"{counts['cycles']} equal{bad}",
    )
