"""What a checkpoint says of its quantisation, and which of its tensors make a matrix."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.models.dequantisers import (
    ORIGINAL,
    Dequantiser,
    Float4,
    Layout,
    PackedColumns,
    PackedRows,
    Scaled,
    Table4,
)
from tesseraq_gguf.models.source import ModelSource
from tesseraq_gguf.models.stored import StoredTensor

Tensors = Mapping[str, StoredTensor]

QUANTIZATION_FILE = "hf_quant_config.json"
"""Where ModelOpt says how it quantised."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes whose numbers stand for themselves, as safetensors calls them."""

PACKED = (
    ".qweight", ".qzeros", ".g_idx", "_g_idx", ".weight_packed", "_proj_blocks", ".absmax", ".quant_map", ".SCB",
    ".weight_scale_2", ".weight_global_scale", ".weight_zero_point", ".qscale_weight",
)  # fmt: skip
"""Ends of names that only packed checkpoints have."""

_SCALES = ("_scale_inv", "_scale")
"""What the name of a scale adds to its matrix's; both multiply. `_scale_inv` is the inverse of what was multiplied by
when the matrix was quantised."""

_ACTIVATIONS = (
    "input_scale", "input_scale_ub", "input_zero_point", "output_scale", "output_zero_point", "activation_scale",
    "k_scale", "v_scale", "q_scale", "kv_scale", "input_global_scale", "weight_format",
)  # fmt: skip
"""Last words of names that tell how activations are rounded, or how kernels want codes: nothing for a GGUF file."""

_FORMATS = (
    "float-quantized", "int-quantized", "naive-quantized", "dense", "pack-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized",
)  # fmt: skip
"""Formats of compressed-tensors that are read."""

