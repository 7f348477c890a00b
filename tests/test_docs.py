"""The pages that people read: the front door is short, and no link on any page leads nowhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_front_door_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_outside_the_site_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert links
    missing = [link for link in links if link and not ((ROOT / page).parent / link).exists()]
    assert not missing


def test_the_site_builds_strictly(tmp_path):
    """A link to a page or a heading that is not there ends the build, and so does a page without a place."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "docs", tree / "docs")
    for name in ("mkdocs.yml", "tesseraq_gguf", "examples"):
        (tree / name).symlink_to(ROOT / name)
    page = ["--output", "docs/reference/command-line.md"]
    for command in (["typer", "tesseraq_gguf.cli.app", "utils", "docs", *page], ["mkdocs", "build"]):
        build = subprocess.run([sys.executable, "-m", *command], cwd=tree, capture_output=True, text=True)
        assert build.returncode == 0, build.stderr
    assert "<h1" in (tree / "build/site/guides/first-model/index.html").read_text(encoding="utf-8")
