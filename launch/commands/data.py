"""`globallocal tokenizer | prepare | verify | inspect`: everything that is done with text and datasets."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.models import OptionInfo

from data_prep.sources.choice import SOURCES, SourceOptions, choose_source
from launch.commands.options import grouped, option

if TYPE_CHECKING:
    from data_prep.engines import Engine
    from data_prep.manifest import Manifest
    from data_prep.sources.documents import TextSource


class ModelType(StrEnum):
    bpe = "bpe"
    unigram = "unigram"


class EngineName(StrEnum):
    processes = "processes"
    ray = "ray"


FILTERS, WORK = "Filters (off by default)", "Who works"


def _source_option(metavar: str, help: str) -> OptionInfo:
    return option(help, rich_help_panel="Source of the text", metavar=metavar)


SOURCE_OPTIONS = {
    "source": _source_option("NAME", "; ".join(f"{name}: {item.help}" for name, item in SOURCES.items()) + "."),
    "path": _source_option(
        "PATTERN",
        "files: a file, folder, pattern or URL (http, s3) of .txt, .jsonl (.gz, .zst) or .parquet. Repeat it for "
        "more; valid=PATTERN and test=PATTERN are held-out splits.",
    ),
    "dataset": _source_option("ID", "hub: the dataset, such as Salesforce/wikitext."),
    "config": _source_option("NAME", "hub: its configuration, if it has several."),
    "revision": _source_option("NAME", "hub: commit, tag or branch."),
    "text_column": _source_option("NAME", "jsonl, parquet, hub: the column with the text."),
    "id_column": _source_option("NAME", "jsonl, parquet, hub: a column with ids; by default file and row."),
    "separator": _source_option(
        "NAME",
        "txt: 'file', one document per file; 'blank-lines', what stands between blank lines; 'wikitext-headings', an "
        "article of a file in WikiText's form.",
    ),
    "valid_share": _source_option(
        "SHARE",
        "files, hub: hold out this part of the training documents as 'valid', such as 0.01; chosen by the hash of "
        "their text.",
    ),
    "test_share": _source_option("SHARE", "The same for 'test'."),
}

MinimumCharacters = Annotated[
    int, typer.Option(rich_help_panel=FILTERS, help="Drop shorter documents; they are counted.", metavar="N")
]
DropDuplicates = Annotated[
    bool,
    typer.Option(
        "--drop-duplicates",
        rich_help_panel=FILTERS,
        help="Keep the first of documents with equal text; the others are counted.",
    ),
]
AllowLossy = Annotated[
    bool,
    typer.Option(
        "--allow-lossy",
        rich_help_panel=FILTERS,
        help="Accept documents that decoding does not give back; they are counted.",
    ),
]
Workers = Annotated[
    int | None, typer.Option(rich_help_panel=WORK, help="Processes that encode; all cores when absent.", metavar="N")
]
EngineOption = Annotated[
    EngineName, typer.Option(rich_help_panel=WORK, help="ray: encode on the nodes of a Ray cluster.", metavar="NAME")
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=WORK, metavar="ADDRESS", help="Of the cluster; 'auto' on one of its nodes; else a local one."
    ),
]


def register(app: typer.Typer) -> None:
    app.command()(tokenizer)
    app.command()(prepare)
    app.command()(verify)
    app.command("inspect")(inspect_dataset)


@grouped(text=SOURCE_OPTIONS)
def tokenizer(
    output: Annotated[Path, typer.Option(help="The tokenizer folder to write.", metavar="FOLDER")],
    text: SourceOptions,
    vocab_size: Annotated[int, typer.Option(help="Pieces, 4 special ones and 256 bytes included.")] = 8192,
    model_type: Annotated[ModelType, typer.Option(help="unigram trains some 20 times as long.")] = ModelType.bpe,
    training_bytes: Annotated[
        int, typer.Option(help="Bytes of text to learn from, at most; of more, parts spread evenly over it.")
    ] = 100_000_000,
) -> None:
    """Train a lossless sentencepiece tokenizer, and write it in its Hugging Face form too.

    Every text decodes to itself: white space is kept, nothing is normalised, and characters outside the
    vocabulary become bytes. Only the train split is learned from. Special ids are unk 0, bos 1, eos 2, pad 3.
    The folder loads with `AutoTokenizer.from_pretrained`. A folder that holds this very tokenizer is left
    as it is.

    Examples:

        globallocal tokenizer --source sample --vocab-size 4096 --output data/tokenizer

        globallocal tokenizer --source wikitext-103 --vocab-size 32000 --output data/tokenizer

        globallocal tokenizer --source files --path 'corpus/*.jsonl.zst' --output data/tokenizer
    """
    from data_prep.errors import interruptible
    from data_prep.tokenizers.tokenizer import TokenizerSettings
    from data_prep.tokenizers.train import make_tokenizer

    source = choose_source(text)
    settings = TokenizerSettings(vocab_size, model_type.value, training_bytes)
    show_notes(source)
    with interruptible(f"{output}: nothing was written; the same command begins anew"):
        for line in make_tokenizer(source, settings, output):
            typer.echo(line)
    typer.echo(f"next: globallocal prepare --source {text.source} --tokenizer {output} --output DATASET")


@grouped(text=SOURCE_OPTIONS)
def prepare(
    tokenizer: Annotated[
        Path, typer.Option(help="A tokenizer folder, or a sentencepiece .model file of your own.", metavar="FOLDER")
    ],
    output: Annotated[
        str, typer.Option(help="The dataset folder to make, or a URL such as s3://bucket/data.", metavar="FOLDER")
    ],
    text: SourceOptions,
    minimum_characters: MinimumCharacters = 0,
    drop_duplicates: DropDuplicates = False,
    allow_lossy: AllowLossy = False,
    workers: Workers = None,
    engine: EngineOption = EngineName.processes,
    ray_address: RayAddress = None,
) -> None:
    """Turn text into a dataset folder: WebDataset shards, a manifest, the tokenizer.

    Interrupt it as you like: the same command goes on where it stopped, and ends in the same bytes, on any
    number of workers. A finished dataset is left as it is; another one is never overwritten. Text that is
    not valid UTF-8 is kept with U+FFFD in the place of the bad bytes, and counted.

    Examples:

        globallocal prepare --source wikitext-103 --tokenizer data/tokenizer --output data/wikitext-103

        globallocal prepare --source sample --tokenizer data/tokenizer --output data/sample

        globallocal prepare --source files --path 'books/*.txt' --valid-share 0.01 --tokenizer T --output D

        globallocal prepare --source files --path 's3://b/*.jsonl.zst' --path valid=v.jsonl --tokenizer T --output D
    """
    from data_prep.encode import Filters
    from data_prep.errors import interruptible
    from data_prep.prepare import finished
    from data_prep.prepare import prepare as run
    from data_prep.prepare_settings import PrepareSettings
    from data_prep.tokenizers.tokenizer import load_tokenizer
    from launch.commands.progress import PrepareReporter

    source = choose_source(text)
    settings = PrepareSettings(
        source=source,
        tokenizer=load_tokenizer(tokenizer),
        output=output,
        filters=Filters(minimum_characters, drop_duplicates, allow_lossy),
        engine=make_engine(engine, workers, ray_address),
    )
    show_notes(source)
    with interruptible(f"{output}: what is finished stays; the same command goes on from there"):
        there = finished(settings)
        if there:
            typer.echo(f"{output}: already prepared from this text with these settings; left as it is")
            manifest = there
        else:
            with PrepareReporter() as reporter:
                manifest = run(settings, reporter)
    show_prepared(manifest, output)


def show_prepared(manifest: Manifest, output: str) -> None:
    """Prints what a dataset holds, and what to do next."""
    from data_prep.verify import summary

    for line in summary(manifest):
        typer.echo(line)
    if "valid" not in manifest.splits:
        typer.echo("note: no 'valid' split to evaluate on; --path valid=PATTERN or --valid-share 0.01 makes one")
    typer.echo(f"next: globallocal inspect {output}")


def verify(
    dataset: Annotated[str, typer.Argument(help="A dataset folder, or a URL such as s3://bucket/data.")],
    quick: Annotated[bool, typer.Option("--quick", help="Sizes only; reads no shard: seconds.")] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also decode every document and encode it anew: as long as preparing.")
    ] = False,
) -> None:
    """Check a dataset, in a folder or at a URL; name every fault in one run.

    By default: manifest and index files, missing and extra files, sizes and hashes of all shards, the
    structure of each tar, counts of tokens and documents, the range of ids, eos after every document.

    Exit code 0 if the dataset is whole, 2 if not.

    Examples:

        globallocal verify data/sample

        globallocal verify s3://bucket/data --quick
    """
    from data_prep.errors import UserError, interruptible
    from data_prep.verify import verify_dataset

    if quick and deep:
        raise UserError("--quick and --deep contradict each other; choose one")
    with interruptible(f"{dataset}: nothing was changed; the same command checks it from the beginning"):
        report = verify_dataset(dataset, "deep" if deep else "quick" if quick else "full")
    if report.problems:
        raise UserError(report.problems)
    for line in report.lines:
        typer.echo(line)


def inspect_dataset(
    dataset: Annotated[str, typer.Argument(help="A dataset folder, or a URL such as s3://bucket/data.")],
    split: Annotated[str, typer.Option(help="Which split.")] = "train",
    document: Annotated[int | None, typer.Option(help="Show this document, counted from 0.")] = None,
    sample: Annotated[int | None, typer.Option(help="Show this training sample, counted from 0.")] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a training sample.")] = 512,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots and examples here.")] = None,
) -> None:
    """Look at a dataset: its text and tokens, lengths, compression, and a page with plots.

    Examples:

        globallocal inspect data/sample

        globallocal inspect data/sample --split valid --document 3

        globallocal inspect data/sample --sample 900 --sequence-length 512

        globallocal inspect s3://bucket/data --html data.html
    """
    from data_prep.errors import interruptible
    from data_prep.manifest import opened
    from data_prep.report import describe, show_document, show_sample

    nothing = f"{dataset}: nothing was changed; the same command begins anew"
    with interruptible(nothing), opened(dataset) as there:
        if document is not None:
            lines = show_document(there, split, document)
        elif sample is not None:
            lines = show_sample(there, split, sample, sequence_length)
        else:
            lines = describe(there, split)
        for line in lines:
            typer.echo(line)
        if html:
            from data_prep.page import write_page

            write_page(there, html)
            typer.echo(f"page: {html}")


def show_notes(source: TextSource) -> None:
    """Prints what a person should know before the text is read."""
    for note in source.notes:
        typer.echo(f"note: {note}")


def make_engine(name: EngineName, workers: int | None, ray_address: str | None) -> Engine:
    """Raises UserError for options that do not go together."""
    from data_prep.engines import ProcessEngine
    from data_prep.errors import UserError
    from data_prep.ray_engine import RayEngine

    if name == EngineName.ray:
        if workers is not None:
            raise UserError("--workers goes with --engine processes; with ray every CPU of the cluster works")
        return RayEngine(ray_address)
    if ray_address is not None:
        raise UserError("--ray-address goes with --engine ray")
    return ProcessEngine((os.cpu_count() or 1) if workers is None else workers)
