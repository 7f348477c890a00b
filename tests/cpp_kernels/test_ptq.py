"""PTQ1_61: C against numpy, the kernels on their own under sanitizers, and models whose columns are in an order."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tesseraq_gguf.converter.packers import packer_of, ptq161
from tesseraq_gguf.runtime import Runtime, SourceTree

from . import test_arm
from .conftest import pointer
from .test_arm import CC, processor
from .test_graph import instructions, run_sanitized
from .test_vec_dot import dot_with, kernels

__all__ = ["instructions", "processor"]

Array = np.ndarray[Any, Any]

PACKER = packer_of("ptq1_61")

GROUP = 16
"""Blocks of a group of Q8_PTQ activations."""

UNITS = ["ptq.c", "ptq-cpu.c", "ptq-repack.cpp"]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc with its sanitizers")
@pytest.mark.runtime
def test_sources_under_sanitizers(source: SourceTree, tmp_path: Path, instructions: list[str]) -> None:
    units = [*UNITS, *(["x86/ptq.c", "x86/ptq-repack.cpp"] if instructions else [])]
    options = [*(instructions or ["-DGGML_CPU_GENERIC"]), "-fsanitize=float-cast-overflow"]
    lines = 16 if "-mavx512vnni" in instructions else 8 if instructions else 4
    assert run_sanitized(source, tmp_path / "ptq", ["gcc"], units, options) == f"{lines} rows: all ok\n"


@pytest.mark.runtime
def test_neon(source: SourceTree, tmp_path: Path, processor: str) -> None:
    units = [*UNITS, "arm/ptq.c", "arm/ptq-repack.cpp"]
    assert test_arm.run(source, tmp_path / "ptq", [CC], units, processor) == "4 rows: all ok\n"


@pytest.mark.runtime
def test_dequantising_is_numpys_bit_for_bit(ggml: ctypes.CDLL, ggml_cpu: ctypes.CDLL) -> None:
    """All scales, any codes and signs."""
    data = np.random.default_rng(0).integers(0, 256, (64, 256, 27), dtype=np.uint8)
    data[:, :, 0], data[:, :, 1] = np.arange(256), np.arange(256)[::-1]
    data = data.reshape(64, -1)
    expected = PACKER.dequantize(PACKER.unpack(data))
    for kernel in [ggml.dequantize_row_ptq1_61, *kernels(ggml_cpu, "ggml_cpu_ptq1_61_to_fp32")]:
        out = np.empty_like(expected)
        kernel(pointer(data), pointer(out), ctypes.c_int64(out.size))
        assert (out.view(np.uint32) == expected.view(np.uint32)).all(), kernel.__name__


@pytest.mark.runtime
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-45, 15))
def test_quantising_is_numpys_bit_for_bit(ggml: ctypes.CDLL, seed: int, exponent: int) -> None:
    """With an importance matrix too, also such as is zero for some blocks, or for one kind of their weights."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((8, 512)) * rng.exponential(size=(8, 512)) * 10.0**exponent).astype(np.float32)
    x[rng.integers(8), 128:256] = 0
    importance = rng.exponential(size=512).astype(np.float32)
    importance[100:280] = 0
    ggml.quantize_ptq1_61.restype = ctypes.c_size_t

    def in_c(imatrix: Array | None) -> Array:
        out = np.empty((8, 4 * 27), np.uint8)
        given = pointer(imatrix) if imatrix is not None else None
        sizes = (ctypes.c_int64(8), ctypes.c_int64(512))
        assert ggml.quantize_ptq1_61(pointer(x), pointer(out), *sizes, given) == out.size
        return out

    assert (in_c(None) == PACKER.pack(ptq161.quantize(x))).all()
    mean_square = np.cumsum(x * x, axis=1, dtype=np.float32)[:, -1:] / np.float32(512)
    weights = importance * np.sqrt(mean_square + x * x)
    assert (in_c(importance) == PACKER.pack(ptq161.quantize(x, weights))).all()


def split(y: Array) -> tuple[Array, Array, Array]:
    """Scales, float32 [blocks, 2], sums, int32 [blocks, 2], and numbers, int8 [blocks, 128], in the weights' order."""
    blocks = len(y) // 144
    d, s, qs = np.empty((blocks, 2), np.float32), np.empty((blocks, 2), np.int32), np.empty((blocks, 128), np.int8)
    for i in range(0, blocks, GROUP):
        m = min(GROUP, blocks - i)
        group = y[144 * i : 144 * (i + m)]
        d[i : i + m] = group[: 8 * m].view(np.float32).reshape(2, m).T
        s[i : i + m] = group[8 * m : 16 * m].view(np.int32).reshape(2, m).T
        qs[i : i + m] = np.roll(group[16 * m :].view(np.int8).reshape(m, 128), 24, axis=1)
    return d, s, qs


