"""The command line's words for a user's own data: ``--data FILE --text NAME --label NAME --model PATH``."""

import ast
import dataclasses
import difflib
import inspect
import re
import shlex
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from effjax.core.errors import near
from effjax.core.storage import Folder
from effjax.data.files import READERS, fitting_modality
from effjax.recipes.spec import OwnData, StudyConfig

_WITH_MODEL = ("text", "image")
_PATHS = ("test", "nodes", "labels", "features")
_OTHERS = {"path": "--data", "model": "--model", "seed": "--split-seed"}
# A keyword and its value in a message: a quoted text, a list or tuple, or one word.
_VALUE = r"""'[^']*'|"[^"]*"|\[[^\[\]]*\]|\((?:[^()]*)\)|[\w/-]+(?:\.\w+)*"""


def keywords() -> dict[str, inspect.Parameter]:
    """The keywords of all readers, by name."""
    found: dict[str, inspect.Parameter] = {}
    for modality in READERS:
        found |= {name: item for name, item in _keywords(modality).items() if name not in found}
    return found


def _keywords(modality: str) -> dict[str, inspect.Parameter]:
    items = inspect.signature(READERS[modality]).parameters.items()
    return {name: item for name, item in items if item.kind is item.KEYWORD_ONLY}


def flag(name: str) -> str:
    """The option of a reader's keyword.

    Example:
      >>> flag("text_b"), flag("seed")
      ('--text-b', '--split-seed')
    """
    return _OTHERS.get(name, f"--{name.replace('_', '-')}")


def own_options() -> type:
    """A dataclass of ``--data``, ``--model`` and one option per keyword of ``effjax.data.files``, for tyro."""
    import tyro

    def option(kind: Any, default: Any, **shown: str) -> tuple[Any, Any]:
        return Annotated[kind, tyro.conf.DisallowNone, tyro.conf.arg(**shown)], dataclasses.field(default=default)

    about = "text, image: a model by name; text: also the folder of a checkpoint; hybrid: weights of images too"
    found = {
        "data": option(str | None, None, metavar="PATH", help="your own: a file, a folder, or hf:owner/name"),
        "model": option(str | None, None, metavar="NAME", help=about),
    }
    for name, item in keywords().items():
        takes = [modality for modality in READERS if name in _keywords(modality)]
        kind, metavar = _type(name, item.annotation)
        shown = {"name": flag(name).removeprefix("--"), "help": f"{', '.join(takes)}: {_about(takes[0], name)}"}
        if kind is not bool:
            shown["metavar"] = metavar
        default = item.default if kind is bool else None
        found[name] = option(kind if kind is bool else kind | None, default, **shown)
    return dataclasses.make_dataclass("OwnOptions", [(name, *entry) for name, entry in found.items()], frozen=True)


def _about(modality: str, name: str) -> str:
    """What the docstring says of a keyword, for ``--help``."""
    doc = inspect.getdoc(READERS[modality])
    found = re.search(rf"^  {name}: (.+?)(?=^  \w+: |^$)", doc or "", re.MULTILINE | re.DOTALL)
    text = re.sub(r"[;.] ``[^`]*``( and the like)? when None|``", "", " ".join(found[1].split() if found else ()))
    text = f"{name} {text}" if text.startswith("of ") else text
    return text.rstrip(".").replace("None", "left out")


def _type(name: str, annotation: Any) -> tuple[Any, str]:
    """The type of an option, and how its value is called in ``--help``."""
    if name == "size":
        return tuple[int, int], "HEIGHT WIDTH"
    parts = [part for part in typing.get_args(annotation) or (annotation,) if part is not type(None)]
    if isinstance(parts[0], str | int) or typing.get_origin(parts[0]) is typing.Literal:
        choices = parts if isinstance(parts[0], str | int) else typing.get_args(parts[0])
        return typing.cast(Any, Literal).__getitem__(tuple(choices)), "|".join(map(str, choices))
    if any(typing.get_origin(part) is Sequence for part in parts):
        return tuple[str, ...], "NAME [NAME ...]"
    kind = next((part for part in parts if part in (int, float, bool)), str)
    words: dict[Any, str] = {int: "N", float: "SHARE"}
    return kind, words.get(kind, "FILE" if name in _PATHS else "NAME")


