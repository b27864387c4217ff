"""SI-CNN: residual blocks that compute on a grid of anchor pixels and interpolate between them.

A reconstruction: the pre-print "Spatially Interpolated Inverted Residual Block" (A. Kag, G. Wadhwa, V. Saligrama,
P. Jain, under review in 2023) was never published. ``spatially_interpolate`` says what was known, and what is ours.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from effjax.core.errors import check_choice, check_number, near
from effjax.models.layers import Images
from effjax.models.residual_blocks import BasicBlock, Bottleneck
from effjax.vision.si_block import CheapPath, SIBlock, SIConfig

__all__ = ["BlockSite", "interpolated", "si_cnn", "warm_start"]

PyTree = Any
Variables = Mapping[str, PyTree]
Model = TypeVar("Model", bound=nn.Module)
Branch = Callable[[nn.Module], tuple[nn.Module, Callable[[jax.Array], jax.Array] | None]]
Policy = str | Collection[str] | Callable[["BlockSite"], bool]


class BlockSite(NamedTuple):
    """A place of a network where a block stands.

    Attributes:
      name: of the block, ``"stage2_block1"``.
      size: (height, width) of the map that enters.
      channels: of the map that enters, and of the one that leaves.
      strides: of the block.
    """

    name: str
    size: tuple[int, int]
    channels: tuple[int, int]
    strides: int

    @property
    def residual(self) -> bool:
        """Whether the block keeps the shape, so that its input can be added."""
        return self.strides == 1 and self.channels[0] == self.channels[1]


POLICIES: dict[str, Callable[[BlockSite], bool]] = {
    "residual_stride1": lambda site: site.residual,
    "residual_stride1_min14": lambda site: site.residual and min(site.size) >= 14,
    "stride1": lambda site: site.strides == 1,
    "all": lambda site: True,
}


def si_cnn(
    key: jax.Array,
    model: Model,
    variables: Variables,
    images: Images | jax.ShapeDtypeStruct,
    *,
    policy: Policy = "residual_stride1",
    config: SIConfig | None = None,
    logit: float = 4.0,
) -> tuple[Model, dict[str, PyTree]]:
    """A trained dense network with its blocks interpolated, ready to be trained further.

    ``interpolated``, ``init`` and ``warm_start`` in one. At first the blend is nearly all interpolation, so that the
    network does what the dense one does on its anchors.

    Args:
      key: of the fresh parameters, those of the cheap paths.
      model: a Linen network that takes its blocks from a field ``block``: a ``ResNet``, an ``InvertedResidualNet``.
      variables: its trained variables.
      images: example input [batch, height, width, channels], or its shape.
      policy: as for ``interpolated``.
      config: as for ``interpolated``.
      logit: as for ``warm_start``.

    Returns:
      The interpolated network and its variables.

    Raises:
      ValueError: as ``interpolated`` and ``warm_start``.

    Example:
      >>> from effjax.models.resnet import ResNet
      >>> dense, images = ResNet(stages=(1,), widths=(8,)), jnp.zeros((1, 8, 8, 3))
      >>> variables = jax.jit(dense.init)(jax.random.key(0), images)
      >>> model, variables = si_cnn(jax.random.key(1), dense, variables, images)
      >>> sorted(variables["params"]["stage1_block0"])
      ['alpha', 'cheap', 'core']

    A reconstruction, see ``spatially_interpolate``.
    """
    model = interpolated(model, images, policy, config=config)
    fresh = jax.jit(model.init)(key, jnp.zeros(images.shape, images.dtype))
    return model, warm_start(variables, fresh, logit=logit)


def interpolated(
    model: Model,
    images: Images | jax.ShapeDtypeStruct,
    policy: Policy = "residual_stride1",
    *,
    config: SIConfig | None = None,
    branch: Branch | None = None,
) -> Model:
    """The same network with some of its blocks spatially interpolated.

    Blocks that keep their shape add their input, the others do not; of those with stride 2 the core halves the anchors
    and the cheap path the map.

    Args:
      model: a Linen network that takes its blocks from a field ``block``, a factory ``(features, strides=, norm=,
        dtype=, name=, ...)``: a ``ResNet``, an ``InvertedResidualNet``. It is traced once, nothing is run.
      images: example input [batch, height, width, channels], or its shape: of what size maps are.
      policy: which blocks. ``"residual_stride1"``: all that keep their shape; ``"residual_stride1_min14"``: of these
        the ones on maps of at least 14 x 14; ``"stride1"``: also those that only change the channels; ``"all"``. Or
        names, or a function from a ``BlockSite`` to whether.
      config: settings of the blocks; ``SIConfig()`` if None.
      branch: ``block -> (core, activation)``: from one block of the network to a module that computes its branch alone,
        without the shortcut, and what follows the sum (None for nothing). By default ``block.clone(skip=False)``, and
        relu after a ``BasicBlock`` or ``Bottleneck``.

    Returns:
      A network of the same type. Variables of an interpolated block stand below ``core``, those of its cheap path
      below ``cheap``, the logits of its blend are ``alpha``, or ``gate``.

    Raises:
      ValueError: a network without the field ``block``, a policy that is unknown or chooses no block.

    Example:
      >>> from effjax.models.resnet import ResNet
      >>> images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
      >>> model = interpolated(ResNet(stages=(1, 2), widths=(8, 16)), images, config=SIConfig(stride=3))
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
      >>> [name for name, block in variables["params"].items() if "alpha" in block]
      ['stage1_block0', 'stage2_block1']

    A reconstruction, see ``spatially_interpolate``.
    """
    sites = block_sites(model, images)
    chosen = [site for site in sites if _wanted(policy, sites)(site)]
    if not chosen:
        listed = ", ".join(f"{site.name} {site.channels} on {site.size}" for site in sites[:6])
        raise ValueError(f"policy={policy!r} chooses none of the {len(sites)} blocks. They begin with {listed}.")
    config = config or SIConfig()
    if config.cheap is None and (strided := [site.name for site in chosen if site.strides > 1]):
        raise ValueError(
            f"config.cheap=None, but {strided[0]!r} has stride 2: only a cheap path says the size of its map."
        )
    offsets = itertools.cycle(config.offsets)
    # Only blocks that keep the size may shift their anchors.
    settings = {site.name: (site.residual, next(offsets) if site.strides == 1 else (0, 0)) for site in chosen}
    return _with_factory(model, functools.partial(Interpolating, tuple(settings.items()), config, branch or _branch))


def warm_start(variables: Variables, fresh: Variables, *, logit: float = 4.0) -> dict[str, PyTree]:
    """Variables of an interpolated network that begins as a trained dense one.

    Every array of the dense network is copied, into the core where its block is interpolated; the logits of the blends
    are set, so that alpha is nearly 1 everywhere and is learned from there; the cheap paths stay as they are.

    Args:
      variables: of the dense network.
      fresh: of the interpolated one, from its ``init``.
      logit: initial logit of the blends; sigmoid(4) = 0.982.

    Returns:
      Variables in the structure of ``fresh``.

    Raises:
      ValueError: an array of the dense network that has no place of its shape, or a place without an array.

    Example:
      >>> dense = {"params": {"block0": {"conv": jnp.ones(2)}}}
      >>> fresh = {"params": {"block0": {"core": {"conv": jnp.zeros(2)}, "alpha": jnp.zeros(2)}}}
      >>> warm_start(dense, fresh)["params"]["block0"]["alpha"].tolist()
      [4.0, 4.0]
    """
    check_number("logit", logit)
    given, wanted = (traverse_util.flatten_dict(dict(tree), sep="/") for tree in (variables, fresh))
    found, used = {}, set()
    blocks = {path.rpartition("/core/")[0].partition("/")[2] for path in wanted if "/core/" in path}
    for path, leaf in wanted.items():
        source = path.replace("/core/", "/", 1) if path.partition("/core/")[0].partition("/")[2] in blocks else path
        if source in given:
            used.add(source)
            found[path] = _copied(source, given[source], leaf)
        else:
            found[path] = _own(path, leaf, blocks, logit, given)
    if unused := sorted(given.keys() - used):
        raise ValueError(
            f"variables: {len(unused)} arrays, such as {unused[0]!r}, have no place in the interpolated network."
            f"{near(unused[0], wanted)} Make it from the network that these belong to."
        )
    return traverse_util.unflatten_dict(found, sep="/")


def _copied(path: str, given: Any, leaf: Any) -> jax.Array:
    if jnp.shape(given) != jnp.shape(leaf):
        raise ValueError(f"variables: {path!r} has shape {jnp.shape(given)}; the interpolated network's {leaf.shape}.")
    return jnp.array(given, leaf.dtype)


def _own(path: str, leaf: Any, blocks: Collection[str], logit: float, given: Collection[str]) -> jax.Array:
    """A leaf that the dense network does not have."""
    for block in blocks:
        if f"/{block}/cheap/" in path or path.endswith(f"/{block}/gate/kernel"):
            return jnp.asarray(leaf)
        if path.endswith((f"/{block}/alpha", f"/{block}/gate/bias")):
            return jnp.full_like(leaf, logit)
    raise ValueError(f"variables hold nothing for {path!r} of the interpolated network.{near(path, given)}")


def block_sites(model: nn.Module, images: Any) -> list[BlockSite]:
    """The blocks of a network in order, found by tracing it."""
    strides: dict[str, int] = {}
    sites: dict[str, BlockSite] = {}

    def recording(base: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def make(features: int, *, name: str, **fields: Any) -> nn.Module:
            strides[name] = fields.get("strides", 1)
            return base(features, name=name, **fields)

        return make

    def watch(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        y = call(*args, **kwargs)
        name = context.module.name
        if context.method_name == "__call__" and name in strides and len(context.module.path) == 1:
            x = args[0]
            sites[name] = BlockSite(name, x.shape[1:3], (x.shape[-1], y.shape[-1]), strides[name])
        return y

    traced = _with_factory(model, recording)
    with nn.intercept_methods(watch):
        jax.eval_shape(traced.init, jax.random.key(0), jax.ShapeDtypeStruct(images.shape, images.dtype))
    return list(sites.values())


def _wanted(policy: Policy, sites: list[BlockSite]) -> Callable[[BlockSite], bool]:
    if isinstance(policy, str):
        return POLICIES[check_choice("policy", policy, POLICIES)]
    if callable(policy):
        return policy
    names = [site.name for site in sites]
    for name in policy:
        check_choice("policy", name, names)
    return lambda site: site.name in policy


def _with_factory(model: Model, wrap: Callable[[Any], Any]) -> Model:
    """The network with every factory of blocks wrapped: its own, and those of single blocks."""
    fields = {field.name for field in dataclasses.fields(model)}
    if "block" not in fields:
        raise ValueError(
            f"model={type(model).__name__} has no field 'block' that makes its blocks. Put SIBlock(core, cheap) in the "
            "place of its blocks instead."
        )
    wrapped = {"block": wrap(model.block)}
    if "stages" in fields:
        wrapped["stages"] = tuple(
            stage if isinstance(stage, int) else tuple(_wrapped_row(row, wrap) for row in stage)
            for stage in model.stages
        )
    return model.clone(**wrapped)


def _wrapped_row(row: Any, wrap: Callable[[Any], Any]) -> Any:
    """A block of a stage: a factory, or a row that may hold one."""
    if callable(row):
        return wrap(row)
    return row if row.block is None else row._replace(block=wrap(row.block))


@dataclasses.dataclass(frozen=True)
class Interpolating:
    """A factory of blocks that makes the chosen ones interpolated, and leaves the others to the network's own."""

    chosen: tuple[tuple[str, tuple[bool, tuple[int, int]]], ...]
    config: SIConfig
    branch: Branch
    base: Callable[..., nn.Module]

    def __call__(self, features: int, *, name: str, strides: int = 1, **fields: Any) -> nn.Module:
        site = dict(self.chosen).get(name)
        if site is None:
            return self.base(features, strides=strides, name=name, **fields)
        residual, offset = site
        core, activation = self.branch(self.base(features, strides=strides, **fields, parent=None))
        config = self.config
        shared = {field: fields[field] for field in ("norm", "dtype") if field in fields}
        return SIBlock(
            core,
            None if config.cheap is None else CheapPath(features, config.cheap, strides, **shared, parent=None),
            stride=config.stride,
            alpha=config.alpha,
            sample=config.sample,
            interpolation=config.interpolation,
            offset=offset,
            residual=residual,
            activation=activation,
            logit=config.logit,
            name=name,
        )


def _branch(block: nn.Module) -> tuple[nn.Module, Callable[[jax.Array], jax.Array] | None]:
    if "skip" not in {field.name for field in dataclasses.fields(block)}:
        raise ValueError(
            f"model: its block {type(block).__name__} has no field 'skip' that leaves out the shortcut. Give branch=, "
            "a function from the block to a module of its branch alone and the activation after the sum."
        )
    return block.clone(skip=False, parent=None), nn.relu if isinstance(block, BasicBlock | Bottleneck) else None
