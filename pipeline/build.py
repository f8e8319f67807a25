"""Settings → the built parts of a run. All that can be wrong is found here, before step 0."""

import logging
import os
import platform
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import transformers
from torch import nn

from data_prep.errors import UserError
from model.configuration_globallocal import GlobalLocalConfig
from model.modeling_globallocal import GlobalLocalForCausalLM
from pipeline.checkpoints.folder import JOB_VARIABLE, CheckpointState
from pipeline.checkpoints.resume import Resumed, resume
from pipeline.checkpoints.saver import Saver
from pipeline.checkpoints.snapshot import HostBuffers
from pipeline.checkpoints.space import checkpoint_bytes, retained, start_problems
from pipeline.checkpoints.write import DeferringCheckpointEngine, logit_fingerprint
from pipeline.config import RunConfig
from pipeline.data.corpus import Corpus
from pipeline.data.loader import BatchLoader, batch_hash, data_step
from pipeline.distributed.clock import Clock
from pipeline.distributed.stop import StopRequest
from pipeline.distributed.world import World
from pipeline.engine.compilation import compile_blocks
from pipeline.engine.engine import initialize, resolve_precision, zero_stage
from pipeline.engine.optim import describe_groups, parameter_groups
from pipeline.evaluate import continuations, held_out
from pipeline.export.load import keep_model, load_tokenizer
from pipeline.fitting import fit
from pipeline.health.guard import Guard
from pipeline.health.state import HealthState
from pipeline.introduce import introduce
from pipeline.profiler import StepProfiler
from pipeline.record import start_tracker
from pipeline.redact import redact
from pipeline.trainer import Trainer
from pipeline.utilisation import Utilisation, device_name, peak_teraflops

log = logging.getLogger("globallocal")


def build(config: RunConfig, world: World, stop: StopRequest, clock: Clock) -> Trainer:
    """Every part of a run, from its settings. All that can be wrong is found here, before step 0."""
    precision = resolve_precision(config.training.precision, world)
    with world.together():
        fitted = fit(config, world.size, precision, world.device)
    corpus, source, layout, model_config = fitted.corpus, fitted.source, fitted.layout, fitted.model
    settings, steps = fitted.deepspeed, fitted.steps
    assert corpus is not None
    assert source is not None
    assert layout is not None
    assert model_config is not None
    assert steps is not None
    check_corpus(config, corpus, world, clock)
    clock.move()

    transformers.set_seed(config.run.seed)
    model = GlobalLocalForCausalLM(model_config)
    torch.nn.Module.to(model, world.device)  # transformers' own `to` is typed too narrowly
    expected_bytes = check_space(config, world, model, precision, zero_stage(settings), steps)
    with world.together():
        if world.is_main:
            try:
                keep_model(model_config, corpus.tokenizer_folder, config.run_folder)
            except OSError as error:
                raise UserError(f"{config.run_folder}: {error.strerror}; make room, or free its rights") from None
    groups = describe_groups(parameter_groups(model, config.optimizer.weight_decay))
    for line in introduce(config, fitted, world.size, precision, world.device.type, groups):
        log.info(line)
    engine = initialize(model, config, settings)
    if fitted.compiled:
        compile_blocks(engine, layout.micro_batch_size, config.data.sequence_length)
    engine.checkpoint_engine = DeferringCheckpointEngine(HostBuffers() if config.checkpoint.background else None)
    clock.move()
    transformers.set_seed(config.run.seed + world.rank)  # dropout differs between ranks

    def restore(config: RunConfig) -> Resumed:
        return resume(config, world, engine, source, layout, corpus, precision, zero_stage(settings), model_config)

    resumed = restore(config)
    newest = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"resume": "auto"})})
    clock.move()

    tokenizer = load_tokenizer(corpus.tokenizer_folder)
    tracker = start_tracker(config, world, fitted, resumed, precision)
    run_id = world.broadcast(tracker.run_id)
    clock.seconds.update(resumed.seconds)
    held_out_split = config.evaluation.split or ""

    def evaluate(before_batch: Callable[[], None]) -> dict[str, float]:
        return held_out(
            engine,
            corpus,
            held_out_split,
            config.data.sequence_length,
            layout.micro_batch_size,
            config.evaluation.max_samples,
            world.device,
            world.rank,
            world.size,
            before_batch,
        )

    def generate(before_text: Callable[[], None]) -> list[str]:
        return continuations(
            engine.module,
            tokenizer,
            config.evaluation.prompts,
            config.evaluation.max_new_tokens,
            world.device,
            config.run.seed,
            before_text,
        )

    def describe(trainer: Trainer) -> CheckpointState:
        batch = data_step(trainer.step, trainer.guard.state.skipped_batches)
        return CheckpointState(
            step=trainer.step,
            consumed_samples=batch * layout.global_batch_size,
            consumed_tokens=trainer.step * trainer.tokens_per_step,
            dataset_id=corpus.dataset_id,
            tokenizer_sha256=corpus.tokenizer.sha256,
            world_size=world.size,
            zero_stage=zero_stage(settings),
            precision=precision,
            config=redact(config.model_dump(mode="json")),
            mlflow_run_id=run_id,
            next_batch_hash=batch_hash(source, layout, batch),
            logit_fingerprint=logit_fingerprint(engine, model_config.vocab_size),
            seconds=clock.seconds,
            loss_sums=world.gather(trainer.losses.sums.tolist()),
            evaluation=trainer.evaluation,
            pending_evaluation=trainer.pending_evaluation,
            health=trainer.guard.state,
            job=os.environ.get(JOB_VARIABLE, ""),
            versions=versions(),
        )

    def read_from(step: int, health: HealthState) -> BatchLoader:
        consumed_samples = data_step(step, health.skipped_batches) * layout.global_batch_size
        return BatchLoader(source, layout, world.rank, consumed_samples, health.skipped_batches)

    stands = resumed.folder is not None and resumed.folder.parent == config.checkpoints
    trainer = Trainer(
        config=config,
        world=world,
        engine=engine,
        layout=layout,
        max_steps=steps,
        batches=read_from(resumed.step, resumed.health),
        evaluate=evaluate if config.evaluation.split else None,
        generate=generate,
        describe=describe,
        saver=Saver(engine, config.checkpoints, world, config.retention, expected_bytes, clock.move),
        guard=Guard(
            config.health, engine, world, layout, source, tokenizer, config.run_folder, tracker, resumed.health
        ),
        restore=lambda: restore(newest),
        read_from=read_from,
        tracker=tracker,
        stop=stop,
        clock=clock,
        utilisation=build_utilisation(config, world, model_config, precision),
        profiler=build_profiler(config, world, clock, tracker, resumed.step),
        step=resumed.step,
        evaluation=resumed.evaluation,
        pending_evaluation=resumed.pending_evaluation and config.evaluation.split is not None,
        saved_step=resumed.step if stands else None,
    )
    trainer.losses.restore(resumed.loss_sums, world)
    return trainer


