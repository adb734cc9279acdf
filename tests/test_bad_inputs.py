"""A catalogue of bad inputs: each gives its one error, before any compute, from our code, and leaves no half file."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import PadCollator, arguments, tiny_gpt2, tiny_lora, token_data
from transformers import Trainer
from typer.testing import CliRunner

import darel_hf
from darel_hf import DarelConfig, DarelTrainer, NLGMetrics, Selector
from darel_hf.cli import app
from darel_hf.jobs import parse_settings
from darel_hf.nlg.task import read_pairs
from darel_hf.training.checkpoints import resolve

PACKAGE = Path(darel_hf.__file__).parent
HALF = {"online_keep": 0.5, "online_rule": "hardest"}
WEIGHTS = {"online_keep": 0.5, "online_rule": "infobatch"}
CASES = {}


def case(name, match, error=ValueError):
    """Register a case: a function of a folder that must raise."""

    def add(function):
        assert name not in CASES
        CASES[name] = (function, error, match)
        return function

    return add


def config(name, match, error=ValueError, **settings):
    case(name, match, error)(lambda folder: DarelConfig(**settings))


config("fraction of zero", r"offline_keep=0: give a fraction in \(0, 1\]", offline_keep=0)
config("negative fraction", "online_keep=-0.1: give a fraction", online_keep=-0.1)
config("per cent", r"offline_keep=80: .*80 per cent is 0.8", offline_keep=80)
config("above one", "online_keep=1.5: give a fraction", online_keep=1.5)
config("not a number", "offline_keep=nan: give a fraction", offline_keep=float("nan"))
config("fraction as text", "offline_keep='0.5': give a number", TypeError, offline_keep="0.5")
config("fraction as truth", "online_keep=True: give a number", TypeError, online_keep=True)
config("half too much", r"online_keep=1.5: give a fraction in \(0, 1\]$", online_keep=1.5)
config(
    "two that are of one use",
    "batch_by_length=True: without padding .* leave it out",
    unpad=True,
    batch_by_length=True,
)
config("rule and unpad", "online_rule='infobatch': its weights .* leave out unpad", unpad=True, **WEIGHTS)
config("budget of zero", "budget_time=0: give a fraction", budget_time=0)
config("memory above one", "budget_memory=2: give a fraction", budget_memory=2)
config("period of zero", "rescore_every=0: give a number of epochs", rescore_every=0)
config("half a period", "rescore_every=1.5: give a whole number", TypeError, rescore_every=1.5)
config("unknown offline rule", "offline_rule='best': unknown rule; choose one of", offline_rule="best")
config("unknown online rule", "online_rule='Hardest': unknown rule", online_rule="Hardest")
config("unknown method", "budget_method='guess': choose one of", budget_method="guess")
config("budget and fraction", "offline_keep=0.5: a budget derives this", budget_time=0.5, offline_keep=0.5)
config("budget and period", "rescore_every=3: a budget derives this", budget_time=0.5, rescore_every=3)
config("groups and weights", "group_column='label': the weights", group_column="label", offline_rule="infobatch")


def trainer(folder, darel=None, data=None, collator=None, model=None, cls=DarelTrainer, keywords=None, **settings):
    return cls(
        model=model or tiny_lora(),
        args=arguments(folder, **settings),
        train_dataset=token_data(24) if data is None else data,
        data_collator=collator or PadCollator(),
        darel=DarelConfig(**(darel or HALF)),
        **(keywords or {}),
    )


def training(name, match, error=ValueError, **keywords):
    case(name, match, error)(
        lambda folder: trainer(
            folder, **{key: value() if key in ("data", "model") else value for key, value in keywords.items()}
        ).train()
    )


def with_column(values):
    return lambda: token_data(24).add_column("key", values)


def without(column):
    return lambda: token_data(24).remove_columns(column)


class Packed(PadCollator):
    """All samples in one row."""

    def __call__(self, features):
        joined = {key: [x for f in features for x in f[key]] for key in ("input_ids", "attention_mask", "labels")}
        return {key: torch.tensor([value]) for key, value in joined.items()}


class NoRows(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(())


class Numbers(torch.utils.data.Dataset):
    """Items that are no mappings."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return index


def broken_model():
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.wte.weight[5] = float("nan")
    return model


