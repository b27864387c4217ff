"""Which way to batch: predictions against plans of the batches themselves, and the committed grid."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from effjax.data.batching import WAYS, choose_batches
from effjax.data.bucket_sampler import BucketSampler
from effjax.data.length_grouping import PaddedBatches
from effjax.data.packing import PackedBatches
from effjax.data.step_costs import StepCosts

ROOT = Path(__file__).resolve().parents[2]
COSTS = StepCosts(compile_s=4.0, token_s=2e-5, step_s=2e-3, pair_s=1e-8, at_once=2.0)


def lengths_of(rows, seed=0):
    return np.minimum(np.random.default_rng(seed).geometric(0.07, rows) + 2, 64)


def steps(batches):
    return {shape: count for shape, (count, _) in batches.use_of_shapes.items()}


def test_the_steps_are_those_of_the_batches_themselves():
    lengths = lengths_of(500)
    columns = {"input_ids": [[1] * n for n in lengths.tolist()]}
    found = choose_batches(lengths, COSTS, epochs=2, batch_size=32, length=64)
    shared = {"seed": 0, "epochs": 2}
    assert found.steps["static"] == steps(PaddedBatches(columns, batch_size=32, length=64, **shared))
    assert found.steps["dynamic"] == steps(PaddedBatches(columns, batch_size=32, **shared))
    fixed = {"cap": 32, "multiple": 1, "length_multiple": 8, "tokens": 32 * 64}
    buckets = BucketSampler(columns, max_shapes="auto", costs=COSTS, **fixed, **shared)
    assert found.boundaries == tuple(buckets.settings["boundaries"])
    assert sum(found.steps["buckets"].values()) == pytest.approx(buckets.total_steps, abs=2)
    size = round(32 * lengths.mean() / 64)
    packed = steps(PackedBatches(columns, length=64, batch_size=size, **shared))
    assert found.steps["packing"].keys() == packed.keys()
    assert found.steps["packing"][size, 64] == pytest.approx(packed[size, 64], abs=2)
    # Seconds are those of the formula.
    each = {way: sum(n * COSTS.of_step(*shape) for shape, n in found.steps[way].items()) for way in WAYS}
    assert found.train_s == pytest.approx(each)
    programs = {way: 4.0 * max(1, len(found.steps[way]) / 2) for way in WAYS}
    assert found.seconds == pytest.approx({way: each[way] + programs[way] for way in WAYS})


def test_the_least_seconds_win_from_short_runs_to_long_ones():
    free = ("static", "dynamic", "buckets")
    choose = lambda rows, epochs, **more: choose_batches(lengths_of(rows), COSTS, epochs=epochs, batch_size=32, **more)
    assert choose(50000, 10).best in ("packing", "buckets")
    assert choose(50000, 10, ways=free).best == "buckets"
    assert choose(250, 1).best == "packing"  # one program, and fewer tokens
    one = choose_batches(np.full(100, 64), COSTS, epochs=1, batch_size=32)
    assert one.best == "static"  # nothing to save: the first of the ways that are level
    assert str(one).splitlines()[0].startswith("static: ")
    many = choose(250, 1, ways=free)
    assert many.seconds[many.best] == min(many.seconds.values())
    assert len(many.boundaries) < len(choose(50000, 10).boundaries)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"costs": None}, "costs=None"),
        ({"lengths": np.zeros(3, int)}, "integers of 1 or more"),
        ({"lengths": np.zeros((0,), int)}, "not empty"),
        ({"length": 10}, "length=10"),
        ({"ways": ()}, r"ways=\(\)"),
        ({"ways": ("statik",)}, "ways='statik' .*static"),
        ({"epochs": 0}, "epochs=0"),
        ({"tokens": 8}, "tokens=8"),
    ],
)
def test_bad_input(changes, message):
    fields = {"lengths": np.array([3, 64]), "costs": COSTS, "epochs": 1} | changes
    with pytest.raises(ValueError, match=message):
        choose_batches(fields.pop("lengths"), fields.pop("costs"), **fields)


def committed():
    sys.path.insert(0, str(ROOT / "tests" / "peers"))
    import batches_speed

    path = ROOT / "configs" / "bucket_sampler" / "results" / "batches-intel-xeon-2-cores.json"
    return batches_speed, json.loads(path.read_text())


def test_the_choice_is_right_in_nine_of_ten_cells_of_the_measured_grid():
    """Short and long texts, 250 to 50,000 rows, 1 to 10 epochs: what every shape was measured to take is the truth."""
    benchmark, document = committed()
    cells = benchmark.grid(document["parts"]["shapes"], rows=(250, 1000, 4000))
    known = {(c["texts"], c["rows"], c["epochs"]): c for c in document["grid"]}
    assert {(c["texts"], c["rows"], c["epochs"]): c["chosen"] for c in cells}.items() <= {
        name: cell["chosen"] for name, cell in known.items()
    }.items()
    right = [cell["over_best"] <= benchmark.RIGHT for cell in known.values()]
    assert len(right) == 30
    assert np.mean(right) >= 0.9


@pytest.mark.nightly
def test_the_committed_grid_is_what_the_choice_says_today():
    benchmark, document = committed()
    found = json.loads(json.dumps(benchmark.grid(document["parts"]["shapes"])))
    assert [cell["chosen"] for cell in found] == [cell["chosen"] for cell in document["grid"]]
    np.testing.assert_allclose([c["over_best"] for c in found], [c["over_best"] for c in document["grid"]], rtol=1e-6)
