"""Embedding and output matrix on a grid."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf.learning.embeddings import dequantized, round_embeddings
from tesseraq_gguf.learning.sensitivity import Sensitivity
from tesseraq_gguf.models import Decoder


def _felt(hidden: int) -> Sensitivity:
    """Inputs of the output matrix that lie in few directions, and channels of uneven weight."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(500, 16, generator=random) @ torch.randn(16, hidden, generator=random)
    return Sensitivity([], torch.rand(hidden, generator=random) ** 4 + 0.01, x.T @ x / 500)


@pytest.mark.parametrize("kind", ["gemma3", "llama"])  # tied, not tied
def test_what_is_felt_is_rounded_better(kind, make_model):  # noqa: F811
    decoder = Decoder(make_model(kind), torch.device("cpu"))
    felt = _felt(decoder.hidden_size)
    names = {decoder.embedding_name(), decoder.output_name()}
    assert len(names) == (1 if kind == "gemma3" else 2)
    types = dict.fromkeys(names, "tsq2")
    plain, weighted = (dequantized(round_embeddings(decoder, types, s)) for s in (None, felt))
    for name in names:
        off, better = plain[name] - decoder.matrix(name), weighted[name] - decoder.matrix(name)
        if name == decoder.output_name():
            assert ((better @ felt.output_moment) * better).sum() < 0.2 * ((off @ felt.output_moment) * off).sum()
        if name == decoder.embedding_name():
            assert (better.square() * felt.embedding).sum() < (off.square() * felt.embedding).sum() * (
                1.05 if kind == "gemma3" else 0.95
            )


def test_chunks_of_rows_do_not_show(make_model, monkeypatch):  # noqa: F811
    decoder = Decoder(make_model("gemma3"), torch.device("cpu"))
    felt, types = _felt(decoder.hidden_size), {decoder.embedding_name(): "tsq3"}
    whole = round_embeddings(decoder, types, felt)[decoder.embedding_name()]
    monkeypatch.setattr("tesseraq_gguf.learning.embeddings._CHUNK", 64 * decoder.hidden_size)
    told = []
    parts = round_embeddings(decoder, types, felt, lambda *n: told.append(n))[decoder.embedding_name()]
    assert all(torch.equal(whole.arrays[k], parts.arrays[k]) for k in whole.arrays)
    assert len(told) == 5
    assert told[-1][0] == told[-1][1]
