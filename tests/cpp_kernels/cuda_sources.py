"""Files of ggml's CUDA backend, made ready for tests: for the host compiler, and with our types alone.

The patched files themselves are compiled, ours and upstream's, so that tests see the hooks as well. What is changed in
a copy is written here, and nothing else is.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tesseraq_gguf.runtime import SourceTree

HERE = Path(__file__).parent / "cuda"

FLAGS = ("-std=c++17", "-O3", "-use_fast_math", "-extended-lambda", "-DGGML_CUDA_USE_GRAPHS")
"""What upstream's CMakeLists.txt tells nvcc."""

ARCHITECTURES = ("75", "80", "86", "89", "90", "120a")
"""Turing to Blackwell. Upstream compiles 120 as 120a, for instructions that no later device has to have."""

_LAUNCH = re.compile(r"(\w+(?:<[^;{}()]*?>)?)\s*<<<(.*?),\s*[\w.]*stream>>>\s*\(", re.DOTALL)
_SHARED = re.compile(r"extern __shared__ int (\w+)\[\];")
_LDMATRIX = re.compile(
    r'asm volatile\("ldmatrix\.sync\.aligned\.m8n8\.x(\d)\.b16 [^"]*"\s*:.*?: "l"\((.*?)\)\);', re.DOTALL
)
_MMA = re.compile(
    r'asm\("mma\.sync\.aligned\.m8n8k16\.row\.col\.s32\.s8\.s8\.s32 [^"]*"'
    r'\s*: "\+r"\((.*?)\), "\+r"\(.*?\)\s*: "r"\((.*?)\), "r"\((.*?)\)\);',
    re.DOTALL,
)
_PRMT = re.compile(r'asm\("prmt\.b32 [^"]*" : "=r"\((.*?)\) : "r"\((.*?)\), "r"\((.*?)\), "r"\((.*?)\)\);')
_LOP3 = re.compile(r'asm\("lop3\.b32 [^"]*, (0x\w+);" : "=r"\((.*?)\) : "r"\((.*?)\), "r"\((.*?)\), "r"\((.*?)\)\);')
_ASM = re.compile(r"\basm( volatile)?\(.*?\);", re.DOTALL)
_OTHER_TYPES = re.compile(r"(\n *TESSERAQ_(?:MMQ_)?TYPES\(TESSERAQ_CASE_\w+\)\n).*?(\n *default:)", re.DOTALL)


def backend(source: SourceTree) -> Path:
    """The folder of the CUDA backend."""
    return source.llama_cpp / "ggml" / "src" / "ggml-cuda"


def include_paths(source: SourceTree) -> list[str]:
    """Options for the compiler to find ggml's headers and ours; the backend's own folder is not among them."""
    ggml = source.llama_cpp / "ggml"
    return [f"-I{ggml / 'src'}", f"-I{ggml / 'include'}"]


def our_types_only(text: str) -> str:
    """A file whose switches know our types alone, where they know them by our list: the others take minutes."""
    return _OTHER_TYPES.sub(r"\1\2", text)


def for_host(text: str) -> str:
    """A file for the host compiler: launches, shared memory, instructions by name become calls of the emulator."""
    text = _LAUNCH.sub(r"emulator::launch(EMULATED(\1), \2)(", text)
    text = _SHARED.sub(r"int * \1 = (int *) emulator::running->shared.data();", text)
    text = _LDMATRIX.sub(r"emulator::ldmatrix<\1>(xi, \2);", text)
    text = _MMA.sub(r"emulator::mma_m8n8k16(&\1, \2, \3);", text)
    text = _PRMT.sub(r"\1 = emulator::prmt(\2, \3, \4);", text)
    text = _LOP3.sub(r"\2 = emulator::lop3<\1>(\3, \4, \5);", text)
    return _ASM.sub("emulator::unknown();", text)


def ours(source: SourceTree) -> Path:
    """The folder of our sources."""
    return backend(source).parent / "tesseraq"


def copy_for_host(source: SourceTree, folder: Path) -> None:
    """Copy the backend and ours into a folder, side by side, for the host compiler, with our types alone."""
    for path in (*backend(source).glob("*.cu*"), *ours(source).rglob("*.cu*")):
        copy = folder / path.relative_to(backend(source).parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(for_host(our_types_only(path.read_text())))
    vendors = Path("vendors", "cuda.h")
    (folder / "ggml-cuda" / "vendors").mkdir()
    shutil.copy(backend(source) / vendors, folder / "ggml-cuda" / vendors)


@dataclass(frozen=True)
class Kernel:
    """What ptxas says about a kernel.

    Attributes:
        name: its mangled name.
        registers: for each thread.
        spilled: bytes that did not fit into registers, stores and loads.
        stack: bytes of its stack.
    """

    name: str
    registers: int
    spilled: int
    stack: int


def compile_kernels(nvcc: str, options: Sequence[str], unit: Path, architecture: str, out: Path) -> list[Kernel]:
    """Compile a file for one architecture, and read what ptxas says about its kernels.

    Raises:
        AssertionError: it does not compile; the message is the compiler's.
    """
    command = [nvcc, *FLAGS, *options, f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v", str(unit), "-o", str(out)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{unit.name}, sm_{architecture}:\n{result.stdout}{result.stderr}"
    return list(read_ptxas(result.stdout + result.stderr))


def read_ptxas(log: str) -> Iterable[Kernel]:
    """The kernels in the output of `ptxas -v`."""
    for part in log.split("Compiling entry function '")[1:]:
        stack, stores, loads = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", part)[:3]
        used = re.search(r"Used (\d+) registers", part)
        assert used, part
        yield Kernel(part.partition("'")[0], int(used[1]), int(stores) + int(loads), int(stack))
