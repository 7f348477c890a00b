"""The hash of what decides learning: what learns is in it, what only tells or runs is not."""

from __future__ import annotations

import ast
from pathlib import Path

import tesseraq_gguf
from tesseraq_gguf.conversion.program import LEARNING, learning_program, learning_sources

HOME = Path(tesseraq_gguf.__file__).parent
HARMLESS = {
    "arguments", "errors", "gguf_files.factors", "gguf_files.gguf_file", "learning.palette", "paths", "runtime.pypi",
    "tensor_files",
}  # fmt: skip
"""What learning modules import that decides nothing by itself: facts of types and recipes stand in a run's identity."""


def _imported(file: Path) -> set[str]:
    """Modules of the package that a file imports, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tesseraq_gguf."):
            base = node.module.removeprefix("tesseraq_gguf.")
            # `from package import module` names modules
            subs = {f"{base}.{alias.name}" for alias in node.names if (HOME / base / f"{alias.name}.py").is_file()}
            found |= subs or {base}
    return found


def _hashed(module: str) -> bool:
    place = module.replace(".", "/")
    return any(place == name or place.startswith(f"{name}/") for name in LEARNING)


def test_whatever_learning_modules_import_is_hashed_or_known_to_decide_nothing():
    wanted = {module for file in learning_sources().values() for module in _imported(file)}
    assert {module for module in wanted if not _hashed(module)} <= HARMLESS


def test_every_source_is_there_and_no_other():
    names = set(learning_sources())
    assert {"methods/tesseraq.py", "types/tsq/grid.py", "models/decoder.py", "learning/reconstruction.py"} <= names
    assert not names & {
        "cli/app.py",
        "serving/chat.py",
        "conversion/pipeline.py",
        "learning/distillation.py",
        "recipe/options.py",
    }
    assert all(file.is_file() for file in learning_sources().values())


def test_a_changed_line_is_another_program(monkeypatch, tmp_path):
    before = learning_program()
    sources = learning_sources()
    changed = tmp_path / "tesseraq.py"
    changed.write_text(sources["methods/tesseraq.py"].read_text(encoding="utf-8").replace("0.99", "0.98") + "\n")
    monkeypatch.setattr(
        "tesseraq_gguf.conversion.program.learning_sources", lambda _: sources | {"methods/tesseraq.py": changed}
    )
    learning_program.cache_clear()
    assert learning_program() != before
    monkeypatch.undo()
    learning_program.cache_clear()
    assert learning_program() == before
