"""A copy of a GGUF file with other metadata, whole or in parts: its tensors stay as they are, bit for bit.

llama.cpp's own tools copy what they know; here types of any runtime are bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from tesseraq_gguf.errors import VerificationError
from tesseraq_gguf.gguf_files.gguf_file import GgufFile, TensorInfo, open_gguf
from tesseraq_gguf.gguf_files.parts import COUNT, NUMBER, SUFFIX, TENSORS, part_name, shared_out

_U16, _U32, _I32, _STRING = 2, 4, 5, 8
_ALIGNMENT = "general.alignment"
_CHUNK = 1 << 24

Watch = Callable[[int], None]
"""Told of bytes that were written."""


def text(value: str) -> bytes:
    """Return a string as a value of the metadata, its type before it."""
    return struct.pack("<I", _STRING) + _string(value)


def number(value: int) -> bytes:
    """Return a whole number as a value of the metadata, u32, its type before it."""
    return struct.pack("<II", _U32, value)


def planned(file: GgufFile, entries: Mapping[str, bytes], most: int | None) -> list[list[TensorInfo]]:
    """Say which tensors each file of a copy holds.

    Args:
        file: what is copied.
        entries: all metadata of the copy, values with their types.
        most: bytes of a file; None makes one.
    """
    tensors = list(file.tensors)
    if most is None:
        return [tensors]
    alignment = _alignment(file)
    spare = (
        len(_header(_numbered(entries, file, 0, 1), [], alignment))
        + alignment
        - sum(map(_entry_bytes, entries.items()))
    )
    sizes = (_padded(t.bytes, alignment) + len(_info(t, 0)) for t in tensors)
    counts, parts = shared_out(sizes, sum(map(_entry_bytes, entries.items())), most - spare), []
    for count in counts:
        parts.append(tensors[:count])
        tensors = tensors[count:]
    return parts


def file_names(stem: str, count: int) -> list[str]:
    """Return what the files of a copy are called."""
    return [f"{stem}{SUFFIX}"] if count == 1 else [part_name(stem, index, count) for index in range(count)]


def copy(file: GgufFile, out: Path, entries: Mapping[str, bytes], most: int | None, watch: Watch) -> list[Path]:
    """Write a copy, and compare every tensor in it with the original.

    Args:
        file: what is copied.
        out: the copy; parts are named after it.
        entries: all its metadata, values with their types.
        most: bytes of a file; None writes one.
        watch: told of bytes that were written.

    Returns:
        The files that were written.

    Raises:
        VerificationError: a tensor of the copy is another.
        OSError: it cannot be written.
    """
    parts = planned(file, entries, most)
    paths = [out.with_name(name) for name in file_names(out.name.removesuffix(SUFFIX), len(parts))]
    for index, (path, tensors) in enumerate(zip(paths, parts, strict=True)):
        own = dict(entries) if index == 0 else {k: v for k, v in entries.items() if k == _ALIGNMENT}
        if len(parts) > 1:
            own = _numbered(own, file, index, len(parts))
        with path.open("wb") as stream:
            _write(stream, file, own, tensors, watch)
    _compare(file, open_gguf(paths[0]))
    return paths


def _write(
    stream: IO[bytes], file: GgufFile, entries: Mapping[str, bytes], tensors: Sequence[TensorInfo], watch: Watch
) -> None:
    alignment = _alignment(file)
    stream.write(_header(entries, tensors, alignment))
    for tensor in tensors:
        for chunk in _chunks(file, tensor):
            stream.write(chunk)
            watch(len(chunk))
        stream.write(bytes(_padded(tensor.bytes, alignment) - tensor.bytes))


def _header(entries: Mapping[str, bytes], tensors: Sequence[TensorInfo], alignment: int) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(entries))]
    parts += [_string(key) + value for key, value in entries.items()]
    at = 0
    for tensor in tensors:
        parts.append(_info(tensor, at))
        at += _padded(tensor.bytes, alignment)
    header = b"".join(parts)
    return header + bytes(_padded(len(header), alignment) - len(header))


def _info(tensor: TensorInfo, at: int) -> bytes:
    shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
    return _string(tensor.name) + shape + struct.pack("<IQ", tensor.type_id, at)


def _numbered(entries: Mapping[str, bytes], file: GgufFile, index: int, count: int) -> dict[str, bytes]:
    return dict(entries) | {
        NUMBER: struct.pack("<IH", _U16, index),
        COUNT: struct.pack("<IH", _U16, count),
        TENSORS: struct.pack("<Ii", _I32, len(file.tensors)),
    }


def _compare(file: GgufFile, copy: GgufFile) -> None:
    for ours, theirs in zip(copy.tensors, file.tensors, strict=True):
        same = (ours.name, ours.type_id, ours.shape) == (theirs.name, theirs.type_id, theirs.shape) and all(
            np.array_equal(a, b) for a, b in zip(_chunks(copy, ours), _chunks(file, theirs), strict=True)
        )
        if not same:
            raise VerificationError(f"{theirs.name} of {file.path} is another in its copy. Is the disk sound?")


def _chunks(file: GgufFile, tensor: TensorInfo) -> Iterator[memoryview]:
    data = file.data(tensor).reshape(-1)
    for start in range(0, tensor.bytes, _CHUNK):
        yield data[start : start + _CHUNK].data


def _entry_bytes(entry: tuple[str, bytes]) -> int:
    key, value = entry
    return len(_string(key)) + len(value)


def _alignment(file: GgufFile) -> int:
    return int(file.get(_ALIGNMENT, 32))


def _string(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
