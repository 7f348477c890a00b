"""Which factors graphs read, by llama.cpp's source: the pinned one, and a made-up one with all ways to do it."""

from __future__ import annotations

import pytest

from tesseraq_gguf.converter.graph_factors import factors_of, factors_read
from tesseraq_gguf.runtime.source import ensure_source

ATTENTION = {"attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output"}
DENSE = {"ffn_gate", "ffn_up", "ffn_down"}


@pytest.fixture(scope="module")
def pinned():
    return ensure_source().llama_cpp


def test_what_the_pinned_graphs_read(pinned):
    stacks = {f"{name}_exps" for name in DENSE}
    assert factors_of(pinned, "llama") == ATTENTION | DENSE | stacks | {"output"}
    assert factors_of(pinned, "qwen3") == ATTENTION | DENSE | {"output"}
    assert factors_of(pinned, "gemma3") == ATTENTION | {"output"}  # its feed-forward network is built without any
    assert "output" not in factors_of(pinned, "bitnet")  # its output matrix is the embedding
    assert not factors_of(pinned, "none")


def test_which_matrices_of_a_file_can_have_one(pinned):
    names = {"token_embd.weight", "output.weight", "output_norm.weight", "blk.3.attn_q.weight", "blk.3.attn_q.bias"}
    names |= {"blk.3.ffn_up.weight", "blk.3.ffn_up.bias", "blk.3.ffn_down.weight", "blk.3.attn_norm.weight"}
    found = factors_read(pinned, "llama", names)
    assert found == {"output.weight", "blk.3.attn_q.weight", "blk.3.ffn_down.weight"}
    # where the model has such a tensor of its own, its place is taken
    assert factors_read(pinned, "llama", names | {"blk.3.attn_q.scale"}) == found - {"blk.3.attn_q.weight"}


MODEL = """
void llama_model_made::load_arch_tensors(llama_model_loader & ml) {
    layer.wq = create_tensor(tn(LLM_TENSOR_ATTN_Q, "weight", i), {n_embd, n_embd}, 0);
    layer.OTHER = create_tensor(tn(LLM_TENSOR_ATTN_K, "weight", i), {n_embd, n_embd}, 0);
}
llama_model_made::graph::graph(const llama_model & model) {
    // build_lora_mm(layer.wq, cur)
    if (layer.wq && !layer.wk) { }
    BODY
}
"""


@pytest.mark.parametrize(
    ("body", "other", "found"),
    [
        ("cur = build_lora_mm(layer.wq, cur, layer.wq_s);", "wk", {"attn_q"}),
        ("cur = build_lora_mm(model.layers[il].wq, build_norm(cur, x), model.layers[il].wq_s);", "wk", {"attn_q"}),
        ("cur = build_lora_mm(layer.wq, cur, layer.wq_s); y = build_lora_mm(layer.wq, cur);", "wk", set()),
        ("cur = ggml_mul_mat(ctx0, layer.wq, cur);", "wk", set()),
        ("ggml_tensor * w = layer.wq;", "wk", set()),
        ("n = layer.wq->ne[1]; cur = build_lora_mm(layer.wq, cur, layer.wq_s);", "wk", {"attn_q"}),
        ("cur = build_qkv(layer, cur);", "wk", {"attn_q", "attn_k"}),
        ("cur = build_qkv(layer, cur);", "wk_other", {"attn_q"}),  # its scale would not be loaded
        ("cur = build_lora_mm(model.output, cur, model.output_s);", "wk", {"output"}),
        ("cur = build_lora_mm(model.output, cur);", "wk", set()),
    ],
)
def test_how_a_factor_is_handed_on(body, other, found, tmp_path):
    source = tmp_path / "src"
    (source / "models").mkdir(parents=True)
    (source / "llama-arch.cpp").write_text(
        '{ LLM_ARCH_MADE, "made" },\n{ LLM_TENSOR_ATTN_Q, "blk.%d.attn_q" },\n{ LLM_TENSOR_ATTN_K, "blk.%d.attn_k" },'
    )
    (source / "llama-model.cpp").write_text(
        "case LLM_ARCH_MADE:\n    return new llama_model_made(params);\n"
        'layer.wq_s = create_tensor(tn(LLM_TENSOR_ATTN_Q, "scale", i), {1}, TENSOR_NOT_REQUIRED);\n'
        'layer.wk_s = create_tensor(tn(LLM_TENSOR_ATTN_K, "scale", i), {1}, TENSOR_NOT_REQUIRED);\n'
    )
    (source / "llama-graph.cpp").write_text(
        "Qcur = build_lora_mm(layer.wq, cur, layer.wq_s); Kcur = build_lora_mm(layer.wk, cur, layer.wk_s);"
    )
    (source / "models" / "models.h").write_text("struct llama_model_made : public llama_model_base {\n};\n")
    (source / "models" / "made.cpp").write_text(MODEL.replace("BODY", body).replace("OTHER", other))
    assert factors_of(tmp_path, "made") == found
