"""The COLA study: chains of adapters against LoRA, its summed rank, other restarts and full fine-tuning."""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.core.errors import check_number
from effjax.core.folders import model_folder
from effjax.core.tree import leaves_at
from effjax.data.ragged import Ragged, padded_columns
from effjax.data.sets import load
from effjax.data.shift import permute_pixels
from effjax.finetune.chain import ColaConfig, cola_export, cola_links, cola_next
from effjax.finetune.lora import LoraConfig, LoraRule, lora_scales
from effjax.finetune.restart import cola_reset
from effjax.finetune.rivals import plora_next, rac_lora, relora_reset, relora_schedule
from effjax.models.mlp import MLP
from effjax.optim.by_part import by_part
from effjax.recipes.spec import Arm, Claim, Group, StudyConfig
from effjax.recipes.texts import (
    Plan,
    adamw,
    bucketed,
    check_epochs,
    check_tasks,
    group_name,
    padded,
    text_metric,
)
from effjax.tasks.adapted import (
    chain_of,
    cola_task,
    full_task,
    head_task,
    kernels_task,
    lora_task,
    save_adapters,
    save_merged,
)
from effjax.tasks.image import image_task
from effjax.tasks.language import lm_task
from effjax.tasks.prompt import prompt_task
from effjax.tasks.task import Metric, Task
from effjax.tasks.text import text_task, train_and_test
from effjax.train.loaders import column_loader, planned_loader
from effjax.train.loop import fit
from effjax.train.program import Loader, Phase, Program
from effjax.train.trainer import TrainState, supervised
from effjax.transformers.token_drop import token_drop_columns, vocabulary_stop_ids

PyTree = Any

