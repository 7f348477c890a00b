"""CUDA kernels without a GPU: compiled for the host, under an emulator of thread blocks, against the C reference."""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tesseraq_gguf.runtime import SourceTree

from .cuda_sources import HERE, copy_for_host, include_paths

pytestmark = [
    pytest.mark.runtime,
    pytest.mark.skipif(shutil.which("g++") is None or os.uname().sysname != "Linux", reason="needs g++ on Linux"),
]

PARTS = {"dequantize": "convert", "get_rows": "getrows", "mmvq": "mmvq", "mmq": "mmq"}
"""What the program can be asked to check, and the source that does."""

TENSOR_CORES, DP4A = 750, 610
"""Compute capabilities: the first with tensor cores for integers, one with dp4a alone."""

# a launch that leaves its rows, or a kernel that does, is an error; so is whatever C++ leaves undefined
OPTIONS = ("-std=c++17", "-O1", "-g1", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def build(source: SourceTree, folder: Path, parts: Sequence[str], capability: int, first: Sequence[str] = ()) -> Path:
    """Compile the program with some parts, and return it. Folders in `first` are looked at for headers first."""
    copy = copy_for_host(source, folder)
    program = folder / "kernels"
    include = [*(f"-I{path}" for path in first), f"-I{HERE}", f"-I{HERE / 'shim'}", f"-I{HERE / 'cublas'}", f"-I{copy}"]
    options = [*OPTIONS, f"-D__CUDA_ARCH__={capability}", *include, *include_paths(source)]
    sources = [HERE / "kernels.cpp", *(HERE / f"kernels-{PARTS[part]}.cpp" for part in parts)]
    if "mmq" in parts or "mmvq" in parts:
        sources.append(HERE / "kernels-quantize.cpp")
    objects = [folder / f"{path.stem}.o" for path in sources]
    commands = [["g++", *options, "-c", str(path), "-o", str(to)] for path, to in zip(sources, objects, strict=True)]
    reference = source.llama_cpp / "ggml" / "src" / "tesseraq" / "tsq.c"
    objects.append(folder / "tsq.o")
    commands.append(["gcc", "-O1", "-g1", *include_paths(source), "-c", str(reference), "-o", str(objects[-1])])
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(lambda command: subprocess.run(command, capture_output=True, text=True), commands):
            assert result.returncode == 0, result.stderr
    # upstream's files hold more than is called here; what that would need is left out
    link = ["g++", "-fsanitize=address,undefined", "-no-pie", "-Wl,--unresolved-symbols=ignore-all"]
    subprocess.run([*link, *map(str, objects), "-o", str(program)], check=True)
    return program


def run(program: Path, part: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), part], capture_output=True, text=True)


@pytest.fixture(scope="module")
def program(source: SourceTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, tmp_path_factory.mktemp("cuda"), list(PARTS), TENSOR_CORES)


@pytest.mark.parametrize("part", PARTS)
def test_kernels(program: Path, part: str) -> None:
    result = run(program, part)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith(f"{part}: all ok\n")


def test_products_without_tensor_cores(source: SourceTree, tmp_path: Path) -> None:
    result = run(build(source, tmp_path, ["mmq"], DP4A), "mmq")
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_wrong_shift_is_found(source: SourceTree, tmp_path: Path) -> None:
    """The test of the tests: with one shift broken in a copy of our headers, dequantising and dot products fail."""
    broken = tmp_path / "first" / "tesseraq" / "cuda"
    ours = source.llama_cpp / "ggml" / "src" / "tesseraq" / "cuda"
    shutil.copytree(ours, broken)
    header = broken / "tsq-dequantize.cuh"
    text = header.read_text()
    assert text.count(">> iqs/8)") == 1
    header.write_text(text.replace(">> iqs/8)", ">> iqs/16)"))
    program = build(source, tmp_path, ["dequantize"], TENSOR_CORES, first=[str(tmp_path / "first")])
    result = run(program, "dequantize")
    assert result.returncode == 1
    assert result.stdout.startswith("tsq3 float32: weight ")
