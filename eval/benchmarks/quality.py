"""
Text: quality against time of LoRA fine-tuning on E2E-NLG, plain, its controls, DAREL, and the peers' rules.

    python eval/benchmarks/quality.py --data_dir FOLDER --model_name_or_path FOLDER [--arms full,random_0.7] [--quick]

Every seed runs all arms one after the other, in the same loop with the same data. Times count everything (measuring
and scoring) and are relative to the plain run of the same seed, which may be an hour away: where a machine's speed
varies, believe `savings`, which interleaves. The training set is all references of as many meaning representations,
drawn with the seed, as --max_train_samples asks for: the whole set in small, eight to nine references each.
Predictions are greedy, for the representations of the test set that --max_test_samples draws; with --num_beams they
are written anew by beam search as in the recipes, which is slow; those results have files of their own. The test loss
is of two references of each. With --shuffled 0.2 a fifth of the training pairs, drawn with the seed, have the text of
another pair: data in which choosing ought to help. Settings are chosen on the development set, --held_out dev, and an
arm may have a learning rate of its own, `reader@2e-3`. A row a run goes to results/quality.jsonl at once; after every
seed the table, quality.md, and the picture, quality.png, are made from all rows of the same settings. Differences in
BLEU to the plain run and to the first random subset are paired over instances, their 95 % intervals by bootstrap.
Without a folder of data and a model, the generated corpus and the demo's model are taken.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import tempfile
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import RESULTS, add_quick, data_and_model, has_row, latest_rows, store, training_arguments
from transformers import DataCollatorForSeq2Seq

from darel_hf import DarelConfig, NLGMetrics
from darel_hf.comparison.statistics import t_quantile
from darel_hf.data import ID_KEY, CarryIds, add_ids
from darel_hf.nlg.demo import DemoSettings
from darel_hf.nlg.metrics import NAMES
from darel_hf.nlg.task import (
    NLGArguments,
    generate,
    held_out,
    load_for_generation,
    read_pairs,
    run,
    tokenize_pairs,
    training_pairs,
)
from darel_hf.scoring import BatchScorer, save_scores, score_dataset
from darel_hf.selection import Scores

HELD_OUT = {"test": "testset_w_refs.csv", "dev": "devset.csv"}
MARGIN = 1.0  # BLEU that an arm may lose to the plain run and still count as no worse
RULES = ("hardest", "easiest", "middle", "trimmed", "stratified", "percentile", "infobatch", "kakurenbo")
RULES += ("loss_bins_high", "rho_loss", "random")
FULL = ("full", "full_padding_free")  # what others are compared with: plain training, or the same without padding
#: Beginnings of arms that choose by chance; the first that runs is compared.
CONTROLS = ("random_", "grouped_random_", "online_random")


class Arm(NamedTuple):
    """What an arm changes: DAREL's settings, the number of epochs, settings of Trainer and of the task."""

    darel: dict[str, Any] = {}
    share_of_epochs: float = 1.0
    training: dict[str, Any] = {}
    task: dict[str, Any] = {}


