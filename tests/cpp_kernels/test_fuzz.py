"""The fuzz target on fixed inputs: any bytes are rows of our types. `scripts/fuzz` lets libFuzzer search for more."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tesseraq_gguf.runtime import SourceTree

from .test_graph import HERE, instructions, run_sanitized

pytestmark = pytest.mark.runtime

__all__ = ["instructions"]

COUNT = 300
"""Random inputs, apart from chosen ones."""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc with its sanitizers")
def test_any_bytes_are_rows(source: SourceTree, tmp_path: Path, instructions: list[str]) -> None:
    units = [f"{name}{part}" for name in ("tsq", "bcq", "ptq") for part in (".c", "-cpu.c", "-repack.cpp")]
    if instructions:
        units += [f"x86/{name}{part}" for name in ("tsq", "bcq", "ptq") for part in (".c", "-repack.cpp")]
    units.append("../ggml-threading.cpp")
    options = [*(instructions or ["-DGGML_CPU_GENERIC"]), "-fsanitize=float-cast-overflow"]
    program = tmp_path / "fuzz"
    command = ["gcc", str(HERE / "fuzz_main.cpp")]
    assert run_sanitized(source, program, command, units, options, str(COUNT)) == "all ok\n"