_MODELOPT = ("FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "W4A16_NVFP4")
"""Algorithms of ModelOpt that are read."""

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_AWQ_VERSIONS = ("gemm", "exllama", "exllamav2", "marlin", "ipex")
"""What names a kernel, and keeps the codes in one way nevertheless."""

_KEYS = ("quantization_config", "compression_config")
_PARTS = ("text_config", "llm_config", "language_config")

_STATE = ".quant_state.bitsandbytes__"


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint says that it is quantised.

    Attributes:
        name: as messages have it.
        find: yields matrices by the name that they have unquantised.
        layouts: of which the first that is for a matrix counts.
    """

    name: str
    find: Callable[[Tensors, Scheme], Iterator[tuple[str, Dequantiser]]]
    layouts: tuple[Layout, ...] = (Layout(),)

    def layout(self, weight: str) -> Layout:
        """Return the layout of a matrix.

        Raises:
            ModelError: there is none for it; the message lacks the model's name.
        """
        found = next((x for x in self.layouts if x.is_for(weight.removesuffix(".weight"))), None)
        if found is None:
            raise ModelError(f"config.json does not say how {weight} is quantised")
        return found


def is_for_activations(name: str) -> bool:
    """Return whether a tensor tells how activations are rounded."""
    last = name.rpartition(".")[2]
    return last in _ACTIVATIONS or last.endswith("_activation_scale")


def scaled_by(name: str) -> str:
    """Return the name of the matrix that a scale of this name would be for; empty for other names."""
    ending = next((e for e in _SCALES if name.endswith(e)), None)
    return name.removesuffix(ending) if ending else ""


# --- what makes a matrix


def _scaled(tensors: Tensors, scheme: Scheme) -> Iterator[tuple[str, Dequantiser]]:
    """Matrices that keep name and shape."""
    for name, scale in tensors.items():
        weight = tensors.get(scaled_by(name))
        if weight is None or len(weight.shape) < 2 or weight.dtype == "U8":
            continue
        if weight.dtype in FLOATS:
            raise ModelError(f"{weight.name} is no quantised matrix, but there is {name}: {ORIGINAL}")
        point = tensors.get(f"{weight.name}_zero_point")
        yield weight.name, Scaled(weight, scale, point, scheme.layout(weight.name))


def _compressed(tensors: Tensors, scheme: Scheme) -> Iterator[tuple[str, Dequantiser]]:
    yield from _scaled(tensors, scheme)
    for name, packed in tensors.items():
        if not name.endswith("_packed"):
            continue
        weight = name.removesuffix("_packed")
        scale = _needed(tensors, f"{weight}_scale", packed)
        if packed.dtype == "U8":
            yield weight, Float4(packed, scale, tensors.get(f"{weight}_global_scale"), divides=True)
        else:
            size, point, groups = (tensors.get(f"{weight}_{part}") for part in ("shape", "zero_point", "g_idx"))
            yield weight, PackedRows(packed, scale, size, point, groups, scheme.layout(weight))


def _modelopt(tensors: Tensors, scheme: Scheme) -> Iterator[tuple[str, Dequantiser]]:
    yield from _scaled(tensors, scheme)
    for name, whole in tensors.items():
        if name.endswith("_scale_2"):
            packed = _needed(tensors, name.removesuffix("_scale_2"), whole)
            yield packed.name, Float4(packed, _needed(tensors, f"{packed.name}_scale", packed), whole)


def _gpt_oss(tensors: Tensors, _: Scheme) -> Iterator[tuple[str, Dequantiser]]:
    """Stacks of experts, which transformers keeps with rows and columns exchanged."""
    for name, packed in tensors.items():
        if name.endswith("_blocks"):
            weight = name.removesuffix("_blocks")
            yield weight, Float4(packed, _needed(tensors, f"{weight}_scales", packed), transposed=True)


def _gptq(bits: int, size: int | None, offset: int) -> Callable[[Tensors, Scheme], Iterator[tuple[str, Dequantiser]]]:
    def find(tensors: Tensors, _: Scheme) -> Iterator[tuple[str, Dequantiser]]:
        for packed, zeros, scale, module in _packed_columns(tensors):
            groups = tensors.get(f"{module}.g_idx")
            own = bits if groups is None else 32 * packed.shape[0] // groups.shape[0]  # some have bits of their own
            if own not in (2, 3, 4, 8):
                raise ModelError(f"{packed.name} has codes of {own} bits, which are not read: {ORIGINAL}")
            yield f"{module}.weight", PackedColumns(packed, zeros, scale, groups, size, own, offset)

    return find


def _awq(size: int | None) -> Callable[[Tensors, Scheme], Iterator[tuple[str, Dequantiser]]]:
    def find(tensors: Tensors, _: Scheme) -> Iterator[tuple[str, Dequantiser]]:
        for packed, zeros, scale, module in _packed_columns(tensors):
            yield f"{module}.weight", PackedColumns(packed, zeros, scale, None, size, 4, 0, _AWQ_ORDER)

    return find


def _packed_columns(tensors: Tensors) -> Iterator[tuple[StoredTensor, StoredTensor, StoredTensor, str]]:
    for name, packed in tensors.items():
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            zeros, scale = (_needed(tensors, f"{module}.{part}", packed) for part in ("qzeros", "scales"))
            yield packed, zeros, scale, module


def _bitsandbytes(tensors: Tensors, _: Scheme) -> Iterator[tuple[str, Dequantiser]]:
    for name, part in tensors.items():
        if _STATE in name:
            weight = name.partition(_STATE)[0]
            packed, largest, table = (_needed(tensors, weight + end, part) for end in ("", ".absmax", ".quant_map"))
            outer = (tensors.get(f"{weight}.nested_{end}") for end in ("absmax", "quant_map"))
            yield weight, Table4(packed, largest, table, part, *outer)
        elif name.endswith(".SCB"):
            matrix = _needed(tensors, f"{name.removesuffix('.SCB')}.weight", part)
            yield matrix.name, Scaled(matrix, part, factor=1 / 127)


def _needed(tensors: Tensors, name: str, beside: StoredTensor) -> StoredTensor:
    if name not in tensors:
        raise ModelError(f"there is {beside.name}, but no {name}: {ORIGINAL}")
    return tensors[name]


# --- what is said


def scheme_of(source: ModelSource) -> Scheme | None:
    """Find out how a checkpoint is quantised; None if it says nothing of it.

    Raises:
        ModelError: in a way that cannot be undone here.
    """
    said = _said(source)
    if not said:
        return None
    eight = "load_in_8bit" in said or "load_in_4bit" in said
    method = str(said.get("quant_method") or ("bitsandbytes" if eight else "")).lower()
    reader = _READERS.get(method)
    found = reader(said) if reader else None
    if isinstance(found, Scheme):
        return found
    named = found or " ".join(filter(None, (method or "an unknown scheme", _detail(said))))
    raise ModelError(f"{source.name} is quantised already, as {named}: {ORIGINAL}")


def _read_fp8(said: Mapping[str, Any]) -> Scheme:
    return Scheme(str(said["quant_method"]), _scaled, (Layout(block=_pair(said.get("weight_block_size"))),))


def _read_modelopt(said: Mapping[str, Any]) -> Scheme | None:
    layers = said.get("quantized_layers") or {}
    algorithms = {str(layer.get("quant_algo")) for layer in layers.values()} or {str(said.get("quant_algo"))}
    if not algorithms <= set(_MODELOPT):
        return None
    block = (128, 128) if "FP8_PB_WO" in algorithms else None
    return Scheme(f"modelopt {', '.join(sorted(algorithms))}", _modelopt, (Layout(block=block),))


def _read_mxfp4(said: Mapping[str, Any]) -> Scheme:
    return Scheme("mxfp4", _gpt_oss)


def _read_gptq(said: Mapping[str, Any]) -> Scheme | None:
    kept = str(said.get("checkpoint_format") or "gptq").lower()
    if kept not in ("gptq", "gptq_v2") or said.get("bits") not in (2, 3, 4, 8):
        return None
    # the first version keeps zero-points less one
    return Scheme("gptq", _gptq(said["bits"], _size(said), 1 if kept == "gptq" else 0))


def _read_awq(said: Mapping[str, Any]) -> Scheme | None:
    plain = str(said.get("version") or "gemm").lower() in _AWQ_VERSIONS
    return Scheme("awq", _awq(_size(said))) if plain and said.get("bits", said.get("w_bit", 4)) == 4 else None


def _read_bitsandbytes(_: Mapping[str, Any]) -> Scheme:
    return Scheme("bitsandbytes", _bitsandbytes)


def _read_compressed(said: Mapping[str, Any]) -> Scheme | str:
    """The scheme, one layout for each group of the configuration; or what is said of one that is not read."""
    groups = said.get("config_groups") or {}
    formats = {str(group.get("format") or said.get("format")) for group in groups.values()} or {str(said.get("format"))}
    if said.get("format") != "mixed-precision":
        formats.add(str(said.get("format")))
    sparse = (said.get("sparsity_config") or {}).get("format", "dense")
    if not formats <= set(_FORMATS):
        return f"compressed-tensors {', '.join(sorted(formats))}"
    if sparse != "dense":
        return f"compressed-tensors {sparse}"
    if said.get("transform_config"):
        return f"compressed-tensors {said.get('format')} with transforms"
    layouts = tuple(map(_layout, groups.values()))
    return Scheme(f"compressed-tensors {said.get('format')}", _compressed, layouts or (Layout(),))


def _layout(group: Mapping[str, Any]) -> Layout:
    weights = group.get("weights") or {}
    strategy = weights.get("strategy")
    return Layout(
        tuple(map(str, group.get("targets") or ["Linear"])),
        _pair(weights.get("block_structure")) if strategy in (None, "block") else None,
        weights.get("group_size") if strategy in (None, "group", "tensor_group") else None,
        weights.get("num_bits"),
    )


_READERS: dict[str, Callable[[Mapping[str, Any]], Scheme | str | None]] = {
    "fp8": _read_fp8,
    "fbgemm_fp8": _read_fp8,
    "modelopt": _read_modelopt,
    "mxfp4": _read_mxfp4,
    "gptq": _read_gptq,
    "awq": _read_awq,
    "bitsandbytes": _read_bitsandbytes,
    "compressed-tensors": _read_compressed,
}
"""What reads the configuration of a method: into a scheme, into what is said of one that is not read, or into None."""


def _detail(said: Mapping[str, Any]) -> str:
    bits = 4 if said.get("load_in_4bit") else 8 if said.get("load_in_8bit") else said.get("bits")
    kept = said.get("checkpoint_format") or said.get("version")
    return " ".join(filter(None, (str(said.get("quant_algo") or (f"{bits} bits" if bits else "")), kept)))


def _said(source: ModelSource) -> dict[str, Any]:
    """What the model's files say of its quantisation; empty if nothing."""
    config = source.config()
    parts = [config, *(config[p] for p in _PARTS if isinstance(config.get(p), dict))]
    said: dict[str, Any] = next(
        (part[key] for part in parts for key in _KEYS if isinstance(part.get(key), dict) and part[key]), {}
    )
    beside = source.folder / QUANTIZATION_FILE
    if beside.is_file() and "quant_algo" not in said and said.get("quant_method", "modelopt") == "modelopt":
        try:
            told = json.loads(beside.read_text(encoding="utf-8")).get("quantization") or {}
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
            raise ModelError(f"{beside} cannot be read: {error}") from error
        if told.get("quant_algo"):
            said = {"quant_method": "modelopt"} | said | told
    return said


def _size(said: Mapping[str, Any]) -> int | None:
    size = said.get("group_size", said.get("q_group_size"))
    return int(size) if size and int(size) > 0 else None


def _pair(block: Any) -> tuple[int, int] | None:
    """Rows and columns of a block; older files of compressed-tensors write "128x128"."""
    if isinstance(block, str):
        block = block.split("x")
    return (int(block[0]), int(block[1])) if block else None


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json for the same model with its matrices dequantised."""
    plain = {key: value for key, value in config.items() if key not in _KEYS}
    return plain | {p: plain_config(config[p]) for p in _PARTS if isinstance(config.get(p), dict)}
