"""Text to token ids and back, on Hugging Face's ``tokenizers``."""

import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from effjax.core.errors import check_number
from effjax.core.files import first_line, read_json, read_text
from effjax.core.folders import model_folder
from effjax.data.ragged import Ragged

__all__ = ["load_tokenizer"]

if TYPE_CHECKING:
    import tokenizers

_log = logging.getLogger("effjax")
_PAD_NAMES = ("[PAD]", "<pad>")
_BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_BATCH = 16384


class Tokens(NamedTuple):
    """Encoded texts.

    Attributes:
      input_ids: one sequence a text.
      token_type_ids: 0 in the first text of a pair and 1 in the second, like ``input_ids``; None
        without pairs.
    """

    input_ids: Ragged
    token_type_ids: Ragged | None


class Tokenizer:
    """A tokenizer whose results are flat arrays; see ``load_tokenizer`` and ``train_tokenizer``.

    Calls leave it unchanged, so that threads may share it.

    Attributes:
      pad_id: id to fill batches with: of the token that the folder names, or ``[PAD]``, ``<pad>``; 0 where there is
        none.
      vocab_size: the highest id and one, the rows that a model's table needs; there may be ids between that no token
        has.
      special_ids: ids of ``[CLS]`` and the like.
    """

    pad_id: int
    vocab_size: int
    special_ids: frozenset[int]

    def __init__(self, backend: "tokenizers.Tokenizer", pad_token: str | None = None):
        # Files may ask for padding or truncation of their own, which would hide ours.
        backend.no_padding()
        backend.no_truncation()
        self._backends: dict[int | None, tokenizers.Tokenizer] = {None: backend}
        named = () if pad_token is None else (pad_token,)
        ids = (backend.token_to_id(name) for name in (*named, *_PAD_NAMES))
        self.pad_id = next((index for index in ids if index is not None), 0)
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        _settle_parallelism()

    def encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        max_length: int,
        truncate: bool = True,
    ) -> Tokens:
        """Token ids of texts, or of pairs of texts, with the special tokens of the model.

        An empty text is legal where special tokens stand around it (``[CLS] [SEP]``, as in BERT).

        Args:
          texts: strings.
          pairs: second texts, one for each.
          max_length: most tokens of a row, special ones included.
          truncate: cut longer rows (of a pair, its longer text); else refuse them.

        Returns:
          ``Tokens`` of ``len(texts)`` sequences.

        Raises:
          TypeError: ``texts`` is one string, or a text is no string.
          ValueError: numbers of texts differ, a row is too long, or one would have no token.

        Example:
          >>> tokenizer = train_tokenizer(["a cat sat", "a mat"], vocab_size=40)
          >>> tokens = tokenizer.encode(["a cat", ""], ["", "a mat"], max_length=16)
          >>> [" ".join(map(tokenizer.token, row)) for row in tokens.input_ids]
          ['[CLS] a cat [SEP] [SEP]', '[CLS] [SEP] a mat [SEP]']
          >>> tokens.token_type_ids[1].tolist()
          [0, 0, 1, 1, 1]
        """
        _check_texts("texts", texts)
        if pairs is not None:
            _check_texts("pairs", pairs)
            if len(pairs) != len(texts):
                raise ValueError(f"pairs holds {len(pairs)} texts and texts {len(texts)}: give one for each.")
        least = self._backends[None].num_special_tokens_to_add(pairs is not None) + 1
        check_number("max_length", max_length, low=least, integer=True, hint="Special tokens need room as well.")
        backend = self._truncating(max_length) if truncate else self._backends[None]
        ids, types, lengths = [], [], []
        for begin in range(0, len(texts), _BATCH):
            batch = slice(begin, begin + _BATCH)
            rows = texts[batch] if pairs is None else list(zip(texts[batch], pairs[batch], strict=True))
            encoded = backend.encode_batch_fast(list(rows))
            ids.append(_flat([row.ids for row in encoded]))
            types.append(_flat([row.type_ids for row in encoded]) if pairs is not None else ids[-1])
            lengths.append(np.array([len(row) for row in encoded]))
        if not lengths:
            ids, types, lengths = ([np.zeros(0, np.int32)] for _ in range(3))
        sizes = np.concatenate(lengths)
        _check_lengths(texts, sizes, max_length)
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        joined = Ragged(np.concatenate(ids), offsets)
        return Tokens(joined, None if pairs is None else Ragged(np.concatenate(types), offsets))

    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of one sequence of ids, without special tokens."""
        return self._backends[None].decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    def token(self, index: int) -> str:
        """The piece of text that an id stands for; empty where no token has that id, though higher ones exist."""
        piece = self._backends[None].id_to_token(int(index))
        if piece is None and 0 <= int(index) < self.vocab_size:
            return ""
        if piece is None:
            raise ValueError(f"index={index} is not an id in [0, {self.vocab_size - 1}].")
        return piece

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.json`` into a folder, as Hugging Face reads it."""
        self._backends[None].save(str(Path(folder) / "tokenizer.json"))

    def _truncating(self, max_length: int) -> "tokenizers.Tokenizer":
        """Truncation is a property of a backend, so each length has its own."""
        if max_length not in self._backends:
            whole = self._backends[None]
            backend = type(whole).from_str(whole.to_str())
            backend.enable_truncation(max_length)
            self._backends.setdefault(max_length, backend)
        return self._backends[max_length]


