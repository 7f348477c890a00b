"""The header of a GGUF file, read and checked without trusting it: every other reader may then rely on what it says.

    magic "GGUF" · version · number of tensors · number of entries · entries · tensor infos · padding · tensor data

A model may be split: its parts are GGUF files that stand beside each other, called `NAME-00001-of-00003.gguf` and so
on. The first holds the metadata and is the one to open; the tensors of all parts are then those of one file.

Stock types are known by what the `gguf` package says of them, ours by the registry; neither is changed.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.errors import FileFormatError
from tesseraq_gguf.gguf_files.parts import part_name, part_of
from tesseraq_gguf.types.facts import TENSOR_TYPES

PROJECTOR = "clip"
"""Architecture of files that hold what images and sound go through on their way to some model."""

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_TYPE_NAMES = dict(
    enumerate(["u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64"])
)
_LAYOUTS = {_TYPE_NAMES[kind]: layout for kind, layout in _SCALARS.items()}
_SMALLEST_ARRAY = 4 + 4 + 8
_LONGEST_NAME = 63  # GGML_MAX_NAME, without the closing zero
_MOST_DIMENSIONS = 4
_SMALLEST_ENTRY = 8 + 4 + 1
_SMALLEST_INFO = 8 + 4 + 8 + 4 + 8
_AGAIN = "The download or copy is incomplete or damaged; get the file again"


@dataclass(frozen=True)
class ArrayValue:
    """An array among the metadata, by what it is made of: vocabularies are long and seldom wanted.

    Attributes:
        element: type of the elements (`string`, `f32`, …).
        count: number of elements.
    """

    element: str
    count: int


@dataclass(frozen=True)
class Entry:
    """One metadata entry.

    Attributes:
        value: a number, a string, a bool, or an `ArrayValue`.
        raw: the bytes of the value as they stand in the file, its type before it.
    """

    value: Any
    raw: bytes


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file.

    Attributes:
        name: its name.
        type: name of its type, lower case (`q8_0`, `tsq2`).
        type_id: value of `ggml_type`.
        shape: as llama.cpp prints it, length of a row first.
        offset: position of its data in the file, or in its part of a split file.
        bytes: size of its data.
        part: which part of a split file it is in, from 0.
    """

    name: str
    type: str
    type_id: int
    shape: tuple[int, ...]
    offset: int
    bytes: int
    part: int = 0

    @property
    def weights(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=object))

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.weights // self.shape[0]

    @property
    def bits_per_weight(self) -> float:
        """Bits per element, block parameters included."""
        return 8 * self.bytes / self.weights


@dataclass(frozen=True)
class GgufFile:
    """What the header of a GGUF file says, checked: all tensor data lies inside the file.

    Attributes:
        path: the file; of a split file the first part.
        version: GGUF version.
        bytes: size of the file, all parts together.
        entries: metadata by key, in file order.
        tensors: tensors in file order, those of all parts.
        parts: the files that it consists of, `path` being the first.
    """

    path: Path
    version: int
    bytes: int
    entries: dict[str, Entry]
    tensors: tuple[TensorInfo, ...]
    parts: tuple[Path, ...]

    def get(self, key: str, default: Any = None) -> Any:
        """Return a metadata value."""
        entry = self.entries.get(key)
        return default if entry is None else entry.value

    def numbers(self, key: str) -> list[Any] | None:
        """Return an array of numbers or bools among the metadata; None if there is no such array."""
        value = self.get(key)
        if not isinstance(value, ArrayValue) or value.element not in _LAYOUTS:
            return None
        numbers = np.frombuffer(self.entries[key].raw, _LAYOUTS[value.element], value.count, _SMALLEST_ARRAY)
        return numbers.tolist()

    def texts(self, key: str) -> list[str]:
        """Return an array of strings among the metadata; empty if there is no such array."""
        value = self.get(key)
        if not isinstance(value, ArrayValue) or value.element != _TYPE_NAMES[_STRING]:
            return []
        cursor = _Cursor(self.entries[key].raw)
        cursor.skip(_SMALLEST_ARRAY)
        return [cursor.text() for _ in range(value.count)]

    def data(self, tensor: TensorInfo) -> NDArray[np.uint8]:
        """Return the bytes of a tensor, uint8 [rows, row_bytes], mapped and not read."""
        mapped = np.memmap(self.parts[tensor.part], np.uint8, "r", tensor.offset, (tensor.bytes,))
        return mapped.reshape(tensor.rows, -1)


class _DamagedError(Exception):
    """What is wrong, without the name of the file."""


