"""Checkpoints that are quantised already are read as the numbers that they stand for, or refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from prequantised import BLOCK, PACKED_SCHEMES, SCHEMES, compressed, pack, prequantise
from safetensors.torch import load_file, save_file

from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.models import Decoder, ModelSource
from tesseraq_gguf.models.codes import unpacked
from tesseraq_gguf.models.prequantised import plain_config
from tesseraq_gguf.models.weights import open_checkpoint
from tesseraq_gguf.models.whole import whole_model

CPU = torch.device("cpu")
DOWN = "model.layers.1.mlp.down_proj.weight"


def exact(model: ModelSource, folder: Path) -> Path:
    """Copy a model, with matrices that all schemes hold exactly: small integers, times one power of two."""
    shutil.copytree(model.folder, folder)
    drawn = torch.Generator().manual_seed(1)
    tensors = tensors_of(folder)
    for name, tensor in tensors.items():
        if "layers" in name and tensor.dim() == 2:
            tensors[name] = (torch.randint(-7, 8, tensor.shape, generator=drawn) * 2.0**-6).bfloat16()
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def model(make_model, tmp_path_factory) -> ModelSource:
    """A Llama whose rows and columns are no multiples of the blocks, in one file, with logits that vary."""
    folder = tmp_path_factory.mktemp("whole") / "llama"
    shutil.copytree(make_model("llama").folder, folder)
    tensors = tensors_of(folder)
    for file in folder.glob("model*"):
        file.unlink()
    # the stream comes from the embedding for the most part, as it does in trained models
    factors = {"model.embed_tokens.weight": 30, "lm_head.weight": 3}
    louder = {n: t * factors.get(n, 3 if t.dim() == 2 else 1) for n, t in tensors.items()}
    save_file(louder, folder / "model.safetensors")
    return ModelSource("llama", folder)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("model*.safetensors") for name, t in load_file(file).items()}


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


TOKENS = torch.randint(4, 300, (1, 48), generator=torch.Generator().manual_seed(3))


def logits(decoder: Decoder) -> torch.Tensor:
    hidden, inputs = decoder.stem(TOKENS)
    for index in range(len(decoder)):
        hidden = decoder.load_block(index).run(hidden, inputs.arguments[index])
    return decoder.answers()(hidden[0])


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Squared error as a share of the variance."""
    return float((got - wanted).square().mean() / wanted.var())


@pytest.mark.parametrize("name", SCHEMES)
def test_quantised_matrices_are_read_dequantised(name, model, tmp_path):
    values = prequantise(model.folder, tmp_path / "quantised", SCHEMES[name])
    weights = open_checkpoint(ModelSource(name, tmp_path / "quantised"))
    plain = tensors_of(model.folder)
    assert set(weights) == plain.keys()
    assert weights.dequantized == values.keys()
    rows = torch.tensor([0, 17, 63])
    for stored, wanted in values.items():
        read = weights.read(stored)
        assert (read.dtype, weights.dtype(stored)) == (torch.float32, torch.float32)
        torch.testing.assert_close(read, wanted, rtol=1e-6, atol=0)
        torch.testing.assert_close(weights.rows(stored, rows), wanted[rows], rtol=1e-6, atol=0)
        assert weights.shape(stored) == plain[stored].shape
    for stored in plain.keys() - values.keys():
        assert torch.equal(weights.read(stored), plain[stored])
        assert weights.dtype(stored) == torch.bfloat16


