"""A run, a checkpoint or an exported folder → the model in memory, in one process, without DeepSpeed's engine."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_prep.errors import UserError
from pipeline.checkpoints.folder import (
    STATE,
    CheckpointState,
    newest_verified_alone,
    read_state,
    verify,
)

if TYPE_CHECKING:
    from model.configuration_globallocal import GlobalLocalConfig
    from pipeline.config import RunConfig
    from pipeline.data.corpus import Corpus


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
    from transformers.utils.logging import disable_progress_bar

    from model.modeling_globallocal import GlobalLocalForCausalLM

    disable_progress_bar()
    if (path / "config.json").is_file():
        model = GlobalLocalForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
        # Out of the mapped file into aligned memory, as a checkpoint's are: else products differ in the last bit.
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        return Loaded(model.eval(), load_tokenizer(path), path, None, None)
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
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # reading needs no device, and DeepSpeed none to warn about
    from pipeline.checkpoints.reshard import ParameterReader, fill

    fill(model, ParameterReader(folder, state))
    return Loaded(model.eval(), load_tokenizer(tokenizer_folder), tokenizer_folder, folder, state)


def load_tokenizer(folder: Path) -> Any:
    """The sentencepiece tokenizer's Hugging Face twin; its class is named here so that no code of `folder` is run."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _rebuild(state: CheckpointState) -> tuple[Any, Path]:
    from pipeline.config import validate
    from pipeline.data.corpus import open_corpus

    config = validate(state.config, "the checkpoint's state.json")
    corpus = open_corpus(config.data)
    if corpus.dataset_id != state.dataset_id:
        raise UserError(
            f"{config.data.dataset}: dataset_id {corpus.dataset_id[:12]}…, the checkpoint was trained on "
            f"{state.dataset_id[:12]}…; restore that dataset there"
        )
    return build_model_config(config, corpus), corpus.tokenizer_folder


def build_model_config(config: "RunConfig", corpus: "Corpus") -> "GlobalLocalConfig":
    """The dataset's tokenizer fixes the vocabulary and the special ids; a larger `model.vocab_size` may pad it."""
    tokenizer = corpus.tokenizer
    wanted = config.model.overrides.get("vocab_size", tokenizer.vocab_size)
    if wanted < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size = {wanted:,} is below the {tokenizer.vocab_size:,} ids of the dataset's tokenizer "
            f"({config.data.dataset}); remove it, or raise it to {tokenizer.vocab_size:,} or more"
        )
    return config.model.build(
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=config.data.sequence_length,
    )


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
