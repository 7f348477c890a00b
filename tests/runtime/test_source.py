"""Fetching, verifying, extracting and patching the source."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from tesseraq_gguf.errors import RuntimeBuildError, UsageError
from tesseraq_gguf.runtime import cache, ensure_source, pin, source


def make_sdist(path: Path, members: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return path


SDIST = {
    "p-1/llama_cpp/__init__.py": b"",
    "p-1/vendor/llama.cpp/ggml/include/ggml.h": b"line 1\nline 2\nline 3\n",
    "p-1/vendor/llama.cpp/docs/large": b"x",
    "p-1/.git/config": b"x",
}

PATCH = """hook: change a line

diff --git a/ggml/include/ggml.h b/ggml/include/ggml.h
--- a/ggml/include/ggml.h
+++ b/ggml/include/ggml.h
@@ -1,3 +1,3 @@
 line 1
-line 2
+line two
 line 3
"""


@pytest.fixture
def small(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pinned sdist of a few files, in the cache, with one patch and one C source of ours. Returns the sdist."""
    kernels = tmp_path / "kernels"
    (kernels / "patches").mkdir(parents=True)
    (kernels / "patches" / "0001-hook.patch").write_text(PATCH)
    (kernels / "tsq.c").write_text("int x;\n")
    monkeypatch.setattr(cache, "kernels_dir", lambda: kernels)
    sdist = make_sdist(empty_cache / "downloads" / f"llama_cpp_python-{pin.VERSION}.tar.gz", SDIST)
    pin_to(sdist, monkeypatch)
    return sdist


def pin_to(sdist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    monkeypatch.setattr(pin, "SHA256", hashlib.sha256(sdist.read_bytes()).hexdigest())


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_source_is_patched_and_reproducible(small: Path) -> None:
    tree = ensure_source()
    assert files(tree.llama_cpp) == {
        "ggml/include/ggml.h": b"line 1\nline two\nline 3\n",
        "ggml/src/tesseraq/tsq.c": b"int x;\n",
    }
    assert files(tree.bindings) == {"__init__.py": b""}
    first = files(tree.llama_cpp.parent)
    shutil.rmtree(tree.llama_cpp.parent)
    assert files(ensure_source().llama_cpp.parent) == first
    assert sorted(p.name for p in tree.llama_cpp.parent.parent.iterdir()) == ["source", "source.lock"]


def test_second_call_takes_the_cached_one(small: Path) -> None:
    tree = ensure_source()
    small.unlink()
    assert ensure_source() == tree


def test_wrong_sha(small: Path, empty_cache: Path) -> None:
    small.write_bytes(small.read_bytes() + b"x")
    with pytest.raises(RuntimeBuildError, match=f"its sha256 is [0-9a-f]{{64}}, expected {pin.SHA256}"):
        ensure_source()
    assert not list(empty_cache.glob("*/source"))


def test_wrong_sha_of_a_download_is_not_kept(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.unlink()
    monkeypatch.setattr(source, "_pip_download", lambda folder: make_sdist(folder / small.name, {"p-1/a/b": b"other"}))
    with pytest.raises(RuntimeBuildError, match="is not the file this version was made for"):
        ensure_source()
    assert not small.exists()


def test_download_fails(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.unlink()
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: No matching distribution found\n")
    monkeypatch.setattr(source.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(RuntimeBuildError, match=r"pip could not download .*No matching distribution found"):
        ensure_source()


def test_no_pip(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.unlink()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeBuildError, match=r"has no pip.*uv pip install pip"):
        ensure_source()


def test_neither_git_nor_patch(small: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, **options: None)
    with pytest.raises(RuntimeBuildError, match="neither 'git' nor 'patch' was found"):
        ensure_source()
    assert not list(empty_cache.glob("*/source"))


@pytest.mark.parametrize("tool", ["git", "patch"])
def test_patch_that_does_not_apply(tool: str, small: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which
    if which(tool) is None:
        pytest.skip(f"needs {tool}")
    monkeypatch.setattr(shutil, "which", lambda name, **options: which(name) if name == tool else None)
    patch = cache.patch_files()[0]
    patch.write_text(PATCH.replace("-line 2", "-line 5"))
    with pytest.raises(RuntimeBuildError, match=r"0001-hook.patch does not apply .* cpp_kernels/README.md"):
        ensure_source()
    assert not list(empty_cache.glob("*/source"))


def test_patching_inside_another_repository(small: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """git skips patches in silence below a repository that it takes the tree for; ours are applied all the same."""
    subprocess.run(["git", "init", "-q", str(empty_cache.parent)], check=True)
    assert b"line two" in (ensure_source().llama_cpp / "ggml/include/ggml.h").read_bytes()


def test_members_outside_and_links_are_not_written(
    small: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = {"p-1/llama_cpp/../../../evil": b"x", "/p-1/llama_cpp/evil": b"x", "p-1/llama_cpp/": b""}
    make_sdist(small, SDIST | evil, {"p-1/llama_cpp/link": "/etc/passwd"})
    pin_to(small, monkeypatch)
    tree = ensure_source()
    assert files(tree.bindings) == {"__init__.py": b""}
    assert not list(empty_cache.parent.rglob("evil"))


def test_truncated_sdist(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.write_bytes(small.read_bytes()[:-40])
    pin_to(small, monkeypatch)
    with pytest.raises(RuntimeBuildError, match="cannot read"):
        ensure_source()


def test_checkout_is_copied_not_touched(small: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "llama.cpp"
    (checkout / "ggml" / "include").mkdir(parents=True)
    (checkout / "ggml" / "include" / "ggml.h").write_bytes(b"line 1\nline 2\nline 3\n")
    (checkout / "build").mkdir()
    (checkout / "build" / "big").touch()
    before = files(checkout)
    tree = ensure_source(llama_cpp=checkout)
    assert files(checkout) == before
    assert tree.key != cache.current_key()
    assert set(files(tree.llama_cpp)) == {"ggml/include/ggml.h", "ggml/src/tesseraq/tsq.c"}
    (checkout / "ggml" / "other.c").touch()
    assert ensure_source(llama_cpp=checkout).key != tree.key


def test_not_a_checkout(empty_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a llama\.cpp checkout"):
        ensure_source(llama_cpp=tmp_path)
