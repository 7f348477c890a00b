"""The patch series: applies in order to the pristine source, with git and with patch, and makes the cached tree."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tesseraq_gguf.converter.tensor_types import TENSOR_TYPES
from tesseraq_gguf.runtime import SourceTree, cache
from tesseraq_gguf.runtime.progress import SilentReporter
from tesseraq_gguf.runtime.source import KERNELS, _extract, apply_patches, copy_kernels, fetch_sdist

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


def test_patches_are_hooks(pristine: Path) -> None:
    """Each says what it is for, touches upstream files only, adds little per type; our code stands in our folder."""
    custom = [t for t in TENSOR_TYPES.values() if t.custom]
    for patch in cache.patch_files():
        lines = patch.read_text().splitlines()
        assert lines[0] and not lines[0].startswith("diff") and lines[1] == ""
        touched = [line.split(" b/")[1] for line in lines if line.startswith("diff --git")]
        assert touched
        for name in touched:
            assert (pristine / name).is_file(), name
            assert not Path(name).is_relative_to(KERNELS)
        added = sum(line.startswith("+") and not line.startswith("+++") for line in lines)
        assert added <= 15 * len(custom), f"{patch.name} adds {added} lines"
