"""Settings → the built parts of a run. All that can be wrong is found here, before step 0."""

import logging
from dataclasses import dataclass, replace

import torch
import transformers
from torch import nn

from data_prep.errors import UserError
from model.modeling_globallocal import GlobalLocalForCausalLM
from pipeline.checkpoints.resume import Resumed, resume
from pipeline.checkpoints.saver import Saver
from pipeline.checkpoints.snapshot import HostBuffers
from pipeline.checkpoints.space import checkpoint_bytes
from pipeline.checkpoints.state import Origin
from pipeline.checkpoints.write import DeferringCheckpointEngine
from pipeline.config import Reading, RunConfig
from pipeline.context import RunContext
from pipeline.distributed.clock import Clock
from pipeline.distributed.grace import Grace
from pipeline.distributed.stop import StopRequest
from pipeline.distributed.world import World
from pipeline.engine.compilation import compile_blocks
from pipeline.engine.engine import initialize, resolve_precision
from pipeline.engine.internals import Engine
from pipeline.engine.optim import describe_groups, parameter_groups
from pipeline.evaluation.evaluator import Evaluator
from pipeline.export.initial import begin_with, initial_weights, origin_of
from pipeline.export.load import keep_model, load_tokenizer
from pipeline.fitting import fit
from pipeline.health.guard import Guard
from pipeline.introduce import describe_start, introduce
from pipeline.meters import Meters
from pipeline.metrics.profiler import StepProfiler
from pipeline.record import start_tracker
from pipeline.tracking.tracker import NullTracker
from pipeline.trainer import Trainer

log = logging.getLogger("globallocal")


@dataclass(frozen=True)
class Machinery:
    """The model in DeepSpeed's engine, and what its checkpoints are taken with.

    Attributes:
        deferring: the engine's `checkpoint_engine`.
        expected_bytes: of one checkpoint.
        origin: the export whose weights it holds; None: they are random, or a checkpoint's to come.
    """

    engine: Engine
    deferring: DeferringCheckpointEngine
    expected_bytes: int
    origin: Origin | None


def build(config: RunConfig, world: World, stop: StopRequest, clock: Clock) -> Trainer:
    """Every part of a run, from its settings. `clock.move` stands where all ranks have come equally far."""
    context = check_settings(config, world, clock)
    clock.move()
    machinery = build_engine(context, stop, clock)
    clock.move()
    transformers.set_seed(config.run.seed + world.rank)  # dropout differs between ranks
    resumed = resume(context, machinery.engine)
    if resumed.folder is None:
        resumed = replace(resumed, state=replace(resumed.state, begun_from=machinery.origin))
    keep_beside_the_run(context)
    clock.move()
    clock.end_part("checkpoint")
    clock.seconds.update(resumed.state.seconds)
    tracker = start_tracker(context, resumed)
    clock.end_part("tracking")
    trainer = build_trainer(context, machinery, resumed, tracker, stop, clock)
    clock.end_part("trainer")
    log.info(describe_start(clock.start_seconds))
    tracker.log_event("ready", trainer.step, seconds=clock.start_seconds)
    return trainer


def checked(read: Reading, world: World) -> RunConfig:
    """The settings. Raises UserError where some are wrong, with whatever else is wrong with the run."""
    if read.problems:
        fit(read.config, world.size, None, world.device, wrong=read.problems, disk=world.is_main)
    return read.whole()


def check_settings(config: RunConfig, world: World, clock: Clock) -> RunContext:
    """Settings, dataset, DeepSpeed JSON and machine fit together, and every shard is there.

    Raises:
        UserError: one line for each problem.
    """
    precision = resolve_precision(config.training.precision, world)
    with world.together():
        fitted = fit(config, world.size, precision, world.device, disk=world.is_main)
    context = fitted.context(config, world, precision)
    clock.end_part("settings")
    check_corpus(context, clock)
    clock.end_part("data")
    return context


