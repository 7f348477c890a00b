"""Types asked for are types written: one map decides, before work begins, and the finished file is compared with it."""

# A recipe takes more forms of rules and candidates than it holds.
# mypy: disable-error-code="arg-type"

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from byte_pairs import take_for_gpt2
from gguf_sources import gguf_model
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf import Recipe, convert, inspect
from tesseraq_gguf.conversion.progress import SilentProgress
from tesseraq_gguf.conversion.run import counted
from tesseraq_gguf.conversion.type_plan import TypePlan, rule_types
from tesseraq_gguf.converter.verify import verify_types
from tesseraq_gguf.converter.writer import FileMatrix, write_plain
from tesseraq_gguf.errors import UsageError, VerificationError
from tesseraq_gguf.models import Decoder
from tesseraq_gguf.models.quantised import final_states

INSIDE = [f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")]
ENDS = ["model.embed_tokens.weight", "lm_head.weight"]
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


class Told(SilentProgress):
    def __init__(self) -> None:
        self.resumed: list[bool] = []
        self.stages: list[str] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def block(self, result, blocks: int) -> None:
        self.resumed.append(result.resumed)


def _types(file) -> dict[str, str]:
    """Types of the matrices of a file."""
    return {t.name: t.type for t in inspect(file).tensors if len(t.shape) > 1}


def _expected(inside: str, embedding: str, output: str | None, **different: str) -> dict[str, str]:
    types = {f"blk.{i}.{name}.weight": inside for i in (0, 1) for name in MATRICES}
    types |= {"token_embd.weight": embedding} | ({"output.weight": output} if output else {})
    return types | {f"blk.{name.replace('__', '.')}.weight": type for name, type in different.items()}


def _logits(source) -> torch.Tensor:
    decoder = Decoder(source, torch.device("cpu"))
    tokens = torch.randint(4, 300, (1, 24), generator=torch.Generator().manual_seed(3))
    return decoder.answers()(final_states(decoder, tokens)[0])


# --- rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "found"),
    [
        ([("down_proj", "f16")], dict.fromkeys(INSIDE[1::2], "f16")),
        ([(".", "tsq3")], dict.fromkeys(INSIDE, "tsq3")),  # not the embedding, although it matches
        ([("lm_head", "f16")], {"lm_head.weight": "f16"}),
        ([("embed|lm_head", "q4_0")], dict.fromkeys(ENDS, "q4_0")),
        ([(".", "tsq3"), (r"layers\.1\.mlp", "f16")], dict.fromkeys(INSIDE, "tsq3") | {INSIDE[3]: "f16"}),
        ([(r"layers\.1\.mlp", "f16"), (".", "tsq3")], dict.fromkeys(INSIDE, "tsq3")),
    ],
)
def test_what_rules_are_for(rules, found):
    assert rule_types(rules, INSIDE, ENDS) == found


@pytest.mark.parametrize(
    ("rule", "ends", "message"),
    [
        (("router", "tsq3"), ENDS, r"router=tsq3 matches no matrix of the model, such as model\.layers\.0"),
        (("lm_head", "f16"), ENDS[:1], "the output matrix is the embedding, model.embed_tokens.weight"),
        (("embed", "ptq1_61"), ENDS, "columns of the embedding have no order"),
    ],
)
def test_rules_that_cannot_be_meant(rule, ends, message):
    with pytest.raises(UsageError, match=message):
        rule_types([rule], INSIDE, ends)


def test_one_map_names_all_matrices_of_the_file():
    file = {
        "blk.0.attn_q.weight": FileMatrix(("q",), 64, 4096),
        "blk.0.ffn_down_exps.weight": FileMatrix(("e0", "e1"), 64, 8192),
        "blk.0.ffn_gate_inp.weight": FileMatrix(("r",), 64, 128, forced="f32"),
        "token_embd.weight": FileMatrix(("e",), 64, 640),
    }
    plan = TypePlan({"q": "tsq2", "e0": "tsq3", "e1": "tsq3"}, {"e": "tsq4"}, {"r": "q8_0"}, file)
    assert plan.in_file() == dict(zip(file, ("tsq2", "tsq3", "f32", "tsq4"), strict=True))
    assert plan.learned_in_file() == {"blk.0.attn_q.weight", "blk.0.ffn_down_exps.weight"}


def test_a_type_that_is_not_the_one_decided_is_found(tiny_gguf):
    types = {tensor.name: tensor.type for tensor in inspect(tiny_gguf).tensors}
    verify_types(tiny_gguf, types)
    with pytest.raises(VerificationError, match=r"blk\.1\.ffn_up\.weight is f16 in the file and was to be q8_0"):
        verify_types(tiny_gguf, types | {"blk.1.ffn_up.weight": "q8_0"})
    with pytest.raises(VerificationError, match=r"output_b\.weight was to be f16 and is not in the file"):
        verify_types(tiny_gguf, types | {"output_b.weight": "f16"})


