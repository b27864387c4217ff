"""DiSK's losses, its rivals' and its guide networks: parity in float64, invariants, bad input."""

import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from effjax.hardness.disk_losses import best_guide, disk_help, disk_loss, disk_normaliser, top_logits
from effjax.hardness.distillation import dist_loss, dkd_loss, kd_loss
from effjax.hardness.guides import FeatureGuide, MapGuide

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "disk"
LOSS = np.load(REFERENCE / "loss.npz")
NETWORKS = np.load(REFERENCE / "gate_networks.npz")


# One program for each set of shapes and choices.
loss_of = jax.jit(disk_loss, static_argnames="k")
help_of = jax.jit(disk_help, static_argnames=("target", "over"))
kd_of, dkd_of = jax.jit(kd_loss), jax.jit(dkd_loss)
top_of = jax.jit(top_logits, static_argnums=2)


def sigmoid(h):
    return 1 / (1 + np.exp(-h))


def softmax(x):
    return np.exp(x) / np.exp(x).sum(1, keepdims=True)


def loss_reference():
    """In float64: the student's and the teacher's logits, labels, the guide's logits."""
    s, t, y, q = (LOSS[name] for name in ("s_logits", "t_logits", "targets", "gate"))
    return s, t, y, np.log(q[:, 0]) - np.log1p(-q[:, 0])


def by_guide(slopes, h):
    """A gradient in the guide's logits as one in its sigmoid, [rows, 1]."""
    q = sigmoid(h)
    return (np.asarray(slopes) / (q * (1 - q)))[:, None]


