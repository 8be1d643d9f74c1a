"""What torchrun starts for test_parallel.py: trains as each case says, and writes down the losses.

torchrun ... parallel_worker.py FOLDER CASE...    where a case is TPxEP, mini:TPxEP, or a word below
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kexaone import Config, KExaone
from kexaone.model.data import Windows
from kexaone.model.moe import MoE
from kexaone.model.parallel.ranks import Ranks, connect
from kexaone.model.parallel.shard import gathered
from kexaone.model.trainer import Trainer, TrainSettings

STEPS, SAVED_AT = 20, 10
SMALL = dataclasses.replace(
    Config.preset("mini"),
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_attention_heads=4,
    head_dim=16,
    num_experts=8,
    num_experts_per_tok=2,
    windows=(8, 0),
    mtp_steps=1,
)
SETTINGS = TrainSettings(
    steps=STEPS, batch_size=4, sequence_length=32, learning_rate=4e-3, warmup=2, bias_rate=1e-3
)


def text() -> Windows:
    """Tokens with something to learn: each follows from the one before, most of the time."""
    random = torch.Generator().manual_seed(3)
    noise = torch.randint(0, 7, (4096,), generator=random)
    tokens = (torch.arange(4096) * 5 + noise) % 250
    return Windows(tokens, SETTINGS.sequence_length)


def new_trainer(ranks: Ranks | None = None, config: Config = SMALL, **changes: Any) -> Trainer:
    torch.manual_seed(7)
    settings = dataclasses.replace(SETTINGS, **changes)
    return Trainer(KExaone(config), text(), settings, ranks)


def biases(trainer: Trainer) -> list[list[float]]:
    layers = [layer.mlp for layer in trainer.model.model.layers]
    found: list[Tensor] = [x.gate.e_score_correction_bias for x in layers if isinstance(x, MoE)]
    return [x.tolist() for x in found]


def record(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Trains, and tells every loss and what the router's biases were after every step."""
    reports, moved = [], []
    for _ in range(steps):
        reports.append(dataclasses.asdict(trainer.step()))
        moved.append(biases(trainer))
    held_out = trainer.evaluate(text(), 2)
    return {"reports": reports, "biases": moved, "evaluated": held_out}


def poisoned(ranks: Ranks, policy: str) -> dict[str, Any]:
    """A gradient that is NaN on one rank; the state before and after must be the same."""
    trainer = new_trainer(ranks, not_finite=policy)
    trainer.step()
    name, weight = next(x for x in trainer.model.named_parameters() if "layers.1.mlp.gate" in x[0])
    before = {k: v.clone() for k, v in trainer._state().items()}
    if ranks.rank == 1:
        weight.register_post_accumulate_grad_hook(lambda p: p.grad.to_local().fill_(torch.nan))
    try:
        told = dataclasses.asdict(trainer.step())
    except ValueError as error:
        told = str(error)
    after = trainer._state()
    same = all(torch.equal(_local(before[k]), _local(after[k])) for k in before)
    return {"told": told, "same": ranks.gather(same), "name": name}


def _local(x: Tensor) -> Tensor:
    return x.to_local() if hasattr(x, "to_local") else x


def full_disk(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """One rank may not write; the checkpoint before must stay and nothing else."""
    from training_cases import largest_file

    trainer = new_trainer(ranks)
    trainer.step()
    trainer.save(folder)
    trainer.step()
    try:
        if ranks.rank == ranks.world - 1:
            with largest_file(1000):
                trainer.save(folder)
        else:
            trainer.save(folder)
        told = "saved"
    except OSError as error:
        told = str(error)
    return {"told": ranks.gather(told), "left": sorted(p.name for p in folder.iterdir())}


def run_case(case: str, folder: Path) -> dict[str, Any]:
    if case.startswith("resume:"):
        ranks = connect(ep=2)
        trainer = Trainer.resume(folder / case.removeprefix("resume:"), text(), ranks=ranks)
        return record(trainer, STEPS - SAVED_AT)
    if "x" in case:
        name, _, sizes = case.rpartition(":")
        tp, ep = (int(n) for n in sizes.split("x"))
        ranks = connect(tp=tp, ep=ep)
        trainer = new_trainer(ranks, Config.preset(name) if name else SMALL)
        first = record(trainer, SAVED_AT)
        trainer.save(folder / case.replace(":", "-"))
        second = record(trainer, STEPS - SAVED_AT)
        whole = gathered(trainer.model, ranks)
        if whole is not None:
            whole.save_pretrained(folder / case.replace(":", "-") / "model")
        return {key: first[key] + second[key] for key in ("reports", "biases")} | {
            "evaluated": second["evaluated"]
        }
    ranks = connect(ep=2)
    if case == "full":
        return full_disk(ranks, folder / "full")
    return poisoned(ranks, case)


def main(folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    for case in cases:
        result = run_case(case, folder)
        if dist.get_rank() == 0:
            name = f"{dist.get_world_size()}-{case.replace(':', '-')}.json"
            (folder / name).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(Path(sys.argv[1]), sys.argv[2:])
