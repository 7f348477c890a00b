"""An importance matrix is what rounding goes by, under the names of the file; ours is what llama-imatrix would make."""

# A recipe takes more forms of paths than it holds.
# mypy: disable-error-code="arg-type"

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversions import Listener, recipe_of
from tiny_models import LOUD, make_model  # noqa: F401  (a fixture)

from tesseraq_gguf import Recipe, convert
from tesseraq_gguf.conversion.importance import entries_of, read_importance
from tesseraq_gguf.conversion.type_plan import plan_types
from tesseraq_gguf.converter.writer import write_plain
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.gguf_files.dequantize import own_codebooks, unpacked
from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.gguf_files.imatrix import Imatrix, Squares, read_imatrix, write_imatrix
from tesseraq_gguf.learning.calibration import tokens_of
from tesseraq_gguf.learning.input_squares import input_squares
from tesseraq_gguf.models import Decoder
from tesseraq_gguf.runtime.locate import find_runtime
from tesseraq_gguf.runtime.source import ensure_source
from tesseraq_gguf.types.grids import grid_of

DOWN = "blk.1.ffn_down.weight"


def weights_of(file: Path) -> dict[str, np.ndarray]:
    read = open_gguf(file)
    return {t.name: unpacked(t.type, read.data(t), own_codebooks(read)) for t in read.tensors if t.type == "q4_0"}


def made_up(source, plan) -> Imatrix:
    """Random importance of every matrix of the blocks."""
    generator = np.random.default_rng(4)
    entries = {}
    for target, matrix in plan.file.items():
        if set(matrix.names) & plan.types.keys():
            layers = 4 if "_exps" in target else 1
            sums = generator.exponential(size=(layers, matrix.columns)).astype(np.float32) ** 4
            entries[target] = Squares(sums, np.arange(1, layers + 1, dtype=np.float32))
    return Imatrix(entries, ("wiki.txt",), 3, 512)


def planned(source, tmp_path, **options):
    recipe = Recipe(str(source.folder), tmp_path / "out.gguf", **{"type": "q4_0", "method": "rtn"} | options)
    return plan_types(recipe, Decoder(source, torch.device("cpu")), ensure_source())


@pytest.mark.parametrize("kind", ["mixtral", "phi-fused"])
def test_rounding_goes_by_the_importance_of_each_matrix(kind, tmp_path, make_model):  # noqa: F811
    source = make_model(kind, LOUD)
    plan = planned(source, tmp_path)
    imatrix = made_up(source, plan)
    write_imatrix(tmp_path / "imatrix.gguf", imatrix)
    out, told = tmp_path / "out.gguf", Listener()
    options = {"type": "q4_0", "method": "rtn", "imatrix": tmp_path / "imatrix.gguf"}
    convert(recipe_of(source, out, tmp_path, **options), told)
    assert not any("importance" in note for note in told.notes)
    importance = read_importance(tmp_path / "imatrix.gguf", plan, kind).by_matrix
    assert importance.keys() == plan.types.keys()
    checkpoint, found = Decoder(source, torch.device("cpu")), weights_of(out)
    checked = 0
    for target, matrix in plan.file.items():
        for layer, name in enumerate(matrix.names):
            if (len(matrix.names) > 1 and "_exps" not in target) or name not in plan.types:
                continue
            block = checkpoint.load_block(int(target.split(".")[1]))
            weight = block.matrices()[name.removeprefix(block.prefix).removesuffix(".weight")].weight.detach()
            expected = imatrix.entries[target].means(matrix.columns)[layer if "_exps" in target else 0]
            np.testing.assert_array_equal(importance[name], expected)
            wanted = grid_of("q4_0").dequantize(grid_of("q4_0").quantize(weight, torch.from_numpy(expected.copy())))
            rows = found[target].reshape(-1, len(weight), matrix.columns)[layer if "_exps" in target else 0]
            # llama.cpp has rows of q and k in another order: compared is what is in them
            assert {row.tobytes() for row in rows} == {row.tobytes() for row in wanted.numpy()}, name
            checked += 1
    assert checked >= 6
    entries = open_gguf(out)
    said = {key: entries.get(f"quantize.imatrix.{key}") for key in ("file", "dataset", "entries_count", "chunks_count")}
    expected_keys = {"file": str(tmp_path / "imatrix.gguf"), "dataset": "wiki.txt", "chunks_count": 3}
    assert said == expected_keys | {"entries_count": len(imatrix.entries)}


