"""The main job: train every arm of a study under one budget, and write what came out."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from effjax.recipes.spec import Arm, Budget
from effjax.study.metering import measure
from effjax.study.progress import Progress
from effjax.study.report import write_report
from effjax.study.resolve import Study, resolve
from effjax.study.results import SCHEMA, arm_result, decide, environment, sweep_result
from effjax.train.checkpoint import describe_difference
from effjax.train.logging import read_jsonl, write_json
from effjax.train.loop import FitResult, NonFiniteError, Prepared, fit
from effjax.train.mesh import start_distributed
from effjax.train.program import Program

CURVE_POINTS = 200


def compare(
    target: str | Study, *, out: str | Path | None = None, cost_only: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Run a study and write ``results.json``, ``curves.json``, ``report.md`` and ``report.png``.

    A run that was killed continues when it is started again with the same folder: finished arms are
    kept, the running one resumes from its checkpoint, bit for bit on CPU.

    Args:
      target: ``'samuel'``, ``'samuel:smoke'``, a TOML file, or a resolved study.
      out: folder; default ``runs/<stem>-<preset>``.
      cost_only: measure speed and memory, train nothing.
      quiet: no progress.

    Returns:
      The content of results.json.

    Raises:
      ValueError: the folder belongs to another config (the difference is shown).
      Preempted: SIGTERM arrived; everything is saved.

    Example:
      ``effjax.compare("samuel:smoke")["claims"]``
    """
    start_distributed()
    study = resolve(target) if isinstance(target, str) else target
    out = (
        Path(out)
        if out is not None
        else study.default_out.with_name(study.default_out.name + ("-cost" if cost_only else ""))
    )
    first = jax.process_index() == 0
    with Progress(quiet=quiet or not first) as progress:
        return _Comparison(study, out, cost_only, progress, first).run()


