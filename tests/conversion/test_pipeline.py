"""The whole road on a tiny model: what comes out, killing and resuming, and that inputs are never touched."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversions import Listener, recipe_of
from gguf_sources import gguf_model
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf import Recipe, convert
from tesseraq_gguf.converter.writer import write_plain
from tesseraq_gguf.errors import FileFormatError, ModelError, UsageError
from tesseraq_gguf.gguf_files.column_orders import orders_of
from tesseraq_gguf.gguf_files.dequantize import own_codebooks
from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.gguf_files.inspection import inspect
from tesseraq_gguf.learning.calibration import load_calibration
from tesseraq_gguf.models import Decoder, resolve_model
from tesseraq_gguf.models.quantised import final_states
from tesseraq_gguf.recipe.presets import PRESETS
from tesseraq_gguf.types.bcq.packer import universal
from tesseraq_gguf.types.facts import LAYOUTS, tensor_type
from tesseraq_gguf.types.quantized import load_tensors

pytestmark = pytest.mark.slow


@pytest.fixture
def brief(monkeypatch):
    """Two steps in a stage: what learning comes to in more is tested elsewhere."""
    monkeypatch.setitem(PRESETS, "fast", replace(PRESETS["fast"], steps=2))


def _digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("kind", ["llama", "gemma3", "phi-fused"])
@pytest.mark.parametrize(("method", "named"), [("tesseraq", "tesseraq from awq"), ("gptq", "gptq")])
def test_learning_lowers_the_loss_of_every_block(kind, method, named, make_model, long_text, tmp_path):  # noqa: F811
    source, told = make_model(kind), Listener()
    before = _digests(source.folder)
    report = convert(recipe_of(source, tmp_path / "out.gguf", long_text, method=method), told)
    assert [r.index for r in told.results] == [0, 1]
    assert all(r.loss_after < r.loss_before for r in told.results)
    assert report.block_bits_per_weight == 2.25
    assert report.bytes == (tmp_path / "out.gguf").stat().st_size
    seen = inspect(tmp_path / "out.gguf")
    matrices = [t for t in seen.tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    assert {t.type for t in matrices} == {"tsq2"}
    assert seen.tesseraq["method"] == named
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.gguf"]  # the work directory is gone
    assert _digests(source.folder) == before


@pytest.mark.parametrize("options", [{}, {"activations": "a4"}, {"finish": "distill"}], ids=["plain", "a4", "distill"])
def test_it_ends_with_the_divergence_on_what_is_held_out(options, make_model, long_text, tmp_path):  # noqa: F811
    """What the report says is what the file's blocks give, in another run of the same model."""
    source, told = make_model("llama"), Listener()
    recipe = recipe_of(
        source, tmp_path / "out.gguf", long_text, work_dir=tmp_path / "work", finish_steps=None, **options
    )
    report = convert(recipe, told)
    assert report.held_out == 4 * 32
    assert report.kept_start == sum(r.verdict.kept_start for r in told.results)
    assert all(r.verdict.kept <= r.verdict.start for r in told.results)
    resumed = convert(recipe, again := Listener())
    assert (resumed.divergence, resumed.kept_start) == (report.divergence, report.kept_start)
    assert [r.verdict for r in again.results] == [r.verdict for r in told.results]
    assert [replace(block, resumed=False) for block in resumed.learned] == list(report.learned)
    assert all(len(block.curve) == 20 and block.curve[-1].loss < block.curve[0].loss for block in report.learned)
    if options.get("finish"):
        before, after = map(float, re.findall(r"(\d\.\d+)", next(n for n in told.notes if "->" in n)))
        assert report.divergence == pytest.approx(min(before, after), abs=2e-4)
    if options:
        return
    apart = load_calibration(source, str(long_text), 8, 32, 0, held_out=4).held_out
    model, original = (
        Decoder(gguf_model(tmp_path / "out.gguf", tmp_path / "back"), torch.device("cpu")),
        Decoder(source, torch.device("cpu")),
    )
    p, q = (d.answers()(final_states(d, apart).flatten(0, 1)) for d in (original, model))
    assert report.divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.1)


