"""Inspection and the check that every reader relies on: what is right is told, what is broken is one line."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from split_files import split

from tesseraq_gguf.errors import FileFormatError
from tesseraq_gguf.gguf_files.gguf_file import ArrayValue
from tesseraq_gguf.gguf_files.inspection import inspect, open_gguf, render


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _entry(key: str, kind: int, value: bytes) -> bytes:
    return _text(key) + struct.pack("<I", kind) + value


ENTRIES = [
    _entry("general.architecture", 8, _text("llama")),
    _entry("general.file_type", 4, struct.pack("<I", 500)),
    _entry("llama.block_count", 4, struct.pack("<I", 1)),
    _entry("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 2) + _text("a") + _text("b")),
    _entry("tokenizer.ggml.scores", 9, struct.pack("<IQf", 6, 1, 0.5)),
    _entry("tesseraq.method", 8, _text("tesseraq")),
    _entry("tesseraq.format_version", 4, struct.pack("<I", 1)),
]
# name, shape, type, bytes
TENSORS = [("blk.0.ffn_up.weight", (64, 2), 500, 36), ("output_norm.weight", (8,), 0, 32), ("odd", (5,), 1, 10)]


def _file(path: Path, *, entries=ENTRIES, tensors=TENSORS, version=3, counts=None, offsets=None, short=0) -> Path:
    counts = counts or (len(tensors), len(entries))
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(entries)
    data = b""
    for index, (name, shape, kind, size) in enumerate(tensors):
        offset = offsets[index] if offsets else len(data)
        header += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        data += bytes(size) + bytes(-size % 32)
    content = header + bytes(-len(header) % 32) + data
    path.write_bytes(content[: len(content) - short])
    return path


def test_a_file_of_ours(tmp_path):
    path = _file(tmp_path / "m.gguf")
    found = inspect(path)
    assert found.architecture == "llama"
    assert found.file_type == "mostly tsq2"
    assert found.runs_on == "tesseraq-gguf runtime only (types: tsq2)"
    assert found.needs_runtime
    assert found.tesseraq == {"method": "tesseraq", "format_version": 1}
    assert found.metadata["llama.block_count"] == 1
    assert found.metadata["vocabulary"] == 2
    assert found.bytes == path.stat().st_size
    assert found.weights == 128 + 8 + 5
    assert [(t.name, t.type, t.shape, t.bytes, t.bpw) for t in found.tensors] == [
        ("blk.0.ffn_up.weight", "tsq2", (64, 2), 36, 2.25),
        ("output_norm.weight", "f32", (8,), 32, 32.0),
        ("odd", "f16", (5,), 10, 16.0),
    ]
    data = json.loads(json.dumps(found.to_json()))
    assert data["types"]["tsq2"] == {"tensors": 1, "weights": 128, "bytes": 36, "bpw": 2.25, "custom": True}
    shown = _shown(render(found))
    for word in ("blk.0.ffn_up.weight", "64 × 2", "2.250", "tesseraq-gguf runtime only", "tesseraq.method"):
        assert word in shown
    assert "blk.0" not in _shown(render(found, tensors=False))


def _shown(renderable: object) -> str:
    text = io.StringIO()
    Console(file=text, width=100).print(renderable)
    return text.getvalue()


def test_a_stock_file_and_the_padding_of_the_last_tensor(tmp_path):
    path = _file(tmp_path / "m.gguf", entries=ENTRIES[:1], tensors=TENSORS[1:], short=22)
    found = inspect(path)
    assert found.runs_on == "any llama.cpp"
    assert not found.needs_runtime
    assert found.file_type is None


def test_what_the_gguf_package_writes(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_file_type(7)
    writer.add_array("some.array", [1, 2, 3])
    writer.add_bool("some.bool", True)
    writer.add_float64("some.float", 0.5)
    weights = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    writer.add_tensor("w", gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0), raw_dtype=8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(path)
    assert inspect(path).file_type == "mostly q8_0"
    assert (file.get("some.array"), file.get("some.bool"), file.get("some.float")) == (ArrayValue("i32", 3), True, 0.5)
    assert file.get("nothing", "x") == "x"
    reader = gguf.GGUFReader(path)
    assert np.array_equal(file.data(file.tensors[0]), reader.tensors[0].data)


@pytest.mark.parametrize("cut", [4, 7, 20, 30, 100, 200, 300, 400])
def test_truncated_anywhere(tmp_path, cut):
    path = _file(tmp_path / "m.gguf")
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    with pytest.raises(FileFormatError, match="truncated") as caught:
        open_gguf(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_tensor_data(tmp_path):
    path = _file(tmp_path / "m.gguf", short=40)
    with pytest.raises(
        FileFormatError, match=r"truncated: tensor 'output_norm.weight' ends at byte .*get the file again"
    ):
        open_gguf(path)


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "version 1": ({"version": 1}, "GGUF version 1"),
    "version 9": ({"version": 9}, "GGUF version 9"),
    "big-endian": ({"version": 3 << 24}, "big-endian"),
    "tensor count": ({"counts": (1 << 60, 7)}, "announces 1,152,921,504,606,846,976 tensors"),
    "entry count": ({"counts": (3, 8)}, "truncated|corrupt"),
    "value type": ({"entries": [_entry("a.b", 77, b"")]}, "metadata 'a.b' has the unknown value type 77"),
    "array type": ({"entries": [_entry("a.b", 9, struct.pack("<IQ", 9, 1))]}, "array of the unknown value type 9"),
    "array length": ({"entries": [_entry("a.b", 9, struct.pack("<IQ", 8, 1 << 40))]}, "truncated"),
    "long array": ({"entries": [_entry("a.b", 9, struct.pack("<IQ", 4, 1 << 62))]}, "truncated"),
    "twice": ({"entries": [ENTRIES[0], ENTRIES[0]]}, "'general.architecture' appears twice"),
    "alignment": ({"entries": [_entry("general.alignment", 4, struct.pack("<I", 3))]}, "alignment is 3"),
    "unknown type": ({"tensors": [("w", (64,), 777, 32)]}, "tensor 'w' of type 777, which is known neither"),
    "removed type": ({"tensors": [("w", (64,), 4, 32)]}, "tensor 'w' of type 4"),
    "row length": ({"tensors": [("w", (63,), 500, 36)]}, "cannot be of type tsq2"),
    "no row": ({"tensors": [("w", (0,), 0, 32)]}, "cannot be of type f32"),
    "dimensions": ({"tensors": [("w", (1, 1, 1, 1, 1), 0, 32)]}, "header of tensor 'w' makes no sense"),
    "huge": ({"tensors": [("w", (1 << 40, 1 << 40), 0, 32)]}, "truncated: tensor 'w'"),
    "overlap": ({"offsets": [0, 32, 96]}, "'output_norm.weight' cannot be"),
    "same name": ({"tensors": [TENSORS[1], TENSORS[1]]}, "appears 2 times"),
    "long name": ({"tensors": [("w" * 64, (8,), 0, 32)]}, "makes no sense"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken(tmp_path, case):
    changes, message = BROKEN[case]
    path = _file(tmp_path / "m.gguf", **changes)
    with pytest.raises(FileFormatError, match=message) as caught:
        open_gguf(path)
    assert "\n" not in str(caught.value)


def test_not_gguf_at_all(tmp_path):
    path = tmp_path / "m.gguf"
    for content, message in [
        (b"", "is empty"),
        (b"PK\x03\x04 a zip", "does not start with 'GGUF'"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ]:
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=message):
            inspect(path)
    with pytest.raises(FileFormatError, match="no file at"):
        inspect(tmp_path / "none.gguf")
    with pytest.raises(FileFormatError, match="is a folder"):
        inspect(tmp_path)


NUMBERS = [0, 1, 8, 9, 10, 31, 32, 127, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]


def _overwrite(content: bytearray, at: int, end: int, data: bytes) -> None:
    content[at : at + len(data)] = data


def _insert(content: bytearray, at: int, end: int, data: bytes) -> None:
    content[at:at] = data


def _delete(content: bytearray, at: int, end: int, data: bytes) -> None:
    del content[at:end]


def _repeat(content: bytearray, at: int, end: int, data: bytes) -> None:
    content[at:at] = content[at:end]


def _cut(content: bytearray, at: int, end: int, data: bytes) -> None:
    del content[at:]


_little = st.tuples(st.sampled_from(NUMBERS), st.sampled_from([1, 2, 4, 8])).map(
    lambda pair: (pair[0] % 2 ** (8 * pair[1])).to_bytes(pair[1], "little")
)
_mutations = st.lists(
    st.tuples(
        st.sampled_from([_overwrite, _overwrite, _overwrite, _insert, _delete, _repeat, _cut]),
        st.integers(0, 600),
        st.integers(1, 64),
        st.one_of(_little, _little, st.binary(min_size=1, max_size=12)),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=500, deadline=5000)
@given(mutations=_mutations)
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path_factory, mutations):
    """Numbers that cannot be, pieces too many or too few, any bytes: no other error, no hang, little memory."""
    path = _file(tmp_path_factory.getbasetemp() / "damaged.gguf")
    content = bytearray(path.read_bytes())
    for mutate, at, length, data in mutations:
        at = min(at, len(content))
        mutate(content, at, at + length, data)
    path.write_bytes(content)
    tracemalloc.start()
    try:
        found = inspect(path)
    except FileFormatError as error:
        assert len(str(error).splitlines()) == 1
        assert str(error).isprintable()
        assert len(str(error)) < 500 + len(str(path))
    else:
        json.dumps(found.to_json())
        _shown(render(found))
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 20e6


def test_an_array_of_texts_longer_than_the_file_costs_nothing(tmp_path):
    path = _file(tmp_path / "m.gguf", entries=[_entry("a.b", 9, struct.pack("<IQ", 8, 1 << 60) + bytes(32 << 20))])
    begin = time.monotonic()
    with pytest.raises(FileFormatError, match="truncated"):
        open_gguf(path)
    assert time.monotonic() - begin < 1


def test_names_that_are_no_names_cannot_disturb_a_terminal(tmp_path):
    """What a file calls its entries and tensors comes from strangers: no escapes, no second line, no end of it."""
    nasty = "a\n\x1b[31m" + "b" * 1000
    for changes in (
        {"entries": [_entry(nasty, 77, b"")]},
        {"entries": [_entry(nasty, 9, struct.pack("<IQ", 9, 1))]},
        {"entries": [_entry(nasty, 0, b"0"), _entry(nasty, 0, b"0")]},
        {"entries": [_entry("general.alignment", 8, _text(nasty))]},
        {"tensors": [(nasty, (8,), 0, 32)]},
        {"tensors": [(nasty[:50], (8,), 777, 32)]},
        {"tensors": [(nasty[:50], (63,), 500, 32)]},
        {"tensors": [(nasty[:50], (1 << 40,), 0, 32)]},
        {"tensors": [(nasty[:50], (8,), 0, 32)] * 2},
    ):
        path = _file(tmp_path / "m.gguf", **changes)
        with pytest.raises(FileFormatError) as caught:
            open_gguf(path)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 400 + len(str(path))


def test_what_a_file_says_of_itself_cannot_disturb_a_terminal_or_a_reader_of_json(run, tmp_path):
    nasty = "red \x1b[31m\x07 🦙\r\nsecond \u202e line"
    entries = [
        _entry("general.architecture", 8, _text(nasty)),
        _entry("general.name", 8, struct.pack("<Q", 3) + b"\xff\xfe\xc3"),
        _entry("general.file_type", 6, struct.pack("<f", float("nan"))),
        _entry(f"{nasty}.block_count", 9, struct.pack("<IQ", 8, 0)),
        _entry("tesseraq.nan", 6, struct.pack("<f", float("nan"))),
        _entry("tesseraq.inf", 12, struct.pack("<d", float("-inf"))),
        _entry(f"tesseraq.{nasty}", 8, _text(nasty)),
        _entry("tesseraq.surrogate", 8, struct.pack("<Q", 3) + b"\xed\xa0\x80"),
    ]
    path = _file(tmp_path / "m.gguf", entries=entries, tensors=[(f"a{nasty}"[:40], (8,), 0, 32)])
    answer = run("inspect", path)
    assert answer.code == 0
    assert all(c == "\n" or ord(c) > 31 for c in answer.out)
    assert "\u202e" not in answer.out
    assert r"red \x1b[31m\x07 🦙\r\nsecond \u202e line" in answer.out

    def refuse(constant):
        pytest.fail(f"not JSON: {constant}")

    data = json.loads(run("inspect", path, "--json").out, parse_constant=refuse)
    assert data["architecture"] == nasty
    assert (data["tesseraq"]["nan"], data["tesseraq"]["inf"]) == ("NaN", "-Infinity")


def test_needs_no_runtime_and_no_torch(tmp_path):
    path = _file(tmp_path / "m.gguf")
    code = (
        "import sys; from tesseraq_gguf.gguf_files.inspection import inspect; "
        f"assert inspect({str(path)!r}).needs_runtime; "
        "assert not {'torch', 'transformers', 'llama_cpp'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_split_file_is_one_file(tmp_path):
    whole = inspect(_file(tmp_path / "whole.gguf"))
    for tensors in ([1], [0], [1, 1], [3]):  # a first part without tensors, and a last one
        folder = tmp_path / "-".join(map(str, tensors))
        folder.mkdir()
        first = split(tmp_path / "whole.gguf", folder, tensors)[0]
        found, header = inspect(first), open_gguf(first)
        assert (found.parts, whole.parts) == (len(tensors) + 1, 1)
        assert found.tensors == whole.tensors
        assert found.weights == whole.weights
        assert found.block_bpw == whole.block_bpw
        assert found.bytes == sum(part.stat().st_size for part in folder.iterdir())
        assert found.bpw == round(8 * found.bytes / found.weights, 4)
        assert f"{found.bytes:,} bytes in {found.parts} parts, " in _shown(render(found))
        assert [len(header.data(t).tobytes()) for t in header.tensors] == [36, 32, 10]


def test_parts_are_found_beside_the_link_that_was_given(tmp_path):
    """A download's names are links to files with other names."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "names").mkdir()
    for index, part in enumerate(split(_file(tmp_path / "whole.gguf"), tmp_path / "blobs", [1])):
        (tmp_path / "names" / part.name).symlink_to(part.rename(tmp_path / "blobs" / f"{index}abc"))
    assert inspect(tmp_path / "names" / "part-00001-of-00002.gguf").parts == 2


