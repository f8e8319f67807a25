"""What a run tells its tracker: of itself at each start, and of its checkpoints."""

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from model.configuration_globallocal import GlobalLocalConfig
from pipeline.checkpoints.resume import Resumed
from pipeline.checkpoints.saver import Saved
from pipeline.config import RunConfig, flatten
from pipeline.context import RunContext
from pipeline.data.corpus import Corpus
from pipeline.evaluation.figures import Evaluation, loss_at
from pipeline.metrics.utilisation import device_name
from pipeline.redact import redact
from pipeline.tracking.facts import DatasetUse, RunFacts, Sizes
from pipeline.tracking.history import CHECKPOINTS_TABLE
from pipeline.tracking.opening import open_tracker
from pipeline.tracking.restarts import restart_tags
from pipeline.tracking.tracker import NullTracker

log = logging.getLogger("globallocal")


def start_tracker(context: RunContext, resumed: Resumed) -> NullTracker:
    """The tracker of this rank; only rank 0's records anything."""
    config = context.config
    if not context.world.is_main:
        return NullTracker()
    # Another run's checkpoint is where this one begins; its MLflow run stays its own.
    own = resumed.folder is None or resumed.folder.parent.absolute() == config.checkpoints.absolute()
    facts = describe_run(context, resumed.state.step, _parent(resumed, own) | _origin(resumed))
    return open_tracker(config.tracking, config.run_folder, facts, resumed.mlflow_run_id if own else None, log.info)


def _parent(resumed: Resumed, own: bool) -> dict[str, str]:
    if own:
        return {}
    parent = {"mlflow.parentRunId": resumed.mlflow_run_id} if resumed.mlflow_run_id else {}
    return {"globallocal.begins_from": str(resumed.folder), **parent}


def _origin(resumed: Resumed) -> dict[str, str]:
    """Of a run that began with an exported model's weights."""
    origin = resumed.state.begun_from
    if origin is None:
        return {}
    return {"globallocal.init_from": origin.folder, "globallocal.init_from_sha256": " ".join(origin.sha256.values())}


def describe_run(context: RunContext, step: int, tags: dict[str, str]) -> RunFacts:
    config, corpus, model = context.config, context.corpus, context.model
    sizes = Sizes(
        max_steps=context.steps,
        tokens_per_step=context.tokens_per_step,
        warmup_tokens=tuple((steps, size * config.data.sequence_length) for steps, size in config.training.warmup),
        flops_per_token=model.flops_per_token(config.data.sequence_length),
        parameters=sum(model.parameter_counts().values()),
        ranks=context.world.size,
        device=device_name(context.world.device),
        precision=context.precision,
        zero_stage=context.stage,
    )
    deepspeed = redact(context.deepspeed)
    settings = redact(config.model_dump(mode="json"))
    return RunFacts(
        name=config.run.name,
        params=flatten(settings) | model_params(model, sizes) | flatten(deepspeed, "deepspeed."),
        tags={"dataset_id": corpus.dataset_id} | tags | restart_tags(config.run_folder),
        datasets=list(_datasets(config, corpus)),
        texts={
            "config/config.yaml": OmegaConf.to_yaml(OmegaConf.create(settings)),
            "config/deepspeed.json": json.dumps(deepspeed, indent=2) + "\n",
            "config/model.json": json.dumps(model_settings(model), indent=2) + "\n",
        },
        sizes=sizes,
        model=config.model.preset,
        about=_about(config, corpus, model, sizes),
        step=step,
    )


def model_settings(model: GlobalLocalConfig) -> dict[str, Any]:
    """The model's own settings with their real numbers, whatever the preset left open."""
    names = [name for name in type(model).__annotations__ if name != "model_type"]
    return {name: getattr(model, name) for name in names}


def model_params(model: GlobalLocalConfig, sizes: Sizes) -> dict[str, Any]:
    return {
        **{f"model.{name}": value for name, value in model_settings(model).items()},
        "model.parameters": sizes.parameters,
        "flops_per_token": f"{sizes.flops_per_token:.6g}",
        "tokens_per_step": sizes.tokens_per_step,
        "steps": sizes.max_steps,
        "precision": sizes.precision,
        "zero_stage": sizes.zero_stage,
        "world_size": sizes.ranks,
        "device": sizes.device,
    }


def _datasets(config: RunConfig, corpus: Corpus) -> Iterator[DatasetUse]:
    for part in corpus.parts:
        manifest = part.dataset.manifest
        for split, context in ((config.data.train_split, "training"), (config.evaluation.split, "validation")):
            if split and split in manifest.splits:
                yield DatasetUse(
                    name=manifest.source.name,
                    dataset_id=part.dataset.dataset_id,
                    source=part.location,
                    split=split,
                    context=context,
                    tokens=manifest.splits[split].tokens,
                    documents=manifest.splits[split].documents,
                    weight=float(part.share),
                )


def _about(config: RunConfig, corpus: Corpus, model: GlobalLocalConfig, sizes: Sizes) -> dict[str, str]:
    """The rows of the run's description."""
    data = config.data
    ranks = "1 rank" if sizes.ranks == 1 else f"{sizes.ranks:,} ranks"
    samples = sizes.tokens_per_step // data.sequence_length
    return {
        "Model": (
            f"{config.model.preset}: {sizes.parameters:,} parameters, {model.num_hidden_layers} layers of width "
            f"{model.hidden_size:,}, {model.vocab_size:,} ids"
        ),
        "Data": "; ".join(_dataset_words(use) for use in _datasets(config, corpus)),
        "Batch": f"{samples:,} samples of {data.sequence_length:,} tokens = {sizes.tokens_per_step:,} tokens per step",
        "Devices": f"{ranks} on {sizes.device}, ZeRO stage {sizes.zero_stage}, {sizes.precision}",
        "Folder": f"`{config.run_folder.absolute()}`",
        "Go on with": f"`cd {Path.cwd()} && globallocal train --config {config.run_folder / 'config.yaml'}`",
    }


def _dataset_words(use: DatasetUse) -> str:
    share = "" if use.weight == 1 else f" (weight {use.weight:g})"
    return f"{use.name}/{use.split}, {use.tokens:,} tokens, id {use.dataset_id[:12]}{share}"


def record_saved(tracker: NullTracker, saved: Saved, evaluation: Evaluation | None) -> None:
    """A checkpoint that stands: an event of the run, and a row of the table `checkpoints.json`.

    `sha256` is that of its `integrity.json`, which holds the hash of every other file.
    """
    rows: list[dict[str, Any]] = [
        {"step": int(item.name.rpartition("-")[2]), "state": "deleted"} for item in saved.deleted
    ]
    rows.append(
        {
            "step": saved.step,
            "state": "stands",
            "loss/valid": loss_at(evaluation, saved.step),
            "path": str(saved.folder.absolute()),
            "sha256": _sha256(saved.folder / "integrity.json"),
            "size_bytes": saved.size_bytes,
        }
    )
    tracker.log_table(CHECKPOINTS_TABLE, rows, key=("step",))
    tracker.log_event(
        "saved",
        saved.step,
        folder=saved.folder,
        size_bytes=saved.size_bytes,
        seconds=saved.seconds,
        deleted=[item.name for item in saved.deleted],
    )


def _sha256(path: Path) -> str | None:
    """None where it has just gone: what is recorded must never end a run."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
