"""Benches, checks and designs: what `scripts/run` lists can be run, and what pages and messages name is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUN = ROOT / "scripts/run"
KINDS = ("bench", "check", "design")
HEADER = ROOT / "tesseraq_gguf/types/bcq/packer.py"
"""Has the text of a header, whose bytes name runtimes: it changes when they are built anew anyway."""


def listed() -> dict[tuple[str, str], str]:
    """Return the summaries of what can be run, by kind and name."""
    said = subprocess.run([RUN], capture_output=True, text=True, check=True).stdout
    found = re.findall(rf"^  ({'|'.join(KINDS)}) (\w+) +(.+)$", said, re.MULTILINE)
    return {(kind, name): summary for kind, name, summary in found}


def pages() -> list[Path]:
    """Return what may name a script: pages, code, and other scripts."""
    folders = ("docs", "scripts", "tests", "examples", "tesseraq_gguf", "convert", "cpp_kernels")
    files = [*ROOT.glob("*.md"), ROOT / ".ci/run", *(file for folder in folders for file in (ROOT / folder).rglob("*"))]
    return [file for file in files if file.suffix in {".md", ".py", ".yaml", ""} and file.is_file()]


def test_everything_that_says_its_needs_is_listed_with_a_sentence() -> None:
    programs = {
        (file.relative_to(ROOT / "scripts").parts[0], file.parent.name if file.stem == "__main__" else file.stem)
        for kind in KINDS
        for file in (ROOT / "scripts" / kind).rglob("*")
        if file.suffix in {".py", ""} and file.is_file() and re.search(r"^# needs:", file.read_text(), re.MULTILINE)
    }
    assert len(programs) > 10
    assert listed().keys() == programs
    assert all(len(summary) > 20 and summary.endswith(".") for summary in listed().values())


def test_needs_are_extras_and_runtimes() -> None:
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for kind in KINDS:
        for file in (ROOT / "scripts" / kind).rglob("*.py"):
            for line in re.findall(r"^# needs: (.*)$", file.read_text(), re.MULTILINE):
                needs = dict(need.split("=") for need in line.split())
                assert set(needs) <= {"extras", "runtime"}
                assert set(needs["extras"].split(",")) <= set(extras), file
                assert needs.get("runtime", "cpu") in {"cpu", "cuda"}


@pytest.mark.parametrize("words", [["bench", "harps"], ["bench", "markers"], ["bench"], ["harp", "quality"]])
def test_what_is_not_there_is_one_line(words: list[str]) -> None:
    asked = subprocess.run([RUN, *words], capture_output=True, text=True)
    assert asked.returncode == 1
    assert asked.stderr.startswith(f"error: there is no '{' '.join(words)}")
    assert asked.stderr.count("\n") == 1


def test_what_pages_and_messages_name_can_be_run() -> None:
    there = listed()
    for file in pages():
        if file in (Path(__file__), HEADER, RUN):
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        assert set(re.findall(r"scripts/run (\w+) (\w+)", text)) <= there.keys(), file
        named = set(re.findall(r"\bscripts/[\w/]+(?:\.\w+)?", text))
        assert not {path for path in named if not (ROOT / path).exists()}, file


def test_a_program_is_run_where_the_user_is(tmp_path: Path) -> None:
    """A folder of the same name there is not in its way."""
    (tmp_path / "check").mkdir()
    (tmp_path / "check" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    asked = subprocess.run([RUN, "check", "mutate", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.startswith("usage: scripts/run check mutate ")
