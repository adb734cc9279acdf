"""Fast LoRA layers: PEFT's own outputs and gradients, nothing more saved for them, stock weights; what stays stock."""

import contextlib
import copy
import logging
import pickle

import pytest
import torch
from helpers import PadCollator, arguments, tiny_gpt2, tiny_lora, token_data, weights
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from readers import GENTLE, adapted
from torch import nn
from transformers import Trainer
from transformers.pytorch_utils import Conv1D

from darel_hf import DarelConfig, DarelTrainer, ReaderLoraConfig
from darel_hf.accelerators import FastLinear, FastLora, fast_lora


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Small layers are fast here, too, whether it pays or not."""
    monkeypatch.setattr(fast_lora, "SMALL", 0)
    monkeypatch.setattr(FastLora, "most", float("inf"))


class Two(nn.Module):
    """A layer of either kind."""

    def __init__(self, i, o, bias):
        super().__init__()
        self.linear, self.conv = nn.Linear(i, o, bias), Conv1D(o, i)
        nn.init.normal_(self.conv.bias)


def layer(kind="linear", i=12, o=20, r=4, bias=True, dtype=torch.float32, **settings):
    """PEFT's LoRA layer with adapters that do something."""
    torch.manual_seed(0)
    config = LoraConfig(r=r, lora_alpha=3 * r, target_modules=[kind], fan_in_fan_out=kind == "conv", **settings)
    made = getattr(get_peft_model(Two(i, o, bias), config).to(dtype).base_model.model, kind)
    nn.init.normal_(made.lora_B["default"].weight)
    return made


def fast(made):
    made = copy.deepcopy(made)
    made.__class__ = FastLinear
    return made


def step(made, x, needs):
    """The output, and all gradients by name, for an output gradient that is always the same."""
    made.zero_grad()
    x = x.detach().clone().requires_grad_(needs)
    y = made(x)
    torch.manual_seed(1)
    y.backward(torch.randn_like(y))
    grads = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **grads, **({"x": x.grad} if needs else {})}


def assert_close(found, wanted, tolerance=1e-6):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].shape == value.shape and found[name].dtype == value.dtype, name
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