def open_gguf(path: Path | str) -> GgufFile:
    """Read and check the header of a GGUF file, and of all its parts. Call this before handing a file to llama.cpp.

    Raises:
        FileFormatError: missing, not GGUF, truncated, corrupt, or with tensors of a type that nobody here knows; or
            one of several parts, and not the first, or with parts that are missing or of another file.
    """
    path = Path(path)
    first = _open_part(path)
    count, number = first.get("split.count", 1), first.get("split.no", 0)
    if not isinstance(count, int) or not isinstance(number, int) or number < 0:
        raise FileFormatError(f"{path} is corrupt: its number among the parts of a split file makes no sense. {_AGAIN}")
    if count <= 1:
        return first
    named = part_of(path.name)
    if number:
        name = part_name(named.stem, 0, named.count) if named else f"the one that ends in {part_name('', 0, count)}"
        raise FileFormatError(f"{path} is part {number + 1} of {count}. Give the first part, {name}; all are then read")
    if named is None or (named.index, named.count) != (0, count):
        raise FileFormatError(
            f"{path} is the first of {count} parts, and its name must end in {part_name('', 0, count)}: by it the "
            "others are found. Give all parts the names that they had"
        )
    parts = [first]
    for index in range(1, count):
        file = path.with_name(part_name(named.stem, index, count))
        if not file.exists():
            raise FileFormatError(
                f"{path}: part {index + 1} of {count} is missing, {file.name}. All parts must be in one folder"
            )
        part = _open_part(file)
        if (part.get("split.no"), part.get("split.count")) != (index, count):
            raise FileFormatError(f"{file} is not part {index + 1} of {count}, as its name says. Get the parts again")
        parts.append(part)
    return _joined(parts)


def _joined(parts: list[GgufFile]) -> GgufFile:
    """Make one file of the parts of a split one.

    Raises:
        FileFormatError: they do not belong together.
    """
    first = parts[0]
    tensors = tuple(replace(t, part=index) for index, part in enumerate(parts) for t in part.tensors)
    twice = [name for name, times in Counter(t.name for t in tensors).items() if times > 1]
    announced = first.get("split.tensors.count", len(tensors))
    if twice or announced != len(tensors):
        reason = f"tensor {_quoted(twice[0])} is in two of them" if twice else (
            f"they hold {len(tensors):,} tensors, the first announces {announced:,}"
        )  # fmt: skip
        raise FileFormatError(f"{first.path}: its {len(parts)} parts are not of one model: {reason}. Get them again")
    size = sum(part.bytes for part in parts)
    return replace(first, bytes=size, tensors=tensors, parts=tuple(part.path for part in parts))


def _open_part(path: Path) -> GgufFile:
    if path.is_dir():
        raise FileFormatError(f"{path} is a folder, not a GGUF file")
    try:
        with _mapped(path) as data:
            return _read(path, data)
    except FileNotFoundError:
        raise FileFormatError(f"no file at {path}") from None
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read: {error.strerror or error}") from error
    except _DamagedError as error:
        raise FileFormatError(f"{path} {error}") from None


@contextmanager
def _mapped(path: Path) -> Iterator[bytes | mmap.mmap]:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