def test_what_is_said_of_many_matrices_is_said_once():
    said = {f"model.layers.{i}.mlp.gate.weight": "is f32" for i in range(12)} | {"model.layers.3.q.weight": "is q8_0"}
    assert list(counted(said)) == [
        "model.layers.*.mlp.gate.weight (12 matrices) is f32",
        "model.layers.3.q.weight is q8_0",
    ]


# --- files ----------------------------------------------------------------------------------------------------------

RULES = {r"layers\.0\.mlp\.down_proj": "f32", r"layers\.1\.self_attn\.q_proj": "bf16", "up_proj": "q8_0"}
RULED = {"0.ffn_down": "f32", "1.attn_q": "bf16", "0.ffn_up": "q8_0", "1.ffn_up": "q8_0"}


@pytest.mark.slow
@pytest.mark.parametrize("learns", [True, False], ids=["learned", "plain"])
@pytest.mark.parametrize("origin", ["folder", "gguf"])
def test_every_matrix_has_the_type_that_was_asked_for(origin, learns, make_model, tmp_path):  # noqa: F811
    model = make_model("llama").folder
    if origin == "gguf":
        model = write_plain(make_model("llama"), tmp_path / "source.gguf", "f32").path
    out, type = tmp_path / "out.gguf", "q4_0" if learns else "f16"
    method = {"method": "rtn"} if learns else {}
    convert(Recipe(model, out, type=type, embedding_type="bf16", output_type="q8_0", rules=RULES, **method))
    assert _types(out) == _expected(type, "bf16", "q8_0", **RULED)


@pytest.mark.slow
def test_a_learned_embedding_beside_a_plain_output_matrix_and_the_reverse(make_model, tmp_path):  # noqa: F811
    out = tmp_path / "out.gguf"
    for embedding, output in (("tsq4", "f16"), ("f16", "tsq4")):
        rules = {"lm_head": output}  # as --output-type says it
        convert(Recipe(make_model("llama").folder, out, method="rtn", embedding_type=embedding, rules=rules))
        assert _types(out) == _expected("tsq2", embedding, output)


@pytest.mark.slow
def test_rows_that_do_not_fit_fall_back_as_documented(make_model, tmp_path):  # noqa: F811
    """Rows of 100 weights are no whole number of blocks of 32."""
    out, model = tmp_path / "out.gguf", make_model("llama-odder").folder
    report = convert(Recipe(model, out, method="rtn", type="q8_0"))
    odd = dict.fromkeys(("0.ffn_down", "1.ffn_down"), "f16")
    assert _types(out) == _expected("q8_0", "q8_0", "q8_0", **odd)
    assert set(report.fallbacks.values()) == {"is not learned and is f16: 32 does not divide its rows of 100"}
    convert(Recipe(model, out, type="f16", rules={"mlp": "q8_0"}))
    assert _types(out) == _expected("f16", "f16", "f16", **{f"{i}.{n}": "q8_0" for i in (0, 1) for n in MATRICES[4:6]})


@pytest.mark.slow
def test_experts_of_a_stack_have_one_plain_type(make_model, tmp_path):  # noqa: F811
    out, model = tmp_path / "out.gguf", make_model("mixtral").folder
    convert(Recipe(model, out, type="f16", rules={r"experts\.\d+\.w2": "q8_0", r"layers\.1\..*w1": "f32"}))
    found = _types(out)
    kinds = [[found[f"blk.{i}.ffn_{name}_exps.weight"] for name in ("gate", "up", "down")] for i in (0, 1)]
    assert kinds == [["f16", "f16", "q8_0"], ["f32", "f16", "q8_0"]]
    learned = {"type": "tsq4", "method": "rtn"}
    convert(Recipe(model, out, rules={r"layers\.1\..*experts": "f16", r"layers\.0\..*w2": "q8_0"}, **learned))
    found = _types(out)
    kinds = [[found[f"blk.{i}.ffn_{name}_exps.weight"] for name in ("gate", "up", "down")] for i in (0, 1)]
    assert kinds == [["tsq4", "tsq4", "q8_0"], ["f16", "f16", "f16"]]


@pytest.mark.slow
def test_experts_that_cannot_have_types_of_their_own(make_model, tmp_path):  # noqa: F811
    recipe = {"model": make_model("mixtral").folder, "out": tmp_path / "out.gguf"}
    learned = {"type": "tsq4", "method": "rtn"}
    with pytest.raises(UsageError, match=r"experts\.\*\.w1\.weight cannot be f32 while other matrices"):
        convert(Recipe(**recipe, rules={r"experts\.\d+\.w1": "f32"}, **learned))
    for options, type in (({"type": "f16"}, "f32"), (learned, "tsq2")):
        with pytest.raises(UsageError, match="become one tensor: they cannot be"):
            convert(Recipe(**recipe, rules={r"experts\.2\.w2": type}, **options))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"])
