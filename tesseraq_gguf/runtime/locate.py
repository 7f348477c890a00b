"""Find the installed runtime that belongs to this version and these patches.

Unless one is asked for by name, it is the first of these that is there: the one in the folder that the environment
variable TESSERAQ_GGUF_RUNTIME names; the one that was built for this processor; the portable one. Runtimes for other
kinds of machines are found by name only.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tesseraq_gguf.errors import RuntimeMissingError
from tesseraq_gguf.runtime import cache, pin
from tesseraq_gguf.runtime.target import Target

BUILD_COMMAND = Target().build_command
"""What a user runs to get a runtime."""

RUNTIME_VARIABLE = "TESSERAQ_GGUF_RUNTIME"
"""Environment variable that names the folder of a runtime: a copy of one that was built elsewhere."""

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

    @property
    def page(self) -> Path | None:
        """The folder of llama.cpp's web page; None if the runtime was built without."""
        folder = self.root / "page"
        return folder if (folder / "index.html").is_file() else None

    @property
    def variants(self) -> list[str]:
        """Names of the CPU backends that one is chosen of when a program starts; empty if there is only `ggml-cpu`."""
        pattern = "ggml-cpu-*.dll" if self._system == "win32" else "libggml-cpu-*.so"
        return sorted(path.stem.partition("ggml-cpu-")[2] for path in self.lib.glob(pattern))

    def variant(self, name: str) -> Path:
        """Path of a CPU backend by the name of its variant: `haswell`."""
        return self.lib / (f"ggml-cpu-{name}.dll" if self._system == "win32" else f"libggml-cpu-{name}.so")

    @property
    def target(self) -> Target:
        """What it was built for."""
        given = self.manifest.get
        return Target(given("backend") or "cpu", bool(given("portable")), given("target"))

    @property
    def _system(self) -> str:
        """What `sys.platform` is where it runs."""
        return "linux" if self.manifest.get("target") else sys.platform

    def library(self, name: str) -> Path:
        """Path of a shared library by its plain name: `llama`, `ggml-base`, and `ggml-cpu` if there are no variants."""
        if self._system == "win32":
            return self.lib / f"{name}.dll"
        return self.lib / f"lib{name}{'.dylib' if self._system == 'darwin' else '.so'}"

    def tool(self, name: str) -> Path:
        """Path of a program by its plain name: `llama-perplexity`, `test-backend-ops`.

        Raises:
            RuntimeMissingError: this runtime has no such program.
        """
        path = self._program(name)
        if not path.is_file():
            raise RuntimeMissingError(
                f"the runtime in {self.root} has no program '{name}'; run: {self.target.build_command}"
            )
        return path

    def has_tools(self, names: Iterable[str]) -> bool:
        """Whether all of these programs are there: a runtime of an earlier version may lack some."""
        return all(self._program(name).is_file() for name in names)

    def _program(self, name: str) -> Path:
        return self.root / "bin" / (f"{name}.exe" if self._system == "win32" else name)


def find_runtime(backend: str = "cpu", *, portable: bool = False, target: str | None = None) -> Runtime:
    """Return the runtime of this version and these patches, by the rule at the top of this file.

    A runtime built from a llama.cpp checkout counts if our patches and sources in it are the present ones.

    Args:
        backend: which devices it is for.
        portable: the portable one, and no other.
        target: the one for another kind of machine, by its triple.

    Raises:
        RuntimeMissingError: there is none; the message says what to run, and what is there instead, if anything.
        UsageError: an unknown target.
    """
    wanted = Target(backend, portable, target)
    if not wanted.portable and (folder := os.environ.get(RUNTIME_VARIABLE)):
        return _named_runtime(Path(folder).expanduser().absolute())
    choices = _choices(wanted)
    for choice in choices:
        if runtime := _matching(choice):
            return runtime
    needed = cache.kernels_hash()
    for choice in choices:
        if others := installed_runtimes(choice):
            raise RuntimeMissingError(_mismatch(_newest(others), needed, f"run: {choice.build_command}"))
    what = f"'{wanted.name}'" if wanted.portable else f"the backend '{backend}'"
    raise RuntimeMissingError(f"no runtime is installed for {what}; run: {wanted.build_command}")


