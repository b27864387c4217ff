"""Benchmarks against other libraries: ``python tests/peers/run.py`` lists them, ``... run.py NAME --help`` tells more.

Run them on a quiet machine, from the repository, with ``pip install -e ".[peers]"``.
"""

import ast
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def benchmarks() -> dict[str, str]:
    """The first line of each benchmark's docstring, by name; nothing is imported."""
    paths = sorted(path for path in FOLDER.glob("*.py") if not path.name.startswith(("run", "test_")))
    return {path.stem: ast.get_docstring(ast.parse(path.read_text())).partition("\n")[0] for path in paths}


def main(words: list[str]) -> int:
    found = benchmarks()
    if not words or words[0] not in found:
        print("\n".join(f"{name:16} {line}" for name, line in found.items()))
        return int(bool(words) and words[0] != "--list")
    sys.argv = words
    runpy.run_path(str(FOLDER / f"{words[0]}.py"), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
