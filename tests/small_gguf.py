"""Small GGUF files of any type, ours too, which say what they are told to say. No model: nothing of them runs."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from tesseraq_gguf.types.facts import tensor_type


def small_gguf(path: Path, type: str, rows: int = 40, seed: int = 0, **said: Any) -> Path:
    """Write a file whose matrix is of a type, with random bytes.

    Args:
        path: the file.
        type: of its matrix.
        rows: of the matrix, 256 weights each.
        seed: of the bytes.
        said: metadata, strings and whole numbers; `__` stands for the dot of a key.
    """
    row = tensor_type(type)
    entries = {"general__architecture": "llama", "general__file_type": row.file_type} | said
    tensors: list[tuple[str, int, tuple[int, ...], int]] = [
        ("blk.0.ffn_up.weight", row.id, (256, rows), rows * 256 // row.block_weights * row.block_bytes)
    ]
    tensors.append(("output_norm.weight", 0, (256,), 1024))
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries))
    header += b"".join(_text(key.replace("__", ".")) + _value(value) for key, value in entries.items())
    data, random = b"", np.random.default_rng(seed)
    for name, kind, shape, size in tensors:
        header += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, len(data))
        data += random.bytes(size) + bytes(-size % 32)
    path.write_bytes(header + bytes(-len(header) % 32) + data)
    return path


def _value(value: Any) -> bytes:
    return struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<I", 8) + _text(value)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()
