"""A type is one row and a folder: a copy of the package with a made-up one knows it wherever types are listed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

ROW = '    TensorType("odd3", 599, 599, 64, 26, "odd", custom=True, without_order="tsq3"),\n'

GRID = """
from dataclasses import replace
from tesseraq_gguf.types.tsq.grid import TSQ3
ODD3 = replace(TSQ3, type="odd3")
"""

PACKER = "from tesseraq_gguf.types.tsq.packer import TSQ3 as ODD3\n"

WRITE = """
import sys, gguf, numpy as np, torch
from tesseraq_gguf.gguf_files.dequantize import dequantized
from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.runtime.builder import _PRODUCTS
from tesseraq_gguf.types.facts import register_with_gguf
from tesseraq_gguf.types.grids import grid_for
from tesseraq_gguf.types.packers import packer_of

register_with_gguf(gguf)
grid = grid_for("odd3", 128, "group")
tensor = grid.quantize(torch.randn(4, 128, generator=torch.Generator().manual_seed(0)))
data = packer_of("odd3").pack({key: array.numpy() for key, array in tensor.arrays.items()})
writer = gguf.GGUFWriter(sys.argv[1], "llama")
writer.add_file_type(599)
writer.add_tensor("blk.0.ffn_up.weight", data, raw_dtype=gguf.GGMLQuantizationType.ODD3)
writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
file = open_gguf(sys.argv[1])
assert np.array_equal(dequantized(file.tensors[0], file.data(file.tensors[0]), {}), grid.dequantize(tensor).numpy())
assert "odd3" in _PRODUCTS[-1]
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory):
    """Run Python with a copy of the package that has one type more."""
    tree = tmp_path_factory.mktemp("tree")
    package = tree / "tesseraq_gguf"
    package.mkdir()
    for entry in (ROOT / "tesseraq_gguf").iterdir():
        if entry.name != "types":
            (package / entry.name).symlink_to(entry)
    (package / "converter").symlink_to(ROOT / "convert")
    shutil.copytree(ROOT / "tesseraq_gguf" / "types", package / "types")
    facts = package / "types" / "facts.py"
    rows, end = facts.read_text().split("\n)\n\nTENSOR_TYPES")
    facts.write_text(f"{rows}\n{ROW})\n\nTENSOR_TYPES{end}")
    family = package / "types" / "odd"
    family.mkdir()
    for name, content in (("__init__", ""), ("grid", GRID), ("packer", PACKER)):
        (family / f"{name}.py").write_text(content)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"PYTHONPATH": str(tree), "COLUMNS": "200"}
        return subprocess.run([sys.executable, *map(str, arguments)], cwd=tree, env=env, capture_output=True, text=True)

    return run


def test_help_and_checks_of_convert_know_it(python, tmp_path: Path) -> None:
    convert = ("-m", "tesseraq_gguf", "convert")
    assert "odd3 for our runtime" in python(*convert, "--help").stdout
    asked = (*convert, "demo", tmp_path / "out.gguf")
    assert ", odd3" in python(*asked, "--type", "nonsense").stderr
    assert "odd3 is for matrices in the blocks" in python(*asked, "--embedding-type", "odd3").stderr
    assert not list(tmp_path.iterdir())


def test_it_is_packed_read_and_inspected(python, tmp_path: Path) -> None:
    file = tmp_path / "odd.gguf"
    written = python("-c", WRITE, file)
    assert written.returncode == 0, written.stderr
    seen = json.loads(python("-m", "tesseraq_gguf", "inspect", file, "--json").stdout)
    assert seen["runs_on"] == "tesseraq-gguf runtime only (types: odd3)"
    assert (seen["file_type"], seen["block_bpw"]) == ("mostly odd3", 3.25)
