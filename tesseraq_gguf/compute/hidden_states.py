"""Where the hidden states of the calibration text are kept from block to block: on the GPU, in memory, or on disk.

The two chains (`reconstruction.py`) have samples × tokens × width × 4 bytes each, which for large models is more than a
block with everything that is learned in it. Results do not depend on the place.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from tesseraq_gguf.compute.torchrun import local_world_size
from tesseraq_gguf.errors import UsageError

Empty = Callable[[torch.Size], Tensor]
"""Makes a float32 tensor of a shape, its numbers not set."""

_GPU_SHARE = 0.25
_MEMORY_SHARE = 0.5
"""Of what is free, without a budget; of main memory the processes of a machine take it together."""


@dataclass(frozen=True)
class Place:
    """Where to keep tensors.

    Attributes:
        name: `cpu`, a GPU's name such as `cuda:0`, or `disk`.
        folder: holds the files of `disk`; they have no name there once they are open, so none is left behind.
    """

    name: str
    folder: Path

    def empty(self, shape: torch.Size) -> Tensor:
        """Make a float32 tensor; one on disk is an ordinary tensor of the CPU, and the system moves its pages.

        Raises:
            UsageError: the disk has no room.
        """
        if self.name != "disk":
            return torch.empty(shape, device=self.name)
        return _on_disk(self.folder, shape)


def choose_place(size: int, device: torch.device, budget: int | None, folder: Path) -> Place:
    """Find the fastest place for `size` bytes.

    Args:
        size: bytes of all that is to be kept.
        device: where to compute.
        budget: bytes that may be taken of the device's memory; None takes a part of what is free. What a GPU has no
            room for goes to main memory if that has.
        folder: for files.
    """
    if device.type == "cuda":
        allowed = int(torch.cuda.mem_get_info(device)[0] * _GPU_SHARE) if budget is None else budget
        if size <= allowed:
            return Place(str(device), folder)
        budget = None
    share = _MEMORY_SHARE / local_world_size()
    allowed = int(psutil.virtual_memory().available * share) if budget is None else budget
    return Place("cpu" if size <= allowed else "disk", folder)


def _on_disk(folder: Path, shape: torch.Size) -> Tensor:
    size = max(shape.numel(), 1) * torch.float32.itemsize
    try:
        folder.mkdir(parents=True, exist_ok=True)  # of a team's hosts only the first one has it
        handle, name = tempfile.mkstemp(prefix="hidden-states-", dir=folder)
        try:
            _reserve(handle, size)
            return torch.from_file(name, shared=True, size=shape.numel(), dtype=torch.float32).view(shape)
        finally:
            os.close(handle)
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"{folder} has no room for {size / 1e9:.1f} GB of activations ({os.strerror(error.errno or errno.EIO)}). "
            "Free some, give --work-dir on another disk or a larger --memory-budget, or use fewer --samples"
        ) from None


def _reserve(handle: int, size: int) -> None:
    """Take the room now: a write to mapped memory that finds none later would end the process without a word."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.truncate(handle, size)
