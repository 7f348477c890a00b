"""Checkpoints as quantisers write them, made out of plain ones: codes in the matrices' place, or packed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = (128, 80)
"""Rows and columns of blocks that divide neither rows nor columns of the tiny models."""

_GROUP = 64


@dataclass(frozen=True)
class Scheme:
    """One way to quantise.

    Attributes:
        dtype: of the codes.
        strategy: what has a scale of its own: tensor, channel (a row), group or block.
        said: what config.json says of it.
        suffix: what a scale's name adds to its matrix's.
        key: under which config.json says it; `hf_quant_config.json` is a file of its own.
        zero_points: whether codes have them.
        extra: tensors of one number that stand beside each matrix, by the last word of their name.
        flat: scales of rows are vectors, not columns.
        block: of rows and columns.
    """

    dtype: torch.dtype
    strategy: str
    said: dict
    suffix: str = "_scale"
    key: str = "quantization_config"
    zero_points: bool = False
    extra: tuple[str, ...] = ()
    flat: bool = False
    block: tuple[int, int] = BLOCK


def compressed(kind: str, bits: int, strategy: str, format: str | None = None, **more: object) -> dict:
    """What compressed-tensors writes."""
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights | more, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format or f"{kind}-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def _two_groups() -> dict:
    said = compressed("int", 8, "group", group_size=_GROUP)
    said["config_groups"]["group_0"]["targets"] = ["re:.*mlp.*"]
    other = compressed("int", 8, "group", group_size=_GROUP)["config_groups"]["group_0"]
    said["config_groups"]["group_1"] = other | {"targets": ["re:.*self_attn.*"]}
    return said


FP8, INT8 = torch.float8_e4m3fn, torch.int8
SCHEMES = {
    "fp8-block": Scheme(
        FP8, "block", {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"},
        "_scale_inv",
    ),
    "fp8-tensor": Scheme(
        FP8, "tensor", {"quant_method": "fp8", "activation_scheme": "static"}, extra=("input_scale",)
    ),
    "fp8-fbgemm": Scheme(FP8, "channel", {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]}),
    "fp8-modelopt": Scheme(
        FP8, "tensor", {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}, "producer": {}},
        key="hf_quant_config.json", extra=("input_scale",),
    ),
    "fp8-ct-tensor": Scheme(FP8, "tensor", compressed("float", 8, "tensor"), extra=("input_scale",)),
    "fp8-ct-row": Scheme(FP8, "channel", compressed("float", 8, "channel")),
    "fp8-ct-flat-row": Scheme(FP8, "channel", compressed("float", 8, "channel"), flat=True),
    "fp8-ct-block": Scheme(FP8, "block", compressed("float", 8, "block", block_structure=list(BLOCK))),
    "fp8-ct-block-text": Scheme(
        FP8, "block", compressed("float", 8, "block", "naive-quantized", block_structure="x".join(map(str, BLOCK)))
    ),
    "int8-ct-tensor": Scheme(INT8, "tensor", compressed("int", 8, "tensor")),
    "int8-ct-row": Scheme(INT8, "channel", compressed("int", 8, "channel")),
    "int8-ct-group": Scheme(INT8, "group", compressed("int", 8, "group", group_size=_GROUP)),
    "int8-ct-groups": Scheme(INT8, "group", _two_groups()),
    "int8-ct-zero": Scheme(INT8, "channel", compressed("int", 8, "channel", symmetric=False), zero_points=True),
    "int8-ct-old": Scheme(INT8, "channel", compressed("int", 8, "channel"), key="compression_config"),
}  # fmt: skip


def prequantise(
    source: Path, folder: Path, scheme: Scheme, scale: float | None = None, pick: Callable[[str], bool] | None = None
) -> dict[str, Tensor]:
    """Write a quantised copy of a model: the matrices of its blocks, except for routers.

    Args:
        source: a model's folder.
        folder: where the copy goes.
        scheme: how it is quantised.
        scale: to use everywhere; by default scales are as small as can be.
        pick: which matrices, by name.

    Returns:
        What the quantised matrices stand for, float32 by name.
    """
    return _written(source, folder, scheme, lambda name, weight: _quantised(name, weight, scheme, scale), pick)


def _written(
    source: Path,
    folder: Path,
    scheme: Scheme | Packed,
    make: Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]],
    pick: Callable[[str], bool] | None = None,
) -> dict[str, Tensor]:
    shutil.copytree(source, folder)
    tensors = {name: t for file in folder.glob("model*.safetensors") for name, t in load_file(file).items()}
    for file in folder.glob("model*"):
        file.unlink()
    stored, values = dict(tensors), {}
    for name, weight in tensors.items():
        if (
            "layers" in name
            and weight.dim() == 2
            and not name.endswith(".gate.weight")
            and (pick is None or pick(name))
        ):
            parts, values[name] = make(name, weight.float())
            del stored[name]
            stored |= parts
    save_file({name: t.contiguous() for name, t in stored.items()}, folder / "model.safetensors")
    if scheme.key.endswith(".json"):
        (folder / scheme.key).write_text(json.dumps(scheme.said))
    else:
        config = json.loads((folder / "config.json").read_text()) | {scheme.key: scheme.said}
        (folder / "config.json").write_text(json.dumps(config))
    return values


def _quantised(name: str, weight: Tensor, scheme: Scheme, fixed: float | None) -> tuple[dict[str, Tensor], Tensor]:
    rows, columns = weight.shape
    height, width = {
        "tensor": (rows, columns), "channel": (1, columns), "group": (1, _GROUP), "block": scheme.block
    }[scheme.strategy]  # fmt: skip
    top = 127 if scheme.dtype == INT8 else 448
    scale = torch.empty(-(-rows // height), -(-columns // width))
    codes, value, point = torch.empty_like(weight), torch.empty_like(weight), torch.zeros_like(scale)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            place = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
            part = weight[place]
            # no two scales alike, so that none can stand for another
            own = float(part.abs().amax()) / top * 1.01 if fixed is None else fixed
            scale[i, j] = torch.tensor(own).bfloat16().float()
            point[i, j] = 3 * (i % 5) if scheme.zero_points else 0
            code = part / scale[i, j] + point[i, j]
            code = code.round().clamp(-128, 127) if scheme.dtype == INT8 else code.clamp(-top, top)
            codes[place] = code.to(scheme.dtype).float()
            value[place] = (codes[place] - point[i, j]) * scale[i, j]
    scale = scale.reshape(1) if scheme.strategy == "tensor" else scale.flatten() if scheme.flat else scale
    parts = {name: codes.to(scheme.dtype), name + scheme.suffix: scale.bfloat16() if fixed is None else scale}
    if scheme.zero_points:
        parts[f"{name}_zero_point"] = point.to(torch.int8)
    parts |= {f"{name.removesuffix('weight')}{word}": torch.ones(1) for word in scheme.extra}
    return parts, value


# --- packed: codes under other names, several in a byte or a word


@dataclass(frozen=True)
class Packed:
    """One way to pack.

    Attributes:
        said: what config.json says of it.
        pack: makes of a matrix's name and numbers, float32 [out, in], the tensors that stand in its place, and what
            they stand for.
        key: under which config.json says it; `hf_quant_config.json` is a file of its own.
    """

    said: dict
    pack: Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]
    key: str = "quantization_config"


def _stream(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, n], one after the other from the lowest bit of a row on, as int32 words: by Python's integers."""
    words = []
    for row in codes.tolist():
        joined = sum(code << (bits * place) for place, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        words.append([(joined >> (32 * i)) & 0xFFFFFFFF for i in range(count)])
    return torch.from_numpy(np.array(words, np.uint32).view(np.int32))


def _integers(weight: Tensor, bits: int, group: int, symmetric: bool, order: list[int] | None = None):
    """Codes from 0, zero-points and scales (float16 numbers) [out, groups], and what they stand for [out, in]."""
    out, columns = weight.shape
    of = order or [j // group for j in range(columns)]
    count, top = max(of) + 1, 2**bits - 1
    scale, zero = torch.empty(out, count), torch.empty(out, count, dtype=torch.int64)
    codes, value = torch.empty(weight.shape, dtype=torch.int64), torch.empty_like(weight)
    for g in range(count):
        inside = [j for j in range(columns) if of[j] == g]
        part = weight[:, inside]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        step = 2 * torch.maximum(-low, high) / top if symmetric else (high - low) / top
        scale[:, g] = step.clamp(min=1e-4).half().float()
        zero[:, g] = 2 ** (bits - 1) if symmetric else (-low / scale[:, g]).round().long().clamp(1, top)
        codes[:, inside] = (part / scale[:, g, None]).round().long().add(zero[:, g, None]).clamp(0, top)
        value[:, inside] = (codes[:, inside] - zero[:, g, None]).float() * scale[:, g, None]
    return codes, zero, scale, value


def _gptq(bits: int, *, symmetric: bool = True, acting: bool = False, named: bool = True, offset: int = 1):
    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        columns, module = weight.shape[1], name.removesuffix("weight")
        # as by the order of activations: groups are of the same size, and their columns stand anywhere
        order = [(7 * j) % columns // 32 for j in range(columns)] if acting else [j // 32 for j in range(columns)]
        codes, zero, scale, value = _integers(weight, bits, 32, symmetric, order)
        parts = {
            f"{module}qweight": _stream(codes, bits).T,
            f"{module}qzeros": _stream(zero.T - offset, bits),
            f"{module}scales": scale.T.half(),
        }
        return parts | ({f"{module}g_idx": torch.tensor(order, dtype=torch.int32)} if named else {}), value

    return pack


def _awq(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes, zero, scale, value = _integers(weight, 4, 32, False)
    places = [0, 2, 4, 6, 1, 3, 5, 7]  # the output that each nibble of a word is of, from the lowest on

    def words(rows: Tensor) -> Tensor:
        return _stream(torch.stack([rows[:, i + p] for i in range(0, rows.shape[1], 8) for p in places], 1), 4)

    module = name.removesuffix("weight")
    return {
        f"{module}qweight": words(codes.T),
        f"{module}qzeros": words(zero.T),
        f"{module}scales": scale.T.half(),
    }, value


def _packed_rows(bits: int, group: int, *, symmetric: bool = True, acting: bool = False):
    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        columns = weight.shape[1]
        group_size = group or columns
        order = [(5 * j) % columns // group_size for j in range(columns)] if acting else None
        codes, zero, scale, value = _integers(weight, bits, group_size, symmetric, order)
        parts = {
            f"{name}_packed": _stream(codes, bits),
            f"{name}_scale": scale.half(),
            f"{name}_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            parts[f"{name}_zero_point"] = _stream(zero.T, bits).T
        if order:
            parts[f"{name}_g_idx"] = torch.tensor(order, dtype=torch.int32)
        return parts, value

    return pack


FLOAT4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def float4(part: Tensor) -> tuple[list[int], list[float]]:
    """Codes of numbers within ±6, and what they stand for."""
    codes, values = [], []
    for number in part.tolist():
        near = min(range(8), key=lambda c: abs(FLOAT4[c] - abs(number)))
        codes.append(near + (8 if number < 0 else 0))
        values.append(FLOAT4[near] * (-1 if number < 0 else 1))
    return codes, values


def _float4(group: int, made: str):
    """NVFP4 of ModelOpt or compressed-tensors (groups of 16), or MXFP4 (32)."""

    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        raw = torch.empty(weight.shape[0], weight.shape[1] // 2, dtype=torch.uint8)
        scale, value = torch.empty(weight.shape[0], weight.shape[1] // group), torch.empty_like(weight)
        whole = 1.0 if group == 32 else float(weight.abs().max()) / 6 / 448
        for i, row in enumerate(weight):
            for g, part in enumerate(row.split(group)):
                wanted = max(float(part.abs().max()), 1e-6) / 6 / whole
                exponent = math.ceil(math.log2(wanted))
                own = 2.0**exponent if group == 32 else float(torch.tensor(wanted).to(torch.float8_e4m3fn))
                scale[i, g] = exponent + 127 if group == 32 else own
                codes, found = float4(part / (own * whole))
                value[i, g * group : (g + 1) * group] = torch.tensor(found) * own * whole
                pairs = [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]
                raw[i, g * group // 2 : (g + 1) * group // 2] = torch.tensor(pairs, dtype=torch.uint8)
        if made == "modelopt":
            own_names, inverse = (name, f"{name}_scale", f"{name}_scale_2"), torch.tensor(whole)
        else:
            own_names, inverse = (f"{name}_packed", f"{name}_scale", f"{name}_global_scale"), torch.tensor([1 / whole])
        kept = scale.to(torch.uint8 if group == 32 else torch.float8_e4m3fn)
        parts = dict(zip(own_names, (raw, kept, inverse), strict=True))
        if group == 32:
            del parts[own_names[2]]
        return parts, value

    return pack


_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def _table4(nested: bool):
    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        table, blocks = torch.tensor(_NF4), weight.reshape(-1, 64)
        largest = blocks.abs().amax(1)
        parts: dict[str, Tensor] = {}
        said = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
        if nested:
            mean, inner = float(largest.mean()), torch.linspace(-1, 1, 256)
            outer = torch.stack([(p - mean).abs().max() for p in largest.split(16)])
            codes = torch.stack([
                (inner - (x - mean) / outer[i // 16]).abs().argmin() for i, x in enumerate(largest)
            ])  # fmt: skip
            largest = torch.stack([inner[c] * outer[i // 16] + mean for i, c in enumerate(codes)])
            parts |= {f"{name}.nested_absmax": outer, f"{name}.nested_quant_map": inner}
            parts[f"{name}.absmax"] = codes.to(torch.uint8)
            said |= {"nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": mean}
        else:
            parts[f"{name}.absmax"] = largest
        places = (blocks[..., None] / largest[:, None, None] - table).abs().argmin(-1).flatten()
        parts[name] = torch.tensor([[16 * a + b] for a, b in places.view(-1, 2).tolist()], dtype=torch.uint8)
        parts[f"{name}.quant_map"] = table
        state = json.dumps(said).encode()
        parts[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(state), dtype=torch.uint8)
        return parts, (table[places].view_as(blocks) * largest[:, None]).view_as(weight)

    return pack


def _int8(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    largest = weight.abs().amax(1)
    codes = (weight / largest[:, None] * 127).round()
    module = name.removesuffix("weight")
    parts = {
        name: codes.to(torch.int8),
        f"{module}SCB": largest,
        f"{module}weight_format": torch.zeros((), dtype=torch.uint8),
    }
    return parts, codes * largest[:, None] / 127


def _of_gptq(bits: int, **more: object) -> dict:
    return {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": True, "desc_act": False} | more


def _rows(bits: int, group: int, **more: object) -> dict:
    own = more | ({"group_size": group} if group else {})
    return compressed("int", bits, "group" if group else "channel", "pack-quantized", **own)


_BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
_NVFP4_CT = compressed("float", 4, "tensor_group", "nvfp4-pack-quantized", group_size=16)
_MXFP4_CT = compressed("float", 4, "group", "mxfp4-pack-quantized", group_size=32)
PACKED_SCHEMES = {
    "gptq-4": Packed(_of_gptq(4), _gptq(4)),
    "gptq-8": Packed(_of_gptq(8), _gptq(8)),
    "gptq-3": Packed(_of_gptq(3), _gptq(3)),
    "gptq-2": Packed(_of_gptq(2), _gptq(2, symmetric=False)),
    "gptq-act": Packed(_of_gptq(4, desc_act=True, sym=False), _gptq(4, symmetric=False, acting=True)),
    "gptq-nameless": Packed(_of_gptq(4), _gptq(4, named=False)),
    "gptq-v2": Packed(_of_gptq(4, checkpoint_format="gptq_v2"), _gptq(4, symmetric=False, offset=0)),
    "awq": Packed({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}, _awq),
    "ct-int4": Packed(_rows(4, 32), _packed_rows(4, 32)),
    "ct-int8": Packed(_rows(8, 0), _packed_rows(8, 0)),
    "ct-int4-zero": Packed(_rows(4, 32, symmetric=False), _packed_rows(4, 32, symmetric=False)),
    "ct-int4-act": Packed(_rows(4, 32, actorder="group"), _packed_rows(4, 32, symmetric=False, acting=True)),
    "ct-nvfp4": Packed(_NVFP4_CT, _float4(16, "ct")),
    "ct-mxfp4": Packed(_MXFP4_CT, _float4(32, "ct")),
    "modelopt-nvfp4": Packed(
        {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}, "producer": {"name": "modelopt"}},
        _float4(16, "modelopt"), "hf_quant_config.json",
    ),
    "nf4": Packed(_BITSANDBYTES, _table4(False)),
    "nf4-nested": Packed(_BITSANDBYTES | {"bnb_4bit_use_double_quant": True}, _table4(True)),
    "bnb-int8": Packed({"quant_method": "bitsandbytes", "load_in_8bit": True}, _int8),
}  # fmt: skip


def pack(source: Path, folder: Path, scheme: Packed) -> dict[str, Tensor]:
    """Write a packed copy of a model, as `prequantise` does."""
    return _written(source, folder, scheme, lambda name, weight: scheme.pack(name, weight))