@pytest.mark.parametrize("name", PACKED_SCHEMES)
def test_packed_matrices_are_read_under_their_own_names(name, model, tmp_path):
    values = pack(model.folder, tmp_path / "packed", PACKED_SCHEMES[name])
    weights = open_checkpoint(ModelSource(name, tmp_path / "packed"))
    plain = tensors_of(model.folder)
    assert set(weights) == plain.keys()
    assert set(weights.dequantized) == values.keys()
    rows = torch.tensor([63, 0, 17])
    for stored, wanted in values.items():
        # a figure that is near, so that nothing is compared with itself in another dress
        assert float((wanted - plain[stored].float()).norm() / plain[stored].float().norm()) < 0.45
        assert weights.shape(stored) == plain[stored].shape
        read = weights.read(stored)
        assert (read.dtype, weights.dtype(stored)) == (torch.float32, torch.float32)
        torch.testing.assert_close(read, wanted, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(weights.rows(stored, rows), wanted[rows], rtol=1e-6, atol=1e-7)
    for stored in plain.keys() - values.keys():
        assert torch.equal(weights.read(stored), plain[stored])


def _with(folder: Path, model: ModelSource, said: dict, tensors: dict[str, torch.Tensor]):
    """Open a model with further tensors, quantised as `said`."""
    shutil.copytree(model.folder, folder)
    save_file(tensors_of(folder) | tensors, folder / "model.safetensors")
    edit(folder, quantization_config=said)
    return open_checkpoint(ModelSource("model", folder))


STACK = "model.layers.0.mlp.experts.gate_up_proj"


def _blocks(*shape: int) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(4)
    blocks = torch.randint(0, 256, (*shape, 16), generator=drawn, dtype=torch.uint8)
    exponents = torch.randint(110, 125, shape, generator=drawn, dtype=torch.uint8)
    return {f"{STACK}_blocks": blocks, f"{STACK}_scales": exponents}


def test_stacks_of_gpt_oss_are_read_as_transformers_reads_them(model, tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored = _blocks(5, 48, 3)
    weights = _with(tmp_path / "oss", model, {"quant_method": "mxfp4"}, stored)
    wanted = convert_moe_packed_tensors(*stored.values(), dtype=torch.float32)
    assert weights.shape(STACK) == wanted.shape == (5, 96, 48)
    assert torch.equal(weights.read(STACK), wanted)
    assert torch.equal(weights.rows(STACK, torch.tensor([3, 0])), wanted[[3, 0]])
    assert f"{STACK}_blocks" not in weights


def test_gpt_oss_is_the_model_that_transformers_dequantises(tmp_path):
    from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Mxfp4Config

    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 16}
    config = GptOssConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2)
    tensors = {}
    for name, tensor in GptOssForCausalLM(config).state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            count, columns, rows = tensor.shape
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (count, rows, columns // 32, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(121, 124, (count, rows, columns // 32), dtype=torch.uint8)
        else:
            tensors[name] = (tensor if "norm" in name else torch.randn_like(tensor) * 0.15).bfloat16()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config.architectures = ["GptOssForCausalLM"]
    config.save_pretrained(tmp_path)
    edit(tmp_path, quantization_config={"quant_method": "mxfp4"})
    found = logits(Decoder(ModelSource("oss", tmp_path), CPU))
    dequantised = Mxfp4Config(dequantize=True)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=dequantised)
    with torch.no_grad():
        wanted = whole.eval()(TOKENS).logits[0].log_softmax(-1)
    assert float(wanted.std()) > 0.5
    assert difference(found, wanted) < 1e-10


def _of_ggml(kind: str, raw: torch.Tensor) -> torch.Tensor:
    """What ggml's blocks [rows, bytes] stand for, by gguf-py."""
    values = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(values.copy())


def _halves(codes: torch.Tensor, length: int) -> torch.Tensor:
    """Codes as ggml packs them: the first half of each `length` in the lower bits."""
    low, high = codes.unflatten(-1, (-1, length)).chunk(2, -1)
    return (low | high << 4).flatten(-2)


def test_blocks_of_mxfp4_are_ggmls(model, tmp_path):
    stored = _blocks(2, 48, 3)
    weights = _with(tmp_path / "oss", model, {"quant_method": "mxfp4"}, stored)
    blocks, exponents = stored.values()
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    raw = torch.cat((exponents[..., None], _halves(codes, 32)), -1).flatten(-2)
    assert torch.equal(weights.read(STACK).mT, _of_ggml("MXFP4", raw.reshape(96, -1)).view(2, 48, 96))


