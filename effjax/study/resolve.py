"""From what a user types (``samuel``, ``samuel:smoke``, ``my.toml``) to a study and its config."""

import dataclasses
import hashlib
import importlib
import json
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import effjax
from effjax.core.errors import check_choice
from effjax.recipes.spec import Claim, Group, OwnData, StudyConfig, choose_arms
from effjax.study.own_files import with_all_rows, with_own
from effjax.study.settings import from_table, from_words, read_toml
from effjax.train.options import PASSING, Budget
from effjax.train.program import Program

DEFAULT_PRESET = "cpu"


class Recipe(Protocol):
    """What a study is made of: a module of ``effjax.recipes``, or a user's own."""

    def groups(self, config: Any) -> Sequence[Group]:
        """Every group with every arm; nothing is loaded yet."""

    def claims(self, config: Any) -> Mapping[str, Sequence[Claim]]:
        """By a shell pattern on the group's name; a module may hold the constant ``CLAIMS`` instead."""


class Study(NamedTuple):
    """A recipe, one of its configs, and what they are called.

    Attributes:
      stem: of the method.
      preset: name of the preset the config started from.
      config: the frozen config, overrides applied.
      overridden: whether any field differs from the preset that is part of a run's identity.
      recipe: the module ``effjax.recipes.<stem>``.
    """

    stem: str
    preset: str
    config: Any  # a StudyConfig of the recipe
    overridden: bool
    recipe: Any  # a Recipe, or the module of one

    def groups(self, config: StudyConfig | None = None) -> list[Group]:
        """The groups with the arms that the config chooses."""
        config = config or self.config
        return choose_arms(self.recipe.groups(config), config.arms)

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of all arms, as ``group/arm``."""
        return tuple(f"{group.name}/{arm.name}" for group in self.groups() for arm in group.arms)

    @property
    def claims(self) -> Mapping[str, Sequence[Claim]]:
        constant = getattr(self.recipe, "CLAIMS", None)
        return self.recipe.claims(self.config) if constant is None else constant

    @property
    def metrics(self) -> dict[str, dict[str, str]]:
        """What each group is judged by, as in results.json."""
        return {group.name: group.metric._asdict() for group in self.groups()}

    def build(self, name: str) -> Program:
        """Load the data of one arm, ``group/arm``, and build its Program."""
        check_choice("arm", name, self.arms)
        for group in self.groups():
            for arm in group.arms:
                if f"{group.name}/{arm.name}" == name:
                    return bounded(arm.build(group.load()), self.config.budget)
        raise AssertionError(name)

    @property
    def config_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self.config)))

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same where a run is continued."""
        return {"study": self.stem, "preset": self.preset, "config": lasting(self.config_dict)}

    @property
    def shared_options(self) -> dict[str, Any]:
        """How runs are executed, as far as all processes of one must do it alike."""
        train = self.config_dict.get("train", {})
        return {name: value for name, value in train.items() if name not in ("compile_cache", "prefetch", "profile")}

    @property
    def default_out(self) -> Path:
        """``runs/<stem>-<preset>``, with 8 hex digits of the config if what identifies it was overridden."""
        name = f"{self.stem}-{self.preset}"
        if self.overridden:
            text = json.dumps(self.identity["config"], sort_keys=True)
            name += "-" + hashlib.sha256(text.encode()).hexdigest()[:8]
        return Path("runs") / name


