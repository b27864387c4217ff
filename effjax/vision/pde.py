"""An advection-diffusion equation on feature maps: coefficients, one step, K steps (Kag, Saligrama, CVPR 2022).

Maps are ``[..., height, width, channels]``; every channel has an equation of its own. x counts rows and y columns, as
in the authors' code.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.fft
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from effjax.core.errors import Count, Natural, Positive, check_fields, check_number, check_shape
from effjax.core.tree import wide_dtype

__all__ = ["PdeCoefficients", "PdeConfig", "PdeMaps", "limit_velocity", "pde_coefficients", "pde_solve", "pde_step"]

Map = Float[Array | np.ndarray, "*batch height width channels"]

_ROWS, _COLUMNS = -3, -2
# Steps from which differences of nearly equal terms ask for 32 bits.
_NARROW_STEPS = 3
# Steps that are unrolled at most.
_UNROLLED_STEPS = 8
# Below it a diffusivity counts as none in the bound, which divides by it.
_LEAST = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class PdeConfig:
    """How the equation is solved.

    Raises:
      ValueError: a number or choice that is not legal, or a setting that would do nothing.

    Example:
      >>> PdeConfig(K=5, border="reflect").dt
      0.2
    """

    K: Natural = 1
    """Steps; with 0 the solution is the first map."""
    dt: Positive = 0.2
    """Length of a step."""
    dx: Count = 1
    """Rows between the points of the stencil."""
    dy: Count = 1
    """Columns between the points of the stencil."""
    scheme: Literal["explicit", "implicit"] = "explicit"
    """The paper's three-level scheme; or implicit diffusion by a Fourier transform, which takes constant diffusivities
    and reaches the whole map in one step."""
    border: Literal["periodic", "reflect"] = "periodic"
    """What lies outside a map: its other side, as in the paper, or its mirror image, behind a wall."""
    clamp: bool = False
    """Whether velocities are scaled down to the bound of limit_velocity."""
    form: Literal["fused", "factors"] = "fused"
    """How explicit steps are computed: fused, from the four maps, with a gradient written by hand that stores one map
    per step and is of first order, in reverse mode; or by the factors of pde_coefficients, with all derivatives."""

    def __post_init__(self):
        check_fields(self)
        if self.form == "factors" and self.scheme == "implicit":
            raise ValueError("form='factors' would do nothing with scheme='implicit', which has no factors.")


class PdeMaps(NamedTuple):
    """What moves and spreads the features.

    Attributes:
      u: velocity along the rows, a map; positive values carry features to smaller indices.
      v: velocity along the columns.
      Dx: diffusivity along the rows, not negative: a map, or a number.
      Dy: diffusivity along the columns.
    """

    u: Map
    v: Map
    Dx: Map | float
    Dy: Map | float


class PdeCoefficients(NamedTuple):
    """The factors of a step, divided by ``1 + 2 Bx + 2 By``: maps, or numbers where no map enters.

    Attributes:
      previous: of the map one step before.
      centre: of the map.
      up: of its pixels ``dx`` rows above.
      down: of those ``dx`` rows below.
      left: of those ``dy`` columns to the left.
      right: of those ``dy`` columns to the right.
      source: of the source.
    """

    previous: Map | float
    centre: Map | float
    up: Map | float
    down: Map | float
    left: Map | float
    right: Map | float
    source: Map | float


def pde_coefficients(maps: PdeMaps, config: PdeConfig) -> PdeCoefficients:
    r"""The factors of ``pde_step``, which stay the same over all steps.

    With :math:`A_x = u\,dt/dx`, :math:`B_x = D_x\,dt/dx^2`, the same along y, and centred differences :math:`\delta`,

    .. math::
        L = 1 + 2 B_x + 2 B_y, \quad E = -(\delta_x u + \delta_y v)\,dt, \quad
        \left(1 - 2 B_x - 2 B_y,\ -2E,\ 2 B_x \mp A_x,\ 2 B_y \mp A_y,\ 2\,dt\right) / L

    Args:
      maps: velocities and diffusivities.
      config: ``dt``, ``dx``, ``dy`` and ``border``.

    Returns:
      ``PdeCoefficients``.

    Raises:
      ValueError: maps of different shapes, or a stencil wider than the maps.

    Example:
      >>> still = jnp.zeros((1, 4, 4, 2))
      >>> factors = pde_coefficients(PdeMaps(still, still, 1.0, 1.0), PdeConfig())
      >>> round(factors.previous, 3), round(factors.source, 3)
      (0.111, 0.222)
    """
    u, v, Dx, Dy = _checked(maps, config)
    dt, dx, dy = config.dt, config.dx, config.dy
    Ax, Ay, Bx, By = u * (dt / dx), v * (dt / dy), Dx * (dt / dx**2), Dy * (dt / dy**2)
    spread = 1 + 2 * Bx + 2 * By
    divergence = _divergence(u, v, config)
    return PdeCoefficients(
        previous=(1 - 2 * Bx - 2 * By) / spread,
        centre=2 * dt * divergence / spread,
        up=(2 * Bx - Ax) / spread,
        down=(2 * Bx + Ax) / spread,
        left=(2 * By - Ay) / spread,
        right=(2 * By + Ay) / spread,
        source=2 * dt / spread,
    )


def pde_step(coefficients: PdeCoefficients, h: Map, h_prev: Map, f: Map | None, config: PdeConfig) -> jax.Array:
    r"""One explicit step of :math:`\partial h/\partial t = D \Delta h + \mathrm{div}(v h) + f`.

    Centred differences in time and for the advection, and the diffusion of DuFort and Frankel:

    .. math::
        \frac{h^{k+1} - h^{k-1}}{2\,dt} = f + u\,\delta_x h^k + h^k \delta_x u
        + D_x \frac{h^k_{i-1} - h^{k+1}_i - h^{k-1}_i + h^k_{i+1}}{dx^2} + \text{the same along y}

    solved for :math:`h^{k+1}`: seven products with the ``coefficients`` at every element.

    Args:
      coefficients: of ``pde_coefficients``.
      h: the map.
      h_prev: the map one step before.
      f: the source; None for none.
      config: ``dx``, ``dy`` and ``border``.

    Returns:
      The next map.

    Example:
      >>> still, h = jnp.zeros((1, 4, 4, 2)), jnp.ones((1, 4, 4, 2))
      >>> config = PdeConfig()
      >>> pde_step(pde_coefficients(PdeMaps(still, still, 0.5, 0.5), config), h, h, None, config).max()
      Array(1., dtype=float32)

    Reference: Kag, Saligrama, "Condensing CNNs with Partial Differential Equations", CVPR 2022, as in the authors'
    code, which adds ``div(v h)``. The scheme is read from the code; the part ``grad(D) grad(h)`` of ``div(D grad h)``
    is dropped there too. Reflecting borders are ours.
    """
    up, down, left, right = _around(h, config)
    out = coefficients.previous * h_prev + coefficients.centre * h
    out += coefficients.up * up + coefficients.down * down + coefficients.left * left + coefficients.right * right
    return jnp.asarray(out if f is None else out + coefficients.source * f)


def pde_solve(
    maps: PdeMaps, h: Map, h_prev: Map | None = None, f: Map | None = None, config: PdeConfig | None = None
) -> jax.Array:
    r"""``config.K`` steps from ``h``; the maps stay as they are.

    ``scheme="explicit"`` repeats ``pde_step``, computed from the four maps, which reads less memory than the seven
    factors; its gradient stores one map per step. ``scheme="implicit"`` solves

    .. math::
        (1 - dt\,(D_x \delta_{xx} + D_y \delta_{yy}))\, h^{k+1} = h^k + dt\,(\mathrm{div}(v h^k) + f)

    by a Fourier transform, or with reflecting borders a cosine transform: diffusion is exact in space and stable for
    any ``dt``, and every pixel reaches every other in one step.

    Args:
      maps: velocities ``[..., height, width, channels]``, and diffusivities of the same shape or numbers.
      h: the first map, of that shape.
      h_prev: the map one step before; None for ``h``. The implicit scheme has none.
      f: the source, added all the time; None for none.
      config: a ``PdeConfig``; None for its defaults.

    Returns:
      The last map, in the dtype of ``h``. More than three steps are computed in float32 at least, and so is the
      implicit scheme.

    Raises:
      ValueError: arrays of different shapes, a stencil wider than the maps, negative diffusivities given as numbers,
        or for the implicit scheme diffusivities that are maps, or an ``h_prev``.
      TypeError: an ``h`` of integers.

    Example:
      >>> still, h = jnp.zeros((2, 8, 8, 3)), jnp.ones((2, 8, 8, 3))
      >>> pde_solve(PdeMaps(still, still, 1.0, 1.0), h, config=PdeConfig(K=5)).shape
      (2, 8, 8, 3)
    """
    config = config or PdeConfig()
    _checked(maps, config)
    shape = jnp.shape(maps.u)
    for name, array in (("h", h), ("h_prev", h_prev), ("f", f)):
        if array is not None:
            check_shape(name, array, shape, "It must have the shape of the maps.")
    if not jnp.issubdtype(jnp.asarray(h).dtype, jnp.floating):
        raise TypeError(f"h has dtype {jnp.asarray(h).dtype}; the equation is of floats. Scale images and cast them.")
    if config.scheme == "implicit":
        _check_implicit(maps, h_prev)
    if config.K == 0:
        return jnp.asarray(h)
    kept, work = jnp.asarray(h).dtype, _work_dtype(h, config)

    def wide(value: Any) -> Any:
        return value if isinstance(value, int | float) else jnp.asarray(value).astype(work)

    maps = PdeMaps(*map(wide, maps))
    if config.clamp:
        u, v = limit_velocity(maps, config)
        maps = maps._replace(u=u, v=v)
    before = wide(h if h_prev is None else h_prev)
    return _run(maps, wide(h), before, None if f is None else wide(f), config).astype(kept)


def _run(maps: PdeMaps, h: jax.Array, h_prev: jax.Array, f: jax.Array | None, config: PdeConfig) -> jax.Array:
    if config.scheme == "explicit" and config.form == "fused":
        numbers = tuple(D if isinstance(D, int | float) else None for D in (maps.Dx, maps.Dy))
        fields = [jnp.broadcast_to(z, h.shape) for z in maps if not isinstance(z, int | float)]
        return _fused(tuple(fields), h, h_prev, f, config, numbers)
    if config.scheme == "implicit":
        step = lambda h, h_prev: _implicit_step(maps, h, f, config)
    else:
        coefficients = pde_coefficients(maps, config)
        step = lambda h, h_prev: pde_step(coefficients, h, h_prev, f, config)
    if config.K == 1:
        return step(h, h_prev)
    # A loop, as the compiler would compute the chain of unrolled steps many times over.
    (h, _), _ = jax.lax.scan(lambda carry, _: ((step(*carry), carry[0]), None), (h, h_prev), length=config.K)
    return h


def limit_velocity(maps: PdeMaps, config: PdeConfig) -> tuple[jax.Array, jax.Array]:
    r"""Velocities scaled down, at each pixel in both directions alike, to where a step does not amplify.

    With constant coefficients no wave grows in the explicit scheme if and only if

    .. math::
        (A_x^2 / B_x + A_y^2 / B_y)(B_x + B_y) \le 1, \quad\text{without diffusion}\quad |A_x| + |A_y| \le 1,

    and in the implicit one if and only if :math:`A_x^2 / B_x + A_y^2 / B_y \le 2`; A and B as in ``pde_coefficients``.
    The scale is the largest that keeps the bound of the pixel. Maps that vary may still grow where the divergence of
    the velocity is positive, as the equation itself does.

    Args:
      maps: velocities and diffusivities.
      config: ``dt``, ``dx``, ``dy`` and ``scheme``.

    Returns:
      The two velocities.

    Example:
      >>> fast = jnp.full((1, 4, 4, 1), 100.0)
      >>> u, v = limit_velocity(PdeMaps(fast, 0 * fast, 1.0, 1.0), PdeConfig())
      >>> round(float(u.max()), 3)  # |v| dt <= sqrt(1 / 2) where Dx = Dy
      3.536
    """
    u, v, Dx, Dy = _checked(maps, config)
    dt, dx, dy = config.dt, config.dx, config.dy
    Ax, Ay = u * (dt / dx), v * (dt / dy)
    Bx, By = (jnp.asarray(D * (dt / d**2), Ax.dtype) for D, d in ((Dx, dx), (Dy, dy)))
    share = Ax**2 / jnp.maximum(Bx, _LEAST) + Ay**2 / jnp.maximum(By, _LEAST)
    if config.scheme == "implicit":
        excess = share / 2
    else:
        excess = jnp.where(Bx + By > 0, share * (Bx + By), (jnp.abs(Ax) + jnp.abs(Ay)) ** 2)
    scale = jax.lax.rsqrt(jnp.maximum(excess, 1))
    return scale * u, scale * v


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _fused(fields: Any, h: jax.Array, h_prev: jax.Array, f: jax.Array | None, config: PdeConfig, numbers: Any) -> Any:
    """K steps from the maps; ``fields`` are those that are arrays, ``numbers`` the diffusivities that are not."""
    return _states(fields, h, h_prev, f, config, numbers)[0]


def _states(
    fields: Any, h: jax.Array, h_prev: jax.Array, f: jax.Array | None, config: PdeConfig, numbers: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The last map, the one before it, and for each step the map before its first."""
    maps = _with_numbers(fields, numbers)

    def body(carry: Any, _: None) -> Any:
        h, h_prev = held(carry)
        return (_fused_step(maps, h, h_prev, f, config), h), h_prev

    (last, h), before = jax.lax.scan(body, (h, h_prev), length=config.K, unroll=_unroll(config))
    return last, h, before


