"""Where and in which precision to compute."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import torch

from tesseraq_gguf.compute.torchrun import local_rank
from tesseraq_gguf.errors import UsageError

_TRIAL = """
import time, torch
torch.set_num_threads(1)
def fastest(dtype):
    a = torch.ones(512, 512, dtype=dtype)
    assert float((a @ a)[0, 0]) == 512
    times = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(4):
            a @ a
        times.append(time.perf_counter() - began)
    return min(times)
raise SystemExit(fastest(torch.float32) < 1.5 * fastest(torch.bfloat16))
"""
"""Succeeds where bfloat16 is at least half as fast again: less would not pay for its rounding."""


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

    bfloat16 on GPUs, and on processors where it really is faster: with AMX tiles it is three times as fast as float32,
    on AMD's Zen 5 almost five times, and on Intel's cores without tiles it is slower.
    """
    if device.type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if _bfloat16_pays() else torch.float32


@cache
def _bfloat16_pays() -> bool:
    """Whether products of bfloat16 matrices are faster here than those of float32, by far and without a fault.

    Virtual machines may advertise AMX and trap, so a child process tries it.
    """
    advertised = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    if not any(getattr(torch.cpu, name, lambda: False)() for name in advertised):
        return False
    tried = subprocess.run([sys.executable, "-c", _TRIAL], capture_output=True, check=False)
    return tried.returncode == 0
