"""From a GGUF file to a Hugging Face folder of the same model.

The config is made of the header (`gguf_config`), the weights are those of the file, and transformers reads the
vocabulary. What comes out is held against the file: the rotary embedding that transformers computes from the config
must be the header's, every tensor of the file must have a place in the model, and every parameter a tensor. One block
is in memory at a time.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.gguf_files.column_orders import SUFFIX, natural, orders_of
from tesseraq_gguf.gguf_files.dequantize import dequantized, own_codebooks
from tesseraq_gguf.gguf_files.gguf_file import GgufFile, TensorInfo
from tesseraq_gguf.models.experts import Forms, expert_of, unroll
from tesseraq_gguf.models.gguf_config import Described, Rotary, describe
from tesseraq_gguf.tensor_files import narrowest, write_tensors

_FLOATS = ("f16", "bf16", "f32", "f64")

_LISTED = 3
"""How many names a message lists."""

_STORED_AS = {"mixtral": ((".mlp.", ".block_sparse_moe."),)}
"""What checkpoints of a kind call modules otherwise than transformers does."""

_STACK_NAMES = {"mixtral": "layers.{block}.feed_forward.experts.{matrix}"}
"""What the `gguf` package calls the stack of all experts' matrices, where it is not what checkpoints call them."""


def write_folder(file: GgufFile, folder: Path) -> None:
    """Write config, vocabulary and weights of the model in a file into a folder, which is there and empty.

    Raises:
        ModelError: it is not a model that is understood whole.
    """
    described = describe(file)
    try:
        model = _skeleton(described)
        check_rotary(described, model)
        kinds = _write_weights(described, model, folder)
        _write_vocabulary(described, folder)
    except (ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        # config and model classes, and the readers of vocabularies, raise whatever a number led them to
        reason = (str(error) or type(error).__name__).strip().split("\n")[0]
        raise ModelError(f"{file.path} cannot be read as a GGUF model: {reason}") from error
    config = model.config.to_dict()
    config |= {"architectures": [described.kind.class_name], "dtype": kinds.most_common(1)[0][0]}
    # written last: its presence says that the folder is whole
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str), encoding="utf-8")


def _skeleton(described: Described) -> Any:
    """The model with parameters on the meta device, rotary embedding for real."""
    import transformers
    from accelerate import init_empty_weights

    config = transformers.AutoConfig.for_model(**described.config)
    with init_empty_weights(include_buffers=False):
        return getattr(transformers, described.kind.class_name)(config).eval()


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


