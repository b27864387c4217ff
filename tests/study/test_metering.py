"""The cost meter: one batch shape, and the mean over several."""

import jax
import pytest
from toy import BATCH, toy, uneven, uneven_shapes

from effjax.core.macs import count_macs
from effjax.study.compare import _curve
from effjax.study.metering import measure
from effjax.study.results import COST_FIELDS
from effjax.train.loop import FitResult
from effjax.train.options import TrainOptions
from effjax.train.program import Phase


def test_costs_of_several_shapes_are_means_over_the_run():
    said = []
    costs, prepared = measure({"one": toy(), "two": uneven()}, TrainOptions(), rounds=3, say=said.append)
    one, two = costs["one"], costs["two"]
    assert set(COST_FIELDS) - set(one) == {"train_s", "evaluate_s", "total_s"}
    assert "tokens" not in one
    assert one["examples_per_s"] == 1e3 * BATCH / one["step_ms"]
    assert (one["compiles"], two["compiles"], prepared["two"].compiles) == (1, 2, 2)
    assert said == ["compiling two, shape 1 of 2", "compiling two, shape 2 of 2"]

    program = uneven()
    state = program.init(jax.random.key(0))
    macs = [count_macs(program.phases[0].step, state, shape.batch, None).expected for shape in uneven_shapes()]
    examples = 27 * BATCH + 13 * BATCH // 2
    assert two["macs_per_example"] == pytest.approx((27 * macs[0] + 13 * macs[1]) / examples)
    assert macs[0] / BATCH == one["macs_per_example"]
    assert two["examples_per_s"] == pytest.approx(1e3 * examples / 40 / two["step_ms"])
    assert two["tokens"] == 10 * examples
    assert two["xla_flops_per_step"] < one["xla_flops_per_step"]
    assert two["peak_bytes"] == one["peak_bytes"] > one["temp_bytes"] >= 0
    assert two["step_ms_quartiles"][0] <= two["step_ms"] <= two["step_ms_quartiles"][1]


def test_a_curve_ends_with_the_run():
    points = [{"step": 2, "train_s": 0.1, "accuracy": 0.5}, {"step": 4, "train_s": 0.3, "accuracy": 0.7}]
    result = FitResult(None, 5, {}, 0.5, 0, points)
    last = {"step": 5, "train_s": 0.5, "accuracy": 0.8}
    assert _curve(result, last) == {"step": [2, 4, 5], "train_s": [0.1, 0.3, 0.5], "accuracy": [0.5, 0.7, 0.8]}
    assert _curve(result, {**last, "step": 4})["step"] == [2, 4]


def test_work_between_phases_and_what_is_trained_are_told():
    calls = []

    def leave(state):
        calls.append(1)
        return {**state, "key": state["key"]}

    program = toy(parts=(2, 3), leave=leave, trained=lambda state: state["params"]["w"][:2])
    costs, _ = measure({"acts": program, "plain": toy(5)}, TrainOptions(), rounds=1)
    assert len(calls) == 6  # one to compile it
    assert costs["acts"]["between_ms"] > 0
    assert costs["acts"]["trained_params"] == 2
    assert not {"between_ms", "trained_params"} & set(costs["plain"])


def test_phases_with_steps_of_their_own_cost_their_mean():
    cheap = toy().phases[0]

    def dear(state, batch, aux):
        state, _ = cheap.step(state, batch, aux)
        return cheap.step(state, batch, aux)

    program = toy()._replace(phases=(cheap._replace(steps=30), Phase(dear, 10)))
    costs, _ = measure({"both": program, "one": toy()}, TrainOptions(), rounds=1)
    assert costs["both"]["compiles"] == program.compiles == 2
    assert costs["both"]["macs_per_example"] == pytest.approx(1.25 * costs["one"]["macs_per_example"])
