"""SIGKILL at random moments of four studies, and the same command again until it ends by itself (default 200 kills)."""

import collections
import signal
import time

from tools import STUDIES, Row, Study, finished_arms, rng, workplace


def run(times: int = 200) -> list[Row]:
    chance, rows = rng(), []
    with workplace() as folder:
        for name in STUDIES:
            study = Study(folder, name)
            counts = hit_until_done(study, -(-times // len(STUDIES)), chance)
            print(f"{name}: {dict(counts)}", flush=True)
            rows.append(row(name, counts))
    return rows


def hit_until_done(study: Study, times: int, chance) -> collections.Counter:
    """Cycles of kills and continuations; a cycle ends with a run that comes to its end."""
    counts, cycle = collections.Counter(), 0
    while counts["kills"] < times:
        out, before = study.folder / f"{study.name}-{cycle}", {}
        cycle += 1
        while True:
            command = study.start(out)
            # One run in four is let through.
            if chance.random() < 0.75 and counts["kills"] < times:
                time.sleep(chance.uniform(0.0, study.seconds))
                if command.running():
                    command.hit(signal.SIGKILL)
                    counts["kills"] += 1
            ended = command.end()
            now = finished_arms(out)
            counts["redone"] += sum(now.get(path, when) != when for path, when in before.items())
            before = now
            if ended.code != -signal.SIGKILL:
                break
        counts["cycles"] += 1
        wrong = f"status {ended.code}: {ended.said[-300:]}" if ended.code else study.wrong(out)
        if wrong:
            counts["wrong"] += 1
            print(f"WRONG {study.name} cycle {cycle}: {wrong}", flush=True)
    return counts


def row(name: str, counts: collections.Counter) -> Row:
    good = not counts["wrong"] and not counts["redone"]
    return Row(
        f"SIGKILL at random, {name}",
        f"{counts['kills']} kills, {counts['cycles']} runs to the end",
        f"{counts['cycles'] - counts['wrong']}/{counts['cycles']} equal, {counts['redone']} finished arms redone"
        + ("" if good else " WRONG"),
    )
