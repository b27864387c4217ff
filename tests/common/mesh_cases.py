"""What a run shows on any mesh: its batches, its losses and its final metrics; the table of ``test_meshes.py``.

``main`` observes studies in one of several processes that have joined.
"""

import contextlib
import json
import sys
import tempfile
import traceback
import warnings
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DATA = ("--train.mesh.data", "8")
BOTH = ("--train.mesh.data", "4", "--train.mesh.model", "2", "--train.mesh.rules", "fsdp+tensor")
TENSOR = ("--train.mesh.data", "2", "--train.mesh.model", "4", "--train.mesh.rules", "tensor")
FSDP = (*DATA, "--train.mesh.rules", "fsdp")


class Row(NamedTuple):
    """How the tiny study of a stem lies on meshes; one arm of it runs, that of ``RESUMED``.

    Attributes:
      meshes: words of meshes of eight devices. ``tensor`` is there where the network is one of the backbones.
      words: for every run, where a batch would not divide by eight.
      arm: that runs, in place of the stem's in ``RESUMED``; the words are then all there are.
      atol: of what is counted in rows: an argmax of equal logits, or a threshold between two of them, may move a row
        where sums are taken in another order.
    """

    meshes: tuple[tuple[str, ...], ...]
    words: tuple[str, ...] = ()
    arm: str | None = None
    atol: float = 1e-6


MESHES = {
    "samuel": Row(
        (DATA, ("--train.mesh.data", "2", "--train.mesh.expert", "4")), ("--experts", "1", "0.1", "0.01", "0.001")
    ),
    "dcl": Row((DATA, FSDP)),
    "cola": Row((DATA, FSDP)),
    "bucket_sampler": Row((DATA, BOTH)),
    "token_drop": Row((DATA, TENSOR)),
    "icpc": Row((DATA, BOTH), ("--batch-size", "16")),
    "axformer": Row((DATA, FSDP)),
    "fptt": Row((DATA, FSDP)),
    "irnn": Row((DATA,)),
    "tarnn": Row((DATA,)),
    "global_layer": Row((DATA,)),
    "fastrain": Row((DATA,)),
    "disk": Row((DATA, FSDP), ("--batch-size", "24")),
    "geeni": Row((DATA, ("--train.mesh.data", "4", "--train.mesh.expert", "2"))),
    "selective": Row((DATA, FSDP)),
    "hybrid": Row((DATA, FSDP)),
    "si_cnn": Row((DATA, BOTH)),
    "dynamic_inference": Row((DATA, BOTH)),
    # A pretrained decoder, of which every process reads the parts that it holds.
    "cola, pretrained": Row(
        (FSDP, BOTH),
        (
            *("--tasks", "sms_spam/stories260k", "--links", "2", "--rank", "2", "--batch-size", "8"),
            *("--train-rows", "32", "--test-rows", "8", "--max-length", "32", "--scan-layers"),
            *("--budget.amount", "4", "--arms", "cola-2"),
        ),
        arm="sms_spam-stories260k/cola-2",
    ),
}


def stem_of(case: str) -> str:
    return case.partition(",")[0]


def words_of(case: str, mesh: Sequence[str] = ()) -> list[str]:
    """The command line of a case's study on a mesh."""
    from study_cases import TINY

    row = MESHES[case]
    return [*(TINY[case] if row.arm is None else ()), *row.words, *mesh]


def built(case: str, words: Sequence[str]) -> tuple[Any, Any]:
    """The config of a case's study, and the program of its arm."""
    from study_cases import RESUMED

    from effjax.study.resolve import resolve

    study = resolve(f"{stem_of(case)}:smoke", words)
    return study.config, study.build(MESHES[case].arm or RESUMED[case])


def observe(case: str, words: Sequence[str], batches: int = 4) -> dict[str, Any]:
    """What a run of the case's arm shows: fingerprints of its first global batches, the loss of each step, metrics."""
    from effjax.train.logging import read_jsonl
    from effjax.train.loop import fit

    config, program = built(case, [*words, "--train.log-steps", "1", "--train.read-lag", "1"])
    prints = []
    if program.has_batches:
        source = program.loader.open(0)
        prints = [fingerprint(next(source)) for _ in range(min(batches, program.total_steps))]
    with tempfile.TemporaryDirectory() as own:
        folder = of_first(own)
        result = fit(program, 0, options=config.train, directory=folder)
        losses = [record["loss"] for record in read_jsonl(Path(folder) / "log.jsonl") if "loss" in record]
        metrics, _ = program.measured(result.state)
        of_first("")  # nobody reads from now on
    return {
        "batches": prints,
        "losses": losses,
        "metrics": {name: float(value) for name, value in {**result.train, **metrics}.items()},
    }


def of_first(text: str) -> str:
    """The text that process 0 has."""
    import jax
    import numpy as np

    if jax.process_count() == 1:
        return text
    from jax.experimental import multihost_utils

    line = np.frombuffer(text.encode().ljust(512, b"\0"), np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(line)).rstrip(b"\0").decode()


def fingerprint(batch: Any) -> int:
    """Of the global batch, whatever the number of processes that each hold some rows of it."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        batch = multihost_utils.process_allgather(batch, tiled=True)
    return crc_of(jax.tree.leaves(batch))


def crc_of(arrays: Iterable[Any]) -> int:
    import numpy as np

    crc = 0
    for array in arrays:
        crc = zlib.crc32(np.ascontiguousarray(array).tobytes(), crc)
    return crc


def main(words: list[str]) -> None:
    """``OUT MESH CASE...``: process 0 writes JSON lines, what each case shows on this mesh, or its error."""
    import jax

    out, mesh, *cases = words
    with Path(out).open("a") if jax.process_index() == 0 else contextlib.nullcontext(sys.stderr) as lines:
        for case in cases:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = observe(case, words_of(case, mesh.split()))
            except Exception:
                found = {"error": traceback.format_exc()}
            print(json.dumps({"case": case, **found}), file=lines, flush=True)
