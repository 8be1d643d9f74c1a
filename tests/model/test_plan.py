"""What a plan says of a rank is what the model's sizes say."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from kexaone import Config
from kexaone.model.parallel.plan import plan
from kexaone.model.parallel.ranks import ParallelError

MINI = Config.preset("mini")


@pytest.mark.parametrize(("world", "tp", "ep"), [(4, 1, 1), (8, 2, 4), (8, 2, 8), (2, 1, 2)])
def test_plan_of_mini(world: int, tp: int, ep: int) -> None:
    found = plan(MINI, world=world, tp=tp, ep=ep, batch_size=8, sequence_length=64)
    assert not dist.is_initialized()
    counts = MINI.parameter_counts()
    buffers = (MINI.num_hidden_layers - 1) * MINI.num_experts
    total = counts["total"] - buffers
    # rank 0 has no less than its share, and of each of the parameters at most a row more
    assert total * 4 / world <= found.weights <= total * 4 / world * 1.1
    assert found.gradients == found.weights
    twice = 2 * 288 * 128  # embedding and head, by AdamW; norms are small
    assert found.optimizer == pytest.approx(found.weights + twice * 4 / world, rel=0.02)
    tokens = 8 * 64 // world
    assert found.sent_tokens == 4 * 7 * tokens * 8 * 128 * 4 * (ep - 1) // ep
    assert found.sent_pieces == 4 * 9 * tokens * 128 * 4 * (tp - 1)
    if (tp, ep) == (1, 1):
        root = 2 * 288 * 128 + 128 + 2 * 128 * 128 + 3 * 128
        everything = 3 * (total - root) + 2 * root
        assert found.sent_weights == pytest.approx(everything * 4 * 3 / 4, rel=1e-3)


def test_plan_of_the_real_model() -> None:
    config = Config.preset("k-exaone-236b")
    found = plan(config, world=512, tp=8, ep=64, batch_size=512, sequence_length=8192)
    counts = config.parameter_counts()
    experts = counts["routed_experts"]
    # 128 experts of a layer cannot be on more than 128 ranks: this one has one of each layer
    fair = (counts["total"] - experts) * 4 / 512 + experts * 4 / 128
    assert found.weights == pytest.approx(fair, rel=0.01)
    with pytest.raises(ParallelError, match="must be a multiple of tp"):
        plan(config, world=64, tp=16, batch_size=64, sequence_length=8192)
