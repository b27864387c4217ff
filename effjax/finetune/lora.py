"""LoRA: trainable low-rank adapters beside frozen kernels (Hu et al. 2021, arXiv 2106.09685)."""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from effjax.core.errors import check_choice, check_number, near
from effjax.core.tree import path_name, select, wide, wide_dtype

__all__ = [
    "LoraConfig",
    "LoraRule",
    "lora_apply",
    "lora_init",
    "lora_merge",
    "lora_params",
    "lora_scales",
    "lora_shardings",
    "scale_lora_b",
]

PyTree = Any
Lora = dict[str, dict[str, Any]]  # of arrays, JAX's or NumPy's
Scales = Any  # a number or scalar array for all adapters, or a mapping from kernel path to one

_INITS = ("peft", "gaussian", "flax")


@dataclasses.dataclass(frozen=True)
class LoraRule:
    """Which kernels get adapters of which size.

    Attributes:
      pattern: regular expression on the slash-joined path of the kernel (``re.search``).
      rank: r, the width of the adapters.
      alpha: the adapters count with the factor alpha / r, or alpha / sqrt(r) with ``rslora``.
      window: axes of a convolution's window. None: 2 for kernels of four or five axes (two-dimensional convolutions,
        stacked or not), else 0 (dense kernels, stacked or not).

    Raises:
      ValueError: a number out of range.

    Example:
      >>> LoraRule("attention/(query|value)/kernel$", rank=4).alpha
      16.0
    """

    pattern: str
    rank: int = 8
    alpha: float = 16.0
    window: int | None = None

    def __post_init__(self) -> None:
        check_number("rank", self.rank, low=1, integer=True)
        check_number("alpha", self.alpha, low=0.0, open_low=True)
        if self.window is not None:
            check_number("window", self.window, low=0, integer=True)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What ``lora_init`` makes; hashable, so it may be a static argument.

    Attributes:
      rules: one ``LoraRule`` or several, the first match wins; a pattern alone has the default rank and alpha.
      dropout: rate on the adapters' input, for ``lora_apply``.
      init: how ``a`` starts, with n the fan-in of the kernel: ``"peft"`` U(-1/sqrt(n), 1/sqrt(n)), the default of
        Hugging Face PEFT; ``"gaussian"`` N(0, 1/r^2), its other one; ``"flax"`` U(-sqrt(6/n), sqrt(6/n)), of
        ``nnx.LoRA`` and Qwix; or an initializer ``(key, shape, dtype) -> array``. ``b`` starts at zero.
      rslora: factor alpha / sqrt(r) in place of alpha / r (Kalajdzievski 2023, arXiv 2312.03732).
      dtype: of the adapters.

    Raises:
      ValueError: no rules, an unknown initializer, ``dropout`` out of [0, 1).
      TypeError: ``dtype`` is not a floating type.

    Example:
      >>> config = LoraConfig((LoraRule("mlp/.*/kernel", rank=2), "query/kernel"))
      >>> [rule.rank for rule in config.rules]
      [2, 8]
    """

    rules: Sequence[LoraRule | str] | LoraRule | str
    dropout: float = 0.0
    init: str | Callable[..., jax.Array] = "peft"
    rslora: bool = False
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        rules = (self.rules,) if isinstance(self.rules, (str, LoraRule)) else tuple(self.rules)
        if not rules:
            raise ValueError("rules=() adapts nothing. Give a pattern such as 'attention/(query|value)/kernel'.")
        rules = tuple(LoraRule(rule) if isinstance(rule, str) else rule for rule in rules)
        object.__setattr__(self, "rules", rules)
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        check_number("dropout", self.dropout, low=0.0, high=1.0, open_high=True)
        if not callable(self.init):
            check_choice("init", self.init, _INITS)
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise TypeError(f"dtype={self.dtype} must be a floating type, such as float32 or bfloat16.")

    @property
    def each_rule(self) -> tuple[LoraRule, ...]:
        """``rules``, none of them a plain pattern."""
        return cast(tuple[LoraRule, ...], self.rules)


def lora_init(key: jax.Array, params: PyTree, config: LoraConfig) -> Lora:
    r"""Adapters for the kernels that the rules select; with them the network computes what it did before.

    .. math:: a \sim \mathrm{init}, \qquad b = 0

    Kernels are leaves named ``kernel``, ``[..., in, out]`` as in Flax (convolutions ``[..., *window, in, out]``), or
    ``weight``, ``[out, in]`` as in Equinox. Further leading axes are stacks of layers, as ``nn.scan`` and ``nn.vmap``
    make them: every layer has its own adapter. Leave out the kernels of ``nn.DenseGeneral``, whose axes are no stack;
    those that can be told by their bias are refused.
    An adapter's draw depends on the key and its path alone, so that another target does not change it.

    Args:
      key: PRNG key.
      params: arrays or ``jax.ShapeDtypeStruct``: a Linen tree, an NNX state or an Equinox module.
      config: the rules and the initializer.

    Returns:
      ``{kernel path: {"a": [..., in, r], "b": [..., r, out]}}``; of a convolution, a is ``[..., *window, in, r]``.

    Raises:
      ValueError: a pattern that matches nothing, a leaf that is no kernel, or a kernel of ``nn.DenseGeneral``; a rank
        above the kernel's smaller side.

    Example:
      >>> params = {"query": {"kernel": jnp.ones((16, 8)), "bias": jnp.zeros(8)}}
      >>> lora = lora_init(jax.random.key(0), params, LoraConfig(LoraRule("query/kernel", rank=4)))
      >>> lora["query/kernel"]["a"].shape, lora["query/kernel"]["b"].shape
      ((16, 4), (4, 8))
    """
    owners = jax.tree.leaves(select(params, [rule.pattern for rule in config.each_rule], argument="rules").tree)
    leaves = [(path_name(path), np.shape(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    targets = [(path, shape, config.each_rule[i]) for (path, shape), i in zip(leaves, owners, strict=True) if i >= 0]
    others = [path for path, shape, _ in targets if not is_kernel(path, shape)]
    if others:
        raise ValueError(
            f"rules: {len(others)} of the {len(targets)} leaves matched are no kernels (leaves named 'kernel' of two "
            f"axes or more, or 'weight' of two), e.g. {others[0]!r}. Narrow the pattern: end it with '/kernel$'."
        )
    shapes = dict(leaves)
    for path, shape, rule in targets:
        if rule.window is None and _is_general(path, shape, shapes):
            raise ValueError(
                f"rules: {path} of shape {shape} is a kernel of nn.DenseGeneral (or of attention built on it), whose "
                "axes are no stack of layers. Leave it out of the rules, or write the layer as nn.Dense and a reshape."
            )
    return {path: _adapter(key, path, shape, rule, config) for path, shape, rule in targets}


def _is_general(path: str, shape: Sequence[int], shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether a kernel of three axes is of ``nn.DenseGeneral``, by the layers beside it: no stack of kernels.

    The bias of a stack is [layers, out], that of [in, heads, size] is [heads, size]. Without one, attention is known by
    the kernels of its query and its output.
    """
    if len(shape) != 3 or out_first(path):
        return False
    parent, _, _ = path.rpartition("/")
    bias = tuple(shapes.get(f"{parent}/bias" if parent else "bias", ()))
    if len(bias) == 2:
        return bias == tuple(shape[1:]) and bias != (shape[0], shape[2])
    beside = parent.rpartition("/")[0]
    query, out = (tuple(shapes.get(f"{beside}/{name}/kernel".lstrip("/"), ())) for name in ("query", "out"))
    heads = len(query) == len(out) == 3 and query[1:] == out[:2]
    return heads and parent.rpartition("/")[2] in ("query", "key", "value", "out")


