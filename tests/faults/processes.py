"""Two processes of one run, SIGTERM to one of them at a random moment, and both again (default 6)."""

import collections
import signal
import time

from tools import Command, Row, announced, rng, truth, workplace, write_study


def run(times: int = 6) -> list[Row]:
    chance, counts, slowest = rng(), collections.Counter(), 0.0
    with workplace() as folder:
        toml = write_study(folder, "samuel")

        def start(out, **options):
            words = ("compare", toml, "--train.mesh.data", "-1", "--train.checkpoint-steps", "10", "--out", out)
            return [Command(*words, environment=environment, **options) for environment in announced()]

        begun = time.monotonic()
        assert [end.code for end in map(Command.end, start(folder / "whole"))] == [0, 0]
        seconds = time.monotonic() - begun
        for turn in range(times):
            out, victim = folder / f"out{turn}", chance.randrange(2)
            pair = start(out)
            while (
                pair[0].running() and not (out / ".work" / "identity.json").exists()
            ):  # joined; before, JAX is not there
                time.sleep(0.005)
            time.sleep(chance.uniform(0.0, 0.8 * seconds))
            if not all(one.running() for one in pair):
                counts["too late"] += 1
                continue
            pair[victim].hit(signal.SIGTERM)
            pair[1 - victim]._hit = pair[victim]._hit
            ends = [one.end() for one in pair]
            slowest = max(slowest, *(end.seconds for end in ends))
            codes = [end.code for end in ends]
            counts["both 75"] += codes == [75, 75]
            counts["finished"] += codes == [0, 0]
            print(f"signal to {victim}: {codes}", flush=True)
            again = [end.code for end in map(Command.end, start(out))]
            good = codes in ([75, 75], [0, 0]) and again == [0, 0] and truth(out) == truth(folder / "whole")
            counts["wrong"] += not good
            if not good:
                print(f"WRONG {codes} {again}: {[end.said[-300:] for end in ends]}", flush=True)
    tried = times - counts["too late"]
    bad = " WRONG" if counts["wrong"] else ""
    return [
        Row(
            "two processes, SIGTERM to one",
            f"{tried} signals",
            f"both 75 in {counts['both 75']}, just finished in {counts['finished']}, after {slowest:.1f} s at most; "
            f"{tried - counts['wrong']}/{tried} continued equal{bad}",
        )
    ]
