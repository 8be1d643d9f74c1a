"""Tokenizers: the one beside a checkpoint, and the byte tokenizer of the mini preset."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from .config import Config

FILE = "tokenizer.json"
SPECIAL = ("<bos>", "<eos>", "<pad>")


class TokenizerError(ValueError):
    """A tokenizer that cannot be read or does not fit its model."""


def byte_tokenizer() -> Tokenizer:
    """Byte b is token b; 256, 257, 258 are begin, end and padding.

    Written as a byte-level BPE without merges, so that other libraries load it too. Byte-level
    BPE names bytes by printable characters: a printable byte by itself, the others by the
    characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    vocabulary = {chr(b if b in printable else next(others)): b for b in range(256)}
    vocabulary |= {name: 256 + i for i, name in enumerate(SPECIAL)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def load_tokenizer(folder: Path, config: Config) -> Tokenizer:
    """The `tokenizer.json` of a checkpoint folder.

    Raises TokenizerError if it is missing, unreadable, or knows tokens outside the model's
    vocabulary.
    """
    path = folder / FILE
    if not path.is_file():
        raise TokenizerError(f"no {FILE} in {folder}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(f"cannot read {path}: {error}") from None
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= config.vocab_size:
        raise TokenizerError(
            f"{path} has token id {largest}, the model's vocabulary only {config.vocab_size}"
        )
    return tokenizer
