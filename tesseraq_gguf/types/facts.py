"""The tensor types of a GGUF file: one row each, and whatever else lists types derives from the rows.

Ids of our own types start at 500, above those of every other project, so a runtime without them refuses the file by id
instead of misreading it. `docs/formats.md` describes each of our layouts to the bit. Tests hold the rows to the C
header and to gguf-py. Nothing here needs torch: a row names the home of its grid and its packer, which are imported
when somebody asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

from typing_extensions import override

from tesseraq_gguf.errors import UsageError

FORMAT_VERSION = 1
"""Value of the GGUF key `tesseraq.format_version`; grows when a layout changes."""

FACTOR = "factor"
"""Array of a matrix whose file has a factor for all of it: float32 [rows, 1], the same in every row."""


@dataclass(frozen=True)
class Codebooks:
    """What the codes of a type are looked up in.

    Attributes:
        layout: what types with the same bytes have in common, and name their universal codebooks by.
        key: GGUF key of a file's own codebooks, an array of int8, codebook after codebook.
        count: how many there are.
        levels: codewords of each, ascending.
        group: neighbouring weights that share one.
        largest: largest magnitude of a codeword.
        activations: whether kernels may write activations in codewords too.
    """

    layout: str
    key: str
    count: int
    levels: int
    group: int
    largest: int
    activations: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of all of them together."""
        return self.count, self.levels


