"""A mix gives every matrix the type that the pinned llama-quantize gives it: compared with files that it makes."""

# A recipe takes more forms of paths than it holds.
# mypy: disable-error-code="arg-type"

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversions import Listener, recipe_of
from tiny_models import LOUD, make_model  # noqa: F401  (a fixture)

from tesseraq_gguf import Recipe, convert, inspect
from tesseraq_gguf.conversion import mix, type_plan
from tesseraq_gguf.conversion.type_plan import plan_types
from tesseraq_gguf.converter.grids import teach_rounding
from tesseraq_gguf.converter.writer import FileMatrix, check_source, write_plain
from tesseraq_gguf.errors import ConversionError, RuntimeMissingError, UsageError
from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.gguf_files.imatrix import Imatrix, Squares, write_imatrix
from tesseraq_gguf.models import Decoder
from tesseraq_gguf.runtime.locate import find_runtime
from tesseraq_gguf.runtime.source import ensure_source
from tesseraq_gguf.types.facts import TENSOR_TYPES
from tesseraq_gguf.types.grids import grid_of
from tesseraq_gguf.types.mixes import MIXES, mix_of, spellings

COMPARED = (
    "q2_k_s", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs",
)  # fmt: skip
SLOW = ("iq2_m", "iq3_xxs", "iq3_m")
UNCALIBRATED = ("q4_0", "q3_k_m", "iq4_xs")


def types_of(file: Path) -> dict[str, str]:
    """Types of the matrices of a file."""
    return {t.name: t.type for t in open_gguf(file).tensors if len(t.shape) > 1}


def of_llama_quantize(f16: Path, name: str, out: Path, imatrix: bool = True) -> dict[str, str]:
    """Types of the file that llama-quantize makes."""
    given: list[object] = []
    if imatrix:
        matrices = [t for t in open_gguf(f16).tensors if len(t.shape) > 1]
        ones = {t.name: np.ones((t.shape[2] if len(t.shape) > 2 else 1, t.shape[0]), np.float32) for t in matrices}
        counts = {n: np.ones(len(values), np.float32) for n, values in ones.items()}
        write_imatrix(out.with_name("ones.gguf"), Imatrix({n: Squares(ones[n], counts[n]) for n in ones}))
        given = ["--imatrix", out.with_name("ones.gguf")]
    command = [find_runtime().tool("llama-quantize"), *given, f16, out, name, 1]
    answer = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-2000:]
    return types_of(out)


@pytest.mark.runtime
@pytest.mark.parametrize("kind", ["gemma3", "llama-256", "mixtral", "mixtral-272"])
def test_every_matrix_has_the_type_that_llama_quantize_gives_it(kind, tmp_path, monkeypatch, make_model):  # noqa: F811
    """Of rows that 256 does not divide and tied embeddings, of rows that it does, and of experts."""
    source, tree = make_model(kind), ensure_source()
    seen: dict[str, Any] = {}
    decoder = Decoder(source, torch.device("cpu"))

    def once(*arguments, outline, **named):
        """The same answer for every mix: it takes a process."""
        if not seen:
            seen["check"] = check_source(*arguments, outline=tmp_path / "outline.gguf", **named)
        shutil.copyfile(tmp_path / "outline.gguf", outline)
        return seen["check"]

    monkeypatch.setattr(type_plan, "check_source", once)
    write_plain(source, tmp_path / "f16.gguf", "f16")
    slow = SLOW if kind == "llama-256" else ()
    for method, names in (("gptq", (*COMPARED, *slow)), ("rtn", UNCALIBRATED)):
        for name in names:
            recipe = Recipe(str(source.folder), tmp_path / "out.gguf", type=f"mix:{name}", method=method)
            ours = plan_types(recipe, decoder, tree).in_file()
            theirs = of_llama_quantize(tmp_path / "f16.gguf", name, tmp_path / "theirs.gguf", method == "gptq")
            assert ours == theirs, (name, method)


@pytest.mark.runtime
@pytest.mark.parametrize(("kind", "name"), [("llama-256", "q3_k_m"), ("mixtral-272", "q4_k_m")])
def test_a_mix_is_learned_and_what_cannot_be_is_rounded(kind, name, tmp_path, long_text, make_model):  # noqa: F811
    """Rows of 272 leave an expert's last matrix in f16, and so the experts unlearned: all of them have their types."""
    source, out, told = make_model(kind, LOUD), tmp_path / "out.gguf", Listener()
    convert(recipe_of(source, out, long_text, type=name, method="gptq"), told)
    write_plain(source, tmp_path / "f16.gguf", "f16")
    assert types_of(out) == of_llama_quantize(tmp_path / "f16.gguf", name, tmp_path / "theirs.gguf")
    assert open_gguf(out).get("general.file_type") == open_gguf(tmp_path / "theirs.gguf").get("general.file_type")
    assert any(note.startswith(f"{name} as llama-quantize has it: ") for note in told.notes)
    assert inspect(out).file_type == f"mostly {name}"


