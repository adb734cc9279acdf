"""The reader: completions read frozen prompts through adapted keys and values; shown against stock parts."""

import inspect
import json
import math
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers import PadCollator, arguments
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from readers import (
    FAMILIES,
    SMALL,
    VOCABULARY,
    adapted,
    data,
    distance,
    gradients,
    make_base,
    oracle,
    prompt_cache,
    rows,
)
from transformers import GenerationConfig, Trainer, pipeline

from darel_hf import DarelTrainer, ReaderLoraConfig, to_lora
from darel_hf.adapters import acting_everywhere, base_alone, find_reader, prompt_positions, with_prompt_lengths
from darel_hf.adapters.reader import _warn_of_no_prompts

LENGTHS = [(7, 5), (10, 3), (1, 6), (2, 4), (12, 2)]


def batch(side, lengths=LENGTHS, **more):
    made = rows(lengths, side=side, **more)
    if side == "left":
        made["position_ids"] = (made["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return made


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_logits_and_gradients(family, side):
    inputs = batch(side)
    stock = adapted(family)
    loss, wanted = oracle(stock, inputs)
    loss.backward()
    model = adapted(family, ReaderLoraConfig).train()
    outputs = model(**inputs)
    count = inputs["labels"].ne(-100).sum()
    torch.testing.assert_close(outputs.loss * count, loss, rtol=1e-5, atol=0)
    (outputs.loss * count).backward()
    assert distance(gradients(model), gradients(stock)) < 1e-5
    for logits, labels, expected in zip(outputs.logits, inputs["labels"], wanted, strict=True):
        torch.testing.assert_close(logits[:-1][labels[1:].ne(-100)], expected, rtol=1e-4, atol=1e-4)
    with acting_everywhere(model):  # and that is something else than LoRA everywhere
        assert abs(model(**inputs).loss - outputs.loss) > 1e-3


def test_attention_only_and_untargeted_keys():
    """Where keys and values are not adapted they are read as the base has them."""
    for targets in (["q_proj", "o_proj"], ["v_proj"], ["mlp.up_proj", "mlp.down_proj", "up_proj"]):
        stock = adapted("llama", targets=targets)
        loss, _ = oracle(stock, batch("right"))
        loss.backward()
        model = adapted("llama", ReaderLoraConfig, targets=targets).train()
        inputs = batch("right")
        (model(**inputs).loss * inputs["labels"].ne(-100).sum()).backward()
        assert distance(gradients(model), gradients(stock)) < 1e-5


def test_a_prompt_of_one_token_is_plain_lora():
    """Its only token predicts the first label, and nothing precedes it."""
    inputs = batch("right", [(1, 5), (1, 7)])
    model = adapted("llama", ReaderLoraConfig).eval()
    with torch.no_grad(), acting_everywhere(model):
        wanted = model(**inputs).loss
    assert torch.equal(model(**inputs).loss, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant):
    inputs, model = batch("right"), adapted("llama", ReaderLoraConfig)
    wanted_of = adapted("llama", ReaderLoraConfig).train()
    wanted_of(**inputs).loss.backward()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    model(**inputs).loss.backward()
    assert distance(gradients(model), gradients(wanted_of)) < 1e-6


def test_prompts_see_no_dropout_and_rows_no_other_rows():
    model = adapted("gpt2", ReaderLoraConfig, dropout=0.5).train()
    inputs, seen = batch("right"), []
    block = model.get_base_model().transformer.h[1]
    hook = block.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    for seed in range(2):
        torch.manual_seed(seed)
        model(**inputs)
    hook.remove()
    prompt = prompt_positions(inputs["attention_mask"].bool(), inputs["labels"])
    first, second = seen[1], seen[3]  # of each call the second pass
    assert torch.equal(first[prompt], second[prompt])
    assert not torch.equal(first[~prompt], second[~prompt])


def greedy(stock, ids, steps):
    """Generate one token after the other from a cache that is made anew each time."""
    base = stock.get_base_model()
    name = "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"
    cut, said = ids.shape[1] - 1, []
    for _ in range(steps):
        with torch.no_grad():
            past = {name: prompt_cache(stock, ids[:, :cut])} if cut else {}
            positions = torch.arange(cut, ids.shape[1])[None]
            said.append(int(base(input_ids=ids[:, cut:], position_ids=positions, **past).logits[0, -1].argmax()))
        if said[-1] == base.generation_config.eos_token_id:
            break
        ids = torch.cat([ids, torch.tensor([said[-1:]])], dim=1)
    return said + [0] * (steps - len(said))


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_what_it_was_trained_to(family):
    made = rows([(length, 1) for length in (7, 3, 10, 1)], side="left")
    ids, mask = made["input_ids"], made["attention_mask"]
    stock, model = adapted(family).eval(), adapted(family, ReaderLoraConfig).eval()
    wanted = [greedy(stock, row[used.bool()][None], 8) for row, used in zip(ids, mask, strict=True)]
    found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert found[:, ids.shape[1] :].tolist() == wanted
    one_beam = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=8, num_beams=3, num_return_sequences=3
    )
    assert len(one_beam) == 3 * len(ids)
    # The first logits that a prompt gives are those that training saw at its last token.
    labelled = batch("right", [(7, 5)])
    prompt = labelled["input_ids"][:, :7]
    with torch.no_grad():
        training = model(**labelled).logits[0, 6]
        first = model.generate(
            input_ids=prompt, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        ).logits[0][0]
    torch.testing.assert_close(first, training, rtol=1e-4, atol=1e-4)


def test_prompt_lengths_in_place_of_labels():
    inputs, model = batch("right"), adapted("llama", ReaderLoraConfig).train()
    wanted = model(**inputs).logits
    labels = inputs.pop("labels")
    lengths = prompt_positions(inputs["attention_mask"].bool(), labels).sum(1)
    assert torch.equal(model(**inputs, prompt_lengths=lengths).logits, wanted)
    with pytest.raises(ValueError, match=r"labels: .*prompt_lengths="):
        model(**inputs)


def test_saved_and_loaded(tmp_path):
    inputs, model = batch("right"), adapted("llama", ReaderLoraConfig).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_base("llama"), tmp_path).eval()
    assert find_reader(again) is not None
    assert torch.equal(again(**inputs).loss, model(**inputs).loss)
    assert {file.name for file in tmp_path.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}


