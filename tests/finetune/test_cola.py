"""COLA: the invariants of a chain, parity, its cost on XLA, optimizer resets, knots that lose nothing, bad input."""

import functools
import warnings
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from effjax.core.cost import Executables, count_compiles, count_params
from effjax.core.errors import NoEffectWarning
from effjax.core.tree import leaf_paths
from effjax.finetune.chain import (
    cola_adapters,
    cola_extend,
    cola_gradients,
    cola_init,
    cola_merge,
    cola_next,
    cola_params,
    cola_value_and_grad,
)
from effjax.finetune.chain_config import ColaConfig
from effjax.finetune.chain_links import cola_export, cola_links
from effjax.finetune.cola import cola, cola_state
from effjax.finetune.lora import lora_init, lora_merge, lora_params, lora_scales, lora_shardings, scale_lora_b
from effjax.finetune.lora_config import LoraConfig, LoraRule
from effjax.finetune.lora_linen import lora_apply
from effjax.finetune.restart import cola_reset
from effjax.finetune.slope_knot import SlopeKnot

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "cola"
KEY = jax.random.key(0)
RULE = LoraRule("(up|down)/kernel", rank=3, alpha=6.0)
TARGETS = ("down/kernel", "up/kernel")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="down")(nn.tanh(nn.Dense(12, name="up")(x)))


_rng = np.random.default_rng(0)
X, Y = (jnp.asarray(_rng.normal(size=(32, n)), jnp.float32) for n in (10, 5))
APPLY = lora_apply(Net().apply)
PARAMS = jax.jit(Net().init)(KEY, X)["params"]


def plain_loss(params):
    return jnp.mean((Net().apply({"params": params}, X) - Y) ** 2)


def loss(params):
    return jnp.mean((APPLY({"params": params}, X) - Y) ** 2)


@functools.partial(jax.jit, static_argnames="config")
def outputs(state, config):
    return APPLY({"params": cola_params(state, config)}, X)


@functools.partial(jax.jit, static_argnames="config")
def gradient(state, config):
    return cola_value_and_grad(loss, config)(state)[1]


init = jax.jit(cola_init, static_argnames="config")
copied = jax.jit(functools.partial(jax.tree.map, jnp.copy))
host = functools.partial(jax.tree.map, np.asarray)
extend = jax.jit(cola_extend, static_argnames="config")
export = jax.jit(cola_export)
merge_lora = jax.jit(lora_merge, static_argnums=2)
merge = jax.jit(cola_merge, static_argnames=("config", "float32"))
applied = jax.jit(lambda params, lora: APPLY({"params": lora_params(params, lora, 1.0)}, X))


@functools.cache
def trainer(tx, config):
    @jax.jit
    def train(state, opt_state, steps):
        def step(_, carry):
            state, opt_state = carry
            _, grads = cola_value_and_grad(loss, config)(state)
            updates, opt_state = tx.update(grads, opt_state, state.lora)
            return state._replace(lora=optax.apply_updates(state.lora, updates)), opt_state

        return jax.lax.fori_loop(0, steps, step, (state, opt_state))

    return train


ADAM = optax.adam(0.02)


def chain(config, params=PARAMS, knots=2, steps=12, tx=ADAM):
    """Train links; returns the states before and after every knot, and at the end."""
    state = init(KEY, params, config)
    opt_state, knot, history = jax.jit(tx.init)(state.lora), cola_next(tx, config), []
    for k in range(knots + 1):
        state, opt_state = trainer(tx, config)(state, opt_state, steps)
        before = copied(state)
        if k < knots:
            state, opt_state = knot(copied(state), opt_state)
        history.append((before, state, opt_state))
    return history


def config_with(**fields):
    return ColaConfig(fields.pop("lora", RULE), **{"knots": (12, 24), **fields})


@pytest.fixture(scope="module", params=("master", "lazy"))
def trained(request):
    config = config_with(merge=request.param, keep_links=True)
    return config, chain(config)