def check_corpus(context: RunContext, clock: Clock) -> None:
    """Look at every shard before step 0, each rank at its share."""
    config, world, problems = context.config, context.world, list[str]()
    wanted = [name for name in dict.fromkeys([config.data.train_split, config.evaluation.split]) if name]
    if config.data.verify != "none":
        hashes = config.data.verify == "hashes"
        problems = context.corpus.check_shards(wanted, world.rank, world.size, hashes, clock.touch)
    world.raise_together(problems)


def build_engine(context: RunContext, stop: StopRequest, clock: Clock) -> Machinery:
    """The model as it begins, in DeepSpeed's engine; before it is built, what the run is and needs is said."""
    config, world = context.config, context.world
    transformers.set_seed(config.run.seed)
    model = GlobalLocalForCausalLM(context.model)
    torch.nn.Module.to(model, world.device)  # transformers' own `to` is typed too narrowly
    origin = begin(model, context)
    kind, stage, precision = config.optimizer.name, context.stage, context.precision
    expected_bytes = checkpoint_bytes(context.model, kind, stage, precision, world.size)
    groups = describe_groups(parameter_groups(model, config.optimizer))
    for line in introduce(context, groups):
        log.info(line)
    clock.end_part("model")
    engine = initialize(model, config, context.deepspeed, stop)
    if context.compiled:
        compile_blocks(engine, context.layout.micro_batch_size, config.data.sequence_length)
    deferring = DeferringCheckpointEngine(HostBuffers() if config.checkpoint.background else None)
    engine.checkpoint_engine = deferring
    clock.end_part("engine")
    return Machinery(engine, deferring, expected_bytes, origin)


def begin(model: nn.Module, context: RunContext) -> Origin | None:
    """The weights of `training.init_from` into the model, on every rank; nothing where this start goes on."""
    config, world = context.config, context.world
    folder = world.broadcast(initial_weights(config) if world.is_main else None)
    if folder is None:
        return None
    with world.together():
        begin_with(model, folder)
    origin: Origin = world.broadcast(origin_of(folder) if world.is_main else None)
    log.info(f"the weights begin as those of {folder}")
    return origin


def keep_beside_the_run(context: RunContext) -> None:
    """The settings, the model's configuration and the tokenizer, in the run folder, once nothing refuses them.

    Raises:
        UserError: the folder takes no files.
    """
    folder = context.config.run_folder
    with context.world.together():
        if context.world.is_main:
            try:
                context.config.save(folder / "config.yaml")
                keep_model(context.model, context.corpus.tokenizer_folder, folder)
            except OSError as error:
                raise UserError(f"{folder}: {error.strerror}; make room, or free its rights") from None


def build_trainer(
    context: RunContext,
    machinery: Machinery,
    resumed: Resumed,
    tracker: NullTracker,
    stop: StopRequest,
    clock: Clock,
) -> Trainer:
    """What trains, watches, measures and saves, around an engine that has been restored."""
    engine, training = machinery.engine, context.config.training
    tokenizer = load_tokenizer(context.corpus.tokenizer_folder)
    grace = Grace(stop, context.world, clock, training.preemption_grace_seconds)
    if training.profiled_steps and resumed.state.step >= training.profiled_steps[-1]:
        late = f"those steps are taken, this start is at {resumed.state.step:,}"
        log.warning(f"training.profile = {training.profile}: {late}")
    return Trainer(
        context=context,
        engine=engine,
        resumed=resumed,
        saver=Saver(context, engine, machinery.deferring, machinery.expected_bytes, clock.move),
        guard=Guard(context, engine, tokenizer, tracker),
        evaluator=Evaluator(context, engine, tokenizer, tracker, clock, grace.stop_if_asked),
        meters=Meters(context, tracker, clock),
        grace=grace,
        profiler=StepProfiler(context, tracker, clock),
        tracker=tracker,
        clock=clock,
    )
