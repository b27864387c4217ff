"""Paths of pytree leaves, selection by regular expression, and dtype-safe scalars."""

import re
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr
from jax.typing import DTypeLike

from effjax.core.errors import near

PyTree = Any
Node = TypeVar("Node")


def path_name(path: Sequence[Any]) -> str:
    """Join a JAX key path with slashes: ``params/Dense_0/kernel``.

    Linen, NNX state and Equinox spell the same leaf differently; a trailing attribute ``.value`` (of
    an NNX variable or a Linen box) is dropped, so that one pattern serves all three. A dictionary
    key or a parameter called ``value`` stays.
    """
    boxed = len(path) > 1 and getattr(path[-1], "name", None) == "value"
    return "/".join(_key_name(key) for key in (path[:-1] if boxed else path))


def _key_name(key: Any) -> str:
    for field in ("key", "name", "idx"):
        if hasattr(key, field):
            return str(getattr(key, field)).lstrip(".")
    return str(key)


def leaf_paths(tree: PyTree) -> list[str]:
    """The slash-joined path of every leaf, in the order of ``jax.tree.leaves``."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def leaves_at(tree: PyTree, paths: Container[str]) -> dict[str, Any]:
    """The leaves whose slash-joined paths are among ``paths``, by path.

    Example:
      >>> leaves_at({"a": {"kernel": 1, "bias": 2}}, ["a/kernel"])
      {'a/kernel': 1}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name: leaf for path, leaf in leaves if (name := path_name(path)) in paths}


def with_leaves(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """``tree`` with other leaves at some slash-joined paths; None counts as a leaf on both sides.

    Example:
      >>> with_leaves({"a": {"kernel": 1, "bias": 2}}, {"a/kernel": None})
      {'a': {'bias': 2, 'kernel': None}}
    """
    fill = lambda path, leaf: leaves.get(path_name(path), leaf)
    return jax.tree_util.tree_map_with_path(fill, tree, is_leaf=lambda leaf: leaf is None)


def only_node(tree: PyTree, kind: type[Node], *, argument: str = "state", maker: str) -> Node:
    """The one node of a type in a tree, such as a method's own state inside the state of an ``optax.chain``.

    Args:
      tree: an optimizer's state.
      kind: a NamedTuple class.
      argument: what the caller calls the tree, for the message.
      maker: the transformation that makes such nodes, for the message.

    Raises:
      ValueError: none, or several.

    Example:
      >>> only_node(({"a": 1}, Selection(2, (3,))), Selection, maker="select").counts
      (3,)
    """
    mine = lambda node: isinstance(node, kind)
    found = [node for node in jax.tree.leaves(tree, is_leaf=mine) if mine(node)]
    if len(found) != 1:
        raise ValueError(
            f"{argument}={type(tree).__name__} holds {len(found)} {kind.__name__}, but exactly one is needed. "
            f"Pass the state that tx.init or tx.update of {maker} returned."
        )
    return found[0]


class Selection(NamedTuple):
    """What ``select`` found.

    Attributes:
      tree: the index of the first matching pattern at every leaf, -1 where none matches.
      counts: leaves claimed by each pattern.
    """

    tree: PyTree
    counts: tuple[int, ...]


def select(tree: PyTree, patterns: Sequence[str], *, argument: str = "patterns") -> Selection:
    """Assign every leaf to the first pattern that matches its path (``re.search``).

    Args:
      tree: any pytree.
      patterns: regular expressions over slash-joined paths; first match wins.
      argument: the caller's argument name, for the messages.

    Returns:
      A ``Selection``.

    Raises:
      ValueError: a pattern is no regular expression, or claims no leaf. The message tells whether
        it matches nothing (and lists near paths) or only leaves claimed before.

    Example:
      >>> select({"a": {"kernel": 1, "bias": 2}}, ["kernel"]).counts
      (1,)
    """
    compiled = [_compile(pattern, argument) for pattern in patterns]
    names = leaf_paths(tree)
    owners = [next((i for i, rule in enumerate(compiled) if rule.search(name)), -1) for name in names]
    counts = tuple(owners.count(i) for i in range(len(compiled)))
    for i, count in enumerate(counts):
        if not count:
            raise ValueError(_no_match(argument, patterns[i], compiled[i], names))
    return Selection(jax.tree.unflatten(jax.tree.structure(tree), owners), counts)


def _compile(pattern: str, argument: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{argument}: {pattern!r} is not a regular expression: {error}.") from None


def _no_match(argument: str, pattern: str, rule: re.Pattern[str], names: list[str]) -> str:
    hidden = [name for name in names if rule.search(name)]
    if hidden:
        return (
            f"{argument}: {pattern!r} matches only leaves that an earlier pattern claims "
            f"({len(hidden)}, e.g. {hidden[0]!r}). Put the narrower pattern first or drop it."
        )
    return (
        f"{argument}: {pattern!r} matches none of the {len(names)} leaves.{near(pattern, names)} "
        f"The leaves begin with {names[:5]}."
    )


def wide(value: Any) -> jax.Array:
    """``value`` as an array of float32, or float64 where it is that already.

    Coefficients, losses and weights stay wide whatever the parameters' dtype: in bfloat16 0.999
    rounds to 1.
    """
    array = jnp.asarray(value)
    return array.astype(wide_dtype(array.dtype))


def wide_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype of sums over ``dtype``: its own from 32 bits on, float32 for narrower floats, integers and bools."""
    dtype = np.dtype(dtype)
    return dtype if dtype.kind in "fc" and dtype.itemsize >= 4 else np.dtype(np.float32)


def holding_both(one: DTypeLike, other: DTypeLike) -> np.dtype:
    """The dtype that holds the values of two, also where the user lets no dtypes meet unasked.

    Example:
      >>> holding_both(jnp.bfloat16, jnp.float32).name
      'float32'
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(one, other)


def copied(tree: PyTree) -> PyTree:
    """The same arrays, placed as they are, in buffers of their own that may be donated; compiles nothing.

    Example:
      >>> x = jnp.ones(2)
      >>> copied({"a": x})["a"].unsafe_buffer_pointer() == x.unsafe_buffer_pointer()
      False
    """
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding, may_alias=False), tree)


def unread(fn: Callable[[PyTree], Any], tree: PyTree) -> list[str]:
    """Paths of the leaves that the first array of ``fn(tree)`` does not depend on; ``fn`` is traced, not run.

    Example:
      >>> unread(lambda tree: tree["a"] + 0 * tree["b"], {"a": 1.0, "b": 2.0, "c": 3.0})
      ['c']
    """
    jaxpr = jax.make_jaxpr(fn)(tree).jaxpr
    _, used = dce_jaxpr(jaxpr, [True] + [False] * (len(jaxpr.outvars) - 1))
    return [path for path, read in zip(leaf_paths(tree), used, strict=True) if not read]
