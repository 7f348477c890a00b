"""Finding a runtime: the right one, none, or one for other patches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tesseraq_gguf.errors import RuntimeMissingError
from tesseraq_gguf.runtime import cache, find_runtime, info, pin

from .conftest import install_fake


def test_none_installed(empty_cache: Path) -> None:
    with pytest.raises(RuntimeMissingError, match=r"no runtime is installed .* run: tesseraq-gguf runtime build"):
        find_runtime()
    data = info()
    assert data["installed"] is False
    assert data["others"] == []
    json.dumps(data)


def test_other_patches(empty_cache: Path) -> None:
    root = install_fake("0.3.36-0123456789ab", kernels_hash="0123456789ab", version="0.3.36")
    with pytest.raises(RuntimeMissingError) as caught:
        find_runtime()
    assert str(caught.value) == (
        f"the runtime in {root} was built for other patches (hash 0123456789ab, this version needs "
        f"{cache.kernels_hash()}); run: tesseraq-gguf runtime build"
    )
    assert info()["others"] == [str(root)]


def test_other_version(empty_cache: Path) -> None:
    install_fake(f"0.1.0-{cache.kernels_hash()}", kernels_hash=cache.kernels_hash(), version="0.1.0")
    with pytest.raises(RuntimeMissingError, match=rf"for llama-cpp-python 0\.1\.0, this version needs {pin.VERSION}"):
        find_runtime()


def test_right_one_among_others(empty_cache: Path) -> None:
    install_fake("0.3.36-0123456789ab", kernels_hash="0123456789ab")
    root = install_fake(cache.current_key(), kernels_hash=cache.kernels_hash())
    assert find_runtime().root == root
    assert info()["path"] == str(root)


def test_runtime_of_a_checkout_with_our_patches_counts(empty_cache: Path) -> None:
    root = install_fake(f"checkout-1-{cache.kernels_hash()}", kernels_hash=cache.kernels_hash(), checkout="/src")
    assert find_runtime().root == root


def test_not_whole_is_not_there(empty_cache: Path) -> None:
    root = install_fake(cache.current_key(), kernels_hash=cache.kernels_hash())
    (root / "manifest.json").write_text("{")
    with pytest.raises(RuntimeMissingError, match="no runtime is installed"):
        find_runtime()


def test_unknown_tool(empty_cache: Path) -> None:
    install_fake(cache.current_key(), kernels_hash=cache.kernels_hash())
    with pytest.raises(RuntimeMissingError, match="has no program 'llama-x'"):
        find_runtime().tool("llama-x")


def test_the_hash_follows_patches_and_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("patches/0001-a.patch", "tsq.c", "x86/tsq.c", "README.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    monkeypatch.setattr(cache, "kernels_dir", lambda: tmp_path)
    hashes = [cache.kernels_hash()]
    for name, counts in (("README.md", False), ("tsq.c", True), ("x86/tsq.c", True), ("patches/0001-a.patch", True)):
        (tmp_path / name).write_text("changed")
        assert (cache.kernels_hash() != hashes[-1]) is counts, name
        hashes.append(cache.kernels_hash())