def own_data(options: Any) -> OwnData | None:
    """What a user said of data of one's own, in ``own_options``; None without ``--data``.

    Paths become absolute, for a run may go on elsewhere.

    Raises:
      ValueError: another option without ``--data``.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    given = {name: value for name, value in vars(options).items() if value != defaults[name]}
    path, model = given.pop("data", None), given.pop("model", None)
    if path is None:
        if given or model is not None:
            named = "--model" if model is not None else flag(next(iter(given)))
            raise ValueError(f"{named} is about data of your own. Give them with --data FILE_OR_FOLDER.")
        return None
    given |= {name: _absolute(given[name]) for name in _PATHS if name in given}
    if model is not None and Path(model).expanduser().exists():
        model = _absolute(model)
    return OwnData(path=_absolute(path), model=model, columns=tuple(sorted(given.items())))


def _absolute(path: str) -> str:
    return path if path.startswith("hf:") else str(Path(path).expanduser().absolute())


def _near(name: str, options: Sequence[str]) -> str:
    return near(name, difflib.get_close_matches(name, options, n=2, cutoff=0.8))


def with_own(config: Any, recipe: Any, own: OwnData, stem: str = "this study") -> StudyConfig:
    """The config of a study on a user's own data.

    Raises:
      ValueError: a study that takes none, an option for data of another kind, or a model where none is taken.
    """
    modality = getattr(recipe, "MODALITY", None)
    if modality is None:
        raise ValueError(f"--data {own.path}: {stem} takes no data of your own.")
    modality = fitting_modality(modality, dict(own.columns))
    legal = [flag(name) for name in _keywords(modality)]
    for name, _ in own.columns:
        if flag(name) not in legal:
            takes = " and ".join(other for other in READERS if name in _keywords(other))
            raise ValueError(
                f"{flag(name)} is for {takes} data, and {stem} takes {modality} data.{_near(flag(name), legal)} "
                f"Its options: {', '.join(legal)}."
            )
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", Path(own.path.removeprefix("hf:")).stem).strip("-.") or "data"
    if modality in _WITH_MODEL:
        default = getattr(recipe, "OWN_MODEL", config.tasks[0].rpartition("/")[2])
        default = default if isinstance(default, str) else default[modality]
        name += f"/{Path(own.model).name if own.model else default}"
    elif own.model is not None:
        raise ValueError(f"--model {own.model}: the arms of {stem}, on {modality} data, bring their own networks.")
    return dataclasses.replace(config, own=own, tasks=(name,), **getattr(recipe, "OWN", {}))


def with_all_rows(config: Any) -> StudyConfig:
    """A preset without its numbers of rows, which were chosen for its own data."""
    names = [name for name in ("train_rows", "test_rows", "calibration_rows") if hasattr(config, name)]
    return dataclasses.replace(config, **dict.fromkeys(names))


def check_unchanged(config: StudyConfig, recipe: Any, sources: Sequence[str], out: Folder) -> None:
    """Refuse to take finished results for those of the user's data if these have changed since.

    Raises:
      ValueError: the files hold something else than when the results were written.
    """
    if config.own is None:
        return
    facts = config.data("", recipe.MODALITY).facts
    if not any(f"SHA-256 {facts.fingerprint[:12]}" in source for source in sources):
        raise ValueError(
            f"out={str(out)!r} holds results on other data:\n  there {sources}\n  here  "
            f"{facts.source(config.own.path)}\n{config.own.path} has changed. Choose another --out, or delete it."
        )


def as_flags(message: str, modality: str | Sequence[str] | None = None, fields: Sequence[str] = ()) -> str:
    """An error's text with the options as they are typed in place of keywords.

    Args:
      message: the text.
      modality: of the data, whose reader has the keywords, or several; None for those of all readers.
      fields: of the study's config.

    Example:
      >>> as_flags("label='kid' is not a column of a.csv. Name it: label=COLUMN.")
      '--label kid is not a column of a.csv. Name it: --label COLUMN.'
      >>> as_flags("Give size=(8, 9), scale16=True or quotes=False; leave_out=['a', 'b c'].")
      "Give --size 8 9, --scale16 or --no-quotes; --leave-out a 'b c'."
    """
    kinds = (modality,) if isinstance(modality, str) else tuple(modality or READERS)
    flags = {name: flag(name) for kind in kinds for name in _keywords(kind)} | _OTHERS
    flags |= {field: f"--{field.replace('_', '-')}" for field in fields}
    if modality and set(kinds) & set(_WITH_MODEL):
        flags["source"] = "--model"  # how loaders of models call it
    pattern = rf"(?<![\w.-])({'|'.join(flags)})=({_VALUE})?"
    return re.sub(pattern, lambda match: _typed(flags[match[1]], match[2]), message)


def _typed(name: str, given: str | None) -> str:
    if given in (None, "True"):
        return name
    if given == "False":
        return f"--no-{name.removeprefix('--')}"
    if given == "None":
        return f"{name} (not given)"
    if given[0] in "'\"[(":
        try:
            value = ast.literal_eval(given)
        except (ValueError, SyntaxError):
            return f"{name} {given.strip('()[]').replace(',', '')}"
        values = value if isinstance(value, list | tuple) else [value]
        return " ".join([name, *(shlex.quote(str(item)) for item in values)])
    return f"{name} {given}"
