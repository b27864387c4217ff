"""Files of weights: which one is meant, and its tensors, whole or mapped."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from effjax.core.errors import near
from effjax.core.files import read_json, read_safetensors
from effjax.core.folders import PACKAGED, held
from effjax.models.mapped import MappedTensors, map_safetensors

__all__: list[str] = []

_LISTED = 8
_LONGEST_NAME = 255  # bytes, of the usual file systems
_INDEX = "model.safetensors.index.json"


def read_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, or of all the files that an index names.

    Args:
      path: ``*.safetensors``, or ``*.safetensors.index.json`` with its files beside it.

    Returns:
      Name -> array.

    Raises:
      FileNotFoundError: a file that the index names is not there.
      ValueError: a damaged or foreign file, by its name.

    Example:
      >>> read_tensors(find_weights("stories260k"))["norm.weight"].shape
      (64,)
    """
    path = Path(path)
    return _read_shards(path) if path.name.endswith(".index.json") else read_safetensors(path)


def map_tensors(path: Path) -> MappedTensors:
    """As ``read_tensors``, with the names of ``without_wrappers``; tensors are mapped and read where they are used."""
    if not path.name.endswith(".index.json"):
        found = map_safetensors(path)
        tensors, maps = found, found.maps
    else:
        parts: list[MappedTensors] = []

        def mapped(part: Path) -> MappedTensors:
            parts.append(map_safetensors(part))
            return parts[-1]

        tensors = _read_shards(path, mapped)
        maps = tuple(whole for part in parts for whole in part.maps)
    names = without_wrappers(tensors, str(path))
    return MappedTensors({names[name]: tensor for name, tensor in tensors.items()}, maps)


def _read_shards(
    index: Path, read: Callable[[Path], Mapping[str, np.ndarray]] = read_safetensors
) -> dict[str, np.ndarray]:
    """Every tensor from the file that the index places it in; a copy in another file is not read."""
    places = _shards(index)
    tensors: dict[str, np.ndarray] = {}
    for part in sorted(set(places.values())):
        held = read(index.parent / part)
        if absent := [name for name, place in places.items() if place == part and name not in held]:
            raise ValueError(
                f"{index} places {listed(absent)} in {part}, which does not hold them. Fetch all the files again."
            )
        for name, tensor in held.items():
            if name not in places and name in tensors:
                raise ValueError(
                    f"{index.parent} holds the tensor {name!r} in two files, and {index.name} does not say which "
                    "counts. Add it to the weight_map."
                )
            if places.get(name, part) == part:
                tensors[name] = tensor
    return tensors


def _shards(index: Path) -> dict[str, str]:
    """Tensor -> name of the file that holds it."""
    found = read_json(index)
    places = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()) or not places:
        raise ValueError(
            f"{index} is damaged or no safetensors index: weight_map must name a file for every tensor. Fetch it again."
        )
    names = sorted(set(places.values()))
    # Names are plain: an index must not reach outside its folder.
    foreign = [name for name in names if Path(name).name != name or "\0" in name or len(name.encode()) > _LONGEST_NAME]
    absent = [name for name in names if name not in foreign and not (index.parent / name).is_file()]
    if foreign:
        raise ValueError(f"{index} names files outside its folder: {listed([f'{name!r:.60}' for name in foreign])}.")
    if absent:
        raise FileNotFoundError(f"{index} names {listed(absent)}, which is not beside it. Fetch all the files.")
    return places


_WRAPPERS = ("module", "language_model")


def without_wrappers(names: Collection[str], origin: str = "tensors") -> dict[str, str]:
    """Names as they are in a file -> names without what a compiled or wrapped model adds to them.

    ``_orig_mod`` goes wherever it stands; ``module`` and ``language_model`` where every name begins with it.

    Args:
      names: of tensors.
      origin: the file, for the message.

    Raises:
      ValueError: two names become one.

    Example:
      >>> without_wrappers(["module._orig_mod.norm.weight", "module.norm.bias"])
      {'module._orig_mod.norm.weight': 'norm.weight', 'module.norm.bias': 'norm.bias'}
    """
    plain = {name: ".".join(part for part in name.split(".") if part != "_orig_mod") for name in names}
    for _ in range(2 * len(_WRAPPERS)):
        for wrapper in _WRAPPERS:
            if plain and all(name.startswith(f"{wrapper}.") for name in plain.values()):
                plain = {name: short.removeprefix(f"{wrapper}.") for name, short in plain.items()}
    if len(set(plain.values())) < len(plain):
        twice = [name for name, short in plain.items() if list(plain.values()).count(short) > 1]
        raise ValueError(f"{origin} holds one tensor under several names, {listed(twice)}. Keep one of each.")
    return plain


def read_unwrapped(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """``read_tensors`` with the names of ``without_wrappers``."""
    tensors = read_tensors(path)
    names = without_wrappers(tensors, str(path))
    return {names[name]: tensor for name, tensor in tensors.items()}


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file, whole or not at all.

    Args:
      path: the file, in a folder that exists.
      tensors: name -> contiguous array.
    """
    from safetensors.numpy import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        # Hugging Face's loaders refuse a file without this entry.
        save_file(dict(tensors), temporary, metadata={"format": "pt"})
        temporary.chmod(mode)  # the library leaves a file that only its owner can read
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
    places = [Path(source), *(root / source for root in (*roots, PACKAGED))]
    for place in places:
        files = (place, place.with_name(f"{place.name}.safetensors"), place / "model.safetensors", place / _INDEX)
        for path in files:
            if path.is_file():
                return path
        if place.is_dir():
            return _only_file(place)
    known = [
        str(path.relative_to(root).with_suffix(""))
        for root in (*roots, PACKAGED)
        for path in root.glob("**/*.safetensors")
    ]
    raise FileNotFoundError(
        f"source={str(source)!r}: no weights at {', '.join(map(str, places))} (.safetensors)."
        f"{near(str(source), known)} Give a path, or set EFFJAX_MODELS to the folder that holds them."
    )


def _only_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"source={str(folder)!r} holds no safetensors file. {held(folder)}")
    if len(files) > 1:
        names = ", ".join(file.stem for file in files)
        raise FileNotFoundError(f"source={str(folder)!r} must hold one safetensors file; it holds {names}. Name one.")
    return files[0]


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
