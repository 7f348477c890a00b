"""From results to Markdown. Pure: nothing is measured here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.quality.plot import sane
from bench.quality.results import Result
from bench.quality.rows import AUTOROUND, OURS, REFERENCE, Row

Pair = tuple[Row, Result]

Measured = Sequence[Pair]

Figures = Mapping[str, Mapping[str, float]]
"""What presets stand for, by their names."""

_COLUMNS = (
    ("", "method", "type", "bits per weight", "perplexity", "KL divergence", "same top token", "made in", "program"),
    ("---", "---", "---", "---:", "---:", "---:", "---:", "---:", "---"),
)
STARTS = ("rounding alone", "GPTQ", "QEP+GPTQ", "AWQ", "OmniQuant", "AWQ+GPTQ")
"""What TesseraQ can begin at, by the names that methods have in the table."""

_ALONE = {"rounding alone": ("RTN", "LO-BCQ")}


def table(measured: Measured, today: Figures) -> str:
    """Lay the results out as a Markdown table, in the order given."""
    lines = [*_COLUMNS, *(_cells(row, result, today) for row, result in measured)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def files_table(measured: Measured, today: Figures) -> str:
    """Lay out files by their size, whatever types their matrices have."""
    heads = ("", "method", "types", "MB", "perplexity", "KL divergence", "same top token", "made in", "program")
    ordered = sorted(measured, key=lambda m: (m[1].bytes or 0, m[1].kld))
    lines = [heads, ("---", "---", "---", *["---:"] * 6), *(_file_cells(*m, today) for m in ordered)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _file_cells(row: Row, result: Result, today: Figures) -> tuple[str, ...]:
    family, method, kind, _, *rest = _cells(row, result, today)
    return (family, method, kind, f"{(result.bytes or 0) / 1e6:.1f}", *rest)


def starts_table(measured: Measured) -> str:
    """Lay out what a start is alone, and what TesseraQ makes of it: divergences, a line for each type of ours."""
    found = {(row.type, row.method): result for row, result in measured if row.type and row.family == OURS}

    def cell(type: str, start: str) -> str:
        alone: list[Result | None] = [
            found[type, name] for name in _ALONE.get(start, (start,)) if (type, name) in found
        ]
        learned = found.get((type, f"TesseraQ from {start}" if start not in _ALONE else "TesseraQ"))
        shown = [f"{r.kld:.{4 if r.kld < 0.1 else 3}f}" if r else "…" for r in (*(alone or [None]), learned)]
        return " → ".join(shown) if alone or learned else ""

    types = [type for type in dict.fromkeys(type for type, _ in found) if (type, "GPTQ") in found]
    bodies = [(type.upper(), *(cell(type, start) for start in STARTS)) for type in types]
    lines = [("type", *STARTS), ("---", *["---:"] * len(STARTS)), *bodies]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rounding_table(measured: Measured, today: Figures) -> str:
    """Lay the study of rounding out for one type: by samples, then divergence on the text that is measured."""
    heads = ("method", "sequences", "variables", "peak memory", "perplexity", "KL divergence",
             "perplexity, kept part", "KL divergence, kept part", "made in", "program")  # fmt: skip
    ordered = sorted(measured, key=lambda m: (-(m[0].samples or 0), m[1].kld))
    lines = [heads, ("---", *["---:"] * (len(heads) - 1)), *(_rounding_cells(*m, today) for m in ordered)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rounding_cells(row: Row, result: Result, today: Figures) -> tuple[str, ...]:
    assert result.kept
    rank = f", rank 1/{row.rank}" if row.rank else ""
    return (
        row.method + rank,
        "" if row.method == "RTN" else str(row.samples),
        f"{result.variables:,}" if result.variables else "",
        f"{result.peak_bytes / 1e9:.2f} GB" if result.peak_bytes else "",
        _perplexity(result),
        f"{result.kld:.4f}",
        f"{result.kept[0]:.2f} ± {result.kept[1]:.2f}",
        f"{result.kept[2]:.4f}",
        _time(result),
        _program(result, today),
    )


def other_figures(result: Result, today: Figures) -> dict[str, dict[str, float]] | None:
    """Return the figures of a result's presets that are others today, by preset; None if they are not known."""
    if result.figures is None:
        return None
    compared = {
        preset: {name: value for name, value in figures.items() if today.get(preset, {}).get(name) != value}
        for preset, figures in result.figures.items()
    }
    return {preset: different for preset, different in compared.items() if different}


def figure_notes(measured: Measured, today: Figures) -> str:
    """List figures of presets that were others when rows were made, with the rows."""
    rows: dict[str, list[str]] = {}
    for row, result in measured:
        for preset, figures in (other_figures(result, today) or {}).items():
            said = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in figures.items())
            rows.setdefault(f"`{preset}` had {said}", []).append(title(row))
    return "\n".join(f"- † {said}: {'; '.join(dict.fromkeys(those))}." for said, those in rows.items())


def notes(measured: Measured, today: Figures) -> str:
    """List what the rows' notes say, the mixtures of types, and figures of presets that were others."""
    lines = []
    for row, result in measured:
        parts = [row.note] if row.note else []
        if len(result.types) > 1:
            parts.append("matrices of the blocks: " + ", ".join(f"{n} × {t}" for t, n in sorted(result.types.items())))
        if result.embedding != "q8_0" and row.family != REFERENCE:
            parts.append(f"embedding in {result.embedding}")
        if parts:
            lines.append(f"- {title(row)}: {'; '.join(parts)}.")
    return "\n".join(filter(None, [*lines, figure_notes(measured, today)]))


def commands(measured: Measured, places: Mapping[str, str]) -> str:
    """Return the commands of the rows, with readable names, in a code block."""
    lines = []
    for row, _ in measured:
        shown = {"out": f"{row.name}.gguf", **places}
        lines += [" ".join(words) for words in row.filled(shown)]
    return "\n".join(f"    {line}" for line in lines)


def title(row: Row) -> str:
    """How a row is called in running text."""
    return " ".join(part for part in (row.family, row.method if row.method != "none" else "", _type(row)) if part)


def _cells(row: Row, result: Result, today: Figures) -> tuple[str, ...]:
    return (
        row.family + (" (padded)" if row.padded else ""),
        row.method,
        _type(row),
        f"{result.bits:.2f}",
        _perplexity(result),
        f"{result.kld:.4f}",
        f"{100 * result.top1:.1f} %",
        "" if row.family == REFERENCE else _time(result),
        _program(result, today),
    )


def _program(result: Result, today: Figures) -> str:
    before = f"≤ {result.recorded}" if result.recorded else "?"
    other = other_figures(result, today)
    return (result.commit or before) + (" †" if other else " (figures ?)" if other is None else "")


def _perplexity(result: Result) -> str:
    if not sane(result):
        return f"{result.perplexity:.0f}"
    return f"{result.perplexity:.2f}" + ("" if result.perplexity_error is None else f" ± {result.perplexity_error:.2f}")


def _type(row: Row) -> str:
    if row.family == AUTOROUND:
        return "Q2_K_S" if row.type is None else "W2 g64"
    return row.mix or (row.type or "mixed").upper()


def _time(result: Result) -> str:
    spent = "" if result.cpu_seconds is None else f" ({_minutes(result.cpu_seconds)})"
    return _minutes(result.seconds) + spent + (f", {result.gpu}" if result.gpu else "")


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
