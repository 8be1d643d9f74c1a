"""Generation side by side: ours, transformers and, where it is installed, llama.cpp.

    python -m kexaone.bench.generation [decode] [prefill] [drafts] [--preset mid] [--threads 2]
        [--lengths 512 8192] [--rounds 5] [--compiled] [--gguf FILE] [--model FOLDER] [--json PATH]

All sides of a table run in turn within every round; figures are medians, ratios those within a
round. transformers' model shares the memory of our weights, so they are identical. `drafts` needs a
trained model (`--model`): what drafts are worth depends on how often they stand.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import write_json
from ..model.allocator import keep_freed_memory
from ..model.config import PRESETS, Config
from ..model.generation import MAX_DRAFTS, Generator
from ..model.quantization import quantize_weights
from ..model.transformer import KExaone

NEW, BATCH, PROMPT = 33, 8, 32
# one run of a side: tokens per second, and what it wrote
Side = Callable[[], tuple[float, Any]]


@dataclass(frozen=True)
class Line:
    """Median tokens per second of one side, and of its ratios to the first side."""

    table: str
    side: str
    tokens_per_second: float
    ratio: float


def build(preset: str) -> KExaone:
    torch.manual_seed(0)
    return KExaone(Config.preset(preset)).to(torch.bfloat16).eval()


def transformers_twin(model: KExaone) -> Any:
    """transformers' model on the same weights, or None where transformers is missing."""
    if importlib.util.find_spec("transformers") is None:
        print("transformers: skipped, it is not installed")
        return None
    from transformers import ExaoneMoeConfig, ExaoneMoeForCausalLM

    with torch.device("meta"):
        twin = ExaoneMoeForCausalLM(ExaoneMoeConfig(**model.config.to_hf()))
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("mtp.")}
    twin.load_state_dict(own, strict=False, assign=True)
    # rotary tables are no weights: made on a device that has memory
    twin.model.rotary_emb = type(twin.model.rotary_emb)(twin.config)
    return twin.eval()


