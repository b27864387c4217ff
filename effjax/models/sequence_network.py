"""A classifier, regressor or language model around any layer of states over time."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.core.errors import check_choice, check_number
from effjax.core.tree import wide


class SequenceNetwork(nn.Module):
    """Embedding (of ids), a layer of states over time, and a linear head on the last state, their mean, or all.

    Args:
      layer: from ``[batch, time, features]`` to states ``[batch, time, hidden]``: ``IncrementalRNN``, ``TARNN``,
        ``LRU``, ``Recurrent(LSTMCell(64))``, ``nn.RNN(nn.GRUCell(64))``, an ``nn.Sequential`` of several, ...
      outputs: classes, numbers to predict, or words of the output vocabulary.
      read: ``"last"`` or ``"mean"``, of the states over time, for one answer a sequence; ``"all"`` for one a time step.
      vocabulary: of ids to embed; None where inputs are vectors.
      embedding: width of the embedding.
      dropout: rate on the states that the head reads, and on embeddings.

    Returns:
      When called with vectors ``[batch, time, features]`` or ids ``[batch, time]``: ``[batch, outputs]``, or
      ``[batch, time, outputs]``, float32 at least.

    Raises:
      ValueError: inputs of another rank, an unknown ``read``, an embedding without a vocabulary.

    Example:
      >>> from effjax.recurrent.irnn import IncrementalRNN
      >>> network = SequenceNetwork(IncrementalRNN(8, length=20), outputs=3)
      >>> outputs, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), jnp.ones((4, 20, 2)))
      >>> outputs.shape
      (4, 3)
    """

    layer: nn.Module
    outputs: int
    read: str = "last"
    vocabulary: int | None = None
    embedding: int | None = None
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time features"] | Int[Array, "batch time"], train: bool = False
    ) -> jax.Array:
        check_choice("read", self.read, ("last", "mean", "all"))
        if (self.vocabulary is None) != (self.embedding is None):
            raise ValueError(
                f"vocabulary={self.vocabulary} and embedding={self.embedding}: ids need both, vectors neither."
            )
        drop = nn.Dropout(self.dropout, deterministic=not train)
        rank = 3 if self.vocabulary is None else 2
        if jnp.ndim(x) != rank:
            wanted = "vectors [batch, time, features]" if rank == 3 else "ids [batch, time]"
            raise ValueError(f"x has shape {jnp.shape(x)}, but vocabulary={self.vocabulary} asks for {wanted}.")
        if self.vocabulary is not None:
            check_number("embedding", self.embedding, low=1, integer=True)
            x = drop(nn.Embed(self.vocabulary, self.embedding, name="embed")(x))
        states = self.layer(x)
        if self.read != "all":
            states = states[:, -1] if self.read == "last" else states.mean(1)
        return wide(nn.Dense(self.outputs, name="head")(drop(states)))
