"""A GGUF file as the checkpoint of a model.

The config is made of the header (`gguf_config`), and every parameter of transformers' model has a place in the file: a
tensor, or a layer of one where experts are stacked. Tensors are read one by one, as the numbers that the file has.
What comes out is held against the file: the rotary embedding that transformers computes from the config must be the
header's, every tensor of the file must have a place in the model, and every parameter a tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.gguf_files.column_orders import SUFFIX, natural, orders_of
from tesseraq_gguf.gguf_files.dequantize import arrays_of, dequantized, own_codebooks
from tesseraq_gguf.gguf_files.factors import factor_tensors, factors_of
from tesseraq_gguf.gguf_files.gguf_file import GgufFile, TensorInfo
from tesseraq_gguf.models.checkpoint import Checkpoint
from tesseraq_gguf.models.experts import Forms, expert_of, unroll
from tesseraq_gguf.models.gguf_config import Described, Header, Rotary, describe
from tesseraq_gguf.types.facts import FACTOR
from tesseraq_gguf.types.quantized import QuantizedTensor

_CHUNK = 1 << 20
"""Weights dequantised at a time: so few that what comes between codes and weights stays in a processor's caches."""

_LISTED = 3
"""How many names a message lists."""

_STORED_AS = {"mixtral": ((".mlp.", ".block_sparse_moe."),)}
"""What checkpoints of a kind call modules otherwise than transformers does."""

_STACK_NAMES = {"mixtral": "layers.{block}.feed_forward.experts.{matrix}"}
"""What the `gguf` package calls the stack of all experts' matrices, where it is not what checkpoints call them."""

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Place:
    """Where a parameter stands in a file.

    Attributes:
        tensor: what the file says of the tensor.
        layer: which layer of a stack it is; None if the tensor is no stack.
        rows: for each row of the parameter the row of the tensor, or of its layer; None if they are in one order.
        shift: what values in the file are larger by than the parameter's.
    """

    tensor: TensorInfo
    layer: int | None
    rows: Rows | None
    shift: float

    def in_file(self, values: NDArray[Any]) -> NDArray[Any]:
        """Turn values of the parameter, [rows, ...], into those that the file has for them."""
        moved = values
        if self.rows is not None:
            moved = np.empty_like(values)
            moved[self.rows] = values
        return moved + values.dtype.type(self.shift) if self.shift else moved


