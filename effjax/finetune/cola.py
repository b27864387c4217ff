"""COLA as one Optax transformation over ``{"base": params, "lora": adapters}``: a thin adapter over ``chain``."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, UInt

from effjax.core.tree import leaves_at, only_node, wide, with_leaves
from effjax.finetune.chain import Kernels, Reset, chain_memory, extend_and_reset, on_mesh_of
from effjax.finetune.chain_config import ColaConfig, ColaState
from effjax.finetune.lora import Lora, check_fit

__all__ = ["cola", "cola_state"]

PyTree = Any


class ColaOptState(NamedTuple):
    """State of ``cola``; the fields as in ``ColaState``, and the base optimizer's state."""

    link: Int[Array, ""]
    key: UInt[Array, "words"]
    past: Lora | None
    master: dict[str, Float[Array, "..."]] | None
    inner: PyTree


def cola(
    base: optax.GradientTransformation | optax.MultiSteps,
    config: ColaConfig,
    *,
    seed: int | Array = 0,
    reset: Reset | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The chain as an Optax transformation over ``{"base": params, "lora": adapters}``.

    .. math::
        (a, b) &\leftarrow (a, b) + u \qquad\text{in every step, with the base optimizer's u; and then, if tied,} \\
        W &\leftarrow W + s\, a\, b, \qquad a \sim \mathrm{init}, \qquad b \leftarrow 0

    ``tie`` is a Python bool and a static argument, so that there are two executables. The untied one's updates of the
    base are literal zeros, which XLA folds away: it costs what LoRA costs, provided that ``params`` are donated (else
    XLA must copy the base). The tied one's are the knot of ``cola_next``, as differences in float32::

        state = cola_init(key, model_params, config)
        params = {"base": state.base, "lora": state.lora}
        state = tx.init(params)

        @functools.partial(jax.jit, static_argnames="tie", donate_argnums=(0, 1))
        def step(params, state, batch, tie):
            value, grads = cola_value_and_grad(loss, config)(cola_state(state, params), batch)
            updates, state = tx.update({"lora": grads}, state, params, tie=tie)
            return optax.apply_updates(params, updates), state, value

        for t in range(steps):
            params, state, value = step(params, state, batches[t], config.ties(t))

    Accumulation: put ``optax.MultiSteps`` inside, ``cola(optax.MultiSteps(base, k), config)``; outside, its buffers
    have the base's size. Either way a knot is tied only in a micro-batch that emits an update; in another one
    ``tie=True`` leaves the chain as it is. ``config.ties(micro_step, every=k)`` asks in the right ones.

    Args:
      base: optimizer of the adapters; LoRA+ is ``optax.chain(optax.adamw(...), scale_lora_b(16.0))``.
      config: the chain.
      seed: of the new links' draws, or a PRNG key; the key of ``cola_init`` makes both draw the same.
      reset: ``(key, base, state, lora) -> state`` in place of ``cola_reset`` by ``config.schedule``.

    Returns:
      A transformation. Its ``update`` takes ``{"lora": gradients}`` (an entry ``"base"`` is not looked at) and needs
      ``params``; ``tie`` ends the link after this update; ``gradients``, of ``cola_gradients``, serves
      ``reinit='gradient'``. Other keywords go to ``base``. The network's parameters and the export are those of
      ``cola_state(state, params)``.

    Raises:
      ValueError: params or gradients of another form, ``reinit='gradient'`` tied without gradients.
      TypeError: ``tie`` is no Python bool.

    Example:
      >>> from effjax.finetune.chain import cola_init
      >>> config = ColaConfig("kernel", knots=(10,))
      >>> state = cola_init(jax.random.key(0), {"kernel": jnp.zeros((16, 8))}, config)
      >>> params = {"base": state.base, "lora": state.lora}
      >>> tx = cola(optax.sgd(1.0), config)
      >>> updates, state = tx.update({"lora": params["lora"]}, tx.init(params), params, tie=config.ties(9))
      >>> params = optax.apply_updates(params, updates)
      >>> cola_state(state, params).link.item()
      1

    The paper restarts the optimizer at knots and does not say what its learning rate does; ``config.schedule`` offers
    both. Beyond the paper: lazy knots and float32 masters, export of the chain as one adapter, data-driven knots
    (``SlopeKnot``), gradient-informed starts. The paper's rank step-down is kept at constant shapes.

    Source: Xia, Qin, Hazan 2024, arXiv:2401.04151.
    """
    if isinstance(base, optax.MultiSteps):
        accumulate: Any = base.update  # takes further keywords, which its type does not say
        base = optax.GradientTransformationExtraArgs(base.init, accumulate)
    base = optax.with_extra_args_support(base)
    key = jax.random.key(seed) if isinstance(seed, int) else seed

    def init(params: PyTree) -> Any:
        link, raw = jnp.zeros((), jnp.int32), jnp.copy(jax.random.key_data(key))
        if type(params).__name__ == "_ParamsPlaceholder":  # optax.tree.map_params asks where the parameters are
            return ColaOptState(link, raw, params, params, base.init(params))
        _check_params(params)
        past, master = chain_memory(params["base"], params["lora"], config)
        link, raw = on_mesh_of(params, (link, raw))
        return ColaOptState(link, raw, past, master, base.init(params["lora"]))

    def update(
        updates: PyTree,
        state: Any,  # ColaOptState, which Optax's types do not know
        params: PyTree = None,
        *,
        tie: bool = False,
        gradients: Kernels | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        _check_params(params)
        if not isinstance(updates, Mapping) or "lora" not in updates:
            raise ValueError('cola needs the gradients as {"lora": gradients}: tx.update({"lora": grads}, ...).')
        if not isinstance(tie, (bool, np.bool_)):
            raise TypeError(
                f"tie={tie!r} must be True or False, known when the step is compiled: write "
                "jax.jit(step, static_argnames='tie') and pass config.ties(t)."
            )
        moves: Any
        moves, inner_state = base.update(updates["lora"], state.inner, params["lora"], **extra_args)
        still = jax.tree.map(jnp.zeros_like, params["base"])
        if not tie:
            return {"base": still, "lora": moves}, state._replace(inner=inner_state)

        moved: Any = optax.apply_updates(params["lora"], moves)
        before = cola_state(state, params)._replace(lora=moved)
        after = extend_and_reset(base, before, inner_state, config, reset, gradients)
        hold = (state.link >= config.most_links - 1) | ~_emitted(inner_state)
        chain, inner_state = optax.tree.where(hold, (before, inner_state), after)
        difference = lambda new, old: wide(new) - wide(old)
        kernels = (leaves_at(tree, params["lora"]) for tree in (chain.base, params["base"]))
        return (
            {
                "base": with_leaves(still, jax.tree.map(difference, *kernels)),
                "lora": jax.tree.map(difference, chain.lora, params["lora"]),
            },
            ColaOptState(chain.link, chain.key, chain.past, chain.master, inner_state),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def cola_state(state: PyTree, params: Mapping[str, PyTree]) -> ColaState:
    """The chain in the parameters and the optimizer state of ``cola``, for the functions of a ``ColaState``.

    Args:
      state: optimizer state that holds a ``ColaOptState``, as of ``optax.chain``.
      params: ``{"base": ..., "lora": ...}``.

    Returns:
      A ``ColaState`` of the same arrays.

    Raises:
      ValueError: params of another form, or not exactly one ``ColaOptState``.

    Example:
      >>> from effjax.finetune.chain import cola_init, cola_merge
      >>> config = ColaConfig("kernel", knots=(10,))
      >>> state = cola_init(jax.random.key(0), {"kernel": jnp.zeros((16, 8))}, config)
      >>> params = {"base": state.base, "lora": state.lora}
      >>> merged = cola_merge(cola_state(cola(optax.sgd(1.0), config).init(params), params), config)
      >>> merged["kernel"].shape
      (16, 8)
    """
    _check_params(params)
    own = only_node(state, ColaOptState, maker="cola")
    return ColaState(params["base"], params["lora"], own.link, own.key, own.past, own.master)


def _check_params(params: PyTree) -> None:
    if params is None:
        raise ValueError('cola needs the parameters: tx.update({"lora": grads}, state, params, tie=False).')
    nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    if any(isinstance(node, optax.MaskedNode) for node in nodes):
        raise ValueError(
            "cola cannot sit inside optax.partition or optax.masked: a knot moves numbers from the adapters to the "
            "base. Put them inside: cola(optax.partition(...), config)."
        )
    if not isinstance(params, Mapping) or set(params) != {"base", "lora"}:
        held = sorted(params) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(
            f'params hold {held}, but must be {{"base": model parameters, "lora": adapters}}: '
            'state = cola_init(key, model_params, config); params = {"base": state.base, "lora": state.lora}.'
        )
    check_fit(params["base"], params["lora"])


def _emitted(inner_state: PyTree) -> Bool[Array, ""]:
    """Whether the accumulators inside, if any, have just passed an update on."""
    nodes = jax.tree.leaves(inner_state, is_leaf=lambda node: isinstance(node, optax.MultiStepsState))
    steps = [node.mini_step for node in nodes if isinstance(node, optax.MultiStepsState)]
    return jnp.all(jnp.asarray([step == 0 for step in steps], bool))
