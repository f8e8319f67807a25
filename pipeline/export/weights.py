"""The weights of checkpoints as safetensors files, with one file's tensors in memory at a time."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.checkpoints.reshard import ParameterReader

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Weights:
    """The tensors of one checkpoint, or the mean of several, each read when it is asked for.

    Attributes:
        shapes: name → shape, of what an export holds: tied weights once, the pool too.
    """

    readers: Sequence[ParameterReader]
    shapes: dict[str, torch.Size]

    @classmethod
    def of(cls, model: nn.Module, readers: Sequence[ParameterReader]) -> "Weights":
        """Of a model that may lie on the meta device."""
        held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return cls(readers, {name: tensor.shape for name, tensor in held.items()})

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """One tensor. The mean is taken in fp32, of parameters alone: the pool is the same in all."""
        first, *others = self.readers
        if name in first.buffers:
            buffer: Tensor = first.buffers[name]
            return buffer.to(dtype, copy=True)
        shape = self.shapes[name]
        total = first.read(name, 0, shape.numel())
        for reader in others:
            total += reader.read(name, 0, shape.numel())
        return total.div_(len(self.readers)).view(shape).to(dtype)


def write_weights(weights: Weights, folder: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """`model.safetensors`, or several files and their index, each of at most so many bytes or one tensor."""
    split = split_state_dict_into_shards_factory(
        weights.shapes,
        get_storage_size=lambda shape: shape.numel() * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: weights.read(name, dtype) for name in names}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # as the other files: safetensors leaves it to its owner alone
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def differing_weights(weights: Weights, folder: Path, dtype: torch.dtype) -> list[str]:
    """Names of tensors of which the files in `folder` do not hold exactly what the checkpoints do."""
    missing, wrong = set(weights.shapes), []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as written:
            for name in written.keys():  # noqa: SIM118 – no mapping
                missing.discard(name)
                if name not in weights.shapes or not torch.equal(written.get_tensor(name), weights.read(name, dtype)):
                    wrong.append(name)
    return sorted({*missing, *wrong})
