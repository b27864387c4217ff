"""DiSK's stages: parity with the authors' alternation, what each step leaves alone, presets, resuming, bad input."""

import functools
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from effjax.core.cost import count_compiles
from effjax.hardness.disk import DiskProblem, disk, disk_init, disk_next, disk_step
from effjax.hardness.disk_config import DiskConfig, disk_passes, disk_preset
from effjax.hardness.disk_losses import TopLogits, disk_help, disk_loss, top_logits
from effjax.hardness.guides import FeatureGuide
from effjax.optim.dual_ascent import cyclic_level
from effjax.train.checkpoint import Checkpoints

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "disk"
RUN = np.load(REFERENCE / "alternating.npz")
SCHEDULES = np.load(REFERENCE / "schedules.npz")


def test_parity_of_the_schedules():
    with jax.enable_x64(True):
        config = disk_preset("release_cifar", optax.sgd(0.1))
        epochs = np.arange(int(SCHEDULES["epochs"]))
        found = jax.jit(jax.vmap(lambda e: (config.at(config.price, e), config.at(config.budget, e))))(epochs)
        np.testing.assert_allclose(found[0], SCHEDULES["lmbda"], rtol=1e-12)
        np.testing.assert_allclose(found[1], SCHEDULES["budget"], rtol=1e-12)


def _network(name):
    return {key.split("__")[1]: RUN[key] for key in RUN.files if key.startswith(f"{name}__")}


def _layers(weights, x):
    hidden = jax.nn.relu(x @ weights["a.weight"].T + weights["a.bias"][None])
    return hidden, hidden @ weights["b.weight"].T + weights["b.bias"][None]


def test_parity_of_the_alternation():
    """Five rounds of two passes each, by the authors' program."""
    setting = lambda name: RUN[name].item()
    sgd = lambda rate: optax.chain(
        optax.add_decayed_weights(setting("weight_decay")), optax.sgd(rate, setting("momentum"))
    )
    with jax.enable_x64(True):
        teacher = _network("teacher0")
        config = disk_preset(
            "release_cifar",
            sgd(setting("s_lr")),
            guide_tx=sgd(setting("g_lr")),
            epochs=setting("outer"),
            student_passes=setting("kt"),
            guide_passes=setting("kg"),
            first_guide_passes=0,
            k=setting("topK"),
            student_temperature=setting("temp_s"),
            price=cyclic_level(setting("lmbda_min"), setting("lmbda_max"), setting("lmbda_Ti")),
            budget=cyclic_level(
                setting("budget_max0"), setting("budget_min"), setting("budget_Ti"), setting("budget_gamma")
            ),
        )
        problem = DiskProblem(
            student=lambda v, batch, train, key: (_layers(v["params"], batch["x"])[1], {}),
            teacher=lambda batch: _layers(teacher, batch["x"])[::-1],
            guide=lambda v, features, train: (_layers(v["params"], features)[1][:, 0], {}),
        )
        size = setting("batch_size")
        parts = [slice(i, i + size) for i in range(0, len(RUN["y"]), size)]
        batches = [{"x": RUN["X"][part], "label": RUN["y"][part]} for part in parts]
        state = disk_init(jax.random.key(0), {"params": _network("student0")}, {"params": _network("gate0")}, config)
        for epoch in range(config.epochs):
            for name in disk_passes(config, epoch):
                for batch in batches:
                    state, _ = STEP(state, batch, problem=problem, config=config, step=name)
            state = disk_next(state)
            for name, found in (("student", state.params), ("gate", state.guide["params"])):
                wanted = _network(f"{name}_after{epoch}")
                for key in wanted:
                    np.testing.assert_allclose(found[key], wanted[key], rtol=1e-6, atol=1e-9, err_msg=f"{name} {key}")


# Small networks with running statistics.


class Student(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(6)(x))
        return nn.Dense(4)(nn.relu(x))


