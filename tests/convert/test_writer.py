"""The file holds what was learned: compared with what llama.cpp's own converter makes of the dequantised weights."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import psutil
import pytest
import split_files
import torch
from safetensors.torch import load_file, save_file
from saved_logits import answered, logit_error, saved_logits

from tesseraq_gguf.converter import nursery, writer
from tesseraq_gguf.converter.writer import (
    Contents,
    Metadata,
    WrittenFile,
    check_output,
    check_source,
    write_gguf,
    write_plain,
)
from tesseraq_gguf.errors import ConversionError, ModelError, UsageError, VerificationError
from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.gguf_files.parts import part_name, parts_of
from tesseraq_gguf.models import Decoder, ModelSource
from tesseraq_gguf.models.experts import aliases, stack_of
from tesseraq_gguf.runtime import ensure_source
from tesseraq_gguf.runtime.progress import SilentReporter
from tesseraq_gguf.types.grids import grid_of
from tesseraq_gguf.types.packers import packer_of
from tesseraq_gguf.types.quantized import load_tensors, save_tensors

KINDS = [
    "llama",
    "llama-576",
    "llama-odd",
    "llama-odder",
    "llama-bias",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi-fused",
    "mixtral",
]


def _weights(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file as float32 in torch's order, by the simplest reader there is."""
    file = open_gguf(path)
    found = {}
    for tensor in file.tensors:
        data = np.ascontiguousarray(file.data(tensor))
        if tensor.type == "tsq2":
            packer = packer_of("tsq2")
            values = packer.dequantize(packer.unpack(data))
        else:
            values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(tensor.type_id))
        found[tensor.name] = values.reshape(tuple(reversed(tensor.shape)))
    return found


def _digests(folder: Path) -> dict[str, str]:
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*")) if f.is_file()}


