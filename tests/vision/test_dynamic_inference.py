"""Gated blocks and the executors that skip: parity, exact agreement, what a closed gate leaves, and bad input."""

import functools
import re
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from effjax.core.macs import count_macs
from effjax.models.residual_blocks import BasicBlock
from effjax.models.resnet import ResNet
from effjax.vision.dynamic_inference import block_macs, dynamic_inference, network_gates
from effjax.vision.gate_networks import AIGGate, ConstantGate, GivenGate, SalienceGate, SkipNetGate, given_gates
from effjax.vision.gated_blocks import GatedBasicBlock, GatedBottleneck, recorded_gates
from effjax.vision.gated_executors import Executor, ResidualBlock, block_rungs, fit_rungs, run_block
from effjax.vision.mac_target import example_macs, static_macs

REFERENCE = Path(__file__).parents[1] / "reference" / "dynamic_inference"
RELU1 = functools.partial(SalienceGate, kind="relu1")
ROWS, WIDTH = 8, 3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, WIDTH)).astype(np.float32)
KERNEL = RNG.normal(size=(WIDTH, WIDTH)).astype(np.float32)
GATE = np.array([0.5, 0, 1, 0, 0, 0.25, 0, 1], np.float32)
BLOCK = ResidualBlock(lambda kernel, x: jnp.tanh(x @ kernel))


def expected(x=X, gate=GATE, kernel=KERNEL):
    return x + gate[:, None] * np.tanh(x @ kernel)


def hwio(kernel):
    return kernel.transpose(2, 3, 1, 0)


def nhwc(images):
    return images.transpose(0, 2, 3, 1)


# Parity


def lc_variables(ref):
    params = {"layer_gate": {"dense": {"kernel": ref["L_w"].T, "bias": ref["L_b"]}}}
    params["channel_gate"] = {"dense": {"kernel": ref["C_w"].T, "bias": ref["C_b"]}}
    norms = {"norm_shortcut": "bnsc", **{f"norm{i}": f"bn{i}" for i in (1, 2, 3)}}
    stats = {}
    for name, own in norms.items():
        if f"{own}_scale" in ref:
            params[name] = {"scale": ref[f"{own}_scale"], "bias": ref[f"{own}_bias"]}
            stats[name] = {"mean": ref[f"{own}_mean"], "var": ref[f"{own}_var"]}
    for name, own in {"conv_shortcut": "sc_w", **{f"conv{i}": f"conv{i}" for i in (1, 2, 3)}}.items():
        if own in ref:
            params[name] = {"kernel": hwio(ref[own])}
    return params, stats


@pytest.mark.promotes  # Flax's running averages
@pytest.mark.parametrize("name", ["lc_basic_identity_eval", "lc_basic_down_train", "lc_bottleneck_eval"])
def test_parity_of_lc_blocks(name):
    ref = dict(np.load(REFERENCE / f"{name}.npz"))
    make = GatedBasicBlock if str(ref["kind"]) == "basic" else GatedBottleneck
    train = str(ref["bn_mode"]) == "train"
    with jax.enable_x64(True):
        params, stats = lc_variables(ref)
        block = make(
            ref["y"].shape[1],
            strides=int(ref["stride"]),
            shortcut="project",
            dtype=jnp.float64,
            layer=RELU1,
            channel=RELU1,
        )

        @jax.jit
        @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        def run(params, x):
            variables = {"params": params, "batch_stats": stats}
            y, changed = block.apply(variables, x, train, mutable=["intermediates", "batch_stats"])
            (gates,) = recorded_gates(changed)
            layer, channel = gates.layer.value, gates.channel.value
            penalty = ref["lambda_layer"] * layer.mean() + ref["lambda_channel"] * channel.mean()
            work = example_macs([gates]), static_macs([gates])
            return (y * nhwc(ref["cotangent"])).sum() + penalty, (y, layer, channel, penalty, work)

        (_, (y, layer, channel, penalty, work)), (grads, grad_x) = run(params, nhwc(ref["x"]))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)
    close(y, nhwc(ref["y"]))
    close(layer, ref["gate_layer"][:, 0])
    close(channel, ref["gate_channel"])
    close(penalty, ref["penalty"])
    close(grad_x, nhwc(ref["grad_x"]))
    for net, own in (("layer_gate", "L"), ("channel_gate", "C")):
        close(grads[net]["dense"]["kernel"], ref[f"grad_{own}_w"].T)
        close(grads[net]["dense"]["bias"], ref[f"grad_{own}_b"])
    for name, own in {"conv_shortcut": "sc_w", **{f"conv{i}": f"conv{i}" for i in (1, 2, 3)}}.items():
        if own in ref:
            close(grads[name]["kernel"], hwio(ref[f"grad_{own}"]))
    np.testing.assert_allclose(work[0], ref["macs_dynamic"], rtol=1e-6)
    assert float(work[1]) == ref["macs_static"]


