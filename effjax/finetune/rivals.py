"""Other merge-and-restart chains, for comparison: ReLoRA, RAC-LoRA, periodic LoRA.

GaLore is ``optax.contrib``'s.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from effjax.core.errors import check_choice, check_number
from effjax.core.tree import leaves_at, path_name, wide
from effjax.finetune.chain import cola_extend
from effjax.finetune.chain_config import ColaConfig, ColaState
from effjax.finetune.lora import (
    Lora,
    Scales,
    check_floating,
    kernel_delta,
    lora_scales,
    only_adapters,
    only_whole,
    scale_of,
)
from effjax.finetune.restart import cola_reset

PyTree = Any


def relora_schedule(
    peak_value: float,
    total_steps: int,
    restart_every: int,
    *,
    first_warmup_steps: int,
    restart_warmup_steps: int = 100,
    end_ratio: float = 0.1,
    adjust_step: int = 0,
) -> optax.Schedule:
    r"""ReLoRA's jagged cosine: one cosine decay with a linear warm-up from zero after every restart.

    .. math::
        c(t) = \rho + \tfrac{1-\rho}{2}\Big(1 + \cos \pi \frac{t - w}{T - w}\Big), \qquad
        m(t) = \begin{cases}
        t / w & t < w \\
        \frac{i}{v}\, c(t' - i + v) & i < v \wedge t \ge R \\
        c(t') & \text{else}\end{cases}

    with :math:`t' = t` + ``adjust_step`` and :math:`i = t' \bmod R`.

    Args:
      peak_value: learning rate at the end of the first warm-up.
      total_steps: T.
      restart_every: R, steps between knots.
      first_warmup_steps: w.
      restart_warmup_steps: v, steps back up to the cosine; the first one has the rate 0.
      end_ratio: rho, the last rate over the peak, in (0, 1].
      adjust_step: shift of the restarts, for runs that begin with full training.

    Returns:
      ``step -> learning rate``, float32.

    Raises:
      ValueError: arguments out of range; warm-ups longer than what they precede.

    Example:
      >>> rate = relora_schedule(1.0, 60, 20, first_warmup_steps=5, restart_warmup_steps=3)
      >>> [round(float(rate(step)), 2) for step in (0, 5, 19, 20, 21, 23)]
      [0.0, 1.0, 0.86, 0.0, 0.26, 0.78]

    Lialin et al. 2023, arXiv 2307.05695.
    """
    check_number("peak_value", peak_value, low=0.0, open_low=True)
    check_number("total_steps", total_steps, low=1, integer=True)
    check_number("restart_every", restart_every, low=1, integer=True)
    check_number("first_warmup_steps", first_warmup_steps, low=0, high=total_steps - 1, integer=True)
    check_number("restart_warmup_steps", restart_warmup_steps, low=0, high=restart_every, integer=True)
    check_number("end_ratio", end_ratio, low=0.0, high=1.0, open_low=True)
    check_number("adjust_step", adjust_step, low=0, integer=True)

    def cosine(step: Array) -> Array:
        progress = (step - first_warmup_steps) / (total_steps - first_warmup_steps)
        return end_ratio + (1.0 - end_ratio) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))

    def schedule(count: Any) -> Float[Array, ""]:
        count = jnp.asarray(count)
        step = count + adjust_step
        inside = step % restart_every
        climb = inside / max(1, restart_warmup_steps) * cosine(step - inside + restart_warmup_steps)
        rate = jnp.where((inside < restart_warmup_steps) & (count >= restart_every), climb, cosine(step))
        rate = jnp.where(count < first_warmup_steps, count / max(1, first_warmup_steps), rate)
        return jnp.asarray(peak_value * rate, jnp.float32)

    return schedule


def relora_reset(
    key: jax.Array,
    tx: optax.GradientTransformation,
    state: PyTree,
    lora: Lora,
    *,
    prune: str = "magnitude",
    ratio: float = 0.9,
) -> PyTree:
    """ReLoRA's restart of the optimizer: zero most of every moment, keep the counts.

    For ``reset`` of ``cola`` and ``cola_next``: ``functools.partial(relora_reset, ratio=0.8)``.

    Args:
      key: PRNG key, for ``'random'``.
      tx: the optimizer of the adapters.
      state: its state.
      lora: the adapters (not looked at).
      prune: ``'magnitude'``: zero all but the entries strictly above the quantile ``ratio`` of their moment's absolute
        values; ``'random'``: zero every entry with probability ``ratio`` (0.999 stands for a full reset).
      ratio: in (0, 1].

    Returns:
      The pruned state.

    Raises:
      ValueError: arguments out of range; a state without moments, of which nothing would be reset.

    Example:
      >>> tx = optax.sgd(0.1, momentum=0.9)
      >>> _, state = tx.update(jnp.arange(10.0), tx.init(jnp.zeros(10)))
      >>> relora_reset(jax.random.key(0), tx, state, {})[0].trace.tolist()
      [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 9.0]

    Lialin et al. 2023, arXiv 2307.05695.
    """
    del lora
    check_choice("prune", prune, ("magnitude", "random"))
    check_number("ratio", ratio, low=0.0, high=1.0, open_low=True)
    seen = 0

    def pruned(moment: jax.Array) -> jax.Array:
        nonlocal seen
        seen += 1
        if prune == "magnitude":
            size = jnp.abs(wide(moment))
            keep = size > jnp.quantile(size, ratio)
        else:
            keep = jax.random.bernoulli(jax.random.fold_in(key, seen), 1.0 - ratio, moment.shape)
        return jnp.where(keep, moment, jnp.zeros_like(moment))

    state = optax.tree.map_params(tx.init, pruned, state)
    if not seen:
        raise ValueError(
            "state holds no moments, so relora_reset would reset 0 % of it. Use an optimizer with moments, such "
            "as optax.adamw, or effjax's cola_reset."
        )
    return state


def rac_lora(base: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """RAC-LoRA: train ``b`` alone; ``a`` is a random sketch that stays frozen for its link.

    ``cola(rac_lora(base), config)`` draws a new sketch at every knot.

    Args:
      base: optimizer of the factors ``b``; it keeps moments for them only.

    Returns:
      A transformation over adapters.

    Example:
      >>> lora = {"kernel": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}}
      >>> tx = rac_lora(optax.sgd(1.0))
      >>> updates, _ = tx.update(lora, tx.init(lora), lora)
      >>> updates["kernel"]["a"].sum().item(), updates["kernel"]["b"].sum().item()
      (0.0, -2.0)

    Malinovsky et al. 2024, arXiv 2410.08305.
    """

    def labels(lora: Lora) -> PyTree:
        if not isinstance(lora, Mapping):
            return "trained"
        kinds = {"a": "sketch", "b": "trained", "whole": "trained"}
        return {path: {name: kinds[name] for name in entry} for path, entry in lora.items()}

    return optax.partition({"sketch": optax.set_to_zero(), "trained": base}, labels)


def rac_precondition(scales: Scales, train: str = "b") -> optax.GradientTransformationExtraArgs:
    r"""Make gradient descent on one factor a projected gradient descent on the kernel, as RAC-LoRA's theory has it.

    .. math::
        u_b = s^{-2} (a^\top a)^{+} g_b \;\Rightarrow\; s\, a\, u_b = a (a^\top a)^{+} a^\top G, \qquad
        u_a = s^{-2} g_a (b\, b^\top)^{+} \;\Rightarrow\; s\, u_a\, b = G\, b^\top (b\, b^\top)^{+} b

    with G the gradient of the kernel: a random projection of it, whatever the sketch's size.

    Args:
      scales: of ``lora_scales``.
      train: the factor that is trained, ``'a'`` or ``'b'``; the other one is the frozen sketch, and has update zero.

    Returns:
      A stateless transformation over dense adapters, to stand before ``optax.sgd``.

    Raises:
      ValueError: ``train`` is neither; at ``update``, no ``params``.

    Example:
      >>> lora = {"kernel": {"a": jnp.ones((4, 1)), "b": jnp.ones((1, 2))}}
      >>> tx = rac_precondition(1.0)
      >>> tx.update(lora, tx.init(lora), lora)[0]["kernel"]["b"].tolist()
      [[0.25, 0.25]]

    Malinovsky et al. 2024, arXiv 2410.08305.
    """
    check_choice("train", train, ("a", "b"))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Lora, Any]:
        del extra
        if params is None:
            raise ValueError("rac_precondition needs the adapters: tx.update(grads, state, lora).")

        def project(path: str) -> dict[str, jax.Array]:
            own, given = params[path], updates[path]
            factor, other = (wide(own[name]) for name in ("a", "b"))
            highest = jax.lax.Precision.HIGHEST
            if train == "b":
                gram = jnp.matmul(factor.mT, factor, precision=highest)
                moved = jnp.matmul(jnp.linalg.pinv(gram), wide(given["b"]), precision=highest)
            else:
                gram = jnp.matmul(other, other.mT, precision=highest)
                moved = jnp.matmul(wide(given["a"]), jnp.linalg.pinv(gram), precision=highest)
            moved = (moved / scale_of(scales, path) ** 2).astype(own[train].dtype)
            return {name: moved if name == train else jnp.zeros_like(own[name]) for name in ("a", "b")}

        return {path: updates[path] if "whole" in updates[path] else project(path) for path in updates}, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def plora_unload(
    params: PyTree, momentum: Mapping[str, jax.Array] | None, lora: Lora, scales: Scales, *, decay: float = 0.5
) -> tuple[PyTree, dict[str, jax.Array]]:
    r"""Periodic LoRA's knot: unload a running mean of the links, which damps their noise.

    .. math:: m \leftarrow \beta m + (1 - \beta)\, s\, a\, b, \qquad W \leftarrow W + m

    The network's outputs change, unlike at COLA's knots, and m is as large as the kernels. ``plora_next`` then starts
    a link.

    Args:
      params: the base.
      momentum: m of the knot before, None at the first one.
      lora: adapters.
      scales: of ``lora_scales``.
      decay: beta, in [0, 1); 0 is a plain merge.

    Returns:
      The new base and m, float32, by kernel path.

    Raises:
      ValueError: ``decay`` out of range, or a kernel of integers or of 8 bits.

    Example:
      >>> lora = {"kernel": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}}
      >>> params, momentum = plora_unload({"kernel": jnp.zeros((3, 2))}, None, lora, 2.0)
      >>> params["kernel"][0, 0].item()
      1.0

    Meng et al. 2024, arXiv 2402.16141. A reconstruction: only the abstract's "momentum-based unloading" was at hand,
    not its equation.
    """
    check_number("decay", decay, low=0.0, high=1.0, open_high=True, hint="0 merges the link as it is.")
    check_floating(params, lora)

    def blended(path: str) -> jax.Array:
        delta = kernel_delta(path, lora[path], scale_of(scales, path), kernels[path].shape)
        before = jnp.zeros_like(delta) if momentum is None else momentum[path]
        return decay * before + (1.0 - decay) * delta

    lora = only_adapters(lora)
    kernels = leaves_at(params, lora)
    after = {path: blended(path) for path in lora}

    def unload(path: Any, leaf: jax.Array) -> jax.Array:
        name = path_name(path)
        return (wide(leaf) + after[name]).astype(leaf.dtype) if name in after else leaf

    return jax.tree_util.tree_map_with_path(unload, params), after


def plora_next(
    tx: optax.GradientTransformation, config: ColaConfig, *, decay: float = 0.5
) -> Callable[..., tuple[ColaState, dict[str, jax.Array], PyTree]]:
    """From one link of periodic LoRA to the next: ``cola_next`` with ``plora_unload`` in place of the merge.

    Args:
      tx: the optimizer of the adapters.
      config: the chain.
      decay: of ``plora_unload``.

    Returns:
      Function ``(state, momentum, opt_state) -> (state, momentum, opt_state)``, jitted, its arguments donated.

    Example:
      >>> from effjax.finetune.chain import cola_init
      >>> config, tx = ColaConfig("kernel", knots=(10,)), optax.adam(1e-3)
      >>> state = cola_init(jax.random.key(0), {"kernel": jnp.zeros((16, 8))}, config)
      >>> momentum = {"kernel": jnp.zeros((16, 8))}
      >>> state, momentum, opt_state = plora_next(tx, config)(state, momentum, tx.init(state.lora))
      >>> state.link.item()
      1
    """

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def knot(state: ColaState, momentum: PyTree, opt_state: PyTree) -> tuple[ColaState, PyTree, PyTree]:
        base, momentum = plora_unload(
            state.base, momentum, state.lora, lora_scales(state.lora, config.lora_config), decay=decay
        )
        empty = jax.tree.map(jnp.zeros_like, only_adapters(state.lora)) | only_whole(state.lora)
        state = cola_extend(state._replace(base=base, lora=empty), config)
        return state, momentum, cola_reset(tx, opt_state, state.lora, schedule=config.schedule)[0]

    return knot
