"""Vision transformers (ViT, DeiT) whose positions, patches and tokens can be chosen when they are called."""

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from effjax.core.errors import check_choice, check_number, near
from effjax.core.tree import wide
from effjax.models.embeddings import norm_module
from effjax.models.layers import Images
from effjax.models.transformer import LayerSpec, run_layers

__all__ = ["ViT", "named_vit"]

Grid = tuple[int, int]
# (table [1, rows, hidden], grid (rows, columns)) -> positions [1, tokens, hidden].
Positions = Callable[[jax.Array, Grid], jax.Array]
# (kernel [side, side, channels, hidden], side) -> a kernel of another side.
PatchKernel = Callable[[jax.Array, int], jax.Array]

_init = nn.initializers.truncated_normal(0.02)


class ViT(nn.Module):
    r"""Vision transformer, norms before the blocks.

    With patches :math:`x_{rc}` of ``patch x patch`` pixels

    .. math:: z = [\mathrm{cls};\, W x_{00};\, W x_{01};\, \ldots] + P, \qquad
        z \leftarrow z + \mathrm{attention}(\mathrm{norm}(z)), \qquad z \leftarrow z + \mathrm{mlp}(\mathrm{norm}(z))

    and a linear head on the normed class token, or on the norm of the mean over the patches.

    Args:
      classes: outputs of the head; None for no head: the vector before it is returned.
      patch: side of a patch in pixels.
      grid: patches along the height and the width of the images that the table of positions is made for. The table is
        the parameter ``position`` [1, prefix + rows * columns, hidden], row 0 that of the class token.
      hidden_size: width D.
      num_layers: depth.
      num_heads: attention heads; divide ``hidden_size``.
      intermediate_size: width of the feed-forward block; None for 4 D.
      pool: ``"cls"``: the class token; ``"mean"``: the mean over the patches, normed after it (timm's ``"avg"``);
        ``"distilled"``: the mean of two heads, on the class and the distillation token (DeiT).
      class_token: whether there is one; ``"mean"`` may do without.
      distillation_token: whether DeiT's second token stands after it; ``"distilled"`` needs it.
      positions: ``(table, (rows, columns)) -> [1, prefix + rows * columns, hidden]`` for other grids than ``grid``,
        such as of ``effjax.transformers.position_selector``. None refuses other sizes.
      patch_kernel: ``(kernel, side) -> kernel`` for calls with another ``patch``, such as
        ``effjax.transformers.resize_patch_kernel``. None refuses them.
      token_multiple: the sequence is padded by masked tokens to a multiple of it; 1 pads nothing.
      layer_norm_eps: epsilon of every LayerNorm.
      activation: ``"gelu"`` (erf), ``"gelu_new"`` (tanh), ``"relu"``, ``"silu"``.
      dropout: rate after positions, attention and feed-forward blocks, in training.
      attention_dropout: rate on attention probabilities in training.
      scan_layers: one scanned layer, parameters stacked under ``layers``, instead of ``layer_{i}``.
      remat: recompute each layer in the backward pass.
      dtype: compute dtype; parameters, softmax and LayerNorm statistics are float32.

    Returns:
      When called with images float [batch, height, width, channels], both sides multiples of the patch: logits float32
      [batch, classes]. Optional: ``patch``, another side of the patches for this call; ``keep``, the patch tokens
      that take part, integers [kept] or [batch, kept], counted by row and from 0: the others are not computed.

    Raises:
      ValueError: sides that are no multiples of the patch, a grid that the positions do not cover, bad sizes.

    Example:
      >>> model = ViT(classes=3, patch=4, grid=(2, 2), hidden_size=8, num_layers=1, num_heads=2)
      >>> logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
      >>> logits.shape, variables["params"]["position"].shape
      ((1, 3), (1, 5, 8))

    Reference: Dosovitskiy et al. 2021 (arXiv 2010.11929); DeiT: Touvron et al. 2021 (2012.12877). As in timm, without
    the original's dropout before the head; patches are cut and multiplied, which is their convolution.
    """

    classes: int | None = 1000
    patch: int = 16
    grid: Grid = (14, 14)
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int | None = None
    pool: str = "cls"
    class_token: bool = True
    distillation_token: bool = False
    positions: Positions | None = None
    patch_kernel: PatchKernel | None = None
    token_multiple: int = 1
    layer_norm_eps: float = 1e-6
    activation: str = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    scan_layers: bool = False
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @property
    def prefix(self) -> int:
        """Tokens before the patches: the class token and the distillation token."""
        return int(self.class_token) + int(self.distillation_token)

    @nn.compact
    def __call__(
        self,
        images: Images,
        *,
        train: bool = False,
        patch: int | None = None,
        keep: Integer[Array | np.ndarray, "*rows kept"] | None = None,
    ) -> Float[Array, "batch outputs"]:
        _check_fields(self)
        x = self._tokens(images, self.patch if patch is None else patch, keep)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        tokens = x.shape[1]
        padded = -(-tokens // self.token_multiple) * self.token_multiple
        mask = None
        if padded > tokens:
            x = jnp.pad(x, ((0, 0), (0, padded - tokens), (0, 0)))
            mask = (jnp.arange(padded) < tokens)[None, None, None, :]
        spec = LayerSpec(
            self.hidden_size,
            self.num_heads,
            self.intermediate_size or 4 * self.hidden_size,
            activation=self.activation,
            norm_eps=self.layer_norm_eps,
            norm_first=True,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            dtype=self.dtype,
        )
        x = run_layers(spec, self.num_layers, x, mask, train=train, scan_layers=self.scan_layers, remat=self.remat)
        return self._head(x[:, :tokens])

    def _tokens(self, images: Images, side: int, keep: Any) -> Float[Array, "batch tokens hidden"]:
        rows, columns = patch_grid(jnp.shape(images), side)
        channels = jnp.shape(images)[3]
        shape = (self.patch, self.patch, channels, self.hidden_size)
        kernel = self.param("patch_kernel", _patch_init, shape, jnp.float32)
        bias = self.param("patch_bias", nn.initializers.zeros_init(), (self.hidden_size,), jnp.float32)
        if side != self.patch:
            if self.patch_kernel is None:
                raise ValueError(
                    f"patch={side}, but this model has patches of {self.patch} pixels. Give it "
                    "patch_kernel=effjax.transformers.resize_patch_kernel."
                )
            kernel = self.patch_kernel(kernel, side)
        batch = jnp.shape(images)[0]
        cut = jnp.asarray(images).astype(self.dtype).reshape(batch, rows, side, columns, side, channels)
        cut = cut.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, side * side * channels)
        x = cut @ kernel.reshape(-1, self.hidden_size).astype(self.dtype) + bias.astype(self.dtype)[None, None]
        table = self._positions((rows, columns)).astype(self.dtype)
        x = x + table[:, self.prefix :]
        if keep is not None:
            x = _kept(x, keep)
        names = ("class_token", "distillation_token")[: self.prefix]  # the second never without the first
        first = [self.param(name, _init, (1, 1, self.hidden_size), jnp.float32).astype(self.dtype) for name in names]
        first = [jnp.broadcast_to(token + table[:, i : i + 1], x[:, :1].shape) for i, token in enumerate(first)]
        return jnp.concatenate([*first, x], axis=1)

    def _positions(self, grid: Grid) -> Float[Array, "1 tokens hidden"]:
        tokens = self.prefix + grid[0] * grid[1]
        shape = (1, self.prefix + self.grid[0] * self.grid[1], self.hidden_size)
        table = self.param("position", _init, shape, jnp.float32)
        if self.positions is not None:
            chosen = self.positions(table, grid)
        elif grid == tuple(self.grid):
            chosen = table
        else:
            raise ValueError(
                f"images give {grid[0]} x {grid[1]} patches, but the positions are for {self.grid[0]} x {self.grid[1]}."
                " Resize the images, or give the model positions=effjax.transformers.position_selector(...)."
            )
        if chosen.shape != (1, tokens, self.hidden_size):
            raise ValueError(
                f"positions gives {chosen.shape} for {grid[0]} x {grid[1]} patches; expected "
                f"{(1, tokens, self.hidden_size)}, with {self.prefix} rows before the patches'."
            )
        return chosen

    def _head(self, x: Float[Array, "batch tokens hidden"]) -> Float[Array, "batch outputs"]:
        norm = norm_module("layer", self.layer_norm_eps, self.dtype, "norm")
        if self.pool == "mean":
            x = norm(wide(x[:, self.prefix :]).mean(1).astype(self.dtype))
        elif self.pool == "cls":
            x = norm(x[:, 0])
        else:
            x = norm(x[:, :2])
        if self.classes is None:
            return wide(x if self.pool != "distilled" else x.mean(1))
        head = lambda name: nn.Dense(self.classes, dtype=self.dtype, kernel_init=_init, name=name)
        if self.pool != "distilled":
            return wide(head("head")(x))
        return (wide(head("head")(x[:, 0])) + wide(head("distillation_head")(x[:, 1]))) / 2


