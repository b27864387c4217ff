"""Pruning to a stated cost: the least loss, by greedy choice and by beam; costs that are counted and measured."""

import itertools

import numpy as np
import pytest

from effjax.models.bert import Bert
from effjax.transformers.block_costs import BlockCosts, latency_of_blocks, macs_of_blocks
from effjax.transformers.cost_search import prune_to_cost
from effjax.transformers.gated import Scores
from effjax.transformers.prune_spec import PruneShape, PruneSpec

SHAPE = PruneShape(2, 3, 2, hidden_size=4, head_width=2, kv_width=2, group_size=3)
LINEAR = BlockCosts((0.0, 1.0, 2.0, 3.0), (0.0, 1.0, 2.0), 5.0)


def additive(rises, blocks=9.0):
    """A loss that every part which is gone raises by its own amount; whole blocks are dear."""

    def evaluate(gates):
        gone = ((1 - gates.heads) * rises[:, :3]).sum() + ((1 - gates.groups) * rises[:, 3:]).sum()
        return np.array([1.0 + gone + blocks * ((1 - gates.attention).sum() + (1 - gates.mlp).sum())])

    return evaluate


@pytest.mark.parametrize("tries", [1, 3])
def test_of_parts_that_cost_alike_those_of_the_least_loss_go(tries):
    rises = np.random.default_rng(0).random((2, 5))
    for count in range(1, 6):
        found = prune_to_cost(additive(rises), SHAPE, LINEAR, target=15.0 - count, tries=tries)
        least = min(map(sum, itertools.combinations(rises.ravel(), count)))
        assert found.base_cost == 15.0
        assert found.cost == 15.0 - count == LINEAR.of(found.spec)
        np.testing.assert_allclose([found.base_loss, found.loss], [1.0, 1.0 + least], rtol=1e-12)


def test_stale_rises_are_measured_again():
    """Of two heads that stand in for each other either costs nothing, both cost much."""

    def evaluate(gates):
        kept = gates.attention[:, None] * gates.heads
        second = 0.1 * (1 - kept[1]).sum() + 0.1 * (1 - gates.mlp[:, None] * gates.groups).sum()
        return np.array([1.0 + second + 0.1 * (1 - kept[0, 2]) + 5.0 * (kept[0, 0] + kept[0, 1] == 0)])

    found = prune_to_cost(evaluate, SHAPE, LINEAR, target=12.0)
    assert len({(0, 0), (0, 1)} & set(found.spec.heads)) == 1
    np.testing.assert_allclose(found.loss, 1.2, rtol=1e-6)
    assert found.tests <= 1 + 14 + 3 * 4  # the whole, each alone, four for each that goes


def test_a_block_saves_what_is_left_of_it():
    """Two of its heads went for nothing, so that the block is worth one head, and a group costs less."""

    def evaluate(gates):
        heads = 0.4 * (1 - gates.heads[0, 2]) * gates.attention[0] + 0.45 * (1 - gates.attention[0])
        return np.array([1.0 + heads + 0.3 * (1 - gates.groups[0]).sum() + 2.0 * (1 - gates.mlp[0])])

    shape, costs = PruneShape(1, 3, 2), BlockCosts((0.0, 1.0, 2.0, 3.0), (0.0, 1.0, 2.0))
    found = prune_to_cost(evaluate, shape, costs, target=2.0, tries=1)
    assert (found.spec.attention, found.spec.heads, len(found.spec.groups)) == ((), ((0, 0), (0, 1)), 1)


