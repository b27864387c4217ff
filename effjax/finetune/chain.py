"""COLA: fine-tuning by a chain of merged low-rank adapters (Xia, Qin, Hazan 2024, arXiv 2401.04151).

A run is ``cola_init``, then in every step ``cola_value_and_grad`` and the optimizer's update, and between steps, at a
knot, ``cola_next``. ``effjax.finetune.cola`` is the same as one Optax transformation.
"""

import functools
import math
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from effjax.core.errors import NoEffectWarning
from effjax.core.tree import leaves_at, unread, wide, with_leaves
from effjax.finetune.chain_config import ColaConfig, ColaState
from effjax.finetune.chain_links import active_part, beside, folded, link_scales, write_link
from effjax.finetune.lora import (
    Lora,
    check_floating,
    kernel_delta,
    lora_init,
    lora_merge,
    lora_params,
    mesh_of,
    only_adapters,
    only_whole,
    placed,
)
from effjax.finetune.lora_layout import out_first
from effjax.finetune.restart import cola_reset

__all__ = [
    "cola_adapters",
    "cola_extend",
    "cola_gradients",
    "cola_init",
    "cola_merge",
    "cola_next",
    "cola_params",
    "cola_value_and_grad",
]

PyTree = Any
Kernels = Mapping[str, jax.Array]
Reset = Callable[[jax.Array, optax.GradientTransformation, PyTree, Lora], PyTree]


def cola_init(key: jax.Array, params: PyTree, config: ColaConfig, gradients: Kernels | None = None) -> ColaState:
    """The first link of a chain; the network computes what it did before.

    Of a base on a mesh all of the state lies there, scalars too, so that a checkpoint may be restored with the
    shardings of the state itself. Leaves of ``LoraConfig(whole=...)``, such as a new head, are trained beside every
    link: no knot changes them, though the optimizer restarts for them too.

    Args:
      key: PRNG key. The first adapters are ``lora_init(key, ...)``; link k draws from ``fold_in(key, k)``.
      params: the model's parameters, kept as the base: not copied, and so consumed by the first knot that is donated.
      config: the chain.
      gradients: of ``cola_gradients``, for ``reinit='gradient'``; without them the first ``a`` is random.

    Returns:
      A ``ColaState``.

    Raises:
      ValueError: as ``lora_init``.

    Warns:
      UserWarning: ``merge='plain'`` on kernels narrower than float32.

    Example:
      >>> params = {"Dense_0": {"kernel": jnp.ones((16, 8))}}
      >>> state = cola_init(jax.random.key(0), params, ColaConfig("kernel", knots=(10, 20)))
      >>> state.lora["Dense_0/kernel"]["a"].shape
      (16, 8)
    """
    raw = jnp.copy(jax.random.key_data(key))  # a donated knot would consume the caller's key
    lora = lora_init(key, params, config.lora_config)
    if gradients is not None:
        lora = _informed(lora, gradients)
    past, master = chain_memory(params, lora, config)
    link, raw = on_mesh_of(params, (jnp.zeros((), jnp.int32), raw))
    return ColaState(params, lora, link, raw, past, master)


def on_mesh_of(params: PyTree, scalars: PyTree) -> PyTree:
    """Small arrays, copied to all devices of the mesh that the parameters lie on, if they do."""
    mesh = mesh_of(params)
    return scalars if mesh is None else jax.device_put(scalars, NamedSharding(mesh, PartitionSpec()))


