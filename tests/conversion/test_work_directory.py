from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tesseraq_gguf.conversion.work_directory import WorkDirectory
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.learning.reconstruction import BlockResult
from tesseraq_gguf.methods.held_out import Verdict
from tesseraq_gguf.methods.problem import Mark
from tesseraq_gguf.types.quantized import QuantizedTensor

IDENTITY = {"model": "abc", "seed": 0, "preset": {"steps": 3}}


def _result(index: int) -> BlockResult:
    q = torch.randint(0, 4, (2, 64), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
    code = torch.full((2, 1), 70, dtype=torch.uint8)
    return BlockResult(
        index,
        {f"layers.{index}.w": QuantizedTensor("tsq2", {"q": q, "d": code, "z": code + 1})},
        2.5,
        1.25,
        1.0,
        ranges={f"layers.{index}.w": (-0.1, 3.0)},
        verdict=Verdict(2.0, 2.25, True) if index else None,
        curve=(Mark("rounding", 3, 2.0), Mark("rounding", 6, 1.5)) if index else (),
    )


def test_blocks_come_back_as_they_were(tmp_path):
    with WorkDirectory(tmp_path / "work", IDENTITY, fresh=False) as work:
        assert work.finished(0) is None
        work.keep(_result(0))
        work.keep(_result(1))
    with WorkDirectory(tmp_path / "work", IDENTITY, fresh=False) as work:
        found = work.finished(1)
        tensors = found.tensors
        assert (found.index, found.loss_before, found.loss_after, found.resumed) == (1, 2.5, 1.25, True)
        assert found.ranges == {"layers.1.w": (-0.1, 3.0)}
        assert found.verdict == Verdict(2.0, 2.25, True)
        assert found.curve == (Mark("rounding", 3, 2.0), Mark("rounding", 6, 1.5))
        assert found.seconds == 1.0
        assert (work.finished(0).verdict, work.finished(0).curve) == (None, ())
        assert tensors.keys() == {"layers.1.w"}
        for name, array in _result(1).tensors["layers.1.w"].arrays.items():
            assert torch.equal(tensors["layers.1.w"].arrays[name], array)
        assert [f.name for f in work.files(2, finish=False)] == ["block-0000.safetensors", "block-0001.safetensors"]
        assert work.finished(2) is None


@pytest.mark.parametrize("change", [{"model": "abd"}, {"preset": {"steps": 4}}, {"more": 1}])
def test_another_run_is_noticed_and_never_mixed(change, tmp_path):
    with WorkDirectory(tmp_path / "work", IDENTITY, fresh=False) as work:
        work.keep(_result(0))
    other = IDENTITY | change
    with (
        pytest.raises(UsageError, match=f"differs in {next(iter(change))}.*--fresh"),
        WorkDirectory(tmp_path / "work", other, fresh=False),
    ):
        pass
    assert (tmp_path / "work" / "block-0000.safetensors").exists()
    with WorkDirectory(tmp_path / "work", other, fresh=True) as work:
        assert work.finished(0) is None


def _leave(work: WorkDirectory) -> None:
    """Leave what a run has before its first block: nothing of it took learning."""
    work.keep_note("checked", "yes")
    work.keep_note("types", ".*=tsq3")
    for name in ("embeddings", "codebooks"):
        work.keep_tensors(name, _result(0).tensors)
    (work.scratch("rotated") / "config.json").write_text("{}")


def test_what_a_run_left_before_its_first_block_is_replaced(tmp_path):
    folder, other = tmp_path / "work", IDENTITY | {"model": "mended"}
    with WorkDirectory(folder, IDENTITY, fresh=False) as work:
        _leave(work)
        with WorkDirectory(folder / "before", IDENTITY, fresh=False) as before:
            _leave(before)
    (folder / "mended.gguf").write_text("the user's")  # a model, say, put beside what was there
    with WorkDirectory(folder, other, fresh=False) as work:
        assert (work.note("checked"), work.note("types")) == (None, None)
        assert sorted(p.name for p in folder.iterdir()) == ["mended.gguf", "run.json"]
        work.keep(_result(0))
    with pytest.raises(UsageError, match="differs in model"), WorkDirectory(folder, IDENTITY, fresh=False):
        pass
    with WorkDirectory(folder, other, fresh=False) as work:
        assert work.finished(0).resumed


@pytest.mark.parametrize(
    "kept", ["before/block-0000.safetensors", "preprocessed/config.json", "last-pass-0/state", "final.safetensors"]
)
def test_whatever_took_learning_is_kept(kept, tmp_path):
    folder = tmp_path / "work"
    with WorkDirectory(folder, IDENTITY, fresh=False) as work:
        work.keep_note("checked", "yes")
    (folder / kept).parent.mkdir(exist_ok=True)
    (folder / kept).write_text("learned")
    with (
        pytest.raises(UsageError, match="differs in seed"),
        WorkDirectory(folder, IDENTITY | {"seed": 1}, fresh=False),
    ):
        pass
    assert (folder / kept).read_text() == "learned"
    assert (folder / "checked.txt").exists()


@pytest.mark.parametrize("text", ['{"model": "someone else\'s", "seed": 3}', "[]", "{"])
def test_a_folder_whose_state_is_not_understood_is_not_replaced(text, tmp_path):
    for name, content in (("run.json", text), ("types.txt", "mine")):
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match="differs in"), WorkDirectory(tmp_path, IDENTITY, fresh=False):
        pass
    assert [(tmp_path / name).read_text() for name in ("run.json", "types.txt")] == [text, "mine"]


def test_a_folder_of_the_users_is_left_alone(tmp_path):
    (tmp_path / "letters.txt").write_text("dear")
    for fresh in (False, True):
        with pytest.raises(UsageError, match="not a work directory"), WorkDirectory(tmp_path, IDENTITY, fresh):
            pass
    assert (tmp_path / "letters.txt").read_text() == "dear"


def test_a_file_is_no_work_directory(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="not a work directory"), WorkDirectory(tmp_path / "file", IDENTITY, True):
        pass


def test_one_process_at_a_time(tmp_path):
    program = (
        "import sys, pathlib; from tesseraq_gguf.conversion.work_directory import WorkDirectory\n"
        f"with WorkDirectory(pathlib.Path({str(tmp_path / 'work')!r}), {IDENTITY!r}, False):\n"
        "    print('in', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(UsageError, match="another run is using"), WorkDirectory(tmp_path / "work", IDENTITY, False):
            pass
    finally:
        other.kill()
        other.wait()
    with WorkDirectory(tmp_path / "work", IDENTITY, False):
        pass


def test_nothing_but_blocks_is_left_behind(tmp_path):
    with WorkDirectory(tmp_path / "work", IDENTITY, False) as work:
        work.keep(_result(0))
        assert sorted(p.name for p in work.folder.iterdir()) == ["block-0000.safetensors", "run.json"]
        work.remove()
    assert not list(tmp_path.iterdir())
