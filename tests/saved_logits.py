"""Logits of a GGUF file by llama.cpp, and how far they are from others.

Perplexity of a model of random weights says nothing of the weights: it is about the size of the vocabulary whatever
they are. Logits do, compared without what softmax does not see, and in units of their own variance.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from tesseraq_gguf.evaluation.simulation import opening
from tesseraq_gguf.runtime import Runtime, find_runtime

_REACH = 16.0
"""llama-perplexity cuts off what is further below the largest logit of a position."""


def saved_logits(
    model: Path, text: Path, ctx: int, chunks: int, *options: str, runtime: Runtime | None = None
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Let llama-perplexity save the answers of a model to the second half of each chunk of a text.

    Returns:
        The tokens, int64 [chunks, ctx]; log-probabilities of the answers at ctx // 2 and after it but for the last,
        float32 [chunks, positions, vocabulary]; what the tool said.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "logits"
        command = [str((runtime or find_runtime()).tool("llama-perplexity")), "-m", str(model), "-f", str(text)]
        command += [
            "-c",
            str(ctx),
            "-b",
            str(ctx),
            "--chunks",
            str(chunks),
            "-t",
            "1",
            "--kl-divergence-base",
            str(out),
        ]
        done = subprocess.run([*command, *options], capture_output=True, text=True, errors="replace")
        said = done.stdout + done.stderr
        assert done.returncode == 0, said[-2000:]
        data = out.read_bytes()
    assert data[:8] == b"_logits_"
    size, words, count = np.frombuffer(data, "<i4", 3, 8)
    assert (size, count) == (ctx, chunks), said[-2000:]
    tokens = np.frombuffer(data, "<i4", ctx * chunks, 20).reshape(chunks, ctx).copy()
    begin = opening(model)
    if begin is not None:
        tokens[:, 0] = begin
    wide = 2 * ((int(words) + 1) // 2) + 4  # two floats stand before the numbers of a position
    rows = np.frombuffer(data, "<u2", offset=20 + 4 * ctx * chunks).reshape(chunks, ctx - 1 - ctx // 2, wide)
    scale, lowest = np.moveaxis(np.ascontiguousarray(rows[..., :4]).view("<f4"), -1, 0)
    found = rows[..., 4 : 4 + words] * scale[..., None] + lowest[..., None]
    return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(found.astype(np.float32)), said


def answered(logits: torch.Tensor) -> torch.Tensor:
    """Logits [chunks, ctx, vocabulary] of the positions whose answers are saved."""
    ctx = logits.shape[1]
    return logits[:, ctx // 2 : ctx - 1]


def logit_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Normalised squared error of logits [..., vocabulary]: 0 for the same answers, 1 for those that know nothing."""
    got, expected = (_centred(x.float()) for x in (got, expected))
    return float((got - expected).square().sum() / expected.square().sum())


def _centred(logits: torch.Tensor) -> torch.Tensor:
    logits = logits.maximum(logits.amax(-1, keepdim=True) - _REACH)
    return logits - logits.mean(-1, keepdim=True)
