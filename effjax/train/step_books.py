"""The books of a run: what its steps measured, summed on the host."""

from collections import deque
from collections.abc import Mapping

import jax
import numpy as np

from effjax.train.logging import JsonlLog
from effjax.train.options import TrainOptions

__all__: list[str] = []


class Books:
    """Running sums of the step metrics, read from the device a few steps late."""

    def __init__(self, options: TrainOptions, log: JsonlLog | None, saved: dict | None):
        self._options, self._log = options, log
        self._pending: deque = deque()
        saved = saved or {}
        self._sums = dict(saved.get("sums", {}))
        self._count = saved.get("count", 0)
        self._window = dict(saved.get("window", {}))
        self._window_count = saved.get("window_count", 0)
        self.skipped = saved.get("skipped", 0)
        self.last_finite = saved.get("last_finite", 0)
        self.curve: list[dict[str, float]] = list(saved.get("curve", ()))
        self.last: dict[str, float] = {}

    def push(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        self._pending.append((step, metrics))

    def read(self, lag: int) -> int | None:
        """Read all but the newest ``lag`` steps; return the first one that was not finite, if any."""
        ready = [self._pending.popleft() for _ in range(max(0, len(self._pending) - lag))]
        first_bad = None
        for (step, _), metrics in zip(ready, jax.device_get([metrics for _, metrics in ready]), strict=True):
            bad = self._add(step, {name: float(value) for name, value in metrics.items()})
            if bad and first_bad is None:
                first_bad = step
                if self._options.nonfinite == "stop":
                    break
        return first_bad

    def _add(self, step: int, metrics: dict[str, float]) -> bool:
        skipped = bool(metrics.pop("skipped", False))
        self.last = metrics
        if skipped or not np.isfinite(metrics["loss"]):
            self.skipped += skipped
            if skipped and self._log is not None:
                self._log.write(step=step, skipped=self.skipped, **metrics)
            return True
        self.last_finite = step
        self._count += 1
        self._window_count += 1
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._window[name] = self._window.get(name, 0.0) + value
        if step % self._options.log_steps == 0:
            self.end_window(step)
        return False

    def end_window(self, step: int) -> None:
        if self._window_count and self._log is not None:
            self._log.write(step=step, **{name: total / self._window_count for name, total in self._window.items()})
        self._window, self._window_count = {}, 0

    def means(self) -> dict[str, float]:
        return {name: total / self._count for name, total in self._sums.items()}

    def snapshot(self) -> dict:
        """Copies, as the checkpoint is written while the run goes on."""
        return {
            "sums": dict(self._sums),
            "count": self._count,
            "window": dict(self._window),
            "window_count": self._window_count,
            "skipped": self.skipped,
            "last_finite": self.last_finite,
            "curve": list(self.curve),
        }
