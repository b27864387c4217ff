"""The TokenDrop study: which tokens to leave out, and what that buys on top of BucketSampler."""

import dataclasses
from collections.abc import Callable

import numpy as np

from effjax.core.errors import check_choice, check_number
from effjax.data.bucket_sampler import PlannedBatches
from effjax.data.ragged import Ragged
from effjax.recipes.bucket_sampler import Form, TextStudy, axes, bucketed, group, metric, text_arms, text_sweeps
from effjax.recipes.spec import Arm, Claim, Sweep
from effjax.tasks.text import TextTask
from effjax.transformers.token_drop import stop_ids, token_drop, token_drop_columns

__all__ = ["OTHERS", "TokenDropStudy", "arms", "axes", "claims", "drop_as_many", "sweeps"]

OTHERS = ("buckets-low", "token-drop-full", "random", "truncated")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenDropStudy(TextStudy):
    """Config of the TokenDrop study."""

    caps: tuple[int, ...] = (32,)
    """BucketSampler's largest batch by epoch; the last goes on"""
    period: int = 5
    """lengths fall to a multiple of it"""
    low_dropout: float = 0.0
    """dropout rate of the model where tokens are dropped: they regularise as well"""
    others: tuple[str, ...] = OTHERS
    """arms besides BucketSampler and BucketSampler with TokenDrop"""

    def __post_init__(self):
        super().__post_init__()
        check_number("period", self.period, low=2, integer=True)
        for name in self.others:
            check_choice("others", name, OTHERS)


def arms(config: TokenDropStudy) -> dict[str, Arm]:
    """Every arm of every task, as ``task/arm``; with several learning rates ``task/arm-rate``."""
    return text_arms(config, _forms(config))


def sweeps(config: TokenDropStudy) -> dict[str, Sweep]:
    """The learning rates of each arm, where there are several."""
    return text_sweeps(config, _forms(config))


def claims(config: TokenDropStudy) -> list[Claim]:
    """Fewer tokens and less time at the same accuracy; and that it matters which tokens go."""
    return [claim for task in config.tasks for claim in _claims(config, task)]


def drop_as_many(ids: Ragged, counts: np.ndarray, priority: np.ndarray) -> np.ndarray:
    """Which tokens stay if the ``counts[i]`` of least ``priority`` go from row ``i``.

    Args:
      ids: rows of tokens.
      counts: integers ``[n]``.
      priority: numbers ``[total]``.

    Returns:
      Bool ``[total]``.

    Example:
      >>> drop_as_many(Ragged.of([[5, 6, 7], [8, 9]]), np.array([1, 0]), np.array([2, 0, 1, 0, 0])).tolist()
      [True, False, True, True, True]
    """
    order = np.lexsort((priority, ids.rows))
    kept = np.ones(len(order), bool)
    kept[order[ids.positions < counts[ids.rows]]] = False
    return kept


def _forms(config: TokenDropStudy) -> dict[str, Form]:
    full, low = config.dropout, config.low_dropout

    def form(label: str, role: str, columns: Callable, dropout: float) -> Form:
        def plan(task: TextTask, seed: int, epochs: int) -> PlannedBatches:
            return bucketed(config, columns(task, seed), task, seed, epochs, cap=config.caps)

        return Form(f"{label}, dropout {dropout:g}", role, plan, dropout)

    whole = lambda task, seed: task.train
    method = lambda task, seed: token_drop_columns(task.train, task_stop_ids(task), seed=seed, period=config.period)
    found = {
        "buckets": form("BucketSampler", "baseline", whole, full),
        "token-drop": form(f"+ TokenDrop, period {config.period}", "method", method, low),
    }
    others = {
        "buckets-low": form("BucketSampler", "baseline", whole, low),
        "token-drop-full": form(f"+ TokenDrop, period {config.period}", "method", method, full),
        "random": form("+ as many random tokens dropped", "control", _instead(config, _random_priority), low),
        "truncated": form("+ as many tokens cut from the end", "alternative", _instead(config, _end_priority), low),
    }
    return found | {name: others[name] for name in config.others}


def task_stop_ids(task: TextTask) -> np.ndarray:
    """The stop words of a task's vocabulary, for ``token_drop``."""
    tokenizer = task.tokenizer
    tokens = [tokenizer.token(index) for index in range(tokenizer.vocab_size)]
    rule = "space_word" if any(token.startswith(("Ġ", "▁")) for token in tokens) else "word"
    return stop_ids(tokens.__getitem__, len(tokens), rule=rule, special_ids=tokenizer.special_ids)


def _instead(config: TokenDropStudy, priority: Callable[[Ragged, np.random.Generator], np.ndarray]) -> Callable:
    """Columns that lose as many tokens as with TokenDrop, row by row, but others; never special ones."""

    def columns(task: TextTask, seed: int) -> Callable:
        ids, stops = task.train["input_ids"], task_stop_ids(task)
        special = np.isin(ids.values, list(task.tokenizer.special_ids))

        def read(epoch: int) -> dict:
            short, _ = token_drop(ids, stops, seed=seed, epoch=epoch, period=config.period)
            order = np.where(special, np.inf, priority(ids, np.random.default_rng((seed, epoch))))
            kept = drop_as_many(ids, ids.lengths - short.lengths, order)
            types = task.train.get("token_type_ids")
            return {
                **task.train,
                "input_ids": ids.keep(kept),
                **({} if types is None else {"token_type_ids": types.keep(kept)}),
            }

        return read

    return columns


def _random_priority(ids: Ragged, rng: np.random.Generator) -> np.ndarray:
    return rng.random(len(ids.values))


def _end_priority(ids: Ragged, rng: np.random.Generator) -> np.ndarray:
    return -ids.positions


def _claims(config: TokenDropStudy, task: str) -> list[Claim]:
    name, quality = group(task), metric(task)
    tokens = lambda m, arm: m[f"{name}/{arm}"].get("processed_tokens", float("nan"))
    score = lambda m, arm: m[f"{name}/{arm}"].get(quality, float("nan"))
    found = [
        Claim(
            f"{name}: TokenDrop processes at most 0.9 x the tokens of BucketSampler alone",
            lambda m: tokens(m, "token-drop"),
            "<=",
            lambda m: 0.9 * tokens(m, "buckets"),
        ),
        Claim(
            f"{name}: ... at {quality} within 0.01",
            lambda m: score(m, "token-drop"),
            ">=",
            lambda m: score(m, "buckets") - 0.01,
        ),
    ]
    found += [
        Claim(
            f"{name}: it matters which tokens go: {quality} is at least that of {label}",
            lambda m: score(m, "token-drop"),
            ">=",
            lambda m, arm=arm: score(m, arm),
        )
        for arm, label in (("random", "random tokens dropped"), ("truncated", "tokens cut from the end"))
        if arm in config.others
    ]
    if "buckets-low" in config.others:
        found.append(
            Claim(
                f"{name}: TokenDrop trains in less time than BucketSampler alone, both with dropout "
                f"{config.low_dropout:g}",
                lambda c: c[f"{name}/token-drop"]["train_s"],
                "<=",
                lambda c: c[f"{name}/buckets-low"]["train_s"],
                of="cost",
            )
        )
    return found
