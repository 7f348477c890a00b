"""Copies with other metadata: tensors stay as they are, no file is larger than it may be, originals are not touched."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from saved_logits import saved_logits
from small_gguf import small_gguf
from split_files import split

from tesseraq_gguf.errors import VerificationError
from tesseraq_gguf.gguf_files import copying
from tesseraq_gguf.gguf_files.gguf_file import open_gguf


def _raw(file):
    return {key: entry.raw for key, entry in file.entries.items() if not key.startswith("split.")}


@pytest.mark.parametrize("most", [None, 10**9, 20_000, 3_000, 1])
def test_a_copy_has_the_same_tensors(most, tiny_gguf, tmp_path):
    source, before = open_gguf(tiny_gguf), tiny_gguf.read_bytes()
    entries = _raw(source) | {"general.url": copying.text("https://somewhere"), "some.number": copying.number(7)}
    wrote: list[int] = []
    paths = copying.copy(source, tmp_path / "copy.gguf", entries, most, wrote.append)
    assert tiny_gguf.read_bytes() == before
    assert [path.name for path in paths] == copying.file_names("copy", len(paths))
    assert (len(paths) == 1) == (most is None or most == 10**9)
    assert sum(wrote) == sum(t.bytes for t in source.tensors)
    read = [gguf.GGUFReader(path) for path in paths]
    assert read[0].fields["general.url"].contents() == "https://somewhere"
    assert read[0].fields["some.number"].contents() == 7
    theirs = [tensor for reader in read for tensor in reader.tensors]
    expected = gguf.GGUFReader(tiny_gguf).tensors
    assert [t.name for t in theirs] == [t.name for t in expected]
    assert all(np.array_equal(a.data, b.data) for a, b in zip(theirs, expected, strict=True))
    for index, (path, reader) in enumerate(zip(paths, read, strict=True)):
        assert most is None or path.stat().st_size <= most or len(reader.tensors) == (1 if index else 0)


def test_a_whole_copy_with_the_same_entries_is_the_same_file(tiny_gguf, tmp_path):
    source = open_gguf(tiny_gguf)
    copying.copy(source, tmp_path / "copy.gguf", _raw(source), None, lambda _: None)
    assert (tmp_path / "copy.gguf").read_bytes() == tiny_gguf.read_bytes()


def test_parts_of_anybody_are_joined(tiny_gguf, tmp_path):
    first = split(tiny_gguf, tmp_path, [1, 3])[0]
    copying.copy(open_gguf(first), tmp_path / "copy.gguf", _raw(open_gguf(first)), None, lambda _: None)
    assert (tmp_path / "copy.gguf").read_bytes() == tiny_gguf.read_bytes()


def test_a_copy_that_is_another_is_found(tmp_path, monkeypatch):
    source = open_gguf(small_gguf(tmp_path / "m.gguf", "tsq2"))
    write = copying._write

    def damaged(stream, *arguments):
        write(stream, *arguments)
        stream.seek(-2000, 1)
        stream.write(b"\x55\xaa\x55\xaa")

    monkeypatch.setattr(copying, "_write", damaged)
    with pytest.raises(VerificationError, match=r"blk\.0\.ffn_up\.weight of .*m\.gguf is another in its copy"):
        copying.copy(source, tmp_path / "copy.gguf", _raw(source), None, lambda _: None)


@pytest.mark.runtime
def test_llama_cpp_answers_from_parts_as_from_the_whole_file(tiny_gguf, long_text, tmp_path):
    source = open_gguf(tiny_gguf)
    first, *_ = copying.copy(source, tmp_path / "copy.gguf", _raw(source), 20_000, lambda _: None)
    assert len(open_gguf(first).parts) > 2
    (_, whole, _), (_, parts, _) = (saved_logits(file, long_text, 32, 2) for file in (tiny_gguf, first))
    assert whole.equal(parts)
    assert whole.std() > 0
