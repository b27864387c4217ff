"""The COLA study: chains of adapters against LoRA, its summed rank, other restarts and full fine-tuning."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import optax

from effjax.core.errors import Count, Limits, Positive, Rate
from effjax.data.ragged import Ragged, padded_columns
from effjax.data.sets import load
from effjax.finetune.chain import cola_next
from effjax.finetune.chain_config import ColaConfig
from effjax.finetune.lora_config import LoraConfig, LoraRule
from effjax.finetune.restart import cola_reset
from effjax.finetune.rivals import plora_next, rac_lora, relora_reset, relora_schedule
from effjax.models.pretrained import is_decoder
from effjax.optim.batch_size import adamw_by_batch_size
from effjax.optim.by_part import by_part
from effjax.recipes.spec import Arm, Claim, Group, Role
from effjax.recipes.texts import Plan, TextFields, bucketed, check_epochs, group_name, padded, text_metric
from effjax.tasks.adapted import (
    cola_task,
    full_task,
    head_task,
    kernels_task,
    lora_task,
    next_link,
    periodic_task,
    save_adapted,
)
from effjax.tasks.language import lm_task
from effjax.tasks.prompt import prompt_task
from effjax.tasks.task import Metric, Task
from effjax.tasks.text import text_task, train_and_test
from effjax.train.loaders import column_loader, planned_loader
from effjax.train.permuted import permuted_task
from effjax.train.program import Loader, Program
from effjax.train.trainer import supervised, with_knots
from effjax.transformers.token_drop import token_drop_columns, vocabulary_stop_ids

MODALITY, OWN_MODEL, OWN_PRESET = "text", "minilm", "text"
LANGUAGE = ("tiny_shakespeare", "wikitext2", "ptb")
"""Data without labels: the task is to predict the next token."""


Several = Annotated[int, Limits(low=2, hint="One link is LoRA.")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColaStudy(TextFields):
    """Config of the COLA study."""

    tasks: tuple[str, ...] = ("digits/mlp-64-64",)
    """Data set and pretrained model: digits/mlp-64-64 (trained here in a second, then its pixels are permuted),
    sst2/minilm, glue/rte/minilm, tiny_shakespeare/stories260k, superglue/cb/opt-1.3b (by prompts), ...; the last part
    is the model: a folder in EFFJAX_MODELS, an installed or a packaged one."""
    links: tuple[Several, ...] = (2, 3, 6)
    """Numbers of adapters in a chain, one arm each."""
    summed: tuple[Several, ...] = (3, 6)
    """Factors of the rank of LoRA, one arm each."""
    rival_links: Several = 3
    """Number of links of the other chains, and of restarts without a merge."""
    rank: Count = 1
    """Rank of an adapter."""
    scale: Positive = 2.0
    """Factor alpha / rank of an adapter, the same at every rank."""
    targets: str | None = None
    """Regex on the paths of the kernels that are adapted; None for all of an MLP, query and value of a transformer."""
    learning_rate: Positive = 1e-2
    """Initial learning rate of the adapters and the head, which falls linearly to 0."""
    full_rate: Positive = 3e-3
    """Initial learning rate of full fine-tuning."""
    rac_rate: Positive = 0.1
    """Initial learning rate of RAC-LoRA, which trains one factor."""
    galore_rate: Positive = 0.1
    """Initial learning rate of GaLore."""
    galore_every: Count = 20
    """Steps between two projections of GaLore."""
    batch_size: Count = 64
    """Examples of one step."""
    batch_sizes: tuple[Count, ...] = ()
    """Examples of one step, with a group of arms for each number; () for the one group of batch_size."""
    partial_batches: bool = False
    """Whether the last texts of an epoch, which do not fill a batch, are trained on too, beside dummy rows."""
    dropout: Rate = 0.0
    """Every dropout rate of an encoder."""
    max_shapes: Count = 6
    """Number of batch shapes that BucketSampler may use."""
    bucket_passes: Count = 2
    """Passes over the data of the arms with BucketSampler, per pass of the others: theirs are several times shorter."""


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
    better = functools.partial(Claim, op="no worse")
    chained = [f"cola-{links}" for links in sorted(config.links)]
    summed = "LoRA of the summed rank, where its memory is there"
    quality = (
        *(better(arm, than="lora") for arm in chained),
        *(better(b, than=a, why="longer chains are better") for a, b in itertools.pairwise(chained)),
        *(better(f"lora-x{times}", than=f"cola-{times}", why=summed) for times in config.summed),
        better(f"cola-{config.rival_links}", than="resets", why="the merge does it, not the restart of the optimizer"),
        *(Claim(arm, "<=", "lora", until="lora") for arm in ("lora-dynamic", "lora-buckets", "stacked")),
    )
    return dict.fromkeys((group.name for group in groups(config)), cost if config.batch_sizes else quality)


def _arms(config: ColaStudy, task: str) -> Iterator[Arm]:
    rank, links = config.rank, config.rival_links
    rows = padded(config, length=config.max_length) if config.partial_batches else None

    def arm(name: str, role: Role, label: str, make: Callable[..., Program], plan=rows, passes: int = 1, **options):
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
    if config.own is None and (task.startswith("digits/") or _data(task) in LANGUAGE):
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
        return permuted_task(data, model)
    if data in LANGUAGE and config.own is None:
        return lm_task(data, model, length=config.max_length, **config.made)
    data, model = config.data(data, MODALITY), config.model(model)
    data = load(data) if isinstance(data, str) else data
    made: dict[str, Any] = {"max_length": config.max_length, **config.made}
    for split, columns in zip(("train_rows", "test_rows"), train_and_test(data), strict=True):
        if made[split] is not None:
            made[split] = min(made[split], len(next(iter(columns.values()))))
    if not model.startswith("encoder-") and is_decoder(model):
        if config.own is not None:
            raise ValueError(
                f"model={model!r} is a decoder, which is taught by prompts, and these are written for named data sets "
                "only. Give an encoder, such as minilm."
            )
        return prompt_task(data, model, **made)
    return text_task(data, model, dropout=config.dropout, **made)


# The arms


class _Run(NamedTuple):
    """What an arm is made for: a task, and the batches of its steps."""

    config: ColaStudy
    task: Task
    loader: Loader
    steps: int

    @property
    def targets(self) -> str:
        """The kernels to adapt: those of a transformer's query and value, or all of them."""
        return self.config.targets or ("(query|value)/kernel$" if self.task.tokenizer is not None else "kernel$")

    def falling(self, peak: float, steps: int | None = None) -> optax.Schedule:
        """From ``peak`` linearly to zero, over the run or ``steps``."""
        return optax.linear_schedule(peak, 0.0, steps or self.steps)

    def adamw(self, rate: optax.Schedule | None = None) -> optax.GradientTransformation:
        """AdamW, with the falling rate of the adapters where none is given."""
        rate = rate or self.falling(self.config.learning_rate)
        reference = self.config.batch_size if self.loader.shapes else None
        return adamw_by_batch_size(rate, weight_decay=self.config.weight_decay, reference=reference)

    def lora(self, times: int = 1) -> LoraConfig:
        """Adapters of ``times`` the study's rank; alpha / rank stays."""
        rank = times * self.config.rank
        return LoraConfig(LoraRule(self.targets, rank, self.config.scale * rank))

    def chain(self, links: int, **options: Any) -> ColaConfig:
        """Equal links over the run."""
        knots = tuple(round(link * self.steps / links) for link in range(1, links))
        return ColaConfig(self.lora(), knots=knots, **options)

    def program(
        self,
        own: Task,
        optimizers: Mapping[str, optax.GradientTransformation],
        knots: Sequence[int] = (),
        leave: Callable[..., tuple[Any, Any]] = lambda *parts: parts,
    ) -> Program:
        """Ordinary training of an adapted task.

        Args:
          own: the adapted task.
          optimizers: of its parts; a head, if there is one, trains as the adapters do, and never restarts.
          knots: see ``with_knots``.
          leave: see ``with_knots``.
        """
        parts = {"head": self.adamw(), **optimizers}
        if "body" not in self.task.details:
            del parts["head"]
        program = supervised(
            own,
            by_part(parts),
            steps=self.steps,
            loader=self.loader,
            options=self.config.train,
            train_metrics=lambda means: {"train_loss": means["loss"]},
        )
        return with_knots(program, knots, leave)._replace(
            task=self.task,
            # The half of the key that the network starts from is dropout's, too; the other half draws adapters.
            init=lambda key: program.init(key)._replace(key=jax.random.split(key)[0]),
            params=lambda state: own.details["merge"](state.variables),
            trained=lambda state: state.params,
            export=lambda state, out, *, merged=False: save_adapted(out, own, state.variables, merged=merged),
        )


