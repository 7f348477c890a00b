"""Where and in which precision to compute."""

from __future__ import annotations

import subprocess
import sys

import torch

from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.torchrun import local_rank


def resolve_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda`, `cuda:1`, … into a device; `auto` takes the GPU if there is one.

    Of several processes on one machine, which torchrun numbers, `auto` gives each a GPU of its own.

    Raises:
        UsageError: no such device here.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"--device {name} cannot be used here: {reason}") from None
    return device


def learning_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for matrix products while learning.

    bfloat16 on GPUs, and on CPUs whose AMX tiles really work: there it is three times as fast as float32. Without
    tiles float32 is faster.
    """
    if device.type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if _amx_works() else torch.float32


def _amx_works() -> bool:
    """Whether AMX is there and runs. Virtual machines may advertise it and trap, so a child process tries it."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    if not supported():
        return False
    trial = (
        "import torch; a = torch.ones(256, 256, dtype=torch.bfloat16); raise SystemExit(float((a @ a)[0, 0]) != 256)"
    )
    return subprocess.run([sys.executable, "-c", trial], capture_output=True, check=False).returncode == 0
