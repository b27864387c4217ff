"""The arms of the COLA study as Programs: how each splits a network into a frozen and a trained part."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.core.tree import leaf_paths, path_name, select
from effjax.data.pipeline import ResumableIterator
from effjax.finetune.cola import (
    ColaConfig,
    ColaState,
    cola_export,
    cola_extend,
    cola_init,
    cola_knot,
    cola_links,
    cola_merge,
    cola_params,
)
from effjax.finetune.lora import (
    Lora,
    LoraConfig,
    LoraRule,
    Scales,
    lora_apply,
    lora_init,
    lora_merge,
    lora_params,
    lora_scales,
)
from effjax.finetune.lora_files import save_lora
from effjax.finetune.restart import cola_reset
from effjax.finetune.rivals import plora_unload, rac_lora, relora_reset, relora_schedule
from effjax.models.convert import write_tensors
from effjax.optim.scale_by_batch_size import scale_by_batch_size
from effjax.recipes.cola_tasks import Adaptation
from effjax.train.grad import accumulated
from effjax.train.program import BatchShape, Program

PyTree = Any


class Settings(NamedTuple):
    """What the arms of a task share; see the fields of ``ColaStudy``."""

    rank: int
    scale: float
    rate: float
    full_rate: float
    rac_rate: float
    galore_rate: float
    galore_every: int
    weight_decay: float
    targets: str | None
    batch_size: int
    accumulate: int


class Run(NamedTuple):
    """The batches of an arm.

    Attributes:
      steps: of one run.
      batches: ``seed -> iterator``.
      shapes: of the batches, where they are several; see ``Program``.
    """

    steps: int
    batches: Callable[[int], ResumableIterator]
    shapes: Sequence[BatchShape] | None = None


class Way(NamedTuple):
    """What an arm trains. ``frozen`` and ``trained`` are trees; ``trained`` and the optimizers are by part.

    Attributes:
      split: ``(key, params) -> (frozen, trained)`` of the pretrained layers.
      forward: ``(frozen, trained) -> params`` for the loss; with adapters, for ``lora_apply``.
      merged: ``(frozen, trained) -> params`` of the plain network.
      optimizers: part -> optimizer.
      adapters: whether ``forward`` returns factored adapters.
      between: ``(step, frozen, trained, optimizer states) -> the last three``, or None where nothing is to be done.
      export: ``(frozen, trained) -> (adapters, scales)`` against the pretrained network; None where there are none.
    """

    split: Callable[[jax.Array, PyTree], tuple[PyTree, dict[str, PyTree]]]
    forward: Callable[[PyTree, Mapping[str, PyTree]], PyTree]
    merged: Callable[[PyTree, Mapping[str, PyTree]], PyTree]
    optimizers: Mapping[str, optax.GradientTransformation]
    adapters: bool = False
    between: Callable[[int, PyTree, PyTree, PyTree], tuple[PyTree, PyTree, PyTree] | None] | None = None
    export: Callable[[PyTree, Mapping[str, PyTree]], tuple[Lora, Scales]] | None = None


class Ground(NamedTuple):
    """What a way is made for."""

    task: Adaptation
    settings: Settings
    steps: int
    scaled: bool

    def optimizer(self, rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        """AdamW; where batches differ in size, its updates scale with the square root of their examples."""
        return optax.chain(
            optax.scale_by_adam(),
            optax.add_decayed_weights(self.settings.weight_decay),
            *([scale_by_batch_size(base=self.settings.batch_size)] if self.scaled else []),
            optax.scale_by_learning_rate(rate),
        )

    def falling(self, peak: float, steps: int | None = None) -> optax.Schedule:
        """From ``peak`` linearly to zero, over the run or ``steps``."""
        return optax.linear_schedule(peak, 0.0, steps or self.steps)

    def lora(self, links: int = 1) -> LoraConfig:
        """Adapters of ``links`` times the study's rank; alpha / rank stays."""
        rank = links * self.settings.rank
        return LoraConfig(LoraRule(self.settings.targets or self.task.targets, rank, self.settings.scale * rank))

    def knots(self, links: int) -> tuple[int, ...]:
        """Equal links over the run."""
        return tuple(round(link * self.steps / links) for link in range(1, links))


