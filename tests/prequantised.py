"""Checkpoints as quantisers write them whose matrices keep name and shape, made out of plain ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
            parts, values[name] = _quantised(name, weight.float(), scheme, scale)
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
