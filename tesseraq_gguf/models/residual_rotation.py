"""Rotation of the residual stream (QuaRot, arXiv 2404.00456, §4.1): a copy of a model whose channels are mixed.

A norm that divides by the root mean square does not see a rotation Q of what it is fed, once its weights are ones:

    W·diag(n)·norm(x)  =  (W·diag(n)·Qᵀ)·norm(Q·x)

So weights n of norms go into the matrices behind them, these read through Qᵀ, and the embedding and all matrices that
add to the stream are multiplied by Q. No channel stands out afterwards, and activations can be rounded to few bits.
Input and output matrix are no longer the same, so a model that ties them grows.

Not every architecture allows it. A norm between a block and the stream, as Gemma 3 has, does not fold; nor does one
that subtracts the mean. As in `models.folding`, nothing is known by name: every block is tried.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from tesseraq_gguf.models.decoder import Decoder, LoadedBlock
from tesseraq_gguf.models.folding import Trace, norm_folds, norm_offset
from tesseraq_gguf.models.handed import Arguments
from tesseraq_gguf.models.prequantised import QUANTIZATION_FILE, plain_config
from tesseraq_gguf.models.rotation import hadamard
from tesseraq_gguf.models.source import ModelSource
from tesseraq_gguf.paths import temporary_sibling
from tesseraq_gguf.tensor_files import write_tensors

_TOLERANCE = 1e-3
"""Relative change of what a block adds that float32 (or TF32) arithmetic may make."""

_TOKENS = 32
"""Random tokens that blocks are tried on."""

_INDEX = "model.safetensors.index.json"


class _CannotRotateError(Exception):
    """The model computes something else when its stream is rotated."""


def rotated_model(
    decoder: Decoder, out: Path, seed: int, report: Callable[[int, int], None] = lambda *_: None
) -> ModelSource | None:
    """Write a copy of a model whose residual stream is rotated, unless it is there.

    One block is in memory at a time. Tensors keep their dtypes; dequantised ones are in float32.

    Args:
        decoder: the model.
        out: the folder to write, which appears only when it is whole.
        seed: of the random Hadamard matrix.
        report: called with (blocks done, blocks in all).

    Returns:
        The copy; None where the model does not allow it, and nothing is written.

    Raises:
        ConversionError: the disk is full.
    """
    source = decoder.source
    copy = replace(source, folder=out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{out}.lock"):
        if out.is_dir():
            return copy
        try:
            with temporary_sibling(out) as partial:
                partial.mkdir()
                _write(decoder, partial, hadamard(decoder.hidden_size, seed).to(decoder.device), report)
        except _CannotRotateError:
            return None
    return copy


@torch.no_grad()
def _write(decoder: Decoder, folder: Path, q: Tensor, report: Callable[[int, int], None]) -> None:
    if not (decoder.walk.state.plain and decoder.walk.alone):
        raise _CannotRotateError
    weights = decoder.weights
    written: dict[str, str] = {}

    def save(tensors: Mapping[str, Tensor]) -> None:
        file = folder / f"model-rotated-{len(set(written.values())):05d}.safetensors"
        write_tensors(tensors, file, {"format": "pt"})
        written.update(dict.fromkeys(tensors, file.name))

    tokens = torch.randint(decoder.config.vocab_size, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    outside = _outside(decoder, q, tokens)
    hidden, recorded = decoder.stem(tokens)
    for index in range(len(decoder)):
        block = decoder.load_block(index)
        changed = rotated_parameters(block, recorded.arguments[index], hidden.to(decoder.device), q)
        if changed is None:
            raise _CannotRotateError
        save(_stored(decoder, {block.prefix + name: value for name, value in changed.items()}))
        report(index + 1, len(decoder))
    save(outside)
    for file in dict.fromkeys(map(weights.file, weights)):
        rest = [name for name in weights if weights.file(name) == file and name not in written]
        if rest:
            save({name: weights.read(name) for name in rest})
    for beside in decoder.source.folder.iterdir():
        if beside.is_file() and ".safetensors" not in beside.name and beside.name != QUANTIZATION_FILE:
            shutil.copyfile(beside, folder / beside.name)
    (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": written}), encoding="utf-8")
    config = plain_config(decoder.source.config())
    for part in (config, config.get("text_config", {})):
        part["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def rotated_parameters(block: LoadedBlock, arguments: Arguments, hidden: Tensor, q: Tensor) -> dict[str, Tensor] | None:
    """Return the parameters with which a block computes the same on a rotated stream.

    Args:
        block: the block, which is not changed.
        arguments: what the model hands to it besides hidden states.
        hidden: hidden states to try it on, float32 [samples, length, hidden] on the block's device.
        q: orthogonal, [hidden, hidden].

    Returns:
        Those that differ, by name within the block; None if there are no such.
    """
    trace = Trace(block, arguments, hidden)
    linears = block.matrices()
    changed: dict[str, Tensor] = {}
    for fold in norm_folds(trace, linears.keys()):
        if fold.channels != len(q):
            continue
        stored = block.module.get_parameter(f"{fold.producer}.weight").detach()
        changed[f"{fold.producer}.weight"] = torch.full_like(stored, 1 - fold.offset)
        for name in fold.consumers:
            weight = linears[name].weight.detach()
            changed[f"{name}.weight"] = (weight * (stored + fold.offset)) @ q.T
    for name, linear in linears.items():
        if linear.out_features == len(q) and f"{name}.weight" not in changed:
            changed[f"{name}.weight"] = q @ linear.weight.detach()
            if linear.bias is not None:
                changed[f"{name}.bias"] = q @ linear.bias.detach()
    expected = (block.run(hidden, arguments) - hidden) @ q.T
    turned = hidden @ q.T
    got = block.run(turned, arguments, vectors=changed) - turned
    return changed if _same(got, expected) else None


def _outside(decoder: Decoder, q: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """What stands before and after the blocks, rotated, by stored name."""
    embedding, head = decoder.embedding_name(), decoder.head
    plain = decoder.matrix(embedding)
    hidden = decoder.stem(tokens, {embedding: plain})[0].to(decoder.device)
    weights = head.vectors
    offset = norm_offset(head.norm, (hidden,), {}) if set(weights) == {"weight"} else None
    if offset is None:
        raise _CannotRotateError
    rotated = plain.to(q.device) @ q.T
    ones = torch.full_like(weights["weight"], 1 - offset)
    turned = decoder.stem(tokens, {embedding: rotated})[0].to(q.device)
    fed = [head.fed(x.flatten(0, 1), {"weight": ones}) for x in (hidden, turned)]
    if not (_same(turned, hidden @ q.T) and _same(fed[1], fed[0] @ q.T)):
        raise _CannotRotateError
    output = (decoder.output_weight() * (weights["weight"] + offset)) @ q.T
    found = _stored(decoder, {embedding: rotated, f"{head.prefix}weight": ones})
    if decoder.output_name() == embedding:
        return found | {decoder.untied_output_name(): output.to(found[decoder.stored_name(embedding)].dtype)}
    return found | _stored(decoder, {decoder.output_name(): output})


def _stored(decoder: Decoder, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors the names and dtypes with which the model's files are read."""
    found = {}
    for name, value in tensors.items():
        stored = decoder.stored_name(name)
        found[stored] = decoder.as_stored(name, value).to(decoder.weights.dtype(stored))
    return found


def _same(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).norm() <= _TOLERANCE * expected.norm())
