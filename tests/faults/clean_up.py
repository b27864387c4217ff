"""SIGKILL while the working folder of a finished study is removed (default 40 kills)."""

import collections
import os
import shutil
import signal
import time

from tools import Row, Study, rng, workplace


def run(times: int = 40) -> list[Row]:
    chance, counts = rng(), collections.Counter()
    with workplace() as folder:
        study = Study(folder, "samuel")
        other = Study(folder, "irnn")
        for turn in range(3 * times):
            if counts["kills"] == times:
                break
            out = folder / f"out{turn}"
            begin(study, out)
            command = study.start(out)
            mark = out / ".work" / "removed.json"
            while command.running() and not mark.exists():
                time.sleep(0.0002)
            time.sleep(chance.uniform(0.0, 0.004))
            if not command.running():
                continue
            command.hit(signal.SIGKILL)
            command.end()
            counts["kills"] += 1
            counts["left"] += mark.exists()
            refused = other.start(out).end()
            again = study.start(out).end()
            wrong = f"status {again.code}: {again.said[-300:]}" if again.code else study.wrong(out)
            wrong = wrong or ("" if refused.code == 2 else f"another study got status {refused.code} there")
            counts["wrong"] += bool(wrong)
            if wrong:
                print(f"WRONG {wrong}", flush=True)
    bad = " WRONG" if counts["wrong"] else ""
    return [
        Row(
            "SIGKILL while the working folder is removed",
            f"{counts['kills']} kills, {counts['left']} of them left a part",
            f"{counts['kills'] - counts['wrong']}/{counts['kills']} equal and clean after the next start, another "
            f"study refused{bad}",
        )
    ]


def begin(study: Study, out) -> None:
    """A folder with all arms finished: once trained, it is copied."""
    kept = study.folder / "all-done"
    if not kept.exists():
        command = study.start(kept)
        while command.running() and not (kept / ".work" / "removed.json").exists():
            if (kept / "report.md").exists() and (kept / ".work").exists():
                command.hit(signal.SIGKILL)
                break
            time.sleep(0.0002)
        command.end()
        assert (kept / ".work" / "identity.json").exists(), "the kill came too late; run it again"
        for name in ("results.json", "curves.json", "report.md", ".lock"):
            if (kept / name).exists():
                os.unlink(kept / name)
    shutil.copytree(kept, out)
