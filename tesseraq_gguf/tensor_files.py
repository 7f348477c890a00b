"""Writing safetensors files, with an error for users where the disk does not take them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tesseraq_gguf.errors import ConversionError


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
