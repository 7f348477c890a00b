"""The tensors of a checkpoint by name, as the numbers that they stand for.

Checkpoints that are quantised already keep scales beside their matrices. `SafetensorsCheckpoint` knows the schemes
whose matrices keep name and shape: 8-bit floats and integers with a scale for a matrix, for each row, for groups of
columns or for blocks. It multiplies on reading, hides what only quantisation needs, and refuses whatever it does not
understand: nothing is ever read raw. Learner, last pass, simulation and writer all read through it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tesseraq_gguf.errors import FileFormatError, ModelError
from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.models.checkpoint import Checkpoint
from tesseraq_gguf.models.gguf_model import GgufCheckpoint
from tesseraq_gguf.models.source import ModelSource

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes whose numbers stand for themselves, as safetensors calls them."""

_SCALES = ("_scale_inv", "_scale")
"""What the name of a scale adds to its matrix's; both multiply. `_scale_inv` is the inverse of what was multiplied by
when the matrix was quantised."""

_ZERO_POINT = "_zero_point"

_ACTIVATIONS = (
    "input_scale", "input_scale_ub", "input_zero_point", "output_scale", "output_zero_point", "activation_scale",
    "k_scale", "v_scale", "q_scale", "kv_scale", "input_global_scale",
)  # fmt: skip
"""Last words of names that tell how activations are rounded, which a GGUF file does not hold."""

_PACKED = (
    ".qweight", ".qzeros", ".g_idx", "_g_idx", ".weight_packed", "_proj_blocks", ".absmax", ".quant_map", ".SCB",
    ".weight_scale_2", ".weight_global_scale", ".qscale_weight",
)  # fmt: skip
"""Ends of names that only packed checkpoints have."""

_PLAIN_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "dense")
"""Formats of compressed-tensors whose matrices keep name and shape."""

QUANTIZATION_FILE = "hf_quant_config.json"
"""Where ModelOpt says how it quantised."""

_KEYS = ("quantization_config", "compression_config")
_PARTS = ("text_config", "llm_config", "language_config")


@dataclass(frozen=True)
class _Layout:
    """How far a scale reaches.

    Attributes:
        targets: modules that it is for: names, regular expressions after `re:`, or classes such as `Linear`.
        block: rows and columns that share a scale, if blocks do.
        group: columns of a row that share one, if groups do.
    """

    targets: tuple[str, ...] = ("Linear",)
    block: tuple[int, int] | None = None
    group: int | None = None

    def is_for(self, module: str) -> bool:
        return any(
            re.match(t.removeprefix("re:"), module) if t.startswith("re:") else t in (module, "Linear")
            for t in self.targets
        )


@dataclass(frozen=True)
class _Scheme:
    """How a checkpoint says that it is quantised.

    Attributes:
        name: as messages have it.
        layouts: of which the first that is for a matrix counts.
    """

    name: str
    layouts: tuple[_Layout, ...] = (_Layout(),)


