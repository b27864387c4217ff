"""Pretrained weights: safetensors in PyTorch's naming to Flax variables and back.

A model's layout is a table of ``Rule``s; nothing here knows a particular architecture.
"""

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.errors import near
from effjax.core.files import not_finite
from effjax.core.tree import path_name
from effjax.models.mapped import Entry, MappedTensors, Source, gathered, placed
from effjax.models.weight_files import find_weights, listed, read_tensors, read_unwrapped, write_tensors

PyTree = Any
Kind = Literal["none", "dense", "conv", "pointwise"]


class _Layout(NamedTuple):
    rank: int | None
    to_flax: Callable[[np.ndarray], np.ndarray]
    to_source: Callable[[np.ndarray], np.ndarray]


def _pointwise(tensor: np.ndarray) -> np.ndarray:
    turned = tensor.transpose(2, 3, 1, 0)
    return turned[0, 0] if turned.shape[:2] == (1, 1) else turned


_LAYOUTS: dict[str, _Layout] = {
    "none": _Layout(None, lambda tensor: tensor, lambda tensor: tensor),
    "dense": _Layout(2, np.transpose, np.transpose),  # (out, in) <-> (in, out)
    "conv": _Layout(4, lambda tensor: tensor.transpose(2, 3, 1, 0), lambda tensor: tensor.transpose(3, 2, 0, 1)),
    "pointwise": _Layout(4, _pointwise, lambda tensor: tensor.T[:, :, None, None]),  # (out, in, 1, 1) <-> (in, out)
}


class Rule(NamedTuple):
    """Where one family of tensors goes.

    Both sides are names with ``{field}`` placeholders, which stand for a run of letters and digits
    and appear on both sides, so that the rule reads in either direction. One number that stands in
    the source only, ``{layer}`` say, is the index on the leading axis of a target that stacks layers.
    Where several rules name one target, the first is the one written.

    Attributes:
      source: name in the file, ``layer{stage}.{block}.conv{i}.weight``.
      target: slash-joined path in the variables, ``params/stage{stage}_block{block}/conv{i}/kernel``,
        or None for a tensor that is ignored.
      kind: layout change: ``"none"``, ``"dense"`` ((out, in) to (in, out)), ``"conv"`` (OIHW to HWIO) or
        ``"pointwise"`` (a 1x1 convolution that is a dense layer here, (out, in, 1, 1) to (in, out)).
      part: (index, count), where several layers lie in one tensor: the target is that one of ``count`` equal parts of
        the last axis in our layout. Each part has a rule, all with one source.
    """

    source: str
    target: str | None
    kind: Kind = "none"
    part: tuple[int, int] = (0, 1)


def batch_norm_rules(source: str, target: str) -> tuple[Rule, ...]:
    """The rules of one batch norm of PyTorch: its module is ``source`` there, ``target`` here."""
    return (
        Rule(f"{source}.weight", f"params/{target}/scale"),
        Rule(f"{source}.bias", f"params/{target}/bias"),
        Rule(f"{source}.running_mean", f"batch_stats/{target}/mean"),
        Rule(f"{source}.running_var", f"batch_stats/{target}/var"),
        Rule(f"{source}.num_batches_tracked", None),
    )


