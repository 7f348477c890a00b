"""Parts of a split file: their names, what each holds, and that a set which can be opened is whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesseraq_gguf.gguf_files import parts
from tesseraq_gguf.gguf_files.parts import moved, part_name, part_of, parts_of, shared_out


def test_names_are_llama_cpps():
    assert part_name("model", 0, 3) == "model-00001-of-00003.gguf"
    found = part_of("a-b-00002-of-00012.gguf")
    assert found is not None
    assert (found.stem, found.index, found.count) == ("a-b", 1, 12)
    for name in ("model.gguf", "model-1-of-3.gguf", "model-00001-of-00003", "model-00001-of-00003.gguf.part"):
        assert part_of(name) is None


def test_parts_beside_a_file_are_named_after_it(tmp_path):
    names = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "m-00001-of-00003.gguf"]
    for name in (*names, "m.gguf", "mm-00001-of-00002.gguf", "m-00001-of-00002.txt"):
        (tmp_path / name).touch()
    for out in ("m.gguf", "m"):
        assert [path.name for path in parts_of(tmp_path / out)] == sorted(names)


@given(st.lists(st.integers(1, 100), max_size=40), st.integers(0, 200), st.integers(1, 250))
def test_no_part_is_larger_than_it_may_be(sizes, header, most):
    counts = shared_out(sizes, header, most)
    assert sum(counts) == len(sizes)
    assert all(counts[1:])
    at, left = 0, header
    for count in counts:
        held = left + sum(sizes[at : at + count])
        assert held <= most or count == (0 if left else 1)
        if at + count < len(sizes):  # the next one did not fit
            assert held + sizes[at + count] > most
        at, left = at + count, 0


def test_a_first_part_is_there_only_with_all_others(tmp_path, monkeypatch):
    """A crash at any moment leaves no set of which some parts are old."""
    home, out = tmp_path / "home", tmp_path / "out"
    for folder, text in ((home, "new"), (out, "old")):
        folder.mkdir()
        for index in range(3):
            (folder / part_name("m", index, 3)).write_text(text)
    replace, seen = Path.replace, []

    def watched(self: Path, target: Path) -> Path:
        seen.append({path.name[:7]: path.read_text() for path in sorted(out.iterdir())})
        return replace(self, target)

    monkeypatch.setattr(parts.Path, "replace", watched)
    placed = moved(sorted(home.iterdir()), out)
    assert placed == sorted(out.iterdir())
    assert [path.read_text() for path in placed] == ["new"] * 3
    assert not any("m-00001" in state for state in seen)


def test_a_file_that_is_whole_is_replaced_in_one_step(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "m.gguf").write_text("new")
    (tmp_path / "m.gguf").write_text("old")
    assert moved([tmp_path / "home" / "m.gguf"], tmp_path) == [tmp_path / "m.gguf"]
    assert (tmp_path / "m.gguf").read_text() == "new"
    with pytest.raises(FileNotFoundError):
        moved([tmp_path / "home" / "m.gguf"], tmp_path)