def lasting(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as JSON holds it, without the fields that may differ between two starts of one run.

    Example:
      >>> lasting({"seeds": [0], "train": {"dtype": "float32", "mesh": {"data": 8}}})
      {'seeds': [0], 'train': {'dtype': 'float32'}}
    """
    train = {name: value for name, value in config.get("train", {}).items() if name not in PASSING}
    return {**config, "train": train}


def _differs(config: Any, base: Any) -> bool:
    return lasting(dataclasses.asdict(config)) != lasting(dataclasses.asdict(base))


def bounded(program: Program, budget: Budget) -> Program:
    """The program, its phases without a number of steps bounded by the budget."""
    if all(phase.steps is not None for phase in program.phases):
        return program
    epoch_steps = program.loader.epoch_steps if program.loader else None
    return program.within(budget.steps(program.batch_size, epoch_steps))


def configs_folder() -> Path:
    """``configs/``: inside the package in a wheel, beside it in a checkout."""
    package = Path(effjax.__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no configs folder in {package} or beside it. Reinstall effjax.")


def presets(stem: str) -> dict[str, StudyConfig]:
    """The presets of a study by name."""
    check_choice("study", stem, tuple(effjax.METHODS))
    path = configs_folder() / stem / "presets.py"
    found = runpy.run_path(str(path), run_name=f"effjax_configs_{stem}")
    return {name: value for name, value in found.items() if isinstance(value, StudyConfig)}


class Begun(NamedTuple):
    """A study before the command line's words change its config.

    Attributes:
      stem: of the method.
      preset: name of the preset.
      base: the preset's config.
      config: the same with the changes of a TOML file, and with all rows of a user's own data.
      recipe: the module ``effjax.recipes.<stem>``.
    """

    stem: str
    preset: str
    base: Any
    config: Any
    recipe: Recipe | ModuleType


def begin(target: str, *, own: bool = False) -> Begun:
    """Find a study by what a user calls it.

    Args:
      target: ``stem``, ``stem:preset`` or the path of a TOML file with ``study = "stem"``, optionally
        ``preset = "cpu"``, and the fields to change.
      own: whether it is to run on a user's own data.

    Raises:
      ValueError: unknown study, preset, file or field, with near names.
    """
    table: dict[str, Any] = {}
    path = Path(target)
    if path.suffix.lower() == ".toml":
        target, table = _study_of(path)
    stem, _, preset = target.partition(":")
    known = presets(stem)
    recipe = importlib.import_module(f"effjax.recipes.{stem}")
    preset = preset or (getattr(recipe, "OWN_PRESET", DEFAULT_PRESET) if own else DEFAULT_PRESET)
    check_choice(f"preset of {stem}", preset, tuple(known))
    base = known[preset]
    start = with_all_rows(base) if own else base
    return Begun(stem, preset, base, from_table(start, table, f"config file {str(path)!r}") if table else start, recipe)


def finish(begun: Begun, config: Any, own: OwnData | None = None) -> Study:
    """The study with its final config, checked against its arms, on a user's own data if there are any."""
    if own is not None:
        if config.tasks != begun.base.tasks:
            raise ValueError(f"--tasks together with --data {own.path}: your data are the one task. Leave --tasks out.")
        config = with_own(config, begun.recipe, own, begun.stem)
    study = Study(begun.stem, begun.preset, config, _differs(config, begun.base), begun.recipe)
    study.groups()  # refuses patterns that match no arm
    return study


def resolve(target: str, overrides: Sequence[str] = (), own: OwnData | None = None) -> Study:
    """Find the study and apply typed overrides (``--seeds 0 1 --budget.amount 300``).

    Args:
      target: see ``begin``.
      overrides: command-line words; they win over the file's.
      own: a user's own data, in place of the study's. All of their rows are used unless ``overrides`` say otherwise.

    Raises:
      ValueError: unknown study, preset, file or field, with near names; a value that does not fit.
    """
    begun = begin(target, own=own is not None)
    config = begun.config
    if overrides:
        config = from_words(type(config), overrides, f"effjax ... {begun.stem}:{begun.preset}", default=config)
    return finish(begun, config, own)


def resolve_saved(stem: str, preset: str, values: Mapping[str, Any]) -> Study:
    """The study of a saved config (the ``config`` of a results.json or a trained arm)."""
    base = resolve(f"{stem}:{preset}")
    config = from_table(base.config, values, "the saved config (if another version wrote it, run the study again)")
    return base._replace(config=config, overridden=_differs(config, base.config))


def _study_of(path: Path) -> tuple[str, dict[str, Any]]:
    """``stem:preset`` and the other entries of a TOML file."""
    table = read_toml(path)
    if "study" not in table:
        raise ValueError(f'config file {str(path)!r} names no study. Add a line such as study = "samuel".')
    for name in ("study", "preset"):
        if not isinstance(table.get(name, ""), str):
            raise ValueError(f'config file {str(path)!r}: {name}={table[name]!r} must be a text, such as "samuel".')
    stem, colon, named = table.pop("study").partition(":")
    preset = table.pop("preset", named)
    if "own" in table:
        raise ValueError(f"config file {str(path)!r}: data of your own are given on the command line, by --data PATH.")
    if colon and preset != named:
        raise ValueError(f"config file {str(path)!r} names the presets {named!r} and {preset!r}. Keep one of them.")
    return f"{stem}:{preset}", table


def words_of(target: str) -> tuple[str | Sequence[str] | None, tuple[str, ...]]:
    """The kind of data of one's own that a study takes, and the fields of its config; none where it is not known."""
    stem = target.partition(":")[0]
    if stem not in effjax.METHODS:
        return None, ()
    fields = tuple(field.name for field in dataclasses.fields(next(iter(presets(stem).values()))))
    return getattr(importlib.import_module(f"effjax.recipes.{stem}"), "MODALITY", None), fields


def studies() -> str:
    """Every study with its presets and the data that it takes, a line each."""
    lines = []
    for stem in effjax.METHODS:
        recipe = importlib.import_module(f"effjax.recipes.{stem}")
        kinds = getattr(recipe, "MODALITY", ())
        kinds = (kinds,) if isinstance(kinds, str) else kinds
        takes = f"--data: {' or '.join(kinds)}" if kinds else ""
        takes += f" (preset {recipe.OWN_PRESET})" if hasattr(recipe, "OWN_PRESET") else ""
        lines.append(f"  {stem:<16} {' '.join(presets(stem)):<50} {takes}".rstrip())
    return "\n".join(lines)
