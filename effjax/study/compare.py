"""The main job: train every arm of a study under one budget, and write what came out."""

import contextlib
import dataclasses
import json
import math
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from effjax.core.cost import programs_from_folder
from effjax.core.storage import Folder, remove_tree, storage
from effjax.core.together import check_same_everywhere, together
from effjax.recipes.spec import Claim
from effjax.study.books import NUMBER, read_json_checked
from effjax.study.claims import decide, was_trained
from effjax.study.curves import curve_json, curve_texts
from effjax.study.lock import FolderLock
from effjax.study.metering import measure
from effjax.study.own import own_study
from effjax.study.own_files import check_unchanged
from effjax.study.progress import Progress
from effjax.study.report import SCHEMA, read_results, write_report
from effjax.study.resolve import Study, bounded, lasting, resolve
from effjax.study.results import arm_result, environment, idle_arms, sweep_result
from effjax.study.results_view import Results
from effjax.tasks.task import Task
from effjax.train.checkpoint import checksums, describe_difference, layout
from effjax.train.logging import read_jsonl, write_json
from effjax.train.loop import FitResult, NonFiniteError, Prepared, fit
from effjax.train.mesh import start_distributed
from effjax.train.options import Budget, TrainOptions
from effjax.train.program import Program
from effjax.train.signals import StopSignal, check_stop

__all__ = ["compare"]

CURVE_POINTS = 200
_REMOVED = "removed.json"
_START_AGAIN = "Delete {0} to start again, or choose another --out."


def compare(
    study: str | Study | None = None,
    *,
    task: Task | None = None,
    arms: Mapping[str, Any] | None = None,
    budget: Budget | float | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    claims: Sequence[Claim] = (),
    batch_size: int = 64,
    options: TrainOptions | None = None,
    out: str | Folder | None = None,
    cost_only: bool = False,
    quiet: bool = False,
) -> Results:
    """Run a study, or arms of your own on a task of your own, and report quality against cost.

    Writes ``results.json``, ``curves.json``, ``report.md`` and ``report.png``. A run that was killed continues when it
    is started again with the same folder: finished arms are kept, the running one resumes from its checkpoint, bit for
    bit on CPU.

    Args:
      study: ``'samuel'``, ``'samuel:smoke'``, a TOML file, or a resolved study; None with ``task`` and ``arms``.
      task: what your arms learn, of ``effjax.task`` or another maker of tasks.
      arms: by name: an Optax optimizer; a ``Program``, such as ``effjax.train.supervised(task, tx)``; or a function
        ``steps -> optimizer or Program``, for schedules. The first is the baseline.
      budget: of every arm and seed; a number is one of steps.
      seeds: of parameters and data order.
      claims: what you expect, as data; decided from the results.
      batch_size: rows of one step, for arms that are optimizers.
      options: how runs are executed.
      out: folder, on a disk or in a bucket (``gs://BUCKET/FOLDER``); default ``runs/<stem>-<preset>``.
      cost_only: measure speed and memory, train nothing.
      quiet: no progress.

    Returns:
      The content of results.json; a notebook shows its table and plot.

    Raises:
      ValueError: bad settings, or a folder that belongs to another comparison (the difference is shown).
      FolderInUse: another process works in the folder.
      Preempted: SIGTERM arrived; everything is saved.

    Example:
      ``effjax.compare("samuel:smoke")["claims"]``
    """
    start_distributed()
    if study is None:
        study = own_study(task, arms, budget, tuple(seeds), tuple(claims), batch_size, options or TrainOptions())
    elif task is not None or arms is not None or budget is not None:
        raise ValueError(
            f"study={study!r} together with task, arms or budget: a study has its own. Give it alone (its config is "
            "changed by a TOML file or on the command line), or leave it out."
        )
    study = resolve(study) if isinstance(study, str) else study
    out = (
        storage(out)
        if out is not None
        else study.default_out.with_name(study.default_out.name + ("-cost" if cost_only else ""))
    )
    first = jax.process_index() == 0
    check_same_everywhere({**study.identity, "train": study.shared_options, "out": str(out)})
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(quiet=quiet or not first))
        together(lambda: stack.enter_context(FolderLock(out, first=first, say=progress.say)))
        stack.enter_context(StopSignal())
        return Results(_Comparison(study, out, cost_only, progress, first).run(), folder=out)


