"""Dilated causal convolutions as implicit matrix products, in Triton: no tap is copied and nothing is padded.

Tiles are read through tensor descriptors of [B, S, ·], which give zeros in front of a sequence and behind it: a tap is
a tile read so many rows earlier, and no sequence sees its neighbour. Each result is one product, whose inner dimension
runs over taps and features (over tokens, for the weight), summed in float32 and written once. The order of all sums
follows from the shapes: no atomic additions, no tuning at run time.

Per token and layer, in elements of memory (weights aside; what a product reads counted once), of n convolutions of K
taps, against products over copied taps; at h = 512, n = 2, K = 3 in bfloat16:

    forward     (1 + n) h,  3.1 kB      copied: (2 + n (3K + 3)) h,  26.6 kB
    backward    (2 + 3n) h,  8.2 kB     copied: (1 + n (7K + 3)) h,  50.2 kB

The arithmetic is the same: 2 n K h² operations forward and twice as many backward, 3.1 and 6.3 million.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # outside of `try`, transformers would refuse an exported model where Triton is missing
    raise

FEATURES = 64  # h is a multiple of it
GROUP = 8  # rows of tiles that are worked on together: their inputs stay in the cache
PROCESSORS = 132  # of an H100 or H200; on others the weight's gradient is only split less evenly
MOST_SPLITS = 16


class Tiles(NamedTuple):
    """How a product is cut: an output tile [rows, columns], `depth` of the inner dimension at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# What a measurement chose, by pass and h; elsewhere the first of `configurations`.
TUNED: dict[tuple[str, int], Tiles] = {}


def configurations(name: str, features: int, dtype: torch.dtype) -> Iterator[Tiles]:
    """Tiles for a pass ("forward", "input", "weight") that fit h and an H100's shared memory, the likely best first."""
    wide = (
        Tiles(128, 256, 64, 8, 4),
        Tiles(128, 256, 64, 8, 3),
        Tiles(128, 128, 64, 4, 4),
        Tiles(128, 128, 64, 8, 4),
        Tiles(128, 64, 64, 4, 4),
        Tiles(64, 64, 64, 4, 4),
    )
    exact = (Tiles(64, 64, 32, 4, 2), Tiles(64, 64, 16, 4, 3), Tiles(32, 64, 32, 4, 2))  # IEEE: no tensor cores
    for tiles in exact if dtype == torch.float32 else wide:
        if features % tiles.columns == 0 and (name != "weight" or features % tiles.rows == 0):
            yield tiles


@functools.cache
def _dtypes_on(device: torch.device) -> tuple[torch.dtype, ...]:
    """What the kernels serve: half precision on GPUs whose shared memory holds the tiles (9.x and 10.x).

    Float32 is left to cuBLAS, but for Triton's interpreter on the CPU, which knows no bfloat16.
    """
    if device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device)[0] in (9, 10):
        return torch.bfloat16, torch.float16
    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return torch.float16, torch.float32
    return ()


def suits_kernels(x: Tensor, *others: Tensor) -> bool:
    """Whether the kernels take x [B, S, h] with weights and gradients."""
    return (
        x.dtype in _dtypes_on(x.device)
        and all(tensor.dtype == x.dtype for tensor in others)
        and x.shape[2] % FEATURES == 0
        and x.numel() > 0
    )


