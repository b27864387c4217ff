"""What a chain of adapters is: its settings and its state."""

import dataclasses
import itertools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int, UInt

from effjax.core.errors import NoEffectWarning, check_choice, check_number
from effjax.finetune.lora import Lora
from effjax.finetune.lora_config import LoraConfig, LoraRule
from effjax.finetune.restart import SCHEDULES

__all__ = ["ColaConfig"]

PyTree = Any

_MERGES = ("master", "lazy", "plain")


@dataclasses.dataclass(frozen=True)
class ColaConfig:
    """A chain of adapters; hashable, so it may be a static argument.

    Attributes:
      lora: the adapters of one link; patterns or rules stand for a ``LoraConfig`` of them.
      knots: steps, counted from 0, at whose start a knot is tied; so many updates are done by then. Increasing.
      links: most links of a chain whose knots are decided while it trains; else one more than ``knots``.
      ranks: rank of every link, never growing, in place of the rules' one rank, which is the first of them. Shapes
        stay, the entries beyond a link's rank are zero, and so are their gradients. It saves next to no compute.
      alphas: alpha of every link, in place of the rules'. A link counts with the factor alpha / rank.
      schedule: ``'global'``: one learning-rate schedule over the whole chain, which may be one of each link's own
        (``link_schedule``); ``'per_link'``: it restarts at knots.
      merge: what a knot does to the kernels. ``'master'``: adds to them; those narrower than float32 have a float32
        copy, so that no change is lost for good, though the network sees it rounded. ``'lazy'``: nothing; past links
        stay beside the kernels as one wider adapter. That is exact whatever the base's dtype, and costs adapters of the
        summed rank. ``'plain'``: adds and rounds; in bfloat16 this loses changes below its resolution for good.
      reinit: the new ``a``: ``'random'``, or the leading directions of a ``'gradient'`` sample.
      keep_links: remember the links of a merged chain, so that it can be exported as one adapter.

    Raises:
      ValueError: knots out of order, ranks that grow, a combination that cannot work.

    Warns:
      NoEffectWarning: a chain of one link, which is LoRA.

    Example:
      >>> config = ColaConfig("(query|value)/kernel", knots=(200, 400))
      >>> config.most_links, config.ties(199), config.ties(200)
      (3, True, False)
    """

    lora: LoraConfig | LoraRule | str | Sequence[LoraRule | str]
    knots: Sequence[int] = ()
    _: dataclasses.KW_ONLY
    links: int | None = None
    ranks: Sequence[int] | None = None
    alphas: Sequence[float] | None = None
    schedule: str = "global"
    merge: str = "master"
    reinit: str = "random"
    keep_links: bool = False

    def __post_init__(self) -> None:
        lora = self.lora if isinstance(self.lora, LoraConfig) else LoraConfig(self.lora)
        object.__setattr__(self, "lora", lora)
        for name in ("knots", "ranks", "alphas"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("merge", self.merge, _MERGES)
        check_choice("reinit", self.reinit, ("random", "gradient"))
        self._check_knots()
        self._check_ranks()
        if self.merge == "lazy" and lora.dropout:
            raise ValueError(
                f"merge='lazy' with dropout={lora.dropout}: the links of the past would be dropped out too, and the "
                "knots would change the network. Use merge='master', or dropout=0."
            )

    def _check_knots(self) -> None:
        for i, knot in enumerate(self.knots):
            check_number(f"knots[{i}]", knot, low=1, integer=True, hint="At step 0 there is nothing to tie.")
        if any(before >= after for before, after in itertools.pairwise(self.knots)):
            raise ValueError(f"knots={self.knots} must increase. Sort them and drop what occurs twice.")
        if self.links is not None:
            check_number("links", self.links, low=1, integer=True)
            if self.knots:
                raise ValueError(
                    f"links={self.links} is for chains whose knots are decided while they train; "
                    f"knots={self.knots} make {len(self.knots) + 1} links. Give one of the two."
                )
        if self.most_links == 1:
            warnings.warn(
                "a chain without knots is LoRA. Give knots=(step, ...), or links=n where they are decided in training.",
                NoEffectWarning,
                stacklevel=4,
            )

    def _check_ranks(self) -> None:
        for name in ("ranks", "alphas"):
            values = getattr(self, name)
            if values is not None and len(values) != self.most_links:
                raise ValueError(f"{name}={values} needs one entry for each of the {self.most_links} links.")
        for i, alpha in enumerate(self.alphas or ()):
            check_number(f"alphas[{i}]", alpha, low=0.0, open_low=True)
        if self.ranks is None:
            return
        for i, rank in enumerate(self.ranks):
            check_number(f"ranks[{i}]", rank, low=1, integer=True)
        if any(before < after for before, after in itertools.pairwise(self.ranks)):
            raise ValueError(f"ranks={self.ranks} grow. Ranks step down: the shapes hold the first one. Reverse them.")
        others = {rule.rank for rule in self.lora_config.each_rule} - {self.ranks[0]}
        if others:
            raise ValueError(
                f"ranks={self.ranks} begin with {self.ranks[0]}, but rules have rank {sorted(others)}. "
                f"Give every rule rank={self.ranks[0]}."
            )

    @property
    def lora_config(self) -> LoraConfig:
        """The adapters of one link."""
        return self.lora if isinstance(self.lora, LoraConfig) else LoraConfig(self.lora)

    @property
    def most_links(self) -> int:
        """Links of the whole chain."""
        return len(self.knots) + 1 if self.links is None else self.links

    def ties(self, step: int, every: int = 1) -> bool:
        """Whether a link ends with this step's update, the value of ``tie`` in ``effjax.cola``.

        Args:
          step: from 0; with accumulation, that of the micro-batch.
          every: micro-batches in one update (``every_k_schedule`` of ``optax.MultiSteps``); knots count updates.

        Returns:
          True in the last micro-batch before a knot.

        Example:
          >>> config = ColaConfig("kernel", knots=(2,))
          >>> [config.ties(step, every=2) for step in range(5)]
          [False, False, False, True, False]
        """
        updates, rest = divmod(int(step) + 1, every)
        return rest == 0 and updates in self.knots


class ColaState(NamedTuple):
    """A network under a chain of adapters: all that a checkpoint needs besides the optimizer's state.

    Attributes:
      base: the model's parameters.
      lora: the trainable adapters of the present link.
      link: int32, its index from 0.
      key: raw PRNG key of the draws.
      past: the links of the past side by side, scales folded into ``b``; only with lazy knots or ``keep_links``.
      master: float32 kernels by path, of those targets that are narrower; None if none.
    """

    base: PyTree
    lora: Lora
    link: Int[Array, ""]
    key: UInt[Array, "words"]
    past: Lora | None
    master: dict[str, Float[Array, "..."]] | None
