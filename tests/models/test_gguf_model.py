"""A GGUF file as the model: what is learned from computes what llama.cpp computes from it, or the file is refused.

The files are written by llama.cpp's own converter from tiny models of transformers.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_sources import gguf_model
from split_files import split, write_gguf_file
from tiny_models import MIXTURE, TEXT, VOCABULARY, tokenizer

from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.gguf_files.gguf_file import GgufFile, TensorInfo, open_gguf
from tesseraq_gguf.models import Decoder, ModelSource, resolve_model
from tesseraq_gguf.models.gguf_config import describe
from tesseraq_gguf.models.quantised import final_states
from tesseraq_gguf.models.weights import open_checkpoint
from tesseraq_gguf.models.whole import whole_model
from tesseraq_gguf.runtime import ensure_source

SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
LENGTH = 96
_BASE = {"rope_theta": 10000.0}
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_FACTORS = {
    "short_factor": [1 + 0.1 * i for i in range(8)], "long_factor": [2 + 0.2 * i for i in range(8)], "factor": 8.0,
}  # fmt: skip
_GEMMA3 = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
# architecture of transformers, what differs from SHAPE; of what is called Phi-3 llama.cpp wants tokens of Phi-3's
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-heads": ("Llama", {"head_dim": 32}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-rope-llama3": ("Llama", {"rope_parameters": _BASE | _LLAMA3}),
    "llama-rope-linear": ("Llama", {"rope_parameters": _BASE | {"rope_type": "linear", "factor": 4.0}}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-rope-yarn": (
        "Qwen2",
        {"rope_parameters": _BASE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "phi-fused": ("Phi3", {"original_max_position_embeddings": 512}),
    "phi-fused-rope-short": (
        "Phi3",
        {"original_max_position_embeddings": 256, "max_position_embeddings": 2048}
        | {"rope_parameters": _BASE | _FACTORS | {"rope_type": "longrope"}},
    ),
    "phi-fused-rope-long": (
        "Phi3",
        {"original_max_position_embeddings": 64, "rope_parameters": _BASE | _FACTORS | {"rope_type": "longrope"}},
    ),
    "gemma2": (
        "Gemma2",
        {"head_dim": 32, "sliding_window": 32, "query_pre_attn_scalar": 32}
        | {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0},
    ),
    "gemma3": (
        "Gemma3",
        {"head_dim": 32, "sliding_window": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 7}
        | {"rope_parameters": _GEMMA3},
    ),
    "granite": (
        "Granite",
        {"logits_scaling": 4.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}
        | {"attention_multiplier": 0.5},
    ),
    "nemotron": ("Nemotron", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    "qwen2-moe": ("Qwen2Moe", MIXTURE | {"shared_expert_intermediate_size": 96}),
    "qwen3-moe": ("Qwen3Moe", MIXTURE | {"head_dim": 16, "norm_topk_prob": True}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),
    "arcee": ("Arcee", {}),
    "seed-oss": ("SeedOss", {"head_dim": 16}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"sliding_window": 32, "num_hidden_layers": 4}),
    "lfm2": (
        "Lfm2",
        {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "block_auto_adjust_ff_dim": False},
    ),
    "starcoder2": ("Starcoder2", {"use_bias": True}),
    "stablelm": ("StableLm", {"use_qkv_bias": True}),
}
BYTE_LEVEL = ("seed-oss", "olmo2", "olmo3", "lfm2", "olmoe", "qwen2-moe", "qwen3-moe", "starcoder2", "stablelm")
"""Kinds whose vocabulary the converter wants as byte-level BPE."""

_CONVERT = """
import json, sys
from pathlib import Path
import gguf, torch
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"  # knows tokenizers by a hash of what they make of a text
for folder, out in json.loads(sys.stdin.read()):
    kind = get_model_class(get_model_architecture(ModelBase.load_hparams(Path(folder), False), ModelType.TEXT))
    with torch.inference_mode():
        kind(Path(folder), gguf.LlamaFileType.MOSTLY_F16, Path(out)).write()