@dataclass(frozen=True)
class _Stored:
    """What the files say of a tensor: where it is, its dtype as safetensors calls it, its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Scaled:
    """What a quantised matrix is multiplied by: names of scale and zero-points, and how far they reach."""

    scale: str
    zero_point: str | None
    layout: _Layout


def open_checkpoint(source: ModelSource) -> Checkpoint:
    """Return the tensors of a model, of whatever files it consists.

    Raises:
        ModelError: a file is missing or broken, or the model is quantised in a way that is not understood.
    """
    if source.gguf is None:
        return SafetensorsCheckpoint(source)
    try:
        return GgufCheckpoint(open_gguf(source.gguf), source.name)
    except FileFormatError as error:
        raise ModelError(str(error)) from error


class SafetensorsCheckpoint(Checkpoint):
    """The tensors of a Hugging Face folder.

    Args:
        source: the model's files.

    Raises:
        ModelError: a file is missing or broken, or the checkpoint is quantised in a way that is not understood.
    """

    def __init__(self, source: ModelSource) -> None:
        self.name = source.name
        self._stored = _headers(source.weight_map())
        scheme = _scheme(source)
        self._scaled: dict[str, _Scaled] = {}
        self._hidden: set[str] = set()
        self._finite: set[str] = set()
        self._refuse_packed(scheme)
        if scheme:
            self._find_scales(scheme)
        self._refuse_unscaled()

    def __contains__(self, name: object) -> bool:
        return name in self._stored and name not in self._hidden and self._is_weight(str(name))

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._stored if name in self)

    def _is_weight(self, name: str) -> bool:
        """Whether a tensor is no buffer of integers, such as a mask."""
        return name in self._scaled or self._stored[name].dtype in _DTYPES

    @property
    def dequantized(self) -> Collection[str]:
        """Names of the matrices that are multiplied by scales when they are read."""
        return self._scaled.keys()

    @property
    def hidden(self) -> Collection[str]:
        """Names in the files that only quantisation needs."""
        return self._hidden

    @property
    def scales(self) -> Collection[str]:
        """Names of scales and zero-points of the matrices: what these cannot be read without."""
        return {n for scaled in self._scaled.values() for n in (scaled.scale, scaled.zero_point) if n}

    def file(self, name: str) -> Path:
        """Return the file that a tensor is in."""
        return self._stored[name].file

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that `read` gives a tensor: float32 if it is dequantised, else the file's."""
        return torch.float32 if name in self._scaled else _DTYPES[self._stored[name].dtype]

    def read(self, name: str) -> Tensor:
        """Read a tensor: in the dtype of the file, or float32 if it is dequantised; on the CPU.

        Raises:
            ModelError: it holds integers, or numbers that are not finite.
        """
        tensor = self._read(name, None)
        if name not in self._finite:
            self._check_finite(name, tensor)
            self._finite.add(name)
        return tensor

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """Read rows of a matrix, or numbers of a vector, float32.

        Args:
            name: the tensor.
            rows: which, int64 [count].
        """
        return self._read(name, rows).float()

    def _read(self, name: str, rows: Tensor | None) -> Tensor:
        if name not in self._scaled:
            if not self._is_weight(name):
                raise ModelError(
                    f"{self.name}: {name} holds {self._stored[name].dtype} and has no scale: "
                    "take the original model, in 16 or 32 bits"
                )
            return self._raw(name) if rows is None else self._picked(name, rows)
        scaled, shape = self._scaled[name], self.shape(name)
        weight = (self._raw(name) if rows is None else self._picked(name, rows)).float()
        which = torch.arange(shape[-2]) if rows is None else rows
        if scaled.zero_point:
            weight -= self._spread(name, scaled.zero_point, scaled.layout, which)
        return weight.mul_(self._spread(name, scaled.scale, scaled.layout, which))

    def _raw(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._stored[name].file, "pt") as tensors:
            return tensors.get_tensor(name)  # type: ignore[no-any-return]

    def _picked(self, name: str, rows: Tensor) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._stored[name].file, "pt") as tensors:
            part = tensors.get_slice(name)
            return torch.cat([part[int(row) : int(row) + 1] for row in rows])

    def _spread(self, name: str, companion: str, layout: _Layout, rows: Tensor) -> Tensor:
        """A scale, or zero-points, for rows of a matrix, float32: of a shape that broadcasts to these rows."""
        shape, scale = self.shape(name), self._raw(companion).float()
        if scale.numel() == 1:
            return scale.reshape(())
        outer, columns = shape[:-2], shape[-1]
        if scale.shape == outer:  # one for each matrix of a stack
            return scale[..., None, None]
        if scale.dim() == len(shape) - 1:
            scale = scale[..., None]
        if layout.block and scale.shape == (
            *outer,
            *(-(-n // b) for n, b in zip(shape[-2:], layout.block, strict=True)),
        ):
            height, width = layout.block
            return scale.index_select(-2, rows // height).repeat_interleave(width, -1)[..., :columns]
        if scale.shape == (*outer, shape[-2], 1):
            return scale.index_select(-2, rows)
        if layout.group and scale.shape == (*outer, shape[-2], -(-columns // layout.group)):
            return scale.index_select(-2, rows).repeat_interleave(layout.group, -1)[..., :columns]
        raise ModelError(
            f"{self.name}: {companion} {list(scale.shape)} does not fit {name} {list(shape)} in any way that is known: "
            "take the original model, in 16 or 32 bits"
        )

    def _check_finite(self, name: str, tensor: Tensor) -> None:
        wrong = ~torch.isfinite(tensor)
        if count := int(wrong.sum()):
            place = wrong.nonzero()[0].tolist()
            numbers = "a number that is" if count == 1 else f"{count} numbers that are"
            raise ModelError(
                f"{self.name}: {name} holds {numbers} not finite (NaN or infinity), the first at {place}: "
                "the model is damaged. Download it again"
            )

    def _refuse_packed(self, scheme: _Scheme | None) -> None:
        packed = next((n for n in self._stored if n.endswith(_PACKED)), None)
        if packed:
            said = f"as {scheme.name}" if scheme else "and packed, and config.json does not say how"
            raise ModelError(
                f"{self.name} is quantised already, {said} ({packed}): take the original model, in 16 or 32 bits"
            )
        if scheme is None:
            scale = next((n for n in self._stored if (b := _scaled_by(n)) and len(self._shape_of(b)) > 1), None)
            if scale:
                raise ModelError(
                    f"{self.name} has scales beside its matrices ({scale}), but config.json has no "
                    "quantization_config that says what they mean: take the original model, in 16 or 32 bits"
                )

    def _shape_of(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape if name in self._stored else ()

    def _find_scales(self, scheme: _Scheme) -> None:
        for name in self._stored:
            last = name.rpartition(".")[2]
            weight = _scaled_by(name)
            if weight in self._stored and len(self._shape_of(weight)) > 1:
                if self._stored[weight].dtype in _DTYPES:
                    raise ModelError(
                        f"{self.name}: {weight} is no quantised matrix, but there is {name}: "
                        "take the original model, in 16 or 32 bits"
                    )
                layout = next((x for x in scheme.layouts if x.is_for(weight.removesuffix(".weight"))), None)
                if layout is None:
                    raise ModelError(f"{self.name}: config.json does not say how {weight} is quantised")
                if weight in self._scaled:
                    raise ModelError(f"{self.name}: {weight} has two scales, {self._scaled[weight].scale} and {name}")
                point = weight + _ZERO_POINT
                self._scaled[weight] = _Scaled(name, point if point in self._stored else None, layout)
                self._hidden |= {name, point} & self._stored.keys()
            elif last in _ACTIVATIONS or last.endswith("_activation_scale"):
                self._hidden.add(name)

    def _refuse_unscaled(self) -> None:
        for name in self._stored.keys() - self._hidden:
            dtype = self._stored[name].dtype
            if not self._is_weight(name) and (dtype.startswith(("F8", "F6", "F4")) or name.endswith(".weight")):
                raise ModelError(
                    f"{self.name}: {name} holds {dtype} and has no scale that config.json speaks of: "
                    "take the original model, in 16 or 32 bits"
                )


def _scaled_by(name: str) -> str:
    """The name of the matrix that a scale of this name would be for; empty for other names."""
    ending = next((e for e in _SCALES if name.endswith(e)), None)
    return name.removesuffix(ending) if ending else ""


def _headers(files: Mapping[str, Path]) -> dict[str, _Stored]:
    from safetensors import safe_open

    found = {}
    for file in dict.fromkeys(files.values()):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (no mapping)
                if files.get(name) == file:
                    part = tensors.get_slice(name)
                    found[name] = _Stored(file, part.get_dtype(), tuple(part.get_shape()))
    return found


def _scheme(source: ModelSource) -> _Scheme | None:
    """Find out how a checkpoint is quantised; None if it says nothing of it.

    Raises:
        ModelError: in a way that cannot be undone here.
    """
    said = _said(source)
    if not said:
        return None
    method = str(said.get("quant_method") or ("bitsandbytes" if "load_in_8bit" in said else "")).lower()
    if method in ("fp8", "fbgemm_fp8"):
        block = said.get("weight_block_size")
        return _Scheme(method, (_Layout(block=_pair(block)),))
    if method == "compressed-tensors":
        return _compressed(source, said)
    if method == "modelopt" and str(said.get("quant_algo")).startswith("FP8"):
        return _Scheme("modelopt FP8")
    raise _refused(source, " ".join(filter(None, (method or "an unknown scheme", _detail(said)))))


def _detail(said: Mapping[str, Any]) -> str:
    bits = 4 if said.get("load_in_4bit") else 8 if said.get("load_in_8bit") else said.get("bits")
    return str(said.get("quant_algo") or (f"{bits} bits" if bits else ""))


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


def _compressed(source: ModelSource, said: Mapping[str, Any]) -> _Scheme:
    """The scheme of a checkpoint of compressed-tensors: one layout for each group of its configuration."""
    label = f"compressed-tensors {said.get('format')}"
    groups = said.get("config_groups") or {}
    formats = {str(group.get("format") or said.get("format")) for group in groups.values()} or {str(said.get("format"))}
    if said.get("format") != "mixed-precision":
        formats.add(str(said.get("format")))
    sparse = (said.get("sparsity_config") or {}).get("format", "dense")
    if not formats <= set(_PLAIN_FORMATS):
        raise _refused(source, f"compressed-tensors {', '.join(sorted(formats))}")
    if sparse != "dense":
        raise _refused(source, f"compressed-tensors {sparse}")
    if said.get("transform_config"):
        raise _refused(source, f"{label} with transforms")
    layouts = []
    for group in groups.values():
        weights = group.get("weights") or {}
        strategy = weights.get("strategy")
        layouts.append(
            _Layout(
                tuple(map(str, group.get("targets") or ["Linear"])),
                _pair(weights.get("block_structure")) if strategy in (None, "block") else None,
                weights.get("group_size") if strategy in (None, "group") else None,
            )
        )
    return _Scheme(label, tuple(layouts) or (_Layout(),))


def _pair(block: Any) -> tuple[int, int] | None:
    """Rows and columns of a block; older files of compressed-tensors write "128x128"."""
    if isinstance(block, str):
        block = block.split("x")
    return (int(block[0]), int(block[1])) if block else None


def _refused(source: ModelSource, scheme: str) -> ModelError:
    return ModelError(f"{source.name} is quantised already, as {scheme}: take the original model, in 16 or 32 bits")


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json for the same model with its matrices dequantised."""
    plain = {key: value for key, value in config.items() if key not in _KEYS}
    return plain | {p: plain_config(config[p]) for p in _PARTS if isinstance(config.get(p), dict)}


def check_weights(
    checkpoint: Checkpoint, names: Iterable[str], report: Callable[[int, int], None] = lambda *_: None
) -> None:
    """Read tensors once, to find out before any work whether all their numbers are finite.

    Args:
        checkpoint: the model's tensors.
        names: which, by stored name.
        report: called with (numbers read, numbers in all).

    Raises:
        ModelError: they are not; the message names the tensor.
    """
    sizes = {name: math.prod(checkpoint.shape(name)) for name in names}
    done, total = 0, sum(sizes.values())
    for name in sorted(sizes, key=lambda n: str(checkpoint.file(n))):
        checkpoint.read(name)
        done += sizes[name]
        report(done, total)
