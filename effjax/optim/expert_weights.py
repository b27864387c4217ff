"""Multiplicative weights over experts: the rule, the draw, and the checks that SAMUEL's two forms share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from effjax.core.errors import check_number
from effjax.core.tree import wide

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


class WeightRule(NamedTuple):
    """How losses move the experts' log-weights; shared by ``samuel`` and ``samuel_one_gradient``."""

    meta_rates: tuple[float, ...]
    eta_scale: Any
    normalize: bool
    spread_decay: Any
    loss_clip: Any

    @classmethod
    def make(cls, meta_rates: Any, *others: Any) -> "WeightRule":
        rule = cls(tuple(meta_rates), *others)
        if not rule.meta_rates:
            raise ValueError("meta_rates=() holds no rate. Give at least one, such as (0.5,).")
        for rate in rule.meta_rates:
            check_number("meta_rates", rate, low=0.0, open_low=True, hint="eta_scale=0 switches the weights off.")
        check_concrete("eta_scale", rule.eta_scale, low=0.0)
        check_concrete("spread_decay", rule.spread_decay, low=0.0, high=1.0, open_high=True)
        if rule.loss_clip is not None:
            check_concrete("loss_clip", rule.loss_clip, low=0.0, open_low=True)
        return rule

    def initial(self, size: int) -> Float[Array, "rates experts"]:
        """Log-weights of a new segment: a row starts at the logarithm of its meta rate."""
        return jnp.repeat(jnp.log(jnp.asarray(self.meta_rates, float))[:, None], size, axis=1)

    def restarts(self, log_weights: Float[Array, "rates experts"], odds: Any) -> Float[Array, "rates experts"]:
        """Log-weights after a sync: each row's own, relative to its best and at most ``log odds`` below it."""
        best = log_weights.max(axis=1, keepdims=True)
        behind = jnp.where(jnp.isfinite(log_weights), log_weights - best, -jnp.inf)
        return self.initial(log_weights.shape[1]) + jnp.maximum(behind, -jnp.log(wide(odds))).astype(log_weights.dtype)

    def logits(self, log_weights: Float[Array, "rates experts"], losses: Float[Array, "experts"]) -> Array:
        """Unnormalised log-probabilities, without the experts whose loss is not finite while another's is."""
        finite = jnp.isfinite(losses)
        return jnp.where(finite | ~finite.any(), log_probabilities(log_weights), -jnp.inf)

    def update(
        self,
        log_weights: Float[Array, "rates experts"],
        spread: Float[Array, ""],
        count: Int[Array, ""],
        losses: Float[Array, "experts"],
        played: Array,
    ) -> tuple[Array, Array]:
        """One multiplicative update; ``played`` says whose loss, or which mixture's, is the reference.

        An expert whose loss is not finite dies; if no loss is, the weights stay as they were.
        """
        finite = jnp.isfinite(losses)
        excess = jnp.where(finite, losses - jnp.min(losses, where=finite, initial=jnp.inf), 0.0)
        scale = jnp.ones((), losses.dtype)
        if self.normalize:
            # The median of the finite ones.
            ordered, number = jnp.sort(jnp.where(finite, excess, jnp.inf)), finite.sum()
            now = (0.5 * (ordered[(number - 1) // 2] + ordered[number // 2])) ** 2
            now = self.spread_decay * spread + (1 - self.spread_decay) * now
            spread = jnp.where(finite.any(), now, spread).astype(spread.dtype)
            root = jnp.sqrt(spread / (1 - self.spread_decay ** (count.astype(spread.dtype) + 1.0)))
            scale = jnp.where(root > 0, root, 1.0).astype(scale.dtype)
        if self.loss_clip is not None:
            excess = jnp.minimum(excess, self.loss_clip * scale)
        excess = jnp.where(finite, excess, excess.max())
        gap = (jnp.sum(played.astype(excess.dtype) * excess) - excess) / scale
        etas = self.eta_scale * jnp.asarray(self.meta_rates, losses.dtype)
        moved = jnp.where(finite[None], log_weights + etas[:, None] * gap[None], -jnp.inf).astype(log_weights.dtype)
        return jnp.where(finite.any(), moved, log_weights), spread


def check_rates(argument: str, rates: Any) -> Any:
    """Rates that are positive numbers; traced ones are taken as they are."""
    if isinstance(rates, jax.core.Tracer):
        return rates
    rates = np.atleast_1d(np.asarray(rates, np.float64)).tolist()
    for rate in rates:
        check_number(argument, rate, low=0.0, open_low=True)
    if repeated := sorted({rate for rate in rates if rates.count(rate) > 1}):
        raise ValueError(
            f"{argument}={rates!r} repeats {repeated}: two equal experts do the same work twice. Drop one."
        )
    return rates


def raw_key(seed: int | Array) -> UInt[Array, "words"]:
    """A PRNG key as plain words, which every checkpoint format can hold; always a new buffer."""
    key = jax.random.key(seed) if isinstance(seed, int) else jnp.asarray(seed)
    return jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jnp.array(key)


def check_concrete(argument: str, value: Any, **limits: Any) -> None:
    """``check_number``, where the value is known."""
    if not isinstance(value, jax.core.Tracer):  # injected hyperparameters arrive traced
        check_number(argument, value, **limits)


def log_probabilities(log_weights: Float[Array, "rates experts"]) -> Float[Array, "experts"]:
    """Unnormalised; uniform when all experts are dead."""
    log_p = jax.nn.logsumexp(log_weights, axis=0)
    return jnp.where(jnp.isneginf(log_p).all(), 0.0, log_p)


def draw(key: UInt[Array, "words"], count: Int[Array, ""], logits: Float[Array, "experts"]) -> Int[Array, ""]:
    """An index with probability softmax(logits), by inverting the cumulative sum at one uniform number.

    The number comes from the bits of ``jax.random.fold_in(key, count)``, so the key itself never changes.
    """
    uniform = (fold_in_bits(key, count) >> 8).astype(logits.dtype) * 2.0**-24
    cumulative = jnp.cumsum(jnp.exp(logits - logits.max()))
    return jnp.sum(cumulative <= uniform * cumulative[-1])


def fold_in_bits(key: UInt[Array, "words"], count: Int[Array, ""]) -> UInt[Array, ""]:
    """The first word of ``jax.random.fold_in(key, count)``, of a Threefry key.

    Threefry-2x32 (Salmon et al. 2011) in straight-line code. JAX's own is a loop on CPU, and one loop keeps XLA's CPU
    runtime from running a step's operations in order: a step of a small network, made of a hundred of them, then takes
    half as long again.
    """
    key = key.astype(jnp.uint32)
    schedule = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    left, right = schedule[0], count.astype(jnp.uint32) + schedule[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            left = left + right
            right = (right << rotation) | (right >> (32 - rotation))
            right = left ^ right
        left = left + schedule[(group + 1) % 3]
        right = right + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return left