def norm_of(ref, name):
    read = lambda part: ref[f"{name}_{part}"]
    return {"scale": read("weight"), "bias": read("bias")}, {"mean": read("running_mean"), "var": read("running_var")}


@pytest.mark.parametrize("name", ["convnet_aig_block", "convnet_aig_block_down"])
def test_parity_of_convnet_aig(name, monkeypatch):
    ref = dict(np.load(REFERENCE / f"{name}.npz"))
    own = {key.removeprefix("param_"): value for key, value in ref.items() if key.startswith("param_")}
    params = {f"conv{i}": {"kernel": hwio(own[f"conv{i}_weight"])} for i in (1, 2)}
    norms = {"norm1": "bn1", "norm2": "bn2"}
    if "shortcut_0_weight" in own:
        params["conv_shortcut"] = {"kernel": hwio(own["shortcut_0_weight"])}
        norms["norm_shortcut"] = "shortcut_1"
    found = {one: norm_of(own, theirs) for one, theirs in norms.items()}
    stats = {one: second for one, (_, second) in found.items()}
    params |= {one: first for one, (first, _) in found.items()}
    gate_norm = norm_of(own, "fc1bn")
    params["layer_gate"] = {
        **{fc: {"kernel": own[f"{fc}_weight"][:, :, 0, 0].T, "bias": own[f"{fc}_bias"]} for fc in ("fc1", "fc2")},
        "norm": gate_norm[0],
    }
    stats["layer_gate"] = {"norm": gate_norm[1]}
    noise = ref["gumbel_noise"][:, 1, 0] - ref["gumbel_noise"][:, 0, 0]
    monkeypatch.setattr(jax.random, "logistic", lambda key, shape, dtype: jnp.asarray(noise, dtype).reshape(shape))
    with jax.enable_x64(True):
        block = GatedBasicBlock(
            own["conv1_weight"].shape[0],
            strides=int(ref["stride"]),
            shortcut="project",
            dtype=jnp.float64,
            layer=functools.partial(AIGGate, noise_at_test=True),
        )

        @jax.jit
        @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        def run(params, x):
            variables, keys = {"params": params, "batch_stats": stats}, {"dropout": jax.random.key(0)}
            y, changed = block.apply(variables, x, False, mutable=["intermediates"], rngs=keys)
            gate = recorded_gates(changed)[0].layer.open
            penalty = ref["lossfact"] * (ref["target_rate"] - gate.mean()) ** 2
            return (y * nhwc(ref["cotangent"])).sum() + penalty, (y, gate)

        (_, (y, gate)), (grads, grad_x) = run(params, nhwc(ref["x"]))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-10)
    np.testing.assert_array_equal(gate, ref["gate"].ravel())
    close(y, nhwc(ref["y"]))
    close(grad_x, nhwc(ref["grad_x"]))
    for fc in ("fc1", "fc2"):
        close(grads["layer_gate"][fc]["kernel"], ref[f"grad_{fc}_weight"][:, :, 0, 0].T)
    close(grads["conv1"]["kernel"], hwio(ref["grad_conv1_weight"]))