def is_kernel(path: str, shape: Sequence[int]) -> bool:
    """Whether a leaf can have an adapter, by its name and number of axes."""
    name = path.rsplit("/", 1)[-1]
    return (name == "kernel" and len(shape) >= 2) or (name == "weight" and len(shape) == 2)


def out_first(path: str) -> bool:
    """Whether the kernel lies as ``[out, in]``, as Equinox's ``weight`` does."""
    return path.rsplit("/", 1)[-1] == "weight"


def _adapter(
    key: jax.Array, path: str, shape: tuple[int, ...], rule: LoraRule, config: LoraConfig
) -> dict[str, jax.Array]:
    window = (2 if len(shape) in (4, 5) else 0) if rule.window is None else rule.window
    if window > len(shape) - 2:
        raise ValueError(f"window={window} of the rule {rule.pattern!r}: {path} has shape {shape}, too few axes.")
    *stack, fan_in, fan_out = shape[::-1] if out_first(path) else shape
    lead, window_shape = tuple(stack[: len(stack) - window]), tuple(stack[len(stack) - window :])
    inputs = math.prod(window_shape) * fan_in
    if rule.rank > min(inputs, fan_out):
        raise ValueError(
            f"rank={rule.rank} of the rule {rule.pattern!r} exceeds the smaller side of {path} ({inputs} in, "
            f"{fan_out} out). Choose a rank in [1, {min(inputs, fan_out)}], or give these kernels a rule of their own."
        )
    own_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    a = _draw(own_key, lead, (*window_shape, fan_in, rule.rank), config)
    return {"a": a, "b": jnp.zeros((*lead, rule.rank, fan_out), config.dtype)}


