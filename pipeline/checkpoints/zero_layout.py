"""Where the parameters lie in a rank's optimizer: which pieces, in which of its flat fp32 tensors, from where on.

DeepSpeed flattens, pads, slices and groups parameters differently at each ZeRO stage. The layout of a live engine is
asked of the engine itself; a checkpoint keeps the layout of each rank that wrote it. So one that was written by any
number of ranks at any stage can be read by parameter, and by nobody's guess at DeepSpeed's arithmetic.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data_prep.errors import UserError


class Piece(NamedTuple):
    """`elements` of a flattened parameter, from `parameter_start` on; in flat tensor `flat` from `flat_start` on."""

    parameter: str
    parameter_start: int
    flat: int
    flat_start: int
    elements: int


def flat_tensors(engine: Any) -> list[torch.Tensor]:
    """The fp32 tensors that this rank's optimizer updates, in the order of its groups."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):  # stages 1 and 2
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    groups = getattr(optimizer, "fp32_groups", None) or [group["params"] for group in optimizer.param_groups]
    return [tensor for group in groups for tensor in group]  # stage 0: a tensor a parameter


def layout(engine: Any) -> list[Piece]:
    """Every piece that this rank's optimizer holds."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    names = {parameter: name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    if stage == 0:
        groups = getattr(optimizer, "fp16_groups", None) or [group["params"] for group in optimizer.param_groups]
        parameters = [parameter for group in groups for parameter in group]
        return [Piece(names[item], 0, index, 0, item.numel()) for index, item in enumerate(parameters)]
    pieces = _pieces_of_stage_3(optimizer, names) if stage == 3 else _pieces_of_stages_1_and_2(names)
    return [piece for piece in pieces if piece.elements > 0]


def _pieces_of_stages_1_and_2(names: dict[torch.nn.Parameter, str]) -> Iterator[Piece]:
    for parameter, name in names.items():
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            inside, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield Piece(name, inside.start, mapping.param_group_index, flat.start, inside.numel)


def _pieces_of_stage_3(optimizer: Any, names: dict[torch.nn.Parameter, str]) -> Iterator[Piece]:
    for parameter, name in names.items():
        flat, flat_start, partition = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = optimizer._get_param_partition_rank(parameter) * partition  # the last partition is padded
        yield Piece(name, start, flat, flat_start, min(partition, parameter.ds_numel - start))  # type: ignore[attr-defined]


def file_name(rank: int) -> str:
    return f"layout-rank-{rank:05d}.pt"


def to_plain(pieces: list[Piece]) -> dict[str, Any]:
    """What a checkpoint keeps, in types that `weights_only` reads back."""
    return {"fields": list(Piece._fields), "pieces": [list(piece) for piece in pieces]}


def read(folder: Path, rank: int) -> list[Piece]:
    """The layout of one rank of a verified checkpoint.

    Raises:
        UserError: the checkpoint holds none, because an earlier version wrote it.
    """
    try:
        return [Piece(*values) for values in torch.load(folder / file_name(rank), weights_only=True)["pieces"]]
    except FileNotFoundError:
        raise UserError(
            f"{folder}: has no {file_name(rank)}, an earlier version wrote it: it can only be resumed with its own "
            "number of ranks, ZeRO stage and precision; do that once, and save"
        ) from None