def _fused_step(maps: PdeMaps, h: Any, h_prev: Any, f: Any, config: PdeConfig) -> jax.Array:
    up, down, left, right = _around(h, config)
    dt, (Bx, By) = config.dt, _spreads(maps, config)
    out = (1 - 2 * Bx - 2 * By) * h_prev + 2 * dt * h * _divergence(maps.u, maps.v, config)
    out += 2 * Bx * (up + down) + maps.u * (dt / config.dx) * (down - up)
    out += 2 * By * (left + right) + maps.v * (dt / config.dy) * (right - left)
    return (out if f is None else out + 2 * dt * f) / (1 + 2 * Bx + 2 * By)


def _fused_forward(
    fields: Any, h: jax.Array, h_prev: jax.Array, f: jax.Array | None, config: PdeConfig, numbers: Any
) -> Any:
    last, *kept = _states(fields, h, h_prev, f, config, numbers)
    return last, (fields, last, *kept, f is None)


def _fused_backward(config: PdeConfig, numbers: Any, saved: Any, grad: jax.Array) -> Any:
    fields, last, h, before, no_source = saved
    maps, kinds = _with_numbers(fields, numbers), (True, True, *(number is None for number in numbers))

    def body(carry: Any, h_prev: jax.Array) -> Any:
        # grad is of the step's result; waiting, what the step after it gave back to its first map.
        grad, waiting, after, h, totals = held(carry)
        to_maps, to_h, to_prev, to_f = _step_backward(maps, (h, h_prev, after), grad, config)
        found = [*itertools.compress(to_maps, kinds), to_f]
        totals = [total + one for total, one in zip(totals, found, strict=True)]
        return (waiting + to_h, to_prev, h, h_prev, totals), None

    nothing = jnp.zeros_like(grad)
    start = (grad, nothing, last, h, [nothing] * (len(fields) + 1))
    (to_h, to_prev, *_, totals), _ = jax.lax.scan(body, start, before, reverse=True, unroll=_unroll(config))
    return tuple(totals[:-1]), to_h, to_prev, None if no_source else totals[-1]