def chain_memory(params: PyTree, lora: Lora, config: ColaConfig) -> tuple[Lora | None, dict[str, jax.Array] | None]:
    """What a chain remembers at its start: room for the past links, float32 copies of narrower kernels."""
    lora = only_adapters(lora)
    kernels = leaves_at(params, lora)
    floating = lambda dtype: jnp.issubdtype(dtype, jnp.inexact) and jnp.dtype(dtype).itemsize > 1
    whole = [path for path, kernel in kernels.items() if not floating(kernel.dtype)]
    if whole and config.merge != "lazy":
        raise ValueError(
            f"merge={config.merge!r} cannot add a knot to {len(whole)} quantised kernels, e.g. {whole[0]} of dtype "
            f"{kernels[whole[0]].dtype}. Use merge='lazy'."
        )
    narrow = {path: kernel for path, kernel in kernels.items() if jnp.dtype(kernel.dtype).itemsize < 4}
    if narrow and config.merge == "plain":
        path, kernel = next(iter(narrow.items()))
        warnings.warn(
            f"merge='plain' adds knots to {len(narrow)} {kernel.dtype} kernels ({path}, ...): what is below their "
            "resolution is lost. Of changes of size 1e-5 in weights of size 0.02, bfloat16 keeps a third. Use "
            "merge='master' or 'lazy'.",
            stacklevel=3,
        )
    master = {path: wide(kernel) for path, kernel in narrow.items()} if config.merge == "master" else {}
    past = None
    if config.most_links > 1 and (config.merge == "lazy" or config.keep_links):
        grow = config.most_links - 1
        links = {
            path: {
                "a": jnp.zeros_like(jnp.concatenate([adapter["a"]] * grow, axis=-1)),
                "b": jnp.zeros_like(jnp.concatenate([adapter["b"]] * grow, axis=-2)),
            }
            for path, adapter in lora.items()
        }
        past = placed(params, links)
    return past, master or None


def cola_adapters(state: ColaState, config: ColaConfig) -> tuple[Lora, dict[str, Any]]:
    """The adapters that count now and their scales: the present link, with lazy knots all links in one.

    For NNX and Equinox: ``lora_merge(state.base, *cola_adapters(state, config))``, or their factored form.

    Args:
      state: of the chain.
      config: the chain.

    Returns:
      ``(lora, scales)``, the last two arguments of ``lora_params`` and ``lora_merge``.

    Example:
      >>> config = ColaConfig("kernel", knots=(10,), merge="lazy")
      >>> state = cola_init(jax.random.key(0), {"kernel": jnp.ones((16, 8))}, config)
      >>> cola_adapters(state, config)[0]["kernel"]["a"].shape
      (16, 16)
    """
    lora, scales = active_part(state.lora, state.link, config), link_scales(state.lora, state.link, config)
    if config.merge != "lazy" or state.past is None:
        return lora, scales
    joined = {path: beside(state.past[path], folded(lora[path], scales[path])) for path in scales}
    return joined | only_whole(lora), dict.fromkeys(scales, 1.0)


def cola_params(state: ColaState, config: ColaConfig) -> PyTree:
    """Linen parameters for ``lora_apply``, in factored form: no W + s a b, no gradient of W's size.

    Differentiate with respect to ``state.lora``, or let ``cola_value_and_grad`` do it.

    Args:
      state: of the chain.
      config: the chain.

    Returns:
      The base with ``lora_a`` and ``lora_b`` beside the adapted kernels.

    Example:
      >>> config = ColaConfig("kernel", knots=(10,))
      >>> state = cola_init(jax.random.key(0), {"kernel": jnp.ones((16, 8))}, config)
      >>> sorted(cola_params(state, config))
      ['kernel', 'lora_a', 'lora_b']
    """
    return lora_params(state.base, *cola_adapters(state, config))


def cola_value_and_grad(
    loss: Callable[..., Any], config: ColaConfig, *, has_aux: bool = False
) -> Callable[..., tuple[Any, Lora]]:
    """Loss and gradient with respect to the present link alone.

    Args:
      loss: ``(params, *args) -> loss``, or ``(loss, aux)``; its params are those of ``cola_params``, for
        ``lora_apply(module.apply)``.
      config: the chain.
      has_aux: whether it returns ``aux``.

    Returns:
      Function ``(state, *args) -> (loss, gradient)``, the gradient shaped like ``state.lora``.

    Warns:
      NoEffectWarning: the loss does not depend on some adapters, as where ``lora_apply`` was left out.

    Example:
      >>> import flax.linen as nn
      >>> from effjax.finetune.lora_linen import lora_apply
      >>> model, config = nn.Dense(8), ColaConfig("kernel", knots=(10,))
      >>> state = cola_init(jax.random.key(0), model.init(jax.random.key(1), jnp.ones((1, 16)))["params"], config)
      >>> loss = lambda params, x: lora_apply(model.apply)({"params": params}, x).sum()
      >>> value, grads = cola_value_and_grad(loss, config)(state, jnp.ones((1, 16)))
      >>> bool((grads["kernel"]["a"] == 0).all()), bool((grads["kernel"]["b"] != 0).all())
      (True, True)
    """

    def value_and_grad(state: ColaState, *args: Any) -> tuple[Any, Lora]:
        def of(lora: Lora) -> Any:
            return loss(cola_params(state._replace(lora=lora), config), *args)

        _warn_unread(loss, config, of, state.lora)
        return jax.value_and_grad(of, has_aux=has_aux)(state.lora)

    return value_and_grad


