"""A writer's tensors, shared out over the parts of a split file."""

from __future__ import annotations

from typing import Any

from tesseraq_gguf.converter.answers import Emit
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.gguf_files.parts import COUNT, LARGEST_COUNT, NUMBER, TENSORS, shared_out

_COUNTS = 8 + 4 + 8 + 8  # magic, version, numbers of tensors and of entries
_OWN = sum(8 + len(key) + 4 + size for key, size in ((NUMBER, 2), (COUNT, 2), (TENSORS, 4)))


def split(writer: Any, most: int, emit: Emit) -> None:
    """Share out the tensors of a writer that has them all, so that no file is larger than it may be.

    Args:
        writer: gguf's, which writes one file for each dict of its tensors.
        most: bytes of a file.
        emit: told of a file that is larger nevertheless.

    Raises:
        UsageError: there would be more files than can be counted.
    """
    (infos,), (entries,) = writer.tensors, writer.kv_data
    padding = writer.data_alignment
    metadata = sum(len(_packed(writer, key, entry)) for key, entry in entries.items())
    sizes = (_bytes(name, info, padding) for name, info in infos.items())
    counts = shared_out(sizes, metadata, most - _COUNTS - _OWN - padding)
    if len(counts) > LARGEST_COUNT:
        raise UsageError(
            f"files of {most:,} bytes would be {len(counts):,}, more than can be counted: take larger ones"
        )
    names, at = list(infos), 0
    writer.tensors = []
    for count in counts:
        writer.tensors.append({name: infos[name] for name in names[at : at + count]})
        at += count
    _tell_large(writer, metadata, most, emit)


def _packed(writer: Any, key: str, entry: Any) -> bytes:
    import gguf

    name = writer._pack_val(key, gguf.GGUFValueType.STRING, add_vtype=False)
    return bytes(name + writer._pack_val(entry.value, entry.type, add_vtype=True, sub_type=entry.sub_type))


def _bytes(name: str, info: Any, padding: int) -> int:
    """What a tensor takes: its data, padded, and its entry in the header."""
    return -(-info.nbytes // padding) * padding + 8 + len(name.encode()) + 4 + 8 * len(info.shape) + 4 + 8


def _tell_large(writer: Any, metadata: int, most: int, emit: Emit) -> None:
    if metadata + _COUNTS + _OWN > most:
        emit({"event": "note", "text": f"the first file is larger than {most:,} bytes: its metadata alone is"})
    large = [name for part in writer.tensors for name, info in part.items() if info.nbytes > most]
    if large:
        more = f" and {len(large) - 1} more" if len(large) > 1 else ""
        emit({"event": "note", "text": f"{large[0]}{more} alone is larger than {most:,} bytes, and has its own file"})
