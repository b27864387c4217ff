"""Tasks of which a part is trained: adapters beside a frozen network, and chains of them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.tree import leaf_paths, leaves_at, select, with_leaves
from effjax.finetune.chain import cola_init, cola_merge, cola_params
from effjax.finetune.chain_config import ColaConfig, ColaState
from effjax.finetune.chain_links import cola_export, cola_links
from effjax.finetune.lora import Lora, Scales, lora_init, lora_merge, lora_params, lora_scales
from effjax.finetune.lora_config import LoraConfig
from effjax.finetune.lora_files import save_lora
from effjax.finetune.lora_linen import lora_apply
from effjax.models.convert import write_tensors
from effjax.models.decoder import Decoder
from effjax.models.pretrained import save_pretrained
from effjax.tasks.task import Batch, PyTree, Task, Variables

__all__ = ["cola_task", "lora_task"]

Network = Callable[[PyTree, Variables], PyTree]


def adapted_task(
    task: Task,
    split: Callable[[jax.Array, PyTree], tuple[PyTree, dict[str, PyTree]]],
    network: Network,
    merged: Network | None = None,
    adapters: Callable[[Variables], tuple[Lora, Scales]] | None = None,
) -> Task:
    """A task whose parameters are those that are trained; the rest of the network is the collection ``frozen``.

    A task with ``details["body"]`` puts a fresh head on a pretrained network. The head has no values to adapt: it is
    the part ``head`` of the parameters, trained whole.

    Args:
      task: on the plain network.
      split: ``(key, params) -> (frozen, trained)`` of the pretrained parameters, ``trained`` by part.
      network: ``(frozen, trained) -> params`` for the loss.
      merged: the same for ``infer`` and ``evaluate``, plain parameters, where ``network`` returns adapters for
        ``lora_apply``.
      adapters: ``variables -> (adapters, scales)``, all that was trained but for the head, against the pretrained
        parameters; None where what is trained are no adapters.

    Returns:
      A ``Task`` whose variables are ``{"params": {part: ...}, "frozen": ...}``; ``details["merge"]`` turns them into
      the variables of ``task``, jitted, and ``details["adapters"]`` is ``adapters``.
    """
    body = task.details.get("body")
    loss_of = task.loss if merged is None else lora_apply(task.loss)

    def whole(of: Network, variables: Variables) -> Variables:
        rest = {name: tree for name, tree in variables.items() if name not in ("params", "frozen")}
        trained = dict(variables["params"])
        head = trained.pop("head", {})
        return {**rest, "params": {**of(variables["frozen"], trained), **head}}

    def init(key: jax.Array) -> Variables:
        start, drawn = jax.random.split(key)
        variables = dict(task.init(start))
        params = dict(variables["params"])
        head = {name: params.pop(name) for name in tuple(params) if body not in (None, name)}
        frozen, trained = split(drawn, params)
        return {**variables, "params": {**trained, **({"head": head} if head else {})}, "frozen": frozen}

    def loss(variables: Variables, batch: Batch, key: jax.Array | None = None, *, train: bool = True) -> Any:
        return loss_of(whole(network, variables), batch, key, train=train)

    merge = jax.jit(lambda variables: whole(merged or network, variables))
    return task._replace(
        init=init,
        loss=loss,
        infer=lambda variables, inputs: task.infer(merge(variables), inputs),
        evaluate=lambda variables: task.evaluate(merge(variables)),
        details={**task.details, "merge": merge, "adapters": adapters},
    )


def lora_task(task: Task, config: LoraConfig) -> Task:
    """A task that trains LoRA's adapters, the part ``lora`` of the parameters.

    Args:
      task: on the plain network.
      config: the adapters.

    Returns:
      A ``Task``; see ``adapted_task``. ``frozen`` holds the network's parameters.

    Example:
      >>> from effjax.tasks.language import lm_task
      >>> task = lora_task(lm_task(length=16, train_rows=4, test_rows=4), LoraConfig("(query|value)/kernel"))
      >>> sorted(task.init(jax.random.key(0))["params"]["lora"])[0]
      'layer_0/attention/query/kernel'
    """
    scales = lambda trained: lora_scales(trained["lora"], config)
    return adapted_task(
        task,
        lambda key, params: (params, {"lora": lora_init(key, params, config)}),
        lambda base, trained: lora_params(base, trained["lora"], scales(trained)),
        lambda base, trained: lora_merge(base, trained["lora"], scales(trained)),
        lambda variables: (variables["params"]["lora"], scales(variables["params"])),
    )


def cola_task(task: Task, config: ColaConfig) -> Task:
    """A task that trains the present link of a chain, the part ``lora`` of the parameters.

    Between steps, at a knot, call ``next_link(cola_next(tx, config))``.

    Args:
      task: on the plain network.
      config: the chain.

    Returns:
      A ``Task``; see ``adapted_task``. ``frozen`` is a ``ColaState`` without its adapters; to be saved as one adapter
      the chain needs ``keep_links``.

    Example:
      >>> from effjax.tasks.language import lm_task
      >>> config = ColaConfig("(query|value)/kernel", knots=(10,))
      >>> task = cola_task(lm_task(length=16, train_rows=4, test_rows=4), config)
      >>> chain_of(task.init(jax.random.key(0))).link.item()
      0
    """

    def split(key: jax.Array, params: PyTree) -> tuple[ColaState, dict[str, PyTree]]:
        chain = cola_init(key, params, config)
        return chain._replace(lora={}), {"lora": chain.lora}

    return adapted_task(
        task,
        split,
        lambda frozen, trained: cola_params(frozen._replace(lora=trained["lora"]), config),
        lambda frozen, trained: cola_merge(frozen._replace(lora=trained["lora"]), config),
        lambda variables: (cola_export(cola_links(chain_of(variables), config)), 1.0),
    )


def chain_of(variables: Variables) -> ColaState:
    """The chain in the variables of a ``cola_task``."""
    return variables["frozen"]._replace(lora=variables["params"]["lora"])


def periodic_task(task: Task, config: ColaConfig) -> Task:
    """A task that trains the present link of periodic LoRA, the part ``lora`` of the parameters.

    Between steps, at a knot, call ``next_link(plora_next(tx, config))``.

    Args:
      task: on the plain network.
      config: the chain.

    Returns:
      A ``Task``; see ``cola_task``. The collection ``momentum`` is the running mean of the links, zero at the start. It
      is as large as the kernels, so what was trained is no adapter.

    Example:
      >>> from effjax.tasks.language import lm_task
      >>> config = ColaConfig("(query|value)/kernel", knots=(10,))
      >>> task = periodic_task(lm_task(length=16, train_rows=4, test_rows=4), config)
      >>> sorted(task.init(jax.random.key(0)))
      ['frozen', 'momentum', 'params']
    """
    chained = cola_task(task, config)
    without = lambda variables: {name: tree for name, tree in variables.items() if name != "momentum"}
    merge = chained.details["merge"]

    def init(key: jax.Array) -> Variables:
        variables = chained.init(key)
        kernels = leaves_at(variables["frozen"].base, variables["params"]["lora"])
        return {**variables, "momentum": {path: jnp.zeros(leaf.shape, jnp.float32) for path, leaf in kernels.items()}}

    return chained._replace(
        init=init,
        loss=lambda variables, *rest, **options: chained.loss(without(variables), *rest, **options),
        infer=lambda variables, inputs: chained.infer(without(variables), inputs),
        evaluate=lambda variables: chained.evaluate(without(variables)),
        details={**chained.details, "merge": lambda variables: merge(without(variables)), "adapters": None},
    )


def next_link(knot: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Variables, dict[str, PyTree]]]:
    """From one link to the next of a ``cola_task`` or a ``periodic_task``; a head keeps its state.

    Args:
      knot: of ``cola_next``, or of ``plora_next`` for a ``periodic_task``. It may donate its arguments.

    Returns:
      Function ``(variables, opt_state) -> (variables, opt_state)``, the latter as for ``by_part``, for ``with_knots``.
    """

    def leave(variables: Variables, opt: Mapping[str, PyTree]) -> tuple[Variables, dict[str, PyTree]]:
        names = [name for name in ("momentum",) if name in variables]
        chain, *others, lora = knot(chain_of(variables), *(variables[name] for name in names), opt["lora"])
        params = {**variables["params"], "lora": chain.lora}
        after = {"params": params, "frozen": chain._replace(lora={}), **dict(zip(names, others, strict=True))}
        return {**variables, **after}, {**opt, "lora": lora}

    return leave


def kernels_task(task: Task, pattern: str) -> Task:
    """A task that trains the leaves whose paths match a regular expression, the part ``kernels``, and nothing else.

    Args:
      task: on the plain network.
      pattern: on slash-joined paths.

    Returns:
      A ``Task``; see ``adapted_task``. The part has one entry per path.

    Raises:
      ValueError: at ``init``, a pattern that matches no leaf.
    """

    def split(key: jax.Array, params: PyTree) -> tuple[PyTree, dict[str, PyTree]]:
        chosen = jax.tree.leaves(select(params, [pattern], argument="targets").tree)
        kernels = leaves_at(params, [path for path, rule in zip(leaf_paths(params), chosen, strict=True) if rule >= 0])
        return with_leaves(params, dict.fromkeys(kernels)), {"kernels": kernels}

    return adapted_task(task, split, lambda frozen, trained: with_leaves(frozen, trained["kernels"]))


def full_task(task: Task) -> Task:
    """A task that trains all parameters, the part ``params``, and apart from them the head, if it has one."""
    split = lambda key, params: ({}, {"params": params})
    return adapted_task(task, split, lambda frozen, trained: trained["params"])


def head_task(task: Task) -> Task:
    """A task that trains the head alone, on frozen features."""
    if "body" not in task.details:
        raise ValueError(f"{task.name} has no head of its own, so nothing is left to train.")
    return adapted_task(task, lambda key, params: (params, {}), lambda frozen, trained: frozen)


def save_adapted(folder: Path, task: Task, variables: Variables, *, merged: bool = False) -> None:
    """Write what an adapted task trained: ``save_adapters``, or with ``merged`` ``save_merged``.

    Args:
      folder: made, or replaced.
      task: of ``adapted_task``.
      variables: of it.
      merged: write the whole network.

    Raises:
      ValueError: what was trained are no adapters, or the task has no pretrained network to be merged into.
    """
    head = variables["params"].get("head")
    if merged:
        save_merged(folder, task, task.details["merge"](variables)["params"], head)
    elif task.details["adapters"] is None:
        raise ValueError(f"--out {folder}: this arm has no adapters. Add --merged, or export NAME.safetensors.")
    else:
        lora, scales = task.details["adapters"](variables)
        save_adapters(folder, task, lora, scales, head)


def save_adapters(folder: Path, task: Task, lora: PyTree, scales: Any, head: PyTree | None = None) -> None:
    """Write adapters as a PEFT folder, a trained head beside them as ``head.safetensors``.

    Args:
      folder: made, or replaced.
      task: on the plain network; module names and the base model are those of ``task.pretrained``.
      lora: adapters of its pretrained part.
      scales: of ``lora_scales``.
      head: parameters of the head.
    """
    source = task.pretrained
    if source is None:
        save_lora(folder, lora, scales, lambda path, layer: path.removesuffix("/kernel").replace("/", "."))
    else:
        kind = "CAUSAL_LM" if isinstance(source.module, Decoder) else "FEATURE_EXTRACTION"
        save_lora(folder, lora, scales, source.module_name, base_model=source.folder.name, task_type=kind)
    _save_head(folder, head)


def save_merged(folder: Path, task: Task, params: PyTree, head: PyTree | None = None) -> None:
    """Write the plain network in Hugging Face's layout, a trained head beside it as ``head.safetensors``.

    Args:
      folder: made if it is not there.
      task: on the plain network.
      params: of it.
      head: parameters of the head.

    Raises:
      ValueError: the task has no pretrained network.
    """
    if task.pretrained is None:
        raise ValueError(f"--merged: {task.name} has no layout of Hugging Face. Export NAME.safetensors instead.")
    body = task.details.get("body")
    save_pretrained(folder, task.pretrained, params if body is None else params[body])
    _save_head(folder, head)


def _save_head(folder: Path, head: PyTree | None) -> None:
    if head:
        tensors = zip(leaf_paths(head), jax.tree.leaves(head), strict=True)
        write_tensors(folder / "head.safetensors", {name: np.asarray(leaf) for name, leaf in tensors})
