"""`globallocal tokenizer | prepare | verify | inspect`: everything that is done with text and datasets."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from data_prep.documents import Source
    from data_prep.engines import Engine


class SourceName(StrEnum):
    sample = "sample"
    files = "files"
    wikitext = "wikitext-103"
    hub = "hub"


class Separator(StrEnum):
    file = "file"
    blank_lines = "blank-lines"
    wikitext_headings = "wikitext-headings"


class ModelType(StrEnum):
    bpe = "bpe"
    unigram = "unigram"


class EngineName(StrEnum):
    processes = "processes"
    ray = "ray"


SOURCE, FILTERS, WORK = "Source of the text", "Filters (off by default)", "Who works"

SourceOption = Annotated[
    SourceName,
    typer.Option(
        rich_help_panel=SOURCE,
        metavar="NAME",
        help="sample: 106 Wikipedia articles that come with the installation. files: your own text (--path). "
        "wikitext-103: from the Hugging Face hub. hub: any dataset there (--dataset).",
    ),
]
PathOption = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=SOURCE,
        metavar="PATTERN",
        help="files: a file, folder, pattern or URL (http, s3) of .txt, .jsonl (.gz, .zst) or .parquet. Repeat it for "
        "more; valid=PATTERN and test=PATTERN are held-out splits.",
    ),
]
DatasetOption = Annotated[
    str | None,
    typer.Option(rich_help_panel=SOURCE, metavar="ID", help="hub: the dataset, such as Salesforce/wikitext."),
]
ConfigOption = Annotated[
    str | None, typer.Option(rich_help_panel=SOURCE, metavar="NAME", help="hub: its configuration, if it has several.")
]
RevisionOption = Annotated[
    str | None, typer.Option(rich_help_panel=SOURCE, metavar="NAME", help="hub: commit, tag or branch.")
]
TextColumnOption = Annotated[
    str, typer.Option(rich_help_panel=SOURCE, metavar="NAME", help="jsonl, parquet, hub: the column with the text.")
]
IdColumnOption = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=SOURCE, metavar="NAME", help="jsonl, parquet, hub: a column with ids; by default file and row."
    ),
]
SeparatorOption = Annotated[
    Separator,
    typer.Option(
        rich_help_panel=SOURCE,
        metavar="NAME",
        help="txt: 'file', a document a file; 'blank-lines', what stands between blank lines; 'wikitext-headings', an "
        "article of a file in WikiText's form.",
    ),
]
ValidShareOption = Annotated[
    float,
    typer.Option(
        rich_help_panel=SOURCE,
        metavar="SHARE",
        help="files, hub: hold out this part of the training documents as 'valid', such as 0.01; chosen by the hash of "
        "their text.",
    ),
]
TestShareOption = Annotated[float, typer.Option(rich_help_panel=SOURCE, metavar="SHARE", help="The same for 'test'.")]


def register(app: typer.Typer) -> None:
    app.command()(tokenizer)
    app.command()(prepare)
    app.command()(verify)
    app.command("inspect")(inspect_dataset)


def tokenizer(
    output: Annotated[Path, typer.Option(help="The tokenizer folder to write.", metavar="FOLDER")],
    source: SourceOption = SourceName.sample,
    vocab_size: Annotated[int, typer.Option(help="Pieces, 4 special ones and 256 bytes included.")] = 8192,
    model_type: Annotated[ModelType, typer.Option(help="unigram trains some 20 times as long.")] = ModelType.bpe,
    training_bytes: Annotated[
        int, typer.Option(help="Bytes of text to learn from, at most; the first of the train split.")
    ] = 100_000_000,
    path: PathOption = None,
    dataset: DatasetOption = None,
    config: ConfigOption = None,
    revision: RevisionOption = None,
    text_column: TextColumnOption = "text",
    id_column: IdColumnOption = None,
    separator: SeparatorOption = Separator.file,
    valid_share: ValidShareOption = 0.0,
    test_share: TestShareOption = 0.0,
) -> None:
    """Train a lossless sentencepiece tokenizer, and write it with its Hugging Face twin.

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
    from data_prep.tokenizer import TokenizerSettings
    from data_prep.train_tokenizer import make_tokenizer

    text = make_source(
        source, path, dataset, config, revision, text_column, id_column, separator, valid_share, test_share
    )
    settings = TokenizerSettings(vocab_size, model_type.value, training_bytes)
    show_notes(text)
    with interruptible(f"{output}: nothing was written; the same command begins anew"):
        for line in make_tokenizer(text, settings, output):
            typer.echo(line)
    typer.echo(f"next: globallocal prepare --source {source.value} --tokenizer {output} --output DATASET")