"""


def _save_vocabulary(kind: str, folder: Path) -> None:
    if kind not in BYTE_LEVEL:
        (folder / "tokenizer.model").write_bytes(tokenizer())
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
        (folder / "tokenizer_config.json").write_text(json.dumps(names))
        return
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator([TEXT] * 20, trainer)
    made.add_tokens([f"<extra{i}>" for i in range(VOCABULARY - made.get_vocab_size())])
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def _save(kind: str, folder: Path) -> None:
    import transformers

    architecture, different = CASES[kind]
    name = f"{architecture}TextConfig" if architecture == "Gemma3" else f"{architecture}Config"
    config = getattr(transformers, name)(**(SHAPE | different))
    torch.manual_seed(len(kind))
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.to(torch.float16).save_pretrained(folder)
    _save_vocabulary(kind, folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The model of every case as a GGUF file in float16; its folder stands beside it."""
    folder = tmp_path_factory.mktemp("cases")
    for kind in CASES:
        _save(kind, folder / kind)
    tree = ensure_source()
    outs = {kind: folder / f"{kind}.gguf" for kind in CASES}
    subprocess.run(
        [sys.executable, "-c", _CONVERT],
        input=json.dumps([[str(folder / kind), str(out)] for kind, out in outs.items()]),
        env=os.environ | {"PYTHONPATH": f"{tree.gguf_py}:{tree.llama_cpp}"},
        check=True,
        capture_output=True,
        text=True,
    )
    return outs


def _tokens() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(0))


def _logits(source: ModelSource) -> torch.Tensor:
    with torch.no_grad():
        return whole_model(source, torch.float32)(_tokens()).logits[0]


