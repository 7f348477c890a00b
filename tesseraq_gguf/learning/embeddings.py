"""Embedding and output matrix on a grid: they stand outside the blocks, so nothing is reconstructed through them.

The output matrix multiplies the final hidden states: its rounding errors are fed forward by GPTQ against their second
moments. A row of the embedding is added to the residual stream: its channels are weighed by how much the answer feels
them. A matrix that is both gets the sum of both, each in units of its mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tesseraq_gguf.learning.palette import Palette, undominated
from tesseraq_gguf.learning.sensitivity import Sensitivity
from tesseraq_gguf.methods.gptq import compensate
from tesseraq_gguf.models.decoder import Decoder
from tesseraq_gguf.models.head import ANSWERS, Head
from tesseraq_gguf.types.facts import tensor_type
from tesseraq_gguf.types.grids import GROUPED, Grid, MatrixGrids, grid_of
from tesseraq_gguf.types.quantized import QuantizedTensor

_CHUNK = 1 << 24
"""Weights rounded at a time."""

_DAMPING = 0.01

_SOME = 2048
"""Rows that tell which types are worth trying."""


@torch.no_grad()
def round_embeddings(
    decoder: Decoder,
    types: Mapping[str, str],
    sensitivity: Sensitivity | None,
    report: Callable[[int, int], None] = lambda *_: None,
    matrix_grids: MatrixGrids = GROUPED,
    importance: Mapping[str, Tensor] | None = None,
) -> dict[str, QuantizedTensor]:
    """Round embedding and output matrix.

    Args:
        decoder: the model.
        types: tensor type by checkpoint name; matrices not named stay as they are.
        sensitivity: what the model feels; None rounds to nearest.
        report: called with (weights done, weights in all) of one matrix.
        matrix_grids: gives them their grids.
        importance: weights of the squared errors of columns, float32 [in] by checkpoint name, where rounding is to
            nearest.

    Returns:
        The rounded matrices by checkpoint name.
    """
    rounded = {}
    for name, type in types.items():
        weight, moment = decoder.matrix(name), _moment(decoder, name, sensitivity)
        grid = matrix_grids.of(name, weight, type)
        rounded[name] = round_matrix(weight, grid, moment, decoder.device, report, (importance or {}).get(name))
    return rounded


def _moment(decoder: Decoder, name: str, sensitivity: Sensitivity | None) -> Tensor | None:
    if sensitivity is None or name not in (decoder.output_name(), decoder.embedding_name()):
        return None
    moment = torch.zeros_like(sensitivity.output_moment)
    if name == decoder.output_name():
        moment += sensitivity.output_moment / sensitivity.output_moment.diagonal().mean()
    if name == decoder.embedding_name():
        moment += torch.diag(sensitivity.embedding / sensitivity.embedding.mean())
    return moment.to(decoder.device)


def round_matrix(
    weight: Tensor,
    grid: Grid,
    moment: Tensor | None,
    device: torch.device,
    report: Callable[[int, int], None] = lambda *_: None,
    importance: Tensor | None = None,
) -> QuantizedTensor:
    """Round a matrix outside the blocks.

    Args:
        weight: float32 [out, in].
        grid: of its type.
        moment: mean x·xᵀ of what it is fed, float32 [in, in] on the device; None rounds to nearest.
        device: where to round.
        report: called with (weights done, weights in all).
        importance: weights of the squared errors of columns, float32 [in], where it is rounded to nearest.
    """
    importance = None if importance is None else importance.to(device)
    parts: list[QuantizedTensor] = []
    done = 0
    for rows in weight.split(max(1, _CHUNK // weight.shape[1])):
        rows = rows.to(device)
        part = grid.quantize(rows, importance) if moment is None else compensate(rows, moment, grid, _DAMPING).tensor
        parts.append(QuantizedTensor(part.type, {key: array.cpu() for key, array in part.arrays.items()}))
        done += rows.numel()
        report(done, weight.numel())
    keys = parts[0].arrays
    return QuantizedTensor(grid.type, {key: torch.cat([p.arrays[key] for p in parts]) for key in keys})


@dataclass(frozen=True)
class EndsPassed:
    """What passes the ends of a model, and what their grids are.

    Attributes:
        tokens: calibration tokens, int64 [samples, length].
        final: final hidden states on them, before the final norm, float32 [samples, length, hidden].
        bottom: gradient of the answers' log-probability below the first block, of the same shape.
        grids: gives embedding and output matrix their grids.
    """

    tokens: Tensor
    final: Tensor
    bottom: Tensor
    grids: MatrixGrids = GROUPED


@torch.no_grad()
def embedding_costs(
    decoder: Decoder, name: str, types: Sequence[str], passed: EndsPassed, palette: Palette | None = None
) -> dict[str, float]:
    """Estimate what embedding or output matrix cost, in nats per token (see `bit_budget.py`), in types worth trying.

    Rows of the embedding move what enters the first block; the output matrix moves the answers' logits, whose
    Kullback-Leibler divergence is half the variance of that move. A matrix that is both does both.

    Args:
        decoder: the model.
        name: checkpoint name of the matrix.
        types: which to try.
        passed: what passes the model's ends.
        palette: where the matrix is kept as it was rounded; None keeps nothing.
    """
    weight = decoder.matrix(name)
    x = decoder.head.fed(passed.final.to(decoder.device).flatten(0, -2))
    importance = torch.zeros(weight.shape[1])
    if name == decoder.output_name():
        importance += _of_mean_one(x.square().mean(0).cpu())
    if name == decoder.embedding_name():
        importance += _of_mean_one(passed.bottom[..., : weight.shape[1]].square().mean((0, 1)))
    before = decoder.stem(passed.tokens)[0] if name == decoder.embedding_name() else None
    costs = {}
    grids = {type: passed.grids.of(name, weight, type) for type in types}
    for type in _worthy(weight, importance, grids):
        grid = grids[type]
        tensor = round_matrix(weight, grid, None, decoder.device, importance=importance)
        rounded = grid.dequantize(tensor)
        cost = 0.0
        if name == decoder.output_name():
            cost += 0.5 * float(_move_of_answers(weight, rounded, x, decoder.head).mean())
        if before is not None:
            moved = decoder.stem(passed.tokens, {name: rounded})[0] - before
            cost += 0.5 * float((moved * passed.bottom).sum(-1).square().mean())
        costs[type] = cost
        if palette is not None:
            palette.keep({name: tensor}, type)
    return costs


def _worthy(weight: Tensor, importance: Tensor, grids: Mapping[str, Grid]) -> list[str]:
    """Types that no smaller one is better than, by what they do to some of the rows."""
    some = weight[torch.linspace(0, len(weight) - 1, min(_SOME, len(weight))).long()]
    errors = {
        type: float(((g.dequantize(g.quantize(some, importance)) - some).square() * importance).mean())
        for type, g in grids.items()
    }
    return undominated(errors, {type: tensor_type(type).bits_per_weight for type in grids})


def _of_mean_one(values: Tensor) -> Tensor:
    return values / values.mean().clamp_min(1e-30)


def _move_of_answers(weight: Tensor, rounded: Tensor, x: Tensor, head: Head) -> Tensor:
    """Variance of the logits' move under the answers' distribution, [positions], x [positions, hidden]."""
    found = []
    for part in x.split(ANSWERS):
        move = part @ (rounded - weight).T.to(part.device)
        logits, move = head.move(part @ weight.T.to(part.device), move)
        p = logits.softmax(-1)
        mean = (p * move).sum(-1)
        found.append((p * move.square()).sum(-1) - mean.square())
    return torch.cat(found)


def dequantized(tensors: Mapping[str, QuantizedTensor]) -> dict[str, Tensor]:
    """Float32 matrices by checkpoint name."""
    return {name: grid_of(tensor.type).dequantize(tensor) for name, tensor in tensors.items()}
