"""The equation of the Global layer: parity, invariants, the bound of stability, borders, the implicit scheme."""

import functools
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from effjax.vision.pde import PdeConfig, PdeMaps, limit_velocity, pde_coefficients, pde_solve, pde_step

VECTORS = Path(__file__).resolve().parents[1] / "reference" / "global_layer" / "pde_solver_only.npz"
SHAPE = (2, 6, 6, 3)
THREE = PdeConfig(K=3)


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


solve = jax.jit(pde_solve, static_argnames="config")


def draw(*names, seed=0, shape=SHAPE):
    """Maps by name; diffusivities are positive."""
    rng = np.random.default_rng(seed)
    return [
        rng.normal(size=shape) if name in ("u", "v", "h", "p", "f") else rng.uniform(0.1, 2, shape) for name in names
    ]


def drawn(seed=0):
    u, v, Dx, Dy, h, p, f = draw("u", "v", "Dx", "Dy", "h", "p", "f", seed=seed)
    return PdeMaps(u, v, Dx, Dy), h, p, f


def full(value, shape=SHAPE):
    return np.full(shape, float(value))


def close(left, right, tolerance=1e-11):
    np.testing.assert_allclose(left, right, rtol=0, atol=tolerance * max(1.0, np.abs(np.asarray(right)).max()))


@pytest.mark.parametrize(("group", "x64"), [(0, True), (1, True), (2, True), (3, True), (0, False)])
def test_parity_of_the_solver(group, x64):
    data = np.load(VECTORS)
    read = lambda name: data[f"{group}/{name}"]
    dtype = np.float64 if x64 else np.float32
    array = lambda name: np.moveaxis(read(name), 1, -1).astype(dtype)
    config = PdeConfig(K=int(read("K")), dt=float(read("dt")), dx=int(read("dx")), dy=int(read("dy")))
    f = array("f") if read("source") else None

    @jax.jit
    def run(maps, h, p, f):
        coefficients, states, before = pde_coefficients(maps, config), [h], p
        for _ in range(config.K):
            states.append(pde_step(coefficients, states[-1], before, f, config))
            before = states[-2]
        return jnp.stack(states[1:]), pde_solve(maps, h, p, f, config)

    states, last = run(PdeMaps(*map(array, ("u", "v", "Dx", "Dy"))), array("h"), array("h_prev"), f)
    wanted = np.moveaxis(read("traj"), 2, -1)
    assert last.dtype == dtype
    close(states, wanted, 1e-11 if x64 else 2e-5)
    close(last, wanted[-1], 1e-11 if x64 else 2e-5)


def test_a_constant_stays_what_it_is():
    _, _, Dx, Dy, _, _, _ = draw("u", "v", "Dx", "Dy", "h", "p", "f")
    close(solve(PdeMaps(full(0.7), full(-1.3), Dx, Dy), full(2.5), full(2.5), None, THREE), full(2.5))


def mass_after(maps, h, p, f, config):
    """The sums over all pixels, by their recurrence for constant diffusivities."""
    b = 2 * config.dt * (maps.Dx[0, 0, 0, 0] / config.dx**2 + maps.Dy[0, 0, 0, 0] / config.dy**2)
    total = lambda z: z.sum((1, 2))
    before, now = total(p), total(h)
    for _ in range(config.K):
        before, now = now, ((1 - b) * before + 2 * b * now + 2 * config.dt * total(f)) / (1 + b)
    return now


@pytest.mark.parametrize("border", ["periodic", "reflect"])
def test_advection_and_constant_diffusion_keep_the_mass(border):
    config = PdeConfig(K=3, border=border)
    maps, h, p, f = drawn()
    maps = maps._replace(Dx=full(0.4), Dy=full(1.1))
    close(np.asarray(solve(maps, h, p, f, config)).sum((1, 2)), mass_after(maps, h, p, f, config))
    numbers = maps._replace(Dx=0.4, Dy=1.1)
    close(solve(numbers, h, p, f, config), solve(maps, h, p, f, config))


