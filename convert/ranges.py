"""Numbers that a tensor's type cannot hold, noticed while they are written."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.errors import ConversionError


def keep_within_range(writer: Any) -> None:
    """Have a writer refuse numbers that their tensor's type cannot hold."""
    add_tensor = writer.add_tensor
    writer.add_tensor = lambda name, tensor, raw_shape=None, raw_dtype=None: add_tensor(
        name, _within_range(name, tensor, raw_dtype), raw_shape, raw_dtype
    )


def _within_range(name: str, tensor: Any, kind: Any) -> Any:
    """A tensor about to be written that raises where a type cannot hold its numbers."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    if kind not in (kinds.F16, kinds.Q8_0):
        return tensor
    if isinstance(tensor, gguf.LazyNumpyTensor):
        return gguf.LazyNumpyTensor._wrap_fn(lambda data: checked_range(name, data, kind), meta_noop=True)(tensor)
    return checked_range(name, tensor, kind) if isinstance(tensor, np.ndarray) else tensor


def checked_range(name: str, data: NDArray[Any], kind: Any) -> NDArray[Any]:
    """Packed weights of a tensor, once it is known that the type could hold them.

    Raises:
        ConversionError: it could not.
    """
    import gguf

    if kind == gguf.GGMLQuantizationType.Q8_0:  # the scale of a block stands first in it
        numbers = data.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])[:, :2].copy().view(np.float16)
    else:
        numbers = data
    if not np.isfinite(numbers).all():
        raise ConversionError(
            f"{name} has weights beyond the range of {kind.name.lower()}, or such as are no numbers: "
            "convert with a type of more range, such as bf16"
        )
    return data
