"""LoRA: trainable low-rank adapters beside frozen kernels (Hu et al. 2021, arXiv 2106.09685)."""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from effjax.core.errors import check_number, near
from effjax.core.tree import leaves_at, path_name, select, wide, wide_dtype, with_leaves
from effjax.finetune.lora_config import LoraConfig, LoraRule
from effjax.finetune.lora_layout import Layout, is_kernel, is_table, layout, matrix, out_first

__all__ = [
    "lora_init",
    "lora_merge",
    "lora_params",
    "lora_scales",
    "lora_shardings",
    "scale_lora_b",
]

PyTree = Any
Lora = dict[str, dict[str, Any]]  # of arrays, JAX's or NumPy's: {"a", "b"} of an adapter, {"whole"} of a whole leaf
Scales = Any  # a number or scalar array for all adapters, or a mapping from kernel path to one


def lora_init(key: jax.Array, params: PyTree, config: LoraConfig) -> Lora:
    r"""Adapters for the kernels that the rules select; with them the network computes what it did before.

    .. math:: a \sim \mathrm{init}, \qquad b = 0

    Kernels are leaves named ``kernel``, ``[..., in, out]`` as in Flax (convolutions ``[..., *window, in, out]``),
    tables named ``embedding``, ``[..., tokens, out]``, or ``weight``, ``[out, in]`` as in Equinox. A kernel of
    ``nn.DenseGeneral``, of attention or of ``nn.Einsum`` may have several axes of inputs and of outputs; its adapter
    is that of the matrix of all inputs by all outputs. Leading axes may be a stack of layers, as ``nn.scan`` and
    ``nn.vmap`` make them: every layer has its own adapter. Which axes are which is told by the bias, by the query and
    output beside it, or by the layers around it; a kernel of which that cannot be told is refused until its rule says
    so.
    An adapter's draw depends on the key and its path alone, so that another target does not change it. Kernels that lie
    on a mesh have adapters that lie there as ``lora_shardings`` says.

    Leaves of ``config.whole`` are trained whole, from where they are: a head beside the adapters.

    Args:
      key: PRNG key.
      params: arrays or ``jax.ShapeDtypeStruct``: a Linen tree, an NNX state or an Equinox module.
      config: the rules and the initializer.

    Returns:
      ``{kernel path: {"a": [..., in, r], "b": [..., r, out]}}``, several axes of inputs or outputs as one; of a
      convolution, a is ``[..., *window, in, r]``. And ``{path: {"whole": a copy of the leaf}}``, in ``config.dtype``.

    Raises:
      ValueError: a pattern that matches nothing, a leaf that is no kernel, or one whose axes cannot be told; a rank
        above the smaller side of the matrix; a leaf that is adapted as well as whole, or whole without values.

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
            f"rules: {len(others)} of the {len(targets)} leaves matched are no kernels (leaves named 'kernel' or "
            f"'embedding' of two axes or more, or 'weight' of two), e.g. {others[0]!r}. Narrow the pattern: end it "
            "with '/kernel$'. Convolutions of Equinox have no adapter."
        )
    shapes = dict(leaves)
    settings = {path: (layout(path, rule, shapes), rule, config) for path, _, rule in targets}
    adapters = {path: _adapter(key, path, shapes[path], settings[path]) for path in settings}
    return placed(params, adapters) | _whole(params, config, adapters)


def _whole(params: PyTree, config: LoraConfig, adapters: Lora) -> Lora:
    if not config.whole:
        return {}
    owners = jax.tree.leaves(select(params, list(config.whole), argument="whole").tree)
    leaves = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    chosen = {path: leaf for (path, leaf), owner in zip(leaves, owners, strict=True) if owner >= 0}
    for path, leaf in chosen.items():
        if path in adapters:
            raise ValueError(f"whole={config.whole}: {path} has an adapter too. Narrow one of the patterns.")
        if isinstance(leaf, jax.ShapeDtypeStruct) or not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            what = "has no values" if isinstance(leaf, jax.ShapeDtypeStruct) else f"is {jnp.result_type(leaf)}"
            raise ValueError(f"whole={config.whole}: {path} {what}; give arrays of floating numbers.")
    # Copies: what is donated with the adapters must not be the base.
    return {path: {"whole": jnp.array(leaf, config.dtype, copy=True)} for path, leaf in chosen.items()}


def only_adapters(lora: Lora) -> Lora:
    """The adapters, without what is trained whole."""
    return {path: entry for path, entry in lora.items() if "whole" not in entry}


def only_whole(lora: Lora) -> Lora:
    """What is trained whole, without the adapters."""
    return {path: entry for path, entry in lora.items() if "whole" in entry}


def mesh_of(params: PyTree) -> Mesh | None:
    """The mesh of several devices that arrays lie on; None where they do not, or are traced."""
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None) if not isinstance(leaf, jax.core.Tracer) else None
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


def placed(params: PyTree, adapters: Lora) -> Lora:
    """Adapters, or past links of them, where their kernels lie; traced ones too."""
    mesh = mesh_of(params)
    if mesh is None:
        return adapters
    shardings = {path: getattr(leaf, "sharding", None) for path, leaf in leaves_at(params, adapters).items()}
    copied = NamedSharding(mesh, P())
    shardings = {path: own if isinstance(own, NamedSharding) else copied for path, own in shardings.items()}
    return jax.device_put(adapters, lora_shardings(shardings, adapters))


def _adapter(
    key: jax.Array, path: str, shape: tuple[int, ...], settings: tuple[Layout, LoraRule, LoraConfig]
) -> dict[str, jax.Array]:
    (stack, inputs, _, window), rule, config = settings
    lead, rest = shape[:stack], shape[stack:]
    sides = math.prod(rest[:inputs]), math.prod(rest[inputs:])
    fan_in, fan_out = sides[::-1] if out_first(path) else sides
    if rule.rank > min(fan_in, fan_out):
        raise ValueError(
            f"rank={rule.rank} of the rule {rule.pattern!r} exceeds the smaller side of {path} ({fan_in} in, "
            f"{fan_out} out). Choose a rank in [1, {min(fan_in, fan_out)}], or give these kernels a rule of their own."
        )
    own_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    own = (*rest[:window], fan_in // math.prod(rest[:window]), rule.rank)
    a = _draw(own_key, lead, own, (config, 1 if is_table(path) else fan_in))
    return {"a": a, "b": jnp.zeros((*lead, rule.rank, fan_out), config.dtype)}


def _draw(key: jax.Array, lead: tuple[int, ...], shape: tuple[int, ...], settings: tuple[LoraConfig, int]) -> jax.Array:
    config, fan_in = settings
    if callable(config.init):
        keys = jax.random.split(key, math.prod(lead))
        return jax.vmap(lambda own: config.init(own, shape, config.dtype))(keys).reshape(*lead, *shape)
    draw_dtype = wide_dtype(config.dtype)
    if config.init == "gaussian":
        return (jax.random.normal(key, lead + shape, draw_dtype) / shape[-1]).astype(config.dtype)
    bound = math.sqrt((1.0 if config.init == "peft" else 6.0) / fan_in)
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
    lora = only_adapters(lora)
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
        if "whole" in adapter:
            if np.shape(adapter["whole"]) != shapes[path]:
                own = np.shape(adapter["whole"])
                raise ValueError(f"lora: {path}, trained whole, has shape {own}, but {shapes[path]} in params.")
            continue
        a, b = np.shape(adapter["a"]), np.shape(adapter["b"])
        lead = len(b) - 2
        sides = matrix(path, shapes[path], b)
        if a[-1] != b[-2] or sides != (a[:lead], math.prod(a[lead:-1]), b[-1]) or a[:lead] != b[:lead]:
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
    adapters, whole = only_adapters(lora), only_whole(lora)

    def add(node: PyTree, prefix: str) -> PyTree:
        if not isinstance(node, Mapping):
            return node
        grown = {name: add(child, f"{prefix}{name}/") for name, child in node.items()}
        for path in (f"{prefix}kernel", f"{prefix}embedding"):
            if path in adapters:
                b = lora[path]["b"]
                grown["lora_a"] = lora[path]["a"]
                grown["lora_b"] = (b * scale_of(scales, path)).astype(b.dtype)
        return grown

    grown = add(params, "")
    return with_leaves(grown, {path: entry["whole"] for path, entry in whole.items()}) if whole else grown


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
        if "whole" in lora[name]:
            return jnp.asarray(lora[name]["whole"]).astype(kernel.dtype)
        delta = kernel_delta(name, lora[name], scale_of(scales, name), kernel.shape)
        return (wide(kernel) + delta).astype(kernel.dtype)

    return jax.tree_util.tree_map_with_path(merge, params)


def check_floating(params: PyTree, lora: Lora) -> None:
    """Raise ``ValueError`` where an adapter's kernel is quantised: sums would be cut to its few values."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        if name not in lora or "whole" in lora[name]:  # such as the activation of an Equinox module, a leaf too
            continue
        dtype = jnp.result_type(leaf)
        if not (jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize > 1):
            raise ValueError(
                f"lora: {path_name(path)} is {dtype}, a quantised kernel, which cannot hold the sum with an adapter. "
                "Dequantise it first (kernel.astype(jnp.float32), times its scale), keep the adapter beside it by "
                "lora_apply, or call cola_merge(..., float32=True)."
            )


