"""A new run that begins with the weights of an exported model."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from data_prep.errors import UserError
from data_prep.hashing import hash_file
from pipeline.checkpoints.folder import list_checkpoints
from pipeline.checkpoints.state import Origin
from pipeline.config import RunConfig
from pipeline.export.load import read_model_config

if TYPE_CHECKING:
    from model.configuration_globallocal import GlobalLocalConfig

SETTING = "training.init_from"
FREE = {
    *("max_position_embeddings", "dropout", "diversity_loss_scale", "z_loss", "activation_checkpointing", "use_cache"),
    "document_boundaries",
    *("initializer_range", "router_temperature"),  # of weights that are read instead
    *("bos_token_id", "eos_token_id", "pad_token_id"),  # of the tokenizer, which is compared by its hash
}
"""Settings of the model that a run may choose for itself, whatever weights it begins with."""


def initial_weights(config: RunConfig) -> Path | None:
    """The export that this start begins with; None where it goes on from a checkpoint, or from nothing."""
    fresh = config.checkpoint.resume in ("auto", "none") and not list_checkpoints(config.checkpoints)
    return config.training.init_from if fresh else None


def check_initial(folder: Path, model: "GlobalLocalConfig", tokenizer_sha256: str) -> None:
    """Raises UserError where `folder` is no export, or one of another vocabulary or of another model: a line each."""
    if not (folder / "config.json").is_file() or not list(folder.glob("model*.safetensors")):
        raise UserError(f"{SETTING}: {folder}: is no exported model; make one with `globallocal export RUN --output …`")
    theirs, problems = read_model_config(folder), []
    tokenizer = folder / "tokenizer.model"
    sha256 = hash_file(tokenizer) if tokenizer.is_file() else "unknown"
    if sha256 != tokenizer_sha256:
        problems.append(
            f"{SETTING}: {folder}: its vocabulary is another: tokenizer {sha256[:12]}…, the dataset's is "
            f"{tokenizer_sha256[:12]}…; prepare the dataset with --tokenizer {folder}"
        )
    for name in type(model).__annotations__:
        ours, other = getattr(model, name), getattr(theirs, name)
        if name not in FREE and ours != other and not (problems and name == "vocab_size"):
            problems.append(f"{SETTING}: {folder}: has {name} {other}, this run {ours}; set model.{name}={other}")
    if problems:
        raise UserError(problems)


@torch.no_grad()
def begin_with(model: nn.Module, folder: Path) -> None:
    """Every weight, and the pool, from the files in `folder`, one tensor at a time; fp32 whatever they are.

    Raises:
        UserError: they cannot be read, or do not hold this model.
    """
    wanted = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    problems = []
    for file in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(file, "pt") as held:
                for name in held.keys():  # noqa: SIM118 – no mapping
                    target = wanted.pop(name, None)
                    if target is None or tuple(target.shape) != tuple(held.get_slice(name).get_shape()):
                        problems.append(f"{SETTING}: {file}: {name} is none of this model's; export it again")
                    else:
                        target.copy_(held.get_tensor(name))
        except (SafetensorError, OSError) as error:
            problems.append(f"{SETTING}: {file}: cannot be read: {error}; export it again")
    problems += [f"{SETTING}: {folder}: holds no {name}; export it again" for name in wanted]
    if problems:
        raise UserError(problems[:5])


def origin_of(folder: Path) -> Origin:
    """The export by its place and by what it holds."""
    weights = sorted(folder.glob("model*.safetensors"))
    return Origin(folder=str(folder.absolute()), sha256={file.name: hash_file(file) for file in weights})
