"""Where runtimes and sources are cached, and the key that says which belong together.

    <cache>/<key>/source/         patched llama.cpp and llama_cpp, read-only by habit
    <cache>/<key>/cpu/            an installed runtime: lib, bin, python, manifest.json
    <cache>/<key>/cpu-portable/   one for every processor of this kind; cpu-aarch64-linux-gnu/ for another kind
    <cache>/<key>/build-cpu/      CMake's build folder, removed when the runtime is installed
    <cache>/<key>/build-cpu.log   what CMake and the compilers said

`<key>` is the pinned version and a hash of everything that makes the source: patches, C sources, sdist.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import os
from pathlib import Path

import platformdirs

from tesseraq_gguf.runtime import pin

CACHE_VARIABLE = "TESSERAQ_GGUF_CACHE"
"""Environment variable that moves the cache folder."""

_SOURCE_SUFFIXES = {".c", ".h", ".cpp", ".cu", ".cuh", ".cmake", ".metal"}


def cache_dir() -> Path:
    """The cache folder, not necessarily there yet."""
    if override := os.environ.get(CACHE_VARIABLE):
        return Path(override).expanduser().absolute()
    return Path(platformdirs.user_cache_dir("tesseraq-gguf"))


def kernels_dir() -> Path:
    """The installed `cpp_kernels` folder."""
    return Path(str(importlib.resources.files("tesseraq_gguf.cpp_kernels")))


def patch_files() -> list[Path]:
    """The patch series in its order."""
    return sorted((kernels_dir() / "patches").glob("*.patch"))


def kernel_files() -> list[Path]:
    """Our C sources: what is copied to `ggml/src/tesseraq` of the patched tree. Paths relative to `kernels_dir()`."""
    root = kernels_dir()
    files = (path.relative_to(root) for path in root.rglob("*") if path.suffix in _SOURCE_SUFFIXES and path.is_file())
    return sorted(path for path in files if path.parts[0] != "patches")


def kernels_hash() -> str:
    """12 hex digits over patches and C sources: what must not differ between a runtime and this installation."""
    digest = hashlib.sha256()
    for path in patch_files():
        _update(digest, f"patches/{path.name}", path.read_bytes())
    for relative in kernel_files():
        _update(digest, relative.as_posix(), (kernels_dir() / relative).read_bytes())
    return digest.hexdigest()[:12]


def current_key() -> str:
    """Key of the runtime that belongs to this installation."""
    return f"{pin.VERSION}-{kernels_hash()}"


def checkout_key(checkout: Path) -> str:
    """Key of a runtime made from a llama.cpp checkout: its files count as well."""
    digest = hashlib.sha256()
    for relative in checkout_files(checkout):
        _update(digest, relative.as_posix(), (checkout / relative).read_bytes())
    return f"checkout-{digest.hexdigest()[:12]}-{kernels_hash()}"


_UNUSED_FOLDERS = {".git", ".github", ".devops", "build", "docs", "media", "benches", "__pycache__"}


def is_used(relative: Path) -> bool:
    """Whether a file of llama.cpp, by its path from the root, can matter to a build or a conversion."""
    if (
        relative.parts[0] in _UNUSED_FOLDERS
        or relative.parts[0].startswith("build-")
        or "__pycache__" in relative.parts
    ):
        return False
    return not (relative.parts[0] == "models" and relative.parts[1:2] != ("templates",))


def checkout_files(checkout: Path) -> list[Path]:
    """The files of a llama.cpp checkout that count, relative to it."""
    files: list[Path] = []
    for folder, folders, names in os.walk(checkout):
        here = Path(folder).relative_to(checkout)
        folders[:] = [name for name in folders if is_used(here / name / "x") or (here / name) == Path("models")]
        files += [here / name for name in names if is_used(here / name) and (checkout / here / name).is_file()]
    return sorted(files)


def _update(digest: hashlib._Hash, name: str, data: bytes) -> None:
    digest.update(f"{name}\0{len(data)}\0".encode())
    digest.update(data)
