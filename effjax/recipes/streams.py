"""Test images as a stream whose labels are seen only where nothing is answered, for the selective study."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from effjax.hardness.confidence import confidence_score
from effjax.hardness.online import VueConfig, threshold_experts, vue, vue_regret
from effjax.recipes.spec import CurveText
from effjax.train.program import Curve

THRESHOLDS = np.linspace(0.2, 0.95, 20, dtype=np.float32)
"""Of the largest probability: the experts of one network, as in the paper's program."""
DRAWS = 20
_X = "tolerated rate of observed mistakes"
STREAM_CURVES = {
    "stream_mistakes": CurveText("Online: mistakes", _X, "mistakes per 1,000 images"),
    "stream_abstentions": CurveText("Online: abstentions", _X, "abstentions per 1,000 images"),
    "stream_excess": CurveText("Online: regret", _X, "abstentions beyond the best, per 1,000"),
}


def stream_measures(logits: np.ndarray, labels: np.ndarray, rounds: int, tolerances: Sequence[float]) -> dict[str, Any]:
    """How ``vue`` does on a stream, with 20 thresholds of one network as experts: means over 20 draws.

    Args:
      logits: of the test images, [rows, classes].
      labels: of the test images; -1 where unknown, which are not played.
      rounds: images played, in one fixed random order.
      tolerances: of ``VueConfig``, ascending.

    Returns:
      Curves over the tolerances, per 1,000 images: mistakes, abstentions, and the abstentions beyond the fewest that
      one threshold needs, in hindsight, for no more mistakes. The last is over the draws that have such a threshold,
      and NaN where none has; ``stream_rivals`` is their share over all tolerances.
    """
    order = np.random.default_rng(0).permutation(check_rounds(rounds, labels))[:rounds]
    confidence = confidence_score(logits[order], "max_probability")
    predictions = np.asarray(threshold_experts(confidence[None], logits[order].argmax(1)[None], THRESHOLDS))
    right = np.asarray(labels)[order]
    names = ("mistakes", "abstentions", "excess_abstentions")
    columns: dict[str, list[float]] = {name: [] for name in (*names, "rivals")}
    for tolerance in tolerances:
        actions = np.asarray(_play(predictions.astype(np.int32), right, VueConfig(tolerance=float(tolerance))))
        found = [vue_regret(predictions, right, row) for row in actions]
        values = {name: np.array([getattr(one, name) for one in found], float) for name in names}
        rivals = np.isfinite(values["excess_abstentions"])
        for name in names:
            held = values[name][rivals] if name == "excess_abstentions" else values[name]
            columns[name].append(1000 * float(held.mean()) / rounds if len(held) else float("nan"))
        columns["rivals"].append(float(rivals.mean()))
    curves = {name: Curve(list(tolerances), columns[of]) for name, of in zip(STREAM_CURVES, names, strict=True)}
    return {**curves, "stream_rivals": float(np.mean(columns["rivals"]))}


def check_rounds(rounds: int, labels: np.ndarray) -> np.ndarray:
    """Which images have a label; refused where they are too few to be played."""
    known = np.flatnonzero(np.asarray(labels) >= 0)
    if rounds > len(known):
        raise ValueError(f"stream_rounds={rounds}, but {len(known)} test images have a label. Play fewer.")
    return known


@functools.partial(jax.jit, static_argnames="config")
def _play(predictions: jax.Array, labels: jax.Array, config: VueConfig) -> jax.Array:
    keys = jax.random.split(jax.random.key(0), DRAWS)
    return jax.vmap(lambda key: vue(key, predictions, labels, config)[1].action)(keys)
