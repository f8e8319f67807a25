"""Where the parameters lie in a rank's optimizer: which pieces, in which of its flat fp32 tensors, from where on.

DeepSpeed flattens, pads, slices and groups parameters differently at each ZeRO stage. The layout of a live engine is
asked of the engine itself; a checkpoint keeps the layout of each rank that wrote it. So one that was written by any
number of ranks at any stage can be read by parameter, and by nobody's guess at DeepSpeed's arithmetic.
"""

from pathlib import Path
from typing import Any

import torch

from data_prep.errors import UserError
from pipeline.engine.internals import Piece


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