def _missing(parts: list[Path]) -> Path:
    parts[1].unlink()
    return parts[0]


def _second(parts: list[Path]) -> Path:
    return parts[1]


def _renamed(parts: list[Path]) -> Path:
    return parts[0].rename(parts[0].with_name("model.gguf"))


def _second_renamed(parts: list[Path]) -> Path:
    return parts[1].rename(parts[1].with_name("model.gguf"))


def _truncated(parts: list[Path]) -> Path:
    parts[2].write_bytes(parts[2].read_bytes()[:-40])
    return parts[0]


def _swapped(parts: list[Path]) -> Path:
    parts[1].write_bytes(parts[2].read_bytes())
    return parts[0]


def _of_another(parts: list[Path]) -> Path:
    """The second part of a model with a tensor more."""
    more = _file(parts[0].with_name("more.gguf"), tensors=[*TENSORS, ("more", (8,), 0, 32)])
    split(more, parts[0].parent, [1, 2])[0].unlink()
    split(more.with_name("whole.gguf"), parts[0].parent, [1, 1], "new")[0].rename(parts[0])
    return parts[0]


def _twice(parts: list[Path]) -> Path:
    """A second part with the first's tensor."""
    split(parts[0].with_name("whole.gguf"), parts[0].parent, [0, 1], "new")[1].rename(parts[1])
    return parts[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_missing, r"part 2 of 3 is missing, part-00002-of-00003\.gguf\. All parts must be in one folder"),
        (_second, r"is part 2 of 3\. Give the first part, part-00001-of-00003\.gguf"),
        (_renamed, r"must end in -00001-of-00003\.gguf"),
        (_second_renamed, r"is part 2 of 3\. Give the first part, the one that ends in -00001-of-00003\.gguf"),
        (_truncated, r"part-00003-of-00003\.gguf is truncated"),
        (_swapped, r"part-00002-of-00003\.gguf is not part 2 of 3, as its name says"),
        (_of_another, r"not of one model: they hold 4 tensors, the first announces 3"),
        (_twice, r"not of one model: tensor 'blk\.0\.ffn_up\.weight' is in two of them"),
    ],
)
def test_parts_that_make_no_file(damage, message, tmp_path):
    parts = split(_file(tmp_path / "whole.gguf"), tmp_path, [1, 1])
    with pytest.raises(FileFormatError, match=message) as caught:
        inspect(damage(parts))
    assert "\n" not in str(caught.value)


def test_numbers_among_the_metadata(tmp_path):
    entries = [
        *ENTRIES,
        _entry("a.bools", 9, struct.pack("<IQ???", 7, 3, True, False, True)),
        _entry("a.numbers", 9, struct.pack("<IQii", 5, 2, -3, 7)),
    ]
    file = open_gguf(_file(tmp_path / "m.gguf", entries=entries))
    assert file.numbers("a.bools") == [True, False, True]
    assert file.numbers("a.numbers") == [-3, 7]
    assert file.numbers("tokenizer.ggml.scores") == [0.5]
    for key in ("tokenizer.ggml.tokens", "general.file_type", "not.there"):
        assert file.numbers(key) is None
