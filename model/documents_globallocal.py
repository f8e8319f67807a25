"""Where documents begin, for models that forget at the token which ends one (`document_boundaries: reset`).

What passes from layer to layer is one tensor, int64 [B, S]: how many tokens of its own document stand before each
position. A convolution's tap reaches back into the document as far as that number, and a state begins anew at 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def ends_document(ids: Tensor, ends: Sequence[int]) -> Tensor:
    """Where ids are one of `ends`: bool, of their shape."""
    return torch.stack([ids == end for end in ends]).any(dim=0)


def document_offsets(
    ids: Tensor, ends: Sequence[int], mask: Tensor | None = None, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How many tokens of its document stand before each position; a token that ends a document is its last one.

    Padding in front of a sequence counts to its first document: it is 0 to whatever reaches it.

    Args:
        ids: int64 [B, S].
        ends: ids that end a document.
        mask: [B, S], 0 at padding, which ends no document.
        before: int64 [B, 1], the offset of the first position; None for 0.

    Returns:
        Offsets, int64 [B, S], and that of the token that follows, int64 [B, 1].
    """
    ended = ends_document(ids, ends)
    ended = (ended if mask is None else ended & (mask != 0)).to(ids.dtype)
    place, count = torch.arange(ids.shape[1], device=ids.device), ended.cumsum(dim=1)
    document = count - ended
    # Where each document of a row begins; in column 0 the first one. (ONNX has no running maximum.)
    first = ids.new_zeros(ids.shape[0], ids.shape[1] + 1).scatter(1, count * ended, (place + 1) * ended)
    offsets = place - first.gather(1, document)
    if before is not None:
        offsets = offsets + before * (document == 0)
    return offsets, (offsets[:, -1:] + 1) * (1 - ended[:, -1:])
