"""Where hidden states are kept: the place by its budget, numbers on disk, and files that do not depend on it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf import Recipe, convert
from tesseraq_gguf.compute import hidden_states
from tesseraq_gguf.compute.hidden_states import Place, choose_place
from tesseraq_gguf.conversion.progress import SilentProgress
from tesseraq_gguf.errors import UsageError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("size", "budget", "name"),
    [(1000, 1000, "cpu"), (1001, 1000, "disk"), (1000, None, "cpu"), (1 << 60, None, "disk")],
)
def test_what_the_budget_has_no_room_for_goes_to_disk(size: int, budget: int | None, name: str, tmp_path: Path) -> None:
    assert choose_place(size, CPU, budget, tmp_path).name == name


@pytest.mark.parametrize(
    ("size", "budget", "name"),
    [(1000, None, "cuda:0"), (1001, None, "cpu"), (2000, 2000, "cuda:0"), (2001, 2000, "cpu"), (1 << 60, 2000, "disk")],
)
def test_a_gpu_goes_before_main_memory(
    size: int, budget: int | None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4000, 8000))
    assert choose_place(size, torch.device("cuda", 0), budget, tmp_path).name == name


def test_processes_of_a_machine_share_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = type("Memory", (), {"available": 4000})
    monkeypatch.setattr(hidden_states.psutil, "virtual_memory", lambda: free)
    names = []
    for processes in ("1", "2"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        names.append(choose_place(1500, CPU, None, tmp_path).name)
    assert names == ["cpu", "disk"]


def test_numbers_on_disk_are_numbers(tmp_path: Path) -> None:
    place = Place("disk", tmp_path)
    x, y = (place.empty(torch.Size((3, 5, 7))) for _ in range(2))
    given = torch.arange(105.0).view(3, 5, 7)
    x.copy_(given)
    y.copy_(-given)
    x[1].copy_(x[1] * 2)
    assert list(tmp_path.iterdir()) == []  # the room is given back even if the process is killed
    assert torch.equal(x[torch.tensor([2, 1])], torch.stack([given[2], 2 * given[1]]))
    assert torch.equal(y, -given)


def test_a_full_disk_is_said_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hidden_states.os, "posix_fallocate", full)
    with pytest.raises(UsageError, match=r"has no room for 0\.1 GB of activations .*No space left.*--memory-budget"):
        Place("disk", tmp_path).empty(torch.Size((25_000_000,)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "tesseraq"])
def test_the_file_is_the_same(make_model, long_text: Path, tmp_path: Path, method: str) -> None:  # noqa: F811
    class Notes(SilentProgress):
        said: str = ""

        def note(self, text: str) -> None:
            self.said += text

    model, told = str(make_model("llama").folder), Notes()
    settings: dict[str, Any] = {
        "preset": "fast",
        "samples": 8,
        "seqlen": 32,
        "calibration": str(long_text),
        "device": "cpu",
    }
    memory, disk = tmp_path / "memory.gguf", tmp_path / "disk.gguf"
    convert(Recipe(model, memory, method=method, **settings))
    convert(Recipe(model, disk, method=method, memory_budget=1, **settings), told)
    assert "activations are kept in" in told.said
    assert disk.read_bytes() == memory.read_bytes()