def assert_equal(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def stepper(tx, config):
    @functools.partial(jax.jit, static_argnames="tie")
    def step(params, opt_state, tie=False):
        _, grads = cola_value_and_grad(loss, config)(cola_state(opt_state, params))
        updates, opt_state = tx.update({"lora": grads}, opt_state, params, tie=tie)
        return optax.apply_updates(params, updates), opt_state

    return step


def begin(tx, config, params=PARAMS):
    state = init(KEY, params, config)
    params = {"base": state.base, "lora": state.lora}
    return params, jax.jit(tx.init)(params)


def test_one_link_is_lora_bit_for_bit():
    with pytest.warns(NoEffectWarning, match="is LoRA"):
        config = ColaConfig(RULE)
    lora = jax.jit(lambda: lora_init(KEY, PARAMS, config.lora))()
    opt_state, scales = jax.jit(ADAM.init)(lora), lora_scales(lora, config.lora)

    @jax.jit
    def lora_step(base, lora, opt_state):
        grads = jax.grad(lambda own: loss(lora_params(base, own, scales)))(lora)
        updates, opt_state = ADAM.update(grads, opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state

    tx = cola(ADAM, config)
    params, state = begin(tx, config)
    step = stepper(tx, config)
    for _ in range(6):
        lora, opt_state = lora_step(PARAMS, lora, opt_state)
        params, state = step(params, state)
    assert_equal(params, {"base": PARAMS, "lora": lora})


def test_a_knot_leaves_the_function(trained):
    config, history = trained
    for before, after, _ in history[:-1]:
        old, new = host((outputs(before, config), outputs(after, config)))
        without = outputs(before._replace(lora=jax.tree.map(np.zeros_like, before.lora)), config)
        assert np.abs(old - without).max() > 0.1
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-6)
        # The new link, with b = 0, changes no bit of what its absence gives.
        absent = {path: {"a": np.zeros_like(x["a"]), "b": x["b"]} for path, x in after.lora.items()}
        assert_equal(new, outputs(after._replace(lora=absent), config))


def test_only_targets_change_and_only_at_knots(trained):
    config, history = trained
    start = PARAMS
    for before, after, _ in history:
        assert_equal(before.base, start)
        moved = {
            path
            for path, a, b in zip(leaf_paths(start), jax.tree.leaves(after.base), jax.tree.leaves(start), strict=True)
            if (np.asarray(a) != np.asarray(b)).any()
        }
        knot = int(after.link) > int(before.link)
        assert moved == (set(TARGETS) if knot and config.merge != "lazy" else set())
        start = after.base


def test_the_new_link_and_its_optimizer_start_afresh(trained):
    _, history = trained
    history = host(history)
    drawn = [history[0][0].lora]
    for before, after, opt_state in history[:-1]:
        assert all((adapter["b"] == 0).all() for adapter in after.lora.values())
        for path, adapter in after.lora.items():
            assert (adapter["a"] != 0).all()
            for earlier in (before.lora, *drawn):
                assert (adapter["a"] != earlier[path]["a"]).mean() > 0.99
        drawn.append(after.lora)
        assert_equal(opt_state, jax.jit(ADAM.init)(after.lora))


def test_rank_grows_by_links_and_parameters_do_not(trained):
    config, history = trained
    for k, (before, _, _) in enumerate(history):
        assert count_params(before.lora) == 3 * (10 + 12 + 12 + 5)
        for path in TARGETS:
            layer = path.split("/")[0]
            update = np.float64(merge(before, config)[layer]["kernel"]) - np.float64(PARAMS[layer]["kernel"])
            values = np.linalg.svd(np.float32(update).astype(np.float64), compute_uv=False)
            assert (values[3 * (k + 1) :] < 1e-6 * values[0]).all()
            if path == "up/kernel":
                assert values[3 * k] > 1e-4 * values[0]


def test_first_gradients_of_a_link(trained):
    config, history = trained
    _, after, _ = history[1]
    for adapter in host(gradient(after, config)).values():
        assert (adapter["a"] == 0).all()
        assert (adapter["b"] != 0).all()


def test_export_is_the_chain_and_one_merge_of_it(trained):
    config, history = trained
    state = history[-1][0]
    links = cola_links(state, config)
    lora = export(links)
    assert len(links) == 3
    assert lora["up/kernel"]["a"].shape == (10, 9)
    expected = outputs(state, config)
    np.testing.assert_allclose(applied(PARAMS, lora), expected, rtol=1e-4, atol=1e-5)
    one, many = merge_lora(PARAMS, lora, 1.0), merge(state, config)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_doubling_alpha_and_halving_b_changes_nothing():
    config = config_with()
    state = chain(config, knots=0)[0][0]
    doubled = config_with(lora=LoraRule(RULE.pattern, rank=3, alpha=12.0))
    halved = {path: {"a": x["a"], "b": np.asarray(x["b"]) / 2} for path, x in state.lora.items()}
    assert_equal(outputs(state, config), outputs(state._replace(lora=halved), doubled))


def test_links_of_the_present_alone_without_memory():
    config = config_with()
    history = chain(config)
    links = [cola_links(before, config) for before, _, _ in history]
    assert [len(found) for found in links] == [1, 1, 1]
    lora = export([found[0] for found in links])
    final = merge(history[-1][0], config)
    for a, b in zip(jax.tree.leaves(merge_lora(PARAMS, lora, 1.0)), jax.tree.leaves(final), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# Parity with the stored chains, in float64.


def least_squares(file, optimizer, rates, reset=True):
    """The chain of a file: losses, and per link the end of the adapters and the kernel after it."""
    data = {name: np.asarray(value) for name, value in np.load(REFERENCE / file).items()}
    ranks, steps = data["ranks"].tolist(), data["link_steps"].tolist()
    knots = tuple(np.cumsum(steps)[:-1].tolist())
    rule = LoraRule("kernel", rank=ranks[0], alpha=float(data["scale"]) * ranks[0])
    chained = {"knots": knots} if knots else {"links": 2}
    if knots and len(set(ranks)) > 1:
        chained |= {"ranks": ranks, "alphas": [float(data["scale"]) * rank for rank in ranks]}
    config = ColaConfig(LoraConfig(rule, dtype=jnp.float64), schedule=rates, **chained)
    x, y = data["X"], data["Y"]

    def squares(params):
        kernel = lora_merge(
            {"kernel": params["kernel"]}, {"kernel": {"a": params["lora_a"], "b": params["lora_b"]}}, 1.0
        )
        return ((x @ kernel["kernel"] - y) ** 2).sum() / (2 * len(x))

    value_and_grad = cola_value_and_grad(squares, config)
    tx = optimizer(data)

    @functools.partial(jax.jit, static_argnames="count")
    def train(state, opt_state, count):
        def step(carry, _):
            state, opt_state = carry
            value, grads = value_and_grad(state)
            updates, opt_state = tx.update(grads, opt_state, state.lora)
            return (state._replace(lora=optax.apply_updates(state.lora, updates)), opt_state), value

        return jax.lax.scan(step, (state, opt_state), length=count)

    restart = jax.jit(lambda opt_state, lora: cola_reset(tx, opt_state, lora, schedule=rates)[0])
    state = init(KEY, {"kernel": data["W0"].T}, config)
    opt_state = jax.jit(tx.init)(state.lora)
    losses = []
    for k, count in enumerate(steps):
        width = ranks[k]
        given = np.zeros_like(state.lora["kernel"]["a"])
        given[:, :width] = data[f"A_init_{k}"].T
        state = state._replace(lora={"kernel": {"a": given, "b": state.lora["kernel"]["b"]}})
        (state, opt_state), values = train(state, opt_state, count)
        losses += values.tolist()
        adapter = host(state.lora["kernel"])
        near = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
        near(adapter["a"][:, :width].T, data[f"A_end_{k}"])
        near(adapter["b"][:width].T, data[f"B_end_{k}"])
        assert (adapter["a"][:, width:] == 0).all()
        assert (adapter["b"][width:] == 0).all()
        merged = np.asarray(merge(state, config)["kernel"])
        near(merged.T, data[f"W_after_link_{k}"])
        near(np.linalg.svd(merged.T - data["W0"], compute_uv=False), data[f"sv_total_update_{k}"])
        if k + 1 < len(steps):
            state = extend(state, config)
            if reset:
                opt_state = restart(opt_state, state.lora)
    losses.append(float(jax.jit(lambda state: squares({**cola_params(state, config)}))(state)))
    np.testing.assert_allclose(losses, data["loss"], rtol=1e-5, atol=1e-6)
    return losses


def linear(data, length):
    return optax.linear_schedule(float(data["lr0"]), 0.0, length)


def test_parity_and_a_chain_beats_one_link_of_its_rank():
    adam = lambda data: optax.adam(linear(data, int(data["link_steps"].sum())))
    with jax.enable_x64(True):
        chained = least_squares("cola_chain_fixed_rank.npz", adam, "global")
        single = least_squares("lora_single_link.npz", adam, "global")
    assert chained[0] == pytest.approx(single[0])
    assert (round(single[-1], 3), round(chained[-1], 3)) == (1.442, 0.230)


def test_parity_of_rank_steps_with_weight_decay():
    with jax.enable_x64(True):
        least_squares(
            "cola_chain_stepdown_adamw.npz",
            lambda data: optax.adamw(linear(data, 30), weight_decay=float(data["weight_decay"])),
            "per_link",
        )


def test_parity_without_optimizer_reset():
    with jax.enable_x64(True):
        least_squares("cola_chain_no_opt_reset.npz", lambda data: optax.adam(float(data["lr0"])), "global", reset=False)


def test_rank_steps_down_at_constant_shape():
    config = config_with(lora=LoraRule(RULE.pattern, rank=4, alpha=8.0), ranks=(4, 2, 1), keep_links=True)
    history = chain(config, tx=optax.adamw(0.02, weight_decay=0.01))
    adapters = jax.jit(lambda state: cola_adapters(state, config))
    for (before, _, _), rank in zip(history, (4, 2, 1), strict=True):
        for tree in host((before.lora, gradient(before, config))):
            for adapter in tree.values():
                assert (adapter["a"][:, rank:] == 0).all()
                assert (adapter["b"][rank:] == 0).all()
                assert (adapter["b"][:rank] != 0).any()
        assert adapters(before)[1]["up/kernel"] == 8.0 / rank
    state = history[-1][0]
    lora = export(cola_links(state, config))
    assert lora["up/kernel"]["a"].shape == (10, 7)
    np.testing.assert_allclose(applied(PARAMS, lora), outputs(state, config), rtol=1e-4, atol=1e-5)


# The Optax transformation.


def test_transformation_is_the_pure_chain():
    config = ColaConfig(RULE, knots=(3, 5))
    tx = cola(ADAM, config, seed=KEY)
    step = stepper(tx, config)
    params, opt_state = begin(tx, config)
    state, knot = copied(init(KEY, PARAMS, config)), cola_next(ADAM, config)
    inner = jax.jit(ADAM.init)(state.lora)
    for t in range(7):
        if t in config.knots:
            state, inner = knot(state, inner)
        state, inner = trainer(ADAM, config)(state, inner, 1)
        params, opt_state = step(params, opt_state, tie=config.ties(t))
    assert opt_state.link == state.link == 2
    for a, b in zip(jax.tree.leaves(cola_state(opt_state, params)), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_two_executables_in_all():
    config = ColaConfig(RULE, knots=(3, 5))
    tx = cola(ADAM, config)
    step = stepper(tx, config)
    params, opt_state = begin(tx, config)
    params, opt_state = jax.block_until_ready(step(params, opt_state, tie=False))
    with count_compiles() as log:
        for t in range(1, 9):
            params, opt_state = step(params, opt_state, tie=config.ties(t))
    assert log.count == 1, log.names


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_untied_step_costs_what_lora_costs(dtype):
    net, x = nn.Dense(256), np.ones((16, 256), dtype)
    apply = lora_apply(net.apply)
    base = jax.tree.map(lambda leaf: np.zeros(leaf.shape, dtype), jax.eval_shape(net.init, KEY, x)["params"])
    config = ColaConfig(LoraRule("kernel", rank=4), knots=(10,))
    state = init(KEY, base, config)
    scales = lora_scales(state.lora, config.lora)

    def objective(params, x):
        return jnp.mean(apply({"params": params}, x) ** 2)

    def lora_step(carry, base, x):
        lora, opt_state = carry
        grads = jax.grad(lambda own: objective(lora_params(base, own, scales), x))(lora)
        updates, opt_state = ADAM.update(grads, opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state

    tx = cola(ADAM, config)

    def cola_step(tie, carry, x):
        params, opt_state = carry
        _, grads = cola_value_and_grad(objective, config)(cola_state(opt_state, params), x)
        updates, opt_state = tx.update({"lora": grads}, opt_state, params, tie=tie)
        return optax.apply_updates(params, updates), opt_state

    def cost(step, *args):
        executables = Executables(step)
        executables.compile(*args)
        return executables.analysis()

    params = {"base": base, "lora": state.lora}
    plain = cost(lora_step, (state.lora, jax.jit(ADAM.init)(state.lora)), base, x)
    opt_state = jax.jit(tx.init)(params)
    untied, tied = (cost(functools.partial(cola_step, tie), (params, opt_state), x) for tie in (False, True))
    kernel_bytes = base["kernel"].nbytes
    # The link index and the key, a few bytes, are all that it touches more.
    assert untied.bytes_accessed - plain.bytes_accessed < 200
    assert untied.temp_bytes <= plain.temp_bytes
    assert untied.flops <= plain.flops
    assert untied.alias_bytes >= kernel_bytes
    assert tied.bytes_accessed - plain.bytes_accessed > 2 * kernel_bytes


@pytest.mark.parametrize("place", ["inside", "outside"])
def test_knots_under_multi_steps_happen_when_an_update_is_emitted(place):
    config = ColaConfig(RULE, knots=(2,))
    plain = cola(ADAM, config)
    params, opt_state = begin(plain, config)
    step = stepper(plain, config)
    for t in range(4):
        params, opt_state = step(params, opt_state, tie=config.ties(t))

    if place == "inside":
        tx = cola(optax.MultiSteps(ADAM, 3), config)
        grads_of = lambda grads, params: {"lora": grads}
    else:
        tx = optax.MultiSteps(cola(ADAM, config), 3)
        grads_of = lambda grads, params: {"base": jax.tree.map(jnp.zeros_like, params["base"]), "lora": grads}

    @functools.partial(jax.jit, static_argnames="tie")
    def step(params, opt_state, tie):
        _, grads = cola_value_and_grad(loss, config)(cola_state(opt_state, params))
        updates, opt_state = tx.update(grads_of(grads, params), opt_state, params, tie=tie)
        return optax.apply_updates(params, updates), opt_state

    micro, micro_state = begin(tx, config)
    for t in range(12):
        if t == 4:  # A tie where nothing is emitted changes nothing, the accumulated gradients included.
            untied, tied = (step(micro, micro_state, tie) for tie in (False, True))
            assert_equal(tied, untied)
        micro, micro_state = step(micro, micro_state, config.ties(t, every=3))
    assert cola_state(micro_state, micro).link == 1
    for a, b in zip(jax.tree.leaves(micro), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_inside_a_chain_and_with_lora_plus():
    config = ColaConfig(RULE, knots=(1,))
    tx = optax.chain(optax.clip_by_global_norm(1e3), cola(optax.chain(optax.sgd(0.1), scale_lora_b(4.0)), config))
    params, opt_state = begin(tx, config)
    first = params["lora"]["up/kernel"]["a"]
    grads = gradient(cola_state(opt_state, params), config)
    params, opt_state = stepper(tx, config)(params, opt_state, tie=True)
    assert cola_state(opt_state, params).link == 1
    # With scale 2: the first step moves b alone, four times as far as the rate says.
    moved = np.asarray(params["base"]["up"]["kernel"]) - np.asarray(PARAMS["up"]["kernel"])
    want = -0.8 * np.asarray(first) @ np.asarray(grads["up/kernel"]["b"])
    np.testing.assert_allclose(moved, want, rtol=1e-3, atol=1e-6)


def test_a_full_chain_goes_on_when_tied_under_jit():
    config = ColaConfig(RULE, knots=(1,), keep_links=True)
    tx = cola(ADAM, config)
    params, opt_state = begin(tx, config)
    step = stepper(tx, config)
    for _ in range(3):
        params, opt_state = step(params, opt_state, tie=True)
    untied, tied = (step(params, opt_state, tie=tie) for tie in (False, True))
    assert tied[1].link == 1
    for a, b in zip(jax.tree.leaves(tied), jax.tree.leaves(untied), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


# Optimizer resets.


def worked(tx, lora, steps=3):
    ones = jax.tree.map(np.ones_like, lora)

    @jax.jit
    def run(lora):
        state = tx.init(lora)
        for _ in range(steps):
            _, state = tx.update(ones, state, lora)
        return state

    return run(lora)


RATE = optax.linear_schedule(1e-2, 0.0, 100)


@pytest.mark.parametrize(
    ("tx", "kept"),
    [
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE)), {"1/2/count": 3}),
        (optax.inject_hyperparams(optax.adam)(RATE), {"count": 3, "hyperparams_states/learning_rate/count": 3}),
        (optax.sgd(RATE, momentum=0.9), {"1/count": 3}),
        (optax.adafactor(1e-2), {}),
        (optax.partition({"a": optax.adam(RATE), "b": optax.lion(RATE)}, {"k": {"a": "a", "b": "b"}}), None),
    ],
    ids=("adamw", "injected", "sgd", "adafactor", "partition"),
)
def test_reset_is_complete_and_spares_the_schedule(tx, kept):
    lora = {"k": {"a": np.ones((4, 2), np.float32), "b": np.ones((2, 3), np.float32)}}
    old, fresh = worked(tx, lora), jax.jit(tx.init)(lora)
    for schedule in ("global", "per_link"):
        new, restart = cola_reset(tx, old, lora, schedule=schedule)
        assert sorted(restart.reset + restart.kept) == sorted(leaf_paths(old))
        by_path = {
            path: values
            for path, *values in zip(leaf_paths(old), *map(jax.tree.leaves, (old, fresh, new)), strict=True)
        }
        for path in restart.reset:
            assert_equal(by_path[path][1], by_path[path][2])
        for path in restart.kept:
            assert_equal(by_path[path][0], by_path[path][2])
        moments = [path for path in by_path if path.split("/")[-3:-2] in (["mu"], ["nu"], ["trace"], ["v"])]
        assert moments
        assert set(moments) <= set(restart.reset)
        if schedule == "per_link":
            assert restart.kept == ()
            assert_equal(new, fresh)
        elif kept is None:
            assert len(restart.kept) == 2
        else:
            assert {path: by_path[path][2] for path in restart.kept if "hyperparams/" not in path} == kept


def test_global_schedule_runs_on_and_per_link_restarts():
    for schedule, count in (("global", 3), ("per_link", 0)):
        config, tx = ColaConfig(LoraRule("kernel", rank=1), knots=(3,), schedule=schedule), optax.adam(RATE)
        state = init(KEY, {"kernel": np.ones((2, 2), np.float32)}, config)
        _, opt_state = cola_next(tx, config)(state, worked(tx, state.lora))
        assert (int(opt_state[0].count), int(opt_state[1].count)) == (0, count)


def test_a_state_of_unknown_make_is_not_reset_silently():
    lora = {"k": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 3))}}
    odd = optax.GradientTransformation(lambda params: {"seen": jnp.zeros((), jnp.int32)}, lambda u, s, p=None: (u, s))
    for tx, words in ((optax.contrib.prodigy(), "count in ProdigyState"), (odd, "seen in")):
        with pytest.raises(ValueError, match=words + r".*per_link"):
            cola_reset(tx, tx.init(lora), lora)
        assert cola_reset(tx, tx.init(lora), lora, schedule="per_link")[1].kept == ()
    with pytest.raises(ValueError, match="nothing of it can be reset"):
        cola_reset(ADAM, optax.sgd(0.1).init(lora), lora)