class _Cursor:
    """Reads forward in a header; whatever leaves the file is `_DamagedError`."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self.data = data
        self.size = len(data)
        self.at = 0

    def skip(self, count: int) -> int:
        start = self.at
        if count > self.size - start:
            raise _DamagedError(f"is truncated: it ends in the middle of its header, at {self.size:,} bytes. {_AGAIN}")
        self.at = start + count
        return start

    def number(self, layout: str) -> Any:
        return struct.unpack_from(layout, self.data, self.skip(struct.calcsize(layout)))[0]

    def text(self) -> str:
        length = self.number("<Q")
        start = self.skip(length)
        return self.data[start : start + length].decode("utf-8", "replace")

    def skip_texts(self, count: int) -> None:
        """Skip an array of strings: a vocabulary, so without a call for each."""
        data, last, at = self.data, self.size - 8, self.at
        length = struct.Struct("<Q").unpack_from
        if 8 * count > self.size - at:
            self.skip(self.size + 1)
        for _ in range(count):
            if at > last:
                break
            at += 8 + length(data, at)[0]
        else:
            if at <= self.size:
                self.at = at
                return
        self.skip(self.size + 1)

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise _DamagedError(f"is corrupt: metadata {_quoted(key)} has the unknown value type {kind}. {_AGAIN}")
        element, count = self.number("<I"), self.number("<Q")
        if element in _SCALARS:
            self.skip(struct.calcsize(_SCALARS[element]) * count)
        elif element == _STRING:
            self.skip_texts(count)
        else:
            raise _DamagedError(
                f"is corrupt: metadata {_quoted(key)} is an array of the unknown value type {element}. {_AGAIN}"
            )
        return ArrayValue(_TYPE_NAMES[element], count)


def _read(path: Path, data: bytes | mmap.mmap) -> GgufFile:
    start = bytes(data[:32])
    if not start:
        raise _DamagedError("is empty, not a GGUF file")
    if start[:4] != b"GGUF":
        if start.startswith(b"version https://git-lfs"):
            raise _DamagedError("is a Git LFS pointer, not the file itself. Run `git lfs pull` where it came from")
        raise _DamagedError("is not a GGUF file (it does not start with 'GGUF')")
    cursor = _Cursor(data)
    cursor.skip(4)
    version = cursor.number("<I")
    if version and version & 0xFFFF == 0:
        raise _DamagedError("is a big-endian GGUF file, which this program does not read")
    if version not in (2, 3):
        raise _DamagedError(f"has GGUF version {version}; this program reads versions 2 and 3. Convert the model again")
    tensor_count, entry_count = cursor.number("<Q"), cursor.number("<Q")
    if tensor_count * _SMALLEST_INFO + entry_count * _SMALLEST_ENTRY > cursor.size:
        raise _DamagedError(
            f"is truncated or corrupt: its header announces {tensor_count:,} tensors and {entry_count:,} metadata "
            f"entries, more than its {cursor.size:,} bytes can hold. {_AGAIN}"
        )
    entries = _read_entries(cursor, entry_count)
    tensors = _read_tensors(cursor, tensor_count, _alignment(entries))
    return GgufFile(path, version, cursor.size, entries, tensors, (path,))


def _read_entries(cursor: _Cursor, count: int) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for _ in range(count):
        key = cursor.text()
        if key in entries:
            raise _DamagedError(f"is corrupt: metadata {_quoted(key)} appears twice. {_AGAIN}")
        start = cursor.at
        value = cursor.value(cursor.number("<I"), key)
        entries[key] = Entry(value, bytes(cursor.data[start : cursor.at]))
    return entries


def _alignment(entries: dict[str, Entry]) -> int:
    value = entries["general.alignment"].value if "general.alignment" in entries else 32
    if not isinstance(value, int) or value <= 0 or value & (value - 1):
        raise _DamagedError(f"is corrupt: general.alignment is {_quoted(value)}, not a power of two. {_AGAIN}")
    return value


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> tuple[TensorInfo, ...]:
    infos: list[tuple[str, int, tuple[int, ...], int]] = []
    for _ in range(count):
        name = cursor.text()
        dimensions = cursor.number("<I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS or len(name.encode()) > _LONGEST_NAME:
            raise _DamagedError(f"is corrupt: the header of tensor {_quoted(name)} makes no sense. {_AGAIN}")
        shape = tuple(cursor.number("<Q") for _ in range(dimensions))
        infos.append((name, cursor.number("<I"), shape, cursor.number("<Q")))
    for name, times in Counter(info[0] for info in infos).items():
        if times > 1:
            raise _DamagedError(f"is corrupt: tensor {_quoted(name)} appears {times} times. {_AGAIN}")
    base = _padded(cursor.at, alignment)
    expected = 0
    tensors = []
    for name, type_id, shape, offset in infos:
        kind, block_weights, block_bytes = _type_facts(name, type_id)
        weights = int(np.prod(shape, dtype=object))
        if weights <= 0 or shape[0] % block_weights or offset != expected:
            raise _DamagedError(
                f"is corrupt: tensor {_quoted(name)} cannot be of type {kind} and shape {list(shape)} at offset "
                f"{offset}. {_AGAIN}"
            )
        size = weights // block_weights * block_bytes
        expected = _padded(offset + size, alignment)
        if base + offset + size > cursor.size:
            raise _DamagedError(
                f"is truncated: tensor {_quoted(name)} ends at byte {base + offset + size:,}, the file at "
                f"{cursor.size:,}. {_AGAIN}"
            )
        tensors.append(TensorInfo(name, kind, type_id, shape, base + offset, size))
    return tuple(tensors)


def _type_facts(tensor: str, type_id: int) -> tuple[str, int, int]:
    """Return name, weights per block and bytes per block of a type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for t in TENSOR_TYPES.values():
        if t.id == type_id:
            return t.name, t.block_weights, t.block_bytes
    try:
        stock = GGMLQuantizationType(type_id)
        block_weights, block_bytes = GGML_QUANT_SIZES[stock]
    except (ValueError, KeyError):
        raise _DamagedError(
            f"has tensor {_quoted(tensor)} of type {type_id}, which is known neither to llama.cpp nor to this version "
            "of tesseraq-gguf: the file is corrupt, or made for another or a newer runtime"
        ) from None
    return stock.name.lower(), int(block_weights), int(block_bytes)


def _quoted(value: Any) -> str:
    """What a file says, for a message: one short line, whatever characters are in it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]}…{text[0]}"


def _padded(size: int, alignment: int) -> int:
    return (size + alignment - 1) // alignment * alignment