def _run(config: ColaStudy, plan: Plan | None, passes: int, task: Task) -> _Run:
    size, ragged = config.batch_size, isinstance(task.train.get("input_ids"), Ragged)
    if plan is None:
        columns = padded_columns(task.train, config.max_length, task.tokenizer.pad_id) if ragged else task.train
        loader = column_loader(columns, size)
        return _Run(config, task, loader, config.budget.steps(size, loader.epoch_steps))
    check_epochs(config)
    if not ragged:
        raise ValueError(f"{task.name} has no texts of different lengths, so its batches cannot be planned by them.")
    epochs = int(config.budget.amount) * passes
    return _Run(config, task, *planned_loader(functools.partial(plan, task), config.seeds, epochs, size))


def _lora(run: _Run, times: int = 1) -> Program:
    """LoRA of ``times`` the rank."""
    return run.program(lora_task(run.task, run.lora(times)), {"lora": run.adamw()})


def _materialised(run: _Run) -> Program:
    """LoRA whose kernels W + s a b are formed in every step: what factored adapters save."""
    own = lora_task(run.task, run.lora())
    merge, plain = own.details["merge"], run.task.loss
    loss = lambda variables, batch, key=None, *, train=True: plain(merge(variables), batch, key, train=train)
    return run.program(own._replace(loss=loss), {"lora": run.adamw()})


