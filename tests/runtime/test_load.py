"""llama-cpp-python on our libraries."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tesseraq_gguf.errors import RuntimeMissingError
from tesseraq_gguf.runtime import load_llama_cpp

from .conftest import install_fake


def test_no_runtime(empty_cache: Path) -> None:
    with pytest.raises(RuntimeMissingError, match="run: tesseraq-gguf runtime build"):
        from tesseraq_gguf.runtime import Llama  # noqa: F401


def test_llama_cpp_from_elsewhere(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tesseraq_gguf.runtime import cache

    install_fake(cache.current_key(), kernels_hash=cache.kernels_hash())
    foreign = types.ModuleType("llama_cpp")
    foreign.__file__ = str(tmp_path / "site-packages" / "llama_cpp" / "__init__.py")
    monkeypatch.setitem(sys.modules, "llama_cpp", foreign)
    with pytest.raises(RuntimeMissingError, match=r"llama_cpp was already imported from .*site-packages"):
        load_llama_cpp()


def test_broken_libraries(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tesseraq_gguf.runtime import cache

    root = install_fake(cache.current_key(), kernels_hash=cache.kernels_hash())
    package = root / "python" / "llama_cpp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('Failed to load shared library')")
    for name in [name for name in sys.modules if name.split(".")[0] == "llama_cpp"]:
        monkeypatch.delitem(sys.modules, name)
    path = list(sys.path)
    with pytest.raises(RuntimeMissingError, match=r"cannot be loaded: Failed to load shared library"):
        load_llama_cpp()
    assert "llama_cpp" not in sys.modules
    assert sys.path == path
    assert "LLAMA_CPP_LIB_PATH" not in os.environ


@pytest.mark.runtime
def test_llama_is_llama_cpp_pythons_class_on_our_libraries() -> None:
    code = """
import sys
import tesseraq_gguf.runtime
assert "llama_cpp" not in sys.modules, "importing the package must cost nothing"
from tesseraq_gguf.runtime import Llama, find_runtime
import llama_cpp
assert Llama is llama_cpp.Llama
assert llama_cpp.__file__.startswith(str(find_runtime().python))
maps = open("/proc/self/maps").read() if sys.platform == "linux" else str(find_runtime().lib)
assert str(find_runtime().lib) in maps
import llama_cpp._ggml
count = 513  # GGML_TYPE_COUNT: no type chosen
assert llama_cpp.llama_model_quantize_default_params().output_tensor_type == count
from tesseraq_gguf.runtime import load_llama_cpp
assert load_llama_cpp() is llama_cpp
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
