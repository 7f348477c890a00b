"""The picture of the results: divergence and perplexity against bits per weight, a line for each family's best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.quality.results import Result
from bench.quality.rows import AUTOROUND, LLAMA_CPP, OURS, REFERENCE, Row
from tesseraq_gguf.types.facts import tensor_type

NO_MODEL = 1e3
"""From this perplexity on a file is no language model, and the exact figure means nothing."""

WIDEST = 5.5
"""Bits per weight up to which the picture reaches: beyond, all files are alike. The table has them."""

Measured = Sequence[tuple[Row, Result]]


@dataclass(frozen=True)
class Line:
    """How a family of rows is drawn.

    Attributes:
        said: its entry in the legend.
        marker, colour: matplotlib's.
        members: whether a row belongs to it.
    """

    said: str
    marker: str
    colour: str
    members: Callable[[Row], bool]


def _custom(row: Row) -> bool:
    return row.type is None or tensor_type(row.type).custom


LINES = (
    Line("learned here, our types", "o", "#c2410c", lambda row: row.family == OURS and _custom(row)),
    Line("learned here, stock types", "D", "#a16207", lambda row: row.family == OURS and not _custom(row)),
    Line("llama-quantize, importance matrix", "s", "#1d4ed8", lambda row: row.family == LLAMA_CPP),
    Line("AutoRound", "^", "#15803d", lambda row: row.family == AUTOROUND),
)


def plot(measured: Measured, file: Path) -> None:
    """Draw all rows that are language models, and through each family its Pareto front, whose points are named."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    # text as paths: a page that shows the picture need not have the font
    matplotlib.rcParams |= {"svg.hashsalt": "bench", "font.size": 10}
    # a type measured both ways is one point
    points = [
        (row, result)
        for row, result in measured
        if row.family != REFERENCE and sane(result) and result.bits < WIDEST and not row.name.endswith("-plain")
    ]
    reference = next((result for row, result in measured if row.family == REFERENCE and not row.padded), None)
    figure, panels = pyplot.subplots(2, 1, figsize=(9, 11), sharex=True, layout="constrained")
    for axes, value, said in (
        (panels[0], lambda r: r.kld, "divergence from 16 bits, nats per token"),
        (panels[1], lambda r: r.perplexity, "perplexity, WikiText-2 validation"),
    ):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel(said)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.margins(x=0.06, y=0.08)
        _draw(axes, points, value)
    if reference:
        panels[1].axhline(reference.perplexity, color="#525252", linewidth=0.8, linestyle=(0, (4, 3)))
        panels[1].annotate(
            f"16 bits: {reference.perplexity:.2f}", (0, reference.perplexity), xycoords=("axes fraction", "data"),
            xytext=(4, -12), textcoords="offset points", color="#525252",
        )  # fmt: skip
        panels[1].set_yticks([t for t in (12, 15, 20, 30, 50, 100, 200, 500) if t > reference.perplexity * 0.9])
    panels[1].set_xlabel("bits per weight, matrices of the blocks")
    panels[0].legend(frameon=False, loc="upper right")
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=150)
    pyplot.close(figure)


def _draw(axes: Any, points: Measured, value: Callable[[Result], float]) -> None:
    from adjustText import adjust_text

    paper = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5}
    texts: list[Any] = []
    covered: list[tuple[float, float]] = []
    for line in LINES:
        members = [(result.bits, value(result), row) for row, result in points if line.members(row)]
        if not members:
            continue
        best = front([(x, y) for x, y, _ in members])
        rest = [(x, y) for x, y, _ in members if (x, y) not in best]
        covered += _along(best) + rest
        look = {"marker": line.marker, "color": line.colour}
        axes.scatter([x for x, _ in rest], [y for _, y in rest], alpha=0.25, s=22, linewidths=0, **look)
        axes.plot([x for x, _ in best], [y for _, y in best], markersize=5, linewidth=1.2, label=line.said, **look)
        named = {(x, y): _name(row) for x, y, row in members if (x, y) in best}
        texts += [axes.text(x, y, text, color=line.colour, fontsize=8, bbox=paper) for (x, y), text in named.items()]
    if texts:
        thread = {"arrowstyle": "-", "color": "#a3a3a3", "lw": 0.5}
        # so many turns and not so much time: the same results draw the same picture
        adjust_text(
            texts, [x for x, _ in covered], [y for _, y in covered], ax=axes, expand=(1.2, 1.5),
            iter_lim=400, arrowprops=thread,
        )  # fmt: skip


def _along(best: Sequence[tuple[float, float]], between: int = 16) -> list[tuple[float, float]]:
    """Points on the line through a front, as it looks where y is logarithmic: what labels keep off."""
    steps = [k / between for k in range(between)]
    inner = [
        (x + t * (x_next - x), y * (y_next / y) ** t) for (x, y), (x_next, y_next) in pairwise(best) for t in steps
    ]
    return [*inner, *best[-1:]]


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other one beats in both numbers, by the first."""
    best: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def sane(result: Result) -> bool:
    """Whether a file is still a language model."""
    return result.perplexity < NO_MODEL


def _name(row: Row) -> str:
    """What a point is called: its type. The table has the method."""
    if row.family == AUTOROUND:
        return "W2 g64" if row.type else "Q2_K_S"
    return (row.type or "mixed").upper()
