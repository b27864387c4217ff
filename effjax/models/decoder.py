"""Causal language models of the Llama, OPT and GPT-2 type, and greedy decoding with a cache."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from effjax.core.errors import check_choice, check_number
from effjax.core.tree import wide
from effjax.models.activations import ACTIVATIONS
from effjax.models.attention import Mask, RopeScaling, Tokens, attention_mask, rope_angles, token_positions
from effjax.models.embeddings import Embeddings, check_tokens, norm_module
from effjax.models.pruned import LayerShape
from effjax.models.transformer import LayerSpec, run_layers

__all__ = ["Decoder", "generate"]

PyTree = Any


class Decoder(nn.Module):
    """Causal transformer language model, norms before the blocks.

    For each layer ``h = x + attention(norm(x))``, ``y = h + mlp(norm(h))``; then
    ``logits = W_out norm(x)``. Llama is the default; OPT is ``norm="layer", mlp="relu",
    positions="learned", position_offset=2, use_bias=True``, GPT-2 the same with ``mlp="gelu_new"`` and no offset,
    Mistral has a ``sliding_window``, Qwen2 ``qkv_bias``, Qwen3 ``qk_norm``.

    Pad on the right: positions count from the row's start, and padding comes after what sees it.

    Args:
      vocab_size: number of tokens.
      hidden_size: width H.
      num_layers: depth.
      num_heads: attention heads; divide ``hidden_size``.
      intermediate_size: width of the feed-forward block.
      max_positions: longest sequence in tokens.
      num_kv_heads: heads of keys and values, a divisor of ``num_heads`` (GQA); None for as many.
      norm: ``"rms"`` or ``"layer"``.
      mlp: ``"swiglu"`` (``W_down (silu(W_gate x) * W_up x)``), or an activation as ``"relu"``, ``"gelu_new"``
        (``W_down relu(W_up x)``).
      positions: ``"rope"`` (rotary) or ``"learned"`` (a table).
      rope_style: pairs of features, ``"half"`` (Hugging Face) or ``"interleaved"`` (Meta).
      rope_theta: base of the rotary angles.
      rope_scaling: slower angles, as Llama 3 has them (``RopeScaling``); None for none.
      position_offset: rows of a learned table before position 0.
      tie_embeddings: the output layer is the token table; else ``head/kernel``.
      use_bias: biases in all dense layers but the output's.
      qkv_bias: biases of query, key and value, whatever ``use_bias`` says.
      qk_norm: a norm over each head's query and key, before the rotation.
      head_dim: width of a head; None for ``hidden_size / num_heads``.
      sliding_window: a token sees itself and the tokens before it, that many in all; None for all. It is a mask: it
        changes what is computed, not what it costs.
      full_layers: layers that see all nevertheless; not with ``scan_layers``.
      norm_eps: epsilon of every norm.
      dropout: rate after attention and feed-forward blocks, in training.
      attention_dropout: rate on attention probabilities, in training.
      scan_layers: one scanned layer, parameters stacked under ``layers``, instead of ``layer_{i}``.
      remat: recompute each layer in the backward pass.
      dtype: compute dtype; parameters, softmax and norm statistics are float32.
      layer_shapes: what is left of each layer of a pruned model; None for whole layers. Not with ``scan_layers``.

    Returns:
      When called with ``input_ids`` [batch, length]: logits float32 [batch, length, vocab]. Optional:
      ``mask`` (True at real tokens), and for packed rows ``segment_ids`` (0 = padding) and
      ``position_ids`` (by default from 0 within each segment); all [batch, length]. With a static
      ``cache_length`` keys and values are kept in the mutable collection ``cache``; see ``generate``.

    Raises:
      ValueError: a sequence longer than ``max_positions``, arrays of different shapes, bad sizes,
        or packing and masks together with a cache.

    Example:
      >>> model = Decoder(vocab_size=30, hidden_size=8, num_layers=2, num_heads=4, num_kv_heads=2,
      ...                 intermediate_size=16, max_positions=32)
      >>> logits, _ = model.init_with_output(jax.random.key(0), jnp.zeros((2, 5), int))
      >>> logits.shape
      (2, 5, 30)

    Reference: Touvron et al. 2023, "Llama 2" (arXiv 2307.09288); Zhang et al. 2022, "OPT" (2205.01068).
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    num_kv_heads: int | None = None
    norm: str = "rms"
    mlp: str = "swiglu"
    positions: str = "rope"
    rope_style: str = "half"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    position_offset: int = 0
    tie_embeddings: bool = True
    use_bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    sliding_window: int | None = None
    full_layers: tuple[int, ...] = ()
    norm_eps: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    scan_layers: bool = False
    remat: bool = False
    dtype: DTypeLike = jnp.float32
    layer_shapes: tuple[LayerShape, ...] | None = None

    @nn.nowrap
    def make_embeddings(self) -> Embeddings:
        """The module whose parameters lie under ``embeddings``."""
        return Embeddings(
            self.vocab_size,
            self.hidden_size,
            max_positions=self.max_positions if self.positions == "learned" else 0,
            position_offset=self.position_offset,
            dropout=self.dropout,
            dtype=self.dtype,
            name="embeddings",
        )

    @nn.nowrap
    def layer_spec(self) -> LayerSpec:
        """Sizes and choices of a whole layer."""
        return LayerSpec(
            self.hidden_size,
            self.num_heads,
            self.intermediate_size,
            num_kv_heads=self.num_kv_heads,
            activation="silu" if self.mlp == "swiglu" else self.mlp,
            gated=self.mlp == "swiglu",
            norm=self.norm,
            norm_eps=self.norm_eps,
            norm_first=True,
            use_bias=self.use_bias,
            causal=True,
            rope_style=self.rope_style,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            dtype=self.dtype,
            head_size=self.head_dim,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            window=self.sliding_window,
        )

    @nn.nowrap
    def angles(self, position_ids: Tokens) -> tuple[jax.Array, jax.Array] | None:
        """Rotary angles of positions [rows, length]; None of a model with a table of positions."""
        if self.positions == "learned":
            return None
        width = self.head_dim or self.hidden_size // self.num_heads
        return rope_angles(position_ids, width, self.rope_theta, self.rope_scaling)

    @nn.nowrap
    def make_norm(self) -> nn.Module:
        """The norm before the output layer, whose parameters lie under ``norm``."""
        return norm_module(self.norm, self.norm_eps, self.dtype, "norm")

    @nn.nowrap
    def make_head(self) -> nn.Dense:
        """The output layer where it is not tied, whose parameters lie under ``head``."""
        return nn.Dense(self.vocab_size, use_bias=False, dtype=self.dtype, name="head")

    @nn.compact
    def __call__(
        self,
        input_ids: Tokens,
        mask: Mask | None = None,
        *,
        position_ids: Tokens | None = None,
        segment_ids: Tokens | None = None,
        cache_length: int | None = None,
        train: bool = False,
    ) -> Float[Array, "batch length vocab"]:
        check_choice("mlp", self.mlp, ("swiglu", *ACTIVATIONS))
        if self.sliding_window is not None:
            check_number("sliding_window", self.sliding_window, low=1, integer=True)
        check_choice("positions", self.positions, ("rope", "learned"))
        check_tokens(input_ids, self.max_positions, mask, segment_ids, vocab_size=self.vocab_size)
        start, seen = 0, attention_mask(mask, segment_ids)
        if cache_length is not None:
            check_number("cache_length", cache_length, low=1, high=self.max_positions, integer=True)
            if seen is not None:
                raise ValueError("cache_length goes with neither mask nor segment_ids: give rows of one length.")
            start, seen = self._advance(jnp.shape(input_ids)[1], cache_length)
        if position_ids is None:
            position_ids = start + token_positions(input_ids, segment_ids)
        embeddings = self.make_embeddings()
        x = run_layers(
            self.layer_spec(),
            self.num_layers,
            embeddings(input_ids, position_ids, train=train),
            seen,
            self.angles(position_ids),
            start,
            train=train,
            scan_layers=self.scan_layers,
            remat=self.remat,
            cache_length=cache_length,
            layer_shapes=self.layer_shapes,
            unwindowed=self.full_layers,
        )
        x = self.make_norm()(x)
        if self.tie_embeddings:
            return wide(embeddings.attend(x))
        return wide(self.make_head()(x))

    def _advance(self, length: int, cache_length: int) -> tuple[jax.Array, jax.Array]:
        """The index of the first new position, and the cached positions that each new one sees."""
        index = self.variable("cache", "index", jnp.zeros, (), jnp.int32)
        start = index.value
        index.value = start + length
        seen = jnp.arange(cache_length)[None] <= start + jnp.arange(length)[:, None]
        return start, seen[None, None]


