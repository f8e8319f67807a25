"""A run, a checkpoint or an exported folder → the model in memory, in one process, without DeepSpeed's engine."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_prep.errors import UserError
from data_prep.store import publish_file
from pipeline.checkpoints.folder import (
    MODEL_FOLDER,
    STATE,
    CheckpointState,
    kept_model,
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
        model_config = read_model_config(path)
        try:
            model = GlobalLocalForCausalLM.from_pretrained(
                path, config=model_config, dtype=torch.float32, local_files_only=True
            )
        except Exception as error:  # of several libraries: no weights, weights cut short, of another shape
            said = " ".join(str(error).split())[:300]
            raise UserError(f"{path}: its weights cannot be read: {said}; export the model again") from None
        # Out of the mapped file into aligned memory, as a checkpoint's are: else products differ in the last bit.
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        return Loaded(model.eval(), load_tokenizer(path), path, None, None)
    folder = find_checkpoint(path)
    state = read_state(folder)
    model_config, tokenizer_folder = rebuild(state, folder)
    model = GlobalLocalForCausalLM(model_config)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # reading needs no device, and DeepSpeed none to warn about
    from pipeline.checkpoints.reshard import ParameterReader, fill

    fill(model, ParameterReader(folder, state))
    return Loaded(model.eval(), load_tokenizer(tokenizer_folder), tokenizer_folder, folder, state)


def find_checkpoint(path: Path) -> Path:
    """`path` itself, verified, or the newest checkpoint of a run folder that verifies.

    Raises:
        UserError: `path` is neither, or is damaged.
    """
    if (path / STATE).is_file():
        if problems := verify(path):
            raise UserError(problems)
        return path
    if not (path / "checkpoints").is_dir():
        raise UserError(f"{path}: neither a run folder, nor a checkpoint, nor an exported model")
    return newest_verified_alone(path / "checkpoints")


def load_tokenizer(folder: Path) -> Any:
    """The sentencepiece tokenizer's Hugging Face twin; its class is named here so that no code of `folder` is run."""
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of several libraries
        said = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: its tokenizer cannot be read: {said}; restore its files") from None


def keep_model(config: "GlobalLocalConfig", tokenizer_folder: Path, run_folder: Path) -> None:
    """Write the run folder's `model/`. Raises OSError."""
    folder = run_folder / MODEL_FOLDER
    kept = folder / "tokenizer"  # apart: an export takes every file of it
    kept.mkdir(parents=True, exist_ok=True)
    for file in tokenizer_folder.iterdir():
        if file.is_file():
            shutil.copyfile(file, kept / f".{file.name}")
            os.replace(kept / f".{file.name}", kept / file.name)
    publish_file(folder / "config.json", config.to_json_string(use_diff=False).encode())


def read_model_config(folder: Path) -> "GlobalLocalConfig":
    """Raises UserError where `config.json` is none of a model of ours, or holds what cannot work."""
    from model.configuration_globallocal import GlobalLocalConfig

    try:
        return GlobalLocalConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of several libraries
        said = " ".join(str(error).split())[:300]
        raise UserError(f"{folder / 'config.json'}: {said}; export the model again") from None


def rebuild(state: CheckpointState, folder: Path) -> "tuple[GlobalLocalConfig, Path]":
    """The model's configuration, and the folder of its tokenizer, for a checkpoint in `folder`."""
    if kept := kept_model(folder, state.tokenizer_sha256):
        return read_model_config(kept), kept / "tokenizer"
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
