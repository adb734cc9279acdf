"""The `darel` command: thin, each verb one call into the package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .files import refuse_overwrite, require

app = typer.Typer(
    help="DAREL: train on the samples that still teach the model something.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(highlight=False, markup=False)  # paths and names may hold brackets
errors = Console(stderr=True, highlight=False)


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Turn errors about input into one line and exit status 1."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None


def read_table(path: Path) -> Any:
    """Read a file of samples as a [`darel_hf.nlg.tables.Table`]. Raises `ValueError` for anything else."""
    from .nlg.tables import read

    return read(path, "data", (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet"))


@app.command()
def demo(
    output_dir: Annotated[str, typer.Option(help="New folder for data, model, results and charts.")] = "demo_output",
) -> None:
    """Fine-tune a small model six ways on a generated corpus: two to four minutes, no network, no GPU."""
    with clear_errors():
        from .nlg.demo import NOTE, run_demo, table

        out.print(
            f"A small GPT-2 is warmed up, then fine-tuned with LoRA six ways; see {output_dir}/.", soft_wrap=True
        )
        results = run_demo(output_dir, progress=lambda text: out.print(f"  {text}", soft_wrap=True))
        Console(width=max(out.width, 100), highlight=False).print(table(results))
        out.print(NOTE, soft_wrap=True)
        out.print(f"Chart: {output_dir}/quality_time.png; plans: {output_dir}/*/darel/report.html", soft_wrap=True)


@app.command()
def score(
    data: Annotated[Path, typer.Argument(help="CSV, TSV, JSON (lines) or parquet, one sample a row; `-`: stdin.")],
    output: Annotated[Path, typer.Option(help="Parquet file for the scores.")] = Path("scores.parquet"),
    model: Annotated[str, typer.Option(help="Causal language model: hub name or folder.")] = "gpt2",
    prompt_column: Annotated[str | None, typer.Option(help="Column with the prompt, which is not scored.")] = None,
    target_column: Annotated[str, typer.Option(help="Column with the text that is scored.")] = "text",
    id_column: Annotated[str | None, typer.Option(help="Column with integer ids; default: row numbers.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of prompt and target together.")] = 512,
    force: Annotated[bool, typer.Option(help="Overwrite the output.")] = False,
) -> None:
    """
    Score every sample with a language model: its mean loss per token.

    The file that comes out (sample_id, loss, n_tokens) is what `darel select --scores` and
    `DarelConfig(scores=...)` take. An example: darel score trainset.csv --model gpt2 --prompt-column mr
    --target-column ref
    """
    with clear_errors():
        refuse_overwrite(output, force)
        from .nlg.task import score_table
        from .scoring import save_scores

        scores, hashes = score_table(read_table(data), model, prompt_column, target_column, id_column, max_length)
        save_scores(scores, output, hashes)
        losses = scores.losses
        blank = scores.ids[scores.n_tokens == 0]
        if len(blank):
            errors.print(
                f"{len(blank):,} samples have no token of {target_column!r} within {max_length} tokens (ids "
                f"{blank[:10].tolist()}): there is nothing in them to learn, and every rule drops them first; raise "
                "--max-length",
                markup=False,
            )
        spread = f"{losses.mean():.3f} on average, {losses.min():.3f} to {losses.max():.3f}"
        out.print(f"{len(losses):,} samples scored: loss {spread}; written to {output}")


@app.command()
def select(
    scores: Annotated[Path, typer.Option(help="Parquet file made by `darel score`.")],
    output: Annotated[Path, typer.Option(help="File for what is kept: .jsonl, .parquet or .csv.")],
    keep: Annotated[float, typer.Option(help="Fraction to keep, in (0, 1].")] = 0.8,
    rule: Annotated[str, typer.Option(help="Selection rule.")] = "middle",
    data: Annotated[Path | None, typer.Option(help="The samples; without them only ids are written.")] = None,
    id_column: Annotated[str | None, typer.Option(help="Column of the data with the ids that were scored.")] = None,
    group_column: Annotated[str | None, typer.Option(help="Column whose values all stay represented.")] = None,
    reference_scores: Annotated[Path | None, typer.Option(help="Scores by a reference model, for rho_loss.")] = None,
    length_correction: Annotated[bool, typer.Option(help="Compare losses among similar lengths.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of rules that draw at random.")] = 0,
    force: Annotated[bool, typer.Option(help="Overwrite the output.")] = False,
) -> None:
    """
    Write the kept part of a data set, or its ids, for any other tool.

    An example: darel select --scores scores.parquet --data trainset.csv --keep 0.7 --output kept.jsonl
    """
    with clear_errors():
        refuse_overwrite(output, force)
        from .config import DarelConfig
        from .data import group_numbers
        from .nlg.tables import Table, check_output
        from .nlg.task import ids_of
        from .scoring import check_rows, load_scores, match_scores
        from .selection import Selector

        check_output(output)
        remedy = "groups are read from the data; give --data"
        require(group_column is None or data is not None, "group_column", group_column, remedy)
        config = DarelConfig(
            offline_keep=keep,
            offline_rule=rule,
            reference_scores=None if reference_scores is None else str(reference_scores),
            length_correction=length_correction,
        )
        loaded, groups, reference = load_scores(scores), None, None
        table = None if data is None else read_table(data)
        if table is not None:
            ids = ids_of(table, id_column)
            remedy = f"there are {len(ids)} rows in {data}, but {len(loaded.ids)} scores; score these data"
            require(len(ids) == len(loaded.ids), "scores", str(scores), remedy)
            loaded = match_scores(loaded, ids, loaded.origin.get("data", ""), str(scores))
            check_rows(scores, ids, lambda name: table.column(name, name) if name in table.columns else None)
            if group_column is not None:
                groups = group_numbers(table.column(group_column, "group_column"))
        if reference_scores is not None:
            name, data_of = "reference_scores", loaded.origin.get("data", "")
            reference = load_scores(reference_scores, name)
            reference = match_scores(reference, loaded.ids, data_of, str(reference_scores), name).losses
        selection = Selector(config, loaded.ids, seed, reference).select_offline(loaded, groups)
        kept = loaded.ids[selection.positions]
        if table is None:
            rows = [{"sample_id": int(sample)} for sample in loaded.ids]
            table = Table(str(scores), "scores", "ids", ["sample_id"], rows, range(len(rows)))
        added = None if selection.weights is None else {"weight": selection.weights.tolist()}
        table.write(selection.positions.tolist(), output, added)
        out.print(f"{len(kept):,} of {len(loaded.ids):,} kept by {rule!r}; written to {output}")


@app.command()
def plan(
    offline_keep: Annotated[float, typer.Option(help="Fraction kept offline (alpha).")] = 1.0,
    online_keep: Annotated[float, typer.Option(help="Fraction of each candidate batch that is trained on (A).")] = 1.0,
    rescore_every: Annotated[int, typer.Option(help="Epochs from one scoring to the next (eta).")] = 1,
    budget_time: Annotated[float | None, typer.Option(help="Instead: fraction of the full time (t).")] = None,
    budget_spend: Annotated[
        str, typer.Option(help="'time', or 'quality': more epochs in what is left of it.")
    ] = "time",
    budget_method: Annotated[str, typer.Option(help="'measured' (our cost model) or 'paper'.")] = "measured",
    epochs: Annotated[float, typer.Option(help="Epochs of training.")] = 5,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 8,
    samples: Annotated[int, typer.Option(help="Samples of the training set.")] = 42061,
    forward_share: Annotated[float, typer.Option(help="Scoring a row relative to training on it (f).")] = 0.5,
    offline_share: Annotated[float, typer.Option(help="The same in the offline pass (c * f).")] = 0.3,
    unpad_share: Annotated[float, typer.Option(help="A step with unpad=True relative to a padded one (q).")] = 1.0,
    offline_rule: Annotated[str, typer.Option(help="One that reads losses needs an offline pass.")] = "random",
    online_rule: Annotated[str, typer.Option(help="Likewise: with random, f is 0.")] = "random",
    saved_scores: Annotated[bool, typer.Option(help="There is no offline pass to pay for.")] = False,
    one_forward: Annotated[bool, typer.Option(help="One forward pass scores and trains (sliced).")] = False,
) -> None:
    """
    Show what a setting, or a time budget, is predicted to cost, before anything runs.

    The shares say what scoring and steps without padding cost on your machine: scoring takes half a step with LoRA, a
    third with full fine-tuning, steps without padding what your texts leave; every run prints those that it measured.
    """
    with clear_errors():
        from .budget import Costs, Plan, budget_plan
        from .config import BACKWARDS, DarelConfig

        config = DarelConfig(
            offline_keep=offline_keep,
            online_keep=online_keep,
            rescore_every=rescore_every,
            budget_time=budget_time,
            budget_spend=budget_spend,
            budget_method=budget_method,
            offline_rule=offline_rule,
            online_rule=online_rule,
            online_backward=BACKWARDS[one_forward],
            reference_scores="of some file",  # for the rules that need them; they cost the run nothing
        )
        for name, value in (("epochs", epochs), ("batch_size", batch_size), ("samples", samples)):
            require(value > 0, name, value, "give a positive number")
        for name, value in (("forward_share", forward_share), ("offline_share", offline_share)):
            require(0 <= value <= 1, name, value, "give a fraction in [0, 1]")
        require(0 < unpad_share <= 1, "unpad_share", unpad_share, "give a fraction in (0, 1]; 1: padded")
        forward_share = forward_share if config.rule("online").reads_losses else 0.0
        factors = {"unpad": unpad_share} if unpad_share < 1 else {}
        costs = Costs(float("nan"), forward_share, offline_share, False, one_forward=one_forward, factors=factors)
        free = saved_scores or not config.rule("offline").reads_losses
        made = Plan.of(config, batch_size=batch_size, epochs=epochs, samples=samples, costs=costs, scores_free=free)
        made = budget_plan(made, config) if config.has_budget else made
        made.check()
        out.print(str(made))
        if made.predicted_saving <= 0 and made.more <= 1:
            errors.print("no saving is predicted: scoring costs more than the dropped rows save")


@app.command()
def compare(
    recipe: Annotated[Path, typer.Argument(help="YAML file of settings; `train.py` beside it trains by it.")],
    metric: Annotated[str, typer.Option(help="A number of the recipe's results.json: bleu, accuracy, test_loss.")],
    arms: Annotated[
        list[str] | None,
        typer.Option(help="plain, fewer_epochs, random, fast, darel, recipe; name:key=value,key=value; a YAML file."),
    ] = None,
    budget: Annotated[float, typer.Option(help="Fraction of the plain training time, for arms that have one.")] = 0.5,
    seeds: Annotated[int, typer.Option(help="How many, from the recipe's seed on.")] = 3,
    first_seed: Annotated[int | None, typer.Option(help="The first, in place of the recipe's.")] = None,
    margin: Annotated[float | None, typer.Option(help="Loss of the metric that still counts as no worse.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value on top of the recipe, for all arms; several times.")
    ] = None,
    lower_is_better: Annotated[
        bool | None, typer.Option("--lower-is-better/--higher-is-better", help="Default: by the metric's name.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "--output_dir", help="Default: outputs/compare_RECIPE.")
    ] = None,
    script: Annotated[Path | None, typer.Option(help="What trains by the recipe, if not its `train.py`.")] = None,
    launch: Annotated[str | None, typer.Option(help="Before the script: 'accelerate launch ...'.")] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time; several slow each other down.")] = 1,
    retry: Annotated[bool, typer.Option(help="Run those that failed once more.")] = False,
) -> None:
    """
    Is it worth it on your data? Compare ways of training by a recipe: quality against time, with intervals and advice.

    A call that was stopped goes on where it was when it is given again; more --seeds or --arms are added. An example:
    darel compare recipes/e2e_nlg/gpt2_small.yaml --metric bleu --margin 1 --set data_dir=FOLDER
    """
    with clear_errors():
        from .comparison import compare_recipe, parse_arms, parse_setting

        folder = output_dir or Path("outputs") / f"compare_{recipe.stem}"
        named = parse_arms(arms or ["plain,fewer_epochs,random,fast,darel"])
        made = compare_recipe(
            recipe,
            named,
            seeds,
            output_dir=folder,
            metric=metric,
            script=script,
            settings=dict(map(parse_setting, settings or [])),
            first_seed=first_seed,
            launch=launch,
            budget=budget,
            margin=margin,
            lower_is_better=lower_is_better,
            jobs=jobs,
            retry=retry,
            tell=lambda line: out.print(line, soft_wrap=True),
        )
        out.print(f"\n{made}\n", soft_wrap=True)
        out.print(f"Page, chart and data: {folder}/comparison.html, .md, .png, .json", soft_wrap=True)
        if not any(row.scores for row in made.rows):
            raise typer.Exit(1)


@app.command("eval")
def evaluate(
    files: Annotated[list[str] | None, typer.Argument(help="More systems, as after --systems.")] = None,
    references: Annotated[str, typer.Option(help="CSV, TSV, JSON (lines), text, WebNLG, DART; `-`: stdin.")] = ...,
    predictions: Annotated[str | None, typer.Option(help="CSV, TSV, JSON (lines), or one text a line.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Another system's predictions, for paired tests.")] = None,
    systems: Annotated[
        list[str] | None, typer.Option(help="Several systems: a.txt b.txt 'c-*.txt' (quoted: runs of one system).")
    ] = None,
    protocol: Annotated[str, typer.Option(help="'e2e' (the challenge's), 'lora' (its -p), 'paper' (nltk).")] = "e2e",
    only: Annotated[str | None, typer.Option(help="These scores alone, with commas between: bleu,ter")] = None,
    bootstrap: Annotated[int, typer.Option(help="Resamples for intervals and tests; 0 for none.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the resampling.")] = 12345,
    format: Annotated[str, typer.Option(help="text, markdown, latex, json or csv.")] = "text",
    output: Annotated[Path | None, typer.Option(help="JSON file for the scores.")] = None,
    per_instance: Annotated[Path | None, typer.Option(help="JSON lines: every score of every instance.")] = None,
    html: Annotated[Path | None, typer.Option(help="A page: where two systems differ most.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column or key of the predictions.")] = None,
    reference_column: Annotated[str | None, typer.Option(help="Column or key of the references.")] = None,
    mr_column: Annotated[str | None, typer.Option(help="Column or key of the meaning representations.")] = None,
    extra: Annotated[list[str] | None, typer.Option(help="Modules of Hugging Face evaluate: bertscore.")] = None,
    slot_rules: Annotated[
        Path | None, typer.Option(help="YAML rules for the slot error rate; default: E2E's.")
    ] = None,
    wordnet: Annotated[str | None, typer.Option(help="Folder with WordNet; 'none': exact and stems only.")] = None,
    meteor_jar: Annotated[
        Path | None, typer.Option("--meteor-jar", "--meteor_jar", help="meteor-1.5.jar, run by Java.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Overwrite the outputs.")] = False,
) -> None:
    """
    Score generated text: BLEU, TER, METEOR, NIST, ROUGE-L, CIDEr, chrF, slot errors, with 95 % confidence intervals.

    Examples: darel eval --predictions predictions.txt --references testset_w_refs.csv --output scores.json

    darel eval --systems baseline.txt 'ours-*.txt' --references testset_w_refs.csv --format latex
    """
    with clear_errors():
        from .nlg.evaluation import Request, run

        request = Request(
            systems=[*(systems or []), *(files or [])],
            predictions=predictions,
            baseline=baseline,
            references=references,
            protocol=protocol,
            only=only,
            bootstrap=bootstrap,
            seed=seed,
            form=format,
            output=output,
            per_instance=per_instance,
            html=html,
            text_column=text_column,
            reference_column=reference_column,
            mr_column=mr_column,
            extra=extra or [],
            slot_rules=slot_rules,
            wordnet=wordnet,
            meteor_jar=meteor_jar,
            force=force,
        )
        run(request, out, errors)


if __name__ == "__main__":
    app()