def test_blocks_of_nvfp4_are_ggmls(model, tmp_path):
    values = pack(model.folder, tmp_path / "packed", PACKED_SCHEMES["modelopt-nvfp4"])
    weights = open_checkpoint(ModelSource("packed", tmp_path / "packed"))
    stored = tensors_of(tmp_path / "packed")
    for name in values:
        packed, scale = stored[name], stored[f"{name}_scale"].view(torch.uint8)
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
        # four groups of 16 make a block of ggml
        raw = torch.cat((scale.unflatten(-1, (-1, 4)), _halves(codes, 16).unflatten(-1, (-1, 32))), -1).flatten(-2)
        found = _of_ggml("NVFP4", raw) * stored[f"{name}_scale_2"]
        torch.testing.assert_close(weights.read(name), found, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_codes_come_out_of_a_stream_of_bits(bits, dtype):
    codes = torch.randint(0, 2**bits, (3, 64), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    rows = [sum(code << (bits * place) for place, code in enumerate(row)) for row in codes.tolist()]
    raw = torch.tensor([list(row.to_bytes(64 * bits // 8, "little")) for row in rows], dtype=torch.uint8)
    assert torch.equal(unpacked(raw.view(dtype), bits), codes)


def test_rows_of_a_stack_have_their_own_scales(model, tmp_path):
    """Codes of three axes: a scale for each matrix, for each row of each, for each column, and for blocks."""
    codes = torch.randint(-9, 9, (3, 6, 8), generator=torch.Generator().manual_seed(5)).to(torch.float8_e4m3fn)
    for block, shape in ((None, (3,)), (None, (3, 1, 1)), (None, (3, 6)), (None, (3, 1, 8)), ((4, 3), (3, 2, 3))):
        scale = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
        said = {"quant_method": "fp8", "weight_block_size": block}
        weights = _with(tmp_path / str(shape), model, said, {STACK: codes, f"{STACK}_scale": scale})
        wanted = codes.float()
        for e in range(3):
            for i in range(6):
                for j in range(8):
                    own = {(3,): (e,), (3, 1, 1): (e, 0, 0), (3, 6): (e, i), (3, 1, 8): (e, 0, j)}
                    wanted[e, i, j] *= scale[own.get(shape, (e, i // 4, j // 3))]
        assert torch.equal(weights.read(STACK), wanted), shape
        assert torch.equal(weights.rows(STACK, torch.tensor([2, 1])), wanted[[2, 1]]), shape


def _damaged(model: ModelSource, folder: Path, scheme: str, change) -> ModelSource:
    pack(model.folder, folder, PACKED_SCHEMES[scheme])
    tensors = tensors_of(folder)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return ModelSource("damaged", folder)


QWEIGHT = DOWN.replace("weight", "qweight")
DAMAGES = {
    "no zeros": ("gptq-4", lambda t: t.pop(DOWN.replace("weight", "qzeros")), rf"{QWEIGHT}, but no .*qzeros"),
    "one group of all": (
        "gptq-4",
        lambda t: t[DOWN.replace("weight", "g_idx")].zero_(),
        rf"down_proj\.g_idx \[192\] does not fit {QWEIGHT} \[24, 128\]",
    ),
    "another width": (
        "ct-int4",
        lambda t: t.update({f"{DOWN}_packed": t[f"{DOWN}_packed"][:, :-1]}),
        rf"{DOWN}_shape \[2\] does not fit {DOWN}_packed \[128, 23\]",
    ),
    "plain zero-points": (
        "ct-int4-zero",
        lambda t: t.update({f"{DOWN}_zero_point": t[f"{DOWN}_zero_point"].char()}),
        rf"{DOWN}_zero_point is not packed",
    ),
    "another group": (
        "ct-nvfp4",
        lambda t: t.update({f"{DOWN}_scale": t[f"{DOWN}_scale"][:, ::2]}),
        rf"{DOWN}_scale \[128, 6\] does not fit {DOWN}_packed \[128, 96\]",
    ),
    "no scale": ("ct-nvfp4", lambda t: t.pop(f"{DOWN}_scale"), rf"there is {DOWN}_packed, but no {DOWN}_scale"),
    "no second scale": (
        "modelopt-nvfp4",
        lambda t: t.pop(f"{DOWN}_scale_2"),
        rf"{DOWN} holds U8 and has no scale that config\.json speaks of",
    ),
    "zero-points of floats": (
        "ct-nvfp4",
        lambda t: t.update({f"{DOWN}_zero_point": torch.zeros(128, 12)}),
        rf"as compressed-tensors nvfp4-pack-quantized \({DOWN}_zero_point\)",
    ),
    "no state": (
        "nf4",
        lambda t: t.pop(f"{DOWN}.quant_state.bitsandbytes__nf4"),
        rf"as bitsandbytes \({DOWN}\.",
    ),
    "the matrix as well": ("gptq-4", lambda t: t.update({DOWN: torch.ones(128, 192)}), rf"{DOWN} is there, and"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_parts_that_do_not_fit_are_named(what, model, tmp_path):
    scheme, change, message = DAMAGES[what]
    source = _damaged(model, tmp_path / "damaged", scheme, change)
    with pytest.raises(ModelError, match=message) as caught:
        open_checkpoint(source).read(DOWN)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("damaged")


@pytest.mark.parametrize("name", ["gptq-act", "ct-int4-zero", "modelopt-nvfp4", "nf4"])
def test_a_packed_model_is_the_same_model(name, model, tmp_path):
    values = pack(model.folder, tmp_path / "packed", PACKED_SCHEMES[name])
    shutil.copytree(model.folder, tmp_path / "plain")
    save_file(tensors_of(model.folder) | values, tmp_path / "plain" / "model.safetensors")
    wanted = logits(Decoder(ModelSource("plain", tmp_path / "plain"), CPU))
    assert difference(logits(Decoder(ModelSource("packed", tmp_path / "packed"), CPU)), wanted) < 1e-10
    whole = whole_model(ModelSource("packed", tmp_path / "packed"), torch.float32)
    torch.testing.assert_close(whole.get_parameter(DOWN).detach(), values[DOWN], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", PACKED_SCHEMES)
def test_packed_matrices_that_nobody_speaks_of_are_refused(name, model, tmp_path):
    pack(model.folder, tmp_path / "silent", PACKED_SCHEMES[name])
    edit(tmp_path / "silent", quantization_config=None)
    (tmp_path / "silent" / "hf_quant_config.json").unlink(missing_ok=True)
    with pytest.raises(ModelError, match=r"and packed, and config\.json does not say how|has scales beside"):
        open_checkpoint(ModelSource("silent", tmp_path / "silent"))


@pytest.mark.parametrize("name", ["fp8-block", "fp8-ct-row", "int8-ct-row", "int8-ct-groups"])
def test_the_learner_sees_the_same_model_whatever_it_is_stored_in(name, model, tmp_path):
    true = logits(Decoder(model, CPU))
    assert float(true.std()) > 0.5
    values = prequantise(model.folder, tmp_path / "quantised", SCHEMES[name])
    found = logits(Decoder(ModelSource(name, tmp_path / "quantised"), CPU))
    assert difference(found, true) < 1e-3
    plain = tmp_path / "plain"
    shutil.copytree(model.folder, plain)
    save_file(tensors_of(model.folder) | values, plain / "model.safetensors")
    assert difference(found, logits(Decoder(ModelSource("plain", plain), CPU))) < 1e-10


@pytest.mark.parametrize("name", ["fp8-block", "fp8-tensor", "fp8-ct-row", "int8-ct-row", "int8-ct-group"])
def test_the_same_values_in_any_scheme_are_the_same_model(name, model, tmp_path):
    folder = exact(model, tmp_path / "exact")
    wanted = logits(Decoder(ModelSource("exact", folder), CPU))
    assert float(wanted.std()) > 0.5
    prequantise(folder, tmp_path / name, SCHEMES[name], scale=2.0**-6)
    assert difference(logits(Decoder(ModelSource(name, tmp_path / name), CPU)), wanted) < 1e-5


def test_experts_are_dequantised_one_by_one(make_model, tmp_path):
    source = make_model("qwen3-moe")
    values = prequantise(source.folder, tmp_path / "quantised", SCHEMES["fp8-block"])
    decoder = Decoder(ModelSource("mixture", tmp_path / "quantised"), CPU)
    block = decoder.load_block(1)
    for name in ("mlp.experts.0.up_proj", "mlp.experts.3.down_proj"):
        assert torch.equal(block.matrices()[name].weight, values[f"model.layers.1.{name}.weight"])


def test_a_whole_model_of_transformers_is_dequantised_too(model, tmp_path):
    values = prequantise(model.folder, tmp_path / "quantised", SCHEMES["fp8-block"])
    whole = whole_model(ModelSource("quantised", tmp_path / "quantised"), torch.float32)
    assert torch.equal(whole.get_parameter(DOWN).detach(), values[DOWN])
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(whole.get_parameter(norm).detach(), tensors_of(model.folder)[norm].float())


def test_the_config_of_a_dequantised_copy():
    config = {"a": 1, "quantization_config": {}, "text_config": {"b": 2, "quantization_config": {}}}
    assert plain_config(config) == {"a": 1, "text_config": {"b": 2}}


REFUSED = {
    "gptq-marlin": ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, r"as gptq 4 bits marlin"),
    "gptq-5": ({"quant_method": "gptq", "bits": 5}, r"as gptq 5 bits"),
    "awq-gemv": ({"quant_method": "awq", "bits": 4, "version": "gemv"}, r"as awq 4 bits gemv"),
    "hqq": ({"quant_method": "hqq"}, r"as hqq"),
    "quanto": ({"quant_method": "quanto"}, r"as quanto"),
    "torchao": ({"quant_method": "torchao"}, r"as torchao"),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, r"as modelopt W4A8_AWQ"),
    "mixed": (
        {"quant_method": "modelopt", "quant_algo": "MIXED", "quantized_layers": {"a": {"quant_algo": "W4A8_AWQ"}}},
        r"as modelopt MIXED",
    ),
    "marlin": (compressed("int", 4, "group", "marlin-24"), r"as compressed-tensors marlin-24"),
    "transforms": (
        compressed("int", 8, "channel") | {"transform_config": {"config_groups": {"u": {}}}},
        r"compressed-tensors int-quantized with transforms",
    ),
    "sparse": (
        compressed("float", 8, "channel") | {"sparsity_config": {"format": "sparse-24-bitmask"}},
        r"compressed-tensors sparse-24-bitmask",
    ),
    "nameless": ({"bits": 3}, r"as an unknown scheme 3 bits"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("nested", [False, True])
def test_schemes_that_are_not_read_are_refused_by_name(name, nested, model, tmp_path):
    said, message = REFUSED[name]
    shutil.copytree(model.folder, tmp_path / "packed")
    edit(
        tmp_path / "packed",
        **{"text_config": {"quantization_config": said}} if nested else {"quantization_config": said},
    )
    with pytest.raises(ModelError, match=message + ".*take the original model") as caught:
        open_checkpoint(ModelSource("packed", tmp_path / "packed"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", SCHEMES)
def test_scales_that_nobody_speaks_of_are_refused(name, model, tmp_path):
    prequantise(model.folder, tmp_path / "silent", SCHEMES[name])
    edit(tmp_path / "silent", quantization_config=None, compression_config=None)
    (tmp_path / "silent" / "hf_quant_config.json").unlink(missing_ok=True)
    with pytest.raises(ModelError, match=r"has scales beside its matrices .*no quantization_config"):
        open_checkpoint(ModelSource("silent", tmp_path / "silent"))


def _change(model: ModelSource, folder: Path, scheme: str, change) -> ModelSource:
    prequantise(model.folder, folder, SCHEMES[scheme])
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return ModelSource("changed", folder)


CHANGES = {
    "no scale": (lambda t: t.pop(f"{DOWN}_scale_inv"), rf"{DOWN} holds F8_E4M3 and has no scale"),
    "another shape": (
        lambda t: t.update({f"{DOWN}_scale_inv": torch.ones(5, 3)}),
        rf"{DOWN}_scale_inv \[5, 3\] does not fit {DOWN} \[128, 192\]",
    ),
    "a float matrix": (lambda t: t.update({DOWN: t[DOWN].bfloat16()}), rf"{DOWN} is no quantised matrix"),
    "two scales": (lambda t: t.update({f"{DOWN}_scale": torch.ones(1)}), rf"{DOWN} has two scales"),
    "packed names": (
        lambda t: t.update({DOWN.replace("weight", "qweight"): torch.zeros(4, 4, dtype=torch.int32)}),
        r"down_proj\.qweight",
    ),
    "not a number": (
        lambda t: t.update({f"{DOWN}_scale_inv": t[f"{DOWN}_scale_inv"] * float("nan")}),
        rf"{DOWN} holds 24576 numbers that are not finite",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_does_not_fit_is_named(what, model, tmp_path):
    change, message = CHANGES[what]
    source = _change(model, tmp_path / "changed", "fp8-block", change)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(source).read(DOWN)


def test_integers_are_never_weights(model, tmp_path):
    shutil.copytree(model.folder, tmp_path / "odd")
    tensors = tensors_of(model.folder)
    tensors["model.position_ids"] = torch.arange(8)[None]
    save_file(tensors, tmp_path / "odd" / "model.safetensors")
    weights = open_checkpoint(ModelSource("odd", tmp_path / "odd"))  # a buffer that nobody reads
    assert set(weights) == tensors.keys() - {"model.position_ids"}
    with pytest.raises(ModelError, match="position_ids holds I64"):
        weights.read("model.position_ids")
    save_file(tensors | {DOWN: tensors[DOWN].char()}, tmp_path / "odd" / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{DOWN} holds I8 and has no scale"):
        open_checkpoint(ModelSource("odd", tmp_path / "odd"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name",
    [DOWN, "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight"],
)
def test_numbers_that_are_not_finite_are_named(value, name, model, tmp_path):
    shutil.copytree(model.folder, tmp_path / "damaged")
    tensors = tensors_of(model.folder)
    tensors[name].view(-1)[[37, 38]] = value
    save_file(tensors, tmp_path / "damaged" / "model.safetensors")
    decoder = Decoder(ModelSource("damaged", tmp_path / "damaged"), CPU)
    place = r"\[37\]" if tensors[name].dim() == 1 else r"\[0, 37\]"
    said = []
    with pytest.raises(ModelError, match=rf"{name} holds 2 numbers that are not finite .* first at {place}"):
        decoder.check_weights(lambda *progress: said.append(progress))
    with pytest.raises(ModelError, match=name):
        decoder.matrix(name)


def test_stacks_are_checked_matrix_by_matrix(model, tmp_path, monkeypatch):
    stored = _blocks(5, 48, 3)
    stored[f"{STACK}_scales"][3, 7, 2] = 255
    weights = _with(tmp_path / "oss", model, {"quant_method": "mxfp4"}, stored)
    monkeypatch.setattr(weights, "read", lambda _: pytest.fail("all of it at once"))
    with pytest.raises(ModelError, match=rf"{STACK} holds 32 numbers that are not finite .* first at \[3, 64, 7\]"):
        weights.check(STACK)


@pytest.mark.parametrize("kind", ["llama", "llama-odd", "gemma3", "qwen3-moe", "phi-fused"])
def test_every_weight_is_checked_once(kind, make_model):
    decoder, said = Decoder(make_model(kind), CPU), []
    decoder.check_weights(lambda *progress: said.append(progress))
    assert said[-1][0] == said[-1][1] == sum(torch.Size(decoder.weights.shape(n)).numel() for n in decoder.weights)


def test_a_missing_weight_is_named_before_any_work(model, tmp_path):
    shutil.copytree(model.folder, tmp_path / "holed")
    tensors = tensors_of(model.folder)
    del tensors[DOWN]
    save_file(tensors, tmp_path / "holed" / "model.safetensors")
    with pytest.raises(ModelError, match=f"no tensor {DOWN}"):
        Decoder(ModelSource("holed", tmp_path / "holed"), CPU).check_weights()


def test_ragged_blocks_are_among_the_schemes(model):
    shape = tensors_of(model.folder)["model.layers.0.mlp.gate_proj.weight"].shape
    assert any(n % b for n, b in zip(shape, BLOCK, strict=True))
