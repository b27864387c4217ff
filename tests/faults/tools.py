"""Commands that are started, hit and continued, and what must come of them."""

import atexit
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

# Shrunken until a run takes seconds; every kind of file and phase stays.
STUDIES = {
    "samuel": """
study = "samuel"
preset = "smoke"
settings = ["shift"]
grid = [0.1]
arms = ["sgd-*", "samuel"]
seeds = [0, 1]
budget = {amount = 80}
""",
    "irnn": """
study = "irnn"
preset = "smoke"
tasks = ["noisy-digits-12"]
hidden = 8
batch_size = 8
train_rows = 64
test_rows = 40
arms = ["lstm", "irnn"]
seeds = [0, 1]
budget = {amount = 60, unit = "steps"}
""",
    "cola": """
study = "cola"
preset = "smoke"
links = [2]
arms = ["lora", "cola-2"]
seeds = [0, 1]
budget = {amount = 60}
""",
    "geeni": """
study = "geeni"
preset = "smoke"
arms = ["single", "geeni-learned"]
hidden = 8
members = 2
modes = ["full"]
fractions = [0.1]
seeds = [0]
budget = {amount = 40}
""",
}
LEFT = {"results.json", "curves.json", "report.md", "report.png"}
"""What a finished folder holds, and nothing else."""
OFTEN = ("--train.checkpoint-seconds", "0.05", "--train.log-steps", "10")
PATIENCE = 240.0
"""Seconds after which a command that was not hit is given up as hanging, on a busy machine."""


class Ended(NamedTuple):
    """How a command ended: its status (negative for a signal), seconds since it was hit, and what it printed."""

    code: int
    seconds: float
    said: str


class Command:
    """One ``effjax`` command in a process of its own.

    The process is a fork of this one, which has imported everything and started nothing: so a run takes seconds.

    Args:
      *words: of the command.
      devices: virtual devices.
      environment: variables to set, such as those that announce a distributed run.
    """

    def __init__(self, *words: Any, devices: int = 1, environment: Mapping[str, str] | None = None):
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  it lives as long as the command
        self._hit: float | None = None
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _become([str(word) for word in words], devices, environment or {}, self._log.fileno())

    def listening(self) -> bool:
        """Whether SIGTERM has a handler, which it has from the command's first line on."""
        fields = dict(line.split(":\t") for line in Path(f"/proc/{self.pid}/status").read_text().splitlines())
        return bool(int(fields.get("SigCgt", "0"), 16) >> (signal.SIGTERM - 1) & 1)

    def running(self) -> bool:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code is None

    def hit(self, number: int) -> None:
        self._hit = time.monotonic()
        os.kill(self.pid, number)

    def end(self, patience: float = PATIENCE) -> Ended:
        """Wait for the end; a command that does not come to one is killed and has the status -9."""
        begun = self._hit or time.monotonic()
        while self.running():
            if time.monotonic() - begun > patience:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.005)
        self._log.seek(0)
        code = self._code
        assert code is not None
        return Ended(code, time.monotonic() - begun, self._log.read())


def _become(words: list[str], devices: int, environment: Mapping[str, str], log: int) -> None:
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    import jax

    from effjax.cli import main

    jax.config.update("jax_num_cpu_devices", devices)
    sys.argv = ["effjax", *words]
    code = 1
    try:
        code = main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            threading._shutdown()  # waits for threads as a process does that is no fork
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def prepare() -> None:
    """Import what a study needs, before the first fork; no backend is started."""
    store = Path(tempfile.gettempdir()) / f"effjax-faults-{os.getuid()}"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(store))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    import matplotlib.backends.backend_agg  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import tyro  # noqa: F401

    import effjax.study.compare
    import effjax.study.single  # noqa: F401
    from effjax.study.resolve import resolve

    for name in STUDIES:
        resolve(f"{name}:smoke")


def write_study(folder: Path, name: str) -> Path:
    """The TOML file of a study."""
    path = folder / f"{name}.toml"
    path.write_text(STUDIES[name].lstrip())
    return path


class Study:
    """A tiny study with the results of a run that nothing disturbed."""

    def __init__(self, folder: Path, name: str, *more: str):
        self.name, self.folder = name, folder
        self.toml = write_study(folder, name)
        self.words = ("compare", self.toml, *OFTEN, *more)
        begun = time.monotonic()
        ended = self.start(folder / f"{name}-whole").end()
        assert ended.code == 0, ended.said
        self.seconds = time.monotonic() - begun
        self.truth = truth(folder / f"{name}-whole")

    def start(self, out: Path, **options: Any) -> Command:
        return Command(*self.words, "--out", out, **options)

    def wrong(self, out: Path) -> str:
        """What is not as in the run that nothing disturbed; empty if all is."""
        if truth(out) != self.truth:
            return "other results"
        left = {path.name for path in out.iterdir()} - LEFT
        return f"left behind: {', '.join(sorted(left))}" if left else ""


def truth(out: Path) -> dict[str, Any]:
    """Metrics and claims of a finished folder: what an interruption must not change."""
    results = json.loads((out / "results.json").read_text())
    arms = {name: (arm["status"], arm["metrics"]) for name, arm in results["arms"].items()}
    return {"arms": arms, "claims": results["claims"]}


def finished_arms(out: Path) -> dict[str, int]:
    """Each ``done.json`` with the time at which it was written."""
    found = {}
    for path in matching(out, ".work/arms/*/*/*/done.json"):
        with contextlib.suppress(FileNotFoundError):
            found[str(path)] = path.stat().st_mtime_ns
    return found


def matching(out: Path, pattern: str) -> list[Path]:
    """The paths of a pattern, while a command makes and removes folders; none where one went meanwhile."""
    try:
        return list(out.glob(pattern))
    except FileNotFoundError:
        return []


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """An empty folder."""
    folder = tempfile.mkdtemp(prefix="effjax-faults-")  # TemporaryDirectory would be removed by a fork that ends
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def announced(devices: int = 1) -> list[dict[str, str]]:
    """The environments of two processes of one run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    one = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    return [{**one, "JAX_PROCESS_ID": str(index)} for index in range(2)]


class Row(NamedTuple):
    """One line of the table."""

    fault: str
    tried: str
    outcome: str


def table(rows: Sequence[Row]) -> str:
    head = ("fault", "tried", "outcome")
    lines = [head, ("---",) * 3, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rng() -> random.Random:
    """A generator whose seed is printed, or given as EFFJAX_FAULT_SEED."""
    seed = int(os.environ.get("EFFJAX_FAULT_SEED", random.SystemRandom().randrange(2**32)))
    print(f"seed {seed}", flush=True)
    return random.Random(seed)
