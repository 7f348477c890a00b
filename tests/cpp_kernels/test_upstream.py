"""llama.cpp's own tests of tensor types, on ours."""

from __future__ import annotations

import re
import subprocess

import pytest

from tesseraq_gguf.runtime import Runtime

pytestmark = pytest.mark.runtime


def run(runtime: Runtime, name: str, *arguments: str) -> str:
    result = subprocess.run([str(runtime.tool(name)), *arguments], capture_output=True, text=True, errors="replace")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return re.sub(r"\x1b\[[0-9;]*m", "", result.stdout)


def test_quantize_fns(runtime: Runtime) -> None:
    output = run(runtime, "test-quantize-fns", "-v")
    assert "Testing tsq2" in output
    for what in ("absolute quantization error", "reference implementation error", "dot product error"):
        assert re.search(rf"tsq2 {what}: +ok", output), what


@pytest.mark.parametrize(
    ("operator", "at_least"),
    [("MUL_MAT", 40), ("MUL_MAT_ID", 60), ("GET_ROWS", 6), ("CPY", 15), ("SET_ROWS", 20), ("OUT_PROD", 10)],
)
def test_backend_ops(runtime: Runtime, operator: str, at_least: int) -> None:
    """With one backend it compares the CPU with itself: no operator aborts or is missing. Values: test_graph.py."""
    output = run(runtime, "test-backend-ops", "test", "-b", "CPU", "-o", operator, "-p", "tsq2")
    assert len(re.findall(rf"^ *{operator}\(.*tsq2.*: OK", output, re.MULTILINE)) >= at_least
    assert "FAIL" not in output


def test_quantize_perf_knows_the_type(runtime: Runtime) -> None:
    output = run(runtime, "test-quantize-perf", "--op", "vec_dot_q", "--type", "tsq2", "--size", "1024", "-i", "10")
    assert "tsq2" in output