def _folder(file: Path) -> ModelSource:
    """The model that a file was converted from."""
    return ModelSource("m", file.with_suffix(""))


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Squared error over the variance of what is wanted."""
    return float((got - wanted).square().sum() / (wanted - wanted.mean()).square().sum())


@pytest.mark.parametrize("kind", CASES)
def test_a_file_computes_what_its_model_did(kind, files, tmp_path):
    """Whole in transformers, and block by block."""
    wanted, source = _logits(_folder(files[kind])), gguf_model(files[kind], tmp_path / "x")
    assert wanted.std() > 0.2
    assert _error(_logits(source), wanted) < 1e-4
    decoder = Decoder(source, torch.device("cpu"))
    got = decoder.answers()(final_states(decoder, _tokens())[0])
    assert _error(got, wanted.log_softmax(-1)) < 1e-4


@pytest.mark.runtime
@pytest.mark.parametrize("kind", CASES)
def test_it_is_what_llama_cpp_computes(kind, files, tmp_path):
    from tesseraq_gguf.runtime import Llama

    llama = Llama(str(files[kind]), n_ctx=LENGTH + 32, n_batch=LENGTH, logits_all=True, verbose=False)
    llama.eval(_tokens()[0].tolist())
    found = torch.from_numpy(np.array(llama.scores[:LENGTH], np.float32))
    llama.close()
    # keys, values and what matrices are fed have 16 bits there
    assert _error(found, _logits(gguf_model(files[kind], tmp_path / "x"))) < 1e-3


@pytest.mark.parametrize("kind", ["llama", "gemma3", "phi-fused", "mixtral"])
def test_tensors_are_those_of_the_folder_it_was_converted_from(kind, files, tmp_path):
    ours, theirs = (open_checkpoint(s) for s in (gguf_model(files[kind], tmp_path / "x"), _folder(files[kind])))
    assert set(ours) == set(theirs)
    assert set(ours.dequantized) == set(ours)
    for name in theirs:
        want = theirs.read(name).float()
        got = ours.read(name)
        assert (ours.shape(name), ours.dtype(name)) == (want.shape, got.dtype)
        # the converter adds 1 to norms of Gemma in float16, their dtype
        torch.testing.assert_close(got, want, rtol=0, atol=2.0**-10 if "norm" in name else 0, msg=name)
        some = torch.tensor([len(want) - 1, 0, len(want) // 2])
        assert torch.equal(ours.rows(name, some), got[some]), name
        assert ours.file(name) == files[kind]


def _raw(value: float | str) -> bytes:
    """A metadata value with its type before it."""
    if isinstance(value, str):
        return struct.pack("<IQ", 8, len(value)) + value.encode()
    return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)


def _changed(file: Path, out: Path, entries: dict[str, Any], keep: Callable[[str], bool] = lambda _: True) -> GgufFile:
    """Write a file with other metadata (None takes an entry away), or without some of its tensors."""
    whole = open_gguf(file)
    raw = {key: entry.raw for key, entry in whole.entries.items() if entries.get(key, 0) is not None}
    raw |= {k: v if isinstance(v, bytes) else _raw(v) for k, v in entries.items() if v is not None}
    write_gguf_file(out, raw, whole, [t for t in whole.tensors if keep(t.name)])
    return open_gguf(out)


_HEADS = struct.pack("<IIQII", 9, 4, 2, 4, 2)
"""Four heads in one block, two in the next."""


@pytest.mark.parametrize(
    ("kind", "entries", "message"),
    [
        ("llama", {"llama.attention.temperature_scale": 0.5}, r"says 'llama\.attention\.temperature_scale', which"),
        ("llama", {"llama.rope.scaling.type": "dynamic"}, "by 'dynamic'"),
        ("llama", {"llama.rope.dimension_count": 8}, "a rotary embedding that transformers cannot compute"),
        (
            "llama",
            {"llama.attention.head_count": _HEADS},
            r"blocks of different shapes \(llama\.attention\.head_count\)",
        ),
        ("llama", {"llama.block_count": None}, r"has no llama\.block_count"),
        ("llama", {"llama.block_count": 3}, r"lacks blk\.2\.attn_k\.weight, .* and 6 more, which a model"),
        ("llama", {"llama.block_count": 1}, r"has blk\.1\.attn_k\.weight, .* and 6 more, for which"),
        ("llama", {"llama.feed_forward_length": 64}, r"of shape \[64, 96\], where"),
        (
            "llama",
            {"general.architecture": "rwkv7"},
            "is of the architecture 'rwkv7'; GGUF files are read as models of",
        ),
        ("mixtral", {"llama.expert_count": None, "llama.expert_used_count": None}, r"lacks blk\.0\.ffn_down\.weight"),
        ("qwen2-moe", {"qwen2moe.expert_count": 5}, r"ffn_gate_inp\.weight of shape \[64, 4\], where"),
        ("gemma2", {"gemma2.attention.value_length": 16}, "values of another length than keys"),
        ("granite", {"granite.logit_scale": None}, r"has no granite\.logit_scale"),
    ],
)
def test_what_a_header_says_and_is_not_understood(kind, entries, message, files, tmp_path):
    _changed(files[kind], tmp_path / "m.gguf", entries)
    with pytest.raises(ModelError, match=message) as caught:
        gguf_model(tmp_path / "m.gguf", tmp_path / "x")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x" / "config.json").exists()


@pytest.mark.parametrize(
    ("kind", "entries", "wanted"),
    [
        ("gemma2", {}, {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 0.5, "sliding_window": 32}),
        ("gemma2", {"gemma2.block_count": 46}, {"query_pre_attn_scalar": 16}),  # as llama.cpp knows the 27B
        (
            "gemma2",
            dict.fromkeys(f"gemma2.{k}" for k in ("attn_logit_softcapping", "final_logit_softcapping"))
            | {"gemma2.attention.sliding_window": None},
            {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096},
        ),
        ("gemma3", {}, {"layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]}),
        ("gemma3", {"gemma3.block_count": 62}, {"query_pre_attn_scalar": 16}),
        (
            "gemma3",
            {"gemma3.attention.sliding_window_pattern": 2, "gemma3.block_count": 3},
            {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        ),
        (
            "gemma3",
            {"gemma3.attention.sliding_window_pattern": struct.pack("<IIQ??", 9, 7, 2, False, True)}
            | {"gemma3.block_count": 2},
            {"layer_types": ["full_attention", "sliding_attention"]},
        ),
        ("gemma3", {"gemma3.attention.sliding_window": None}, {"layer_types": ["full_attention"] * 7}),
        ("granite", {"granite.attention.scale": None, "granite.residual_scale": None}, {"residual_multiplier": 1.0}),
        ("qwen2", {"qwen2.rope.freq_base": None}, {"rope_parameters": {"rope_theta": 10000.0}}),
        ("llama", {"llama.attention.layer_norm_rms_epsilon": 0.25}, {"rms_norm_eps": 0.25}),
    ],
)
def test_defaults_are_those_of_llama_cpp(kind, entries, wanted, files, tmp_path):
    config = describe(_changed(files[kind], tmp_path / "m.gguf", entries)).config
    for key, value in wanted.items():
        found = config[key]
        assert (found | value if isinstance(value, dict) else value) == found, key


def test_frequencies_of_any_kind_are_kept(files, tmp_path):
    """Factors that no formula gives, on top of a scale."""
    whole = open_gguf(files["llama-rope-llama3"])
    factors = np.array([1, 3, 1, 7, 2, 2, 5, 9], "<f4")
    data = bytearray(files["llama-rope-llama3"].read_bytes())
    place = next(t for t in whole.tensors if t.name == "rope_freqs.weight")
    data[place.offset : place.offset + place.bytes] = factors.tobytes()
    (tmp_path / "odd.gguf").write_bytes(data)
    _changed(tmp_path / "odd.gguf", tmp_path / "m.gguf", {"llama.rope.scaling.factor": 2.0})
    config = gguf_model(
        tmp_path / "m.gguf", tmp_path / "x"
    ).config()  # which holds sines and cosines against llama.cpp's
    assert config["rope_parameters"]["short_factor"] == [2 * f for f in factors.tolist()]


def _retyped(file: Path, out: Path, types: dict[str, gguf.GGMLQuantizationType], scale: float) -> dict[str, np.ndarray]:
    """Write a file with matrices of other types and other values; return what they hold."""
    from tesseraq_gguf.gguf_files.dequantize import dequantized

    whole = open_gguf(file)
    values = {t.name: dequantized(t, whole.data(t), {}) for t in whole.tensors}
    random = np.random.default_rng(0)
    made, infos = {}, []
    for tensor in whole.tensors:
        kind = types.get(tensor.name)
        if kind is not None:
            values[tensor.name] = random.normal(size=values[tensor.name].shape).astype(np.float32) * scale
            made[tensor.name] = gguf.quants.quantize(values[tensor.name], kind)
            values[tensor.name] = gguf.quants.dequantize(made[tensor.name], kind)
        infos.append(tensor if kind is None else TensorInfo(tensor.name, "", kind, tensor.shape, 0, 0))

    class Retyped:
        def data(self, tensor: TensorInfo) -> np.ndarray:
            return made[tensor.name] if tensor.name in made else whole.data(tensor)

    write_gguf_file(out, {k: e.raw for k, e in whole.entries.items()}, Retyped(), infos)  # type: ignore[arg-type]
    return values


@pytest.mark.parametrize(
    ("kind", "scale"),
    [("F16", 1.0), ("BF16", 1e-6), ("BF16", 1e9), ("F32", 1.0), ("Q8_0", 1.0), ("Q4_0", 1e4)],
)
def test_matrices_have_the_numbers_of_the_file(kind, scale, files, tmp_path):
    names = {
        "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
        "token_embd.weight": "model.embed_tokens.weight",
    }
    types = dict.fromkeys(names, gguf.GGMLQuantizationType[kind])
    wanted = _retyped(files["llama"], tmp_path / "m.gguf", types, scale)
    weights = open_checkpoint(gguf_model(tmp_path / "m.gguf", tmp_path / "x"))
    for name, stored in names.items():
        np.testing.assert_array_equal(weights.read(stored).numpy(), wanted[name])


def test_a_number_that_is_none_is_named(files, tmp_path):
    whole = open_gguf(files["llama"])
    data = bytearray(files["llama"].read_bytes())
    place = next(t for t in whole.tensors if t.name == "blk.1.attn_v.weight")
    data[place.offset + 2 * 64 : place.offset + 2 * 64 + 2] = np.array([np.nan], "<f2").tobytes()
    (tmp_path / "m.gguf").write_bytes(data)
    weights = open_checkpoint(gguf_model(tmp_path / "m.gguf", tmp_path / "x"))
    with pytest.raises(
        ModelError, match=r"1 of 2,048 numbers of blk\.1\.attn_v\.weight are not finite, .* at \[1, 0\]"
    ):
        weights.read("model.layers.1.self_attn.v_proj.weight")


def test_a_split_file_is_read_whole(files, tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERAQ_GGUF_CACHE", str(tmp_path / "cache"))
    parts = split(files["qwen2"], tmp_path, [9, 5])
    source = resolve_model(str(parts[0]))
    assert source.gguf == parts[0]
    assert source.gguf_parts() == tuple(parts)
    assert _error(_logits(source), _logits(_folder(files["qwen2"]))) < 1e-4
    weights = open_checkpoint(source)
    assert {weights.file(name) for name in weights} == set(parts)
    assert resolve_model(str(parts[0])) == source
    # another last part is another model
    before = source.fingerprint()
    assert source.fingerprint() == before
    data = bytearray(parts[2].read_bytes())
    data[-2:] = b"\0\0" if data[-2:] != b"\0\0" else b"\0\x3c"
    parts[2].write_bytes(data)
    assert source.fingerprint() != before
    with pytest.raises(ModelError, match=r"is part 2 of 3\. Give the first part"):
        resolve_model(str(parts[1]))
    parts[1].unlink()
    with pytest.raises(ModelError, match="part 2 of 3 is missing"):
        resolve_model(str(parts[0]))


def test_the_cache_has_no_weights(files, tmp_path, monkeypatch):
    """Config and tokenizer alone, which files of the same header share."""
    monkeypatch.setenv("TESSERAQ_GGUF_CACHE", str(tmp_path / "cache"))
    source = resolve_model(str(files["llama"]))
    kept = {file.name: file.stat().st_size for file in source.folder.iterdir()}
    assert {"config.json", "tokenizer.json"} <= kept.keys()
    assert not [name for name in kept if name.endswith((".safetensors", ".gguf", ".bin"))]
    assert sum(kept.values()) < files["llama"].stat().st_size
    _changed(files["llama"], tmp_path / "other.gguf", {"general.name": "other", "tesseraq.method": "none"})
    other = resolve_model(str(tmp_path / "other.gguf"))
    assert (other.folder, other.gguf) == (source.folder, tmp_path / "other.gguf")
    assert other.fingerprint() != source.fingerprint()
    _changed(files["llama"], tmp_path / "third.gguf", {"llama.rope.freq_base": 500.0})
    assert resolve_model(str(tmp_path / "third.gguf")).folder != source.folder


def test_a_copy_of_a_split_file_is_whole(files, tmp_path):
    from tesseraq_gguf.converter.writer import check_output, write_plain
    from tesseraq_gguf.errors import UsageError
    from tesseraq_gguf.models import ModelSource

    parts = split(files["gemma3"], tmp_path, [0, 7])
    source = ModelSource("m", tmp_path, gguf=parts[0])
    with pytest.raises(UsageError, match="is the model itself"):
        check_output(parts[1], source)
    made = open_gguf(write_plain(source, tmp_path / "out.gguf", "f16").path)
    whole = open_gguf(files["gemma3"])
    assert made.parts == (tmp_path / "out.gguf",)
    assert not [key for key in made.entries if key.startswith("split.")]
    assert [t.name for t in made.tensors] == [t.name for t in whole.tensors]
    for mine, other in zip(made.tensors, whole.tensors, strict=True):
        assert np.array_equal(made.data(mine), whole.data(other)), mine.name
