"""Bytes that one rank needs: model states under ZeRO by arithmetic, activations by a rehearsal without memory.

The arithmetic is that of DeepSpeed 0.19 with AdamW or Muon (ZeRO: arXiv:1910.02054), for P parameters on N ranks.
"""

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.configuration_globallocal import GlobalLocalConfig
from model.modeling_globallocal import GlobalLocalForCausalLM
from pipeline.engine.deepspeed_json import device
from pipeline.engine.muon import parameters_at_once
from pipeline.engine.optim import is_matrix

FP32_BYTES = 4
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MOMENTS_BYTES = 2 * FP32_BYTES


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank's device, by what they hold, and what lies in host memory or on NVMe instead."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    offloaded: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations


@dataclass(frozen=True)
class ModelSize:
    """The numbers that the memory of a model follows from.

    Attributes:
        parameters: trainable parameters.
        frozen: elements of buffers, kept whole on every rank (the tensor pool).
        largest_block: parameters of the largest block; ZeRO-3 gathers as much at once.
        activations: bytes at the peak of a forward and backward pass, gradients of parameters not counted.
        matrices: parameters that Muon moves; 0 under AdamW.
        matrices_at_once: the most of them that a step puts together.
    """

    parameters: int
    frozen: int
    largest_block: int
    activations: int
    matrices: int = 0
    matrices_at_once: int = 0


def measure(
    config: GlobalLocalConfig, micro_batch_size: int, sequence_length: int, precision: str, optimizer: str
) -> ModelSize:
    """Build the model and run it forward and backward on torch's meta device: exact sizes, no memory, no work."""
    with torch.device("meta"):
        model = GlobalLocalForCausalLM(config)
    torch.nn.Module.to(model, dtype=DTYPES[precision]).train()
    for parameter in model.parameters():  # as ZeRO-2 and 3 do: reduced, then gone
        parameter.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
    tokens = torch.zeros(micro_batch_size, sequence_length, dtype=torch.long, device="meta")
    with LiveBytes([*model.parameters(), *model.buffers(), tokens]) as memory:
        model(tokens, shift_labels=tokens).loss.backward()
    by_shape = Counter(
        tuple(item.shape) for name, item in model.named_parameters() if optimizer == "muon" and is_matrix(name, item)
    )
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        frozen=sum(buffer.numel() for buffer in model.buffers()),
        largest_block=max(sum(p.numel() for p in block.parameters()) for block in model.model.layers),
        activations=memory.peak,
        matrices=sum(math.prod(shape) * count for shape, count in by_shape.items()),
        matrices_at_once=max(
            (math.prod(shape) * min(count, parameters_at_once(shape)) for shape, count in by_shape.items()), default=0
        ),
    )


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that operations inside it make, while they live; `peak` is the most.

    Views of the `given` tensors are none of them.
    """

    def __init__(self, given: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._given = {tensor.untyped_storage()._cdata for tensor in given}
        self._storages: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, torch.Tensor):
                self._add(item.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages and key not in self._given:
            self._storages.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size


def rank_memory(
    size: ModelSize,
    stage: int,
    ranks: int,
    precision: str,
    zero: Mapping[str, Any],
    *,
    accumulates: bool = True,
) -> RankMemory:
    """One rank's bytes under ZeRO `stage`; `zero` is the JSON's `zero_optimization` (buckets, offload).

    16-bit training keeps fp32 master weights and sums gradients in fp32; fp32 training needs neither, but ZeRO
    keeps a master copy all the same. Stage 1 keeps whole gradients between the micro-batches of a step, where there
    are several (`accumulates`). The peak is in backward, or in the optimizer's step where that needs more than
    activations and buckets do: the partition's gradients once more, as one tensor, and at stage 2 those that the last
    micro-batch adds. One rank alone has nothing to gather. Muon keeps one moment of its matrices; a step puts some of
    them together on every rank, of which each rank orthogonalizes its share (five tensors of that size).
    """
    width, p = DTYPE_BYTES[precision], size.parameters
    mixed = width < FP32_BYTES

    def share(count: int, from_stage: int) -> int:
        return -(-count // ranks) if stage >= from_stage else count

    weights = width * share(p, 3)
    gradients = FP32_BYTES * share(p, 2 if accumulates else 1)
    optimizer = MOMENTS_BYTES * share(p, 1) + (FP32_BYTES * share(p, 1) if mixed or stage else 0)
    optimizer -= MOMENTS_BYTES // 2 * share(size.matrices, 1)
    group = max(size.matrices, p - size.matrices)  # one after the other is stepped
    step = FP32_BYTES * (share(group, 1) + (share(p, 1) if stage == 2 and accumulates else 0)) if stage else 0
    together = (2 if precision == "bf16" else FP32_BYTES) * size.matrices_at_once
    step += together + 5 * together // ranks
    released = gradients - FP32_BYTES * share(p, 1)  # stage 1 keeps its part alone once they are reduced
    offloaded = gathered = 0
    if stage == 3:
        # DeepSpeed gathers a block and what it prefetches, and lets go of nothing that is used again soon enough:
        # the last layers, between forward and backward, up to half the distance.
        ahead = size.largest_block + int(zero.get("stage3_prefetch_bucket_size", 5e7))
        kept = min(
            int(zero.get("stage3_max_live_parameters", 1e9)), int(zero.get("stage3_max_reuse_distance", 1e9)) // 2
        )
        gathered = width * min(p, max(ahead, kept)) if ranks > 1 else 0
        weights += gathered
        partition = int(zero.get("zero_hpz_partition_size", 1))
        weights += width * -(-p // partition) if partition > 1 else 0  # the second copy, split within a node
    if device(zero, "offload_optimizer") != "none" and stage:
        offloaded += optimizer + gradients
        optimizer = gradients = step = 0
    if device(zero, "offload_param") != "none" and stage == 3:
        offloaded += width * share(p, 3)
        weights -= width * share(p, 3)
    buckets = _bucket_bytes(stage, width, zero)
    return RankMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        buffers=width * size.frozen + buckets + max(0, step - size.activations - buckets - gathered - released),
        activations=size.activations,
        offloaded=offloaded,
    )


def _bucket_bytes(stage: int, width: int, zero: Mapping[str, Any]) -> int:
    """Gradients on their way: one flat buffer, two where communication overlaps (stages 1 and 2)."""
    if not stage or not zero.get("contiguous_gradients", True):
        return 0
    elements = int(zero.get("reduce_bucket_size", 5e8))
    copies = 2 if zero.get("overlap_comm") and stage < 3 else 1
    return copies * elements * (FP32_BYTES if stage == 1 else width)