def cola_merge(state: ColaState, config: ColaConfig, *, float32: bool = False) -> PyTree:
    """Plain parameters of the model with the whole chain in them, for inference at the base's cost.

    Args:
      state: of the chain.
      config: the chain.
      float32: return the targets in float32, with all that was learned, whatever the base's dtype.

    Returns:
      A tree like ``state.base``.

    Raises:
      ValueError: a kernel of integers or of 8 bits, which would lose what was learned, without ``float32``.

    Example:
      >>> config = ColaConfig("kernel", knots=(10,))
      >>> state = cola_init(jax.random.key(0), {"kernel": jnp.ones((16, 8), jnp.bfloat16)}, config)
      >>> cola_merge(state, config)["kernel"].dtype, cola_merge(state, config, float32=True)["kernel"].dtype
      (dtype(bfloat16), dtype('float32'))
    """
    if not float32:
        check_floating(state.base, state.lora)
    masters = state.master or {}
    kernels = {path: masters.get(path, _widened(kernel)) for path, kernel in leaves_at(state.base, state.lora).items()}
    merged = lora_merge(with_leaves(state.base, kernels), *cola_adapters(state, config))
    if float32:
        return merged
    dtypes = {path: kernel.dtype for path, kernel in leaves_at(state.base, state.lora).items()}
    return with_leaves(merged, {path: leaf.astype(dtypes[path]) for path, leaf in leaves_at(merged, dtypes).items()})


def _widened(kernel: jax.Array) -> jax.Array:
    return kernel.astype(jnp.float32) if kernel.dtype.itemsize == 1 else wide(kernel)  # 8 bits promote to nothing


def cola_extend(state: ColaState, config: ColaConfig, gradients: Kernels | None = None) -> ColaState:
    r"""Tie the knot and extend the chain; the network computes what it did before.

    .. math:: W \leftarrow W + s\, a\, b, \qquad a \sim \mathrm{init}, \qquad b \leftarrow 0

    The optimizer's state is not touched: use ``cola_next``, which resets it as well. For use inside ``jit`` with the
    state donated.

    Args:
      state: at the end of a link.
      config: the chain.
      gradients: of ``cola_gradients``, for ``reinit='gradient'``.

    Returns:
      The state at the start of the next link. A full chain comes back as it was.

    Raises:
      ValueError: ``reinit='gradient'`` without gradients; outside ``jit``, a chain that is full.

    Example:
      >>> config = ColaConfig("kernel", knots=(10,))
      >>> state = cola_init(jax.random.key(0), {"kernel": jnp.zeros((16, 8))}, config)
      >>> trained = {"kernel": {"a": jnp.ones((16, 8)), "b": jnp.ones((8, 8))}}
      >>> state = cola_extend(state._replace(lora=trained), config)
      >>> state.base["kernel"][0, 0].item(), state.lora["kernel"]["b"][0, 0].item()
      (16.0, 0.0)
    """
    _check_room(state, config)
    hold = state.link >= config.most_links - 1
    lora, scales = active_part(state.lora, state.link, config), link_scales(state.lora, state.link, config)
    link = state.link + jnp.where(hold, 0, 1).astype(state.link.dtype)
    past, base, master = state.past, state.base, state.master
    if past is not None:
        written = {path: write_link(past[path], folded(lora[path], scales[path]), state.link) for path in past}
        past = optax.tree.where(hold, past, written)
    if config.merge != "lazy":
        kernels = leaves_at(base, scales)
        active = {path: jnp.where(hold, 0.0, scales[path]) for path in scales}
        deltas = {path: kernel_delta(path, lora[path], active[path], kernels[path].shape) for path in scales}
        master = None if master is None else {path: master[path] + deltas[path] for path in master}
        sums = {path: (master or {}).get(path, wide(kernel) + deltas[path]) for path, kernel in kernels.items()}
        base = with_leaves(base, {path: sums[path].astype(kernel.dtype) for path, kernel in kernels.items()})
    fresh = optax.tree.where(hold, state.lora, _fresh(state, link, config, gradients))
    return ColaState(base, fresh, link, state.key, past, master)


