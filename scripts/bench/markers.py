"""Where scripts put what they measured into pages that people write."""

from __future__ import annotations

from pathlib import Path

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def insert(page: str, part: str) -> str:
    """Replace what is between the markers; a page without them gets them at its end.

    Raises:
        ValueError: one marker without the other, one twice, or in the wrong order.
    """
    if BEGIN not in page and END not in page:
        return f"{page.rstrip()}\n\n{BEGIN}\n{part.strip()}\n{END}\n".lstrip()
    before, found, rest = page.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended or BEGIN in rest or END in before or END in after:
        raise ValueError(f"the page must have {BEGIN} once, and {END} once after it")
    return f"{before}{BEGIN}\n{part.strip()}\n{END}{after}"


def write_part(page: Path, part: str) -> None:
    """Put a part between the markers of a page on disk, which is made if there is none."""
    page.parent.mkdir(parents=True, exist_ok=True)
    before = page.read_text(encoding="utf-8") if page.is_file() else ""
    page.write_text(insert(before, part), encoding="utf-8")