def patch_grid(shape: tuple[int, ...], patch: int) -> Grid:
    """Rows and columns of patches of images [batch, height, width, channels].

    Raises:
      ValueError: sides that are no multiples of the patch, or images of another form.

    Example:
      >>> patch_grid((1, 8, 12, 3), 4)
      (2, 3)
    """
    check_number("patch", patch, low=1, integer=True)
    if len(shape) != 4:
        raise ValueError(f"images have shape {shape}; expected [batch, height, width, channels]. One is images[None].")
    height, width = shape[1:3]
    if height % patch or width % patch or not height or not width:
        fit = tuple(max(1, round(side / patch)) * patch for side in (height, width))
        raise ValueError(
            f"images of {height} x {width} pixels do not divide into patches of {patch} x {patch}. Resize them, for "
            f"instance to {fit[0]} x {fit[1]}."
        )
    return height // patch, width // patch


def _kept(x: jax.Array, keep: Any) -> jax.Array:
    if jnp.ndim(keep) not in (1, 2) or not jnp.issubdtype(jnp.result_type(keep), jnp.integer):
        raise ValueError(
            f"keep is {jnp.result_type(keep)}{list(jnp.shape(keep))}; expected integers [kept] or [batch, kept]."
        )
    if not isinstance(keep, jax.core.Tracer) and np.size(keep) and not 0 <= np.min(keep) <= np.max(keep) < x.shape[1]:
        raise ValueError(
            f"keep runs from {np.min(keep)} to {np.max(keep)}, but the patches from 0 to {x.shape[1] - 1}."
        )
    if jnp.ndim(keep) == 1:
        return x[:, jnp.asarray(keep)]
    if jnp.shape(keep)[0] != x.shape[0]:
        raise ValueError(f"keep has {jnp.shape(keep)[0]} rows for {x.shape[0]} images.")
    return jnp.take_along_axis(x, jnp.asarray(keep)[..., None], axis=1)


