"""Does a test fail for every mistake of the table?

``python tests/mutations/run.py [name pattern ...]`` applies one mutation after another to a copy of the package in a
temporary folder, runs its test files there up to the first failure, and prints a Markdown table. The exit status is
that of the table: 1 where a mutation survives.
"""

import argparse
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from table import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[2]
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+?\.py)(?:::(.*?))?(?: - |$)", re.MULTILINE)


def place(mutation: Mutation, package: Path) -> Path:
    """The one file that holds the mutation's old text.

    Raises:
      ValueError: none does, it occurs more than once, or a test file of the mutation is not there.
    """
    gone = [name for name in mutation.tests if not (ROOT / "tests" / name).exists()]
    if gone:
        raise ValueError(f"{mutation.name}: tests/{gone[0]} is not there. Update tests/mutations/table.py.")
    counts = {path: path.read_text().count(mutation.old) for path in sorted(package.rglob("*.py"))}
    found = {path.relative_to(package).as_posix(): count for path, count in counts.items() if count}
    if list(found.values()) != [1]:
        raise ValueError(
            f"{mutation.name}: the text {mutation.old!r} occurs {found or 'nowhere'}; it must occur once. Update it in "
            "tests/mutations/table.py."
        )
    return package / next(iter(found))


def prepare(folder: Path) -> Path:
    """A copy of what the tests read; beside it the shared data, if there are any."""
    copy = folder / "repo"
    skipped = shutil.ignore_patterns("__pycache__", ".venv*", ".git", "mutations")
    for name in ("effjax", "configs", "tests", "notebooks"):
        shutil.copytree(ROOT / name, copy / name, ignore=skipped)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    shared = ROOT.parent / "shared"
    if shared.exists():
        (folder / "shared").symlink_to(shared.resolve())
    return copy


def first_failure(copy: Path, cache: Path, *tests: str) -> str:
    """The first test of the copy that fails, '' for none."""
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        **os.environ,
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-rfE", *tests]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest {tests} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr}")
    return "" if done.returncode == 0 else "::".join(filter(None, _FAILED.search(done.stdout).groups()))


def run(mutation: Mutation, copy: Path, cache: Path) -> tuple[str, str, float]:
    """The mutated module, the test that caught it ('' for none), and the seconds it took.

    Raises:
      RuntimeError: the test that fails does so without the mutation too.
    """
    path = place(mutation, copy / "effjax")
    text = path.read_text()
    path.write_text(text.replace(mutation.old, mutation.new))
    start = time.perf_counter()
    try:
        caught = first_failure(copy, cache, *(f"tests/{name}" for name in mutation.tests))
    finally:
        path.write_text(text)
    if caught and first_failure(copy, cache, caught):
        raise RuntimeError(f"{mutation.name}: {caught} fails without the mutation too. Mend the test.")
    return path.relative_to(copy / "effjax").as_posix(), caught.removeprefix("tests/"), time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["*"], help="shell patterns of mutations; all by default")
    parser.add_argument("--check", action="store_true", help="only look for the texts")
    arguments = parser.parse_args()
    chosen = [one for one in MUTATIONS if any(fnmatch.fnmatch(one.name, name) for name in arguments.names)]
    missing = []
    for mutation in chosen:
        try:
            place(mutation, ROOT / "effjax")
        except ValueError as error:
            missing.append(str(error))
    if missing:
        print("\n".join(missing), file=sys.stderr)
        return 2
    if arguments.check:
        return 0
    survived = 0
    print("| mutation | kind | module | caught by | s |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = prepare(Path(folder))
        for mutation in chosen:
            module, caught, seconds = run(mutation, copy, Path(folder) / "cache")
            survived += not caught
            by = f"`{caught}`" if caught else "**nothing**"
            print(f"| {mutation.name} | {mutation.kind} | `{module}` | {by} | {seconds:.0f} |", flush=True)
    print(f"\n{len(chosen) - survived} of {len(chosen)} are caught.")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