class Places:
    """Where the parameters of a model stand in its file, by the names that checkpoints have for them.

    Args:
        described: the model, as the file describes it.
    """

    def __init__(self, described: Described) -> None:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        self._header, self._kind = described.header, described.kind
        self._heads = (described.config["num_attention_heads"], described.config["num_key_value_heads"])
        architecture = next(a for a, name in MODEL_ARCH_NAMES.items() if name == described.header.architecture)
        self._names = get_tensor_name_map(architecture, described.config["num_hidden_layers"])

    def tensor(self, name: str) -> str:
        """Return what GGUF files call the tensor in which a parameter is.

        Raises:
            ModelError: nobody here knows.
        """
        module, _, ending = name.rpartition(".")
        expert = expert_of(name)
        if expert is not None:
            module = module.replace(f".experts.{expert}.", ".experts.")
            if self._kind.model_type in _STACK_NAMES:
                block, matrix = module.split(".")[2], module.rpartition(".")[2]
                module = _STACK_NAMES[self._kind.model_type].format(block=block, matrix=matrix)
        found = self._names.get_name(module)
        if found is None:
            raise self._header.refuse(f"may lack {name}, whose name in GGUF files is not known here")
        return f"{found}.{ending}"

    def __getitem__(self, name: str) -> Place:
        tensor = self._header.tensors[self.tensor(name)]
        shift = 1.0 if self._kind.shifted and tensor.name.endswith("norm.weight") else 0.0
        return Place(tensor, expert_of(name), self._rows(tensor), shift)

    def _rows(self, tensor: TensorInfo) -> Rows | None:
        """Rows that llama.cpp's converter moves: neighbours are those that are turned together."""
        which = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", tensor.name)
        if not self._kind.permuted or which is None:
            return None
        count, heads = tensor.shape[-1], self._heads[which[1] == "k"]
        return np.arange(count).reshape(heads, count // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def check_rotary(described: Described, model: Any) -> None:
    """Compare sines and cosines of a model with those that llama.cpp computes from the header.

    Raises:
        ModelError: they differ.
    """
    module = model.base_model.rotary_emb
    for name, rotary in described.rotaries.items():
        typed = {"layer_type": name} if name else {}
        for long in (False, True) if rotary.factors is not None else (False,):
            positions = torch.tensor([[1, 2, rotary.original if long else 3]])
            found = module(torch.zeros(1), positions, **typed)
            if not all(_same(f, w) for f, w in zip(found, _waves(rotary, positions[0], long), strict=True)):
                raise described.header.refuse(
                    "has a rotary embedding that transformers cannot compute as llama.cpp does"
                )


def _waves(rotary: Rotary, positions: Tensor, long: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    angles = np.outer(positions.numpy(), rotary.frequencies(long))
    angles = np.concatenate([angles, angles], axis=1)
    return rotary.attention * np.cos(angles), rotary.attention * np.sin(angles)


def _same(found: Tensor, wanted: NDArray[np.float64]) -> bool:
    # positions are at most as large as a context, and angles are computed in float32
    near = found[0].double().numpy()
    return near.shape == wanted.shape and bool(np.allclose(near[:2], wanted[:2], atol=1e-5, rtol=0))


def _parameters(described: Described, model: Any) -> dict[str, torch.Size]:
    """Return shapes of all parameters by the names that checkpoints have for them."""
    unroll(model, Forms(model).by_name)
    head = model.get_output_embeddings()
    shapes: dict[str, torch.Size] = {}
    for module_name, module in model.named_modules():
        if module is head and described.config["tie_word_embeddings"]:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}"
            for ours, theirs in _STORED_AS.get(described.kind.model_type, ()):
                full_name = full_name.replace(ours, theirs)
            shapes[full_name] = parameter.shape
    return shapes


class GgufCheckpoint(Checkpoint):
    """The tensors of a GGUF file by the names that checkpoints have for them, float32.

    Args:
        file: the file.
        name: how messages call the model.

    Attributes:
        described: what the header says of the model.
        config: the same as config.json has it.

    Raises:
        ModelError: it is not a model that is understood whole.
        FileFormatError: it is damaged.
    """

    def __init__(self, file: GgufFile, name: str) -> None:
        self.name, self.described = name, describe(file)
        try:
            model = _skeleton(self.described)
            check_rotary(self.described, model)
            self._shapes = _parameters(self.described, model)
        except (ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
            # config and model classes raise whatever a number led them to
            reason = (str(error) or type(error).__name__).strip().split("\n")[0]
            raise ModelError(f"{file.path} cannot be read as a GGUF model: {reason}") from error
        self.config = model.config.to_dict() | {"architectures": [self.described.kind.class_name]}
        self._file, self._orders, self._codebooks = file, orders_of(file), own_codebooks(file)
        self._factors = factors_of(file)
        places = Places(self.described)
        _check_complete(self.described.header, {places.tensor(name) for name in self._shapes})
        self._places = {name: self._fitting(name, places[name]) for name in self._shapes}

    def _fitting(self, name: str, place: Place) -> Place:
        """The place of a parameter, whose tensor must have the shape that the config implies."""
        shape, config, tensor = self.shape(name), self.described.config, place.tensor
        if place.layer is not None:
            shape = (config.get("num_experts") or config["num_local_experts"], *shape)
        if tensor.weights != math.prod(shape) or tensor.shape[0] != shape[-1]:
            raise self.described.header.refuse(
                f"has {tensor.name} of shape {list(tensor.shape)}, where its header implies {list(reversed(shape))}"
            )
        return place

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    @property
    def dequantized(self) -> Collection[str]:
        """All names: transformers reads none of them by itself."""
        return self._shapes.keys()

    def file(self, name: str) -> Path:
        """Return the file, or the part of a split one, that a tensor is in."""
        return self._file.parts[self._places[name].tensor.part]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return tuple(self._shapes[name])

    def dtype(self, name: str) -> torch.dtype:
        """Return float32."""
        return torch.float32

    def read(self, name: str) -> Tensor:
        """Read a tensor, float32 on the CPU; little more than the result is in memory.

        Raises:
            ModelError: it holds numbers that are not finite.
        """
        place, data, finite = self._places[name], self._data(name), True
        weights: NDArray[np.float32] = np.empty((len(data), place.tensor.shape[0]), np.float32)
        step = max(1, _CHUNK // weights.shape[1])
        for start in range(0, len(data), step):
            part = self._numbers(place, data[start : start + step])
            weights[start : start + step] = part
            finite = finite and bool(np.isfinite(part).all())
        weights = weights.reshape(self.shape(name))
        if not finite:
            raise self._not_finite(place.tensor, weights)
        return self._restored(place, weights if place.rows is None else weights[place.rows])

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """Read rows of a matrix, or numbers of a vector, float32.

        Args:
            name: the tensor.
            rows: which, int64 [count].
        """
        place, which = self._places[name], rows.numpy()
        if len(self.shape(name)) < 2:
            return self.read(name)[rows]
        there = which if place.rows is None else place.rows[which]
        weights = self._numbers(place, self._data(name)[there])
        return self._restored(place, weights.reshape(len(which), *self.shape(name)[1:]))

    def type_of(self, name: str) -> str:
        """Return the name of a parameter's tensor type, lower case."""
        return self._places[name].tensor.type

    def codes(self, name: str) -> QuantizedTensor:
        """Read a matrix as its type keeps it: codes and parameters, on the CPU.

        Args:
            name: of a matrix whose type can be learned.
        """
        place, data = self._places[name], self._data(name)
        rows = np.array(data) if place.rows is None else data[place.rows]
        arrays = arrays_of(place.tensor.type, rows, self._codebooks)
        if (factor := self._factor(place)) is not None:
            arrays[FACTOR] = np.full((len(rows), 1), factor)
        return QuantizedTensor(place.tensor.type, {key: torch.from_numpy(array) for key, array in arrays.items()})

    def has_factor(self, name: str) -> bool:
        """Whether a parameter has a factor in the file."""
        return self._factor(self._places[name]) is not None

    @property
    def ordered(self) -> bool:
        """Whether matrices have columns in an order of their own."""
        return bool(self._orders)

    def _data(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a parameter's rows, uint8 [rows, row_bytes], mapped and not read."""
        place = self._places[name]
        data = self._file.data(place.tensor)
        if place.layer is None:
            return data
        rows = self.shape(name)[0]
        return data[place.layer * rows : (place.layer + 1) * rows]

    def _numbers(self, place: Place, data: NDArray[np.uint8]) -> NDArray[np.float32]:
        tensor, factor = place.tensor, self._factor(place)
        numbers = natural(dequantized(tensor, data, self._codebooks), self._orders.get(tensor.name))
        return numbers if factor is None else numbers * factor

    def _factor(self, place: Place) -> np.float32 | None:
        factors = self._factors.get(place.tensor.name)
        return None if factors is None else factors[place.layer or 0]

    def _restored(self, place: Place, weights: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(weights - np.float32(place.shift) if place.shift else weights)

    def _not_finite(self, tensor: TensorInfo, weights: NDArray[np.float32]) -> ModelError:
        wrong = np.argwhere(~np.isfinite(weights))
        return ModelError(
            f"{self._file.path.name}: {len(wrong):,} of {weights.size:,} numbers of {tensor.name} are not finite, "
            f"the first at {wrong[0].tolist()}. The file is damaged; get it again"
        )


def _skeleton(described: Described) -> Any:
    """The model with parameters on the meta device, rotary embedding for real."""
    import transformers
    from accelerate import init_empty_weights

    config = transformers.AutoConfig.for_model(**described.config)
    with init_empty_weights(include_buffers=False):
        return getattr(transformers, described.kind.class_name)(config).eval()


def _check_complete(header: Header, places: set[str]) -> None:
    """Refuse a file with tensors that the model has no place for, or without some that it needs."""
    missing = sorted(places - header.tensors.keys(), key=_natural_order)
    factors = {tensor.name for tensor in factor_tensors(header.tensors.values()).values()}
    there = {name for name in header.tensors if not name.endswith(SUFFIX)} - factors
    unused = sorted(there - places - header.used, key=_natural_order)
    kind = f"a model of the architecture {header.architecture!r}"
    if missing:
        raise header.refuse(f"lacks {_listed(missing)}, which {kind} needs")
    if unused:
        raise header.refuse(f"has {_listed(unused)}, for which {kind} has no place here")


def _natural_order(name: str) -> list[Any]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def digest_of(described: Described) -> str:
    """Return a hash of all that config.json and the files of the tokenizer are made of."""
    said, prefixes = described.header.file.entries, (f"{described.header.architecture}.", "tokenizer.")
    digest = hashlib.sha256(json.dumps([described.kind.class_name, described.config], sort_keys=True).encode())
    for key in sorted(k for k in said if k.startswith(prefixes) or k == "general.architecture"):
        digest.update(_text(key) + said[key].raw)
    return digest.hexdigest()


def write_header_folder(weights: GgufCheckpoint, folder: Path) -> None:
    """Write config.json and the files of the tokenizer into a folder, which is there and empty.

    Raises:
        ModelError: transformers cannot read the vocabulary.
    """
    _write_vocabulary(weights.described, folder)
    # written last: its presence says that the folder is whole
    (folder / "config.json").write_text(json.dumps(weights.config, indent=2, default=str), encoding="utf-8")


def _write_vocabulary(described: Described, folder: Path) -> None:
    """Let transformers read the vocabulary from a copy of the header."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    # the whole path: transformers takes a file of that name in the working directory first
    copy = folder.resolve() / "vocabulary.gguf"
    _write_header(described, copy)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=str(copy))
    except Exception as error:  # transformers and gguf raise whatever the broken byte led them to
        reason = (str(error) or type(error).__name__).strip().split("\n")[0]
        raise ModelError(f"{described.header.file.path}: transformers cannot read its vocabulary: {reason}") from error
    copy.unlink()
    check_tokens(tokenizer, described.header.file.path)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def _write_header(described: Described, out: Path) -> None:
    """Write a GGUF file of the metadata alone, without what is no business of a vocabulary."""
    others = (f"{described.header.architecture}.", "split.")
    entries = {k: e.raw for k, e in described.header.file.entries.items() if not k.startswith(others)}
    if described.kind.vocabulary:
        entries["general.architecture"] = struct.pack("<I", 8) + _text(described.kind.vocabulary)
    with out.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)))
        for key, raw in entries.items():
            file.write(_text(key) + raw)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


_WORD = re.compile("[\u2581\u0120][a-z]{4,}")
"""A word of a vocabulary: SentencePiece's mark of a space, or that of byte-level BPE, and letters."""

_WORDS = 64
"""How many of them a tokenizer is asked for."""


def check_tokens(tokenizer: Any, file: Path) -> None:
    """Refuse a tokenizer that does not find the common words of its own vocabulary in a text.

    Some versions of transformers (5.17 with Gemma 3, for one) lose the merges of a GGUF file's vocabulary and cut text
    into characters. Nothing fails then, but what is learned is learned on a text that llama.cpp never sees.

    Raises:
        ModelError: it finds fewer than half of them.
    """
    words = sorted((number, token) for token, number in tokenizer.get_vocab().items() if _WORD.fullmatch(token))
    common = words[:_WORDS]
    found = [number in tokenizer.encode(" " + token[1:], add_special_tokens=False) for number, token in common]
    if sum(found) < len(found) / 2:
        import transformers

        raise ModelError(
            f"transformers {transformers.__version__} cuts text of {file.name} into other tokens than llama.cpp does "
            f"({len(found) - sum(found)} of {len(found)} words of its vocabulary are not found). "
            "Update it (pip install -U transformers), or give the model as a Hugging Face folder"
        )
