"""Pretrained weights: safetensors in PyTorch's naming to Flax variables and back.

A model's layout is a table of ``Rule``s; nothing here knows a particular architecture.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.errors import near
from effjax.core.tree import path_name

PyTree = Any
Kind = Literal["none", "dense", "conv"]

_PACKAGED = Path(__file__).parent / "weights"
_LISTED = 8


class _Layout(NamedTuple):
    rank: int | None
    to_flax: tuple[int, ...] | None
    to_source: tuple[int, ...] | None


_LAYOUTS: dict[str, _Layout] = {
    "none": _Layout(None, None, None),
    "dense": _Layout(2, (1, 0), (1, 0)),  # (out, in) <-> (in, out)
    "conv": _Layout(4, (2, 3, 1, 0), (3, 2, 0, 1)),  # OIHW <-> HWIO
}


class Rule(NamedTuple):
    """Where one family of tensors goes.

    Both sides are names with ``{field}`` placeholders, which stand for a run of letters and digits
    and appear on both sides, so that the rule reads in either direction.

    Attributes:
      source: name in the file, ``layer{stage}.{block}.conv{i}.weight``.
      target: slash-joined path in the variables, ``params/stage{stage}_block{block}/conv{i}/kernel``,
        or None for a tensor that is ignored.
      kind: layout change: ``"none"``, ``"dense"`` ((out, in) to (in, out)) or ``"conv"`` (OIHW to HWIO).
    """

    source: str
    target: str | None
    kind: Kind = "none"


def import_weights(
    tensors: Mapping[str, np.ndarray], target: PyTree, rules: Sequence[Rule] | None = None, *, origin: str = "tensors"
) -> PyTree:
    """Arrange named tensors as the variables of a model.

    Args:
      tensors: name -> array in the source's layout; any floating dtype.
      target: variables of the model: arrays, or the shapes of ``jax.eval_shape(model.init, ...)``.
      rules: the layout table, first match wins; None for files that hold our own paths and layouts.
      origin: where the tensors came from, for the message.

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
    found, unexpected, misfits = {}, [], []
    for name, tensor in tensors.items():
        rule = _target_of(name, rules)
        if rule is None or rule.target not in (None, *wanted):
            unexpected.append(name)
        elif rule.target in found:
            misfits.append(f"{name} -> {rule.target}: filled by another tensor before")
        elif rule.target is not None:
            problem = _misfit(tensor, wanted[rule.target], rule.kind)
            misfits += [f"{name} -> {rule.target}: {problem}"] if problem else []
            found[rule.target] = tensor if problem else _turn(tensor, _LAYOUTS[rule.kind].to_flax)
    missing = [f"{_source_name(path, rules)} -> {path}" for path in wanted if path not in found]
    problems = {"missing": missing, "unexpected": unexpected, "misfitting": misfits}
    if any(problems.values()):
        listed = "".join(f"\n  {what}: {_listed(names)}" for what, names in problems.items() if names)
        raise ValueError(
            f"{origin} does not hold the weights of this model.{listed}\nBuild the model with the sizes of the file."
        )
    arrays = [jnp.asarray(found[path], leaf.dtype) for path, leaf in wanted.items()]
    return jax.tree.unflatten(structure, arrays)


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
    tensors, unnamed = {}, []
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        rule = _source_of(path_name(path), rules)
        if rule is None:
            unnamed.append(path_name(path))
        elif rule.source in tensors:
            raise ValueError(f"rules: {path_name(path)} and another leaf are both named {rule.source!r}.")
        else:
            # safetensors writes the buffer as it lies in memory, whatever the strides say.
            tensors[rule.source] = np.ascontiguousarray(_turn(np.asarray(leaf), _LAYOUTS[rule.kind].to_source))
    if unnamed:
        raise ValueError(f"rules: no rule names {_listed(unnamed)}. Add one for each, or save with rules=None.")
    return tensors


