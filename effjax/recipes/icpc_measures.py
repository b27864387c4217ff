"""What is measured of a model that answers at several levels: images of some sizes, texts of some lengths."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

from effjax.recipes.spec import CurveText
from effjax.tasks.task import Metric
from effjax.train.program import Curve
from effjax.transformers.level_calibration import level_thresholds, stop_levels
from effjax.transformers.level_cascade import evaluated_cost

METRIC = Metric("accuracy", "max", "test accuracy")
CURVES = {"sizes": CurveText("Accuracy by size", "tokens, share of the full size's", "test accuracy")}


def check_held_out(config: Any, rows: int) -> None:
    """Refuse, before anything is trained, fewer test rows than the threshold's guarantee needs.

    Args:
      config: of the study: ``loss`` and ``certify``.
      rows: test rows, of which every other one is held out for the threshold.
    """
    held = (rows + 1) // 2
    try:
        level_thresholds(np.ones((held, 2)), np.zeros((held, 2), bool), loss=config.loss, method=config.certify)
    except ValueError:
        raise ValueError(
            f"certify={config.certify!r}: {rows} test rows are too few for loss={config.loss:g} (half of them find the "
            "threshold). Give more test rows, a larger loss, or certify='search', which guarantees nothing."
        ) from None


def level_measures(
    config: Any, logits: np.ndarray, labels: np.ndarray, tokens: Sequence[float], names: Sequence[str]
) -> dict[str, Any]:
    """Accuracy at every level, and of the cascade of the smallest and the largest.

    Args:
      config: of the study: ``loss`` and ``certify``.
      logits: [rows, levels, classes].
      labels: [rows].
      tokens: of each level.
      names: of the levels.
    """
    hit = logits.argmax(-1) == labels[:, None]
    accuracy = hit.mean(0)
    return {
        "accuracy": float(accuracy[-1]),
        "small": float(accuracy[0]),
        "spread": float(accuracy.max() - accuracy.min()),
        **{f"accuracy_{name}": float(value) for name, value in zip(names, accuracy, strict=True)},
        **_cascaded(config, logits[:, [0, -1]], hit[:, [0, -1]], (tokens[0], tokens[-1])),
        "sizes": Curve([count / tokens[-1] for count in tokens], accuracy.tolist()),
    }


def _cascaded(config: Any, logits: np.ndarray, hit: np.ndarray, tokens: tuple[float, float]) -> dict[str, float]:
    """Threshold from the even rows, measures on the odd ones.

    ``cascade_harm`` is what all rows lose that the small size gets wrong and the full one right: what the threshold
    has to keep from stopping. ``cascade_least`` is the cost if it stopped all others.
    """
    confidence = special.softmax(logits.astype(np.float64), -1).max(-1)
    held, rest = slice(0, None, 2), slice(1, None, 2)
    found = level_thresholds(confidence[held], ~hit[held], loss=config.loss, method=config.certify)
    stop = stop_levels(confidence[rest], found.values)
    accuracy = np.take_along_axis(hit[rest], stop[:, None], 1).mean()
    harm = float((~hit[rest][:, 0] & hit[rest][:, -1]).mean())
    return {
        "cascade_accuracy": float(accuracy),
        "cascade_loss": float(hit[rest][:, -1].mean() - accuracy),
        "cascade_cost": float(evaluated_cost(stop, tokens).mean() / tokens[-1]),
        "cascade_harm": harm,
        "cascade_least": tokens[0] / tokens[-1] + harm,
        "threshold": min(found.values[0], 1.0),
    }
