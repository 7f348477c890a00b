"""The examples do on a tiny model what they do on a real one."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from tesseraq_gguf import Recipe, plan

EXAMPLES = Path(__file__).parent.parent / "examples"
LITTLE = {"samples": 8, "seqlen": 32, "device": "cpu"}
"""What makes a conversion short."""


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_here():
    tested = set(re.findall(r'example\("(\w+)"\)', Path(__file__).read_text(encoding="utf-8")))
    assert tested == {path.stem for path in EXAMPLES.glob("*.py")}


@pytest.mark.slow
def test_convert(tiny_model, long_text, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    example("convert").main(str(tiny_model), str(out), calibration=str(long_text), **LITTLE)
    said = capsys.readouterr().out
    assert "block 1 of 2: 100%" in said and re.search(r"block 2 of 2: \d+ s\n +loss on sequences held out: ", said)
    assert "2.25 bits per weight of the blocks" in said
    far = re.search(r"answers: (\S+) nats", said)
    assert far is not None and float(far[1]) > 0
    assert out.is_file()


@pytest.mark.slow
def test_size_budget(tiny_model, long_text, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    least, most = (
        plan(Recipe(str(tiny_model), out, type=type, method="rtn", embedding_type=type)).bytes
        for type in ("tsq2", "tsq4")
    )
    size = (least + most) // 2 + 8192  # some is spared for what a file says of how it was made
    types = {"candidates": ("tsq2", "tsq3", "tsq4"), "calibration": str(long_text)}
    example("size_budget").main(str(tiny_model), str(out), size, method="gptq", **types, **LITTLE)
    said = capsys.readouterr().out
    counts = [int(count) for count in re.findall(r"^ *(\d+) × tsq\d$", said, re.MULTILINE)]
    assert len(counts) > 1 and sum(counts) == 14
    assert out.stat().st_size <= size
    assert said.splitlines()[-1].endswith(" …")


@pytest.mark.slow
def test_own_text(tiny_model, long_text, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    example("own_text").main(
        str(tiny_model), str(long_text), str(out), tokens=512, method="gptq", preset="fast", **LITTLE
    )
    said = capsys.readouterr().out
    assert "2 documents of the model's own" in said
    assert re.search(r"divergence \d\.\d{4} on [1-9]\d* tokens held out", said)


@pytest.mark.runtime
def test_compare(tiny_gguf, long_text, capsys):
    example("compare").main(str(tiny_gguf), str(long_text), str(tiny_gguf), ctx=64, chunks=2)
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith(str(tiny_gguf)) and line.endswith("0.0000      100.0%")


@pytest.mark.runtime
def test_chat(tiny_gguf, capsys):
    example("chat").main(str(tiny_gguf), "Good morning!", max_tokens=8)
    assert capsys.readouterr().out.strip()
