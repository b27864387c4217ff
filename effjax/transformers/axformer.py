"""AxFormer: a fine-tuned transformer loses what its validation loss does not miss, one element after another."""

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from effjax.core.errors import check_number
from effjax.models.pruned import Gates
from effjax.transformers.axformer_rules import (
    FINE,
    AxformerConfig,
    AxformerState,
    Trial,
    axformer_init,
    axformer_next,
    loss_bound,
    loss_weights,
)
from effjax.transformers.evaluator import GatedEvaluator
from effjax.transformers.gated import Scores
from effjax.transformers.prune_spec import PruneShape, PruneSpec

__all__ = ["AxformerResult", "axformer", "axformer_report"]


class AxformerResult(NamedTuple):
    """What a search found.

    Attributes:
      spec: the removed elements and the layers with hard attention.
      trace: all tests, in order.
      base: scores of the unpruned model.
      final: scores of the pruned one.
      base_loss: of the unpruned model.
      loss: of the pruned one.
    """

    spec: PruneSpec
    trace: tuple[Trial, ...]
    base: Scores
    final: Scores
    base_loss: float
    loss: float


def axformer(
    evaluate: GatedEvaluator | Callable[[Gates], Any],
    shape: PruneShape,
    *,
    config: AxformerConfig | None = None,
    speculate: int = 1,
    abort: bool = False,
    progress: Callable[[AxformerState], Any] | None = None,
) -> AxformerResult:
    """Search what a fine-tuned model can do without: ``axformer_init`` and ``axformer_next`` in a loop.

    At most 1 + layers (3 + heads + groups) evaluations, and one more that fills the store of a ``GatedEvaluator``.
    No gradients and no training. The search fits the set it reads: report results on other rows.

    Args:
      evaluate: a ``GatedEvaluator``, or your own ``gates -> losses`` ([rows], 0 or more) or ``gates -> Scores``.
      shape: the model's elements, of ``prune_shape``.
      config: rules; the defaults are the authors'.
      speculate: candidates that are scored ahead, as if each were rejected: the device does not wait for the decision,
        and what follows an accepted one is scored again. The result is the same. Needs a ``GatedEvaluator``.
      abort: stop scoring a candidate once its loss is certain to be rejected: the decisions are the same, the losses
        in the trace are then those of a part. Needs a ``GatedEvaluator``, and losses of 0 or more.
      progress: called with the state after every test.

    Returns:
      An ``AxformerResult``.

    Raises:
      ValueError: settings that do not go together, another ``top_k`` than the evaluator's, or bad losses.

    Example:
      >>> def evaluate(gates):  # the second head of the only layer hurts
      ...     return np.array([0.5, 0.7]) + 0.1 * gates.heads[0, 1] + (1 - gates.attention[0]) + (1 - gates.mlp[0])
      >>> found = axformer(evaluate, PruneShape(1, 2, 1), config=AxformerConfig(descend=4.0))
      >>> found.spec.heads, [trial.element.kind for trial in found.trace]
      (((0, 1),), ['hard', 'mlp', 'group', 'attention', 'head', 'head'])

    Reference: Nagarajan, Sen, Stevens, Raghunathan 2022, "AxFormer: Accuracy-driven Approximation of Transformers for
    Faster, Smaller and more Accurate NLP Models" (arXiv 2010.03688), as its code does it: that masks, here
    ``slice_model`` removes. ``tolerance``, ``counted_above``, budgets, significance and the guard against collapse are
    ours.
    """
    check_number("speculate", speculate, low=1, integer=True)
    state = axformer_init(shape, config)
    _check_search(evaluate, state.config, speculate, abort)
    gated = isinstance(evaluate, GatedEvaluator)
    first: Any = evaluate.keep if isinstance(evaluate, GatedEvaluator) else evaluate
    state = axformer_next(state, _scores(first(state.spec.gates())))
    base_loss, final, stored = state.best, state.base, state.spec
    while not state.done:
        if gated and state.pending[0].kind != "hard" and state.spec != stored and not state.spec.removed_any:
            first(state.spec.gates())  # hard attention is settled in all layers
            stored = state.spec
        for scores in _scored(evaluate, state, speculate, abort):
            state = axformer_next(state, scores)
            if progress is not None:
                progress(state)
            if state.trace[-1].accepted:
                final = scores
                break
    return AxformerResult(state.spec, state.trace, state.base, final, base_loss, state.best)


