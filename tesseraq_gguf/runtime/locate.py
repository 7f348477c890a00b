"""Find the installed runtime that belongs to this version and these patches."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tesseraq_gguf.errors import RuntimeMissingError
from tesseraq_gguf.runtime import cache, pin

BUILD_COMMAND = "tesseraq-gguf runtime build"
"""What a user runs to get a runtime."""

MANIFEST = "manifest.json"
"""Its presence says that a runtime is whole: it is part of what one rename puts in place."""


@dataclass(frozen=True)
class Runtime:
    """An installed runtime.

    Attributes:
        root: its folder; `lib/`, `bin/`, `python/` and `manifest.json` are in it.
        manifest: what it was built from, how, when, and what proved it.
    """

    root: Path
    manifest: dict[str, Any]

    @property
    def lib(self) -> Path:
        """The folder of the shared libraries."""
        return self.root / "lib"

    @property
    def python(self) -> Path:
        """The folder to put on `sys.path` for `llama_cpp`."""
        return self.root / "python"

    def library(self, name: str) -> Path:
        """Path of a shared library by its plain name: `llama`, `ggml-base`, `ggml-cpu`."""
        if sys.platform == "win32":
            return self.lib / f"{name}.dll"
        return self.lib / f"lib{name}{'.dylib' if sys.platform == 'darwin' else '.so'}"

    def tool(self, name: str) -> Path:
        """Path of a program by its plain name: `llama-perplexity`, `test-backend-ops`.

        Raises:
            RuntimeMissingError: this runtime has no such program.
        """
        path = self.root / "bin" / (f"{name}.exe" if sys.platform == "win32" else name)
        if not path.is_file():
            raise RuntimeMissingError(f"the runtime in {self.root} has no program '{name}'")
        return path


def find_runtime(backend: str = "cpu") -> Runtime:
    """Return the runtime of this version and these patches.

    A runtime built from a llama.cpp checkout counts if our patches and sources in it are the present ones.

    Raises:
        RuntimeMissingError: there is none; the message says what to run, and what is there instead, if anything.
    """
    if runtime := read_runtime(cache.cache_dir() / cache.current_key() / backend):
        return runtime
    others = installed_runtimes(backend)
    needed = cache.kernels_hash()
    checkouts = [r for r in others if r.manifest.get("checkout") and r.manifest.get("kernels_hash") == needed]
    if checkouts:
        return max(checkouts, key=lambda runtime: str(runtime.manifest.get("built", "")))
    if others:
        newest = max(others, key=lambda runtime: str(runtime.manifest.get("built", "")))
        raise RuntimeMissingError(_mismatch(newest, needed))
    raise RuntimeMissingError(f"no runtime is installed for the backend '{backend}'; run: {BUILD_COMMAND}")


def installed_runtimes(backend: str = "cpu") -> list[Runtime]:
    """Every whole runtime in the cache, whatever it was built for."""
    folders = sorted(path.parent for path in cache.cache_dir().glob(f"*/{backend}/{MANIFEST}"))
    return [runtime for folder in folders if (runtime := read_runtime(folder))]


def read_runtime(folder: Path) -> Runtime | None:
    """Read the runtime in a folder; None if there is none or it is not whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    runtime = Runtime(folder, manifest) if isinstance(manifest, dict) else None
    return runtime if runtime and runtime.library("llama").is_file() else None


def info(backend: str = "cpu") -> dict[str, Any]:
    """Everything a bug report needs, JSON-ready: what this version needs and what is installed."""
    data: dict[str, Any] = {
        "backend": backend,
        "cache": str(cache.cache_dir()),
        "llama_cpp_python": pin.VERSION,
        "kernels_hash": cache.kernels_hash(),
        "installed": False,
        "path": None,
        "problem": None,
        "manifest": None,
        "others": [],
    }
    found: Path | None = None
    try:
        runtime = find_runtime(backend)
    except RuntimeMissingError as error:
        data["problem"] = str(error)
    else:
        found = runtime.root
        data |= {"installed": True, "path": str(runtime.root), "manifest": runtime.manifest}
    data["others"] = [str(runtime.root) for runtime in installed_runtimes(backend) if runtime.root != found]
    return data


def _mismatch(runtime: Runtime, needed: str) -> str:
    has = runtime.manifest.get("kernels_hash")
    if has != needed:
        return (
            f"the runtime in {runtime.root} was built for other patches (hash {has}, this version needs {needed}); "
            f"run: {BUILD_COMMAND}"
        )
    version = runtime.manifest.get("version")
    return (
        f"the runtime in {runtime.root} was built for {pin.PACKAGE} {version}, this version needs {pin.VERSION}; "
        f"run: {BUILD_COMMAND}"
    )
