"""What we rely on in other libraries that is not public: a new version that renames it fails here, by name."""

import inspect

import peft
import pytest
import torch
from peft import PeftType
from peft.tuners.lora import LoraModel
from peft.tuners.lora.variants import get_alora_offsets_for_forward
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from sacrebleu.metrics import BLEU, TER
from sacrebleu.metrics.base import Metric
from sacrebleu.metrics.lib_ter import translation_edit_rate
from torch._dynamo import config as dynamo_config
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.schemas import ViewAndMutationMeta
from torch._functorch.partitioners import default_partition
from torch._guards import TracingContext
from torch._inductor import compile_fx as compile_fx_module
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from transformers import PreTrainedConfig, Seq2SeqTrainer, Trainer
from transformers import trainer as trainer_module
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("train", ["resume_from_checkpoint", "trial"]),
        ("get_train_dataloader", []),
        ("get_batch_samples", ["epoch_iterator", "num_batches", "device"]),
        ("compute_loss", ["model", "inputs", "return_outputs", "num_items_in_batch"]),
        ("save_model", ["output_dir", "_internal_call"]),
        ("log", ["logs", "start_time"]),
        ("_set_signature_columns_if_needed", []),
        ("_get_train_sampler", ["train_dataset"]),
        ("_prepare_inputs", ["inputs"]),
        ("_hp_search_setup", ["trial"]),
        ("_get_num_items_in_batch", ["batch_samples", "device"]),
        ("get_optimizer_cls_and_kwargs", ["args", "model"]),
        ("create_scheduler", ["num_training_steps"]),
        ("set_initial_training_values", ["args", "dataloader"]),
        ("evaluate", ["eval_dataset"]),
        ("create_model_card", ["model_name"]),
        ("add_callback", ["callback"]),
        ("remove_callback", ["callback"]),
    ],
)
@pytest.mark.parametrize("cls", [Trainer, Seq2SeqTrainer])
def test_methods_and_their_parameters(cls, name, parameters):
    found = list(inspect.signature(getattr(cls, name)).parameters)
    assert [parameter for parameter in parameters if parameter not in found] == []


@pytest.mark.parametrize(
    "attribute",
    ["_train_batch_size", "_signature_columns", "compute_loss_func", "label_smoother", "hp_search_backend"],
)
def test_attributes(attribute):
    assert f"self.{attribute} = " in inspect.getsource(Trainer)


def test_what_slices_backward_passes_needs_of_the_compiler():
    assert list(inspect.signature(compile_fx).parameters)[:3] == ["model_", "example_inputs_", "inner_compile"]
    source = inspect.getsource(compile_fx_module)
    assert "is_backward=True" in source  # how an inner compiler tells the two graphs apart
    made = inspect.signature(default_partition).parameters
    assert list(made)[:2] == ["joint_module", "_joint_inputs"]
    assert hasattr(functorch_config, "enable_autograd_cache") and hasattr(functorch_config, "donated_buffer")
    assert list(inspect.signature(boxed_nop).parameters)[:2] == ["fx_g", "example_inputs"]
    assert "bw_donated_idxs" in ViewAndMutationMeta.__dataclass_fields__
    assert "fw_metadata" in inspect.getsource(TracingContext.__init__)
    assert hasattr(torch._C._autograd, "_get_current_graph_task_keep_graph") and hasattr(torch, "_foreach_copy_")
    assert hasattr(inductor_config, "fallback_random") and hasattr(dynamo_config, "skip_nnmodule_hook_guards")


def test_what_training_without_padding_needs_of_transformers():
    assert "_attn_implementation" in dir(PreTrainedConfig)
    assert "sdpa" in ALL_ATTENTION_FUNCTIONS.valid_keys() and "sdpa" in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()
    assert {"is_causal", "dropout", "scaling"} <= set(inspect.signature(ALL_ATTENTION_FUNCTIONS["sdpa"]).parameters)
    assert "shift_labels" in inspect.signature(ForCausalLMLoss).parameters


def test_the_loop_asks_for_batches_and_saves_in_our_order():
    loop = inspect.getsource(Trainer._run_epoch)
    assert "self.get_batch_samples(epoch_iterator, num_batches, self.args.device)" in loop
    save = inspect.getsource(Trainer._save_checkpoint)
    assert save.index("self.save_model(") < save.index("self.state.save_to_json(")
    assert trainer_module.TRAINER_STATE_NAME == "trainer_state.json"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_preprocess_segment", ["sent"]),
        ("_extract_reference_info", ["refs"]),
        ("_cache_references", ["references"]),
        ("_compute_segment_statistics", ["hypothesis", "ref_kwargs"]),
        ("_extract_corpus_statistics", ["hypotheses", "references"]),
        ("_compute_score_from_stats", ["stats"]),
        ("_aggregate_and_compute", ["stats"]),
    ],
)
@pytest.mark.parametrize("cls", [Metric, BLEU, TER])
def test_what_a_sacrebleu_metric_is_made_of(cls, name, parameters):
    found = list(inspect.signature(getattr(cls, name)).parameters)
    assert [parameter for parameter in parameters if parameter not in found] == []


def test_ter_of_one_reference():
    assert translation_edit_rate(["a", "b"], ["a", "c"]) == (1, 2)


def test_the_reader_in_peft_and_transformers():
    """A method of our own is registered in PEFT's tables, hooks go on blocks, a flag switches adapters off."""
    assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LORA] == LoraModel.prefix
    assert "self._post_injection_hook(" in inspect.getsource(BaseTuner.__init__)
    assert callable(LoraModel._get_adapter_state_dict)
    assert "return self._disable_adapters" in inspect.getsource(BaseTunerLayer.disable_adapters.fget)
    assert "alora_offsets" in inspect.getsource(get_alora_offsets_for_forward)
    assert torch._C._current_graph_task_id() == -1
    assert issubclass(LlamaDecoderLayer, GradientCheckpointingLayer)
