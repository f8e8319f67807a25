"""`globallocal evaluate | export`: what is made of a trained model."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_prep.errors import UserError

if TYPE_CHECKING:
    from pipeline.checkpoints.folder import CheckpointState
    from pipeline.evaluation.figures import HeldOut
    from pipeline.evaluation.held_out import HeldOutText
    from pipeline.tracking.models import Publication

ModelPath = Annotated[
    Path,
    typer.Argument(help="A run folder (its newest verified checkpoint is taken), a checkpoint, or an exported folder."),
]


UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


def register(app: typer.Typer) -> None:
    app.command()(evaluate)
    app.command()(export)


def evaluate(
    path: ModelPath,
    dataset: Annotated[
        str | None, typer.Option(help="Folder or URL of a prepared dataset; what was trained on when absent.")
    ] = None,
    split: Annotated[str, typer.Option(help="Which of its splits.")] = "valid",
    sequence_length: Annotated[
        int | None, typer.Option(min=1, max=2**31 - 1, help="Tokens per sample; that of training when absent.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=65536, help="Samples at once.")] = 8,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Only the first so many samples.")] = None,
) -> None:
    """Measure held-out loss, token and word perplexity and bits per byte.

    Examples:

        globallocal evaluate runs/quickstart

        globallocal evaluate runs/quickstart/export --dataset data/quickstart --split test
    """
    from data_prep.manifest import hash_file
    from pipeline.config import validate
    from pipeline.data.corpus import open_corpus
    from pipeline.evaluation.held_out import HeldOutText, held_out
    from pipeline.export.load import best_device, load_model
    from pipeline.settings.sections import DataSection

    loaded = load_model(path)
    if dataset is not None:
        data = DataSection(dataset=dataset)
    elif loaded.state is not None:
        data = validate(loaded.state.config, "the checkpoint's state.json").data
    else:
        raise UserError(f"{path}: an exported model does not name its dataset; give --dataset")
    corpus = open_corpus(data)
    own_model = loaded.tokenizer_folder / "tokenizer.model"
    own = hash_file(own_model) if own_model.is_file() else "unknown"
    if corpus.tokenizer.sha256 != own:
        raise UserError(
            f"{dataset}: its tokenizer is {corpus.tokenizer.sha256[:16]}…, the model's is {own[:16]}…; "
            "evaluate on a dataset of the model's tokenizer"
        )
    length = sequence_length or loaded.model.config.max_position_embeddings
    tokens = max((part.dataset.split(split).tokens for part in corpus.parts), default=0)
    if sequence_length and length >= tokens > 1:
        raise UserError(
            f"--sequence-length {length:,} is longer than split {split}, {tokens:,} tokens; give {tokens - 1:,} or less"
        )
    batch_size = min(batch_size, max_samples or batch_size, -(-tokens // length))  # no padding beyond the split
    device = best_device()
    text = HeldOutText(corpus, split, length, batch_size, max_samples)
    show_result(held_out(loaded.model.to(device), text, device), text)


def show_result(result: HeldOut, text: HeldOutText) -> None:
    """Prints an evaluation: what was read, the loss and the perplexities."""
    for part in text.corpus.parts:
        info = part.dataset.manifest.splits[text.split]
        typer.echo(
            f"{part.location}, split {text.split}: {info.words + info.lines:,} words and line ends, "
            f"{info.source_bytes:,} bytes in the split"
        )
        if part.name in result.by_dataset:
            own = result.by_dataset[part.name].loss
            typer.echo(f"  its own loss {own:.4f}, a share of {float(part.share):.4g}")
    total = result.total
    typer.echo(f"{total.tokens:,.0f} target tokens, sequence length {text.sequence_length}")
    typer.echo(f"loss              {total.loss:.4f} nats per token")
    typer.echo(f"token perplexity  {total.token_perplexity:.2f}")
    typer.echo(f"word perplexity   {total.word_perplexity:.2f}")
    typer.echo(f"bits per byte     {total.bits_per_byte:.4f}")


def export(
    path: ModelPath,
    output: Annotated[Path, typer.Option(help="The folder to make; it must not exist.")],
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights written.")] = Dtype.float32,
    max_shard_size: Annotated[
        str, typer.Option(help="Of one file of weights, such as 500MB; as much memory is needed.")
    ] = "5GB",
    average: Annotated[
        int, typer.Option(min=1, max=1000, help="The mean of the weights of so many of the run's newest checkpoints.")
    ] = 1,
    push_to_hub: Annotated[
        str | None,
        typer.Option(help="USER/NAME on the Hugging Face hub; made private where there is none. Takes HF_TOKEN."),
    ] = None,
    register: Annotated[str | None, typer.Option(help="Name in MLflow's model registry; a version is added.")] = None,
    alias: Annotated[str | None, typer.Option(help="Alias of that version, such as champion.")] = None,
) -> None:
    """Write a Hugging Face folder, reload it in a fresh process, and publish it only if it is the same model.

    MLflow, where it knows the run, lists the export as a model of the run and its step.

    Examples:

        globallocal export runs/quickstart --output runs/quickstart/export --register quickstart --alias champion

        globallocal export runs/quickstart --output mean --average 3 --dtype bfloat16 --push-to-hub me/quickstart
    """
    import torch

    from pipeline.export.hub import check_repository, push
    from pipeline.export.hugging_face import Form
    from pipeline.export.hugging_face import export as write_export
    from pipeline.tracking.models import publish

    if alias and not register:
        raise UserError(f"--alias {alias}: is of a version in the registry; give --register NAME too")
    if push_to_hub:
        check_repository(push_to_hub)
    form = Form(getattr(torch, dtype.value), shard_bytes(max_shard_size), average, push_to_hub)
    state = write_export(path, output, form)
    mean = f"the mean of {average} checkpoints up to " if average > 1 else ""
    typer.echo(f"{output}: {mean}step {state.step:,} of {path}, reloaded and verified")
    if push_to_hub:
        typer.echo(f"hub: {push(output, push_to_hub)}")
    publication = publication_of(state, output, register, alias)
    if publication is None:
        if register:
            raise UserError(f"--register {register}: MLflow knows no run of {path}; train with tracking.enabled=true")
        return
    try:
        typer.echo(f"MLflow: {publish(publication)}")
    except UserError as error:
        if register:
            raise
        typer.echo(f"warning: {error}", err=True)


def shard_bytes(size: str) -> int:
    """`500MB`, as the hub's own programs read it, → 500,000,000."""
    found = re.fullmatch(r"(\d{1,6}) ?(KB|MB|GB|TB)", size.strip().upper())
    count = int(found[1]) * UNITS[found[2]] if found else 0
    if count < UNITS["MB"]:
        raise UserError(f"--max-shard-size {size}: write a number and a unit, such as 500MB or 5GB, at least 1MB")
    return count


def publication_of(state: CheckpointState, output: Path, register: str | None, alias: str | None) -> Publication | None:
    """What MLflow is told of an export; None where it knows no run of the checkpoint."""
    from pipeline.config import validate
    from pipeline.tracking.models import Publication
    from pipeline.tracking.shipping import Delivery
    from pipeline.tracking.store import tracking_uri

    config = validate(state.config, "the checkpoint's state.json")
    delivery = Delivery.load(config.run_folder / "tracking" / "delivery.json")
    if not (config.tracking.enabled and delivery and delivery.run_id and delivery.experiment_id):
        return None
    return Publication(
        uri=tracking_uri(config.tracking.uri or (delivery.store if "***" not in delivery.store else None)),
        experiment_id=delivery.experiment_id,
        run_id=delivery.run_id,
        folder=str(output.absolute()),
        name=f"{config.run.name}-step-{state.step}",
        step=state.step,
        metrics=state.evaluation.held_out.metrics() if state.evaluation else {},
        register=register,
        alias=alias,
    )
