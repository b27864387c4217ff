"""Weights larger than one host: tensors mapped from safetensors files, read and written a part at a time.

A safetensors file is eight bytes with the length of its header, the header (JSON: name, type, shape, and the first and
last byte of every tensor), and the tensors one after another. So a part of a tensor is at a known place, and a process
reads the parts that its devices hold, and no others.
"""

import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from effjax.core.files import NUMBERS, first_line, not_finite

__all__: list[str] = []

_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


class MappedTensors(dict[str, np.ndarray]):
    """Name -> a tensor as it lies in a file, read where and when it is looked at.

    Attributes:
      maps: of the files.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], maps: tuple[np.memmap, ...]):
        super().__init__(tensors)
        self.maps = maps

    def release(self) -> None:
        """Give back the memory of what has been read; it is read again where it is needed again."""
        for mapped in self.maps:
            base = mapped.base
            assert isinstance(base, mmap.mmap)
            base.madvise(mmap.MADV_DONTNEED)


def map_safetensors(path: Path) -> MappedTensors:
    """The tensors of one safetensors file, mapped.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: a damaged or foreign file, or a type of number that arrays do not have.

    Example:
      >>> from effjax.models.weight_files import find_weights
      >>> map_safetensors(find_weights("stories260k"))["norm.weight"].shape
      (64,)
    """
    try:
        header, start = _header(path)
        whole = np.memmap(path, np.uint8, "r")
        tensors = {name: _view(whole[start:], name, entry) for name, entry in header.items() if name != "__metadata__"}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist. Fetch it again.") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({first_line(error)}). Fetch it again; PyTorch files must first "
            "be converted with safetensors.torch.save_file."
        ) from None
    return MappedTensors(tensors, (whole,))


def _header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= _LONGEST_HEADER:
            raise ValueError(f"a header of {length} bytes")
        text = file.read(length)
    if len(text) < length:
        raise ValueError("the header is cut short")
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("the header is no table")
    return found, 8 + length


def _view(data: np.ndarray, name: str, entry: Mapping[str, Any]) -> np.ndarray:
    first, last = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] not in NUMBERS:
        raise ValueError(f"tensor {name!r} is of type {entry['dtype']}, which arrays do not have")
    dtype = NUMBERS[entry["dtype"]]
    size = math.prod(shape) * dtype.itemsize
    if not 0 <= first <= last <= len(data) or last - first != size or min(shape, default=0) < 0:
        raise ValueError(f"tensor {name!r} does not lie in the file")
    return data[first:last].view(dtype).reshape(shape)


class Source(NamedTuple):
    """What a leaf is made of.

    Attributes:
      layers: tensors in our layout by their index on the leading axis; one of index None for a leaf that is no stack.
      where: for messages.
      release: called after each read, to give back the memory of what has been read.
    """

    layers: Mapping[int | None, np.ndarray]
    where: str
    release: Callable[[], None] = lambda: None


def placed(source: Source, leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
    """A global array of which this process reads what its devices hold, once.

    At any time there is one part in host memory, apart from those that devices hold.

    Raises:
      ValueError: a part that holds NaN or infinity.
    """
    holders: dict[Any, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        holders.setdefault(tuple((one.start, one.stop) for one in index or ()), []).append(device)
    arrays = []
    for bounds, devices in holders.items():
        part = _part(source, tuple(slice(*bound) for bound in bounds), leaf)
        arrays += jax.block_until_ready([jax.device_put(part, device) for device in devices])
        del part
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def _part(source: Source, index: tuple[slice, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    def read(tensor: np.ndarray, inner: tuple[slice, ...]) -> np.ndarray:
        found = np.array(tensor[inner], order="C")  # a copy: JAX may keep what it is given, and files change
        source.release()
        if not_finite(found):
            raise ValueError(f"{source.where} holds NaN or infinity. Fetch the file again.")
        return found

    if None in source.layers:
        return read(source.layers[None], index).astype(leaf.dtype, copy=False)
    rows = range(leaf.shape[0])[index[0]]
    shape = (len(rows), *(len(range(size)[one]) for size, one in zip(leaf.shape[1:], index[1:], strict=True)))
    stack = np.empty(shape, leaf.dtype)
    for place, layer in enumerate(rows):
        stack[place] = read(source.layers[layer], index[1:])
    return stack


class Entry(NamedTuple):
    """A tensor to write: its name, its form in the file, and how it is got when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    get: Callable[[], np.ndarray]


def write_in_turn(path: Path, entries: Iterable[Entry], dtype: DTypeLike | None = None) -> None:
    """Write a safetensors file, whole or not at all, with one tensor at a time in host memory.

    In several processes all of them must call this, as a tensor that is spread over them is gathered by all; process 0
    writes.

    Args:
      path: the file, in a folder that exists.
      entries: in the order of the file.
      dtype: of floating tensors; None keeps theirs.
    """
    entries = list(entries)
    names = {number: name for name, number in NUMBERS.items()}
    stored = lambda entry: (
        entry.dtype if dtype is None or not jnp.issubdtype(entry.dtype, jnp.floating) else jnp.dtype(dtype)
    )
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # Hugging Face's loaders refuse a file without it
    end = 0
    for entry in entries:
        first, end = end, end + math.prod(entry.shape) * stored(entry).itemsize
        header[entry.name] = {
            "dtype": names[stored(entry)],
            "shape": list(entry.shape),
            "data_offsets": [first, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    parts = (np.ascontiguousarray(np.asarray(entry.get(), stored(entry))) for entry in entries)
    if jax.process_index() != 0:
        for _ in parts:  # their share of gathering
            pass
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for part in parts:
                file.write(part.reshape(-1).view(np.uint8).data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def gathered(leaf: Any, layer: int | None = None) -> np.ndarray:
    """A leaf, or one layer of a stack, whole on the host of every process."""
    if layer is not None:
        leaf = leaf[layer]
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)