def program(task: Adaptation, settings: Settings, run: Run, way: Callable[[Ground], Way]) -> Program:
    """A Program that trains ``task`` in one way."""
    own = way(Ground(task, settings, run.steps, run.shapes is not None))
    optimizers = dict(own.optimizers)
    if task.head:
        # The head has no pretrained values to add a link to: it trains beside the chain, with no restarts.
        ground = Ground(task, settings, run.steps, run.shapes is not None)
        rate = settings.rate if "params" not in optimizers else settings.full_rate
        optimizers["head"] = ground.optimizer(ground.falling(rate))
    optimizers = {part: optax.with_extra_args_support(tx) for part, tx in optimizers.items()}
    loss_of = lora_apply(task.loss) if own.adapters else task.loss

    def init(key: jax.Array) -> PyTree:
        start, adapters = jax.random.split(key)
        params = dict(task.init(start))
        head = {name: params.pop(name) for name in task.head}
        frozen, trained = own.split(adapters, params)
        trained = {**trained, **({"head": head} if head else {})}
        opt = {part: tx.init(trained[part]) for part, tx in optimizers.items()}
        return {
            "frozen": frozen,
            "trained": trained,
            "opt": opt,
            "key": jax.random.key_data(start),
            "step": jnp.int32(0),
        }

    def assemble(network: Callable[..., PyTree], frozen: PyTree, trained: Mapping[str, PyTree]) -> PyTree:
        return {"params": {**network(frozen, trained), **trained.get("head", {})}}

    def loss(trained: PyTree, batch: PyTree, frozen: PyTree, key: jax.Array) -> tuple[jax.Array, None]:
        return loss_of(assemble(own.forward, frozen, trained), batch, key)[0], None

    def step(state: PyTree, batch: PyTree, aux: None) -> tuple[PyTree, dict[str, jax.Array]]:
        trained, opt = {}, {}
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
        value_and_grad = accumulated(loss, settings.accumulate)
        (value, _), grads = value_and_grad(state["trained"], batch, state["frozen"], key)
        extra = {"batch_size": batch["weight"].sum()} if "weight" in batch else {}
        for part, tx in optimizers.items():
            updates, opt[part] = tx.update(grads[part], state["opt"][part], state["trained"][part], **extra)
            trained[part] = optax.apply_updates(state["trained"][part], updates)
        return {**state, "trained": trained, "opt": opt, "step": state["step"] + 1}, {"loss": value}

    merged = jax.jit(lambda frozen, trained: assemble(own.merged, frozen, trained))
    params = lambda state: merged(state["frozen"], state["trained"])

    def between(state: PyTree, done: int) -> PyTree:
        moved = own.between(done, state["frozen"], state["trained"], state["opt"])
        return state if moved is None else {**state, **dict(zip(("frozen", "trained", "opt"), moved, strict=True))}

    return Program(
        init=init,
        step=step,
        batches=run.batches,
        evaluate=lambda state: task.evaluate(params(state)),
        infer=task.infer,
        params=params,
        trained=lambda state: state["trained"],
        example_inputs=task.example_inputs,
        total_steps=run.steps,
        batch_size=settings.batch_size,
        source=f"{task.name}: {task.source}",
        compiles=1 if run.shapes is None else len(run.shapes),
        shapes=None if run.shapes is None else lambda: run.shapes,
        between=between if own.between else None,
        folder=functools.partial(_folder, task, own, params),
        train_metrics=lambda means: {"train_loss": means["loss"]},
    )


def lora(ground: Ground, links: int = 1) -> Way:
    """LoRA of ``links`` times the rank."""
    return _lora(ground, links, ground.optimizer(ground.falling(ground.settings.rate)))


def materialised(ground: Ground) -> Way:
    """LoRA whose kernels W + s a b are formed in every step: what factored adapters save."""
    way = lora(ground)
    return way._replace(forward=way.merged, adapters=False)