# What a knot may lose.


@pytest.mark.parametrize(("size", "error", "kept"), [(1e-3, 0.03, 1.0), (1e-4, 0.32, 1.0), (1e-5, 0.89, 0.30)])
def test_plain_knots_lose_small_changes_in_bfloat16(size, error, kept):
    draw = np.random.default_rng(0)
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32)
    base = {"kernel": (np.float32(0.02) * normal(256, 256)).astype(jnp.bfloat16)}
    rule = LoraRule("kernel", rank=8, alpha=8.0)
    a, b = normal(256, 8), np.float32(size / np.sqrt(8)) * normal(8, 256)
    delta = a @ b
    link = {"kernel": {"a": a, "b": b}}

    def share(kernel):
        change = np.float32(kernel) - np.float32(base["kernel"])
        return np.linalg.norm(change - delta) / np.linalg.norm(delta), (change * delta).sum() / (delta * delta).sum()

    found = {}
    for form in ("plain", "master", "lazy"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore" if form == "plain" else "error", message="merge='plain'")
            config = ColaConfig(rule, links=2, merge=form)
            state = extend(init(KEY, base, config)._replace(lora=link), config)
        found[form] = share(merge(state, config, float32=True)["kernel"])
        assert state.base["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(found["plain"], (error, kept), rtol=0.15)
    for form in ("master", "lazy"):
        np.testing.assert_allclose(found[form], (0.0, 1.0), atol=5e-3)


def test_many_small_knots_add_up_with_a_master():
    base = {"kernel": np.ones((4, 4), jnp.bfloat16)}
    with pytest.warns(UserWarning, match="bfloat16 keeps a third"):
        cola_init(KEY, base, ColaConfig(LoraRule("kernel", rank=2), links=50, merge="plain"))
    config = ColaConfig(LoraRule("kernel", rank=2, alpha=2.0), links=50)
    state = init(KEY, base, config)
    link = {"kernel": {"a": np.ones((4, 2), np.float32), "b": np.full((2, 4), 5e-4, np.float32)}}
    for _ in range(40):  # Each adds 1e-3, an eighth of bfloat16's step at 1.
        state = extend(state._replace(lora=link), config)
    np.testing.assert_allclose(state.master["kernel"], 1.04, rtol=1e-5)
    np.testing.assert_allclose(np.float32(state.base["kernel"]), 1.04, rtol=4e-3)

    tx = cola(optax.sgd(0.0), config)
    params = {"base": base, "lora": link}
    opt_state = jax.jit(tx.init)(params)

    @jax.jit
    def tied(params, opt_state):
        params = {**params, "lora": link}
        updates, opt_state = tx.update({"lora": link}, opt_state, params, tie=True)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(40):
        params, opt_state = tied(params, opt_state)
    assert_equal(cola_state(opt_state, params).base, state.base)
    assert params["base"]["kernel"].dtype == jnp.bfloat16


# Beyond the paper.


def test_gradient_informed_start():
    config = config_with(reinit="gradient")
    state = chain(config_with(), knots=0)[0][0]
    gradients = jax.jit(lambda state: cola_gradients(plain_loss, state, config))(state)
    expected = jax.jit(jax.grad(plain_loss))(merge(state, config))["up"]["kernel"]
    np.testing.assert_allclose(gradients["up/kernel"], expected, rtol=1e-5, atol=1e-7)
    after = extend(state, config, gradients)
    random = extend(state, config_with())
    a = np.asarray(after.lora["up/kernel"]["a"], np.float64)
    basis = np.linalg.svd(np.asarray(expected, np.float64))[0][:, :3]
    cosines = np.linalg.svd(basis.T @ (a / np.linalg.norm(a, axis=0)), compute_uv=False)
    np.testing.assert_allclose(cosines, 1.0, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(a), np.linalg.norm(random.lora["up/kernel"]["a"]), rtol=1e-4)
    # The first step of b sees more of the gradient than from a random start.
    seen = [np.linalg.norm(gradient(state, config)["up/kernel"]["b"]) for state in (random, after)]
    assert seen[1] > 1.2 * seen[0]
    np.testing.assert_allclose(outputs(after, config), outputs(state, config), rtol=1e-5, atol=1e-6)
    first = init(KEY, PARAMS, config, gradients)
    assert_equal(outputs(first, config), jax.jit(Net().apply)({"params": PARAMS}, X))


def test_slope_knots_come_when_the_link_flattens():
    rule = SlopeKnot(min_steps=20, max_steps=400, window=10, fraction=0.1)
    noise = np.random.default_rng(0).normal(size=400) * 0.01

    @jax.jit
    def length(losses):
        def step(state, loss):
            state = rule.update(state, loss)
            return state, state.tie

        return jnp.argmax(jax.lax.scan(step, rule.init(), losses)[1]) + 1

    t = np.arange(400)
    fast, slow = (int(length(np.exp(-t / tau) + noise)) for tau in (20, 60))
    assert 30 < fast < 90
    assert 110 < slow < 260
    assert int(length(-1.0 * t)) == 400
    assert int(length(np.zeros(400))) == 20
    holes = np.where(t % 7 == 3, np.nan, np.exp(-t / 20) + noise)
    assert 30 < int(length(holes)) < 110


def test_knots_keep_shardings_and_agree_with_one_device():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params = {"kernel": np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32)}
    config = ColaConfig(LoraRule("kernel", rank=4), knots=(1, 2), keep_links=True)
    tx, ends = optax.adam(1e-2), []
    for sharded in (False, True):
        state = copied(init(KEY, params, config))
        if sharded:
            base = {"kernel": NamedSharding(mesh, P(None, "model"))}
            place = lora_shardings(base, state.lora)
            lora, past = (jax.device_put(tree, place) for tree in (state.lora, state.past))
            state = state._replace(base=jax.device_put(state.base, base), lora=lora, past=past)
        opt_state, knot = jax.jit(tx.init)(state.lora), cola_next(tx, config)
        types = jax.tree.map(lambda leaf: leaf.sharding, (state.base, state.lora, state.past))
        for _ in range(2):
            lora = jax.jit(functools.partial(jax.tree.map, lambda leaf: leaf + 0.1))(state.lora)
            state, opt_state = knot(state._replace(lora=lora), opt_state)
            found = jax.tree.map(lambda leaf: leaf.sharding, (state.base, state.lora, state.past))
            if sharded:
                assert found == types, (found, types)
        ends.append(merge(state, config)["kernel"])
    np.testing.assert_allclose(*map(np.asarray, ends), rtol=1e-5)


def test_lazy_chain_takes_a_quantised_base():
    base = {"kernel": np.ones((8, 8), np.int8)}
    with pytest.raises(ValueError, match="quantised kernels"):
        cola_init(KEY, base, ColaConfig("kernel", knots=(1,)))
    config = ColaConfig("kernel", knots=(1,), merge="lazy")
    state = extend(init(KEY, base, config), config)
    assert_equal(state.base, base)
    state = state._replace(lora=jax.tree.map(lambda leaf: np.full_like(leaf, 0.1), state.lora))
    with pytest.raises(ValueError, match="kernel is int8, a quantised kernel"):
        merge(state, config)

    @jax.jit
    def both(state):
        right = lora_merge({"kernel": jnp.ones((8, 8))}, *cola_adapters(state, config))
        return cola_merge(state, config, float32=True), right

    found, right = both(state)
    np.testing.assert_array_equal(found["kernel"], right["kernel"])


# Bad input.


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"knots": (20, 10)}, "must increase"),
        ({"knots": (10, 10)}, "must increase"),
        ({"knots": (0, 10)}, r"knots\[0\]=0"),
        ({"knots": (10,), "links": 3}, "make 2 links"),
        ({"knots": (10,), "ranks": (2, 4)}, "grow"),
        ({"knots": (10,), "ranks": (4, 2)}, r"rules have rank \[3\]"),
        ({"knots": (10,), "ranks": (3,)}, "each of the 2 links"),
        ({"knots": (10,), "alphas": (3.0, -1.0)}, r"alphas\[1\]"),
        ({"knots": (10,), "merge": "layz"}, "Did you mean 'lazy'"),
        ({"knots": (10,), "schedule": "local"}, "schedule='local'"),
        ({"knots": (10,), "merge": "lazy", "lora": LoraConfig(RULE, dropout=0.1)}, "dropped out too"),
    ],
)
def test_bad_chains_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        ColaConfig(**{"lora": RULE, **fields})


