"""Build, prove and install a runtime: libraries, tools and Python bindings of the patched llama.cpp.

A runtime appears under its final name only when it is whole and its programs have run: on this machine, or under qemu
if it is for another kind. Nothing in the build touches the network, apart from fetching the pinned source once.
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
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from tesseraq_gguf.errors import RuntimeBuildError, UsageError
from tesseraq_gguf.runtime import cache, cuda, pin, toolchain
from tesseraq_gguf.runtime.load import LIBRARY_VARIABLE
from tesseraq_gguf.runtime.locate import MANIFEST, Runtime, read_runtime, this_platform
from tesseraq_gguf.runtime.progress import Reporter, RichReporter
from tesseraq_gguf.runtime.source import SourceTree, ensure_source
from tesseraq_gguf.runtime.target import Target
from tesseraq_gguf.runtime.toolchain import Toolchain
from tesseraq_gguf.types.facts import names

BACKENDS: Mapping[str, tuple[str, ...]] = {"cpu": ("-DGGML_METAL=OFF",), "cuda": ("-DGGML_METAL=OFF",)}
"""CMake options by backend; those of CUDA depend on what is found. Each backend comes with that of the CPU."""

TOOLS = (
    "llama-perplexity",
    "llama-bench",
    "llama-quantize",
    "llama-imatrix",
    "llama-completion",
    "llama-server",
    "ggml-rpc-server",
    "test-backend-ops",
    "test-quantize-fns",
    "test-quantize-perf",
)
"""Programs of a runtime: those of llama.cpp that people and this project use, and its tests of tensor types."""

_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DGGML_RPC=ON",
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "-DLLAMA_BUILD_TOOLS=ON",
    "-DLLAMA_BUILD_SERVER=ON",
    "-DLLAMA_BUILD_TESTS=ON",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_NUMBER=0",
)

_PORTABLE_OPTIONS = ("-DGGML_NATIVE=OFF", "-DGGML_BACKEND_DL=ON", "-DGGML_CPU_ALL_VARIANTS=ON")
"""The CPU backend in variants, each a library of its own that ggml may load."""

_NO_VARIANT = "Testing 0 devices"
"""What test-backend-ops says, and is content with, where no variant can be loaded."""

_PRODUCTS = (
    *("-o", "MUL_MAT"),
    *("-p", rf"type_a=({'|'.join(names(lambda t: t.custom or t.plain))}),type_b=f32,m=16,n=(1|8),k=256,bs=\[1,1\]"),
)

_PROOFS = (("test-quantize-fns",), ("test-backend-ops", "test", "-b", "CPU", *_PRODUCTS))
"""Programs that must succeed before a runtime is installed; quick, and wide enough to meet the instructions in use."""


_PROOFS_OF_VARIANTS = _PROOFS[1:]
"""What is run with each variant by itself: test-quantize-fns takes minutes under qemu, and once will do."""


def build(
    wanted: Target | None = None,
    *,
    llama_cpp: Path | None = None,
    cuda_architectures: Sequence[str] = (),
    force: bool = False,
    jobs: int | None = None,
    progress: Reporter | None = None,
) -> Runtime:
    """Return the runtime of this version and these patches, building and installing it if it is not there.

    Args:
        wanted: what it is to run on; by default this machine's processor.
        llama_cpp: an existing llama.cpp checkout to copy and patch instead of the pinned one.
        cuda_architectures: GPUs to compile for, as CMake spells them (`89`, `90-virtual`); by default those of this
            machine, or all since Turing if it has none. A runtime for others than are asked for is built again.
        force: build even if it is there.
        jobs: compilers at a time; by default one per processor this process may use.
        progress: told what happens; by default a progress bar on stderr.

    Raises:
        RuntimeBuildError: something is missing or failed; the message is one line, and names the log if there is one.
        UsageError: an unknown backend or architecture, or `llama_cpp` is no llama.cpp checkout.
    """
    wanted = wanted or Target()
    if wanted.backend not in BACKENDS:
        raise UsageError(f"unknown backend '{wanted.backend}'. Known backends: {', '.join(BACKENDS)}")
    if cuda_architectures and wanted.backend != "cuda":
        raise UsageError(f"architectures of CUDA are of no use to the backend '{wanted.backend}'; add: --backend cuda")
    cuda.choose_architectures(cuda_architectures, cuda.OLDEST, ())  # complains before anything is done

    def serves(runtime: Runtime | None) -> bool:
        if runtime is None or force or not runtime.has_tools(TOOLS):
            return False
        return not cuda_architectures or runtime.manifest.get("cuda_architectures") == list(cuda_architectures)

    key = cache.checkout_key(_checkout(llama_cpp)) if llama_cpp else cache.current_key()
    installed = read_runtime(cache.cache_dir() / key / wanted.name)
    if installed and serves(installed):
        return installed
    with contextlib.ExitStack() as stack:
        reporter = progress or stack.enter_context(RichReporter())
        programs = toolchain.find_toolchain(wanted)
        if wanted.backend == "cuda":
            cuda.find_cuda()  # before the source is fetched
        source = ensure_source(reporter, llama_cpp=llama_cpp)
        home = source.llama_cpp.parent.parent
        stack.enter_context(FileLock(home / f"{wanted.name}.lock"))
        installed = read_runtime(home / wanted.name)
        if installed and serves(installed):
            return installed
        arguments = (wanted, source, programs, jobs or _processors(), reporter)
        work: _Build
        if wanted.backend == "cuda":
            work = _CudaBuild(*arguments, cuda_architectures)
        else:
            work = (_PortableBuild if wanted.portable else _Build)(*arguments)
        return work.run(checkout=llama_cpp)


@dataclass(frozen=True)
class _Plan:
    """One way to configure a build.

    Attributes:
        options: CMake options of its own.
        facts: what the manifest says of it.
    """

    options: Sequence[str]
    facts: Mapping[str, Any]


class _Build:
    """One build of one target, in the folder of its key: for the instruction sets of this machine."""

    def __init__(self, target: Target, source: SourceTree, programs: Toolchain, jobs: int, progress: Reporter):
        self.target = target
        self.source = source
        self.home = source.llama_cpp.parent.parent
        self.folder = self.home / f"build-{target.name}"
        self.log = self.home / f"build-{target.name}.log"
        self.programs = programs
        self.jobs = jobs
        self.progress = progress
        self.library_folders: list[Path] = []
        """Where programs find libraries that are not the runtime's own."""

    def run(self, checkout: Path | None) -> Runtime:
        """Compile by the best plan whose programs run, prove, install."""
        self.log.write_text("")
        for plan in self._plans():
            options = [*_OPTIONS, *BACKENDS[self.target.backend], *plan.options]
            self._compile(options)
            with tempfile.TemporaryDirectory(dir=self.home, prefix=f"{self.target.name}-") as temporary:
                stage = Path(temporary) / self.target.name
                self._collect(stage)
                proof = self._prove(Runtime(stage, self._origin(checkout)), Path(temporary))
                if proof is None:
                    self.progress.note(
                        "what was built traps on this machine; building again with fewer instruction sets"
                    )
                    continue
                manifest = self._origin(checkout) | {"cmake_options": options, **plan.facts, **proof}
                (stage / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
                final = self.home / self.target.name
                if final.exists():
                    final.rename(Path(temporary) / "old")
                stage.rename(final)
            shutil.rmtree(self.folder, ignore_errors=True)
            return Runtime(final, manifest)
        raise RuntimeBuildError(f"even the plainest build traps on this machine; the full log is {self.log}")

    def _plans(self) -> Iterator[_Plan]:
        """Ways to build, best first."""
        for sets in self._candidates():
            options = ["-DGGML_NATIVE=ON"] if sets is None else toolchain.native_options(sets)
            yield _Plan(options, {"instruction_sets": None if sets is None else [each.name for each in sets]})

    def _candidates(self) -> Iterator[list[toolchain.InstructionSet] | None]:
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
        # of a build that was stopped: with other compilers, CMake would begin again and forget every other option
        (self.folder / "CMakeCache.txt").unlink(missing_ok=True)
        shutil.rmtree(self.folder / "CMakeFiles", ignore_errors=True)
        origin = "@loader_path" if sys.platform == "darwin" and not self.target.cross else "$ORIGIN"
        command = [self.programs.cmake, "-S", str(self.source.llama_cpp), "-B", str(self.folder), "-G", "Ninja"]
        command += options
        rpath = ";".join([origin, f"{origin}/../lib", *map(str, self.library_folders)])
        command += [f"-DCMAKE_MAKE_PROGRAM={self.programs.ninja}", f"-DCMAKE_INSTALL_RPATH={rpath}"]
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
        windows = sys.platform == "win32" and not self.target.cross
        built = self.folder / "bin"
        for path in sorted(built.iterdir()):
            if re.search(r"\.(so|dylib|dll)(\.|$)|\.dylib$", path.name):
                shutil.copy(path, lib / path.name, follow_symlinks=False)
                if windows:
                    shutil.copy(path, bin_ / path.name)
        suffix = ".exe" if windows else ""
        for tool in TOOLS:
            shutil.copy(built / (tool + suffix), bin_ / (tool + suffix))
        shutil.copytree(self.source.bindings, python / "llama_cpp")
        # not every module of the bindings looks at LLAMA_CPP_LIB_PATH; this is where the others look
        beside = python / "llama_cpp" / "lib"
        if windows:
            shutil.copytree(lib, beside)
        else:
            beside.symlink_to(Path("..", "..", "lib"), target_is_directory=True)

    def _prove(self, runtime: Runtime, scratch: Path) -> dict[str, Any] | None:
        """Run what was built. Returns what the manifest says of it; None if the machine trapped."""
        self.progress.stage("proving that it runs")
        code, tool, _ = self._run_proofs(runtime)
        if not _is_trap(code):
            if code:
                raise self._failure(f"{tool} failed on the new runtime (exit code {code})")
            code, system_info = self._import_bindings(runtime)
        return None if _is_trap(code) else {"system_info": system_info}

    def _run_proofs(
        self, runtime: Runtime, emulator: Sequence[str] = (), proofs: Sequence[Sequence[str]] = _PROOFS
    ) -> tuple[int, str, str]:
        """Run the proofs until one fails. Returns its exit code, its name, and all that it said."""
        for name, *arguments in proofs:
            code, out, err = self._try([*emulator, str(runtime.tool(name)), *arguments])
            if code:
                break
        return code, name, out + err

    def _import_bindings(self, runtime: Runtime) -> tuple[int, str]:
        """Import llama_cpp. Returns the exit code, and what llama.cpp says about its instruction sets."""
        code, out, _ = self._try(
            [
                sys.executable,
                "-c",
                "import llama_cpp as l; l.llama_backend_init(); print(l.llama_print_system_info().decode())",
            ],
            {"PYTHONPATH": str(runtime.python), LIBRARY_VARIABLE: str(runtime.lib)},
        )
        if code and not _is_trap(code):
            raise self._failure(f"llama_cpp cannot be imported on the new runtime (exit code {code})")
        return code, out.strip().splitlines()[-1] if out.strip() else ""

    def _try(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[int, str, str]:
        """Run a program that was built. Returns its exit code, stdout and stderr."""
        result = subprocess.run(
            command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, errors="replace"
        )
        with self.log.open("a") as log:
            print("$", *command, file=log)
            log.write(result.stdout + result.stderr)
        return result.returncode, result.stdout, result.stderr

    def _origin(self, checkout: Path | None) -> dict[str, Any]:
        """What the manifest says whatever was built."""
        cross = self.target.cross
        return {
            "key": self.source.key,
            "version": pin.VERSION,
            "kernels_hash": cache.kernels_hash(),
            "checkout": str(checkout) if checkout else None,
            "backend": self.target.backend,
            "portable": self.target.portable,
            "target": self.target.triple,
            "platform": f"{cross.system} {cross.processor}" if cross else this_platform(),
            "compiler": toolchain.compiler_version(self.programs.cxx),
            "built": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }


class _CudaBuild(_Build):
    """A build for the GPUs of NVIDIA and this processor."""

    def __init__(
        self,
        target: Target,
        source: SourceTree,
        programs: Toolchain,
        jobs: int,
        progress: Reporter,
        architectures: Sequence[str],
    ):
        super().__init__(target, source, programs, jobs, progress)
        self.cuda = cuda.find_cuda()
        self.gpus = cuda.find_gpus()
        capabilities = [gpu.capability for gpu in self.gpus]
        self.architectures = cuda.choose_architectures(architectures, self.cuda.version, capabilities)
        self.library_folders = self.cuda.library_folders

    def _plans(self) -> Iterator[_Plan]:
        facts = {"cuda": ".".join(map(str, self.cuda.version)), "cuda_architectures": self.architectures}
        options = [*self.cuda.options, f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(self.architectures)}"]
        for plan in super()._plans():
            yield _Plan([*plan.options, *options], {**plan.facts, **facts})

    def _prove(self, runtime: Runtime, scratch: Path) -> dict[str, Any] | None:
        proof = super()._prove(runtime, scratch)
        if proof is None:
            return None
        if not self.gpus:
            self.progress.note("the kernels for GPUs are not proven: there is no NVIDIA GPU here")
            return {**proof, "gpus": []}
        self.progress.stage(f"proving that it runs on {self.gpus[0].name}")
        code, tool, _ = self._run_proofs(runtime, proofs=[("test-backend-ops", "test", "-b", "CUDA0", *_PRODUCTS)])
        if code:
            raise self._failure(f"{tool} failed on {self.gpus[0].name} (exit code {code})")
        return {**proof, "gpus": [gpu.name for gpu in self.gpus]}


class _PortableBuild(_Build):
    """A build for every processor of a kind: each variant of the CPU backend that can run here is proven by itself."""

    def _plans(self) -> Iterator[_Plan]:
        cross = self.target.cross
        left_out = toolchain.variants_left_out(self.programs.cc, cross.processor if cross else platform.machine())
        options = [*_PORTABLE_OPTIONS, f"-DTESSERAQ_VARIANTS_LEFT_OUT={';'.join(left_out)}"]
        if cross:
            options += [f"-DCMAKE_SYSTEM_NAME={cross.system}", f"-DCMAKE_SYSTEM_PROCESSOR={cross.processor}"]
        yield _Plan(options, {"instruction_sets": None, "variants_left_out": left_out})

    def _prove(self, runtime: Runtime, scratch: Path) -> dict[str, Any] | None:
        emulator = toolchain.find_emulator(self.target)
        if emulator is None:
            needed = self.target.cross.emulator if self.target.cross else ""
            self.progress.note(f"not proven: there is no {needed} to run it (apt install qemu-user)")
            return {"variants": runtime.variants, "proven": [], "trapped": [], "chosen": None, "system_info": None}
        proven: list[str] = []
        trapped: list[str] = []
        for number, variant in enumerate(runtime.variants):
            self.progress.stage(f"proving that {variant} runs")
            alone = _with_one_variant(runtime, variant, scratch / f"alone-{number}")
            code, tool, said = self._run_proofs(alone, emulator, _PROOFS_OF_VARIANTS)
            shutil.rmtree(alone.root)
            if _is_trap(code):
                trapped.append(variant)
            elif code:
                raise self._failure(f"{tool} failed with the variant {variant} (exit code {code})")
            elif _NO_VARIANT not in said:
                proven.append(variant)
        if trapped:
            # ggml goes by what a processor says of itself, and would choose them again
            self.progress.note(f"this machine traps on variants that it should run; left out: {', '.join(trapped)}")
            for variant in trapped:
                runtime.variant(variant).unlink()
        if not proven:
            raise RuntimeBuildError(f"no variant of the CPU backend runs on this machine; the full log is {self.log}")
        self.progress.stage("proving that it runs")
        code, tool, said = self._run_proofs(runtime, emulator)
        chosen = re.search(r"loaded CPU backend from .*ggml-cpu-(\S+)\.(?:so|dll)", said)
        if code or chosen is None:
            raise self._failure(f"{tool} failed on the new runtime (exit code {code})")
        system_info = None if self.target.cross else self._import_bindings(runtime)[1]
        return {
            "variants": runtime.variants,
            "proven": proven,
            "trapped": trapped,
            "chosen": chosen[1],
            "system_info": system_info,
        }


def _with_one_variant(runtime: Runtime, variant: str, folder: Path) -> Runtime:
    """Libraries and tools of a runtime in another folder, by hard links, with one variant of the CPU backend only."""
    others = {runtime.variant(name) for name in runtime.variants if name != variant}

    def ignored(parent: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(parent, name) in others]

    for part in ("lib", "bin"):
        shutil.copytree(runtime.root / part, folder / part, symlinks=True, ignore=ignored, copy_function=os.link)
    return Runtime(folder, runtime.manifest)


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