def _patch_init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    return nn.initializers.lecun_normal(in_axis=(0, 1, 2))(key, shape, dtype)


def _check_fields(model: ViT) -> None:
    check_choice("pool", model.pool, ("cls", "mean", "distilled"))
    for name in ("patch", "num_layers", "hidden_size", "token_multiple"):
        check_number(name, getattr(model, name), low=1, integer=True)
    if model.classes is not None:
        check_number("classes", model.classes, low=1, integer=True, hint="None makes no head.")
    if model.pool != "mean" and not model.class_token:
        raise ValueError(f"pool={model.pool!r} needs class_token=True; only 'mean' does without.")
    if model.distillation_token and not model.class_token:
        raise ValueError("distillation_token=True needs class_token=True, after which it stands.")
    if model.pool == "distilled" and not model.distillation_token:
        raise ValueError(
            "pool='distilled' needs distillation_token=True, whose head it averages with the class token's."
        )
    if len(model.grid) != 2:
        raise ValueError(f"grid={model.grid} must be (rows, columns).")
    for i, side in enumerate(model.grid):
        check_number(f"grid[{i}]", side, low=1, integer=True)


# Width, depth, heads, width of the feed-forward block.
SIZES = {
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "huge": (1280, 32, 16, 5120),
}
_NAME = re.compile(r"(vit|deit)_([a-z]+)(_distilled)?_patch(\d+)(?:_(\d+))?")


def named_vit(name: str, **fields: Any) -> ViT:
    """A ViT or DeiT by the name that timm gives it.

    Args:
      name: ``"vit_base_patch16_384"``, ``"deit_small_distilled_patch16_224"``: a size (tiny, small, base, large, huge),
        the side of a patch, and that of the images (224 where it is left out), both in pixels.
      **fields: further fields of ``ViT``.

    Returns:
      The module.

    Raises:
      ValueError: no such name; the message suggests the nearest. An image side that is no multiple of the patch.

    Example:
      >>> model = named_vit("vit_base_patch16_384", classes=10)
      >>> model.hidden_size, model.grid
      (768, (24, 24))
    """
    found = _NAME.fullmatch(name)
    if found is None or found[2] not in SIZES or (found[1] == "vit" and found[3]):
        known = [f"{kind}_{size}_patch16_224" for kind in ("vit", "deit") for size in SIZES]
        raise ValueError(
            f"name={name!r} is no vision transformer: (vit|deit)_SIZE[_distilled]_patchP[_PIXELS] with SIZE one of "
            f"{', '.join(SIZES)}; _distilled is DeiT's.{near(name, known)}"
        )
    hidden, layers, heads, intermediate = SIZES[found[2]]
    patch, side = int(found[4]), int(found[5] or 224)
    sizes: dict[str, Any] = {
        "patch": patch,
        "grid": patch_grid((1, side, side, 3), patch),
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "intermediate_size": intermediate,
        "pool": "distilled" if found[3] else "cls",
        "distillation_token": bool(found[3]),
    }
    return ViT(**{**sizes, **fields})
