"""A GGUF file in parts, as llama-gguf-split makes them: the first part has the metadata."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

from tesseraq_gguf.gguf_files.gguf_file import GgufFile, TensorInfo, open_gguf


def split(file: Path, folder: Path, tensors: Sequence[int], name: str = "part") -> list[Path]:
    """Write a file in parts.

    Args:
        file: the file, which is whole.
        folder: where the parts go.
        tensors: how many tensors each part has but the last, which has the others.
        name: what the parts' names begin with.
    """
    whole = open_gguf(file)
    count, at, parts = len(tensors) + 1, 0, []
    for index, size in enumerate([*tensors, len(whole.tensors)]):
        own = {"split.no": (2, "<H", index), "split.count": (2, "<H", count)}
        own["split.tensors.count"] = (5, "<i", len(whole.tensors))
        entries = {} if index else {key: entry.raw for key, entry in whole.entries.items()}
        entries |= {key: struct.pack("<I", kind) + struct.pack(form, value) for key, (kind, form, value) in own.items()}
        parts.append(folder / f"{name}-{index + 1:05}-of-{count:05}.gguf")
        write_gguf_file(parts[-1], entries, whole, whole.tensors[at : at + size])
        at += size
    return parts


def write_gguf_file(out: Path, entries: dict[str, bytes], file: GgufFile, tensors: Sequence[TensorInfo]) -> None:
    """Write metadata, as type and value, and some tensors of a file."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries))
    header += b"".join(_text(key) + raw for key, raw in entries.items())
    data = b""
    for tensor in tensors:
        header += _text(tensor.name) + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        header += struct.pack("<IQ", tensor.type_id, len(data))
        raw = file.data(tensor).tobytes()
        data += raw + bytes(-len(raw) % 32)
    out.write_bytes(header + bytes(-len(header) % 32) + data)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()
