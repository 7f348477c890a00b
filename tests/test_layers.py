"""The layers of the package, as `pyproject.toml` draws them: no import runs upwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_no_import_runs_upwards(tmp_path: Path) -> None:
    """The linter reads the package from its folder: the parts that are installed below it from elsewhere are linked."""
    package = tmp_path / "tesseraq_gguf"
    package.mkdir()
    for entry in (ROOT / "tesseraq_gguf").iterdir():
        (package / entry.name).symlink_to(entry)
    (package / "converter").symlink_to(ROOT / "convert")
    (package / "cpp_kernels").symlink_to(ROOT / "cpp_kernels")
    linter = Path(sys.executable).with_name("lint-imports")
    found = subprocess.run(
        [linter, ROOT / "pyproject.toml", "--no-cache"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "120"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
