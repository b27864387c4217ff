"""A disk that is full, at several sizes, and the same command again with room (default 8; needs root for a tmpfs)."""

import collections
import contextlib
import os
import subprocess

from tools import Row, Study, rng, workplace

SIZES = (4, 60, 200, 400, 600, 900)
"""Kilobytes left at the start."""


def run(times: int = 8) -> list[Row]:
    if os.geteuid():
        return [Row("disk full", "0", "not tried: making a small disk needs root")]
    chance, counts, slowest = rng(), collections.Counter(), 0.0
    with workplace() as folder:
        study = Study(folder, "cola")
        for turn in range(times):
            room = SIZES[turn] if turn < len(SIZES) else chance.randrange(4, 1500)
            with disk(folder / f"disk{turn}", room) as small:
                ended = study.start(small / "out").end()
                slowest = max(slowest, ended.seconds)
                lines = [line for line in ended.said.splitlines() if line.startswith("effjax: ")]
                counts["filled"] += ended.code != 0
                readable = ended.code == 0 or (ended.code == 2 and len(lines) == 1 and str(small) in lines[0])
                counts["unreadable"] += not readable or "Traceback" in ended.said
                print(f"{room} kB: status {ended.code}: {lines or ended.said[-1500:]}", flush=True)
                subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
                again = study.start(small / "out").end()
                wrong = f"status {again.code}: {again.said[-300:]}" if again.code else study.wrong(small / "out")
                counts["wrong"] += bool(wrong)
                if wrong:
                    print(f"WRONG {wrong}", flush=True)
    bad = " WRONG" if counts["wrong"] or counts["unreadable"] else ""
    return [
        Row(
            "disk full, then room",
            f"{times} sizes, {counts['filled']} too small",
            f"{counts['filled'] - counts['unreadable']}/{counts['filled']} end with one line that names the path, "
            f"{times - counts['wrong']}/{times} equal after the next start, {slowest:.0f} s at most in all{bad}",
        )
    ]


@contextlib.contextmanager
def disk(folder, kilobytes: int):
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
