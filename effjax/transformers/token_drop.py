"""TokenDrop: every epoch, leave out a few insignificant tokens (Nagarajan, Raghunathan 2023, Findings of EMNLP).

On token ids and whole data sets, in NumPy: no strings at run time and no loop over rows.
"""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Integer, UInt

from effjax.core.errors import NoEffectWarning, check_choice, check_number
from effjax.core.shapes import check_ladder
from effjax.data.columns import Columns, token_columns
from effjax.data.ragged import Ragged

__all__ = ["stop_ids", "stop_ids_top_k", "token_drop", "token_drop_columns"]

_PUNCTUATION = ("-", ".", ";", "...", "(", ")")
# NLTK's English stop words without negations, "same" and clitics, as in the paper's code, plus punctuation. Its eight
# entries with an apostrophe ("you're", "should've") are never one token and are left out.
_ENGLISH = """
i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it
its itself they them their theirs themselves what which who whom this that these those am is are was were be been
being have has had having do does did doing a an the and but if or because as until while of at by for with about
against between into through during before after above below to from up down in out on off over under again further
then once here there when where why how all any both each few more most other some such only own so than too very
can will just should now
"""
STOP_WORDS: tuple[str, ...] = (*_ENGLISH.split(), *_PUNCTUATION)
_SPACES = (" ", "Ġ", "▁")  # as decoded, in byte-level BPE, in SentencePiece


def stop_ids(
    token: Callable[[int], str],
    vocab_size: int,
    *,
    rule: str = "word",
    words: Sequence[str] = STOP_WORDS,
    special_ids: Collection[int] = (),
) -> Int[np.ndarray, "vocab"]:
    """Which token ids may be dropped, and as which word.

    Args:
      token: the text of an id, raw or decoded (``tokenizer.token``, ``convert_ids_to_tokens``).
      vocab_size: number of ids.
      rule: ``'word'``, the token is the word (uncased WordPiece); ``'space_word'``, it is the word after a space
        (RoBERTa, Llama), or the bare mark for punctuation: so a text's first word and capitalised words are safe.
      words: the insignificant words. The default is English.
      special_ids: ids never dropped, whatever their text.

    Returns:
      Int32 ``[vocab_size]``: index into ``words``, or -1 where the token stays.

    Raises:
      ValueError: no token matches, or arguments out of range.

    Example:
      >>> stop_ids(["[CLS]", "the", "##the", "film"].__getitem__, 4, words=("a", "the")).tolist()
      [-1, 1, -1, -1]
    """
    check_number("vocab_size", vocab_size, low=1, integer=True)
    check_choice("rule", rule, ("word", "space_word"))
    if rule == "word":
        index = {word: i for i, word in enumerate(words)}
    else:
        index = {
            prefix + word: i for i, word in enumerate(words) for prefix in (("",) if word in _PUNCTUATION else _SPACES)
        }
    table = np.array([index.get(token(i), -1) for i in range(vocab_size)], np.int32)
    table[list(special_ids)] = -1
    if (table < 0).all():
        other = "space_word" if rule == "word" else "word"
        raise ValueError(
            f"rule={rule!r} finds none of the {len(words)} words among {vocab_size} tokens such as "
            f"{[token(i) for i in range(min(vocab_size, 5))]}. Try rule={other!r}, words of the tokens' language, or "
            "stop_ids_top_k."
        )
    return table


def stop_ids_top_k(
    ids: Ragged | Integer[np.ndarray, "total"] | Sequence[Sequence[int]] | Any,
    k: int,
    *,
    vocab_size: int,
    special_ids: Collection[int],
) -> Int[np.ndarray, "vocab"]:
    """The k most frequent token ids as the insignificant ones, for languages without a list.

    Args:
      ids: the training texts: a ``Ragged``, lists, a column of a Hugging Face ``Dataset``, or all ids end to end.
      k: how many.
      vocab_size: number of ids.
      special_ids: ids never dropped (they would be the most frequent).

    Returns:
      Int32 ``[vocab_size]``: the id's rank by frequency, or -1 where the token stays.

    Raises:
      ValueError: fewer than ``k`` other ids occur, or ids are outside the vocabulary.

    Example:
      >>> stop_ids_top_k(Ragged.of([[0, 3, 3, 2], [0, 3, 1]]), 1, vocab_size=4, special_ids=[0]).tolist()
      [-1, -1, -1, 0]
    """
    values = ids if isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype != object else _ragged(ids).values
    _check_ids(values, vocab_size)
    counts = np.bincount(values, minlength=vocab_size)
    counts[list(special_ids)] = 0
    check_number("k", k, low=1, high=int((counts > 0).sum()), integer=True, hint="Other ids occur nowhere.")
    table = np.full(vocab_size, -1, np.int32)
    table[np.argsort(-counts, kind="stable")[:k]] = np.arange(k)
    return table


