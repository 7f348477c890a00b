"""A head for speculation on a grid: one more block, learned for its own output as the model's blocks are.

The head is run on calibration text as llama.cpp drafts: what the output matrix is fed and the embedding of the token
that followed, at every position. In the quantised model it is fed what that makes, as blocks are. The matrix that joins
the two stands before the block: its rounding errors are fed forward by GPTQ. Heads of another build than the model's
own blocks are rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tesseraq_gguf.learning.calibration import Calibration
from tesseraq_gguf.learning.embeddings import round_matrix
from tesseraq_gguf.learning.reconstruction import Reconstruction
from tesseraq_gguf.models.decoder import Decoder
from tesseraq_gguf.models.quantised import Quantised
from tesseraq_gguf.models.speculation import DraftHead, load_head
from tesseraq_gguf.types.grids import UNIVERSAL, OwnCodebooks, grid_for, grid_of
from tesseraq_gguf.types.quantized import QuantizedTensor


@torch.no_grad()
def round_draft_head(
    decoder: Decoder,
    types: Mapping[str, str],
    report: Callable[[int, int], None] = lambda *_: None,
    codebooks: OwnCodebooks = UNIVERSAL,
) -> dict[str, QuantizedTensor]:
    """Round the matrices of a head to nearest.

    Args:
        decoder: the model.
        types: tensor type by checkpoint name.
        report: called with (matrices done, matrices in all).
        codebooks: those that the model brings.

    Returns:
        The rounded matrices by checkpoint name.
    """
    rounded = {}
    for done, (name, type) in enumerate(types.items()):
        weight = decoder.matrix(name)
        rounded[name] = round_matrix(weight, grid_for(type, weight.shape[1], "group", codebooks), None, decoder.device)
        report(done + 1, len(types))
    return rounded


def learn_draft_head(
    walk: Reconstruction, model: Quantised, types: Mapping[str, str], calibration: Calibration
) -> dict[str, QuantizedTensor]:
    """Learn the matrices of a head.

    Args:
        walk: that learned the model's blocks.
        model: the quantised model.
        types: tensor type by checkpoint name.
        calibration: the text.

    Returns:
        The learned matrices, and vectors that changed along with them, by checkpoint name.

    Raises:
        NotFiniteError: the head, or what was learned for it, overflows.
    """
    decoder = walk.decoder
    head = load_head(decoder)
    if head is None:
        return round_draft_head(decoder, types, codebooks=walk.codebooks)
    tokens = torch.cat([calibration.tokens, calibration.held_out])
    learned: dict[str, QuantizedTensor] = {}
    with torch.no_grad():
        full = _entering(joined(head, Quantised(decoder, lambda _: {}), tokens), head.join)
        fed, join = joined(head, model, tokens), head.join
        if head.join_name in types:
            rounded = _rounded_join(head, fed, types[head.join_name], walk.codebooks)
            learned[head.join_name] = rounded
            join = grid_of(rounded.type).dequantize(rounded).to(join.device)
        quantised = _entering(fed, join)
        arguments = decoder.stem(tokens[:1])[1].arguments[-1]
    walk = replace(walk, types=types)
    learned |= walk.beside(head.block, full, quantised, len(calibration.held_out), arguments).tensors
    rest = {name: type for name, type in types.items() if name not in learned}
    return learned | round_draft_head(decoder, rest, codebooks=walk.codebooks)


def joined(head: DraftHead, model: Quantised, tokens: Tensor) -> Tensor:
    """What the matrix that joins is fed, float32 [sequences, length, 2·hidden] on the CPU.

    Args:
        head: of the model.
        model: the model that the head is fed by.
        tokens: int64 [sequences, length].
    """
    decoder = model.decoder
    prefix, name = decoder.head.prefix, decoder.embedding_name()
    vectors = {n.removeprefix(prefix): t.arrays["values"].to(decoder.device) for n, t in model.final.items()}
    given, stored = model.embeddings.get(name), decoder.stored_name(name)
    fed = []
    for hidden, t in zip(model.states(tokens), tokens, strict=True):
        # the last position has no token behind it: it is given its own, and counts for little
        followed = torch.cat([t[1:], t[-1:]])
        embeddings = decoder.weights.rows(stored, followed) if given is None else given[followed]
        states = decoder.head.fed(hidden.to(decoder.device), vectors)
        fed.append(head.joined(states, embeddings.to(decoder.device)).cpu())
    return torch.stack(fed)


def _entering(fed: Tensor, join: Tensor) -> Tensor:
    """What enters a head's block, float32 [sequences, length, hidden] on the CPU."""
    return torch.stack([(x.to(join.device) @ join.T).cpu() for x in fed])


def _rounded_join(head: DraftHead, fed: Tensor, type: str, codebooks: OwnCodebooks) -> QuantizedTensor:
    moment = torch.zeros(fed.shape[-1], fed.shape[-1], device=head.join.device)
    for x in fed:
        x = x.to(moment.device)
        moment.addmm_(x.T, x, alpha=1 / fed[..., 0].numel())
    grid = grid_for(type, head.join.shape[1], "group", codebooks)
    return round_matrix(head.join, grid, moment, head.join.device)
