"""What comes of interruptions: ``python tests/faults/run.py NAME [TIMES]``, without a name the list.

Each script starts the real command on tiny studies, hits it, starts it again, and compares with a run that nothing
disturbed. It prints rows of a table (fault, times tried, outcome) and exits with 1 if anything was lost or mixed.
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

NAMES = ("kills", "clean_up", "stops", "disk", "commands", "books", "processes", "devices")


def main(words: list[str]) -> int:
    if not words or words[0] not in (*NAMES, "all"):
        for name in NAMES:
            print(f"{name:10} {importlib.import_module(name).__doc__.splitlines()[0]}")
        return 2 if words else 0
    import tools

    tools.prepare()
    times = [int(word) for word in words[1:]]
    rows = []
    for name in NAMES if words[0] == "all" else words[:1]:
        rows += importlib.import_module(name).run(*times)
    print(tools.table(rows))
    return int(any("WRONG" in row.outcome for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
