"""Muon for hidden matrices and AdamW for everything else, under one learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels import gradient_norm as kernels
from ..kernels.newton_schulz import newton_schulz
from ..kernels.optimizer import adamw_step
from .moe import Experts
from .parallel.matrices import Assembly
from .parallel.ranks import Ranks, fill, local

STACK_ELEMENTS = 1 << 24
"""Matrices are orthogonalized in stacks of at most this many elements, to bound the memory."""


def orthogonalize(matrices: Tensor, *, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Roughly U V^T of each matrix's singular value decomposition, by Newton-Schulz iteration.

    Singular values above about 1e-3 of the Frobenius norm end near 1 (0.7 .. 1.2), which is all
    that Muon needs (kellerjordan.github.io/posts/muon). A zero matrix stays zero.

    Args:
        matrices: [..., rows, columns]; fastest with rows <= columns.

    Returns:
        The same shape and dtype; operands are bfloat16 on a GPU and float32 on a CPU.
    """
    dtype = torch.bfloat16 if matrices.is_cuda else torch.float32
    return newton_schulz(matrices, steps=steps, eps=eps, dtype=dtype)


def clip_gradients(
    parameters: Iterable[Tensor], limit: float, ranks: Ranks | None = None
) -> Tensor:
    """Scale all gradients so that their joint norm is at most `limit`; returns the norm before.

    With `ranks`, the norm is that of the parts on all of them. Gradients whose norm is not finite
    stay as they are, so that one can tell which is to blame.
    """
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    norm = kernels.gradient_norm(grads)
    if ranks is not None and ranks.world > 1:
        norm = ranks.sum(norm.double().square()).sqrt().to(norm.dtype)
    factor = limit / (float(norm) + kernels.EPSILON)
    if factor < 1 and math.isfinite(float(norm)):
        for grad in grads:
            grad.mul_(factor)
    return norm


@dataclass(frozen=True)
class _Matrices:
    """A parameter that Muon updates: `count` matrices of equal shape, laid one after another.

    `whole`: the matrices that this rank holds, it holds completely.
    """

    parameter: nn.Parameter
    momentum: Tensor
    rows: int
    columns: int
    whole: bool

    def wide(self, x: Tensor) -> Tensor:
        """A view of `x`, shaped like the parameter, as [count, shorter side, longer side]."""
        x = x.view(-1, self.rows, self.columns)
        return x.mT if self.rows > self.columns else x

    @property
    def stack_key(self) -> tuple[int, int, torch.device, bool]:
        short, long = sorted((self.rows, self.columns))
        return short, long, self.parameter.device, self.whole

    def moved(self, momentum: float) -> Tensor:
        """This rank's part of the Nesterov momentum, which takes the gradient in."""
        assert self.parameter.grad is not None
        grad, running = local(self.parameter.grad).contiguous(), local(self.momentum)
        running.lerp_(grad, 1 - momentum)
        return torch.lerp(grad, running, momentum)


@dataclass(frozen=True)
class _Elements:
    """A parameter that AdamW updates, with its running mean, mean square and step count."""

    parameter: nn.Parameter
    mean: Tensor
    square: Tensor
    step: Tensor
    decays: bool