def lora_delta(adapter: Mapping[str, Any], scale: Any) -> Float[Array, "*lead in out"]:
    """``scale * a @ b`` of one adapter in float32 or wider at the highest precision, as ``a`` and ``b`` lie."""
    a, b = wide(adapter["a"]), wide(adapter["b"])
    b = b.reshape(*b.shape[:-2], *[1] * (a.ndim - b.ndim), *b.shape[-2:])
    return scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def kernel_delta(path: str, adapter: Mapping[str, Any], scale: Any, shape: tuple[int, ...]) -> jax.Array:
    """``lora_delta`` as the kernel lies."""
    delta = lora_delta(adapter, scale)
    return (delta.mT if out_first(path) else delta).reshape(shape)


def lora_shardings(params_shardings: PyTree, lora: Lora) -> dict[str, dict[str, NamedSharding]]:
    """Shardings of the adapters that follow the base: ``a`` its input axis, ``b`` its output axis, r replicated.

    Of several axes of inputs or outputs the first one's place is taken; outputs that cannot be told are replicated.

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
    if "whole" in adapter:
        return {"whole": base}
    a, b = np.ndim(adapter["a"]), np.ndim(adapter["b"])
    axes = (*base.spec, *[None] * (a - len(base.spec)))
    if out_first(path):
        return {"a": NamedSharding(base.mesh, P(axes[1], None)), "b": NamedSharding(base.mesh, P(None, axes[0]))}
    return {
        "a": NamedSharding(base.mesh, P(*axes[: a - 1], None)),
        # Of kernels with more axes: the first one of the outputs, or the last where there is one, if they agree.
        "b": NamedSharding(base.mesh, P(*axes[: b - 2], None, axes[-1] if axes[a - 1] == axes[-1] else None)),
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
