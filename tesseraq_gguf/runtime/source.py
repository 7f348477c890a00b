"""The source of the runtime: the pinned sdist, verified, extracted, patched, with our C sources in it.

Nothing is compiled here. `SourceTree` also serves the Python in that source: llama.cpp's `conversion` and `gguf-py`,
and the `llama_cpp` bindings.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock

from tesseraq_gguf.errors import RuntimeBuildError, UsageError
from tesseraq_gguf.runtime import cache, pin
from tesseraq_gguf.runtime.progress import Reporter, SilentReporter
from tesseraq_gguf.runtime.pypi import PipError, pip_download

_LLAMA_CPP = Path("vendor", "llama.cpp")
"""llama.cpp inside the sdist."""

KERNELS = Path("ggml", "src", "tesseraq")
"""Our C sources inside llama.cpp."""


@dataclass(frozen=True)
class SourceTree:
    """A patched source.

    Attributes:
        key: what it was made from, see `cache`.
        llama_cpp: root of the patched llama.cpp; put it on `sys.path` for the package `conversion`.
        bindings: the folder `llama_cpp`, the Python package of llama-cpp-python, without libraries.
    """

    key: str
    llama_cpp: Path
    bindings: Path

    @property
    def gguf_py(self) -> Path:
        """The folder to put on `sys.path` for the `gguf` that knows our types."""
        return self.llama_cpp / "gguf-py"


def ensure_source(progress: Reporter | None = None, *, llama_cpp: Path | None = None) -> SourceTree:
    """Return the patched source, making it first if it is not in the cache.

    Args:
        progress: told what happens.
        llama_cpp: an existing llama.cpp checkout to copy and patch instead of the pinned one.

    Raises:
        RuntimeBuildError: the source cannot be fetched, verified, extracted or patched.
        UsageError: `llama_cpp` is not a llama.cpp checkout.
    """
    progress = progress or SilentReporter()
    if llama_cpp is not None:
        llama_cpp = llama_cpp.expanduser().absolute()
        if not (llama_cpp / "ggml" / "include" / "ggml.h").is_file():
            raise UsageError(f"'{llama_cpp}' is not a llama.cpp checkout: there is no ggml/include/ggml.h in it")
    key = cache.checkout_key(llama_cpp) if llama_cpp else cache.current_key()

    home = cache.cache_dir() / key
    final = home / "source"
    tree = SourceTree(key, final / "llama.cpp", final / "llama_cpp")
    if final.is_dir():
        return tree

    _make_folder(home)
    with FileLock(home / "source.lock"):
        if final.is_dir():
            return tree
        with tempfile.TemporaryDirectory(dir=home, prefix="source-") as temporary:
            work = Path(temporary) / "source"
            _extract(fetch_sdist(progress), work, with_llama_cpp=llama_cpp is None, progress=progress)
            if llama_cpp is not None:
                progress.stage(f"copying {llama_cpp}")
                _copy_checkout(llama_cpp, work / "llama.cpp")
            progress.stage("patching llama.cpp")
            apply_patches(work / "llama.cpp")
            copy_kernels(work / "llama.cpp")
            work.rename(final)
    return tree


def fetch_sdist(progress: Reporter | None = None) -> Path:
    """Return the pinned sdist from the cache, downloading it with pip if needed; its sha256 is checked every time."""
    progress = progress or SilentReporter()
    folder = cache.cache_dir() / "downloads"
    sdist = folder / f"{pin.PACKAGE.replace('-', '_')}-{pin.VERSION}.tar.gz"
    _make_folder(folder)
    with FileLock(folder / "sdist.lock"):
        if not sdist.is_file():
            progress.stage(f"downloading {pin.PACKAGE} {pin.VERSION}")
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                _pip_download(Path(temporary))
                found = Path(temporary) / sdist.name
                if not found.is_file():
                    raise RuntimeBuildError(f"pip downloaded no {sdist.name}")
                verify(found)
                found.replace(sdist)
        verify(sdist)
    return sdist


def verify(sdist: Path) -> None:
    """Compare the sha256 of a file with the pinned one.

    Raises:
        RuntimeBuildError: they differ; the message names both.
    """
    with sdist.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != pin.SHA256:
        raise RuntimeBuildError(
            f"{sdist} is not the file this version was made for: its sha256 is {digest.hexdigest()}, "
            f"expected {pin.SHA256}. Delete it and try again"
        )


def apply_patches(llama_cpp: Path) -> None:
    """Apply the patch series to a llama.cpp tree, in place, with git or with patch.

    Raises:
        RuntimeBuildError: neither tool is there, or a patch does not apply.
    """
    git, patch = shutil.which("git"), shutil.which("patch")
    if not git and not patch:
        raise RuntimeBuildError(
            "neither 'git' nor 'patch' was found; install one of them, it applies our patches to llama.cpp"
        )
    # without this, git would take the tree for a part of a repository around the cache and skip the patch in silence
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_CEILING_DIRECTORIES"] = str(llama_cpp.parent.resolve())
    for file in cache.patch_files():
        command = (
            [git, "-c", "core.autocrlf=false", "apply", "--whitespace=nowarn", str(file)]
            if git
            else [str(patch), "-p1", "--batch", "--forward", "--fuzz=0", "-i", str(file)]
        )
        result = subprocess.run(command, cwd=llama_cpp, env=environment, capture_output=True, text=True)
        if result.returncode:
            lines = (result.stderr or result.stdout).strip().splitlines()
            detail = lines[0] if lines else "no message"
            raise RuntimeBuildError(
                f"{file.name} does not apply to this llama.cpp ({detail}). "
                "cpp_kernels/README.md says how to carry the patches to another version"
            )


def copy_kernels(llama_cpp: Path) -> None:
    """Copy our C sources into a llama.cpp tree."""
    for relative in cache.kernel_files():
        target = llama_cpp / KERNELS / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(cache.kernels_dir() / relative, target)


def _pip_download(folder: Path) -> None:
    try:
        pip_download(f"{pin.PACKAGE}=={pin.VERSION}", folder, ["--no-binary", pin.PACKAGE])
    except PipError as error:
        raise RuntimeBuildError(str(error)) from error


def _extract(sdist: Path, target: Path, *, with_llama_cpp: bool, progress: Reporter) -> None:
    """Write what we use of the sdist, `llama_cpp/` and if wanted `llama.cpp/`: plain files only, all below `target`."""
    progress.stage(f"extracting {sdist.name}")
    try:
        with tarfile.open(sdist, "r:gz") as archive:
            for member in archive:
                relative = _destination(PurePosixPath(member.name), with_llama_cpp)
                if relative is None or not member.isfile():
                    continue
                content = archive.extractfile(member)
                if content is None:
                    continue
                path = target / relative
                path.parent.mkdir(parents=True, exist_ok=True)
                with content, path.open("wb") as out:
                    shutil.copyfileobj(content, out)
                path.chmod(0o755 if member.mode & 0o100 else 0o644)
    except (tarfile.TarError, EOFError) as error:
        raise RuntimeBuildError(f"cannot read {sdist}: {error}") from error


def _destination(name: PurePosixPath, with_llama_cpp: bool) -> Path | None:
    if name.is_absolute() or ".." in name.parts or len(name.parts) < 3:
        return None
    inside = Path(*name.parts[1:])
    if inside.parts[0] == "llama_cpp":
        return inside
    if with_llama_cpp and inside.parts[:2] == _LLAMA_CPP.parts and len(inside.parts) > 2:
        relative = Path(*inside.parts[2:])
        return Path("llama.cpp") / relative if cache.is_used(relative) else None
    return None


def _copy_checkout(checkout: Path, target: Path) -> None:
    for relative in cache.checkout_files(checkout):
        path = target / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(checkout / relative, path)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeBuildError(
            f"cannot write to the cache folder {folder}: {error.strerror}. {cache.CACHE_VARIABLE} chooses another"
        ) from error