def build_utilisation(config: RunConfig, world: World, model_config: GlobalLocalConfig, precision: str) -> Utilisation:
    """Says what MFU is measured against, or why there is none."""
    given, name = config.training.peak_teraflops_per_device, device_name(world.device)
    peak = given or peak_teraflops(name, precision)
    source = "training.peak_teraflops_per_device" if given else "data sheet"
    if peak:
        log.info(f"device: {name}, peak {peak:g} TFLOP/s in {precision} ({source}), which MFU is a part of")
    elif world.device.type == "cuda":
        log.info(
            f"device: {name}, whose peak rate in {precision} is not known, so that no MFU is shown; "
            "training.peak_teraflops_per_device gives it"
        )
    return Utilisation(model_config.flops_per_token(config.data.sequence_length), world.size, peak)


def build_profiler(config: RunConfig, world: World, clock: Clock, tracker: Any, step: int) -> StepProfiler:
    steps = config.training.profiled_steps
    if steps and step >= steps[-1]:
        log.warning(f"training.profile = {config.training.profile}: those steps are taken, this start is at {step:,}")
    return StepProfiler(steps, config.run_folder, world, clock, tracker)


def check_space(config: RunConfig, world: World, model: nn.Module, precision: str, stage: int, steps: int) -> int:
    """Bytes of one checkpoint. Raises UserError where the disk has no room for those that the run keeps."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.numel() for buffer in model.buffers())
    one_bytes = checkpoint_bytes(parameters, buffers, stage, precision, world.size)
    count = retained(config.retention, steps, config.checkpoint.interval_steps)
    with world.together():
        problems = start_problems(config.checkpoints, one_bytes, count) if world.is_main else []
        if problems:
            raise UserError(problems)
    return one_bytes


def check_corpus(config: RunConfig, corpus: Corpus, world: World, clock: Clock) -> None:
    """Look at every shard before step 0, each rank at its share."""
    problems: list[str] = []
    wanted = [name for name in dict.fromkeys([config.data.train_split, config.evaluation.split]) if name]
    if config.data.verify != "none":
        hashes = config.data.verify == "hashes"
        problems = corpus.check_shards(wanted, world.rank, world.size, hashes, clock.touch)
    world.raise_together(problems)


def versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
