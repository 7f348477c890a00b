"""The NEON kernels on their own: cross-compiled, and run in an emulator with no more instructions than they are for."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tesseraq_gguf.runtime import SourceTree

pytestmark = [pytest.mark.runtime, pytest.mark.qemu]

HERE = Path(__file__).parent

CC, CXX, EMULATOR = "aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++", "qemu-aarch64"

PROCESSORS = {
    "neon": ("armv8-a", "cortex-a53"),
    "dotprod": ("armv8.2-a+dotprod", "neoverse-n1"),
    "i8mm": ("armv8.2-a+dotprod+i8mm", "max"),
}
"""What the compiler may use and what the emulator has, by what the kernels distinguish."""

OPTIONS = ["-O1", "-static"]
UBSAN = ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-function"]


@pytest.fixture(params=PROCESSORS)
def processor(request: pytest.FixtureRequest) -> str:
    missing = [tool for tool in (CC, CXX, EMULATOR) if shutil.which(tool) is None]
    if missing:
        packages = "gcc-aarch64-linux-gnu g++-aarch64-linux-gnu qemu-user"
        pytest.skip(f"there is no {', '.join(missing)} here (Debian and Ubuntu: apt install {packages})")
    return str(request.param)


def run(
    source: SourceTree, program: Path, command: list[str], units: list[str], processor: str, *arguments: str
) -> str:
    """Compile a program of this folder with units of our sources, and run it."""
    architecture, cpu = PROCESSORS[processor]
    src = source.llama_cpp / "ggml" / "src"
    include = [f"-I{folder}" for folder in (src.parent / "include", src, src / "ggml-cpu")]
    sources = [*HERE.glob(f"{program.name}.c*"), *(src / "tesseraq" / unit for unit in units)]
    flags = [*OPTIONS, *WARNINGS, f"-march={architecture}", *include]
    subprocess.run([*command, *flags, *map(str, sources), "-lstdc++", "-lm", "-o", str(program)], check=True)
    result = subprocess.run([EMULATOR, "-cpu", cpu, str(program), *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_rows(source: SourceTree, tmp_path: Path, processor: str) -> None:
    units = [f"{family}/{unit}.c" for family in ("tsq", "bcq", "ptq") for unit in (family, "cpu", "arm")]
    units += ["common/cpu.c", "../ggml-threading.cpp"]
    run(source, tmp_path / "sanitize", [CC, "-std=gnu11", *UBSAN], units, processor)


def test_repacked_rows(source: SourceTree, tmp_path: Path, processor: str) -> None:
    # without UBSan: with it, the compiler takes more than five times as long
    units = ["tsq/repack.cpp", "tsq/arm-repack.cpp"]
    assert run(source, tmp_path / "repack", [CXX, "-std=c++17"], units, processor) == "4 rows: all ok\n"
