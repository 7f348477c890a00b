"""Beginning at a quantised file: its types stay, its codes move, and the model comes nearer to its own answers."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
import torch
from conversions import Listener, recipe_of
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf import Recipe, convert
from tesseraq_gguf.conversion.start_file import StartFile
from tesseraq_gguf.converter.writer import write_plain
from tesseraq_gguf.errors import ModelError, UsageError
from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.gguf_files.imatrix import Imatrix, Squares, write_imatrix
from tesseraq_gguf.gguf_files.inspection import inspect
from tesseraq_gguf.models import Decoder
from tesseraq_gguf.runtime import find_runtime
from tesseraq_gguf.types.facts import tensor_type
from tesseraq_gguf.types.grids import grid_of

RULES = (("q_proj", "q4_0"), ("k_proj", "q4_1"), ("v_proj", "q8_0"), ("down_proj", "tsq3"), ("gate_proj", "f16"))


def types_of(file):
    return {t.name: t.type for t in inspect(file).tensors}


@pytest.fixture(scope="module")
def begun(make_model, tmp_path_factory):  # noqa: F811
    """A mix of types rounded to nearest; rows of queries and keys are moved in it."""
    source, file = make_model("llama", 0.2), tmp_path_factory.mktemp("begun") / "mix.gguf"
    convert(Recipe(str(source.folder), file, type="q2_0", method="rtn", rules=RULES, embedding_type="tsq4"))
    return source, file


def test_codes_are_read_by_the_models_names(begun):
    source, file = begun
    decoder = Decoder(source, torch.device("cpu"))
    start = StartFile(file, decoder)
    assert set(start.types) == {*decoder.matrix_shapes(), decoder.embedding_name(), decoder.output_name()}
    assert {start.types[n] for n in start.types if "q_proj" in n} == {"q4_0"}
    for name, type in start.types.items():
        if tensor_type(type).is_float:
            continue
        tensor = start[name]
        assert tensor.type == type
        expected = grid_of(type).quantize(decoder.matrix(name))
        if name not in (decoder.embedding_name(), decoder.output_name()):  # those are rounded in parts
            assert all(torch.equal(tensor.arrays[key], array) for key, array in expected.arrays.items()), name


@pytest.mark.slow
def test_a_file_is_improved_in_place(begun, long_text, tmp_path):
    source, file = begun
    out, told = tmp_path / "out.gguf", Listener()
    before = file.read_bytes()
    recipe = recipe_of(source, out, long_text, type="tsq2", init=f"file:{file}", samples=16)
    report = convert(recipe, told)
    assert file.read_bytes() == before
    assert types_of(out) == types_of(file)
    assert out.stat().st_size == pytest.approx(file.stat().st_size, abs=2048)
    assert all(result.loss_after < result.loss_before for result in told.results)
    assert inspect(out).tesseraq["method"] == "tesseraq from file"
    assert report.divergence is not None


@pytest.mark.slow
@pytest.mark.runtime
def test_files_of_one_bit_from_llama_quantize_are_improved(make_model, long_text, tmp_path):  # noqa: F811
    source, file, out, told = make_model("llama-256"), tmp_path / "theirs.gguf", tmp_path / "out.gguf", Listener()
    write_plain(source, tmp_path / "f16.gguf", "f16")
    squares = {t.name: np.ones((1, t.shape[0]), np.float32) for t in open_gguf(tmp_path / "f16.gguf").tensors}
    write_imatrix(tmp_path / "ones", Imatrix({n: Squares(s, np.ones(1, np.float32)) for n, s in squares.items()}))
    options = ["--imatrix", tmp_path / "ones", "--tensor-type", "ffn_up=iq1_s", tmp_path / "f16.gguf", file, "IQ1_M"]
    subprocess.run([find_runtime().tool("llama-quantize"), *options], check=True, capture_output=True)
    assert {"iq1_s", "iq1_m"} < set(types_of(file).values())
    recipe = recipe_of(source, out, long_text, type="tsq2", init=f"file:{file}", samples=16)
    convert(recipe, told)
    assert types_of(out) == types_of(file)
    assert all(result.loss_after < result.loss_before for result in told.results)


def test_what_it_cannot_begin_at(begun, make_model, long_text, tmp_path):  # noqa: F811
    source, file = begun
    out = tmp_path / "out.gguf"

    def refused(error, match, path=file, model=source, **more):
        with pytest.raises(error, match=match):
            convert(Recipe(str(model.folder), out, init=f"file:{path}", calibration=str(long_text), **more))

    refused(UsageError, "is of another model", model=make_model("qwen3"))
    refused(ModelError, "init: no file at .*none.gguf", path=tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("not a GGUF file")
    refused(ModelError, "init: .*text.gguf", path=tmp_path / "text.gguf")
    refused(UsageError, "has types and scales: type has no meaning there", type="q4_0")
    refused(UsageError, "has types and scales: target_bpw has no meaning there", target_bpw=3)
    refused(UsageError, "gptq knows one way: init has no meaning there", method="gptq")
    link = tmp_path / "link.gguf"
    link.symlink_to(file)
    for written in (file, link):
        with pytest.raises(UsageError, match=r"out .* is the file that init reads: name another one"):
            convert(Recipe(str(source.folder), written, init=f"file:{file}"))
    with pytest.raises(UsageError, match=r"write_imatrix .* is the file that init reads"):
        convert(Recipe(str(source.folder), out, init=f"file:{file}", write_imatrix=link))
    with pytest.raises(UsageError, match="is the model itself"):
        convert(Recipe(str(file), out, method="gptq", write_imatrix=link))
    with pytest.raises(UsageError, match="file:GGUF"):
        Recipe("m", out, init="file:")
