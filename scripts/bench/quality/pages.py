"""The parts of the pages that come from results: which page has which table, and what is said around it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

from bench.quality import report
from bench.quality.places import AUTOROUND_VERSION, Options
from bench.quality.plot import WIDEST
from bench.quality.report import Figures, Measured
from bench.quality.rows import ACTIVATIONS, FILES, PTQ161, REFERENCE, ROUNDING, TYPES
from bench.quality.subjects import Subject

DRAWING = "results/quality.svg"

BANDS = (
    (2.0, "Below 2 bits"),
    (2.5, "2 to 2.5 bits"),
    (3.0, "2.5 to 3 bits"),
    (4.0, "3 to 4 bits"),
    (6.0, "4 to 5 bits"),
    (float("inf"), "8 and 16 bits"),
)
"""Headings of the tables of types, and the bits per weight below which a row stands under each."""

PROGRAMS_SAID = """“Program” is the commit that made and measured a row. ≤ stands before the commit that brought a
result whose program was not noted: it is that one or an earlier one. † marks rows whose preset stood for other figures
than it does today; they are listed below the tables. ? is not known. Compare rows of different programs with care."""

STARTS_SAID = """The divergence before → is that of the start alone. The one after it is what TesseraQ makes of it, with
the same preset. An ellipsis was not measured."""

ROUNDING_SAID = """All rows have the same text and the same number of steps of the same size. They learn on sequences
of 128 tokens, from four fifths of the calibration text: every fifth stretch of 2000 characters is kept back. The kept
part is text like that learned on. The other perplexity and divergence are those of the text that all pages measure, of
another domain. Variables are the numbers learned at once, in a block. Ranks are shares of the width. Peak memory is
that of the whole conversion."""

PTQ161_SAID = """Each row does one thing more than the one named before it: the mask of activation peaks alone, signs
and 4-bit channels rounded to nearest; then scales of signs and of input channels, learned from the blocks' squared
error; then the cosine in their loss; then preprocessing with adapters, which learn the calibration text."""

ACTIVATIONS_SAID = """What matrices are fed has as many bits as their weights, and a range for each token
(`--activations a4`, `a3`). Keys and values stay as they are. No kernel computes so: torch measures it, by
`eval --simulate`."""


@dataclass(frozen=True)
class Setting:
    """What the rows share.

    Attributes:
        subject: the model.
        options: of the measurement.
        today: what presets stand for.
        shown: readable names for what commands name.
    """

    subject: Subject
    options: Options
    today: Figures
    shown: Mapping[str, str]


def pages(measured: Measured, setting: Setting) -> dict[str, str]:
    """Return what belongs between the markers of each page, by the page's path in the folder of documents."""
    if any(row.study == FILES for row, _ in measured):
        return {setting.subject.page: "\n\n".join(filter(None, _files(measured, setting)))}
    studies = {study: [m for m in measured if m[0].study == study] for study in (TYPES, ROUNDING, PTQ161, ACTIVATIONS)}
    parts = {
        "results/quality.md": _quality(studies[TYPES], setting),
        "notes/starts.md": [prose(STARTS_SAID), report.starts_table(studies[TYPES])],
        "results/commands.md": _commands(measured, setting),
    }
    today = setting.today
    for study, page, said in (
        (PTQ161, "results/ptq161.md", PTQ161_SAID),
        (ACTIVATIONS, "results/activations.md", ACTIVATIONS_SAID),
    ):
        if rows := studies[study]:
            ordered = sorted(rows, key=lambda m: (m[1].bits, m[1].kld))
            parts[page] = [prose(said), report.table(ordered, today), _figures(rows, today)]
    if rows := studies[ROUNDING]:
        parts["results/rounding.md"] = [
            prose(ROUNDING_SAID),
            *(part for type in dict.fromkeys(row.type for row, _ in rows) for part in _rounding(rows, type, today)),
            _figures(rows, today),
        ]
    return {page: "\n\n".join(filter(None, part)) for page, part in parts.items()}