LOSSES = {"offline_keep": 0.5, "offline_rule": "middle"}
training(
    "settings that are no config",
    "darel='fast': give a DarelConfig",
    TypeError,
    cls=lambda **k: DarelTrainer(**{**k, "darel": "fast"}),
)
training("empty data", "train_dataset='empty'", data=lambda: token_data(24).select([]))
training("budget and steps", "budget_time=0.5: max_steps=5 fixes", darel={"budget_time": 0.5}, max_steps=5)
training("stream without number", "id_column=None", data=lambda: NoRows(), max_steps=2)
training(
    "stream and offline stage", "offline_keep=0.5: train_dataset is a stream", data=NoRows, darel=LOSSES, max_steps=2
)
training("items that are no mappings", "train_dataset='int': items must be mappings", TypeError, data=Numbers)
training(
    "no such id column", "id_column='key': the training set has no such column", darel={**HALF, "id_column": "key"}
)
training(
    "ids of text",
    "id_column='key': ids must be integers",
    TypeError,
    data=with_column([str(i) for i in range(24)]),
    darel={**HALF, "id_column": "key"},
)
training(
    "ids of fractions",
    "id_column='key': ids must be integers",
    TypeError,
    data=with_column([i / 2 for i in range(24)]),
    darel={**HALF, "id_column": "key"},
)
training(
    "ids that occur twice",
    r"id_column='key': ids must be unique.*\[3\]",
    data=with_column([3, 3, *range(10, 32)]),
    darel={**HALF, "id_column": "key"},
)
training(
    "no such group column",
    "group_column='label': the training set has no such column",
    darel={**LOSSES, "group_column": "label"},
)
training(
    "more groups than places",
    "group_column='key': has 24 values",
    data=with_column(list(range(24))),
    darel={**LOSSES, "group_column": "key"},
)
training(
    "no labels",
    "labels: the batch has only the keys",
    data=without("labels"),
    collator=lambda rows: {"input_ids": torch.ones(len(rows), 3, dtype=torch.long)},
    remove_unused_columns=True,
)
training("losses that are no numbers", "loss is NaN or infinite for sample ids", model=broken_model, darel=LOSSES)
training("packed batches", "input_ids has 1 rows for .* samples.*packing=False", collator=Packed())
training(
    "fraction finer than the batch",
    "online_keep=0.95: of a batch of 4 it keeps 4 of 4",
    darel={"online_keep": 0.95, "online_rule": "hardest"},
)
training(
    "budget that cannot be met",
    "budget_time=0.001: cannot be met: the smallest possible here is",
    darel={"budget_time": 0.001, "online_rule": "hardest"},
)
training(
    "memory that cannot be met",
    "budget_memory=0.001: cannot be met: one row needs",
    darel={"budget_memory": 0.001, "online_rule": "hardest"},
)
training("rebalanced batches", "train_sampling_strategy='batch_rebalance'", train_sampling_strategy="batch_rebalance")
training("split batches", "split_batches=True", accelerator_config={"split_batches": True})
training(
    "own loss and weights",
    "compute_loss_func=",
    darel={**HALF, "online_rule": "infobatch"},
    keywords={"compute_loss_func": lambda *a, **k: None},
)
training(
    "embeddings online", "online_rule='ids': the rule looks at the embeddings", darel={**HALF, "online_rule": "ids"}
)
training(
    "embeddings of a language model",
    "offline_rule: this rule looks at embeddings",
    darel={**LOSSES, "offline_rule": "ids"},
)
training(
    "rule that needs to know what is right",
    "online_rule='kakurenbo'",
    darel={**HALF, "online_rule": "kakurenbo"},
    keywords={"per_sample_loss": lambda o, i: o.logits.mean((1, 2))},
)
training(
    "scorer that makes nothing",
    "scorer='NoneType': the function must return a model",
    TypeError,
    darel=LOSSES,
    keywords={"scorer": lambda: None},
)
training(
    "losses of the wrong shape",
    r"per_sample_loss=\(\): return one loss a sample",
    keywords={"per_sample_loss": lambda o, i: o.logits.mean()},
)
training(
    "drop_last without a whole batch",
    "dataloader_drop_last=True",
    data=lambda: token_data(6),
    dataloader_drop_last=True,
)


def scores_file(folder, table):
    pq.write_table(pa.table(table), folder / "scores.parquet")
    return trainer(folder / "run", {**LOSSES, "scores": str(folder / "scores.parquet")}).train()


@case("no scores file", "scores='nowhere.parquet': no such file")
def _(folder):
    trainer(folder, {**LOSSES, "scores": "nowhere.parquet"}).train()


@case("no file of reference scores", "reference_scores='nowhere.parquet': no such file")
def _(folder):
    trainer(folder, {**LOSSES, "offline_rule": "rho_loss", "reference_scores": "nowhere.parquet"}).train()


@case("scores that are no parquet", "scores='.*': not a readable parquet file")
def _(folder):
    (folder / "scores.parquet").write_text("id,loss\n")
    trainer(folder / "run", {**LOSSES, "scores": str(folder / "scores.parquet")}).train()


@case("scores without losses", "scores='.*': column 'loss' is missing")
def _(folder):
    scores_file(folder, {"sample_id": list(range(24))})


@case("scores of too few samples", "scores='.*': 10 scores for 24 samples")
def _(folder):
    scores_file(folder, {"sample_id": list(range(10)), "loss": [1.0] * 10})


