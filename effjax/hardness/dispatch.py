"""Ask an expert about some rows of a batch only, inside ``jit``: by a fixed capacity, by buckets, or all and masked."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree

from effjax.core.errors import check_number, check_shape
from effjax.core.shapes import check_ladder
from effjax.core.slots import in_least_bucket, mesh_parts, over_mesh, request_slots
from effjax.core.tree import holding_both

__all__ = [
    "Dispatched",
    "dispatch_buckets",
    "dispatch_capacity",
    "dispatch_masked",
    "expert_capacity",
    "request_slots",
]

Apply = Callable[..., Any]


class Dispatched(NamedTuple):
    """Answers of a batch.

    Attributes:
      outputs: the expert's on the rows it served, the base model's bits on all others.
      answered: int32 [rows], who answered: 0 for the base model, 1 for the expert; in a cascade the model's place.
      overflowed: bool [rows], rows that asked and found no place.
      failed: bool [rows], rows that were asked about and got no usable answer: NaN, or none at all.
    """

    outputs: Any
    answered: Any
    overflowed: Any
    failed: Any

    @property
    def served(self) -> Any:
        """bool [rows], rows that another model than the first answered."""
        return self.answered > 0


def dispatch_capacity(
    apply: Apply,
    params: PyTree,
    inputs: PyTree,
    outputs: PyTree,
    request: Bool[Array | np.ndarray, "rows"],
    *,
    capacity: int,
    score: Float[Array | np.ndarray, "rows"] | None = None,
    mesh: Mesh | None = None,
    axis: str = "data",
) -> Dispatched:
    r"""Ask the expert about at most ``capacity`` rows; one program whose cost never varies.

    .. math:: y_i = g(x_i) \text{ if } i \in S, \quad y_i = b(x_i) \text{ otherwise}, \qquad |S| = \min(C, |R|)

    with R the rows that ask. The expert runs on C gathered rows, however many ask; places that nobody needs hold a row
    that does not ask, whose answer is dropped. Works under ``jit``, ``grad``, ``vmap`` and ``scan``.

    Args:
      apply: the expert, ``(params, inputs) -> outputs``: ``module.apply`` of Linen, a function of an NNX state, any.
      params: its parameters, an argument so that they are no constants of the program.
      inputs: an array or a tree of arrays, the batch axis leading.
      outputs: the base model's answers, of the same form as the expert's, the batch axis leading.
      request: rows that ask.
      capacity: C, the most rows that are served; see ``expert_capacity``. C above the batch is the batch.
      score: who is served where more ask than there is room for: the largest, of equals the first; NaN counts as
        largest. None serves the first C rows.
      mesh: where the batch is sharded over ``axis`` of this mesh, each device serves C / devices of its own rows, and
        no row crosses devices. Parameters are replicated over that axis.
      axis: name of the batch's axis in the mesh.

    Returns:
      A ``Dispatched``. ``overflowed`` holds :math:`\max(0, |R| - C)` rows.

    Raises:
      ValueError: shapes that do not fit, an expert whose answers differ in form from ``outputs``, or numbers out of
        range.

    Example:
      >>> expert = lambda params, x: params * x
      >>> x = jnp.array([[1.0], [2.0], [3.0]])
      >>> asks = jnp.array([True, False, True])
      >>> found = dispatch_capacity(expert, 10.0, x, jnp.zeros((3, 1)), asks, capacity=1)
      >>> found.outputs.ravel().tolist(), found.served.tolist(), int(found.overflowed.sum())
      ([10.0, 0.0, 0.0], [True, False, False], 1)

    The fixed-capacity dispatch of mixtures of experts, for whole networks.
    """
    check_number("capacity", capacity, low=1, integer=True)
    rows = check_batch(inputs, outputs, request)
    if score is not None:
        check_shape("score", score, (rows,), "One number for each row.")
    parts = mesh_parts(mesh, axis, rows)
    if parts > 1 and capacity % parts:
        raise ValueError(f"capacity={capacity} does not divide among the {parts} devices of axis {axis!r}.")

    def run(params, inputs, outputs, request, *score):
        size = min(capacity // parts, request.shape[0])
        slots = request_slots(request, *score, capacity=size)
        return serve_slots(apply, params, inputs, outputs, request, slots)

    rest = () if score is None else (score,)
    return over_mesh(mesh, axis, run, rows)(params, inputs, outputs, request, *rest)


def dispatch_buckets(
    apply: Apply,
    params: PyTree,
    inputs: PyTree,
    outputs: PyTree,
    request: Bool[Array | np.ndarray, "rows"],
    *,
    buckets: Sequence[int],
    mesh: Mesh | None = None,
    axis: str = "data",
) -> Dispatched:
    r"""Ask the expert about all rows that ask, in the smallest bucket that holds them; one program with a branch each.

    .. math:: C = \min \{ c \in \{0\} \cup \mathrm{buckets} \cup \{B\} : c \ge |R| \}

    Only the branch of C runs; with nobody asking that is the one without the expert. No row overflows and nothing is
    read on the host; compile time and code grow with the number of buckets. Not under ``vmap``, where a branch becomes
    a selection and all buckets run: that is refused.

    Args:
      apply: the expert, ``(params, inputs) -> outputs``.
      params: its parameters.
      inputs: an array or a tree of arrays, the batch axis leading.
      outputs: the base model's answers, of the same form as the expert's.
      request: rows that ask.
      buckets: increasing sizes; 0 and the batch are added, sizes above the batch left out. With a mesh, of one device.
      mesh: where the batch is sharded over ``axis`` of this mesh, each device gathers its own rows, and all take the
        branch of the device where most rows ask.
      axis: name of the batch's axis in the mesh.

    Returns:
      A ``Dispatched``.

    Raises:
      ValueError: as for ``dispatch_capacity``, or under ``vmap``.

    Example:
      >>> expert = lambda params, x: params * x
      >>> x = jnp.array([[1.0], [2.0], [3.0]])
      >>> asks = jnp.array([True, False, True])
      >>> dispatch_buckets(expert, 10.0, x, jnp.zeros((3, 1)), asks, buckets=(2,)).outputs.ravel().tolist()
      [10.0, 0.0, 30.0]

    On CPUs XLA is slow at convolutions inside a branch: there ``HostDispatch`` is the way.
    """
    rungs = check_ladder(buckets, argument="buckets")
    rows = check_batch(inputs, outputs, request)
    manual = axis if mesh is not None else None

    def run(params, inputs, outputs, request):
        def serve(slots, params, inputs, outputs, request):
            return serve_slots(apply, params, inputs, outputs, request, slots)

        return in_least_bucket(
            serve,
            request,
            params,
            inputs,
            outputs,
            request,
            buckets=rungs,
            axis=manual,
            caller="dispatch_buckets",
            instead="dispatch_capacity",
        )

    return over_mesh(mesh, axis, run, rows)(params, inputs, outputs, request)


def dispatch_masked(
    apply: Apply, params: PyTree, inputs: PyTree, outputs: PyTree, request: Bool[Array | np.ndarray, "rows"]
) -> Dispatched:
    """Ask the expert about every row and keep the answers of those that ask: saves nothing, and is what others equal.

    Args:
      apply: the expert, ``(params, inputs) -> outputs``.
      params: its parameters.
      inputs: an array or a tree of arrays, the batch axis leading.
      outputs: the base model's answers, of the same form as the expert's.
      request: rows that ask.

    Returns:
      A ``Dispatched``.

    Raises:
      ValueError: inputs, outputs and request of different numbers of rows, or answers of another form.

    Example:
      >>> expert = lambda params, x: params * x
      >>> dispatch_masked(expert, 10.0, jnp.ones((2, 1)), jnp.zeros((2, 1)), jnp.array([True, False])).outputs.tolist()
      [[10.0], [0.0]]
    """
    rows = check_batch(inputs, outputs, request)
    return serve_slots(apply, params, inputs, outputs, request, jnp.where(request, jnp.arange(rows), rows))


def expert_capacity(rows: int, share: float, *, deviations: float = 3.0, multiple: int = 8) -> int:
    r"""A capacity that a batch seldom exceeds if each row asks by itself with probability q.

    .. math:: C = \lceil B q + z \sqrt{B q (1 - q)} \rceil

    Args:
      rows: B.
      share: q, the expected share of rows that ask, from 0 to 1. Bursts ask for more.
      deviations: z; 3 is exceeded by about one batch in a thousand.
      multiple: C is rounded up to a multiple of it, but not above B.

    Returns:
      C, from 1 to B.

    Raises:
      ValueError: an argument out of its range.

    Example:
      >>> expert_capacity(256, 0.3), expert_capacity(256, 0.3, deviations=2.6)
      (104, 96)
    """
    check_number("rows", rows, low=1, integer=True)
    check_number("share", share, low=0, high=1)
    check_number("deviations", deviations, low=0)
    check_number("multiple", multiple, low=1, integer=True)
    wanted = rows * share + deviations * math.sqrt(rows * share * (1 - share))
    return min(rows, max(1, math.ceil(wanted / multiple)) * multiple)


def serve_slots(
    apply: Apply,
    params: PyTree,
    inputs: PyTree,
    outputs: PyTree,
    request: Bool[Array | np.ndarray, "rows"],
    slots: Int[Array | np.ndarray, "capacity"],
) -> Dispatched:
    """Run the expert on gathered rows and put its answers in their places.

    Args:
      apply: the expert, ``(params, inputs) -> outputs``.
      params: its parameters.
      inputs: an array or a tree of arrays, the batch axis leading.
      outputs: the base model's answers.
      request: rows that ask.
      slots: rows to serve, each once; the number of rows where a place is empty.

    Returns:
      A ``Dispatched``.
    """
    rows, size = request.shape[0], slots.shape[0]
    nobody = jnp.zeros(rows, bool)
    if not rows or not size:
        outputs = jax.tree.map(_like, outputs, check_answers(apply, params, inputs, outputs, 1))
        return Dispatched(outputs, jnp.zeros(rows, jnp.int32), request, nobody)
    # Where a place is empty some row does not ask. Its answer is dropped; models of a cascade see that it does not ask.
    real = slots < rows
    taken = jnp.where(real, slots, jnp.argmin(request).astype(slots.dtype))
    check_answers(apply, params, inputs, outputs, size)
    answers = apply(params, jax.tree.map(lambda leaf: jnp.asarray(leaf)[taken], inputs))
    bad = functools.reduce(jnp.logical_or, map(_any_nan, jax.tree.leaves(answers)))
    good = jnp.where(bad, rows, slots)

    def place(own: Any, given: jax.Array) -> jax.Array:
        both = _like(own, given)
        return both.at[good].set(given.astype(both.dtype), mode="drop")

    tried = nobody.at[slots].set(True, mode="drop")
    return Dispatched(
        jax.tree.map(place, outputs, answers),
        jnp.zeros(rows, jnp.int32).at[good].set(1, mode="drop"),
        request & ~tried,
        nobody.at[jnp.where(bad, slots, rows)].set(True, mode="drop"),
    )


def _like(own: Any, given: Any) -> jax.Array:
    """The base's answers in a dtype that holds both without loss."""
    return jnp.asarray(own, holding_both(jnp.result_type(own), given.dtype))


