"""Going on where a run was: which checkpoint, whether it fits, and the proof that it was restored."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.errors import UserError
from model.configuration_globallocal import GlobalLocalConfig
from pipeline.checkpoints import folder as checkpoint
from pipeline.checkpoints import reshard, zero_layout
from pipeline.checkpoints import write as checkpoint_io
from pipeline.checkpoints.fingerprint import logit_fingerprint
from pipeline.checkpoints.state import TrainState
from pipeline.config import RunConfig, flatten
from pipeline.context import RunContext
from pipeline.data.loader import batch_hash
from pipeline.distributed.world import World
from pipeline.engine.internals import Engine, pieces_of
from pipeline.health.decisions import decisions_path, read_decisions
from pipeline.health.state import HealthState, RollBack
from pipeline.random_state import seed_generators
from pipeline.redact import failure_message
from pipeline.settings.batches import data_step
from pipeline.settings.section import counted

log = logging.getLogger("globallocal")

FIXED = (
    "run.seed",
    "model.",
    "data.sequence_length",
    "data.train_split",
    "data.order_seed",
    "data.window_tokens",
    *("training.global_batch_size", "training.batch_size_warmup"),
    *("optimizer.name", "optimizer.base_hidden_size"),
)
"""Settings that a resumed run may not change: they decide what the model is, which samples come next, and what the
optimizer remembers."""


OF_THE_MODEL = frozenset(GlobalLocalConfig.__annotations__) - {
    *("model_type", "vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
}
"""What of a model its preset and the settings say, and not the dataset."""

EARLIER = {"optimizer.name": "adamw", "training.batch_size_warmup": []}
"""What checkpoints of earlier versions do not name."""


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on; the defaults are a fresh start.

    Attributes:
        folder: the checkpoint; None where there is none.
        mlflow_run_id: of the run that wrote it.
    """

    state: TrainState = field(default_factory=TrainState)
    folder: Path | None = None
    mlflow_run_id: str | None = None


class Shape(NamedTuple):
    """What a checkpoint's files depend on; a run may go on in another one."""

    world_size: int
    zero_stage: int
    precision: str

    @classmethod
    def of(cls, state: checkpoint.CheckpointState) -> "Shape":
        return cls(state.world_size, state.zero_stage, state.precision)

    @classmethod
    def of_run(cls, context: RunContext) -> "Shape":
        return cls(context.world.size, context.stage, context.precision)


def resume(context: RunContext, engine: Engine) -> Resumed:
    """Restore the run as `checkpoint.resume` says, and prove it.

    Raises:
        UserError: checkpoints stand but none can be used; the run no longer fits the checkpoint; the restored
            model or data position is not the saved one.
    """
    world = context.world
    folder = find(context.config, world)
    decided = decisions(context)
    if folder is None:
        return Resumed(TrainState(health=HealthState().with_decisions(decided)))
    with world.together():
        saved = checkpoint.read_state(folder)
        problems, changes = compare(saved, context, model_then(folder, saved))
        if problems:
            raise UserError([f"{folder}: {problem}" for problem in problems])
    for change in changes:
        log.info(f"changed since the checkpoint: {change}")
    restore(folder, saved, context, engine)
    prove(folder, saved, context, engine)
    state = replace(saved.train_state, health=saved.health.with_decisions(decided))
    return Resumed(state, folder, saved.mlflow_run_id)


def newest(context: RunContext) -> RunContext:
    """The same run, going on from its own newest checkpoint, whatever `checkpoint.resume` named at its start."""
    section = context.config.checkpoint.model_copy(update={"resume": "auto"})
    return replace(context, config=context.config.model_copy(update={"checkpoint": section}))


def decisions(context: RunContext) -> tuple[RollBack, ...]:
    """The roll backs that this run has decided so far, the same on every rank."""
    config, world = context.config, context.world
    with world.together():
        read = read_decisions(config.run_folder) if world.is_main else ()
    decided: tuple[RollBack, ...] = world.broadcast(read)
    for item in decided:
        log.info(
            f"leaving out global batches {item.first_batch:,} to {item.last_batch - 1:,}, as decided at step "
            f"{item.step:,} ({decisions_path(config.run_folder)})"
        )
    return decided


def find(config: RunConfig, world: World) -> Path | None:
    """The checkpoint to go on from, agreed by all ranks; None is a fresh start.

    What `checkpoint.resume` names is where the job begins. Started again by its launcher, it goes on from what it has
    saved since.
    """
    root, wanted = config.checkpoints, config.checkpoint.resume
    with world.together():
        if world.is_main:
            checkpoint.tidy(root)
    standing = world.broadcast(checkpoint.list_checkpoints(root) if world.is_main else None)
    fitting = standing if wanted == "auto" else world.broadcast(of_this_job(standing) if world.is_main else None)
    folder, passed_over = checkpoint.newest_verified(fitting, world)
    for problem in passed_over:
        log.warning(f"passed over: {problem}")
    if folder is None and wanted == "none":
        if standing:
            raise UserError(
                f"{root}: holds {len(standing)} checkpoints, and checkpoint.resume=none would start over; choose "
                "another run.name, or delete the folder"
            )
        return None
    if folder is None and wanted != "auto":
        problems = checkpoint.verify_together(Path(wanted), world)
        world.raise_together([f"checkpoint.resume: {problem}" for problem in problems])
        with world.together():
            refuse_later(standing, Path(wanted))
        log.info(f"resuming from {wanted}")
        return Path(wanted)
    if folder is None and standing:
        raise UserError(
            [
                *passed_over,
                f"{root}: none of {len(standing)} checkpoints verifies; restore one, or start over with another "
                "run.name",
            ]
        )
    log.info(f"resuming from {folder}" if folder else f"no checkpoint in {root}: starting at step 0")
    return folder


