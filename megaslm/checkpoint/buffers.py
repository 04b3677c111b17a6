"""Host memory that a copy of the training state goes to, so that training may go on while the copy is written."""

from collections.abc import Hashable

import torch
from torch import Tensor


class HostBuffers:
    """Buffers by key, in fp32.

    Where the state lies on a GPU they are pinned, since that is copied to at the full rate of the bus, and kept from
    save to save, since pinning takes longer than copying. They are pinned in place, at their exact size: torch's own
    pinned memory comes in powers of two. On a CPU they last as long as the snapshot.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, Tensor] = {}
        self._device: torch.device | None = None

    def copy(self, key: Hashable, source: Tensor) -> Tensor:
        """fp32 copy of `source`, in its shape. From a GPU it is under way until `wait`.

        Raises:
            MemoryError, RuntimeError: no room.
        """
        if not source.is_cuda:
            return torch.empty(source.shape, dtype=torch.float32).copy_(source)
        self._device = source.device
        if key not in self._kept:
            buffer = torch.empty(source.shape, dtype=torch.float32)
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
            self._kept[key] = buffer
        return self._kept[key].copy_(source, non_blocking=True)

    def wait(self) -> None:
        """Until all copies are there."""
        if self._device is not None:
            torch.cuda.synchronize(self._device)
