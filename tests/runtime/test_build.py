"""Building: what appears in the cache, and what a user reads when something is missing or fails. No compiler runs."""

from __future__ import annotations

import platform
import re
import shutil
import threading
import time
from pathlib import Path

import pytest

from tesseraq_gguf.errors import RuntimeBuildError, RuntimeMissingError, UsageError
from tesseraq_gguf.runtime import build, cache, ensure_source, find_runtime, toolchain
from tesseraq_gguf.runtime.builder import TOOLS
from tesseraq_gguf.runtime.target import Target

from .conftest import FakeMachine, Recorder


def leftovers(home: Path) -> list[str]:
    """What is in the folder of a key apart from source, locks and log."""
    expected = re.compile(r"source|cpu.*\.lock|build-cpu.*")
    return sorted(path.name for path in home.iterdir() if not expected.fullmatch(path.name))


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


def test_what_a_stopped_build_was_configured_for_is_forgotten(machine: FakeMachine, recorder: Recorder) -> None:
    """CMake that finds other compilers in its cache drops all options, and says so in the middle of its log only."""
    machine.script("cmake", f"[ ! -e {machine.build}/CMakeCache.txt ] && [ ! -e {machine.build}/CMakeFiles ]")
    (machine.build / "CMakeFiles").mkdir(parents=True)
    (machine.build / "CMakeCache.txt").touch()
    build(progress=recorder)


def test_damaged_runtime_is_built_again(machine: FakeMachine, recorder: Recorder) -> None:
    runtime = build(progress=recorder)
    runtime.library("llama").unlink()
    assert build(progress=recorder).library("llama").is_file()


def test_a_runtime_without_one_of_the_programs_is_built_again(machine: FakeMachine, recorder: Recorder) -> None:
    """An earlier version with the same patches had fewer."""
    build(progress=recorder).tool("llama-server").unlink()
    assert build(progress=recorder).tool("llama-server").is_file()