def test_linear_and_shift_equivariant():
    maps, h, p, f = drawn()
    _, h2, p2, f2 = drawn(1)
    out, other = solve(maps, h, p, f, THREE), solve(maps, h2, p2, f2, THREE)
    close(solve(maps, h + 2 * h2, p + 2 * p2, f + 2 * f2, THREE), out + 2 * other)
    roll = lambda z: np.roll(z, (2, 1), (1, 2))
    close(solve(PdeMaps(*map(roll, maps)), roll(h), roll(p), roll(f), THREE), roll(out))


@pytest.mark.parametrize("border", ["periodic", "reflect"])
def test_transposed_and_flipped(border):
    config, swapped = (PdeConfig(K=3, dx=dx, dy=dy, border=border) for dx, dy in ((2, 1), (1, 2)))
    maps, h, p, f = drawn()
    out = np.asarray(solve(maps, h, p, f, config))
    turn = lambda z: z.swapaxes(1, 2)
    turned = PdeMaps(turn(maps.v), turn(maps.u), turn(maps.Dy), turn(maps.Dx))
    close(solve(turned, turn(h), turn(p), turn(f), swapped), turn(out))
    flip = lambda z: z[:, ::-1]
    flipped = PdeMaps(-flip(maps.u), flip(maps.v), flip(maps.Dx), flip(maps.Dy))
    close(solve(flipped, flip(h), flip(p), flip(f), config), flip(out))


def test_a_step_reaches_its_neighbours_and_a_velocity_carries_to_smaller_indices():
    maps, h, p, f = drawn()
    dot = np.zeros(SHAPE)
    dot[0, 3, 3, 1] = 1
    config = PdeConfig(K=2)
    reached = np.abs(np.asarray(solve(maps, h + dot, p, f, config) - solve(maps, h, p, f, config))) > 1e-13
    rows, columns = np.ogrid[:6, :6]
    np.testing.assert_array_equal(reached[0, :, :, 1], abs(rows - 3) + abs(columns - 3) <= 2)
    assert not reached[1].any()
    assert not reached[0, :, :, [0, 2]].any()
    still = PdeMaps(full(1.0), full(0.0), full(0.0), full(0.0))
    moved = np.asarray(solve(still, dot, 0 * dot, 0 * f, PdeConfig(K=1)))
    assert moved[0, 2, 3, 1] == pytest.approx(0.2)
    assert moved[0, 4, 3, 1] == pytest.approx(-0.2)


def mirrored(n, by):
    """The matrix that reads ``z[i - by]`` of n points between walls, and the one for what changes sign there."""
    even, odd = np.zeros((n, n)), np.zeros((n, n))
    for i in range(n):
        j = i - by
        k = -1 - j if j < 0 else 2 * n - 1 - j if j >= n else j
        even[i, k], odd[i, k] = 1, 1 if j == k else -1
    return even, odd


def test_reflecting_borders_are_walls():
    config = PdeConfig(K=1, dt=0.1, dx=2, dy=1, border="reflect")
    maps, h, p, f = drawn()
    u, v, Dx, Dy = maps
    rows = lambda matrix, z: np.einsum("ij,bjwc->biwc", matrix, z)
    columns = lambda matrix, z: np.einsum("ij,bhjc->bhic", matrix, z)
    (up, up_odd), (down, down_odd), (left, left_odd), (right, right_odd) = (mirrored(6, by) for by in (2, -2, 1, -1))
    slope = (rows(down_odd, u) - rows(up_odd, u)) / 4 + (columns(right_odd, v) - columns(left_odd, v)) / 2
    above, below, before, behind = rows(up, h), rows(down, h), columns(left, h), columns(right, h)
    move = u * (below - above) / 4 + v * (behind - before) / 2 + h * slope + f
    spread = Dx / 4 * (above + below) + Dy * (before + behind)
    b = 2 * 0.1 * (Dx / 4 + Dy)
    close(solve(maps, h, p, f, config), ((1 - b) * p + 0.2 * (move + spread)) / (1 + b))


def amplification(Ax, Ay, Bx, By, implicit):
    """The largest growth of a wave in a step, over a grid of waves, for constant coefficients."""
    x, y = np.meshgrid(*[np.linspace(-np.pi, np.pi, 73)] * 2)
    turn = Ax * np.sin(x) + Ay * np.sin(y)
    if implicit:
        return np.max(np.abs(1 + 1j * turn) / (1 + 2 * Bx * (1 - np.cos(x)) + 2 * By * (1 - np.cos(y))))
    spread, b = Bx * np.cos(x) + By * np.cos(y), 2 * (Bx + By)
    middle = (4 * spread + 2j * turn) / (1 + b)
    root = np.sqrt(middle**2 / 4 + (1 - b) / (1 + b))
    return max(np.abs(middle / 2 + root).max(), np.abs(middle / 2 - root).max())


