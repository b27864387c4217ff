"""Damaged working files of a study that was killed (default 60 damages)."""

import collections
import json
import shutil
import signal
import time

from tools import Command, Row, Study, finished_arms, matching, rng, workplace

CHECKPOINTS = ".work/arms/*/*/*/checkpoints/[0-9]*"


def run(times: int = 60) -> list[Row]:
    chance, counts = rng(), collections.Counter()
    with workplace() as folder:
        study = Study(folder, "samuel")
        killed = killed_in_training(study)
        files = sorted(path for path in killed.rglob("*") if path.is_file() and path.stat().st_size)
        for turn in range(times):
            out = folder / f"out{turn}"
            shutil.copytree(killed, out)
            victim = out / chance.choice(files).relative_to(killed)
            kind = damage(victim, chance)
            ended = study.start(out).end()
            named = "Traceback" not in ended.said and ended.code == 2
            wrong = "" if named else (f"status {ended.code}" if ended.code else study.wrong(out))
            # The loss curves are no results: a log whose bytes were flipped may differ there.
            counts["refused" if named else "equal"] += 1
            if wrong:
                counts["wrong"] += 1
                print(f"WRONG {kind} {victim.relative_to(out)}: {wrong}: {ended.said[-500:]}", flush=True)
            shutil.rmtree(out)
        counts["other"] = another_config(study, killed)
    bad = " WRONG" if counts["wrong"] or not counts["other"] else ""
    return [
        Row(
            "damaged working files (cut, emptied, removed, one bit)",
            f"{times} damages of {len(files)} files",
            f"{counts['equal']} continued equal, {counts['refused']} refused in one line, {counts['wrong']} mixed or "
            f"obscure; without identity.json another config is refused{bad}",
        )
    ]


def killed_in_training(study: Study):
    """A folder with a finished arm and a checkpoint of the next."""
    out = study.folder / "killed"
    while True:
        command = study.start(out)
        while command.running() and not (finished_arms(out) and matching(out, CHECKPOINTS)):
            time.sleep(0.001)
        if command.running():
            command.hit(signal.SIGKILL)
        command.end()
        if (out / ".work").exists() and finished_arms(out):
            return out
        shutil.rmtree(out)


def damage(path, chance) -> str:
    kind = chance.choice(["cut", "empty", "remove", "bit"])
    content = path.read_bytes()
    if kind == "remove":
        path.unlink()
    elif kind == "bit":
        place = chance.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :])
    else:
        path.write_bytes(content[: chance.randrange(len(content))] if kind == "cut" else b"")
    return kind


def another_config(study: Study, killed) -> bool:
    """Whether a run of another config refuses finished arms, also where nothing says whose the folder is."""
    refused = []
    for mark in (None, "foreign"):
        out = study.folder / f"other-{mark}"
        shutil.copytree(killed, out)
        path = out / ".work" / "identity.json"
        identity = json.loads(path.read_text())
        path.unlink()
        if mark:
            identity["config"]["momentum"] = 0.5
            path.write_text(json.dumps(identity))
        ended = Command(*study.words, "--momentum", "0.5", "--out", out).end()
        print(f"momentum 0.5 there: status {ended.code}: {ended.said.splitlines()[-1][:200]}", flush=True)
        refused.append(ended.code == 2)
    return all(refused)