def quantize_activations(library: ctypes.CDLL, x: Array) -> list[Array]:
    """Q8_PTQ bytes of a row of floats, by every kernel."""
    results = []
    for kernel in kernels(library, "quantize_row_q8_ptq"):
        y = np.empty(x.size // 128 * 144, np.uint8)
        kernel(pointer(x), pointer(y), ctypes.c_int64(x.size))
        results.append(y)
    return results


@pytest.mark.runtime
@settings(max_examples=100, deadline=None)
@given(blocks=st.integers(1, 49), seed=st.integers(0, 2**32 - 1), exponent=st.integers(-40, 30))
def test_activations_from_float(ggml_cpu: ctypes.CDLL, blocks: int, seed: int, exponent: int) -> None:
    """All kernels write the same bytes; each number is within half a step of its kind; sums belong to the numbers."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((blocks, 128)) * np.where(np.arange(128) < 24, 50.0, 1.0)
    x = (x * 10.0**exponent).astype(np.float32)
    x[rng.integers(blocks), : rng.integers(129)] = 0
    first, *others = quantize_activations(ggml_cpu, x)
    assert all((y == first).all() for y in others)
    d, s, qs = split(first)
    for kind, part, lack in ((0, slice(0, 24), -60), (1, slice(24, 128), -32)):
        assert (s[:, kind] == lack * qs[:, part].sum(axis=1, dtype=np.int32)).all()
        step = np.abs(x[:, part]).max(axis=1).astype(np.float64) / 127
        error = np.abs(qs[:, part] * d[:, kind, None].astype(np.float64) - x[:, part])
        assert (error <= 0.50001 * step[:, None] + 1e-36).all()


@pytest.mark.runtime
@settings(max_examples=100, deadline=None)
@given(blocks=st.integers(1, 49), seed=st.integers(0, 2**32 - 1))
def test_dot_products(ggml_cpu: ctypes.CDLL, blocks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, blocks * 27, dtype=np.uint8)
    x = (rng.standard_normal((blocks, 128)) * np.where(np.arange(128) < 24, 50.0, 1.0)).astype(np.float32)
    y = quantize_activations(ggml_cpu, x)[0]
    d, _, qs = split(y)
    weights = PACKER.dequantize(PACKER.unpack(data[None])).reshape(blocks, 128).astype(np.float64)
    a = qs * np.repeat(d.astype(np.float64), (24, 104), axis=1)
    # kernels take as much as the largest weight out of the products again
    largest = np.repeat(np.abs(weights.reshape(blocks, 128)[:, [0, 24]]), (24, 104), axis=1)
    largest[:, :24] = np.abs(weights[:, :24]).max(axis=1, keepdims=True) * 15
    expected, magnitude = (weights * a).sum(), ((np.abs(weights) + largest) * np.abs(a)).sum()
    for kernel in kernels(ggml_cpu, "ggml_vec_dot_ptq1_61_q8_ptq"):
        assert abs(dot_with(kernel, data, y, blocks * 128) - expected) <= 5e-7 * magnitude, kernel.__name__


# ---- orders of columns in a model ---------------------------------------------------------------------------------

WIDTH, INNER, VOCABULARY = 256, 384, 48

SHAPES = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH // 2, WIDTH),
    "attn_v": (WIDTH // 2, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (INNER, WIDTH),
    "ffn_up": (INNER, WIDTH),
    "ffn_down": (WIDTH, INNER),
}

SHARED = {"attn_k": "attn_q", "attn_v": "attn_q", "ffn_up": "ffn_gate"}
"""Whose order a matrix has."""


def write_model(source: SourceTree, path: Path, tensors: dict[str, tuple[Array, int]]) -> Path:
    """Write a Llama of one block: bytes or numbers by the tensor's name, with their `ggml_type`."""
    arrays = path.with_suffix(".npz")
    np.savez(arrays, **{name: array for name, (array, _) in tensors.items()})
    code = """
import json, sys, numpy as np, gguf
path, arrays, types = sys.argv[1], np.load(sys.argv[2]), json.loads(sys.argv[3])
writer = gguf.GGUFWriter(path, "llama")
writer.add_context_length(64)
writer.add_embedding_length(WIDTH)
writer.add_block_count(1)
writer.add_feed_forward_length(INNER)
writer.add_head_count(4)
writer.add_head_count_kv(2)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_rope_dimension_count(WIDTH // 4)
writer.add_vocab_size(VOCABULARY)
writer.add_tokenizer_model("none")
for name, type in types.items():
    writer.add_tensor(name, arrays[name], raw_dtype=gguf.GGMLQuantizationType(type))
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
"""
    for name, value in (("WIDTH", WIDTH), ("INNER", INNER), ("VOCABULARY", VOCABULARY)):
        code = code.replace(name, str(value))
    types = json.dumps({name: type for name, (_, type) in tensors.items()})
    command = [sys.executable, "-c", code, str(path), str(arrays), types]
    subprocess.run(command, env={"PYTHONPATH": str(source.gguf_py)}, check=True)
    return path


def model_tensors(seed: int) -> tuple[dict[str, tuple[Array, int]], dict[str, tuple[Array, int]]]:
    """The tensors of a model in PTQ1_61 with orders, and of the same model in float32 without."""
    rng = np.random.default_rng(seed)
    common: dict[str, tuple[Array, int]] = {}
    for name in ("token_embd", "output"):
        common[f"{name}.weight"] = (rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32), 0)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        common[f"{name}.weight"] = (np.ones(WIDTH, np.float32), 0)
    packed, plain = dict(common), dict(common)
    orders = {name: rng.permutation(shape[1]).astype(np.int32) for name, shape in SHAPES.items() if name not in SHARED}
    for name, order in orders.items():
        packed[f"blk.0.{name}.order"] = (order, 26)
    for name, shape in SHAPES.items():
        arrays = ptq161.quantize((rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32))
        weights = np.empty(shape, np.float32)
        weights[:, orders[SHARED.get(name, name)]] = PACKER.dequantize(arrays)
        packed[f"blk.0.{name}.weight"] = (PACKER.pack(arrays), 505)
        plain[f"blk.0.{name}.weight"] = (weights, 0)
    return packed, plain


