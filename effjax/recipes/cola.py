"""The COLA study: chains of adapters against LoRA, its summed rank, other restarts and full fine-tuning."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax

from effjax.core.errors import check_choice, check_number
from effjax.data.bucket_sampler import PlannedBatches
from effjax.data.length_grouping import PaddedBatches
from effjax.data.pipeline import batches
from effjax.recipes import cola_arms as ways
from effjax.recipes.bucket_sampler import bucketed, planned_run
from effjax.recipes.cola_arms import Ground, Run, Settings, Way
from effjax.recipes.cola_tasks import LANGUAGE, Options, adaptation, axis
from effjax.recipes.spec import Arm, Axis, Budget, Claim, StudyConfig, Sweep, time_to
from effjax.recipes.token_drop import task_stop_ids
from effjax.tasks.text import TextTask
from effjax.train.program import Program
from effjax.transformers.token_drop import token_drop_columns

OTHERS = ("relora", "rac-lora", "periodic", "per-link", "resets", "galore", "full", "head")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColaStudy(StudyConfig):
    """Config of the COLA study."""

    tasks: tuple[str, ...] = ("digits/mlp-64-64",)
    """data set and pretrained model: digits/mlp-64-64 (trained here in a second, then its pixels are permuted),
    sst2/minilm, glue/rte/minilm, tiny_shakespeare/stories260k, superglue/cb/opt-1.3b (by prompts), ...; what follows
    the last stroke is a folder in EFFJAX_MODELS, or an installed or packaged model"""
    compare: Literal["quality", "overhead", "stacked"] = "quality"
    """the arms: rivals in quality; what a step costs (for --cost-only); or LoRA against COLA with BucketSampler and
    TokenDrop, in the time to the same accuracy"""
    links: tuple[int, ...] = (2, 3, 6)
    """adapters in a chain, one arm each"""
    summed: tuple[int, ...] = (3, 6)
    """LoRA of so many times the rank, one arm each"""
    rival_links: int = 3
    """links of the other chains, and of the restarts without a merge"""
    rank: int = 1
    """of an adapter"""
    scale: float = 2.0
    """alpha / rank, the same at every rank"""
    targets: str | None = None
    """regex on the paths of the kernels that are adapted; None for all of an MLP, query and value of a
    transformer"""
    learning_rate: float = 1e-2
    """of the adapters and the head at the start, falling linearly to 0"""
    full_rate: float = 3e-3
    """of full fine-tuning"""
    rac_rate: float = 0.1
    """of RAC-LoRA, which trains one factor"""
    galore_rate: float = 0.1
    """of GaLore"""
    galore_every: int = 20
    """steps between two projections of GaLore"""
    weight_decay: float = 0.0
    """of AdamW"""
    batch_size: int = 64
    """examples of one step"""
    overhead_batches: tuple[int, ...] = (8, 32)
    """examples of one step, one group each, where steps are compared"""
    train_rows: int | None = None
    """training texts used, at most; all when None"""
    test_rows: int | None = None
    """test texts used, at most; all when None"""
    max_length: int = 64
    """tokens of a text; longer ones are truncated, shorter ones padded"""
    dropout: float = 0.0
    """every dropout rate of an encoder"""
    scan_layers: bool = False
    """compile one layer instead of all of them"""
    max_shapes: int = 6
    """compile budget of BucketSampler, in the stack"""
    bucket_passes: int = 2
    """passes of the arms with BucketSampler for one of the others, in the stack: theirs are several times shorter"""
    tokens: int = 8192
    """padded tokens of one of BucketSampler's batches, at most"""
    others: tuple[str, ...] = OTHERS
    """arms besides LoRA, the chains and LoRA of the summed rank"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("rank", "batch_size", "bucket_passes"):
            check_number(name, getattr(self, name), low=1, integer=True)
        for name in ("links", "summed"):
            for value in getattr(self, name):
                check_number(name, value, low=2, integer=True, hint="One link is LoRA.")
        check_number("rival_links", self.rival_links, low=2, integer=True)
        check_choice("compare", self.compare, ("quality", "overhead", "stacked"))
        if self.compare == "stacked" and (self.budget.unit != "epochs" or not self.train.evaluate_steps):
            raise ValueError(
                f"compare='stacked' counts whole epochs and needs curves, but budget.unit={self.budget.unit!r} and "
                f"train.evaluate_steps={self.train.evaluate_steps}. Use 'epochs', and evaluate some twenty times."
            )
        for name in self.others:
            check_choice("others", name, OTHERS)
        for task in self.tasks:
            if not all(task.rpartition("/")):
                raise ValueError(f"tasks={task!r} must be DATA/MODEL, such as 'sst2/minilm'.")


class _Form(NamedTuple):
    """One arm, but for its task."""

    label: str
    role: Literal["baseline", "method", "control", "alternative"]
    way: Callable[[Ground], Way]
    plan: Callable[[TextTask, int, int], PlannedBatches] | None = None
    passes: int = 1


def arms(config: ColaStudy) -> dict[str, Arm]:
    """Every arm of every task, as ``task/arm``."""
    found = {}
    for task in config.tasks:
        for group, size in _groups(config, task).items():
            for name, form in _forms(config, task).items():
                found[f"{group}/{name}"] = Arm(
                    build=lambda task=task, form=form, size=size: _build(config, task, form, size),
                    group=group,
                    label=form.label,
                    role=form.role,
                )
    return found


def sweeps(config: ColaStudy) -> dict[str, Sweep]:
    """None: every arm runs at one rate, chosen on other seeds; see the card."""
    return {}


def axes(config: ColaStudy) -> dict[str, Axis]:
    """What each group is judged by."""
    return {group: axis(task) for task in config.tasks for group in _groups(config, task)}


def claims(config: ColaStudy) -> list[Claim]:
    """What the paper promises and the method file asks to show."""
    make = {"quality": _quality_claims, "overhead": _overhead_claims, "stacked": _stacked_claims}[config.compare]
    return [claim for task in config.tasks for group in _groups(config, task) for claim in make(config, task, group)]


def _groups(config: ColaStudy, task: str) -> dict[str, int]:
    """Group of arms -> examples of a step."""
    name = task.replace("/", "-")
    if config.compare != "overhead":
        return {name: config.batch_size}
    return {f"{name}-batch-{size}": size for size in config.overhead_batches}


def _forms(config: ColaStudy, task: str) -> dict[str, _Form]:
    rank, links = config.rank, config.rival_links
    plain = _Form(f"LoRA, rank {rank}", "baseline", ways.lora)
    chain = lambda k: _Form(f"COLA, {k} links of rank {rank}", "method", lambda ground: ways.chain(ground, k))
    everything = _Form("full fine-tuning", "alternative", ways.full)
    if config.compare == "overhead":
        return {
            "lora": plain,
            "cola": chain(links),
            "full": everything,
            "materialised": _Form(f"LoRA, rank {rank}, W + s a b formed", "control", ways.materialised),
        }
    if config.compare == "stacked":
        return _stack(config, plain, chain(links))
    bind = lambda way, **fields: functools.partial(way, links=links, **fields)
    found = {"lora": plain} | {f"cola-{k}": chain(k) for k in config.links}
    found |= {
        f"lora-x{k}": _Form(
            f"LoRA, rank {k * rank} (of {k} links)", "alternative", functools.partial(ways.lora, links=k)
        )
        for k in config.summed
    }
    others = {
        "relora": _Form(f"ReLoRA, {links} links", "alternative", bind(ways.relora)),
        "rac-lora": _Form(f"RAC-LoRA, {links} links", "alternative", bind(ways.rac)),
        "periodic": _Form(f"periodic LoRA, {links} links", "alternative", bind(ways.periodic)),
        "per-link": _Form(f"COLA, {links} links, a schedule each", "method", bind(ways.chain, schedule="per_link")),
        "resets": _Form(f"LoRA, optimizer reset {links - 1} x, no merge", "control", bind(ways.resets)),
        "galore": _Form(f"GaLore, rank {rank}", "alternative", ways.galore),
        "full": everything,
        "head": _Form("head alone, encoder frozen", "control", ways.head),
    }
    headless = task.startswith("digits/") or task.rpartition("/")[0] in LANGUAGE
    return found | {name: others[name] for name in config.others if name != "head" or not headless}


def _stack(config: ColaStudy, plain: _Form, chain: _Form) -> dict[str, _Form]:
    """Plain LoRA, and what is added to it one by one."""

    def padded(task: TextTask, seed: int, epochs: int, **options: Any) -> PlannedBatches:
        options |= {"batch_size": config.batch_size, "pad_id": task.tokenizer.pad_id}
        return PaddedBatches(task.train, seed=seed, epochs=epochs, **options)

    def buckets(task: TextTask, seed: int, epochs: int) -> PlannedBatches:
        return bucketed(config, task.train, task, seed, epochs)

    def dropped(task: TextTask, seed: int, epochs: int) -> PlannedBatches:
        return bucketed(config, token_drop_columns(task.train, task_stop_ids(task), seed=seed), task, seed, epochs)

    static = functools.partial(padded, length=config.max_length)
    passes = config.bucket_passes
    quick = f"BucketSampler, {passes} x the epochs"
    added = lambda form, label, role, plan, passes=1: _Form(f"{form.label}, {label}", role, form.way, plan, passes)
    return {
        "lora": added(plain, f"padded to {config.max_length}", "baseline", static),
        "lora-dynamic": added(plain, "dynamic padding", "baseline", padded),
        "lora-buckets": added(plain, quick, "alternative", buckets, passes),
        "stacked": added(chain, f"TokenDrop, {quick}", "method", dropped, passes),
    }


def _build(config: ColaStudy, task_name: str, form: _Form, size: int) -> Program:
    options = Options(
        config.max_length,
        config.train_rows,
        config.test_rows,
        config.train.dtype,
        config.train.remat,
        config.scan_layers,
        config.dropout,
    )
    task = adaptation(task_name, options)
    settings = Settings(
        config.rank,
        config.scale,
        config.learning_rate,
        config.full_rate,
        config.rac_rate,
        config.galore_rate,
        config.galore_every,
        config.weight_decay,
        config.targets,
        size,
        config.train.accumulate,
    )
    if form.plan is not None:
        budget = Budget(config.budget.amount * form.passes, config.budget.unit)
        plan = functools.partial(form.plan, task.text)
        run = Run(*planned_run(plan, dataclasses.replace(config, budget=budget)))
    else:
        rows = len(next(iter(task.columns.values())))
        steps = config.budget.steps(size, lambda epoch: rows // size)
        run = Run(steps, lambda seed: batches(task.columns, size, seed=seed))
    return ways.program(task, settings, run, form.way)


def _quality_claims(config: ColaStudy, task: str, group: str) -> list[Claim]:
    judged = axis(task)
    sign, op = (1, ">=") if judged.goal == "max" else (-1, "<=")
    score = lambda m, arm: m[f"{group}/{arm}"].get(judged.metric, float("nan"))
    better = "at least" if sign > 0 else "at most"

    def claim(text: str, left: str, right: str) -> Claim:
        return Claim(f"{group}: {text}", lambda m: score(m, left), op, lambda m: score(m, right))

    chained = [f"cola-{k}" for k in sorted(config.links)]
    found = [
        claim(f"COLA of {arm.removeprefix('cola-')} links: {judged.label} {better} LoRA's of that rank", arm, "lora")
        for arm in chained
    ]
    found += [
        claim(f"longer chains are better: {after} {better} {before}", after, before)
        for before, after in itertools.pairwise(chained)
    ]
    found += [
        claim(f"LoRA of the summed rank, {k} x, where its memory is there, is {better} COLA of {k} links", *pair)
        for k in config.summed
        if k in config.links
        for pair in [(f"lora-x{k}", f"cola-{k}")]
    ]
    if "resets" in config.others and config.rival_links in config.links:
        arm = f"cola-{config.rival_links}"
        found.append(claim(f"the merge does it: {arm} {better} resets of the optimizer alone", arm, "resets"))
    return found


def _overhead_claims(config: ColaStudy, task: str, group: str) -> list[Claim]:
    cost = lambda c, arm, name: c[f"{group}/{arm}"][name]
    most = 1.10 if jax.default_backend() == "cpu" else 1.02

    def ratio(text: str, left: str, right: str, name: str, most: float = 1.0) -> Claim:
        of = lambda c: cost(c, left, name) / cost(c, right, name)
        return Claim(f"{group}: {text}", of, "<=", lambda c: most, of="cost")

    return [
        ratio(f"COLA's step takes at most {most:g} x LoRA's", "cola", "lora", "step_ms", most),
        ratio("COLA's step has at most 1.02 x LoRA's peak memory", "cola", "lora", "peak_bytes", 1.02),
        ratio("LoRA's step takes less time than full fine-tuning's", "lora", "full", "step_ms"),
        ratio("LoRA's step has less peak memory than full fine-tuning's", "lora", "full", "peak_bytes"),
        ratio("factored adapters take less time than materialised ones", "lora", "materialised", "step_ms"),
        ratio("factored adapters have less peak memory than materialised ones", "lora", "materialised", "peak_bytes"),
    ]


def _stacked_claims(config: ColaStudy, task: str, group: str) -> list[Claim]:
    metric = axis(task).metric

    def seconds(c: Mapping[str, Any], arm: str) -> float:
        """To the accuracy that plain LoRA ends with, seed by seed."""
        curves = zip(c[f"{group}/{arm}"]["curve"], c[f"{group}/lora"]["curve"], strict=True)
        times = [time_to({"curve": [own]}, metric, plain[metric][-1]) for own, plain in curves]
        return sum(times) / len(times)

    return [
        Claim(
            f"{group}: to the {metric} that plain LoRA, padded to {config.max_length}, ends with, {label} takes less "
            "time (plain LoRA's seconds over its own)",
            lambda c, arm=arm: seconds(c, "lora") / seconds(c, arm),
            ">=",
            lambda c: 1.0,
            of="cost",
        )
        for arm, label in (
            ("lora-dynamic", "dynamic padding"),
            ("lora-buckets", "LoRA with BucketSampler"),
            ("stacked", "COLA with BucketSampler and TokenDrop"),
        )
    ]
