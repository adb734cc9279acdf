"""Trainers for comparisons, at the top level of a module, as every run's process looks for them."""

import helpers

from darel_hf import DarelTrainer


def make_trainer(run):
    settings = {"num_train_epochs": 2, **run.settings}
    if settings.pop("breaks", False):
        raise RuntimeError("the arm that breaks")
    return DarelTrainer(
        model=helpers.tiny_lora(seed=run.seed),
        args=helpers.arguments(run.output_dir, seed=run.seed, **settings),
        train_dataset=helpers.token_data(16),
        eval_dataset=helpers.token_data(8, seed=1),
        data_collator=helpers.PadCollator(),
        darel=run.darel,
    )


def evaluate(trainer):
    return {"test_loss": trainer.evaluate()["eval_loss"], "epochs": trainer.args.num_train_epochs}
