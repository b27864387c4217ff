"""Reading files of others: whatever is wrong with one is said in one line that names it."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from effjax.core.storage import Folder

__all__: list[str] = []

# What safetensors calls the types that NumPy lacks.
_NARROW = {
    "BF16": jnp.dtype(jnp.bfloat16),
    "F8_E4M3": jnp.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": jnp.dtype(jnp.float8_e5m2),
}
_PLAIN = {
    **{f"F{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    "BOOL": np.dtype(bool),
}
NUMBERS = {**_PLAIN, **_NARROW}
"""What safetensors calls a type of number -> that type."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error) or type(error).__name__).splitlines()[0]


def read_text(path: Folder, way_out: str = "Fetch it again.") -> str:
    """The text of a UTF-8 file.

    Args:
      path: of the file.
      way_out: ends the message about a bad file.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is no UTF-8 text, or the system cannot read it.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist. {way_out}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason}). {way_out}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}). {way_out}") from None


def read_json(path: Folder, way_out: str = "Fetch it again.") -> Any:
    """What a JSON file holds; see ``read_text``.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is no JSON.
    """
    text = read_text(path, way_out)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        state = f"is not JSON ({first_line(error)})" if text.strip() else "is empty"
        raise ValueError(f"{path} {state}. {way_out}") from None


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of one safetensors file, also those of 8 bits.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: a damaged or foreign file, or a type of number that arrays do not have.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except AttributeError:  # a type that NumPy lacks
        return _read_narrow(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist. Fetch it again.") from None
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({first_line(error)}). Fetch it again; "
            "PyTorch files must first be converted with safetensors.torch.save_file."
        ) from None


def _read_narrow(path: Path) -> dict[str, np.ndarray]:
    from safetensors import deserialize

    found = {}
    for name, tensor in deserialize(path.read_bytes()):
        dtype = _NARROW.get(tensor["dtype"], _PLAIN.get(tensor["dtype"]))
        if dtype is None:
            raise ValueError(
                f"{path}: tensor {name!r} is of type {tensor['dtype']}, which arrays do not have. Convert it to "
                "float32, float16 or bfloat16."
            )
        found[name] = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
    return found


def not_finite(tensor: np.ndarray) -> bool:
    """Whether an array of floats holds NaN or infinity."""
    floating = tensor.dtype.kind == "f" or tensor.dtype in _NARROW.values()
    return floating and not bool(np.isfinite(tensor).all())
