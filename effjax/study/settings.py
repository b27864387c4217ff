"""Settings into a config's dataclasses: from TOML and JSON tables by msgspec, from the command line's words by tyro."""

import contextlib
import dataclasses
import io
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

Config = TypeVar("Config")


def read_toml(path: Path) -> dict[str, Any]:
    """The table of a TOML file, with a byte order mark or without.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a folder, or no TOML.
    """
    if path.is_dir():
        raise ValueError(f"config file {str(path)!r} is a folder. Name a file in it.")
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))  # editors on Windows begin with a mark
    except FileNotFoundError:
        raise FileNotFoundError(f"config file {str(path)!r} does not exist.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {str(path)!r} is not TOML: {error}.") from None


def from_table(base: Config, table: Mapping[str, Any], where: str) -> Config:
    """The config with the fields of a TOML or JSON table changed.

    Args:
      base: a dataclass, of whose type the result is.
      table: values by field name; those of a nested dataclass are a table again.
      where: what holds the table, for messages.

    Returns:
      A dataclass like ``base``.

    Raises:
      ValueError: a key that is no field (with near names), a value of another type or out of range; the message names
        ``where``, the key, the value and what is legal.

    Example:
      >>> from effjax.train.options import Budget
      >>> from_table(Budget(3.0), {"unit": "epochs"}, "my.toml")
      Budget(amount=3.0, unit='epochs')
    """
    import msgspec

    _check_keys(type(base), table, where)
    whole = _merged(dataclasses.asdict(cast(Any, base)), table)
    try:
        return msgspec.convert(whole, type(base))
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$")
        keys = re.findall(r"\.?([^.\[\]]+)", place.rstrip("`"))
        if not keys:  # a dataclass's own check, which names the field
            raise ValueError(f"{where}: {reason}") from None
        raise ValueError(f"{where}: {_explain(type(base), whole, keys, reason)}") from None


def _check_keys(kind: type, table: Mapping[str, Any], where: str, prefix: str = "") -> None:
    from effjax.core.errors import near  # which imports jax, as `effjax --help` does not

    hints = typing.get_type_hints(kind)
    for name, value in table.items():
        if name not in hints:
            legal = ", ".join(hints)
            raise ValueError(f"{where}: {prefix + name!r} is no field.{near(name, hints)} The fields are {legal}.")
        inner = [part for part in (hints[name], *typing.get_args(hints[name])) if dataclasses.is_dataclass(part)]
        if inner and isinstance(value, Mapping):
            _check_keys(inner[0], value, where, f"{prefix}{name}.")


def _merged(base: dict[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    both = lambda name: isinstance(base.get(name), dict) and isinstance(table[name], Mapping)
    return {**base, **{name: _merged(base[name], table[name]) if both(name) else table[name] for name in table}}


def _explain(kind: Any, value: Any, keys: Sequence[str], reason: str) -> str:
    """The message of msgspec with the field's whole name, its value, and the type that is legal there."""
    from effjax.core.errors import near

    name = ""
    for key in keys:
        inside = isinstance(value, Mapping)
        name += f".{key}" if inside else f"[{key}]"
        value = value[key] if inside else value[int(key)]
        parts = [part for part in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(part)]
        kind = typing.get_type_hints(parts[0])[key] if inside and parts else (*typing.get_args(kind), kind)[0]
    if not reason.startswith(("Expected", "Invalid enum value")):  # of a nested dataclass, or a missing field
        return reason
    hint = near(value, _choices(kind)) if isinstance(value, str) else ""
    return f"{name.removeprefix('.')}={value!r} must be {_named(kind)}.{hint}"


def _choices(kind: Any) -> list[Any]:
    return list(typing.get_args(kind)) if typing.get_origin(kind) is typing.Literal else []


def _named(kind: Any) -> str:
    """A type in words: ``a list of integers``."""
    if choices := _choices(kind):
        return f"one of {', '.join(map(repr, choices))}"
    arguments = typing.get_args(kind)
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return " or ".join(_named(part) for part in arguments if part is not type(None))
    if arguments:
        return f"a list, each {_named(arguments[0])}"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a text"}.get(kind, "a table")


def from_words(kind: Any, words: Sequence[str], program: str, **options: Any) -> Any:
    """An object from the command line's words, by tyro.

    Args:
      kind: a dataclass, or a union of dataclasses that are subcommands.
      words: what the user typed.
      program: how ``--help`` calls the command.
      **options: of ``tyro.cli``.

    Raises:
      ValueError: words that do not fit, in one line, with the options that may have been meant.
      SystemExit: ``--help`` was asked for and printed.
    """
    import tyro

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                kind,
                args=words,
                prog=program,
                config=(tyro.conf.AvoidSubcommands,),
                **options,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_one_line(box.getvalue())) from None


def _one_line(box: str) -> str:
    """What tyro says in a box (of ASCII where the terminal has no other letters), as one line."""
    lines = [line.strip("│|+ ") for line in box.splitlines() if line[:1] not in "╭╰+"]
    parts = (part.strip(" .") for part in re.split(r"[─-]{9,}", " ".join(lines)))
    said = ". ".join(part for part in parts if not part.startswith("For full helptext"))
    said = re.sub(r" in effjax \w+ --help", "", said)
    # What a config says of itself needs no more words.
    return re.sub(r"^Error parsing \w+: (?=[\w.\[\]]+=)", "", said) + "."
