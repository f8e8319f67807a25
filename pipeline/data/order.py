"""The order of samples: pure functions of a seed and a position, with no state and O(1) memory.

An epoch's order is a keyed permutation of [0, N): a Feistel network (Luby and Rackoff 1988,
doi:10.1137/0217022) on the smallest power of two that holds N, applied again to results outside [0, N)
until they fall inside ("cycle walking", Black and Rogaway 2002, doi:10.1007/3-540-45760-7_9). Integers
only, so every machine computes the same order.

Legend: N samples in an epoch; position: how many samples the whole job has consumed before this one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: keeps round keys apart
_MINIMUM_BITS = 6  # halves of fewer than 3 bits have too few round functions to mix well
MAX_SAMPLES = 1 << 45


def mix(value: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit words in which every input bit moves about half of the output bits.

    The finaliser of SplitMix64 (Steele, Lea and Flood 2014, doi:10.1145/2714064.2660195).
    """
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = value ^ (value >> np.uint64(31))
    return mixed


def order_key(seed: int, number: int | np.ndarray) -> np.ndarray:
    """64-bit keys for (seed, number), where number is an epoch or a window: int or an array of them."""
    digest = hashlib.sha256(f"globallocal sample order {seed}".encode()).digest()
    base = np.frombuffer(digest[:8], dtype="<u8").astype(np.uint64)
    return mix(base + mix(np.atleast_1d(np.asarray(number)).astype(np.uint64) + _GOLDEN))


def permute(index: int | np.ndarray, size: int | np.ndarray, key: int | np.ndarray) -> np.ndarray:
    """Where a keyed permutation of [0, size) sends each index.

    Args:
        index: int or integer array [n], each in [0, size).
        size: of the permuted range, up to 2^45; one for all, or [n].
        key: any 64-bit number, one for all, or [n].

    Returns:
        int64 [n] in [0, size): for one size and key, distinct indices give distinct results.
    """
    value, size, key = np.broadcast_arrays(
        *(np.atleast_1d(np.asarray(x)).astype(np.uint64) for x in (index, size, key))
    )
    if value.size == 0:
        return np.empty(0, np.int64)
    if (value >= size).any() or int(size.max()) > MAX_SAMPLES:
        raise ValueError(f"indices must be below size, and size at most 2^45; got size {size.max()}")
    result = np.empty(value.shape, np.uint64)
    bits = np.maximum(np.frexp((size - np.uint64(1)).astype(np.float64))[1], _MINIMUM_BITS)
    for width in np.unique(bits):  # nearly always one width
        chosen = np.flatnonzero(bits == width)
        result[chosen] = _cycle_walk(value[chosen], size[chosen], key[chosen], int(width))
    return result.astype(np.int64)


def _cycle_walk(value: np.ndarray, size: np.ndarray, key: np.ndarray, bits: int) -> np.ndarray:
    """The permutation of [0, 2^bits), repeated where it leaves [0, size): fewer than two times on average."""
    value = _feistel(value, key, bits)
    outside = np.flatnonzero(value >= size)
    while outside.size:
        value[outside] = _feistel(value[outside], key[outside], bits)
        outside = outside[value[outside] >= size[outside]]
    return value


