"""A network of any kind behind two pure functions: Flax Linen and NNX modules, Equinox modules, bare functions."""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax

PyTree = Any
Variables = Mapping[str, PyTree]
KINDS = (
    "a Linen module, an NNX module (or a function of `rngs` that makes one), an Equinox module (or a function of `key` "
    "that makes one), or a pair of functions (init, apply) with init(key) and apply(params, inputs, *, key=None)"
)


class Network(NamedTuple):
    """Two pure functions.

    Attributes:
      name: for tables.
      init: ``(key, inputs) -> variables``, with the entry ``params``; traceable.
      apply: ``(variables, inputs, train, key) -> (outputs, changed collections)``.
    """

    name: str
    init: Callable[[jax.Array, PyTree], Variables]
    apply: Callable[[Variables, PyTree, bool, jax.Array | None], tuple[PyTree, Variables]]


def as_network(module: Any) -> Network:
    """``module`` as two pure functions.

    Raises:
      TypeError: something that is none of the kinds.
    """
    if isinstance(module, nn.Module):
        return _linen(module)
    if isinstance(module, tuple) and len(module) == 2 and all(map(callable, module)):
        return _functions(*module)
    nnx, equinox = sys.modules.get("flax.nnx"), sys.modules.get("equinox")
    if nnx is not None and isinstance(module, nnx.Module):
        return _nnx(nnx, type(module).__name__, lambda key: nnx.clone(module))
    if equinox is not None and isinstance(module, equinox.Module):
        return _equinox(equinox, type(module).__name__, lambda key: module)
    if callable(module):
        name = getattr(module, "__name__", type(module).__name__)
        takes = inspect.signature(module.__init__ if inspect.isclass(module) else module).parameters
        if nnx is not None and "rngs" in takes:
            return _nnx(nnx, name, lambda key: module(rngs=nnx.Rngs(key)))
        if equinox is not None and "key" in takes:
            return _equinox(equinox, name, lambda key: module(key=key))
    raise TypeError(f"module is a {type(module).__name__}. Give {KINDS}.")


def _linen(module: nn.Module) -> Network:
    mode = _mode(module.__call__)

    def init(key: jax.Array, inputs: PyTree) -> Variables:
        return module.init({"params": key, "dropout": key}, inputs, **mode(False))

    def apply(variables: Variables, inputs: PyTree, train: bool, key: jax.Array | None) -> tuple[PyTree, Variables]:
        state = [name for name in variables if name != "params"] if train else []
        rngs = None if key is None else {"dropout": key}
        outputs, changed = module.apply(variables, inputs, rngs=rngs, mutable=state, **mode(train))
        return outputs, changed

    return Network(type(module).__name__, init, apply)


def _mode(function: Callable) -> Callable[[bool], dict[str, Any]]:
    """The keyword that tells a module whether it is trained, if it has one."""
    takes = inspect.signature(function).parameters
    if "train" in takes:
        return lambda train: {"train": train}
    if "training" in takes:
        return lambda train: {"training": train}
    return lambda train: {"deterministic": not train} if "deterministic" in takes else {}


def _functions(init: Callable, apply: Callable) -> Network:
    takes_key = "key" in inspect.signature(apply).parameters

    def run(variables: Variables, inputs: PyTree, train: bool, key: jax.Array | None) -> tuple[PyTree, Variables]:
        keys = {"key": key if train else None} if takes_key else {}
        return apply(variables["params"], inputs, **keys), {}

    name = getattr(apply, "__name__", "function")
    return Network(name if name.isidentifier() else "function", lambda key, inputs: {"params": init(key)}, run)


def _nnx(nnx: Any, name: str, make: Callable[[jax.Array], Any]) -> Network:
    """The parameters are the variables of type ``nnx.Param``; all others are the collection ``nnx``."""
    parts: dict[bool, tuple[Any, Any, Any]] = {}

    def split(model: Any, train: bool) -> tuple[Any, Any, Any]:
        model.train() if train else model.eval()
        return nnx.split(model, nnx.Param, ...)

    def layout(train: bool) -> tuple[Any, Any, Any]:
        # The structure, made once: a graph definition and abstract states without values.
        if train not in parts:
            parts[train] = split(nnx.eval_shape(lambda: make(jax.random.key(0))), train)
        return parts[train]

    def init(key: jax.Array, inputs: PyTree) -> Variables:
        _, params, rest = split(make(key), True)
        variables = {"params": nnx.to_pure_dict(params)}
        others = nnx.to_pure_dict(rest)
        return variables | ({"nnx": others} if others else {})

    def apply(variables: Variables, inputs: PyTree, train: bool, key: jax.Array | None) -> tuple[PyTree, Variables]:
        definition, params, rest = (nnx.clone(part) if index else part for index, part in enumerate(layout(train)))
        nnx.replace_by_pure_dict(params, variables["params"])
        nnx.replace_by_pure_dict(rest, variables.get("nnx", {}))
        model = nnx.merge(definition, params, rest)
        outputs = model(inputs)
        others = nnx.to_pure_dict(split(model, train)[2])
        return outputs, {"nnx": others} if train and others else {}

    return Network(name, init, apply)


def _equinox(equinox: Any, name: str, make: Callable[[jax.Array], Any]) -> Network:
    """The parameters are the inexact arrays; the module is called per example, as Equinox modules are."""
    static = equinox.partition(equinox.filter_eval_shape(make, jax.random.key(0)), _is_parameter)[1]

    def init(key: jax.Array, inputs: PyTree) -> Variables:
        return {"params": equinox.partition(make(key), _is_parameter)[0]}

    def apply(variables: Variables, inputs: PyTree, train: bool, key: jax.Array | None) -> tuple[PyTree, Variables]:
        model = equinox.combine(variables["params"], static)
        model = model if train else equinox.nn.inference_mode(model)
        if key is None or not train or "key" not in inspect.signature(type(model).__call__).parameters:
            return jax.vmap(model)(inputs), {}
        rows = jax.tree.leaves(inputs)[0].shape[0]
        return jax.vmap(lambda x, key: model(x, key=key))(inputs, jax.random.split(key, rows)), {}

    return Network(name, init, apply)


def _is_parameter(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact)