def _scored(evaluate: Any, state: AxformerState, speculate: int, abort: bool) -> Iterator[Scores]:
    """Scores of the next candidates, for as long as they are rejected."""
    if not isinstance(evaluate, GatedEvaluator):
        yield _scores(evaluate(state.candidate.gates()))
    elif abort:
        factor = state.config.descend if state.pending[0].kind in FINE else 1.0
        weights = loss_weights(state.losses.size, state.config.loss_batch)
        yield evaluate(state.candidate.gates(), weights=weights, bound=factor * loss_bound(state))
    else:
        started = [evaluate.submit(candidate.gates()) for candidate in state.upcoming(speculate)]
        for results in started:
            yield evaluate.collect(results)


def _scores(found: Any) -> Scores:
    return found if isinstance(found, Scores) else Scores(found)


def _check_search(evaluate: Any, config: AxformerConfig, speculate: int, abort: bool) -> None:
    if not isinstance(evaluate, GatedEvaluator):
        if abort or speculate > 1:
            raise ValueError(
                f"abort={abort} and speculate={speculate} need a GatedEvaluator, but evaluate is "
                f"{type(evaluate).__name__}. Leave them out, or give GatedEvaluator(apply, params, batches)."
            )
        return
    if abort and speculate > 1:
        raise ValueError(f"abort=True waits for every batch, speculate={speculate} for none. Choose one.")
    if evaluate.top_k not in (None, config.top_k):
        raise ValueError(f"top_k={config.top_k}, but the evaluator's is {evaluate.top_k}. Give both the same.")


def axformer_report(result: AxformerResult, labels: Sequence[int] | np.ndarray | None = None) -> str:
    """What was tested, accepted, and rejected by which rule, as lines of text.

    Args:
      result: of ``axformer``.
      labels: [rows] of the validation set: accuracies too, and that of always the most frequent class.

    Returns:
      A few lines.

    Raises:
      ValueError: labels of another number, or a result without predicted classes.

    Example:
      >>> found = axformer(lambda gates: np.ones(2) * gates.mlp[0], PruneShape(1, 1, 1))
      >>> print(axformer_report(found))
      3 tests, 1 accepted; rejected by loss 2
      removed: 1 mlp
      validation loss 1.0000 -> 0.0000
    """
    rejected = [trial for trial in result.trace if not trial.accepted]
    rules = collections.Counter(" and ".join(trial.failed) for trial in rejected)
    by = "".join(f"; rejected by {rule} {count}" for rule, count in sorted(rules.items()))
    removed = ", ".join(f"{count} {name}" for name, count in result.spec.removed.items() if count)
    lines = [
        f"{len(result.trace)} tests, {len(result.trace) - len(rejected)} accepted{by}",
        f"removed: {removed or 'nothing'}",
        f"validation loss {result.base_loss:.4f} -> {result.loss:.4f}",
    ]
    if labels is not None:
        lines.append(_accuracies(result, np.asarray(labels)))
    return "\n".join(lines)


def _accuracies(result: AxformerResult, labels: np.ndarray) -> str:
    if result.base.predicted is None or labels.shape != np.shape(result.base.predicted):
        held = None if result.base.predicted is None else np.shape(result.base.predicted)
        raise ValueError(
            f"labels have shape {labels.shape}, but predicted classes {held}. Give the known rows' labels."
        )
    before, after = (float((scores.predicted == labels).mean()) for scores in (result.base, result.final))
    most = np.unique(labels, return_counts=True)[1].max() / len(labels)
    return f"validation accuracy {before:.4f} -> {after:.4f}; always the most frequent class: {most:.4f}"
