"""`globallocal export`: what is made of a trained model."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_prep.errors import UserError

if TYPE_CHECKING:
    from pipeline.checkpoints.folder import CheckpointState
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
    app.command()(export)


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
    onnx: Annotated[bool, typer.Option("--onnx", help="Also model.onnx, for onnxruntime; loads the model.")] = False,
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
    from pipeline.export.onnx_graph import check_installed
    from pipeline.tracking.models import publish

    if alias and not register:
        raise UserError(f"--alias {alias}: is of a version in the registry; give --register NAME too")
    if push_to_hub:
        check_repository(push_to_hub)
    if onnx:
        check_installed()
    form = Form(getattr(torch, dtype.value), shard_bytes(max_shard_size), average, push_to_hub, onnx)
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