@pytest.mark.parametrize("form", ["I", "II"])
def test_parity_of_skipnet_gates(form):
    ref = {k.removeprefix(f"{form}_"): v for k, v in np.load(REFERENCE / "skipnet_ff_gates.npz").items()}
    ref = {key: value for key, value in ref.items() if not key.startswith("I")}
    own = {key.removeprefix("param_"): value for key, value in ref.items() if key.startswith("param_")}
    depth = 2 if form == "I" else 1
    params = {f"conv{i}": {"kernel": hwio(own[f"conv{i}_weight"])} for i in range(1, depth + 1)}
    norms = {f"norm{i}": norm_of(own, f"bn{i}") for i in range(1, depth + 1)}
    params |= {name: first for name, (first, _) in norms.items()}
    linear = own["linear_layer_weight"][:, :, 0, 0].T
    params["linear"] = {"kernel": linear, "bias": own["linear_layer_bias"]}
    stats = {name: second for name, (_, second) in norms.items()}
    with jax.enable_x64(True):

        @jax.jit
        @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        def run(params, x):
            gate = SkipNetGate(form=form).apply({"params": params, "batch_stats": stats}, x, False)
            return (gate.value[:, 0] * ref["cotangent"].ravel()).sum(), gate.open[:, 0]

        (_, gate), (grads, grad_x) = run(params, nhwc(ref["x"]))
    np.testing.assert_array_equal(gate, ref["gate"].ravel())
    np.testing.assert_allclose(grad_x, nhwc(ref["grad_x"]), rtol=1e-8, atol=1e-11)
    np.testing.assert_allclose(grads["conv1"]["kernel"], hwio(ref["grad_conv1_weight"]), rtol=1e-8, atol=1e-11)
    np.testing.assert_allclose(grads["linear"]["bias"], ref["grad_linear_layer_bias"], rtol=1e-8)


@pytest.mark.parametrize("capacity", [4, 8, 16])
def test_parity_of_capacity(capacity):
    ref = np.load(REFERENCE / "capacity_topk.npz")
    block = ResidualBlock(lambda kernel, x: jax.nn.relu(x @ kernel))
    run = jax.jit(functools.partial(run_block, block, executor=Executor("capacity", capacity=capacity)))
    with jax.enable_x64(True):
        y, served = run(ref["W"], ref["x"], ref["gate"])
    np.testing.assert_allclose(y, ref[f"y_cap_{capacity}"], rtol=1e-12)
    np.testing.assert_array_equal(served, ref[f"kept_{capacity}"])
    assert int(((ref["gate"] > 0) & ~np.asarray(served)).sum()) == ref[f"dropped_{capacity}"]


# Executors on plain functions

RUN = {
    name: jax.jit(functools.partial(run_block, BLOCK, executor=executor))
    for name, executor in {
        "masked": "masked",
        "map": "map",
        "ladder": Executor("ladder", rungs=(2, 5)),
        "capacity": Executor("capacity", capacity=ROWS),
    }.items()
}


@pytest.mark.parametrize("name", RUN)
@pytest.mark.parametrize("count", [0, 1, 4, 8])
def test_executors_agree_and_closed_rows_keep_their_bits(name, count):
    gate = np.where(np.argsort(np.argsort(-X[:, 0])) < count, GATE + 0.5, 0).astype(np.float32)
    y, served = jax.device_get(RUN[name](KERNEL, X, gate))
    np.testing.assert_allclose(y, expected(gate=gate), rtol=1e-5)
    np.testing.assert_array_equal(y[gate == 0], X[gate == 0])
    np.testing.assert_array_equal(served, gate > 0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=ROWS, max_size=ROWS), st.permutations(range(ROWS)))
def test_the_ladder_is_independent_of_batch_mates(gate, order):
    gate, order = np.array(gate, np.float32), np.array(order)
    y, _ = RUN["ladder"](KERNEL, X, gate)
    moved, _ = RUN["ladder"](KERNEL, X[order], gate[order])
    np.testing.assert_allclose(moved, np.asarray(y)[order], rtol=1e-5)
    np.testing.assert_allclose(y, expected(gate=gate), rtol=1e-5)


