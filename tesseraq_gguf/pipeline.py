"""The road from a model to a file: load, learn block by block, write, verify. `convert` is the whole of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch

from tesseraq_gguf.calibration import Calibration, load_calibration
from tesseraq_gguf.converter.tensor_types import TensorType, tensor_type
from tesseraq_gguf.converter.writer import Metadata, check_output, check_source, stock_type, write_gguf, write_plain
from tesseraq_gguf.devices import learning_dtype, resolve_device
from tesseraq_gguf.errors import ModelError, TesseraqError
from tesseraq_gguf.inspection import inspect
from tesseraq_gguf.methods.gptq import GPTQ
from tesseraq_gguf.methods.rtn import round_blocks
from tesseraq_gguf.methods.tesseraq import TesseraQ
from tesseraq_gguf.models import Decoder, ModelSource, resolve_model
from tesseraq_gguf.recipe import Recipe
from tesseraq_gguf.reconstruction import BlockResult, Finished, Method, Reconstruction
from tesseraq_gguf.runtime.progress import Reporter, SilentReporter
from tesseraq_gguf.runtime.source import SourceTree, ensure_source
from tesseraq_gguf.sensitivity import channel_sensitivity
from tesseraq_gguf.work_directory import WorkDirectory

_SENSITIVITY_TOKENS = 4096
"""Calibration tokens that the sensitivity of the channels is measured on."""


class Progress(Reporter, Protocol):
    """Receives what a conversion tells: stages and notes of `Reporter`, steps within a block, and finished blocks."""

    def step(self, block: int, blocks: int, done: int, total: int) -> None:
        """Block `block` of `blocks` (counted from 0) has done `done` of `total` steps."""

    def block(self, result: BlockResult, blocks: int) -> None:
        """One of `blocks` blocks is finished and on disk."""


class SilentProgress(SilentReporter):
    """Tells nothing."""

    def step(self, block: int, blocks: int, done: int, total: int) -> None:
        """Ignore."""

    def block(self, result: BlockResult, blocks: int) -> None:
        """Ignore."""


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion made.

    Attributes:
        out: the file.
        bytes: its size.
        bits_per_weight: of the whole file.
        block_bits_per_weight: of the matrices that were learned; 0 if none was.
        blocks: decoder blocks.
        resumed: how many of them an earlier run had finished.
        seconds: time this run took.
        fallbacks: matrices of the blocks that were not learned, with the reason.
        runs_on: where the file runs.
    """

    out: Path
    bytes: int
    bits_per_weight: float
    block_bits_per_weight: float
    blocks: int
    resumed: int
    seconds: float
    fallbacks: dict[str, str]
    runs_on: str


def convert(recipe: Recipe, progress: Progress | None = None) -> ConversionReport:
    """Learn a model and write it as a GGUF file. Every error a user can cause is a `TesseraqError`.

    The same recipe again goes on after the last finished block; the file appears under its name only when it is whole
    and verified.

    Args:
        recipe: what to make.
        progress: told what happens.
    """
    progress = progress or SilentProgress()
    started = time.monotonic()
    target = tensor_type(recipe.type)
    stock_type(recipe.embedding_type)
    check_output(recipe.out)
    source = resolve_model(recipe.model, progress.stage)
    check_output(recipe.out, source)
    tree = ensure_source(progress)
    device = resolve_device(recipe.device)
    decoder = Decoder(source, device)
    if not recipe.learns:
        progress.stage(f"Writing {recipe.out.name} in {target.name}; nothing is learned")
        write_plain(
            source,
            recipe.out,
            target.name,
            embedding_type=recipe.embedding_type,
            say=progress.note,
            progress=progress.advance,
            tree=tree,
        )
        return _report(recipe, len(decoder), 0, {}, started)
    calibration = _calibration(recipe, source, progress)
    progress.stage("Asking llama.cpp's converter about the model")
    types, fallbacks = _plan(source, decoder, target, tree)
    for name, reason in fallbacks.items():
        progress.note(f"{name} is not learned and gets a stock type: {reason}")
    autocast = learning_dtype(device)
    identity = _identity(recipe, source.fingerprint(), calibration, autocast, types)
    folder = recipe.work_dir or recipe.out.with_name(f"{recipe.out.name}.tesseraq-work")
    with WorkDirectory(folder, identity, recipe.fresh) as work:
        resumed = 0
        for result in _results(recipe, decoder, types, calibration, autocast, work.finished, progress):
            if not result.resumed:
                work.keep(result)
            resumed += result.resumed
            progress.block(result, len(decoder))
        progress.stage(f"Writing and verifying {recipe.out.name}")
        write_gguf(
            source,
            recipe.out,
            work.files(),
            embedding_type=recipe.embedding_type,
            metadata=_metadata(recipe, target.file_type, calibration),
            say=progress.note,
            progress=progress.advance,
            tree=tree,
        )
        if recipe.work_dir is None:
            work.remove()
    return _report(recipe, len(decoder), resumed, fallbacks, started)


