"""Several processes of one run that do a thing all or none, and the same thing."""

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import jax
import numpy as np

__all__: list[str] = []

Result = TypeVar("Result")
_TOLD = "_effjax_told"
"""Attribute of an error that the other processes know of."""


class ElsewhereError(ValueError):
    """Another process of a distributed run was refused."""


def together(action: Callable[[], Result]) -> Result:
    """Do something in every process; where one of them is refused all are, in place of waiting for it.

    Such actions may hold one another: what an inner one has told the others is not told again.

    Raises:
      ElsewhereError: in the processes where it worked.
    """
    if jax.process_count() == 1:
        return action()
    from jax.experimental import multihost_utils

    error, result = None, None
    try:
        result = action()
    except Exception as refused:
        if getattr(refused, _TOLD, False):
            raise
        error = refused
    failed = np.flatnonzero(multihost_utils.process_allgather(np.array(error is not None)))
    if error is None and failed.size:
        error = ElsewhereError(f"process {failed[0]} of this run was refused; its message says why.")
    if error is not None:
        setattr(error, _TOLD, True)
        raise error
    return cast(Result, result)


def check_same_everywhere(what: Mapping[str, Any], argument: str = "config") -> None:
    """Refuse a run whose processes were started with different settings, in all of them.

    Args:
      what: JSON-able; compared with that of process 0.
      argument: what it is, for the message.

    Raises:
      ValueError: with the first fields that differ, and the process.

    Example:
      >>> check_same_everywhere({"steps": 3})
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(what, sort_keys=True, default=str).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(text)))
    texts = multihost_utils.process_allgather(np.pad(text, (0, int(sizes.max()) - len(text))))
    first, *others = (json.loads(bytes(row[:size])) for row, size in zip(texts, sizes, strict=True))
    for process, other in enumerate(others, start=1):
        if other != first:
            fields = sorted(_difference(first, other))
            raise ValueError(
                f"{argument}: process {process} of this run was started with other settings than process 0: "
                f"{'; '.join(fields[:5])}. Give all processes one command."
            )


def _difference(left: Any, right: Any, path: str = "") -> list[str]:
    """One line for every field that differs.

    Example:
      >>> _difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}})
      ['a.b is 1 in process 0, 3 in the other']
    """
    if isinstance(left, dict) and isinstance(right, dict):
        names = sorted(left.keys() | right.keys())
        inner = (_difference(left.get(name), right.get(name), f"{path}.{name}".strip(".")) for name in names)
        return [line for lines in inner for line in lines]
    return [] if left == right else [f"{path} is {left!r} in process 0, {right!r} in the other"]
