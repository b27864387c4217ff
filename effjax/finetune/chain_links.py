"""The links of a chain: their scales and ranks, each by itself, and all of them as one adapter."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from effjax.finetune.chain_config import ColaConfig, ColaState
from effjax.finetune.lora import Lora, lora_scales, only_adapters, only_whole

__all__ = ["cola_export", "cola_links"]


def cola_links(state: ColaState, config: ColaConfig) -> tuple[Lora, ...]:
    """The links of the chain that the state remembers, first to present, scales folded into ``b``.

    All of them with lazy knots or ``keep_links``; else the present one only, so collect it before every knot. What is
    trained whole stands in each as it is now.

    Args:
      state: of the chain, outside ``jit``.
      config: the chain.

    Returns:
      Adapters of the links' own ranks and scale 1.

    Example:
      >>> from effjax.finetune import LoraRule, cola_extend, cola_init
      >>> config = ColaConfig(LoraRule("kernel", rank=4), knots=(10,), ranks=(4, 2), keep_links=True)
      >>> state = cola_extend(cola_init(jax.random.key(0), {"kernel": jnp.ones((16, 8))}, config), config)
      >>> [link["kernel"]["a"].shape for link in cola_links(state, config)]
      [(16, 4), (16, 2)]
    """
    return _each_link(state, int(state.link), config)


@functools.partial(jax.jit, static_argnames=("link", "config"))
def _each_link(state: ColaState, link: int, config: ColaConfig) -> tuple[Lora, ...]:
    scales = link_scales(state.lora, state.link, config)
    whole = only_whole(state.lora)
    present = {path: folded(state.lora[path], scales[path]) for path in scales}

    def cut(lora: Lora, k: int, start: int) -> Lora:
        def one(path: str) -> dict[str, jax.Array]:
            width = state.lora[path]["a"].shape[-1]
            rows = slice(start * width, start * width + (width if config.ranks is None else config.ranks[k]))
            return {"a": lora[path]["a"][..., rows], "b": lora[path]["b"][..., rows, :]}

        return {path: one(path) for path in lora} | whole

    before = () if state.past is None else tuple(cut(state.past, k, k) for k in range(link))
    return (*before, cut(present, link, 0))


def cola_export(links: Sequence[Lora]) -> Lora:
    r"""A whole chain as ONE adapter of the summed rank and scale 1, exactly.

    .. math:: a = [a_1, \dots, a_K], \qquad b = [s_1 b_1; \dots; s_K b_K], \qquad a b = \sum_k s_k a_k b_k

    Args:
      links: of ``cola_links``.

    Returns:
      Adapters for ``lora_params``, ``lora_merge`` or a PEFT folder, to be used with the base of before the chain and
      scale 1 (alpha equal to the rank).

    Raises:
      ValueError: no links, or links of different kernels.

    Example:
      >>> link = {"kernel": {"a": jnp.ones((16, 4)), "b": jnp.ones((4, 8))}}
      >>> cola_export([link, link])["kernel"]["b"].shape
      (8, 8)
    """
    if not links or any(set(link) != set(links[0]) for link in links):
        raise ValueError(
            f"links: {len(links)} of them, with kernels {[sorted(link)[:3] for link in links]}; at least one is "
            "needed, all of the same kernels. Pass those of cola_links(state, config)."
        )
    adapters = map(only_adapters, links)
    joined = functools.reduce(lambda left, right: {path: beside(left[path], right[path]) for path in left}, adapters)
    return joined | only_whole(links[-1])


def link_scales(lora: Lora, link: Array, config: ColaConfig) -> dict[str, Any]:
    scales = lora_scales(lora, config.lora_config)
    if config.ranks is None and config.alphas is None:
        return scales
    root = math.sqrt if config.lora_config.rslora else float

    def table(path: str) -> list[float]:
        width = lora[path]["a"].shape[-1]
        ranks = config.ranks or (width,) * config.most_links
        alphas = config.alphas or (scales[path] * root(width),) * config.most_links
        return [alpha / root(rank) for alpha, rank in zip(alphas, ranks, strict=True)]

    return {path: jnp.asarray(table(path), float)[link] for path in scales}


def active_part(lora: Lora, link: Array, config: ColaConfig) -> Lora:
    """Zero beyond the link's rank: there the gradients vanish as well."""
    if config.ranks is None:
        return lora
    rank = jnp.asarray(config.ranks, jnp.int32)[link]

    def mask(adapter: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        used = jnp.arange(adapter["a"].shape[-1]) < rank
        a, b = adapter["a"], adapter["b"]
        return {"a": jnp.where(used, a, jnp.zeros_like(a)), "b": jnp.where(used[:, None], b, jnp.zeros_like(b))}

    return {path: mask(adapter) for path, adapter in only_adapters(lora).items()} | only_whole(lora)


def folded(adapter: Mapping[str, jax.Array], scale: Any) -> dict[str, jax.Array]:
    b = adapter["b"]
    return {"a": adapter["a"], "b": (b * scale).astype(b.dtype)}


def beside(left: Mapping[str, jax.Array], right: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {
        "a": jnp.concatenate([left["a"], right["a"]], axis=-1),
        "b": jnp.concatenate([left["b"], right["b"]], axis=-2),
    }


def write_link(past: Mapping[str, jax.Array], adapter: Mapping[str, jax.Array], link: Array) -> dict[str, jax.Array]:
    start = link * adapter["a"].shape[-1]
    return {
        name: jax.lax.dynamic_update_slice_in_dim(past[name], adapter[name], start, axis=axis)
        for name, axis in (("a", adapter["a"].ndim - 1), ("b", adapter["b"].ndim - 2))
    }
