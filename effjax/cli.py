"""The ``effjax`` command: compare, train, report, methods, export."""

import argparse
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import effjax

USER_ERRORS = (ValueError, FileNotFoundError)
STUDY_EXTRA = ("tyro", "rich", "grain", "PIL", "matplotlib", "sklearn")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status.

    0 success, 2 bad input (one readable message), 75 stopped by SIGTERM after saving: start again.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser(arguments)
    options, rest = parser.parse_known_args(arguments)
    if rest and not getattr(options, "overrides", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        status = options.run(options, rest) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except USER_ERRORS as error:
        if os.environ.get("EFFJAX_TRACEBACK"):
            raise
        print(f"effjax: {_readable(error, options)}\n(EFFJAX_TRACEBACK=1 shows where)", file=sys.stderr)
        return 2
    except Exception as error:
        return _expected(error)


def _readable(error: Exception, options: argparse.Namespace) -> str:
    """The message; with data of one's own, options are named as they are typed."""
    if getattr(options, "data", None) is None:
        return str(error)
    from effjax.study.own_files import as_flags
    from effjax.study.resolve import words_of

    return as_flags(str(error), *words_of(options.study))


def _expected(error: Exception) -> int:
    """Exit status of an interruption or a refused checkpoint; anything else is a bug and is raised."""
    from effjax.train.checkpoint import CheckpointError
    from effjax.train.loop import RESUME_EXIT_CODE, NonFiniteError, Preempted

    if isinstance(error, Preempted):
        print(f"effjax: {error}", file=sys.stderr)
        return RESUME_EXIT_CODE
    if isinstance(error, ModuleNotFoundError) and error.name in STUDY_EXTRA:
        print(f'effjax: {error.name} is not installed. pip install "effjax[study]"', file=sys.stderr)
        return 2
    if isinstance(error, CheckpointError | NonFiniteError):
        print(f"effjax: {error}", file=sys.stderr)
        return 2
    raise error


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="effjax", description=effjax.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=effjax.__version__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    overrides = "; further words change config fields: --seeds 0 1 --budget.amount 300 (--config-help lists them)"

    verb = verbs.add_parser(
        "compare",
        help="run a study and report quality against cost",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if arguments[:1] == ["compare"]:
        _add_own(verb)
        if {"-h", "--help"} & set(arguments):
            from effjax.study.resolve import studies

            verb.epilog = f"studies, presets (default: cpu), and the data of your own that each takes:\n{studies()}"
    verb.add_argument("study", help="STEM, STEM:PRESET or a TOML file" + overrides)
    verb.add_argument("--out", type=Path, help="folder of results (default runs/STEM-PRESET)")
    verb.add_argument("--cost-only", action="store_true", help="measure speed and memory, train nothing")
    verb.add_argument("--config-help", action="store_true", help="list the config's fields and values")
    verb.set_defaults(run=_compare, overrides=True)

    verb = verbs.add_parser("train", help="train one arm, with checkpoints and a log", allow_abbrev=False)
    verb.add_argument("study", help="STEM, STEM:PRESET or a TOML file" + overrides)
    verb.add_argument("--arm", help="name of the arm; without it they are listed")
    verb.add_argument("--seed", type=int, default=0)
    if arguments[:1] == ["train"]:
        _add_own(verb)
    verb.add_argument("--out", type=Path, help="folder of checkpoints (default runs/STEM-PRESET-ARM-SEED)")
    verb.add_argument("--config-help", action="store_true", help="list the config's fields and values")
    verb.set_defaults(run=_train, overrides=True)

    verb = verbs.add_parser("report", help="tables and plots of finished folders")
    verb.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    verb.set_defaults(run=_report)

    verb = verbs.add_parser("methods", help="list the methods")
    verb.add_argument("pattern", nargs="?", default="*", help="shell pattern on the stem or family/stem")
    verb.set_defaults(run=_methods)

    verb = verbs.add_parser("export", help="weights or adapters of a trained arm as safetensors")
    verb.add_argument("folder", type=Path, metavar="DIR", help="folder written by `effjax train`")
    verb.add_argument("--out", type=Path, required=True, help="NAME.safetensors, or a folder for PEFT")
    verb.add_argument("--merged", action="store_true", help="in that folder the network, adapters merged")
    verb.set_defaults(run=_export)
    return parser


def _add_own(verb: argparse.ArgumentParser) -> None:
    from effjax.study.own_files import add_arguments

    add_arguments(verb)


def _resolve(options: argparse.Namespace, rest: list[str]):
    from effjax.study.resolve import resolve

    own = None
    if hasattr(options, "data"):
        from effjax.study.own_files import from_arguments

        own = from_arguments(options)
    return resolve(options.study, [*rest, "--help"] if options.config_help else rest, own)


def _compare(options: argparse.Namespace, rest: list[str]) -> None:
    from effjax.study.compare import compare

    study = _resolve(options, rest)
    results = compare(study, out=options.out, cost_only=options.cost_only)
    _print_claims(results)
    print("\n" + "\n".join(str(results.folder / name) for name in ("report.md", "report.png", "results.json")))


def _print_claims(results: dict) -> None:
    from effjax.study.report import number

    for claim in results["claims"]:
        verdict = "holds         " if claim["holds"] else "DOES NOT HOLD "
        numbers = f"{number(claim['left'])} {claim['op']} {number(claim['right'])}"
        print(f"{verdict} {claim['group']}: {claim['text']}: {numbers}")


def _train(options: argparse.Namespace, rest: list[str]) -> None:
    from effjax.study.single import train_arm

    for name, value in train_arm(_resolve(options, rest), options.arm, options.seed, options.out).items():
        print(f"{name}: {value}")


def _report(options: argparse.Namespace, rest: list[str]) -> None:
    from effjax.study.report import write_report

    for folder in options.folders:
        write_report(folder)
        print((folder / "report.md").read_text())
        print(folder / "report.png")


def _methods(options: argparse.Namespace, rest: list[str]) -> None:
    width = max(40, shutil.get_terminal_size().columns)
    for method in effjax.methods(options.pattern):
        about = f"{method.summary}  [{method.kind}; {method.paper}]"
        names = ", ".join(method.names)
        first = textwrap.wrap(about, width, initial_indent=f"{method.stem:<18} ", subsequent_indent=" " * 19)
        print("\n".join([*first, *textwrap.wrap(names, width, initial_indent=" " * 19, subsequent_indent=" " * 19)]))


def _export(options: argparse.Namespace, rest: list[str]) -> None:
    from effjax.study.single import export_arm

    count = export_arm(options.folder, options.out, options.merged)
    print(json.dumps({"out": str(options.out), "tensors": count}))


if __name__ == "__main__":
    sys.exit(main())
