# needs: extras=test
"""Count MMVQ's instructions per weight in what nvcc makes of it, for docs/notes/cuda.md.

No GPU is needed, and nothing is measured: the share is what is left if every instruction takes one slot of a scheduler
and nothing is ever waited for. Latency, caches and the time between kernels come on top.

    scripts/run check cuda_budget
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
from bench.markers import write_part

from tesseraq_gguf.runtime import ensure_source
from tesseraq_gguf.types.facts import TENSOR_TYPES

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from cpp_kernels.cuda_sources import FLAGS, HERE, backend, include_paths

ROW = 4096
"""Weights of a row: the width of a 7B model."""


@dataclass(frozen=True)
class Type:
    """A tensor type as MMVQ's kernel for one column sees it.

    Attributes:
        name: upstream's, as in GGML_TYPE_name.
        id: `ggml_type`.
        bits: per weight.
        weights: that a thread multiplies with one call of vec_dot.
        dot_products: instructions IDP.4A of the loop for one step: those of all rows, and those that rows share.
        warps: of a thread block.
        rows: of a thread block.
    """

    name: str
    id: int
    bits: float
    weights: int
    dot_products: int
    warps: int
    rows: int


def _ours(name: str, dot_products: int = 8) -> Type:
    """One of our types: four rows, and the sums of activations that they share."""
    known = TENSOR_TYPES[name]
    return Type(name.upper(), known.id, known.bits_per_weight, 32, 5 * dot_products, warps=2, rows=4)


def _theirs(name: str, weights: int, dot_products: int) -> Type:
    """One of upstream's types: four warps and a row."""
    known = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[known]
    return Type(name, known.value, 8 * size / block, weights, dot_products, warps=4, rows=1)


TYPES = (
    _ours("tsq2"),
    _ours("tsq3"),
    _ours("tsq4"),
    _ours("bcq4"),
    _ours("ptq1_61", 8 + 2),
    _theirs("IQ2_XXS", 32, 8),
    _theirs("Q2_K", 16, 8),
    _theirs("Q3_K", 16, 4),
    _theirs("Q4_0", 16, 4),
    _theirs("IQ4_NL", 16, 4),
    _theirs("Q4_K", 16, 8),
)


@dataclass(frozen=True)
class Device:
    """A GPU: processors with four schedulers each, their clock in GHz under load, memory in GB/s (data sheets)."""

    name: str
    architecture: str
    processors: int
    clock: float
    bandwidth: float

    def share(self, instructions: float, bits: float) -> float:
        """Share of the bandwidth that issuing so many instructions per weight leaves within reach."""
        weights = self.processors * 4 * 32 * self.clock * 1e9 / instructions
        return weights * bits / 8 / (self.bandwidth * 1e9)


DEVICES = (
    Device("H100 SXM", "90", 132, 1.755, 3352),
    Device("RTX 4090", "89", 128, 2.52, 1008),
)


@dataclass(frozen=True)
class Count:
    """Instructions of a kernel: in its loop, for one step of it, and outside."""

    loop: int
    steps: int
    outside: int

    def per_weight(self, kind: Type) -> float:
        """In the loop."""
        return self.loop / self.steps / (kind.weights * kind.rows)

    def per_weight_of_row(self, kind: Type) -> float:
        """Of a whole row: what a thread begins and ends with is counted, all of it for every warp."""
        threads = 32 * kind.warps
        steps = -(-ROW // (threads * kind.weights))
        return threads * (self.outside + steps * self.loop / self.steps) / (ROW * kind.rows)


def main() -> None:
    """Compile for both devices, and write the table."""
    parser = argparse.ArgumentParser(
        prog="scripts/run check cuda_budget", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2] / "docs/notes/cuda.md")
    options = parser.parse_args()
    nvcc, cuobjdump = (
        find("nvcc", "the CUDA toolkit"),
        find("cuobjdump", "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"),
    )
    counts = {device.name: dict(count(device.architecture, nvcc, cuobjdump)) for device in DEVICES}
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    text = "\n".join(table(counts, re.findall(r"release ([\d.]+)", release)[0]))
    write_part(options.out, text)
    print(text)


