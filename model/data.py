"""Training text: where it comes from, as one tensor of tokens, and in shuffled windows."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
}


class DataError(ValueError):
    """Training data that is missing, empty, too short or not what a checkpoint was trained on."""


class Split(NamedTuple):
    """Documents to train on and documents held out."""

    train: list[bytes]
    validation: list[bytes]


def stdlib_source(*, validation_share: float = 0.05) -> Split:
    """Python's own standard library as text: every .py file outside tests and site-packages.

    A file is held out by a hash of its path, so the split does not depend on the order or number
    of files. Documents are sorted by path.

    Raises:
        DataError: if this interpreter comes without the library's source.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    split = Split([], [])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts[:-1]) and (text := path.read_bytes()):
            digest = hashlib.sha256(relative.as_posix().encode()).digest()
            held_out = int.from_bytes(digest[:4], "big") < validation_share * 2**32
            (split.validation if held_out else split.train).append(text)
    if not split.train or not split.validation:
        raise DataError(f"found too little Python source under {root}")
    return split


def read_corpus(paths: Iterable[str | os.PathLike[str]]) -> list[bytes]:
    """The contents of each file.

    Raises:
        DataError: if there are no paths, or one is not a readable file or is empty.
    """
    documents = []
    for path in paths:
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read training data {path}: {error.strerror}") from error
        if not text:
            raise DataError(f"training data {path} is empty")
        documents.append(text)
    if not documents:
        raise DataError("no training data given")
    return documents


def encode_bytes(text: bytes) -> Tensor:
    """Bytes as tokens 0..255, int32 [len(text)]."""
    if not text:
        return torch.empty(0, dtype=torch.int32)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int32)


def tokenize(
    documents: Sequence[bytes], *, eos: int, encode: Callable[[bytes], Tensor] = encode_bytes
) -> Tensor:
    """All documents as one int32 [N] of tokens, `eos` between them.

    Raises:
        DataError: if there is no text.
    """
    if not any(documents):
        raise DataError("no training data given")
    separator = torch.tensor([eos], dtype=torch.int32)
    parts = [part for text in documents for part in (separator, encode(text).to(torch.int32))]
    return torch.cat(parts[1:])


class Windows:
    """Tokens cut into consecutive windows, dealt in an order shuffled anew for each epoch.

    `batch` depends on its arguments only, so a run resumes at any position by its index. Up to
    length - 1 tokens at the end of the data are never used.

    Args:
        tokens: integers [N].
        length: tokens per window, T.
        seed: of the shuffling.

    Raises:
        DataError: if there are not enough tokens for one window.
    """

    def __init__(self, tokens: Tensor, length: int, *, seed: int = 0) -> None:
        if tokens.dim() != 1 or tokens.is_floating_point():
            raise DataError(f"tokens must be integers [N], got {tokens.dtype} {tokens.shape}")
        if length < 2:
            raise DataError(f"a window needs at least 2 tokens, got {length}")
        if len(tokens) < length:
            raise DataError(f"{len(tokens)} tokens are too short for a window of {length}")
        self.tokens = tokens
        self.length = length
        self.seed = seed
        self._shuffled: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        """Number of windows, and of windows per epoch."""
        return len(self.tokens) // self.length

    def batch(self, index: int, batch_size: int) -> Tensor:
        """Windows index * batch_size and on of the endless sequence of epochs, int64 [B, T]."""
        if index < 0 or batch_size < 1:
            raise ValueError(f"need index >= 0 and batch_size >= 1, got {index}, {batch_size}")
        first = index * batch_size
        chosen = []
        while len(chosen) < batch_size:
            epoch, start = divmod(first + len(chosen), len(self))
            wanted = batch_size - len(chosen)
            chosen += self._order(epoch)[start : start + wanted].tolist()
        windows = self.tokens[: len(self) * self.length].view(-1, self.length)
        return windows[torch.tensor(chosen)].to(torch.int64)

    def _order(self, epoch: int) -> Tensor:
        if self._shuffled is None or self._shuffled[0] != epoch:
            digest = hashlib.sha256(f"{self.seed}/{epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            self._shuffled = (epoch, torch.randperm(len(self), generator=generator))
        return self._shuffled[1]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the batches: tokens, window length and seed."""
        digest = hashlib.sha256(f"{self.length}/{self.seed}/".encode())
        for part in self.tokens.split(1 << 22):
            digest.update(part.to("cpu", torch.int64).numpy().tobytes())
        return digest.hexdigest()


def bigram_entropy(
    train_tokens: Tensor, validation_tokens: Tensor, *, vocab_size: int | None = None
) -> float:
    """Nats per token of held-out text under a bigram model with add-one smoothing.

    A bar that a trained language model has to pass. p(b | a) = (count(a, b) + 1) / (count(a) + V),
    with V the `vocab_size`, or one more than the largest token if that is not given.

    Raises:
        DataError: if either text has fewer than two tokens.
    """
    if min(len(train_tokens), len(validation_tokens)) < 2:
        raise DataError("a bigram needs at least two tokens of training and of validation text")
    train, held_out = train_tokens.long(), validation_tokens.long()
    size = vocab_size or int(max(train.max(), held_out.max())) + 1
    pairs, counts = (train[:-1] * size + train[1:]).unique(return_counts=True)
    wanted = held_out[:-1] * size + held_out[1:]
    # pairs, not a V x V table, which a large vocabulary would not fit
    found = torch.searchsorted(pairs, wanted).clamp(max=len(pairs) - 1)
    together = torch.where(pairs[found] == wanted, counts[found], 0).double()
    alone = train[:-1].bincount(minlength=size)[held_out[:-1]].double()
    return float(((alone + size).log() - (together + 1).log()).mean())
