"""Two processes that share rows, as meshes on gloo: plain Trainer takes them, DAREL refuses each by name."""

import os
import sys
from pathlib import Path

os.environ["ACCELERATE_USE_CPU"] = "true"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch.distributed
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from helpers import PadCollator, arguments, token_data
from transformers import LlamaConfig, LlamaForCausalLM, Trainer
from transformers.distributed import DistributedConfig

from darel_hf import DarelConfig, DarelTrainer


class OnCpus(ParallelismConfig):
    """Accelerate's own check knows GPUs only; meshes work on CPUs as well."""

    def _validate_accelerator(self, accelerator):
        pass


def made(cls, folder, model, config, **more):
    """Make a trainer; return what it says against it."""
    try:
        trainer = cls(
            model=model, args=arguments(folder / "run", parallelism_config=config), train_dataset=token_data(16),
            data_collator=PadCollator(), **more,
        )  # fmt: skip
        return trainer.accelerator.parallelism_config
    except ValueError as error:
        return str(error)
    finally:
        AcceleratorState._reset_state()


def main():
    folder = Path(sys.argv[1])
    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    torch.distributed.init_process_group("gloo")
    if torch.distributed.get_rank() == 0:
        LlamaForCausalLM(LlamaConfig(**settings, num_attention_heads=4)).save_pretrained(folder / "model")
    torch.distributed.barrier()
    whole = LlamaForCausalLM.from_pretrained(folder / "model")
    # The last one has its weights spread by transformers when it is loaded.
    for name, model in [(n, whole) for n in ("tp_size", "cp_size", "sp_size")] + [("tp_size", None)]:
        if model is None:
            spread = DistributedConfig(tp_plan="auto")
            model = LlamaForCausalLM.from_pretrained(folder / "model", distributed_config=spread)
            assert model.tp_size == 2
        config = OnCpus(**{name: 2})
        plain = made(Trainer, folder, model, config)
        assert getattr(plain, name, plain) == 2
        said = made(DarelTrainer, folder, model, config, darel=DarelConfig(online_keep=0.5))
        assert f"{name}=2: its processes share rows" in said, said
        print("refused by name", flush=True)


if __name__ == "__main__":
    main()
