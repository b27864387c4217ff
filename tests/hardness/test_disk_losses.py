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


def loss_reference():
    """In float64: the student's and the teacher's logits, labels, the guide's logits."""
    s, t, y, q = (jnp.asarray(LOSS[name]) for name in ("s_logits", "t_logits", "targets", "gate"))
    return s, t, y, jnp.log(q[:, 0]) - jnp.log1p(-q[:, 0])


def by_guide(slopes, h):
    """A gradient in the guide's logits as one in its sigmoid, [rows, 1]."""
    q = jax.nn.sigmoid(h)
    return (slopes / (q * (1 - q)))[:, None]


@pytest.mark.parametrize("cached", [False, True])
def test_parity_of_the_distillation(cached):
    with jax.enable_x64(True):
        s, t, y, h = loss_reference()
        k = int(LOSS["topK"])
        temperatures = {name: float(LOSS[f"temp_{name[0]}"]) for name in ("student", "teacher")}
        options = {f"{name}_temperature": value for name, value in temperatures.items()}
        teacher = top_logits(t, y, k) if cached else t
        value = lambda s, h: float(LOSS["l_nll"]) * disk_loss(s, teacher, y, h, k=k, **options)
        np.testing.assert_allclose(value(s, h), LOSS["disk50_loss"], rtol=1e-9)
        by_s, by_h = jax.grad(value, argnums=(0, 1))(s, h)
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

        # The release counts wrong rows by an accuracy in float32.
        np.testing.assert_allclose(value(s, h), LOSS[f"{variant}_loss"], rtol=1e-7)
        by_s, by_h = jax.grad(value, argnums=(0, 1))(s, h)
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
        np.testing.assert_allclose(loss(s, t, y), LOSS[value], rtol=rtol)
        np.testing.assert_allclose(
            jax.grad(loss)(s, t, y), LOSS[grad], rtol=1e-5 if name == "dist" else 1e-7, atol=1e-9
        )


def _torch(prefix, layers):
    """Flax variables from torch's: ``{Flax layer: (torch layer, whether it is a norm)}``."""
    found = {"params": {}, "batch_stats": {}}
    at = lambda name: jnp.asarray(NETWORKS[f"{prefix}{name}"])
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


@pytest.mark.parametrize("name", GUIDES)
def test_parity_of_the_guide_networks(name):
    guide, inputs, routing, convs = GUIDES[name]
    layers = {k: f"routing.{i}" for k, i in routing.items()} | {k: f"ft_convs.{i}" for k, i in convs.items()}
    with jax.enable_x64(True):
        variables, slopes = _torch(f"{name}__", layers), _torch(f"{name}_grad__", layers)["params"]
        x = jnp.asarray(NETWORKS[inputs])
        x = x.transpose(0, 2, 3, 1) if x.ndim == 4 else x
        found = jax.nn.sigmoid(guide.apply(variables, x))
        np.testing.assert_allclose(found, NETWORKS[f"{name}_eval_gate"][:, 0], rtol=1e-8)

        def trained(params):
            h, _ = guide.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
            return jax.nn.sigmoid(h)

        value = lambda params: jnp.sum(trained(params) * NETWORKS[f"{name}_cotangent"][:, 0])
        np.testing.assert_allclose(trained(variables["params"]), NETWORKS[f"{name}_train_gate"][:, 0], rtol=1e-8)
        grads = jax.grad(value)(variables["params"])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-10), grads, slopes)


# Invariants


