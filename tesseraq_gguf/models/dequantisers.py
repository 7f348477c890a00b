"""Matrices that checkpoints keep as codes and scales, read as the numbers that they stand for, a few rows if wanted.

One class for each way to keep them. All compute in float32.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.models.codes import FP4, high_first, looked_up, powers_of_two, unpacked
from tesseraq_gguf.models.stored import StoredTensor

ORIGINAL = "take the original model, in 16 or 32 bits"


class Dequantiser(ABC):
    """A matrix [out, in], or a stack of matrices [count, ...], that is kept as codes."""

    @property
    @abstractmethod
    def codes(self) -> StoredTensor:
        """What holds the codes."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of what the codes stand for."""

    @abstractmethod
    def read(self, rows: Tensor | None = None) -> Tensor:
        """Read it, float32 on the CPU: all, or what `rows`, int64 [count], pick along its first axis.

        Raises:
            ModelError: its parts do not fit each other; the message lacks the model's name.
        """

    @property
    def file(self) -> Path:
        """The file that the codes are in."""
        return self.codes.file

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of all that it is made of."""
        values = [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]
        return tuple(value.name for value in values if isinstance(value, StoredTensor))


@dataclass(frozen=True)
class Layout:
    """How far a scale reaches.

    Attributes:
        targets: modules that it is for: names, regular expressions after `re:`, or classes such as `Linear`.
        block: rows and columns that share a scale, if blocks do.
        group: columns of a row that share one, if groups do.
        bits: of a code, where they are packed.
    """

    targets: tuple[str, ...] = ("Linear",)
    block: tuple[int, int] | None = None
    group: int | None = None
    bits: int | None = None

    def is_for(self, module: str) -> bool:
        """Whether a module is among the targets."""
        return any(
            re.match(t.removeprefix("re:"), module) if t.startswith("re:") else t in (module, "Linear")
            for t in self.targets
        )

    def reach(self, axis: int) -> int | None:
        """Rows (axis -2) or columns (axis -1) that share a scale; None if that is not said."""
        if axis == -1 and self.group:
            return self.group
        return self.block[axis] if self.block and axis in (-1, -2) else None


def misfit(part: StoredTensor, whole: StoredTensor) -> ModelError:
    """The error for a part of a matrix whose shape is none that is known."""
    return ModelError(
        f"{part.name} {list(part.shape)} does not fit {whole.name} {list(whole.shape)} in any way that is known: "
        f"{ORIGINAL}"
    )


def _numbers(scale: StoredTensor, rows: Tensor | None = None) -> Tensor:
    """Scales, float32; bytes are exponents."""
    read = scale.read(rows)
    return powers_of_two(read) if read.dtype == torch.uint8 else read.float()


@dataclass(frozen=True)
class Scaled(Dequantiser):
    """Codes in the matrix's own shape, 8-bit floats or integers: (codes - zero_point) · scale · factor."""

    matrix: StoredTensor
    scale: StoredTensor
    zero_point: StoredTensor | None = None
    layout: Layout = Layout()
    factor: float = 1.0

    @property
    @override
    def codes(self) -> StoredTensor:
        return self.matrix

    @property
    @override
    def shape(self) -> tuple[int, ...]:
        return self.matrix.shape

    @override
    def read(self, rows: Tensor | None = None) -> Tensor:
        weight = self.matrix.read(rows).float()
        if self.zero_point:
            weight -= self._spread(self.zero_point, rows)
        return weight.mul_(self._spread(self.scale, rows)).mul_(self.factor)

    def _spread(self, part: StoredTensor, rows: Tensor | None) -> Tensor:
        """A scale, or zero-points, in a shape that broadcasts to the rows."""
        values = _numbers(part)
        if values.numel() == 1:
            return values.reshape(())
        values = self._aligned(part, values)
        for axis, (count, size) in enumerate(zip(values.shape, self.shape, strict=True)):
            if count == 1:
                continue
            reach = self.layout.reach(axis - len(self.shape))
            if not (reach and count == -(-size // reach)):
                reach = 1
                if count != size:
                    raise misfit(part, self.matrix)
            if axis == 0 and rows is not None:
                values = values.index_select(0, rows // reach)
            elif reach > 1:
                values = values.repeat_interleave(reach, axis).narrow(axis, 0, size)
        return values

    def _aligned(self, part: StoredTensor, values: Tensor) -> Tensor:
        """With as many axes as the matrix."""
        if values.shape == self.shape[:-2]:  # one for each matrix of a stack
            return values[..., None, None]
        if values.dim() == 2 * len(self.shape):  # blocks with axes of one number within
            values = values.squeeze(3).squeeze(1)
        if values.dim() == len(self.shape) - 1:
            values = values[..., None]
        if values.dim() != len(self.shape):
            raise misfit(part, self.matrix)
        return values


def _spread_groups(values: Tensor, groups: Tensor) -> Tensor:
    """Values of groups, [rows, groups], for each column, given the group of each; one value is for all columns."""
    return values if values.shape[-1] == 1 else values.index_select(-1, groups)


@dataclass(frozen=True)
class PackedRows(Dequantiser):
    """Integers packed along rows, as compressed-tensors packs them: (codes - zero_point) · scale.

    Codes are signed, and stand with 2^(bits-1) added to them. So do zero-points, which are packed along columns.

    Attributes:
        packed: int32 [out, words].
        scale: [out, groups], or one number for each row or for all.
        size: the matrix's shape, int64 [2].
        zero_point: int32 [words, groups], if there are any.
        groups: of each column, int32 [in]; those of the same number need not stand together.
    """

    packed: StoredTensor
    scale: StoredTensor
    size: StoredTensor | None
    zero_point: StoredTensor | None
    groups: StoredTensor | None
    layout: Layout

    @property
    @override
    def codes(self) -> StoredTensor:
        return self.packed

    @property
    def bits(self) -> int:
        """Of a code."""
        if self.layout.bits is None or not 2 <= self.layout.bits <= 8:
            raise ModelError(f"{self.packed.name} has codes of {self.layout.bits} bits, which are not read: {ORIGINAL}")
        return self.layout.bits

    @cached_property
    @override
    def shape(self) -> tuple[int, ...]:
        rows, words = self.packed.shape
        grouped = self.scale.shape[-1] * (self.layout.group or 0)
        if grouped and -(-grouped * self.bits // 32) == words:
            return rows, grouped
        columns = int(self.size.read()[-1]) if self.size else words * 32 // self.bits
        if -(-columns * self.bits // 32) != words:  # early versions kept no code in two words
            raise misfit(self.size or self.packed, self.packed)
        return rows, columns

    @override
    def read(self, rows: Tensor | None = None) -> Tensor:
        groups = self._groups()
        weight = unpacked(self.packed.read(rows), self.bits)[..., : self.shape[-1]].float()
        zeros = self._zeros()
        if zeros is None:
            weight -= 2 ** (self.bits - 1)
        else:
            weight -= _spread_groups(zeros if rows is None else zeros[rows], groups)
        scale = self._of_rows(self.scale, _numbers(self.scale))
        scale = scale if rows is None or len(scale) == 1 else scale[rows]
        return weight.mul_(_spread_groups(scale, groups))

    def _groups(self) -> Tensor:
        """The group of each column, int64 [in]."""
        columns = self.shape[-1]
        named = self.groups.read().long() if self.groups else None
        if named is None or bool((named < 0).any()):  # the names were never given
            return torch.arange(columns) // (self.layout.group or columns)
        return named

    def _zeros(self) -> Tensor | None:
        if self.zero_point is None:
            return None
        if self.zero_point.dtype != "I32":
            raise ModelError(f"{self.zero_point.name} is not packed, though {self.packed.name} is: {ORIGINAL}")
        codes = unpacked(self.zero_point.read().T, self.bits).T[: self.shape[0]]
        return self._of_rows(self.zero_point, codes.float())

    def _of_rows(self, part: StoredTensor, values: Tensor) -> Tensor:
        """Scales or zero-points as [out, groups], [out, 1] or [1, 1]."""
        count, columns = self.shape
        values = values.reshape(len(values), -1) if values.dim() else values.reshape(1, 1)
        group = self.layout.group or columns
        if values.shape not in ((count, -(-columns // group)), (count, 1), (1, 1)):
            raise misfit(part, self.packed)
        return values


@dataclass(frozen=True)
class PackedColumns(Dequantiser):
    """Integers as GPTQ and AWQ keep them, rows and columns exchanged: (codes - zero_point) · scale, transposed.

    Attributes:
        packed: int32, packed along the inputs [in·bits/32, out] (GPTQ), or along the outputs [in, out·bits/32] (AWQ).
        zeros: zero-points, int32 [groups, out·bits/32].
        scale: [groups, out].
        groups: of each input, int32 [in]; None where they stand together.
        size: inputs of a group; None for all of them.
        bits: of a code.
        offset: what is added to zero-points.
        order: where each of eight outputs that share a word stands in it (AWQ); None for GPTQ.
    """

    packed: StoredTensor
    zeros: StoredTensor
    scale: StoredTensor
    groups: StoredTensor | None
    size: int | None
    bits: int
    offset: int
    order: tuple[int, ...] | None = None

    @property
    @override
    def codes(self) -> StoredTensor:
        return self.packed

    @property
    @override
    def shape(self) -> tuple[int, ...]:
        per_word = 32 / self.bits
        height, width = self.packed.shape
        return (int(width * per_word), height) if self.order else (width, int(height * per_word))

    @override
    def read(self, rows: Tensor | None = None) -> Tensor:
        out, columns = self.shape
        which = torch.arange(out) if rows is None else rows
        if self.scale.shape[-1] != out:
            raise misfit(self.scale, self.packed)
        if self.order:
            codes = self._in_order(self.packed.read()).T[which]
        else:
            codes = unpacked(self.packed.read().T[which], self.bits)
        zeros = self._in_order(self.zeros.read())[:, :out].T[which].float() + self.offset
        scale = self.scale.read().float().T[which]
        groups = self._groups(columns, scale.shape[1])
        return codes.float().sub_(zeros[:, groups]).mul_(scale[:, groups])

    def _in_order(self, words: Tensor) -> Tensor:
        codes = unpacked(words, self.bits)
        if not self.order:
            return codes
        return codes.unflatten(-1, (-1, len(self.order)))[..., list(self.order)].flatten(-2)

    def _groups(self, columns: int, count: int) -> Tensor:
        groups = self.groups.read().long() if self.groups else torch.arange(columns) // (self.size or columns)
        if len(groups) != columns or int(groups.min()) < 0 or int(groups.max()) + 1 != count:
            raise misfit(self.groups or self.scale, self.packed)
        return groups


@dataclass(frozen=True)
class Float4(Dequantiser):
    """4-bit floats with a scale for groups of columns: 32 whose scale is an exponent (MXFP4), 16 else (NVFP4).

    Attributes:
        packed: uint8 [..., in/2], the first of two codes in the lower bits; or [..., groups, bytes of a group].
        scale: of groups [..., groups]: 8-bit floats, or exponents.
        whole: one number for the matrix, or one for each of a stack.
        divides: whether codes are divided by that number.
        transposed: whether rows and columns of a stack's matrices are to be exchanged, as gpt-oss' are.
    """

    packed: StoredTensor
    scale: StoredTensor
    whole: StoredTensor | None = None
    divides: bool = False
    transposed: bool = False

    @property
    @override
    def codes(self) -> StoredTensor:
        return self.packed

    @property
    def _flat(self) -> tuple[int, ...]:
        *outer, last = self.packed.shape
        if len(self.packed.shape) == len(self.scale.shape) + 1:
            last *= outer.pop()
        return *outer, 2 * last

    @property
    @override
    def shape(self) -> tuple[int, ...]:
        *outer, rows, columns = self._flat
        return (*outer, columns, rows) if self.transposed else (*outer, rows, columns)

    @override
    def read(self, rows: Tensor | None = None) -> Tensor:
        *outer, columns = self._flat
        group = 32 if self.scale.dtype in ("U8", "F8_E8M0") else 16
        if self.scale.shape != (*outer, columns // group) or columns % group:
            raise misfit(self.scale, self.packed)
        if rows is not None and self.transposed and len(outer) == 1:
            raise misfit(self.scale, self.packed)
        weight = looked_up(unpacked(self.packed.read(rows), 4), FP4)
        scale = _numbers(self.scale, rows)
        weight = weight.view(*scale.shape, -1).mul_(scale[..., None]).flatten(-2)
        weight = self._finished(weight, rows)
        return weight.transpose(-1, -2).contiguous() if self.transposed else weight

    def _finished(self, weight: Tensor, rows: Tensor | None) -> Tensor:
        if self.whole is None:
            return weight
        whole = self.whole.read().float().flatten()
        if whole.numel() == 1:
            whole = whole.reshape(())
        elif weight.dim() == 3 and len(whole) == self.packed.shape[0]:
            whole = (whole if rows is None else whole[rows])[:, None, None]
        else:
            raise misfit(self.whole, self.packed)
        return weight.div_(whole) if self.divides else weight.mul_(whole)


@dataclass(frozen=True)
class Table4(Dequantiser):
    """4-bit codes of bitsandbytes, which stand for numbers of a table, times the largest of their block.

    Blocks run through the matrix row by row. The largest numbers of blocks may be quantised in turn.

    Attributes:
        packed: uint8 [n/2, 1], the first of two codes in the higher bits.
        largest: of the blocks, float32; or uint8 codes of them.
        table: float32 [16].
        state: JSON in bytes: shape, size of blocks, and what else is needed.
        outer_largest: of blocks of codes of `largest`.
        outer_table: float32 [256], what these codes stand for.
    """

    packed: StoredTensor
    largest: StoredTensor
    table: StoredTensor
    state: StoredTensor
    outer_largest: StoredTensor | None = None
    outer_table: StoredTensor | None = None

    @property
    @override
    def codes(self) -> StoredTensor:
        return self.packed

    @cached_property
    def _said(self) -> dict[str, Any]:
        return json.loads(bytes(self.state.read().tolist()))  # type: ignore[no-any-return]

    @property
    @override
    def shape(self) -> tuple[int, ...]:
        return tuple(self._said["shape"])

    @override
    def read(self, rows: Tensor | None = None) -> Tensor:
        codes = high_first(self.packed.read().flatten())
        weight = looked_up(codes, self.table.read().float())
        largest = self._largest().repeat_interleave(self._said["blocksize"])
        whole = weight.mul_(largest[: len(weight)])[: math.prod(self.shape)].view(self.shape)
        return whole if rows is None else whole[rows]

    def _largest(self) -> Tensor:
        if self.outer_table is None or self.outer_largest is None:
            return self.largest.read().float()
        found = looked_up(self.largest.read(), self.outer_table.read().float())
        outer = self.outer_largest.read().float().repeat_interleave(self._said["nested_blocksize"])
        return found.mul_(outer[: len(found)]).add_(self._said["nested_offset"])
