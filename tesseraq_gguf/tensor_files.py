"""Writing safetensors files: in what dtype, and with an error for users where the disk does not take them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tesseraq_gguf.errors import ConversionError


def narrowest(weights: Tensor) -> Tensor:
    """Return weights, float32, in the narrowest dtype that holds them: vectors as they are, matrices in 16 bits where
    these do."""
    if weights.dim() < 2:
        return weights.clone()
    for dtype in (torch.float16, torch.bfloat16):
        stored = weights.to(dtype)
        if torch.equal(stored.float(), weights):
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