def test_unknown_backend(empty_cache: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown backend 'tpu'\. Known backends: cpu, cuda"):
        build(Target("tpu"))
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
    monkeypatch.setattr(toolchain, "cpu_flags", lambda: {"sse4_2", "avx", "f16c"})
    codes = {"SSE42": 0, "AVX": -4, "F16C": None}
    monkeypatch.setattr(toolchain, "_run_probe", lambda cc, candidate, folder: codes[candidate.name])
    usable, trapped = toolchain.probe_instruction_sets("cc")
    assert [each.name for each in usable] == ["SSE42"]
    assert [each.name for each in trapped] == ["AVX"]
    options = toolchain.native_options(usable)
    assert "-DGGML_NATIVE=OFF" in options
    assert "-DGGML_SSE42=ON" in options
    assert "-DGGML_AVX=OFF" in options


HOST, ARM = Target(portable=True), Target(triple="aarch64-linux-gnu")

# what a program of a portable runtime does: it tells the variant it would load, the last one that is there
SAY_VARIANT = """
lib="$(dirname "$0")/../lib"
for file in "$lib"/libggml-cpu-*.so; do chosen="$file"; done
echo "load_backend: loaded CPU backend from $chosen"
"""


def test_portable_build_stands_beside_the_native_one(machine: FakeMachine, recorder: Recorder) -> None:
    native = build(progress=recorder)
    machine.prepare(HOST, ["haswell", "x64"], SAY_VARIANT)
    runtime = build(Target(portable=True), progress=recorder)
    assert runtime.root == machine.home / "cpu-portable"
    assert leftovers(machine.home) == ["cpu", "cpu-portable"]
    assert find_runtime() == native
    assert find_runtime(portable=True) == runtime
    manifest = runtime.manifest
    assert (manifest["portable"], manifest["target"], manifest["instruction_sets"]) == (True, None, None)
    assert manifest["variants"] == manifest["proven"] == ["haswell", "x64"]
    assert manifest["variants_left_out"] == [f"too-new-for-{platform.machine()}"]
    assert (manifest["chosen"], manifest["system_info"]) == ("x64", "AVX2 = 1")
    for option in ("-DGGML_NATIVE=OFF", "-DGGML_BACKEND_DL=ON", "-DGGML_CPU_ALL_VARIANTS=ON"):
        assert option in manifest["cmake_options"]
    log = (machine.home / "build-cpu-portable.log").read_text()
    assert f"-DTESSERAQ_VARIANTS_LEFT_OUT=too-new-for-{platform.machine()}" in log
    assert build(Target(portable=True), progress=recorder) == runtime


def test_every_variant_is_proven_by_itself(machine: FakeMachine, recorder: Recorder) -> None:
    """One that this processor cannot run is kept for others; one that traps although ggml would choose it is not."""
    tool = f"""{SAY_VARIANT}
case "$chosen" in
    *-alderlake.so) echo "Testing 0 devices"; exit 0 ;;
    *-zen4.so) kill -ILL $$ ;;
esac
echo "$(ls "$lib"/libggml-cpu-*.so | wc -l) $chosen" >> {machine.folder}/runs
"""
    machine.prepare(HOST, ["alderlake", "haswell", "x64", "zen4"], tool)
    runtime = build(Target(portable=True), progress=recorder)
    assert runtime.variants == runtime.manifest["variants"] == ["alderlake", "haswell", "x64"]
    assert runtime.manifest["proven"] == ["haswell", "x64"]
    assert runtime.manifest["trapped"] == ["zen4"]
    assert recorder.notes == ["this machine traps on variants that it should run; left out: zen4"]
    runs = [line.split()[0] for line in (machine.folder / "runs").read_text().splitlines()]
    assert runs == ["1", "1", "3", "3"]  # two variants by one program each, then both programs with all that are left


def test_variant_with_wrong_results_installs_nothing(machine: FakeMachine, recorder: Recorder) -> None:
    machine.prepare(HOST, ["haswell", "x64"], f'{SAY_VARIANT} case "$chosen" in *-haswell.so) exit 1 ;; esac')
    with pytest.raises(RuntimeBuildError, match=r"test-backend-ops failed with the variant haswell \(exit code 1\)"):
        build(Target(portable=True), progress=recorder)
    assert leftovers(machine.home) == []


def test_no_variant_for_this_machine(machine: FakeMachine, recorder: Recorder) -> None:
    machine.prepare(HOST, ["zen4"], "kill -ILL $$")
    with pytest.raises(RuntimeBuildError, match="no variant of the CPU backend runs on this machine"):
        build(Target(portable=True), progress=recorder)
    assert leftovers(machine.home) == []


def test_cross_build_is_proven_under_qemu_and_never_chosen_here(machine: FakeMachine, recorder: Recorder) -> None:
    machine.prepare(ARM, ["armv8.0_1", "armv8.2_1"], f'[ -n "$EMULATED" ] || exit 9\n{SAY_VARIANT}')
    machine.script("emulate", 'export EMULATED=1\nexec "$@"')
    machine.emulator = [str(machine.folder / "emulate")]
    runtime = build(Target(triple="aarch64-linux-gnu"), progress=recorder)
    assert runtime.root == machine.home / "cpu-aarch64-linux-gnu"
    manifest = runtime.manifest
    assert (manifest["portable"], manifest["target"]) == (True, "aarch64-linux-gnu")
    assert manifest["platform"] == "Linux aarch64"
    assert manifest["proven"] == ["armv8.0_1", "armv8.2_1"]
    assert manifest["variants_left_out"] == ["too-new-for-aarch64"]
    assert manifest["chosen"] == "armv8.2_1"
    for option in ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DGGML_BACKEND_DL=ON"):
        assert option in manifest["cmake_options"]
    assert find_runtime(target="aarch64-linux-gnu") == runtime
    with pytest.raises(RuntimeMissingError, match="no runtime is installed"):
        find_runtime()


def test_cross_build_without_qemu_says_that_it_is_not_proven(machine: FakeMachine, recorder: Recorder) -> None:
    machine.prepare(ARM, ["armv8.0_1"], "exit 1")
    machine.emulator = None
    assert build(Target(triple="aarch64-linux-gnu"), progress=recorder).manifest["proven"] == []
    assert recorder.notes == ["not proven: there is no qemu-aarch64 to run it (apt install qemu-user)"]


def test_unknown_target(empty_cache: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown target 'vax-dec-vms'\. Known targets: aarch64-linux-gnu"):
        build(Target(triple="vax-dec-vms"))
    assert not empty_cache.exists()


def test_missing_cross_compiler(monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, **o: None if name.endswith(("-gcc", "-g++")) else "/x/" + name)
    message = (
        r"no C and C\+\+ compiler for aarch64-linux-gnu .*\(apt install gcc-aarch64-linux-gnu g\+\+-aarch64-linux-gnu\)"
    )
    with pytest.raises(RuntimeBuildError, match=message):
        build(Target(triple="aarch64-linux-gnu"), progress=Recorder())
    assert not empty_cache.exists()


def test_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, **o: "/x/" + name if name == "qemu-aarch64-static" else None)
    monkeypatch.setenv("QEMU_LD_PREFIX", "/elsewhere")
    assert toolchain.find_emulator(ARM) == ["/x/qemu-aarch64-static", "-cpu", "max,sve-max-vq=2"]
    assert toolchain.find_emulator(HOST) == []
    monkeypatch.setattr(shutil, "which", lambda name, **o: None)
    assert toolchain.find_emulator(ARM) is None


def test_variants_that_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = {"-mavxvnni", "-march=armv9.2-a+dotprod+fp16+sve+i8mm+sme"}
    monkeypatch.setattr(toolchain, "_accepts", lambda cc, flags: not unknown & set(flags))
    assert toolchain.variants_left_out("cc", "x86_64") == ["sapphirerapids", "alderlake"]
    assert toolchain.variants_left_out("cc", "aarch64") == ["armv9.2_1"]
    assert toolchain.variants_left_out(None, "AMD64") == ["sapphirerapids"]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="asks gcc")
def test_flags_that_a_compiler_accepts() -> None:
    assert toolchain._accepts("gcc", ())
    assert not toolchain._accepts("gcc", ("-march=abacus",))


@pytest.mark.runtime
def test_names_of_variants_are_those_of_ggml() -> None:
    """A name that ggml no longer has would leave nothing out."""
    listed = (ensure_source().llama_cpp / "ggml" / "src" / "CMakeLists.txt").read_text()
    for name in (*toolchain.NEVER_BUILT, *toolchain.VARIANT_FLAGS):
        assert re.search(rf"ggml_add_cpu_backend_variant\({re.escape(name)}\s", listed), name
