"""The TokenDrop study: which tokens to leave out, and what that buys on top of BucketSampler."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

from effjax.core.errors import Count, Limits, Rate
from effjax.recipes.spec import Claim, Group, Role
from effjax.recipes.texts import MODALITY, TextArm, TextStudy, bucketed, text_groups
from effjax.tasks.task import Task
from effjax.transformers.token_drop import drop_as_many_columns, token_drop_columns, vocabulary_stop_ids

__all__ = ["CLAIMS", "MODALITY", "TokenDropStudy", "groups"]

CLAIMS = {
    "*": (
        Claim("token-drop", "<=", "buckets", of="processed_tokens", times=0.9),
        Claim("token-drop", ">=", "buckets", plus=-0.01),
        Claim("token-drop", ">=", "random", why="it matters which tokens go"),
        Claim("token-drop", ">=", "truncated", why="it matters which tokens go"),
        Claim("token-drop", "<=", "buckets-low", of="train_s"),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenDropStudy(TextStudy):
    """Config of the TokenDrop study."""

    caps: tuple[Count, ...] = (32,)
    """Largest batch of BucketSampler in each epoch; later epochs have the last one."""
    period: Annotated[int, Limits(low=2)] = 5
    """Texts are shortened to a multiple of this many tokens."""
    low_dropout: Rate = 0.0
    """Dropout rate of the model in arms that drop tokens, which regularises as well."""


def groups(config: TokenDropStudy) -> list[Group]:
    """Every arm on every task."""
    full, low = config.dropout, config.low_dropout

    def arm(role: Role, label: str, columns: Callable[[Task, int], Any], dropout: float) -> TextArm:
        return TextArm(role, f"{label}, dropout {dropout:g}", bucketed(config, columns, cap=config.caps), dropout)

    whole = lambda task, seed: task.train
    stops = lambda task: vocabulary_stop_ids(task.tokenizer)
    method = lambda task, seed: token_drop_columns(task.train, stops(task), seed=seed, period=config.period)
    # As many tokens of every row as TokenDrop leaves out, but others; never special ones.
    instead = lambda priority: (
        lambda task, seed: drop_as_many_columns(
            task.train, stops(task), priority, special_ids=task.tokenizer.special_ids, seed=seed, period=config.period
        )
    )
    random = instead(lambda ids, rng: rng.random(len(ids.values)))
    end = instead(lambda ids, rng: -ids.positions)
    arms = {
        "buckets": arm("baseline", "BucketSampler", whole, full),
        "token-drop": arm("method", f"+ TokenDrop, period {config.period}", method, low),
        "buckets-low": arm("baseline", "BucketSampler", whole, low),
        "token-drop-full": arm("method", f"+ TokenDrop, period {config.period}", method, full),
        "random": arm("control", "+ as many random tokens dropped", random, low),
        "truncated": arm("alternative", "+ as many tokens cut from the end", end, low),
    }
    return text_groups(config, arms)
