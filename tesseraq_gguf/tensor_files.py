"""Writing safetensors files: in what dtype, and with an error for users where the disk does not take them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tesseraq_gguf.errors import ConversionError

_HALF = 2.0**-11
"""Relative error of rounding to float16, of numbers that it holds with all its digits."""


def narrowest(weights: Tensor, quantised: bool = False) -> Tensor:
    """Return weights in the narrowest dtype that holds them: vectors in float32, matrices in 16 bits where these do.

    Args:
        weights: float32.
        quantised: whether they are products of codes and scales of some bits. These have more digits than float16, but
            what it drops is a small part of what quantising took away (of 8 bits at most a sixteenth of half a step);
            so here float16 will do as long as it has all its digits, and the file is half as large.
    """
    if weights.dim() < 2:
        return weights.clone()
    for dtype in (torch.float16, torch.bfloat16):
        stored = weights.to(dtype)
        error = (stored.float() - weights).abs()
        if not error.any() or (quantised and dtype == torch.float16 and bool((error <= _HALF * weights.abs()).all())):
            return stored
    return weights.clone()


def write_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors of any device, by name, into a safetensors file.

    Raises:
        ConversionError: the disk is full, or cannot be written to.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, file, metadata=dict(metadata))
    except (SafetensorError, OSError) as error:
        reason = re.sub(r"^.*I/O error: | \(os error \d+\)", "", str(error))
        folder = next((p.parent for p in file.parents if p.suffix == ".partial"), file.parent)
        raise ConversionError(
            f"{folder} cannot be written to: {reason}. Free some room, or give --work-dir on another disk"
        ) from error