def vocabulary_stop_ids(tokenizer: Any) -> Int[np.ndarray, "vocabulary"]:
    """The ``stop_ids`` of a tokenizer's vocabulary, by the rule that its tokens follow.

    Args:
      tokenizer: with ``token(index)``, ``vocab_size`` and ``special_ids``, such as ``effjax.load_tokenizer`` returns.

    Returns:
      int32 [vocabulary], see ``stop_ids``.

    Example:
      >>> from types import SimpleNamespace
      >>> words = ["<s>", " the", " cat", " to", "the"]
      >>> made = SimpleNamespace(token=words.__getitem__, vocab_size=5, special_ids=(0,))
      >>> [words[index] for index in np.flatnonzero(vocabulary_stop_ids(made) >= 0)]
      [' the', ' to']
    """
    tokens = [tokenizer.token(index) for index in range(tokenizer.vocab_size)]
    rule = "space_word" if any(token[:1] in _SPACES and token[1:].isalpha() for token in tokens) else "word"
    return stop_ids(tokens.__getitem__, len(tokens), rule=rule, special_ids=tokenizer.special_ids)


def _ragged(ids: Any) -> Ragged:
    return ids if isinstance(ids, Ragged) else Ragged.of(ids)


def token_drop(
    ids: Ragged | Sequence[Sequence[int]] | Any,
    stop_of_id: Integer[np.ndarray, "vocab"],
    *,
    seed: int,
    epoch: int,
    period: int = 5,
    boundaries: Sequence[int] | None = None,
    max_drop: float | None = None,
    row_ids: Integer[np.ndarray, "n"] | None = None,
    order: Integer[np.ndarray, "n words"] | None = None,
) -> tuple[Ragged, Bool[np.ndarray, "total"]]:
    r"""Leave out random insignificant tokens, just enough that each length falls to the edge of the bucket below.

    Of a sequence of n tokens

    .. math:: r = n \bmod \mathrm{period}

    go, or as many droppable ones as there are: sorted by a random order of the stop words, then by position, the first
    r. So all copies of one word go before another word is touched. Only for training, anew from the undropped ids in
    every epoch.

    Args:
      ids: token ids, special tokens included: a ``Ragged``, lists, or a column of a Hugging Face ``Dataset``.
      stop_of_id: from ``stop_ids`` or ``stop_ids_top_k``; below 0 where the token stays.
      seed: 0 or more.
      epoch: from 0.
      period: the buckets' width.
      boundaries: of the buckets, where their widths differ (the sampler's ``boundaries``): then r is n minus the
        largest boundary up to n, and 0 below the first. ``period`` has no part in it.
      max_drop: most tokens that a sequence may lose: an integer, or a fraction of its tokens (a float below 1).
      row_ids: integers ``[n]`` that name the examples; by default their place. Drops depend on
        ``(seed, epoch, row id)`` alone, so a shard or another order must bring its ids.
      order: the order of the stop words in each row, instead of a random one: ``order[i, j]`` is the j-th to go.

    Returns:
      The shorter sequences, and which tokens stayed, for arrays that go with them: ``types.keep(kept)``.

    Raises:
      ValueError: ids outside the table, or arguments out of range.

    Warns:
      NoEffectWarning: no token is droppable.

    Example:
      >>> ids = Ragged.of([[0, 1, 3, 2, 3, 1, 0]])  # 1 and 2 are stop words; 7 mod 5 = 2 tokens go
      >>> short, kept = token_drop(ids, np.array([-1, 0, 1, -1]), seed=0, epoch=0)
      >>> short.lengths.tolist(), kept.sum().item()
      ([5], 5)

    The paper's code (Nagarajan and Raghunathan, Findings of EMNLP 2023) shuffles one list in place, example after
    example; here each example has a generator of its own. ``boundaries`` and ``max_drop`` are ours, and a sequence
    never loses its last token. Dropping articles is unsafe where grammar is the label (CoLA) and where tokens are.
    """
    stop_of_id, ids = np.asarray(stop_of_id), _ragged(ids)
    _check_ids(ids.values, len(stop_of_id))
    check_number("seed", seed, low=0, integer=True)
    check_number("epoch", epoch, low=0, integer=True)
    excess = np.minimum(_excess(ids.lengths, period, boundaries), np.maximum(ids.lengths - 1, 0))
    if max_drop is not None:
        fraction = isinstance(max_drop, float) and max_drop < 1
        check_number("max_drop", max_drop, low=0, open_low=True, integer=not fraction)
        excess = np.minimum(excess, (max_drop * ids.lengths).astype(int) if fraction else max_drop)

    words = stop_of_id[ids.values]
    if ids.values.size and (words < 0).all():
        warnings.warn(
            f"None of the {len(ids.values)} tokens is droppable: stop_of_id marks {int((stop_of_id >= 0).sum())} of "
            f"{len(stop_of_id)} ids, which do not occur. Make it with the tokenizer of these ids.",
            NoEffectWarning,
            stacklevel=2,
        )
    rows = ids.rows
    places = np.flatnonzero((words >= 0) & (excess[rows] > 0))
    rows, words = rows[places], words[places]
    if order is None:
        names = np.arange(len(ids)) if row_ids is None else _check_row_ids(row_ids, len(ids))
        ranks = word_hash(seed, epoch, names[rows], words)
    else:
        ranks = np.argsort(order, axis=1)[rows, words]
    sequence = np.lexsort((places, ranks, rows))
    counts = np.bincount(rows, minlength=len(ids))
    turns = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept = np.ones(len(ids.values), bool)
    kept[places[sequence[turns < excess[rows]]]] = False  # rows are sorted, so they are in sequence as well
    return ids.keep(kept), kept


