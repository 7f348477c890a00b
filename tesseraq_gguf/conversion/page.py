"""A conversion for the browser: one page without other files, with its plots. Drawing needs matplotlib (`[plot]`)."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tesseraq_gguf.conversion.report import BlockReport, ConversionReport
from tesseraq_gguf.gguf_files.inspection import Inspection, TypeSummary, inspect
from tesseraq_gguf.pages import document, svg, table
from tesseraq_gguf.paths import temporary_sibling
from tesseraq_gguf.printing import short

_BLOCKS_DRAWN = 48
"""Curves of losses that are drawn, spread over the blocks: more hide each other."""


def write_page(report: ConversionReport, place: Path) -> None:
    """Write the page."""
    with temporary_sibling(place) as partial:
        partial.write_text(page(report), encoding="utf-8")


def page(report: ConversionReport) -> str:
    """Return the page, HTML."""
    seen = inspect(report.out)
    parts = [
        f"<h1>{html.escape(report.out.name)}</h1>",
        f"<p>{_summary(report)}</p>",
        *_recipe(seen),
        "<h2>Types</h2>",
        table(("type", "tensors", "weights", "MB", "bits per weight"), map(_type, seen.types)),
        *_fallbacks(report),
        *_losses(report.learned),
    ]
    return document(f"{report.out.name}: how it was made", parts)


def _summary(report: ConversionReport) -> str:
    said = [f"{report.bytes:,} bytes", f"{report.bits_per_weight:.3f} bits per weight"]
    if report.block_bits_per_weight:
        said.append(f"{report.block_bits_per_weight:.3f} in the learned matrices")
    sentences = [f"{', '.join(said)}.", f"Runs on {html.escape(report.runs_on)}."]
    if report.divergence is not None:
        sentences.append(
            f"Divergence from the original on {report.held_out:,} tokens that nothing was learned on: "
            f"<strong>{report.divergence:.4f}</strong> nats per token."
        )
    if report.kept_start:
        sentences.append(f"Learning was undone in {report.kept_start} of {report.blocks} blocks.")
    return " ".join(sentences)


def _recipe(seen: Inspection) -> Iterator[str]:
    if "command" in seen.tesseraq:
        yield "<h2>Recipe</h2>"
        yield f"<pre>{html.escape(str(seen.tesseraq['command']))}</pre>"
        yield f"<p class='note'>tesseraq-gguf {html.escape(str(seen.tesseraq.get('version', '')))}</p>"


def _type(of: TypeSummary) -> Sequence[str]:
    return of.type, str(of.tensors), f"{of.weights:,}", f"{of.bytes / 1e6:.1f}", f"{of.bpw:.3f}"


def _fallbacks(report: ConversionReport) -> Iterator[str]:
    if report.fallbacks:
        yield "<h2>Matrices that were not learned</h2>"
        yield table(("matrix", "why"), report.fallbacks.items())


def _losses(blocks: Sequence[BlockReport]) -> Iterator[str]:
    if not any(block.loss_after is not None for block in blocks):
        return
    yield "<h2>Losses of blocks</h2>"
    yield f"<figure>{svg(lambda axes: _draw_losses(axes, blocks))}</figure>"
    if any(block.curve for block in blocks):
        yield "<h2>Losses while learning</h2>"
        yield f"<figure>{svg(lambda axes: _draw_curves(axes, blocks))}</figure>"
        yield (
            "<p class='note'>Means over stretches of steps, on what was learned on, against the first stretch of the "
            "block. Where stages follow each other, each begins with more roundings fixed.</p>"
        )
    yield table(
        ("block", "rounded to nearest", "learned", "share", "held out, start", "held out, end", "kept", "seconds"),
        map(_block, blocks),
    )
    yield (
        "<p class='note'>A loss is the squared error of what the block puts out, each channel weighed by what the "
        "model's answers depend on it; a block is fed what the blocks before it, quantised, put out. Held out: on "
        "sequences that nothing was learned on.</p>"
    )


def _block(block: BlockReport) -> Sequence[str]:
    before, after, verdict = block.loss_before, block.loss_after, block.verdict
    return (
        str(block.index + 1),
        _number(before),
        _number(after),
        f"{100 * after / before:.1f} %" if before and after is not None else "",
        _number(verdict.start if verdict else None),
        _number(verdict.end if verdict else None),
        "" if verdict is None else "start" if verdict.kept_start else "end",
        f"{block.seconds:.1f}",
    )


def _number(value: float | None) -> str:
    return "" if value is None else short(value)


def _draw_losses(axes: Any, blocks: Sequence[BlockReport]) -> None:
    places = [block.index + 1 for block in blocks]
    nan = float("nan")
    for label, colour, values in (
        ("rounded to nearest", "#9ca3af", [block.loss_before for block in blocks]),
        ("learned", "#c2410c", [block.loss_after for block in blocks]),
        ("learned, held out", "#0369a1", [block.verdict.kept if block.verdict else None for block in blocks]),
    ):
        if any(values):
            axes.plot(places, [value or nan for value in values], "o-", ms=3, lw=1.2, color=colour, label=label)
    axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("block")
    axes.set_ylabel("loss")
    axes.legend(fontsize=8, frameon=False)


def _draw_curves(axes: Any, blocks: Sequence[BlockReport]) -> None:
    from matplotlib import colormaps

    learned = [block for block in blocks if block.curve]
    drawn = learned[:: -(-len(learned) // _BLOCKS_DRAWN)]
    colours = colormaps["viridis"].resampled(max(2, len(drawn)))
    for place, block in enumerate(drawn):
        losses = [mark.loss for mark in block.curve]
        label = f"block {block.index + 1}" if place in (0, len(drawn) - 1) else None
        points = range(1, 1 + len(losses))
        axes.plot(points, [loss / losses[0] for loss in losses], lw=1, color=colours(place), label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("stretch")
    axes.set_ylabel("loss against the first")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