def import_weights(
    tensors: Mapping[str, np.ndarray],
    target: PyTree,
    rules: Sequence[Rule] | None = None,
    *,
    origin: str = "tensors",
    optional: Collection[str] = (),
    shardings: PyTree = None,
    way_out: Callable[[Mapping[str, Sequence[str]]], str] | None = None,
) -> PyTree:
    """Arrange named tensors as the variables of a model.

    Args:
      tensors: name -> array in the source's layout; any floating dtype.
      target: variables of the model: arrays, or the shapes of ``jax.eval_shape(model.init, ...)``.
      rules: the layout table, first match wins; None for files that hold our own paths and layouts.
      origin: where the tensors came from, for the message.
      optional: paths that keep ``target``'s leaf where the tensors lack them: new heads.
      shardings: a ``NamedSharding`` for every leaf, for global arrays of which each process reads what its devices
        hold; ``tensors`` are then mapped. None for one device.
      way_out: advice for the end of the message, from the lists ``missing``, ``unexpected`` and ``misfitting``.

    Returns:
      A tree like ``target`` with its shapes and dtypes (float16 kernels become float32).

    Raises:
      ValueError: tensors missing, unexpected, of another shape or kind of number; all in one message.

    Example:
      >>> target = {"params": {"head": {"kernel": jnp.zeros((2, 3))}}}
      >>> rules = (Rule("linear.weight", "params/head/kernel", "dense"),)
      >>> variables = import_weights({"linear.weight": np.ones((3, 2), np.float16)}, target, rules)
      >>> variables["params"]["head"]["kernel"].dtype
      dtype('float32')
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(target)
    wanted = {path_name(path): leaf for path, leaf in leaves}
    found: dict[str, dict[int | None, np.ndarray]] = {}
    unexpected, misfits = [], []
    for name, tensor in tensors.items():
        matches = _targets_of(name, rules)
        if any(match.path is None for match in matches):
            continue
        if not matches or any(
            match.path not in wanted or not _has_layer(wanted[match.path], match.layer) for match in matches
        ):
            unexpected.append(name)
            continue
        spoilt = shardings is None and not_finite(tensor)
        for match in matches:
            assert match.path is not None
            leaf, layers = wanted[match.path], found.setdefault(match.path, {})
            problem = _misfit(tensor, leaf.shape if match.layer is None else leaf.shape[1:], leaf.dtype, match)
            if not problem and spoilt:
                problem = "holds NaN or infinity"
            if match.layer in layers:
                problem = "filled by another tensor before"
            misfits += [f"{name} -> {match.path}: {problem}"] if problem else []
            layers.setdefault(match.layer, _piece(tensor, match) if not problem else tensor)
    absent = [path for path in wanted if path not in found and path in optional]
    missing = [
        f"{name} -> {path}"
        for path, leaf in wanted.items()
        if path not in absent
        for name, _, layer, _ in _sources_of(path, leaf, rules) or [("no rule", "none", None, (0, 1))]
        if layer not in found.get(path, {})
    ]
    problems = {"missing": missing, "unexpected": unexpected, "misfitting": misfits}
    if any(problems.values()):
        text = "; ".join(f"{what}: {listed(names)}" for what, names in problems.items() if names)
        raise ValueError(
            f"{origin} does not hold the weights of this model. {text}. "
            f"{'Build the model with the sizes of the file.' if way_out is None else way_out(problems)}"
        )
    if shardings is not None:
        return jax.tree.unflatten(structure, _all_placed(tensors, wanted, found, jax.tree.leaves(shardings), origin))
    arrays = [leaf if path in absent else _joined(found[path], leaf.dtype) for path, leaf in wanted.items()]
    return jax.tree.unflatten(structure, arrays)


def _all_placed(
    tensors: Mapping[str, np.ndarray],
    wanted: Mapping[str, Any],
    found: Mapping[str, Mapping[int | None, np.ndarray]],
    shardings: Sequence[Any],
    origin: str,
) -> list[Any]:
    release = tensors.release if isinstance(tensors, MappedTensors) else lambda: None
    return [
        placed(Source(found[path], f"{origin}: {path}", release), leaf, sharding) if path in found else leaf
        for (path, leaf), sharding in zip(wanted.items(), shardings, strict=True)
    ]


def export_weights(variables: PyTree, rules: Sequence[Rule] | None = None) -> dict[str, np.ndarray]:
    """The inverse of ``import_weights``: named tensors in the source's layout.

    Args:
      variables: variables of the model.
      rules: the layout table; None keeps our own paths and layouts.

    Returns:
      Name -> contiguous array, in the variables' dtypes.

    Raises:
      ValueError: a leaf that no rule names, or two leaves with one name.

    Example:
      >>> variables = {"params": {"head": {"kernel": jnp.zeros((2, 3))}}}
      >>> export_weights(variables, (Rule("linear.weight", "params/head/kernel", "dense"),))["linear.weight"].shape
      (3, 2)
    """
    # safetensors writes the buffer as it lies in memory, whatever the strides say.
    read = lambda leaf, layer: np.asarray(leaf) if layer is None else np.asarray(leaf)[layer]
    return {name: np.ascontiguousarray(tensor.get(read)) for name, tensor in _named(variables, rules).items()}


def exported_in_turn(variables: PyTree, rules: Sequence[Rule]) -> list[Entry]:
    """As ``export_weights``, each tensor gathered when it is written."""
    like = lambda leaf, layer: np.broadcast_to(np.zeros((), bool), np.shape(leaf)[0 if layer is None else 1 :])
    entries = []
    for name, tensor in _named(variables, rules).items():
        empty = tensor.get(like)
        get = lambda tensor=tensor: tensor.get(gathered)
        entries.append(Entry(name, empty.shape, np.dtype(tensor.parts[0][0].dtype), get))
    return entries


class _Tensor(NamedTuple):
    """A tensor to write: the leaves, or layers of stacked leaves, that lie in it side by side."""

    kind: Kind
    parts: dict[int, tuple[Any, int | None]]

    def get(self, read: Callable[[Any, int | None], np.ndarray]) -> np.ndarray:
        """The tensor in the source's layout, ``read(leaf, layer)`` side by side."""
        arrays = [read(*self.parts[index]) for index in sorted(self.parts)]
        return _LAYOUTS[self.kind].to_source(arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1))


