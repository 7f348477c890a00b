"""Mixtures of many experts over two processes: what one learns, from AWQ, within a budget, and after a kill."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny_models import LOUD, make_model  # noqa: F401  (a fixture)

from tesseraq_gguf.models import ModelSource

pytestmark = pytest.mark.slow


@pytest.fixture
def source(make_model) -> ModelSource:  # noqa: F811
    return make_model("mixtral-many", LOUD)


def start(processes: int, out: Path, source: ModelSource, text: Path, *options: str) -> subprocess.Popen[str]:
    runs = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    command = [*(runs if processes > 1 else [sys.executable]), "-m", "tesseraq_gguf", "convert", str(source.folder)]
    command += [str(out), "--calibration", str(text), "--samples", "16", "--seqlen", "32", "--preset", "fast", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def convert(processes: int, out: Path, *arguments: object) -> str:
    running = start(processes, out, *arguments)  # type: ignore[arg-type]
    said, errors = running.communicate(timeout=900)
    assert running.returncode == 0, errors
    return said + errors


def divergence(said: str) -> float:
    found = re.search(r"held out: ([\d.]+) nats", said)
    assert found
    return float(found[1])


def test_two_processes_learn_from_awq_what_one_learns(source, long_text, tmp_path):
    told = {n: convert(n, tmp_path / f"{n}.gguf", source, long_text, "--type", "tsq3") for n in (1, 2)}
    assert divergence(told[2]) == pytest.approx(divergence(told[1]), rel=0.05)
    held_out = {n: [float(loss) for loss in re.findall(r"held out ([\d.]+)", said)] for n, said in told.items()}
    assert len(held_out[1]) == 2
    assert held_out[2] == pytest.approx(held_out[1], rel=0.05)


BUDGET = ("--method", "gptq", "--target-bpw", "3")


def test_two_processes_keep_a_budget_and_go_on_after_a_kill(source, long_text, tmp_path):
    told = {n: convert(n, tmp_path / f"{n}.gguf", source, long_text, *BUDGET) for n in (1, 2)}
    chosen = [(tmp_path / f"{n}.gguf.types").read_text().split("\n", 1)[1] for n in (1, 2)]
    assert chosen[0] == chosen[1]
    assert len({line.rpartition("=")[2] for line in chosen[0].splitlines()}) > 1
    assert divergence(told[2]) == pytest.approx(divergence(told[1]), rel=0.05)

    broken = tmp_path / "broken.gguf"
    running = start(2, broken, source, long_text, *BUDGET)
    block, deadline = tmp_path / "broken.gguf.tesseraq-work" / "block-0000.safetensors", time.monotonic() + 600
    while not block.exists():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    kill(running)
    assert not broken.exists()
    assert "from an earlier run" in convert(2, broken, source, long_text, *BUDGET)
    assert broken.read_bytes() == (tmp_path / "2.gguf").read_bytes()


def kill(running: subprocess.Popen[str]) -> None:
    """Kill what torchrun started, which are in sessions of their own, and it."""
    process = psutil.Process(running.pid)
    for each in (process, *process.children(recursive=True)):
        each.kill()
    running.communicate()
