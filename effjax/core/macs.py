"""Multiply-accumulates of a function, counted from its jaxpr."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr

from effjax.core.errors import check_number, near

Equation = Any  # jax.extend.core.JaxprEqn
Rule = Callable[[Equation], int | None]
N = TypeVar("N", int, float)


class MacCount(NamedTuple):
    """Multiply-accumulates of one call.

    Attributes:
      least: with the cheapest branch of every ``cond``; what is unknown counts as nothing.
      most: with the most expensive branch; None where something is unknown.
      expected: with the given branch probabilities; None where a ``cond`` whose branches differ has
        none, or something unknown is reached.
      unknown: what could not be counted, by primitive and name scope.
    """

    least: int
    most: int | None
    expected: float | None
    unknown: tuple[str, ...] = ()


_NOTHING = MacCount(0, 0, 0)
_CUSTOM: dict[str, Rule] = {}


def register_macs(primitive_name: str, rule: Rule) -> None:
    """Count a primitive, a custom kernel's for example, by a rule of one's own.

    Args:
      primitive_name: ``eqn.primitive.name``, such as ``"pallas_call"`` or ``"ffi_call"``.
      rule: ``equation -> MACs``. It reads ``eqn.invars[i].aval``, ``eqn.outvars[i].aval`` and
        ``eqn.params``; None leaves the equation to the built-in rule. The last rule registered for a
        primitive holds.

    Raises:
      TypeError: ``rule`` cannot be called.

    Example:
      >>> register_macs("ffi_call", lambda eqn: None)
    """
    if not callable(rule):
        raise TypeError(f"rule={rule!r} must be a function from a jaxpr equation to a number of MACs or None.")
    _CUSTOM[primitive_name] = rule


def count_macs(
    function: Callable[..., Any],
    *args: Any,
    branch_probabilities: Mapping[str, Sequence[float]] | None = None,
) -> MacCount:
    r"""Multiply-accumulates of ``function(*args)``, counted from its jaxpr after dead code is removed.

    Matrix products count :math:`B M N K`; convolutions count every tap of every output, padding
    included (as published tables do) but without the zeros that a transposed convolution inserts;
    sparse products count stored elements times columns. Element-wise work counts nothing. ``scan``
    and kernel grids multiply by their length, ``shard_map`` by its devices, so the count is that of
    all devices. Loops with known bounds are ``scan`` in the jaxpr; whatever is left as ``while`` has
    a trip count that only the data know: it is reported, not guessed. So are decompositions, FFTs,
    callbacks and foreign kernels without a rule (``register_macs``).

    Args:
      function: a traceable function; it is traced, never run.
      *args: arrays or ``jax.ShapeDtypeStruct``.
      branch_probabilities: measured probabilities of the branches of ``cond`` and ``switch``, by a
        regular expression on the name scope (``jax.named_scope``; Flax modules set it), first match
        wins. For ``lax.cond`` the order is (false, true). Conditions whose branches cost the same
        need none.

    Returns:
      A ``MacCount``.

    Raises:
      ValueError: probabilities that do not fit a condition, or a pattern that matches none.

    Example:
      >>> x, w = jax.numpy.ones((8, 4)), jax.numpy.ones((4, 16))
      >>> count_macs(lambda x: x @ w, x).most
      512
      >>> def skip(x):
      ...     with jax.named_scope("gate"):
      ...         return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x @ w[:, :1] + w[:1], x)
      >>> count_macs(skip, x, branch_probabilities={"gate": (0.75, 0.25)})
      MacCount(least=32, most=512, expected=152.0, unknown=())
    """
    return count_jaxpr_macs(jax.make_jaxpr(function)(*args), branch_probabilities)


def count_jaxpr_macs(closed: Any, branch_probabilities: Mapping[str, Sequence[float]] | None = None) -> MacCount:
    """``count_macs`` of a function that is traced already."""
    counter = _Counter(branch_probabilities or {})
    jaxpr = closed.jaxpr
    live, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    count = counter.jaxpr(live, "")
    counter.check_matched()
    return count


def holds_loop(jaxpr: Any) -> bool:
    """Whether a jaxpr repeats a body, which XLA's own cost analysis counts once or not at all."""
    return any(
        eqn.primitive.name in ("while", "pallas_call")
        or (eqn.primitive.name == "scan" and eqn.params["length"] != 1)
        or any(holds_loop(inner) for inner in _inner_jaxprs(eqn))
        for eqn in jaxpr.eqns
    )