class _Weights:
    """The tensors of a file by the names that checkpoints have for them."""

    def __init__(self, described: Described) -> None:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        self.header, self.kind = described.header, described.kind
        self.file = described.header.file
        self.heads = (described.config["num_attention_heads"], described.config["num_key_value_heads"])
        self.experts = described.config.get("num_experts") or described.config.get("num_local_experts")
        self.orders, self.codebooks = orders_of(self.file), own_codebooks(self.file)
        architecture = next(a for a, name in MODEL_ARCH_NAMES.items() if name == self.header.architecture)
        self._names = get_tensor_name_map(architecture, described.config["num_hidden_layers"])

    def place(self, name: str) -> str:
        """Return what the file calls the tensor in which a parameter is, by its checkpoint name."""
        module, _, ending = name.rpartition(".")
        expert = expert_of(name)
        if expert is not None:
            module = module.replace(f".experts.{expert}.", ".experts.")
            if self.kind.model_type in _STACK_NAMES:
                block, matrix = module.split(".")[2], module.rpartition(".")[2]
                module = _STACK_NAMES[self.kind.model_type].format(block=block, matrix=matrix)
        found = self._names.get_name(module)
        if found is None:
            raise self.header.refuse(f"may lack {name}, whose name in GGUF files is not known here")
        return f"{found}.{ending}"

    def read(self, name: str, shape: torch.Size) -> tuple[Tensor, TensorInfo]:
        """Read a parameter, float32 of the shape that the model wants, and what the file says of its tensor."""
        tensor = self.header.tensors[self.place(name)]
        expert = expert_of(name)
        whole = shape if expert is None else (self.experts, *shape)
        if tensor.weights != int(np.prod(whole)) or tensor.shape[0] != whole[-1]:
            raise self.header.refuse(
                f"has {tensor.name} of shape {list(tensor.shape)}, where its header implies {list(reversed(whole))}"
            )
        data = self.file.data(tensor)
        if expert is not None:
            data = data[expert * shape[0] : (expert + 1) * shape[0]]
        weights = natural(dequantized(tensor, data, self.codebooks), self.orders.get(tensor.name))
        self._check_finite(tensor, weights)
        return torch.from_numpy(self._restored(tensor.name, weights.reshape(shape))), tensor

    def _check_finite(self, tensor: TensorInfo, weights: NDArray[np.float32]) -> None:
        wrong = np.argwhere(~np.isfinite(weights))
        if len(wrong):
            raise ModelError(
                f"{self.file.path.name}: {len(wrong):,} of {weights.size:,} numbers of {tensor.name} are not finite, "
                f"the first at {wrong[0].tolist()}. The file is damaged; get it again"
            )

    def _restored(self, name: str, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """Undo what llama.cpp's converter does to values and rows."""
        if self.kind.shifted and name.endswith("norm.weight"):
            return weights - np.float32(1)
        which = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", name)
        if self.kind.permuted and which:
            heads = self.heads[which[1] == "k"]
            pairs = weights.reshape(heads, weights.shape[0] // heads // 2, 2, *weights.shape[1:])
            return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weights.shape)
        return weights


def _write_weights(described: Described, model: Any, folder: Path) -> Counter[str]:
    """Write a file for each block and one for what is around them; count weights by dtype."""
    weights = _Weights(described)
    parameters = _parameters(described, model)
    places = {name: weights.place(name) for name in parameters}
    _check_complete(weights, places)
    kinds: Counter[str] = Counter()
    index: dict[str, str] = {}
    for number, names in enumerate(_shards(list(parameters))):
        shard = {}
        for name in names:
            values, tensor = weights.read(name, parameters[name])
            shard[name] = narrowest(values, quantised=tensor.type not in _FLOATS)
            kinds[str(shard[name].dtype).removeprefix("torch.")] += values.numel()
        file = f"model-{number:05}.safetensors"
        index |= dict.fromkeys(shard, file)
        write_tensors(shard, folder / file, {"format": "pt"})
    listed = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listed, indent=1), encoding="utf-8")
    return kinds


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


def _check_complete(weights: _Weights, places: dict[str, str]) -> None:
    """Refuse a file with tensors that the model has no place for, or without some that it needs."""
    header = weights.header
    missing = sorted({place for place in places.values() if place not in header.tensors}, key=_natural_order)
    there = {name for name in header.tensors if not name.endswith(SUFFIX)}
    unused = sorted(there - set(places.values()) - header.used, key=_natural_order)
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


def _shards(names: list[str]) -> Iterator[list[str]]:
    """What is around the blocks, and then each block."""
    blocks: dict[str, list[str]] = {"": []}
    for name in names:
        found = re.search(r"\.layers\.(\d+)\.", name)
        blocks.setdefault(found[1] if found else "", []).append(name)
    yield from (names for names in blocks.values() if names)


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
        shutil.rmtree(folder, ignore_errors=True)
        reason = (str(error) or type(error).__name__).strip().split("\n")[0]
        raise ModelError(f"{described.header.file.path}: transformers cannot read its vocabulary: {reason}") from error
    copy.unlink()
    check_tokens(tokenizer, described.header.file.path)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def _write_header(described: Described, out: Path) -> None:
    """Write a GGUF file of the metadata alone."""
    entries = {k: e.raw for k, e in described.header.file.entries.items() if not k.startswith("split.")}
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