def cola_next(
    tx: optax.GradientTransformation, config: ColaConfig, reset: Reset | None = None
) -> Callable[..., tuple[ColaState, PyTree]]:
    """From one link to the next, between steps: extend the chain and reset the optimizer.

    It is jitted, its arguments are donated and the shardings stay, so that it holds no second copy of the base. (In a
    ``lax.cond`` inside the step there would always be one.) Call it before step t for every t of ``config.knots``.

    Args:
      tx: the optimizer of the adapters.
      config: the chain.
      reset: ``(key, tx, opt_state, lora) -> opt_state`` in place of ``cola_reset`` by ``config.schedule``.

    Returns:
      Function ``(state, opt_state, gradients=None) -> (state, opt_state)``.

    Raises:
      ValueError: at the call, a chain that is full, or as ``cola_extend`` and ``cola_reset``.

    Example:
      >>> import flax.linen as nn
      >>> from effjax.finetune.lora_linen import lora_apply
      >>> model, config, tx = nn.Dense(8), ColaConfig("kernel", knots=(2, 4)), optax.adam(1e-2)
      >>> x = jnp.ones((4, 16))
      >>> loss = lambda params, x: (lora_apply(model.apply)({"params": params}, x) ** 2).mean()
      >>> @jax.jit
      ... def step(state, opt_state, x):
      ...     value, grads = cola_value_and_grad(loss, config)(state, x)
      ...     updates, opt_state = tx.update(grads, opt_state, state.lora)
      ...     return state._replace(lora=optax.apply_updates(state.lora, updates)), opt_state, value
      >>> state = cola_init(jax.random.key(0), model.init(jax.random.key(1), x)["params"], config)
      >>> opt_state, knot = tx.init(state.lora), cola_next(tx, config)
      >>> for t in range(6):
      ...     if t in config.knots:
      ...         state, opt_state = knot(state, opt_state)
      ...     state, opt_state, value = step(state, opt_state, x)
      >>> state.link.item()
      2
    """

    def knot(state: ColaState, opt_state: PyTree, gradients: Kernels | None) -> tuple[ColaState, PyTree]:
        return extend_and_reset(tx, state, opt_state, config, reset, gradients)

    @functools.cache
    def jitted(structure: Any, shardings: tuple[NamedSharding | None, ...]) -> Callable[..., Any]:
        out = jax.tree.unflatten(structure, shardings)
        return jax.jit(knot, donate_argnums=(0, 1), out_shardings=out)

    def call(state: ColaState, opt_state: PyTree, gradients: Kernels | None = None) -> tuple[ColaState, PyTree]:
        _check_room(state, config)
        leaves, structure = jax.tree.flatten((state, opt_state))
        found = (getattr(leaf, "sharding", None) for leaf in leaves)
        shardings = tuple(sharding if isinstance(sharding, NamedSharding) else None for sharding in found)
        return jitted(structure, shardings)(state, opt_state, gradients)

    return call


def extend_and_reset(
    tx: optax.GradientTransformation,
    state: ColaState,
    opt_state: PyTree,
    config: ColaConfig,
    reset: Reset | None,
    gradients: Kernels | None,
) -> tuple[ColaState, PyTree]:
    """The traceable part of ``cola_next``."""
    after = cola_extend(state, config, gradients)
    if reset is None:
        return after, cola_reset(tx, opt_state, after.lora, schedule=config.schedule)[0]
    return after, reset(_link_key(after.key, after.link), tx, opt_state, after.lora)