def _draw(key: jax.Array, lead: tuple[int, ...], shape: tuple[int, ...], config: LoraConfig) -> jax.Array:
    if callable(config.init):
        keys = jax.random.split(key, math.prod(lead))
        return jax.vmap(lambda own: config.init(own, shape, config.dtype))(keys).reshape(*lead, *shape)
    draw_dtype = wide_dtype(config.dtype)
    if config.init == "gaussian":
        return (jax.random.normal(key, lead + shape, draw_dtype) / shape[-1]).astype(config.dtype)
    bound = math.sqrt((1.0 if config.init == "peft" else 6.0) / math.prod(shape[:-1]))
    return jax.random.uniform(key, lead + shape, draw_dtype, -bound, bound).astype(config.dtype)


def lora_scales(lora: Lora, config: LoraConfig) -> dict[str, float]:
    """The factor of every adapter: alpha / r, or alpha / sqrt(r) with ``config.rslora``.

    Args:
      lora: adapters, of which the widths r are taken.
      config: the rules that made them.

    Returns:
      One number per kernel path.

    Raises:
      ValueError: a rule that matches no adapter, or an adapter that no rule matches.

    Example:
      >>> config = LoraConfig("kernel")
      >>> lora_scales(lora_init(jax.random.key(0), {"kernel": jnp.ones((16, 8))}, config), config)
      {'kernel': 2.0}
    """
    paths = sorted(lora)
    owners = select(dict.fromkeys(paths, 0), [rule.pattern for rule in config.each_rule], argument="rules").tree
    alone = [path for path in paths if owners[path] < 0]
    if alone:
        raise ValueError(f"rules: no rule matches the adapters of {alone[:5]}. Pass the config that made them.")
    ranks = {path: lora[path]["a"].shape[-1] for path in paths}
    root = math.sqrt if config.rslora else float
    return {path: config.each_rule[owners[path]].alpha / root(ranks[path]) for path in paths}


def scale_of(scales: Scales, path: str) -> Any:
    """The scale of one adapter."""
    if not isinstance(scales, Mapping):
        return scales
    if path not in scales:
        raise ValueError(f"scales has no entry for {path!r}.{near(path, scales)} Use lora_scales(lora, config).")
    return scales[path]


