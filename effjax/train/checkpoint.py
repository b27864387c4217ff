"""Checkpoints behind one small interface over Orbax: save, restore, latest step, close.

A checkpoint holds the state, the data iterator's state, the running sums of the loop and the run's
identity. Saving is asynchronous and atomic: a killed process leaves the previous checkpoint whole.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import shutil
import sys
import zlib
from collections.abc import Generator
from typing import Any

import jax
import numpy as np

from effjax.core.storage import Folder, is_remote, megabytes, storage
from effjax.core.tree import leaf_paths

PyTree = Any

FORMAT = 3


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, of another format, or of another run."""


class Checkpoints:
    """The checkpoints of one run in one folder.

    Args:
      directory: created if missing.
      identity: JSON-able description of the run (config, arm, seed). Restoring into a run of another
        identity is refused with the difference.
      keep: newest checkpoints kept.
      best_metric: name of an evaluation metric whose best checkpoint is kept as well; ``-name`` when
        smaller is better.
    """

    def __init__(self, directory: Folder, identity: dict, *, keep: int = 2, best_metric: str | None = None):
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

        self._ocp = ocp
        self._need = 0
        _quieten()
        directory = storage(directory, "directory")
        self.directory = directory if is_remote(directory) else directory.absolute()
        self.identity = json.loads(json.dumps(identity))
        kept: list[policies.PreservationPolicy] = [policies.LatestN(keep)]
        if best_metric:
            smaller = best_metric.startswith("-")
            name = best_metric.removeprefix("-")
            sign = -1.0 if smaller else 1.0
            kept.append(
                policies.BestN(
                    n=1, get_metric_fn=lambda metrics: sign * metrics[name], keep_checkpoints_without_metrics=False
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
            # Where a folder could not be made, threads would wait for it for minutes, and the process with them.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False, timeout_secs=_patience()),
        )
        with self._writing():
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, state: PyTree, extra: dict, metrics: dict[str, float] | None = None) -> None:
        """Start writing checkpoint ``step``; returns when the state has been copied off the device."""
        args = self._ocp.args
        meta = {
            "format": FORMAT,
            "step": step,
            "identity": self.identity,
            "layout": layout(state),
            "checksums": checksums(state),
            "extra": extra,
        }
        with self._writing(sum(leaf.nbytes for leaf in jax.tree.leaves(state))):
            self._manager.save(
                step,
                args=args.Composite(state=args.StandardSave(state), meta=args.JsonSave(_sealed(meta))),
                metrics=metrics,
                force=True,
            )

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def restore(self, abstract: PyTree, step: int | None = None) -> tuple[int, PyTree, dict]:
        """Read checkpoint ``step`` (default: the newest) as ``(step, state, extra)``.

        Args:
          abstract: the state as ShapeDtypeStructs with shardings; the checkpoint may come from
            another mesh.
          step: which one.

        Raises:
          CheckpointError: damaged, another format, another run or another state; the message shows
            the difference and the way out.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise CheckpointError(f"{self.directory} holds no checkpoint. Check the path, or train first.")
        where = self.directory / str(step)
        meta = self._read(step, where)
        if meta.get("format") != FORMAT:
            raise CheckpointError(f"{where} has checkpoint format {meta.get('format')!r}; this effjax reads {FORMAT}.")
        if meta != _sealed(meta):
            raise CheckpointError(_damaged(where, "its meta data changed since they were written"))
        if meta["step"] != step:
            raise CheckpointError(
                f"{where} holds step {meta['step']}: the folder was renamed. Give it its name back, or delete it."
            )
        difference = describe_difference(meta["identity"], self.identity)
        if difference:
            raise CheckpointError(
                f"{where} belongs to another run:\n{difference}\nUse another output folder, or delete this one."
            )
        difference = describe_difference(meta["layout"], layout(abstract))
        if difference:
            raise CheckpointError(
                f"{where} holds another state:\n{difference}\nUse the code that wrote it, or delete it."
            )
        args = self._ocp.args
        try:
            state = self._manager.restore(step, args=args.Composite(state=args.StandardRestore(abstract)))["state"]
        except Exception as error:
            raise CheckpointError(_damaged(where, error)) from error
        wrong = [name for name, crc in checksums(state).items() if meta["checksums"].get(name, crc) != crc]
        if wrong:
            raise CheckpointError(_damaged(where, f"the bytes of {wrong[:3]} changed since they were written"))
        return step, state, meta["extra"]

    def _read(self, step: int, where: Folder) -> dict:
        args = self._ocp.args
        try:
            return self._manager.restore(step, args=args.Composite(meta=args.JsonRestore()))["meta"]
        except Exception as error:
            raise CheckpointError(_damaged(where, error)) from error

    def wait(self) -> None:
        """Block until everything begun has been written."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and release the folder."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self, need: int | None = None) -> Generator[None]:
        """Turn what is raised by a write that failed, now or of a save begun before, into one line.

        Args:
          need: bytes of the state, remembered for the saves that end later.
        """
        self._need = self._need if need is None else need
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            why = _storage_reason(error)
            if why is None:
                raise
            raise CheckpointError(self._not_written(why)) from error

    def _not_written(self, why: str) -> str:
        newest = None
        with contextlib.suppress(Exception):  # a bucket that cannot be read either
            newest = max((int(path.name) for path in self.directory.glob("*") if path.name.isdigit()), default=None)
        kept = "There is no checkpoint before it" if newest is None else f"The checkpoint of step {newest} is kept"
        try:
            free = f", and {megabytes(shutil.disk_usage(self.directory).free)} are free"
        except OSError:
            free = ""
        return (
            f"{self.directory}: a checkpoint could not be written ({why}). It needs about {megabytes(self._need)}{free}"
            f". {kept}. Free some space or mend the folder, and give the same command again: it continues from there."
        )


