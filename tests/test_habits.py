"""What is written in more than one place of the tools' settings says the same everywhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def setting(pattern: str) -> str:
    """Return what the only place that matches says."""
    (found,) = re.findall(pattern, PROJECT, re.MULTILINE)
    return str(found)


def test_types_and_style_are_checked_for_the_oldest_python_that_is_allowed() -> None:
    oldest = setting(r'^requires-python = ">=(.*)"$')
    assert setting(r'^python_version = "(.*)"$') == oldest
    assert setting(r'^target-version = "py(.*)"$') == oldest.replace(".", "")
    needed = re.findall(r"version_info < \((\d+), (\d+)\)", (ROOT / "scripts/lib.sh").read_text())
    assert [".".join(parts) for parts in needed] == [oldest]


def test_commits_are_checked_as_scripts_lint_does() -> None:
    """An unknown check makes it tell which there are, before it does anything."""
    asked = subprocess.run([ROOT / "scripts/lint", "spelling"], capture_output=True, text=True)
    assert asked.returncode == 1
    checks = asked.stderr.strip().rpartition("there are: ")[2].split()
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert [hook["entry"] for hook in hooks] == [f"scripts/lint {check}" for check in checks]
    assert len(checks) == 3