@triton.jit
def _place(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows at a time, column by column."""
    first = tile // (GROUP * column_tiles) * GROUP
    rows = min(row_tiles - first, GROUP)
    place = tile % (GROUP * column_tiles)
    return first + place % rows, place // rows


@triton.jit
def _entry(values, index, COUNT: tl.constexpr):
    """values[index], of a tuple of COUNT numbers."""
    chosen = tl.where(index == 0, values[0], 0)
    for i in tl.static_range(1, COUNT):
        chosen = tl.where(index == i, values[i], chosen)
    return chosen


@triton.jit
def _forward(
    x, weight, bias, out, dilations, length, row_tiles,
    H: tl.constexpr, TAPS: tl.constexpr, BRANCHES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = _place(tl.program_id(0), row_tiles, BRANCHES * H // COLUMNS, GROUP)
    column *= COLUMNS
    sequence_tiles = tl.cdiv(length, ROWS)
    sequence, start = row // sequence_tiles, row % sequence_tiles * ROWS
    dilation = _entry(dilations, column // H, BRANCHES)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(TAPS * H // DEPTH):
        earlier = (TAPS - 1 - step * DEPTH // H) * dilation
        tokens = x.load([sequence, start - earlier, step * DEPTH % H]).reshape(ROWS, DEPTH)
        matrix = weight.load([column, step * DEPTH])
        sums = tl.dot(tokens, matrix.T, sums, input_precision="ieee")
    sums += tl.load(bias + column + tl.arange(0, COLUMNS)).to(tl.float32)[None, :]
    out.store([sequence, start, column], sums.to(out.dtype).reshape(1, ROWS, COLUMNS))


@triton.jit
def _input_gradient(
    grad, weight, out, dilations, length, row_tiles,
    H: tl.constexpr, TAPS: tl.constexpr, BRANCHES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = _place(tl.program_id(0), row_tiles, H // COLUMNS, GROUP)
    column *= COLUMNS
    sequence_tiles = tl.cdiv(length, ROWS)
    sequence, start = row // sequence_tiles, row % sequence_tiles * ROWS
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(BRANCHES * TAPS * H // DEPTH):
        product = step * DEPTH // H  # branch by branch, tap by tap
        branch, tap = product // TAPS, product % TAPS
        feature = branch * H + step * DEPTH % H
        later = (TAPS - 1 - tap) * _entry(dilations, branch, BRANCHES)
        tokens = grad.load([sequence, start + later, feature]).reshape(ROWS, DEPTH)
        matrix = weight.load([feature, tap * H + column])
        sums = tl.dot(tokens, matrix, sums, input_precision="ieee")
    out.store([sequence, start, column], sums.to(out.dtype).reshape(1, ROWS, COLUMNS))


@triton.jit
def _weight_gradient(
    grad, x, out, dilations, length, batch, row_tiles,
    H: tl.constexpr, TAPS: tl.constexpr, BRANCHES: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = _place(tl.program_id(0), row_tiles, TAPS * H // COLUMNS, GROUP)
    row, column, split = row * ROWS, column * COLUMNS, tl.program_id(1)
    earlier = (TAPS - 1 - column // H) * _entry(dilations, row // H, BRANCHES)
    sequence_blocks = tl.cdiv(length, DEPTH)
    share = tl.cdiv(batch * sequence_blocks, SPLITS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(split * share, min((split + 1) * share, batch * sequence_blocks)):
        sequence, start = block // sequence_blocks, block % sequence_blocks * DEPTH
        errors = grad.load([sequence, start, row]).reshape(DEPTH, ROWS)
        tokens = x.load([sequence, start - earlier, column % H]).reshape(DEPTH, COLUMNS)
        sums = tl.dot(errors.T, tokens, sums, input_precision="ieee")
    rows = split.to(tl.int64) * BRANCHES * H + row + tl.arange(0, ROWS)
    places = rows[:, None] * (TAPS * H) + column + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + places, sums.to(out.dtype.element_ty))


def _tiles(name: str, tiles: Tiles | None, features: int, dtype: torch.dtype) -> Tiles:
    tuned = None if dtype == torch.float32 else TUNED.get((name, features))
    return tiles or tuned or next(configurations(name, features, dtype))


def _described(tensor: Tensor, *block: int) -> TensorDescriptor:
    tensor = tensor.contiguous()
    if tensor.data_ptr() % 16:  # a parameter somewhere in an optimiser's flat memory
        tensor = tensor.clone()
    return TensorDescriptor.from_tensor(tensor, list(block))


def convolve(x: Tensor, weight: Tensor, bias: Tensor, dilations: list[int], tiles: Tiles | None = None) -> Tensor:
    """x [B, S, h], weight [n, h, K·h], bias [n, h] → [B, S, n·h]."""
    batch, length, h = x.shape
    branches, _, inner = weight.shape
    rows, columns, depth, warps, stages = _tiles("forward", tiles, h, x.dtype)
    out = x.new_empty(batch, length, branches * h)
    row_tiles = batch * triton.cdiv(length, rows)
    with torch.cuda.device_of(x):
        _forward[(row_tiles * (branches * h // columns),)](
            _described(x, 1, rows, depth),
            _described(weight.reshape(branches * h, inner), columns, depth),
            bias.contiguous(),
            _described(out, 1, rows, columns),
            tuple(dilations), length, row_tiles, h, inner // h, branches, rows, columns, depth, GROUP,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


def input_gradient(grad: Tensor, weight: Tensor, dilations: list[int], tiles: Tiles | None = None) -> Tensor:
    """Gradient of the output [B, S, n·h], weight [n, h, K·h] → gradient of the input [B, S, h]."""
    batch, length, _ = grad.shape
    branches, h, inner = weight.shape
    rows, columns, depth, warps, stages = _tiles("input", tiles, h, grad.dtype)
    out = grad.new_empty(batch, length, h)
    row_tiles = batch * triton.cdiv(length, rows)
    with torch.cuda.device_of(grad):
        _input_gradient[(row_tiles * (h // columns),)](
            _described(grad, 1, rows, depth),
            _described(weight.reshape(branches * h, inner), depth, columns),
            _described(out, 1, rows, columns),
            tuple(dilations), length, row_tiles, h, inner // h, branches, rows, columns, depth, GROUP,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


def weight_gradient(grad: Tensor, x: Tensor, taps: int, dilations: list[int], tiles: Tiles | None = None) -> Tensor:
    """Gradient of the output [B, S, n·h], input [B, S, h] → gradient of the weight [n, h, K·h]."""
    batch, length, h = x.shape
    branches = len(dilations)
    rows, columns, depth, warps, stages = _tiles("weight", tiles, h, x.dtype)
    row_tiles = branches * h // rows
    num_tiles = row_tiles * (taps * h // columns)
    splits = _splits(num_tiles, batch * triton.cdiv(length, depth))
    out = x.new_empty(splits, branches, h, taps * h, dtype=torch.float32 if splits > 1 else x.dtype)
    with torch.cuda.device_of(x):
        _weight_gradient[(num_tiles, splits)](
            _described(grad, 1, depth, rows),
            _described(x, 1, depth, columns),
            out,
            tuple(dilations), length, batch, row_tiles, h, taps, branches, splits, rows, columns, depth, GROUP,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out.sum(dim=0).to(x.dtype) if splits > 1 else out[0]


def _splits(num_tiles: int, num_blocks: int) -> int:
    """In how many parts the tokens are summed: the fewest that keep 95 % of the processors busy, or else the best."""

    def busy(splits: int) -> float:
        programs = num_tiles * splits
        return programs / (triton.cdiv(programs, PROCESSORS) * PROCESSORS)

    possible = range(1, max(1, min(MOST_SPLITS, num_blocks // 8)) + 1)
    return next((splits for splits in possible if busy(splits) >= 0.95), max(possible, key=busy))
