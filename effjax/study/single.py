"""One arm on its own: train it, and export what it learned."""

import contextlib
import re
from typing import Any

import jax
import numpy as np

from effjax.core.errors import check_choice
from effjax.core.storage import Folder, make_folder, storage, written_locally
from effjax.core.together import check_same_everywhere, together
from effjax.core.tree import leaf_paths
from effjax.study.books import read_json_checked
from effjax.study.lock import FolderLock
from effjax.study.progress import Progress
from effjax.study.resolve import Study, resolve_saved
from effjax.train.checkpoint import Checkpoints, describe_difference
from effjax.train.logging import write_json
from effjax.train.loop import fit
from effjax.train.mesh import start_distributed
from effjax.train.program import Program

NOTE = "arm.json"


def train_arm(study: Study, arm: str | None, seed: int, out: str | Folder | None) -> dict[str, Any]:
    """Train one arm of a study into a folder with checkpoints and ``log.jsonl``; resumes if started again.

    Returns:
      Its metrics, also written to ``metrics.json``.
    """
    start_distributed()
    if arm is None:
        raise ValueError(f"--arm is missing. The arms of {study.stem}:{study.preset} are: {', '.join(study.arms)}.")
    check_choice("--arm", arm, study.arms)
    name = f"{study.default_out.name}-{re.sub('[^A-Za-z0-9.]+', '-', arm)}-{seed}"
    out = study.default_out.with_name(name) if out is None else storage(out)
    identity = {**study.identity, "arm": arm}
    program = together(lambda: study.build(arm))
    first = jax.process_index() == 0
    check_same_everywhere({**identity, "seed": seed, "train": study.shared_options, "out": str(out)})
    if study.config.own is not None:  # their files may change between two starts
        identity["source"] = program.task.source
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(quiet=not first))
        together(lambda: stack.enter_context(FolderLock(out, first=first, say=progress.say)))
        progress.plan(program.total_steps)
        label = f"{arm}, seed {seed}"
        progress.say(label)
        together(lambda: _mark(out, {**identity, "seed": seed}) if first else None)
        result = fit(
            program,
            seed,
            options=study.config.train,
            directory=out,
            identity=identity,
            on_steps=progress.reach,
            on_compile=progress.compiling(label),
        )
        metrics = {**result.train, **program.judged(result.state), "train_s": result.train_s, "skipped": result.skipped}
        if first:
            write_json(out / "metrics.json", metrics)
    return metrics


def _mark(out: Folder, note: dict[str, Any]) -> None:
    """Note what the folder holds, or refuse a folder that holds something else."""
    path = out / NOTE
    difference = describe_difference(_read_note(path), note) if path.exists() else ""
    if difference:
        raise ValueError(f"--out {out} holds another run:\n{difference}\nChoose another folder, or delete it.")
    write_json(path, note)


def _read_note(path: Folder) -> dict[str, Any]:
    kinds = {"study": str, "preset": str, "arm": str, "config": dict, "seed": int}
    return read_json_checked(path, kinds, "Choose another folder, or delete this one and train again.")


def export_arm(folder: str | Folder, out: str | Folder, merged: bool = False) -> int:
    """Write what a trained arm learned, from its newest checkpoint.

    Args:
      folder: written by ``train_arm``.
      out: ``NAME.safetensors`` for the network's parameters, one tensor a leaf, named by its path; else a folder that
        other libraries read, if the arm has one: adapters in the format of PEFT, a whole chain as one.
      merged: in that folder the network with its adapters merged, in Hugging Face's layout, in place of the adapters.

    Returns:
      The number of tensors.

    Raises:
      ValueError: an arm or a network that has no such folder.
    """
    folder, out = storage(folder, "folder"), storage(out)
    note_path = folder / NOTE
    if not note_path.exists():
        raise FileNotFoundError(f"{note_path} does not exist. Give a folder written by `effjax train`.")
    note = _read_note(note_path)
    study = resolve_saved(note["study"], note["preset"], note["config"])
    program = study.build(note["arm"])
    single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=single),
        jax.eval_shape(program.init, jax.random.key(0)),
    )
    checkpoints = Checkpoints(folder / "checkpoints", note)
    _, state, _ = checkpoints.restore(abstract)
    checkpoints.close()
    if out.suffix == ".safetensors":
        if merged:
            raise ValueError(f"--merged is for folders: the parameters in --out {out} are merged as they are.")
        return _export_file(program, state, out, note)
    if program.export is None:
        raise ValueError(
            f"--out {out}: the arm {note['arm']!r} has no adapters to put in a folder. Name a .safetensors."
        )
    make_folder(out.parent)
    with written_locally(out) as local:
        program.export(state, local, merged=merged)
        return sum(_count_tensors(path) for path in local.glob("*.safetensors"))


def _count_tensors(path: Folder) -> int:
    from safetensors import safe_open

    with safe_open(path, "numpy") as tensors:
        return len(tensors.keys())


def _export_file(program: Program, state: Any, out: Folder, note: dict[str, Any]) -> int:
    from safetensors.numpy import save_file

    params = program.params(state)
    tensors = {name: np.asarray(leaf) for name, leaf in zip(leaf_paths(params), jax.tree.leaves(params), strict=True)}
    make_folder(out.parent)
    with written_locally(out) as local:
        partial = local.with_name(local.name + ".partial")
        save_file(tensors, partial, metadata={"format": "flax", "study": note["study"], "arm": note["arm"]})
        partial.replace(local)
    return len(tensors)
