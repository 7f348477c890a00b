"""The pages that people read: the front door is short, and no link on any page leads nowhere."""

from __future__ import annotations

import dataclasses
import html
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What writes the reference of the recipe."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("docs_recipe")


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


def test_code_in_contributing_is_the_programs():
    """What the walks show stands in the package; how it is broken into lines does not matter."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    homes = [*(ROOT / "tesseraq_gguf").rglob("*.py"), *(ROOT / "cpp_kernels").rglob("*.h")]
    program = "".join("".join(path.read_text(encoding="utf-8").split()) for path in homes)
    blocks = re.findall(r"```(?:python|c)\n(.*?)```", page, re.DOTALL)
    shown = [line for block in blocks for line in block.splitlines()]
    assert len(shown) > 10
    missing = [line for line in shown if "".join(line.split()).rstrip(",") not in program]
    assert not missing


def test_the_site_builds_strictly(recipe, tmp_path):
    """A link to a page or a heading that is not there ends the build, and so does a page without a place."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "docs", tree / "docs")
    for name in ("mkdocs.yml", "tesseraq_gguf", "examples", "cpp_kernels", "CHANGELOG.md"):
        (tree / name).symlink_to(ROOT / name)
    (tree / "docs/reference/recipe.md").write_text(recipe.page(), encoding="utf-8")
    made = ["--output", "docs/reference/command-line.md"]
    for command in (["typer", "tesseraq_gguf.cli.app", "utils", "docs", *made], ["mkdocs", "build"]):
        build = subprocess.run([sys.executable, "-m", *command], cwd=tree, capture_output=True, text=True)
        assert build.returncode == 0, build.stderr
    site = tree / "build/site"
    assert "<h1" in (site / "guides/first-model/index.html").read_text(encoding="utf-8")
    page = (site / "guides/examples/index.html").read_text(encoding="utf-8")
    shown = html.unescape(re.sub(r"<.*?>", "", page))
    for example in (ROOT / "examples").glob("*.py"):
        assert example.read_text(encoding="utf-8").splitlines()[0].strip('"') in shown
    assert "Keep a Changelog" in (site / "changelog/index.html").read_text(encoding="utf-8")
    assert "sources.cmake" in (site / "developers/kernels/index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.name)
def test_lines_of_prose_are_short(page):
    """Tables, code and what is made of the program may be wider."""
    if page.name in ("command-line.md", "recipe.md"):
        return
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    wide = [line for line in text.splitlines() if len(line) > 100 and not re.match(r"\s*\||    ", line)]
    assert not wide


def test_the_reference_of_the_recipe_has_every_field(recipe):
    from tesseraq_gguf import Recipe

    table = recipe.page().partition("## What presets")[0]
    found = dict(re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", table, re.MULTILINE))
    assert {field.name for field in dataclasses.fields(Recipe)} <= found.keys()
    assert found["model"] == "always"
    assert found["seed"] == "where something is learned"
    assert found["rank"] == "with `lrq`"
    assert found["finish_steps"] == "with `finish`, not with `rtn`"
    assert found["candidates"] == "with `target_bpw` or `target_size`"


def test_the_reference_has_every_method_and_every_type(recipe):
    from tesseraq_gguf.methods.table import METHODS
    from tesseraq_gguf.types.facts import TENSOR_TYPES

    tables = recipe.page().partition("## Methods")[2]
    listed = {name: rest.split(" | ") for name, rest in re.findall(r"^\| `(\S+?)` \| (.*) \|$", tables, re.MULTILINE)}
    assert METHODS.keys() | TENSOR_TYPES.keys() <= listed.keys()
    assert listed["tsq2"][:4] == ["2.25", "64", "500", "our runtime"]
    assert listed["lrq"][1:3] == ["`init`", "`rank`"]


def test_a_field_without_a_meaning_is_no_reference(recipe):
    @dataclasses.dataclass
    class Silent:
        """Says something of one.

        Attributes:
            one: of `options.PARTS`, in
                two lines.
        """

        one: int = 1
        two: int = 2

    with pytest.raises(ValueError, match="Silent does not say what these mean: two"):
        recipe.meanings(Silent)


def test_the_architecture_has_every_layer():
    """The page lists the layers of pyproject.toml, from the roof to the ground."""
    contract = re.search(
        r"^layers = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.DOTALL | re.M
    )
    page = (ROOT / "docs/developers/architecture.md").read_text(encoding="utf-8").partition("Beside the package")[0]
    table = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    assert contract
    assert re.findall(r"`(\w+)`", " ".join(table)) == re.findall(r"\w+", contract[1])
