"""The state of a run as a checkpoint has it: what is written into `state.json`."""

import os
import platform

import deepspeed
import torch
import transformers

from pipeline.checkpoints.fingerprint import Fingerprint
from pipeline.checkpoints.folder import JOB_VARIABLE, CheckpointState
from pipeline.checkpoints.state import TrainState
from pipeline.context import RunContext
from pipeline.data.loader import batch_hash
from pipeline.redact import redact
from pipeline.settings.batches import data_step


def describe(
    context: RunContext, state: TrainState, fingerprint: Fingerprint, mlflow_run_id: str | None
) -> CheckpointState:
    """No collective, and nothing is changed.

    Args:
        fingerprint: of the weights after `state.step` steps.
    """
    batch = data_step(state.step, state.health.skipped_batches)
    return CheckpointState(
        step=state.step,
        consumed_samples=context.layout.first_sample(batch),
        consumed_tokens=context.tokens_after(state.step, state.health.skipped_batches),
        dataset_id=context.corpus.dataset_id,
        tokenizer_sha256=context.corpus.tokenizer.sha256,
        world_size=context.world.size,
        zero_stage=context.stage,
        precision=context.precision,
        config=redact(context.config.model_dump(mode="json")),
        mlflow_run_id=mlflow_run_id,
        next_batch_hash=batch_hash(context.source, context.layout, batch),
        logit_fingerprint=fingerprint,
        seconds=state.seconds,
        loss_sums=state.loss_sums,
        evaluation=state.evaluation,
        pending_evaluation=state.pending_evaluation,
        health=state.health,
        job=os.environ.get(JOB_VARIABLE, ""),
        versions=versions(),
        begun_from=state.begun_from,
    )


def versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