def test_a_killed_run_resumed_gives_the_same_file(make_model, long_text, tmp_path):  # noqa: F811
    source = make_model("llama")
    whole, broken = tmp_path / "whole.gguf", tmp_path / "broken.gguf"
    arguments = ["--preset", "fast", "--samples", "8", "--seqlen", "32", "--calibration", str(long_text)]
    arguments += ["--device", "cpu"]  # the file names it

    def start(out: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "tesseraq_gguf", "convert", str(source.folder), str(out), *arguments]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)

    assert start(whole).wait() == 0
    killed = start(broken)
    block = tmp_path / "broken.gguf.tesseraq-work" / "block-0000.safetensors"
    deadline = time.monotonic() + 300
    while not block.exists():
        assert killed.poll() is None, killed.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not broken.exists()
    told = Listener()
    report = convert(recipe_of(source, broken, long_text), told)
    assert report.resumed >= 1
    assert told.results[0].resumed
    assert broken.read_bytes() == whole.read_bytes()


@pytest.mark.usefixtures("brief")
def test_finished_blocks_are_not_learned_again(make_model, long_text, tmp_path):  # noqa: F811
    source = make_model("llama")
    recipe = recipe_of(source, tmp_path / "out.gguf", long_text, work_dir=tmp_path / "work")
    convert(recipe)
    first = recipe.out.read_bytes()
    told = Listener()
    assert convert(recipe, told).resumed == 2
    assert told.steps == 0
    assert recipe.out.read_bytes() == first
    told = Listener()
    assert convert(recipe_of(source, recipe.out, long_text, work_dir=recipe.work_dir, fresh=True), told).resumed == 0
    assert told.steps > 0


