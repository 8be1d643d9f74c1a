"""Tokenizers: bytes there and back, the same file in another library, unusable files."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from kexaone import Config
from kexaone.model.tokenizer import SPECIAL, TokenizerError, byte_tokenizer, load_tokenizer

MINI = Config.preset("mini")
BYTES = byte_tokenizer()
ODD_TEXTS = (
    "",
    " ",
    "\n\n \t\r\n",
    "  two  spaces  ",
    "\x00\x01\x7f\x80\xad\xa0\xff",
    "다음 토큰",
    "e\u0301 \u00e9 \ufb01 \u212b",  # forms that a normalizer would merge
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "\u200f\u202e\ufeff\ufffe\uffff\U0010ffff",
    "Ġ Ċ ĠĊ <0x0A>",  # names that byte-level vocabularies use
    "don't I'll 1234567890",
)


@given(st.text())
def test_tokens_are_the_bytes_of_any_text(text):
    assume(not any(name in text for name in SPECIAL))
    ids = BYTES.encode(text).ids
    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_tokens_are_the_bytes_of_odd_texts(text):
    ids = BYTES.encode(text).ids
    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


@given(st.binary())
def test_any_bytes_decode_as_python_decodes_them(data):
    assert BYTES.decode(list(data)) == data.decode(errors="replace")


def test_special_tokens_have_their_own_ids_and_fit_the_mini_preset():
    assert [BYTES.token_to_id(name) for name in SPECIAL] == [256, 257, 258]
    assert MINI.bos_token_id == 256 and MINI.eos_token_ids == (257,) and MINI.pad_token_id == 258
    assert sorted(BYTES.get_vocab(with_added_tokens=True).values()) == list(range(259))
    assert BYTES.encode("a<eos>b").ids == [97, 257, 98]
    assert BYTES.decode([256, 97, 257]) == "a"
    assert BYTES.decode([256, 97, 257], skip_special_tokens=False) == "<bos>a<eos>"


@given(st.text())
def test_a_saved_tokenizer_is_the_same(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp() / "bytes"
    if not folder.exists():
        folder.mkdir()
        BYTES.save(str(folder / "tokenizer.json"))
    ours = load_tokenizer(folder, MINI)
    assert ours.encode(text).ids == BYTES.encode(text).ids


def test_transformers_loads_the_same_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    BYTES.save(str(path))
    other = PreTrainedTokenizerFast(tokenizer_file=str(path))
    for text in (*ODD_TEXTS, "a<eos>b"):
        assert other.encode(text, add_special_tokens=False) == BYTES.encode(text).ids
        assert other.decode(list(text.encode()), clean_up_tokenization_spaces=False) == text


def test_another_vocabulary_loads(tmp_path):
    words = Tokenizer(models.WordLevel({"one": 0, "two": 7, "?": 3}, unk_token="?"))
    words.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path, MINI).encode("two").ids == [7]
    exact = dataclasses.replace(
        MINI, vocab_size=8, bos_token_id=None, eos_token_ids=(), pad_token_id=None
    )
    assert load_tokenizer(tmp_path, exact).encode("one").ids == [0]
    with pytest.raises(TokenizerError, match="token id 7, the model's vocabulary only 7"):
        load_tokenizer(tmp_path, dataclasses.replace(exact, vocab_size=7))


def test_added_tokens_count_too(tmp_path):
    large = byte_tokenizer()
    large.add_special_tokens([f"<more {i}>" for i in range(30)])
    large.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="token id 288, the model's vocabulary only 288"):
        load_tokenizer(tmp_path, MINI)


def test_a_missing_file_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(TokenizerError, match=r"no tokenizer\.json in"):
            load_tokenizer(folder, MINI)
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json in"):
        load_tokenizer(tmp_path, MINI)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe\x00", json.dumps({"model": {"type": "Other"}}).encode()],
)
def test_unreadable_files_are_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match="cannot read") as caught:
        load_tokenizer(tmp_path, MINI)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)