@functools.cache
def _quieten() -> None:
    """Of a failed save let the one error speak that is raised, once in a process."""
    logging.getLogger("absl").addFilter(_unless_raised_again)
    shown = sys.unraisablehook

    def show(unraisable):
        # TensorStore's other writes report to Orbax's event loop, which has ended with the first error.
        if str(unraisable.exc_value) != "Event loop is closed":
            shown(unraisable)

    sys.unraisablehook = show


def _unless_raised_again(record: logging.LogRecord) -> bool:
    """Orbax logs the traceback of what fails in each of its threads, and raises it again from the next call."""
    return not (record.exc_info and "orbax" in record.pathname) or bool(os.environ.get("EFFJAX_TRACEBACK"))


def _patience() -> int:
    """Seconds that Orbax waits, by a clock that may be set: one process waits for nobody but its own disk."""
    return 10 * 365 * 86400 if jax.process_count() == 1 else 1200


def _sealed(meta: dict) -> dict:
    """The meta data as JSON brings them back, with a checksum of all the rest."""
    rest = json.loads(json.dumps({name: value for name, value in meta.items() if name != "crc"}))
    return {**rest, "crc": zlib.crc32(json.dumps(rest, sort_keys=True).encode())}


_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT)
"""Errors of a disk, a quota or a folder, which no line of code can mend."""


def _storage_reason(error: BaseException) -> str | None:
    """What the disk said, if that is what an error is about; Orbax and TensorStore wrap it in types of their own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _STORAGE:
            return str(seen.strerror)
        if isinstance(seen, PermissionError):  # of a bucket's driver, which has words of its own
            return str(seen).partition("\n")[0]
        for number in _STORAGE:
            if os.strerror(number) in str(seen):
                return os.strerror(number)
        seen = seen.__cause__ or seen.__context__
    return None


def _damaged(where: Folder, why: Any) -> str:
    text = str(why).strip().splitlines()
    return (
        f"{where} is damaged and was not loaded ({text[0][:300] if text else type(why).__name__}). "
        f"Delete that folder to resume from the checkpoint before it, if there is one."
    )


def layout(state: PyTree) -> dict[str, str]:
    """Path -> ``dtype[shape]`` of every leaf."""
    return {
        name: f"{leaf.dtype}{list(leaf.shape)}"
        for name, leaf in zip(leaf_paths(state), jax.tree.leaves(state), strict=True)
    }


def checksums(state: PyTree) -> dict[str, int]:
    """CRC-32 of every leaf that this process holds whole."""
    sums = {}
    for name, leaf in zip(leaf_paths(state), jax.tree.leaves(state), strict=True):
        if not leaf.is_fully_addressable:
            if not leaf.is_fully_replicated:
                continue
            leaf = leaf.addressable_data(0)
        raw = jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        sums[name] = zlib.crc32(np.ascontiguousarray(_whole(raw)).view(np.uint8).data if raw.size else b"")
    return sums


def _whole(array: jax.Array | np.ndarray) -> np.ndarray:
    """The array on the host. Of one that is split JAX would keep what it puts together, for as long as it lives."""
    if not isinstance(array, jax.Array) or len(array.addressable_shards) < 2:
        return np.asarray(array)
    if array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    whole = np.empty(array.shape, array.dtype)
    for shard in array.addressable_shards:
        whole[shard.index] = shard.data
    return whole


def describe_difference(old: Any, new: Any, path: str = "", limit: int = 12) -> str:
    """Readable difference of two JSON-able values, one line a field; empty when equal."""
    lines = _differences(json.loads(json.dumps(old)), json.loads(json.dumps(new)), path)
    shown = lines[:limit]
    if len(lines) > limit:
        shown.append(f"  ... and {len(lines) - limit} more")
    return "\n".join(shown)


def _differences(old: Any, new: Any, path: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            name = f"{path}.{key}" if path else key
            if key not in new:
                lines.append(f"  {name}: {old[key]!r} there, absent here")
            elif key not in old:
                lines.append(f"  {name}: absent there, {new[key]!r} here")
            else:
                lines += _differences(old[key], new[key], name)
        return lines
    return [] if old == new else [f"  {path}: {old!r} there, {new!r} here"]
