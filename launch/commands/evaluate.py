"""`globallocal evaluate`: how good a model is, on held-out text and on tasks."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_prep.errors import UserError
from launch.commands.model import ModelPath
from launch.commands.options import grouped, option
from launch.evaluation.options import OutputOptions, TaskOptions, TextOptions, check_together

if TYPE_CHECKING:
    from launch.evaluation.measurement import Measurement
    from pipeline.data.corpus import Corpus
    from pipeline.export.load import Loaded

READ, TASKS, OUTPUT = "How text is read", "Tasks of lm-evaluation-harness", "Where the figures go"
TEXT_OPTIONS = {
    "split": option("Which split of the datasets.", rich_help_panel=READ),
    "window": option(
        "blocks: side by side, as in training. sliding: overlapping, so that each token has more text before it; "
        "better figures, in more time.",
        rich_help_panel=READ,
    ),
    "stride": option(
        "Tokens that a sliding window goes on by; half its length when absent.", min=1, rich_help_panel=READ
    ),
    "sequence_length": option(
        "Tokens per window; that of training when absent.", min=1, max=2**31 - 1, rich_help_panel=READ
    ),
    "max_samples": option(
        "Only the first so many windows of each dataset, or examples of each task.", min=1, rich_help_panel=READ
    ),
    "batch_size": option("Windows, or examples, at once.", min=1, max=65536, rich_help_panel=READ),
    "by_position": typer.Option(
        "--by-position",
        help="Also the loss by position in the window, and of what is repeated and what is new in it.",
        rich_help_panel=READ,
    ),
}
TASK_OPTIONS = {
    "tasks": option("Tasks in place of datasets, such as hellaswag,arc_easy.", rich_help_panel=TASKS),
    "task_folder": option("A folder with tasks of your own, as YAML.", rich_help_panel=TASKS),
    "few_shot": option("Examples in front of each; the task's own number when absent.", min=0, rich_help_panel=TASKS),
}
OUTPUT_OPTIONS = {
    "json": option("Write JSON; - prints it in place of the table.", metavar="FILE", rich_help_panel=OUTPUT),
    "picture": option("Draw what --by-position finds: .png, .svg or .pdf.", metavar="FILE", rich_help_panel=OUTPUT),
    "record": typer.Option("--record", help="Also tell the MLflow run that trained the model.", rich_help_panel=OUTPUT),
}


def register(app: typer.Typer) -> None:
    app.command()(evaluate)


@grouped(text=TEXT_OPTIONS, tasks=TASK_OPTIONS, output=OUTPUT_OPTIONS)
def evaluate(
    path: ModelPath,
    text: TextOptions,
    tasks: TaskOptions,
    output: OutputOptions,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="Folder or URL of a prepared dataset; repeat it for more. What was trained on when absent."),
    ] = None,
) -> None:
    """Measure a model: held-out loss, perplexity per token and word, bits per byte; or tasks of lm-evaluation-harness.

    Of a mixture each dataset is measured, and the mixture as trained on.

    Examples:

        globallocal evaluate runs/quickstart

        globallocal evaluate runs/quickstart/export --dataset data/quickstart --split test --window sliding --stride 64

        globallocal evaluate runs/quickstart --by-position --picture positions.png --json -

        globallocal evaluate runs/quickstart --tasks hellaswag,arc_easy
    """
    from launch.evaluation import harness, recording

    datasets = dataset or []
    check_together(datasets, text, tasks, output)
    if tasks.names:
        harness.prepare()

    from pipeline.export.load import best_device, load_model

    loaded = load_model(path)
    run = recording.run_of(loaded, path) if output.record else None
    found = (
        harness.run_tasks(loaded, path, tasks, text, best_device())
        if tasks.names
        else measure_text(loaded, path, datasets, text, best_device())
    )
    show(found, output)
    if run:
        recording.record(run, found, lambda line: typer.echo(line, err=True))


def measure_text(loaded: Loaded, path: Path, datasets: Sequence[str], options: TextOptions, device: Any) -> Measurement:
    """The model on every dataset, with progress."""
    from launch.commands.progress import EvaluationReporter
    from launch.evaluation.measurement import Measurement
    from pipeline.evaluation.held_out import HeldOutText
    from pipeline.evaluation.measured import as_mixed, measure, num_targets

    corpus = corpus_of(loaded, path, datasets)
    reading = options.reading(loaded.model.config.max_position_embeddings)
    length, stride = reading.sequence_length, reading.stride
    tokens = max((part.dataset.split(reading.split).tokens for part in corpus.parts), default=0)
    if options.sequence_length and length >= tokens > 1:
        raise UserError(
            f"--sequence-length {length:,} is longer than split {reading.split}, {tokens:,} tokens; "
            f"give {tokens - 1:,} or less"
        )
    # No padding beyond the split.
    batch_size = min(options.batch_size, reading.max_samples or options.batch_size, -(-tokens // stride))
    text = HeldOutText(corpus, reading.split, length, batch_size, reading.max_samples, stride)
    begin = time.monotonic()
    with EvaluationReporter({part.name: num_targets(text, part) for part in corpus.parts}) as told:
        found = measure(loaded.model.to(device), text, device, options.by_position, told)
    mixed = as_mixed(found, reading.split) if len(found) > 1 and not datasets else None
    step = loaded.state.step if loaded.state else None
    return Measurement(str(path), step, reading, found, mixed, time.monotonic() - begin)


def corpus_of(loaded: Loaded, path: Path, datasets: Sequence[str]) -> Corpus:
    """The datasets that were named, else what the model was trained on.

    Raises:
        UserError: of another tokenizer than the model's; none is known.
    """
    from data_prep.hashing import hash_file
    from pipeline.config import validate
    from pipeline.data.corpus import open_corpus
    from pipeline.settings.sections import DataSection, MixturePart

    if len(datasets) == 1:
        data = DataSection(dataset=datasets[0])
    elif datasets:
        data = DataSection(dataset=[MixturePart(dataset=item, weight=1) for item in datasets])
    elif loaded.state is not None:
        data = validate(loaded.state.config, "the checkpoint's state.json").data
    else:
        raise UserError(f"{path}: an exported model does not name its dataset; give --dataset")
    try:
        corpus = open_corpus(data)
    except UserError as error:
        if not datasets:
            raise
        raise UserError([problem.replace("data.dataset: ", "--dataset ") for problem in error.problems]) from None
    own_model = loaded.tokenizer_folder / "tokenizer.model"
    own = hash_file(own_model) if own_model.is_file() else "unknown"
    if (given := corpus.tokenizer.sha256) != own:
        raise UserError(
            f"{corpus.parts[0].location}: its tokenizer is {given[:16]}…, the model's is {own[:16]}…; "
            "evaluate on a dataset of the model's tokenizer"
        )
    return corpus


def show(found: Any, output: OutputOptions) -> None:
    """Table, JSON and picture of what was found."""
    from rich.console import Console

    from data_prep.store import explained_write_errors, publish_file
    from launch.evaluation.measurement import WIDTH
    from launch.evaluation.picture import draw, kind_of
    from pipeline.tracking.journal import jsonable

    def write(file: Path, content: bytes) -> None:
        with explained_write_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            publish_file(file, content)
        typer.echo(f"{file}: written", err=True)

    text = json.dumps(jsonable(found.as_json()), indent=2, ensure_ascii=False) + "\n"
    if str(output.json) == "-":
        typer.echo(text, nl=False)
    else:
        console = Console()
        found.show(console if console.is_terminal else Console(width=WIDTH))
        if output.json:
            write(output.json, text.encode())
    if output.picture:
        kind = kind_of(output.picture)
        assert kind
        write(output.picture, draw(found.datasets, str(found.reading), kind))