def prose(text: str, indent: str = "") -> str:
    """Wrap a paragraph as the pages are."""
    return textwrap.fill(text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _quality(measured: Measured, setting: Setting) -> list[str]:
    options = setting.options
    notes = report.notes(measured, setting.today).splitlines()
    return [
        prose(
            "Written by `scripts/run bench quality`, which ran [these commands](commands.md). "
            f"The first {options.chunks} chunks of {options.ctx} tokens of "
            f"{options.text.name} are measured; everything is calibrated on {options.calibration.name}. Rows that name "
            f"no preset were learned with `{options.preset}`. All matrices of the blocks have the type named, and the "
            "embedding is q8_0, unless the notes say otherwise. Divergence and agreement are against the model with "
            "blocks in f16 and the embedding in q8_0. Times are wall time and, in parentheses, processor time of all "
            "threads."
        ),
        prose(
            "Rows of Gemma-3-270M have 640 weights, no multiple of 256, and llama.cpp takes other types for such rows. "
            "“Padded” rows were measured on a model with rows of 768 that computes the same function "
            "(`scripts/bench/quality/pad_gemma.py`). Bits per weight do not count the padding."
        ),
        prose(PROGRAMS_SAID),
        f"![divergence and perplexity against bits per weight]({DRAWING.rpartition('/')[2]})",
        prose(
            f"A line goes through the best file of each size, up to {WIDEST:g} bits per weight; the others are faint. "
            "The best may have had more text or a last pass: the tables say which it is."
        ),
        *(part for heading, rows in bands(measured) for part in (heading, report.table(rows, setting.today))),
        "## Notes to the rows" if notes else "",
        "\n".join(prose(line, "  ") for line in notes),
    ]


def _files(measured: Measured, setting: Setting) -> list[str]:
    options, subject = setting.options, setting.subject
    made = f"scripts/run bench quality --model {subject.name}{'' if subject.model else '=FILE'}"
    notes = report.notes(measured, setting.today).splitlines()
    return [
        prose(
            f"Written by `{made}`. The model is {subject.title}. It came as {subject.came_as}, so “16 bits” means that "
            f"file's weights in f16, and a type that finds its own grid again there has an unfair start. The first "
            f"{options.chunks} chunks of {options.ctx} tokens of {options.text.name} are measured; everything is "
            f"calibrated on {options.samples * options.seqlen:,} tokens of {options.calibration.name}. Our rows were "
            f"learned with `{options.preset}`, and their embedding is q8_0 where the notes name none. Where 256 "
            "does not divide a row, K types take another type for it, in llama-quantize and here alike: the notes say "
            "which. Files stand by their "
            "whole size. Times are wall time and, in parentheses, processor time of all threads."
        ),
        prose(PROGRAMS_SAID),
        report.files_table(measured, setting.today),
        "## Notes to the rows" if notes else "",
        "\n".join(prose(line, "  ") for line in notes),
        "## Commands",
        report.commands([m for m in measured if m[0].family != REFERENCE], setting.shown),
    ]


def bands(measured: Measured) -> list[tuple[str, Measured]]:
    """Group rows by size under a heading each, the least divergence first."""
    found: dict[str, list[report.Pair]] = {}
    for row, result in sorted(measured, key=lambda m: m[1].kld):
        heading = next(heading for limit, heading in BANDS if result.bits < limit)
        found.setdefault(heading, []).append((row, result))
    return [(f"## {heading}", found[heading]) for _, heading in BANDS if heading in found]


def _commands(measured: Measured, setting: Setting) -> list[str]:
    options = setting.options
    read = f"{options.imatrix_chunks} chunks" if options.imatrix_chunks else "all chunks"
    return [
        prose(
            f"`scripts/bench/quality/places.py` makes the models, the importance matrix ({read} of 512 tokens, in "
            f"`llama-imatrix --no-ppl`) and the tokens for AutoRound {AUTOROUND_VERSION} "
            f"({options.samples} × {options.seqlen}, drawn as ours are). Then:"
        ),
        report.commands([m for m in measured if m[0].family != REFERENCE], setting.shown),
    ]


def _rounding(measured: Measured, type: str | None, today: Figures) -> tuple[str, str]:
    return f"## {str(type).upper()}", report.rounding_table([m for m in measured if m[0].type == type], today)


def _figures(measured: Measured, today: Figures) -> str:
    return "\n".join(prose(line, "  ") for line in report.figure_notes(measured, today).splitlines())
