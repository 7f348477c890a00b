"""The patched llama.cpp: fetch, build, find and load it.

`from tesseraq_gguf.runtime import Llama` is llama-cpp-python's class on our libraries. Names are imported when first
used, so that `import tesseraq_gguf.runtime` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_cpp import Llama

    from tesseraq_gguf.runtime.builder import build
    from tesseraq_gguf.runtime.load import load_llama_cpp
    from tesseraq_gguf.runtime.locate import Runtime, find_runtime, info
    from tesseraq_gguf.runtime.source import SourceTree, ensure_source

__all__ = ["Llama", "Runtime", "SourceTree", "build", "ensure_source", "find_runtime", "info", "load_llama_cpp"]

_MODULES = {
    "Runtime": "locate",
    "SourceTree": "source",
    "build": "builder",
    "ensure_source": "source",
    "find_runtime": "locate",
    "info": "locate",
    "load_llama_cpp": "load",
}


def __getattr__(name: str) -> Any:
    if name == "Llama":
        from tesseraq_gguf.runtime.load import load_llama_cpp

        return load_llama_cpp().Llama
    if name in _MODULES:
        return getattr(importlib.import_module(f"tesseraq_gguf.runtime.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
