"""What is a matrix to learn: `nn.Linear`, and what can be brought to it, [out, in]: all methods learn them alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tesseraq_gguf.models.stand_ins import put


def matrices_of(block: nn.Module) -> dict[str, nn.Linear]:
    """Return the matrices of a block by module name: linear layers, and whatever of their kind gives a product alone.

    A router, say, that is a linear layer by its class and returns which experts it chooses, is none.
    """
    return {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear) and _multiplies(m)}


_PRODUCTS: dict[type[nn.Linear], bool] = {nn.Linear: True}
"""Whether modules of a class make [..., out] of [..., in] and nothing else, as far as any were asked."""


def _multiplies(module: nn.Linear) -> bool:
    kind = type(module)
    if kind not in _PRODUCTS:
        parameters = {name: p.detach().to("meta") for name, p in module.named_parameters()}
        try:
            out = functional_call(module, parameters, (torch.empty(1, 2, module.in_features, device="meta"),))
        except (RuntimeError, TypeError, ValueError):
            out = None
        _PRODUCTS[kind] = isinstance(out, Tensor) and out.shape == (1, 2, module.out_features)
    return _PRODUCTS[kind]


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