def arms() -> dict[str, Arm]:
    """Return all arms that can be asked for."""
    by_length = {"batch_by_length": True}
    made = {"full": Arm(), "full_by_length": Arm(by_length)}
    made["full_group_by_length"] = Arm(training={"train_sampling_strategy": "group_by_length"})  # Trainer's own
    for keep in (0.9, 0.8, 0.7, 0.5, 0.4, 0.3):
        made[f"fewer_{keep}"] = Arm(share_of_epochs=keep)
        budget = {"budget_time": keep, "offline_rule": "middle"}  # once the default; stored rows are of it
        made[f"exact_first_{keep}"] = Arm(budget)
        made[f"reader_exact_first_{keep}"] = Arm(budget, task={"lora_on": "reader"})
        dropping = {**budget, "fast": False}
        made[f"budget_{keep}"] = Arm(dropping)
        grouped = {**dropping, "group_column": "mr"}
        made[f"grouped_budget_{keep}"] = Arm(grouped)
        made[f"grouped_random_budget_{keep}"] = Arm({**grouped, "offline_rule": "random"})  # what scoring is worth
        for rule in RULES:
            offline = {"offline_keep": keep, "offline_rule": rule}
            made[f"offline_{rule}_{keep}"] = Arm(offline)
            made[f"grouped_{rule}_{keep}"] = Arm({**offline, "group_column": "mr"})
            made[f"grouped_{rule}_{keep}_by_length"] = Arm({**offline, "group_column": "mr", **by_length})
        made[f"random_{keep}"] = made.pop(f"offline_random_{keep}")
    # Two thirds of each batch of two thirds of the samples: with what scoring costs, predicted to take half of the
    # time. Or the same from nearly all samples: what is dropped online comes back in other epochs.
    both = {"online_rule": "random", "group_column": "mr"}
    for begin, shares in (("both", (0.66, 2 / 3)), ("mostly_online", (0.9, 0.5))):
        for rule in RULES:
            darel = {**both, "offline_keep": shares[0], "online_keep": shares[1], "offline_rule": rule}
            made[f"{begin}_{rule}_random"] = Arm(darel)
            made[f"{begin}_{rule}_random_by_length"] = Arm({**darel, **by_length})
    for rule in RULES:
        online = {"online_keep": 0.5, "online_rule": rule}
        made[f"online_{rule}"] = Arm(online)  # scored in every epoch
        made[f"online_{rule}_every3"] = Arm({**online, "rescore_every": 3})
        made[f"online_{rule}_two_thirds_every3"] = Arm({**online, "online_keep": 2 / 3, "rescore_every": 3})
        made[f"online_{rule}_every3_by_length"] = Arm({**online, "rescore_every": 3, **by_length})
        if rule != "random":
            made[f"sliced_{rule}"] = Arm({**online, "online_backward": "sliced"})
    # In the time of plain training.
    made["more_epochs"] = Arm({"budget_time": 1.0, "budget_spend": "quality", "offline_rule": "middle"})
    cached = {"prompt_cache": "ram"}
    made["reader"] = Arm(cached, task={"lora_on": "reader"})
    for finish in (0.5, 1.0, 2.0):
        made[f"reader_finish_{finish}"] = Arm({**cached, "finish_epochs": finish}, task={"lora_on": "reader"})
    made["fewer_0.67"] = Arm(share_of_epochs=0.67)
    for time in (0.4, 0.3, 0.25, 0.2):
        allowed = {"budget_time": time, "budget_allows": ["base_precision"], "offline_rule": "middle"}
        made[f"allowed_{time}"] = Arm(allowed)
        made[f"reader_allowed_{time}"] = Arm(allowed, task={"lora_on": "reader"})
    made["full_bf16"] = Arm(training={"bf16": True})  # the control of a base in bfloat16
    made["fast"] = Arm({"fast": True})
    made["fast_bf16"] = Arm({"fast": True, "base_precision": "bf16"})
    made["reader_fast"] = Arm({"fast": True}, task={"lora_on": "reader"})
    made["reader_fast_bf16"] = Arm({"fast": True, "base_precision": "bf16"}, task={"lora_on": "reader"})
    for share in (0.83, 0.67, 0.5, 0.33):
        made[f"reader_fewer_{share}"] = made["reader"]._replace(share_of_epochs=share)
    made["alora"] = Arm(cached, task={"lora_on": "completion"})
    for most in (1, 2, 4):
        made[f"share_{most}"] = Arm({"share_prompts": most})
    for name, arm in list(made.items()):
        try:
            DarelConfig(**{"reference_scores": "made later", **arm.darel, "unpad": True})
        except ValueError:  # a setting that does not go together with it
            continue
        made[f"{name}_padding_free"] = arm._replace(darel={**arm.darel, "unpad": True})
    return made


