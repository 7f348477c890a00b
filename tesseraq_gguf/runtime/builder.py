"""Build, prove and install a runtime: libraries, tools and Python bindings of the patched llama.cpp.

A runtime appears under its final name only when it is whole and its programs have run on this machine. Nothing in the
build touches the network, apart from fetching the pinned source once.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from tesseraq_gguf.errors import RuntimeBuildError, UsageError
from tesseraq_gguf.runtime import cache, pin, toolchain
from tesseraq_gguf.runtime.load import LIBRARY_VARIABLE
from tesseraq_gguf.runtime.locate import MANIFEST, Runtime, read_runtime
from tesseraq_gguf.runtime.progress import Reporter, RichReporter
from tesseraq_gguf.runtime.source import SourceTree, ensure_source
from tesseraq_gguf.runtime.toolchain import InstructionSet, Toolchain

BACKENDS: Mapping[str, tuple[str, ...]] = {"cpu": ("-DGGML_METAL=OFF",)}
"""CMake options by backend."""

TOOLS = (
    "llama-perplexity",
    "llama-bench",
    "llama-quantize",
    "llama-imatrix",
    "llama-completion",
    "test-backend-ops",
    "test-quantize-fns",
    "test-quantize-perf",
)
"""Programs of a runtime: those of llama.cpp that people and this project use, and its tests of tensor types."""

_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "-DLLAMA_BUILD_TOOLS=ON",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_TESTS=ON",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_NUMBER=0",
)

_PROOFS = (
    ("test-quantize-fns",),
    (
        "test-backend-ops",
        "test",
        "-b",
        "CPU",
        "-o",
        "MUL_MAT",
        "-p",
        r"type_a=(tsq2|tsq3|tsq4|q8_0|f16|bf16),type_b=f32,m=16,n=(1|8),k=256,bs=\[1,1\]",
    ),
)
"""Programs that must succeed before a runtime is installed; quick, and wide enough to meet the instructions in use."""


def build(
    backend: str = "cpu",
    *,
    llama_cpp: Path | None = None,
    force: bool = False,
    jobs: int | None = None,
    progress: Reporter | None = None,
) -> Runtime:
    """Return the runtime of this version and these patches, building and installing it if it is not there.

    Args:
        backend: which devices it runs on; only `cpu` so far.
        llama_cpp: an existing llama.cpp checkout to copy and patch instead of the pinned one.
        force: build even if it is there.
        jobs: compilers at a time; by default one per processor this process may use.
        progress: told what happens; by default a progress bar on stderr.

    Raises:
        RuntimeBuildError: something is missing or failed; the message is one line, and names the log if there is one.
        UsageError: an unknown backend, or `llama_cpp` is no llama.cpp checkout.
    """
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend '{backend}'. Known backends: {', '.join(BACKENDS)}")
    key = cache.checkout_key(_checkout(llama_cpp)) if llama_cpp else cache.current_key()
    installed = read_runtime(cache.cache_dir() / key / backend)
    if installed and not force:
        return installed
    with contextlib.ExitStack() as stack:
        reporter = progress or stack.enter_context(RichReporter())
        programs = toolchain.find_toolchain()
        source = ensure_source(reporter, llama_cpp=llama_cpp)
        home = source.llama_cpp.parent.parent
        stack.enter_context(FileLock(home / f"{backend}.lock"))
        installed = read_runtime(home / backend)
        if installed and not force:
            return installed
        work = _Build(backend, source, home, programs, jobs or _processors(), reporter)
        return work.run(checkout=llama_cpp)


class _Build:
    """One build of one backend, in the folder of its key."""

    def __init__(
        self, backend: str, source: SourceTree, home: Path, programs: Toolchain, jobs: int, progress: Reporter
    ):
        self.backend = backend
        self.source = source
        self.home = home
        self.folder = home / f"build-{backend}"
        self.log = home / f"build-{backend}.log"
        self.programs = programs
        self.jobs = jobs
        self.progress = progress

    def run(self, checkout: Path | None) -> Runtime:
        """Compile with the best instruction sets that run here, prove, install."""
        self.log.write_text("")
        for sets in self._candidates():
            options = ["-DGGML_NATIVE=ON"] if sets is None else toolchain.native_options(sets)
            self._compile(options)
            with tempfile.TemporaryDirectory(dir=self.home, prefix=f"{self.backend}-") as temporary:
                stage = Path(temporary) / self.backend
                self._collect(stage)
                system_info = self._prove(Runtime(stage, {}))
                if system_info is None:
                    self.progress.note(
                        "what was built traps on this machine; building again with fewer instruction sets"
                    )
                    continue
                manifest = self._manifest(sets, options, system_info, checkout)
                (stage / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
                final = self.home / self.backend
                if final.exists():
                    final.rename(Path(temporary) / "old")
                stage.rename(final)
            shutil.rmtree(self.folder, ignore_errors=True)
            return Runtime(final, manifest)
        raise RuntimeBuildError(f"even the plainest build traps on this machine; the full log is {self.log}")

    def _candidates(self) -> Iterator[list[InstructionSet] | None]:
        """Instruction sets to try, best first; None leaves the choice to ggml."""
        if not toolchain.is_linux_x86() or self.programs.cc is None:
            yield None
            return
        self.progress.stage("probing instruction sets")
        usable, trapped = toolchain.probe_instruction_sets(self.programs.cc)
        if trapped:
            names = ", ".join(each.name for each in trapped)
            self.progress.note(f"this machine names instruction sets that it traps on; left out: {names}")
        yield usable
        plainer = [each for each in usable if not each.name.startswith(("AVX512", "AVX_VNNI"))]
        if plainer != usable:
            yield plainer
        if plainer:
            yield []

    def _compile(self, options: Sequence[str]) -> None:
        self.progress.stage("configuring")
        origin = "@loader_path" if sys.platform == "darwin" else "$ORIGIN"
        command = [self.programs.cmake, "-S", str(self.source.llama_cpp), "-B", str(self.folder), "-G", "Ninja"]
        command += [*_OPTIONS, *BACKENDS[self.backend], *options]
        command += [f"-DCMAKE_MAKE_PROGRAM={self.programs.ninja}", f"-DCMAKE_INSTALL_RPATH={origin};{origin}/../lib"]
        command += [f"-DLLAMA_BUILD_COMMIT={cache.kernels_hash()}"]
        if self.programs.cc and self.programs.cxx:
            command += [f"-DCMAKE_C_COMPILER={self.programs.cc}", f"-DCMAKE_CXX_COMPILER={self.programs.cxx}"]
        self._execute(command, "configuring")
        self.progress.stage("compiling")
        command = [self.programs.ninja, "-C", str(self.folder), "-j", str(self.jobs), "llama", *TOOLS]
        self._execute(command, "compiling")

    def _execute(self, command: Sequence[str], what: str) -> None:
        """Run a program of the build into the log, reading Ninja's `[n/m]` for the progress bar."""
        environment = dict(os.environ)
        # paths relative to the key's folder: a new key finds what ccache has of the last one
        environment.setdefault("CCACHE_BASEDIR", str(self.home))
        environment.setdefault("CCACHE_NOHASHDIR", "1")
        with self.log.open("a") as log:
            print("$", *command, file=log, flush=True)
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
            )
            try:
                assert process.stdout is not None
                self._follow(process.stdout, log)
                code = process.wait()
            except BaseException:
                process.terminate()
                process.wait()
                raise
        if code:
            raise self._failure(f"{what} the runtime failed (exit code {code})")

    def _follow(self, output: IO[str], log: IO[str]) -> None:
        for line in output:
            log.write(line)
            if step := re.match(r"\[(\d+)/(\d+)\]", line):
                self.progress.advance(int(step[1]), int(step[2]))

    def _failure(self, message: str) -> RuntimeBuildError:
        """Show the end of the log and make the error that names it."""
        lines = self.log.read_text(errors="replace").splitlines()
        self.progress.note("\n".join(lines[-20:]))
        errors = [line.strip() for line in lines if re.search(r"\berror\b[: ]|CMake Error", line, re.IGNORECASE)]
        detail = f": {errors[0]}" if errors else ""
        return RuntimeBuildError(f"{message}{detail}; the full log is {self.log}")

    def _collect(self, stage: Path) -> None:
        """Copy libraries, tools and bindings into the folder that becomes the runtime."""
        lib, bin_, python = stage / "lib", stage / "bin", stage / "python"
        for folder in (lib, bin_, python):
            folder.mkdir(parents=True)
        built = self.folder / "bin"
        for path in sorted(built.iterdir()):
            if re.search(r"\.(so|dylib|dll)(\.|$)|\.dylib$", path.name):
                shutil.copy(path, lib / path.name, follow_symlinks=False)
                if sys.platform == "win32":
                    shutil.copy(path, bin_ / path.name)
        suffix = ".exe" if sys.platform == "win32" else ""
        for tool in TOOLS:
            shutil.copy(built / (tool + suffix), bin_ / (tool + suffix))
        shutil.copytree(self.source.bindings, python / "llama_cpp")
        # not every module of the bindings looks at LLAMA_CPP_LIB_PATH; this is where the others look
        beside = python / "llama_cpp" / "lib"
        if sys.platform == "win32":
            shutil.copytree(lib, beside)
        else:
            beside.symlink_to(Path("..", "..", "lib"), target_is_directory=True)

    def _prove(self, runtime: Runtime) -> str | None:
        """Run what was built. Returns what llama.cpp says about its instruction sets; None if the machine trapped."""
        self.progress.stage("proving that it runs")
        for name, *arguments in _PROOFS:
            code, _ = self._try([str(runtime.tool(name)), *arguments])
            if _is_trap(code):
                return None
            if code:
                raise self._failure(f"{name} failed on the new runtime (exit code {code})")
        code, output = self._try(
            [
                sys.executable,
                "-c",
                "import llama_cpp as l; l.llama_backend_init(); print(l.llama_print_system_info().decode())",
            ],
            {"PYTHONPATH": str(runtime.python), LIBRARY_VARIABLE: str(runtime.lib)},
        )
        if _is_trap(code):
            return None
        if code:
            raise self._failure(f"llama_cpp cannot be imported on the new runtime (exit code {code})")
        return output.strip().splitlines()[-1] if output.strip() else ""

    def _try(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[int, str]:
        result = subprocess.run(
            command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, errors="replace"
        )
        with self.log.open("a") as log:
            print("$", *command, file=log)
            log.write(result.stdout + result.stderr)
        return result.returncode, result.stdout

    def _manifest(
        self, sets: list[InstructionSet] | None, options: Sequence[str], system_info: str, checkout: Path | None
    ) -> dict[str, Any]:
        return {
            "key": self.source.key,
            "version": pin.VERSION,
            "kernels_hash": cache.kernels_hash(),
            "checkout": str(checkout) if checkout else None,
            "backend": self.backend,
            "platform": f"{platform.system()} {platform.machine()}",
            "instruction_sets": None if sets is None else [each.name for each in sets],
            "cmake_options": [*_OPTIONS, *BACKENDS[self.backend], *options],
            "compiler": toolchain.compiler_version(self.programs.cxx),
            "built": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "system_info": system_info,
        }


def _checkout(path: Path) -> Path:
    path = path.expanduser().absolute()
    if not (path / "ggml" / "include" / "ggml.h").is_file():
        raise UsageError(f"'{path}' is not a llama.cpp checkout: there is no ggml/include/ggml.h in it")
    return path


def _is_trap(code: int) -> bool:
    """Whether an exit code says that the processor did not know an instruction."""
    if sys.platform == "win32":
        return code & 0xFFFFFFFF == 0xC000001D
    return code in (-signal.SIGILL, 128 + signal.SIGILL)


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