def generate(apply: Callable[..., Any], params: PyTree, input_ids: Tokens, steps: int) -> Int[Array, "batch total"]:
    """Continue token sequences greedily, each token in time linear in the length.

    ``t[n + 1] = argmax logits(t[0..n])``. One forward pass fills a cache of static shape, a
    ``lax.scan`` adds a token at a time; jit it with ``static_argnums=(0, 3)``.

    Args:
      apply: ``Decoder(...).apply``.
      params: the model's parameters.
      input_ids: [batch, length] prompts of one length, without padding.
      steps: tokens to add; length + steps - 1 may be at most the model's ``max_positions``.

    Returns:
      int32 [batch, length + steps].

    Raises:
      ValueError: ``steps`` below 1 or more positions than the model has.

    Example:
      >>> model = Decoder(vocab_size=30, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=16,
      ...                 max_positions=8)
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 4), int))["params"]
      >>> generate(model.apply, params, jnp.zeros((2, 4), int), 5).shape
      (2, 9)
    """
    check_number("steps", steps, low=1, integer=True)
    input_ids = jnp.asarray(input_ids, jnp.int32)
    total = input_ids.shape[1] + steps

    def forward(cache, ids):
        # The last token of all is never fed back.
        logits, cache = apply({"params": params, **cache}, ids, cache_length=total - 1, mutable=["cache"])
        return jnp.argmax(logits[:, -1:], axis=-1).astype(jnp.int32), cache

    def step(carry, _):
        token, cache = carry
        following, cache = forward(cache, token)
        return (following, cache), token[:, 0]

    (last, _), tokens = jax.lax.scan(step, forward({}, input_ids), length=steps - 1)
    return jnp.concatenate([input_ids, tokens.T, last], axis=1)
