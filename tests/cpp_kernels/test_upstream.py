"""llama.cpp's own tests of tensor types, on ours."""

from __future__ import annotations

import os
import re
import struct
import subprocess
from pathlib import Path

import pytest

from tesseraq_gguf.runtime import Runtime

from .conftest import kernel_types, type_id

pytestmark = pytest.mark.runtime

NAMES = [name for _, name, *_ in kernel_types()]


def run(runtime: Runtime, name: str, *arguments: str) -> str:
    command = [str(runtime.tool(name)), *arguments]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}  # threads that spin are slow on a machine with other work
    result = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return re.sub(r"\x1b\[[0-9;]*m", "", result.stdout)


def test_quantize_fns(runtime: Runtime) -> None:
    output = run(runtime, "test-quantize-fns", "-v")
    for name in NAMES:
        assert f"Testing {name}" in output
        for what in ("absolute quantization error", "reference implementation error", "dot product error"):
            assert re.search(rf"{name} {what}: +ok", output), (name, what)


@pytest.mark.parametrize(
    ("operator", "at_least"),
    [("MUL_MAT", 40), ("MUL_MAT_ID", 60), ("GET_ROWS", 6), ("CPY", 15), ("SET_ROWS", 20), ("OUT_PROD", 10)],
)
def test_backend_ops(runtime: Runtime, operator: str, at_least: int) -> None:
    """With one backend it compares the CPU with itself: no operator aborts or is missing. Values: test_graph.py."""
    output = run(runtime, "test-backend-ops", "test", "-b", "CPU", "-o", operator, "-p", "|".join(NAMES))
    for name in NAMES:
        assert len(re.findall(rf"^ *{operator}\(.*{name}\b.*: OK", output, re.MULTILINE)) >= at_least, name
        for columns in (1, 2, 8, 32, 512) if operator == "MUL_MAT" else ():
            k = 2432 if name == "ptq1_61" else 1216
            assert re.search(rf"type_a={name},type_b=f32,m=64,n={columns},k={k},.*: OK", output), (name, columns)
    assert "FAIL" not in output


def test_gathering_columns(runtime: Runtime) -> None:
    output = run(runtime, "test-backend-ops", "test", "-b", "CPU", "-o", "GET_COLS")
    assert len(re.findall(r"^ *GET_COLS\(.*: OK", output, re.MULTILINE)) == 6


@pytest.mark.parametrize("name", NAMES)
def test_quantize_perf_knows_the_type(runtime: Runtime, name: str) -> None:
    output = run(runtime, "test-quantize-perf", "--op", "vec_dot_q", "--type", name, "--size", "1024", "-i", "10")
    assert name in output


def gguf_with_type(path: Path, type_id: int, weights: int = 256) -> Path:
    """A GGUF file of one tensor, a single row, whose type is `type_id`."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    key = string("general.architecture") + struct.pack("<I", 8) + string("llama")
    tensor = string("blk.0.ffn_up.weight") + struct.pack("<IQIQ", 1, weights, type_id, 0)
    path.write_bytes((head + key + tensor).ljust(512, b"\0") + bytes(1024))
    return path


@pytest.mark.parametrize("type_id", [43, 300, 499, 507, 510, 511, 512, 513, 2**31 - 1])
def test_unknown_type_ids_are_a_clean_error(runtime: Runtime, tmp_path: Path, type_id: int) -> None:
    bad = gguf_with_type(tmp_path / "bad.gguf", type_id)
    command = [str(runtime.tool("llama-quantize")), str(bad), str(tmp_path / "out.gguf"), "TSQ2"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"tensor 'blk.0.ffn_up.weight' has invalid ggml type {type_id}. should be in [0, 513)" in result.stderr


def test_a_row_that_is_no_multiple_of_the_block_is_a_clean_error(runtime: Runtime, tmp_path: Path, bits: int) -> None:
    bad = gguf_with_type(tmp_path / "bad.gguf", type_id(bits), weights=250)
    command = [str(runtime.tool("llama-quantize")), str(bad), str(tmp_path / "out.gguf"), "TSQ2"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    expected = f"type {type_id(bits)} (tsq{bits}) has 250 elements per row, not a multiple of block size (64)"
    assert expected in result.stderr
