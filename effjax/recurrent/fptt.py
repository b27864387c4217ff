"""FPTT: forward propagation through time (Kag, Saligrama 2021, ICML, PMLR 139:5189-5200)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from effjax.core.errors import check_choice, check_number, check_shape
from effjax.core.tree import only_node, wide
from effjax.recurrent.sequence_problem import SequencePart

__all__ = [
    "fptt",
    "fptt_epoch_end",
    "fptt_eval_params",
    "fptt_terminal_loss",
    "qbar_first_errors",
    "qbar_init",
    "qbar_means",
    "qbar_sums",
]

PyTree = Any

_AUXILIARY = ("none", "uniform", "qbar")


class FpttState(NamedTuple):
    """State of ``fptt``.

    Attributes:
      wbar: running average of the parameters, float32 or wider; the weights to evaluate.
      lam: running estimate of the last part's gradient, of the same dtypes.
      inner: the base optimizer's state.
    """

    wbar: PyTree
    lam: PyTree
    inner: PyTree


def fptt(
    base: optax.GradientTransformation,
    alpha: ArrayLike = 0.1,
    *,
    beta: ArrayLike = 0.5,
    lmbda: ArrayLike = 1.0,
    correction: ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Tether frequent updates to their running average (FPTT's dynamic regulariser).

    With the gradient g of one part's loss at the parameters W, and :math:`W'` those after the base's step,

    .. math::
        g &\leftarrow g - c\,\lambda + \rho\,\alpha\,(W - \bar W) \\
        \lambda &\leftarrow \lambda - \alpha\,(W' - \bar W) \\
        \bar W &\leftarrow (1 - \beta)\,\bar W + \beta\,W' - (\beta / \alpha)\,\lambda

    in this order: the second line uses the old average, the third the new :math:`\lambda`. Here :math:`\rho` is
    ``lmbda`` and c ``correction``; at the start :math:`\bar W = W` and :math:`\lambda = 0`. The gradient of the
    regulariser is written out, so nothing is differentiated twice. The average forgets by :math:`\sqrt{1 - \beta}` per
    update whatever alpha is: it spans about three of them.

    It stands outermost: a clip or a learning rate belongs into ``base``, as whatever follows would move the parameters
    to another place than :math:`W'`. (``optax.MultiSteps``, ``optax.apply_if_finite``, ``optax.partition`` around it
    are fine: they pass an update on whole or not at all.) The state holds two copies of the parameters in float32; keep
    the parameters in float32 too, as the steps that they average over vanish in bfloat16::

        tx = fptt(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)), alpha=0.02)
        train = fptt_step(problem, tx, parts=10)

    A schedule in ``base`` counts updates, so K a sequence; a constant rate may stall above what BPTT ends at. Evaluate
    with ``fptt_eval_params``.

    Updating in every part does most of FPTT's work, and ``fptt_step`` with a plain optimizer does that too: it is the
    control to compare with. Under Adam :math:`\lambda` is about twice alpha times the learning rate, whatever the
    gradient is, so that on plateaus the regulariser and not the loss decides the direction: 0.02 or less is safer than
    the paper's 0.1 to 0.5. Under SGD alpha near 1 / learning rate makes :math:`\lambda` the gradient itself.

    Args:
      base: the optimizer of one update; it sees the regularised gradient.
      alpha: strength of the tether, above 0.
      beta: weight of the newest parameters in the average, in (0, 1].
      lmbda: factor of the quadratic term only; 1 in the authors' image programs, 2 in their language models.
      correction: factor of the linear term. 1 is the authors' program and the paper's own derivation; 0.5 is the
        paper's printed formula.

    Returns:
      A transformation; its ``update`` needs the parameters.

    Raises:
      TypeError: ``base`` is no transformation.
      ValueError: arguments out of range; at ``update``, no parameters.

    Example:
      >>> tx = fptt(optax.sgd(0.1), alpha=0.5)
      >>> w = jnp.zeros(2)
      >>> state = tx.init(w)
      >>> updates, state = tx.update(jnp.ones(2), state, w)
      >>> w = optax.apply_updates(w, updates)
      >>> w.tolist() == state.wbar.tolist() == [-0.10000000149011612] * 2, state.lam.tolist()
      (True, [0.05000000074505806, 0.05000000074505806])

    Kag, Saligrama 2021 (ICML, PMLR 139:5189-5200), by the authors' program, whose trajectories it repeats; the float32
    averages of narrower parameters are ours.
    """
    if not isinstance(base, optax.GradientTransformation):
        raise TypeError(f"base={base!r} must be an optax transformation, such as optax.adam(1e-3).")
    check_number("alpha", alpha, low=0.0, open_low=True, hint="Without a tether, use the base optimizer alone.")
    check_number("beta", beta, low=0.0, high=1.0, open_low=True)
    check_number("lmbda", lmbda, low=0.0)
    check_number("correction", correction, low=0.0)
    base = optax.with_extra_args_support(base)

    def init(params: PyTree) -> FpttState:
        return FpttState(
            wbar=jax.tree.map(_wide_copy, params),
            lam=jax.tree.map(lambda p: jnp.zeros_like(wide(p)), params),
            inner=base.init(params),
        )

    def update(
        updates: PyTree,
        state: Any,  # FpttState, which Optax's types do not know
        params: PyTree = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("fptt needs the parameters: tx.update(grads, state, params).")
        a, b, pull, push = (wide(value) for value in (alpha, beta, lmbda, correction))

        def regularise(g: Array, w: Array, wbar: Array, lam: Array) -> Array:
            return (wide(g) - push * lam + pull * a * (wide(w) - wbar)).astype(g.dtype)

        grads = jax.tree.map(regularise, updates, params, state.wbar, state.lam)
        updates, inner = base.update(grads, state.inner, params, **extra_args)
        # As rounded to the parameters' dtype, which is what the caller goes on with.
        after = jax.tree.map(wide, optax.apply_updates(params, updates))
        lam = jax.tree.map(lambda l, w, m: (l - a * (w - m)).astype(l.dtype), state.lam, after, state.wbar)
        wbar = jax.tree.map(lambda m, w, l: ((1 - b) * m + b * w - (b / a) * l).astype(m.dtype), state.wbar, after, lam)
        return updates, FpttState(wbar, lam, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def fptt_eval_params(state: PyTree, params: PyTree) -> PyTree:
    r"""The weights to evaluate: the running average :math:`\bar W`.

    Args:
      state: optimizer state that holds one ``FpttState``, possibly nested in another.
      params: the parameters in training; they give the dtypes, and the leaves that FPTT does not own.

    Returns:
      Pytree like ``params``.

    Raises:
      ValueError: ``state`` holds no ``FpttState``, or several.

    Example:
      >>> w = jnp.ones(2, jnp.bfloat16)
      >>> fptt_eval_params(fptt(optax.sgd(0.1)).init(w), w).dtype.name
      'bfloat16'
    """
    return jax.tree.map(
        lambda m, p: p if _masked(m) else jnp.array(m, p.dtype, copy=True), _find(state).wbar, params, is_leaf=_masked
    )


def fptt_epoch_end(state: PyTree, params: PyTree, *, reset_lam: bool = True) -> tuple[PyTree, PyTree]:
    r"""End of an epoch: :math:`W \leftarrow \bar W`, then :math:`\lambda \leftarrow 0`.

    The base optimizer's moments go on, as in the authors' programs. Use it also where the loss changes (a curriculum,
    another task), since :math:`\lambda` is the old one's gradient.

    Args:
      state: optimizer state that holds one ``FpttState``, possibly nested in another.
      params: the parameters.
      reset_lam: False keeps :math:`\lambda`, as the authors do in two of their three language models.

    Returns:
      The state and the parameters of the next epoch.

    Raises:
      ValueError: ``state`` holds no ``FpttState``, or several.

    Example:
      >>> tx = fptt(optax.sgd(0.1), alpha=0.5)
      >>> w = jnp.zeros(2)
      >>> updates, state = tx.update(jnp.ones(2), tx.init(w), w)
      >>> state, w = fptt_epoch_end(state, optax.apply_updates(w, updates))
      >>> state.lam.tolist()
      [0.0, 0.0]

    Source: Kag, Saligrama 2021, ICML (PMLR 139:5189-5200).
    """
    params = fptt_eval_params(state, params)
    if reset_lam:
        state = jax.tree.map(
            lambda node: node._replace(lam=jax.tree.map(jnp.zeros_like, node.lam)) if _ours(node) else node,
            state,
            is_leaf=_ours,
        )
    return state, params


def fptt_terminal_loss(
    logits: Float[Array, "batch classes"],
    labels: Int[Array, "batch"],
    part: SequencePart,
    *,
    auxiliary: str = "uniform",
    qbar: Float[Array, "classes parts classes"] | None = None,
    class_mean: bool = True,
) -> Float[Array, ""]:
    r"""Loss of one part where the sequence has a single label: surer the more of the sequence has been seen.

    .. math::
        \ell_p = b\,\mathrm{CE}(y, P) - (1 - b)\,\tfrac{1}{C} \textstyle\sum_k q_k \log P_k, \qquad b = (p + 1) / P'

    averaged over the batch, with :math:`P'` the number of parts. The last part's loss is the cross-entropy alone.

    Args:
      logits: after the last step of the part.
      labels: of the whole sequence; -1 where unknown, which counts nowhere.
      part: which part, as ``fptt_step`` hands it to the loss.
      auxiliary: the target q of a part that is not the last full one: ``'uniform'``, :math:`1/C`, as in the authors'
        first 20 epochs; ``'qbar'``, the row ``qbar[y, p]``, as after them; ``'none'``, the first term only.
        (From the last full part on it is the label.)
      qbar: see ``qbar_first_errors`` (the authors' program) and ``qbar_means`` (the paper's text).
      class_mean: True divides the second term by the number of classes C, as the authors' program does and the paper
        does not.

    Returns:
      A scalar, float32 or wider.

    Raises:
      ValueError: unknown ``auxiliary``; ``qbar`` missing, superfluous or of a shape that does not fit.

    Example:
      >>> first, last = SequencePart(0, 2, 2), SequencePart(1, 2, 2)
      >>> [round(float(fptt_terminal_loss(jnp.zeros((1, 4)), jnp.zeros(1, int), p)), 3) for p in (first, last)]
      [0.866, 1.386]

    Source: Kag, Saligrama 2021, ICML (PMLR 139:5189-5200).
    """
    check_choice("auxiliary", auxiliary, _AUXILIARY)
    if (qbar is not None) != (auxiliary == "qbar"):
        raise ValueError(
            f"auxiliary={auxiliary!r} with qbar {'missing' if qbar is None else 'given'}: pass qbar with "
            "auxiliary='qbar', and only then."
        )
    log_p = jax.nn.log_softmax(wide(logits))
    classes = log_p.shape[-1]
    check_shape("labels", labels, log_p.shape[:-1], "One label for each sequence.")
    labels = jnp.asarray(labels)
    known = labels >= 0
    # The mean over the known; the factor is 1 where all are, so that it changes no bit.
    mean = lambda each: jnp.mean(jnp.where(known, each, 0)) * (known.size / jnp.maximum(known.sum(), 1))
    hot = jax.nn.one_hot(labels, classes, dtype=log_p.dtype)
    b = part.progress.astype(log_p.dtype)
    loss = b * -mean(jnp.sum(hot * log_p, -1))
    if auxiliary == "none":
        return loss
    early = jnp.full_like(log_p, 1 / classes)
    if qbar is not None:
        if jnp.shape(qbar) != (classes, part.whole, classes):
            raise ValueError(
                f"qbar has shape {jnp.shape(qbar)}, but {classes} classes in {part.whole} full parts need "
                f"{(classes, part.whole, classes)}. Start with qbar_init({classes}, {part.whole})."
            )
        early = wide(qbar)[jnp.maximum(labels, 0), jnp.minimum(part.index, part.whole - 1)]
    q = jnp.where(part.index < part.whole - 1, early, hot)
    return loss + (1 - b) * -mean(jnp.sum(q * log_p, -1)) / (classes if class_mean else 1)


def qbar_init(classes: int, parts: int, *, uniform: bool = True) -> Float[Array, "classes parts classes"]:
    """Targets of the auxiliary loss before anything is known.

    Args:
      classes: C.
      parts: number of full parts, ``SequencePart.whole``.
      uniform: False starts from zeros, as the authors' program does: such a row asks for nothing.

    Returns:
      Float32 ``[C, parts, C]``: for each label and part, a distribution over the classes.

    Raises:
      ValueError: fewer than two classes, or no part.

    Example:
      >>> qbar_init(4, 10).shape
      (4, 10, 4)

    Source: Kag, Saligrama 2021, ICML (PMLR 139:5189-5200).
    """
    check_number("classes", classes, low=2, integer=True)
    check_number("parts", parts, low=1, integer=True)
    return jnp.full((classes, parts, classes), 1 / classes if uniform else 0.0)


def qbar_first_errors(
    qbar: Float[Array, "classes parts classes"],
    logits: Float[Array, "count batch classes"],
    labels: Int[Array, "batch"],
) -> Float[Array, "classes parts classes"]:
    """The authors' rule, after each batch: a class's first sample that a part gets wrong overwrites that class's row.

    Args:
      qbar: the targets so far.
      logits: of all parts, as ``fptt_step`` stacks them where the loss returns them as ``aux``.
      labels: of the batch.

    Returns:
      The new targets. The last full part's, which nothing reads, stay as they are.

    Raises:
      ValueError: more or less than one label for each sequence.

    Example:
      >>> logits = jnp.asarray([[[0.0, 9.0]], [[9.0, 0.0]]])
      >>> qbar_first_errors(qbar_init(2, 2), logits, jnp.zeros(1, int))[:, 0].round(2).tolist()
      [[0.0, 1.0], [0.5, 0.5]]

    Source: Kag, Saligrama 2021, ICML (PMLR 139:5189-5200).
    """
    check_shape("labels", labels, logits.shape[1:-1], "One label for each sequence.")
    early = qbar.shape[1] - 1
    probabilities = jax.nn.softmax(wide(logits[:early]))
    wrong = jnp.argmax(logits[:early], -1) != labels[None]
    mine = wrong[:, None, :] & (labels[None] == jnp.arange(qbar.shape[0])[:, None])[None]  # part, class, sample
    rows = jnp.take_along_axis(probabilities, jnp.argmax(mine, -1)[..., None], axis=1)
    rows = jnp.where(mine.any(-1)[..., None], rows, qbar[:, :early].swapaxes(0, 1))
    return qbar.at[:, :early].set(rows.swapaxes(0, 1).astype(qbar.dtype))


def qbar_sums(
    sums: Float[Array, "classes parts classes"],
    logits: Float[Array, "count batch classes"],
    labels: Int[Array, "batch"],
) -> Float[Array, "classes parts classes"]:
    """The paper's rule, after each batch: add every sample's probabilities to its class's row.

    Args:
      sums: those of the epoch so far; zeros at its start.
      logits: of all parts, as ``fptt_step`` stacks them where the loss returns them as ``aux``.
      labels: of the batch.

    Returns:
      The new sums.

    Raises:
      ValueError: more or less than one label for each sequence.

    Example:
      >>> qbar_sums(jnp.zeros((2, 1, 2)), jnp.zeros((1, 3, 2)), jnp.asarray([0, 0, 1])).tolist()
      [[[1.0, 1.0]], [[0.5, 0.5]]]

    Source: Kag, Saligrama 2021, ICML (PMLR 139:5189-5200).
    """
    check_shape("labels", labels, logits.shape[1:-1], "One label for each sequence.")
    parts, classes = sums.shape[1:]
    hot = jax.nn.one_hot(labels, classes, dtype=sums.dtype)
    return sums + jnp.einsum("bc,pbk->cpk", hot, jax.nn.softmax(wide(logits[:parts])).astype(sums.dtype))


def qbar_means(
    sums: Float[Array, "classes parts classes"], qbar: Float[Array, "classes parts classes"]
) -> Float[Array, "classes parts classes"]:
    """The paper's rule, after each epoch: the targets of the next one.

    Args:
      sums: see ``qbar_sums``.
      qbar: the old targets, kept for classes that did not occur.

    Returns:
      The new targets.

    Example:
      >>> qbar_means(jnp.asarray([[[3.0, 1.0]], [[0.0, 0.0]]]), qbar_init(2, 1)).tolist()
      [[[0.75, 0.25]], [[0.5, 0.5]]]

    Source: Kag, Saligrama 2021, ICML (PMLR 139:5189-5200).
    """
    counts = sums.sum(-1, keepdims=True)  # every sample's probabilities sum to 1
    return jnp.where(counts > 0, sums / jnp.where(counts > 0, counts, 1), qbar)


def _wide_copy(leaf: Array) -> Array:
    # A copy, so that parameters and state may both be donated.
    return jnp.array(leaf, wide(leaf).dtype, copy=True)


def _masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _ours(node: Any) -> bool:
    return isinstance(node, FpttState)


def _find(state: PyTree) -> FpttState:
    return only_node(state, FpttState, maker="fptt")
