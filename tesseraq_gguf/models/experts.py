"""Experts of a mixture, one linear layer for each of their matrices, in place of stacks of three dimensions.

transformers keeps the experts of a block as two parameters [experts, out, in]. Checkpoints on the hub have a matrix for
each expert, and so have methods: every expert sees its own tokens. `unrolled` gives a block whose experts are modules
with the checkpoint's names, and which computes the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tesseraq_gguf.errors import ModelError

_USUAL = ("gate_proj", "up_proj", "down_proj")

_KNOWN = {
    "MixtralExperts": ("w1", "w3", "w2"),
    "OlmoeExperts": _USUAL,
    "Qwen2MoeExperts": _USUAL,
    "Qwen3MoeExperts": _USUAL,
}
"""Classes of transformers that compute Σ p·down(act(gate(x))·up(x)), and what checkpoints call an expert's gate, up and
down. The tests hold each to `Experts`."""

_ALIASES = ((".mlp.", ".block_sparse_moe."),)
"""Names of modules that checkpoints call otherwise."""


class Expert(nn.Module):
    """One expert, float32: down(act(gate(x))·up(x)).

    Args:
        hidden: width of the residual stream.
        inner: width within.
        activation: of the gate.
        names: what gate, up and down are called.
    """

    def __init__(self, hidden: int, inner: int, activation: nn.Module, names: tuple[str, str, str]) -> None:
        super().__init__()
        self._names, self._activation = names, (activation,)  # in a tuple: one module serves all experts
        for name, (out, into) in zip(names, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True):
            setattr(self, name, nn.Linear(into, out, bias=False, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """What the expert makes of tokens [tokens, hidden]."""
        gate, up, down = (getattr(self, name) for name in self._names)
        return down(self._activation[0](gate(x)) * up(x))  # type: ignore[no-any-return]


class Experts(nn.ModuleList):
    """The experts of one block, in their order."""

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Sum of what the chosen experts make of each token.

        Args:
            hidden: [tokens, hidden].
            chosen: which experts, int64 [tokens, chosen].
            weights: how much each of them counts, [tokens, chosen].
        """
        out = torch.zeros_like(hidden)
        for index, expert in enumerate(self):
            token, place = torch.where(chosen == index)
            if len(token):
                given = expert(hidden[token]) * weights[token, place, None]
                out = out.index_add(0, token, given.to(out.dtype))
        return out


def unroll(block: nn.Module) -> None:
    """Replace stacked experts in a block whose parameters are on the meta device.

    Raises:
        ModelError: it has experts of a kind that is not known.
    """
    for name, module in list(block.named_modules()):
        stacks = {n: p.shape for n, p in module.named_parameters(recurse=False) if p.dim() == 3}
        kind = type(module).__name__
        if stacks and kind in _KNOWN:
            experts, hidden, inner = stacks["down_proj"]
            made = Experts(Expert(hidden, inner, module.act_fn, _KNOWN[kind]) for _ in range(experts))  # type: ignore[arg-type]
            parent, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(parent), leaf, made)
        elif stacks and kind.endswith("Experts"):
            raise ModelError(f"experts of this kind ({kind}) cannot be learned yet. There are: {', '.join(_KNOWN)}")


def aliases(name: str) -> list[str]:
    """Return what a checkpoint may call a parameter."""
    return [name, *(name.replace(ours, theirs) for ours, theirs in _ALIASES if ours in name)]


def stack_of(name: str) -> str | None:
    """Return what the matrices of one stack are called together, a star in place of the expert's number; else None."""
    before, number, rest = _parts(name)
    return f"{before}.experts.*.{rest}" if number else None


def expert_of(name: str) -> int | None:
    """Return the number of the expert that a matrix belongs to, None if it belongs to none."""
    number = _parts(name)[1]
    return int(number) if number else None


def _parts(name: str) -> tuple[str, str, str]:
    """What stands before an expert's number in a name, the number, and what stands after; no number, no expert."""
    before, _, after = name.partition(".experts.")
    number, _, rest = after.partition(".")
    return before, number if number.isdecimal() else "", rest