@pytest.mark.parametrize("cached", [False, True])
def test_parity_of_the_distillation(cached):
    with jax.enable_x64(True):
        s, t, y, h = loss_reference()
        k = int(LOSS["topK"])
        temperatures = {name: float(LOSS[f"temp_{name[0]}"]) for name in ("student", "teacher")}
        options = {f"{name}_temperature": value for name, value in temperatures.items()}
        teacher = top_of(t, y, k) if cached else t
        value = lambda s, h: float(LOSS["l_nll"]) * disk_loss(s, teacher, y, h, k=k, **options)
        found, (by_s, by_h) = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(s, h)
        np.testing.assert_allclose(found, LOSS["disk50_loss"], rtol=1e-9)
        np.testing.assert_allclose(by_s, LOSS["disk50_grad_s"], rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(by_guide(by_h, h), LOSS["disk50_grad_gate"], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("variant", "target"), [("penalty24", "teacher"), ("penalty25", "label")])
def test_parity_of_the_budget(variant, target):
    with jax.enable_x64(True):
        s, t, y, h = loss_reference()
        price, budget = float(LOSS[f"{variant}_lambda"]), float(LOSS["budget"])

        def value(s, h):
            total = price * jax.nn.relu(disk_help(s, t, y, h, target=target, clamp=float(LOSS["max_ce"])) - budget)
            if variant == "penalty24":
                total += float(LOSS["l_nll"]) * disk_normaliser(h, int(LOSS["topK"]))
            return total

        found, (by_s, by_h) = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(s, h)
        # The release counts wrong rows by an accuracy in float32.
        np.testing.assert_allclose(found, LOSS[f"{variant}_loss"], rtol=1e-7)
        np.testing.assert_allclose(by_s, LOSS[f"{variant}_grad_s"], rtol=1e-6, atol=1e-10)
        np.testing.assert_allclose(by_guide(by_h, h), LOSS[f"{variant}_grad_gate"], rtol=1e-6, atol=1e-10)


RIVALS = {
    "kd": (lambda s, t, y: kd_loss(s, t, temperature=4.0), "kd_loss", "kd_grad_s"),
    "dkd": (dkd_loss, "dkd_loss", "dkd_grad_s"),
    "dist": (lambda s, t, y: dist_loss(s, t), "dist_loss_own", "dist_grad_s_own"),
}


@pytest.mark.parametrize("name", RIVALS)
def test_parity_of_the_rivals(name):
    with jax.enable_x64(True):
        s, t, y, _ = loss_reference()
        loss, value, grad = RIVALS[name]
        # The reference keeps a small number under its correlations' roots.
        rtol = 1e-7 if name == "dist" else 1e-8
        found, slopes = jax.jit(jax.value_and_grad(loss))(s, t, y)
        np.testing.assert_allclose(found, LOSS[value], rtol=rtol)
        np.testing.assert_allclose(slopes, LOSS[grad], rtol=1e-5 if name == "dist" else 1e-7, atol=1e-9)


def _torch(prefix, layers):
    """Flax variables from torch's: ``{Flax layer: (torch layer, whether it is a norm)}``."""
    found = {"params": {}, "batch_stats": {}}
    at = lambda name: NETWORKS[f"{prefix}{name}"]
    for ours, theirs in layers.items():
        weight = at(f"{theirs}.weight")
        if ours.startswith("BatchNorm"):
            found["params"][ours] = {"scale": weight, "bias": at(f"{theirs}.bias")}
            if f"{prefix}{theirs}.running_mean" in NETWORKS:
                stats = {"mean": at(f"{theirs}.running_mean"), "var": at(f"{theirs}.running_var")}
                found["batch_stats"][ours] = stats
        elif weight.ndim == 4:
            found["params"][ours] = {"kernel": weight.transpose(2, 3, 1, 0)}
        else:
            found["params"][ours] = {"kernel": weight.T, "bias": at(f"{theirs}.bias")}
    return found


GUIDES = {
    "B23": (
        FeatureGuide(norm="batch"),
        "t_ft",
        {"Dense_0": 0, "BatchNorm_0": 1, "Dense_1": 3, "BatchNorm_1": 4, "Dense_2": 6},
        {},
    ),
    "B24": (
        MapGuide(features=7, classes=10, channels=12),
        "t_map",
        {"Dense_1": 0, "BatchNorm_3": 1, "Dense_2": 3},
        {
            **{"Conv_0": 0, "BatchNorm_0": 1, "Conv_1": 3, "BatchNorm_1": 4, "Conv_2": 6, "BatchNorm_2": 7},
            "Dense_0": 11,
        },
    ),
}


@pytest.mark.promotes  # batch normalisation in Flax
@pytest.mark.parametrize("name", GUIDES)
def test_parity_of_the_guide_networks(name):
    guide, inputs, routing, convs = GUIDES[name]
    layers = {k: f"routing.{i}" for k, i in routing.items()} | {k: f"ft_convs.{i}" for k, i in convs.items()}
    with jax.enable_x64(True):
        variables, slopes = _torch(f"{name}__", layers), _torch(f"{name}_grad__", layers)["params"]
        x = NETWORKS[inputs]
        x = x.transpose(0, 2, 3, 1) if x.ndim == 4 else x

        def trained(params, variables, x):
            h, _ = guide.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
            q = jax.nn.sigmoid(h)
            return jnp.sum(q * NETWORKS[f"{name}_cotangent"][:, 0]), q

        @jax.jit
        def run(variables, x):
            slopes = jax.grad(trained, has_aux=True)(variables["params"], variables, x)
            return jax.nn.sigmoid(guide.apply(variables, x)), slopes

        found, (grads, again) = run(variables, x)
        np.testing.assert_allclose(found, NETWORKS[f"{name}_eval_gate"][:, 0], rtol=1e-8)
        np.testing.assert_allclose(again, NETWORKS[f"{name}_train_gate"][:, 0], rtol=1e-8)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-10), grads, slopes)


# Invariants


def draw(rows=12, classes=7, seed=0):
    rng = np.random.default_rng(seed)
    a, b, h = (
        (scale * rng.normal(size=shape)).astype(np.float32)
        for scale, shape in ((2, (rows, classes)), (2, (rows, classes)), (1, rows))
    )
    return a, b, rng.integers(-1, classes, rows, dtype=np.int32), h


def full(value):
    return np.full(12, value, np.float32)


def test_without_help_on_all_classes_it_is_plain_distillation():
    a, b, y, _ = draw()
    ours, slopes = jax.jit(jax.value_and_grad(lambda a: disk_loss(a, b, y, full(-np.inf))))(a)
    wanted, theirs = jax.jit(jax.value_and_grad(lambda a: kd_loss(a, b)))(a)
    u = softmax(b / 4.0)
    entropy = -16.0 * np.mean(np.sum(u * np.log(u), axis=1))
    np.testing.assert_allclose(ours, wanted + entropy, rtol=1e-5)
    np.testing.assert_allclose(slopes, theirs, rtol=1e-4, atol=1e-6)


