"""Checkpoints behind one small interface over Orbax: save, restore, latest step, close.

A checkpoint holds the state, the data iterator's state, the running sums of the loop and the run's
identity. Saving is asynchronous and atomic: a killed process leaves the previous checkpoint whole.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from effjax.core.tree import leaf_paths

PyTree = Any

FORMAT = 2


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

    def __init__(self, directory: Path, identity: dict, *, keep: int = 2, best_metric: str | None = None):
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

        self._ocp = ocp
        self.directory = Path(directory).absolute()
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
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                cleanup_tmp_directories=True,
            ),
        )

    def save(self, step: int, state: PyTree, extra: dict, metrics: dict[str, float] | None = None) -> None:
        """Start writing checkpoint ``step``; returns when the state has been copied off the device."""
        args = self._ocp.args
        meta = {
            "format": FORMAT,
            "identity": self.identity,
            "layout": layout(state),
            "checksums": checksums(state),
            "extra": extra,
        }
        self._manager.save(
            step,
            args=args.Composite(state=args.StandardSave(state), meta=args.JsonSave(meta)),
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

    def _read(self, step: int, where: Path) -> dict:
        args = self._ocp.args
        try:
            return self._manager.restore(step, args=args.Composite(meta=args.JsonRestore()))["meta"]
        except Exception as error:
            raise CheckpointError(_damaged(where, error)) from error

    def reached_preemption(self, step: int) -> bool:
        """Whether the cluster has announced a preemption; agreed between all processes."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Block until everything begun has been written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and release the folder."""
        self._manager.close()


def _damaged(where: Path, why: Any) -> str:
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
            continue
        raw = jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        sums[name] = zlib.crc32(np.ascontiguousarray(np.asarray(raw)).view(np.uint8).data if raw.size else b"")
    return sums


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