def logits(model: Path, tokens: list[int], repack: bool = True) -> Array:
    """Answers of the runtime, float32 [tokens, vocabulary], in a process of its own."""
    code = """
import sys, json, numpy as np
from tesseraq_gguf.runtime.load import load_llama_cpp
llama_cpp = load_llama_cpp()
llama_cpp.llama_backend_init()
params = llama_cpp.llama_model_default_params()
params.use_extra_bufts = json.loads(sys.argv[2])
model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), params)
if not model:
    sys.exit(3)
settings = llama_cpp.llama_context_default_params()
settings.n_ctx, settings.n_batch, settings.n_threads, settings.n_threads_batch = 64, 64, 2, 2
context = llama_cpp.llama_init_from_model(model, settings)
tokens = json.loads(sys.argv[3])
rows = []
for first, last in ((0, len(tokens) - 2), (len(tokens) - 2, len(tokens) - 1), (len(tokens) - 1, len(tokens))):
    batch = llama_cpp.llama_batch_init(64, 0, 1)
    batch.n_tokens = last - first
    for i in range(last - first):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = tokens[first + i], first + i, 1, 1
        batch.seq_id[i][0] = 0
    assert llama_cpp.llama_decode(context, batch) == 0
    for i in range(last - first):
        rows.append(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (VOCABULARY,)).copy())
np.save(sys.argv[4], np.stack(rows))
""".replace("VOCABULARY", str(VOCABULARY))
    out = model.with_suffix(".npy")
    command = [sys.executable, "-c", code, str(model), json.dumps(repack), json.dumps(tokens), str(out)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr[-3000:])
    return np.load(out)


def nmse(got: Array, expected: Array) -> float:
    """Mean squared error, relative to the mean square."""
    return float(((got - expected) ** 2).mean() / (expected**2).mean())


@pytest.mark.runtime
def test_a_model_in_an_order_answers_as_in_the_natural_one(
    runtime: Runtime, source: SourceTree, tmp_path: Path
) -> None:
    packed, plain = model_tensors(0)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, 21).tolist()
    expected = logits(write_model(source, tmp_path / "plain.gguf", plain), tokens)
    model = write_model(source, tmp_path / "packed.gguf", packed)
    for repack in (True, False):
        assert nmse(logits(model, tokens, repack), expected) < 1e-3
    # every order is used: without it, and with it where it does not belong, the answers are others
    for name in ("attn_q", "attn_output", "ffn_gate", "ffn_down"):
        others = {key: value for key, value in packed.items() if key != f"blk.0.{name}.order"}
        assert nmse(logits(write_model(source, tmp_path / "other.gguf", others), tokens), expected) > 1e-2, name
    # a matrix's own order comes before the one that it would share
    own = np.arange(WIDTH, dtype=np.int32)
    model = write_model(source, tmp_path / "own.gguf", packed | {"blk.0.attn_k.order": (own, 26)})
    assert nmse(logits(model, tokens), expected) > 1e-2


@pytest.mark.runtime
@pytest.mark.parametrize(
    ("order", "says"),
    [
        (np.arange(1, WIDTH + 1, dtype=np.int32), "is no permutation of 0 to 255"),
        (np.arange(-1, WIDTH - 1, dtype=np.int32), "is no permutation of 0 to 255"),
        (np.zeros(WIDTH, np.int32), "is no permutation of 0 to 255"),
        (np.arange(WIDTH // 2, dtype=np.int32), "is no order of the columns of 'blk.0.attn_q.weight'"),
        (np.arange(WIDTH, dtype=np.float32), "is no order of columns: its type is f32"),
    ],
)
def test_what_is_no_order_is_refused(
    runtime: Runtime, source: SourceTree, tmp_path: Path, order: Array, says: str
) -> None:
    packed, _ = model_tensors(0)
    packed["blk.0.attn_q.order"] = (order, 26 if order.dtype == np.int32 else 0)
    with pytest.raises(RuntimeError, match=f"tensor 'blk.0.attn_q.order' {says}"):
        logits(write_model(source, tmp_path / "bad.gguf", packed), [1, 2, 3])