def _plan(
    source: ModelSource, decoder: Decoder, target: TensorType, tree: SourceTree
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the tensor type of each matrix to learn, and why the others are not learned."""
    shapes = decoder.matrix_shapes()
    unfit = {
        name: f"{target.block_weights} does not divide its rows of {columns}"
        for name, (_, columns) in shapes.items()
        if not target.fits(columns)
    }
    unfit |= check_source(source, {name: shape for name, shape in shapes.items() if name not in unfit}, tree=tree)
    types = {name: target.name for name in shapes if name not in unfit}
    if not types:
        raise ModelError(f"{source.name}: no matrix of its blocks can be learned in {target.name}")
    return types, unfit


def _calibration(recipe: Recipe, source: ModelSource, progress: Progress) -> Calibration | None:
    if recipe.method == "rtn":
        return None
    settings = recipe.settings
    progress.stage("Reading the calibration text")
    calibration = load_calibration(source, recipe.calibration, settings.samples, settings.length, recipe.seed)
    if len(calibration.tokens) < settings.samples:
        progress.note(
            f"the calibration text gives {len(calibration.tokens)} sequences of {settings.length} tokens, "
            f"fewer than the {settings.samples} asked for"
        )
    return calibration


def _results(
    recipe: Recipe,
    decoder: Decoder,
    types: Mapping[str, str],
    calibration: Calibration | None,
    autocast: torch.dtype,
    finished: Finished,
    progress: Progress,
) -> Iterator[BlockResult]:
    learning = f"Learning {len(types)} matrices in {len(decoder)} blocks with {recipe.method} on {decoder.device}"
    if calibration is None:
        progress.stage(f"Rounding {len(types)} matrices in {len(decoder)} blocks")
        yield from round_blocks(decoder, types, finished)
        return
    stored = [finished(index) for index in range(len(decoder))]
    if all(s is not None for s in stored):
        for index, s in enumerate(stored):
            assert s is not None
            yield BlockResult(index, *s, seconds=0.0, resumed=True)
        return
    del stored
    walk = Reconstruction(
        decoder=decoder,
        method=_method(recipe),
        types=types,
        seed=recipe.seed,
        autocast=autocast,
        report=lambda block, done, total: progress.step(block, len(decoder), done, total),
    )
    try:
        progress.stage("Measuring which channels the model's answer depends on")
        few = calibration.tokens[: max(1, _SENSITIVITY_TOKENS // calibration.tokens.shape[1])]
        sensitivity = channel_sensitivity(decoder, few, recipe.seed, progress.advance)
        progress.stage(learning)
        yield from walk.run(calibration.tokens, sensitivity, finished)
    except torch.OutOfMemoryError as error:
        raise TesseraqError(
            f"not enough memory on {decoder.device}: use fewer --samples, a smaller --seqlen, or --device cpu"
        ) from error


def _method(recipe: Recipe) -> Method:
    if recipe.method == "gptq":
        return GPTQ()
    settings = recipe.settings
    return TesseraQ(
        steps=settings.steps,
        batch=settings.batch,
        rounding_rate=settings.rounding_rate,
        scale_rate=settings.parameter_rate,
        zero_rate=settings.parameter_rate,
    )


def _identity(
    recipe: Recipe, model: str, calibration: Calibration | None, autocast: torch.dtype, types: Mapping[str, str]
) -> dict[str, object]:
    """Everything that decides what is learned. Differences are named to the user by these keys."""
    return {
        "program": version("tesseraq-gguf"),
        "torch": torch.__version__,
        "model": model,
        "calibration": calibration.fingerprint() if calibration else None,
        "method": recipe.method,
        "type": sorted(set(types.values())),
        "matrices": len(types),
        "preset": asdict(recipe.settings),
        "seed": recipe.seed,
        "precision": str(autocast),
    }


def _metadata(recipe: Recipe, file_type: int, calibration: Calibration | None) -> Metadata:
    settings = {"preset": recipe.preset, **asdict(recipe.settings), "seed": recipe.seed}
    entries: dict[str, str | int] = {
        "general.file_type": file_type,
        "tesseraq.method": recipe.method,
        "tesseraq.recipe": json.dumps(settings if calibration else {"seed": recipe.seed}),
    }
    if calibration:
        entries["tesseraq.calibration"] = f"{calibration.name} {calibration.fingerprint()}"
    return entries


def _report(recipe: Recipe, blocks: int, resumed: int, fallbacks: dict[str, str], started: float) -> ConversionReport:
    seen = inspect(recipe.out)
    learned = next((t for t in seen.types if t.type == recipe.type.lower() and recipe.learns), None)
    return ConversionReport(
        out=recipe.out,
        bytes=seen.bytes,
        bits_per_weight=seen.bpw,
        block_bits_per_weight=learned.bpw if learned else 0.0,
        blocks=blocks,
        resumed=resumed,
        seconds=time.monotonic() - started,
        fallbacks=fallbacks,
        runs_on=seen.runs_on,
    )
