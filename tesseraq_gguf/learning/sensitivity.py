"""How much the model's answer feels an error in each channel of the residual stream, after every block.

A block's squared error counts channels alike, but what follows does not: language models keep a few channels a
thousand times larger than the rest, and every norm that reads them scales them down. For a small error e after a
block the answer moves by

    KL(p || p_e) ≈ ½ eᵀ F e,      F = E[g gᵀ],  g = ∂ log p(y) / ∂ hidden,  y drawn from the model itself

(the Fisher information of the output distribution). Its diagonal, averaged over tokens, weighs the squared error of
reconstruction. The same pass sees what the embedding and the output matrix need.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from tesseraq_gguf.errors import NotFiniteError
from tesseraq_gguf.models.decoder import Decoder, LoadedBlock
from tesseraq_gguf.models.finite import TAKE_ANOTHER, check_finite, finite, origin
from tesseraq_gguf.models.handed import Arguments

_LOGITS = 1 << 22
"""Logits that are in memory at a time: words of the vocabulary, of all positions."""

_FLOOR = 1e-4
"""Smallest weight against the mean: no channel is given up."""


@dataclass(frozen=True)
class Sensitivity:
    """What the pass finds.

    Attributes:
        blocks: for each block the weights of the squared error of its output, float32 [2, hidden], mean 1 in the second
            row: weights of the first position, where models park attention, and weights that all others share.
        embedding: the same of what comes before the first block, float32 [hidden], all positions alike.
        output_moment: mean x·xᵀ of the inputs of the output matrix, float32 [hidden, hidden].
    """

    blocks: list[Tensor]
    embedding: Tensor
    output_moment: Tensor


Passed = Mapping[str, "tuple[Tensor, Tensor]"]
"""What a block's matrices were fed and felt, by module name: inputs [tokens, in], and the gradient of the answers'
log-probability with respect to outputs [tokens, out]. Experts that no token came to are not among them."""


class Witness(Protocol):
    """Sees more of the pass than what `Sensitivity` keeps."""

    def ends(self, final: Tensor, bottom: Tensor) -> None:
        """Take final hidden states, before the final norm, and the gradient below the first block.

        Both are float32 [samples, length, hidden] on the CPU.
        """

    def block(self, block: LoadedBlock, passed: Passed) -> None:
        """Take a block, on the way down, with what its matrices were fed and felt."""


def measure_sensitivity(
    decoder: Decoder,
    tokens: Tensor,
    seed: int,
    report: Callable[[int, int], None] = lambda *_: None,
    witness: Witness | None = None,
) -> Sensitivity:
    """Diagonal Fisher information of the hidden states before and after each block.

    One pass up and one pass down, block by block, so no more than one block has weights at a time.

    Args:
        decoder: the model.
        tokens: a few calibration sequences, int64 [samples, length].
        seed: of the drawn answers.
        report: called with (blocks done, blocks in all).
        witness: sees blocks and ends of the model; None sees nothing.

    Raises:
        NotFiniteError: the model overflows, on the way up or down.
    """
    hidden, recorded = decoder.stem(tokens)
    total = 2 * len(decoder)
    # the inputs of all blocks wait on disk for the way down: memory does not grow with depth
    with tempfile.TemporaryDirectory(prefix="tesseraq-") as folder:
        levels = [Path(folder) / f"{index}.pt" for index in range(len(decoder))]
        for index, level in enumerate(levels):
            torch.save(hidden, level)
            block = decoder.load_block(index)
            with torch.no_grad():
                hidden = torch.cat(
                    [block.run(h.to(decoder.device), recorded.arguments[index]).cpu() for h in hidden.split(1)]
                )
            if not finite(hidden):
                below, given = torch.load(level, weights_only=True), recorded.arguments[index]
                where = _origin(decoder, block, below, given)
                raise NotFiniteError(f"block {index + 1} of the model overflows, {where}. {TAKE_ANOTHER}")
            report(index + 1, total)
        moment = decoder.head.moment(hidden)
        check_finite({decoder.output_name(): moment}, "the second moments of what it is fed", TAKE_ANOTHER)
        rows = max(1, _LOGITS // tokens.numel())
        gradient = decoder.head.answer_gradient(
            hidden, lambda: decoder.output_rows(rows), torch.Generator().manual_seed(seed)
        )
        weights = []
        for index in reversed(range(len(decoder))):
            weights.append(_weights(gradient))
            if not finite(weights[-1]):
                raise NotFiniteError(f"what the answers feel after block {index + 1} is not finite. {TAKE_ANOTHER}")
            block, inputs = decoder.load_block(index), torch.load(levels[index], weights_only=True)
            below = []
            with _watched(block if witness else None) as passed:
                for h, g in zip(inputs.split(1), gradient.split(1), strict=True):
                    h = h.to(decoder.device).requires_grad_()
                    out = block.run(h, recorded.arguments[index])
                    below.append(torch.autograd.grad(out, h, g.to(decoder.device))[0].cpu())
            gradient = torch.cat(below)
            if witness:
                witness.block(block, {n: (torch.cat(fed), torch.cat(felt)) for n, (fed, felt) in passed.items() if fed})
            del passed
            report(total - index, total)
    if witness:
        witness.ends(hidden, gradient)
    embedding = _weights(gradient[..., : decoder.hidden_size])[1].cpu()
    check_finite({decoder.embedding_name(): embedding}, "the sensitivities of its channels", TAKE_ANOTHER)
    return Sensitivity(weights[::-1], embedding, moment.cpu())


@torch.no_grad()
def _origin(decoder: Decoder, block: LoadedBlock, hidden: Tensor, arguments: Arguments) -> str:
    return origin(block, lambda: [block.run(h.to(decoder.device), arguments) for h in hidden.split(1)])


@contextmanager
def _watched(block: LoadedBlock | None) -> Iterator[dict[str, tuple[list[Tensor], list[Tensor]]]]:
    """Collect what the block's matrices are fed and feel inside; None collects nothing."""
    passed: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def hook(name: str) -> Callable[..., None]:
        fed, felt = passed.setdefault(name, ([], []))

        def forward(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            fed.append(args[0].detach().flatten(0, -2))
            out.register_hook(lambda gradient: felt.append(gradient.flatten(0, -2)))

        return forward

    matrices = block.matrices() if block else {}
    handles = [module.register_forward_hook(hook(name)) for name, module in matrices.items()]
    try:
        yield passed
    finally:
        for handle in handles:
            handle.remove()


def _weights(gradient: Tensor) -> Tensor:
    energy = gradient.square().mean(0)
    others = energy[1:] if len(energy) > 1 else energy  # a single token is like all that might follow
    scale = others.mean().clamp_min(1e-30)
    return (torch.stack([energy[0], others.mean(0)]) / scale).clamp_min(_FLOOR)
