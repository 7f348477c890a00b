"""A comparison for the browser: one page without other files, and its plots. Drawing needs matplotlib (`[plot]`)."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tesseraq_gguf.evaluation.comparison import Compared, Comparison
from tesseraq_gguf.evaluation.generation import LONGEST
from tesseraq_gguf.evaluation.speed import ANSWER, PROMPT, Speed
from tesseraq_gguf.pages import document, drawn, svg, table
from tesseraq_gguf.paths import temporary_sibling

_WORST = 12
"""Tokens of each file that are shown in their context."""

_BEFORE, _AFTER = 24, 4
"""Tokens shown before and after one."""

_DECADE = 10.0
"""Ratio of divergences from which on marks between powers of ten have no labels: they would overlap."""

_BINS = 32
"""Stretches of a chunk that divergence is averaged over."""


def write_plot(found: Comparison, place: Path) -> None:
    """Draw divergence against bits per weight, with the front that no smaller file is below, as .svg or .png."""
    with temporary_sibling(place) as partial:
        partial.write_bytes(drawn(lambda axes: _front(axes, found), place.suffix.removeprefix(".")))


def write_page(found: Comparison, place: Path) -> None:
    """Write the page."""
    with temporary_sibling(place) as partial:
        partial.write_text(page(found), encoding="utf-8")


def page(found: Comparison) -> str:
    """Return the page, HTML."""
    request, tokens = found.request, found.reference.answers.tokens
    name = html.escape(request.reference.name)
    parts = [
        f"<h1>Compared with {name}</h1>",
        f"<p>{tokens:,} tokens of {html.escape(request.text.name)} count, in {len(found.text.chunks)} chunks of "
        f"{request.ctx}. ± is one standard error.</p>",
        "<h2>Answers</h2>",
        _table([NAME, *ANSWERS, *SPREAD], [found.reference, *found.files]),
        "<p class='note'>KLD: divergence from the reference's answers in nats per token. Δp: difference of the next "
        "token's probability. Same top: positions with the same most likely token.</p>",
        f"<figure>{svg(lambda axes: _front(axes, found))}</figure>",
        "<h2>Size, memory and speed</h2>",
        _table([NAME, *costs(found)], [found.reference, *found.files]),
        "<p class='note'>bpw: bits per weight, of the whole file and of the matrices in its blocks. Memory is what "
        f"llama.cpp plans for {request.memory_at:,} tokens.{_of_speed(found)}</p>",
        *_tasks(found),
        *_written(found),
        "<h2>Where in a chunk</h2>",
        f"<figure>{svg(lambda axes: _by_position(axes, found))}</figure>",
        "<h2>Where answers differ most</h2>",
        *(_worst(found, file) for file in found.files),
    ]
    return document(f"{request.reference.name}: comparison", parts)


def _of_speed(found: Comparison) -> str:
    """What is said of speeds where some were measured."""
    first = found.files[0]
    if first.speed is None:
        return ""
    return (
        f" A prompt has {PROMPT} tokens, an answer {ANSWER}; × is the ratio to {html.escape(first.file.name)}, and the "
        "best of three rounds in turns counts."
    )


Column = tuple[str, Callable[[Compared], str]]
"""A heading, and what stands under it."""

NAME: Column = ("file", lambda f: f.file.name)


def _with_error(value: float, error: float) -> str:
    """Three decimals, and none of a number that needs none."""
    return f"{value:.3f} ± {error:.3f}" if value < 1000 else f"{value:.0f} ± {error:.0f}"


ANSWERS: Sequence[Column] = (
    ("perplexity", lambda f: _with_error(f.answers.perplexity, f.answers.perplexity_error)),
    ("KLD", lambda f: f"{f.answers.kld:.4f} ± {f.answers.kld_error:.4f}"),
    ("RMS Δp", lambda f: f"{100 * f.answers.rms_dp:.2f} %"),
    ("same top", lambda f: f"{100 * f.answers.same_top:.2f} %"),
)
"""Columns of what is known of answers."""

SPREAD: Sequence[Column] = (
    ("median KLD", lambda f: f"{f.answers.kld_median:.4f}"),
    ("90 %", lambda f: f"{f.answers.kld_90:.3f}"),
    ("99 %", lambda f: f"{f.answers.kld_99:.3f}"),
    ("99.9 %", lambda f: f"{f.answers.kld_999:.2f}"),
    ("max", lambda f: f"{f.answers.kld_maximum:.2f}"),
)
"""Columns of how divergence is spread over positions."""


def costs(found: Comparison) -> Sequence[Column]:
    """Columns of what files cost; × stands over ratios of speeds to the first file's."""
    columns: list[Column] = [
        ("MB", lambda f: f"{f.facts.bytes / 1e6:.1f}"),
        ("bpw", lambda f: f"{f.facts.bpw:.3f}"),
        ("in blocks", lambda f: f"{f.facts.block_bpw:.3f}"),
        ("memory, MB", lambda f: f"{sum(f.memory.values()) / 1e6:.0f}"),
    ]
    return [*columns, *_rates("prompt", found, lambda s: s.prompt), *_rates("answer", found, lambda s: s.answer)]


GENERATED: Sequence[Column] = (
    ("answers", lambda f: str(f.generated.answers) if f.generated else ""),
    ("words", lambda f: f"{f.generated.mean_words:.0f}" if f.generated else ""),
    ("without end", lambda f: f"{100 * f.generated.unended:.0f} %" if f.generated else ""),
    ("repeated", lambda f: f"{100 * f.generated.repeated:.1f} %" if f.generated else ""),
)
"""Columns of what files write."""