def test_a_loss_that_does_not_read_adapters_warns_once():
    state = init(KEY, PARAMS, config := ColaConfig(RULE, knots=(3,)))

    def upper(params):
        params = {**params, "down": {name: params["down"][name] for name in ("kernel", "bias")}}
        return jnp.mean(APPLY({"params": params}, X) ** 2)

    for blind, words in (
        (plain_loss, "2 of 2 adapters .of 'down/kernel'"),
        (upper, "1 of 2 adapters .of 'down/kernel'"),
    ):
        with pytest.warns(NoEffectWarning, match=words + r".*Call the network as lora_apply"):
            jax.eval_shape(cola_value_and_grad(blind, config), state)
        jax.eval_shape(cola_value_and_grad(blind, config), state)  # warnings are errors here


def test_bad_calls_are_refused():
    config = ColaConfig(RULE, knots=(3,))
    tx = cola(ADAM, config)
    params, opt_state = begin(tx, config)
    grads = {"lora": params["lora"]}
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(grads, opt_state, tie=True)
    with pytest.raises(ValueError, match="cola needs the gradients as "):
        tx.update(params["lora"], opt_state, params)
    for tie in (None, 1, jnp.bool_(True)):
        with pytest.raises(TypeError, match=r"static_argnames='tie'.*config.ties"):
            tx.update(grads, opt_state, params, tie=tie)
    with pytest.raises(ValueError, match="cola_init"):
        tx.init(params["base"])
    with pytest.raises(ValueError, match=r"cannot sit inside optax.partition or"):
        optax.partition({"ours": tx, "other": ADAM}, {"base": "ours", "lora": "other"}).init(params)
    with pytest.raises(ValueError, match="holds 0 ColaOptState"):
        cola_state(ADAM.init(params), params)
    with pytest.raises(ValueError, match="matches none"):
        cola_init(KEY, PARAMS, ColaConfig("upp/kernel", knots=(3,)))
    state = extend(init(KEY, PARAMS, config), config)
    for knot in (
        lambda: cola_extend(state, config),
        lambda: cola_next(ADAM, config)(state, jax.jit(ADAM.init)(state.lora)),
    ):
        with pytest.raises(ValueError, match="has its 2 links already"):
            knot()
    informed = ColaConfig(RULE, knots=(3,), reinit="gradient")
    with pytest.raises(ValueError, match="gradients=cola_gradients"):
        cola_extend(cola_init(KEY, PARAMS, informed), informed)
    with pytest.raises(ValueError, match="gradients lack the kernels"):
        cola_extend(cola_init(KEY, PARAMS, informed), informed, {"up/kernel": jnp.ones((10, 12))})
    with pytest.raises(ValueError, match="all of the same kernels"):
        cola_export([])
    with pytest.raises(ValueError, match="Two windows are needed"):
        SlopeKnot(min_steps=10, window=8)
