"""The task of the recipes: settings, files, prompts, generation, and its errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainingArguments

from darel_hf import DarelConfig
from darel_hf.jobs import parse_settings
from darel_hf.nlg.corpus import make_corpus
from darel_hf.nlg.metrics import NAMES
from darel_hf.nlg.task import (
    NLGArguments,
    NoRepeatInOutput,
    generate,
    group_references,
    load_for_generation,
    load_model,
    prompt_of,
    read_pairs,
    run,
    tokenize_pairs,
)

RECIPES = Path(__file__).parents[2] / "recipes"
CLASSES = (NLGArguments, DarelConfig, TrainingArguments)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with `data/` (the generated corpus, small) and `model/` (a random GPT-2 and a tokenizer)."""
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("base")
    pairs = make_corpus(folder / "data", representations=28)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [f"{prompt_of(p['mr'])} {p['ref']}" for p in pairs["train"]], vocab_size=400, special_tokens=["<end>"]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<end>", eos_token="<end>")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0)
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def task(base, **more):
    return NLGArguments(
        model_name_or_path=str(base / "model"), data_dir=str(base / "data"), max_new_tokens=12, num_beams=3, **more
    )


def training(folder, **more):
    settings = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "save_strategy": "no"}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return TrainingArguments(output_dir=str(folder), **{**settings, **quiet, **more})


# ---- Settings ----


