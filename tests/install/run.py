"""Build sdist and wheel, install the wheel in a fresh environment per Python, and use it in an empty folder.

``python tests/install/run.py [PYTHON ...]``; by default every Python 3.11 to 3.13 that is found. The wheel is built
from the source distribution, as an index would get it.
"""

import glob
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 8e6  # bytes of a wheel
USE = """
import effjax, numpy as np
assert "site-packages" in effjax.__file__, effjax.__file__
assert effjax.load_data("digits").source.startswith("built-in")
assert len(effjax.METHODS) == 18
print(effjax.__version__, effjax.load_data("fashion_mnist").source)
"""


def pythons() -> list[str]:
    """Interpreters of the supported versions."""
    found = {}
    for version in ("3.11", "3.12", "3.13"):
        homes = sorted(glob.glob(f"{Path.home()}/.pyenv/versions/{version}*/bin/python"))
        found[version] = next(iter(homes), None) or shutil.which(f"python{version}")
    return [path for path in found.values() if path]


def timed(what: str, command: list[str | Path], **options) -> float:
    """Run a command, print how long it took, and stop where it fails."""
    start = time.perf_counter()
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    seconds = time.perf_counter() - start
    print(f"  {what}: {seconds:.0f} s", flush=True)
    if done.returncode:
        raise SystemExit(f"{what} failed with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return seconds


def build(folder: Path) -> Path:
    """The wheel, from the source distribution, from a copy of the files that git knows."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    timed("environment of the builder", [sys.executable, "-m", "venv", folder / "builder"])
    timed("installing the builder", [folder / "builder/bin/pip", "install", "-q", "build"])
    timed("sdist and wheel", [folder / "builder/bin/python", "-m", "build", "-o", folder / "dist", folder / "source"])
    (wheel,) = (folder / "dist").glob("*.whl")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    print(f"  {wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB; {sdist.name}: {sdist.stat().st_size / 1e6:.2f} MB")
    assert wheel.stat().st_size < LARGEST, "the wheel is too large"
    return wheel


def try_wheel(python: str, wheel: Path, folder: Path) -> None:
    """A fresh environment, the wheel with its extra, and a comparison in an empty folder."""
    print(python, flush=True)
    empty = folder / "empty"
    empty.mkdir(parents=True)
    keep = ("PATH", "HOME", "LANG", "TMPDIR")
    names = {name: value for name, value in os.environ.items() if name in keep or name.startswith("PIP_")}
    options = {"cwd": empty, "env": names | {"JAX_PLATFORMS": "cpu"}}
    timed("environment", [python, "-m", "venv", folder / "venv"], **options)
    timed("pip install", [folder / "venv/bin/pip", "install", "-q", f"{wheel}[study]"], **options)
    timed("import, data, methods", [folder / "venv/bin/python", "-c", USE], **options)
    timed("effjax compare samuel:smoke", [folder / "venv/bin/effjax", "compare", "samuel:smoke"], **options)
    for name in ("results.json", "report.md", "report.png"):
        assert (empty / "runs/samuel-smoke" / name).is_file(), name
    shutil.rmtree(folder)


def main() -> None:
    """Try all."""
    with tempfile.TemporaryDirectory() as name:
        wheel = build(Path(name))
        for number, python in enumerate(sys.argv[1:] or pythons()):
            try_wheel(python, wheel, Path(name) / f"try{number}")


if __name__ == "__main__":
    main()