@case("scores with infinite losses", r"loss is NaN or infinite for sample ids \[3\]")
def _(folder):
    scores_file(folder, {"sample_id": list(range(24)), "loss": [np.inf if i == 3 else 1.0 for i in range(24)]})


@case("nothing to resume from", "output_dir='.*': no complete checkpoint in it")
def _(folder):
    trainer(folder).train(resume_from_checkpoint=True)


@case("checkpoint that is cut off", "resume_from_checkpoint='.*trainer_state.json is missing or cut off")
def _(folder):
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "trainer_state.json").write_text('{"epoch"')
    resolve(str(folder / "checkpoint-3"), str(folder))


@case("checkpoint of plain Trainer", "resume_from_checkpoint='.*': made without DAREL")
def _(folder):
    plain = Trainer(
        model=tiny_lora(),
        args=arguments(folder, save_strategy="epoch"),
        train_dataset=token_data(24),
        data_collator=PadCollator(),
    )
    plain.train()
    trainer(folder).train(resume_from_checkpoint=True)


def resumed(folder, **changes):
    trainer(folder, save_strategy="epoch").train()
    trainer(folder, **changes).train(resume_from_checkpoint=True)


@case("checkpoint of other data", "resume_from_checkpoint='.*': made from another data set")
def _(folder):
    resumed(folder, data=token_data(24, seed=1))


@case("checkpoint of other settings", "online_keep=0.25: the checkpoint .* was made with 0.5")
def _(folder):
    resumed(folder, darel={"online_keep": 0.25, "online_rule": "hardest"})


@case("checkpoint of another batch size", "per_device_train_batch_size=2: the checkpoint was made with 4")
def _(folder):
    resumed(folder, per_device_train_batch_size=2)


@case("selector with unknown ids", r"sample ids=\[99\]: not among the ids")
def _(folder):
    Selector(DarelConfig(**HALF), range(8)).select([99, 1], [0.0, 1.0], batch_size=1, batch=0)


@case("unknown setting in a file", "settings='onlin_keep': unknown key")
def _(folder):
    (folder / "settings.yaml").write_text("onlin_keep: 0.5\n")
    parse_settings((DarelConfig,), [str(folder / "settings.yaml")])


@case("no file of settings", "settings='.*nowhere.yaml': no such file")
def _(folder):
    parse_settings((DarelConfig,), [str(folder / "nowhere.yaml")])


@case("no training file", "data_dir='.*trainset.csv': no such file")
def _(folder):
    read_pairs(folder / "trainset.csv")


@case("training file without references", "data_dir='.*': no column 'ref'")
def _(folder):
    (folder / "trainset.csv").write_text("mr,text\na,b\n")
    read_pairs(folder / "trainset.csv")


@case("fewer predictions than references", "predictions")
def _(folder):
    NLGMetrics()(["a"], [["a"], ["b"]])


def command(name, match, *options, files=None):
    def run(folder):
        for path, text in (files or {}).items():
            (folder / path).write_text(text)
        done = CliRunner().invoke(app, [str(option).replace("@", str(folder)) for option in options])
        assert done.exit_code == 1, done.output
        assert done.output.count("error:") == 1 and "Traceback" not in done.output
        raise ValueError(" ".join(done.output.split()))

    case(name, match)(run)


command("command: no data", "no such file", "score", "@/nowhere.csv")
command(
    "command: unknown kind of file",
    "unknown kind of file",
    "score",
    "@/data.txt",
    "--output",
    "@/o.parquet",
    files={"data.txt": "x"},
)
command(
    "command: output exists",
    "exists; name another file",
    "select",
    "--scores",
    "@/s.parquet",
    "--output",
    "@/k.jsonl",
    files={"k.jsonl": "mine"},
)
command("command: no scores", "no such file", "select", "--scores", "@/s.parquet", "--output", "@/k.jsonl")
command("command: no predictions", "no such file", "eval", "--predictions", "@/p.txt", "--references", "@/r.txt")
command("command: budget of zero", "budget_time=0.0", "plan", "--budget-time", "0", "--epochs", "5")


@pytest.mark.parametrize("name", CASES)
def test_bad_input(tmp_path, name):
    function, error, match = CASES[name]
    with pytest.raises(error, match=match) as raised:
        function(tmp_path)
    assert not re.search(r"\bor (leave|start|pass|set|choose|resume|allow)\b", str(raised.value)), (
        "one remedy is enough"
    )
    raised_in = Path(str(raised.traceback[-1].path))
    assert raised_in.is_relative_to(PACKAGE) or raised_in == Path(__file__), raised_in
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert not path.name.startswith("."), f"{path} was left behind"
            if path.suffix == ".json" and path.parent.name != "checkpoint-3":
                json.loads(path.read_text())
            if path.suffix == ".parquet" and path.name != "scores.parquet":
                pq.read_table(path)


def test_the_catalogue_is_long():
    assert len(CASES) >= 40