slopes_of = jax.jit(jax.grad(lambda a, b, y, h: disk_loss(a, b, y, h, k=3), argnums=(0, 3)))


def test_help_lowers_the_loss_and_the_students_gradient():
    a, b, y, h = draw()
    assert (np.asarray(slopes_of(a, b, y, h)[1]) < 0).all()
    sizes = [np.abs(slopes_of(a, b, y, full(level))[0]).max() for level in (-30.0, -3.0, 0.0)]
    assert sizes[0] > sizes[1] > sizes[2]
    # At q = 1 what is left of a class's gradient is z / (z + 1).
    assert sizes[2] < sizes[0] * 2 * softmax(a / 4.0).max()


def test_support_holds_the_label_once():
    a, b, y, h = draw()
    y = np.abs(y)
    support, rows = np.zeros((12, 7), bool), np.arange(12)
    support[rows[:, None], top_of(b, y, 3).indices] = True
    support[rows, y] = True
    least = b.min(1, keepdims=True)
    # A teacher whose logits outside the support change, but for the least, teaches the same.
    inside = support | (b == least)
    assert set(inside.sum(1).tolist()) <= {3, 4, 5}
    moved = np.where(inside, b, np.maximum(least, b - np.float32(0.1)))
    found = loss_of(a, b, y, h, k=3)
    np.testing.assert_allclose(loss_of(a, moved, y, h, k=3), found, rtol=1e-6)
    # By a dense formula of our own.
    u = softmax(np.where(support, b / 4.0, least)) * support
    z = softmax(a / 4.0) + sigmoid(h)[:, None]
    np.testing.assert_allclose(found, -16 * np.sum(u * np.log(z), 1).mean(), rtol=1e-5)


