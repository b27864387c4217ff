"""Adapters in the layers of a Linen module, added in factored form."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effjax.core.errors import check_number
from effjax.core.tree import path_name
from effjax.finetune.lora_axes import low_rank_einsum, through_axes

__all__ = ["lora_apply"]

PyTree = Any


def lora_apply(apply: Callable[..., Any], dropout: float = 0.0) -> Callable[..., Any]:
    r"""``module.apply`` that adds the adapters found in the parameters, in factored form.

    .. math:: y = x W + \mathrm{bias} + (\mathrm{dropout}(x)\, a)\, (s\, b)

    The sum W + s a b is never formed, and neither is its gradient. ``nn.Dense``, ``nn.DenseGeneral`` (so
    ``nn.MultiHeadDotProductAttention`` too), ``nn.Einsum``, ``nn.Conv`` and ``nn.Embed`` (its ``attend`` too) are
    intercepted where their parameters hold ``lora_a`` and ``lora_b``, inside ``nn.scan``, ``nn.remat`` and ``nn.vmap``
    too; the model's code stays as it is. Rows of a table are not dropped. The adapters compute in the dtype of the
    layer's output. The base is an argument, so differentiate with respect to the adapters alone::

        def loss(lora, params, batch):
            variables = {"params": lora_params(params, lora, scales)}
            return objective(lora_apply(module.apply)(variables, batch["input_ids"]), batch["label"])

        grads = jax.grad(loss)(lora, params, batch)

    Args:
      apply: ``module.apply`` of a Linen module.
      dropout: rate on the adapters' input. Above 0, for training, it draws from ``rngs={"dropout": key}``; make
        another ``lora_apply(module.apply)`` for evaluation.

    Returns:
      A function with the arguments of ``apply``.

    Raises:
      ValueError: ``dropout`` out of [0, 1); at the call, adapters that no layer read, a layer that cannot use one, or
        no key for the dropout.

    Example:
      >>> from effjax.finetune.lora import lora_params
      >>> model = nn.Dense(2)
      >>> params = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}
      >>> lora = {"kernel": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}}
      >>> lora_apply(model.apply)({"params": lora_params(params, lora, 2.0)}, jnp.ones((1, 3))).tolist()
      [[6.0, 6.0]]
    """
    check_number("dropout", dropout, low=0.0, high=1.0, open_high=True)

    def apply_with_adapters(variables: PyTree, *args: Any, **kwargs: Any) -> Any:
        read: set[str] = set()

        def intercept(next_call: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
            module, method = context.module, context.method_name
            run = _runner(module, method)
            if run is None or not module.has_variable("params", "lora_a"):
                return next_call(*args, **kwargs)
            read.add("/".join(module.path))
            a, b = (module.get_variable("params", name) for name in ("lora_a", "lora_b"))
            call = {**dict(zip(_WORDS[method], args, strict=False)), **kwargs}
            y = next_call(*args, **kwargs)
            x = call.pop(_WORDS[method][0])
            if method == "__call__" and not isinstance(module, nn.Embed):
                x = _dropped(module, jnp.asarray(x).astype(y.dtype), dropout)
            return y + run(module, jnp.asarray(x), (a.astype(y.dtype), b.astype(y.dtype)), call.get("einsum_str"))

        with nn.intercept_methods(intercept):
            outputs = apply(variables, *args, **kwargs)
        _check_read(variables, read)
        return outputs

    return apply_with_adapters


_WORDS = {"__call__": ("inputs", "einsum_str"), "attend": ("query",)}
Factors = tuple[jax.Array, jax.Array]


def _runner(module: nn.Module, method: str) -> Callable[..., jax.Array] | None:
    """What computes the low-rank term of a call, ``(module, x, (a, b), einsum_str)``; None where nothing does."""
    if isinstance(module, nn.Embed):
        return {"__call__": _row, "attend": _logits}.get(method)
    kinds = ((nn.Dense, _dense), (nn.DenseGeneral, _dense_general), (nn.Einsum, _einsum), (nn.Conv, _conv))
    found = [run for kind, run in kinds if isinstance(module, kind)]
    return found[0] if found and method == "__call__" else None


def _dropped(module: nn.Module, x: jax.Array, dropout: float) -> jax.Array:
    if not dropout:
        return x
    if not module.has_rng("dropout"):
        raise ValueError(
            f"dropout={dropout} needs a key: apply(..., rngs={{'dropout': key}}). For evaluation make another "
            "lora_apply(module.apply) without it."
        )
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - dropout, x.shape)
    return jnp.where(keep, x / (1.0 - dropout), jnp.zeros_like(x))


def _dense(module: nn.Dense, x: jax.Array, factors: Factors, _: Any) -> jax.Array:
    a, b = factors
    _check_factors(module, factors, (x.shape[-1], module.features))
    return jnp.matmul(jnp.matmul(x, a, precision=module.precision), b, precision=module.precision)


def _dense_general(module: nn.DenseGeneral, x: jax.Array, factors: Factors, _: Any) -> jax.Array:
    if module.batch_dims:
        raise ValueError(
            f"lora: {'/'.join(module.path)} has batch_dims={module.batch_dims}, a kernel for each entry of a batch, "
            "which has no adapter. Leave it out of the rules."
        )
    axes, features = (
        tuple(value) if isinstance(value, Sequence) else (value,) for value in (module.axis, module.features)
    )
    check = lambda sides: _check_factors(module, factors, sides)
    return through_axes(x, axes, (*factors, features), (module.precision, check))


def _einsum(module: nn.Einsum, x: jax.Array, factors: Factors, string: str | None) -> jax.Array:
    name = "/".join(module.path)
    return low_rank_einsum((string or module.einsum_str or "", module.shape), x, factors, (module.precision, name))


def _conv(module: nn.Conv, x: jax.Array, factors: Factors, _: Any) -> jax.Array:
    name = "/".join(module.path)
    if module.feature_group_count != 1 or module.mask is not None:
        raise ValueError(
            f"lora: {name} is a grouped or masked convolution, which has no adapter. Leave it out of the rules."
        )
    size = (module.kernel_size,) if isinstance(module.kernel_size, int) else tuple(module.kernel_size)
    _check_factors(module, factors, (math.prod(size) * x.shape[-1], module.features))
    a, b = factors
    conv = module.clone(parent=None, name=None, features=a.shape[-1], use_bias=False, dtype=x.dtype)
    kernel = a.reshape(*size, x.shape[-1], a.shape[-1])
    narrow = jnp.asarray(conv.apply({"params": {"kernel": kernel}}, x))
    return jnp.matmul(narrow, b, precision=module.precision)


def _row(module: nn.Embed, tokens: jax.Array, factors: Factors, _: Any) -> jax.Array:
    _check_factors(module, factors, (module.num_embeddings, module.features))
    return jnp.take(factors[0], tokens, axis=0) @ factors[1]


def _logits(module: nn.Embed, x: jax.Array, factors: Factors, _: Any) -> jax.Array:
    _check_factors(module, factors, (module.num_embeddings, module.features))
    return (x.astype(factors[1].dtype) @ factors[1].T) @ factors[0].T


def _check_factors(module: nn.Module, factors: Factors, sides: tuple[int, int]) -> None:
    a, b = factors
    if b.ndim != 2 or (math.prod(a.shape[:-1]), b.shape[-1]) != sides:
        raise ValueError(
            f"lora: in {'/'.join(module.path)}, a {type(module).__name__} of {sides[0]} inputs and {sides[1]} outputs, "
            f"a has shape {a.shape} and b {b.shape}: its kernel was taken for another kind. Tell its axes by "
            "LoraRule(..., inputs=, outputs=, window=)."
        )


def _check_read(variables: PyTree, read: set[str]) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(variables.get("params", {}))
    paths = [path_name(path) for path, _ in leaves]
    given = {path.removesuffix("lora_a").rstrip("/") for path in paths if path.split("/")[-1] == "lora_a"}
    if not given:
        raise ValueError(
            "lora: the parameters hold no adapters. Pass {'params': lora_params(params, lora, scales)}, or call "
            "module.apply itself."
        )
    unread = sorted(given - read)
    if unread:
        raise ValueError(
            f"lora: {len(unread)} of {len(given)} adapters were not read, e.g. that of {unread[0]!r}. Only nn.Dense, "
            "nn.DenseGeneral, nn.Einsum, nn.Conv and nn.Embed that this call runs read them: nn.ConvTranspose, "
            "nn.ConvLocal and layers of your own do not, nor does a trace that nn.jit kept. Leave them out of the "
            "rules, or run the module on lora_merge(params, lora, scales), which has the same values and gradients at "
            "the cost of a full weight gradient."
        )
