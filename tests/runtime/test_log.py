"""Of the many lines that llama.cpp says, the one that says why."""

from __future__ import annotations

import pytest

from tesseraq_gguf.runtime.log import errors_in, first_reason

REFUSED = """\
0.00.001.117 I llama_model_loader: loaded meta data with 26 key-value pairs and 21 tensors
0.00.001.120 W load: special token error is fine
0.00.004.457 E llama_model_load: error loading model: check_tensor_dims: tensor 'blk.1.attn_norm.weight' not found
0.00.004.498 E llama_model_load_from_file_impl: failed to load model
0.00.004.650 E common_fit_params: encountered an error while trying to fit params to free device memory: failed to
0.00.005.274 E cmn  common_init_: failed to load model 'renamed.gguf'
0.00.005.291 E llama_perplexity: unable to load model
"""


def test_the_first_error_that_means_something() -> None:
    assert len(errors_in(REFUSED)) == 5
    assert first_reason(errors_in(REFUSED)) == "tensor 'blk.1.attn_norm.weight' not found"


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["gguf_init_from_reader: tensor 't' has invalid ggml type 510. should be in [0, 513)"],
         "tensor 't' has invalid ggml type 510. should be in [0, 513)"),
        (["llama_model_load: error loading model: error loading model hyperparameters: key not found in model: a.b"],
         "key not found in model: a.b"),
        (["llama_model_load: error loading model: unknown model architecture: 'x'"], "unknown model architecture: 'x'"),
        (["llama_model_load_from_file_impl: failed to load model"], "failed to load model"),
        (["ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 9"],
         "failed to allocate buffer of size 9"),
        (["/src/ggml.c:12: GGML_ASSERT(a == b) failed"], "/src/ggml.c:12: GGML_ASSERT(a == b) failed"),
        (["error: no such file"], "error: no such file"),
        (["a_b: " + "x" * 1000], "x" * 300 + " …"),
        ([], None),
    ],
)  # fmt: skip
def test_who_says_it_is_left_out(lines: list[str], reason: str | None) -> None:
    assert first_reason(lines) == reason


def test_lines_without_a_level_are_judged_by_their_words() -> None:
    assert errors_in("reading\nerror: no such file\n\nbye") == ["error: no such file"]
    assert errors_in("") == []
