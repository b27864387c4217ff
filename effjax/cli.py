"""The ``effjax`` command: compare, train, report, methods, export."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import effjax

USER_ERRORS = (ValueError, FileNotFoundError)
STUDY_EXTRA = ("tyro", "rich", "grain", "PIL", "matplotlib", "sklearn")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status.

    0 success, 2 bad input (one readable message), 75 stopped by SIGTERM after saving: start again.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not getattr(options, "overrides", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return options.run(options, rest) or 0
    except USER_ERRORS as error:
        if os.environ.get("EFFJAX_TRACEBACK"):
            raise
        print(f"effjax: {error}\n(EFFJAX_TRACEBACK=1 shows where)", file=sys.stderr)
        return 2
    except Exception as error:
        return _expected(error)


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="effjax", description=effjax.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=effjax.__version__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    overrides = "; further words change config fields: --seeds 0 1 --budget.amount 300 (--config-help lists them)"

    verb = verbs.add_parser("compare", help="run a study and report quality against cost", allow_abbrev=False)
    verb.add_argument("study", help="STEM, STEM:PRESET or a TOML file" + overrides)
    verb.add_argument("--out", type=Path, help="folder of results (default runs/STEM-PRESET)")
    verb.add_argument("--cost-only", action="store_true", help="measure speed and memory, train nothing")
    verb.add_argument("--config-help", action="store_true", help="list the config's fields and values")
    verb.set_defaults(run=_compare, overrides=True)

    verb = verbs.add_parser("train", help="train one arm, with checkpoints and a log", allow_abbrev=False)
    verb.add_argument("study", help="STEM, STEM:PRESET or a TOML file" + overrides)
    verb.add_argument("--arm", help="name of the arm; without it they are listed")
    verb.add_argument("--seed", type=int, default=0)
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


def _resolve(options: argparse.Namespace, rest: list[str]):
    from effjax.study.resolve import resolve

    return resolve(options.study, [*rest, "--help"] if options.config_help else rest)


def _compare(options: argparse.Namespace, rest: list[str]) -> None:
    from effjax.study.compare import compare

    study = _resolve(options, rest)
    results = compare(study, out=options.out, cost_only=options.cost_only)
    out = options.out or study.default_out.with_name(study.default_out.name + ("-cost" if options.cost_only else ""))
    _print_claims(results)
    print(f"\n{out / 'report.md'}\n{out / 'report.png'}\n{out / 'results.json'}")


def _print_claims(results: dict) -> None:
    from effjax.study.report import number

    for claim in results["claims"]:
        verdict = "holds         " if claim["holds"] else "DOES NOT HOLD "
        print(f"{verdict} {claim['text']}: {number(claim['left'])} {claim['op']} {number(claim['right'])}")


def _train(options: argparse.Namespace, rest: list[str]) -> None:
    from effjax.study.single import train_arm

    for name, value in train_arm(_resolve(options, rest), options.arm, options.seed, options.out).items():
        print(f"{name}: {value}")


def _report(options: argparse.Namespace, rest: list[str]) -> None:
    from effjax.study.report import read_results, write_report
    from effjax.study.resolve import resolve_saved

    for folder in options.folders:
        results = read_results(folder / "results.json")
        write_report(folder, resolve_saved(results["study"], results["preset"], results["config"]))
        print((folder / "report.md").read_text())
        print(folder / "report.png")


def _methods(options: argparse.Namespace, rest: list[str]) -> None:
    for method in effjax.methods(options.pattern):
        print(f"{method.stem:<18} {method.summary}  [{method.kind}; {method.paper}]")
        print(f"{'':<18} effjax.{', effjax.'.join(method.names)}")


def _export(options: argparse.Namespace, rest: list[str]) -> None:
    from effjax.study.single import export_arm

    count = export_arm(options.folder, options.out, options.merged)
    print(json.dumps({"out": str(options.out), "tensors": count}))


if __name__ == "__main__":
    sys.exit(main())
