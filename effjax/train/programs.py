"""The folder of compiled programs that the command keeps, so that a program is compiled once and not at every start."""

import os
import platform
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path

__all__ = ["keep_programs"]

VARIABLE = "EFFJAX_COMPILE_CACHE"
_OFF = ("off", "0", "no", "false")


def keep_programs(folder: str | os.PathLike[str] | None = None, *, max_mib: int = 2048) -> Path | None:
    """Keep compiled programs in JAX's persistent cache, and find those of earlier starts there.

    Programs that took a second or longer to compile are written. Beyond ``max_mib`` the ones that were not used for the
    longest time go. A program is found where jax, the device, the compiler's options and the program itself are the
    same. The command ``effjax`` calls it by itself; ``EFFJAX_COMPILE_CACHE`` names another folder, or is ``off``.

    Args:
      folder: where; None for ``EFFJAX_COMPILE_CACHE`` or else ``~/.cache/effjax/programs``, in it a folder for the
        instructions that this processor has. ``XDG_CACHE_HOME`` takes the place of ``~/.cache``.
      max_mib: most MiB of all programs.

    Returns:
      The folder. None where nothing is kept: it is off, JAX has a folder already (``JAX_COMPILATION_CACHE_DIR``, whose
      owner decides), or the folder cannot be made.

    Raises:
      ValueError: ``max_mib`` below 1.

    Example::

        import effjax
        effjax.train.keep_programs()  # at the top of a script, before JAX compiles
    """
    if not isinstance(max_mib, int) or max_mib < 1:
        raise ValueError(
            f"max_mib={max_mib!r} must be an integer of 1 or more. EFFJAX_COMPILE_CACHE=off keeps nothing."
        )
    if _jax_has_one():
        return None
    place = _place(os.environ, folder)
    if place is None:
        return None
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written: compiled anew, as before
        return None
    settings = {"jax_compilation_cache_dir": str(place), "jax_compilation_cache_max_size": max_mib * 2**20}
    if "jax" in sys.modules:
        import jax

        for name, value in settings.items():
            jax.config.update(name, value)
    else:  # read when JAX is imported, which takes seconds that a listing of methods need not wait for
        os.environ.update({name.upper(): str(value) for name, value in settings.items()})
    return place


def _place(variables: Mapping[str, str], folder: str | os.PathLike[str] | None) -> Path | None:
    """The folder for this processor; None where it is off."""
    named = variables.get(VARIABLE, "")
    if folder is None and named.lower() in _OFF:
        return None
    if folder is None and not named:
        home = variables.get("XDG_CACHE_HOME") or "~/.cache"
        folder = Path(home) / "effjax" / "programs"
    return Path(folder or named).expanduser() / _processor()


def _processor() -> str:
    """The processor by what its programs may use: a home may be shared by machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
    return f"{platform.machine()}-{zlib.crc32(features.encode()):08x}"


def _jax_has_one() -> bool:
    if "jax" not in sys.modules:
        return bool(os.environ.get("JAX_COMPILATION_CACHE_DIR"))
    import jax

    return bool(getattr(jax.config, "jax_compilation_cache_dir", None))
