"""torch.compile emits Triton for CPUs and this backend runs it, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import config
from torch._inductor.utils import run_and_get_code


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(F.gelu(self.up(x)))).softmax(-1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm = nn.Linear(64, 192), nn.RMSNorm(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).view(2, 20, 3, 4, 16).permute(2, 0, 3, 1, 4)
        future = torch.ones(20, 20).triu(1).bool()
        scores = (q @ k.transpose(-1, -2) / 4).masked_fill(future, -1e9)
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 20, 64) + x


@pytest.fixture(autouse=True)
def triton_code(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with config.patch(cpu_backend="triton", compile_threads=1):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


@pytest.mark.parametrize(
    ("module", "shape"), [(Mlp, (32, 64)), (Attention, (2, 20, 64))], ids=["mlp", "attention"]
)
def test_forward_and_backward(module, shape):
    torch.manual_seed(0)
    model = module()
    x = torch.randn(shape, requires_grad=True)
    y, code = run_and_get_code(torch.compile(model), x)
    assert "@triton.jit" in "".join(code)
    grad = torch.randn_like(y)
    y.backward(grad)
    got = [x.grad, *(p.grad for p in model.parameters())]
    x.grad = None
    model.zero_grad()
    want_y = model(x)
    want_y.backward(grad)
    torch.testing.assert_close(y, want_y, rtol=1e-5, atol=1e-5)
    for a, b in zip(got, [x.grad, *(p.grad for p in model.parameters())], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_integer_and_selection_ops():
    def operations(x: torch.Tensor) -> list[torch.Tensor]:
        return [x.argmax(-1), x.sort(-1)[0], x.int() // 3, x.cumsum(-1), x.to(torch.float8_e4m3fn)]

    x = torch.randint(-40, 40, (16, 100), generator=torch.Generator().manual_seed(0)).float()
    for got, want in zip(torch.compile(operations)(x), operations(x), strict=True):
        assert torch.equal(got.float(), want.float())