MODALITY, OWN_MODEL = "text", "minilm"
LANGUAGE = ("tiny_shakespeare", "wikitext2", "ptb")
"""Data without labels: the task is to predict the next token."""
_MLP = re.compile(r"mlp((?:-\d+)+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColaStudy(StudyConfig):
    """Config of the COLA study."""

    tasks: tuple[str, ...] = ("digits/mlp-64-64",)
    """Data set and pretrained model: digits/mlp-64-64 (trained here in a second, then its pixels are permuted),
    sst2/minilm, glue/rte/minilm, tiny_shakespeare/stories260k, superglue/cb/opt-1.3b (by prompts), ...; the last part
    is the model: a folder in EFFJAX_MODELS, an installed or a packaged one."""
    links: tuple[int, ...] = (2, 3, 6)
    """Numbers of adapters in a chain, one arm each."""
    summed: tuple[int, ...] = (3, 6)
    """Factors of the rank of LoRA, one arm each."""
    rival_links: int = 3
    """Number of links of the other chains, and of restarts without a merge."""
    rank: int = 1
    """Rank of an adapter."""
    scale: float = 2.0
    """Factor alpha / rank of an adapter, the same at every rank."""
    targets: str | None = None
    """Regex on the paths of the kernels that are adapted; None for all of an MLP, query and value of a transformer."""
    learning_rate: float = 1e-2
    """Initial learning rate of the adapters and the head, which falls linearly to 0."""
    full_rate: float = 3e-3
    """Initial learning rate of full fine-tuning."""
    rac_rate: float = 0.1
    """Initial learning rate of RAC-LoRA, which trains one factor."""
    galore_rate: float = 0.1
    """Initial learning rate of GaLore."""
    galore_every: int = 20
    """Steps between two projections of GaLore."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    batch_size: int = 64
    """Examples of one step."""
    batch_sizes: tuple[int, ...] = ()
    """Examples of one step, with a group of arms for each number; () for the one group of batch_size."""
    partial_batches: bool = False
    """Whether the last texts of an epoch, which do not fill a batch, are trained on too, beside dummy rows."""
    train_rows: int | None = None
    """Most training texts used; all when None."""
    test_rows: int | None = None
    """Most test texts used; all when None."""
    max_length: int = 64
    """Tokens of a text; longer ones are truncated, shorter ones padded."""
    dropout: float = 0.0
    """Every dropout rate of an encoder."""
    scan_layers: bool = False
    """Whether one layer is compiled instead of all of them."""
    max_shapes: int = 6
    """Number of batch shapes that BucketSampler may use."""
    bucket_passes: int = 2
    """Passes over the data of the arms with BucketSampler, per pass of the others: theirs are several times shorter."""
    tokens: int = 8192
    """Most padded tokens of one of BucketSampler's batches."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("rank", "batch_size", "bucket_passes"):
            check_number(name, getattr(self, name), low=1, integer=True)
        for name, low in (("batch_sizes", 1), ("links", 2), ("summed", 2)):
            for value in getattr(self, name):
                check_number(name, value, low=low, integer=True, hint="One link is LoRA." if low == 2 else "")
        check_number("rival_links", self.rival_links, low=2, integer=True)
        check_tasks(self.tasks)


def groups(config: ColaStudy) -> list[Group]:
    """Every task; with ``batch_sizes`` one group for each of them."""
    return [
        Group(
            group_name(task) + (f"-batch-{size}" if config.batch_sizes else ""),
            config.metric(task, MODALITY, _metric),
            functools.partial(_load, config, task),
            list(_arms(dataclasses.replace(config, batch_size=size), task)),
        )
        for task in config.tasks
        for size in config.batch_sizes or (config.batch_size,)
    ]


def claims(config: ColaStudy) -> dict[str, tuple[Claim, ...]]:
    """What the paper promises and its critics ask."""
    # How much a step may cost beyond LoRA's: a CPU's clock is less steady.
    most = 1.10 if jax.default_backend() == "cpu" else 1.02
    cost = (
        Claim("cola", "<=", "lora", of="step_ms", times=most),
        Claim("cola", "<=", "lora", of="peak_bytes", times=1.02),
        Claim("lora", "<=", "full", of="step_ms"),
        Claim("lora", "<=", "full", of="peak_bytes"),
        Claim("lora", "<=", "materialised", of="step_ms", why="factored adapters against materialised ones"),
        Claim("lora", "<=", "materialised", of="peak_bytes", why="factored adapters against materialised ones"),
    )
    stack = tuple(Claim(arm, "<=", "lora", until="lora") for arm in ("lora-dynamic", "lora-buckets", "stacked"))
    return {
        group.name: cost if config.batch_sizes else (*_quality(config, group.metric.goal), *stack)
        for group in groups(config)
    }


def _quality(config: ColaStudy, goal: str) -> Iterator[Claim]:
    op = ">=" if goal == "max" else "<="
    chained = [f"cola-{links}" for links in sorted(config.links)]
    yield from (Claim(arm, op, "lora") for arm in chained)
    yield from (Claim(b, op, a, why="longer chains are better") for a, b in itertools.pairwise(chained))
    for times in config.summed:
        yield Claim(f"lora-x{times}", op, f"cola-{times}", why="LoRA of the summed rank, where its memory is there")
    yield Claim(f"cola-{config.rival_links}", op, "resets", why="the merge does it, not the restart of the optimizer")


def _arms(config: ColaStudy, task: str) -> Iterator[Arm]:
    rank, links = config.rank, config.rival_links
    rows = padded(config, length=config.max_length) if config.partial_batches else None

    def arm(name: str, role: str, label: str, make: Callable[..., Program], plan=rows, passes: int = 1, **options):
        run = functools.partial(_run, config, plan, passes)
        return Arm(name, role, lambda loaded: make(run(loaded), **options), label)

    plain, chain = f"LoRA, rank {rank}", "COLA, {} links of rank " + str(rank)
    yield arm("lora", "baseline", plain + (f", padded to {config.max_length}" if config.partial_batches else ""), _lora)
    for k in config.links:
        yield arm(f"cola-{k}", "method", chain.format(k), _chain, links=k)
    for k in config.summed:
        yield arm(f"lora-x{k}", "alternative", f"LoRA, rank {k * rank} (of {k} links)", _lora, times=k)
    yield arm("relora", "alternative", f"ReLoRA, {links} links", _relora)
    yield arm("rac-lora", "alternative", f"RAC-LoRA, {links} links", _rac)
    yield arm("periodic", "alternative", f"periodic LoRA, {links} links", _periodic)
    yield arm("per-link", "method", f"COLA, {links} links, a schedule each", _chain, links=links, schedule="per_link")
    yield arm("resets", "control", f"LoRA, optimizer reset {links - 1} x, no merge", _resets)
    yield arm("galore", "alternative", f"GaLore, rank {rank}", _galore)
    yield arm("cola", "method", chain.format(links), _chain, links=links)
    yield arm("full", "alternative", "full fine-tuning", _full)
    yield arm("materialised", "control", f"{plain}, W + s a b formed", _materialised)
    if task.startswith("digits/") or _data(task) in LANGUAGE:
        return
    yield arm("head", "control", "head alone, encoder frozen", _head)
    passes = config.bucket_passes
    quick = f"BucketSampler, {passes} x the epochs"
    dropped = lambda task, seed: token_drop_columns(task.train, vocabulary_stop_ids(task.tokenizer), seed=seed)
    yield arm("lora-dynamic", "baseline", f"{plain}, dynamic padding", _lora, padded(config))
    yield arm("lora-buckets", "alternative", f"{plain}, {quick}", _lora, bucketed(config), passes)
    stacked = f"{chain.format(links)}, TokenDrop, {quick}"
    yield arm("stacked", "method", stacked, _chain, bucketed(config, dropped), passes, links=links)


# The tasks


def _data(task: str) -> str:
    return task.rpartition("/")[0]


def _metric(task: str) -> Metric:
    return Metric("nll", "min", "test nats a token") if _data(task) in LANGUAGE else text_metric(task)


def _load(config: ColaStudy, name: str) -> Task:
    data, _, model = name.rpartition("/")
    if data == "digits" and config.own is None:
        return _digits(model)
    made = {"dtype": config.train.dtype, "remat": config.train.remat, "scan_layers": config.scan_layers}
    if data in LANGUAGE and config.own is None:
        rows = {"train_rows": config.train_rows, "test_rows": config.test_rows}
        return lm_task(data, model, length=config.max_length, **rows, **made)
    data, model = config.data(data, MODALITY), config.model(model)
    data = load(data) if isinstance(data, str) else data
    for split, columns in zip(("train_rows", "test_rows"), train_and_test(data), strict=True):
        most = getattr(config, split)
        made[split] = None if most is None else min(most, len(next(iter(columns.values()))))
    if not model.startswith("encoder-"):
        folder = model_folder(model, holds="model.safetensors*")
        if json.loads((folder / "config.json").read_text())["model_type"] in ("opt", "llama"):
            return prompt_task(data, model, max_length=config.max_length, **made)
    return text_task(data, model, max_length=config.max_length, dropout=config.dropout, **made)


def _digits(model: str) -> Task:
    """An MLP trained on the digits, to be adapted to the digits with their pixels permuted."""
    widths = _MLP.fullmatch(model)
    if not widths:
        raise ValueError(f"tasks='digits/{model}': the model must be like 'mlp-64-64', the widths of hidden layers.")
    data = load("digits")
    module = MLP(tuple(map(int, widths[1][1:].split("-"))), classes=len(data.classes))
    before, steps = image_task(data, module), 1500
    rows = np.random.default_rng(0).integers(0, len(before.train["label"]), (steps, 64))
    drawn = lambda batch, index, rng: {name: column[rows[index]] for name, column in before.train.items()}
    tx = optax.adam(optax.linear_schedule(3e-3, 0.0, steps))
    trained = fit(supervised(before, tx, steps=steps, loader=column_loader(before.train, 64, transform=drawn)), seed=0)
    params = jax.tree.map(jnp.asarray, trained.state.params)
    permuted = permute_pixels(0, data.splits["train"]["image"].shape[1:])
    splits = {name: permuted(columns) for name, columns in data.splits.items()}
    after = image_task(dataclasses.replace(data, splits=splits), module)
    return after._replace(
        name=f"digits, pixels permuted/{model}",
        init=lambda key: {"params": params},
        example_inputs=after.test["image"][:64],
    )


def _targets(task: Task) -> str:
    """The kernels of a transformer's query and value, or all of them."""
    return "(query|value)/kernel$" if task.tokenizer is not None else "kernel$"


# The arms


class _Run(NamedTuple):
    """What an arm is made for: a task, and the batches of its steps."""

    config: ColaStudy
    task: Task
    loader: Loader
    steps: int

    def adamw(self, rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        size = self.config.batch_size if self.loader.shapes else None
        return adamw(rate, self.config.weight_decay, size)

    def falling(self, peak: float, steps: int | None = None) -> optax.Schedule:
        """From ``peak`` linearly to zero, over the run or ``steps``."""
        return optax.linear_schedule(peak, 0.0, steps or self.steps)

    def lora(self, times: int = 1) -> LoraConfig:
        """Adapters of ``times`` the study's rank; alpha / rank stays."""
        rank = times * self.config.rank
        return LoraConfig(LoraRule(self.config.targets or _targets(self.task), rank, self.config.scale * rank))

    def knots(self, links: int) -> tuple[int, ...]:
        """Equal links over the run."""
        return tuple(round(link * self.steps / links) for link in range(1, links))

    def program(
        self,
        own: Task,
        optimizers: Mapping[str, optax.GradientTransformation],
        *,
        head_rate: float | None = None,
        knots: tuple[int, ...] = (),
        leave: Callable[[TrainState], TrainState] | None = None,
        adapters: Callable[[TrainState], tuple[PyTree, Any]] | None = None,
    ) -> Program:
        """Ordinary training of an adapted task, left for a moment at its knots.

        Args:
          own: the adapted task.
          optimizers: of its parts, but for the head, which trains beside them and never restarts.
          head_rate: initial learning rate of the head; None for that of the adapters.
          knots: steps at whose start ``leave`` is called.
          leave: from one link to the next.
          adapters: ``state -> (adapters, scales)``, against the pretrained network.
        """
        if "body" in self.task.details:
            head = self.adamw(self.falling(head_rate or self.config.learning_rate))
            optimizers = {**optimizers, "head": head}
        program = supervised(
            own,
            by_part(optimizers),
            steps=self.steps,
            loader=self.loader,
            options=self.config.train,
            train_metrics=lambda means: {"train_loss": means["loss"]},
        )
        network = lambda state: own.details["merge"](program.params(state))

        def export(state: TrainState, out: Path, *, merged: bool = False) -> None:
            head = state.params.get("head")
            if merged:
                save_merged(out, self.task, network(state)["params"], head)
            elif adapters is None:
                raise ValueError(f"--out {out}: this arm has no adapters. Add --merged, or export NAME.safetensors.")
            else:
                save_adapters(out, self.task, *adapters(state), head)

        step, edges = program.phases[0].step, (0, *knots, self.steps)
        lengths = [after - before for before, after in itertools.pairwise(edges)]
        return program._replace(
            task=self.task,
            # The half of the key that the network starts from is dropout's, too; the other half draws adapters.
            init=lambda key: program.init(key)._replace(key=jax.random.split(key)[0]),
            phases=(*(Phase(step, length, leave=leave) for length in lengths[:-1]), Phase(step, lengths[-1])),
            params=network,
            trained=lambda state: state.params,
            export=export,
        )


def _run(config: ColaStudy, plan: Plan | None, passes: int, task: Task) -> _Run:
    size = config.batch_size
    if plan is not None:
        check_epochs(config)
        if not isinstance(task.train.get("input_ids"), Ragged):
            raise ValueError(
                f"{task.name} has no texts of different lengths, so its batches cannot be planned by them."
            )
        epochs = int(config.budget.amount) * passes
        return _Run(config, task, *planned_loader(functools.partial(plan, task), config.seeds, epochs, size))
    ragged = isinstance(task.train.get("input_ids"), Ragged)
    columns = padded_columns(task.train, config.max_length, task.tokenizer.pad_id) if ragged else task.train
    loader = column_loader(columns, size)
    return _Run(config, task, loader, config.budget.steps(size, loader.epoch_steps))


def _lora(run: _Run, times: int = 1) -> Program:
    """LoRA of ``times`` the rank."""
    config = run.lora(times)
    adapters = lambda state: (state.params["lora"], lora_scales(state.params["lora"], config))
    tx = run.adamw(run.falling(run.config.learning_rate))
    return run.program(lora_task(run.task, config), {"lora": tx}, adapters=adapters)


def _materialised(run: _Run) -> Program:
    """LoRA whose kernels W + s a b are formed in every step: what factored adapters save."""
    own, tx = lora_task(run.task, run.lora()), run.adamw(run.falling(run.config.learning_rate))
    merge, plain = own.details["merge"], run.task.loss
    loss = lambda variables, batch, key=None, *, train=True: plain(merge(variables), batch, key, train=train)
    return run.program(own._replace(loss=loss), {"lora": tx})


def _resets(run: _Run) -> Program:
    """LoRA whose optimizer restarts where a chain has its knots, and nothing else: no merge, no new adapters."""
    tx = run.adamw(run.falling(run.config.learning_rate))
    reset = jax.jit(lambda opt, adapters: cola_reset(tx, opt, adapters)[0])

    def leave(state: TrainState) -> TrainState:
        return state._replace(opt={**state.opt, "lora": reset(state.opt["lora"], state.params["lora"])})

    own = lora_task(run.task, run.lora())
    return run.program(own, {"lora": tx}, knots=run.knots(run.config.rival_links), leave=leave)


def _chain(
    run: _Run,
    links: int,
    tx: optax.GradientTransformation | None = None,
    *,
    schedule: str = "global",
    reset: Callable[..., PyTree] | None = None,
) -> Program:
    """COLA: ``links`` adapters one after another, as in the README: ``cola_init``, steps, ``cola_next``."""
    if tx is None:
        length = run.steps if schedule == "global" else -(-run.steps // links)
        tx = run.adamw(run.falling(run.config.learning_rate, length))
    config = ColaConfig(run.lora(), knots=run.knots(links), schedule=schedule, keep_links=True)
    knot = cola_next(tx, config, reset)

    chain_in = lambda state: chain_of({"params": state.params, **state.model})

    def leave(state: TrainState) -> TrainState:
        chain, opt = knot(chain_in(state), state.opt["lora"])
        return state._replace(
            params={**state.params, "lora": chain.lora},
            model={"frozen": chain._replace(lora=None)},
            opt={**state.opt, "lora": opt},
        )

    adapters = lambda state: (cola_export(cola_links(chain_in(state), config)), 1.0)
    own = cola_task(run.task, config)
    return run.program(own, {"lora": tx}, knots=config.knots, leave=leave, adapters=adapters)


def _relora(run: _Run) -> Program:
    """ReLoRA: a jagged cosine, and all but a thousandth of the moments pruned at a knot.

    Of its two prunings the random one: by magnitude, a moment may survive where its square does not, and Adam leaps.
    """
    links = run.config.rival_links
    length = max(1, run.steps // links)
    warm = {name: min(100, length // 3) for name in ("first_warmup_steps", "restart_warmup_steps")}
    schedule = relora_schedule(run.config.learning_rate, run.steps, length, **warm)
    return _chain(run, links, run.adamw(schedule), reset=functools.partial(relora_reset, prune="random", ratio=0.999))


def _rac(run: _Run) -> Program:
    """RAC-LoRA: a random sketch ``a`` stays frozen for its link, ``b`` is trained."""
    return _chain(run, run.config.rival_links, rac_lora(run.adamw(run.falling(run.config.rac_rate))))


def _periodic(run: _Run) -> Program:
    """Periodic LoRA: a knot unloads a running mean of the links."""
    tx = run.adamw(run.falling(run.config.learning_rate))
    config = ColaConfig(run.lora(), knots=run.knots(run.config.rival_links))
    chained, knot = cola_task(run.task, config), plora_next(tx, config)

    def init(key: jax.Array) -> dict[str, PyTree]:
        variables = chained.init(key)
        kernels = leaves_at(variables["frozen"].base, variables["params"]["lora"])
        return {**variables, "momentum": {path: jnp.zeros(leaf.shape, jnp.float32) for path, leaf in kernels.items()}}

    def leave(state: TrainState) -> TrainState:
        chain = chain_of({"params": state.params, **state.model})
        chain, momentum, opt = knot(chain, state.model["momentum"], state.opt["lora"])
        return state._replace(
            params={**state.params, "lora": chain.lora},
            model={"frozen": chain._replace(lora=None), "momentum": momentum},
            opt={**state.opt, "lora": opt},
        )

    plain = lambda variables: {name: tree for name, tree in variables.items() if name != "momentum"}
    own = chained._replace(
        init=init,
        loss=lambda variables, *rest, **options: chained.loss(plain(variables), *rest, **options),
        details={**chained.details, "merge": lambda variables: chained.details["merge"](plain(variables))},
    )
    return run.program(own, {"lora": tx}, knots=config.knots, leave=leave)


def _galore(run: _Run) -> Program:
    """GaLore on the kernels that the adapters would sit on, at the same rank."""
    config, rate = run.config, run.falling(run.config.galore_rate)
    tx = optax.contrib.galore(rate, config.rank, config.galore_every, weight_decay=config.weight_decay)
    return run.program(kernels_task(run.task, config.targets or _targets(run.task)), {"kernels": tx})


def _full(run: _Run) -> Program:
    """All parameters."""
    rate = run.config.full_rate
    return run.program(full_task(run.task), {"params": run.adamw(run.falling(rate))}, head_rate=rate)


def _head(run: _Run) -> Program:
    """The head alone, on frozen features."""
    return run.program(head_task(run.task), {})