def test_a_fixed_capacity_depends_on_batch_mates():
    run = jax.jit(functools.partial(run_block, BLOCK, executor=Executor("capacity", capacity=1)))
    other = GATE.copy()
    other[2] = 0.0
    alone, beside = run(KERNEL, X, GATE)[0][7], run(KERNEL, X, other)[0][7]
    np.testing.assert_array_equal(alone, X[7])  # row 2 took the only place
    np.testing.assert_allclose(beside, expected()[7], rtol=1e-5)


def test_a_batch_of_one_runs_a_branch_of_the_program():
    run = jax.jit(functools.partial(run_block, BLOCK, executor="cond"))
    for row in (0, 1):
        y, _ = run(KERNEL, X[row : row + 1], GATE[row : row + 1])
        np.testing.assert_allclose(y, expected()[row : row + 1], rtol=1e-5)
    with pytest.raises(ValueError, match=r"executor='cond' takes a batch of one, and x has 8 rows"):
        run_block(BLOCK, KERNEL, X, GATE, executor="cond")


def test_the_ladder_compiles_to_a_conditional_and_vmapped_cond_to_a_selection():
    ladder = RUN["ladder"].lower(KERNEL, X, GATE).compile().as_text()
    one = lambda x, gate: jax.lax.cond(gate > 0, lambda x: x + gate * jnp.tanh(x @ KERNEL), lambda x: x, x)
    assert "conditional(" in ladder
    assert "conditional(" not in jax.jit(jax.vmap(one)).lower(X, GATE).compile().as_text()


def test_the_ladder_costs_what_its_rungs_cost():
    count = count_macs(functools.partial(run_block, BLOCK, executor=Executor("ladder", rungs=(2, 5))), KERNEL, X, GATE)
    assert (count.least, count.most) == (0, ROWS * WIDTH * WIDTH)


def test_under_vmap_the_ladder_is_refused_and_a_capacity_works():
    many = np.stack([GATE, GATE[::-1]])
    with pytest.raises(ValueError, match=r"run_block under vmap over 2 would run every bucket"):
        jax.vmap(lambda gate: run_block(BLOCK, KERNEL, X, gate)[0])(many)
    run = lambda gate: run_block(BLOCK, KERNEL, X, gate, executor=Executor("capacity", capacity=4))[0]
    np.testing.assert_allclose(jax.jit(jax.vmap(run))(many), [expected(gate=gate) for gate in many], rtol=1e-5)


def test_an_infinite_or_nan_branch_shows_in_open_rows_alone():
    broken = ResidualBlock(lambda bad, x: jnp.where(x == bad, jnp.nan, x))
    run = jax.jit(functools.partial(run_block, broken, executor=Executor("ladder", rungs=(5,))))
    y, _ = run(X[0, 0], X, (GATE > 0).astype(np.float32))
    assert np.isnan(y[0, 0])
    assert np.isfinite(y[1:]).all()
    gate = GATE.copy()
    gate[1] = np.nan
    assert np.isnan(RUN["ladder"](KERNEL, X, gate)[0][1]).all()


@pytest.mark.parametrize("whole", [False, True])
def test_shortcuts_activations_and_whole_blocks(whole):
    narrow = RNG.normal(size=(WIDTH, 2)).astype(np.float32)
    own = {"branch": KERNEL[:, :2], "shortcut": narrow}
    block = ResidualBlock(
        lambda params, x: x @ params["branch"],
        shortcut=lambda params, x: x @ params["shortcut"],
        activation=jax.nn.relu,
        whole=whole,
    )
    keep = (1 - GATE)[:, None] if whole else 1
    wanted = np.maximum(keep * (X @ narrow) + GATE[:, None] * (X @ KERNEL[:, :2]), 0)
    for executor in ("masked", Executor("ladder", rungs=(5,))):
        y, _ = jax.jit(functools.partial(run_block, block, executor=executor))(own, X, GATE)
        np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("name", ["ladder", "masked", "map", "capacity"])