def test_a_beam_finds_pairs_that_greedy_search_passes_by():
    """The second head alone hurts least; without both others, which only help each other, the loss does not rise."""
    losses = {(): 1.0, (0,): 1.3, (2,): 1.3, (1,): 1.2, (0, 2): 1.0, (0, 1): 1.9, (1, 2): 1.9}

    def evaluate(gates):
        blocks = 9.0 * (2 - gates.attention[0] - gates.mlp[0] * gates.groups[0, 0])
        return np.array([losses.get(tuple(np.flatnonzero(gates.heads[0] == 0).tolist()), 3.0) + blocks])

    shape, costs = PruneShape(1, 3, 1), BlockCosts((0.0, 1.0, 2.0, 3.0), (0.0, 1.0))
    greedy, beam = (prune_to_cost(evaluate, shape, costs, target=2.0, beam=beam) for beam in (1, 3))
    np.testing.assert_allclose((greedy.loss, beam.loss), (1.9, 1.0), rtol=1e-6)
    assert beam.spec.heads == ((0, 0), (0, 2))
    assert beam.tests > greedy.tests


def test_costs_that_fall_in_steps_are_reached():
    """On a TPU one head less may save nothing; the heads of a whole tile do."""
    tiles = BlockCosts((0.0, 4.0, 4.0, 6.0), (0.0, 5.0, 5.0))
    shape = PruneShape(1, 3, 2)
    rises = np.array([[0.1, 0.2, 0.9, 0.9, 0.9]])
    found = prune_to_cost(additive(rises), shape, tiles, target=9.0)
    assert (found.spec.heads, found.cost) == (((0, 0),), 9.0)
    found = prune_to_cost(additive(rises), shape, tiles, target=5.0)
    assert found.cost <= 5.0


def test_what_helps_goes_first_and_nan_never():
    rises = np.full((2, 5), 0.5)
    rises[1, 4] = -0.3

    def evaluate(gates):
        if gates.heads[0, 0] == 0 or gates.attention[0] == 0:
            return Scores(np.array([np.nan]))
        return Scores(additive(rises)(gates))

    found = prune_to_cost(evaluate, SHAPE, LINEAR, target=13.0)
    assert (1, 1) in found.spec.groups
    assert (0, 0) not in found.spec.heads
    np.testing.assert_allclose(found.loss, 1.2)


def test_counted_costs_are_the_closed_forms():
    """Of a token: 4 D dh and 2 T dh of a head, 2 D G of a group."""
    costs = macs_of_blocks(SHAPE, 7)
    np.testing.assert_allclose(np.diff(costs.attention), 4 * 4 * 2 + 2 * 7 * 2)
    np.testing.assert_allclose(np.diff(costs.mlp), 2 * 4 * 3)
    spec = PruneSpec(SHAPE, attention=(0,), mlp=(1,), heads=((1, 0),), groups=((0, 1),))
    assert costs.of(spec) == 2 * (32 + 28) + 24
    assert costs.of(spec) / costs.of(PruneSpec(SHAPE)) == pytest.approx(spec.kept_macs(7))


@pytest.mark.slow
@pytest.mark.optimized
def test_measured_costs_rise_with_what_is_left():
    module = Bert(30, 256, num_layers=4, num_heads=4, intermediate_size=1024)
    costs = latency_of_blocks(module, rows=16, length=64, group_size=256)
    assert costs.attention[4] > 1.3 * costs.attention[1] > 0
    assert costs.mlp[4] > 2 * costs.mlp[1] > 0
    assert 0 < costs.rest < costs.mlp[4]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": 15.0}, "target=15 must be at least 5, .* below 15"),
        ({"target": 4.9}, "must be at least 5"),
        ({"target": float("nan")}, "target=nan"),
        ({"beam": 0}, "beam=0"),
        ({"tries": 0}, "tries=0"),
        ({"costs": BlockCosts((0.0, 1.0), (0.0, 1.0, 2.0))}, r"costs\.attention holds 2 numbers .* 4 are needed"),
        ({"costs": BlockCosts((0.0, 1.0, 2.0, 3.0), (0.0, -1.0, 2.0))}, r"costs\.mlp holds 3 numbers from -1 on"),
        ({"evaluate": lambda gates: np.array([np.nan])}, "whole model's loss is inf"),
    ],
)
def test_refuse(changes, words):
    given = {"evaluate": lambda gates: np.ones(1), "shape": SHAPE, "costs": LINEAR, "target": 10.0} | changes
    with pytest.raises(ValueError, match=words):
        prune_to_cost(**given)
