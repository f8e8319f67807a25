"""Settings → the built parts of a run. All that can be wrong is found here, before step 0."""

import logging
import math
import platform
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers

from data_prep.manifest import Dataset, check_shards, open_dataset
from model.configuration_globallocal import GlobalLocalConfig
from model.modeling_globallocal import GlobalLocalForCausalLM
from pipeline.checkpoint import CheckpointState
from pipeline.checkpoint_io import HashingCheckpointEngine, logit_fingerprint
from pipeline.config import RunConfig
from pipeline.data import BatchLayout, BatchLoader, SampleSource, TokenStream, batch_hash, data_step, evaluation_batches
from pipeline.distributed import StopRequest, World
from pipeline.engine import deepspeed_config, initialize, resolve_precision, zero_stage
from pipeline.evaluate import continuations, perplexities, summed_loss
from pipeline.metrics import Clock
from pipeline.optim import describe_groups, parameter_groups
from pipeline.redact import redact
from pipeline.resume import Resumed, resume
from pipeline.tracking import NullTracker, open_tracker
from pipeline.trainer import Trainer
from pipeline.weights import build_model_config, load_tokenizer

log = logging.getLogger("globallocal")


def build(config: RunConfig, world: World, stop: StopRequest) -> Trainer:
    """Every part of a run, from its settings. All that can be wrong is found here, before step 0."""
    with world.together():
        dataset = open_dataset(config.data.dataset)
        source = SampleSource(dataset, config.data.train_split, config.data.sequence_length, config.order_seed)
        layout = BatchLayout(config.training.global_batch_size, config.training.micro_batch_size, world.size)
        model_config = build_model_config(config, dataset)
    precision = resolve_precision(config.training.precision, world)
    with world.together():
        settings = deepspeed_config(config, layout, precision)
    check_dataset(config, dataset, world)

    transformers.set_seed(config.run.seed)
    model = GlobalLocalForCausalLM(model_config)
    torch.nn.Module.to(model, world.device)  # transformers' own `to` is typed too narrowly
    narrate(config, world, dataset, source, layout, model, precision, settings)
    engine = initialize(model, config, settings)
    engine.checkpoint_engine = HashingCheckpointEngine()
    transformers.set_seed(config.run.seed + world.rank)  # dropout differs between ranks
    resumed = resume(config, world, engine, source, layout, dataset, precision, zero_stage(settings), model_config)

    tokenizer = load_tokenizer(dataset.tokenizer_folder)
    tracker = start_tracker(config, world, dataset, resumed, model_config, precision)
    run_id = world.broadcast(tracker.run_id)
    clock = Clock(resumed.seconds)
    held_out = config.evaluation.split or ""

    def evaluate() -> dict[str, float]:
        batches = evaluation_batches(
            TokenStream(dataset, held_out),
            config.data.sequence_length,
            layout.micro_batch_size,
            world.rank,
            world.size,
            config.evaluation.max_samples,
        )
        nats, targets = summed_loss(engine, batches, world.device)
        return perplexities(nats, targets, dataset.manifest.splits[held_out])

    def generate() -> list[str]:
        return continuations(
            engine.module,
            tokenizer,
            config.evaluation.prompts,
            config.evaluation.max_new_tokens,
            world.device,
            config.run.seed,
        )

    def describe(trainer: Trainer) -> CheckpointState:
        batch = data_step(trainer.step, trainer.health.skipped_batches)
        return CheckpointState(
            step=trainer.step,
            consumed_samples=batch * layout.global_batch_size,
            consumed_tokens=trainer.step * trainer.tokens_per_step,
            dataset_id=dataset.manifest.dataset_id,
            tokenizer_sha256=dataset.manifest.tokenizer.sha256,
            world_size=world.size,
            zero_stage=zero_stage(settings),
            precision=precision,
            config=redact(config.model_dump(mode="json")),
            mlflow_run_id=run_id,
            next_batch_hash=batch_hash(source, layout, batch),
            logit_fingerprint=logit_fingerprint(engine, model_config.vocab_size),
            seconds=clock.seconds,
            evaluation=trainer.evaluation,
            health=trainer.health,
            versions=versions(),
        )

    first_batch = data_step(resumed.step, resumed.health.skipped_batches)
    return Trainer(
        config=config,
        world=world,
        engine=engine,
        layout=layout,
        max_steps=max_steps(config, source.num_samples),
        batches=BatchLoader(
            source, layout, world.rank, first_batch * layout.global_batch_size, resumed.health.skipped_batches
        ),
        evaluate=evaluate if config.evaluation.split else None,
        generate=generate,
        describe=describe,
        tracker=tracker,
        stop=stop,
        clock=clock,
        step=resumed.step,
        health=resumed.health,
        evaluation=resumed.evaluation,
        saved_step=resumed.step if resumed.folder else None,
    )


def max_steps(config: RunConfig, num_samples: int) -> int:
    if config.training.max_steps is not None:
        return config.training.max_steps
    assert config.training.max_epochs is not None
    return math.ceil(config.training.max_epochs * num_samples / config.training.global_batch_size)


def check_dataset(config: RunConfig, dataset: Dataset, world: World) -> None:
    """Look at every shard before step 0, each rank at its share."""
    problems: list[str] = []
    wanted = {config.data.train_split, config.evaluation.split} - {None}
    with world.together():
        splits = [dataset.split(str(name)) for name in sorted(map(str, wanted))]
    if config.data.verify != "none":
        for split in splits:
            share = range(world.rank, split.num_shards, world.size)
            problems += check_shards(dataset, split.name, share, config.data.verify == "hashes")
    world.raise_together(problems)


def start_tracker(
    config: RunConfig,
    world: World,
    dataset: Dataset,
    resumed: Resumed,
    model: GlobalLocalConfig,
    precision: str,
) -> Any:
    if not (world.is_main and config.tracking.enabled):
        return NullTracker()
    return open_tracker(
        config.tracking,
        config.run_folder,
        config.run.name,
        resumed.mlflow_run_id,
        {**config.flat(), "precision": precision, "world_size": world.size},
        {},
        {
            "source": str(Path(config.data.dataset)),
            "name": dataset.manifest.source.name,
            "dataset_id": dataset.manifest.dataset_id,
        },
        say=log.info,
    )


def narrate(
    config: RunConfig,
    world: World,
    dataset: Dataset,
    source: SampleSource,
    layout: BatchLayout,
    model: GlobalLocalForCausalLM,
    precision: str,
    settings: dict[str, Any],
) -> None:
    """What is about to happen, in a few lines."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    train = dataset.split(config.data.train_split)
    log.info(f"run {config.run.name} in {config.run_folder}")
    log.info(f"data: {config.data.dataset}, {train.tokens:,} tokens, dataset_id {dataset.manifest.dataset_id[:12]}")
    log.info(f"model: {config.model.preset}, {parameters:,} parameters, {model.config.vocab_size:,} ids")
    for line in describe_groups(parameter_groups(model, config.optimizer.weight_decay)):
        log.info(f"  {line}")
    log.info(
        f"batch: {layout.global_batch_size} samples of {config.data.sequence_length} tokens = "
        f"{layout.micro_batch_size} micro-batch × {world.size} ranks × "
        f"{layout.gradient_accumulation_steps} accumulation steps; "
        f"an epoch is {source.num_samples / layout.global_batch_size:,.1f} steps"
    )
    chosen = " (auto)" if config.training.precision == "auto" else ""
    log.info(f"engine: ZeRO stage {zero_stage(settings)}, {precision}{chosen}, {world.device.type}")


def versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