def test_empty_batch_and_batch_of_one(name, rows):
    y, served = RUN[name](KERNEL, X[:rows], GATE[:rows])
    np.testing.assert_allclose(y, expected()[:rows], rtol=1e-5)
    assert served.shape == (rows,)


def test_bfloat16_keeps_its_dtype_and_its_gates():
    for name in ("masked", "ladder"):
        y, served = RUN[name](KERNEL.astype(jnp.bfloat16), X.astype(jnp.bfloat16), GATE)
        assert y.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(y, np.float32), expected(), rtol=0.05, atol=0.05)
        np.testing.assert_array_equal(served, GATE > 0)


def test_no_program_is_compiled_for_other_gates():
    before = RUN["ladder"]._cache_size()
    RUN["ladder"](KERNEL, X, GATE)
    size = RUN["ladder"]._cache_size()
    RUN["ladder"](KERNEL, X, np.ones(ROWS, np.float32))
    assert RUN["ladder"]._cache_size() == size
    assert size - before <= 1


# Networks given as lists

NETWORK = [
    BLOCK,
    ResidualBlock(lambda kernel, x: x @ kernel, gate=lambda limit, x: (x[:, 0] > limit).astype(jnp.float32)),
    BLOCK._replace(gate=lambda weight, x: jnp.clip(x @ weight, 0, 1)),
]
PAIRS = [(KERNEL, None), (KERNEL.T, 0.0), (-KERNEL, KERNEL[0])]
GIVEN = np.stack([GATE, GATE[::-1], np.ones_like(GATE)], 1)


def network_expected(gates=None):
    x, found = X, []
    for place in range(3):
        branch = (lambda x: np.tanh(x @ KERNEL), lambda x: x @ KERNEL.T, lambda x: np.tanh(-x @ KERNEL))[place]
        own = (np.ones(ROWS), x[:, 0] > 0, np.clip(x @ KERNEL[0], 0, 1))[place] if gates is None else gates[:, place]
        found.append(own)
        x = x + own[:, None] * branch(x)
    return x, np.stack(found, 1)


@pytest.mark.parametrize("executor", ["masked", "ladder", "map"])
def test_a_list_of_blocks(executor):
    how = Executor("ladder", rungs=(3,)) if executor == "ladder" else executor
    run = jax.jit(functools.partial(dynamic_inference, NETWORK, executor=how))
    for gates in (None, GIVEN):
        found = run(PAIRS, X, gates=gates)
        outputs, wanted = network_expected(gates)
        np.testing.assert_allclose(found.outputs, outputs, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.gates, wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found.served, wanted > 0)
        assert not found.dropped.any()


def test_a_fixed_capacity_reports_what_it_drops():
    run = functools.partial(dynamic_inference, NETWORK, executor=Executor("capacity", capacity=3))
    found = jax.jit(run)(PAIRS, X, gates=GIVEN)
    assert found.dropped.tolist() == [1, 1, 5]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_every_device_takes_a_rung_of_its_own(kind):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    put = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))
    how = Executor("ladder", rungs=(1,))
    run = jax.jit(functools.partial(dynamic_inference, NETWORK[:2], mesh=mesh, executor=how))
    found = run(PAIRS[:2], put(X), gates=put(GIVEN[:, :2]))
    once = X + GATE[:, None] * np.tanh(X @ KERNEL)
    np.testing.assert_allclose(found.outputs, once + GATE[::-1, None] * (once @ KERNEL.T), rtol=1e-4, atol=1e-5)
    assert found.outputs.sharding.spec[0] == "data"
    assert "all-gather" not in run.lower(PAIRS[:2], put(X), gates=put(GIVEN[:, :2])).compile().as_text()


def test_gradients_pass_to_branches_and_gates_when_all_runs():
    def loss(pairs):
        return dynamic_inference(NETWORK, pairs, X, executor="masked").outputs.sum()

    grads = jax.jit(jax.grad(loss))(PAIRS)
    assert float(jnp.abs(grads[2][1]).sum()) > 0
    assert float(jnp.abs(grads[0][0]).sum()) > 0