class _Comparison:
    """One study in one folder."""

    def __init__(self, study: Study, out: Folder, cost_only: bool, progress: Progress, first: bool):
        self.study, self.out, self.cost_only, self.progress, self.first = study, out, cost_only, progress, first
        self.work = out / ".work"
        self.groups = study.groups()
        self.prepared: dict[str, Prepared] = {}
        self.evaluated: set[Any] = set()

    def run(self) -> dict[str, Any]:
        finished = self._claim_folder()
        if finished is not None:
            self.progress.say(f"{self.out} is finished; writing its report again")
            if self.first:
                write_report(self.out)
            return finished
        try:
            costs, programs = self._costs()
            self._rehearse(costs, programs)
        except Exception:
            if self.first and not (self.work / "cost.json").exists():
                self._remove_work()  # nothing in it was paid for
            raise
        runs = {name: [] for name in programs} if self.cost_only else self._train(costs, programs)
        results = self._results(costs, runs)
        if self.first:
            write_json(self.out / "curves.json", self._curves())
            write_json(self.out / "results.json", results)
            write_report(self.out)
            self._remove_work()
        return results

    def _remove_work(self) -> None:
        """Marked first and the mark last, as a kill in the middle must leave nothing that a run takes for its own."""
        with contextlib.suppress(OSError):  # a full disk, of which this frees some
            write_json(self.work / _REMOVED, {})
        remove_tree(self.work, last=_REMOVED)

    def _sweep(self) -> None:
        """Remove the working files if that was begun."""
        if (self.work / _REMOVED).exists():
            remove_tree(self.work, last=_REMOVED)

    def _identity(self) -> dict[str, Any]:
        return {**self.study.identity, "cost_only": self.cost_only}

    def _claim_folder(self) -> dict[str, Any] | None:
        """Check that the folder is ours or new, and mark it; return its results if it is finished."""
        together(lambda: self._sweep() if self.first else None)
        finished = together(self._look)
        if self.first and finished is None:
            write_json(self.work / "identity.json", self._identity())
        return finished

    def _look(self) -> dict[str, Any] | None:
        mark, results = self.work / "identity.json", self.out / "results.json"
        # A kill before the mark was in its place leaves the folder with at most a part of it.
        if self.work.exists() and any(path.name != f"{mark.name}.partial" for path in self.work.iterdir()):
            self._check_same(read_json_checked(mark, tuple(self._identity()), _START_AGAIN.format(self.work)))
        elif results.exists():
            found = read_results(results)
            config = found["config"]
            about = {"study": found["study"], "preset": found["preset"], "config": lasting(config)}
            self._check_same({**about, "cost_only": not was_trained(found["arms"])})
            check_unchanged(self.study.config, self.study.recipe, found["environment"].get("data", []), self.out)
            return found
        return None

    def _check_same(self, found: dict[str, Any]) -> None:
        difference = describe_difference(found, self._identity())
        if difference:
            raise ValueError(
                f"out={str(self.out)!r} holds another comparison:\n{difference}\nChoose another --out, or delete it."
            )

    # Costs

    def _costs(self) -> tuple[dict[str, dict], dict[str, Program]]:
        """Build the programs, and measure them unless an earlier run of this folder did."""
        path = self.work / "cost.json"
        budget = self.study.config.budget
        by_seconds = budget.unit == "device_seconds"
        if by_seconds and jax.process_count() > 1:
            raise ValueError(
                f"budget.unit='device_seconds' is one process's clock, and there are {jax.process_count()} processes. "
                "Use steps or examples."
            )
        loaded = {}
        for group in self.groups:
            check_stop()
            self.progress.say(f"preparing {group.name}")
            loaded[group.name] = together(group.load)
        programs = self._build(loaded, Budget(1000.0) if by_seconds else budget)
        self.about = {group.name: list(group.about(loaded[group.name])) for group in self.groups}
        self.sources = sorted({f"{program.task.name}: {program.task.source}" for program in programs.values()})
        costs = together(lambda: self._known_costs(path, programs))
        for group in self.groups:
            members = {name: programs[name] for name in self._names(group)}
            if costs.keys() >= members.keys():
                continue
            self.progress.say(f"measuring the cost of {group.name}")
            measured, prepared = measure(members, self.study.config.train, say=self.progress.say)
            more = {"devices": self._devices(), "from_folder": programs_from_folder() > 0}
            costs |= {name: {**cost, **more} for name, cost in measured.items()}
            self.prepared |= {} if by_seconds else prepared
            if self.first:
                write_json(self.work / "sources.json", self.sources)
                write_json(path, costs)
        if by_seconds:
            steps = {name: max(1.0, budget.amount * 1e3 // costs[name]["step_ms"]) for name in programs}
            programs = {name: self._build(loaded, Budget(steps[name]), name)[name] for name in programs}
        return costs, programs

    def _known_costs(self, path: Folder, programs: Mapping[str, Program]) -> dict[str, dict]:
        """What an earlier start has measured on as many devices along each axis."""
        if not path.exists():
            return {}
        way_out = f"Delete it to measure again: {path}."
        found = read_json_checked(path, {}, way_out)
        shape = {name: {"step_ms": NUMBER, "compile_s": NUMBER} for name in programs if name in found}
        read_json_checked(path, shape, way_out)
        self._check_sources()
        return {name: found[name] for name in shape if found[name].get("devices") == self._devices()}

    def _devices(self) -> dict[str, Any]:
        options = self.study.config.train.mesh
        rules = {} if options.rules == "data" else {"rules": options.rules}
        return {} if options.built is None else {**options.built.shape, **rules}

    def _build(self, loaded: Mapping[str, Any], budget: Budget, only: str | None = None) -> dict[str, Program]:
        """Programs of all arms, or of one, under a budget."""
        groups = self.study.groups(dataclasses.replace(self.study.config, budget=budget))
        return {
            name: bounded(arm.build(loaded[group.name]), budget)
            for group in groups
            for name, arm in zip(self._names(group), group.arms, strict=True)
            if only in (None, name)
        }

    @staticmethod
    def _names(group: Any) -> list[str]:
        return [f"{group.name}/{arm.name}" for arm in group.arms]

    def _check_sources(self) -> None:
        path = self.work / "sources.json"
        begun = read_json_checked(path, list, _START_AGAIN.format(self.work))
        if begun != self.sources:
            raise ValueError(
                f"out={str(self.out)!r} was begun on other data:\n  there {begun}\n  here  {self.sources}\n"
                f"{'Your files have changed: restore them' if self.study.config.own else 'Set EFFJAX_DATA as it was'}, "
                "or choose another --out."
            )

    # Training

    def _train(self, costs: Mapping[str, Mapping], programs: dict[str, Program]) -> dict[str, list[dict]]:
        work = {name: costs[name]["step_ms"] * programs[name].total_steps for name in programs}
        seeds = self.study.config.seeds
        done = sum(work[name] for name in programs for seed in seeds if self._finished(name, seed))
        self.progress.plan(len(seeds) * sum(work.values()), done, expected_s=1e-3)
        runs: dict[str, list[dict]] = {}
        for name in list(programs):
            runs[name] = []
            for seed in seeds:
                check_stop()
                run = self._finished(name, seed)
                if run is None:
                    run = self._run(name, seed, programs[name], done, costs[name]["step_ms"])
                    done += work[name]
                runs[name].append(run)
            self.prepared.pop(name, None)
            del programs[name]
        return runs

    def _folder(self, name: str, seed: int) -> Folder:
        return self.work / "arms" / name / str(seed)

    def _finished(self, name: str, seed: int) -> dict | None:
        path = self._folder(name, seed) / "done.json"
        if not path.exists():
            return None
        kinds = {"status": str, "metrics": dict, "train_s": NUMBER, "evaluate_s": NUMBER, "compiles": int}
        way_out = f"Delete {path.parent} to train this seed again."
        run = read_json_checked(path, {**kinds, "identity": dict}, way_out)
        if "curves" in run:
            read_json_checked(path, {"curves": dict}, way_out)
            shape = {curve: {"x": list, "y": list} for curve in run["curves"]}
            read_json_checked(path, {"curves": shape}, way_out)
        difference = describe_difference(run.pop("identity"), self._arm_identity(name, seed))
        if difference:
            raise ValueError(f"{path} is of another run:\n{difference}\n{way_out}")
        # NaN is written as null.
        metrics = {metric: math.nan if found is None else found for metric, found in run["metrics"].items()}
        return {**run, "metrics": metrics}

    def _arm_identity(self, name: str, seed: int) -> dict[str, Any]:
        return {"arm": name, "seed": seed, **self._identity()}

    def _run(self, name: str, seed: int, program: Program, done: float, step_ms: float) -> dict[str, Any]:
        folder = self._folder(name, seed)
        label = f"{name}, seed {seed}"
        self.progress.say(label)
        options = self.study.config.train
        if name not in self.prepared:
            self.prepared[name] = Prepared(program, options)
        prepared = self.prepared[name]
        if options.profile is not None:
            options = dataclasses.replace(options, profile=f"{options.profile}/{name}/{seed}")
        try:
            result = fit(
                program,
                seed,
                options=options,
                prepared=prepared,
                directory=folder,
                identity=self._arm_identity(name, seed),
                on_steps=lambda steps: self.progress.reach(done + steps * step_ms),
                on_compile=self.progress.compiling(label),
                compile_first=True,  # the clock is for steps alone
            )
        except NonFiniteError as error:
            run = {"status": "diverged", "metrics": {}, "train_s": error.train_s, "evaluate_s": 0.0, "why": str(error)}
        else:
            evaluation = program.evaluate or program.task.evaluate
            if evaluation not in self.evaluated:  # arms share it, and its compilation is no cost of the first of them
                program.judged(result.state)
                self.evaluated.add(evaluation)
            run = self._judge(name, program, result)
        run["compiles"] = prepared.compiles
        if self.first:
            write_json(folder / "done.json", {**run, "identity": self._arm_identity(name, seed)})
            remove_tree(folder / "checkpoints")
        return run

    def _judge(self, name: str, program: Program, result: FitResult) -> dict[str, Any]:
        start = time.perf_counter()
        metrics, curves = program.measured(result.state)
        run: dict[str, Any] = {
            "status": "ok",
            "metrics": {**result.train, **metrics},
            "train_s": result.train_s,
            "evaluate_s": time.perf_counter() - start,
            "steps": result.steps,
            "skipped": result.skipped,
            "fingerprint": fingerprint(program.params(result.state)),
        }
        if curves:
            run["curves"] = {found: curve_json(name, found, curve) for found, curve in curves.items()}
        if self.study.config.train.evaluate_steps:
            run["curve"] = _curve(result, {"step": result.steps, "train_s": result.train_s, **metrics})
        return run

    # Results

    def _rehearse(self, costs: Mapping[str, Mapping], programs: Mapping[str, Program]) -> None:
        """Assemble results in which every arm diverged: what cannot be decided is refused before anything trains."""
        run = {"status": "diverged", "metrics": {}, "train_s": 0.0, "evaluate_s": 0.0, "compiles": 1}
        self._results(costs, {name: [run] * len(self.study.config.seeds) for name in programs})

    def _results(self, costs: Mapping[str, Mapping], runs: Mapping[str, list[dict]]) -> dict[str, Any]:
        study, arms, idle = self.study, {}, []
        for group in self.groups:
            names = self._names(group)
            for name, arm in zip(names, group.arms, strict=True):
                about = {"group": group.name, "label": arm.label or arm.name, "role": arm.role}
                arms[name] = arm_result(runs[name], costs[name], name) | about
            for sweep_name, sweep in group.sweeps.items():
                members = [name for name in names if sweep.matches(name.removeprefix(f"{group.name}/"))]
                best = sweep_result(members, arms, group.metric.name, group.metric.goal)
                about = {"group": group.name, "label": sweep.label, "role": "sweep"}
                arms[f"{group.name}/{sweep_name}"] = best | about
            idle += idle_arms({name: [run.get("fingerprint") for run in runs[name]] for name in names})
        metrics = study.metrics
        in_group = lambda group: {name: arm for name, arm in arms.items() if arm["group"] == group.name}
        texts = {group.name: curve_texts(group.curves, in_group(group)) for group in self.groups}
        texts = {group: found for group, found in texts.items() if found}
        about = {group: found for group, found in self.about.items() if found}
        return {
            "schema": SCHEMA,
            "study": study.stem,
            "preset": study.preset,
            "seeds": list(study.config.seeds),
            "budget": dataclasses.asdict(study.config.budget),
            "config": study.config_dict,
            "groups": metrics,
            "arms": arms,
            **({"curves": texts} if texts else {}),
            **({"about": about} if about else {}),
            "claims": decide(study.claims, arms, metrics, timed=False),
            "cost_claims": decide(study.claims, arms, metrics, timed=True),
            "idle": idle,
            "environment": environment() | self._cached(costs) | {"data": self.sources},
        }

    @staticmethod
    def _cached(costs: Mapping[str, Mapping]) -> dict[str, bool]:
        """What ``environment`` tells of this start, if it was so when the costs were measured."""
        return {"compile_cache": True} if any(cost.get("from_folder") for cost in costs.values()) else {}

    def _curves(self) -> dict[str, dict[str, Any]]:
        """Per arm the training loss of every seed, thinned to a few hundred points."""
        curves: dict[str, dict[str, Any]] = {}
        for name in self.study.arms:
            for seed in self.study.config.seeds:
                records = [r for r in read_jsonl(self._folder(name, seed) / "log.jsonl") if "loss" in r]
                if records:
                    thin = records[:: max(1, len(records) // CURVE_POINTS)]
                    curves.setdefault(name, {})[str(seed)] = {
                        "step": [r["step"] for r in thin],
                        "loss": [r["loss"] for r in thin],
                    }
        return curves


def fingerprint(params: Any) -> int | None:
    """A number of all bits of a tree of arrays; None where this process does not hold it whole."""
    arrays = jax.tree.map(jax.numpy.asarray, params)
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(arrays)):
        return None
    return zlib.crc32(json.dumps([layout(arrays), checksums(arrays)], sort_keys=True).encode())


def _curve(result: FitResult, last: dict[str, float]) -> dict[str, list[float]]:
    """The evaluations of one run by column, its end included."""
    records = [record for record in result.curve if record["step"] < last["step"]] + [last]
    return {name: [record[name] for record in records] for name in last}
