"""Going on where a run was: which checkpoint, whether it fits, and the proof that it was restored."""

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.errors import UserError
from pipeline.checkpoints import folder as checkpoint
from pipeline.checkpoints import reshard, zero_layout
from pipeline.checkpoints import write as checkpoint_io
from pipeline.config import RunConfig, flatten
from pipeline.data.corpus import Corpus
from pipeline.data.loader import BatchLayout, batch_hash, data_step
from pipeline.data.samples import Source
from pipeline.distributed.world import World
from pipeline.engine.internals import Engine, pieces_of
from pipeline.health.decisions import decisions_path, read_decisions
from pipeline.health.state import HealthState
from pipeline.random_state import seed_generators

log = logging.getLogger("globallocal")

FIXED = (
    "run.seed",
    "model.",
    "data.sequence_length",
    "data.train_split",
    "data.order_seed",
    "data.window_tokens",
    "training.global_batch_size",
)
"""Settings that a resumed run may not change: they decide what the model is and which samples come next."""


@dataclass(frozen=True)
class Resumed:
    """Where the run stands; the defaults are a fresh start."""

    folder: Path | None = None
    step: int = 0
    mlflow_run_id: str | None = None
    evaluation: dict[str, float] | None = None
    pending_evaluation: bool = False
    loss_sums: list[list[float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    health: HealthState = field(default_factory=HealthState)


class Shape(NamedTuple):
    """What a checkpoint's files depend on; a run may go on in another one."""

    world_size: int
    zero_stage: int
    precision: str

    @classmethod
    def of(cls, state: checkpoint.CheckpointState) -> "Shape":
        return cls(state.world_size, state.zero_stage, state.precision)


def resume(
    config: RunConfig,
    world: World,
    engine: Engine,
    source: Source,
    layout: BatchLayout,
    corpus: Corpus,
    precision: str,
    stage: int,
    model_config: Any,
) -> Resumed:
    """Restore the run as `checkpoint.resume` says, and prove it.

    Raises:
        UserError: checkpoints stand but none can be used; the run no longer fits the checkpoint; the restored
            model or data position is not the saved one.
    """
    folder = find(config, world)
    with world.together():
        decided = read_decisions(config.run_folder) if world.is_main else ()
    decided = world.broadcast(decided)
    for item in decided:
        log.info(
            f"leaving out global batches {item.first_batch:,} to {item.last_batch - 1:,}, as decided at step "
            f"{item.step:,} ({decisions_path(config.run_folder)})"
        )
    if folder is None:
        return Resumed(health=HealthState().with_decisions(decided))
    shape = Shape(world.size, stage, precision)
    with world.together():
        state = checkpoint.read_state(folder)
        problems, changes = compare(state, config, corpus, shape)
        if problems:
            raise UserError([f"{folder}: {problem}" for problem in problems])
    for change in changes:
        log.info(f"changed since the checkpoint: {change}")
    restore(folder, state, config, world, engine, shape)
    prove(folder, state, engine, source, layout, world, model_config.vocab_size, precision)
    return Resumed(
        folder,
        state.step,
        state.mlflow_run_id,
        state.evaluation,
        state.pending_evaluation,
        state.loss_sums,
        state.seconds,
        state.health.with_decisions(decided),
    )


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


def restore(
    folder: Path, state: checkpoint.CheckpointState, config: RunConfig, world: World, engine: Engine, shape: Shape
) -> None:
    """Model, optimizer and random state of a verified checkpoint, resharded where its shape is not the run's."""
    if (
        Shape.of(state) == shape
        and world.agree({"moved": float(not lies_as_here(folder, world, engine))})["moved"] == 0
    ):
        checkpoint_io.load(engine, folder, world)
    else:
        with world.together():
            reader = reshard.ParameterReader(folder, state)
            reshard.check(engine, reader)
        reshard.restore(engine, reader)
        log.info(f"resharded: {_words(Shape.of(state))} → {_words(shape)}")
    if state.world_size == world.size:
        checkpoint_io.load_random_state(folder, world)
    else:
        seed_generators(config.run.seed, state.step, world.rank)
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
    return f"{shape.world_size} ranks, ZeRO stage {shape.zero_stage}, {shape.precision}"


def compare(
    state: checkpoint.CheckpointState, config: RunConfig, corpus: Corpus, shape: Shape
) -> tuple[list[str], list[str]]:
    """(What forbids the resume, what merely changed), one line each."""
    problems = [
        f"was written with {name} {then}, this run has {now}; {remedy}"
        for name, then, now, remedy in (
            ("dataset", state.dataset_id, corpus.dataset_id, "give data.dataset the same dataset, or mixture"),
            ("tokenizer", state.tokenizer_sha256, corpus.tokenizer.sha256, "give data.dataset one of that tokenizer"),
        )
        if then != now
    ]
    then, now = flatten(state.config), config.flat()
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
        elif not key.startswith("checkpoint.resume"):
            changes.append(line)
    return problems, changes


def prove(
    folder: Path,
    state: checkpoint.CheckpointState,
    engine: Engine,
    source: Source,
    layout: BatchLayout,
    world: World,
    vocab_size: int,
    precision: str,
) -> None:
    """Recompute the next batch's hash and the probe's logits; say how near they are, or refuse."""
    problems = []
    if batch_hash(source, layout, data_step(state.step, state.health.skipped_batches)) != state.next_batch_hash:
        problems.append(f"{folder}: the next batch is not the one the checkpoint recorded; the data has changed")
    now = checkpoint_io.logit_fingerprint(engine, vocab_size)
    distance = checkpoint_io.compare_fingerprints(state.logit_fingerprint, now)
    bound = 1e-4 if state.precision == precision == "fp32" else 5e-2
    if not distance <= bound:
        problems.append(
            f"{folder}: the restored model's logits differ from the saved ones by {distance:.2g} > {bound:g}"
        )
    world.raise_together(problems)
    nearness = "bitwise" if distance == 0 else f"within {distance:.1g}"
    log.info(f"resume verified: {nearness} (step {state.step:,}, {state.consumed_samples:,} samples consumed)")
