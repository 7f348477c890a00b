"""Checkpoints that are quantised already: the writer reads as the learner does, and llama.cpp checks both."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from prequantised import PACKED_SCHEMES, SCHEMES, pack, prequantise
from safetensors.torch import load_file, save_file

from tesseraq_gguf import Recipe, convert
from tesseraq_gguf.converter import survey, upstream
from tesseraq_gguf.converter.writer import check_source, write_plain
from tesseraq_gguf.errors import ConversionError, ModelError
from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.models import Decoder, ModelSource

CPU = torch.device("cpu")
DOWN = "model.layers.1.mlp.down_proj.weight"


def _weights(path: Path) -> dict[str, np.ndarray]:
    file = open_gguf(path)
    return {
        t.name: gguf.quants.dequantize(np.ascontiguousarray(file.data(t)), gguf.GGMLQuantizationType(t.type_id))
        for t in file.tensors
    }


def _quantised(name: str, source: Path, folder: Path) -> dict[str, torch.Tensor]:
    if name in PACKED_SCHEMES:
        return pack(source, folder, PACKED_SCHEMES[name])
    return prequantise(source, folder, SCHEMES[name])


_PACKED = ["gptq-4", "awq", "ct-nvfp4", "modelopt-nvfp4"]


# some that llama.cpp's converter reads too, and some that it does not know or not rightly
@pytest.mark.parametrize(
    "name", ["fp8-block", "int8-ct-row", "fp8-tensor", "fp8-modelopt", "int8-ct-groups", "int8-ct-zero", *_PACKED]
)
def test_what_is_written_is_dequantised(name, make_model, tmp_path):
    values = _quantised(name, make_model("llama").folder, tmp_path / "model")
    source = ModelSource(name, tmp_path / "model")
    decoder = Decoder(source, CPU)
    assert check_source(source, decoder.matrix_shapes(), decoder.samples()).dropped == {}
    written = _weights(write_plain(source, tmp_path / "out.gguf", "f32").path)
    assert len(written) == 21
    for block in (0, 1):
        for ours, theirs in (
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.down_proj", "ffn_down"),
            ("self_attn.v_proj", "attn_v"),
        ):
            wanted = values[f"model.layers.{block}.{ours}.weight"].numpy()
            np.testing.assert_allclose(written[f"blk.{block}.{theirs}.weight"], wanted, rtol=1e-6, atol=1e-7)


def test_files_written_from_any_scheme_are_the_same(make_model, tmp_path):
    """Whole files, of the same values: rows that the converter moves are moved as well."""
    folder, drawn = tmp_path / "exact", torch.Generator().manual_seed(1)
    shutil.copytree(make_model("llama").folder, folder)
    for file in folder.glob("model*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if "layers" in name and tensor.dim() == 2:
                tensors[name] = (torch.randint(-7, 8, tensor.shape, generator=drawn) * 2.0**-6).bfloat16()
        save_file(tensors, file)
    wanted = _weights(write_plain(ModelSource("exact", folder), tmp_path / "exact.gguf", "f16").path)
    for name in ("fp8-ct-block", "int8-ct-tensor"):
        prequantise(folder, tmp_path / name, SCHEMES[name], scale=2.0**-6)
        found = _weights(write_plain(ModelSource(name, tmp_path / name), tmp_path / f"{name}.gguf", "f16").path)
        assert found.keys() == wanted.keys()
        for tensor, values in wanted.items():
            np.testing.assert_array_equal(found[tensor], values, err_msg=f"{name} {tensor}")


def _logits(model: Path) -> np.ndarray:
    """Answers of the runtime to a few tokens, float32 [tokens, vocabulary], in a process of its own."""
    code = """
import sys, numpy as np
from tesseraq_gguf.runtime.load import load_llama_cpp
llama_cpp = load_llama_cpp()
llm = llama_cpp.Llama(sys.argv[1], n_ctx=64, logits_all=True, n_threads=1, verbose=False)
llm.eval([int(t) for t in sys.argv[3:]])
np.save(sys.argv[2], np.array(llm.scores[: llm.n_tokens]))
"""
    out = model.with_suffix(".npy")
    command = [sys.executable, "-c", code, str(model), str(out), *map(str, range(5, 300, 11))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return np.load(out)


@pytest.mark.runtime
def test_files_of_the_same_model_answer_alike(make_model, tmp_path):
    """The same model as it was, in fp8 by blocks and rows and in int8 by rows: what is written answers alike."""
    folder, factors = tmp_path / "plain", {"model.embed_tokens.weight": 30, "lm_head.weight": 3}
    shutil.copytree(make_model("llama").folder, folder)
    for file in folder.glob("model*.safetensors"):
        tensors = load_file(file)
        save_file({n: t * factors.get(n, 3 if t.dim() == 2 else 1) for n, t in tensors.items()}, file)
    folders = {"plain": folder}
    for name in ("fp8-block", "fp8-ct-row", "int8-ct-row"):
        prequantise(folder, tmp_path / name, SCHEMES[name])
        folders[name] = tmp_path / name
    found = {}
    for name, place in folders.items():
        out = tmp_path / f"{name}.gguf"
        convert(Recipe(str(place), out, type="q8_0", method="rtn", embedding_type="f16", device="cpu"))
        found[name] = _logits(out)
    wanted = found.pop("plain")
    assert wanted.std() > 0.5
    for name, got in found.items():
        assert ((got - wanted) ** 2).mean() / wanted.var() < 1e-3, name


def test_packed_checkpoints_are_not_written_either(make_model, tmp_path):
    shutil.copytree(make_model("llama").folder, tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "version": "gemv"}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantised already, as awq 4 bits gemv"):
        write_plain(ModelSource("packed", tmp_path / "packed"), tmp_path / "out.gguf", "f16")


_READ = """
import json, sys
job = json.loads(sys.argv[1])
sys.path[:0] = [job["gguf_py"], job["llama_cpp"]]
import torch
from pathlib import Path
from tesseraq_gguf.converter.upstream import Converter
from tesseraq_gguf.models import ModelSource
from tesseraq_gguf.models.weights import open_checkpoint
weights = open_checkpoint(ModelSource("m", Path(job["folder"])))
found = {}
for name, shape, part in Converter(job, "f16").read(weights, list(weights.dequantized)):
    theirs, ours = part(slice(None)), weights.read(name)
    found[name] = float((theirs - ours).norm() / ours.norm()), shape == ours.shape