def main() -> None:
    known = arms()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arms",
        default="full,fewer_0.7,fewer_0.5,random_0.7,grouped_random_0.7,grouped_middle_0.7,both_middle_random,"
        "grouped_budget_0.5_padding_free,"
        "offline_middle_0.7,offline_stratified_0.7,offline_trimmed_0.7,offline_easiest_0.7,offline_rho_loss_0.7,"
        "offline_loss_bins_high_0.7,online_random,online_hardest_every3,online_stratified_every3,"
        "online_percentile_every3,online_infobatch_every3,online_kakurenbo_every3,online_rho_loss_every3,"
        "online_loss_bins_high_every3,sliced_stratified",
    )
    add_options(parser)
    parser.add_argument("--name", default="quality", help="of the files of results")
    parser.add_argument("--work_dir", help="folder of the runs; those that it has already are not done again")
    parser.add_argument(
        "--runs_only", action="store_true", help="no rows yet: a later call with --work_dir makes them"
    )
    parser.add_argument("--num_beams", type=int, default=1, help="more than one: beam search; results to NAME_beams")
    options = parser.parse_args()
    if options.num_beams > 1:
        options.name += "_beams"
    if options.quick:
        options.arms = "full,random_0.7,offline_rho_loss_0.7,sliced_hardest,budget_0.5_padding_free"
    names = options.arms.split(",")
    for name in names:  # an arm with a learning rate of its own
        arm, at, rate = name.partition("@")
        if at and arm in known:
            known[name] = known[arm]._replace(training={**known[arm].training, "learning_rate": float(rate)})
    unknown = [name for name in names if name not in known]
    if unknown:
        near = get_close_matches(unknown[0], known, n=5, cutoff=0.4)
        parser.error(f"--arms {','.join(unknown)}: unknown; near to the first: {near}; all are in arms() of this file")
    relative = names[0].partition("@")[0] in FULL
    there = any(has_row(options.name, settings_of(options), name, options.first_seed) for name in FULL)
    if not relative and not there and not options.runs_only:
        parser.error(f"--arms {options.arms}: times are relative to the first; begin with one of {FULL}")
    task, settings, folder = prepared(options)
    made_with = folder / "settings.json"
    if made_with.exists() and json.loads(made_with.read_text(encoding="utf-8")) != settings:
        parser.error(f"--work_dir {folder}: it holds runs with other settings, see {made_with}; give another folder")
    if not made_with.exists():
        made_with.write_text(json.dumps(settings), encoding="utf-8")
    if options.num_beams > 1:
        settings["num_beams"] = options.num_beams
    held = held_out(read_pairs(Path(task.data_dir) / HELD_OUT[options.held_out or "test"]), task)
    references = list(held.values())
    measure = NLGMetrics(bootstrap=0, wordnet="none")
    compare = NLGMetrics(bootstrap=1000, wordnet="none", only=("bleu",))
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        part = data_of(task, folder / f"data-{seed}", seed, options)
        arguments = replace(task, data_dir=part)
        told: dict[str, list[str]] = {}
        reference, plain = None, None
        for name in names:
            arm = known[name]
            darel = arm.darel
            if "rho_loss" in (darel.get("offline_rule"), darel.get("online_rule")):
                reference = reference or score_by_reference(arguments, options, seed, folder)
                darel = {**darel, "reference_scores": reference}
            output, epochs = folder / f"{name}-{seed}", arm.share_of_epochs * options.epochs
            finished = output / "results.json"
            done = finished.exists()  # by an earlier call with this --work_dir
            if done:
                result = json.loads(finished.read_text(encoding="utf-8"))
            else:
                shutil.rmtree(output, ignore_errors=True)
                training = training_arguments(output, epochs, seed, options, **arm.training)
                result = run(replace(arguments, **arm.task), DarelConfig(**darel), training)
            if name == names[0] and relative:
                plain = result["seconds"]
            told[name] = outputs_of(output, task, list(held), options.num_beams)
            if options.runs_only or (done and has_row(options.name, settings, name, seed)):
                continue
            if options.num_beams > 1:
                scores = measure(told[name], references)
                result |= {key: scores.get(key) for key in NAMES}
            row = {
                "arm": name,
                "seed": seed,
                "time": plain and result["seconds"] / plain,
                "plain_seconds": plain,
                "seconds": result["seconds"],
                **{key: result.get(key) for key in NAMES},
                **{key: result[key] for key in ("scoring_seconds", "predicted_time", "steps", "train_loss")},
                "words": float(np.mean([len(text.split()) for text in told[name]])),
                "rows_backpropagated": result["rows_backpropagated"],
                "test_loss": test_loss(output, task.model_name_or_path, held),
            }
            control = next((n for n in names if n.startswith(CONTROLS)), "")
            for other, called in ((names[0] if relative else "", "full"), (control, control)):
                if other in told and other != name:
                    compared = compare(told[name], references, baseline=told[other])
                    row[f"bleu_minus_{called}"] = compared["bleu"] - compared["baseline"]["bleu"]
                    row[f"bleu_minus_{called}_interval"] = compared["differences"]["bleu"]
            store(options.name, {**settings, **arm._asdict()}, row)
        if not options.runs_only:
            summarize(options.name, settings)


