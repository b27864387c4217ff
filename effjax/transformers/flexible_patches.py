"""Other ways to fewer tokens, beside which ICPC is judged: larger patches (FlexiViT), fewer patches (PatchDropout)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from effjax.core.errors import check_number
from effjax.core.tree import wide

__all__ = ["random_patches", "resize_patch_kernel"]


def resize_patch_kernel(
    kernel: Float[Array | np.ndarray, "side side channels hidden"], side: int
) -> Float[Array, "new new channels hidden"]:
    r"""The kernel of a patch embedding for patches of another side (FlexiViT's pseudo-inverse resize).

    With B the bilinear resize of a patch x from p to q pixels, the new kernel solves

    .. math:: \hat w = \arg\min_{\hat w} E_x \left[ (\langle x, w \rangle - \langle B x, \hat w \rangle)^2 \right]
        = (B^T)^+ w

    for white x, so that for q >= p an enlarged patch gives the token that the patch gives. B is the product of a matrix
    for each axis, and so is its pseudo-inverse.

    Args:
      kernel: [p, p, channels, hidden].
      side: q, in pixels.

    Returns:
      [q, q, channels, hidden] in the kernel's dtype, computed in float32 at least; linear in the kernel.

    Raises:
      ValueError: a kernel that is not square, or ``side`` below 1.

    Example:
      >>> kernel = jnp.ones((2, 2, 1, 1))
      >>> round(resize_patch_kernel(kernel, 4).sum().item(), 4)  # a patch of ones still gives 4
      4.0

    Beyer et al. 2023 (FlexiViT), arXiv:2212.08013; bilinear without antialiasing, as there.
    """
    check_number("side", side, low=1, integer=True)
    shape = jnp.shape(kernel)
    if len(shape) != 4 or shape[0] != shape[1]:
        raise ValueError(f"kernel has shape {shape}; expected [side, side, channels, hidden].")
    if side == shape[0]:
        return jnp.asarray(kernel)
    wide_kernel = wide(kernel)
    inverse = jnp.asarray(np.linalg.pinv(_bilinear(shape[0], side).T), wide_kernel.dtype)
    return jnp.einsum("qp,ro,poch->qrch", inverse, inverse, wide_kernel).astype(jnp.result_type(kernel))


def _bilinear(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """The matrix of a bilinear resize along one axis, pixels at half integers, the border's repeated."""
    at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old)[None, :]))


def random_patches(key: PRNGKeyArray, rows: int, patches: int, kept: int) -> Int[Array, "rows kept"]:
    """Distinct random patches for each image, in increasing order: the ``keep`` of a ``ViT`` (PatchDropout).

    Args:
      key: PRNG key.
      rows: images of the batch.
      patches: of an image.
      kept: how many take part, a static number.

    Returns:
      int32 [rows, kept].

    Raises:
      ValueError: more kept than there are.

    Example:
      >>> random_patches(jax.random.key(0), 2, 4, 4).tolist()
      [[0, 1, 2, 3], [0, 1, 2, 3]]

    Liu et al. 2023 (PatchDropout), arXiv:2208.07220.
    """
    check_number("rows", rows, low=0, integer=True)
    check_number("patches", patches, low=1, integer=True)
    check_number("kept", kept, low=1, high=patches, integer=True)
    _, chosen = jax.lax.top_k(jax.random.uniform(key, (rows, patches)), kept)
    return jnp.sort(chosen, axis=1).astype(jnp.int32)