def test_symmetries():
    a, b, y, h = draw()
    y = np.abs(y)
    order = np.array([3, 1, 0, 6, 2, 5, 4])
    places = np.argsort(order)[y].astype(np.int32)
    value = lambda a, b, y, t=1.0: float(loss_of(a, b, y, h, k=3, teacher_temperature=t))
    np.testing.assert_allclose(value(a[:, order], b[:, order], places), value(a, b, y), rtol=1e-5)
    turned, straight = (np.asarray(slopes_of(*x, h)[0]) for x in ((a[:, order], b[:, order], places), (a, b, y)))
    np.testing.assert_allclose(turned, straight[:, order], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(value(a + 5, b, y), value(a, b, y), rtol=1e-5)
    # The teacher's logits may be moved at temperature 1 only: the least of them is not divided.
    np.testing.assert_allclose(value(a, b + 1, y), value(a, b, y), rtol=1e-5)
    assert abs(value(a, b + 1, y, 4.0) - value(a, b, y, 4.0)) > 1e-3


def test_rows_that_do_not_take_part_change_nothing():
    a, b, y, h = draw()
    mask = np.arange(12) % 3 > 0
    bad = lambda x, fill: np.where(mask.reshape(-1, *[1] * (x.ndim - 1)), x, x.dtype.type(fill))
    filled = bad(a, np.nan), bad(b, 1e9), bad(y, 3), bad(h, np.nan)
    losses = lambda a, b, y, h, mask: {
        "disk": disk_loss(a, b, y, h, k=3, mask=mask),
        "help": disk_help(a, b, y, h, mask=mask),
        "label": disk_help(a, b, y, h, target="label", over="all", mask=mask),
        "normaliser": disk_normaliser(h, 3, mask),
        "kd": kd_loss(a, b, mask=mask),
        "dkd": dkd_loss(a, b, y, mask=mask),
        "dist": dist_loss(a, b, mask=mask),
    }

    def run(a, b, y, h, mask):
        """All losses and, row by row of the Jacobian, the gradient of each."""
        values, pull = jax.vjp(lambda a, h: losses(a, b, y, h, mask), a, h)
        return values, {
            name: pull({other: jnp.float32(other == name) for other in values}) for name in values
        }  # fmt: skip

    alone = jax.jit(losses)(a[mask], b[mask], y[mask], h[mask], None)
    values, slopes = jax.jit(run)(*filled, mask)
    for name, value in values.items():
        np.testing.assert_allclose(value, alone[name], rtol=1e-4, err_msg=name)
        assert all(np.isfinite(slope).all() for slope in slopes[name]), name
    assert loss_of(a, b, y, h, k=3, mask=np.zeros(12, bool)) == 0.0


def test_an_unknown_label_counts_nowhere_that_needs_it():
    a, b, y, h = draw()
    known, unknown = np.abs(y), np.full(12, -1, np.int32)
    # The label has no place in the support, and no row is wrong: the help is divided by 1.
    nothing = float(loss_of(a, b, unknown, h, k=1))
    assert nothing != float(loss_of(a, b, known, h, k=1))
    np.testing.assert_allclose(nothing, loss_of(a, b, b.argmax(1).astype(np.int32), h, k=1), rtol=1e-6)
    assert help_of(a, b, unknown, h, target="label") == 0.0
    found, mean = help_of(a, b, unknown, h), help_of(a, b, unknown, h, over="all")
    np.testing.assert_allclose(found, 12 * np.asarray(mean), rtol=1e-5)
    half = np.where(np.arange(12) < 6, known, -1)
    np.testing.assert_allclose(dkd_of(a, b, half), dkd_of(a[:6], b[:6], known[:6]), rtol=1e-5)


def test_help_grows_with_the_guide_and_is_finite_where_all_rows_are_right():
    a, b, y, h = draw()
    y = np.abs(y)
    run = jax.jit(jax.value_and_grad(lambda h, y: disk_help(a, b, y, h)))
    found = [float(run(h + np.float32(shift), y)[0]) for shift in (-np.inf, -1.0, 0.0, 1.0)]
    assert found[0] == 0.0
    assert all(low < high for low, high in itertools.pairwise(found))
    value, slopes = run(h, a.argmax(1).astype(np.int32))
    assert np.isfinite(value)
    assert np.isfinite(slopes).all()


def test_large_logits_give_finite_values_and_gradients():
    a, b, y, h = draw()
    run = jax.jit(jax.value_and_grad(lambda a, b, h: disk_loss(a, b, y, h, k=3), argnums=(0, 2)))
    for size in (np.float32(1e2), np.float32(1e4)):
        for guide in (h, full(-np.inf), size * h):
            value, slopes = run(size * a, size * b, guide)
            assert np.isfinite(value)
            assert np.isfinite(slopes[0]).all()


def test_bfloat16_is_computed_in_float32():
    a, b, y, h = draw()
    half = [x.astype(jnp.bfloat16) for x in (a, b, h)]
    found = loss_of(half[0], half[1], y, half[2], k=3)
    assert found.dtype == jnp.float32
    again = [x.astype(np.float32) for x in half]
    np.testing.assert_allclose(found, loss_of(again[0], again[1], y, again[2], k=3), rtol=1e-6)


def test_over_eight_devices_and_under_vmap():
    a, b, y, h = draw(rows=16)
    value = jax.jit(lambda a, b, y, h: (disk_loss(a, b, y, h, k=3), disk_help(a, b, y, h), dist_loss(a, b)))
    expected = value(a, b, y, h)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (a, b, y, h)]
    np.testing.assert_allclose(value(*sharded), expected, rtol=1e-5)
    stacked = jax.jit(jax.vmap(value, in_axes=(0, None, None, None)))(np.stack([a, 2 * a]), b, y, h)
    np.testing.assert_allclose([np.asarray(part)[0] for part in stacked], expected, rtol=1e-5)


# The best guide