@pytest.mark.parametrize("scheme", ["explicit", "implicit"])
def test_limited_velocities_are_the_largest_that_do_not_grow(scheme):
    rng = np.random.default_rng(3)
    cases = 60
    u, v = rng.normal(0, 6, (2, cases, 1, 1, 1))
    Dx, Dy = 10 ** rng.uniform(-2, 1, (2, cases, 1, 1, 1))
    if scheme == "explicit":
        Dx[:10], Dy[:10] = 0, 0
    tile = lambda z: np.tile(z, (1, 2, 2, 1))
    config = PdeConfig(scheme=scheme, dt=0.3)
    limit = jax.jit(lambda *maps: limit_velocity(PdeMaps(*maps), config))
    slow_u, slow_v = (np.asarray(z)[:, :1, :1] for z in limit(*map(tile, (u, v, Dx, Dy))))
    grows = lambda u, v, Dx, Dy: amplification(0.3 * u, 0.3 * v, 0.3 * Dx, 0.3 * Dy, scheme == "implicit")
    limited = 0
    for case in zip(*(z.ravel() for z in (u, v, Dx, Dy, slow_u, slow_v)), strict=True):
        fast, D, slow = case[:2], case[2:4], case[4:]
        assert grows(*slow, *D) <= 1 + 1e-9
        if slow != fast:
            limited += 1
            assert slow[0] * fast[1] == pytest.approx(slow[1] * fast[0])
            assert grows(1.1 * slow[0], 1.1 * slow[1], *D) > 1 + 1e-6
    assert 20 < limited < cases


def test_the_bound_over_two_hundred_steps():
    _, h, _, _ = drawn()
    # Anisotropic diffusion is the dangerous case: v dt = 0.8 would be stable without it.
    fast = PdeMaps(full(0), full(4), full(2), full(0.02))
    free, limited = (
        np.abs(np.asarray(solve(fast, h, h, None, PdeConfig(K=200, clamp=clamp)))).max() for clamp in (False, True)
    )
    assert free > 1e6
    assert limited <= np.abs(h).max()


def test_implicit_steps_against_dense_matrices():
    maps, h, _, f = drawn()
    u, v = maps.u, maps.v
    eye = np.eye(6)
    for border in ("periodic", "reflect"):
        config = PdeConfig(K=2, dt=0.3, dx=2, dy=1, border=border, scheme="implicit")
        if border == "periodic":
            reads = [(np.roll(eye, by, 0),) * 2 for by in (2, -2, 1, -1)]
        else:
            reads = [mirrored(6, by) for by in (2, -2, 1, -1)]
        (up, up_odd), (down, down_odd), (left, left_odd), (right, right_odd) = reads
        laplace = 0.7 / 4 * np.kron(up + down - 2 * eye, eye) + 1.9 * np.kron(eye, left + right - 2 * eye)
        rows = lambda matrix, z: np.einsum("ij,bjwc->biwc", matrix, z)
        columns = lambda matrix, z: np.einsum("ij,bhjc->bhic", matrix, z)
        state = h
        for _ in range(2):
            change = u * rows(down - up, state) / 4 + state * rows(down_odd - up_odd, u) / 4
            change += v * columns(right - left, state) / 2 + state * columns(right_odd - left_odd, v) / 2
            flat = (state + 0.3 * (change + f)).reshape(2, 36, 3)
            state = np.linalg.solve(np.eye(36) - 0.3 * laplace, flat).reshape(SHAPE)
        close(solve(PdeMaps(u, v, 0.7, 1.9), h, None, f, config), state)


