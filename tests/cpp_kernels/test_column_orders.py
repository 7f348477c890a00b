"""Orders of columns: answers of a model in PTQ1_61, and what the runtime's other tools make of such a file."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.gguf_files.inspection import inspect
from tesseraq_gguf.runtime import Runtime, SourceTree
from tesseraq_gguf.types.ptq161 import packer as ptq161

from .conftest import pointer
from .llamas import (
    F32,
    I32,
    LETTERS,
    PACKER,
    SHAPES,
    VOCABULARY,
    WIDTH,
    Array,
    logits,
    model_tensors,
    nmse,
    save,
    write_model,
)

pytestmark = pytest.mark.runtime

TOKENS = np.random.default_rng(1).integers(0, VOCABULARY, 21).tolist()


def test_a_model_in_an_order_answers_as_in_the_natural_one(
    runtime: Runtime, source: SourceTree, tmp_path: Path
) -> None:
    packed, plain = model_tensors(0)
    expected = logits(write_model(source, tmp_path / "plain.gguf", plain), TOKENS)
    model = write_model(source, tmp_path / "packed.gguf", packed)
    for repack in (True, False):
        assert nmse(logits(model, TOKENS, repack), expected) < 1e-3
    # every order is used: without it, and with it where it does not belong, the answers are others
    for name in ("attn_q", "attn_output", "ffn_gate", "ffn_down"):
        others = {key: value for key, value in packed.items() if key != f"blk.0.{name}.order"}
        assert nmse(logits(write_model(source, tmp_path / "other.gguf", others), TOKENS), expected) > 1e-2, name
    # a matrix's own order comes before the one that it would share
    own = np.arange(WIDTH, dtype=np.int32)
    model = write_model(source, tmp_path / "own.gguf", packed | {"blk.0.attn_k.order": (own, I32)})
    assert nmse(logits(model, TOKENS), expected) > 1e-2


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
    packed["blk.0.attn_q.order"] = (order, I32 if order.dtype == np.int32 else F32)
    with pytest.raises(RuntimeError, match=f"tensor 'blk.0.attn_q.order' {says}"):
        logits(write_model(source, tmp_path / "bad.gguf", packed), [1, 2, 3])


def test_a_matrix_that_lost_its_order_is_refused(runtime: Runtime, source: SourceTree, tmp_path: Path) -> None:
    """As older programs wrote it: other types, and the orders still there. Nothing says that it runs anywhere."""
    packed, plain = model_tensors(0)
    broken = packed | plain
    model = write_model(source, tmp_path / "broken.gguf", broken)
    says = "was written by a program that does not know orders of columns, and is broken"
    with pytest.raises(RuntimeError, match=says):
        logits(model, TOKENS)
    answer = quantize(runtime, model, tmp_path / "again.gguf", "F16")
    assert answer.returncode != 0
    assert says in answer.stderr + answer.stdout
    seen = inspect(model)
    assert seen.runs_on.startswith("nothing: columns of blk.0.attn_q.weight, … have an order that their type does not")
    assert seen.needs_runtime is False
    # an order that some matrix still has is no fault
    mixed = packed | {name: plain[name] for name in ("blk.0.attn_q.weight",)}
    assert (
        nmse(
            logits(write_model(source, tmp_path / "mixed.gguf", mixed), TOKENS),
            logits(write_model(source, tmp_path / "plain.gguf", plain), TOKENS),
        )
        < 1e-3
    )
    assert "tesseraq-gguf runtime only" in inspect(tmp_path / "mixed.gguf").runs_on


def quantize(runtime: Runtime, model: Path, out: Path, type: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run llama-quantize; embedding and head stay float32."""
    keep = ["--output-tensor-type", "f32", "--token-embedding-type", "f32"]
    command = [
        str(runtime.tool("llama-quantize")),
        "--allow-requantize",
        *keep,
        *options,
        str(model),
        str(out),
        type,
        "1",
    ]
    return subprocess.run(command, capture_output=True, text=True)


def arrays(model: Path) -> dict[str, Array]:
    """The tensors of a file as they are stored, numbers as such, rows before columns."""
    file = open_gguf(model)
    dtypes = {"f32": np.float32, "i32": np.int32, "i64": np.int64}
    return {
        tensor.name: np.frombuffer(file.data(tensor).tobytes(), dtypes.get(tensor.type, np.uint8)).reshape(
            *reversed(tensor.shape[1:]), -1
        )
        for tensor in file.tensors
    }


def test_quantizing_gives_columns_their_places_back(runtime: Runtime, source: SourceTree, tmp_path: Path) -> None:
    packed, plain = model_tensors(0)
    model = write_model(source, tmp_path / "packed.gguf", packed)
    out = tmp_path / "f32.gguf"
    answer = quantize(runtime, model, out, "F32")
    assert answer.returncode == 0, answer.stderr
    found = arrays(out)
    assert set(found) == set(plain)
    for name, (expected, _) in plain.items():
        assert (found[name].reshape(expected.shape) == expected).all(), name
    assert inspect(out).runs_on == "any llama.cpp"

    # another of our types, whose answers are near enough to tell a wrong order
    expected = logits(out, TOKENS)
    assert quantize(runtime, model, tmp_path / "tsq4.gguf", "TSQ4").returncode == 0
    assert nmse(logits(tmp_path / "tsq4.gguf", TOKENS), expected) < 0.05