def tasks(found: Comparison) -> Sequence[Column]:
    """Columns of what tasks found: the task and its metric, and the figure with its standard error."""

    def said(file: Compared, name: str) -> str:
        result = next(result for result in file.tasks if result.name == name)
        return f"{result.value:.4f}" + (f" ± {result.stderr:.4f}" if result.stderr is not None else "")

    return [(result.name, partial(said, name=result.name)) for result in found.reference.tasks]


def _rates(what: str, found: Comparison, rate: Callable[[Speed], float]) -> Iterator[Column]:
    first = found.files[0].speed
    if first is not None:
        yield f"{what}, t/s", lambda f: f"{rate(f.speed):.1f}" if f.speed else ""
        yield "×", lambda f: f"{rate(f.speed) / rate(first):.2f}" if f.speed else ""


def front(files: Iterable[Compared]) -> list[Compared]:
    """Return the files that no smaller or equal one diverges less than, from the smallest on."""
    found: list[Compared] = []
    for file in sorted(files, key=lambda f: (f.facts.bpw, f.answers.kld)):
        if not found or file.answers.kld < found[-1].answers.kld:
            found.append(file)
    return found


def _table(columns: Sequence[Column], files: Sequence[Compared]) -> str:
    return table([heading for heading, _ in columns], ([said(file) for _, said in columns] for file in files))


def _tasks(found: Comparison) -> list[str]:
    if not found.reference.tasks:
        return []
    items = {result.task: result.items for result in found.reference.tasks}
    told = ", ".join(f"{html.escape(task)} {count:,}" for task, count in items.items())
    return [
        "<h2>Tasks</h2>",
        _table([NAME, *tasks(found)], [found.reference, *found.files]),
        f"<p class='note'>Of lm-evaluation-harness. Items asked: {told}. ± is one standard error.</p>",
    ]


def _written(found: Comparison) -> list[str]:
    if found.reference.generated is None:
        return []
    return [
        "<h2>What they write</h2>",
        _table([NAME, *GENERATED], [found.reference, *found.files]),
        f"<p class='note'>An answer has {LONGEST} tokens at most. Repeated: four words in a row that it had before."
        "</p>",
    ]


def _worst(found: Comparison, file: Compared) -> str:
    """The tokens after which a file's answers are farthest from the reference's, in their context."""
    text, kld = found.text, file.positions.kld
    order = np.argsort(kld, axis=None)[::-1][:_WORST]
    rows = []
    for chunk, place in zip(*np.unravel_index(order, kld.shape), strict=True):
        at = text.first + int(place) + 1  # the token that is answered

        def said(first: int, last: int, chunk: int = int(chunk)) -> str:
            pieces = (text.pieces.get(int(t), "") for t in text.chunks[chunk, max(0, first) : last])
            return html.escape("".join(pieces)).replace("\n", "<span class='faint'>⏎</span> ")

        expected, got = (float(np.exp(-of[chunk, place])) for of in (file.positions.base_nll, file.positions.nll))
        context = f"{said(at - _BEFORE, at)}<mark>{said(at, at + 1)}</mark>{said(at + 1, at + 1 + _AFTER)}"
        rows.append(
            f"<tr><td>{kld[chunk, place]:.2f}</td><td>{100 * expected:.1f} %</td><td>{100 * got:.1f} %</td>"
            f"<td class='text'>{context}</td></tr>"
        )
    head = "<tr><th>KLD</th><th>reference</th><th>file</th><th class='text'>token in its context</th></tr>"
    return (
        f"<details><summary>{html.escape(file.file.name)}</summary><p class='note'>Percentages are the probability of "
        f"the marked token.</p><div class='wide'><table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
        "</div></details>"
    )


def _front(axes: Any, found: Comparison) -> None:
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    best = front(found.files)
    axes.plot(
        [f.facts.bpw for f in best],
        [f.answers.kld for f in best],
        color="#c2410c",
        lw=1,
        zorder=1,
        label="no smaller file is closer",
    )
    for file in found.files:
        x, y = file.facts.bpw, file.answers.kld
        axes.errorbar(x, y, yerr=file.answers.kld_error, fmt="o", color="#c2410c" if file in best else "#9ca3af")
        axes.annotate(file.file.stem, (x, y), xytext=(6, 5), textcoords="offset points", fontsize=8)
    if min(f.answers.kld for f in found.files) > 0:
        axes.set_yscale("log")
        plain = StrMethodFormatter("{x:g}")
        axes.yaxis.set_major_formatter(plain)
        spread = max(f.answers.kld for f in found.files) / min(f.answers.kld for f in found.files)
        axes.yaxis.set_minor_formatter(plain if spread < _DECADE else NullFormatter())
    if len(best) > 1:
        axes.legend(fontsize=8, frameon=False)
    axes.margins(x=0.2, y=0.15)
    axes.set_xlabel("bits per weight, the whole file")
    axes.set_ylabel("KLD, nats per token")


def _by_position(axes: Any, found: Comparison) -> None:
    first = found.text.first
    for file in found.files:
        means = file.positions.kld.mean(0)
        parts = np.array_split(np.arange(len(means)), min(_BINS, len(means)))
        axes.plot([first + p.mean() for p in parts], [means[p].mean() for p in parts], lw=1.2, label=file.file.stem)
    axes.set_xlabel("position in a chunk")
    axes.set_ylabel("KLD, nats per token")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