def test_macs_of_plain_functions():
    macs = block_macs(NETWORK, PAIRS, X)
    assert [one.once for one in macs] == [WIDTH * WIDTH] * 3
    assert [one.gates for one in macs] == [0, 0, WIDTH]

    @jax.jit
    def run(pairs, x):
        return example_macs(network_gates(dynamic_inference(NETWORK, pairs, x, executor="masked"), macs))

    work = np.asarray(run(PAIRS, X))
    np.testing.assert_allclose(work, WIDTH**2 * (network_expected()[1] > 0).sum(1) + WIDTH)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: run_block(BLOCK, KERNEL, X, GATE[:3]), "gate has 3 rows and x has shape (8, 3)"),
        (lambda: run_block(BLOCK, KERNEL, X, GATE[:, None]), "gate has shape (8, 1); expected (8,)"),
        (lambda: run_block(BLOCK, KERNEL[:, :2], X, GATE), "the branch returns (8, 2) and the shortcut (8, 3)"),
        (lambda: run_block(BLOCK, KERNEL, X, GATE, executor="laddr"), "Did you mean 'ladder'"),
        (lambda: Executor("capacity", capacity=0).check(), "capacity=0 must be an integer in [1, inf)"),
        (lambda: Executor("capacity").check(), "give a capacity to 'capacity'"),
        (lambda: Executor("map", rungs=(2,)).check(), "rungs=(2,) are of executor='ladder'"),
        (lambda: Executor("ladder", rungs=(4, 2)).check(), "must hold at least one size and increase"),
        (lambda: dynamic_inference(NETWORK, PAIRS[:2], X), "params hold 2 pairs for 3 blocks"),
        (lambda: dynamic_inference([], [], X), "params hold 0 pairs for 0 blocks"),
        (lambda: dynamic_inference(NETWORK, PAIRS, X, gates=GIVEN[:, :2]), "gates have shape (8, 2); expected (8, 3)"),
        (lambda: fit_rungs(GIVEN, 9, 2), "gates hold 8 rows, less than one batch of 9"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        call()
    assert "\n" not in str(error.value)


@given(st.integers(1, 300))
def test_the_default_ladder_holds_every_batch(rows):
    rungs = block_rungs(rows)
    assert rungs[-1] == rows
    assert len(rungs) <= 8
    assert list(rungs) == sorted(set(rungs))


def test_rungs_fitted_to_measured_gates():
    gates = np.zeros((64, 2), np.float32)
    gates[:, 0], gates[::4, 1] = 1, 1  # all of a block, a quarter of another
    assert fit_rungs(gates, 64, 2) == (16, 64)


# Networks of Linen blocks

IMAGES = RNG.normal(size=(5, 8, 8, 3)).astype(np.float32)
NAMES = ["stage1_block0", "stage1_block1", "stage2_block0"]


def resnet(**fields):
    block = functools.partial(GatedBasicBlock, **fields)
    return ResNet(stages=(2, 1), widths=(4, 8), classes=3, block=block)


def drawn(model, x, **options):
    """Variables of a module by NumPy, without a program; statistics are positive."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(model.init, jax.random.key(0), **options), x)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        value = rng.normal(size=leaf.shape).astype(np.float32)
        if "gate" in name:
            return 2 * value if "kernel" in name else np.full(leaf.shape, 0.3, np.float32)
        return np.abs(value) + 0.5 if "var" in name or "scale" in name else 0.3 * value

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def trained():
    """A network whose gates differ from image to image."""
    return drawn(resnet(channel=functools.partial(SalienceGate, kind="relu1"), group=2), IMAGES)


def run_network(variables, images, **fields):
    model = resnet(channel=functools.partial(SalienceGate, kind="relu1"), group=2, **fields)
    return jax.jit(lambda v, x: model.apply(v, x, mutable=["intermediates"]))(variables, images)


def test_linen_executors_agree_and_record_the_same_gates(trained):
    wanted, recorded = run_network(trained, IMAGES)
    gates = recorded_gates(recorded)
    opened = np.stack([one.layer.open for one in gates])
    assert 0 < opened.mean() < 1
    for executor in (Executor("ladder", rungs=(1, 3)), "map"):
        found, others = run_network(trained, IMAGES, executor=executor)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
        for one, other in zip(gates, recorded_gates(others), strict=True):
            np.testing.assert_array_equal(other.layer.open, one.layer.open)
            np.testing.assert_array_equal(other.channel.open, one.channel.open)
    one, _ = run_network(trained, IMAGES[:1], executor="cond")
    np.testing.assert_allclose(one, wanted[:1], rtol=1e-4, atol=1e-5)


def test_all_gates_open_is_the_plain_network_bit_for_bit():
    plain = ResNet(stages=(2, 1), widths=(4, 8), classes=3, block=BasicBlock)
    variables = drawn(plain, IMAGES)
    gated = resnet(layer=ConstantGate)
    logits = [jax.jit(model.apply)(variables, IMAGES) for model in (plain, gated)]
    np.testing.assert_array_equal(*logits)


def test_a_closed_layer_leaves_its_input_and_does_not_read_its_weights():
    block = GatedBasicBlock(
        3, layer=functools.partial(ConstantGate, value=0.0), executor=Executor("ladder", rungs=(3,))
    )
    x = np.abs(IMAGES)
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), drawn(block, x, train=False))
    np.testing.assert_array_equal(jax.jit(lambda v, x: block.apply(v, x, False))(broken, x), x)


def test_a_closed_channel_can_be_changed_at_will():
    given = {"layer_gate": {"value": np.ones(5, np.float32)}}
    closed = np.ones((5, 4), np.float32)
    closed[0, 2] = 0.0
    block = GatedBasicBlock(4, layer=GivenGate, channel=GivenGate)
    x = RNG.normal(size=(5, 4, 4, 4)).astype(np.float32)
    variables = drawn(block, x, train=False)
    variables["given"] = {**given, "channel_gate": {"value": closed}}
    run = jax.jit(lambda variables: block.apply(variables, x, False))
    params = variables["params"]
    before = run(variables)
    first, second = params["conv1"]["kernel"].copy(), params["conv2"]["kernel"].copy()
    first[..., 2] += 1
    second[:, :, 2] += 1
    for changed in ({"conv1": {"kernel": first}}, {"conv2": {"kernel": second}}):
        after = run({**variables, "params": {**params, **changed}})
        np.testing.assert_array_equal(after[0], before[0])
        assert not np.allclose(after[1], before[1])


def test_gates_decided_outside_and_their_gradient():
    model = resnet(layer=GivenGate)
    variables = drawn(model, IMAGES)
    assert set(variables) == {"params", "batch_stats"}
    gates = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 1, 0]], np.float32)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(gates, x):
        held = {**variables, "given": given_gates(gates, NAMES)}
        logits, changed = model.apply(held, x, mutable=["intermediates"])
        return logits.sum(), jnp.stack([one.layer.open for one in recorded_gates(changed)], 1)

    (_, opened), grads = run(gates, IMAGES)
    np.testing.assert_array_equal(opened, gates)
    assert (np.abs(grads).sum(1) > 0).all()


def test_bad_blocks_are_refused():
    x = IMAGES[..., :3]
    with pytest.raises(ValueError, match=r"group=2 does not divide the 3 gated channels"):
        GatedBasicBlock(3, channel=SalienceGate, group=2).init(jax.random.key(0), x, False)
    with pytest.raises(ValueError, match=r"shortcut='pas' is not one of"):
        GatedBasicBlock(3, shortcut="pas").init(jax.random.key(0), x, False)
    with pytest.raises(ValueError, match=r"no recorded gates: call apply with mutable"):
        recorded_gates({"batch_stats": {}})
    with pytest.raises(ValueError, match=r"gates have 3 columns for 2 blocks"):
        given_gates(np.ones((2, 3), np.float32), NAMES[:2])
