"""Settings of LoRA: which kernels get adapters, and of which size."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from effjax.core.errors import check_choice, check_number

__all__ = ["LoraConfig", "LoraRule"]

_INITS = ("peft", "gaussian", "flax")


@dataclasses.dataclass(frozen=True)
class LoraRule:
    """Which kernels get adapters of which size.

    Attributes:
      pattern: regular expression on the slash-joined path of the kernel (``re.search``).
      rank: r, the width of the adapters.
      alpha: the adapters count with the factor alpha / r, or alpha / sqrt(r) with ``rslora``.
      window: axes of a convolution's window. None, as the two below: told by the bias and the parameters beside it.
      inputs: axes of the kernel that the layer sums over: 2 of attention's output layer [heads, width, out].
      outputs: axes that it makes: 2 of attention's query [in, heads, width]. Axes before them are a stack of layers.

    Raises:
      ValueError: a number out of range.

    Example:
      >>> LoraRule("attention/(query|value)/kernel$", rank=4).alpha
      16.0
    """

    pattern: str
    rank: int = 8
    alpha: float = 16.0
    window: int | None = None
    inputs: int | None = None
    outputs: int | None = None

    def __post_init__(self) -> None:
        check_number("rank", self.rank, low=1, integer=True)
        check_number("alpha", self.alpha, low=0.0, open_low=True)
        for name, low in (("window", 0), ("inputs", 1), ("outputs", 1)):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=low, integer=True)
        if self.window and self.inputs is not None and self.inputs <= self.window:
            raise ValueError(
                f"inputs={self.inputs} must exceed window={self.window}: the axes of a window are summed over too."
            )


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What ``lora_init`` makes; hashable, so it may be a static argument.

    Attributes:
      rules: one ``LoraRule`` or several, the first match wins; a pattern alone has the default rank and alpha.
      dropout: rate on the adapters' input, for ``lora_apply``.
      init: how ``a`` starts, with n the fan-in of the kernel (1 of an embedding, of which a token reads one row):
        ``"peft"`` U(-1/sqrt(n), 1/sqrt(n)), the default of Hugging Face PEFT; ``"gaussian"`` N(0, 1/r^2), its other
        one; ``"flax"`` U(-sqrt(6/n), sqrt(6/n)), of ``nnx.LoRA`` and Qwix; or an initializer
        ``(key, shape, dtype) -> array``. ``b`` starts at zero.
      rslora: factor alpha / sqrt(r) in place of alpha / r (Kalajdzievski 2023, arXiv 2312.03732).
      dtype: of the adapters.
      whole: patterns of leaves that are trained whole beside the adapters, such as a new head, ``"^head/"``: PEFT's
        ``modules_to_save``.

    Raises:
      ValueError: no rules, an unknown initializer, ``dropout`` out of [0, 1).
      TypeError: ``dtype`` is not a floating type.

    Example:
      >>> config = LoraConfig((LoraRule("mlp/.*/kernel", rank=2), "query/kernel"))
      >>> [rule.rank for rule in config.rules]
      [2, 8]
    """

    rules: Sequence[LoraRule | str] | LoraRule | str
    dropout: float = 0.0
    init: str | Callable[..., jax.Array] = "peft"
    rslora: bool = False
    dtype: DTypeLike = jnp.float32
    whole: Sequence[str] | str = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "whole", (self.whole,) if isinstance(self.whole, str) else tuple(self.whole))
        rules = (self.rules,) if isinstance(self.rules, (str, LoraRule)) else tuple(self.rules)
        if not rules:
            raise ValueError("rules=() adapts nothing. Give a pattern such as 'attention/(query|value)/kernel'.")
        rules = tuple(LoraRule(rule) if isinstance(rule, str) else rule for rule in rules)
        object.__setattr__(self, "rules", rules)
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        check_number("dropout", self.dropout, low=0.0, high=1.0, open_high=True)
        if not callable(self.init):
            check_choice("init", self.init, _INITS)
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise TypeError(f"dtype={self.dtype} must be a floating type, such as float32 or bfloat16.")

    @property
    def each_rule(self) -> tuple[LoraRule, ...]:
        """``rules``, none of them a plain pattern."""
        return cast(tuple[LoraRule, ...], self.rules)