def prepare(
    tokenizer: Annotated[
        Path, typer.Option(help="A tokenizer folder, or a sentencepiece .model file of your own.", metavar="FOLDER")
    ],
    output: Annotated[
        str, typer.Option(help="The dataset folder to make, or a URL such as s3://bucket/data.", metavar="FOLDER")
    ],
    source: SourceOption = SourceName.sample,
    path: PathOption = None,
    dataset: DatasetOption = None,
    config: ConfigOption = None,
    revision: RevisionOption = None,
    text_column: TextColumnOption = "text",
    id_column: IdColumnOption = None,
    separator: SeparatorOption = Separator.file,
    valid_share: ValidShareOption = 0.0,
    test_share: TestShareOption = 0.0,
    minimum_characters: Annotated[
        int,
        typer.Option(rich_help_panel=FILTERS, help="Drop shorter documents; they are counted.", metavar="N"),
    ] = 0,
    drop_duplicates: Annotated[
        bool,
        typer.Option(
            "--drop-duplicates",
            rich_help_panel=FILTERS,
            help="Keep the first of documents with equal text; the others are counted.",
        ),
    ] = False,
    allow_lossy: Annotated[
        bool,
        typer.Option(
            "--allow-lossy",
            rich_help_panel=FILTERS,
            help="Accept documents that decoding does not give back; they are counted.",
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(rich_help_panel=WORK, help="Processes that encode; all cores when absent.", metavar="N"),
    ] = None,
    engine: Annotated[
        EngineName,
        typer.Option(rich_help_panel=WORK, help="ray: encode on the nodes of a Ray cluster.", metavar="NAME"),
    ] = EngineName.processes,
    ray_address: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=WORK,
            metavar="ADDRESS",
            help="Of the cluster; 'auto' on one of its nodes; else a local one.",
        ),
    ] = None,
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
    from data_prep.prepare import PrepareSettings, finished
    from data_prep.prepare import prepare as run
    from data_prep.tokenizer import load_tokenizer
    from data_prep.verify import summary
    from launch.commands.progress import PrepareReporter

    text = make_source(
        source, path, dataset, config, revision, text_column, id_column, separator, valid_share, test_share
    )
    settings = PrepareSettings(
        source=text,
        tokenizer=load_tokenizer(tokenizer),
        output=output,
        filters=Filters(minimum_characters, drop_duplicates, allow_lossy),
        engine=make_engine(engine, workers, ray_address),
    )
    show_notes(text)
    with interruptible(f"{output}: what is finished stays; the same command goes on from there"):
        there = finished(settings)
        if there:
            typer.echo(f"{output}: already prepared from this text with these settings; left as it is")
            manifest = there
        else:
            with PrepareReporter() as reporter:
                manifest = run(settings, reporter)
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


def show_notes(source: Source) -> None:
    """What a person should know before the text is read."""
    for note in source.notes:
        typer.echo(f"note: {note}")


def make_source(
    source: SourceName,
    path: list[str] | None,
    dataset: str | None,
    config: str | None,
    revision: str | None,
    text_column: str,
    id_column: str | None,
    separator: Separator,
    valid_share: float,
    test_share: float,
) -> Source:
    """The source that the options name. Raises UserError for options that do not go with it."""
    from data_prep.documents import SampleSource
    from data_prep.errors import UserError
    from data_prep.files import FilesSettings, FilesSource
    from data_prep.hub import HubSettings, HubSource, WikitextSource

    problems = []
    if path and source != SourceName.files:
        problems.append(f"--path goes with --source files, not with {source.value}")
    if (dataset or config or revision) and source != SourceName.hub:
        problems.append(f"--dataset, --config and --revision go with --source hub, not with {source.value}")
    if (valid_share or test_share) and source in (SourceName.sample, SourceName.wikitext):
        problems.append(f"--valid-share and --test-share: {source.value} has held-out splits of its own")
    if source == SourceName.hub and not dataset:
        problems.append("--source hub needs --dataset ID, such as --dataset Salesforce/wikitext")
    if problems:
        raise UserError(problems)
    if source == SourceName.sample:
        return SampleSource()
    if source == SourceName.wikitext:
        return WikitextSource()
    if source == SourceName.hub:
        return HubSource(HubSettings(dataset or "", config, revision, text_column, id_column, valid_share, test_share))
    settings = FilesSettings(
        paths_by_split(path or []), text_column, id_column, separator.value, valid_share, test_share
    )
    return FilesSource(settings)


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


def paths_by_split(paths: list[str]) -> dict[str, list[str]]:
    """`valid=PATTERN` belongs to valid, `PATTERN` to train."""
    splits: dict[str, list[str]] = {}
    for path in paths:
        split, equals, pattern = path.partition("=")
        if equals and not os.path.lexists(path) and split in ("train", "valid", "test"):
            splits.setdefault(split, []).append(pattern)
        else:
            splits.setdefault("train", []).append(path)
    return splits
