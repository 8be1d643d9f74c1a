"""Names of tensors in checkpoint files, and which part of which parameter each one is.

Parameters have transformers' in-memory names. Files hold routed experts one by one (the released
layout) or fused as in memory, and the router's selection bias under `.mlp.` or `.mlp.gate.`.

Shape letters: E experts, I expert width, H hidden.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass

from .fp8 import BLOCK

GATE_UP, DOWN = ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"
BIAS_IN_MEMORY, BIAS_ON_DISK = ".mlp.gate.e_score_correction_bias", ".mlp.e_score_correction_bias"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SCALE_SUFFIXES = ("_scale", "_scale_inv")


@dataclass(frozen=True)
class Piece:
    """A tensor `name` of `shape` in a file; it is `parameter[expert, rows]`.

    Without `expert` it is the whole parameter, without `rows` all of an expert's matrix.
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    rows: tuple[int, int] | None = None

    @property
    def index(self) -> tuple[int | slice, ...]:
        """The index into the parameter."""
        if self.expert is None:
            return ()
        return (self.expert,) if self.rows is None else (self.expert, slice(*self.rows))

    @property
    def scale_index(self) -> tuple[int | slice, ...]:
        """The index into the parameter's scales; `rows` must start and end on a block."""
        if self.expert is None:
            return ()
        if self.rows is None:
            return (self.expert,)
        return (self.expert, slice(self.rows[0] // BLOCK, self.rows[1] // BLOCK))


def released(parameter: str, shape: tuple[int, ...]) -> list[Piece]:
    """How the released layout stores a parameter: experts one by one, the bias under `.mlp.`."""
    if parameter.endswith(BIAS_IN_MEMORY):
        return [Piece(parameter.removesuffix(BIAS_IN_MEMORY) + BIAS_ON_DISK, shape)]
    if parameter.endswith(GATE_UP):
        prefix = parameter.removesuffix("gate_up_proj")
        experts, width, hidden = shape[0], shape[1] // 2, shape[2]
        return [
            Piece(
                f"{prefix}{e}.{half}_proj.weight",
                (width, hidden),
                expert=e,
                rows=(i * width, (i + 1) * width),
            )
            for e in range(experts)
            for i, half in enumerate(("gate", "up"))
        ]
    if parameter.endswith(DOWN):
        prefix = parameter.removesuffix("down_proj")
        return [
            Piece(f"{prefix}{e}.down_proj.weight", shape[1:], expert=e) for e in range(shape[0])
        ]
    return [Piece(parameter, shape)]


def pieces(parameter: str, shape: tuple[int, ...], present: Container[str]) -> list[Piece]:
    """How a checkpoint with the tensors `present` stores a parameter.

    A name that is in memory and in `present` wins, which covers the fused layout; otherwise the
    released layout is meant, whether or not its tensors are there.
    """
    return [Piece(parameter, shape)] if parameter in present else released(parameter, shape)


def scale_name(name: str, present: Container[str]) -> str | None:
    """The name of the scales of a float8 tensor, None if `present` has none."""
    return next((name + s for s in SCALE_SUFFIXES if name + s in present), None)


def is_ignorable(name: str) -> bool:
    """Whether a tensor may be in a checkpoint without being a parameter."""
    return name.endswith("rotary_emb.inv_freq")


def has_mtp(names: Iterable[str]) -> bool:
    """Whether any tensor belongs to the multi-token-prediction block."""
    return any(name.startswith("mtp.") for name in names)
