"""`kexaone.tune`: a user's own `@triton.jit` kernel, tuned once and for all processes.

Where `@triton.autotune` measures again in every process, the choice is kept in the tuning tables,
by the kernel's source and the rounded values of its key; a problem near a tuned one takes its
configuration without measuring. Candidates run on copies of the tensors, so kernels that write in
place need no care, and one whose results differ from the first candidate's is never chosen.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import tables
from ..kernels.arch import Arch, arch_of
from ..kernels.lang import triton
from ..kernels.launch import on
from ..kernels.sources import name_of, source_hash
from ..kernels.table_files import Entry, machine_of, plain, user_file
from ..kernels.tables import Decision, triton_release
from .compete import Clock, clock_of, compete
from .store import locked, save

Values = dict[str, Any]
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
_CLOSE = 64.0
"""Units of rounding that two orders of adding up may differ by, relative to the whole tensor."""


def tune(
    kernel: Any = None,
    *,
    configs: Sequence[Mapping[str, Any]],
    key: Sequence[str] = (),
    seconds: float = 2.0,
    clock: Clock | None = None,
) -> Any:
    """A `@triton.jit` kernel that is launched with the best of `configs`; also a decorator.

    The first launch for a new problem measures; every later one, in this process or another, looks
    the choice up. While a CUDA graph is captured nothing is measured.

    Args:
        kernel: the kernel; without it, a decorator is returned.
        configs: candidates, constexpr arguments and options (`num_warps`, `num_stages`) by name;
            the first is the default.
        key: names of the arguments that the choice depends on: integers, rounded up to a power of
            two, or tensors, by their dtype.
        seconds: the most time that a new problem may take, compilation not counted.
        clock: times one call; None: the host's clock, or events on a GPU.

    Raises:
        ValueError: `configs` is empty, or names what the kernel does not have.
    """
    if kernel is None:
        return lambda fn: tune(fn, configs=configs, key=key, seconds=seconds, clock=clock)
    return TunedKernel(kernel, configs, key, seconds, clock)


class TunedKernel:
    """A kernel with its candidates; `kernel[grid](...)` launches it, `why(...)` explains."""

    def __init__(
        self, kernel: Any, configs: Sequence[Mapping[str, Any]], key: Sequence[str],
        seconds: float, clock: Clock | None,
    ) -> None:  # fmt: skip
        if not configs:
            raise ValueError("configs must hold at least one candidate")
        names = set(inspect.signature(kernel.fn).parameters)
        for config in configs:
            if set(config) != set(configs[0]):
                raise ValueError("all configs must name the same arguments")
            if strange := set(config) - names - set(_OPTIONS):
                raise ValueError(f"{kernel.__name__} has no argument {min(strange)!r}")
        if strange := set(key) - names:
            raise ValueError(f"key names {min(strange)!r}, which {kernel.__name__} has not")
        self.kernel, self.key, self.seconds, self.clock = kernel, tuple(key), seconds, clock
        self.candidates = [dict(config) for config in configs]
        self._op = f"user {name_of(kernel)}"

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **named: Any) -> Any:
            config = self._config(grid, args, named)
            return self.kernel[grid](*args, **named, **config)

        return launch

    def why(self, *args: Any, **named: Any) -> str:
        """The configuration for these arguments and the reason, as text."""
        found = self._decision(args, named)
        values = ", ".join(f"{n}={v}" for n, v in plain(found.config).items())
        return f"{values} ({found.reason})"

    def _configs(self, problem: Any, arch: Arch) -> list[Values]:
        return self.candidates

    def _decision(self, args: tuple[Any, ...], named: Values) -> Decision:
        given = inspect.signature(self.kernel.fn).bind_partial(*args, **named).arguments
        tensor = next((v for v in given.values() if isinstance(v, Tensor)), None)
        device = tensor.device if tensor is not None else torch.device("cpu")
        problem = tuple(_rounded(given.get(name)) for name in self.key)
        arch = arch_of(device)
        source_hash(self.kernel)
        return tables.decide(self._op, self._configs, problem, "", arch, machine_of(arch, device))

    def _config(self, grid: Any, args: tuple[Any, ...], named: Values) -> Values:
        found = self._decision(args, named)
        if found.entry is not None or len(self.candidates) < 2 or _capturing():
            return found.config
        try:
            with locked(user_file(found.arch.name), seconds=3600, suffix=".tuning.lock"):
                # another process may have measured while this one waited
                tables.reload()
                again = self._decision(args, named)
                return again.config if again.entry is not None else self._measured(
                    again, grid, args, named
                )  # fmt: skip
        except OSError:
            return self._measured(found, grid, args, named)

    def _measured(self, found: Decision, grid: Any, args: tuple[Any, ...], named: Values) -> Values:
        given = inspect.signature(self.kernel.fn).bind_partial(*args, **named).arguments
        at = next((v for v in given.values() if isinstance(v, Tensor)), torch.empty(0))
        expected: list[Tensor] = []
        runs, kept = [], []
        for config in self.candidates:
            copies = {n: v.clone() if isinstance(v, Tensor) else v for n, v in given.items()}

            def run(copies: Values = copies, config: Values = config) -> None:
                with on(at):
                    self.kernel[grid](**copies, **config)

            run()
            results = [v.clone() for v in copies.values() if isinstance(v, Tensor)]
            expected = expected or results
            if all(map(_agree, results, expected)):
                runs.append(run)
                kept.append(config)
        clock = self.clock or clock_of(at.device)
        verdict = compete(runs, seconds=self.seconds, clock=clock)
        figures = {
            "chosen_us": round(verdict.medians[verdict.winner] * 1e6, 2),
            "default_us": round(verdict.medians[0] * 1e6, 2),
        }
        release = triton_release()
        entry = Entry(
            self._op, found.arch.name, found.machine, "", plain(found.problem),
            {name_of(self.kernel): source_hash(self.kernel)}, (release, release),
            kept[verdict.winner], "measured", figures,
        )  # fmt: skip
        if problem := save(found.arch.name, [entry]):
            warnings.warn(f"{problem}; the choice holds in this process only", stacklevel=4)
        return kept[verdict.winner]


def _rounded(value: Any) -> Any:
    """What a choice depends on: a size up to a power of two, a tensor's dtype, else the value."""
    if isinstance(value, Tensor):
        return str(value.dtype)[6:]
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return triton.next_power_of_2(value)
    return value


def _agree(found: Tensor, expected: Tensor) -> bool:
    if not found.is_floating_point():
        return torch.equal(found, expected)
    a, b = found.double(), expected.double()
    if not torch.equal(a.isnan(), b.isnan()):
        return False
    a, b = a.nan_to_num(), b.nan_to_num()
    return float((a - b).norm()) <= _CLOSE * torch.finfo(found.dtype).eps * float(b.norm())


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