def _any_nan(answers: jax.Array) -> jax.Array:
    if not jnp.issubdtype(answers.dtype, jnp.inexact):
        return jnp.zeros(answers.shape[0], bool)
    return jnp.any(jnp.isnan(answers.reshape(answers.shape[0], -1)), axis=1)


def check_batch(inputs: PyTree, outputs: PyTree, request: Any) -> int:
    """The number of rows, if all arrays have as many."""
    if jnp.ndim(request) != 1 or jnp.result_type(request) != jnp.bool_:
        raise ValueError(
            f"request is {jnp.result_type(request)}{list(jnp.shape(request))}; bool [rows] is needed, such as score > "
            "threshold."
        )
    rows = request.shape[0]
    for name, tree in (("inputs", inputs), ("outputs", outputs)):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        if not leaves:
            raise ValueError(f"{name}={tree!r} holds no array. The batch axis leads in every one.")
        for path, leaf in leaves:
            if jnp.shape(leaf)[:1] != (rows,):
                where = f"{name}{jax.tree_util.keystr(path)}"
                raise ValueError(f"{where} has shape {jnp.shape(leaf)}, but request has {rows} rows.")
    return rows


def check_answers(apply: Apply, params: PyTree, inputs: PyTree, outputs: PyTree, size: int) -> PyTree:
    """Shapes of the expert's answers on ``size`` rows, if they fit the base model's."""
    cut = lambda leaf: jax.ShapeDtypeStruct((size, *jnp.shape(leaf)[1:]), jnp.result_type(leaf))
    answers = jax.eval_shape(apply, params, jax.tree.map(cut, inputs))
    wanted = jax.tree.map(cut, outputs)
    same = jax.tree.structure(answers) == jax.tree.structure(wanted)
    pairs = list(zip(jax.tree.leaves(answers), jax.tree.leaves(wanted), strict=True)) if same else []
    kind = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.inexact)
    if not same or any(one.shape != two.shape or kind(one) != kind(two) for one, two in pairs):
        show = lambda tree: str(jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", tree)).replace("'", "")
        raise ValueError(
            f"the expert answers {size} rows with {show(answers)}; the base model's answers ask for {show(wanted)}. "
            "Give both models the same outputs, or wrap the expert."
        )
    return answers
