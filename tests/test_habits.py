"""What is written in more than one place of the tools' settings says the same everywhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import tesseraq_gguf

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


def git(folder: Path, *words: str) -> None:
    who = {
        f"GIT_{role}_{what}": "somebody@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    subprocess.run(["git", *words], cwd=folder, env=os.environ | who, check=True, capture_output=True)


@pytest.fixture
def version_of(tmp_path: Path):
    """Return a function that says which version a package has that is made of a folder with our pyproject.toml."""

    def ask() -> str:
        command = [sys.executable, "-m", "setuptools_scm"]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return ask


def test_a_copy_without_git_has_a_version(version_of) -> None:
    assert version_of() == setting(r'^fallback_version = "(.*)"$')


def test_versions_come_from_tags(version_of, tmp_path: Path) -> None:
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "Begin")
    assert re.fullmatch(r"0\.2\.0\.dev1\+g\w+", version_of())  # a clone without tags
    git(tmp_path, "tag", "v0.3.0")
    assert version_of() == "0.3.0"
    git(tmp_path, "commit", "--allow-empty", "-m", "Go on")
    assert re.fullmatch(r"0\.3\.1\.dev1\+g\w+", version_of())


def test_the_package_says_its_version() -> None:
    assert tesseraq_gguf.__version__ == metadata.version("tesseraq-gguf")
    said = subprocess.run([sys.executable, "-m", "tesseraq_gguf", "--version"], capture_output=True, text=True).stdout
    assert said == f"tesseraq-gguf {tesseraq_gguf.__version__}\n"


def test_the_changelog_has_what_is_not_released_and_all_releases() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.*?)\]( - \d{4}-\d\d-\d\d)?$", text, re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    releases = [name for name, date in headings[1:] if date]
    assert len(releases) == len(headings) - 1
    assert releases == sorted(releases, key=lambda name: [int(part) for part in name.split(".")], reverse=True)
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= {
        "Added", "Changed", "Deprecated", "Removed", "Fixed", "Security",
    }  # fmt: skip


def test_a_file_is_the_same_whatever_the_version(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    """A tree with changes has a version of its own, and makes no other files for it."""
    real, made = metadata.version, []
    for version in ("0.2.0", "0.2.1.dev3+g1234567.d20261129"):
        monkeypatch.setattr(
            metadata, "version", lambda name, own=version: own if name == "tesseraq-gguf" else real(name)
        )
        assert tesseraq_gguf.__version__ == version
        out = tmp_path / "out.gguf"
        tesseraq_gguf.convert(tesseraq_gguf.Recipe(str(tiny_model), out, method="rtn", fresh=True))
        made.append(out.read_bytes())
        out.unlink()
    assert made[0] == made[1]