def test_implicit_waves_decay_as_they_should_and_mass_stays():
    """A wave of the whole map loses exp(-D k^2 t) of its height, whatever the number of steps, as these grow short."""
    n = 6
    still = full(0)
    wave = np.broadcast_to(np.cos(2 * np.pi * np.arange(n) / n)[None, :, None, None], SHAPE)
    wall = np.broadcast_to(np.cos(np.pi * (np.arange(n) + 0.5) / n)[None, None, :, None], SHAPE)
    for h, border, angle in ((wave, "periodic", 2 * np.pi / n), (wall, "reflect", np.pi / n)):
        rate = 2 * (1 - np.cos(angle))  # of the second difference
        run = lambda K, border=border, h=h: solve(
            PdeMaps(still, still, 1.0, 1.0), h, None, None, PdeConfig(K=K, dt=1 / K, border=border, scheme="implicit")
        )
        close(run(4), h / (1 + rate / 4) ** 4)
        close(run(2000), h * np.exp(-rate), 1e-3)
    maps, h, _, f = drawn()
    config = PdeConfig(K=2, dt=0.3, dx=2, border="reflect", scheme="implicit")
    total = lambda z: np.asarray(z).sum((1, 2))
    close(total(solve(PdeMaps(maps.u, maps.v, 0.7, 1.9), h, None, f, config)), total(h) + 2 * 0.3 * total(f))


def test_one_implicit_step_reaches_every_pixel_and_is_stable_when_long():
    dot = np.zeros(SHAPE)
    dot[0, 3, 3, 1] = 1
    still = PdeMaps(full(0), full(0), 1.0, 1.0)
    far = np.asarray(solve(still, dot, None, None, PdeConfig(scheme="implicit", dt=50.0)))[0, :, :, 1]
    assert (far > 0).all()
    close(far, np.full((6, 6), 1 / 36), 0.05)


@pytest.mark.parametrize("numbers", [False, True])
def test_the_gradient_written_by_hand_is_that_of_the_factors(numbers):
    maps, h, p, f = drawn()
    maps = maps._replace(Dy=0.3) if numbers else maps
    options = {"dx": 2, "border": "reflect"} if numbers else {}

    @functools.partial(jax.jit, static_argnames="form")
    def value(u, v, Dx, h, p, f, form):
        run = lambda u, v, Dx, h, p, f: jnp.sum(
            jnp.sin(pde_solve(maps._replace(u=u, v=v, Dx=Dx), h, p, f, PdeConfig(K=3, form=form, **options)))
        )
        return jax.value_and_grad(run, argnums=tuple(range(6)))(u, v, Dx, h, p, f)

    run = lambda form: value(maps.u, maps.v, maps.Dx, h, p, f, form)
    jax.tree.map(close, run("fused"), run("factors"))


def test_the_gradient_stores_one_map_a_step():
    shape = jax.ShapeDtypeStruct((4, 16, 16, 8), jnp.float32)

    def peak(K, form):
        config = PdeConfig(K=K, form=form)
        loss = lambda *maps: jnp.sum(pde_solve(PdeMaps(*maps[:4]), maps[4], config=config) ** 2)
        return (
            jax.jit(jax.grad(loss, argnums=(0, 4))).lower(*[shape] * 5).compile().memory_analysis().temp_size_in_bytes
        )

    a_step = lambda form: (peak(40, form) - peak(16, form)) / 24 / (4 * 4 * 16 * 16 * 8)
    assert a_step("fused") < 1.1
    assert a_step("factors") > 1.9


def test_bfloat16_is_solved_in_float32_from_four_steps_on():
    maps, h, p, f = jax.tree.map(lambda z: np.asarray(z, np.float32), drawn())
    low = jax.tree.map(lambda z: np.asarray(z).astype(jnp.bfloat16), (maps, h, p, f))
    config = PdeConfig(K=20, dt=0.05)
    out = solve(*low, config)
    assert out.dtype == jnp.bfloat16
    exact = np.asarray(solve(*jax.tree.map(lambda z: np.asarray(z, np.float32), low), config))
    # One rounding, at the end.
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, rtol=2**-8, atol=1e-6)
    jaxpr = str(jax.make_jaxpr(lambda *x: pde_solve(*x, PdeConfig(K=3)))(*low))
    assert "f32" not in jaxpr


