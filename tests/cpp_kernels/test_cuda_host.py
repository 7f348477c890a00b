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

from .cuda_sources import HERE, copy_for_host, include_paths, ours

pytestmark = [
    pytest.mark.runtime,
    pytest.mark.skipif(shutil.which("g++") is None or os.uname().sysname != "Linux", reason="needs g++ on Linux"),
]

PARTS = {
    "dequantize": "convert",
    "get_rows": "getrows",
    "get_cols": "getcols",
    "quantize": "quantize",
    "mmvq": "mmvq",
    "mmq": "mmq",
}
"""What the program can be asked to check, and the source that does."""

TENSOR_CORES, DP4A = 750, 610
"""Compute capabilities: the first with tensor cores for integers, one with dp4a alone."""

# a launch that leaves its rows, or a kernel that does, is an error; so is whatever C++ leaves undefined
OPTIONS = ("-std=c++17", "-O1", "-g1", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def build(source: SourceTree, folder: Path, parts: Sequence[str], capability: int) -> Path:
    """Compile the program with some parts, and return it. Copies that are there already are taken as they are."""
    if not (folder / "ggml-cuda").exists():
        copy_for_host(source, folder)
    program = folder / "kernels"
    copies = [folder, folder / "ggml-cuda"]
    include = [f"-I{path}" for path in (HERE, HERE / "shim", HERE / "cublas", *copies)]
    options = [*OPTIONS, f"-D__CUDA_ARCH__={capability}", *include, *include_paths(source)]
    needed = {*parts, *(["quantize"] if {"mmq", "mmvq"} & set(parts) else [])}
    sources = [HERE / f"kernels{name}.cpp" for name in ("", "-tables", *(f"-{PARTS[part]}" for part in sorted(needed)))]
    objects = [folder / f"{path.stem}.o" for path in sources]
    commands = [["g++", *options, "-c", str(path), "-o", str(to)] for path, to in zip(sources, objects, strict=True)]
    include = [*include_paths(source), f"-I{ours(source).parent / 'ggml-cpu'}"]
    for name in ("tsq/tsq", "bcq/bcq", "bcq/cpu", "ptq/ptq"):
        objects.append(folder / f"{name.replace('/', '-')}.o")
        reference = ours(source) / f"{name}.c"
        commands.append(["gcc", "-O1", "-g1", *include, "-c", str(reference), "-o", str(objects[-1])])
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


BROKEN = {
    "a shift": ("tsq/cuda/dequantize.cuh", ">> iqs/8)", ">> iqs/16)", "tsq3 float32: weight "),
    "a unit that is forgotten": (
        "bcq/cuda/unit.cuh",
        "bcq_this_unit(&bcq_device)",
        "*bcq_this_unit",
        "bcq2 float32: weight ",
    ),
    "codebooks that stay": (
        "bcq/cuda/tables.cu",
        "if (ready[device] && ",
        "if (ready[device] || ",
        "bcq2 float32: weight ",
    ),
}
"""What is broken in a copy of ours: the file, what it says, what it says then, and what the program has to say."""


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_found(source: SourceTree, tmp_path: Path, what: str) -> None:
    """The test of the tests: with a line of ours broken, dequantising fails."""
    name, right, wrong, message = BROKEN[what]
    copy_for_host(source, tmp_path)
    header = tmp_path / "tesseraq" / name
    text = header.read_text()
    assert text.count(right) == 1
    header.write_text(text.replace(right, wrong))
    result = run(build(source, tmp_path, ["dequantize"], TENSOR_CORES), "dequantize")
    assert result.returncode == 1
    assert result.stdout.startswith(message)
