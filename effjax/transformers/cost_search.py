"""Pruning to a stated cost, beyond the paper: the least loss at so many milliseconds or multiply-accumulates."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from effjax.core.errors import check_number
from effjax.models.pruned import Gates
from effjax.transformers.axformer_rules import loss_weights
from effjax.transformers.block_costs import BlockCosts
from effjax.transformers.evaluator import GatedEvaluator
from effjax.transformers.gated import Scores
from effjax.transformers.prune_spec import Element, Kind, PruneShape, PruneSpec

__all__ = ["PrunedToCost", "prune_to_cost"]


class PrunedToCost(NamedTuple):
    """What ``prune_to_cost`` found.

    Attributes:
      spec: the removed elements.
      loss: of the pruned model.
      cost: of the pruned model.
      base_loss: of the whole model.
      base_cost: of the whole model.
      tests: models that were scored.
    """

    spec: PruneSpec
    loss: float
    cost: float
    base_loss: float
    base_cost: float
    tests: int


class _Choice(NamedTuple):
    """A pruned model of the beam; ``rises``: of the loss by each element, as far back as it was last measured."""

    spec: PruneSpec
    loss: float
    rises: dict[Element, float]


def prune_to_cost(
    evaluate: GatedEvaluator | Callable[[Gates], Any],
    shape: PruneShape,
    costs: BlockCosts,
    *,
    target: float,
    beam: int = 1,
    tries: int = 4,
    loss_batch: int | None = None,
) -> PrunedToCost:
    r"""Remove what raises the loss least for what it saves, until the model costs at most ``target``.

    Every element is scored alone first. Then, of the elements e that are left, the ``tries`` with the smallest

    .. math:: \frac{\ell(S \cup e) - \ell(S)}{\mathrm{saved}(e)}

    by their last known rise are scored again, and the best one goes: of lazily updated rises only those that could
    win are looked at. A block saves what it costs now, a head or a group its equal share of a whole block, so that
    costs which fall in steps of several heads (the tiles of a TPU) do not stop the search; ``target`` is compared with
    the true cost. A rise is negative where a removal helps: such elements go first.

    Args:
      evaluate: as for ``axformer``.
      shape: the model's elements.
      costs: of blocks of every size: of ``macs_of_blocks``, or measured by ``latency_of_blocks``.
      target: the most that the model may cost, in the unit of ``costs``.
      beam: models that are followed side by side: of all that are scored, those with the smallest rise of the loss for
        what is saved. 1 is greedy.
      tries: elements of a model that are scored before one is chosen.
      loss_batch: as for ``AxformerConfig``; None for the mean over samples.

    Returns:
      A ``PrunedToCost``: of the models that reach the target, the one of the least loss.

    Raises:
      ValueError: costs of another shape, a target that needs nothing or cannot be reached, or bad losses.

    Example:
      >>> def evaluate(gates):  # the second head is needed least
      ...     heads = gates.attention[0] * (gates.heads[0, 0] + 0.1 * gates.heads[0, 1])
      ...     return np.array([4.0 - heads - gates.mlp[0] * gates.groups[0, 0]])
      >>> costs = BlockCosts(attention=(0.0, 1.0, 2.0), mlp=(0.0, 2.0))
      >>> found = prune_to_cost(evaluate, PruneShape(layers=1, heads=2, groups=1), costs, target=3.0)
      >>> found.spec.heads, round(found.loss, 6), found.cost
      (((0, 1),), 2.0, 3.0)

    No search of this kind is in the AxFormer papers that we read. Lazy updates are those of Minoux 1978.
    """
    check_number("beam", beam, low=1, integer=True)
    check_number("tries", tries, low=1, integer=True)
    _check_costs(shape, costs, target)
    scored = _Scored(evaluate, loss_batch)
    whole = PruneSpec(shape)
    first: Any = evaluate.keep if isinstance(evaluate, GatedEvaluator) else evaluate
    base = scored.loss(first(whole.gates()))
    if not np.isfinite(base):
        raise ValueError(f"the whole model's loss is {base}: nothing can be compared with it. Repair the model.")
    alone = {element: scored(whole.adding(element)) - base for element in _left(whole)}
    live, ended = [_Choice(whole, base, alone)], []
    base_cost = costs.of(whole)
    slope = lambda choice: (choice.loss - base) / max(base_cost - costs.of(choice.spec), 1e-9 * base_cost)
    while live:
        children: dict[PruneSpec, _Choice] = {}
        for choice in live:
            for child in _children(choice, costs, tries, scored):
                children.setdefault(child.spec, child)
        live = sorted(children.values(), key=slope)[:beam]
        ended += [choice for choice in live if costs.of(choice.spec) <= target]
        live = [choice for choice in live if costs.of(choice.spec) > target]
    best = min(ended, key=lambda choice: choice.loss)
    return PrunedToCost(best.spec, best.loss, costs.of(best.spec), base, base_cost, scored.tests)


class _Scored:
    """Losses of specs, and how many were asked for."""

    def __init__(self, evaluate: Any, batch: int | None):
        self._evaluate, self._batch, self.tests = evaluate, batch, 0

    def __call__(self, spec: PruneSpec) -> float:
        return self.loss(self._evaluate(spec.gates()))

    def loss(self, found: Any) -> float:
        """Of scores or losses; infinite where one is NaN."""
        self.tests += 1
        losses = np.asarray(found.losses if isinstance(found, Scores) else found, np.float64)
        value = float(loss_weights(losses.size, self._batch) @ losses)
        return np.inf if np.isnan(value) else value


def _children(choice: _Choice, costs: BlockCosts, tries: int, scored: _Scored) -> Iterator[_Choice]:
    """The choice without one element more, for each of the elements that promise most."""
    saved = {element: _saved(choice.spec, element, costs) for element in _left(choice.spec)}
    order = sorted(saved, key=lambda element: choice.rises[element] / max(saved[element], 1e-12))
    rises, specs = dict(choice.rises), {}
    for element in order[:tries]:
        specs[element] = choice.spec.adding(element)
        rises[element] = scored(specs[element]) - choice.loss
    for element, spec in specs.items():
        yield _Choice(spec, choice.loss + rises[element], rises)


def _left(spec: PruneSpec) -> list[Element]:
    """What can still be removed, the last layer first."""
    found = []
    kinds: tuple[tuple[Kind, Kind, tuple, tuple, int], ...] = (
        ("mlp", "group", spec.mlp, spec.groups, spec.shape.groups),
        ("attention", "head", spec.attention, spec.heads, spec.shape.heads),
    )
    for layer in reversed(range(spec.shape.layers)):
        for block, fine, blocks, parts, count in kinds:
            if layer not in blocks:
                found.append(Element(block, layer))
                found += [Element(fine, layer, index) for index in range(count) if (layer, index) not in parts]
    return found


def _saved(spec: PruneSpec, element: Element, costs: BlockCosts) -> float:
    attention = element.kind in ("attention", "head")
    table = costs.attention if attention else costs.mlp
    if element.index >= 0:
        return (table[-1] - table[0]) / (len(table) - 1)
    gone = spec.heads if attention else spec.groups
    return table[len(table) - 1 - sum(layer == element.layer for layer, _ in gone)]


def _check_costs(shape: PruneShape, costs: BlockCosts, target: float) -> None:
    for name, table, count in (("attention", costs.attention, shape.heads), ("mlp", costs.mlp, shape.groups)):
        if len(table) != count + 1 or not np.isfinite(table).all() or min(table) < 0:
            raise ValueError(
                f"costs.{name} holds {len(table)} numbers from {min(table, default=np.nan):g} on; {count + 1} are "
                f"needed, of 0 to {count} parts, finite and 0 or more."
            )
    whole, least = costs.of(PruneSpec(shape)), costs.rest
    if not least <= target < whole:
        raise ValueError(
            f"target={target:g} must be at least {least:g}, what cannot be pruned costs, and below {whole:g}, what the "
            "whole model costs."
        )