@pytest.mark.runtime
def test_rules_and_ends_go_before_the_mix(tmp_path, make_model):  # noqa: F811
    source, tree = make_model("llama-256"), ensure_source()
    options = {"type": "q4_k_m", "rules": "layers.0.*down_proj=q3_k", "embedding_type": "q2_k", "method": "rtn"}
    recipe = Recipe(str(source.folder), tmp_path / "out.gguf", **options)
    types = plan_types(recipe, Decoder(source, torch.device("cpu")), tree).in_file()
    named = {
        n: types[n] for n in ("token_embd.weight", "output.weight", "blk.0.ffn_down.weight", "blk.1.ffn_down.weight")
    }
    assert list(named.values()) == ["q2_k", "q6_k", "q3_k", "q6_k"]


@pytest.mark.runtime
def test_names_and_file_types_are_those_of_llama_quantize():
    answer = subprocess.run([find_runtime().tool("llama-quantize"), "--help"], capture_output=True, text=True)
    listed = [line.split() for line in answer.stdout.splitlines() if "  or  " in line]
    theirs = {words[2].lower(): int(words[0]) for words in listed}
    for name, found in MIXES.items():
        assert theirs[name] == found.file_type, name
    aliases, ternary = {"q3_k", "q4_k", "q5_k"}, {"tq1_0", "tq2_0"}
    floats_and_ours = {t.name for t in TENSOR_TYPES.values() if t.is_float or t.custom}
    assert theirs.keys() - MIXES.keys() <= aliases | ternary | floats_and_ours | {"q1_0", "nvfp4"}


def test_a_name_of_a_type_is_that_of_the_type():
    assert mix_of("q2_k") is None
    assert Recipe("m", "o", type="Q4_K").type == "q4_k"
    assert Recipe("m", "o", type="mix:Q2_K").type == "mix:q2_k"
    assert Recipe("m", "o", type="Q4_K_M").type == Recipe("m", "o", type="mix:q4_k_m").type == "q4_k_m"
    assert Recipe("m", "o", type="q4_k_m").embedding_type == "auto"
    assert spellings().index("q4_k_m") < spellings().index("mix:q4_0")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"type": "mix:q9"}, "unknown mix 'mix:q9'. llama-quantize has: q2_0, "),
        ({"type": "q4_k_x"}, "unknown tensor type 'q4_k_x'. Known types: "),
        ({"type": "q4_k_x"}, "Mixes of llama-quantize: "),
        ({"embedding_type": "q4_k_m"}, "'q4_k_m' is a mix of types, which type alone takes"),
        ({"target_bpw": 3, "candidates": "q2_k,q4_k_m"}, "'q4_k_m' is a mix of types, which type alone takes"),
        ({"type": "q4_k_m", "target_bpw": 3}, "type q4_k_m chooses types, and so does a target: give one of them"),
        ({"type": "q4_k", "embedding_type": "auto"}, "only, or is a mix's: name one"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, said):
    with pytest.raises(UsageError) as caught:
        Recipe("m", "o", **options)
    assert said in str(caught.value)


def test_without_a_runtime_there_is_nobody_to_ask(tmp_path, monkeypatch):
    def none() -> None:
        raise RuntimeMissingError("no runtime is installed; run: tesseraq-gguf runtime build")

    monkeypatch.setattr(mix, "find_runtime", none)
    with pytest.raises(RuntimeMissingError, match=r"type q4_k_m asks llama-quantize: no runtime .* runtime build"):
        mix.ask(MIXES["q4_k_m"], tmp_path / "model.gguf", calibrated=False)


@pytest.mark.runtime
def test_what_llama_quantize_refuses_is_said_in_a_line(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ConversionError, match=r"^llama-quantize has no types for this model: \w.*$"):
        mix.ask(MIXES["q4_k_m"], tmp_path / "model.gguf", calibrated=False)


def test_a_type_that_nothing_makes_is_refused_and_a_matrix_in_parts_gets_the_largest():
    file = {"a": FileMatrix(("x",), 64, 64), "b": FileMatrix(("x",), 64, 64), "c": FileMatrix(("y",), 64, 64, "f32")}
    assert mix.by_matrix(MIXES["q4_k_m"], {"a": "q4_k", "b": "q6_k", "c": "q4_k"}, file) == {"x": "q6_k"}
    said = {"x": "has one type in all its parts: llama-quantize gives them q4_k, q6_k"}
    assert mix.torn({"a": "q4_k", "b": "q6_k", "c": "q4_k"}, file) == said
    assert mix.torn({"a": "q4_k", "b": "q4_k"}, file) == {}
    with pytest.raises(UsageError, match=r"type mix:q4_0 has a in tq1_0, which nothing here makes"):
        mix.by_matrix(MIXES["q4_0"], {"a": "tq1_0"}, file)


def test_gguf_learns_to_round_to_what_our_grids_round_to(monkeypatch):
    import gguf

    for traits in gguf.quants._type_traits.values():  # put back what it is taught
        if "quantize_blocks" not in vars(traits):
            monkeypatch.setattr(traits, "quantize_blocks", traits.quantize_blocks, raising=False)
            monkeypatch.delattr(traits, "quantize_blocks")
    teach_rounding(gguf)
    weight = np.random.default_rng(1).standard_normal((2, 3, 512)).astype(np.float32)
    for name in ("q2_k", "q3_k", "q4_k", "q6_k", "iq4_nl"):
        kind = gguf.GGMLQuantizationType[name.upper()]
        rounded = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
        rows = torch.from_numpy(weight.reshape(6, 512))
        np.testing.assert_array_equal(rounded.reshape(6, 512), grid_of(name).dequantize(grid_of(name).quantize(rows)))
