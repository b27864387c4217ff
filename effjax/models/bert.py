"""BERT-type encoders (BERT, MiniLM, RoBERTa, ELECTRA, DistilBERT) and a classifier on top."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from effjax.core.errors import check_choice
from effjax.core.tree import wide
from effjax.models.activations import ACTIVATIONS
from effjax.models.attention import Mask, Tokens, attention_mask, token_positions
from effjax.models.embeddings import Embeddings, check_tokens
from effjax.models.pruned import LayerShape
from effjax.models.transformer import LayerSpec, run_layers

__all__ = ["Bert", "BertClassifier"]


class Bert(nn.Module):
    """Bidirectional transformer encoder, norms after the residuals.

    ``e = norm(word[t] + position[p + offset] + type[s])``, then for each layer
    ``h = norm(x + attention(x))``, ``y = norm(h + W_down gelu(W_up h))``.

    Pad on the right: positions count from the row's start. All-padding rows give finite values.

    Args:
      vocab_size: number of tokens.
      hidden_size: width H.
      num_layers: depth.
      num_heads: attention heads; divide ``hidden_size``.
      intermediate_size: width of the feed-forward block.
      max_positions: longest sequence in tokens.
      type_vocab_size: number of token types; 0 for none (DistilBERT).
      embedding_size: width of the tables where it differs from H (ELECTRA); None for H.
      layer_norm_eps: epsilon of every LayerNorm.
      activation: ``"gelu"`` (erf), ``"gelu_new"`` (tanh), ``"relu"``, ``"silu"``.
      position_offset: rows of the position table before position 0 (RoBERTa: 2).
      dropout: rate after embeddings, attention and feed-forward blocks, in training.
      attention_dropout: rate on attention probabilities in training; above 0 the probabilities are
        formed explicitly, which costs memory.
      scan_layers: one scanned layer, parameters stacked under ``layers``, instead of ``layer_{i}``.
      remat: recompute each layer in the backward pass.
      dtype: compute dtype; parameters, softmax and LayerNorm statistics are float32.
      layer_shapes: what is left of each layer of a pruned model; None for whole layers. Not with ``scan_layers``.

    Returns:
      When called with ``input_ids`` [batch, length]: hidden states [batch, length, H] in ``dtype``.
      Optional: ``mask`` (True at real tokens), ``token_type_ids``, and for packed rows ``segment_ids``
      (0 = padding; tokens see their own segment only) and ``position_ids`` (by default from 0 within
      each segment); all [batch, length].

    Raises:
      ValueError: a sequence longer than ``max_positions``, arrays of different shapes, bad sizes.

    Example:
      >>> model = Bert(vocab_size=30, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=16)
      >>> hidden, _ = model.init_with_output(jax.random.key(0), jnp.zeros((2, 5), int))
      >>> hidden.shape
      (2, 5, 8)

    Reference: Devlin et al. 2019, "BERT" (arXiv 1810.04805); RoBERTa (1907.11692), ELECTRA (2003.10555),
    MiniLM (2002.10957) and DistilBERT (1910.01108) share the layout. The pooler is left to ``BertClassifier``.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int = 512
    type_vocab_size: int = 2
    embedding_size: int | None = None
    layer_norm_eps: float = 1e-12
    activation: str = "gelu"
    position_offset: int = 0
    dropout: float = 0.1
    attention_dropout: float = 0.1
    scan_layers: bool = False
    remat: bool = False
    dtype: DTypeLike = jnp.float32
    layer_shapes: tuple[LayerShape, ...] | None = None

    @nn.nowrap
    def make_embeddings(self) -> Embeddings:
        """The module whose parameters lie under ``embeddings``."""
        return Embeddings(
            self.vocab_size,
            self.embedding_size or self.hidden_size,
            max_positions=self.max_positions,
            position_offset=self.position_offset,
            type_vocab_size=self.type_vocab_size,
            output_size=self.hidden_size,
            norm_eps=self.layer_norm_eps,
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
            activation=self.activation,
            norm_eps=self.layer_norm_eps,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            dtype=self.dtype,
        )

    @nn.compact
    def __call__(
        self,
        input_ids: Tokens,
        mask: Mask | None = None,
        token_type_ids: Tokens | None = None,
        *,
        position_ids: Tokens | None = None,
        segment_ids: Tokens | None = None,
        train: bool = False,
    ) -> Float[Array, "batch length hidden"]:
        check_tokens(input_ids, self.max_positions, mask, segment_ids, vocab_size=self.vocab_size)
        positions = token_positions(input_ids, segment_ids) if position_ids is None else position_ids
        return run_layers(
            self.layer_spec(),
            self.num_layers,
            self.make_embeddings()(input_ids, positions, token_type_ids, train=train),
            attention_mask(mask, segment_ids),
            train=train,
            scan_layers=self.scan_layers,
            remat=self.remat,
            layer_shapes=self.layer_shapes,
        )