@pytest.mark.usefixtures("brief")
def test_whatever_changes_the_result_is_noticed(make_model, long_text, tmp_path):  # noqa: F811
    source, text = make_model("llama"), tmp_path / "text.txt"
    text.write_text(long_text.read_text())
    place = {"work_dir": tmp_path / "work"}
    convert(recipe_of(source, tmp_path / "out.gguf", text, **place))
    first = (tmp_path / "out.gguf").read_bytes()
    changes: list[dict[str, Any]] = [
        {"seed": 1}, {"samples": 9}, {"method": "gptq"}, {"preset": "balanced"}, {"rotate": True},
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(UsageError, match="differs in"):
            convert(recipe_of(source, tmp_path / "out.gguf", text, **place, **change))
    text.write_text(long_text.read_text()[7:])
    with pytest.raises(UsageError, match="differs in calibration"):
        convert(recipe_of(source, tmp_path / "out.gguf", text, **place))
    assert (tmp_path / "out.gguf").read_bytes() == first


def test_rounding_needs_no_text(make_model, tmp_path):  # noqa: F811
    told = Listener()
    recipe = Recipe(str(make_model("qwen3").folder), tmp_path / "out.gguf", method="rtn")
    assert convert(recipe, told).block_bits_per_weight == 2.25
    assert [r.loss_after for r in told.results] == [None, None]


@pytest.mark.usefixtures("brief")
def test_matrices_that_do_not_fit_are_named_and_kept(make_model, long_text, tmp_path):  # noqa: F811
    told = Listener()
    report = convert(recipe_of(make_model("llama-odd"), tmp_path / "out.gguf", long_text), told)
    assert set(report.fallbacks) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    assert all("160" in reason for reason in report.fallbacks.values())
    said = "down_proj.weight (2 matrices) is not learned and is q8_0: 64 does not divide its rows of 160"
    assert [said in note for note in told.notes if "down_proj" in note] == [True]
    types = {t.name: t.type for t in inspect(tmp_path / "out.gguf").tensors}
    assert (types["blk.0.ffn_down.weight"], types["blk.0.ffn_up.weight"]) == ("q8_0", "tsq2")


def test_a_model_of_which_nothing_can_be_learned(tmp_path, make_model, long_text):  # noqa: F811
    from transformers import LlamaConfig, LlamaForCausalLM

    source = make_model("llama")
    config = LlamaConfig(**{**source.config(), "hidden_size": 80, "intermediate_size": 96, "num_attention_heads": 2,
                            "num_key_value_heads": 2, "head_dim": 40})  # fmt: skip
    folder = tmp_path / "narrow"
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((source.folder / name).read_bytes())
    with pytest.raises(ModelError, match=r"learned in tsq2 \(.*: 64 does not divide its rows of 80\). Give another"):
        convert(Recipe(str(folder), tmp_path / "out.gguf", calibration=str(long_text)))
    assert not (tmp_path / "out.gguf").exists()


def test_the_engine_keeps_two_chains(make_model, long_text):  # noqa: F811
    """The quantised chain feeds the next block, the full-precision chain gives its target."""
    from tesseraq_gguf.learning.reconstruction import Reconstruction
    from tesseraq_gguf.models import Decoder

    decoder = Decoder(make_model("qwen2"), torch.device("cpu"))
    tokens = torch.randint(4, 300, (3, 16), generator=torch.Generator().manual_seed(0))
    full, inputs = decoder.stem(tokens)
    seen = []

    class Spy:
        def learn(self, problem):
            seen.append((problem.inputs.clone(), problem.targets.clone()))
            return {name: problem.grids[name].quantize(w) for name, w in problem.matrices().items()}

    types = dict.fromkeys(decoder.matrix_shapes(), "tsq2")
    walk = Reconstruction(decoder, Spy(), types, seed=0, autocast=torch.float32)
    results = list(walk.run(tokens, [torch.ones(2, decoder.hidden_size)] * 2, lambda _: None))
    from tesseraq_gguf.types.tsq.grid import TSQ2

    with torch.no_grad():
        first, second = decoder.load_block(0), decoder.load_block(1)
        y0 = first.run(full, inputs.arguments[0])
        weights = {n: TSQ2.dequantize(results[0].tensors[f"{first.prefix}{n}.weight"]) for n in first.matrices()}
        q1 = first.run(full, inputs.arguments[0], weights)
        y1 = second.run(y0, inputs.arguments[1])
    torch.testing.assert_close(seen[0][0], full)
    torch.testing.assert_close(seen[0][1], y0, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen[1][0], q1, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen[1][1], y1, atol=1e-4, rtol=1e-4)
    assert not np.allclose(q1, y0, atol=1e-3)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("method", ["rtn", "gptq", "tesseraq", "lrq"])
def test_rows_with_one_scale_reach_the_file(method, make_model, long_text, tmp_path):  # noqa: F811
    recipe = recipe_of(make_model("llama"), tmp_path / "out.gguf", long_text, method=method, granularity="channel")
    convert(recipe, Listener())
    file = open_gguf(recipe.out)
    tensor = next(t for t in file.tensors if t.name == "blk.0.ffn_down.weight")
    rows = file.data(tensor).reshape(tensor.rows, -1, 18)
    assert rows.shape[1] > 1
    assert (rows[..., :2] == rows[:, :1, :2]).all()


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("options", [{"method": "flexround"}, {"method": "lrq", "rank": 8}], ids=["flexround", "lrq"])
def test_divisions_learned_before_rounding_reach_the_file(options, make_model, long_text, tmp_path):  # noqa: F811
    told = Listener()
    report = convert(recipe_of(make_model("llama"), tmp_path / "out.gguf", long_text, type="tsq3", **options), told)
    assert report.block_bits_per_weight == 3.25
    assert all(r.loss_after < r.loss_before for r in told.results)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("init", ["none", "awq", "omniquant", "awq+gptq", "awq+qep"])
def test_every_initialisation_makes_a_file(init, make_model, long_text, tmp_path):  # noqa: F811
    told = Listener()
    convert(recipe_of(make_model("gemma3"), tmp_path / "out.gguf", long_text, init=init), told)
    assert all(r.loss_after < r.loss_before for r in told.results)
    assert inspect(tmp_path / "out.gguf").tesseraq["method"] == f"tesseraq from {init}"


@pytest.mark.parametrize("method", ["gptq", "qep", "awq", "awq+gptq", "omniquant"])
def test_every_start_can_be_all_there_is(method, make_model, long_text, tmp_path):  # noqa: F811
    told = Listener()
    convert(recipe_of(make_model("gemma3"), tmp_path / "out.gguf", long_text, method=method, type="tsq3"), told)
    # in the second block of random weights AWQ alone, without outliers to scale, may win nothing over its worse inputs
    assert told.results[0].loss_after < told.results[0].loss_before
    assert inspect(tmp_path / "out.gguf").tesseraq["method"] == method


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize(
    "type",
    [
        "tsq3",
        "tsq4",
        "bcq2",
        "bcq4",
        "bcq4_a4",
        "q1_0",
        "q2_0",
        "q4_0",
        "q4_1",
        "q8_0",
        "iq4_nl",
        "nvfp4",
        "q6_k",
        "iq4_xs",
    ],
)
def test_every_kind_of_type_can_be_learned(type, make_model, long_text, tmp_path):  # noqa: F811
    told = Listener()
    kind = "llama-576" if tensor_type(type).fits(576) else "llama-256"
    report = convert(recipe_of(make_model(kind), tmp_path / "out.gguf", long_text, type=type), told)
    assert all(r.loss_after < r.loss_before for r in told.results)
    seen = inspect(tmp_path / "out.gguf")
    assert {t.type for t in seen.tensors if t.name.startswith("blk.") and len(t.shape) == 2} == {type}
    assert ("any llama.cpp" in report.runs_on) == (not tensor_type(type).custom)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("type", ["iq1_s", "iq1_m", "iq2_xxs", "iq3_s"])
def test_lattices_are_learned_where_256_divides_the_rows(type, make_model, long_text, tmp_path):  # noqa: F811
    told = Listener()
    report = convert(recipe_of(make_model("llama-256"), tmp_path / "out.gguf", long_text, type=type, init="gptq"), told)
    assert all(r.loss_after < r.loss_before for r in told.results)
    seen = inspect(tmp_path / "out.gguf")
    assert {t.type for t in seen.tensors if t.name.startswith("blk.") and len(t.shape) == 2} == {type}
    assert "any llama.cpp" in report.runs_on


@pytest.mark.parametrize(
    ("type", "instead"),
    [
        ("q2_k", "q4_0"), ("q3_k", "q4_0"), ("q4_k", "q5_0"), ("q5_k", "q5_1"), ("q6_k", "q8_0"), ("iq4_xs", "iq4_nl"),
        ("iq1_m", "iq4_nl"), ("iq2_xs", "iq4_nl"), ("iq3_s", "iq4_nl"),
    ],
)  # fmt: skip
def test_rows_that_a_super_block_does_not_divide_fall_back_as_llama_quantize_does(
    type,
    instead,
    make_model,  # noqa: F811
    long_text,
    tmp_path,
):
    told = Listener()
    convert(recipe_of(make_model("qwen2"), tmp_path / "out.gguf", long_text, type=type, method="gptq"), told)
    found = {t.name: t.type for t in inspect(tmp_path / "out.gguf").tensors}
    assert found["blk.0.attn_q.weight"] == instead  # rows of 896
    assert found["blk.0.ffn_down.weight"] == instead  # rows of 192
    assert any(f"is {instead}, not {type}: 256 does not divide its rows of 896" in n for n in told.notes)


@pytest.mark.parametrize("kind", ["gemma3", "llama"])  # tied, not tied
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_embedding_and_output_take_our_types(kind, method, make_model, long_text, tmp_path):  # noqa: F811
    source, types = make_model(kind), {"embedding_type": "tsq4"}
    if kind == "llama":
        types["output_type"] = "tsq3"
    convert(recipe_of(source, tmp_path / "out.gguf", long_text, method=method, **types))
    found = {t.name: t.type for t in inspect(tmp_path / "out.gguf").tensors}
    assert found["token_embd.weight"] == "tsq4"
    assert found.get("output.weight") == (None if kind == "gemma3" else "tsq3")


def test_a_tied_output_matrix_has_no_type_of_its_own(make_model, long_text, tmp_path):  # noqa: F811
    with pytest.raises(UsageError, match="give embedding_type alone"):
        convert(recipe_of(make_model("gemma3"), tmp_path / "x.gguf", long_text, output_type="tsq2"))


def test_best_is_the_papers_setting():
    best = PRESETS["best"]
    assert (best.samples, best.length, best.steps, best.batch, best.rounding_rate) == (512, 2048, 250, 4, 1e-3)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_model_brings_its_own_codebooks(method, make_model, long_text, tmp_path):  # noqa: F811
    out = tmp_path / "out.gguf"
    recipe = recipe_of(make_model("llama"), out, long_text, type="bcq4", method=method, codebooks="model")
    report = convert(recipe, Listener())
    assert report.block_bits_per_weight == 4.5
    own = own_codebooks(open_gguf(out))
    assert own.keys() == {"bcq4"}
    assert not np.array_equal(own["bcq4"], universal(LAYOUTS["bcq4"]))
    convert(recipe_of(make_model("llama"), out, long_text, type="bcq4", method=method), Listener())
    assert own_codebooks(open_gguf(out)) == {}


def test_damaged_codebooks_are_one_line(make_model, long_text, tmp_path):  # noqa: F811
    out = tmp_path / "out.gguf"
    convert(recipe_of(make_model("llama"), out, long_text, type="bcq2", method="rtn", codebooks="model"))
    own = own_codebooks(open_gguf(out))["bcq2"]
    data = out.read_bytes()
    assert data.count(own.tobytes()) == 1
    out.write_bytes(data.replace(own.tobytes(), own[:, ::-1].tobytes()))
    with pytest.raises(FileFormatError, match=r"BCQ codewords ascend .*damaged, make it again"):
        own_codebooks(open_gguf(out))


def test_codebooks_that_no_matrix_would_have_are_refused(make_model, long_text, tmp_path):  # noqa: F811
    rules = {"type": "bcq2", "rules": ((".", "tsq2"),), "method": "rtn"}
    recipe = recipe_of(make_model("llama"), tmp_path / "x.gguf", long_text, codebooks="model", **rules)
    with pytest.raises(UsageError, match="codebooks model has no effect"):
        convert(recipe)
    assert not (tmp_path / "x.gguf").exists()


def test_a_file_of_two_layouts_brings_codebooks_of_both(make_model, long_text, tmp_path):  # noqa: F811
    out = tmp_path / "out.gguf"
    rules = {"down_proj": "bcq2", "v_proj": "tsq3"}
    recipe = recipe_of(make_model("llama"), out, long_text, type="bcq4", rules=rules, codebooks="model", method="rtn")
    convert(recipe, Listener())  # compares every tensor with what was learned
    file = open_gguf(out)
    assert {t.type for t in file.tensors if t.name.startswith("blk.") and len(t.shape) == 2} == {"bcq2", "bcq4", "tsq3"}
    own = own_codebooks(file)
    assert {layout: codebooks.shape for layout, codebooks in own.items()} == {"bcq2": (4, 4), "bcq4": (8, 16)}
    for layout, codebooks in own.items():
        assert not np.array_equal(codebooks, universal(LAYOUTS[layout]))
    # a file that is made of this one takes weights alone
    again = tmp_path / "again.gguf"
    convert(Recipe(out, again, type="f16"), Listener())
    assert own_codebooks(open_gguf(again)) == {}


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({}, "awq"),
        ({"init": "gptq"}, "gptq"),
        ({"method": "lrq"}, "awq"),
        ({"method": "flexround"}, "awq"),
        ({"method": "lrq", "init": "none"}, "none"),
        ({"activations": "a4"}, "awq+gptq"),
        ({"method": "lrq", "activations": "a8"}, "awq+gptq"),
    ],
    ids=str,
)
def test_learning_begins_where_it_measured_best(options, start):
    assert Recipe("demo", Path("out.gguf"), **options).start == start


