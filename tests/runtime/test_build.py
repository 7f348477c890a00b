"""Building: what appears in the cache, and what a user reads when something is missing or fails. No compiler runs."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest

from tesseraq_gguf.errors import RuntimeBuildError, UsageError
from tesseraq_gguf.runtime import build, cache, find_runtime, toolchain
from tesseraq_gguf.runtime.builder import TOOLS

from .conftest import FakeMachine, Recorder


def leftovers(home: Path) -> list[str]:
    """What is in the folder of a key apart from source, locks and log."""
    expected = {"source", "cpu.lock", "build-cpu.log", "build-cpu"}
    return sorted(path.name for path in home.iterdir() if path.name not in expected)


def test_build_installs_and_the_second_is_instant(machine: FakeMachine, recorder: Recorder) -> None:
    runtime = build(progress=recorder)
    assert runtime.root == machine.home / "cpu"
    assert recorder.steps == [(1, 2), (2, 2)]
    assert runtime == find_runtime()
    assert all(runtime.tool(name).is_file() for name in TOOLS)
    assert (runtime.python / "llama_cpp" / "lib").resolve() == runtime.lib.resolve()
    assert runtime.manifest["kernels_hash"] == cache.kernels_hash()
    assert runtime.manifest["system_info"] == "AVX2 = 1"
    assert "AVX512_VNNI" in runtime.manifest["instruction_sets"]
    assert leftovers(machine.home) == ["cpu"]
    assert not machine.build.exists()

    machine.script("cmake", "exit 1")
    assert build(progress=recorder) == runtime


def test_force_builds_again(machine: FakeMachine, recorder: Recorder) -> None:
    build(progress=recorder)
    (machine.home / "cpu" / "old").touch()
    runtime = build(progress=recorder, force=True)
    assert not (runtime.root / "old").exists()
    assert leftovers(machine.home) == ["cpu"]


def test_damaged_runtime_is_built_again(machine: FakeMachine, recorder: Recorder) -> None:
    runtime = build(progress=recorder)
    runtime.library("llama").unlink()
    assert build(progress=recorder).library("llama").is_file()


def test_unknown_backend(empty_cache: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown backend 'tpu'\. Known backends: cpu"):
        build("tpu")
    assert not empty_cache.exists()


def test_compiler_error_is_one_line_with_the_log(machine: FakeMachine, recorder: Recorder) -> None:
    machine.script("ninja", 'echo "[1/9] cc a.c"\necho "a.c:3:1: error: expected \';\'"\nexit 7')
    with pytest.raises(RuntimeBuildError) as caught:
        build(progress=recorder)
    message = str(caught.value)
    assert "\n" not in message
    assert "exit code 7" in message
    assert "a.c:3:1: error: expected ';'" in message
    assert str(machine.home / "build-cpu.log") in message
    assert "a.c:3:1" in recorder.notes[-1]
    assert leftovers(machine.home) == []


def test_trap_falls_back_to_fewer_instruction_sets(machine: FakeMachine, recorder: Recorder) -> None:
    """The tools trap until AVX-512 is off: one note, and the manifest says what is in use."""
    machine.script(
        "cmake", f'case "$*" in *GGML_AVX512=ON*) touch {machine.folder}/trap;; *) rm {machine.folder}/trap;; esac'
    )
    machine.set_tool(f"if [ -e {machine.folder}/trap ]; then kill -ILL $$; fi")
    runtime = build(progress=recorder)
    assert runtime.manifest["instruction_sets"] == ["SSE42", "AVX", "F16C", "FMA", "BMI2", "AVX2"]
    assert len(recorder.notes) == 1
    assert "traps on this machine" in recorder.notes[0]


def test_trap_everywhere(machine: FakeMachine, recorder: Recorder) -> None:
    machine.set_tool("kill -ILL $$")
    with pytest.raises(RuntimeBuildError, match="even the plainest build traps"):
        build(progress=recorder)
    assert leftovers(machine.home) == []


def test_failed_proof_installs_nothing(machine: FakeMachine, recorder: Recorder) -> None:
    machine.set_tool("echo wrong result; exit 1")
    with pytest.raises(RuntimeBuildError, match=r"test-quantize-fns failed on the new runtime \(exit code 1\)"):
        build(progress=recorder)
    assert leftovers(machine.home) == []


@pytest.mark.parametrize("program", ["cmake", "ninja"])
def test_interrupt_leaves_nothing(machine: FakeMachine, program: str) -> None:
    """Ctrl-C while a program of the build runs: it is ended, and no runtime is there."""
    started = machine.folder / "started"
    machine.script(program, f"touch {started}; echo '[1/2] x'; exec sleep 60")

    class Interrupter(Recorder):
        def advance(self, done: int, total: int) -> None:
            raise KeyboardInterrupt

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        build(progress=Interrupter())
    assert started.exists()
    assert time.monotonic() - begin < 30
    assert leftovers(machine.home) == []


def test_two_builds_at_once_make_one(machine: FakeMachine) -> None:
    counter = machine.folder / "count"
    body = (machine.folder / "ninja").read_text().removeprefix("#!/bin/sh\n")
    machine.script("ninja", f"echo x >> {counter}; sleep 0.3\n{body}")
    threads = [threading.Thread(target=build, kwargs={"progress": Recorder()}) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.read_text() == "x\n"


def test_missing_compiler(monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> None:
    which = shutil.which
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    compilers = {"cc", "gcc", "clang", "c++", "g++", "clang++"}
    monkeypatch.setattr(
        shutil, "which", lambda name, **o: None if name in compilers else which(name, **o) or "/x/" + name
    )
    monkeypatch.setattr(toolchain.sys, "platform", "linux")
    with pytest.raises(RuntimeBuildError, match="no C and C\\+\\+ compiler found; install one"):
        build(progress=Recorder())
    assert not empty_cache.exists()


def test_missing_cmake_and_ninja(monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, **options: None)
    with pytest.raises(RuntimeBuildError, match="cmake and ninja not found; run: pip install cmake ninja"):
        build(progress=Recorder())
    assert not empty_cache.exists()


def test_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(RuntimeBuildError, match=r"cannot write to the cache folder .*TESSERAQ_GGUF_CACHE"):
        build(progress=Recorder())


@pytest.mark.skipif(not toolchain.is_linux_x86() or shutil.which("cc") is None, reason="probes run on Linux x86 only")
def test_probes_run() -> None:
    usable, trapped = toolchain.probe_instruction_sets("cc")
    assert "SSE42" in [each.name for each in usable]
    assert not set(usable) & set(trapped)


def test_a_probe_that_traps_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_cpu_flags", lambda: {"sse4_2", "avx", "f16c"})
    codes = {"SSE42": 0, "AVX": -4, "F16C": None}
    monkeypatch.setattr(toolchain, "_run_probe", lambda cc, candidate, folder: codes[candidate.name])
    usable, trapped = toolchain.probe_instruction_sets("cc")
    assert [each.name for each in usable] == ["SSE42"]
    assert [each.name for each in trapped] == ["AVX"]
    options = toolchain.native_options(usable)
    assert "-DGGML_NATIVE=OFF" in options
    assert "-DGGML_SSE42=ON" in options
    assert "-DGGML_AVX=OFF" in options