def outputs_of(output: Path, task: NLGArguments, mrs: list[str], beams: int) -> list[str]:
    """Return the outputs of a run; by beam search they are written first, once."""
    path = output / "predictions.txt"
    if beams > 1:
        path = output / f"predictions-{beams}-beams.txt"
        if not path.exists():
            recipe = {key: getattr(NLGArguments, key) for key in ("length_penalty", "no_repeat_ngram_size")}
            model, tokenizer = loaded(output, task.model_name_or_path)
            generate(model, tokenizer, mrs, replace(task, num_beams=beams, **recipe), path)
    return path.read_text(encoding="utf-8").splitlines()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the task."""
    parser.add_argument("--data_dir")
    parser.add_argument("--model_name_or_path")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--gradient_accumulation_steps", type=int, help="batches a step; default: 1")
    parser.add_argument("--learning_rate", type=float, default=5e-3)
    parser.add_argument("--lora_r", type=int, default=8)
    parser.add_argument("--lora_target_modules", help="default: all-linear")
    parser.add_argument("--bf16", action="store_true", help="train and score in bfloat16, where that is faster")
    parser.add_argument("--max_train_samples", type=int, default=800)
    parser.add_argument("--shuffled", type=float, help="of the training pairs so many have another's text")
    parser.add_argument("--max_test_samples", type=int, default=250)
    parser.add_argument("--held_out", choices=["dev"], help="try on the development set; default: the test set")
    parser.add_argument("--threads", type=int, default=2)
    add_quick(parser)


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that results depend on, as far as they are options."""
    what_is_run = ("data_dir", "model_name_or_path", "arms", "seeds", "first_seed", "name", "work_dir")
    what_is_run += ("runs_only", "quick", "num_beams")
    return {k: v for k, v in vars(options).items() if k not in what_is_run and v is not None}