@dataclass(frozen=True)
class TensorType:
    """One GGUF tensor type.

    Attributes:
        name: as users write it, lower case (`tsq2`, `q8_0`).
        id: value of `ggml_type` in the file.
        file_type: value of `llama_ftype` (`general.file_type`) for a file made mostly of this type.
        block_weights: weights per block; a row's length must be a multiple of it.
        block_bytes: bytes per block.
        family: the folder in `types/` whose `grid.py` and `packer.py` have what this type is, under its name in capital
            letters; None if nothing is learned in it.
        custom: True if only our runtime reads it.
        recent: True if llama.cpp has had it for a short time only.
        plain: True for what a tensor can be that is not learned: floats, and 8 bits, which need no care.
        fallback: the type that llama-quantize takes for rows that are no whole number of blocks; where that does not
            fit either, or is None, f16.
        without_order: the type to take for matrices whose columns can have no order; None if this type wants none.
        codebooks: what its codes are looked up in; None where they count evenly spaced values.
        factor: whether a file may have a factor for a whole matrix of it, in a tensor beside it.
    """

    name: str
    id: int
    file_type: int
    block_weights: int
    block_bytes: int
    family: str | None = None
    custom: bool = False
    recent: bool = False
    plain: bool = False
    fallback: str | None = None
    without_order: str | None = None
    codebooks: Codebooks | None = None
    factor: bool = False

    @property
    def is_float(self) -> bool:
        """Whether it holds weights as they are: nothing can be learned in it."""
        return self.block_weights == 1

    @property
    def ordered(self) -> bool:
        """Whether the places of a block differ, so that its columns want an order."""
        return self.without_order is not None

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, parameters of the block included."""
        return 8 * self.block_bytes / self.block_weights

    def fits(self, row_length: int) -> bool:
        """Whether a row of `row_length` weights is a whole number of blocks."""
        return row_length % self.block_weights == 0


_BCQ4 = Codebooks("bcq4", "tesseraq.bcq.codebooks", count=8, levels=16, group=8, largest=31, activations=True)
_BCQ2 = Codebooks("bcq2", "tesseraq.bcq2.codebooks", count=4, levels=4, group=16, largest=31)

# The file types of the K types are the "small" ones, Q2_K_S and so on: the others promise a mix of types.
_ROWS = (
    TensorType("f32", 0, 0, 1, 4, plain=True),
    TensorType("f16", 1, 1, 1, 2, plain=True),
    TensorType("bf16", 30, 32, 1, 2, plain=True),
    TensorType("tsq2", 500, 500, 64, 18, "tsq", custom=True),
    TensorType("tsq3", 501, 501, 64, 26, "tsq", custom=True),
    TensorType("tsq4", 502, 502, 64, 34, "tsq", custom=True),
    TensorType("bcq2", 506, 506, 64, 18, "bcq", custom=True, codebooks=_BCQ2),
    TensorType("bcq4", 503, 503, 64, 36, "bcq", custom=True, codebooks=_BCQ4),
    TensorType("bcq4_a4", 504, 504, 64, 36, "bcq", custom=True, codebooks=_BCQ4),
    TensorType("ptq1_61", 505, 505, 128, 27, "ptq161", custom=True, without_order="tsq2"),
    TensorType("q1_0", 41, 40, 128, 18, "stock", recent=True),
    TensorType("q2_0", 42, 41, 64, 18, "stock", recent=True, fallback="q4_0"),
    TensorType("q4_0", 2, 2, 32, 18, "stock"),
    TensorType("q4_1", 3, 3, 32, 20, "stock"),
    TensorType("q5_0", 6, 8, 32, 22, "stock"),
    TensorType("q5_1", 7, 9, 32, 24, "stock"),
    TensorType("q8_0", 8, 7, 32, 34, "stock", plain=True),
    TensorType("iq4_nl", 20, 25, 32, 18, "stock"),
    TensorType("mxfp4", 39, 38, 32, 17, "fp4"),
    TensorType("nvfp4", 40, 39, 64, 36, "fp4", recent=True, factor=True),
    TensorType("q2_k", 10, 21, 256, 84, "kquants", fallback="q4_0"),
    TensorType("q3_k", 11, 11, 256, 110, "kquants", fallback="q4_0"),
    TensorType("q4_k", 12, 14, 256, 144, "kquants", fallback="q5_0"),
    TensorType("q5_k", 13, 16, 256, 176, "kquants", fallback="q5_1"),
    TensorType("q6_k", 14, 18, 256, 210, "kquants", fallback="q8_0"),
    TensorType("iq4_xs", 23, 30, 256, 136, "kquants", fallback="iq4_nl"),
    TensorType("iq1_s", 19, 24, 256, 50, "lattice", fallback="iq4_nl"),
    TensorType("iq1_m", 29, 31, 256, 56, "lattice", fallback="iq4_nl"),
    TensorType("iq2_xxs", 16, 19, 256, 66, "lattice", fallback="iq4_nl"),
    TensorType("iq2_xs", 17, 20, 256, 74, "lattice", fallback="iq4_nl"),
    TensorType("iq2_s", 22, 28, 256, 82, "lattice", fallback="iq4_nl"),
    TensorType("iq3_xxs", 18, 23, 256, 98, "lattice", fallback="iq4_nl"),
    TensorType("iq3_s", 21, 26, 256, 110, "lattice", fallback="iq4_nl"),
)

TENSOR_TYPES: dict[str, TensorType] = {t.name: t for t in _ROWS}


def names(chosen: Callable[[TensorType], object]) -> tuple[str, ...]:
    """Return the names of the types that are chosen, in the order of the rows."""
    return tuple(t.name for t in TENSOR_TYPES.values() if chosen(t))


ORDERED_TYPES = names(lambda t: t.ordered)
"""Types whose columns may have an order."""

WITH_CODEBOOKS = names(lambda t: t.codebooks)
"""Types whose codes name codewords of codebooks."""

WITH_FACTOR = names(lambda t: t.factor)
"""Types of matrices that may have a factor."""

LAYOUTS: dict[str, Codebooks] = {t.codebooks.layout: t.codebooks for t in TENSOR_TYPES.values() if t.codebooks}
"""What there are codebooks of: types of one layout have the same."""


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


T = TypeVar("T")


class OfFamilies(Mapping[str, T]):
    """What the families' folders have for each type that can be learned, by its name, imported when it is asked for.

    Args:
        module: which module of a folder: `grid` or `packer`.
    """

    def __init__(self, module: str) -> None:
        self._module = module

    @override
    def __getitem__(self, name: str) -> T:
        family = TENSOR_TYPES[name].family
        if family is None:
            raise KeyError(name)
        found: T = getattr(import_module(f"{__package__}.{family}.{self._module}"), name.upper())
        return found

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(names(lambda t: t.family))

    @override
    def __len__(self) -> int:
        return len(names(lambda t: t.family))


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