print(json.dumps(found))
"""


@pytest.mark.parametrize(("name", "read"), [
    ("gptq-act", True), ("gptq-v2", True), ("ct-int4", True), ("ct-int4-zero", True), ("ct-int4-act", False),
])  # fmt: skip
def test_llama_cpp_reads_packed_matrices_alike_or_not_at_all(name, read, make_model, tmp_path):
    """Its converter is another's reading of the formats; those that it does not know are not compared."""
    from tesseraq_gguf.runtime.source import ensure_source

    values = pack(make_model("llama").folder, tmp_path / "model", PACKED_SCHEMES[name])
    tree = ensure_source()
    job = {"name": "m", "folder": str(tmp_path / "model"), "gguf": None, "out": str(tmp_path / "out.gguf")}
    job |= {"gguf_py": str(tree.gguf_py), "llama_cpp": str(tree.llama_cpp), "scratch": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", _READ, json.dumps(job)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found.keys() == (values.keys() if read else set())
    assert all(same and error < 1e-6 for error, same in found.values())


class _Converter(upstream.Converter):
    """Reads a checkpoint as `change` has it, given the rows of a tensor as they are."""

    def __init__(self, change: Callable[[str, torch.Tensor], torch.Tensor]):
        self._change = change

    def read(self, weights, names):
        for name in names:
            yield name, weights.shape(name), lambda rows, name=name: self._change(name, weights.rows(name, rows))


def _job(source: ModelSource) -> dict:
    return {"name": "m", "folder": str(source.folder), "compared": Decoder(source, CPU).samples()}


def test_weights_that_llama_cpp_reads_otherwise_stop_the_work(make_model, tmp_path):
    plain = make_model("llama")
    prequantise(plain.folder, tmp_path / "quantised", SCHEMES["fp8-ct-row"])
    quantised = ModelSource("quantised", tmp_path / "quantised")

    def refused(source, change):
        job = _job(source)
        with pytest.raises(ModelError, match=rf"{DOWN} is not read as llama\.cpp's converter reads it") as caught:
            survey.compare(job, _Converter(lambda name, rows: change(rows) if name == DOWN else rows))
        assert "\n" not in str(caught.value)

    for source in (plain, quantised):
        survey.compare(_job(source), _Converter(lambda _, rows: rows))
        refused(source, lambda rows: rows * 448)  # a scale that is missing
        refused(source, lambda rows: rows.flip(0))
        refused(source, lambda rows: rows[:, :-1])
    refused(plain, lambda rows: rows.half().float() + 1e-7)
    # rounding of dequantised weights to bfloat16 is none
    survey.compare(_job(quantised), _Converter(lambda _, rows: rows.bfloat16().float()))
    # a number that is none is for those to say who read all of the model
    survey.compare(_job(plain), _Converter(lambda _, rows: rows))


def test_what_is_compared(make_model):
    names = Decoder(make_model("qwen3-moe"), CPU).samples()
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_norm.weight"} <= names.keys()
    experts = {name.split(".")[5] for name in names if ".experts." in name}
    assert experts == {"0", "3"}
    for index in (0, 1):
        assert (
            sum(name.startswith(f"model.layers.{index}.") and name.endswith("_proj.weight") for name in names) == 4 + 6
        )
    assert Decoder(make_model("mixtral"), CPU).samples()["model.layers.0.mlp.experts.0.w1.weight"] == (
        "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    )


def test_weights_beyond_a_types_range_are_named(make_model, tmp_path):
    source = make_model("llama")
    folder = tmp_path / "large"
    shutil.copytree(source.folder, folder)
    file = source.weight_map()[DOWN].name
    tensors = load_file(folder / file)
    tensors[DOWN][3, 5] = 1e5
    save_file(tensors, folder / file)
    large = ModelSource("large", folder)
    with pytest.raises(ConversionError, match=r"blk\.1\.ffn_down\.weight has weights beyond the range of f16"):
        write_plain(large, tmp_path / "out.gguf", "f16")
    written = _weights(write_plain(large, tmp_path / "out.gguf", "bf16").path)["blk.1.ffn_down.weight"]
    assert written[3, 5] == pytest.approx(1e5, rel=4e-3)
    again = ModelSource("again", folder, gguf=tmp_path / "out.gguf")
    with pytest.raises(ConversionError, match=r"blk\.1\.ffn_down\.weight has weights beyond the range of f16"):
        write_plain(again, tmp_path / "again.gguf", "f16")
    tensors[DOWN][3, 5] = 1e9  # more than 127 times what the scale of a block can be
    save_file(tensors, folder / file)
    with pytest.raises(ConversionError, match=r"blk\.1\.ffn_down\.weight has weights beyond the range of q8_0"):
        write_plain(large, tmp_path / "out.gguf", "q8_0")
    tensors[DOWN][3, 5] = float("nan")
    save_file(tensors, folder / file)
    with pytest.raises(ModelError, match=rf"{DOWN} holds a number that is not finite .*, the first at \[3, 5\]"):
        write_plain(large, tmp_path / "out.gguf", "bf16")