def test_yaml_and_overrides(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: 2e-4\noffline_keep: 0.8\nnum_beams: 4\noutput_dir: x\n")
    nlg, darel, args = parse_settings(CLASSES, [str(tmp_path / "a.yaml"), "--num_beams", "7", "--online_keep", "0.5"])
    assert (nlg.num_beams, darel.offline_keep, darel.online_keep, args.learning_rate) == (7, 0.8, 0.5, 2e-4)


def test_unknown_keys_fail(tmp_path):
    (tmp_path / "a.yaml").write_text("learnin_rate: 2e-4\n")
    with pytest.raises(ValueError, match=r"unknown key in .*did you mean learning_rate"):
        parse_settings(CLASSES, [str(tmp_path / "a.yaml")])
    with pytest.raises((ValueError, SystemExit)):
        parse_settings(CLASSES, ["--learnin_rate", "1"])
    with pytest.raises(ValueError, match="no such file"):
        parse_settings(CLASSES, [str(tmp_path / "b.yaml")])


@pytest.mark.parametrize("name", ["gpt2_small", "gpt2_medium", "gpt2_large"])
def test_the_recipes_settings_are_the_papers(name):
    from pathlib import Path

    path = Path(__file__).parents[2] / "recipes" / "e2e_nlg" / f"{name}.yaml"
    nlg, darel, args = parse_settings(CLASSES, [str(path)])
    assert (nlg.lora_r, nlg.lora_alpha, nlg.lora_dropout) == (4, 32, 0.1)
    assert (args.learning_rate, args.num_train_epochs, args.per_device_train_batch_size) == (2e-4, 5, 8)
    assert (args.label_smoothing_factor, args.lr_scheduler_type) == (0.1, "linear")
    assert round(args.warmup_steps * 42061 / 8 * 5) == pytest.approx(500, abs=1)
    assert (nlg.num_beams, nlg.length_penalty, nlg.no_repeat_ngram_size, nlg.max_new_tokens) == (10, 0.8, 4, 64)
    assert darel.active


# ---- Data ----


def test_prompts():
    assert prompt_of("name[The Oak], price[less than 60]") == "name : The Oak | price : less than 60 ||"
    assert prompt_of("Translate this:") == "Translate this:"


@pytest.mark.parametrize("text", ["[INST] Hi [/INST]", "Sort the list [3, 1, 2].", "name[a], and then", "a[0], b"])
def test_other_prompts_stay_as_they_are(text):
    assert prompt_of(text) == text


@pytest.mark.parametrize("text", [
    "\ufeffmr,ref\na[1],one\n", "MR,REF\na[1],one\n", "meaning_representation,human_reference\na[1],one\n",
    "mr;ref\na[1];one\n", "mr,ref,fixed\na[1],one,0\n",
])  # fmt: skip
def test_pairs_of_any_spelling(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    assert read_pairs(tmp_path / "a.csv") == [{"mr": "a[1]", "ref": "one"}]


@pytest.mark.parametrize(("text", "message"), [
    ('mr,ref\na,"one"\nb,"second\nc,third\n', "the row that begins in line 3 is broken"),
    ("mr,ref\na,cheap, and nice\n", "line 2 has 3 columns"),
    ("mr,ref\na,one\nb\n", "line 3 has 1 columns"),
    ("mr,ref\na," + "x" * 140_000 + "\n", "begins in line 2 is broken"),
    ("mr,ref\na,one\nb, \n", "line 3 has an empty 'ref'"),
])  # fmt: skip
def test_pairs_that_are_broken(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        read_pairs(tmp_path / "a.csv")
    assert str(raised.value).startswith(f"data_dir={str(tmp_path / 'a.csv')!r}")


@pytest.mark.parametrize("settings", [{"num_beams": 0}, {"max_new_tokens": 0}, {"max_new_tokens": 100_000}])
def test_generation_is_checked_before_training(base, tmp_path, monkeypatch, settings):
    args = task(base)
    for name, value in settings.items():
        setattr(args, name, value)
    monkeypatch.setattr("darel_hf.nlg.task.train_once", lambda *_: pytest.fail("it trains"))
    with pytest.raises(ValueError, match=next(iter(settings))):
        run(args, DarelConfig(), training(tmp_path / "out"))


def test_labels_are_on_reference_and_end_only(base):
    _, tokenizer = load_for_generation(str(base / "model"))
    pair = {"mr": "name[The Oak], kind[inn]", "ref": "The Oak is an inn."}
    (row,) = tokenize_pairs([pair], tokenizer, 256)
    text = tokenizer.decode(row["input_ids"])
    assert text == "name : The Oak | kind : inn || The Oak is an inn.<end>"
    assert tokenizer.decode([t for t in row["labels"] if t != -100]) == " The Oak is an inn.<end>"
    (cut,) = tokenize_pairs([pair], tokenizer, 5)
    assert len(cut["input_ids"]) == len(cut["labels"]) == 5


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match=r"needs trainset\.csv, devset\.csv, testset_w_refs\.csv"):
        read_pairs(tmp_path / "none.csv")
    (tmp_path / "a.csv").write_text("meaning,text\na,b\n")
    with pytest.raises(ValueError, match="no column 'mr'"):
        read_pairs(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_bytes("mr,ref\na,caf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        read_pairs(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("mr,ref\n")
    with pytest.raises(ValueError, match="no rows"):
        read_pairs(tmp_path / "a.csv")


def test_a_hub_that_cannot_be_reached(tmp_path, base):
    for settings in ({"model_name_or_path": "no/such-model"}, {"data_dir": None}):
        arguments = NLGArguments(
            **{"model_name_or_path": str(base / "model"), "data_dir": str(base / "data"), **settings}
        )
        with pytest.raises(OSError, match=r"--data_dir and --model_name_or_path.*darel demo"):
            run(arguments, DarelConfig(), training(tmp_path / "out"))


# ---- Generation ----


def test_target_modules_of_the_adapters(base):
    adapted = {}
    for targets in (None, "c_attn, c_fc", "all-linear"):
        model, _ = load_model(task(base, lora_target_modules=targets))
        names = (name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name)
        adapted[targets] = {name.rsplit(".", 1)[-1] for name in names}
    assert adapted == {
        None: {"c_attn"},
        "c_attn, c_fc": {"c_attn", "c_fc"},
        "all-linear": {"c_attn", "c_proj", "c_fc"},
    }


def test_predictions_do_not_depend_on_the_batch_size(base, tmp_path):
    model, tokenizer = load_for_generation(str(base / "model"))
    mrs = list(group_references(read_pairs(base / "data" / "testset_w_refs.csv"))) * 2
    outputs = []
    for size in (1, 3, 50):
        out = generate(model, tokenizer, mrs, task(base, generation_batch_size=size), tmp_path / f"{size}.txt")
        outputs.append(out)
        assert (tmp_path / f"{size}.txt").read_text().splitlines() == out
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(set(outputs[0])) > 1


def test_generation_goes_on_where_it_was(base, tmp_path, monkeypatch):
    model, tokenizer = load_for_generation(str(base / "model"))
    mrs = list(group_references(read_pairs(base / "data" / "trainset.csv")))[:9]
    settings = task(base, generation_batch_size=2)
    whole = generate(model, tokenizer, mrs, settings, tmp_path / "whole.txt")
    calls = []
    original = type(model).generate

    def counting(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "generate", counting)
    with pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, mrs, settings, tmp_path / "p.txt")
    assert not (tmp_path / "p.txt").exists()
    partial = tmp_path / "p.txt.partial.jsonl"
    partial.write_text(partial.read_text() + '{"index": 7, "predic')  # cut off in the middle of a line
    assert generate(model, tokenizer, mrs, settings, tmp_path / "p.txt") == whole
    assert len(calls) == 3 + 3  # four samples were done, five in three batches were left
    assert not partial.exists()


def test_partial_predictions_of_other_settings_are_put_aside(base, tmp_path):
    model, tokenizer = load_for_generation(str(base / "model"))
    partial = tmp_path / "p.txt.partial.jsonl"
    partial.write_text(json.dumps({"origin": "other"}) + "\n" + json.dumps({"index": 0, "prediction": "wrong"}) + "\n")
    out = generate(model, tokenizer, ["name[A B], kind[inn]"], task(base), tmp_path / "p.txt")
    assert out != ["wrong"]
    assert len(list(tmp_path.glob("*.other"))) == 1


def test_only_the_output_must_not_repeat():
    processor = NoRepeatInOutput(2, prompt_width=3)
    scores = torch.zeros(1, 10)
    ids = torch.tensor([[5, 6, 7, 1, 2, 1]])  # the output is 1 2 1: after 1, 2 would repeat; 5 6 of the prompt may
    banned = torch.isinf(processor(ids, scores.clone()))[0]
    assert banned.nonzero().flatten().tolist() == [2]
    assert not torch.isinf(processor(torch.tensor([[5, 6, 7, 5]]), scores.clone())).any()


# ---- The whole job ----


def test_run(base, tmp_path):
    out = tmp_path / "out"
    results = run(
        task(base),
        DarelConfig(offline_keep=0.8, offline_rule="middle", online_keep=0.5, online_rule="hardest"),
        training(out),
    )
    for name in ("adapter_model.safetensors", "predictions.txt", "results.json", "dropped.csv", "losses.png"):
        assert (out / name).stat().st_size > 0, name
    assert len((out / "predictions.txt").read_text().splitlines()) == results["test_representations"]
    samples = len(read_pairs(base / "data" / "trainset.csv"))
    dropped = (out / "dropped.csv").read_text().splitlines()
    assert len(dropped) - 1 == samples - round(0.8 * samples)
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    scores = json.loads((out / "scores.json").read_text())
    assert scores["n"] == results["test_representations"] and set(scores["signatures"]) >= {"bleu", "ter", "nist"}
    report = json.loads((out / "darel" / "report.json").read_text())
    assert report["scores"] == {name: scores[name] for name in NAMES}
    with pytest.raises(ValueError, match="holds another run"):
        run(task(base), DarelConfig(), training(out))


def test_the_same_seed_gives_the_same_adapter(base, tmp_path):
    """Whatever random numbers were drawn before: adapters begin at random."""
    adapters = []
    for number, seed in enumerate((7, 7, 8)):
        torch.manual_seed(number)
        run(task(base, generate=False), DarelConfig(), training(tmp_path / str(number), seed=seed, max_steps=2))
        adapters.append((tmp_path / str(number) / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1] != adapters[2]


@pytest.mark.slow
def test_generate_recipe_writes_what_the_run_wrote(base, tmp_path):
    """Also from the folder of an adapter: the recipe's script, started as a user starts it."""
    settings = task(base, max_test_samples=5)
    run(settings, DarelConfig(), training(tmp_path / "out"))
    command = [sys.executable, str(RECIPES / "e2e_nlg" / "generate.py"), "--adapter", str(tmp_path / "out")]
    command += ["--model_name_or_path", settings.model_name_or_path, "--data_dir", settings.data_dir]
    command += ["--num_beams", str(settings.num_beams), "--max_new_tokens", str(settings.max_new_tokens)]
    command += ["--max_test_samples", "5", "--output", str(tmp_path / "again.txt")]
    first = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "again.txt").read_text() == (tmp_path / "out" / "predictions.txt").read_text()
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode != 0 and "--force" in again.stderr


@pytest.mark.slow
def test_run_resumes(base, tmp_path):
    darel = DarelConfig(offline_keep=0.8, offline_rule="middle")
    straight = run(task(base), darel, training(tmp_path / "a", save_strategy="epoch", num_train_epochs=2))
    run(task(base), darel, training(tmp_path / "b", save_strategy="epoch", num_train_epochs=2))
    last = sorted((tmp_path / "b").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)[-1]
    for path in last.rglob("*"):
        if path.is_file():
            path.unlink()
    (tmp_path / "b" / "predictions.txt").unlink()
    again = run(task(base, resume=True), darel, training(tmp_path / "b", save_strategy="epoch", num_train_epochs=2))
    assert again["bleu"] == straight["bleu"]
    assert (tmp_path / "a" / "predictions.txt").read_text() == (tmp_path / "b" / "predictions.txt").read_text()
