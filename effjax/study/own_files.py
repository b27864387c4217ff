"""The command line's words for a user's own data: ``--data FILE --text NAME --label NAME --model PATH``."""

import argparse
import dataclasses
import inspect
import re
import types
import typing
from pathlib import Path
from typing import Any

from effjax.data.files import READERS
from effjax.recipes.spec import OwnData, StudyConfig

_WITH_MODEL = ("text", "image")


def keywords() -> dict[str, inspect.Parameter]:
    """The keywords of all readers, by name."""
    found: dict[str, inspect.Parameter] = {}
    for read in READERS.values():
        for name, item in inspect.signature(read).parameters.items():
            if item.kind is item.KEYWORD_ONLY:
                found.setdefault(name, item)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--data``, ``--model`` and one option per keyword of ``effjax.data.files``."""
    own = parser.add_argument_group("your own data, in place of the study's")
    own.add_argument("--data", metavar="PATH", help="file, folder, or hf:owner/name")
    own.add_argument("--model", metavar="PATH", help="a model by name, or a folder with a checkpoint")
    for name, item in keywords().items():
        takes = [modality for modality, read in READERS.items() if name in inspect.signature(read).parameters]
        flag = f"--{name.replace('_', '-')}"
        options: dict[str, Any] = {"dest": f"own_{name}", "help": f"for {', '.join(takes)} data"}
        kind, many = _type(item.annotation)
        if kind is bool:
            action = argparse.BooleanOptionalAction
            own.add_argument(flag, action=action, default=None, **options)
        else:
            own.add_argument(flag, type=kind, nargs="+" if many else None, metavar=kind.__name__.upper(), **options)


def _type(annotation: Any) -> tuple[type, bool]:
    """The type of one word of an option, and whether it takes several."""
    inner = [part for part in typing.get_args(annotation) if part is not type(None)]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        kinds = [_type(part) for part in inner]
        many = any(several for _, several in kinds)
        return next((kind for kind, _ in kinds if kind is not str), str), many
    if typing.get_origin(annotation) is typing.Literal:
        return type(inner[0]), False
    if typing.get_origin(annotation) is not None:  # a tuple or sequence
        return (inner[0] if inner and inner[0] in (int, float) else str), True
    return (annotation if annotation in (int, float, bool) else str), False


def from_arguments(options: argparse.Namespace) -> OwnData | None:
    """What ``add_arguments`` read; None without ``--data``.

    Raises:
      ValueError: a column without ``--data``.
    """
    given = {
        name.removeprefix("own_"): tuple(value) if isinstance(value, list) else value
        for name, value in vars(options).items()
        if name.startswith("own_") and value is not None
    }
    if options.data is None:
        if given or options.model is not None:
            named = "--model" if options.model is not None else f"--{next(iter(given)).replace('_', '-')}"
            raise ValueError(f"{named} is about data of your own. Give them with --data FILE_OR_FOLDER.")
        return None
    path = options.data if options.data.startswith("hf:") else str(Path(options.data).absolute())
    return OwnData(path=path, model=options.model, columns=tuple(sorted(given.items())))


def with_own(config: StudyConfig, recipe: Any, own: OwnData) -> StudyConfig:
    """The config of a study on a user's own data.

    Raises:
      ValueError: a study that takes none.
    """
    modality = getattr(recipe, "MODALITY", None)
    if modality is None:
        raise ValueError(f"--data {own.path}: this study takes no data of your own.")
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", Path(own.path.removeprefix("hf:")).stem) or "data"
    if modality in _WITH_MODEL:
        default = getattr(recipe, "OWN_MODEL", config.tasks[0].rpartition("/")[2])
        name += f"/{Path(own.model).name if own.model else default}"
    elif own.model is not None:
        raise ValueError(f"--model {own.model}: the arms of a study on {modality} data bring their own networks.")
    return dataclasses.replace(config, own=own, tasks=(name,), **getattr(recipe, "OWN", {}))