def _named(variables: PyTree, rules: Sequence[Rule] | None) -> dict[str, _Tensor]:
    """What each tensor of a file is made of."""
    tensors: dict[str, _Tensor] = {}
    counts: dict[str, int] = {}
    unnamed = []
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        path = path_name(key_path)
        sources = _sources_of(path, leaf, rules)
        unnamed += [] if sources else [path]
        for name, kind, layer, (index, count) in sources:
            counts[name] = count
            parts = tensors.setdefault(name, _Tensor(kind, {})).parts
            if index in parts:
                raise ValueError(f"rules: {path} and another leaf are both named {name!r}.")
            parts[index] = leaf, layer
    if unnamed:
        raise ValueError(f"rules: no rule names {listed(unnamed)}. Add one for each, or save with rules=None.")
    if short := [name for name, tensor in tensors.items() if len(tensor.parts) < counts[name]]:
        raise ValueError(f"rules: {listed(short)} lack a part of theirs. Give all the leaves that lie in one tensor.")
    return tensors


def load_weights(source: str | os.PathLike[str], target: PyTree, rules: Sequence[Rule] | None = None) -> PyTree:
    """Read a safetensors file into the variables of a model.

    Args:
      source: a file, a folder that holds one safetensors file (or ``model.safetensors``, or its
        ``model.safetensors.index.json``), or a name
        such as ``resnet_cifar10/resnet20`` inside the folder ``EFFJAX_MODELS`` or the package.
      target: as for ``import_weights``.
      rules: as for ``import_weights``.

    Returns:
      A tree like ``target``.

    Raises:
      FileNotFoundError: nothing there; the message lists where it looked.
      ValueError: a damaged or foreign file, or weights of another model.

    Example:
      >>> import tempfile
      >>> variables = {"params": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_weights(f"{folder}/model.safetensors", variables)
      ...     load_weights(folder, variables)["params"]["kernel"].shape
      (2, 3)
    """
    path = find_weights(source)
    tensors = read_tensors(path) if rules is None else read_unwrapped(path)
    return import_weights(tensors, target, rules, origin=str(path))


