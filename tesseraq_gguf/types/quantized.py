"""QuantizedTensor: what a block leaves behind.

Integer codes and parameters; nothing is derived from floats after this point.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tesseraq_gguf.paths import temporary_sibling
from tesseraq_gguf.tensor_files import write_tensors

_SEPARATOR = "|"

_PLAIN, _ORDER = "f32", "i32"

ORDER = ".order"
"""Ends the name of an order of columns, which begins as that of the matrix does: `….q_proj.order`."""


@dataclass(frozen=True)
class QuantizedTensor:
    """One learned matrix, a vector such as a norm's weight that changed along with matrices, or an order of columns.

    Attributes:
        type: name of its tensor type (`tsq2`); `f32` for a vector, `i32` for an order.
        arrays: codes and parameters by name, each with the matrix's rows first: for TSQ types `q` uint8 [out, in],
            `d` and `z` uint8 [out, in / 64]. Their meaning is the grid's and the packer's. A vector has `values`,
            and so has an order: the input channel of every column.
    """

    type: str
    arrays: dict[str, Tensor]

    @property
    def plain(self) -> bool:
        """Whether this is a vector of plain numbers."""
        return self.type == _PLAIN

    @property
    def is_order(self) -> bool:
        """Whether this is an order of columns."""
        return self.type == _ORDER

    @property
    def is_matrix(self) -> bool:
        """Whether this is a learned matrix."""
        return not self.plain and not self.is_order


def plain_vector(values: Tensor) -> QuantizedTensor:
    """Keep a vector, float32 of any shape, as it is."""
    return QuantizedTensor(_PLAIN, {"values": values.detach().float()})


def column_order(order: Tensor) -> QuantizedTensor:
    """Keep an order of columns: the input channel of each, any integers [in]."""
    return QuantizedTensor(_ORDER, {"values": order.detach().to(torch.int32)})


def save_tensors(file: Path, tensors: dict[str, QuantizedTensor], notes: dict[str, str] | None = None) -> None:
    """Write tensors, by checkpoint name, to one safetensors file that appears only when whole.

    Args:
        file: the target, replaced in one step if it exists.
        tensors: what to write.
        notes: strings to keep beside the types in the file's metadata.

    Raises:
        ConversionError: the disk is full.
    """
    flat = {f"{name}{_SEPARATOR}{key}": a for name, t in tensors.items() for key, a in t.arrays.items()}
    metadata = {f"type{_SEPARATOR}{name}": t.type for name, t in tensors.items()}
    metadata |= {f"note{_SEPARATOR}{key}": value for key, value in (notes or {}).items()}
    with temporary_sibling(file) as partial:
        write_tensors(flat, partial, metadata)


def load_tensors(file: Path) -> tuple[dict[str, QuantizedTensor], dict[str, str]]:
    """Invert `save_tensors`: the tensors and the notes."""
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        metadata = stored.metadata() or {}
        arrays: dict[str, dict[str, Tensor]] = {}
        for key in stored.keys():  # noqa: SIM118  (not a dict)
            name, _, array = key.rpartition(_SEPARATOR)
            arrays.setdefault(name, {})[array] = stored.get_tensor(key)
    types = {k.removeprefix(f"type{_SEPARATOR}"): v for k, v in metadata.items() if k.startswith(f"type{_SEPARATOR}")}
    notes = {k.removeprefix(f"note{_SEPARATOR}"): v for k, v in metadata.items() if k.startswith(f"note{_SEPARATOR}")}
    return {name: QuantizedTensor(types[name], a) for name, a in arrays.items()}, notes
