"""Training with block-scaled float8 products, by rule; weights and optimizer stay as they are.

The rule is `kexaone.graph.fp8.in_fp8`: every linear layer and all experts of the decoder blocks,
not router, embeddings, output head, norms and multi-token prediction.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..graph.fp8 import in_fp8
from ..graph.linear_fp8 import linear_fp8_training
from .moe import Experts


class Fp8TrainingLinear(nn.Linear):
    """A linear layer on the parameters of another, whose products are float8 in training.

    Without gradients it is the plain layer, which is what the trained weights are for.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, "meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(input)
        y = linear_fp8_training(input, self.weight.to(input.dtype))
        return y if self.bias is None else y + self.bias


def train_in_fp8(model: nn.Module) -> tuple[str, ...]:
    """Let the layers that the rule names train in float8, in place; their paths.

    Parameters stay the same objects under the same names: optimizers and checkpoints do not notice.
    Layers of other classes than `nn.Linear` and our `Experts` stay; what `kexaone.optimize(model,
    fp8=True)` rewrites is decided by operators instead.
    """
    changed = []
    for path, module in list(model.named_modules()):
        if not in_fp8(path):
            continue
        if type(module) is nn.Linear:
            model.set_submodule(path, Fp8TrainingLinear(module))
        elif isinstance(module, Experts):
            module.training_fp8 = True
        else:
            continue
        changed.append(path)
    return tuple(changed)
