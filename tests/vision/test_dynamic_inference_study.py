"""The study of dynamic inference: what its arms share, its estimates, its timings, and own images."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from effjax.recipes.dynamic_inference import VARIANTS, DynamicInferenceStudy, _program, claims, groups
from effjax.recipes.executor_speed import gates_at, make_shape
from effjax.recipes.gated_networks import drawn_gates, load_network, random_rate, static_pattern
from effjax.recipes.gated_training import gate_labels
from effjax.recipes.spec import OwnData
from effjax.study.resolve import resolve
from effjax.train.options import Budget

STUDY = DynamicInferenceStudy(
    budget=Budget(2), tasks=("digits/resnet-4-8",), depth=2, train_rows=32, test_rows=16, batch_size=8
)


@pytest.fixture(scope="module")
def loaded():
    return load_network(STUDY, "digits/resnet-4-8")


def test_the_network_is_counted_by_hand(loaded):
    basic = lambda side, inputs, width: side * side * 9 * width * (inputs + width)
    wanted = [basic(8, 4, 4), basic(8, 4, 4), basic(4, 4, 8), basic(4, 8, 8)]
    assert [macs.channel * macs.channels for macs in loaded.macs] == wanted
    assert loaded.shapes == ((8, 8, 4), (8, 8, 4), (8, 8, 4), (4, 4, 8))
    assert loaded.static == sum(wanted) + 9 * 4 * 64 + 8 * 10
    assert [loaded.names[place] for place in loaded.gated] == ["stage1_block1", "stage2_block1"]
    assert loaded.branches.tolist() == [wanted[1], wanted[3]]


def test_static_and_random_controls_spend_the_target(loaded):
    assert static_pattern(loaded, 0.7).tolist() == [True, False]  # the last block closes first
    assert static_pattern(loaded, 0.4).tolist() == [False, False]
    rate = random_rate(loaded, 0.7)
    assert 1 - (1 - rate) * loaded.branches.sum() / loaded.static == pytest.approx(0.7)
    images = np.random.default_rng(0).integers(0, 255, (400, 4, 4, 1), np.uint8)
    draw = jax.jit(drawn_gates, static_argnums=(1, 2))
    gates = np.asarray(draw(images, 4, 0.5))
    assert abs(gates.mean() - 0.5) < 0.05
    np.testing.assert_array_equal(draw(images[::-1], 4, 0.5), gates[::-1])  # whatever the batch
    assert len(np.unique(gates, axis=0)) == 16


def test_gates_are_trained_at_a_rate_of_their_own():
    labels = gate_labels({"a": {"layer_gate": {"dense": 1}, "conv1": 2}, "policy": {"dense": 3}, "head": 4})
    assert labels == {
        "a": {"layer_gate": {"dense": "gates"}, "conv1": "network"},
        "policy": {"dense": "gates"},
        "head": "network",
    }


def test_a_policy_learns_and_its_own_work_is_counted():
    study = dataclasses.replace(STUDY, depth=1, tasks=("digits/resnet-4",))
    loaded = load_network(study, "digits/resnet-4")
    program = _program(study, VARIANTS["one-shot"], loaded)
    state = jax.jit(program.init)(jax.random.key(0))
    after, metrics = jax.jit(program.phases[0].step)(state, next(program.loader.open(0)), None)
    assert np.isfinite(metrics["loss"])
    learned = after.params["policy"]["dense"]["kernel"] != state.params["policy"]["dense"]["kernel"]
    assert np.asarray(learned).any()
    found = program.judged(after)
    policy = 16 * 9 * 8 + 4 * 9 * 8 * 16 + 9 * 16 * 32 + 32  # three convolutions and a dense layer
    assert found["mac_fraction"] == pytest.approx(1 + policy / loaded.static)
    assert (found["layers_open"], found["patterns"]) == (1, 1)


def test_a_trained_network_rests_while_blockdrop_s_policy_learns():
    study = dataclasses.replace(STUDY, depth=1, tasks=("digits/resnet-4",), drop_curriculum=0.5)
    trained = load_network(study, "digits/resnet-4")._replace(start={})  # fresh weights, taken as trained ones
    program = _program(study, VARIANTS["block-drop"], trained)
    batches, step = program.loader.open(0), jax.jit(program.phases[0].step)
    states = [jax.jit(program.init)(jax.random.key(0))]
    for _ in range(2):
        states.append(step(states[-1], next(batches), None)[0])
    flat = [dict(jax.tree_util.tree_leaves_with_path(state.variables)) for state in states]
    moved = [{str(p) for p in old if not np.array_equal(old[p], new[p])} for old, new in itertools.pairwise(flat)]
    assert not [path for path in moved[0] if "policy" not in path]
    assert any("conv1" in path for path in moved[1])
    assert any("mean" in path for path in moved[1])


def test_timed_executors_agree_and_their_claims_follow_the_estimate():
    study = dataclasses.replace(STUDY, tasks=(), shapes=("mlp-8", "basic-64-16"), batches=(32,), open_rates=(0.5,))
    first, _ = groups(study)
    assert [arm.name for arm in first.arms] == ["dense", "masked", "ladder-50", "capacity-50", "map-50"]
    shape = first.load()
    assert "estimate on one CPU core: block" in first.about(shape)[0]
    program = first.arms[2].build(shape)
    state = program.init(jax.random.key(0))
    assert program.evaluate(state)["gap"] < 1e-5
    phase = program.phases[0]
    _, metrics = jax.jit(phase.step)(state, None, phase.aux(state))
    assert np.isfinite(metrics["loss"])
    found = claims(study)
    assert "mlp-8-b32" not in found  # too small to pay
    assert [claim.arm for claim in found["basic-64-16-b32"]] == ["ladder-50", "ladder-100"]


def test_shares_of_open_examples_are_exact():
    gates = gates_at(0.25, 16, 3)
    assert gates.sum(0).tolist() == [4, 4, 4]
    assert (gates[:, 0] != gates[:, 1]).any()
    assert make_shape("bottleneck-16-4", 2, 3, "bfloat16").x.shape == (3, 4, 4, 16)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tasks": ()}, "leave nothing to compare"),
        ({"tasks": ("digits",)}, "must be DATA/NETWORK"),
        ({"shapes": ("conv-8",)}, "shapes: 'conv-8' must be basic-CHANNELS-SIDE"),
        ({"warm_up": 0.8, "anneal": 0.4}, "are more than the run"),
        ({"open_rates": (0.0,)}, r"open_rates\[0\]=0.0"),
    ],
)
def test_bad_settings_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(STUDY, **fields)


def test_unknown_networks_and_pretrained_ones_on_other_data_are_refused():
    with pytest.raises(ValueError, match=r"'resnet21' is not one of .* Did you mean .*'resnet20'"):
        load_network(STUDY, "digits/resnet21")
    with pytest.raises(ValueError, match="pretrained networks tell 10 classes of color images"):
        load_network(STUDY, "digits/pretrained-resnet20")


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_own_images_of_one_channel_and_odd_sizes(kind, tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for number in range(6):
            pixels = rng.integers(0, np.iinfo(kind).max, (9, 7), kind)
            Image.fromarray(pixels).save(tmp_path / label / f"{number}.png")
    columns = (("scale16", True),) if kind == "uint16" else ()
    own = OwnData(path=str(tmp_path), model="resnet-4", columns=columns)
    study = resolve("dynamic_inference:smoke", ["--arms", "layers", "--batch-size", "4"], own)
    (group,) = study.groups()
    loaded = group.load()
    assert loaded.shapes == ((9, 7, 4), (9, 7, 4))
    program = group.arms[0].build(loaded)
    state = jax.eval_shape(program.init, jax.random.key(0))
    _, metrics = jax.eval_shape(program.phases[0].step, state, next(program.loader.open(0)), None)
    assert metrics["loss"].shape == ()


def test_the_estimate_is_printed_and_reported(tmp_path, capsys, monkeypatch):
    from effjax.cli import main
    from effjax.study import metering

    monkeypatch.setattr(metering, "SECONDS", 0.0)  # the fewest rounds of timing
    words = ["compare", "dynamic_inference:speed", "--cost-only", "--shapes", "mlp-8", "--batches", "4"]
    assert main([*words, "--arms", "dense", "--out", str(tmp_path / "out")]) == 0
    assert "mlp-8-b4: estimate on one CPU core: block 0.0" in capsys.readouterr().out
    assert "\n- estimate on an H200: " in (tmp_path / "out" / "report.md").read_text()
