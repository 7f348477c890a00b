"""Import llama-cpp-python on our libraries.

The bindings come with the runtime, from the same sdist as its libraries, so the structs of both sides always match. An
installed llama-cpp-python is neither needed nor used. `bindings.py` mends what they let crash.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from tesseraq_gguf.errors import RuntimeMissingError
from tesseraq_gguf.runtime.locate import Runtime, find_runtime

LIBRARY_VARIABLE = "LLAMA_CPP_LIB_PATH"
"""Environment variable that tells llama-cpp-python where its libraries are."""


def load_llama_cpp(runtime: Runtime | None = None) -> ModuleType:
    """Import and return `llama_cpp` of a runtime, by default of the installed one.

    Raises:
        RuntimeMissingError: no runtime, or `llama_cpp` was already imported from elsewhere.
    """
    loaded = sys.modules.get("llama_cpp")
    if loaded is not None and runtime is None and (home := _home_of_runtime(loaded)) is not None:
        runtime = home
    runtime = runtime or find_runtime()
    if loaded is not None:
        _refuse_foreign(loaded, runtime)
        return loaded

    from tesseraq_gguf.runtime.bindings import guard

    previous = os.environ.get(LIBRARY_VARIABLE)
    os.environ[LIBRARY_VARIABLE] = str(runtime.lib)
    sys.path.insert(0, str(runtime.python))
    try:
        module = importlib.import_module("llama_cpp")
        guard(module, on_gpu=runtime.manifest.get("backend", "cpu") != "cpu")
        return module
    except (OSError, FileNotFoundError, RuntimeError) as error:
        for name in [name for name in sys.modules if name.split(".")[0] == "llama_cpp"]:
            del sys.modules[name]
        raise RuntimeMissingError(f"the runtime in {runtime.root} cannot be loaded: {error}") from error
    finally:
        sys.path.remove(str(runtime.python))
        if previous is None:
            del os.environ[LIBRARY_VARIABLE]
        else:
            os.environ[LIBRARY_VARIABLE] = previous


def check_loads(file: Path | str) -> None:
    """Let llama.cpp read a file without taking memory for its weights, to learn what it has against it.

    Raises:
        FileFormatError: it refuses the file; the message says why.
        RuntimeMissingError: no runtime.
    """
    _planned(load_llama_cpp(), file).close()


_PLANNED = {
    "weights": re.compile(r"file size += +([\d.]+) (K|M|G)iB"),
    "cache": re.compile(r"(?:llama_kv_cache|llama_memory_recurrent): +size = +([\d.]+) (K|M|G)iB"),
    "computing": re.compile(r"(?:compute|output) buffer size = +([\d.]+) (K|M|G)iB"),
}
"""What llama.cpp says of the memory that it would take."""

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def memory_of(file: Path | str, context: int) -> dict[str, int]:
    """Let llama.cpp plan the memory of a model and a context, and take none of it.

    Returns:
        Bytes of weights, cache and computing, on all devices together.

    Raises:
        FileFormatError: it refuses the file.
        RuntimeMissingError: no runtime.
    """
    llama_cpp = load_llama_cpp()
    with llama_cpp._tesseraq_log.noted() as said:
        model = _planned(llama_cpp, file)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context
        params.swa_full = False  # as llama.cpp's programs have it
        llama_cpp._internals.LlamaContext(model=model, params=params, verbose=False).close()
        model.close()
    return {
        what: sum(round(float(number) * _UNITS[unit]) for number, unit in pattern.findall(said()))
        for what, pattern in _PLANNED.items()
    }


def _planned(llama_cpp: ModuleType, file: Path | str) -> Any:
    """A model without memory for its weights."""
    llama_cpp.llama_backend_init()
    llama_cpp._logger.set_verbose(False)
    params = llama_cpp.llama_model_default_params()
    params.no_alloc = True
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    return llama_cpp._internals.LlamaModel(path_model=str(file), params=params, verbose=False)


def _origin(module: ModuleType) -> Path:
    return Path(module.__file__).resolve().parent if module.__file__ else Path(module.__name__)


def _home_of_runtime(module: ModuleType) -> Runtime | None:
    """The installed runtime that `module` comes from, None if it is not the one of this version."""
    try:
        runtime = find_runtime()
    except RuntimeMissingError:
        return None
    return runtime if _origin(module).is_relative_to(runtime.python.resolve()) else None


def _refuse_foreign(module: ModuleType, runtime: Runtime) -> None:
    if not _origin(module).is_relative_to(runtime.python.resolve()):
        raise RuntimeMissingError(
            f"llama_cpp was already imported from {_origin(module)}, whose libraries do not know our types; "
            "import tesseraq_gguf.runtime.Llama first, and do not import llama_cpp itself"
        )