class MuonAdamW:
    """Muon (scaled to AdamW's update size, arXiv 2502.16982) and AdamW over one model.

    Muon takes the two-dimensional weights other than embedding and output head, router included,
    and the experts' stacked weights: `gate_up_proj` [E, 2I, H] is 2E matrices of [I, H]. Its
    update is the orthogonalized Nesterov momentum times 0.2 * sqrt(max(rows, columns)). AdamW
    takes the rest. Weight decay is decoupled and spares one-dimensional weights (norms).

    A parameter whose gradient is None is left alone, its state included.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        ranks: Ranks | None = None,
    ) -> None:
        if weight_decay < 0 or eps <= 0 or not all(0 <= x < 1 for x in (momentum, *betas)):
            raise ValueError(
                f"need weight_decay >= 0, eps > 0 and momentum and betas in [0, 1), got "
                f"{weight_decay}, {eps}, {momentum} and {betas}"
            )
        self.ranks = ranks or Ranks()
        self.weight_decay, self.momentum, self.betas, self.eps = weight_decay, momentum, betas, eps
        self._assemblies: dict[tuple[int, ...], Assembly] = {}
        self._muon: dict[str, _Matrices] = {}
        self._adamw: dict[str, _Elements] = {}
        shapes = _matrix_shapes(model)
        for name, parameter in model.named_parameters():
            if parameter in shapes:
                state = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
                whole = self.ranks.world == 1 or parameter.dim() == 3
                self._muon[name] = _Matrices(parameter, state.detach(), *shapes[parameter], whole)
            else:
                zeros = torch.zeros_like(parameter).detach()
                step = torch.zeros((), dtype=torch.int64)
                self._adamw[name] = _Elements(
                    parameter, zeros, zeros.clone(), step, decays=parameter.dim() > 1
                )

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [x.parameter for x in (*self._muon.values(), *self._adamw.values())]

    @property
    def divided_matrices(self) -> set[nn.Parameter]:
        """Those whose matrices are put together before they are orthogonalized."""
        return {x.parameter for x in self._muon.values() if not x.whole}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient."""
        stacks: dict[tuple[int, int, torch.device, bool], list[_Matrices]] = {}
        for matrices in self._muon.values():
            if matrices.parameter.grad is not None:
                stacks.setdefault(matrices.stack_key, []).append(matrices)
        for same_shape in stacks.values():
            # matrices that lie on several ranks are put together on all of them in turn
            ranks = 1 if same_shape[0].whole else self.ranks.world
            for stack in _bounded(same_shape, STACK_ELEMENTS * ranks):
                if stack[0].whole:
                    self._muon_step(stack, lr)
                else:
                    self._muon_step_apart(stack, lr)
        same_step: dict[tuple[int, bool], list[_Elements]] = {}
        for elements in self._adamw.values():
            if elements.parameter.grad is not None:
                elements.step.add_(1)
                same_step.setdefault((int(elements.step), elements.decays), []).append(elements)
        for (taken, decays), group in same_step.items():
            self._adamw_step(group, taken, lr, self.weight_decay if decays else 0.0)

    def _muon_step(self, stack: list[_Matrices], lr: float) -> None:
        updates = [m.wide(m.moved(self.momentum)) for m in stack]
        counts = [len(update) for update in updates]
        directions = orthogonalize(torch.cat(updates)).split(counts)
        for m, direction in zip(stack, directions, strict=True):
            weight = local(m.parameter)
            weight.mul_(1 - lr * self.weight_decay)
            scale = 0.2 * math.sqrt(max(m.rows, m.columns))
            m.wide(weight).add_(direction, alpha=-lr * scale)

    def _muon_step_apart(self, stack: list[_Matrices], lr: float) -> None:
        """The same where every rank holds a block of each matrix."""
        key = tuple(id(m.parameter) for m in stack)
        if key not in self._assemblies:
            self._assemblies[key] = Assembly([m.parameter for m in stack], self.ranks)
        assembly = self._assemblies[key]
        updates = [m.moved(self.momentum) for m in stack]
        whole = assembly.gather(updates)
        mine = [stack[i] for i in assembly.owned()]
        if mine:
            wide = torch.cat([m.wide(x) for m, x in zip(mine, whole, strict=True)])
            turned = zip(mine, orthogonalize(wide), strict=True)
            whole = [x.mT if m.rows > m.columns else x for m, x in turned]
        for m, block in zip(stack, assembly.scatter(whole, updates[0]), strict=True):
            weight = local(m.parameter)
            weight.mul_(1 - lr * self.weight_decay)
            scale = 0.2 * math.sqrt(max(m.rows, m.columns))
            weight.add_(block.view(weight.shape), alpha=-lr * scale)

    def _adamw_step(
        self, group: list[_Elements], taken: int, lr: float, weight_decay: float
    ) -> None:
        adamw_step(
            [local(p.parameter) for p in group],
            [local(p.parameter.grad) for p in group if p.parameter.grad is not None],
            [local(p.mean) for p in group],
            [local(p.square) for p in group],
            step=taken,
            lr=lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=weight_decay,
        )

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        for name, matrices in self._muon.items():
            yield f"{name}.momentum", matrices.momentum
        for name, elements in self._adamw.items():
            yield f"{name}.mean", elements.mean
            yield f"{name}.square", elements.square
            yield f"{name}.step", elements.step

    def state_dict(self) -> dict[str, Tensor]:
        """All state as a flat dict of tensors, which share memory with this optimizer."""
        return dict(self._state())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a `state_dict`, copying its values.

        Raises:
            ValueError: if names, shapes or dtypes are not those of this optimizer.
        """
        own = self.state_dict()
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())
            raise ValueError(f"optimizer state does not fit the model: {', '.join(odd[:4])}")
        for name, tensor in own.items():
            given = state[name]
            if given.shape != tensor.shape or given.dtype != tensor.dtype:
                raise ValueError(
                    f"optimizer state {name} must be {tensor.dtype} {tuple(tensor.shape)}, got "
                    f"{given.dtype} {tuple(given.shape)}"
                )
        for name, tensor in own.items():
            fill(tensor, state[name])


def _matrix_shapes(model: nn.Module) -> dict[nn.Parameter, tuple[int, int]]:
    """Rows and columns of the matrices in each parameter that belongs to Muon."""
    shapes: dict[nn.Parameter, tuple[int, int]] = {}
    outer: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            _, double, hidden = module.gate_up_proj.shape
            shapes[module.gate_up_proj] = (double // 2, hidden)
            shapes[module.down_proj] = (hidden, double // 2)
            continue
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.Embedding) or name.split(".")[-1] == "lm_head":
            outer.update(own)
        shapes |= {p: (p.shape[0], p.shape[1]) for p in own if p.dim() == 2}
    return {p: shape for p, shape in shapes.items() if p not in outer}


def _bounded(same_shape: list[_Matrices], most: int) -> Iterator[list[_Matrices]]:
    """Consecutive stacks of at most `most` elements, or of a single parameter."""
    stack: list[_Matrices] = []
    elements = 0
    for matrices in same_shape:
        size = matrices.parameter.numel()
        if stack and elements + size > most:
            yield stack
            stack, elements = [], 0
        stack.append(matrices)
        elements += size
    if stack:
        yield stack
