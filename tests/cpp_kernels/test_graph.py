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


def test_operators(runtime: Runtime, source: SourceTree, tmp_path: Path) -> None:
    compiler = find_toolchain().cxx
    assert compiler, "compiled on Linux and macOS only"
    program = tmp_path / "graph_ops"
    libraries = [str(runtime.library(name)) for name in ("ggml", "ggml-cpu", "ggml-base")]
    include = f"-I{source.llama_cpp / 'ggml' / 'include'}"
    command = [*compiler.split(), "-std=c++17", "-O1", "-Wall", "-Wextra", include, str(HERE / "graph_ops.cpp")]
    subprocess.run([*command, *libraries, f"-Wl,-rpath,{runtime.lib}", "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("all ok\n")


SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc with its sanitizers")
def test_sources_under_sanitizers(source: SourceTree, tmp_path: Path) -> None:
    program = tmp_path / "sanitize"
    src = source.llama_cpp / "ggml" / "src"
    folders = [src.parent / "include", src, src / "ggml-cpu"]
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    simd = ["-mavx2", "-mf16c", "-mfma"] if all(f" {flag} " in flags for flag in ("avx2", "f16c", "fma")) else []
    units = ["tsq.c", "tsq-cpu.c", *(["x86/tsq.c"] if simd else [])]
    command = [
        "gcc",
        "-std=gnu11",
        *SANITIZE,
        "-Wall",
        "-Wextra",
        "-Wno-unused-function",
        *simd,
        *(f"-I{f}" for f in folders),
    ]
    command += [] if simd else ["-DGGML_CPU_GENERIC"]
    sources = [str(HERE / "sanitize.c"), *(str(src / "tesseraq" / unit) for unit in units)]
    subprocess.run([*command, *sources, "-lm", "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