def _resets(run: _Run) -> Program:
    """LoRA whose optimizer restarts where a chain has its knots, and nothing else: no merge, no new adapters."""
    tx = run.adamw()
    reset = jax.jit(lambda opt, adapters: cola_reset(tx, opt, adapters)[0])

    def leave(variables: Any, opt: Any) -> tuple[Any, Any]:
        return variables, {**opt, "lora": reset(opt["lora"], variables["params"]["lora"])}

    knots = run.chain(run.config.rival_links).knots
    return run.program(lora_task(run.task, run.lora()), {"lora": tx}, knots, leave)


def _chain(
    run: _Run,
    links: int,
    tx: optax.GradientTransformation | None = None,
    *,
    schedule: str = "global",
    reset: Callable[..., Any] | None = None,
) -> Program:
    """COLA: ``links`` adapters one after another, as in the README: ``cola_init``, steps, ``cola_next``."""
    length = run.steps if schedule == "global" else -(-run.steps // links)
    tx = tx or run.adamw(run.falling(run.config.learning_rate, length))
    config = run.chain(links, schedule=schedule, keep_links=True)
    leave = next_link(cola_next(tx, config, reset))
    return run.program(cola_task(run.task, config), {"lora": tx}, config.knots, leave)


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
    config, tx = run.chain(run.config.rival_links), run.adamw()
    leave = next_link(plora_next(tx, config))
    return run.program(periodic_task(run.task, config), {"lora": tx}, config.knots, leave)


def _galore(run: _Run) -> Program:
    """GaLore on the kernels that the adapters would sit on, at the same rank."""
    config, rate = run.config, run.falling(run.config.galore_rate)
    tx = optax.contrib.galore(rate, config.rank, config.galore_every, weight_decay=config.weight_decay)
    return run.program(kernels_task(run.task, run.targets), {"kernels": tx})


def _full(run: _Run) -> Program:
    """All parameters, those of the head at the same rate."""
    tx = run.adamw(run.falling(run.config.full_rate))
    return run.program(full_task(run.task), {"params": tx, "head": tx})


def _head(run: _Run) -> Program:
    """The head alone, on frozen features."""
    return run.program(head_task(run.task), {})