def cola_gradients(loss: Callable[..., Float[Array, ""]], state: ColaState, config: ColaConfig, *args: Any) -> Kernels:
    """The gradient of the loss with respect to the adapted kernels, for ``reinit='gradient'``.

    The one place where a gradient of W's size exists: call it at knots only, on a batch that is worth it.

    Args:
      loss: ``(params, *args) -> loss`` of the model's plain parameters (``module.apply``, without ``lora_apply``).
      state: of the chain.
      config: the chain.
      *args: the batch.

    Returns:
      ``{kernel path: gradient}``.

    Example:
      >>> config = ColaConfig("kernel", knots=(10,), reinit="gradient")
      >>> state = cola_init(jax.random.key(0), {"kernel": jnp.ones((16, 8))}, config)
      >>> gradients = cola_gradients(lambda params, x: (x @ params["kernel"]).sum(), state, config, jnp.ones(16))
      >>> cola_extend(state, config, gradients).lora["kernel"]["a"].shape
      (16, 8)
    """
    merged = cola_merge(state, config)
    kernels = leaves_at(merged, only_adapters(state.lora))
    return jax.grad(lambda kernels: loss(with_leaves(merged, kernels), *args))(kernels)


# Losses that were looked at, with the chains they were looked at with: once is enough, in a loop without jit too.
_looked_at: weakref.WeakKeyDictionary[Callable[..., Any], set[ColaConfig]] = weakref.WeakKeyDictionary()


def _warn_unread(loss: Callable[..., Any], config: ColaConfig, of: Callable[[Lora], Any], lora: Lora) -> None:
    seen = _looked_at.setdefault(loss, set())
    if config in seen:
        return
    seen.add(config)
    idle = sorted({path.rpartition("/")[0] for path in unread(of, lora)})
    if idle:
        warnings.warn(
            f"the loss does not depend on {len(idle)} of {len(lora)} adapters (of {idle[0]!r}, ...), so they learn "
            "nothing. Call the network as lora_apply(module.apply)({'params': params}, ...), or adapt other kernels.",
            NoEffectWarning,
            stacklevel=3,
        )


def _check_room(state: ColaState, config: ColaConfig) -> None:
    if not isinstance(state.link, jax.core.Tracer) and int(state.link) >= config.most_links - 1:
        raise ValueError(
            f"the chain has its {config.most_links} links already (knots={config.knots}, links={config.links}). Give "
            "more knots, or links=n where they are decided in training."
        )


def _fresh(state: ColaState, link: Array, config: ColaConfig, gradients: Kernels | None) -> Lora:
    drawn = lora_init(_link_key(state.key, link), state.base, config.lora_config)
    if config.reinit == "gradient":
        if gradients is None:
            raise ValueError(
                "reinit='gradient' needs gradients=cola_gradients(loss, state, config, batch) at every knot."
            )
        drawn = _informed(drawn, gradients)
    # The sum takes over the sharding of the old adapters, on explicit meshes too.
    fresh = jax.tree.map(lambda old, new: jnp.zeros_like(old) + new.astype(old.dtype), state.lora, drawn)
    return active_part(fresh | only_whole(state.lora), link, config)


def _link_key(key: Array, link: Array) -> Array:
    return jax.random.fold_in(jax.random.wrap_key_data(key), link)


def _informed(lora: Lora, gradients: Kernels) -> Lora:
    """Replace every ``a`` by the kernel gradient's leading directions on the input side, columns as long as before."""
    missing = sorted(set(only_adapters(lora)) - set(gradients))
    if missing:
        raise ValueError(f"gradients lack the kernels {missing[:5]}. Use cola_gradients(loss, state, config, batch).")

    def informed(path: str, adapter: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        a, b = adapter["a"], adapter["b"]
        gradient = wide(gradients[path])
        gradient = gradient.mT if out_first(path) else gradient
        rank, lead = a.shape[-1], b.shape[:-2]
        directions = jnp.linalg.svd(gradient.reshape(*lead, -1, b.shape[-1]), full_matrices=False)[0][..., :rank]
        length = jnp.sqrt(jnp.sum(wide(a) ** 2) / (rank * math.prod(lead)))
        return {"a": (length * directions).reshape(a.shape).astype(a.dtype), "b": b}

    return {path: informed(path, adapter) for path, adapter in only_adapters(lora).items()} | only_whole(lora)