STUDENT, GUIDE = Student(), FeatureGuide((8,), norm="batch")
RNG = np.random.default_rng(0)
X, MAP = RNG.normal(size=(32, 5)).astype(np.float32), RNG.normal(size=(5, 4)).astype(np.float32)
BEST = np.argmax(X @ MAP, axis=1)
Y = np.append(np.arange(6) % 4, BEST[6:]).astype(np.int32)
BATCH = {"x": X, "label": Y}


def student(variables, batch, train, key):
    if not train:
        return STUDENT.apply(variables, batch["x"]), {}
    return STUDENT.apply(variables, batch["x"], train=True, mutable=["batch_stats"])


def guide(variables, features, train):
    if not train:
        return GUIDE.apply(variables, features), {}
    return GUIDE.apply(variables, features, train=True, mutable=["batch_stats"])


def teacher(batch):
    return 4.0 * jnp.tanh(batch["x"] @ MAP), batch["x"]


PROBLEM = DiskProblem(student, teacher, guide)
VARIABLES = tuple(jax.jit(net.init)(jax.random.key(seed), X) for seed, net in ((2, STUDENT), (3, GUIDE)))
CONFIG = DiskConfig(tx=optax.sgd(0.1, momentum=0.9), guide_tx=optax.sgd(0.02), epochs=3, k=2)
STEP = jax.jit(disk_step, static_argnames=("problem", "config", "step"))


def begin(config=CONFIG):
    return disk_init(jax.random.key(1), *VARIABLES, config)


def bits(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def same(left, right):
    leaves = [map(bits, jax.tree.leaves(tree)) for tree in (left, right)]
    return all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))


def take(state, step, config=CONFIG, batch=BATCH, problem=PROBLEM):
    return STEP(state, batch, problem=problem, config=config, step=step)


def test_a_step_of_one_network_leaves_the_other_as_it_is():
    before = begin()
    after, _ = take(before, "student")
    assert same((before.guide, before.guide_opt, before.dual), (after.guide, after.guide_opt, after.dual))
    assert not same(before.params, after.params)
    assert not same(before.model, after.model)
    after, _ = take(before, "guide")
    # Not even the running statistics, as the student runs in evaluation mode.
    assert same((before.params, before.model, before.opt), (after.params, after.model, after.opt))
    assert not same(before.guide["params"], after.guide["params"])
    assert not same(before.guide["batch_stats"], after.guide["batch_stats"])
    after, _ = take(before, "best")
    assert same((before.guide, before.dual), (after.guide, after.dual))
    assert "guide" not in str(jax.tree_util.tree_structure(after.variables))


def test_a_pair_is_the_students_step_and_a_guides_step():
    before = begin()
    both, metrics = take(before, "pairs")
    alone, _ = take(before, "student")
    # To the last bit but for what XLA makes of two programs.
    pairs = zip(*map(jax.tree.leaves, ((both.params, both.model), (alone.params, alone.model))), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert not same(both.guide, before.guide)
    assert set(metrics) == {"loss", "help", "guide", "multiplier"}

    @jax.jit
    def by_hand(own, guides, x):
        """Its loss with the guide before the step, in evaluation mode."""
        logits = STUDENT.apply(own, x, train=True, mutable=["batch_stats"])[0]
        loss = 0.9 * disk_loss(logits, teacher(BATCH)[0], Y, GUIDE.apply(guides, x), k=2)
        loss += 0.1 * optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()
        # The guide's part sees those logits, and not what the student says after its step.
        h = GUIDE.apply(guides, x, train=True, mutable=["batch_stats"])[0]
        return loss, disk_help(logits, teacher(BATCH)[0], Y, h)

    loss, spent = by_hand(*VARIABLES, X)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["help"], spent, rtol=1e-5)


ANSWER = jax.jit(STUDENT.apply)