def find(program: str, remedy: str) -> str:
    """A program, from PATH or from a wheel of NVIDIA's in this Python."""
    wheels = sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("cu[0-9]*/bin"))
    found = shutil.which(program) or next(
        (path for folder in wheels if (path := shutil.which(program, path=str(folder)))), None
    )
    if found is None:
        sys.exit(f"error: {program} not found; it comes with {remedy}")
    return found


def count(architecture: str, nvcc: str, cuobjdump: str) -> Iterator[tuple[str, Count]]:
    """Compile MMVQ for one column of `TYPES`, and count in its plain kernels."""
    source = ensure_source()
    text = (backend(source) / "mmvq.cu").read_text()
    text = cut(text, "    switch (type_x) {\n", "        default:", "".join(case(kind.name) for kind in TYPES))
    text = cut(text, "        } break;\n", "        default:", "", after="case 1: {\n            // static")
    with tempfile.TemporaryDirectory() as folder:
        unit, cubin = Path(folder, "mmvq.cu"), Path(folder, "mmvq.cubin")
        unit.write_text(text)
        include = [f"-I{backend(source)}", f"-I{HERE / 'cublas'}", *include_paths(source)]
        command = [nvcc, *FLAGS, *include, f"-arch=sm_{architecture}", "-cubin", str(unit), "-o", str(cubin)]
        subprocess.run(command, check=True)
        code = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    for function in code.split("Function : ")[1:]:
        for kind in TYPES:
            if function.startswith(f"_Z13mul_mat_vec_qIL9ggml_type{kind.id}ELi1ELb0ELb0ELb0E"):
                yield kind.name, read(function, kind)


def cut(text: str, begin: str, end: str, instead: str, after: str = "") -> str:
    """Replace what is between two marks, the first ones after a third."""
    start = text.index(begin, text.index(after)) + len(begin)
    return text[:start] + instead + text[text.index(end, start) :]


def case(name: str) -> str:
    """A case of MMVQ's switch over types."""
    return f"TESSERAQ_CASE_MMVQ({name}, {name}, )\n"


def read(function: str, kind: Type) -> Count:
    """Count instructions of a function in SASS. Its loop is the largest piece that a branch goes back over."""
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/ +((?:@!?U?P\w+ +)?[A-Z][^;]*);", function)
    addresses = {int(address, 16): index for index, (address, _) in enumerate(found)}
    end = next(index for index, (_, code) in reversed(list(enumerate(found))) if "EXIT" in code) + 1
    loop: tuple[int, int] = (0, 0)
    for index, (address, code) in enumerate(found):
        target = re.search(r"BRA.* 0x([0-9a-f]+)", code)
        if target and int(target[1], 16) < int(address, 16):
            loop = max(loop, (addresses[int(target[1], 16)], index + 1), key=lambda piece: piece[1] - piece[0])
    body = [code for _, code in found[slice(*loop)]]
    dots = sum("IDP." in code for code in body)
    if dots == 0 or dots % kind.dot_products:
        sys.exit(f"error: {kind.name} has {dots} dot products in its loop, no multiple of {kind.dot_products}")
    return Count(len(body), dots // kind.dot_products, end - len(body))


def table(counts: Mapping[str, Mapping[str, Count]], release: str) -> Iterator[str]:
    """The lines of the page."""
    yield f"`scripts/run check cuda_budget`, nvcc {release}. Instructions per weight, in the loop and for a row of"
    yield f"{ROW} weights:"
    yield ""
    columns = [f"{device.name}: {what}" for device in DEVICES for what in ("loop", "row", "share of bandwidth")]
    yield f"| type | bytes per weight | {' | '.join(columns)} |"
    yield "| --- " * (len(columns) + 2) + "|"
    for kind in TYPES:
        cells = [kind.name, f"{kind.bits / 8:.3f}"]
        for device in DEVICES:
            one = counts[device.name][kind.name]
            row = one.per_weight_of_row(kind)
            cells += [f"{one.per_weight(kind):.2f}", f"{row:.2f}", f"{min(1.0, device.share(row, kind.bits)):.0%}"]
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield "The share is a bound: a processor issues 4 × 32 lanes per cycle, and nothing waits."
    for device in DEVICES:
        yield f"{device.name}: {device.processors} processors at {device.clock} GHz, {device.bandwidth} GB/s."


if __name__ == "__main__":
    main()