def save_weights(path: str | os.PathLike[str], variables: PyTree, rules: Sequence[Rule] | None = None) -> None:
    """Write the variables of a model as one safetensors file, whole or not at all.

    Args:
      path: the file; its folder must exist.
      variables: as for ``export_weights``.
      rules: as for ``export_weights``.

    Raises:
      FileNotFoundError: the folder does not exist.
      ValueError: as for ``export_weights``.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path={str(path)!r}: the folder {path.parent} does not exist. Create it first.")
    write_tensors(path, export_weights(variables, rules))


def module_name(path: str, rules: Sequence[Rule], layer: int | None = None) -> str:
    """The source's name of the module that holds a kernel, as in the folders of PEFT.

    Of a kernel that lies in a module of the source beside others it ends with its place, ``c_attn[0/3]``: the first of
    three equal parts of that module's outputs.

    Args:
      path: the kernel's path in the params; a leading ``encoder/`` that the rules lack is passed over.
      rules: the layout table.
      layer: index on the leading axis of a kernel that stacks layers; else None.

    Returns:
      The name without ``.weight``.

    Raises:
      ValueError: no rule names the path, or ``layer`` is missing or superfluous.

    Example:
      >>> rules = (Rule("layer.{layer}.query.weight", "layers/query/kernel", "dense"),)
      >>> module_name("encoder/layers/query/kernel", rules, layer=3)
      'layer.3.query'
    """
    for candidate in (path, path.removeprefix("encoder/")):
        rule = _source_of(candidate, rules)
        if rule is not None:
            break
    else:
        raise ValueError(f"path={path!r}: no rule names it.{near(path, [rule.target or '' for rule in rules])}")
    stacked = _placeholders(rule.source)
    if bool(stacked) != (layer is not None):
        raise ValueError(f"layer={layer}: {path} {'stacks layers, give one' if stacked else 'is no stack, drop it'}.")
    index, count = rule.part
    name = _fill(rule.source, dict.fromkeys(stacked, layer)).removesuffix(".weight")
    return name if count == 1 else f"{name}[{index}/{count}]"


class _Match(NamedTuple):
    """Where a tensor of the file, or a part of it, goes; ``layer`` is the index in a stack."""

    path: str | None
    kind: Kind
    layer: int | None
    part: tuple[int, int] = (0, 1)


def _targets_of(name: str, rules: Sequence[Rule] | None) -> list[_Match]:
    """The leaf that a tensor makes, or the several whose parts it holds; empty where no rule names it."""
    if rules is None:
        return [_Match(name, "none", None)]
    matches: list[_Match] = []
    for rule in rules:
        fields = _fields(rule.source, name)
        if fields is None or (matches and rule.part[1] == 1):
            continue
        if rule.target is None:
            return matches or [_Match(None, rule.kind, None)]
        stacked = [value for field, value in fields.items() if field not in _placeholders(rule.target)]
        layer = int(stacked[0]) if stacked else None
        matches.append(_Match(_fill(rule.target, fields), rule.kind, layer, rule.part))
        if rule.part[1] == 1:
            break
    return matches


def _piece(tensor: np.ndarray, match: _Match) -> np.ndarray:
    """The part of a tensor that is meant, in our layout."""
    whole, (index, count) = _LAYOUTS[match.kind].to_flax(tensor), match.part
    if count == 1:
        return whole
    width = whole.shape[-1] // count
    return whole[..., index * width : (index + 1) * width]


def _source_of(path: str, rules: Sequence[Rule] | None) -> Rule | None:
    """The rule for a leaf of the variables, its placeholders filled in but that of a stack."""
    if rules is None:
        return Rule(path, path)
    for rule in rules:
        fields = None if rule.target is None else _fields(rule.target, path)
        if fields is not None:
            return Rule(_fill(rule.source, fields), path, rule.kind, rule.part)
    return None


_Source = tuple[str, Kind, int | None, tuple[int, int]]


def _sources_of(path: str, leaf: Any, rules: Sequence[Rule] | None) -> list[_Source]:
    """Name, kind, layer and part of every tensor that makes up a leaf; empty where no rule names it."""
    rule = _source_of(path, rules)
    if rule is None:
        return []
    if rules is None or not (stacked := _placeholders(rule.source)):
        return [(rule.source, rule.kind, None, rule.part)]
    return [(_fill(rule.source, dict.fromkeys(stacked, i)), rule.kind, i, rule.part) for i in range(leaf.shape[0])]


def _has_layer(leaf: Any, layer: int | None) -> bool:
    return layer is None or (leaf.ndim > 0 and layer < leaf.shape[0])


def _joined(layers: Mapping[int | None, np.ndarray], dtype: Any) -> jax.Array:
    # NumPy changes the dtype: no program for each shape.
    if None in layers:
        return jax.device_put(layers[None].astype(dtype))
    return jax.device_put(np.stack([layers[index] for index in range(len(layers))]).astype(dtype))


def _placeholders(template: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", template)


def _fill(template: str, fields: Mapping[str, Any]) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: str(fields.get(match[1], match[0])), template)


def _fields(template: str, name: str) -> dict[str, str] | None:
    pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[A-Za-z0-9]+)", re.escape(template))
    match = re.fullmatch(pattern, name)
    return match and match.groupdict()


def _misfit(tensor: np.ndarray, shape: tuple[int, ...], dtype: Any, match: _Match) -> str:
    layout, (_, count) = _LAYOUTS[match.kind], match.part
    if layout.rank not in (None, tensor.ndim):
        return f"shape {tensor.shape} has not the {layout.rank} axes of a {match.kind!r} tensor"
    given = layout.to_flax(tensor).shape
    if count > 1 and (not given or given[-1] % count):
        return f"shape {given} in our layout is not {count} layers side by side"
    given = given if count == 1 else (*given[:-1], given[-1] // count)
    if given != shape:
        return f"shape {given} in our layout, but the model has {shape}"
    if jnp.issubdtype(tensor.dtype, jnp.floating) != jnp.issubdtype(dtype, jnp.floating):
        return f"dtype {tensor.dtype}, but the model has {dtype}"
    return ""
