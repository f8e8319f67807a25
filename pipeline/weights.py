"""A run, a checkpoint or an exported folder → the model in memory, in one process, without DeepSpeed's engine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import UserError
from pipeline.checkpoint import (
    STATE,
    CheckpointState,
    newest_verified_alone,
    read_state,
    safe_globals,
    verify,
)


@dataclass(frozen=True)
class Loaded:
    """A model in fp32 on the CPU, in eval mode, with its tokenizer.

    `checkpoint` and `state` are None for an exported folder.
    """

    model: Any
    tokenizer: Any
    tokenizer_folder: Path
    checkpoint: Path | None
    state: CheckpointState | None


def load_model(path: Path) -> Loaded:
    """Read the model that `path` holds: a run folder (its newest verified checkpoint), a checkpoint, or an export.

    Raises:
        UserError: `path` is none of these, or is damaged.
    """
    from transformers import AutoTokenizer

    from model.modeling_globallocal import GlobalLocalForCausalLM

    if (path / "config.json").is_file():
        model = GlobalLocalForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
        return Loaded(model.eval(), AutoTokenizer.from_pretrained(path, local_files_only=True), path, None, None)
    folder = path
    if not (path / STATE).is_file():
        if not (path / "checkpoints").is_dir():
            raise UserError(f"{path}: neither a run folder, nor a checkpoint, nor an exported model")
        folder = newest_verified_alone(path / "checkpoints")
    elif problems := verify(path):
        raise UserError(problems)
    state = read_state(folder)
    model_config, tokenizer_folder = _rebuild(state)
    model = GlobalLocalForCausalLM(model_config)
    model.load_state_dict(consolidated_weights(folder, state))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    return Loaded(model.eval(), tokenizer, tokenizer_folder, folder, state)


def _rebuild(state: CheckpointState) -> tuple[Any, Path]:
    from data_prep.manifest import open_dataset
    from pipeline.config import validate
    from pipeline.train import build_model_config

    config = validate(state.config, "the checkpoint's state.json")
    dataset = open_dataset(config.data.dataset)
    if dataset.dataset_id != state.dataset_id:
        raise UserError(
            f"{config.data.dataset}: dataset_id {dataset.dataset_id[:12]}…, the checkpoint was trained on "
            f"{state.dataset_id[:12]}…; restore that dataset there"
        )
    return build_model_config(config, dataset), dataset.tokenizer_folder


def consolidated_weights(folder: Path, state: CheckpointState) -> dict[str, torch.Tensor]:
    """The fp32 weights and buffers of a verified checkpoint, gathered from all ranks' files; no code is run."""
    with only_weights():
        if state.zero_stage == 0 and state.precision == "fp32":
            path = folder / "mp_rank_00_model_states.pt"
            module: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)["module"]
            return module
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name))


@contextmanager
def only_weights() -> Iterator[None]:
    """Inside, every `torch.load`, DeepSpeed's own included, refuses anything but tensors and plain values."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(safe_globals()):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
