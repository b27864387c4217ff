"""What goes, by the arms of the AxFormer study: from a fine-tuned model to a ``PruneSpec`` and parameters."""

from typing import Any

import jax
import numpy as np

from effjax.recipes.axformer_arms import Fitted
from effjax.transformers.axformer_rules import AxformerConfig
from effjax.transformers.block_costs import macs_of_blocks
from effjax.transformers.cost_search import prune_to_cost
from effjax.transformers.fisher import fisher_spec, gate_fisher
from effjax.transformers.gated import gated_apply
from effjax.transformers.prune_rivals import magnitude_scores, random_spec, ranked_spec
from effjax.transformers.prune_spec import PruneShape, PruneSpec
from effjax.transformers.repair import repair_outputs


def searched(fitted: Fitted, **rules: Any) -> tuple[PruneSpec, Any]:
    """AxFormer's search, without hard attention, which is not in the weights and saves nothing, unless it is asked."""
    chosen: dict[str, Any] = {"hard": False, "loss_batch": fitted.config.search_batch, **rules}
    config = AxformerConfig(**chosen)
    return fitted.loaded.search(fitted.seed, config), fitted.params


def loose(fitted: Fitted) -> tuple[PruneSpec, Any]:
    """The search whose sizes the rivals have."""
    return searched(fitted, agreement=fitted.config.loose_agreement)


def to_target(fitted: Fitted) -> tuple[PruneSpec, Any]:
    """The search to a stated share of the multiply-accumulates."""
    loaded, config = fitted.loaded, fitted.config
    costs = macs_of_blocks(loaded.shape, loaded.length)
    target = config.cost_target * costs.of(PruneSpec(loaded.shape))
    found = prune_to_cost(loaded.evaluator(fitted.seed), loaded.shape, costs, target=target, beam=config.beam)
    return found.spec, fitted.params


def at_random(fitted: Fitted) -> tuple[PruneSpec, Any]:
    """As many elements at random."""
    return random_spec(fitted.key, loose(fitted)[0]), fitted.params


def by_magnitude(fitted: Fitted) -> tuple[PruneSpec, Any]:
    """As many elements of the smallest weights."""
    scores = magnitude_scores(fitted.module, fitted.params, group_size=fitted.config.group_size)
    return ranked_spec(scores, loose(fitted)[0]), fitted.params


def by_fisher(fitted: Fitted) -> tuple[PruneSpec, Any]:
    """As many multiply-accumulates, by Fisher information."""
    loaded, found = fitted.loaded, loose(fitted)[0]
    share = found.kept_macs(loaded.length)
    if share >= 1 or share <= 0:
        return PruneSpec(loaded.shape) if share >= 1 else found, fitted.params
    fisher = gate_fisher(gated_apply(fitted.module), fitted.params, loaded.shape, loaded.held)
    return fisher_spec(fisher, loaded.shape, macs=share, length=loaded.length), fitted.params


def repaired(fitted: Fitted) -> tuple[PruneSpec, Any]:
    """The same, the output layers refitted."""
    spec, params = by_fisher(fitted)
    return spec, repair_outputs(fitted.module, params, spec, fitted.loaded.held, ridge=fitted.config.ridge)


def fewer_layers(fitted: Fitted) -> tuple[PruneSpec, Any]:
    """As many multiply-accumulates in fewer and narrower layers, of the model as it was before it was fine-tuned."""
    loaded = fitted.loaded
    fresh = fitted.params if loaded.tuned else loaded.task.init(jax.random.split(fitted.key)[0])["params"]
    return static_spec(loaded.shape, loose(fitted)[0].kept_macs(loaded.length), loaded.length), fresh


def static_spec(shape: PruneShape, macs: float, length: int) -> PruneSpec:
    """Evenly spaced layers, the first among them, each without as many groups as a share of the operations asks for.

    Example:
      >>> shape = PruneShape(4, 2, 4, hidden_size=8, head_width=4, kv_width=4, group_size=8)
      >>> spec = static_spec(shape, 0.45, length=1)
      >>> spec.mlp, spec.removed["groups"], spec.kept_macs(1) <= 0.45
      ((1, 3), 2, True)
    """
    count = max(1, int(np.ceil(macs * shape.layers - 1e-9)))
    kept = np.unique(np.arange(count) * shape.layers // count).tolist()
    gone = tuple(layer for layer in range(shape.layers) if layer not in kept)

    def without(removed: int) -> PruneSpec:
        groups = tuple((layer, index) for layer in kept for index in range(shape.groups - removed, shape.groups))
        return PruneSpec(shape, attention=gone, mlp=gone, groups=groups)

    specs = (without(removed) for removed in range(shape.groups))
    return next((spec for spec in specs if spec.kept_macs(length) <= macs + 1e-9), without(shape.groups))
