"""Print a text to measure on: prose from the docstrings of Python's standard library.

It ships with every Python, needs no network, and has nothing in common with the default calibration text, Python's help
topics. Figures on it compare files with each other on one machine; for figures to publish take a known text.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

CHARACTERS = 80_000
_UNWANTED = {"test", "tests", "idlelib", "pydoc_data", "site-packages", "dist-packages", "lib2to3", "turtledemo"}


def paragraphs(file: Path) -> Iterator[str]:
    """Yield the paragraphs of a source file's docstrings that read like English."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and (doc := ast.get_docstring(node, clean=False)):
            for paragraph in inspect.cleandoc(doc).split("\n\n"):
                text = " ".join(paragraph.split())
                if _is_prose(text):
                    yield text


def _is_prose(text: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in text)
    return (
        len(text) >= 160
        and bool(re.match(r"[A-Z][a-z]*[ ,]", text))
        and text.endswith(".")
        and letters >= 0.93 * len(text)
        and ">>>" not in text
    )


def main() -> None:
    """Print paragraphs, each once, in the order of the files' names."""
    library = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    size = 0
    for file in sorted(library.rglob("*.py")):
        if _UNWANTED & set(file.relative_to(library).parts):
            continue
        for text in paragraphs(file):
            if text not in seen and size < CHARACTERS:
                seen.add(text)
                size += len(text)
                print(text, end="\n\n")
    if not seen:
        sys.exit(f"error: the Python in {library} comes without the sources of its library")


if __name__ == "__main__":
    main()