def load_tokenizer(source: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a pretrained model.

    Args:
      source: a ``tokenizer.json``, a folder that holds one, or a name as for ``load_pretrained``:
        ``"minilm"``, ``"stories260k"``.

    Returns:
      A ``Tokenizer``; padding and truncation that the file may ask for are switched off. The padding token is that of
      ``tokenizer_config.json`` or ``special_tokens_map.json`` beside it, where one names it.

    Raises:
      FileNotFoundError: there is none.
      ImportError: the package ``tokenizers`` is not installed.
      ValueError: a damaged or foreign file.

    Example:
      >>> tokenizer = load_tokenizer("stories260k")
      >>> ids = tokenizer.encode(["Lily saw a dog."], max_length=32).input_ids[0]
      >>> len(ids), tokenizer.decode(ids)
      (7, 'Lily saw a dog.')
    """
    library = _library()
    path = Path(source)
    path = path if path.is_file() else model_folder(source, "tokenizer.json") / "tokenizer.json"
    text = read_text(path)
    try:
        content = json.loads(text)
        own = "pieces" in content
        backend = _from_pieces(content["pieces"], content["scores"]) if own else library.Tokenizer.from_str(text)
        backend.encode_batch(["a text", ("a text", "another")])  # templates fail only here
        return Tokenizer(backend, _pad_token(path.parent, backend))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exceptions, and Rust's panics, which are none
        raise ValueError(f"{path} is damaged or no tokenizer ({first_line(error)}). Fetch it again.") from error


def _pad_token(folder: Path, backend: "tokenizers.Tokenizer") -> str | None:
    """The padding token by the files beside a tokenizer; one that the vocabulary lacks is passed over, and said so."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if not (folder / name).is_file():
            continue
        found = read_json(folder / name)
        token = found.get("pad_token") if isinstance(found, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and backend.token_to_id(token) is not None:
            return token
        if isinstance(token, str):
            _log.warning("%s names the padding token %r, which the vocabulary has not.", folder / name, token)
    return None


def train_tokenizer(texts: Sequence[str], vocab_size: int, *, lowercase: bool = True) -> Tokenizer:
    """A WordPiece tokenizer in the manner of BERT, trained on texts; the same texts give the same ids.

    Args:
      texts: training texts.
      vocab_size: most ids: five special ones (``[PAD]`` is 0), characters, pieces of words. Where the
        characters would take more than half, the rarest ones become ``[UNK]``.
      lowercase: ignore case and accents.

    Returns:
      A ``Tokenizer``; short texts may not fill ``vocab_size``.

    Raises:
      ImportError: the package ``tokenizers`` is not installed.
      ValueError: no text, or ``vocab_size`` below 16.

    Example:
      >>> tokenizer = train_tokenizer(["one fish two fish", "red fish blue fish"], vocab_size=80)
      >>> [tokenizer.token(i) for i in tokenizer.encode(["Two fish"], max_length=8).input_ids[0]]
      ['[CLS]', 'two', 'fish', '[SEP]']

    Source: Schuster & Nakajima 2012, in the form of ``tokenizers``, whose own training gives
    continuations of words ids in random order; here characters come first, sorted.
    """
    _check_texts("texts", texts)
    check_number("vocab_size", vocab_size, low=16, integer=True)
    library = _library()
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    counts = Counter(itertools.chain.from_iterable(normalizer.normalize_str(text) for text in texts))
    counts.pop(" ", None)
    if not counts:
        raise ValueError(f"texts: the {len(texts)} texts hold no character to train on.")
    ranked = sorted(counts, key=lambda char: (-counts[char], char))
    kept = sorted(ranked[: (vocab_size - len(_BERT_SPECIAL)) // 4])
    characters = [*kept, *(f"##{char}" for char in kept)]
    rare = {ord(char): None for char in ranked[len(kept) :]}
    trained = library.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # Characters as "special" tokens get their ids before training does.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*_BERT_SPECIAL, *characters], show_progress=False
    )
    trained.train_from_iterator((normalizer.normalize_str(text).translate(rare) for text in texts), trainer)
    backend = library.Tokenizer(models.WordPiece(vocab=trained.get_vocab(), unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(list(_BERT_SPECIAL))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return Tokenizer(backend)


def _from_pieces(pieces: Sequence[str], scores: Sequence[float]) -> "tokenizers.Tokenizer":
    """llama2.c's byte-pair encoding: join the neighbours whose piece scores highest until none is left."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    vocabulary = {name: index for index, name in enumerate(pieces)}
    joined = sorted(range(259, len(pieces)), key=lambda index: -scores[index])
    merges = [
        (name[:cut], name[cut:])
        for name in (pieces[index] for index in joined)
        for cut in range(1, len(name))
        if name[:cut] in vocabulary and name[cut:] in vocabulary
    ]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Prepend(" ")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(list(pieces[1:3]))
    backend.post_processor = processors.TemplateProcessing(
        single=[pieces[1], "$A"], pair=[pieces[1], "$A", "$B"], special_tokens=[(pieces[1], 1)]
    )
    return backend


def _library():
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("Texts need the package tokenizers: pip install 'effjax[text]'.") from error
    return tokenizers


def _settle_parallelism() -> None:
    """Threads in this process, none in forked ones, where they would hang; otherwise the library warns."""
    if "TOKENIZERS_PARALLELISM" not in os.environ:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))


def _flat(rows: Sequence[Sequence[int]]) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(rows), np.int32)


def _check_texts(argument: str, texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise TypeError(f"{argument}={texts[:40]!r} is one string; give a list of texts.")
    row = next((row for row, text in enumerate(texts) if not isinstance(text, str)), None)
    if row is not None:
        raise TypeError(f"{argument}[{row}]={texts[row]!r} is {type(texts[row]).__name__}, not a string.")


def _check_lengths(texts: Sequence[str], lengths: np.ndarray, max_length: int) -> None:
    long, empty = lengths > max_length, lengths == 0
    if long.any():
        row = int(long.argmax())
        raise ValueError(
            f"max_length={max_length}: {int(long.sum())} of {len(texts)} texts have more tokens, the first is "
            f"texts[{row}] with {lengths[row]}. Pass truncate=True, or max_length >= {lengths.max()}."
        )
    if empty.any():
        row = int(empty.argmax())
        raise ValueError(
            f"texts[{row}]={texts[row]!r} has no token ({int(empty.sum())} of {len(texts)} texts). Drop empty texts; "
            "this tokenizer puts no special token around them."
        )