def _feistel(value: np.ndarray, key: np.ndarray, bits: int) -> np.ndarray:
    """Changes the left half by a function of the right one, then the right by the left, and so on.

    Each such change is its own inverse, whatever the function, so the whole is a bijection; the halves may
    differ by one bit.
    """
    right_bits = np.uint64(bits // 2)
    right_mask = (np.uint64(1) << right_bits) - np.uint64(1)
    left_mask = (np.uint64(1) << np.uint64(bits - bits // 2)) - np.uint64(1)
    left, right = value >> right_bits, value & right_mask
    round_key = key
    for number in range(_ROUNDS):
        round_key = round_key + _GOLDEN
        if number % 2 == 0:
            left = left ^ (mix(right ^ round_key) & left_mask)
        else:
            right = right ^ (mix(left ^ round_key) & right_mask)
    return (left << right_bits) | right


@dataclass(frozen=True)
class SampleOrder:
    """Endless epochs over N samples, each epoch a permutation of its own.

    Attributes:
        num_samples: N, at least 1.
        seed: any integer; with the epoch it keys the permutation.
    """

    num_samples: int
    seed: int

    def sample_index(self, position: int | np.ndarray) -> np.ndarray:
        """int64 [n]: which sample is read at each position (epoch = position // N)."""
        epoch, place = np.divmod(np.atleast_1d(np.asarray(position, dtype=np.int64)), self.num_samples)
        return permute(place, self.num_samples, order_key(self.seed, epoch))

    def window(self, position: int) -> int:
        """All samples are one window, in every epoch."""
        return 0

    def window_ranges(self, window: int) -> np.ndarray:
        """int64 [1, 2]: first and one-past-last sample."""
        return np.array([[0, self.num_samples]])


@dataclass(frozen=True)
class WindowedOrder:
    """Endless epochs in which samples that lie together are read near each other in time.

    The samples are cut into blocks of consecutive ones, the blocks are permuted, and each run of
    `blocks_per_window` blocks in that new order is a window, whose samples are permuted among themselves.
    Reading touches one window of the data at a time. The last window of an epoch may hold fewer blocks, and
    takes the N % block_samples samples that do not fill one.

    Attributes:
        num_samples: N, at least 1.
        seed: any integer.
        block_samples: consecutive samples per block.
        blocks_per_window: more of them mix the data better and need a larger cache.
    """

    num_samples: int
    seed: int
    block_samples: int
    blocks_per_window: int

    @cached_property
    def num_blocks(self) -> int:
        return self.num_samples // self.block_samples

    @cached_property
    def windows_per_epoch(self) -> int:
        return max(1, -(-self.num_blocks // self.blocks_per_window))

    def sample_index(self, position: int | np.ndarray) -> np.ndarray:
        """int64 [n]: which sample is read at each position."""
        epoch, place = np.divmod(np.atleast_1d(np.asarray(position, dtype=np.int64)), self.num_samples)
        window_samples = self.block_samples * self.blocks_per_window
        window = np.minimum(place // window_samples, self.windows_per_epoch - 1)
        start = window * window_samples
        is_last = window == self.windows_per_epoch - 1
        length = np.where(is_last, self.num_samples - start, window_samples)
        window_key = order_key(self.seed, epoch * self.windows_per_epoch + window)
        place = start + permute(place - start, length, window_key)
        block, offset = np.divmod(place, self.block_samples)
        if self.num_blocks == 0:
            return np.asarray(place)
        whole = block < self.num_blocks
        block_key = order_key(~self.seed, epoch)
        moved = permute(np.where(whole, block, 0), self.num_blocks, block_key)
        return np.asarray(np.where(whole, moved, block) * self.block_samples + offset)

    def window(self, position: int) -> int:
        """Number of the window, counted over all epochs, that a position lies in."""
        epoch, place = divmod(position, self.num_samples)
        inside = min(place // (self.block_samples * self.blocks_per_window), self.windows_per_epoch - 1)
        return epoch * self.windows_per_epoch + inside

    def window_ranges(self, window: int) -> np.ndarray:
        """int64 [blocks, 2]: first and one-past-last sample of each block read in a window."""
        epoch, inside = divmod(window, self.windows_per_epoch)
        first = inside * self.blocks_per_window
        is_last = inside == self.windows_per_epoch - 1
        blocks = np.arange(first, min(first + self.blocks_per_window, self.num_blocks))
        starts = permute(blocks, max(1, self.num_blocks), order_key(~self.seed, epoch)) * self.block_samples
        ranges = np.stack([starts, starts + self.block_samples], axis=1)
        tail = self.num_blocks * self.block_samples
        if is_last and tail < self.num_samples:
            ranges = np.concatenate([ranges, [[tail, self.num_samples]]])
        return ranges