def test_quantizing_keeps_orders_that_are_in_use(runtime: Runtime, source: SourceTree, tmp_path: Path) -> None:
    """What stays PTQ1_61 keeps its order, though the matrix that it shares it with has none; and back again."""
    packed, plain = model_tensors(0)
    model = write_model(source, tmp_path / "packed.gguf", packed)
    expected = logits(write_model(source, tmp_path / "plain.gguf", plain), TOKENS)

    copy = tmp_path / "copy.gguf"
    assert quantize(runtime, model, copy, "PTQ1_61").returncode == 0
    for name, value in arrays(model).items():
        assert (arrays(copy)[name] == value).all(), name

    mixed = tmp_path / "mixed.gguf"
    options = ["--tensor-type", "attn_q=q8_0", "--tensor-type", "ffn_down=q8_0"]
    assert quantize(runtime, model, mixed, "PTQ1_61", *options).returncode == 0
    names = set(arrays(mixed))
    assert "blk.0.attn_q.order" in names
    assert "blk.0.ffn_down.order" not in names
    assert nmse(logits(mixed, TOKENS), expected) < 1e-3

    # attn_q becomes PTQ1_61 in the order that the file still has for attn_k
    back = tmp_path / "back.gguf"
    assert quantize(runtime, mixed, back, "PTQ1_61", "--tensor-type", "ffn_down=f32").returncode == 0
    order = arrays(back)["blk.0.attn_q.order"].ravel()
    found = PACKER.dequantize(PACKER.unpack(arrays(back)["blk.0.attn_q.weight"]))
    natural = np.empty_like(found)
    natural[:, order] = found
    weights = plain["blk.0.attn_q.weight"][0]
    assert nmse(natural, weights) < 1e-3
    assert nmse(found, weights) > 0.5


def test_importances_are_those_of_inputs(
    runtime: Runtime, source: SourceTree, ggml: ctypes.CDLL, tmp_path: Path
) -> None:
    """llama-imatrix writes what it writes of the model without orders; llama-quantize knows whose they are."""
    packed, plain = model_tensors(0)
    # of different sizes, so that places differ
    for tensors in (packed, plain):
        tensors["token_embd.weight"] = (
            tensors["token_embd.weight"][0] * np.linspace(0.1, 3, WIDTH, dtype=np.float32),
            F32,
        )
    text = tmp_path / "text.txt"
    text.write_text("".join(np.random.default_rng(2).choice(list(LETTERS), 200)))
    seen: dict[str, dict[str, Array]] = {}
    for name, tensors in (("packed", packed), ("plain", plain)):
        model, out = write_model(source, tmp_path / f"{name}.gguf", tensors), tmp_path / f"{name}.imatrix.gguf"
        command = [str(runtime.tool("llama-imatrix")), "-m", str(model), "-f", str(text), "-o", str(out)]
        answer = subprocess.run([*command, "-c", "64", "--chunks", "2", "-t", "1"], capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
        seen[name] = arrays(out)
    for name in SHAPES:
        key = f"blk.0.{name}.weight.in_sum2"
        found, expected = seen["packed"][key].ravel(), seen["plain"][key].ravel()
        assert np.corrcoef(found, expected)[0, 1] > 0.99, name
    exact = seen["packed"]["blk.0.attn_q.weight.in_sum2"].ravel()
    np.testing.assert_allclose(exact, seen["plain"]["blk.0.attn_q.weight.in_sum2"].ravel(), rtol=1e-4)

    # a matrix that gets an order by llama-quantize gets its importance in that order
    weights = np.random.default_rng(3).standard_normal((WIDTH, WIDTH)).astype(np.float32)
    mixed = write_model(source, tmp_path / "mixed.gguf", packed | {"blk.0.attn_q.weight": (weights, F32)})
    out = tmp_path / "out.gguf"
    assert quantize(runtime, mixed, out, "PTQ1_61", "--imatrix", str(tmp_path / "packed.imatrix.gguf")).returncode == 0
    order = arrays(out)["blk.0.attn_q.order"].ravel()
    importance = (exact / seen["packed"]["blk.0.attn_q.weight.counts"].ravel()).astype(np.float32)[order]
    x = np.ascontiguousarray(weights[:, order])
    expected = np.empty((WIDTH, WIDTH // 128 * 27), np.uint8)
    ggml.quantize_ptq1_61.restype = ctypes.c_size_t
    sizes = (ctypes.c_int64(WIDTH), ctypes.c_int64(WIDTH))
    ggml.quantize_ptq1_61(pointer(x), pointer(expected), *sizes, pointer(np.ascontiguousarray(importance)))
    assert (arrays(out)["blk.0.attn_q.weight"] == expected).mean() > 0.999
    assert (PACKER.pack(ptq161.quantize(x)) != expected).any()


def test_a_copy_of_a_loaded_model_has_its_orders(runtime: Runtime, source: SourceTree, tmp_path: Path) -> None:
    packed, _ = model_tensors(0)
    model, copy = write_model(source, tmp_path / "packed.gguf", packed), tmp_path / "copy.gguf"
    save(model, copy)
    found = arrays(copy)
    for name, value in arrays(model).items():
        assert (found[name] == value).all(), name
    assert (logits(copy, TOKENS) == logits(model, TOKENS)).all()