def test_what_an_imatrix_lacks_is_named_and_what_is_of_another_model_refused(tmp_path, make_model):  # noqa: F811
    source = make_model("mixtral", LOUD)
    plan, file = planned(source, tmp_path), tmp_path / "imatrix.gguf"
    imatrix = made_up(source, plan)
    whole = dict(imatrix.entries)

    def read(entries) -> dict[str, str]:
        write_imatrix(file, Imatrix(entries))
        return read_importance(file, plan, "tiny").said

    assert read(whole) == {}
    some = {name: squares for name, squares in whole.items() if name != "blk.0.attn_v.weight"}
    assert read(some) == {
        "model.layers.0.self_attn.v_proj.weight": "is rounded without importance: imatrix.gguf has nothing of it"
    }
    stack = whole["blk.1.ffn_down_exps.weight"]
    unseen = Squares(stack.sums, np.array([1, 0, 2, 3], np.float32))
    assert list(read(whole | {"blk.1.ffn_down_exps.weight": unseen})) == ["model.layers.1.mlp.experts.1.w2.weight"]
    with pytest.raises(UsageError, match=r"blk.1.ffn_down_exps.weight has 576 values, the model's has 4 × 192"):
        read(whole | {"blk.1.ffn_down_exps.weight": Squares(stack.sums[:3], stack.counts[:3])})
    with pytest.raises(UsageError, match=r"blk.0.attn_q.weight has 192 values, the model's has 128: it is of another"):
        read(whole | {"blk.0.attn_q.weight": Squares(stack.sums[:1], stack.counts[:1])})
    with pytest.raises(UsageError, match=r"has nothing of tiny's matrices, only of blk.77.attn_q.weight and the like"):
        read({"blk.77.attn_q.weight": whole["blk.0.attn_q.weight"]})


def test_an_imatrix_makes_another_run(tmp_path, make_model):  # noqa: F811
    source = make_model("llama", LOUD)
    imatrix = made_up(source, planned(source, tmp_path))
    write_imatrix(tmp_path / "imatrix.gguf", imatrix)
    options = {"work_dir": tmp_path / "work", "type": "q4_0", "method": "rtn"}
    convert(recipe_of(source, tmp_path / "a.gguf", tmp_path, imatrix=tmp_path / "imatrix.gguf", **options))
    with pytest.raises(UsageError, match="imatrix"):
        convert(recipe_of(source, tmp_path / "b.gguf", tmp_path, **options))


def test_keys_of_a_source_say_nothing_of_the_new_file(tmp_path, make_model):  # noqa: F811
    """They are of the quantisation that the source has."""
    source = make_model("llama", LOUD)
    plain, out = tmp_path / "plain.gguf", tmp_path / "out.gguf"
    write_imatrix(tmp_path / "imatrix.gguf", made_up(source, planned(source, tmp_path)))
    convert(recipe_of(source, plain, tmp_path, type="q4_0", method="rtn", imatrix=tmp_path / "imatrix.gguf"))
    assert "quantize.imatrix.file" in open_gguf(plain).entries
    convert(Recipe(str(plain), out, type="q4_0", method="rtn", device="cpu"))
    assert not [key for key in open_gguf(out).entries if key.startswith("quantize.imatrix.")]