def check_fit(params: PyTree, lora: Lora) -> None:
    """Raise ``ValueError`` unless every adapter has a kernel of its shape in ``params``."""
    shapes = {path_name(path): np.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for path, adapter in lora.items():
        if path not in shapes:
            raise ValueError(
                f"lora: params have no kernel {path!r}.{near(path, shapes)} Pass the tree that lora_init was given."
            )
        a, b = np.shape(adapter["a"]), np.shape(adapter["b"])
        made = (b[-1], a[-2]) if out_first(path) else (*a[:-1], b[-1])
        if made != shapes[path] or a[-1] != b[-2] or a[: len(b) - 2] != b[:-2]:
            raise ValueError(
                f"lora: the adapter of {path} with a {a} and b {b} does not fit the kernel of shape {shapes[path]}."
            )


def lora_params(params: PyTree, lora: Lora, scales: Scales) -> PyTree:
    """Linen parameters with ``lora_a`` and ``lora_b`` beside every adapted kernel, for ``lora_apply``.

    The base is not copied. ``lora_b`` carries the scale, so that gradients with respect to ``lora`` are those of
    W + scale a b.

    Args:
      params: nested dictionaries, the tree that ``lora_init`` was given; may be bfloat16.
      lora: adapters.
      scales: of ``lora_scales``, or one number (or traced scalar) for all.

    Returns:
      Nested dictionaries with the additional leaves.

    Raises:
      ValueError: an adapter that has no kernel here, or one of another shape; a scale missing.

    Example:
      >>> lora = {"Dense_0/kernel": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}}
      >>> sorted(lora_params({"Dense_0": {"kernel": jnp.ones((3, 2))}}, lora, 2.0)["Dense_0"])
      ['kernel', 'lora_a', 'lora_b']
    """
    check_fit(params, lora)

    def add(node: PyTree, prefix: str) -> PyTree:
        if not isinstance(node, Mapping):
            return node
        grown = {name: add(child, f"{prefix}{name}/") for name, child in node.items()}
        adapter = lora.get(f"{prefix}kernel")
        if adapter is not None:
            b = adapter["b"]
            grown["lora_a"] = adapter["a"]
            grown["lora_b"] = (b * scale_of(scales, f"{prefix}kernel")).astype(b.dtype)
        return grown

    return add(params, "")


def lora_merge(params: PyTree, lora: Lora, scales: Scales) -> PyTree:
    r"""Parameters with the adapters added to their kernels, for inference at the base's cost.

    .. math:: W' = W + s\, a\, b

    computed in float32 at the highest precision (float64 where an operand is that) and cast back. On a mesh it is
    local: jit it with the base's shardings as ``out_shardings``. A bfloat16 kernel loses what is below its own
    resolution.

    Args:
      params: the tree that ``lora_init`` was given: Linen, NNX state or Equinox.
      lora: adapters.
      scales: as for ``lora_params``.

    Returns:
      A tree like ``params``; leaves without an adapter are the same objects.

    Raises:
      ValueError: as for ``lora_params``; a kernel of integers or of 8 bits, which would lose the adapter.

    Example:
      >>> lora = {"kernel": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}}
      >>> lora_merge({"kernel": jnp.zeros((3, 2))}, lora, 2.0)["kernel"].tolist()
      [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
    """
    check_fit(params, lora)
    check_floating(params, lora)

    def merge(path: Sequence[Any], kernel: Any) -> Any:
        name = path_name(path)
        if name not in lora:
            return kernel
        delta = lora_delta(lora[name], scale_of(scales, name))
        return (wide(kernel) + (delta.mT if out_first(name) else delta)).astype(kernel.dtype)

    return jax.tree_util.tree_map_with_path(merge, params)


def check_floating(params: PyTree, lora: Lora) -> None:
    """Raise ``ValueError`` where an adapter's kernel is quantised: sums would be cut to its few values."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path_name(path) not in lora:  # such as the activation of an Equinox module, which is a leaf too
            continue
        dtype = jnp.result_type(leaf)
        if not (jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize > 1):
            raise ValueError(
                f"lora: {path_name(path)} is {dtype}, a quantised kernel, which cannot hold the sum with an adapter. "
                "Dequantise it first (kernel.astype(jnp.float32), times its scale), keep the adapter beside it by "
                "lora_apply, or call cola_merge(..., float32=True)."
            )


def lora_delta(adapter: Mapping[str, jax.Array], scale: Any) -> Float[Array, "*lead in out"]:
    """``scale * a @ b`` of one adapter in float32 or wider at the highest precision, in Flax's layout."""
    a, b = wide(adapter["a"]), wide(adapter["b"])
    b = b.reshape(*b.shape[:-2], *[1] * (a.ndim - b.ndim), *b.shape[-2:])
    return scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def lora_apply(apply: Callable[..., Any], dropout: float = 0.0) -> Callable[..., Any]:
    r"""``module.apply`` that adds the adapters found in the parameters, in factored form.

    .. math:: y = x W + \mathrm{bias} + (\mathrm{dropout}(x)\, a)\, (s\, b)

    The sum W + s a b is never formed, and neither is its gradient. ``nn.Dense`` and ``nn.Conv`` are intercepted where
    their parameters hold ``lora_a`` and ``lora_b``, inside ``nn.scan``, ``nn.remat`` and ``nn.vmap`` too; the model's
    code stays as it is. The adapters compute in the dtype of the layer's output. The base is an argument, so
    differentiate with respect to the adapters alone::

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
            module = context.module
            if (
                context.method_name != "__call__"
                or not isinstance(module, (nn.Dense, nn.Conv))
                or not module.has_variable("params", "lora_a")
            ):
                return next_call(*args, **kwargs)
            read.add("/".join(module.path))
            a, b = (module.get_variable("params", name) for name in ("lora_a", "lora_b"))
            x = args[0] if args else kwargs["inputs"]
            y = next_call(*args, **kwargs)
            return y + _low_rank(module, x, a, b, y.dtype, dropout)

        with nn.intercept_methods(intercept):
            outputs = apply(variables, *args, **kwargs)
        _check_read(variables, read)
        return outputs

    return apply_with_adapters


def _low_rank(
    module: nn.Module, x: jax.Array, a: jax.Array, b: jax.Array, dtype: DTypeLike, dropout: float
) -> jax.Array:
    _check_layer(module, a, b)
    x, a, b = (array.astype(dtype) for array in (jnp.asarray(x), a, b))
    if dropout:
        if not module.has_rng("dropout"):
            raise ValueError(
                f"dropout={dropout} needs a key: apply(..., rngs={{'dropout': key}}). For evaluation make another "
                "lora_apply(module.apply) without it."
            )
        keep = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - dropout, x.shape)
        x = jnp.where(keep, x / (1.0 - dropout), jnp.zeros_like(x))
    if isinstance(module, nn.Dense):
        narrow = jnp.matmul(x, a, precision=module.precision)
    else:
        conv = module.clone(parent=None, name=None, features=a.shape[-1], use_bias=False, dtype=dtype)
        narrow = jnp.asarray(conv.apply({"params": {"kernel": a}}, x))
    return jnp.matmul(narrow, b, precision=module.precision)


def _check_layer(module: nn.Module, a: jax.Array, b: jax.Array) -> None:
    name = "/".join(module.path)
    if isinstance(module, nn.Conv) and (module.feature_group_count != 1 or module.mask is not None):
        raise ValueError(
            f"lora: {name} is a grouped or masked convolution, which has no adapter. Leave it out of the rules."
        )
    window = a.ndim - 2 if isinstance(module, nn.Conv) else 0
    if b.ndim != 2 or a.ndim != window + 2:
        raise ValueError(
            f"lora: in {name}, a {type(module).__name__}, a has shape {a.shape} and b {b.shape}: its kernel was taken "
            "for a stack or for a convolution. Tell the axes of its window by LoraRule(..., window=...)."
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
            f"lora: {len(unread)} of {len(given)} adapters were not read, e.g. that of {unread[0]!r}. Only nn.Dense "
            "and nn.Conv that this call runs read them: nn.DenseGeneral, nn.Einsum and layers of your own do not, nor "
            "does a trace that nn.jit kept. Leave them out of the rules, write the layer as nn.Dense and a reshape, or "
            "run the module on lora_merge(params, lora, scales)."
        )


def lora_shardings(params_shardings: PyTree, lora: Lora) -> dict[str, dict[str, NamedSharding]]:
    """Shardings of the adapters that follow the base: ``a`` its input axis, ``b`` its output axis, r replicated.

    Args:
      params_shardings: ``NamedSharding`` for every leaf of the base.
      lora: adapters, or their shapes from ``jax.eval_shape``.

    Returns:
      A tree like ``lora``, for ``jax.device_put`` or ``out_shardings`` of a jitted ``lora_init``.

    Raises:
      ValueError: an adapter whose kernel has no sharding here.
      TypeError: a sharding that is no ``NamedSharding``.

    Example:
      >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> base = {"kernel": NamedSharding(mesh, P(None, "model"))}
      >>> lora = {"kernel": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}}
      >>> tuple(lora_shardings(base, lora)["kernel"]["b"].spec)
      (None, 'model')
    """
    shardings = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params_shardings)}
    return {path: _adapter_shardings(path, adapter, shardings) for path, adapter in lora.items()}


def _adapter_shardings(path: str, adapter: Mapping[str, Any], shardings: Mapping[str, Any]) -> dict[str, NamedSharding]:
    if path not in shardings:
        raise ValueError(f"params_shardings has no leaf {path!r}.{near(path, shardings)}")
    base = shardings[path]
    if not isinstance(base, NamedSharding):
        raise TypeError(f"params_shardings: {path} has {type(base).__name__}, but a NamedSharding is needed.")
    lead = np.ndim(adapter["b"]) - 2
    axes = (*base.spec, *[None] * (np.ndim(adapter["a"]) - len(base.spec)))
    *before, fan_in, fan_out = (axes[1], axes[0]) if out_first(path) else axes
    return {
        "a": NamedSharding(base.mesh, P(*before, fan_in, None)),
        "b": NamedSharding(base.mesh, P(*before[:lead], None, fan_out)),
    }


def scale_lora_b(ratio: ArrayLike = 16.0) -> optax.GradientTransformationExtraArgs:
    """LoRA+: the factors ``b`` learn ``ratio`` times faster than the factors ``a``.

    Place it after the optimizer; a decoupled weight decay before it is multiplied too, as it would be by a learning
    rate of its own::

        tx = optax.chain(optax.adamw(1e-4), scale_lora_b(16.0))

    Args:
      ratio: learning rate of b over that of a; positive.

    Returns:
      A transformation over any tree in which adapters sit, i.e. dictionaries of ``a`` and ``b`` alone.

    Raises:
      ValueError: ``ratio`` out of range; at ``init``, a tree without adapters.

    Example:
      >>> lora = {"kernel": {"a": jnp.ones(1), "b": jnp.ones(1)}}
      >>> tx = scale_lora_b(16.0)
      >>> updates, _ = tx.update(lora, tx.init(lora))
      >>> updates["kernel"]["b"].item(), updates["kernel"]["a"].item()
      (16.0, 1.0)

    Hayou, Ghosh & Yu 2024, arXiv 2402.12354.
    """
    check_number("ratio", ratio, low=0.0, open_low=True, hint="16 is usual; 1 changes nothing.")

    def init(params: PyTree) -> optax.EmptyState:
        if not any(map(_is_adapter, jax.tree.leaves(params, is_leaf=_is_adapter))):
            raise ValueError("scale_lora_b: params hold no adapters ({'a': ..., 'b': ...}). Pass those of lora_init.")
        return optax.EmptyState()

    def scale(node: PyTree) -> PyTree:
        if not _is_adapter(node):
            return node
        return {"a": node["a"], "b": jax.tree.map(lambda u: (wide(u) * ratio).astype(u.dtype), node["b"])}

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra: Any) -> tuple[PyTree, Any]:
        del params, extra
        return jax.tree.map(scale, updates, is_leaf=_is_adapter), state

    return optax.GradientTransformationExtraArgs(init, update)


def _is_adapter(node: PyTree) -> bool:
    return isinstance(node, Mapping) and set(node) == {"a", "b"}