class _Counter:
    """Walks a jaxpr; remembers which patterns of branch probabilities were used."""

    def __init__(self, branch_probabilities: Mapping[str, Sequence[float]]):
        self.probabilities = {
            pattern: tuple(check_number(f"branch_probabilities[{pattern!r}]", p, low=0, high=1) for p in row)
            for pattern, row in branch_probabilities.items()
        }
        for pattern, row in self.probabilities.items():
            if abs(sum(row) - 1) > 1e-6:
                raise ValueError(f"branch_probabilities[{pattern!r}]={row} must sum to 1, not {sum(row):g}.")
        self.matched: set[str] = set()
        self.scopes: list[str] = []

    def check_matched(self) -> None:
        for pattern in self.probabilities:
            if pattern not in self.matched:
                raise ValueError(
                    f"branch_probabilities: {pattern!r} claims none of the {len(self.scopes)} conditions whose "
                    f"branches differ in cost.{near(pattern, self.scopes)} Their scopes begin with {self.scopes[:5]}."
                )

    def jaxpr(self, jaxpr: Any, scope: str) -> MacCount:
        return _total(self.equation(eqn, scope) for eqn in jaxpr.eqns)

    def equation(self, eqn: Equation, scope: str) -> MacCount:
        name = eqn.primitive.name
        scope = "/".join(part for part in (scope, str(eqn.source_info.name_stack)) if part)
        for rules in (_CUSTOM, _RULES):
            macs = rules[name](eqn) if name in rules else None
            if macs is not None:
                return MacCount(macs, macs, macs)
        if name in _OPAQUE:
            return _unknown(name, scope)
        if name == "cond":
            return self.condition([self.jaxpr(branch, scope) for branch in eqn.params["branches"]], scope)
        if name == "while":
            return self.loop(eqn, scope)
        inside = _total(self.jaxpr(inner, scope) for inner in _inner_jaxprs(eqn))
        if inside == _NOTHING:
            return inside
        repeats = 1 if name in _CALLS else _REPEATS[name](eqn) if name in _REPEATS else None
        return _unknown(name, scope, inside=inside.unknown) if repeats is None else _scaled(inside, repeats)

    def loop(self, eqn: Equation, scope: str) -> MacCount:
        test = self.jaxpr(eqn.params["cond_jaxpr"], scope)
        body = self.jaxpr(eqn.params["body_jaxpr"], scope)
        trip = _total([test, body])
        if trip == _NOTHING:
            return trip
        detail = f"{trip.least} MACs a trip" if trip.least == trip.most else f"at least {trip.least} MACs a trip"
        return _unknown("while", scope, detail, trip.unknown)._replace(least=test.least)

    def condition(self, branches: list[MacCount], scope: str) -> MacCount:
        most = _known([branch.most for branch in branches])
        expected = [branch.expected for branch in branches]
        if all(branch == branches[0] for branch in branches):
            return branches[0]
        self.scopes.append(scope)
        return MacCount(
            least=min(branch.least for branch in branches),
            most=None if most is None else max(most),
            expected=_expectation(self.row(len(branches), scope), expected),
            unknown=_unique(branches),
        )

    def row(self, branches: int, scope: str) -> Sequence[float] | None:
        for pattern, row in self.probabilities.items():
            if re.search(pattern, scope):
                if len(row) != branches:
                    raise ValueError(
                        f"branch_probabilities[{pattern!r}] holds {len(row)} numbers, but the condition in {scope!r} "
                        f"has {branches} branches. Give one probability for each; for lax.cond, (false, true)."
                    )
                self.matched.add(pattern)
                return row
        return None


def _expectation(row: Sequence[float] | None, expected: Sequence[float | None]) -> float | None:
    if row is None:
        return None
    return _sum([None if macs is None else p * macs for p, macs in zip(row, expected, strict=True) if p > 0])


def _known(numbers: Sequence[N | None]) -> list[N] | None:
    known = [number for number in numbers if number is not None]
    return known if len(known) == len(numbers) else None


def _sum(numbers: Sequence[N | None]) -> N | None:
    known = _known(numbers)
    return None if known is None else cast(N, sum(known))


def _unknown(name: str, scope: str, detail: str = "", inside: tuple[str, ...] = ()) -> MacCount:
    label = name + (f" in {scope}" if scope else "") + (f": {detail}" if detail else "")
    return MacCount(0, None, None, (label, *inside))


def _unique(counts: Iterable[MacCount]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(label for count in counts for label in count.unknown))


def _total(counts: Iterable[MacCount]) -> MacCount:
    counts = list(counts)
    return MacCount(
        least=sum(count.least for count in counts),
        most=_sum([count.most for count in counts]),
        expected=_sum([count.expected for count in counts]),
        unknown=_unique(counts),
    )


def _scaled(count: MacCount, repeats: int) -> MacCount:
    if repeats == 0:
        return _NOTHING
    return MacCount(
        least=count.least * repeats,
        most=None if count.most is None else count.most * repeats,
        expected=None if count.expected is None else count.expected * repeats,
        unknown=count.unknown,
    )


def _inner_jaxprs(eqn: Equation) -> Iterator[Any]:
    def is_jaxpr(value: Any) -> bool:
        return hasattr(value, "eqns")

    return filter(is_jaxpr, jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr))