@pytest.mark.parametrize("order", ["pairs", "separate", "joint", "best"])
def test_every_order_learns(order):
    config = DiskConfig(tx=optax.adam(0.02), epochs=40, k=2, order=order)
    state = disk(jax.random.key(1), *VARIABLES, PROBLEM, lambda number: [BATCH] * 3, config=config)
    hits, start = ((np.asarray(ANSWER(v, X)).argmax(1) == BEST).mean() for v in (state.variables, VARIABLES[0]))
    assert hits > max(0.7, start + 0.2)
    assert int(state.epoch) == 40
    assert int(state.count) == 120 * len(disk_passes(config, 1))


def test_the_multiplier_holds_the_help_to_its_budget():
    """Without a price and a normaliser the guide goes to 1; the multiplier brings it back."""
    free = DiskConfig(tx=optax.sgd(0.0), guide_tx=optax.adam(0.05), epochs=1, k=2, price=0.0, normaliser="none")
    held = DiskConfig(
        tx=optax.sgd(0.0), guide_tx=optax.adam(0.05), epochs=1, k=2, budget=0.4, normaliser="none",
        multiplier=0.0, dual=optax.sgd(0.3),
    )  # fmt: skip
    ends = {}
    for name, config in (("free", free), ("held", held)):
        run = jax.jit(lambda state, config=config: jax.lax.scan(
            lambda s, _: disk_step(s, BATCH, PROBLEM, config, step="guide"), state, length=400
        ))  # fmt: skip
        ends[name] = run(begin(config))
    assert np.asarray(ends["free"][1]["guide"])[-1] > 0.99
    spent = np.asarray(ends["held"][1]["help"])
    assert spent[0] > 0.5
    np.testing.assert_allclose(spent[-100:].mean(), 0.4, atol=0.05)
    assert float(ends["held"][0].dual.multipliers["help"]) > 0


def test_schedules_move_by_rounds_and_do_not_recompile():
    config = DiskConfig(tx=optax.sgd(0.1), epochs=4, k=2, budget=(0.6, 0.2), price=(1.0, 3.0))
    state, first = take(begin(config), "guide", config)
    state, second = take(state, "guide", config)
    state = disk_next(disk_next(state))
    with count_compiles() as log:
        _, later = take(state, "guide", config)
    assert log.count == 0, log.names
    assert float(first["multiplier"]) == float(second["multiplier"]) == 1.0
    np.testing.assert_allclose(later["multiplier"], 2.0, rtol=1e-6)


