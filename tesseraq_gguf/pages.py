"""Pages for the browser, each one file without others, and drawings for them. Drawing needs matplotlib (`[plot]`)."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tesseraq_gguf.errors import UsageError

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #888; --mark: #f59e0b55; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child, th.text { text-align: left; }
pre { overflow-x: auto; padding: .6rem .8rem; border: 1px solid var(--line); border-radius: 6px; }
td.text { text-align: left; white-space: normal; font: 13px/1.5 ui-monospace, monospace; }
mark { background: var(--mark); color: inherit; border-radius: 3px; }
p.note, .faint { color: var(--faint); }
figure { margin: 1rem 0; background: #fff; border-radius: 6px; padding: .5rem; }
figure svg { max-width: 100%; height: auto; }
"""


def check_place(option: str, place: Path, used: Iterable[Path]) -> None:
    """Refuse a place for something beside the work that cannot be meant, before any work is done.

    Args:
        option: that names it.
        place: where it is to be written.
        used: files that the work reads or makes.

    Raises:
        UsageError: a folder, in a folder that is not there, or one of the files.
    """
    if str(place) == "-":
        raise UsageError(f"{option} wants the name of a file; --json prints to the standard output")
    if place.is_dir():
        raise UsageError(f"{option} {place} is a folder: name a file in it")
    if not place.absolute().parent.is_dir():
        raise UsageError(f"{option}: the folder {place.absolute().parent} does not exist")
    for file in used:
        if place.absolute() == file.absolute() or (place.exists() and file.exists() and place.samefile(file)):
            raise UsageError(f"{option} {place} is {file}, which is used: name another one")


def check_plot(option: str, place: Path, kinds: Sequence[str]) -> None:
    """Refuse a place for a drawing that cannot be meant, before any work is done.

    Raises:
        UsageError: its name ends in none of the kinds, or matplotlib is missing.
    """
    if place.suffix not in kinds:
        raise UsageError(f"{option} {place}: its name must end in {' or '.join(kinds)}")
    if not find_spec("matplotlib"):
        raise UsageError(f"{option} needs matplotlib; run: pip install 'tesseraq-gguf[plot]'")


def document(title: str, parts: Iterable[str]) -> str:
    """Return a page, HTML, of parts that are HTML."""
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width'><style>{_STYLE}</style></head><body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table, HTML, of cells that are plain text."""
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def svg(draw: Callable[[Any], None]) -> str:
    """A drawing to stand in a page."""
    return re.sub(r"^.*?(?=<svg)", "", drawn(draw, "svg").decode(), flags=re.DOTALL)


def drawn(draw: Callable[[Any], None], kind: str) -> bytes:
    """Return a drawing in a format that matplotlib names: svg, png.

    Args:
        draw: draws on the axes that it is handed.
        kind: the format.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # the same bytes whenever the same is drawn
    with matplotlib.rc_context({"svg.hashsalt": "tesseraq-gguf", "svg.fonttype": "path"}):
        figure = Figure(figsize=(8.5, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        draw(axes)
        out = io.BytesIO()
        figure.savefig(out, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
        return out.getvalue()
