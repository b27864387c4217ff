"""Two commands on one folder, some time apart (default 8 pairs)."""

import collections
import time

from tools import Row, Study, rng, workplace


def run(times: int = 8) -> list[Row]:
    chance, counts, slowest = rng(), collections.Counter(), 0.0
    with workplace() as folder:
        study = Study(folder, "samuel")
        for turn in range(times):
            out = folder / f"out{turn}"
            one = study.start(out)
            time.sleep(chance.choice([0.0, chance.uniform(0.0, study.seconds / 2)]))
            two = study.start(out)
            begun = time.monotonic()
            while one.running() and two.running():
                time.sleep(0.005)
            slowest = max(slowest, time.monotonic() - begun)
            ends = sorted([one.end(), two.end()])
            refused = ends[1].code == 2 and "is in use by process" in ends[1].said and "Traceback" not in ends[1].said
            # A second command that came after the end of the first finds its results.
            wrong = "" if [end.code for end in ends] == [0, 0] or (ends[0].code == 0 and refused) else str(ends)[-600:]
            wrong = wrong or study.wrong(out)
            counts["refused"] += refused
            counts["wrong"] += bool(wrong)
            if wrong:
                print(f"WRONG {wrong}", flush=True)
    bad = " WRONG" if counts["wrong"] else ""
    return [
        Row(
            "two commands on one folder",
            f"{times} pairs",
            f"the second told who holds it in {counts['refused']}, after {slowest:.1f} s at most; "
            f"{times - counts['wrong']}/{times} equal{bad}",
        )
    ]
