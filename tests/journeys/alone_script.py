"""Launched by the journeys on two processes: what one of them tries out must not wait for the other."""

import sys
from pathlib import Path

import torch
from transformers import MistralConfig, MistralForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import PadCollator, arguments, tiny_lora, token_data

from darel_hf import DarelConfig, DarelTrainer


def with_a_window():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    sizes |= {"intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": 10}
    return MistralForCausalLM(MistralConfig(**sizes))


def main():
    torch.set_num_threads(1)
    which, folder = sys.argv[1:]
    if which == "memory":  # measured before training
        model, data, darel = tiny_lora(), token_data(16).remove_columns("group"), {"budget_memory": 0.7}
    else:  # a row that is longer than the window, in the batch of one process, and none of those that were looked at
        lengths = [20 if i == 8 else 8 for i in range(400)]
        rows = [list(range(2, 2 + length)) for length in lengths]
        data = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100, *ids[1:]]} for ids in rows]
        model, darel = with_a_window(), {"unpad": True}
    args = arguments(folder, ddp_backend="gloo", max_steps=3, train_sampling_strategy="sequential")
    trainer = DarelTrainer(
        model=model, args=args, train_dataset=data, data_collator=PadCollator(), darel=DarelConfig(**darel)
    )
    trainer.train()
    assert args.world_size == 2 and trainer.state.global_step == 3
    print(f"{which}: trained, {trainer.report.plan.batch_size} rows")


if __name__ == "__main__":
    main()
