"""The fuzz target on fixed inputs: any bytes are rows of our types. `scripts/run check fuzz` searches for more."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tesseraq_gguf.runtime import SourceTree

from . import test_arm
from .test_arm import CC, processor
from .test_graph import HERE, instructions, run_sanitized

pytestmark = pytest.mark.runtime

__all__ = ["instructions", "processor"]

FAMILIES = ("tsq", "bcq", "ptq")

COUNT = 300
"""Random inputs, apart from chosen ones."""


def units_of(processor: str) -> list[str]:
    """Kernels for a kind of processor."""
    return [f"{family}/{processor}{part}" for family in FAMILIES for part in (".c", "-repack.cpp")]


UNITS = [f"{family}/{unit}" for family in FAMILIES for unit in (f"{family}.c", "cpu.c", "repack.cpp")]
UNITS.append("../ggml-threading.cpp")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc with its sanitizers")
def test_any_bytes_are_rows(source: SourceTree, tmp_path: Path, instructions: list[str]) -> None:
    units = [*UNITS, *(units_of("x86") if instructions else [])]
    options = [*(instructions or ["-DGGML_CPU_GENERIC"]), "-fsanitize=float-cast-overflow"]
    program = tmp_path / "fuzz"
    command = ["gcc", str(HERE / "fuzz_main.cpp")]
    assert run_sanitized(source, program, command, units, options, str(COUNT)) == "all ok\n"


def test_any_bytes_are_rows_on_arm(source: SourceTree, tmp_path: Path, processor: str) -> None:
    command = [CC, str(HERE / "fuzz_main.cpp")]
    assert test_arm.run(source, tmp_path / "fuzz", command, [*UNITS, *units_of("arm")], processor, "20") == "all ok\n"