def test_a_matrix_is_refused_where_it_would_be_ignored():
    given = {"model": "m", "out": "o", "imatrix": "i.gguf"}
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "learns": ({}, "--method tesseraq learns from calibration text, which says more"),
        "order": ({"method": "rtn", "type": "ptq1_61"}, "ptq1_61, which orders columns by itself"),
        "rotated": ({"method": "rtn", "rotate": True}, "mixes the channels that"),
        "float": ({"type": "f16"}, "learns nothing"),
    }
    for options, said in cases.values():
        with pytest.raises(UsageError) as caught:
            Recipe(**given | options)
        assert said.replace("--", "") in str(caught.value).replace("--", "")
    with pytest.raises(UsageError, match="uses no calibration"):
        Recipe("m", "o", method="rtn", write_imatrix="i.gguf")
    with pytest.raises(UsageError, match="is the output itself"):
        Recipe("m", "o.gguf", write_imatrix="o.gguf")


@pytest.mark.runtime
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_ours_is_what_llama_imatrix_makes_of_the_same_tokens(kind, tmp_path, make_model, long_text):  # noqa: F811
    source, chunk, chunks = make_model(kind), 64, 6
    write_plain(source, tmp_path / "f32.gguf", "f32")
    command = [find_runtime().tool("llama-imatrix"), "-m", tmp_path / "f32.gguf", "-f", long_text]
    command += ["-o", tmp_path / "theirs.gguf", "-c", chunk, "--chunks", chunks, "-t", 1]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    theirs = read_imatrix(tmp_path / "theirs.gguf")
    _, ids = tokens_of(source, long_text.read_text(), special=False)
    tokens = torch.tensor([0, *ids][: chunk * chunks]).view(chunks, chunk)
    tokens[:, 0] = 1  # llama-imatrix begins every chunk with <s>
    ours = entries_of(input_squares(Decoder(source, torch.device("cpu")), tokens), planned(source, tmp_path))
    assert theirs.entries.keys() - ours.keys() <= {f"blk.{i}.ffn_gate_inp.weight" for i in (0, 1)}
    assert ours.keys() <= theirs.entries.keys()
    for name, squares in ours.items():
        other = theirs.entries[name]
        np.testing.assert_array_equal(squares.counts, other.counts, name)
        np.testing.assert_allclose(squares.sums.sum(), other.sums.sum(), rtol=0.02, err_msg=name)
        ratio = squares.sums[other.sums > other.sums.mean() / 10] / other.sums[other.sums > other.sums.mean() / 10]
        np.testing.assert_allclose(ratio, 1, atol=0.1, err_msg=name)


@pytest.mark.runtime
@pytest.mark.parametrize("kind", ["llama-256", "mixtral"])
def test_llama_quantize_takes_ours(kind, tmp_path, make_model, long_text):  # noqa: F811
    source = make_model(kind, LOUD)
    ours, f16, out = (tmp_path / name for name in ("ours.gguf", "f16.gguf", "out.gguf"))
    told = Listener()
    options = {"type": "q4_0", "method": "gptq", "write_imatrix": ours}
    convert(recipe_of(source, tmp_path / "learned.gguf", long_text, **options), told)
    assert any("importance matrix of" in note for note in told.notes)
    found = read_imatrix(ours)
    assert (found.datasets, found.chunks, found.chunk_size) == (("long.txt",), 8, 32)
    assert found.entries["blk.0.attn_q.weight"].counts == 8 * 32
    write_plain(source, f16, "f16")
    kind_of_file = "IQ2_XXS" if kind == "llama-256" else "Q4_0"  # the first is refused without one
    command = [find_runtime().tool("llama-quantize"), "--imatrix", ours, f16, out, kind_of_file, 1]
    answer = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert "did not find weights for blk" not in answer.stdout + answer.stderr
    assert open_gguf(out).get("quantize.imatrix.entries_count") == len(found.entries)
    assert open_gguf(out).get("quantize.imatrix.chunks_count") == 8
