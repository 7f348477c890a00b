"""Heads for speculation: blocks behind the last one, which guess the token after the next (MTP, nextn).

transformers drops their tensors, llama.cpp drafts with them. A head is one more decoder block, and before it a matrix
that joins what the model ends with and the embedding of the token that it chose. Checkpoints call it by one of two
ways: `mtp.*`, or one more block in the model's list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tesseraq_gguf.gguf_files.gguf_file import GgufFile, open_gguf
from tesseraq_gguf.models.source import ModelSource

if TYPE_CHECKING:
    from tesseraq_gguf.models.decoder import Decoder

_NAMED = re.compile(r"(^|\.)mtp(_\w+)?\.")
_BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def has_head(source: ModelSource) -> bool:
    """Whether a model has a head for speculation in its files; of a GGUF file, whether that has one."""
    if source.gguf:
        return drafts(open_gguf(source.gguf))
    return bool(head_names(source.config(), source.weight_map()))


def drafts(file: GgufFile) -> bool:
    """Whether a GGUF file has a head that llama.cpp drafts with."""
    return bool(file.get(f"{file.get('general.architecture')}.nextn_predict_layers"))


def head_names(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return the tensors of a head among those of a checkpoint.

    Args:
        config: of the model, as config.json has it.
        names: of all tensors.
    """
    text = config.get("text_config") or config
    blocks = text.get("num_hidden_layers")
    return [n for n in names if "visual" not in n and "vision" not in n and (_NAMED.search(n) or _behind(n, blocks))]


def head_matrices(decoder: Decoder) -> dict[str, tuple[int, int]]:
    """Return the shapes [out, in] of a head's matrices by checkpoint name; none where it is left out."""
    source, weights = decoder.source, decoder.weights
    if source.gguf or not source.keeps_head:
        return {}
    found = {name: weights.shape(name) for name in head_names(source.config(), weights) if name.endswith(".weight")}
    return {name: (shape[0], shape[1]) for name, shape in found.items() if len(shape) == 2}


def _behind(name: str, blocks: int | None) -> bool:
    match = _BLOCK.search(name)
    return match is not None and isinstance(blocks, int) and int(match[1]) >= blocks