def of_this_job(folders: Sequence[Path]) -> list[Path]:
    """Those of `folders` that were saved by an earlier start of the job that this process belongs to."""
    job, found = os.environ.get(checkpoint.JOB_VARIABLE), []
    for folder in folders if job else ():
        with suppress(UserError):  # damaged: none of them
            if checkpoint.read_state(folder).job == job:
                found.append(folder)
    return found


def refuse_later(standing: Sequence[Path], wanted: Path) -> None:
    """Raises UserError where the run holds checkpoints of later steps: `auto` would take those for its newest."""
    step = checkpoint.read_state(wanted).step
    later = [folder for folder in standing if checkpoint.step_of(folder) > step]
    if later:
        raise UserError(
            f"checkpoint.resume: {wanted} is of step {step:,}, but {later[0].parent} holds {len(later)} of later steps "
            f"(the newest: {checkpoint.step_of(later[0]):,}); leave checkpoint.resume out to go on from there; to go "
            "back, move the later ones away, or choose another run.name"
        )


def restore(folder: Path, saved: checkpoint.CheckpointState, context: RunContext, engine: Engine) -> None:
    """Model, optimizer and random state of a verified checkpoint, resharded where its shape is not the run's."""
    world, shape = context.world, Shape.of_run(context)
    if Shape.of(saved) == shape and not world.any(not lies_as_here(folder, world, engine)):
        checkpoint_io.load(engine, folder, world)
    else:
        with world.together():
            reader = reshard.ParameterReader(folder, saved)
            reshard.check(engine, reader)
        reshard.restore(engine, reader)
        log.info(f"resharded: {_words(Shape.of(saved))} → {_words(shape)}")
    if saved.world_size == world.size:
        checkpoint_io.load_random_state(folder, world)
    else:
        seed_generators(context.config.run.seed, saved.step, world.rank)
        log.info("random state: each rank's generators are seeded anew from run.seed, the step and its rank")


def lies_as_here(folder: Path, world: World, engine: Any) -> bool:
    """Whether the checkpoint's parameters lie in this rank's optimizer as the engine's do; earlier versions had another
    order. A checkpoint without layouts is taken for one of this order."""
    try:
        return zero_layout.read(folder, world.rank) == pieces_of(engine)
    except UserError:
        return True


def _words(shape: Shape) -> str:
    if not shape.world_size:
        return "one file"
    return f"{counted(shape.world_size, 'rank')}, ZeRO stage {shape.zero_stage}, {shape.precision}"


def model_then(folder: Path, saved: checkpoint.CheckpointState) -> dict[str, Any]:
    """The model's settings with which the run began, its preset's included; none where the run's `model/` is gone."""
    kept = checkpoint.kept_model(folder, saved.tokenizer_sha256)
    if kept is None:
        return {}
    try:
        config: dict[str, Any] = json.loads((kept / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{kept / 'config.json'}: {failure_message(error)}; restore it, or delete {kept}") from None
    return {name: value for name, value in config.items() if name in OF_THE_MODEL}


def compare(
    state: checkpoint.CheckpointState, context: RunContext, model: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """(What forbids the resume, what merely changed), one line each; `model`: as `model_then` gives it."""
    corpus, shape = context.corpus, Shape.of_run(context)
    problems = [
        f"was written with {name} {then}, this run has {now}; {remedy}"
        for name, then, now, remedy in (
            ("dataset", state.dataset_id, corpus.dataset_id, "give data.dataset the same dataset, or mixture"),
            ("tokenizer", state.tokenizer_sha256, corpus.tokenizer.sha256, "give data.dataset one of that tokenizer"),
        )
        if then != now
    ]
    then, now = EARLIER | flatten(state.config), context.config.flat()
    model_now = json.loads(context.model.to_json_string(use_diff=False))
    for name, value in model.items():
        then[f"model.{name}"], now[f"model.{name}"] = value, model_now[name]
    changes = [
        f"{name} {old} → {new}"
        for name, old, new in zip(("world size", "ZeRO stage", "precision"), Shape.of(state), shape, strict=True)
        if old != new and (old or state.world_size)  # one file has neither ranks nor a stage
    ]
    for key in sorted(then.keys() | now.keys()):
        if then.get(key) == now.get(key):
            continue
        line = f"{key} {then.get(key)} → {now.get(key)}"
        if key.startswith(FIXED):
            problems.append(f"{line}: a resumed run may not change it; set it back, or choose another run.name")
        elif not key.startswith(("checkpoint.resume", "training.init_from")):
            changes.append(line)
    return problems, changes


def prove(folder: Path, saved: checkpoint.CheckpointState, context: RunContext, engine: Engine) -> None:
    """Recompute the next batch's hash and the probe's logits; say how near they are, or refuse."""
    problems = []
    batch = data_step(saved.step, saved.health.skipped_batches)
    if batch_hash(context.source, context.layout, batch) != saved.next_batch_hash:
        problems.append(f"{folder}: the next batch is not the one the checkpoint recorded; the data has changed")
    distance = saved.logit_fingerprint.distance(logit_fingerprint(engine, context.model.vocab_size))
    bound = 1e-4 if saved.precision == context.precision == "fp32" else 5e-2
    if not distance <= bound:
        problems.append(
            f"{folder}: the restored model's logits differ from the saved ones by {distance:.2g} > {bound:g}"
        )
    context.world.raise_together(problems)
    nearness = "bitwise" if distance == 0 else f"within {distance:.1g}"
    log.info(f"resume verified: {nearness} (step {saved.step:,}, {saved.consumed_samples:,} samples consumed)")
