"""CUDA kernels without a GPU: every file that we touch compiles for every generation of devices, and nothing spills.

Of the files that all types share, other types' kernels are left out where they take long: `mmvq.cu` is compiled with
our types alone, of MMQ the kernels with the largest tiles. `scripts/run check builds cuda` compiles everything.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tesseraq_gguf.runtime import SourceTree

from .cuda_sources import ARCHITECTURES, HERE, Kernel, backend, compile_kernels, include_paths, our_types_only, ours

NVCC = shutil.which("nvcc")

pytestmark = [pytest.mark.runtime, pytest.mark.skipif(NVCC is None, reason="needs nvcc, of CUDA 12.8 or newer")]

OURS = ("bcq/cuda/tables.cu", "common/cuda/get-cols.cu")
"""Units of ours."""

UNITS = (
    *("convert.cu", "getrows.cu", "quantize.cu", "mmvq.cu", "mmq.cu", "ggml-cuda.cu"),
    *("mmq-largest.cu", *OURS),
)
"""The files of upstream's that the patch touches, or that see what it touches, a choice of MMQ's kernels, and ours."""

CASES = [
    (name, architecture)
    for name in UNITS
    for architecture in ARCHITECTURES
    if name not in OURS or architecture == ARCHITECTURES[-1]  # which have no kernels, or a simple one
]

KERNELS = {"quantize.cu": ("bcq_", 3), "mmvq.cu": ("mul_mat_vec_q", 78), "mmq-largest.cu": ("mul_mat_q", 5)}
"""Files whose kernels must not spill: a part of their names, and how many there are.

MMVQ has, for each layout, 4 kernels for one column (for long rows and short ones, fused with a gate or not), 7 for more
columns, and 2 for experts.
"""


SPILLS = {("mmq-largest.cu", "75"): 128, ("mmq-largest.cu", "80"): 512, ("mmq-largest.cu", "120a"): 128}
"""Bytes that a kernel may spill, stores and loads, where upstream's product of 128 columns does not fit into registers.

That of Q2_K spills 312, 720 and 132 there, that of Q8_0 48 on the last, where ours of BCQ2 has 84. That of Q5_1, whose
tiles TSQ has, spills 184 and 268 on the first two; that of IQ4_NL, which is looked up in a table and has Q8_0's tiles,
as BCQ4, 284 and 468 (nvcc 13.0).
"""


def compile_unit(source: SourceTree, name: str, architecture: str, folder: Path) -> list[Kernel]:
    """Compile one of `UNITS`."""
    # the real cuBLAS is 400 MB, and nothing is linked
    options = [f"-I{HERE / 'cublas'}", *include_paths(source)]
    elsewhere = {"mmq-largest.cu": HERE, "mmvq.cu": folder, **dict.fromkeys(OURS, ours(source))}
    unit = elsewhere.get(name, backend(source)) / name
    if (folder / name).is_file():  # a copy that a test has changed
        unit = folder / name
    elif name == "mmvq.cu":
        unit.write_text(our_types_only((backend(source) / name).read_text()))
    if unit.parent != backend(source):  # in its place, a file must do without, as in a build
        options.append(f"-I{backend(source)}")
    return compile_kernels(str(NVCC), options, unit, architecture, folder / "out.cubin")


def spilling(kernels: list[Kernel], allowed: int = 0) -> list[str]:
    """The gate: names of kernels that put more bytes of registers into memory than is allowed."""
    return [f"{kernel.name}: {kernel.spilled} bytes" for kernel in kernels if kernel.spilled > allowed]


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_compiles_and_does_not_spill(
    source: SourceTree, tmp_path: Path, name: str, architecture: str, record_property: Callable[[str, object], None]
) -> None:
    kernels = compile_unit(source, name, architecture, tmp_path)
    if name in KERNELS:
        part, number = KERNELS[name]
        ours = [kernel for kernel in kernels if part in kernel.name]
        assert len(ours) == number, [kernel.name for kernel in ours]
        assert spilling(ours, SPILLS.get((name, architecture), 0)) == []
        registers = sorted(kernel.registers for kernel in ours)
        record_property("registers", registers)
        print(f"{name}, sm_{architecture}: {registers[0]} to {registers[-1]} registers")


def test_the_gate_sees_spills(tmp_path: Path) -> None:
    """The test of the tests: a kernel that is given fewer registers than it has numbers at hand."""
    unit = tmp_path / "hungry.cu"
    unit.write_text(
        "__global__ void hungry(float * x) {\n"
        "    float a[64];\n"
        "    for (int i = 0; i < 64; ++i) { a[i] = x[i]; }\n"
        "    __syncthreads();\n"
        "    for (int i = 0; i < 64; ++i) { x[i] = a[63 - i] * a[(7*i) % 64]; }\n"
        "}\n"
    )
    out = tmp_path / "out.cubin"
    assert spilling(compile_kernels(str(NVCC), [], unit, "90", out)) == []
    assert len(spilling(compile_kernels(str(NVCC), ["-maxrregcount=32"], unit, "90", out))) == 1


def test_a_hook_that_is_missing_is_found(source: SourceTree, tmp_path: Path) -> None:
    """The test of the tests: without its include, the file does not compile."""
    text = our_types_only((backend(source) / "getrows.cu").read_text())
    hook = '#include "tesseraq/common/cuda/dequantize.cuh"\n'
    assert text.count(hook) == 1
    (tmp_path / "getrows.cu").write_text(text.replace(hook, ""))
    with pytest.raises(AssertionError, match="TESSERAQ_CASE_GET_ROWS"):
        compile_unit(source, "getrows.cu", "90", tmp_path)