@pytest.mark.parametrize("options", [{"method": "lrq"}, {"method": "flexround"}, {"init": "omniquant"}])
def test_codebooks_refuse_methods_that_step_by_one_scale(options, make_model, long_text, tmp_path):  # noqa: F811
    with pytest.raises(UsageError, match="not evenly spaced"):
        convert(recipe_of(make_model("llama"), tmp_path / "out.gguf", long_text, type="bcq4", **options))


def _final(source, tokens, blocks) -> torch.Tensor:
    """Final hidden states of a model with learned blocks."""
    decoder = Decoder(source, torch.device("cpu"))
    hidden, recorded = decoder.stem(tokens)
    with torch.no_grad():
        for index in range(len(decoder)):
            block = decoder.load_block(index)
            weights = block.adopt(blocks(index))
            hidden = torch.cat([block.run(h, recorded.arguments[index], weights) for h in hidden.split(1)])
    return hidden


@pytest.mark.parametrize("origin", ["folder", "gguf"])
@pytest.mark.parametrize("method", ["rtn", "ptq161"])
def test_ordered_columns_from_model_to_file(method, origin, make_model, long_text, tmp_path):  # noqa: F811
    source = make_model("llama-256")
    if origin == "gguf":
        write_plain(source, tmp_path / "model.gguf", "f16")
        source = resolve_model(str(tmp_path / "model.gguf"))
    given: dict[str, Any] = {"samples": 8, "seqlen": 32, "calibration": str(long_text), "preset": "fast"}
    if method == "rtn":
        given = {}
    model = str(source.gguf or source.folder)
    recipe = Recipe(
        model, tmp_path / "out.gguf", type="ptq1_61", method=method, device="cpu", embedding_type="f32",
        work_dir=tmp_path / "work", **given,
    )  # fmt: skip
    report = convert(recipe)
    file = open_gguf(recipe.out)
    learned = {t.name for t in file.tensors if t.type == "ptq1_61"}
    assert len(learned) == 14
    # values, gate and up carry the orders of what reads them in their rows
    stored = {t.name for t in file.tensors if t.type == "i32"}
    assert stored == {f"blk.{i}.{name}.order" for i in (0, 1) for name in ("attn_q", "ffn_gate")}
    assert orders_of(file).keys() == {
        f"blk.{i}.{name}.weight" for i in (0, 1) for name in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
    }
    weights = sum(t.weights for t in file.tensors if t.name in learned)
    bits = 27 / 16 + 32 * 256 * len(stored) / weights
    assert report.block_bits_per_weight == pytest.approx(bits)
    assert inspect(recipe.out).block_bpw == pytest.approx(bits, abs=1e-4)
    # the file is the same function as the learner's blocks
    tokens = torch.randint(4, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    blocks = [load_tensors(tmp_path / "work" / f"block-{i:04d}.safetensors")[0] for i in (0, 1)]
    expected = _final(source, tokens, blocks.__getitem__)
    got = _final(gguf_model(recipe.out, tmp_path / "back"), tokens, lambda _: {})
    assert float((got - expected).norm()) < 2e-3 * float(expected.norm())


def test_rows_that_no_block_divides_are_named(make_model, long_text, tmp_path):  # noqa: F811
    told = Listener()  # 128 channels, and 192 between
    report = convert(
        recipe_of(make_model("llama"), tmp_path / "out.gguf", long_text, type="ptq1_61", method="gptq"), told
    )
    assert {name.split(".")[-2] for name in report.fallbacks} == {"down_proj"}
    assert any("down_proj" in note and "128 does not divide its rows of 192" in note for note in told.notes)


def test_ptq161_is_of_its_own_type(make_model, long_text, tmp_path):  # noqa: F811
    with pytest.raises(UsageError, match="not possible in tsq2"):
        convert(recipe_of(make_model("llama"), tmp_path / "out.gguf", long_text, method="ptq161"))
    with pytest.raises(UsageError, match="lrq is not possible in ptq1_61"):
        convert(recipe_of(make_model("llama"), tmp_path / "out.gguf", long_text, method="lrq", type="ptq1_61"))
    with pytest.raises(UsageError, match="no order"):
        convert(recipe_of(make_model("llama"), tmp_path / "out.gguf", long_text, embedding_type="ptq1_61"))


def test_a_run_in_parts_ends_with_the_first_of_them(make_model, tiny_gguf, long_text, run, tmp_path):  # noqa: F811
    source = make_model("llama")
    for type, method in (("f16", "tesseraq"), ("tsq2", "rtn")):
        chosen: dict[str, Any] = {"method": method, "device": "cpu"} if method == "rtn" else {}
        recipe = Recipe(str(source.folder), tmp_path / f"{type}.gguf", type=type, **chosen | {"split": "40K"})
        report = convert(recipe)
        found = inspect(report.out)
        assert report.out.name == f"{type}-00001-of-{found.parts:05}.gguf"
        assert found.parts > 1
        assert report.bytes == sum(part.stat().st_size for part in tmp_path.glob(f"{type}-*.gguf"))
        assert not (tmp_path / f"{type}.gguf").exists()
    assert "--split 40000" in run("recipe", report.out).out
    assert "is part 2 of" in run("inspect", report.out.with_name(report.out.name.replace("00001-of", "00002-of"))).err
    report.out.with_name(report.out.name.replace("00001-of", "00002-of")).unlink()
    for name in ("inspect", "recipe", "chat", "serve"):
        assert f"part 2 of {found.parts} is missing, tsq2-00002-of" in run(name, report.out).err
    commands: list[list[Any]] = [["eval"], ["compare", tiny_gguf]]
    for command in commands:
        assert f"part 2 of {found.parts} is missing" in run(*command, report.out, "--text", long_text).err
    again = run("convert", report.out, tmp_path / "again.gguf", "--type", "q8_0")
    assert f"part 2 of {found.parts} is missing" in again.err
