"""ICPC: train and serve one transformer on inputs of several sizes (Nagarajan, Raghunathan 2023, arXiv:2312.12385).

Four parts, each of use alone: positions that stay consistent over sizes (``select_positions``), which size is shown
when (``icpc``, ``sample_level``, ``level_batch``), smaller inputs by modality (``resize_images``,
``compress_spectrogram``, ``compress_text``), and inference that spends effort by difficulty (``LevelCascade``,
``level_thresholds``).
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import PRNGKeyArray, PyTree

from effjax.transformers.compressions import resize_images
from effjax.transformers.level_sampling import join_groups, level_groups, level_weights

__all__ = ["MixedLevels", "icpc"]

Apply = Callable[..., Any]
Compress = Callable[[Any, Any], Any]


def icpc(
    apply: Apply,
    levels: Sequence[Any],
    *,
    shares: Sequence[int] | None = None,
    compress: Compress = resize_images,
) -> Callable[..., Any]:
    r"""The network of a training step on a mixture of levels: a fixed share of the batch at each of them.

    Of rows :math:`x` in groups :math:`S_1, \ldots, S_k` of fixed shares

    .. math:: y_i = f(\mathrm{compress}(x_i, \ell_j)), \qquad i \in S_j

    so any loss over the batch, and its one gradient, mixes all sizes, as do the micro-batches of one update in the
    paper. All steps cost the same, one program holds them all, and nothing is drawn: an example meets other levels
    because the loader shuffles. For inference use ``apply`` itself, or ``LevelCascade``.

    Args:
      apply: ``(params, inputs, *, key=None) -> outputs``, for inputs of every level: a vision transformer with
        ``positions=position_selector("crop")``, say. ``key`` is handed on only if it is given.
      levels: static, in any order: sides in pixels, pairs, or what ``compress`` takes.
      shares: integers, rows of each level among ``sum(shares)`` neighbouring rows; None for 1 each. (1, 1, 2) gives the
        last level half of them.
      compress: ``(inputs, level) -> inputs``, traceable; runs on the device, so that the host feeds one size.

    Returns:
      ``(params, inputs, *, key=None) -> outputs``, the batch in its order. ``inputs`` is an array or a tree of arrays.

    Raises:
      ValueError: no levels, shares of another number or below 1; when called, a batch that they do not divide.

    Example:
      >>> import jax.numpy as jnp
      >>> model = lambda params, x: params * x.sum((1, 2, 3))
      >>> mixed = icpc(model, (1, 2))
      >>> mixed(1.0, jnp.ones((4, 2, 2, 1))).tolist()
      [1.0, 4.0, 1.0, 4.0]

    The paper draws one size for each micro-batch of 8 and adds up the gradients of 64 of them; that is ``sample_level``
    with ``optax.MultiSteps``. Fixed shares are ours: the same mixture without drawn step times, and with no host that
    draws another size than the rest.

    Source: Nagarajan, Raghunathan 2023, arXiv:2312.12385 (ECML PKDD 2024).
    """
    levels, shares = tuple(levels), _shares(levels, shares)

    def mixed(params: PyTree, inputs: PyTree, *, key: PRNGKeyArray | None = None) -> Any:
        keys = [{}] * len(levels) if key is None else [{"key": one} for one in jax.random.split(key, len(levels))]
        groups = zip(level_groups(inputs, shares), levels, keys, strict=True)
        return join_groups([apply(params, compress(group, level), **key) for group, level, key in groups], shares)

    return mixed


class MixedLevels(nn.Module):
    """A Linen module that trains on a mixture of levels and is evaluated on whole inputs.

    Args:
      module: called as ``module(inputs, train=...)``; its variables lie under ``module``.
      levels: as for ``icpc``.
      shares: as for ``icpc``.
      compress: as for ``icpc``.
      whole: the level of evaluation; None takes the inputs as they are.

    Returns:
      When called with ``train=True``: what ``icpc`` gives. Else ``module(inputs)``, at the level ``whole``.

    Raises:
      ValueError: as for ``icpc``.

    Example:
      >>> import jax.numpy as jnp
      >>> class Total(nn.Module):
      ...     def __call__(self, x, *, train=False):
      ...         return x.sum((1, 2))
      >>> mixed = MixedLevels(Total(), (1, 2))
      >>> mixed.apply({}, jnp.ones((2, 2, 2, 1)), train=True).ravel().tolist()
      [1.0, 4.0]
    """

    module: nn.Module
    levels: tuple[Any, ...]
    shares: tuple[int, ...] | None = None
    compress: Compress = resize_images
    whole: Any = None

    @nn.compact
    def __call__(self, inputs: PyTree, *, train: bool = False) -> Any:
        if not train:
            return self.module(inputs if self.whole is None else self.compress(inputs, self.whole), train=False)
        run = icpc(lambda module, x: module(x, train=True), self.levels, shares=self.shares, compress=self.compress)
        return run(self.module, inputs)


def _shares(levels: Sequence[Any], shares: Sequence[int] | None) -> tuple[int, ...]:
    level_weights(levels, shares, "shares")
    return (1,) * len(levels) if shares is None else tuple(shares)