_fused.defvjp(_fused_forward, _fused_backward)


def _step_backward(maps: PdeMaps, states: Any, grad: jax.Array, config: PdeConfig) -> Any:
    """Gradients in the four maps, in h, in h_prev and in the source, from that in the step's result."""
    h, h_prev, after = states
    dt, dx, dy, border = config.dt, config.dx, config.dy, config.border
    Bx, By = _spreads(maps, config)
    up, down, left, right = _around(h, config)
    g = held(grad / (1 + 2 * Bx + 2 * By))
    hg, Ax, Ay = held((h * g * dt, maps.u * (dt / dx), maps.v * (dt / dy)))
    both = h_prev + after
    to_u = g * (down - up) * (dt / dx) + _returned(-hg, hg, dx, _ROWS, border, odd=True) / dx
    to_v = g * (right - left) * (dt / dy) + _returned(-hg, hg, dy, _COLUMNS, border, odd=True) / dy
    to_Dx = 2 * g * (up + down - both) * (dt / dx**2)
    to_Dy = 2 * g * (left + right - both) * (dt / dy**2)
    parts = held(((2 * Bx - Ax) * g, (2 * Bx + Ax) * g, (2 * By - Ay) * g, (2 * By + Ay) * g))
    to_h = 2 * dt * g * _divergence(maps.u, maps.v, config)
    to_h += _returned(parts[0], parts[1], dx, _ROWS, border) + _returned(parts[2], parts[3], dy, _COLUMNS, border)
    return (to_u, to_v, to_Dx, to_Dy), to_h, (1 - 2 * Bx - 2 * By) * g, 2 * dt * g


