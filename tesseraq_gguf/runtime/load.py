"""Import llama-cpp-python on our libraries.

The bindings come with the runtime, from the same sdist as its libraries, so the structs of both sides always match. An
installed llama-cpp-python is neither needed nor used. `bindings.py` mends what they let crash.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

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
    llama_cpp = load_llama_cpp()
    llama_cpp.llama_backend_init()
    llama_cpp._logger.set_verbose(False)
    params = llama_cpp.llama_model_default_params()
    params.no_alloc = True
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    llama_cpp._internals.LlamaModel(path_model=str(file), params=params, verbose=False).close()


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
