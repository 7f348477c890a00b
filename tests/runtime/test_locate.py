"""Finding a runtime: the right one, none, or one for other patches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tesseraq_gguf.errors import RuntimeMissingError, UsageError
from tesseraq_gguf.runtime import cache, find_runtime, info, pin
from tesseraq_gguf.runtime.locate import RUNTIME_VARIABLE, this_platform

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


def install_matching(name: str, **manifest: object) -> Path:
    return install_fake(cache.current_key(), name, kernels_hash=cache.kernels_hash(), version=pin.VERSION, **manifest)


def test_the_one_for_this_processor_comes_before_the_portable_one(empty_cache: Path) -> None:
    portable = install_matching("cpu-portable", portable=True)
    assert find_runtime().root == portable
    native = install_matching("cpu")
    assert find_runtime().root == native
    assert find_runtime(portable=True).root == portable
    assert info()["others"] == [str(portable)]
    assert info(portable=True)["path"] == str(portable)


def test_an_old_one_for_this_processor_does_not_hide_the_portable_one(empty_cache: Path) -> None:
    install_fake("0.3.36-0123456789ab", kernels_hash="0123456789ab")
    portable = install_matching("cpu-portable", portable=True)
    assert find_runtime().root == portable


def test_missing_by_name_says_how_to_get_that_one(empty_cache: Path) -> None:
    install_matching("cpu")
    with pytest.raises(RuntimeMissingError, match=r"for 'cpu-portable'; run: tesseraq-gguf runtime build --portable$"):
        find_runtime(portable=True)
    triple = "aarch64-linux-gnu"
    with pytest.raises(RuntimeMissingError, match=rf"; run: tesseraq-gguf runtime build --target {triple}$"):
        find_runtime(target=triple)
    install_fake("0.3.36-0123456789ab", f"cpu-{triple}", kernels_hash="0123456789ab", target=triple)
    with pytest.raises(
        RuntimeMissingError, match=rf"other patches .*; run: tesseraq-gguf runtime build --target {triple}$"
    ):
        find_runtime(target=triple)
    with pytest.raises(UsageError, match="unknown target 'x'"):
        find_runtime(target="x")


@pytest.fixture
def copied(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime of this version in another folder, which the environment names."""
    root = install_matching("cpu-portable", portable=True, platform=this_platform())
    folder = Path(shutil.move(root, tmp_path / "copied"))
    monkeypatch.setenv(RUNTIME_VARIABLE, str(folder))
    return folder


def test_copy_that_the_environment_names(copied: Path) -> None:
    install_matching("cpu")
    assert find_runtime().root == copied
    with pytest.raises(RuntimeMissingError, match="no runtime is installed for 'cpu-portable'"):
        find_runtime(portable=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"platform": "Linux m68k"}, r"was built for Linux m68k, this is "),
        (
            {"kernels_hash": "0123456789ab"},
            r"other patches .*; copy one of this version, or unset TESSERAQ_GGUF_RUNTIME$",
        ),
        ({"version": "0.1.0"}, rf"for llama-cpp-python 0\.1\.0, this version needs {pin.VERSION}; copy one"),
        (None, r"TESSERAQ_GGUF_RUNTIME names .*copied, which is no whole runtime"),
    ],
)
def test_copy_that_cannot_work_here(copied: Path, change: dict[str, str] | None, message: str) -> None:
    """It is an error, although a good one is installed: somebody wants this one."""
    install_matching("cpu")
    manifest = copied / "manifest.json"
    if change is None:
        manifest.unlink()
    else:
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    with pytest.raises(RuntimeMissingError, match=message) as caught:
        find_runtime()
    assert "\n" not in str(caught.value)


def test_variants(empty_cache: Path) -> None:
    root = install_matching("cpu-aarch64-linux-gnu", target="aarch64-linux-gnu")
    for name in ("libggml-cpu-armv8.0_1.so", "libggml-cpu-armv8.2_1.so", "libggml-base.so"):
        (root / "lib" / name).touch()
    runtime = find_runtime(target="aarch64-linux-gnu")
    assert runtime.variants == ["armv8.0_1", "armv8.2_1"]
    assert runtime.variant("armv8.0_1").is_file()
    assert runtime.library("llama").name == "libllama.so"


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