def load_weights(source: str | os.PathLike[str], target: PyTree, rules: Sequence[Rule] | None = None) -> PyTree:
    """Read a safetensors file into the variables of a model.

    Args:
      source: a file, a folder that holds one safetensors file (or ``model.safetensors``), or a name
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
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = find_weights(source)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({error}). Fetch it again; "
            "PyTorch files must first be converted with safetensors.torch.save_file."
        ) from None
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
    from safetensors.numpy import save_file

    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path={str(path)!r}: the folder {path.parent} does not exist. Create it first.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # Hugging Face's loaders refuse a file without this entry.
        save_file(export_weights(variables, rules), temporary, metadata={"format": "pt"})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def find_weights(source: str | os.PathLike[str]) -> Path:
    """The safetensors file meant by ``source``; see ``load_weights``.

    Args:
      source: a file, a folder, or a name inside ``EFFJAX_MODELS`` or the package.

    Returns:
      The path of an existing file.

    Raises:
      FileNotFoundError: nothing there, or a folder of several files.

    Example:
      >>> find_weights("resnet_cifar10/resnet20").name
      'resnet20.safetensors'
    """
    roots = [Path(os.environ["EFFJAX_MODELS"])] if os.environ.get("EFFJAX_MODELS") else []
    places = [Path(source), *(root / source for root in (*roots, _PACKAGED))]
    for place in places:
        for path in (place, place.with_name(f"{place.name}.safetensors"), place / "model.safetensors"):
            if path.is_file():
                return path
        if place.is_dir():
            return _only_file(place)
    known = [
        str(path.relative_to(root).with_suffix(""))
        for root in (*roots, _PACKAGED)
        for path in root.glob("**/*.safetensors")
    ]
    raise FileNotFoundError(
        f"source={str(source)!r}: no weights at {', '.join(map(str, places))} (.safetensors)."
        f"{near(str(source), known)} Give a path, or set EFFJAX_MODELS to the folder that holds them."
    )


def _only_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        names = ", ".join(file.stem for file in files) or "none"
        raise FileNotFoundError(f"source={str(folder)!r} must hold one safetensors file; it holds {names}. Name one.")
    return files[0]


def _target_of(name: str, rules: Sequence[Rule] | None) -> Rule | None:
    """The rule for a tensor of the file with its placeholders filled in."""
    if rules is None:
        return Rule(name, name)
    for rule in rules:
        fields = _fields(rule.source, name)
        if fields is not None:
            return Rule(name, rule.target and rule.target.format(**fields), rule.kind)
    return None


def _source_of(path: str, rules: Sequence[Rule] | None) -> Rule | None:
    """The rule for a leaf of the variables with its placeholders filled in."""
    if rules is None:
        return Rule(path, path)
    for rule in rules:
        fields = None if rule.target is None else _fields(rule.target, path)
        if fields is not None:
            return Rule(rule.source.format(**fields), path, rule.kind)
    return None


def _source_name(path: str, rules: Sequence[Rule] | None) -> str:
    rule = _source_of(path, rules)
    return "no rule" if rule is None else rule.source


def _fields(template: str, name: str) -> dict[str, str] | None:
    pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[A-Za-z0-9]+)", re.escape(template))
    match = re.fullmatch(pattern, name)
    return match and match.groupdict()


def _turn(tensor: np.ndarray, axes: tuple[int, ...] | None) -> np.ndarray:
    return tensor if axes is None else tensor.transpose(axes)


def _misfit(tensor: np.ndarray, leaf: Any, kind: str) -> str:
    layout = _LAYOUTS[kind]
    if layout.rank not in (None, tensor.ndim):
        return f"shape {tensor.shape} has not the {layout.rank} axes of a {kind!r} tensor"
    shape = _turn(tensor, layout.to_flax).shape
    if shape != leaf.shape:
        return f"shape {shape} in our layout, but the model has {leaf.shape}"
    if jnp.issubdtype(tensor.dtype, jnp.floating) != jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"dtype {tensor.dtype}, but the model has {leaf.dtype}"
    return ""


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
