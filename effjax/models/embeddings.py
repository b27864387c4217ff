"""What tokens become before the first layer, and what the layers share: a check of ids, norms, activations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from effjax.core.errors import check_choice
from effjax.models.attention import Mask, Tokens

_init = nn.initializers.normal(0.02)


def check_tokens(
    input_ids: Tokens,
    max_positions: int,
    mask: Mask | None = None,
    segment_ids: Tokens | None = None,
    *,
    vocab_size: int | None = None,
) -> None:
    """Refuse token ids that the model cannot take, while it is traced; ids beyond the table where they are known.

    Args:
      input_ids: what the caller gave.
      max_positions: the longest sequence in tokens.
      mask: None or as long as ``input_ids``.
      segment_ids: None or as long as ``input_ids``.
      vocab_size: rows of the table. Under ``jit`` ids are not known; one beyond the table gives NaN there.

    Raises:
      TypeError: ids that are no integers.
      ValueError: not [batch, length], longer than ``max_positions``, shapes that differ, or an id without a row.
    """
    shape = jnp.shape(input_ids)
    if not jnp.issubdtype(jnp.result_type(input_ids), jnp.integer):
        raise TypeError(f"input_ids of dtype {jnp.result_type(input_ids)} must be integers: tokenize the text first.")
    if len(shape) != 2:
        raise ValueError(f"input_ids of shape {shape} must be [batch, length]; write input_ids[None] for one row.")
    if shape[1] > max_positions:
        raise ValueError(
            f"input_ids of length {shape[1]} is longer than max_positions={max_positions}. "
            f"Truncate the text: tokenizer.encode(texts, max_length={max_positions})."
        )
    for name, other in (("mask", mask), ("segment_ids", segment_ids)):
        if other is not None and jnp.shape(other) != shape:
            raise ValueError(f"{name} of shape {jnp.shape(other)} must have the shape {shape} of input_ids.")
    known = not isinstance(input_ids, jax.core.Tracer) and getattr(input_ids, "is_fully_addressable", True)
    if vocab_size is not None and known and 0 not in shape:
        ids = np.asarray(input_ids)
        check_ids(int(ids.min()), int(ids.max()), vocab_size)


def check_ids(lowest: int, highest: int, vocab_size: int, what: str = "input_ids") -> None:
    """Refuse ids without a row in the table of embeddings.

    Raises:
      ValueError: with the way out.

    Example:
      >>> check_ids(0, 4, vocab_size=5)
    """
    if not 0 <= lowest <= highest < vocab_size:
        raise ValueError(
            f"{what} run from {lowest} to {highest}, but the table has rows for 0 to {vocab_size - 1}. Use the "
            f"model's tokenizer, or give your tokens rows: load_pretrained(..., vocab_size={max(highest, 0) + 1}), or "
            "grow_vocabulary of a model that is loaded."
        )


def norm_module(kind: str, eps: float, dtype: DTypeLike, name: str | None) -> nn.Module:
    """``"layer"`` or ``"rms"`` normalisation over the features, statistics in float32."""
    check_choice("norm", kind, ("layer", "rms"))
    if kind == "rms":
        return nn.RMSNorm(epsilon=eps, dtype=dtype, name=name)
    return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


class Embeddings(nn.Module):
    """Token, position and type embeddings; norm, dropout and projection where asked for.

    Args:
      vocab_size: number of tokens.
      features: width of the tables.
      max_positions: longest sequence; 0 for none (rotary positions).
      position_offset: rows before position 0 (Hugging Face: 2 in RoBERTa and OPT).
      type_vocab_size: number of token types; 0 for none.
      output_size: project to that width (ELECTRA); None keeps ``features``.
      norm_eps: epsilon of a LayerNorm; None for none.
      dropout: rate in training.
      dtype: compute dtype.

    Returns:
      When called with ids and positions [batch, length], types or None: [batch, length, output_size].
    """

    vocab_size: int
    features: int
    max_positions: int = 0
    position_offset: int = 0
    type_vocab_size: int = 0
    output_size: int | None = None
    norm_eps: float | None = None
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    def setup(self):
        table = lambda rows: nn.Embed(rows, self.features, dtype=self.dtype, embedding_init=_init)
        self.word = table(self.vocab_size)
        if self.max_positions:
            self.position = table(self.max_positions + self.position_offset)
        if self.type_vocab_size:
            self.token_type = table(self.type_vocab_size)
        if self.norm_eps is not None:
            self.norm = norm_module("layer", self.norm_eps, self.dtype, name=None)
        if self.output_size is not None and self.output_size != self.features:
            self.projection = nn.Dense(self.output_size, dtype=self.dtype, kernel_init=_init)
        self.drop = nn.Dropout(self.dropout)

    def __call__(self, input_ids, positions, token_type_ids=None, *, train=False):
        x = self.word(input_ids)
        if self.max_positions:
            x = x + self.position(positions + self.position_offset)
        if not self.type_vocab_size and token_type_ids is not None:
            raise ValueError(
                "token_type_ids are given, but type_vocab_size=0: this model has no types of tokens. Leave them out."
            )
        if self.type_vocab_size:
            x = x + self.token_type(jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids)
        if self.norm_eps is not None:
            x = self.norm(x)
        x = self.drop(x, deterministic=not train)
        return self.projection(x) if self.output_size not in (None, self.features) else x

    def attend(self, x: Float[Array, "batch length features"]) -> Float[Array, "batch length vocab"]:
        """Logits of an output layer tied to the token table."""
        return self.word.attend(x)
