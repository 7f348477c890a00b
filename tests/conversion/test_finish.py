"""The last pass in a conversion: it is in the file, it resumes, and two of them are never mixed."""

from __future__ import annotations

import pytest
import torch
from conversions import Listener, recipe_of
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf import convert
from tesseraq_gguf.conversion.work_directory import WorkDirectory
from tesseraq_gguf.types.quantized import load_tensors

pytestmark = pytest.mark.slow


def test_the_last_pass_is_in_the_file_and_resumes(make_model, long_text, tmp_path):  # noqa: F811
    source, told = make_model("gemma3"), Listener()
    options = {"method": "gptq", "samples": 24, "work_dir": tmp_path / "work"}
    convert(recipe_of(source, tmp_path / "plain.gguf", long_text, **options))
    options["finish"] = "distill"  # added later: the blocks serve again
    convert(recipe_of(source, tmp_path / "a.gguf", long_text, **options), told)
    assert all(r.resumed for r in told.results)
    first = [n for n in told.notes if "held out" in n]
    assert len(first) == 1
    assert (tmp_path / "work" / "final.safetensors").is_file()
    again = Listener()
    convert(recipe_of(source, tmp_path / "b.gguf", long_text, **options), again)
    assert [n for n in again.notes if "held out" in n] == first
    assert all(r.resumed for r in again.results)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    longer = Listener()
    convert(recipe_of(source, tmp_path / "c.gguf", long_text, finish_steps=80, **options), longer)
    assert all(r.resumed for r in longer.results)
    assert [n for n in longer.notes if "held out" in n] != first


def test_blocks_of_two_last_passes_are_never_mixed(make_model, long_text, tmp_path, monkeypatch):  # noqa: F811
    """The second pass is stopped while its blocks replace those of the first one."""
    source = make_model("llama")
    options = {"method": "gptq", "samples": 24, "work_dir": tmp_path / "work", "finish": "distill"}
    first = {"finish_steps": 12}
    convert(recipe_of(source, tmp_path / "a.gguf", long_text, **options, **first))
    keep = WorkDirectory.keep_tensors

    def stopped(work, name, tensors, notes=None):
        if name == "finish-0001":
            raise KeyboardInterrupt
        keep(work, name, tensors, notes)

    with monkeypatch.context() as patch:
        patch.setattr(WorkDirectory, "keep_tensors", stopped)
        with pytest.raises(KeyboardInterrupt):
            convert(recipe_of(source, tmp_path / "b.gguf", long_text, **options, finish_steps=16))
    convert(recipe_of(source, tmp_path / "c.gguf", long_text, **options, **first))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()


def test_a_last_pass_keeps_orders_and_biases(make_model, long_text, tmp_path):  # noqa: F811
    source = make_model("llama-256-bias")
    recipe = recipe_of(
        source, tmp_path / "out.gguf", long_text, type="ptq1_61", method="gptq", finish="distill",
        work_dir=tmp_path / "work",
    )  # fmt: skip
    convert(recipe)
    for index in (0, 1):
        before, after = (
            load_tensors(tmp_path / "work" / f"{name}-{index:04d}.safetensors")[0] for name in ("block", "finish")
        )
        assert before.keys() <= after.keys()
        kept = [n for n, t in before.items() if t.is_order or n.endswith("bias")]
        assert len(kept) == 5 + 3
        assert all(torch.equal(before[n].arrays["values"], after[n].arrays["values"]) for n in kept)
        assert any(not torch.equal(before[n].arrays["d"], t.arrays["d"]) for n, t in after.items() if t.is_matrix)
