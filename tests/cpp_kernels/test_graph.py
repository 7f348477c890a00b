"""Operators of the CPU backend on TSQ weights give what they give on the dequantised weights."""

from __future__ import annotations

import shutil
import subprocess
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


SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

AVX2 = ["avx2", "f16c", "fma", "bmi2"]
AVX512 = ["avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw", "avx512vnni"]
INSTRUCTIONS = {
    "generic": [],
    "avx2": AVX2,
    "avxvnni": [*AVX2, "avxvnni"],
    "avx512": [*AVX2, *AVX512],
    "avx512vbmi": [*AVX2, *AVX512, "avx512vbmi"],
}
"""Options of gcc, by what the kernels distinguish."""


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest) -> list[str]:
    """Compiler options for one set of kernels; skips what this processor does not have."""
    wanted = INSTRUCTIONS[request.param]
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    for name in wanted:
        spelling = {"avxvnni": "avx_vnni", "avx512vnni": "avx512_vnni"}.get(name, name)
        if f" {spelling} " not in flags:
            pytest.skip(f"this processor has no {name}")
    return [f"-m{name}" for name in wanted]


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
    result = subprocess.run([str(program), *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc with its sanitizers")
def test_sources_under_sanitizers(source: SourceTree, tmp_path: Path, instructions: list[str]) -> None:
    # TSQ's own code names the rows of the other types
    units = ["tsq.c", "tsq-cpu.c", "bcq.c", "bcq-cpu.c", "ptq.c", "ptq-cpu.c", "../ggml-threading.cpp"]
    units += ["x86/tsq.c", "x86/q2_0.c", "x86/bcq.c", "x86/ptq.c"] if instructions else []
    options = instructions or ["-DGGML_CPU_GENERIC"]
    run_sanitized(source, tmp_path / "sanitize", ["gcc", "-std=gnu11"], units, options)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ with its sanitizers")
def test_repacked_kernels_under_sanitizers(source: SourceTree, tmp_path: Path, instructions: list[str]) -> None:
    units = ["tsq-repack.cpp", *(["x86/tsq-repack.cpp"] if instructions else [])]
    output = run_sanitized(source, tmp_path / "repack", ["g++", "-std=c++17"], units, instructions)
    rows = 16 if "-mavx512vnni" in instructions else 8 if instructions else 4
    assert output == f"{rows} rows: all ok\n"
