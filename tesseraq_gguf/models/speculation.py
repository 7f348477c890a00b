"""Heads for speculation: blocks behind the last one, which guess the token after the next (MTP, nextn).

transformers drops their tensors, llama.cpp drafts with them. A head is one more decoder block, and before it a matrix
that joins what the model ends with and the embedding of the token that it chose. Checkpoints call it by one of two
ways: `mtp.*`, or one more block in the model's list.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tesseraq_gguf.errors import ModelError
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


class DraftHead:
    """A head: a block fed with what joins the model's last states and the embeddings of the tokens that followed.

    Attributes:
        join: the matrix that joins them.
        join_name: what the checkpoint calls it.
        block: what follows.
    """

    def __init__(self, decoder: Decoder, prefix: str, names: tuple[str, str, str]) -> None:
        self.join_name, of_embedding, of_hidden = names
        norm = decoder.final_norm()[1]
        self.enorm, self.hnorm = _like(norm, decoder, of_embedding), _like(norm, decoder, of_hidden)
        self.join = decoder.matrix(self.join_name).to(decoder.device)
        self.block = decoder.load_alike(prefix)

    def joined(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """What the matrix that joins is fed, float32 [..., 2·hidden].

        Args:
            hidden: what the output matrix is fed, float32 [..., hidden].
            embeddings: of the tokens that follow, of the same shape.
        """
        return torch.cat([self.enorm(embeddings), self.hnorm(hidden)], -1)


def load_head(decoder: Decoder) -> DraftHead | None:
    """Return the first block of a model's head, with its weights; None where it is of another build than the model's.

    Its names are those of Qwen's (`mtp.fc`), or of DeepSeek's and GLM's (`eh_proj` in one more block).
    """
    within = next((w for w in ("", "model.") if f"{w}mtp.fc.weight" in decoder.weights), None)
    if within is not None:
        norms = (f"{within}mtp.pre_fc_norm_embedding.weight", f"{within}mtp.pre_fc_norm_hidden.weight")
        prefix, names = f"{within}mtp.layers.0.", (f"{within}mtp.fc.weight", *norms)
    else:
        last = decoder.block_prefix(len(decoder) - 1)
        prefix = f"{last.removesuffix(f'{len(decoder) - 1}.')}{len(decoder)}."
        names = (f"{prefix}eh_proj.weight", f"{prefix}enorm.weight", f"{prefix}hnorm.weight")
    if not decoder.walk.alone or any(name not in decoder.weights for name in names):
        return None
    try:
        return DraftHead(decoder, prefix, names)
    except ModelError:
        return None


def _like(norm: nn.Module, decoder: Decoder, name: str) -> nn.Module:
    """A norm as the final one is, with a weight of its own."""
    made = copy.deepcopy(norm)
    made.load_state_dict({"weight": decoder.matrix(name).to(decoder.device)})
    return made


def _behind(name: str, blocks: int | None) -> bool:
    match = _BLOCK.search(name)
    return match is not None and isinstance(blocks, int) and int(match[1]) >= blocks
