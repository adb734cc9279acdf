"""The run folder explains itself: a page that needs nothing else, escaped text, run.json, the model card."""

import json
from html.parser import HTMLParser

import datasets
from helpers import PadCollator, arguments, tiny_lora, token_data

from darel_hf import DarelConfig, DarelTrainer

EVIL = "<script>alert('x')</script> & \"quotes\" <img src=x onerror=alert(1)>"
VOID = {"meta", "br"}


class Check(HTMLParser):
    """Collect tags and text; see that what is opened is closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text, self.attributes = [], set(), [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def train(folder, data, darel, **settings):
    trainer = DarelTrainer(
        model=tiny_lora(),
        args=arguments(folder, **settings),
        train_dataset=data,
        data_collator=PadCollator(),
        darel=DarelConfig(**darel),
    )
    trainer.train()
    return trainer


def test_the_page_is_whole_and_escaped(tmp_path):
    data = token_data(40)
    data = data.add_column("ref", [f"{EVIL} number {i}" for i in range(40)])
    darel = {"offline_keep": 0.5, "offline_rule": "hardest", "online_keep": 0.5, "online_rule": "hardest"}
    trainer = train(tmp_path, data, darel)
    text = (tmp_path / "darel" / "report.html").read_text()
    page = Check(text)
    assert not page.tags & {"script", "img", "link", "iframe"}
    assert "http" not in text and "<script" not in text
    assert not {name for name, _ in page.attributes} & {"onerror", "src", "href"}
    shown = "".join(page.text)
    for expected in ("Where the time went", "Losses before training", "Selection over time", "dropped", "kept"):
        assert expected in shown
    worst = trainer.report.dropped(1)[0]
    assert f"ref: {EVIL} number {worst['sample_id']}" in shown
    assert worst["why"] in shown
    assert "torch" in shown and "offline_keep" in shown


def test_the_folder_explains_the_run(tmp_path):
    train(tmp_path, token_data(40), {"online_keep": 0.5, "online_rule": "hardest"})
    run = json.loads((tmp_path / "darel" / "run.json").read_text())
    assert run["config"]["online_keep"] == 0.5 and run["plan"]["online_keep"] == 0.5
    assert {"torch", "transformers", "darel_hf"} <= set(run["environment"]["versions"])
    assert run["environment"]["command"] and run["environment"]["processes"] == 1
    report = json.loads((tmp_path / "darel" / "report.json").read_text())
    assert report["environment"] == run["environment"]


def test_pages_without_losses_and_with_a_rule_that_reads_none(tmp_path):
    for number, darel in enumerate(({"track": True}, {"offline_keep": 0.5, "offline_rule": "random"})):
        train(tmp_path / str(number), token_data(12), darel, num_train_epochs=1)
        Check((tmp_path / str(number) / "darel" / "report.html").read_text())


def test_labels_and_torch_data_sets(tmp_path):
    rows = [{**row, "group": 0} for row in token_data(20)]
    trainer = train(
        tmp_path,
        datasets.Dataset.from_list(rows).with_format("torch"),
        {"offline_keep": 0.5, "offline_rule": "middle"},
    )
    assert trainer.report.kept.sum() == 10
    Check((tmp_path / "darel" / "report.html").read_text())


def test_the_model_card_has_a_section(tmp_path):
    trainer = train(tmp_path, token_data(40), {"offline_keep": 0.5, "offline_rule": "middle"})
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text()
    assert card.count("## Training data selection (DAREL)") == 1
    assert "`offline_keep=0.5`" in card and "20 of 40" in card
    trainer.create_model_card(model_name="mine")
    assert (tmp_path / "README.md").read_text().count("## Training data selection (DAREL)") == 1


def test_what_the_loggers_get(tmp_path):
    """TensorBoard, W&B and trackio take what `Trainer.log` is given: numbers under names that begin with darel/."""
    trainer = train(tmp_path, token_data(40), {"online_keep": 0.5, "online_rule": "hardest"})
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("kept_fraction", "rows_backpropagated", "coverage", "scoring_share", "loss_p50"):
        assert all(isinstance(entry[f"darel/{name}"], (int, float)) for entry in logged)