class BertClassifier(nn.Module):
    """An encoder, one vector for each text, and a linear classifier.

    ``"mean"``: the mean over real tokens, in float32; ``"cls"``: ``tanh(W h_first + b)``, as the
    sequence classifiers of Hugging Face do. A text without tokens has the vector zero (before W).

    Args:
      encoder: the ``Bert``; its parameters lie under ``encoder``.
      classes: number of outputs.
      pool: ``"mean"`` or ``"cls"``.
      dropout: rate before the classifier in training.
      pool_activation: activation of the ``"cls"`` vector: ``"tanh"`` (BERT, RoBERTa), ``"gelu"`` (ELECTRA) or
        ``"relu"`` (DistilBERT).

    Returns:
      When called like the encoder: logits float32 [batch, classes]. With ``segment_ids`` and the
      static ``segments`` = S: [batch, S, classes], segment s + 1 of each row at s.

    Raises:
      ValueError: unknown ``pool``, or only one of ``segment_ids`` and ``segments``.

    Example:
      >>> encoder = Bert(vocab_size=30, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=16)
      >>> model = BertClassifier(encoder, classes=3)
      >>> logits, _ = model.init_with_output(jax.random.key(0), jnp.zeros((2, 5), int), jnp.zeros((2, 5), bool))
      >>> logits.shape, bool(jnp.isfinite(logits).all())
      ((2, 3), True)
    """

    encoder: Bert
    classes: int
    pool: str = "mean"
    dropout: float = 0.1
    pool_activation: str = "tanh"

    def __call__(
        self,
        input_ids: Tokens,
        mask: Mask | None = None,
        token_type_ids: Tokens | None = None,
        *,
        position_ids: Tokens | None = None,
        segment_ids: Tokens | None = None,
        segments: int | None = None,
        train: bool = False,
    ) -> Float[Array, "batch classes"] | Float[Array, "batch segments classes"]:
        if (segments is None) != (segment_ids is None):
            raise ValueError(
                f"segments={segments} and segment_ids belong together: segments is the most texts packed in a row."
            )
        hidden = self.encoder(
            input_ids, mask, token_type_ids, position_ids=position_ids, segment_ids=segment_ids, train=train
        )
        return self.classify(hidden, mask, segment_ids=segment_ids, segments=segments, train=train)

    @nn.compact
    def classify(
        self,
        hidden: Float[Array, "batch length hidden"],
        mask: Mask | None = None,
        *,
        segment_ids: Tokens | None = None,
        segments: int | None = None,
        train: bool = False,
    ) -> Float[Array, "batch classes"] | Float[Array, "batch segments classes"]:
        """Logits from the encoder's hidden states: what comes after it when the module is called."""
        check_choice("pool", self.pool, ("mean", "cls"))
        members = _members(hidden, mask, segment_ids, segments)
        x = _mean(hidden, members) if self.pool == "mean" else _first(hidden, members)
        x = x.astype(self.encoder.dtype)
        x = x if segments else x[:, 0]
        drop = nn.Dropout(self.dropout, deterministic=not train)
        if self.pool == "cls":
            x = nn.Dense(self.encoder.hidden_size, dtype=self.encoder.dtype, name="pooler")(x)
            x = ACTIVATIONS[self.pool_activation](x)
        return wide(nn.Dense(self.classes, dtype=self.encoder.dtype, name="head")(drop(x)))


def _members(
    hidden: jax.Array, mask: Mask | None, segment_ids: Tokens | None, segments: int | None
) -> Float[Array, "batch segments length"]:
    """1 where a token is a real one of the segment."""
    real = jnp.ones(hidden.shape[:2], bool) if mask is None else jnp.asarray(mask)
    if segment_ids is None or segments is None:
        return real[:, None].astype(jnp.float32)
    index = jnp.arange(1, segments + 1)[None, :, None]
    return ((jnp.asarray(segment_ids)[:, None] == index) & real[:, None]).astype(jnp.float32)


def _mean(hidden: jax.Array, members: jax.Array) -> Float[Array, "batch segments hidden"]:
    total = jnp.einsum("bsl,blh->bsh", members, hidden.astype(jnp.float32))
    return total / jnp.maximum(members.sum(-1, keepdims=True), 1)


def _first(hidden: jax.Array, members: jax.Array) -> Float[Array, "batch segments hidden"]:
    first = jnp.take_along_axis(hidden, members.argmax(-1)[..., None], axis=1)
    return first * members.max(-1, keepdims=True)
