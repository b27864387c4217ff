"""Tokenizers: flat results, pairs, refusals, the encoding of llama2.c, training that repeats."""

import os
import subprocess
import sys

import numpy as np
import pytest

from effjax.data.tokens import Tokenizer, load_tokenizer, train_tokenizer

TEXTS = ["the cat sat on the mat", "a dog saw the cat", "dogs and cats, mats and hats!"] * 5


@pytest.fixture(scope="module")
def words():
    return train_tokenizer(TEXTS, vocab_size=90)


@pytest.fixture(scope="module")
def stories():
    return load_tokenizer("stories260k")


def pieces(tokenizer, tokens):
    return [[tokenizer.token(index) for index in row] for row in tokens.input_ids]


def test_texts_become_rows_with_special_tokens(words):
    tokens = words.encode(["The cat", "", "zebra9"], max_length=16)
    assert pieces(words, tokens) == [["[CLS]", "the", "cat", "[SEP]"], ["[CLS]", "[SEP]"], ["[CLS]", "[UNK]", "[SEP]"]]
    assert tokens.token_type_ids is None
    assert (tokens.input_ids.values.dtype, words.pad_id, words.token(0)) == (np.int32, 0, "[PAD]")
    assert words.special_ids == {0, 1, 2, 3, 4}
    assert words.decode(tokens.input_ids[0]) == "the cat"
    assert len(words.encode([], max_length=8).input_ids) == 0


def test_a_padding_token_by_name_and_a_vocabulary_with_holes(tmp_path, caplog):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(models.WordLevel({"a": 0, "<fill>": 2, "cat": 7}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    found = load_tokenizer(tmp_path)
    assert (found.vocab_size, found.pad_id, found.token(7), found.token(3)) == (8, 0, "cat", "")
    with pytest.raises(ValueError, match=r"index=8 is not an id in \[0, 7\]"):
        found.token(8)
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "<fill>", "lstrip": false}}')
    assert load_tokenizer(tmp_path).pad_id == 2
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "cat"}')
    assert load_tokenizer(tmp_path).pad_id == 7
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "[none]"}')
    assert load_tokenizer(tmp_path).pad_id == 2
    assert "names the padding token '[none]', which the vocabulary has not" in caplog.text


def test_pairs_have_types(words):
    tokens = words.encode(["the cat", "a dog"], ["sat", ""], max_length=16)
    assert pieces(words, tokens)[0] == ["[CLS]", "the", "cat", "[SEP]", "sat", "[SEP]"]
    assert [row.tolist() for row in tokens.token_type_ids] == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]


def test_truncation_keeps_the_special_tokens_and_cuts_the_longer_text(words):
    tokens = words.encode(["the cat sat on the mat"], ["a dog"], max_length=7)
    assert pieces(words, tokens) == [["[CLS]", "the", "cat", "[SEP]", "a", "dog", "[SEP]"]]
    assert len(words.encode(["the cat sat on"], max_length=16).input_ids[0]) == 6  # the setting does not stick
    with pytest.raises(ValueError, match=r"max_length=4: 1 of 2 texts .* the first is texts\[1\] with 6"):
        words.encode(["cat", "the cat sat on"], max_length=4, truncate=False)


def test_many_texts_in_batches(words, monkeypatch):
    whole = words.encode(TEXTS, TEXTS[::-1], max_length=12)
    monkeypatch.setattr("effjax.data.tokens._BATCH", 4)
    parts = words.encode(TEXTS, TEXTS[::-1], max_length=12)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a.values, b.values)
        np.testing.assert_array_equal(a.offsets, b.offsets)


@pytest.mark.parametrize(
    ("texts", "keywords", "message"),
    [
        ("a cat", {}, "is one string"),
        (["a", None], {}, r"texts\[1\]=None is NoneType"),
        (["a"], {"pairs": []}, "pairs holds 0 texts and texts 1"),
        (["a"], {"max_length": 2}, "max_length=2.*Special tokens need room"),
    ],
)
def test_bad_texts_are_refused(words, texts, keywords, message):
    with pytest.raises((ValueError, TypeError), match=message):
        words.encode(texts, **{"max_length": 8, **keywords})
    with pytest.raises(ValueError, match="index=90 is not an id"):
        words.token(90)


def test_an_empty_text_without_special_tokens_is_refused():
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(models.WordLevel({"[UNK]": 0, "cat": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match=r"texts\[1\]='' has no token"):
        Tokenizer(backend).encode(["cat", ""], max_length=4)


def test_stories_pieces_are_joined_by_score(stories):
    tokens = stories.encode(["Once upon a time", "née\n日"], max_length=64).input_ids
    assert [stories.token(index) for index in tokens[0][1:]] == [" Once", " upon", " a", " time"]
    assert tokens[0][0] == tokens[1][0] == 1
    assert (tokens[1][-3:] - 3).tolist() == list("日".encode())
    assert [stories.decode(row) for row in tokens] == ["Once upon a time", "née\n日"]
    assert stories.vocab_size == 512


def test_training_leaves_out_rare_characters_of_a_small_vocabulary():
    tokenizer = train_tokenizer(["".join(map(chr, range(0x4E00, 0x4E40))) + " aaa"] * 2, vocab_size=32)
    assert tokenizer.vocab_size <= 32
    assert "[UNK]" not in pieces(tokenizer, tokenizer.encode(["aaa"], max_length=8))[0]
    for texts, message in (([" "], "no character"), ([], "no character")):
        with pytest.raises(ValueError, match=message):
            train_tokenizer(texts, vocab_size=32)
    with pytest.raises(ValueError, match="vocab_size=8"):
        train_tokenizer(["a"], vocab_size=8)


def test_files_that_are_no_tokenizers(tmp_path):
    for content in ("{", "[]", '{"pieces": 1}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json is damaged or no tokenizer"):
            load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'stories260k'"):
        load_tokenizer("stories260")


def test_training_repeats_and_a_forked_process_neither_hangs_nor_warns(words, tmp_path):
    code = f"""
import os, warnings
warnings.simplefilter("ignore")
from effjax.data.tokens import train_tokenizer
texts = {TEXTS!r}
tokenizer = train_tokenizer(texts, vocab_size=90)
tokenizer.encode(texts, max_length=8)
tokenizer.save({str(tmp_path)!r})
child = os.fork()
if not child:
    os._exit(len(tokenizer.encode(texts, max_length=8).input_ids))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == (f"{len(TEXTS)}\n", "")
    again = load_tokenizer(tmp_path)
    assert [again.token(i) for i in range(again.vocab_size)] == [words.token(i) for i in range(words.vocab_size)]
    ids, expected = (tokenizer.encode(TEXTS, max_length=32).input_ids for tokenizer in (again, words))
    np.testing.assert_array_equal(ids.values, expected.values)
