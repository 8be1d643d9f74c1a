"""What training keeps of a decoder block between forward and backward.

    nothing     no result is computed twice: the fastest, and the most memory
    cheap       products, attention and what experts keep stay; norms, rotations, activations and
                sums are computed again in the backward pass
    blocks      only a block's input stays, and the block is computed again

What counts as cheap is the graph layer's table, `kexaone.graph.recompute`. All three give the same
bits: every kernel does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ..graph.recompute import expensive

POLICIES = ("nothing", "cheap", "blocks")


def recomputed(policy: str, block: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    """`block(*inputs, **named)`, with what is kept for its gradient as the policy says.

    Raises:
        ValueError: an unknown policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"recompute takes one of {', '.join(POLICIES)}, got {policy!r}")
    if policy == "nothing" or not torch.is_grad_enabled():
        return block(*inputs, **named)
    options: dict[str, Any] = {}
    if policy == "cheap":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _decide)
    # nothing in a block draws random numbers
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, **options,
                      **named)  # fmt: skip


def _decide(context: Any, op: Any, *inputs: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if expensive(op) else CheckpointPolicy.PREFER_RECOMPUTE