def prepared(options: argparse.Namespace) -> tuple[NLGArguments, dict[str, Any], Path]:
    """Return the task, the settings that its results depend on, and a folder for what is made."""
    if options.quick:
        options.seeds, options.max_train_samples, options.max_test_samples, options.epochs = 1, 120, 10, 1
    torch.set_num_threads(options.threads)
    folder = Path(getattr(options, "work_dir", None) or tempfile.mkdtemp(prefix="darel-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    sizes = DemoSettings(warm_up_representations=20) if options.quick else DemoSettings()
    data, model, data_and_model_names = data_and_model(options, folder, sizes)
    settings = settings_of(options) | data_and_model_names
    task = NLGArguments(
        model_name_or_path=model,
        data_dir=data,
        max_test_samples=options.max_test_samples,
        lora_r=options.lora_r,
        lora_alpha=4 * options.lora_r,
        lora_dropout=0.0,
        lora_target_modules=options.lora_target_modules or "all-linear",
        num_beams=1,
        no_repeat_ngram_size=0,
        length_penalty=1.0,
        max_new_tokens=60,
        generation_batch_size=256 if torch.cuda.is_available() else 32,
        wordnet="none",
    )
    return task, settings, folder


def test_loss(output: Path, base: str, held: dict[str, list[str]]) -> float:
    """Return the mean loss of a token, of two references of each held-out representation: less noisy than BLEU."""
    model, tokenizer = loaded(output, base)
    scores = scored(model, tokenizer, [{"mr": mr, "ref": text} for mr, texts in held.items() for text in texts[:2]])
    return float((scores.losses * scores.n_tokens).sum() / scores.n_tokens.sum())


def loaded(output: Path, base: str) -> tuple[Any, Any]:
    """Return a trained model, on the GPU if there is one, and its tokenizer."""
    model, tokenizer = load_for_generation(str(output), base)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def scored(model: Any, tokenizer: Any, pairs: list[dict[str, str]]) -> Scores:
    """Score pairs."""
    columns = ["input_ids", "attention_mask", "labels", ID_KEY]
    data = add_ids(tokenize_pairs(pairs, tokenizer, 256), np.arange(len(pairs))).select_columns(columns)
    collator = CarryIds(DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100))
    return score_dataset(
        BatchScorer(model),
        data,
        collator,
        lambda batch: {key: value.to(model.device) for key, value in batch.items()},
        progress_bar=False,
    )


def data_of(task: NLGArguments, folder: Path, seed: int, options: argparse.Namespace) -> str:
    """Write two parts of the training set: what is trained on, and as much for a reference model."""
    if (folder / "others" / "trainset.csv").exists():  # written last, by an earlier call with this --work_dir
        return str(folder)
    source, limit = Path(task.data_dir), replace(task, max_train_samples=options.max_train_samples)
    rest = read_pairs(source / "trainset.csv")
    for part in (folder, folder / "others"):
        drawn = training_pairs(rest, limit, seed)
        taken = set(map(id, drawn))
        rest = [pair for pair in rest if id(pair) not in taken]
        drawn = with_wrong_texts(drawn, options.shuffled or 0.0, seed)
        part.mkdir(exist_ok=True)
        shutil.copy(source / "devset.csv", part)
        shutil.copy(source / HELD_OUT[options.held_out or "test"], part / HELD_OUT["test"])
        with open(part / "trainset.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["mr", "ref"])
            writer.writeheader()
            writer.writerows(drawn)
    return str(folder)


def with_wrong_texts(pairs: list[dict[str, str]], share: float, seed: int) -> list[dict[str, str]]:
    """Return the pairs, a share of them, drawn with the seed, with the text of the next one that was drawn."""
    drawn = np.random.default_rng(seed).permutation(len(pairs))[: round(share * len(pairs))]
    wrong = {int(i): pairs[j]["ref"] for i, j in zip(drawn, np.roll(drawn, -1), strict=True)}
    return [{**pair, "ref": wrong.get(i, pair["ref"])} for i, pair in enumerate(pairs)]


def score_by_reference(arguments: NLGArguments, options: argparse.Namespace, seed: int, folder: Path) -> str:
    """
    Train a reference model for RHO-LOSS on other pairs, score the training pairs of this seed; return the file.

    Its time is in no arm: the rule's idea is that a reference model is made once and used often.
    """
    output, path = folder / f"reference-{seed}", folder / f"reference-{seed}.parquet"
    if not path.exists():
        shutil.rmtree(output, ignore_errors=True)
        others = replace(arguments, generate=False, data_dir=str(Path(arguments.data_dir) / "others"))
        run(others, DarelConfig(), training_arguments(output, 2, seed, options))
        model, tokenizer = loaded(output, arguments.model_name_or_path)
        save_scores(scored(model, tokenizer, read_pairs(Path(arguments.data_dir) / "trainset.csv")), path)
    return str(path)


def summarize(name: str, settings: dict[str, Any]) -> None:
    """Make the table and the picture from all stored rows of these settings."""
    by_arm = latest_rows(name, settings)
    plain = {row["seed"]: row for row in by_arm[next(arm for arm in by_arm if arm.partition("@")[0] in FULL)]}
    control = next((arm for arm in by_arm if arm.startswith(CONTROLS)), "control")
    lines = [
        f"| arm | time, median | of it scoring | samples | BLEU, mean (spread) | minus full | minus {control} "
        "| no worse by more than 1 | loss minus full | NIST | METEOR | TER | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm, rows in by_arm.items():
        bleu = np.array([row["bleu"] for row in rows])
        spread = f" ({bleu.std(ddof=1):.1f})" if len(bleu) > 1 else ""
        cells = [arm]
        timed = [row for row in rows if row["time"]]
        cells.append(f"{np.median([row['time'] for row in timed]):.2f}" if timed else "-")
        scoring = [row["scoring_seconds"] / row["plain_seconds"] for row in timed]
        cells.append(f"{np.median(scoring):.3f}" if timed else "-")
        samples = [row["rows_backpropagated"] / plain[row["seed"]]["rows_backpropagated"] for row in rows]
        cells.append(f"{np.mean(samples):.2f}")
        cells.append(f"{bleu.mean():.1f}{spread}")
        for other in (plain, {row["seed"]: row for row in by_arm.get(control, [])}):
            shared = [row for row in rows if row["seed"] in other and other[row["seed"]]["arm"] != arm]
            differences = [row["bleu"] - other[row["seed"]]["bleu"] for row in shared]
            cells.append(f"{np.mean(differences):+.1f}" if differences else "-")
        cells.append(verdict(rows))
        cells.append(f"{np.mean([row['test_loss'] - plain[row['seed']]['test_loss'] for row in rows]):+.3f}")
        for key, digits in (("nist", 2), ("meteor", 3), ("ter", 1)):
            cells.append(f"{np.mean([row[key] for row in rows]):.{digits}f}")
        lines.append(f"| {' | '.join([*cells, str(len(rows))])} |")
    conditions = ", ".join(f"{key} {value}" for key, value in settings.items())
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + f"\n\nSettings: {conditions}.\n", encoding="utf-8")
    plot(by_arm, RESULTS / f"{name}.png")


def verdict(rows: list[dict[str, Any]]) -> str:
    """Say whether the mean difference to full is above -1 BLEU with 95 % confidence, over instances and seeds."""
    known = [row for row in rows if "bleu_minus_full" in row]
    if not known:
        return "-"
    # Variance within a seed (instances, from the interval's width) and between seeds, of the mean over seeds.
    differences = np.array([row["bleu_minus_full"] for row in known])
    widths = np.array([np.diff(row["bleu_minus_full_interval"])[0] for row in known])
    variance = np.mean((widths / 3.92) ** 2) / len(known)
    if len(known) > 1:
        variance = max(variance, differences.var(ddof=1) / len(known))
    quantile = (
        t_quantile(0.05, len(known) - 1) if len(known) > 1 else 1.645
    )  # few seeds say little of their own spread
    low = differences.mean() - quantile * np.sqrt(variance)
    if len(known) == 1:
        return f"one seed ({low:+.1f})"  # of the instances only: it says nothing of another run
    return "yes" if low > -MARGIN else f"not shown ({low:+.1f})"


def plot(by_arm: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw BLEU against time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    points = []
    for arm, rows in by_arm.items():
        bleu, times = np.array([row["bleu"] for row in rows]), [row["time"] for row in rows if row["time"]]
        if not times:
            continue
        points.append((bleu.mean(), np.median(times), arm))
        spread = bleu.std(ddof=1) if len(bleu) > 1 else 0
        axes.errorbar(points[-1][1], bleu.mean(), yerr=spread, fmt="o", capsize=3)
    line, labels = 0.032 * np.ptp(axes.get_ylim()), []
    letter = 0.0125 * np.ptp(axes.get_xlim())
    for height, time, arm in sorted(points, reverse=True):  # labels that would overlap move apart, as little as can be
        end = time + letter * len(arm)
        for step in range(100):
            at = height + (step + 1) // 2 * (-1) ** step * line / 3
            if all(right < time or left > end or abs(at - y) >= line for y, left, right in labels):
                break
        labels.append((at, time, end))
        axes.annotate(arm, (time, at), xytext=(6, 3), textcoords="offset points", fontsize=8)
    axes.set_xlabel("time relative to plain training, scoring counted")
    axes.set_ylabel("BLEU")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
