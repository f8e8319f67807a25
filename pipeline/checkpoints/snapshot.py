"""A copy of a rank's state in host memory, taken between two steps, so that training can go on while it is written."""

import copy
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator


class HostBuffers:
    """Host memory that successive snapshots of the same state share; pinned where the tensors lie on a device.

    It holds one copy of the tensors' bytes, from the first snapshot until it is dropped. A snapshot is valid until
    the next one is begun.
    """

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._used = 0

    def begin(self) -> None:
        """The next copies take the place of the earlier ones."""
        self._used = 0

    def copy(self, state: Any) -> Any:
        """A deep copy of nested dicts, lists and tuples whose tensors are copied into the buffers.

        Tensors that share a storage share it in the copy too, with their offsets and strides: `torch.save` writes
        the same bytes for the copy as for the original. Copies from a device are complete when this returns.
        """
        storages: dict[int, torch.UntypedStorage] = {}
        result = self._copy(state, storages)
        get_accelerator().synchronize()
        return result

    def _copy(self, item: Any, storages: dict[int, torch.UntypedStorage]) -> Any:
        if isinstance(item, torch.Tensor):
            return self._tensor(item, storages)
        if isinstance(item, dict):
            copied = copy.copy(item)  # keeps the class and its attributes
            for key, value in item.items():
                copied[key] = self._copy(value, storages)
            return copied
        if type(item) in (list, tuple):
            return type(item)(self._copy(value, storages) for value in item)
        return copy.deepcopy(item)

    def _tensor(self, tensor: torch.Tensor, storages: dict[int, torch.UntypedStorage]) -> torch.Tensor:
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = self._storage(storage)
        copied = torch.empty(0, dtype=tensor.dtype)
        return copied.set_(storages[storage._cdata], tensor.storage_offset(), tensor.size(), tensor.stride())

    def _storage(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """The storage's bytes in the next buffer, which is made anew where its size does not fit."""
        on_device = storage.device.type != "cpu"
        if self._used == len(self._buffers):
            self._buffers.append(torch.empty(0, dtype=torch.uint8))
        if self._buffers[self._used].numel() != storage.nbytes():
            self._buffers[self._used] = torch.empty(0, dtype=torch.uint8)  # freed before its successor is made
            self._buffers[self._used] = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=on_device)
        buffer = self._buffers[self._used]
        self._used += 1
        source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        buffer.copy_(source, non_blocking=on_device)
        return buffer.untyped_storage()
