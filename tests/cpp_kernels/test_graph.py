"""Operators of the CPU backend on TSQ weights give what they give on the dequantised weights."""

from __future__ import annotations

import concurrent.futures
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tesseraq_gguf.runtime import Runtime, SourceTree
from tesseraq_gguf.runtime.toolchain import find_toolchain

pytestmark = pytest.mark.runtime

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", ["graph_ops", "graph_repack"])
def test_operators(runtime: Runtime, source: SourceTree, tmp_path: Path, name: str) -> None:
    compiler = find_toolchain().cxx
    assert compiler, "compiled on Linux and macOS only"
    program = tmp_path / name
    libraries = [str(runtime.library(name)) for name in ("ggml", "ggml-cpu", "ggml-base")]
    include = f"-I{source.llama_cpp / 'ggml' / 'include'}"
    command = [*compiler.split(), "-std=c++17", "-O1", "-Wall", "-Wextra", include, str(HERE / f"{name}.cpp")]
    subprocess.run([*command, *libraries, f"-Wl,-rpath,{runtime.lib}", "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("all ok\n")


OPERATORS = ["ggml-cpu.c", "ggml-cpu.cpp", "quants.c", "traits.cpp", "vec.cpp", "arch/x86/quants.c"]
OPERATORS += ["tiled/tiled.cpp", "tiled/tiled-kernel.cpp"]
"""What products need of ggml's CPU backend. The other operators are never called, and stay unresolved."""


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="needs the linker of Linux")
@pytest.mark.parametrize("name", ["avx2", "avx512", "avx512vbmi"])
def test_products_on_other_processors(runtime: Runtime, source: SourceTree, tmp_path: Path, name: str) -> None:
    """The backend compiled for less than this processor has repacks what it has kernels for, and multiplies it."""
    options = compiler_options(name)
    src = source.llama_cpp / "ggml" / "src"
    ours = src / "tesseraq"
    sources = [*(src / "ggml-cpu" / unit for unit in OPERATORS), *ours.glob("*/cpu.c"), *ours.glob("*/*repack.cpp")]
    sources = [unit for unit in sources if not unit.name.startswith("arm")]
    sources += [ours / "common" / "buffer.cpp", ours / "common" / "get-cols.c", *ours.glob("*/x86*.c")]
    sources.append(HERE / "graph_repack.cpp")
    include = [f"-I{folder}" for folder in (src.parent / "include", src, src / "ggml-cpu")]
    defines = ["-D_GNU_SOURCE", "-DGGML_USE_CPU_REPACK", "-DALONE"]

    def compile(unit: Path) -> Path:
        out = tmp_path / f"{unit.parent.name}-{unit.name}.o"
        standard = "-std=gnu11" if unit.suffix == ".c" else "-std=c++17"
        compiler = "gcc" if unit.suffix == ".c" else "g++"
        command = [compiler, standard, "-O1", "-w", *options, *defines, *include, "-c", str(unit), "-o", str(out)]
        subprocess.run(command, check=True)
        return out

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, sources))
    program = tmp_path / "graph_repack"
    link = ["g++", "-no-pie", "-Wl,--unresolved-symbols=ignore-all", *map(str, objects)]
    link += [str(runtime.library("ggml-base")), f"-Wl,-rpath,{runtime.lib}", "-pthread", "-o", str(program)]
    subprocess.run(link, check=True)
    require(options)
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("all ok\n")
    assert ("bcq4 is not repacked: ok" in result.stdout) == (name != "avx512vbmi")


SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

AVX2 = ["avx2", "f16c", "fma", "bmi2"]
AVX512 = ["avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw", "avx512vnni"]
NEW = ["avxvnni", "avx512vbmi"]
INSTRUCTIONS = {
    "generic": [],
    "avx2": AVX2,
    "avxvnni": [*AVX2, "avxvnni"],
    "avx512": [*AVX2, *AVX512],
    "avx512vbmi": [*AVX2, *AVX512, "avx512vbmi"],
}
"""Options of gcc, by what the kernels distinguish."""


def compiler_options(instructions: str) -> list[str]:
    """Options for one set of kernels; skips where the processor is of another kind, or the compiler too old."""
    if INSTRUCTIONS[instructions] and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"this processor has no {instructions}")
    options = [f"-m{name}" for name in INSTRUCTIONS[instructions]]
    command = ["gcc", *options, "-E", "-x", "c", os.devnull]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"this processor has no {instructions}, or gcc does not know it")
    return options


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest) -> list[str]:
    """Compiler options for one set of kernels; programs with others than this processor has are compiled, not run."""
    return compiler_options(request.param)


def require(options: Sequence[str]) -> None:
    """Skip, where a program was compiled with these options, if this processor cannot run it."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    for name in (
        option.removeprefix("-m") for option in options if option.removeprefix("-m") in {*AVX2, *AVX512, *NEW}
    ):
        spelling = {"avxvnni": "avx_vnni", "avx512vnni": "avx512_vnni"}.get(name, name)
        if f" {spelling} " not in flags:
            pytest.skip(f"this processor has no {name}: compiled, not run")


def run_sanitized(
    source: SourceTree, program: Path, command: list[str], units: list[str], options: list[str], *arguments: str
) -> str:
    """Compile a program of this folder with units of our sources under sanitizers, and run it."""
    src = source.llama_cpp / "ggml" / "src"
    folders = [src.parent / "include", src, src / "ggml-cpu"]
    include = [f"-I{folder}" for folder in folders]
    warnings = ["-Wall", "-Wextra", "-Wno-unused-function"]
    sources = [*HERE.glob(f"{program.name}.c*"), *(src / "tesseraq" / unit for unit in units)]
    flags = [*SANITIZE, *warnings, *options, *include]
    subprocess.run([*command, *flags, *map(str, sources), "-lm", "-lstdc++", "-o", str(program)], check=True)
    require(options)
    result = subprocess.run([str(program), *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc with its sanitizers")
def test_sources_under_sanitizers(source: SourceTree, tmp_path: Path, instructions: list[str]) -> None:
    # what is common to the types names the kernels of all
    units = [f"{family}/{unit}.c" for family in ("tsq", "bcq", "ptq") for unit in (family, "cpu")]
    units += ["common/cpu.c", "../ggml-threading.cpp"]
    units += ["tsq/x86.c", "bcq/x86.c", "ptq/x86.c", "common/x86-q2_0.c"] if instructions else []
    options = instructions or ["-DGGML_CPU_GENERIC"]
    run_sanitized(source, tmp_path / "sanitize", ["gcc", "-std=gnu11"], units, options)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ with its sanitizers")
def test_repacked_kernels_under_sanitizers(source: SourceTree, tmp_path: Path, instructions: list[str]) -> None:
    units = ["tsq/repack.cpp", *(["tsq/x86-repack.cpp"] if instructions else [])]
    output = run_sanitized(source, tmp_path / "repack", ["g++", "-std=c++17"], units, instructions)
    rows = 16 if "-mavx512vnni" in instructions else 8 if instructions else 4
    assert output == f"{rows} rows: all ok\n"
