"""A head for speculation on a grid: rounding errors are fed forward by GPTQ against what its matrices are fed.

The head is run on calibration text as llama.cpp drafts: what the output matrix is fed and the embedding of the token
that followed, at every position. Experts, of which there may be hundreds, and heads of another build than the model's
own blocks are rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tesseraq_gguf.learning.embeddings import round_matrix
from tesseraq_gguf.models.decoder import Decoder
from tesseraq_gguf.models.experts import stack_of
from tesseraq_gguf.models.speculation import DraftBlock, load_head
from tesseraq_gguf.types.grids import UNIVERSAL, OwnCodebooks, grid_for
from tesseraq_gguf.types.quantized import QuantizedTensor


@torch.no_grad()
def round_draft_head(
    decoder: Decoder,
    types: Mapping[str, str],
    tokens: Tensor | None,
    report: Callable[[int, int], None] = lambda *_: None,
    codebooks: OwnCodebooks = UNIVERSAL,
) -> dict[str, QuantizedTensor]:
    """Round the matrices of a head.

    Args:
        decoder: the model.
        types: tensor type by checkpoint name.
        tokens: calibration sequences, int64 [samples, length]; None rounds to nearest.
        report: called with (matrices done, matrices in all).
        codebooks: those that the model brings.

    Returns:
        The rounded matrices by checkpoint name.
    """
    head = None if tokens is None else load_head(decoder)
    moments = {} if head is None or tokens is None else head_moments(decoder, head, tokens)
    rounded = {}
    for done, (name, type) in enumerate(types.items()):
        weight = decoder.matrix(name)
        grid = grid_for(type, weight.shape[1], "group", codebooks)
        rounded[name] = round_matrix(weight, grid, moments.get(name), decoder.device)
        report(done + 1, len(types))
    return rounded


@torch.no_grad()
def head_moments(decoder: Decoder, head: DraftBlock, tokens: Tensor) -> dict[str, Tensor]:
    """Mean x·xᵀ of what a head's matrices are fed, float32 [in, in] on the device, by checkpoint name; no experts'.

    Args:
        decoder: the model.
        head: its head.
        tokens: calibration sequences, int64 [samples, length].
    """
    hidden, recorded = decoder.stem(tokens)
    for index in range(len(decoder)):
        block = decoder.load_block(index)
        hidden = torch.cat([block.run(h.to(decoder.device), recorded.arguments[index]).cpu() for h in hidden.split(1)])
    embedding = decoder.stored_name(decoder.embedding_name())
    moments: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def see(_: object, fed: tuple[Tensor, ...]) -> None:
            x = fed[0].flatten(0, -2).float()
            moment = moments.setdefault(name, torch.zeros(x.shape[1], x.shape[1], device=x.device))
            moment.addmm_(x.T, x, alpha=1 / (len(tokens) * (tokens.shape[1] - 1)))

        return see

    named = {module: name for module, name in head.names.items() if not stack_of(name)}
    handles = [module.register_forward_pre_hook(watch(name)) for module, name in named.items()]
    try:
        for h, t in zip(hidden, tokens, strict=True):
            states = decoder.head.fed(h.to(decoder.device))
            followed = decoder.weights.rows(embedding, t[1:]).to(decoder.device)
            # the last position has no token behind it: it is given its own, and counts for little
            followed = torch.cat([followed, followed[-1:]])
            head(states[None], followed[None], recorded.arguments[-1])
    finally:
        for handle in handles:
            handle.remove()
    return moments
