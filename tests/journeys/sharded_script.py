"""Launched by the journeys on two processes: score and train a model sharded by `fully_shard`, beside a whole one."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import PadCollator, tiny_gpt2, token_data

from darel_hf import DarelConfig, Selector
from darel_hf.data import ID_KEY, CarryIds, add_ids, take_rows
from darel_hf.scoring import BatchScorer, model_fingerprint, score_dataset


def main():
    torch.set_num_threads(1)
    state = PartialState(cpu=True)  # starts gloo, nothing more: the model is not prepared by accelerate
    rank, world = state.process_index, state.num_processes
    whole, sharded = tiny_gpt2(), tiny_gpt2()
    mesh = init_device_mesh("cpu", (world,))
    for block in sharded.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert isinstance(sharded, FSDPModule)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    assert sharded.lm_head.weight.to_local().shape[0] == whole.lm_head.weight.shape[0] // world
    assert model_fingerprint(sharded) == model_fingerprint(sharded)  # works, and is the same again

    data = token_data(int(sys.argv[1]))
    with_ids, collator = add_ids(data, np.arange(len(data))), CarryIds(PadCollator())
    # A few tokens a batch: the ranks have different numbers of batches, and so must wait for each other.
    found = score_dataset(
        BatchScorer(sharded), with_ids, collator, dict, rank=rank, world_size=world, max_tokens=25, progress_bar=False
    )
    expected = score_dataset(BatchScorer(whole), with_ids, collator, dict, progress_bar=False)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)

    selector = Selector(DarelConfig(online_keep=0.5, online_rule="hardest"), range(len(data)))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (whole, sharded)]
    for step in range(3):
        rows = [with_ids[(step * 16 + rank * 8 + i) % len(data)] for i in range(8)]
        batch = collator(rows)
        losses = BatchScorer(sharded)(batch).losses.numpy()
        np.testing.assert_allclose(losses, BatchScorer(whole)(batch).losses.numpy(), rtol=1e-4)
        kept, _ = selector.select(batch[ID_KEY], losses, batch_size=4, batch=step * world + rank)
        chosen = {key: value for key, value in take_rows(batch, kept, 8).items() if key != ID_KEY}
        for model, optimizer in zip((whole, sharded), optimizers, strict=True):
            optimizer.zero_grad()
            model(**chosen).loss.backward()
            if model is whole:  # what sharding does by itself: the mean of the gradients over ranks
                for parameter in model.parameters():
                    dist.all_reduce(parameter.grad, dist.ReduceOp.SUM)
                    parameter.grad /= world
            optimizer.step()
    for (name, left), right in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(left, right.full_tensor(), rtol=1e-4, atol=1e-6, msg=name)
    print(f"sharded equals whole on rank {rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