def installed_runtimes(target: Target) -> list[Runtime]:
    """Every whole runtime for a target in the cache, whatever patches it was built from."""
    folders = sorted(path.parent for path in cache.cache_dir().glob(f"*/{target.name}/{MANIFEST}"))
    return [runtime for folder in folders if (runtime := read_runtime(folder))]


def _choices(wanted: Target) -> list[Target]:
    """What may stand for a target that is not named in full, best first."""
    return [wanted] if wanted.portable or wanted.backend == "cuda" else [wanted, Target(wanted.backend, portable=True)]


def _matching(target: Target) -> Runtime | None:
    """The runtime for a target with the present patches, the pinned one first; None if there is none."""
    if runtime := read_runtime(cache.cache_dir() / cache.current_key() / target.name):
        return runtime
    needed = cache.kernels_hash()
    checkouts = [
        runtime
        for runtime in installed_runtimes(target)
        if runtime.manifest.get("checkout") and runtime.manifest.get("kernels_hash") == needed
    ]
    return _newest(checkouts) if checkouts else None


def _newest(runtimes: list[Runtime]) -> Runtime:
    return max(runtimes, key=lambda runtime: str(runtime.manifest.get("built", "")))


def _named_runtime(folder: Path) -> Runtime:
    """The runtime that the environment variable names, if it can work here."""
    runtime = read_runtime(folder)
    if runtime is None:
        raise RuntimeMissingError(f"{RUNTIME_VARIABLE} names {folder}, which is no whole runtime")
    here, built_for = this_platform(), runtime.manifest.get("platform")
    if built_for != here:
        raise RuntimeMissingError(
            f"the runtime that {RUNTIME_VARIABLE} names was built for {built_for}, this is {here}"
        )
    needed = cache.kernels_hash()
    if runtime.manifest.get("kernels_hash") != needed or not _of_this_version(runtime):
        raise RuntimeMissingError(_mismatch(runtime, needed, f"copy one of this version, or unset {RUNTIME_VARIABLE}"))
    return runtime


def this_platform() -> str:
    """What a manifest says of the machines that a runtime is for: `Linux x86_64`."""
    return f"{platform.system()} {platform.machine()}"


def _of_this_version(runtime: Runtime) -> bool:
    return bool(runtime.manifest.get("checkout")) or runtime.manifest.get("version") == pin.VERSION


def read_runtime(folder: Path) -> Runtime | None:
    """Read the runtime in a folder; None if there is none or it is not whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    runtime = Runtime(folder, manifest) if isinstance(manifest, dict) else None
    return runtime if runtime and runtime.library("llama").is_file() else None


def info(backend: str = "cpu", *, portable: bool = False, target: str | None = None) -> dict[str, Any]:
    """Everything a bug report needs, JSON-ready: what this version needs and what is installed."""
    wanted = Target(backend, portable, target)
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
        runtime = find_runtime(backend, portable=portable, target=target)
    except RuntimeMissingError as error:
        data["problem"] = str(error)
    else:
        found = runtime.root
        data |= {"installed": True, "path": str(runtime.root), "manifest": runtime.manifest}
    choices = _choices(wanted)
    installed = [runtime for choice in choices for runtime in installed_runtimes(choice)]
    data["others"] = [str(runtime.root) for runtime in installed if runtime.root != found]
    return data


def _mismatch(runtime: Runtime, needed: str, remedy: str) -> str:
    has = runtime.manifest.get("kernels_hash")
    if has != needed:
        return (
            f"the runtime in {runtime.root} was built for other patches (hash {has}, this version needs {needed}); "
            f"{remedy}"
        )
    return (
        f"the runtime in {runtime.root} was built for {pin.PACKAGE} {runtime.manifest.get('version')}, "
        f"this version needs {pin.VERSION}; {remedy}"
    )