def test_the_gradient_is_finite_at_the_bound_and_without_diffusion():
    rng = np.random.default_rng(0)
    u, v = np.maximum(rng.normal(0, 20, (2, *SHAPE)), 0)
    Dx, Dy = np.maximum(rng.normal(0, 1, (2, *SHAPE)), 0)
    config = PdeConfig(K=3, clamp=True)
    maps = PdeMaps(*(np.asarray(z, np.float32) for z in (u, v, Dx, Dy)))
    grads = jax.jit(jax.grad(lambda maps: jnp.sum(pde_solve(maps, maps.u, config=config) ** 2)))(maps)
    assert all(np.isfinite(leaf).all() for leaf in grads)
    assert np.abs(grads.u).max() > 0


def test_no_step_returns_the_map_and_an_empty_batch_stays_one():
    maps, h, p, f = drawn()
    assert pde_solve(maps, h, p, f, PdeConfig(K=0)) is not None
    np.testing.assert_array_equal(pde_solve(maps, h, p, f, PdeConfig(K=0)), h)
    empty = jax.tree.map(lambda z: z[:0], (maps, h, p, f))
    assert solve(*empty, THREE).shape == (0, 6, 6, 3)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.data())
def test_shapes_fit_or_are_refused(data):
    batch, sizes = data.draw(st.integers(0, 2)), data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    steps = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    border, K = data.draw(st.sampled_from(["periodic", "reflect"])), data.draw(st.sampled_from([0, 1]))
    config = PdeConfig(K=K, dx=steps[0], dy=steps[1], border=border)
    map_ = jax.ShapeDtypeStruct((batch, *sizes, 2), jnp.float32)
    run = lambda u, v, h: pde_solve(PdeMaps(u, v, 1.0, 1.0), h, config=config)
    if all(step < max(size, 2) for step, size in zip(steps, sizes, strict=True)):
        assert jax.eval_shape(run, map_, map_, map_).shape == map_.shape
    else:
        with pytest.raises(ValueError, match="must be below the"):
            jax.eval_shape(run, map_, map_, map_)


def test_one_pixel_is_a_map():
    one = np.full((1, 1, 1, 2), 3.0)
    out = solve(PdeMaps(0.5 * one, one, one, one), one, one, one, PdeConfig(K=1, dt=0.1))
    close(out, one + 0.2 * one / (1 + 4 * 0.1 * one))


BAD = {
    "h shape": (lambda m, h: pde_solve(m, h[:1]), r"h has shape \(1, 6, 6, 3\); expected \(2, 6, 6, 3\)"),
    "f would broadcast": (lambda m, h: pde_solve(m, h, None, h[:, :1]), r"f has shape \(2, 1, 6, 3\)"),
    "maps": (lambda m, h: pde_solve(m._replace(v=h[:1]), h), r"maps.v has shape \(1, 6, 6, 3\)"),
    "number for a velocity": (lambda m, h: pde_solve(m._replace(v=1.0), h), r"maps.v has shape \(\)"),
    "negative diffusivity": (lambda m, h: pde_solve(m._replace(Dx=-1.0), h), r"maps.Dx=-1.0 must be a number in \[0"),
    "rank": (lambda m, h: pde_solve(PdeMaps(h[0, 0], h[0, 0], 1.0, 1.0), h[0, 0]), r"shape \(6, 3\).*batch of one"),
    "stencil": (lambda m, h: pde_solve(m, h, config=PdeConfig(dx=6)), r"dx=6 must be below the 6 rows"),
    "K": (lambda m, h: PdeConfig(K=-1), r"K=-1 must be an integer in \[0"),
    "dt": (lambda m, h: PdeConfig(dt=0.0), r"dt=0.0 must be a number in \(0"),
    "border": (lambda m, h: PdeConfig(border="reflecting"), r"border='reflecting'.*Did you mean 'reflect'"),
    "idle form": (lambda m, h: PdeConfig(form="factors", scheme="implicit"), r"has no factors"),
    "implicit maps": (lambda m, h: pde_solve(m, h, config=PdeConfig(scheme="implicit")), r"takes numbers for maps.Dx"),
    "integers": (lambda m, h: pde_solve(m, np.ones(SHAPE, np.uint8)), r"h has dtype uint8; the equation is of floats"),
    "implicit past": (
        lambda m, h: pde_solve(m._replace(Dx=1.0, Dy=1.0), h, h, config=PdeConfig(scheme="implicit")),
        r"Leave h_prev out",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    maps, h, _, _ = drawn()
    with pytest.raises(TypeError if case == "integers" else ValueError, match=message):
        call(maps, h)
