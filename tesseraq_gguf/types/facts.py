"""The tensor types of a GGUF file as facts: id, block size, bytes. One row per type, held to the C header by a test.

Ids of our own types start at 500, above those of every other project, so a runtime without them refuses the file by id
instead of misreading it. `docs/formats.md` describes each of our layouts to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tesseraq_gguf.errors import UsageError

FORMAT_VERSION = 1
"""Value of the GGUF key `tesseraq.format_version`; grows when a layout changes."""


@dataclass(frozen=True)
class TensorType:
    """One GGUF tensor type.

    Attributes:
        name: as users write it, lower case (`tsq2`, `q8_0`).
        id: value of `ggml_type` in the file.
        file_type: value of `llama_ftype` (`general.file_type`) for a file made mostly of this type.
        block_weights: weights per block; a row's length must be a multiple of it.
        block_bytes: bytes per block.
        custom: True if only our runtime reads it.
        plain: True for what a tensor can be that is not learned: floats, and 8 bits, which need no care.
        fallback: the type that llama-quantize takes for rows that are no whole number of blocks; where that does not
            fit either, or is None, f16.
    """

    name: str
    id: int
    file_type: int
    block_weights: int
    block_bytes: int
    custom: bool
    plain: bool = False
    fallback: str | None = None

    @property
    def is_float(self) -> bool:
        """Whether it holds weights as they are: nothing can be learned in it."""
        return self.block_weights == 1

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, parameters of the block included."""
        return 8 * self.block_bytes / self.block_weights

    def fits(self, row_length: int) -> bool:
        """Whether a row of `row_length` weights is a whole number of blocks."""
        return row_length % self.block_weights == 0


# The file types of the K types are the "small" ones, Q2_K_S and so on: the others promise a mix of types.
_TYPES = (
    TensorType("f32", 0, 0, 1, 4, False, plain=True),
    TensorType("f16", 1, 1, 1, 2, False, plain=True),
    TensorType("bf16", 30, 32, 1, 2, False, plain=True),
    TensorType("q8_0", 8, 7, 32, 34, False, plain=True),
    TensorType("q5_0", 6, 8, 32, 22, False),
    TensorType("q4_1", 3, 3, 32, 20, False),
    TensorType("q4_0", 2, 2, 32, 18, False),
    TensorType("q2_0", 42, 41, 64, 18, False, fallback="q4_0"),
    TensorType("q4_k", 12, 14, 256, 144, False, fallback="q5_0"),
    TensorType("q3_k", 11, 11, 256, 110, False, fallback="q4_0"),
    TensorType("q2_k", 10, 21, 256, 84, False, fallback="q4_0"),
    TensorType("tsq2", 500, 500, 64, 18, True),
    TensorType("tsq3", 501, 501, 64, 26, True),
    TensorType("tsq4", 502, 502, 64, 34, True),
    TensorType("bcq4", 503, 503, 64, 36, True),
    TensorType("bcq4_a4", 504, 504, 64, 36, True),
    TensorType("ptq1_61", 505, 505, 128, 27, True),
)

TENSOR_TYPES: dict[str, TensorType] = {t.name: t for t in _TYPES}


def tensor_type(name: str) -> TensorType:
    """Look a type up by its name.

    Raises:
        UsageError: no such type; the message lists those there are.
    """
    try:
        return TENSOR_TYPES[name.lower()]
    except KeyError:
        known = ", ".join(TENSOR_TYPES)
        raise UsageError(f"unknown tensor type '{name}'. Known types: {known}") from None


def register_with_gguf(gguf: Any) -> None:
    """Teach a `gguf` module our tensor types and file types, so that its reader and writer accept them.

    The package published on PyPI knows only stock ids and keeps them in closed enums. The copy inside our patched
    llama.cpp knows ours already; then this does nothing.
    """
    for t in TENSOR_TYPES.values():
        if t.custom:
            _add_enum_member(gguf.GGMLQuantizationType, t.name.upper(), t.id)
            _add_enum_member(gguf.LlamaFileType, f"MOSTLY_{t.name.upper()}", t.file_type)
            gguf.GGML_QUANT_SIZES.setdefault(gguf.GGMLQuantizationType(t.id), (t.block_weights, t.block_bytes))


def _add_enum_member(enum: Any, name: str, value: int) -> None:
    if value in enum._value2member_map_:
        return
    member = int.__new__(enum, value)
    member._name_, member._value_ = name, value
    enum._value2member_map_[value] = member
    enum._member_map_[name] = member
    type.__setattr__(enum, name, member)