def test_best_guide_spends_the_budget_where_it_helps_most():
    a, b, y, _ = draw(rows=32)
    budget = 0.3
    help_and_loss = lambda h: (disk_help(a, b, y, h, over="all"), disk_loss(a, b, y, h, k=3))
    h, price = jax.jit(lambda: best_guide(a, b, y, budget, k=3))()
    run = jax.jit(jax.vmap(help_and_loss))  # of five guides at once
    spent, loss = (np.asarray(x)[0] for x in run(np.tile(h, (5, 1))))
    np.testing.assert_allclose(spent, budget, rtol=1e-3)
    assert price > 0
    # Optimality: where q is inside (0, 1) the gain per cost is the same; at 1 it is more, at 0 less.
    q = sigmoid(np.asarray(h))
    cost, gain = jax.jit(jax.jacrev(lambda q: help_and_loss(jnp.log(q) - jnp.log1p(-q))))(np.clip(q, 1e-4, 1 - 1e-4))
    ratio, inside = -2 * np.asarray(gain) / (32 * np.asarray(cost)), (q > 1e-3) & (q < 0.999)
    assert inside.sum() >= 3
    np.testing.assert_allclose(ratio[inside], price, rtol=1e-2)
    assert (ratio[q > 0.999] >= float(price) * 0.99).all()
    assert (ratio[q < 1e-3] <= float(price) * 1.01).all()
    # No guide that is drawn and scaled to the same budget does better.
    others = (np.random.default_rng(1).normal(size=(5, 32)) * 3).astype(np.float32)
    low, high = np.full((5, 1), -30.0, np.float32), np.full((5, 1), 30.0, np.float32)
    for _ in range(40):
        middle = (low + high) / 2
        over = np.asarray(run(others + middle)[0])[:, None] > budget
        low, high = np.where(over, low, middle), np.where(over, middle, high)
    assert (loss <= np.asarray(run(others + low)[1]) + 1e-4).all()


def test_best_guide_within_its_budget_helps_everywhere():
    a, b, y, _ = draw()
    h, price = guide_of(a, b, y, 1e3)
    assert price == 0.0
    assert (sigmoid(np.asarray(h)) > 0.999).all()


guide_of = jax.jit(lambda a, b, y, budget: best_guide(a, b, y, budget, k=3))


def test_best_guide_is_traceable_with_a_scheduled_budget():
    a, b, y, _ = draw()
    spent = [help_of(a, b, y, guide_of(a, b, y, budget)[0], over="all") for budget in (0.1, 0.4)]
    np.testing.assert_allclose(spent, [0.1, 0.4], rtol=1e-3)


A, B, Y, H = np.zeros((4, 3), np.float32), np.zeros((4, 3), np.float32), np.zeros(4, np.int32), np.zeros(4, np.float32)
BAD = {
    "labels [N, 1]": (lambda: disk_loss(A, B, Y[:, None], H), "labels are int32[4, 1]; give integers [4]"),
    "guide [N, 1]": (lambda: disk_loss(A, B, Y, H[:, None]), "guide_logits have shape (4, 1); expected (4,)"),
    "teacher of other classes": (lambda: disk_loss(A, B[:, :2], Y, H), "teacher has shape (4, 2); expected (4, 3)"),
    "k": (lambda: disk_loss(A, B, Y, H, k=4), "k=4 must be an integer in [1, 3]"),
    "k of a cache": (lambda: disk_loss(A, top_logits(B, Y, 2), Y, H, k=3), "teacher holds the 2 largest logits"),
    "cache of other rows": (
        lambda: disk_loss(A, top_logits(B[:2], Y[:2], 2), Y, H),
        "teacher.indices have shape (2, 2)",
    ),
    "temperature": (lambda: disk_loss(A, B, Y, H, student_temperature=0.0), "student_temperature=0.0 must be"),
    "target": (lambda: disk_help(A, B, Y, H, target="teachers"), "Did you mean 'teacher'?"),
    "over": (lambda: disk_help(A, B, Y, H, over="rows"), "over='rows' is not one of 'wrong', 'all'"),
    "budget": (lambda: best_guide(A, B, Y, 0.0), "budget=0.0 must be a number in (0"),
    "token logits": (lambda: kd_loss(A[None], B[None]), "Flatten other axes into rows"),
    "rival's teacher": (lambda: dkd_loss(A, B[:2], Y), "teacher_logits have shape (2, 3); expected (4, 3)"),
    "alpha": (lambda: dkd_loss(A, B, Y, alpha=-1.0), "alpha=-1.0 must be a number in [0"),
    "norm": (lambda: FeatureGuide(norm="group").init(jax.random.key(0), A), "norm='group' is not one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    run, words = BAD[case]
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        jax.eval_shape(run)