def resets(ground: Ground, links: int) -> Way:
    """LoRA whose optimizer restarts where a chain has its knots, and nothing else: no merge, no new adapters."""
    tx = ground.optimizer(ground.falling(ground.settings.rate))
    knots = ground.knots(links)
    reset = jax.jit(lambda opt, adapters: cola_reset(tx, opt, adapters)[0])

    def between(step: int, frozen: PyTree, trained: PyTree, opt: PyTree) -> tuple[PyTree, PyTree, PyTree] | None:
        if step not in knots:
            return None
        return frozen, trained, {**opt, "lora": reset(opt["lora"], trained["lora"])}

    return _lora(ground, 1, tx)._replace(between=between)


def chain(ground: Ground, links: int, *, schedule: str = "global") -> Way:
    """COLA: ``links`` adapters one after another."""
    peak, steps = ground.settings.rate, ground.steps
    falling = ground.falling(peak, steps if schedule == "global" else -(-steps // links))
    return _chain(ground, links, ground.optimizer(falling), schedule=schedule)


def relora(ground: Ground, links: int) -> Way:
    """ReLoRA: a jagged cosine, and all but a thousandth of the moments pruned at a knot.

    Of its two prunings the random one: by magnitude, a moment may survive where its square does not, and Adam leaps.
    """
    length = max(1, ground.steps // links)
    warm = {name: min(100, length // 3) for name in ("first_warmup_steps", "restart_warmup_steps")}
    schedule = relora_schedule(ground.settings.rate, ground.steps, length, **warm)
    reset = functools.partial(relora_reset, prune="random", ratio=0.999)
    return _chain(ground, links, ground.optimizer(schedule), reset=reset)


def rac(ground: Ground, links: int) -> Way:
    """RAC-LoRA: a random sketch ``a`` stays frozen for its link, ``b`` is trained."""
    return _chain(ground, links, rac_lora(ground.optimizer(ground.falling(ground.settings.rac_rate))))


def periodic(ground: Ground, links: int) -> Way:
    """Periodic LoRA: a knot unloads a running mean of the links."""
    tx = ground.optimizer(ground.falling(ground.settings.rate))
    config = ColaConfig(ground.lora(), knots=ground.knots(links))
    own = _chain(ground, links, tx)
    scales = lambda adapters: lora_scales(adapters, config.lora)

    def split(key: jax.Array, params: PyTree) -> tuple[PyTree, dict[str, PyTree]]:
        state = cola_init(key, params, config)
        momentum = {path: jnp.zeros(leaf.shape, jnp.float32) for path, leaf in _kernels(params, state.lora).items()}
        return (state._replace(lora=None), momentum), {"lora": state.lora}

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def knot(frozen: PyTree, adapters: Lora, opt: PyTree) -> tuple[PyTree, Lora, PyTree]:
        state, momentum = frozen
        base, momentum = plora_unload(state.base, momentum, adapters, scales(adapters))
        empty = jax.tree.map(jnp.zeros_like, adapters)
        state = cola_extend(state._replace(base=base, lora=empty), config)
        return (state._replace(lora=None), momentum), state.lora, cola_reset(tx, opt, state.lora)[0]

    def between(step: int, frozen: PyTree, trained: PyTree, opt: PyTree) -> tuple[PyTree, PyTree, PyTree] | None:
        if step not in config.knots:
            return None
        frozen, adapters, restarted = knot(frozen, trained["lora"], opt["lora"])
        return frozen, {**trained, "lora": adapters}, {**opt, "lora": restarted}

    return own._replace(
        split=split,
        forward=lambda frozen, trained: own.forward(frozen[0], trained),
        merged=lambda frozen, trained: own.merged(frozen[0], trained),
        between=between,
        export=None,
    )


def galore(ground: Ground) -> Way:
    """GaLore on the kernels that the adapters would sit on, at the same rank."""
    settings = ground.settings
    pattern = settings.targets or ground.task.targets
    tx = optax.contrib.galore(
        ground.falling(settings.galore_rate),
        settings.rank,
        settings.galore_every,
        weight_decay=settings.weight_decay,
    )

    def split(key: jax.Array, params: PyTree) -> tuple[PyTree, dict[str, PyTree]]:
        chosen = jax.tree.leaves(select(params, [pattern], argument="targets").tree)
        paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        targets = {path for path, rule in zip(paths, chosen, strict=True) if rule >= 0}
        kernels = _kernels(params, targets)
        return _with_kernels(params, dict.fromkeys(kernels)), {"kernels": kernels}

    network = lambda frozen, trained: _with_kernels(frozen, trained["kernels"])
    return Way(split, network, network, {"kernels": tx})


def full(ground: Ground) -> Way:
    """All parameters."""
    network = lambda frozen, trained: trained["params"]
    tx = ground.optimizer(ground.falling(ground.settings.full_rate))
    return Way(lambda key, params: ({}, {"params": params}), network, network, {"params": tx})


def head(ground: Ground) -> Way:
    """The head alone, on frozen features."""
    network = lambda frozen, trained: frozen
    return Way(lambda key, params: (params, {}), network, network, {})


def _lora(ground: Ground, links: int, tx: optax.GradientTransformation) -> Way:
    config = ground.lora(links)
    scales = lambda trained: lora_scales(trained["lora"], config)
    return Way(
        split=lambda key, params: (params, {"lora": lora_init(key, params, config)}),
        forward=lambda base, trained: lora_params(base, trained["lora"], scales(trained)),
        merged=lambda base, trained: lora_merge(base, trained["lora"], scales(trained)),
        optimizers={"lora": tx},
        adapters=True,
        export=lambda base, trained: (trained["lora"], scales(trained)),
    )


def _chain(
    ground: Ground,
    links: int,
    tx: optax.GradientTransformation,
    *,
    schedule: str = "global",
    reset: Callable[..., PyTree] | None = None,
) -> Way:
    config = ColaConfig(ground.lora(), knots=ground.knots(links), schedule=schedule, keep_links=True)
    knot = cola_knot(tx, config, reset)
    whole = lambda frozen, trained: frozen._replace(lora=trained["lora"])

    def split(key: jax.Array, params: PyTree) -> tuple[ColaState, dict[str, PyTree]]:
        state = cola_init(key, params, config)
        return state._replace(lora=None), {"lora": state.lora}

    def between(step: int, frozen: ColaState, trained: PyTree, opt: PyTree) -> tuple[PyTree, PyTree, PyTree] | None:
        if step not in config.knots:
            return None
        state, restarted = knot(whole(frozen, trained), opt["lora"])
        return state._replace(lora=None), {**trained, "lora": state.lora}, {**opt, "lora": restarted}

    return Way(
        split=split,
        forward=lambda frozen, trained: cola_params(whole(frozen, trained), config),
        merged=lambda frozen, trained: cola_merge(whole(frozen, trained), config),
        optimizers={"lora": tx},
        adapters=True,
        between=between,
        export=lambda frozen, trained: (cola_export(cola_links(whole(frozen, trained), config)), 1.0),
    )


def _folder(
    task: Adaptation, own: Way, params: Callable[[PyTree], PyTree], state: PyTree, out: Path, *, merged: bool = False
) -> None:
    """``Program.folder``: a PEFT adapter, or the merged network in Hugging Face's layout; a head lies beside it."""
    if merged:
        if task.save is None:
            raise ValueError(f"--merged: {task.name} has no layout of Hugging Face. Export NAME.safetensors instead.")
        task.save(out, params(state)["params"])
    elif own.export is None:
        raise ValueError(f"--out {out}: this arm has no adapters. Add --merged, or export NAME.safetensors.")
    else:
        adapters, scales = own.export(state["frozen"], state["trained"])
        save_lora(out, adapters, scales, task.names, base_model=task.base_model, task_type=task.task_type)
    head = state["trained"].get("head")
    if head:
        tensors = zip(leaf_paths(head), jax.tree.leaves(head), strict=True)
        write_tensors(out / "head.safetensors", {name: np.asarray(leaf) for name, leaf in tensors})


def _kernels(params: PyTree, paths: Any) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {path_name(path): leaf for path, leaf in leaves if path_name(path) in paths}


def _with_kernels(params: PyTree, kernels: Mapping[str, Any]) -> PyTree:
    fill = lambda path, leaf: kernels.get(path_name(path), leaf)
    return jax.tree_util.tree_map_with_path(fill, params, is_leaf=lambda leaf: leaf is None)