def token_drop_columns(
    columns: Columns | Any, stop_of_id: Integer[np.ndarray, "vocab"], *, seed: int, **options: Any
) -> Callable[[int], dict[str, Any]]:
    """The columns of every epoch, dropped anew: what ``BucketSampler`` takes for columns that change.

    Args:
      columns: as for ``BucketSampler``: by name, a Hugging Face ``Dataset``, or a list of examples. All columns of one
        integer per token lose what ``input_ids`` lose.
      stop_of_id: from ``stop_ids``; below 0 where the token stays.
      seed: of the draws.
      **options: of ``token_drop``.

    Returns:
      ``epoch -> columns``.

    Example:
      >>> read = token_drop_columns({"input_ids": Ragged.of([[0, 1, 1, 1, 2, 1, 0]])}, np.array([-1, 0, -1]), seed=0)
      >>> read(0)["input_ids"][0].tolist()
      [0, 1, 2, 1, 0]
    """
    held = _held(columns)

    def read(epoch: int) -> dict[str, Any]:
        _, kept = token_drop(held["input_ids"], stop_of_id, seed=seed, epoch=epoch, **options)
        return _kept(held, kept)

    return read


def drop_as_many_columns(
    columns: Columns | Any,
    stop_of_id: Integer[np.ndarray, "vocab"],
    priority: Callable[[Ragged, np.random.Generator], np.ndarray],
    *,
    special_ids: Collection[int],
    seed: int,
    **options: Any,
) -> Callable[[int], dict[str, Any]]:
    """The columns of every epoch, of which every row loses as many tokens as with ``token_drop_columns``, but others.

    Args:
      columns: as for ``token_drop_columns``.
      stop_of_id: from ``stop_ids``; below 0 where the token stays.
      priority: ``(ids, rng) -> numbers [total]``; the tokens of least priority go.
      special_ids: tokens that go last.
      seed: of the draws; the generator is seeded by it and the epoch.
      **options: of ``token_drop``.

    Returns:
      ``epoch -> columns``.

    Example:
      >>> columns = {"input_ids": Ragged.of([[0, 1, 1, 1, 2, 3, 0]])}
      >>> end = lambda ids, rng: -ids.positions
      >>> read = drop_as_many_columns(columns, np.array([-1, 0, -1, -1]), end, special_ids=[0], seed=0)
      >>> read(0)["input_ids"][0].tolist()
      [0, 1, 1, 1, 0]
    """
    held = _held(columns)
    ids = held["input_ids"]
    special = np.isin(ids.values, list(special_ids))

    def read(epoch: int) -> dict[str, Any]:
        short, _ = token_drop(ids, stop_of_id, seed=seed, epoch=epoch, **options)
        order = np.where(special, np.inf, priority(ids, np.random.default_rng((seed, epoch))))
        return _kept(held, drop_as_many(ids, ids.lengths - short.lengths, order))

    return read


def _held(columns: Any) -> dict[str, Any]:
    """Columns of one integer per token as ``Ragged``, the others as they are."""
    found = token_columns(columns)
    own = columns if isinstance(columns, Mapping) else found
    return {name: column if isinstance(column, Ragged) else own[name] for name, column in found.items()}


def _kept(columns: Mapping[str, Any], kept: np.ndarray) -> dict[str, Any]:
    return {name: column.keep(kept) if isinstance(column, Ragged) else column for name, column in columns.items()}


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


def _excess(lengths: np.ndarray, period: int, boundaries: Sequence[int] | None) -> np.ndarray:
    """Tokens above the edge of the bucket below."""
    if boundaries is None:
        return lengths % check_number("period", period, low=2, integer=True, hint="1 would drop nothing.")
    edges = np.array((0, *check_ladder(boundaries, argument="boundaries")))
    below = np.searchsorted(edges, lengths, side="right") - 1
    return np.where(below == 0, 0, lengths - edges[below])


def _check_ids(values: np.ndarray, vocab_size: int) -> None:
    if values.size and not 0 <= values.min() <= values.max() < vocab_size:
        raise ValueError(
            f"Token ids run from {values.min()} to {values.max()}, outside the {vocab_size} of the vocabulary. Use the "
            "tokenizer that made them."
        )


def _check_row_ids(row_ids: Any, rows: int) -> np.ndarray:
    row_ids = np.asarray(row_ids)
    if row_ids.shape != (rows,) or row_ids.dtype.kind not in "iu":
        raise ValueError(f"row_ids is {row_ids.dtype}{list(row_ids.shape)}; it must hold one integer for {rows} rows.")
    return row_ids


def word_hash(seed: int, epoch: int, rows: np.ndarray, words: np.ndarray) -> UInt[np.ndarray, "m"]:
    """A random 64-bit number for each (seed, epoch, row, word): SplitMix64 steps over the parts."""
    state = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    for part in (rows, words):
        state = _mix(state + part.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return state


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
