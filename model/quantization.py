"""A model's weights in block-scaled float8: half the memory, and half the reading per token.

The linear layers and experts of the decoder's blocks are quantized. Router, norms, embedding,
output head and MTP block keep their dtype, as in the released FP8 checkpoint.
"""

from __future__ import annotations

import torch
from torch import nn

from .fp8 import Fp8Linear, quantize
from .moe import Experts
from .transformer import KExaone


@torch.no_grad()
def quantize_weights(model: KExaone) -> None:
    """Replace the weights of the decoder's blocks, one after another, by float8 ones.

    What is float8 already stays. The new weights take no gradients.
    """
    for layer in model.model.layers:
        for module in list(layer.modules()):
            if isinstance(module, Experts):
                _quantize_experts(module)
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    found = quantize(child.weight)
                    setattr(module, name, Fp8Linear(found.values, found.scale))


def _quantize_experts(experts: Experts) -> None:
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name)
        if weight.itemsize > 1:
            # one expert at a time: the float32 copy of all would be twice the layer
            parts = [quantize(expert) for expert in weight]
            values = torch.stack([part.values for part in parts])
            setattr(experts, name, nn.Parameter(values, requires_grad=False))
            setattr(experts, f"{name}_scale", torch.stack([part.scale for part in parts]))