def test_a_cached_teacher_gives_the_same_steps():
    top = jax.jit(lambda batch: top_logits(teacher(batch)[0], batch["label"], 2))(BATCH)
    columns = {**BATCH, **{f"teacher_{name}": value for name, value in top._asdict().items()}}
    cached = PROBLEM._replace(
        teacher=lambda batch: (TopLogits(*(batch[f"teacher_{name}"] for name in TopLogits._fields)), batch["x"])
    )
    ends = take(begin(), "pairs")[0], take(begin(), "pairs", batch=columns, problem=cached)[0]
    for a, b in zip(*map(jax.tree.leaves, (ends[0]._replace(key=0), ends[1]._replace(key=0))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_rows_that_do_not_take_part_and_unknown_labels():
    mask = np.arange(32) < 20
    problem = DiskProblem(
        student=lambda v, batch, train, key: (batch["x"] @ v["params"], {}),
        teacher=teacher,
        guide=lambda v, features, train: ((features @ v["params"])[:, 0], {}),
        mask=lambda batch: batch["mask"],
    )
    state = disk_init(jax.random.key(0), {"params": MAP}, {"params": MAP[:, :1]}, CONFIG)
    dirty = {"x": np.where(mask[:, None], X, np.float32(1e3)), "label": np.where(mask, Y, 2), "mask": mask}
    clean = {"x": X[:20], "label": Y[:20], "mask": mask[:20]}
    ends = [take(state, "pairs", batch=batch, problem=problem) for batch in (dirty, clean)]
    for a, b in zip(
        *map(jax.tree.leaves, ((ends[0][0].params, ends[0][1]), (ends[1][0].params, ends[1][1]))), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    unknown = {"x": X, "label": np.full(32, -1), "mask": np.ones(32, bool)}
    after, metrics = take(state, "pairs", batch=unknown, problem=problem)
    assert np.isfinite(metrics["loss"])
    assert not same(after.params, state.params)  # the teacher still teaches


def test_resumes_bitwise_from_a_checkpoint(tmp_path):
    state = take(take(begin(), "pairs")[0], "pairs")[0]
    saved = Checkpoints(tmp_path, {"study": "disk"})
    saved.save(2, state, {})
    saved.close()
    again = Checkpoints(tmp_path, {"study": "disk"})
    _, restored, _ = again.restore(jax.eval_shape(lambda: state))
    again.close()
    ends = [disk_next(take(s, "pairs")[0]) for s in (state, restored)]
    assert same(*ends)


def test_over_eight_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    batch = {name: jax.device_put(x, NamedSharding(mesh, P("data"))) for name, x in BATCH.items()}
    state, metrics = take(begin(), "pairs", batch=batch)
    alone, expected = take(begin(), "pairs")
    for name in expected:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (state.guide, alone.guide)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_seeds_under_vmap():
    states = jax.jit(jax.vmap(lambda key: disk_init(key, *VARIABLES, CONFIG)))(jax.random.split(jax.random.key(0), 2))
    step = jax.vmap(functools.partial(disk_step, problem=PROBLEM, config=CONFIG, step="pairs"), in_axes=(0, None))
    _, metrics = jax.jit(step)(states, BATCH)
    assert metrics["loss"].shape == (2,)


def test_presets_differ_where_the_sources_do():
    paper, cifar, imagenet = (
        disk_preset(name, optax.sgd(0.1)) for name in ("paper", "release_cifar", "release_imagenet")
    )
    assert (paper.target, paper.over, paper.clamp, paper.k) == ("label", "all", None, None)
    assert disk_passes(cifar, 0) == ("guide",) * 5 + ("student",) * 3 + ("guide",) * 3
    assert disk_passes(cifar, 1) == ("student",) * 3 + ("guide",) * 3
    assert disk_passes(imagenet, 0) == ("joint",)
    np.testing.assert_allclose(imagenet.at(imagenet.price, 30), 0.1, rtol=1e-6)
    for preset in (paper, imagenet):
        preset = disk_preset("paper" if preset is paper else "release_imagenet", optax.sgd(0.01), k=2)
        _, metrics = take(begin(preset), "joint", preset)
        assert np.isfinite(metrics["loss"])


BAD = {
    "preset": (lambda: disk_preset("release", optax.sgd(0.1)), "name='release' is not one of"),
    "field": (lambda: disk_preset("paper", optax.sgd(0.1), temprature=1.0), "'temprature' is no field of DiskConfig"),
    "nothing to distil": (lambda: DiskConfig(tx=optax.sgd(0.1), distil_weight=0.0), "leaves nothing to distil"),
    "temperature": (lambda: DiskConfig(tx=optax.sgd(0.1), student_temperature=-1.0), "student_temperature=-1.0"),
    "order": (lambda: DiskConfig(tx=optax.sgd(0.1), order="pair"), "Did you mean 'pairs'"),
    "variables": (lambda: disk_init(jax.random.key(0), {"w": X}, VARIABLES[1], CONFIG), "with the entry 'params'"),
    "step": (lambda: disk_step(begin(), BATCH, PROBLEM, CONFIG, step="both"), "step='both' is not one of"),
    "labels": (
        lambda: disk_step(begin(), {**BATCH, "label": Y[:, None]}, PROBLEM, CONFIG),
        "labels are int32[32, 1]; give integers [32]",
    ),
    "guide [N, 1]": (
        lambda: disk_step(begin(), BATCH, PROBLEM._replace(guide=lambda v, f, t: (f[:, :1], {})), CONFIG),
        "guide_logits have shape (32, 1); expected (32,)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    run, words = BAD[case]
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        jax.eval_shape(run)
