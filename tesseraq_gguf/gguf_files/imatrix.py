"""Importance matrices as llama-imatrix writes them: for each matrix of a model the squares of what it is fed, summed.

A file is GGUF, with tensors `NAME.in_sum2` (sums of squares, one row for each expert) and `NAME.counts` (how many
tokens each row is of), or of the older format without a magic number, which people call `.dat`:

    entries i32 · entries × (length i32, name, calls i32, values i32, mean square times calls f32 …)
    chunks i32 · length i32, name of the text           (these may be missing)
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.errors import FileFormatError
from tesseraq_gguf.gguf_files.gguf_file import GgufFile, TensorInfo, open_gguf
from tesseraq_gguf.paths import temporary_sibling

_SUMS, _COUNTS = ".in_sum2", ".counts"

_DATASETS, _CHUNKS, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"

_LONGEST_NAME = 256
"""Of a tensor in the older format: names of llama.cpp have 63 bytes at most."""

_FOREIGN = "is no importance matrix of llama.cpp, neither GGUF nor of the older format: make one with llama-imatrix"
_AGAIN = "Get the file again, or make it again with llama-imatrix"


@dataclass(frozen=True)
class Squares:
    """What one matrix of a model was fed, or each matrix of a stack.

    Attributes:
        sums: of squares, float32 [matrices, columns]. The older format does not tell matrices apart, and has one row.
        counts: over how many tokens, float32 [matrices].
    """

    sums: NDArray[np.float32]
    counts: NDArray[np.float32]

    def means(self, columns: int) -> NDArray[np.float32]:
        """Return the mean squares, float32 [matrices, columns]: ones for what was fed no token.

        Raises:
            ValueError: they are not of matrices with so many columns.
        """
        counts = self.counts[:, None]
        means = np.where(counts > 0, self.sums / np.where(counts > 0, counts, 1), 1)
        return means.astype(np.float32).reshape(-1, columns)


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix.

    Attributes:
        entries: what matrices were fed, by their names in a GGUF file of the model.
        datasets: names of the texts.
        chunks: sequences that it was made of; 0 where that is not known.
        chunk_size: tokens of each; 0 where that is not known.
    """

    entries: Mapping[str, Squares]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 0


def read_imatrix(path: Path) -> Imatrix:
    """Read an importance matrix in either format.

    Raises:
        FileFormatError: missing, truncated, damaged, or a file of another kind.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
            found = _from_gguf(open_gguf(path)) if start == b"GGUF" else _Older(path, start + file.read()).read()
    except FileNotFoundError:
        raise FileFormatError(f"no file at {path}") from None
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read: {error.strerror or error}") from error
    for name, squares in found.entries.items():
        if not (np.isfinite(squares.sums).all() and (squares.sums >= 0).all()):
            raise FileFormatError(f"{path} is damaged: what it has of {name} are no sums of squares. {_AGAIN}")
    return found


def _from_gguf(file: GgufFile) -> Imatrix:
    tensors = {t.name: t for t in file.tensors}
    names = [name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)]
    if not names:
        raise FileFormatError(
            f"{file.path} is a GGUF file of another kind, a model perhaps: an importance matrix has tensors that end "
            f"in {_SUMS}"
        )
    entries = {name: _squares(file, tensors[name + _SUMS], tensors.get(name + _COUNTS)) for name in names}
    chunks, size = (value if isinstance(value := file.get(key), int) else 0 for key in (_CHUNKS, _CHUNK_SIZE))
    return Imatrix(entries, tuple(filter(None, file.texts(_DATASETS))), chunks, size)


def _squares(file: GgufFile, sums: TensorInfo, counts: TensorInfo | None) -> Squares:
    if counts is None or {sums.type, counts.type} != {"f32"} or sums.weights % counts.weights:
        raise FileFormatError(f"{file.path} is damaged: {sums.name} does not go with its counts. {_AGAIN}")
    values, tokens = (file.data(t).view("<f4").reshape(-1) for t in (sums, counts))
    return Squares(np.array(values).reshape(len(tokens), -1), np.array(tokens))


class _Older:
    """The older format, of which nothing says that it is that: what cannot be is refused.

    Args:
        path: of the file, for messages.
        data: all that is in it.
    """

    def __init__(self, path: Path, data: bytes) -> None:
        self._path, self._data, self._at = path, data, 0

    def read(self) -> Imatrix:
        """Return what it says.

        Raises:
            FileFormatError: it is truncated, or something else.
        """
        count = self._number() if len(self._data) >= 4 else 0
        entries: dict[str, Squares] = {}
        for index in range(max(count, 1)):
            name = self._name() if count > 0 else None
            if name is None:
                raise FileFormatError(f"{self._path} {self._cut(index, count) if index else _FOREIGN}")
            entries[name] = self._entry(index, count)
        chunks, datasets = 0, list[str]()
        if self._left >= 4:
            chunks = max(0, self._number())
            datasets = [text] if (text := self._name(self._left)) else []
        return Imatrix(entries, tuple(datasets), chunks)

    def _entry(self, index: int, count: int) -> Squares:
        if self._left < 8:
            raise FileFormatError(f"{self._path} {self._cut(index, count)}")
        calls, values = self._number(), self._number()
        if values < 1 or 4 * values > self._left:
            raise FileFormatError(f"{self._path} {self._cut(index, count) if index else _FOREIGN}")
        sums = np.frombuffer(self._data, "<f4", values, self._at)
        self._at += sums.nbytes
        return Squares(np.array(sums)[None], np.array([max(calls, 1)], np.float32))

    @property
    def _left(self) -> int:
        return len(self._data) - self._at

    def _number(self) -> int:
        self._at += 4
        return int(struct.unpack_from("<i", self._data, self._at - 4)[0])

    def _name(self, longest: int = _LONGEST_NAME) -> str | None:
        """The text that comes next, with its length before it; None if there is none that could be a name."""
        if self._left < 4:
            return None
        length = self._number()
        if not 0 < length <= min(longest, self._left):
            return None
        self._at += length
        try:
            name = self._data[self._at - length : self._at].decode()
        except UnicodeDecodeError:
            return None
        return name if name.isprintable() else None

    @staticmethod
    def _cut(index: int, count: int) -> str:
        return f"is truncated or damaged: it ends in entry {index + 1} of {count:,}. {_AGAIN}"


def write_imatrix(path: Path, imatrix: Imatrix) -> None:
    """Write an importance matrix as GGUF, in the place of `path` when it is whole.

    Raises:
        OSError: it cannot be written.
    """
    from gguf import GGUFWriter

    with temporary_sibling(path) as partial:
        writer = GGUFWriter(None, "imatrix")
        writer.kv_data[0].pop("general.architecture")  # it is no model
        writer.add_type("imatrix")
        writer.add_array(_DATASETS, list(imatrix.datasets) or [""])  # llama-quantize wants the key, gguf a value
        writer.add_uint32(_CHUNKS, imatrix.chunks)
        writer.add_uint32(_CHUNK_SIZE, imatrix.chunk_size)
        for name, squares in sorted(imatrix.entries.items()):
            writer.add_tensor(name + _SUMS, np.ascontiguousarray(squares.sums, np.float32))
            writer.add_tensor(name + _COUNTS, np.ascontiguousarray(squares.counts[:, None], np.float32))
        writer.write_header_to_file(path=partial)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