def _spreads(maps: PdeMaps, config: PdeConfig) -> tuple[Any, Any]:
    """``Bx`` and ``By``."""
    return maps.Dx * (config.dt / config.dx**2), maps.Dy * (config.dt / config.dy**2)


def _with_numbers(fields: Any, numbers: Any) -> PdeMaps:
    arrays = iter(fields)
    return PdeMaps(*(next(arrays) if number is None else number for number in (None, None, *numbers)))


def _unroll(config: PdeConfig) -> int:
    """Steps in the body of the loop: on CPUs all, as loops copy their state and ``held`` keeps the steps apart."""
    return min(config.K, _UNROLLED_STEPS) if jax.default_backend() == "cpu" else 1


def _implicit_step(maps: PdeMaps, h: jax.Array, f: jax.Array | None, config: PdeConfig) -> jax.Array:
    """One step with explicit advection and implicit diffusion."""
    up, down, left, right = _around(h, config)
    change = maps.u * (down - up) / (2 * config.dx) + maps.v * (right - left) / (2 * config.dy)
    change += h * _divergence(maps.u, maps.v, config)
    h = h + config.dt * (change if f is None else change + f)
    rows, columns = h.shape[_ROWS], h.shape[_COLUMNS]
    decay = lambda n, d: _laplacian_values(n, d, config.border)
    rate = maps.Dx * decay(rows, config.dx)[:, None] + maps.Dy * decay(columns, config.dy)[None, :]
    factor = jnp.asarray(1 / (1 + config.dt * rate), h.dtype)[:, :, None]
    factor = factor.reshape((1,) * (h.ndim - 3) + factor.shape)
    axes = (h.ndim + _ROWS, h.ndim + _COLUMNS)
    if config.border == "reflect":
        waves = jax.scipy.fft.dctn(h, axes=axes, norm="ortho")
        return jax.scipy.fft.idctn(waves * factor, axes=axes, norm="ortho")
    waves = jnp.fft.rfftn(h, axes=axes)
    return jnp.fft.irfftn(waves * factor[..., : columns // 2 + 1, :], (rows, columns), axes)


def _laplacian_values(n: int, distance: int, border: str) -> np.ndarray:
    """What minus the second difference makes of the waves of a transform of n points, in its order."""
    angles = np.arange(n) * (math.pi if border == "reflect" else 2 * math.pi) / n
    return 2 * (1 - np.cos(angles * distance)) / distance**2


def _around(h: Any, config: PdeConfig) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The neighbours above, below, to the left and to the right of every pixel."""
    above_below = _neighbours(h, config.dx, _ROWS, config.border)
    return (*above_below, *_neighbours(h, config.dy, _COLUMNS, config.border))


def _divergence(u: Any, v: Any, config: PdeConfig) -> jax.Array:
    up, down = _neighbours(u, config.dx, _ROWS, config.border, odd=True)
    left, right = _neighbours(v, config.dy, _COLUMNS, config.border, odd=True)
    return (down - up) / (2 * config.dx) + (right - left) / (2 * config.dy)


def _neighbours(z: Any, by: int, axis: int, border: str, odd: bool = False) -> tuple[jax.Array, jax.Array]:
    """``z[i - by]`` and ``z[i + by]`` along an axis; behind a wall lies the mirror image, negative if ``odd``."""
    z = jnp.asarray(z)
    n, axis = z.shape[axis], axis % z.ndim
    first, last = _cut(z, 0, by, axis), _cut(z, n - by, n, axis)
    before, after = (last, first) if border == "periodic" else (_mirror(first, axis, odd), _mirror(last, axis, odd))
    around = held(jnp.concatenate([before, z, after], axis))
    return _cut(around, 0, n, axis), _cut(around, 2 * by, 2 * by + n, axis)


def _returned(above: Any, below: Any, by: int, axis: int, border: str, odd: bool = False) -> jax.Array:
    """The transpose of ``_neighbours``: what comes back to z from its two results."""
    n, axis = above.shape[axis], axis % above.ndim
    if border == "periodic":
        before, after = _cut(below, n - by, n, axis), _cut(above, 0, by, axis)
    else:
        before, after = _mirror(_cut(above, 0, by, axis), axis, odd), _mirror(_cut(below, n - by, n, axis), axis, odd)
    from_above = held(jnp.concatenate([above, after], axis))
    from_below = held(jnp.concatenate([before, below], axis))
    return _cut(from_above, by, by + n, axis) + _cut(from_below, 0, n, axis)


def _cut(z: jax.Array, first: int, last: int, axis: int) -> jax.Array:
    return jax.lax.slice_in_dim(z, first, last, axis=axis)


def _mirror(z: jax.Array, axis: int, odd: bool) -> jax.Array:
    return -jnp.flip(z, axis) if odd else jnp.flip(z, axis)


def held(value: Any) -> Any:
    """On CPUs, arrays that are computed once and kept; the compiler would compute them for every reader."""
    return jax.lax.optimization_barrier(value) if jax.default_backend() == "cpu" else value


def _checked(maps: PdeMaps, config: PdeConfig) -> tuple[Any, Any, Any, Any]:
    """The maps, if they fit each other and the stencil."""
    shape = jnp.shape(maps.u)
    if len(shape) < 3:
        raise ValueError(
            f"maps.u has shape {shape}; expected [..., height, width, channels]. Lead with a batch of one."
        )
    for name, value in maps._asdict().items():
        if jnp.ndim(value):
            check_shape(
                f"maps.{name}", value, shape, "All maps have the shape of maps.u; diffusivities may be numbers."
            )
        elif name in "uv":
            check_shape(f"maps.{name}", value, shape)
        else:
            check_number(f"maps.{name}", value, low=0)
    for name, distance, size, what in (
        ("dx", config.dx, shape[_ROWS], "rows"),
        ("dy", config.dy, shape[_COLUMNS], "columns"),
    ):
        if distance >= max(size, 2):
            raise ValueError(
                f"{name}={distance} must be below the {size} {what} of the maps of shape {shape}: the stencil would "
                "meet its own pixel. Give less, or place the layer where the maps are larger."
            )
    return maps


def _check_implicit(maps: PdeMaps, h_prev: object) -> None:
    if jnp.ndim(maps.Dx) or jnp.ndim(maps.Dy):
        raise ValueError(
            "scheme='implicit' takes numbers for maps.Dx and maps.Dy: a Fourier transform solves constant diffusion "
            "only. Give numbers, or scheme='explicit'."
        )
    if h_prev is not None:
        raise ValueError("scheme='implicit' has no map one step before. Leave h_prev out.")


def _work_dtype(h: Map, config: PdeConfig) -> DTypeLike:
    dtype = jnp.asarray(h).dtype
    return dtype if config.K <= _NARROW_STEPS and config.scheme == "explicit" else wide_dtype(dtype)
