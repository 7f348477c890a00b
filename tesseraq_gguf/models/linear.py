"""Matrices of other kinds than `nn.Linear`, brought to it: [out, in], so that all methods learn them alike."""

from __future__ import annotations

from torch import nn

from tesseraq_gguf.models.stand_ins import put


def as_linear(block: nn.Module) -> list[str]:
    """Replace linear layers that multiply from the left, [in, out], as GPT-2's, in a block on the meta device.

    Returns:
        Their names: what is stored for their weights is to be transposed.
    """
    from transformers.pytorch_utils import Conv1D

    found = {name: module for name, module in block.named_modules() if isinstance(module, Conv1D)}
    for name, module in found.items():
        put(block, name, nn.Linear(module.nx, module.nf, bias=True, device="meta"))
    return list(found)
