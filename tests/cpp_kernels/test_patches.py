"""The patch series: applies in order to the pristine source, with git and with patch, and makes the cached tree."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from tesseraq_gguf.runtime import SourceTree, cache
from tesseraq_gguf.runtime.progress import SilentReporter
from tesseraq_gguf.runtime.source import KERNELS, _extract, apply_patches, copy_kernels, fetch_sdist
from tesseraq_gguf.types.facts import TENSOR_TYPES

pytestmark = pytest.mark.runtime


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "tree"
    _extract(fetch_sdist(), folder, with_llama_cpp=True, progress=SilentReporter())
    return folder / "llama.cpp"


@pytest.fixture
def tree(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "llama.cpp"))


def files(root: Path) -> dict[Path, bytes]:
    return {
        path.relative_to(root): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def test_every_patch_checks_in_order(tree: Path) -> None:
    if not shutil.which("git"):
        pytest.skip("needs git")
    for patch in cache.patch_files():
        for arguments in (["--check"], []):
            result = subprocess.run(
                ["git", "apply", *arguments, str(patch)],
                cwd=tree,
                env={"GIT_CEILING_DIRECTORIES": str(tree.parent), "PATH": "/usr/bin:/bin"},
                capture_output=True,
                text=True,
            )
            assert result.returncode == 0, f"{patch.name}: {result.stderr}"


def test_patched_tree_is_the_cached_one(tree: Path, source: SourceTree) -> None:
    apply_patches(tree)
    copy_kernels(tree)
    assert files(tree) == files(source.llama_cpp)


@pytest.mark.skipif(shutil.which("patch") is None, reason="needs the patch tool")
def test_patch_tool_makes_the_same_tree(tree: Path, source: SourceTree, monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **options: None if name == "git" else which(name, **options))
    apply_patches(tree)
    copy_kernels(tree)
    assert files(tree) == files(source.llama_cpp)


ELSEWHERE = Path("gguf-py")
"""Where upstream has tables in Python: the list of types in C is of no use there."""


def test_patches_are_hooks(pristine: Path) -> None:
    """Each says what it is for, adds little to upstream's files only, and names no type; none has another's files."""
    seen: set[Path] = set()
    names = re.compile("|".join(rf"\b\w*{t.name}\w*\b" for t in TENSOR_TYPES.values() if t.custom), re.IGNORECASE)
    for patch in cache.patch_files():
        lines = patch.read_text().splitlines()
        assert lines[0] and not lines[0].startswith("diff") and lines[1] == ""
        touched = [Path(line.split(" b/")[1]) for line in lines if line.startswith("diff --git")]
        assert touched and not seen & {*touched}, patch.name
        seen |= {*touched}
        for name in touched:
            assert (pristine / name).is_file(), name
            assert not name.is_relative_to(KERNELS)
        added = [line for line in lines if line.startswith("+") and not line.startswith("+++")]
        in_python = all(name.is_relative_to(ELSEWHERE) for name in touched)
        assert len(added) <= (120 if in_python else 90), f"{patch.name} adds {len(added)} lines"
        if not in_python:
            assert [line for line in added if names.search(line.partition("//")[0])] == [], patch.name


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """`scripts/patches.py`."""
    if not shutil.which("git"):
        pytest.skip("needs git")
    path = Path(__file__).parents[2] / "scripts" / "patches.py"
    spec = importlib.util.spec_from_file_location("patches", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_series_is_what_its_commits_are_written_as(script: ModuleType, tmp_path: Path) -> None:
    """Unpacked and written, every patch has the same bytes, and the same name."""
    tree, folder = tmp_path / "llama.cpp", tmp_path / "patches"
    script.unpack(tree, cache.patch_files())
    folder.mkdir()
    (folder / "0099-of-another-time.patch").write_text("is deleted")
    script.write(tree, folder)
    expected = {path.name: path.read_bytes() for path in cache.patch_files()}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
    # our sources are in the tree, and in no patch
    assert (tree / KERNELS / "types.h").is_file()

    (tree / "README.md").write_text("changed")
    with pytest.raises(script.PatchError, match="changes that are in no commit"):
        script.write(tree, folder)
    with pytest.raises(script.PatchError, match="commit your changes"):
        script.unpack(tree, cache.patch_files())
    script.git(tree, "commit", "--quiet", "--all", "--message", "no name")
    with pytest.raises(script.PatchError, match="'no name', not 'name: what it is for'"):
        script.write(tree, folder)


def test_unpacking_goes_on_after_a_patch_that_was_mended(script: ModuleType, tmp_path: Path) -> None:
    tree = tmp_path / "llama.cpp"
    build, gguf = (
        next(path for path in cache.patch_files() if path.name.endswith(name))
        for name in ("-build.patch", "-gguf.patch")
    )
    bad = tmp_path / "0002-gguf.patch"
    bad.write_text(gguf.read_text().replace("// check that tensor type", "// check that the type"))
    with pytest.raises(script.PatchError, match=r"0002-gguf.patch does not apply: mend what is in \*.rej"):
        script.unpack(tree, [build, bad])
    with pytest.raises(script.PatchError, match="mend what they say and delete them"):
        script.unpack(tree, [build, bad])
    (rejected,) = tree.rglob("*.rej")
    assert "ggml_type_name(info.t.type) == nullptr" in rejected.read_text()
    rejected.unlink()
    (tree / "README.md").write_text("mended by hand")
    script.unpack(tree, [build, bad])
    written = script.write(tree, tmp_path / "patches")
    assert [path.name for path in written] == ["0001-build.patch", "0002-gguf.patch"]
    assert written[0].read_bytes() == build.read_bytes()
    assert "+mended by hand" in written[1].read_text()
