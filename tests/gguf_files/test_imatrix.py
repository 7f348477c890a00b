"""Importance matrices are read as llama-imatrix writes them, in both formats, and written as llama.cpp reads them."""

from __future__ import annotations

import struct
import subprocess

import numpy as np
import pytest

from tesseraq_gguf.errors import FileFormatError
from tesseraq_gguf.gguf_files.imatrix import Imatrix, Squares, read_imatrix, write_imatrix
from tesseraq_gguf.runtime.locate import find_runtime

SQUARES = Squares(np.arange(12, dtype=np.float32).reshape(3, 4), np.array([2, 0, 4], np.float32))
ENTRIES = {"blk.0.ffn_down_exps.weight": SQUARES, "blk.0.attn_q.weight": Squares(SQUARES.sums[:1], SQUARES.counts[:1])}


def older(entries: dict[str, list[float]], chunks: int | None = None, text: bytes = b"") -> bytes:
    """A file of the older format, made of two calls."""
    parts = [struct.pack("<i", len(entries))]
    for name, values in entries.items():
        parts.append(struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 2, len(values)))
        parts.append(np.array(values, "<f4").tobytes())
    return b"".join(parts) + (struct.pack("<ii", chunks, len(text)) + text if chunks is not None else b"")


def test_what_is_written_is_read(tmp_path):
    written = Imatrix(ENTRIES, ("texts/ä.txt", "other"), 7, 512)
    write_imatrix(tmp_path / "imatrix.gguf", written)
    found = read_imatrix(tmp_path / "imatrix.gguf")
    assert (found.datasets, found.chunks, found.chunk_size) == (("texts/ä.txt", "other"), 7, 512)
    assert found.entries.keys() == ENTRIES.keys()
    for name, squares in ENTRIES.items():
        np.testing.assert_array_equal(found.entries[name].sums, squares.sums)
        np.testing.assert_array_equal(found.entries[name].counts, squares.counts)


def test_means_are_those_of_llama_quantize():
    """It divides by each expert's own count, and takes ones where an expert saw nothing."""
    np.testing.assert_array_equal(SQUARES.means(4), [[0, 0.5, 1, 1.5], [1, 1, 1, 1], [2, 2.25, 2.5, 2.75]])


def test_the_older_format_is_read(tmp_path):
    file = tmp_path / "imatrix.dat"
    file.write_bytes(older({"a.weight": [2, 4], "b.weight": [6, 8, 10, 12]}, 5, b"wiki.train.raw"))
    found = read_imatrix(file)
    assert (found.datasets, found.chunks) == (("wiki.train.raw",), 5)
    np.testing.assert_array_equal(found.entries["a.weight"].means(2), [[1, 2]])
    np.testing.assert_array_equal(found.entries["b.weight"].means(2), [[3, 4], [5, 6]])  # experts, one after the other
    file.write_bytes(older({"a.weight": [2, 4]}))  # older still: nothing of the text
    assert (read_imatrix(file).datasets, read_imatrix(file).chunks) == ((), 0)


def test_what_cannot_be_read_is_refused_in_a_line(tmp_path, tiny_gguf):
    file = tmp_path / "imatrix.dat"
    whole = older({"a.weight": [2, 4], "b.weight": [6, 8]})

    def refused(data: bytes) -> str:
        file.write_bytes(data)
        with pytest.raises(FileFormatError) as caught:
            read_imatrix(file)
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith(str(file))
        return message

    for data in (b"", b"a", b"some text, and more of it " * 9, bytes(100), bytes(range(256)) * 9):
        assert "is no importance matrix of llama.cpp" in refused(data)
    for end in range(32, len(whole)):
        assert "ends in entry 2 of 2" in refused(whole[:end]), end
    assert "what it has of b.weight are no sums of squares" in refused(older({"a.weight": [1], "b.weight": [-1]}))
    assert "no sums of squares" in refused(older({"a.weight": [float("nan")]}))
    write_imatrix(file, Imatrix(ENTRIES))
    data = file.read_bytes()
    assert "is truncated" in refused(data[:-60])
    assert "does not go with its counts" in refused(data.replace(b"q.weight.counts", b"q.weight.c0unts"))
    assert "a GGUF file of another kind" in refused(tiny_gguf.read_bytes())
    with pytest.raises(FileFormatError, match="no file at"):
        read_imatrix(tmp_path / "none")
    with pytest.raises(FileFormatError, match="cannot be read"):
        read_imatrix(tmp_path)


@pytest.mark.runtime
def test_both_formats_of_llama_imatrix_say_the_same(tmp_path, tiny_gguf, long_text):
    tool, found = find_runtime().tool("llama-imatrix"), []
    for kind in ("gguf", "dat"):
        out = tmp_path / f"imatrix.{kind}"
        command = [tool, "-m", tiny_gguf, "-f", long_text, "-o", out, "--output-format", kind, "-c", "64"]
        command += ["--chunks", "3", "--no-ppl", "-t", "1"]
        subprocess.run([str(word) for word in command], check=True, capture_output=True)
        found.append(read_imatrix(out))
    new, old = found
    assert new.entries.keys() == old.entries.keys()
    assert {"blk.0.attn_q.weight", "blk.1.ffn_down.weight"} <= new.entries.keys()
    assert new.chunks == old.chunks == 3
    assert new.datasets == old.datasets == (str(long_text),)
    for name, squares in new.entries.items():
        columns = squares.sums.shape[1]
        np.testing.assert_allclose(squares.means(columns), old.entries[name].means(columns), rtol=1e-5)
