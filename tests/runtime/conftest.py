"""An empty cache, and a machine on which a build takes no time: fake programs that do what a test says."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tesseraq_gguf.runtime import SourceTree, builder, cache, toolchain
from tesseraq_gguf.runtime.builder import TOOLS
from tesseraq_gguf.runtime.locate import RUNTIME_VARIABLE, Runtime
from tesseraq_gguf.runtime.target import Target


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(folder))
    monkeypatch.delenv(RUNTIME_VARIABLE, raising=False)
    return folder


class Recorder:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.steps: list[tuple[int, int]] = []
        self.notes: list[str] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def advance(self, done: int, total: int) -> None:
        self.steps.append((done, total))

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


class FakeMachine:
    """Fake cmake, ninja and tools. `ninja` and `tool` are shell commands that a test may change."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder
        self._monkeypatch = monkeypatch
        self.home = cache.cache_dir() / cache.current_key()
        self.build = self.home / "build-cpu"
        self.libraries = [Runtime(Path(), {}).library("llama").name]
        self.script("cmake", 'echo configured "$@"')
        self.set_tool("exit 0")
        bindings = folder / "llama_cpp"
        bindings.mkdir()
        (bindings / "__init__.py").write_text(
            "def llama_backend_init(): pass\ndef llama_print_system_info(): return b'AVX2 = 1'\n"
        )
        tree = SourceTree(cache.current_key(), self.home / "source" / "llama.cpp", bindings)
        tree.llama_cpp.mkdir(parents=True)
        monkeypatch.setattr(builder, "ensure_source", lambda progress, llama_cpp=None: tree)
        monkeypatch.setattr(toolchain, "probe_instruction_sets", lambda cc: (list(toolchain.X86_INSTRUCTION_SETS), []))
        monkeypatch.setattr(toolchain, "is_linux_x86", lambda: True)
        programs = toolchain.Toolchain(str(folder / "cmake"), str(folder / "ninja"), "cc", "c++")
        monkeypatch.setattr(toolchain, "find_toolchain", lambda target: programs)
        self.emulator: list[str] | None = []
        monkeypatch.setattr(toolchain, "find_emulator", lambda target: self.emulator if target.cross else [])
        monkeypatch.setattr(toolchain, "compiler_version", lambda compiler: "fake 1.0")

    def script(self, name: str, body: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def set_tool(self, body: str) -> None:
        """What every built program does; the fake ninja makes them."""
        self.script("tool", body)
        copies = "\n".join(f'cp "{self.folder / "tool"}" "$dir/{name}"' for name in TOOLS)
        libraries = "\n".join(f': > "$dir/{name}"' for name in self.libraries)
        self.script(
            "ninja",
            f'dir="{self.build}/bin"\nmkdir -p "$dir"\necho "[1/2] one"\n{copies}\n{libraries}\necho "[2/2] two"',
        )

    def prepare(self, target: Target, variants: Sequence[str], tool: str = "exit 0") -> None:
        """Build another target: CPU backends by the names of their variants, and what every program does."""
        self.build = self.home / f"build-{target.name}"
        self.libraries = ["libllama.so", *(f"libggml-cpu-{name}.so" for name in variants)]
        self._monkeypatch.setattr(toolchain, "variants_left_out", lambda cc, processor: [f"too-new-for-{processor}"])
        self.set_tool(tool)


@pytest.fixture
def machine(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    if sys.platform == "win32":
        pytest.skip("the fake programs are shell scripts")
    folder = tmp_path / "programs"
    folder.mkdir()
    return FakeMachine(folder, monkeypatch)


def install_fake(key: str, name: str = "cpu", **manifest: Any) -> Path:
    """Put something that looks like a runtime into the cache."""
    root = cache.cache_dir() / key / name
    library = Runtime(root, manifest).library("llama")
    library.parent.mkdir(parents=True)
    library.touch()
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root