def _stock_conversions(jobs: list[tuple[Path, str, Path]]) -> None:
    """Convert folders with llama.cpp's script, as a user would, but all in one process: importing it takes its time."""
    tree = ensure_source()
    code = (
        "import json, sys\n"
        "from convert_hf_to_gguf import main\n"
        "for folder, kind, out in json.loads(sys.stdin.read()):\n"
        "    sys.argv = ['convert', folder, '--outtype', kind, '--outfile', out]\n"
        "    main()\n"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([[str(folder), kind, str(out)] for folder, kind, out in jobs]),
        env=os.environ | {"PYTHONPATH": str(tree.llama_cpp)},
        check=True,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def stock(make_model, learn, tmp_path_factory) -> dict[str, Path]:
    """The dequantised weights of every kind in f32, converted by llama.cpp alone: nothing of ours is on this road."""
    jobs = []
    for kind in KINDS:
        source, folder = make_model(kind), tmp_path_factory.mktemp("stock") / kind
        shutil.copytree(source.folder, folder)
        learned = {
            alias: grid_of(t.type).dequantize(t)
            for block in learn(source)
            for name, t in load_tensors(block)[0].items()
            for alias in aliases(name)
        }
        for file in folder.glob("*.safetensors"):
            tensors = {name: learned.get(name, t.float()) for name, t in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt"})
        jobs.append((folder, "f32", folder.parent / f"{kind}.gguf"))
    _stock_conversions(jobs)
    return {folder.name: out for folder, _, out in jobs}


class Told(SilentReporter):
    """Keeps notes, and steps."""

    def __init__(self, notes: list[str], steps: list[tuple[int, int]] | None = None) -> None:
        self.notes, self.steps = notes, [] if steps is None else steps

    def note(self, text: str) -> None:
        self.notes.append(text)

    def advance(self, done: int, total: int) -> None:
        self.steps.append((done, total))


@pytest.fixture(scope="module")
def write(make_model, learn, tmp_path_factory):
    """Return what `write_gguf` made of a kind with its notes and steps, made once; not to be changed."""
    made: dict[str, tuple[WrittenFile, list[str], list[tuple[int, int]]]] = {}

    def make(kind: str) -> tuple[WrittenFile, list[str], list[tuple[int, int]]]:
        if kind not in made:
            notes: list[str] = []
            steps: list[tuple[int, int]] = []
            out = tmp_path_factory.mktemp(kind) / "out.gguf"
            metadata: Metadata = {"tesseraq.method": "random", "tesseraq.recipe": '{"seed": 1}', "tesseraq.seed": 1}
            source = make_model(kind)
            contents = Contents(learn(source), metadata=metadata)
            made[kind] = (write_gguf(source, out, contents, Told(notes, steps)), notes, steps)
        return made[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_equals_the_stock_conversion_of_the_dequantised_weights(kind, make_model, learn, write, stock):
    source = make_model(kind)
    blocks = learn(source)
    before = _digests(source.folder)
    written, notes, steps = write(kind)
    assert _digests(source.folder) == before, "the input was touched"
    assert list(written.path.parent.iterdir()) == [written.path]
    assert steps[-1][0] == steps[-1][1]

    ours, theirs = _weights(written.path), _weights(stock[kind])
    assert set(ours) == set(theirs)
    file, reference = open_gguf(written.path), open_gguf(stock[kind])
    types = {t.name: t.type for t in file.tensors}
    # the experts' matrices are layers of stacks
    learned_count = len({stack_of(name) or name for b in blocks for name in load_tensors(b)[0]})
    assert written.verified == list(types.values()).count("tsq2") == learned_count
    for name, values in theirs.items():
        if types[name] in ("tsq2", "f32"):
            np.testing.assert_array_equal(ours[name].view(np.uint32), values.view(np.uint32), err_msg=name)
        else:
            want = gguf.quants.quantize(values, gguf.GGMLQuantizationType[types[name].upper()])
            want = gguf.quants.dequantize(want, gguf.GGMLQuantizationType[types[name].upper()])
            np.testing.assert_array_equal(ours[name], want, err_msg=name)
        if values.ndim == 1 or name.endswith("_norm.weight"):
            assert types[name] == "f32", name
    assert types["token_embd.weight"] == "q8_0"

    # metadata: as the stock converter has it, and ours
    differing = {"general.file_type", "general.name", "general.basename", "general.finetune"}
    for key, entry in reference.entries.items():
        if key not in differing:
            assert file.entries[key].raw == entry.raw, key
    assert file.get("general.file_type") == 500
    assert file.get("tesseraq.format_version") == 1
    assert file.get("tesseraq.method") == "random"
    assert json.loads(file.get("tesseraq.recipe")) == {"seed": 1}
    assert "runtime build" in file.get("tesseraq.runtime")
    assert file.get("general.name") == kind

    down = types["blk.0.ffn_down_exps.weight" if kind == "mixtral" else "blk.0.ffn_down.weight"]
    assert down == {"llama-odd": "q8_0", "llama-odder": "f16"}.get(kind, "tsq2")
    if down != "tsq2":
        columns = {"llama-odd": 160, "llama-odder": 100}[kind]
        assert notes == [f"ffn_down of 2 blocks, in rows of {columns} weights, is {down}: not learned"]
    else:
        assert notes == []


@pytest.mark.runtime
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_loads_what_was_written_and_computes_what_transformers_does(kind, make_model, learn, write, tmp_path):
    from transformers import AutoModelForCausalLM

    source = make_model(kind)
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog while seven wizards box with a jolly gnome. " * 40)
    # llama.cpp has no windows in Mistral: beyond one it computes something else
    tokens, got, _ = saved_logits(write(kind)[0].path, text, 64 if kind == "mistral" else 128, 1)
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    own = {n: t for block in learn(source) for n, t in load_tensors(block)[0].items()}
    before = _logits(model, tokens)
    learned = {n: grid_of(t.type).dequantize(t) for n, t in own.items()}
    _give(model, learned)
    expected = _logits(model, tokens)
    assert logit_error(got, expected) < 2e-3
    assert logit_error(before, expected) > 0.1  # so what was learned is seen in what is compared


def _logits(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return answered(model(tokens).logits)


def _give(model, matrices: dict[str, torch.Tensor]) -> None:
    """Give a transformers model matrices by checkpoint name; those of experts go into its stacks."""
    model.load_state_dict({n: w for n, w in matrices.items() if stack_of(n) is None}, strict=False)
    for name, weight in matrices.items():
        if stack_of(name):
            before, _, after = name.partition(".experts.")
            number, which, _ = after.split(".")
            experts, half = model.get_submodule(f"{before}.experts"), len(weight)
            if which == "w2":
                experts.down_proj.data[int(number)] = weight
            else:
                start = 0 if which == "w1" else half
                experts.gate_up_proj.data[int(number), start : start + half] = weight


def test_plain_types_equal_the_stock_conversion(make_model, tmp_path):
    source = make_model("llama")
    types = ("f32", "f16", "bf16", "q8_0")
    _stock_conversions([(source.folder, kind, tmp_path / f"stock-{kind}.gguf") for kind in types])
    for kind in types:
        ours = open_gguf(write_plain(source, tmp_path / f"{kind}.gguf", kind).path)
        theirs = open_gguf(tmp_path / f"stock-{kind}.gguf")
        assert [(t.name, t.type, t.shape) for t in ours.tensors] == [(t.name, t.type, t.shape) for t in theirs.tensors]
        for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
            assert np.array_equal(ours.data(mine), theirs.data(other)), mine.name
        assert {key: e.raw for key, e in ours.entries.items()} == {
            key: e.raw for key, e in theirs.entries.items() if key != "general.name"
        } | {"general.name": ours.entries["general.name"].raw}


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen3", "mixtral"])
def test_a_model_from_a_gguf_file_keeps_its_metadata_and_tensors(kind, make_model, learn, write, tmp_path):
    folder_source = make_model(kind)
    more = Contents(metadata={"quantize.imatrix.file": "x", "own.key": 2.5})
    original = write_plain(folder_source, tmp_path / "original.gguf", "f16", more).path
    before = original.read_bytes()
    # the folder that would be made of its header is already at hand
    source = ModelSource(kind, folder_source.folder, gguf=original)
    written = write_gguf(
        source, tmp_path / "out.gguf", Contents(learn(folder_source), metadata={"tesseraq.method": "random"})
    )
    direct = write(kind)[0]
    assert original.read_bytes() == before
    ours, first = open_gguf(written.path), open_gguf(original)
    for key, entry in first.entries.items():
        if key.startswith("quantize.imatrix."):
            assert key not in ours.entries
        elif key not in ("general.file_type", "general.quantization_version"):
            assert ours.entries[key].raw == entry.raw, key
    assert ours.get("own.key") == 2.5
    assert ours.get("general.file_type") == 500
    assert [t.name for t in ours.tensors] == [t.name for t in first.tensors]
    got, want = _weights(written.path), _weights(direct.path)
    for name, values in want.items():
        if name not in ("token_embd.weight", "output.weight"):  # 16 bits on the way
            np.testing.assert_array_equal(got[name], values, err_msg=name)
    again = write_plain(source, tmp_path / "again.gguf", "f16").path
    for mine, other in zip(open_gguf(again).tensors, first.tensors, strict=True):
        assert np.array_equal(open_gguf(again).data(mine), first.data(other)), mine.name


def test_a_tensor_that_llama_cpp_has_no_place_for_is_named(make_model, tmp_path):
    folder = tmp_path / "llama"
    shutil.copytree(make_model("llama").folder, folder)
    tensors = {"model.layers.0.odd.weight": torch.zeros(8, 8)}
    for file in folder.glob("model*"):
        tensors |= load_file(file) if file.suffix == ".safetensors" else {}
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no place for model\.layers\.0\.odd\.weight .*: save the model without"):
        write_plain(ModelSource("odd", folder), tmp_path / "odd.gguf", "f16")


def test_a_hub_snapshot_is_called_by_its_model_and_not_by_its_commit(make_model, tmp_path):
    snapshot = tmp_path / ("0123456789abcdef" * 3)[:40]
    shutil.copytree(make_model("llama").folder, snapshot)
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
    out = write_plain(ModelSource("Someone/Tiny-Instruct", snapshot), tmp_path / "out.gguf", "f16").path
    file = open_gguf(out)
    keys = ("name", "basename", "finetune", "license")
    assert [file.get(f"general.{key}") for key in keys] == ["Tiny-Instruct", "Tiny", "Instruct", "mit"]


def test_only_some_matrices_learned(make_model, learn, tmp_path):
    source = make_model("llama")
    notes: list[str] = []
    written = write_gguf(source, tmp_path / "out.gguf", Contents(learn(source)[:1], fallback_type="bf16"), Told(notes))
    types = {t.name: t.type for t in open_gguf(written.path).tensors}
    assert types["blk.0.attn_q.weight"] == "tsq2"
    assert types["blk.1.attn_q.weight"] == "bf16"
    assert "attn_q of 1 block, in rows of 128 weights, is bf16: not learned" in notes


def test_check_source_finds_nothing_wrong_and_what_is_wrong(make_model, tmp_path):
    source = make_model("llama")
    shapes = Decoder(source, torch.device("cpu")).matrix_shapes()
    assert check_source(source, shapes).dropped == {}
    strange = {"model.layers.0.self_attn.q_proj.weight": (128, 128), "model.layers.0.mixer.weight": (64, 64)}
    assert check_source(source, strange).dropped == {
        "model.layers.0.mixer.weight": "llama.cpp's converter does not know it",
    }
    unknown = tmp_path / "unknown"
    shutil.copytree(source.folder, unknown)
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps(config | {"architectures": ["NobodyForCausalLM"]}))
    with pytest.raises(ModelError, match=r"llama\.cpp does not know the architecture NobodyForCausalLM"):
        check_source(ModelSource("unknown", unknown), shapes)
    (unknown / "config.json").write_text(json.dumps(config))
    (unknown / "tokenizer.model").unlink()
    with pytest.raises(ModelError, match="there is no tokenizer in its folder"):
        check_source(ModelSource("unknown", unknown), shapes)


def test_a_file_that_the_converter_misses_is_named(make_model, tmp_path):
    source = make_model("gemma2")
    shutil.copytree(source.folder, tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer.model"))
    with pytest.raises(ModelError, match=r"needs a file that is not there: .*tokenizer\.model"):
        check_source(ModelSource("m", tmp_path / "m"), Decoder(source, torch.device("cpu")).matrix_shapes())


def test_the_process_keeps_its_own_gguf(make_model, learn, tmp_path):
    before = set(sys.modules)
    types = len(gguf.GGMLQuantizationType)
    write_gguf(make_model("llama"), tmp_path / "out.gguf", Contents(learn(make_model("llama"))))
    assert "conversion" not in set(sys.modules) - before
    assert len(gguf.GGMLQuantizationType) == types


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs file size limits")
def test_a_full_disk_is_one_line_and_leaves_nothing(make_model, learn, tmp_path):
    source, out = make_model("llama-576"), tmp_path / "out.gguf"
    blocks = learn(source)
    out.write_bytes(b"GGUF old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(ConversionError, match="cannot be written") as caught:
            write_gguf(source, out, Contents(blocks))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert caught.value.log == ""  # nothing for the command line to print before that line
    assert out.read_bytes() == b"GGUF old"
    assert list(tmp_path.iterdir()) == [out]


def test_too_little_space_is_known_before_writing(make_model, tmp_path, monkeypatch):
    from tesseraq_gguf.converter import worker

    class Usage:
        free = 10

    monkeypatch.setattr(worker.shutil, "disk_usage", lambda _: Usage)

    class Writer:
        tensors = ({"a": type("Info", (), {"nbytes": 5_000_000})},)

    with pytest.raises(ConversionError, match=r"needs [\d,]{9} bytes, and [\d,]+ are free on the disk .*: make room"):
        worker._write_file(Writer(), tmp_path / "out.gguf", lambda _: None)


def test_a_wrong_byte_is_found(make_model, learn, tmp_path):
    from tesseraq_gguf.converter.verify import Expected, verify

    source = make_model("llama")
    blocks = learn(source)
    written = write_gguf(source, tmp_path / "out.gguf", Contents(blocks))
    name = "model.layers.0.mlp.up_proj.weight"
    tensor = load_tensors(blocks[0])[0][name]
    expected = Expected("blk.0.ffn_up.weight", "tsq2", grid_of("tsq2").dequantize(tensor).numpy())
    assert verify(written.path, [expected]) == 1
    info = next(t for t in open_gguf(written.path).tensors if t.name == expected.name)
    data = bytearray(written.path.read_bytes())
    data[info.offset + info.bytes - 1] ^= 64
    written.path.write_bytes(data)
    with pytest.raises(VerificationError, match=r"blk\.0\.ffn_up\.weight .* 1 of 192 rows, first in row 191"):
        verify(written.path, [expected])
    with pytest.raises(VerificationError, match="not in the file"):
        verify(written.path, [Expected("blk.9.ffn_up.weight", "tsq2", expected.weights)])
    with pytest.raises(VerificationError, match="learned was tsq2"):
        verify(written.path, [Expected("blk.0.attn_norm.weight", "tsq2", expected.weights)])


def test_broken_block_files(make_model, learn, tmp_path):
    source = make_model("llama")
    blocks = learn(source)
    with pytest.raises(UsageError, match="nothing was learned"):
        write_gguf(source, tmp_path / "out.gguf", Contents([]))
    with pytest.raises(ConversionError, match="learned twice"):
        write_gguf(source, tmp_path / "out.gguf", Contents([blocks[0], blocks[0]]))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(blocks[0].read_bytes()[:1000])
    with pytest.raises(ConversionError, match="cannot be read as learned tensors"):
        write_gguf(source, tmp_path / "out.gguf", Contents([broken]))
    tensors, _ = load_tensors(blocks[0])
    save_tensors(broken, {name.replace("layers.0", "layers.7"): t for name, t in tensors.items()})
    with pytest.raises(ConversionError, match="none of the learned matrices can be written"):
        write_gguf(source, tmp_path / "out.gguf", Contents([broken]))
    with pytest.raises(UsageError, match="'tsq2' can only be learned"):
        write_gguf(source, tmp_path / "out.gguf", Contents(blocks, fallback_type="tsq2"))
    with pytest.raises(UsageError, match=r"'q2_k' can only be learned; .* choose one of f32, f16, bf16, q8_0"):
        write_plain(source, tmp_path / "out.gguf", "q2_k")
    assert list(tmp_path.iterdir()) == [broken]


@pytest.mark.parametrize("forks", [True, False])
def test_interrupting_ends_the_child_and_leaves_nothing(forks, make_model, learn, tmp_path, monkeypatch):
    source, before = make_model("llama"), set(psutil.Process().children(recursive=True))
    monkeypatch.setattr(nursery, "_can_fork", lambda: forks and hasattr(os, "pidfd_open"))
    children: list[psutil.Process] = []

    class Interrupting(SilentReporter):
        def advance(self, done: int, total: int) -> None:
            running = set(psutil.Process().children(recursive=True)) - before
            children.extend(running)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(source, tmp_path / "out.gguf", Contents(learn(source)), Interrupting())
    kept = [kept.process.pid for kept in nursery._kept]
    assert children and not any(child.is_running() for child in children if child.pid not in kept)
    assert list(tmp_path.iterdir()) == []


def test_the_child_ends_with_its_parent(make_model, learn, tmp_path):
    job: dict[str, object] = {
        "task": "write", "name": "m", "folder": str(make_model("llama").folder), "gguf": None, "metadata": {},
        "out": str(tmp_path / "out.gguf"), "learned": [str(f) for f in learn(make_model("llama"))],
        "type": "q8_0", "types": {}, "part_bytes": None,
        "scratch": str(tmp_path), "llama_cpp": str(ensure_source().llama_cpp), "gguf_py": str(ensure_source().gguf_py),
    }  # fmt: skip
    (tmp_path / "job").write_text(json.dumps(job))
    command = [sys.executable, "-m", "tesseraq_gguf.converter.worker", str(tmp_path / "job")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        time.sleep(0.2)
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(60) == 1
    assert not (tmp_path / "out.gguf").exists()


def test_outputs_that_cannot_be(tiny_gguf, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="is a folder"):
        check_output(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        check_output(tmp_path / "no" / "out.gguf")
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(UsageError, match="not a GGUF file"):
        check_output(notes)
    with pytest.raises(UsageError, match="not a plain file"):
        check_output(Path(os.devnull))
    model = tmp_path / "model.gguf"
    model.write_bytes(tiny_gguf.read_bytes())
    with pytest.raises(UsageError, match="is the model itself"):
        check_output(model, ModelSource("m", tmp_path, gguf=model))
    check_output(model)
    check_output(tmp_path / "new.gguf")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.gguf", "notes.txt"]

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(writer.tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(UsageError, match="cannot be written: Permission denied"):
        check_output(tmp_path / "new.gguf")


def test_a_file_in_parts_holds_what_the_whole_one_does(make_model, learn, tmp_path):
    """Parts are read by gguf's own reader, and the model as llama-gguf-split joins them."""
    source, most = make_model("llama"), 60_000
    contents = Contents(learn(source), metadata={"tesseraq.method": "random"})
    whole = open_gguf(write_gguf(source, tmp_path / "whole.gguf", contents).path)
    (tmp_path / "out-00001-of-00002.gguf").write_bytes(b"GGUF of yesterday")
    written = write_gguf(source, tmp_path / "out.gguf", replace(contents, part_bytes=most))
    parts = [path for path in parts_of(tmp_path / "out.gguf") if path.stat().st_size > 100]
    assert written.path == parts[0]
    assert written.bytes == sum(part.stat().st_size for part in parts)
    assert len(parts) > 3
    assert [part.name for part in parts] == [part_name("out", index, len(parts)) for index in range(len(parts))]
    found = open_gguf(written.path)
    assert found.parts == tuple(parts)
    own = {"split.no", "split.count", "split.tensors.count"}
    assert found.entries.keys() - whole.entries.keys() == own
    assert all(found.entries[key].raw == entry.raw for key, entry in whole.entries.items())
    assert [t.name for t in found.tensors] == [t.name for t in whole.tensors]
    assert all(np.array_equal(found.data(a), whole.data(b)) for a, b in zip(found.tensors, whole.tensors, strict=True))
    for index, part in enumerate(parts):
        of_part = [tensor for tensor in found.tensors if tensor.part == index]
        assert part.stat().st_size <= most or len(of_part) == (1 if index else 0)


def test_a_file_that_fits_is_in_one_part(make_model, tmp_path):
    source = make_model("llama")
    plain = write_plain(source, tmp_path / "plain.gguf", "f16").path
    fits = write_plain(source, tmp_path / "fits.gguf", "f16", Contents(part_bytes=plain.stat().st_size + 1000)).path
    assert fits == tmp_path / "fits.gguf"
    assert fits.read_bytes() == plain.read_bytes()
    notes: list[str] = []
    one = write_plain(source, tmp_path / "one.gguf", "f16", Contents(part_bytes=1), Told(notes))
    assert len(open_gguf(one.path).parts) == 1 + len(open_gguf(plain).tensors)
    assert any("metadata alone" in note for note in notes)
    assert any("has its own file" in note for note in notes)
    keys = [
        {key for key in gguf.GGUFReader(part).fields if not key.startswith("GGUF.")}
        for part in open_gguf(one.path).parts
    ]
    assert all(of_part == {"split.no", "split.count", "split.tensors.count"} for of_part in keys[1:])
    read = [tensor for part in open_gguf(one.path).parts for tensor in gguf.GGUFReader(part).tensors]
    expected = gguf.GGUFReader(plain).tensors
    assert [tensor.name for tensor in read] == [tensor.name for tensor in expected]
    assert all(np.array_equal(a.data, b.data) for a, b in zip(read, expected, strict=True))


def test_outputs_in_parts_that_cannot_be(tiny_gguf, tmp_path):
    first = split_files.split(tiny_gguf, tmp_path, [3], "out")[0]
    check_output(tmp_path / "out.gguf", split=True)
    with pytest.raises(UsageError, match="is the model itself"):
        check_output(tmp_path / "out.gguf", ModelSource("m", tmp_path, gguf=first), split=True)
    check_output(tmp_path / "out.gguf", ModelSource("m", tmp_path, gguf=first))
    (tmp_path / "out-00004-of-00004.gguf").write_text("mine")
    with pytest.raises(UsageError, match="not a GGUF file"):
        check_output(tmp_path / "out.gguf", split=True)