def compare(table: str, sides: dict[str, Side], rounds: int) -> list[Line]:
    """All sides in every round, in an order drawn anew; the first round is not counted."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    order, draw = list(sides), random.Random(0)
    for turn in range(rounds + 1):
        draw.shuffle(order)
        for name in order:
            speed = sides[name]()[0]
            if turn:
                speeds[name].append(speed)
    base = next(iter(speeds.values()))
    lines = []
    for name, found in speeds.items():
        ratio = statistics.median(x / b for x, b in zip(found, base, strict=True))
        lines.append(Line(table, name, statistics.median(found), ratio))
        print(f"{table:14} {name:28} {lines[-1].tokens_per_second:9.1f} tokens/s {ratio:6.2f} x",
              flush=True)  # fmt: skip
    return lines


def ours(model: KExaone, batch: int) -> Side:
    draw = random.Random(0)
    lengths = [PROMPT] if batch == 1 else [draw.randint(8, 2 * PROMPT) for _ in range(batch)]
    prompts = [[draw.randrange(model.config.vocab_size) for _ in range(n)] for n in lengths]
    generator = Generator(model, batch=batch, context=max(lengths) + NEW)

    def run() -> tuple[float, Any]:
        found = generator(prompts, max_new_tokens=NEW, stop_ids=())
        return found.statistics.tokens_per_second, found.token_ids

    return run


def theirs(twin: Any, *, compiled: bool) -> Side:
    """Decoding of transformers: the time of `NEW` tokens less that of one."""
    draw = random.Random(0)
    ids = torch.tensor([[draw.randrange(twin.config.vocab_size) for _ in range(PROMPT)]])
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if compiled:
        options["cache_implementation"] = "static"

    def once(count: int) -> tuple[float, Any]:
        begin = time.perf_counter()
        with torch.inference_mode():
            out = twin.generate(ids, max_new_tokens=count, **options)
        return time.perf_counter() - begin, out

    def run() -> tuple[float, Any]:
        short, (long, out) = once(1)[0], once(NEW)
        return (NEW - 1) / (long - short), out[:, PROMPT:].tolist()

    return run


def llama(file: Path, threads: int, length: int) -> Side:
    """llama.cpp: decoding after a prompt, or the prompt itself where it is long."""
    from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

    peer = Llama(str(file), n_ctx=max(length, PROMPT + NEW) + 1, n_threads=threads,
                 n_threads_batch=threads, verbose=False)  # fmt: skip
    ids = [3 + i * 7919 % 1000 for i in range(length)]

    def run() -> tuple[float, Any]:
        peer.reset()
        begin = time.perf_counter()
        peer.eval(ids)
        if length > PROMPT:
            return length / (time.perf_counter() - begin), None
        begin = time.perf_counter()
        for token in range(NEW - 1):
            peer.eval([3 + token])
        return (NEW - 1) / (time.perf_counter() - begin), None

    return run


def _llama_sides(options: argparse.Namespace, length: int) -> dict[str, Side]:
    if options.gguf is None or importlib.util.find_spec("llama_cpp") is None:
        missing = "--gguf is not given" if options.gguf is None else "it is not installed"
        print(f"llama.cpp: skipped, {missing}")
        return {}
    return {"llama.cpp": llama(options.gguf, options.threads, length)}


def decode(model: KExaone, options: argparse.Namespace) -> list[Line]:
    narrow = copy.deepcopy(model)
    quantize_weights(narrow)
    sides: dict[str, Side] = {"ours": ours(model, 1)}
    twin = transformers_twin(model)
    if twin is not None:
        sides["transformers eager"] = theirs(twin, compiled=False)
        if options.compiled:
            sides["transformers compiled"] = theirs(twin, compiled=True)
        same = sides["ours"]()[1] == sides["transformers eager"]()[1]
        print(f"texts of ours and transformers: {'identical' if same else 'different'}")
    sides |= _llama_sides(options, PROMPT)
    sides |= {"ours, float8": ours(narrow, 1), f"ours, batch {BATCH}": ours(model, BATCH),
              f"ours, float8, batch {BATCH}": ours(narrow, BATCH)}  # fmt: skip
    return compare("decode", sides, options.rounds)


def prefill(model: KExaone, options: argparse.Namespace) -> list[Line]:
    twin, lines = transformers_twin(model), []
    for length in options.lengths:
        ids = [3 + i * 7919 % 1000 % (model.config.vocab_size - 3) for i in range(length)]
        generator = Generator(model, batch=1, context=length + 1)

        def own(generator: Generator = generator, ids: list[int] = ids) -> tuple[float, Any]:
            found = generator([ids], max_new_tokens=1)
            return len(ids) / found.statistics.prefill_seconds, found.token_ids

        def other(twin: Any = twin, ids: list[int] = ids) -> tuple[float, Any]:
            begin = time.perf_counter()
            with torch.inference_mode():
                twin(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
            return len(ids) / (time.perf_counter() - begin), None

        sides: dict[str, Side] = {"ours": own}
        if twin is not None and length <= options.most_of_peers:
            sides["transformers eager"] = other
        sides |= _llama_sides(options, length) if length > PROMPT else {}
        lines += compare(f"prefill {length}", sides, max(1, options.rounds * 512 // length))
    return lines


def drafts(folder: Path, options: argparse.Namespace) -> list[Line]:
    """Tokens per second by number of drafts, on held-out text, beside what would break even."""
    from ..model.demo import _prompts
    from ..model.training_run import read_data

    model = KExaone.from_pretrained(folder)
    prompts = _prompts(read_data((), model.config, None).validation)
    numbers: list[Any] = [*range(MAX_DRAFTS + 1), "auto"]
    context = max(map(len, prompts)) + options.tokens
    generators = {n: Generator(model, batch=1, context=context, drafts=n) for n in numbers}
    done: dict[Any, list[Any]] = {n: [] for n in numbers}
    for turn in range(options.rounds + 1):
        for prompt in prompts:
            for n, generator in generators.items():
                found = generator([prompt], max_new_tokens=options.tokens, stop_ids=())
                if turn:
                    done[n].append(found)
    lines = []
    plain = [g.statistics for g in done[0]]
    for n in numbers:
        stats = [g.statistics for g in done[n]]
        speed = statistics.median(s.tokens_per_second for s in stats)
        ratio = statistics.median(
            s.tokens_per_second / p.tokens_per_second for s, p in zip(stats, plain, strict=True)
        )
        drafted, steps = sum(s.drafted for s in stats), sum(s.steps for s in stats)
        cost = statistics.median(
            (s.decode_seconds / s.steps) / (p.decode_seconds / p.steps)
            for s, p in zip(stats, plain, strict=True)
        )
        same = [g.token_ids for g in done[n]] == [g.token_ids for g in done[0]]
        lines.append(Line("drafts", str(n), speed, ratio))
        print(
            f"drafts {n!s:5} {speed:8.0f} tokens/s {ratio:5.2f} x  acceptance "
            f"{sum(s.accepted for s in stats) / max(1, drafted):4.0%}  tokens per step "
            f"{1 + sum(s.accepted for s in stats) / steps:4.2f}, breaks even at {cost:4.2f}  "
            f"texts {'identical' if same else 'DIFFERENT'}",
            flush=True,
        )
    return lines


def main() -> None:
    tables = ("decode", "prefill", "drafts")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tables", nargs="*", metavar="table", help=", ".join(tables))
    parser.add_argument("--preset", choices=sorted(PRESETS), default="mid")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 8192])
    parser.add_argument("--most-of-peers", type=int, default=8192, help="longest prompt of peers")
    parser.add_argument("--compiled", action="store_true", help="also transformers compiled")
    parser.add_argument("--gguf", type=Path, help="the same weights, for llama.cpp")
    parser.add_argument("--model", type=Path, help="trained checkpoint, for drafts")
    parser.add_argument("--tokens", type=int, default=200, help="tokens per prompt, for drafts")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    wanted = options.tables or [t for t in tables if t != "drafts" or options.model]
    if set(wanted) - set(tables) or ("drafts" in wanted and options.model is None):
        parser.error(f"tables: {', '.join(tables)}; drafts needs --model")
    torch.set_num_threads(options.threads)
    lines: list[Line] = []
    print(f"torch {torch.__version__}, {options.threads} threads")
    with keep_freed_memory():
        if "drafts" in wanted:
            lines += drafts(options.model, options)
        if {"decode", "prefill"} & set(wanted):
            model = build(options.preset)
            print(f"{options.preset}, bfloat16")
            for name, table in (("decode", decode), ("prefill", prefill)):
                if name in wanted:
                    lines += table(model, options)
    write_json(options.json, [asdict(line) for line in lines])


if __name__ == "__main__":
    main()
