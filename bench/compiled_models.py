"""transformers' ExaoneMoe: eager, torch.compile with Inductor, and `kexaone.optimize`.

    python -m kexaone.bench.compiled_models [--preset mid] [--rounds 5] [--threads 2] [--json PATH]
                                            [prefill] [decode] [training]

One model, bfloat16, random weights; the sides run alternately in one process and share it. Figures
are medians. `difference` is the norm of the difference to eager relative to eager's: in bfloat16 a
token whose experts are almost tied may be routed otherwise. What is compiled is kept in PyTorch's
caches, so a second run starts soon.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import write_json
from ..graph.backend import optimize
from ..model.config import PRESETS, Config

PROMPT = 512
STEPS = 8
BATCH = 2

Run = Callable[[Callable[..., Any]], Tensor]
"""A workload: what it gets is the model, compiled or not; it returns what sides are compared by."""


@dataclass(frozen=True)
class Row:
    """Median milliseconds of one side of a workload; `ratio` is eager's time over it."""

    workload: str
    side: str
    milliseconds: float
    ratio: float
    difference: float
    first_seconds: float


def build(preset: str) -> Any:
    """transformers' model with the dimensions of a preset."""
    import transformers

    described = Config.preset(preset).to_hf()
    config = transformers.CONFIG_MAPPING[described["model_type"]](**described)
    torch.manual_seed(0)
    with torch.random.fork_rng():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def workloads(model: Any) -> dict[str, tuple[Callable[..., Any], Run]]:
    """What is compiled, and what is run with it."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size
    prompt = torch.randint(1, vocabulary, (1, PROMPT), generator=generator)
    batch = torch.randint(1, vocabulary, (BATCH, PROMPT), generator=generator)

    def prefill(forward: Callable[..., Any]) -> Tensor:
        with torch.no_grad():
            return forward(prompt, use_cache=False, logits_to_keep=1).logits

    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values

    def decode(forward: Callable[..., Any]) -> Tensor:
        held, logits = copy.deepcopy(cache), []
        with torch.no_grad():
            for step in range(STEPS):
                out = forward(prompt[:, step : step + 1], past_key_values=held, logits_to_keep=1)
                logits.append(out.logits)
        return torch.cat(logits)

    def loss(ids: Tensor) -> Tensor:
        return model(ids, labels=ids, use_cache=False).loss

    def training(step: Callable[..., Any]) -> Tensor:
        model.zero_grad(set_to_none=True)
        found = step(batch)
        found.backward()
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        return torch.stack([found.detach().float(), *(n.float() for n in norms)])

    return {"prefill": (model, prefill), "decode": (model, decode), "training": (loss, training)}


def measure(name: str, model: nn.Module, rounds: int) -> list[Row]:
    """All sides of one workload."""
    function, run = workloads(model)[name]
    dynamic = True if name == "decode" else None
    torch._dynamo.reset()
    sides = {
        "eager": function,
        "inductor": torch.compile(function, dynamic=dynamic),
        "kexaone": optimize(function, dynamic=dynamic),
    }
    results, first = {}, {}
    for side, forward in sides.items():
        begin = time.perf_counter()
        results[side] = run(forward).double()
        first[side] = time.perf_counter() - begin
        run(forward)
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, forward in sides.items():
            begin = time.perf_counter()
            run(forward)
            times[side].append((time.perf_counter() - begin) * 1e3)
    base = statistics.median(times["eager"])
    size = results["eager"].norm()
    return [
        Row(name, side, middle := statistics.median(times[side]), base / middle,
            float((results[side] - results["eager"]).norm() / size), first[side])
        for side in sides
    ]  # fmt: skip


def main() -> None:
    names = ("prefill", "decode", "training")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="workload", help=", ".join(names))
    parser.add_argument("--preset", choices=sorted(PRESETS), default="mid")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    unknown = set(options.names) - set(names)
    if unknown:
        parser.error(f"unknown workloads: {', '.join(sorted(unknown))}")
    torch.set_num_threads(options.threads)
    model, rows = build(options.preset), []
    print(f"torch {torch.__version__}, {options.threads} threads, {options.preset}")
    for name in options.names or names:
        for row in measure(name, model, options.rounds):
            rows.append(row)
            print(f"{row.workload:9} {row.side:9} {row.milliseconds:10.1f} ms  {row.ratio:5.2f} x "
                  f"eager  difference {row.difference:.2g}  first call {row.first_seconds:.1f} s",
                  flush=True)  # fmt: skip
    write_json(options.json, [asdict(row) for row in rows])


if __name__ == "__main__":
    main()