def test_what_stays_as_it_is_goes_with_what_is_scaled_and_mixed(name, make_model, long_text, tmp_path):  # noqa: F811
    """AWQ's scales and rotations move between matrices: one that is not learned must not lose its part of them."""
    source, out = make_model("llama"), tmp_path / "out.gguf"
    recipe = Recipe(
        source.folder, out, type="q8_0", method="awq", rotate=True, rules={name: "f32"}, embedding_type="f32",
        calibration=long_text, samples=4, seqlen=32, preset="fast",
    )  # fmt: skip
    convert(recipe)
    expected, got = (_logits(s) for s in (source, gguf_model(out, tmp_path / "expanded")))
    assert float((got - expected).square().mean() / expected.var()) < 1e-3


@pytest.mark.slow
def test_floats_are_candidates_of_a_budget(make_model, long_text, tmp_path):  # noqa: F811
    out = tmp_path / "out.gguf"
    common = {"method": "rtn", "calibration": long_text, "samples": 4, "seqlen": 32}
    convert(Recipe(make_model("llama").folder, out, target_bpw=8, candidates="q4_0,f16", **common))
    inside = {name: type for name, type in _types(out).items() if name.startswith("blk.")}
    assert set(inside.values()) == {"q4_0", "f16"}
    assert out.with_name("out.gguf.types").read_text().count("=f16") == list(inside.values()).count("f16")
    sizes = {t.name: t.bytes for t in inspect(out).tensors if t.name in inside}
    weights = sum(128 * 192 * 3 + 128 * (128 + 64 + 64 + 128) for _ in (0, 1))
    assert 8 * sum(sizes.values()) <= 8 * weights
    # all of it, when there is room
    convert(Recipe(make_model("llama").folder, out, target_bpw=16, candidates="q4_0,f16", **common))
    assert _types(out) == _expected("f16", "q8_0", "q8_0")


@pytest.mark.slow
def test_a_size_counts_what_rules_and_options_settle(make_model, long_text, tmp_path):  # noqa: F811
    """What a larger type of a settled matrix takes is missing for the others, to the byte."""
    down, output = 2 * 128 * 192 * (4 - 2), 320 * 128 * (16 - 8.5) / 8

    def left(size: int, type: str, output_type: str) -> str:
        common = {"method": "rtn", "calibration": long_text, "samples": 4, "seqlen": 32, "output_type": output_type}
        recipe = Recipe(
            make_model("llama").folder, tmp_path / f"{type}.gguf", target_size=size, rules={"down": type}, **common
        )
        with pytest.raises(UsageError, match="the smallest types need") as caught:
            convert(recipe)
        return str(caught.value)

    assert left(250_000, "f32", "f16") == left(250_000 - down - int(output), "f16", "q8_0")


# --- runs that go on ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_blocks_serve_again_exactly_if_nothing_in_them_depends_on_the_change(make_model, long_text, tmp_path):  # noqa: F811
    out, work = tmp_path / "out.gguf", tmp_path / "work"

    def run(**options) -> list[bool]:
        told = Told()
        recipe = Recipe(
            make_model("llama").folder, out, method="gptq", work_dir=work, calibration=long_text, samples=4, seqlen=32,
            **options,
        )  # fmt: skip
        convert(recipe, told)
        return told.resumed

    assert run(embedding_type="tsq4") == [False, False]
    for output in ("f16", "tsq3", "q8_0"):  # none of the blocks knows of it
        assert run(embedding_type="tsq4", output_type=output) == [True, True]
        assert _types(out) == _expected("tsq2", "tsq4", output)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"embedding_type": "tsq3"}, r"types \(model\.embed_tokens\.weight was tsq4, and is tsq3 now\)"),
        ({"embedding_type": "f16"}, r"types \(model\.embed_tokens\.weight was tsq4, and is not there now\)"),
        ({"rules": {"layers.1.mlp.down_proj": "tsq3"}}, r"layers\.1\.mlp\.down_proj\.weight was tsq2, and is tsq3 now"),
        ({"rules": {"down_proj": "f16"}}, r"down_proj\.weight was tsq2, and is not there now, and 1 more"),
    ]
    for change, said in changes:
        with pytest.raises(UsageError, match=said):
            run(**{"embedding_type": "tsq4"} | change)
    shutil.rmtree(work)


@pytest.mark.slow
def test_what_llama_cpp_keeps_in_32_bits_is_not_learned(make_model, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "site").mkdir()
    take_for_gpt2(tmp_path / "site", monkeypatch)
    report = convert(Recipe(make_model("qwen2-moe").folder, tmp_path / "out.gguf", type="tsq3", method="rtn"))
    gates = {f"model.layers.{i}.mlp.shared_expert_gate.weight" for i in (0, 1)}
    assert report.fallbacks == dict.fromkeys(gates, "is not learned: it is f32 in every file of llama.cpp's")
    assert _types(report.out)["blk.1.ffn_gate_inp_shexp.weight"] == "f32"