def _size_without(shape: Sequence[int], *axes: Sequence[int]) -> int:
    dropped = {int(axis) for group in axes for axis in group}
    return math.prod(size for axis, size in enumerate(shape) if axis not in dropped)


def _dot(eqn: Equation) -> int:
    (contract, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval
    return eqn.outvars[0].aval.size * math.prod(lhs.shape[axis] for axis in contract)


def _ragged_dot(eqn: Equation) -> int:
    # Every row of the left side meets one group's matrix, however the rows are split.
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contract), (_, batch) = numbers.dot_dimension_numbers
    lhs, rhs = (invar.aval for invar in eqn.invars[:2])
    return lhs.size * _size_without(rhs.shape, contract, batch, numbers.rhs_group_dimensions)


def _conv(eqn: Equation) -> int:
    kernel, out = eqn.invars[1].aval, eqn.outvars[0].aval
    numbers = eqn.params["dimension_numbers"]
    outputs = out.shape[numbers.out_spec[0]] * out.shape[numbers.out_spec[1]]
    taps = (
        _taps(out.shape[out_axis], kernel.shape[kernel_axis], stride, low, inserted, spread)
        for out_axis, kernel_axis, stride, (low, _), inserted, spread in zip(
            numbers.out_spec[2:],
            numbers.rhs_spec[2:],
            eqn.params["window_strides"],
            eqn.params["padding"],
            eqn.params["lhs_dilation"],
            eqn.params["rhs_dilation"],
            strict=True,
        )
    )
    # The kernel's input axis is already divided by the feature groups.
    return outputs * kernel.shape[numbers.rhs_spec[1]] * math.prod(taps)


def _taps(out: int, kernel: int, stride: int, low: int, inserted: int, spread: int) -> int:
    """Pairs of output and kernel positions along one axis that do not fall on an inserted zero."""
    if inserted == 1:
        return out * kernel
    position = np.arange(out)[:, None] * stride + np.arange(kernel)[None, :] * spread - low
    return int(np.count_nonzero(position % inserted == 0))


def _sparse_dot(eqn: Equation, sparse_axes: int) -> int:
    """Stored elements times columns; ``sparse_axes`` trail the batch axes of the index array."""
    data, indices, rhs = (eqn.invars[i].aval for i in (0, 1, -1))
    batch = indices.ndim - sparse_axes
    (_, contract), (_, shared) = eqn.params["dimension_numbers"]
    # Batch axes of the stored arrays may be 1 and broadcast; the logical shape is not.
    stored = math.prod(eqn.params["lhs_spinfo"].shape[:batch]) * math.prod(data.shape[batch:])
    return stored * _size_without(rhs.shape, contract, shared)


def _grid(eqn: Equation) -> int | None:
    grid = eqn.params["grid_mapping"].grid
    return math.prod(grid) if all(isinstance(size, int) for size in grid) else None


def _shards(eqn: Equation) -> int:
    axes = eqn.params.get("newly_manual_axes", eqn.params.get("manual_axes"))
    return math.prod(eqn.params["mesh"].shape[axis] for axis in axes)


def _depthwise(eqn: Equation) -> int | None:
    """Products of ``core.depthwise``, which are element-wise; the function's name holds the number of taps."""
    named = re.fullmatch(r"depthwise_(products|kernel)_(\d+)", eqn.params["name"])
    if named is None:
        return None
    outputs = eqn.outvars[0] if named[1] == "products" else eqn.invars[1]
    return outputs.aval.size * int(named[2])


_RULES: dict[str, Rule] = {
    "jit": _depthwise,
    "pjit": _depthwise,
    "dot_general": _dot,
    "scaled_dot": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _conv,
    "bcoo_dot_general": lambda eqn: _sparse_dot(eqn, 2),
    "bcsr_dot_general": lambda eqn: _sparse_dot(eqn, 1),
    "bcoo_dot_general_sampled": _dot,
}
# How often the jaxpr inside an equation runs: once in a call, else as the rule says.
_CALLS = {
    *("jit", "pjit", "call", "core_call", "closed_call", "core_closed_call", "eval_jaxpr"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call"),
    *("remat", "remat2", "checkpoint"),
}
_REPEATS: dict[str, Callable[[Equation], int | None]] = {
    "scan": lambda eqn: eqn.params["length"],
    "shard_map": _shards,
    "pallas_call": _grid,
}
# Real work without a jaxpr inside.
_OPAQUE = {
    *("lu", "cholesky", "qr", "geqrf", "householder_product", "eigh", "eig", "svd", "schur", "hessenberg"),
    *("tridiagonal", "tridiagonal_solve", "triangular_solve", "fft", "bcoo_spdot_general"),
    *("ffi_call", "triton_kernel_call", "pure_callback", "io_callback"),
    *("dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper"),
}