@contextlib.contextmanager
def counted():
    """Count calls of either function."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for cls in (fast_lora._Whole, fast_lora._Added):
            apply = cls.apply
            patch.setattr(
                cls, "apply", lambda *args, name=cls.__name__, apply=apply: calls.append(name) or apply(*args)
            )
        yield calls


# Fewer rows than inputs, between inputs and outputs, more than both; several dimensions, one, no rows.
SHAPES = [(7,), (15,), (40,), (3, 13), (2, 3, 1), (), (0,), (2, 0)]


@pytest.mark.parametrize("needs", [True, False], ids=["x-with-gradient", "x-without"])
@pytest.mark.parametrize("r", [1, 3, 8, 64])
@pytest.mark.parametrize(("kind", "bias"), [("linear", True), ("linear", False), ("conv", True)])
def test_outputs_and_gradients_are_pefts(kind, bias, r, needs):
    for i, o in [(12, 20), (20, 12)]:
        stock = layer(kind, i, o, r, bias)
        for shape in SHAPES:
            x = torch.randn(*shape, i)
            with counted() as calls:
                found = step(fast(stock), x, needs)
            assert calls == ["_Whole"]
            assert_close(found, step(stock, x, needs))


@pytest.mark.parametrize("trained", ["bias", "A", "B"])
def test_what_else_is_trained_or_frozen(trained):
    stock = layer()
    stock.base_layer.bias.requires_grad_(trained == "bias")
    stock.lora_A["default"].weight.requires_grad_(trained != "B")
    stock.lora_B["default"].weight.requires_grad_(trained != "A")
    for rows in (5, 50):
        x = torch.randn(rows, 12)
        assert_close(step(fast(stock), x, True), step(stock, x, True))


def test_memory_that_is_not_in_order():
    stock = layer()
    x = torch.randn(12, 9, 4).transpose(0, 2)
    assert_close(step(fast(stock), x, True), step(stock, x, True))
    found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    fast(stock)(found).sum().backward()  # a gradient without memory of its own
    stock(wanted).sum().backward()
    torch.testing.assert_close(found.grad, wanted.grad)


@pytest.mark.parametrize("hooked", [False, True], ids=["whole", "added"])
@pytest.mark.parametrize("rows", [3, 30])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gradcheck(kind, rows, hooked):
    made = fast(layer(kind, 4, 6, 2, dtype=torch.float64))
    if hooked:
        made.base_layer.register_forward_hook(lambda *called: None)
    names = ("lora_A.default.weight", "lora_B.default.weight")

    def call(x, *factors):
        return torch.func.functional_call(made, dict(zip(names, factors, strict=True)), (x,))

    inputs = [torch.randn(rows, 4, dtype=torch.float64), *(made.get_parameter(name).detach() for name in names)]
    inputs = [value.clone().requires_grad_() for value in inputs]
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rows", [8, 100])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_no_more_is_saved(kind, rows, autocast):
    def saved(made):
        found, given = {}, {p.untyped_storage().data_ptr() for p in made.parameters()}

        def count(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = torch.randn(rows, 32, requires_grad=True)
        hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            kept = made(x)  # noqa: F841 - what is saved lives as long
        return sum(found.values())

    stock = layer(kind, 32, 48)
    assert 0 < saved(fast(stock)) <= saved(stock)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("rows", [8, 200])
@pytest.mark.parametrize("hooked", [False, True], ids=["whole", "added"])
def test_under_autocast_it_is_as_near_to_the_truth_as_peft(kind, rows, hooked):
    stock = layer(kind, 64, 96, 8)
    if hooked:
        stock.base_layer.register_forward_hook(lambda *called: None)
    x = torch.randn(rows, 64)

    def run(made):
        with torch.autocast("cpu", torch.bfloat16):
            return step(made, x, True)

    with counted() as calls:
        found, slow = run(fast(stock)), run(stock)
    assert calls == ["_Added" if hooked else "_Whole"]
    for name, value in slow.items():
        assert found[name].dtype == value.dtype
        assert (found[name] - value).norm() <= 0.02 * value.norm(), name
    with torch.no_grad():
        truth = copy.deepcopy(stock).double()(x.double())
    error, of_peft = ((one["y"].double() - truth).norm() for one in (found, slow))
    assert error <= 1.05 * of_peft


def test_merged_only_where_nothing_is_lost(monkeypatch):
    made = []
    monkeypatch.setattr(fast_lora, "_merged", lambda *args, f=fast_lora._merged: made.append(args) or f(*args))
    many, few = torch.randn(50, 12), torch.randn(5, 12)
    step(fast(layer()), few, True)
    assert not made
    step(fast(layer()), many, True)
    assert len(made) == 2  # forward and backward
    with torch.autocast("cpu", torch.bfloat16):
        step(fast(layer()), many, True)
    step(fast(layer(dtype=torch.bfloat16)), many.bfloat16(), True)
    torch.set_float32_matmul_precision("high")
    try:
        step(fast(layer()), many, True)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # as Trainer's tf32=True does
        step(fast(layer()), many, True)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")
    assert len(made) == 2


def with_second_adapter(made):
    made.update_layer("second", r=2, lora_alpha=2, config=LoraConfig(r=2))
    made.set_adapter(["default", "second"])


def with_a_listener(made):
    made.lora_A["default"].register_forward_hook(lambda *called: None)


STAYS_STOCK = {
    "lora_dropout=0.3": ({"lora_dropout": 0.3}, None),
    "a variant, DoraLinearVariant": ({"use_dora": True}, None),
    "a variant, ALoraLinearVariant": ({"alora_invocation_tokens": [5]}, None),
    "lora_bias=True": ({"lora_bias": True}, None),
    "2 active adapters": ({}, with_second_adapter),
    "0 active adapters": ({}, lambda made: made.set_adapter([])),
    "merged adapters": ({}, lambda made: made.merge()),
    "adapters switched off": ({}, lambda made: made.enable_adapters(False)),
    "a base that is trained, too": ({}, lambda made: made.base_layer.weight.requires_grad_()),
    "factors that somebody listens to": (
        {},
        lambda m: m.lora_A["default"].register_forward_hook(lambda *called: None),
    ),
    "a base that is Other": ({}, lambda made: setattr(made.base_layer, "__class__", type("Other", (nn.Linear,), {}))),
}


@pytest.mark.parametrize("reason", STAYS_STOCK)
def test_what_stays_stock(reason):
    settings, change = STAYS_STOCK[reason]
    stock = layer(**settings)
    if change is not None:
        change(stock)
    assert fast_lora.why_stock(stock) == reason
    x = torch.randn(30, 12)
    results = []
    for made in (stock, fast(stock)):
        torch.manual_seed(4)
        with counted() as calls:
            y = made(x)
        results.append(y)
        assert not calls
    assert torch.equal(*results)


def test_other_layers_and_types():
    model = get_peft_model(tiny_gpt2(), LoraConfig(target_modules=["wte", "c_attn"], fan_in_fan_out=True))
    assert fast_lora.why_stock(model.base_model.model.transformer.wte) == "layer.Embedding"
    mixed = layer()
    mixed.base_layer.to(torch.bfloat16)  # as PEFT has it: adapters in float32, sums rounded once
    x = torch.randn(30, 12).bfloat16()
    with counted() as calls:
        assert torch.equal(fast(mixed)(x), mixed(x))
        assert fast(layer(dtype=torch.float64))(x.double()).dtype == torch.float64
    assert calls == ["_Whole"]
    with torch.autocast("cpu", torch.bfloat16), counted() as calls:  # which leaves doubles alone
        fast(layer(dtype=torch.float64))(x.double())
    assert not calls


def test_small_calls_and_compiled_ones_are_pefts(monkeypatch):
    monkeypatch.setattr(fast_lora, "SMALL", 12 * 20 * 10)
    made = fast(layer())
    with counted() as calls:
        made(torch.randn(9, 12))
        assert not calls
        made(torch.randn(10, 12))
        assert len(calls) == 1
        compiled = torch.compile(made, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x := torch.randn(30, 12)), made(x))
    assert len(calls) == 2


def test_switched_on_and_off(tmp_path):
    """Names, weights, what is saved, and all that PEFT does to a model, are stock while it is on."""
    model = tiny_lora()
    nn.init.normal_(model.base_model.model.transformer.h[0].attn.c_attn.lora_B["default"].weight)
    ids, before, text = torch.randint(3, 60, (2, 30)), weights(model), repr(model)
    wanted = model(ids).logits
    trainer = DarelTrainer(model=model, args=arguments(tmp_path), train_dataset=token_data(8))
    accelerator = FastLora(trainer)
    accelerator.attach()
    accelerator.attach()
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    assert len(layers) == 2 and all(type(one) is FastLinear for one in layers)
    assert list(model.state_dict()) == list(before)
    with counted() as calls:
        found = model(ids).logits
    assert len(calls) == 2
    torch.testing.assert_close(found, wanted)
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "saved")
    assert not any(type(module) is FastLinear for module in loaded.modules())
    assert torch.equal(loaded.eval()(ids).logits, wanted)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(again(ids).logits, found)
    with model.disable_adapter():
        torch.testing.assert_close(model(ids).logits, tiny_gpt2()(ids).logits)
    model.merge_adapter()
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(model).unload()(ids).logits, tiny_gpt2()(ids).logits)
    accelerator.detach()
    assert repr(model) == text and all(type(one) is Linear for one in layers)


def trained(cls, folder, model, darel=None, data=None, resume=None, **more):
    trainer = cls(
        model=model,
        args=arguments(folder, **{**GENTLE, **more}),
        train_dataset=token_data(24) if data is None else data,
        data_collator=PadCollator(),
        **({} if darel is None else {"darel": DarelConfig(**darel)}),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def distance(found, wanted, model):
    """How far apart two trained models are, relative to how far training went."""
    start = dict(model.named_parameters())
    gone = sum((wanted[n] - start[n]).norm() ** 2 for n in wanted) ** 0.5
    return (sum((found[n] - wanted[n]).norm() ** 2 for n in wanted) ** 0.5 / gone).item()


BESIDE = {
    "alone": ({}, {}, LoraConfig),
    "unpad": ({"unpad": True}, {}, LoraConfig),
    "share_prompts": ({"share_prompts": 1}, {}, LoraConfig),
    "online": ({"online_keep": 0.5, "online_rule": "random"}, {}, LoraConfig),
    "reader": ({}, {}, ReaderLoraConfig),
    "prompt_cache": ({"prompt_cache": "ram"}, {}, ReaderLoraConfig),
    "recompute": ({"prompt_cache": "recompute"}, {}, ReaderLoraConfig),
    "finish": ({"prompt_cache": "ram", "finish_epochs": 1}, {}, ReaderLoraConfig),
    "checkpointing": ({}, {"gradient_checkpointing": True}, LoraConfig),
    "reentrant": (
        {"unpad": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        LoraConfig,
    ),
    "accumulation": ({"unpad": True}, {"gradient_accumulation_steps": 3}, LoraConfig),
    "smoothing": ({}, {"label_smoothing_factor": 0.1}, LoraConfig),
}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("beside", BESIDE)
def test_trains_as_without_it(beside, family, tmp_path):
    darel, more, config = BESIDE[beside]
    slow = (DarelTrainer, darel) if darel else (Trainer, None)
    _, wanted = trained(slow[0], tmp_path / "slow", adapted(family, config), slow[1], **more)
    with counted() as calls:
        trainer, found = trained(DarelTrainer, tmp_path, adapted(family, config), {**darel, "fast_lora": True}, **more)
    assert len(calls) > trainer.state.global_step
    assert ("_Added" in calls) == ("prompt_cache" in darel)  # which hooks the layers that make keys and values
    assert list(trainer.report.plan.costs.factors)[-1] == "fast_lora"
    assert not any(type(module) is FastLinear for module in trainer.model.modules())
    assert distance(found, wanted, adapted(family, config)) < 1e-4


@pytest.mark.slow
def test_beside_sliced_it_leaves_the_compiled_step_alone(tmp_path):
    darel = {"online_keep": 0.5, "online_rule": "hardest", "online_backward": "sliced", "rescore_every": 2}
    _, wanted = trained(DarelTrainer, tmp_path / "slow", tiny_lora(), darel, num_train_epochs=2)
    with counted() as calls:
        _, found = trained(DarelTrainer, tmp_path, tiny_lora(), {**darel, "fast_lora": True}, num_train_epochs=2)
    assert calls  # in the second epoch, which scores nothing
    assert distance(found, wanted, tiny_lora()) < 1e-4


def test_resume_is_bit_exact(tmp_path):
    more = {"save_strategy": "steps", "save_steps": 5, "num_train_epochs": 2}
    darel = {"fast_lora": True, "unpad": True}
    _, whole = trained(DarelTrainer, tmp_path, tiny_lora(), darel, **more)
    resume = str(tmp_path / "checkpoint-5")
    _, again = trained(DarelTrainer, tmp_path, tiny_lora(), darel, resume=resume, **more)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_evaluates_meanwhile(tmp_path):
    trainer = DarelTrainer(
        model=tiny_lora(),
        args=arguments(tmp_path, eval_strategy="epoch", num_train_epochs=1),
        train_dataset=token_data(16),
        eval_dataset=token_data(8, seed=1),
        data_collator=PadCollator(),
        darel=DarelConfig(fast_lora=True),
    )
    trainer.train()
    logged = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(logged, rel=1e-5)


def test_some_layers_stay_stock_and_all_do(tmp_path, caplog):
    model = tiny_lora()
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    layers[1].lora_dropout["default"] = nn.Dropout(0.1)
    with caplog.at_level(logging.WARNING), counted() as calls:
        trained(DarelTrainer, tmp_path / "some", model, {"fast_lora": True}, num_train_epochs=1)
    said = "lora_dropout=0.1 (1 of 2 LoRA layers, base_model.model.transformer.h.1.attn.c_attn)"
    assert f"fast_lora=True: there are {said}; these layers compute as PEFT has them" in caplog.text
    assert calls
    caplog.clear()
    with caplog.at_level(logging.WARNING), counted() as calls:
        trained(DarelTrainer, tmp_path / "all", tiny_lora(dropout=0.1), {"fast_lora": True}, num_train_epochs=1)
    assert "fast_lora=True: there are lora_dropout=0.1 (2 of 2 LoRA layers" in caplog.text
    assert "going on with False" in caplog.text and not calls


@pytest.mark.parametrize(
    ("model", "more", "said"),
    [
        (tiny_gpt2, {}, "GPT2LMHeadModel has no LoRA layers of PEFT"),
        (
            tiny_lora,
            {"torch_compile": True, "torch_compile_backend": "eager"},
            "torch_compile=True puts passes together",
        ),
    ],
)
def test_what_it_cannot_be_had_for(model, more, said, tmp_path):
    trainer = DarelTrainer(model=model(), args=arguments(tmp_path, **more), train_dataset=token_data(8))
    assert said in FastLora(trainer).why_not(None)


def test_what_would_change_is_refused(tmp_path, monkeypatch, caplog):
    wrong = fast_lora._factor_gradients
    monkeypatch.setattr(fast_lora, "_factor_gradients", lambda *args: [g * 1.1 for g in wrong(*args)])
    with caplog.at_level(logging.WARNING):
        trained(DarelTrainer, tmp_path, tiny_lora(), {"fast_lora": True}, num_train_epochs=1)
    assert "fast_lora=True: the gradient of" in caplog.text and "going on with False" in caplog.text


def test_where_it_does_not_pay_it_is_left_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(FastLora, "most", 0.0)
    more = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 1}
    with caplog.at_level(logging.WARNING):
        trainer, whole = trained(DarelTrainer, tmp_path, tiny_lora(), {"fast_lora": True}, **more)
    assert "of one without it; going on with False" in caplog.text
    assert trainer.report.plan.costs.factors == {}
    monkeypatch.setattr(FastLora, "most", 9.0)  # a run that goes on does not measure again
    with counted() as calls:
        resume = str(tmp_path / "checkpoint-3")
        _, again = trained(DarelTrainer, tmp_path, tiny_lora(), {"fast_lora": True}, resume=resume, **more)
    assert len(calls) == 2  # in the trial before training, of either layer
    assert all(torch.equal(again[name], whole[name]) for name in whole)
