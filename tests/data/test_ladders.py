"""The cheapest ladder against every other one, and the costs that two measured steps have."""

import itertools

import numpy as np
import pytest

from effjax.data.bucket_sampler import BucketSampler
from effjax.data.ladders import cheapest_ladder
from effjax.data.ragged import Ragged
from effjax.data.step_costs import StepCosts, fit_step_costs

COSTS = StepCosts(compile_s=2.0, token_s=1e-3, step_s=0.02)


def run_seconds(lengths, boundaries, costs, caps, tokens):
    """Compiling and training by the formulas of the documentation."""
    shapes, trained = set(), 0.0
    for cap, (low, high) in itertools.product(caps, itertools.pairwise((-1, *boundaries))):
        rows = min(cap, tokens // high)
        shapes.add((rows, high))
        each = costs.step_s + rows * high * costs.token_s + rows * high**2 * costs.pair_s
        trained += np.sum((lengths > low) & (lengths <= high)) / rows * each
    return costs.compile_s * max(1, len(shapes) / costs.at_once) + trained


@pytest.mark.parametrize("case", range(12))
def test_no_other_ladder_is_cheaper(case):
    rng = np.random.default_rng(case)
    lengths = np.append(rng.integers(1, 10, rng.integers(5, 200)), 9)
    scale = lambda low, high: float(10 ** rng.uniform(low, high))
    costs = StepCosts(scale(-3, 1), scale(-5, -2), scale(-4, 0), scale(-6, -4), at_once=(1.0, 2.0, 3.5)[case % 3])
    caps = ((8,), (8, 8), (4, 8, 16))[case // 4]
    found = cheapest_ladder(lengths, costs, caps=caps, tokens=90, multiple=1)
    values = np.unique(lengths)[:-1]
    others = itertools.chain.from_iterable(itertools.combinations(values, count) for count in range(len(values) + 1))
    best = min(run_seconds(lengths, (*other, 9), costs, caps, 90) for other in others)
    assert run_seconds(lengths, found, costs, caps, 90) == pytest.approx(best, rel=1e-9)


def test_more_epochs_and_cheaper_programs_buy_more_boundaries():
    lengths = np.random.default_rng(0).integers(1, 65, 2000)
    counts = [
        len(cheapest_ladder(lengths, COSTS._replace(compile_s=seconds), caps=(32,) * epochs))
        for seconds, epochs in ((1e4, 1), (20.0, 1), (20.0, 10), (1e-9, 1))
    ]
    assert counts[0] == 1
    assert counts == sorted(counts)
    assert len(set(counts)) == 4
    assert counts[-1] == 48  # the most
    rungs = cheapest_ladder(lengths, COSTS._replace(compile_s=1e-9), caps=(32,), length_multiple=16)
    assert rungs == (16, 32, 48, 64)


def test_auto_plans_the_cheapest_ladder_also_of_lengths_that_change_by_epoch():
    rng = np.random.default_rng(1)
    texts = [rng.integers(1, 9, n).tolist() for n in rng.integers(1, 40, 300)]
    make = lambda columns, epochs=3, **more: BucketSampler(columns, seed=0, epochs=epochs, cap=32, **more)
    columns = {"input_ids": texts}
    auto = make(columns, max_shapes="auto", costs=COSTS)
    boundaries = auto.settings["boundaries"]
    lengths = np.array(list(map(len, texts)))
    assert tuple(boundaries) == cheapest_ladder(lengths, COSTS, caps=(32,) * 3)
    assert 1 < len(boundaries) < 9
    predicted = lambda data: sum(COSTS.of_run({shape: n for shape, (n, _) in data.use_of_shapes.items()}))
    fixed = [make(columns, max_shapes=count) for count in range(1, 12)]
    assert predicted(auto) <= 1.01 * min(map(predicted, fixed))
    np.testing.assert_array_equal(auto[3]["input_ids"], make(columns, boundaries=boundaries)[3]["input_ids"])
    by_epoch = make(lambda epoch: columns, max_shapes="auto", costs=COSTS)
    assert by_epoch.settings["boundaries"] == boundaries


def test_two_steps_tell_the_share_of_tokens_of_pairs_and_of_the_step_itself():
    truth = StepCosts(compile_s=5.0, token_s=2e-5, step_s=0.004, pair_s=1e-7, at_once=2.0)
    shapes = [(32, 16), (8, 128)]
    # Multiply-adds in the same proportion as the truth's seconds.
    macs = [rows * (2e6 * length + 1e4 * length**2) for rows, length in shapes]
    seconds = [0.004 + rows * (2e-5 * length + 1e-7 * length**2) for rows, length in shapes]
    found = fit_step_costs(shapes, seconds, compile_s=5.0, at_once=2.0, macs=macs)
    np.testing.assert_allclose(found, truth, rtol=1e-6)
    alike = fit_step_costs(shapes, [0.03, 0.02], compile_s=1.0, macs=macs)  # a clock that says nothing
    assert (alike.token_s, alike.pair_s, alike.step_s) == (0.0, 0.0, 0.025)
    steep = fit_step_costs([(1, 10), (1, 20)], [0.01, 0.04], compile_s=1.0)  # no step takes less than nothing
    assert (steep.step_s, steep.token_s) == (0.0, 0.002)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_step_costs([(8, 16)], [0.1], compile_s=1.0), "shapes=.* two .* different lengths"),
        (lambda: fit_step_costs([(8, 16), (4, 16)], [0.1, 0.2], compile_s=1.0), "different lengths"),
        (lambda: fit_step_costs([(8, 16), (8, 32)], [0.1], compile_s=1.0), r"step_s=\[0.1\] must hold one number"),
        (lambda: fit_step_costs([(8, 16), (8, 32)], [0.1, 0.0], compile_s=1.0), r"step_s\[1\]=0.0"),
        (lambda: cheapest_ladder(np.array([3]), COSTS._replace(token_s=-1.0)), "costs.token_s=-1.0"),
        (lambda: cheapest_ladder(np.array([3]), COSTS._replace(at_once=0.5)), "costs.at_once=0.5"),
        (lambda: cheapest_ladder(np.array([0.5]), COSTS), "lengths is float64"),
        (lambda: cheapest_ladder(np.array([3]), COSTS, caps=tuple(range(8, 60))), "52 programs for one boundary"),
        (lambda: sampler(max_shapes="auto"), "costs=None: .*measure_costs"),
        (lambda: sampler(max_shapes="most"), "max_shapes='most' must be a number of 1 or more, or 'auto'"),
        (lambda: sampler(max_shapes="auto", costs=COSTS, boundaries=(4,)), "leave out boundaries"),
        (lambda: sampler(max_shapes=3, costs=COSTS), "costs are for max_shapes='auto', and max_shapes=3"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def sampler(**options):
    return BucketSampler({"input_ids": Ragged.of([[1, 2], [3]])}, seed=0, epochs=1, **options)