@pytest.mark.slow
def test_peft_alone_refuses_it(tmp_path):
    adapted("llama", ReaderLoraConfig).save_pretrained(tmp_path)
    code = f"""
        from peft import PeftModel
        from transformers import LlamaConfig, LlamaForCausalLM
        PeftModel.from_pretrained(LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8,
            num_hidden_layers=1, num_attention_heads=1, vocab_size=8)), {str(tmp_path)!r})
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "KeyError: 'READER'" in ended.stderr


def test_to_lora(tmp_path):
    inputs, model = batch("right"), adapted("llama", ReaderLoraConfig).eval()
    before, after = to_lora(model, inputs)
    stock = adapted("llama").eval()
    with torch.no_grad():
        assert stock(**inputs).loss.item() == after != before
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    loaded = PeftModel.from_pretrained(make_base("llama"), tmp_path).eval()
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert torch.equal(loaded(**inputs).logits, stock(**inputs).logits)
    with pytest.raises(TypeError, match="ReaderLoraConfig"):
        to_lora(stock)
    model.merge_and_unload()


def test_trains_and_evaluates_with_plain_trainer(tmp_path):
    made = rows([(3 + i % 5, 2 + i % 4) for i in range(12)], same_prompts=True)
    model = adapted("gpt2", ReaderLoraConfig)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, optim="sgd", learning_rate=0.05, num_train_epochs=1, per_device_train_batch_size=12),
        train_dataset=data(12),
        eval_dataset=data(12),
        data_collator=PadCollator(),
    )
    stock = adapted("gpt2")
    loss, _ = oracle(stock, made)
    count = made["labels"].ne(-100).sum()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(loss / count), rel=1e-4)
    trainer.train()
    (loss / count).backward()
    gradient, norm = gradients(stock), torch.nn.utils.get_total_norm(gradients(stock).values())
    scale = 0.05 * min(1.0, 1.0 / float(norm))  # Trainer clips
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = before[name] - scale * gradient[name]
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-6)


def test_adapters_that_were_frozen_stay_frozen():
    model = adapted("llama", ReaderLoraConfig)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model(**batch("right"))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_switched_off_it_is_the_base():
    inputs, model = batch("right"), adapted("llama", ReaderLoraConfig).eval()
    base = make_base("llama")
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "target_modules=.*embeddings"),
    ],
)
def test_refuses_what_acts_on_prompts(settings, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(make_base("llama"), ReaderLoraConfig(**{"target_modules": ["q_proj"], **settings}))


def test_unloaded_the_base_is_as_it_was():
    """What adapters it gets later are none of ours."""
    inputs, model = batch("right"), adapted("llama", ReaderLoraConfig)
    base = model.unload()
    stock = adapted("llama").eval()
    later = get_peft_model(base, stock.peft_config["default"]).eval()
    later.load_state_dict(stock.state_dict())
    assert torch.equal(later(**inputs).logits, stock(**inputs).logits)


def test_the_base_alone_leaves_modes_and_switches_as_they_were():
    """Also from within, and after an error: what is trained goes on in its mode."""
    model = adapted("llama", ReaderLoraConfig).base_model.model.train()
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    layers[0].eval()
    layers[1]._disable_adapters = True
    before = [(module.training, getattr(module, "_disable_adapters", None)) for module in model.modules()]
    with pytest.raises(KeyError), base_alone(model):
        with base_alone(model):
            assert all(layer.disable_adapters for layer in layers)
        assert not any(module.training for module in model.modules())
        assert all(layer.disable_adapters for layer in layers)
        raise KeyError
    assert [(module.training, getattr(module, "_disable_adapters", None)) for module in model.modules()] == before
    with base_alone(model):
        assert not any(module.training for module in model.modules())


def test_needs_a_causal_language_model():
    from transformers import LlamaForSequenceClassification

    base = LlamaForSequenceClassification(make_base("llama").config)
    with pytest.raises(ValueError, match="model='LlamaForSequenceClassification': a reader needs a causal language"):
        get_peft_model(base, ReaderLoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS"))


def test_a_conversation_that_goes_on():
    """A cache of an earlier call is refused: what is new would be read as completion, not as prompt."""
    model = adapted("llama", ReaderLoraConfig).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    first = model.generate(input_ids=ids, max_new_tokens=3, return_dict_in_generate=True, do_sample=False)
    longer = torch.cat([first.sequences, torch.tensor([[9, 10]])], dim=1)
    cache = first.get("past_key_values", first.get("cache"))
    with pytest.raises(ValueError, match="past_key_values='DynamicCache': a reader reads a prompt in one call"):
        model.generate(input_ids=longer, past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"prompt_lookup_num_tokens": 4}])
def test_whatever_calls_generation_makes(settings):
    """The prompt is what it was given, also where a first call holds guesses, or each call the whole text again."""
    model = adapted("llama", ReaderLoraConfig).eval()
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7]])
    said = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=-1, **settings)
    assert said[0, 7:].tolist() == greedy_to(adapted("llama").eval(), ids, 12)


def greedy_to(stock, ids, steps):
    stock.get_base_model().generation_config.eos_token_id = -1
    return greedy(stock, ids, steps)


def test_a_prompt_in_parts_by_a_configuration():
    model = adapted("llama", ReaderLoraConfig)
    with pytest.raises(ValueError, match="prefill_chunk_size=2"):
        model.generate(torch.ones(1, 4, dtype=torch.int64), GenerationConfig(prefill_chunk_size=2, max_new_tokens=2))


def test_losses_read_off_guessed_prompts_are_nan(tmp_path):
    """Where labels are kept from the model in evaluation, a loss that means nothing must not look like one."""
    inputs, model = batch("right"), adapted("llama", ReaderLoraConfig).eval()
    labels = inputs.pop("labels")
    logits = model(**inputs).logits
    used = inputs["attention_mask"].bool()
    last = used & (used.cumsum(1) == used.sum(1, keepdim=True))
    assert logits[used & ~last].isnan().all() and not logits[last].isnan().any()
    kinds = {Trainer: True, DarelTrainer: False}
    for cls, nothing in kinds.items():
        trainer = cls(
            model=model,
            args=arguments(tmp_path, label_smoothing_factor=1e-9),
            eval_dataset=data(12),
            data_collator=PadCollator(),
        )
        assert math.isnan(trainer.evaluate()["eval_loss"]) == nothing
    assert labels is not None


def test_padding_inside_a_prompt():
    inputs, model = batch("right", [(6, 3)]), adapted("llama", ReaderLoraConfig).eval()
    inputs["attention_mask"][0, 2:4] = 0
    wanted = model(**inputs).loss
    assert torch.equal(model(**with_prompt_lengths(model, inputs)).loss, wanted)


def test_rows_without_prompts_are_noticed(caplog):
    """Labels of all tokens, as collators for plain language modelling make them: nothing would ever read a prompt."""
    _warn_of_no_prompts.cache_clear()
    model, batch = adapted("llama", ReaderLoraConfig), rows([(3, 2), (0, 4)])
    model(**batch)  # one of them has a prompt
    assert "no prompt" not in caplog.text
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for _ in range(2):
        model(**batch)
    assert caplog.text.count("there is no prompt to read") == 1


def test_adapters_of_both_kinds_at_once():
    model = adapted("llama", ReaderLoraConfig)
    model.add_adapter("other", ReaderLoraConfig(r=2, target_modules=["q_proj"], everywhere=True))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="some act on prompts and some do not"):
        model(**batch("right"))


def test_experts_that_peft_renames():
    from transformers import MixtralConfig, MixtralForCausalLM

    base = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2))
    with pytest.raises(ValueError, match="target_modules='all-linear': in MixtralForCausalLM PEFT adapts experts"):
        get_peft_model(base, ReaderLoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    base = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2))
    get_peft_model(base, ReaderLoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def test_refuses_merging_parts_and_several_answers():
    model = adapted("llama", ReaderLoraConfig)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="prefill_chunk_size=2"):
        model.generate(input_ids=torch.ones(1, 4, dtype=torch.int64), prefill_chunk_size=2)
    inputs = batch("right", [(4, 6)])
    inputs["labels"][0, 6] = -100
    with pytest.raises(ValueError, match=r"labels: row 0 .* 2 places"):
        model(**inputs)


def test_a_decoder_alone_has_no_prompt():
    """Past the head nobody says where prompts end: an error, no LoRA everywhere in silence."""
    model = adapted("llama", ReaderLoraConfig)
    decoder = model.get_base_model().model
    with pytest.raises(RuntimeError, match="call the model as a whole"):
        decoder(input_ids=torch.ones(1, 4, dtype=torch.int64))
    with model.disable_adapter():
        decoder(input_ids=torch.ones(1, 4, dtype=torch.int64))
    to_lora(model)
    decoder(input_ids=torch.ones(1, 4, dtype=torch.int64))


def test_in_a_pipeline():
    """transformers' own pipeline calls `generate` on whatever it is given."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY)}
    fast = Tokenizer(models.WordLevel(words, unk_token="w3"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="w0", eos_token="w2", padding_side="left")
    model = adapted("llama", ReaderLoraConfig).eval()
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    ids = tokenizer("w5 w6 w7", return_tensors="pt").input_ids
    said = writer("w5 w6 w7", max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
    wanted = [token for token in greedy(adapted("llama").eval(), ids, 4) if token not in (0, 2)]
    assert said.split() == [f"w{token}" for token in wanted]