def draw(rows=12, classes=7, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    a, b = (2 * jax.random.normal(key, (rows, classes)) for key in keys[:2])
    return a, b, jax.random.randint(keys[2], (rows,), -1, classes), jax.random.normal(keys[3], (rows,))


def test_without_help_on_all_classes_it_is_plain_distillation():
    a, b, y, _ = draw()
    none = jnp.full(12, -jnp.inf)
    ours = jax.jit(lambda a: disk_loss(a, b, y, none))
    u = jax.nn.softmax(b / 4.0)
    entropy = -16.0 * jnp.mean(jnp.sum(u * jnp.log(u), axis=1))
    np.testing.assert_allclose(ours(a), kd_loss(a, b) + entropy, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(ours)(a), jax.grad(lambda a: kd_loss(a, b))(a), rtol=1e-4, atol=1e-6)


def test_help_lowers_the_loss_and_the_students_gradient():
    a, b, y, h = draw()
    value = lambda a, h: disk_loss(a, b, y, h, k=3)
    assert bool((jax.grad(value, argnums=1)(a, h) < 0).all())
    sizes = [float(jnp.abs(jax.grad(value)(a, jnp.full(12, level))).max()) for level in (-30.0, -3.0, 0.0)]
    assert sizes[0] > sizes[1] > sizes[2]
    # At q = 1 what is left of a class's gradient is z / (z + 1).
    z = jax.nn.softmax(a / 4.0)
    assert sizes[2] < sizes[0] * 2 * float(z.max())


def test_support_holds_the_label_once():
    a, b, y, h = draw()
    y = jnp.abs(y)
    top = top_logits(b, y, 3)
    # A teacher whose logits outside the support change, but for the least, teaches the same.
    inside = jnp.zeros((12, 7), bool).at[jnp.arange(12)[:, None], top.indices].set(True)
    inside = inside.at[jnp.arange(12), y].set(True) | (b == b.min(1, keepdims=True))
    assert set(np.asarray(inside.sum(1)).tolist()) <= {3, 4, 5}
    moved = jnp.where(inside, b, jnp.maximum(b.min(1, keepdims=True), b - 0.1))
    np.testing.assert_allclose(disk_loss(a, moved, y, h, k=3), disk_loss(a, b, y, h, k=3), rtol=1e-6)
    # By a dense formula of our own.
    support = (
        jnp.zeros((12, 7), bool).at[jnp.arange(12)[:, None], top.indices].set(True).at[jnp.arange(12), y].set(True)
    )
    u = jax.nn.softmax(jnp.where(support, b / 4.0, b.min(1, keepdims=True))) * support
    z = jax.nn.softmax(a / 4.0) + jax.nn.sigmoid(h)[:, None]
    np.testing.assert_allclose(disk_loss(a, b, y, h, k=3), -16 * jnp.sum(u * jnp.log(z), 1).mean(), rtol=1e-5)


def test_symmetries():
    a, b, y, h = draw()
    y = jnp.abs(y)
    order = jnp.array([3, 1, 0, 6, 2, 5, 4])
    value = lambda a, b, y, t=1.0: disk_loss(a, b, y, h, k=3, teacher_temperature=t)
    turned = value(a[:, order], b[:, order], jnp.argsort(order)[y])
    np.testing.assert_allclose(turned, value(a, b, y), rtol=1e-5)
    slopes = jax.grad(value)(a[:, order], b[:, order], jnp.argsort(order)[y])
    np.testing.assert_allclose(slopes, jax.grad(value)(a, b, y)[:, order], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(value(a + 5.0, b, y), value(a, b, y), rtol=1e-5)
    # The teacher's logits may be moved at temperature 1 only: the least of them is not divided.
    np.testing.assert_allclose(value(a, b + 1.0, y), value(a, b, y), rtol=1e-5)
    assert abs(value(a, b + 1.0, y, 4.0) - value(a, b, y, 4.0)) > 1e-3


def test_rows_that_do_not_take_part_change_nothing():
    a, b, y, h = draw()
    mask = jnp.arange(12) % 3 > 0
    bad = lambda x, fill: jnp.where(mask.reshape(-1, *[1] * (x.ndim - 1)), x, fill)
    filled = bad(a, jnp.nan), bad(b, 1e9), bad(y, 3), bad(h, jnp.nan)
    losses = {
        "disk": lambda a, b, y, h, mask: disk_loss(a, b, y, h, k=3, mask=mask),
        "help": lambda a, b, y, h, mask: disk_help(a, b, y, h, mask=mask),
        "label": lambda a, b, y, h, mask: disk_help(a, b, y, h, target="label", over="all", mask=mask),
        "normaliser": lambda a, b, y, h, mask: disk_normaliser(h, 3, mask),
        "kd": lambda a, b, y, h, mask: kd_loss(a, b, mask=mask),
        "dkd": lambda a, b, y, h, mask: dkd_loss(a, b, y, mask=mask),
        "dist": lambda a, b, y, h, mask: dist_loss(a, b, mask=mask),
    }
    for name, loss in losses.items():
        alone = jax.jit(loss)(a[mask], b[mask], y[mask], h[mask], None)
        value, slopes = jax.jit(jax.value_and_grad(loss, argnums=(0, 3)))(*filled, mask)
        np.testing.assert_allclose(value, alone, rtol=1e-4, err_msg=name)
        assert all(bool(jnp.isfinite(slope).all()) for slope in slopes), name
    assert disk_loss(a, b, y, h, k=3, mask=jnp.zeros(12, bool)) == 0.0


def test_an_unknown_label_counts_nowhere_that_needs_it():
    a, b, y, h = draw()
    known, unknown = jnp.abs(y), jnp.full(12, -1)
    # The label has no place in the support, and no row is wrong: the help is divided by 1.
    assert disk_loss(a, b, unknown, h, k=1) != disk_loss(a, b, known, h, k=1)
    best = b.argmax(1)
    np.testing.assert_allclose(disk_loss(a, b, unknown, h, k=1), disk_loss(a, b, best, h, k=1), rtol=1e-6)
    assert disk_help(a, b, unknown, h, target="label") == 0.0
    np.testing.assert_allclose(disk_help(a, b, unknown, h), 12 * disk_help(a, b, unknown, h, over="all"), rtol=1e-5)
    half = jnp.where(jnp.arange(12) < 6, known, -1)
    np.testing.assert_allclose(dkd_loss(a, b, half), dkd_loss(a[:6], b[:6], known[:6]), rtol=1e-5)


def test_help_grows_with_the_guide_and_is_finite_where_all_rows_are_right():
    a, b, y, h = draw()
    y = jnp.abs(y)
    found = [float(disk_help(a, b, y, h + shift)) for shift in (-jnp.inf, -1.0, 0.0, 1.0)]
    assert found[0] == 0.0
    assert all(low < high for low, high in itertools.pairwise(found))
    right = a.argmax(1)
    value, slopes = jax.value_and_grad(lambda h: disk_help(a, b, right, h))(h)
    assert bool(jnp.isfinite(value))
    assert bool(jnp.isfinite(slopes).all())


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_logits_give_finite_values_and_gradients(size):
    a, b, y, h = draw()
    run = jax.jit(jax.value_and_grad(lambda a, h: disk_loss(size * a, size * b, y, h, k=3)))
    for guide in (h, jnp.full(12, -jnp.inf), size * h):
        value, slopes = run(a, guide)
        assert bool(jnp.isfinite(value))
        assert bool(jnp.isfinite(slopes).all())


def test_bfloat16_is_computed_in_float32():
    a, b, y, h = draw()
    half = [x.astype(jnp.bfloat16) for x in (a, b, h)]
    found = disk_loss(half[0], half[1], y, half[2], k=3)
    assert found.dtype == jnp.float32
    again = [x.astype(jnp.float32) for x in half]
    np.testing.assert_allclose(found, disk_loss(again[0], again[1], y, again[2], k=3), rtol=1e-6)


def test_over_eight_devices_and_under_vmap():
    a, b, y, h = draw(rows=16)
    value = jax.jit(lambda a, b, y, h: (disk_loss(a, b, y, h, k=3), disk_help(a, b, y, h), dist_loss(a, b)))
    expected = value(a, b, y, h)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (a, b, y, h)]
    np.testing.assert_allclose(value(*sharded), expected, rtol=1e-5)
    stacked = jax.vmap(value, in_axes=(0, None, None, None))(jnp.stack([a, 2 * a]), b, y, h)
    np.testing.assert_allclose([part[0] for part in stacked], expected, rtol=1e-5)


# The best guide


def test_best_guide_spends_the_budget_where_it_helps_most():
    a, b, y, _ = draw(rows=32)
    budget = 0.3
    h, price = jax.jit(lambda: best_guide(a, b, y, budget, k=3))()
    spent = jax.jit(lambda h: disk_help(a, b, y, h, over="all"))
    loss = jax.jit(lambda h: disk_loss(a, b, y, h, k=3))
    np.testing.assert_allclose(spent(h), budget, rtol=1e-3)
    assert price > 0
    # Optimality: where q is inside (0, 1) the gain per cost is the same; at 1 it is more, at 0 less.
    q = jax.nn.sigmoid(h)
    cost = jax.grad(lambda q: 32 * disk_help(a, b, y, jnp.log(q) - jnp.log1p(-q), over="all"))(
        jnp.clip(q, 1e-4, 1 - 1e-4)
    )
    gain = jax.grad(lambda q: -2 * disk_loss(a, b, y, jnp.log(q) - jnp.log1p(-q), k=3))(jnp.clip(q, 1e-4, 1 - 1e-4))
    ratio, inside = np.asarray(gain / cost), np.asarray((q > 1e-3) & (q < 0.999))
    assert inside.sum() >= 3
    np.testing.assert_allclose(ratio[inside], price, rtol=1e-2)
    assert (ratio[np.asarray(q > 0.999)] >= float(price) * 0.99).all()
    assert (ratio[np.asarray(q < 1e-3)] <= float(price) * 1.01).all()
    # No guide that is drawn and scaled to the same budget does better.
    for seed in range(5):
        other = jax.random.normal(jax.random.key(seed), (32,)) * 3
        low, high = -30.0, 30.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if spent(other + middle) > budget else (middle, high)
        assert loss(h) <= loss(other + low) + 1e-4


def test_best_guide_within_its_budget_helps_everywhere():
    a, b, y, _ = draw()
    h, price = best_guide(a, b, y, 1e3, k=3)
    assert price == 0.0
    assert bool((jax.nn.sigmoid(h) > 0.999).all())


def test_best_guide_is_traceable_with_a_scheduled_budget():
    a, b, y, _ = draw()
    run = jax.jit(lambda budget: disk_help(a, b, y, best_guide(a, b, y, budget, k=3)[0], over="all"))
    np.testing.assert_allclose([run(0.1), run(0.4)], [0.1, 0.4], rtol=1e-3)


A, B, Y, H = jnp.zeros((4, 3)), jnp.zeros((4, 3)), jnp.zeros(4, int), jnp.zeros(4)
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
        run()
