"""Hybrid models: a small base model that asks a large expert only where that pays (Kag et al. 2023, ICLR)."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int, PyTree

from effjax.core.errors import check_choice, check_shape
from effjax.hardness.cascades import Asking, with_query
from effjax.hardness.hybrid_config import (
    HybridBatch,
    HybridConfig,
    HybridExamples,
    HybridModel,
    HybridNetworks,
    HybridParts,
    HybridState,
    Stage,
)
from effjax.hardness.hybrid_losses import (
    coverage_penalty,
    hybrid_weights,
    router_loss,
    weighted_cross_entropy,
)
from effjax.hardness.query_rules import query_threshold
from effjax.hardness.router import as_need, router_need

__all__ = [
    "hybrid",
    "hybrid_batch",
    "hybrid_data",
    "hybrid_examples",
    "hybrid_init",
    "hybrid_next",
    "hybrid_stages",
    "hybrid_step",
]


def hybrid(
    key: jax.Array,
    networks: HybridNetworks,
    params: tuple[PyTree, PyTree],
    inputs: PyTree,
    labels: Int[Array | np.ndarray, "rows"],
    *,
    calibration: tuple[PyTree, Int[Array | np.ndarray, "others"]],
    config: HybridConfig | None = None,
    train: tuple[PyTree, Int[Array | np.ndarray, "more"]] | None = None,
) -> HybridModel:
    r"""Train a router between a base model and an expert, and fit its threshold. The loop runs on the host.

    .. math:: \min_r \; \mathrm{BCE}(r(x), o(x)), \qquad o(x) = 1\{ b(x) \neq y, \; g(x) = y \}

    and with ``config.rounds`` after it, again and again: the base model by cross-entropy with the weights 2 - r, the
    expert with 1 + r, and the router on the oracle of the new models.

    Args:
      key: of the router's parameters and the order of the data.
      networks: base, expert and router.
      params: of base and expert, trained already.
      inputs: an array or a tree of arrays, the batch axis leading: data that neither model was fitted on. On its own
        training data the expert is nearly always right and the base too good, and the oracle is wrong.
      labels: classes; -1 for unknown, which counts nowhere.
      calibration: inputs and labels of other rows, on which the threshold is fitted.
      config: of training.
      train: inputs and labels of the base and expert stages; needed where ``config.rounds`` is above 0.

    Returns:
      A ``HybridModel``; ``hybrid_stages`` makes of it what the dispatchers serve.

    Raises:
      ValueError: arrays of other lengths, no rows, too few rows for the coverage, or a missing ``train``.

    Example:
      >>> from effjax.hardness.router import Router
      >>> x = jnp.linspace(-1, 1, 64)[:, None]
      >>> labels = (x[:, 0] > 0).astype(int)
      >>> blind = lambda params, x, *, key=None: (jnp.stack([0 * x[:, 0], x[:, 0] - 0.5], 1), x)
      >>> sees = lambda params, x, *, key=None: jnp.stack([0 * x[:, 0], x[:, 0]], 1)
      >>> networks = HybridNetworks(blind, sees, Router((8,), (8,)))
      >>> config = HybridConfig(coverage=0.5, epochs=2)
      >>> odd, even = (x[1::2], labels[1::2]), (x[::2], labels[::2])
      >>> found = hybrid(jax.random.key(0), networks, (None, None), *odd, calibration=even, config=config)
      >>> found.threshold.rows, found.threshold.coverage
      (32, 0.5)

    Kag, Fedorov, Gangrade, Whatmough, Saligrama, "Efficient Edge Inference by Selective Query", ICLR 2023. Their code
    trains everything in one loss on the training data, with the opposite sign of r and a penalty on raw logits; here
    the router learns from held-out data, and its threshold is an exact quantile of other rows.
    """
    config = HybridConfig() if config is None else config
    if config.rounds and train is None:
        raise ValueError(f"rounds={config.rounds} trains base and expert: give train=(inputs, labels). Or rounds=0.")
    look = functools.partial(hybrid_examples, networks=networks, batch_size=config.batch_size)
    state, held = hybrid_init(key, networks, params, inputs, config=config), None
    for stage in config.stages:
        data = hybrid_data(state, networks, (inputs, labels), train, config=config, stage=stage)
        for _ in range(config.steps(stage, _length(data))):
            state, _ = _step(state, data, networks, config=config, stage=stage)
        held = look(state, *calibration)
        state = hybrid_next(state, held, networks, config=config, stage=stage)
    assert held is not None  # there is a stage
    need = _need(networks, state.params.router, held)
    held = held._replace(request=~(need <= np.asarray(state.threshold)))
    return HybridModel(state, query_threshold(need, config.coverage, known=held.known), held)


def hybrid_data(
    state: HybridState,
    networks: HybridNetworks,
    held_out: tuple[PyTree, Any],
    train: tuple[PyTree, Any] | None,
    *,
    config: HybridConfig,
    stage: Stage = "router",
) -> HybridExamples | HybridBatch:
    """All that a stage learns from, by the models that it starts with; on the host.

    Args:
      state: when the stage begins.
      networks: base, expert and router.
      held_out: inputs and labels of the router's stages.
      train: inputs and labels of the others.
      config: of training.
      stage: that begins.

    Returns:
      ``HybridExamples`` in a router stage, otherwise a ``HybridBatch`` of all rows.

    Raises:
      ValueError: no rows.
    """
    check_choice("stage", stage, ("router", "base", "expert"))
    look = functools.partial(hybrid_examples, networks=networks, batch_size=config.batch_size)
    if stage == "router":
        found: Any = look(state, *held_out)
    else:
        if train is None:
            raise ValueError(f"stage={stage!r} needs train=(inputs, labels).")
        nothing = np.zeros(len(train[1]), bool)  # the expert is not run for what nobody reads
        asks = look(state, *train, expert_correct=nothing).request
        found = HybridBatch(train[0], np.asarray(train[1], np.int32), asks)
    if not _length(found):
        raise ValueError(f"stage={stage!r} has no rows to learn from. Give some.")
    return jax.tree.map(jnp.asarray, found)


def hybrid_batch(
    state: HybridState, data: HybridExamples | HybridBatch, *, config: HybridConfig
) -> HybridExamples | HybridBatch:
    """The rows of one step, in an order drawn anew in each pass; traceable.

    Args:
      state: its key and count say which rows.
      data: of ``hybrid_data``.
      config: for ``batch_size``.

    Returns:
      ``batch_size`` rows, or all where there are fewer. The last batch of a pass is filled up with rows that do not
      count.
    """
    rows = _length(data)
    size = min(config.batch_size, rows)
    passes = -(-rows // size)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), 1)
    order = jax.random.permutation(jax.random.fold_in(key, state.count // passes), rows)
    places = state.count % passes * size + jnp.arange(size)
    meant = places < rows
    batch = jax.tree.map(lambda leaf: leaf[order[places % rows]], data)
    if isinstance(batch, HybridExamples):
        return batch._replace(known=batch.known & meant)
    return batch._replace(labels=jnp.where(meant, batch.labels, -1))


def hybrid_init(
    key: jax.Array,
    networks: HybridNetworks,
    params: tuple[PyTree, PyTree],
    inputs: PyTree,
    *,
    config: HybridConfig,
) -> HybridState:
    """The state before the first step.

    Args:
      key: of the router's parameters and of dropout.
      networks: base, expert and router.
      params: of base and expert.
      inputs: a batch, of which only the shapes matter.
      config: of training.

    Returns:
      A ``HybridState``; its threshold is infinite: nobody asks.
    """
    drawn, kept = jax.random.split(key)
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *jnp.shape(leaf)[1:]), jnp.result_type(leaf)), inputs)
    logits, features = jax.eval_shape(lambda p, x: _pair(networks.base(p, x)), params[0], one)
    zeros = lambda leaf: np.zeros(leaf.shape, np.float32)
    router = _router(networks.router, drawn, zeros(logits), jax.tree.map(zeros, features))
    expert_opt = None if config.expert_tx is None else config.expert_tx.init(params[1])
    return HybridState(
        key=jax.random.key_data(kept),
        count=jnp.zeros((), jnp.int32),
        params=HybridParts(*params, router),
        opt=HybridParts(config.base_tx.init(params[0]), expert_opt, config.router_tx.init(router["params"])),
        dual=jnp.zeros((), jnp.float32),
        threshold=jnp.full((), jnp.inf, jnp.float32),
    )


def hybrid_step(
    state: HybridState,
    batch: HybridExamples | HybridBatch,
    networks: HybridNetworks,
    *,
    config: HybridConfig,
    stage: Stage = "router",
) -> tuple[HybridState, Mapping[str, jax.Array]]:
    """One step of a stage; traceable. What the stage does not train keeps its bits.

    Args:
      state: of ``hybrid_init``.
      batch: rows of ``HybridExamples`` in a router stage, a ``HybridBatch`` otherwise.
      networks: base, expert and router.
      config: of training.
      stage: ``'router'``, ``'base'`` or ``'expert'``; static.

    Returns:
      The next state, and metrics: ``loss``; of a router stage ``keep``, the mean probability of keeping, and ``dual``.

    Raises:
      ValueError: an unknown stage, or ``'expert'`` without ``config.expert_tx``.
    """
    check_choice("stage", stage, ("router", "base", "expert"))
    count = state.count + 1
    if stage == "router":
        if not isinstance(batch, HybridExamples):
            raise TypeError(f"batch is a {type(batch).__name__}, but stage='router' learns from HybridExamples.")
        return _router_step(state._replace(count=count), batch, networks, config)
    if not isinstance(batch, HybridBatch):
        raise TypeError(f"batch is a {type(batch).__name__}, but stage={stage!r} learns from a HybridBatch.")
    tx = getattr(config, f"{stage}_tx")
    if tx is None:
        raise ValueError("stage='expert' trains the expert, but expert_tx=None leaves it as it is. Give an optimizer.")
    key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(state.key), 0), state.count)
    weights = hybrid_weights(batch.request)[0 if stage == "base" else 1]

    def loss(params: PyTree) -> jax.Array:
        logits, _ = _pair(getattr(networks, stage)(params, batch.inputs, key=key))
        return weighted_cross_entropy(logits, batch.labels, weights)

    own = getattr(state.params, stage)
    value, grads = jax.value_and_grad(loss)(own)
    updates, opt = tx.update(grads, getattr(state.opt, stage), own)
    return state._replace(
        count=count,
        params=state.params._replace(**{stage: optax.apply_updates(own, updates)}),
        opt=state.opt._replace(**{stage: opt}),
    ), {"loss": value}


def hybrid_next(
    state: HybridState,
    examples: HybridExamples,
    networks: HybridNetworks,
    *,
    config: HybridConfig,
    stage: Stage = "router",
) -> HybridState:
    """From one stage to the next, on the host: after a router stage its threshold is fitted and its optimizer restarts.

    Args:
      state: after the stage's last step.
      examples: calibration rows, which the router did not learn from.
      networks: base, expert and router.
      config: of training.
      stage: that is over.

    Returns:
      The state that the next stage starts from.

    Raises:
      ValueError: an unknown stage.
    """
    check_choice("stage", stage, ("router", "base", "expert"))
    next_key = jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(state.key), 2))
    state = state._replace(key=next_key, count=jnp.zeros_like(state.count))
    if stage != "router":
        return state
    need = _need(networks, state.params.router, examples)
    fitted = query_threshold(need, config.coverage, known=np.asarray(examples.known))
    opt = state.opt._replace(router=config.router_tx.init(state.params.router["params"]))
    return state._replace(opt=opt, threshold=jnp.asarray(fitted.value, jnp.float32))


def hybrid_examples(
    state: HybridState,
    inputs: PyTree,
    labels: Int[Array | np.ndarray, "rows"],
    networks: HybridNetworks,
    *,
    expert_correct: Bool[Array | np.ndarray, "rows"] | None = None,
    batch_size: int = 256,
) -> HybridExamples:
    """What the router reads and should say of each row, by the models of the state; on the host.

    Args:
      state: of ``hybrid_init``, or later.
      inputs: an array or a tree of arrays, the batch axis leading.
      labels: classes; -1 for unknown.
      networks: base, expert and router.
      expert_correct: where the expert is right, if known: then it is not run.
      batch_size: rows run at once; the last batch is padded.

    Returns:
      ``HybridExamples`` of NumPy arrays.

    Raises:
      ValueError: arrays of other lengths, labels that are no class of the logits, or an expert that is neither given
        nor known.
    """
    labels = _checked_labels(labels)
    rows = len(labels)
    for path, leaf in jax.tree_util.tree_leaves_with_path(inputs):
        if jnp.shape(leaf)[:1] != (rows,):
            where = f"inputs{jax.tree_util.keystr(path)}"
            raise ValueError(f"{where} has shape {jnp.shape(leaf)}, but there are {rows} labels.")
    if expert_correct is None and networks.expert is None:
        raise ValueError("expert_correct=None, and networks.expert is None: give one of the two.")
    if expert_correct is not None:
        check_shape("expert_correct", expert_correct, (rows,), "One for each row.")
    found, inputs = [], jax.tree.map(np.asarray, inputs)
    size = max(1, min(batch_size, rows))
    run_expert = expert_correct is None
    for start in range(0, max(rows, 1), size):  # without rows once, for the shapes
        places = np.minimum(np.arange(start, start + size), max(rows - 1, 0)) if rows else np.zeros(0, int)
        part = jax.tree.map(lambda leaf, at=places: leaf[at], inputs)
        seen = _look(networks, run_expert, state.params, state.threshold, part)
        found.append(jax.tree.map(lambda leaf, n=rows - start: np.asarray(leaf)[:n], seen))
    logits, features, base, expert, request = jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)
    if rows and labels.max() >= logits.shape[1]:
        raise ValueError(f"labels go up to {labels.max()}, but the base model has {logits.shape[1]} classes.")
    known = labels >= 0
    right = (expert == labels) & known if expert_correct is None else np.asarray(expert_correct, bool)
    return HybridExamples(logits, features, (base == labels) & known, right, known, request)


def hybrid_stages(networks: HybridNetworks, state: HybridState) -> tuple[list[Callable[..., Any]], list[PyTree]]:
    """Base and expert as the dispatchers take them.

    Args:
      networks: base, expert and router.
      state: trained.

    Returns:
      The stages and their parameters: for ``HostDispatch``, ``cascade``, or by hand:
      ``outputs, request = stages[0](params[0], inputs)``, then ``dispatch_capacity(stages[1], params[1], ...)``.
    """
    base = with_query(networks.base, router_need(networks.router))
    stages = [base] if networks.expert is None else [base, networks.expert]
    asking = Asking(state.params.base, state.threshold, state.params.router)
    return stages, [asking, state.params.expert][: len(stages)]


def _router_step(
    state: HybridState, batch: HybridExamples, networks: HybridNetworks, config: HybridConfig
) -> tuple[HybridState, Mapping[str, jax.Array]]:
    variables = dict(state.params.router)
    params = variables.pop("params")
    known = jnp.asarray(batch.known)

    def loss(params: PyTree) -> tuple[jax.Array, Any]:
        found, moved = networks.router.apply(
            {"params": params, **variables}, batch.logits, batch.features, train=True, mutable=list(variables)
        )
        if config.objective == "gain":
            if found.ndim != 2:
                raise ValueError("objective='gain' needs Router(outputs=2): who is right, base and expert.")
            value = router_loss(found[:, 0], batch.base_correct, known)
            value += router_loss(found[:, 1], batch.expert_correct, known)
            return value, (moved, jnp.mean(as_need(found) <= 0))
        if found.ndim != 1:
            raise ValueError("objective='query' needs Router(outputs=1): whether to ask. Or take objective='gain'.")
        rows = known.astype(jnp.float32)
        keep = jnp.sum(rows * jax.nn.sigmoid(-found)) / jnp.maximum(jnp.sum(rows), 1)
        value = router_loss(found, batch.oracle, known)
        if config.constraint == "penalty":
            value += config.strength * coverage_penalty(found, config.coverage, weights=known)
        elif config.constraint == "dual":
            value += state.dual * (config.coverage - keep)
        return value, (moved, keep)

    (value, (moved, keep)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, opt = config.router_tx.update(grads, state.opt.router, params)
    dual = state.dual
    if config.constraint == "dual":
        dual = jnp.maximum(0.0, dual + config.dual_rate * (config.coverage - keep)).astype(jnp.float32)
    router = {"params": optax.apply_updates(params, updates), **moved}
    state = state._replace(params=state.params._replace(router=router), opt=state.opt._replace(router=opt), dual=dual)
    return state, {"loss": value, "keep": keep, "dual": dual}


@functools.partial(jax.jit, static_argnums=0)
def _router(router: nn.Module, key: jax.Array, logits: jax.Array, features: PyTree) -> PyTree:
    return router.init(key, logits, features)


@functools.partial(jax.jit, static_argnames=("networks", "config", "stage"))
def _step(
    state: HybridState, data: Any, networks: HybridNetworks, *, config: HybridConfig, stage: Stage
) -> tuple[HybridState, Mapping[str, jax.Array]]:
    # Nothing is donated: the models' parameters are the caller's.
    return hybrid_step(state, hybrid_batch(state, data, config=config), networks, config=config, stage=stage)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _look(
    networks: HybridNetworks, run_expert: bool, params: HybridParts, threshold: jax.Array, inputs: PyTree
) -> tuple[Any, ...]:
    logits, features = _pair(networks.base(params.base, inputs))
    logits = jnp.asarray(logits, jnp.float32)  # classes of bfloat16 logits tie, which turns the oracle
    need = router_need(networks.router)(params.router, logits, features)
    base = jnp.argmax(logits, axis=1)
    expert = base
    if run_expert and networks.expert is not None:
        expert = jnp.argmax(jnp.asarray(_pair(networks.expert(params.expert, inputs))[0], jnp.float32), axis=1)
    return logits, features, base, expert, ~(need <= threshold)


@functools.partial(jax.jit, static_argnums=0)
def _needs(networks: HybridNetworks, router: PyTree, logits: jax.Array, features: jax.Array | None) -> jax.Array:
    return router_need(networks.router)(router, logits, features)


def _need(networks: HybridNetworks, router: PyTree, examples: HybridExamples) -> np.ndarray:
    return np.asarray(_needs(networks, router, examples.logits, examples.features))


def _checked_labels(labels: Any) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"labels are {labels.dtype}{list(labels.shape)}; integers [rows] are needed, -1 for unknown.")
    return labels


def _pair(found: Any) -> tuple[jax.Array, Any]:
    return found if isinstance(found, tuple) else (found, None)


def _length(data: HybridExamples | HybridBatch) -> int:
    return len(data.request)