class _Comparison:
    """One study in one folder."""

    def __init__(self, study: Study, out: Path, cost_only: bool, progress: Progress, first: bool):
        self.study, self.out, self.cost_only, self.progress, self.first = study, out, cost_only, progress, first
        self.work = out / ".work"
        self.arms = study.arms()
        self.prepared: dict[str, Prepared] = {}

    def run(self) -> dict[str, Any]:
        finished = self._claim_folder()
        if finished is not None:
            self.progress.say(f"{self.out} is finished; writing its report again")
            write_report(self.out, self.study)
            return finished
        costs, programs = self._costs()
        runs = {name: [] for name in self.arms} if self.cost_only else self._train(costs, programs)
        results = self._results(costs, runs)
        if self.first:
            write_json(self.out / "curves.json", self._curves())
            write_json(self.out / "results.json", results)
            write_report(self.out, self.study)
            shutil.rmtree(self.work)
        return results

    def _identity(self) -> dict[str, Any]:
        return {
            "study": self.study.stem,
            "preset": self.study.preset,
            "cost_only": self.cost_only,
            "config": self.study.config_dict,
        }

    def _claim_folder(self) -> dict[str, Any] | None:
        """Check that the folder is ours or new; return its results if it is finished."""
        mark, results = self.work / "identity.json", self.out / "results.json"
        if mark.exists():
            self._check_same(json.loads(mark.read_text()))
        elif results.exists():
            found = json.loads(results.read_text())
            self._check_same(
                {
                    "study": found.get("study"),
                    "preset": found.get("preset"),
                    "cost_only": all(not arm["metrics"] for arm in found.get("arms", {}).values()),
                    "config": found.get("config"),
                }
            )
            return found
        elif self.first:
            write_json(mark, self._identity())
        return None

    def _check_same(self, found: dict[str, Any]) -> None:
        difference = describe_difference(found, self._identity())
        if difference:
            raise ValueError(
                f"out={str(self.out)!r} holds another comparison:\n{difference}\nChoose another --out, or delete it."
            )

    def _costs(self) -> tuple[dict[str, dict], dict[str, Program]]:
        """Build the programs, and measure them unless an earlier run of this folder did."""
        path = self.work / "cost.json"
        config = self.study.config
        by_seconds = config.budget.unit == "device_seconds"
        if by_seconds and jax.process_count() > 1:
            raise ValueError(
                f"budget.unit='device_seconds' is one process's clock, and there are {jax.process_count()} processes. "
                "Use steps or examples."
            )
        provisional = dataclasses.replace(config, budget=Budget(1000.0)) if by_seconds else config
        programs = {}
        for name, arm in self.study.arms(provisional).items():
            self.progress.say(f"preparing {name}")
            programs[name] = arm.build()
        self.sources = sorted({program.source for program in programs.values()})
        if path.exists():
            costs = json.loads(path.read_text())
            self._check_sources()
        else:
            costs = {}
            for group in dict.fromkeys(arm.group for arm in self.arms.values()):
                self.progress.say(f"measuring the cost of {group}")
                members = {name: programs[name] for name, arm in self.arms.items() if arm.group == group}
                measured, prepared = measure(members, config.train, say=self.progress.say)
                costs |= measured
                self.prepared |= {} if by_seconds else prepared
            if self.first:
                write_json(self.work / "sources.json", self.sources)
                write_json(path, costs)
        if by_seconds:
            programs = {name: self._within_seconds(name, costs[name]).build() for name in programs}
        return costs, programs

    def _check_sources(self) -> None:
        begun = json.loads((self.work / "sources.json").read_text())
        if begun != self.sources:
            raise ValueError(
                f"out={str(self.out)!r} was begun on other data:\n  there {begun}\n  here  {self.sources}\n"
                "Set EFFJAX_DATA as it was, or choose another --out."
            )

    def _within_seconds(self, name: str, cost: Mapping[str, Any]) -> Arm:
        steps = max(1.0, self.study.config.budget.amount * 1e3 // cost["step_ms"])
        return self.study.arms(dataclasses.replace(self.study.config, budget=Budget(steps)))[name]

    def _train(self, costs: Mapping[str, Mapping], programs: dict[str, Program]) -> dict[str, list[dict]]:
        work = {name: costs[name]["step_ms"] * programs[name].total_steps for name in programs}
        seeds = self.study.config.seeds
        done = sum(work[name] for name in programs for seed in seeds if self._finished(name, seed))
        self.progress.plan(len(seeds) * sum(work.values()), done)
        runs: dict[str, list[dict]] = {}
        for name in list(programs):
            runs[name] = []
            for seed in seeds:
                run = self._finished(name, seed)
                if run is None:
                    run = self._run(name, seed, programs[name], done, costs[name]["step_ms"])
                    done += work[name]
                runs[name].append(run)
            self.prepared.pop(name, None)
            del programs[name]
        return runs

    def _folder(self, name: str, seed: int) -> Path:
        return self.work / "arms" / name / str(seed)

    def _finished(self, name: str, seed: int) -> dict | None:
        path = self._folder(name, seed) / "done.json"
        return json.loads(path.read_text()) if path.exists() else None

    def _run(self, name: str, seed: int, program: Program, done: float, step_ms: float) -> dict[str, Any]:
        folder = self._folder(name, seed)
        label = f"{name}, seed {seed}"
        self.progress.say(label)
        options = self.study.config.train
        if name not in self.prepared:
            self.prepared[name] = Prepared(program, options)
        prepared = self.prepared[name]
        try:
            result = fit(
                program,
                seed,
                options=options,
                prepared=prepared,
                directory=folder,
                identity={"arm": name, **self._identity()},
                on_steps=lambda steps: self.progress.reach(done + steps * step_ms),
                on_compile=self.progress.compiling(label),
            )
        except NonFiniteError as error:
            run = {"status": "diverged", "metrics": {}, "train_s": error.train_s, "why": str(error)}
        else:
            metrics = {key: float(value) for key, value in program.evaluate(result.state).items()}
            run = {"status": "ok", "train_s": result.train_s, "skipped": result.skipped}
            run |= {"metrics": {**result.train, **metrics}}
            if options.evaluate_steps:
                run["curve"] = _curve(result, {"step": program.total_steps, "train_s": result.train_s, **metrics})
        run["compiles"] = prepared.step.compiles
        if self.first:
            write_json(folder / "done.json", run)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return run

    def _results(self, costs: Mapping[str, Mapping], runs: Mapping[str, list[dict]]) -> dict[str, Any]:
        study = self.study
        arms = {name: arm_result(runs[name], costs[name]) for name in self.arms}
        for name, arm in self.arms.items():
            arms[name] |= {"group": arm.group, "label": arm.label, "role": arm.role}
        for name, sweep in study.sweeps.items():
            arms[name] = {**sweep_result(sweep, arms), "group": sweep.group, "label": sweep.label, "role": "sweep"}
        return {
            "schema": SCHEMA,
            "study": study.stem,
            "method": study.stem,
            "preset": study.preset,
            "seeds": list(study.config.seeds),
            "budget": dataclasses.asdict(study.config.budget),
            "config": study.config_dict,
            "arms": arms,
            "claims": decide(study.claims, arms, "cost" if self.cost_only else "metrics"),
            "environment": environment() | {"data": self.sources},
        }

    def _curves(self) -> dict[str, dict[str, Any]]:
        """Per arm the training loss of every seed, thinned to a few hundred points."""
        curves: dict[str, dict[str, Any]] = {}
        for name in self.arms:
            for seed in self.study.config.seeds:
                records = [r for r in read_jsonl(self._folder(name, seed) / "log.jsonl") if "loss" in r]
                if records:
                    thin = records[:: max(1, len(records) // CURVE_POINTS)]
                    curves.setdefault(name, {})[str(seed)] = {
                        "step": [r["step"] for r in thin],
                        "loss": [r["loss"] for r in thin],
                    }
        return curves


def _curve(result: FitResult, last: dict[str, float]) -> dict[str, list[float]]:
    """The evaluations of one run by column, its end included."""
    records = [record for record in result.curve if record["step"] < last["step"]] + [last]
    return {name: [record[name] for record in records] for name in last}
