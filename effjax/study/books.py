"""Reading a study's working files: a damaged one is named, with the way out, before anything is mixed."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from effjax.core.storage import Folder, storage

NUMBER = (int, float, type(None))
"""A number as it is written: NaN and infinities are null."""


class BooksError(ValueError):
    """A working file is missing, cut short, or not what this version writes."""


def read_json_checked(
    path: str | Folder, required_keys: Collection[str] | Mapping[str, Any] | type, way_out: str
) -> Any:
    """Read a JSON file and check what it holds.

    Args:
      path: of the file.
      required_keys: the names it must hold; or a mapping from them to a type, to a tuple of types, or to such a
        mapping in turn; or ``list`` where the whole file is a list. Other names may be there too.
      way_out: what to do about a bad file, such as "Delete it to measure again."; ends the message.

    Returns:
      What the file holds.

    Raises:
      BooksError: with the file's name and ``way_out``.

    Example:
      ``read_json_checked(path, {arm: {"step_ms": NUMBER} for arm in arms}, "Delete it to measure again.")``
    """
    path = storage(path)
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise BooksError(f"{path} is missing. {way_out}") from None
    except UnicodeDecodeError:
        raise BooksError(f"{path} is damaged: it is not text. {way_out}") from None
    except RecursionError:
        raise BooksError(f"{path} is damaged: its lists are nested too deep. {way_out}") from None
    except OSError as error:
        raise BooksError(f"{path} cannot be read ({error.strerror or error}). {way_out}") from None
    except json.JSONDecodeError as error:
        state = f"is cut short or damaged at line {error.lineno}" if error.doc else "is empty"
        raise BooksError(f"{path} {state}. {way_out}") from None
    problem = _problem(found, required_keys, "")
    if problem:
        raise BooksError(f"{path} is not what this version of effjax writes: {problem}. {way_out}")
    return found


def _problem(found: Any, shape: Any, where: str) -> str:
    """What is wrong with ``found``, or an empty string."""
    at = where or "the file"
    if isinstance(shape, type) or (isinstance(shape, tuple) and all(isinstance(kind, type) for kind in shape)):
        kinds = (shape,) if isinstance(shape, type) else shape
        fits = isinstance(found, kinds) and (not isinstance(found, bool) or bool in kinds)
        return "" if fits else f"{at} is {_name(type(found))}, not {' or '.join(map(_name, kinds))}"
    if not isinstance(found, dict):
        return f"{at} is {_name(type(found))}, not {_name(dict)}"
    missing = [name for name in shape if name not in found]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        return f"{at} lacks {', '.join(map(repr, missing[:5]))}{more}"
    inner = shape.items() if isinstance(shape, Mapping) else ()
    problems = (_problem(found[name], kind, f"{where}[{name!r}]") for name, kind in inner)
    return next(filter(None, problems), "")


def _name(kind: type) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(kind, "a number" if kind in (int, float) else kind.__name__)
