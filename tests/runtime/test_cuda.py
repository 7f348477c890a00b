"""Builds for NVIDIA's GPUs: what is found, what is compiled for, and what a user reads when something is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tesseraq_gguf.errors import RuntimeBuildError, UsageError
from tesseraq_gguf.runtime import build, cuda, find_runtime
from tesseraq_gguf.runtime.target import Target

from .conftest import FakeMachine, Recorder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the CUDA backend is built on Linux only")


class Toolkit:
    """A folder that looks like a CUDA toolkit, named by CUDA_HOME, and the only one on this machine."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder
        self.bin = folder / "cuda" / "bin"
        self.bin.mkdir(parents=True)
        (folder / "cuda" / "lib64").mkdir()
        self.packages = folder / "packages"
        monkeypatch.delenv("CUDACXX", raising=False)
        monkeypatch.setenv("CUDA_HOME", str(folder / "cuda"))
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        monkeypatch.setattr(cuda.site, "getsitepackages", lambda: [str(self.packages)])
        monkeypatch.setattr(cuda.site, "getusersitepackages", lambda: str(self.packages))
        self.program(self.bin / "nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")

    def program(self, path: Path, body: str) -> None:
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def add_cublas(self) -> None:
        (self.folder / "cuda" / "include").mkdir()
        (self.folder / "cuda" / "include" / "cublas_v2.h").touch()
        (self.folder / "cuda" / "lib64" / "libcublas.so").touch()

    def add_wheel(self, version: str) -> Path:
        folder = self.packages / "nvidia" / "cu13"
        for path in (
            folder / "include" / "cublas_v2.h",
            *(folder / "lib" / f"lib{name}.so.{version}" for name in ("cublas", "cublasLt")),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return folder

    def add_gpu(self, *rows: str) -> None:
        self.program(self.folder / "nvidia-smi", "\n".join(f"echo '{row}'" for row in rows))


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toolkit:
    return Toolkit(tmp_path / "nvidia", monkeypatch)


def test_toolkit_with_its_own_cublas(toolkit: Toolkit) -> None:
    toolkit.add_cublas()
    found = cuda.find_cuda()
    assert (found.version, found.include, found.cublas) == ((13, 0), None, {})
    assert f"-DCMAKE_CUDA_COMPILER={toolkit.bin / 'nvcc'}" in found.options


def test_cublas_of_a_wheel(toolkit: Toolkit) -> None:
    wheel = toolkit.add_wheel("13")
    options = cuda.find_cuda().options
    assert f"-DCMAKE_CUDA_FLAGS=-I{wheel / 'include'}" in options
    assert f"-DCUDA_cublasLt_LIBRARY={wheel / 'lib' / 'libcublasLt.so.13'}" in options
    assert wheel / "lib" in cuda.find_cuda().library_folders


def test_what_is_missing_is_named(toolkit: Toolkit) -> None:
    with pytest.raises(
        RuntimeBuildError, match=r"cuBLAS for CUDA 13 not found; .*pip install 'nvidia-cublas==13.0\.\*'"
    ):
        cuda.find_cuda()
    toolkit.add_wheel("12")  # of another toolkit
    with pytest.raises(RuntimeBuildError, match="cuBLAS for CUDA 13 not found"):
        cuda.find_cuda()
    toolkit.program(toolkit.bin / "nvcc", "echo 'release 11.4, V11.4.1'")
    with pytest.raises(RuntimeBuildError, match=r"nvcc is of CUDA 11\.4; ggml needs 11\.7 or newer"):
        cuda.find_cuda()
    toolkit.program(toolkit.bin / "nvcc", "echo no licence >&2; exit 1")
    with pytest.raises(RuntimeBuildError, match="nvcc does not run: no licence"):
        cuda.find_cuda()


def test_no_nvcc(toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_find_nvcc", lambda: None)
    with pytest.raises(RuntimeBuildError, match=r"^nvcc not found; .*pip install nvidia-cuda-nvcc"):
        cuda.find_cuda()


def test_architectures() -> None:
    assert cuda.choose_architectures(["89", "90-virtual"], (13, 0), ["7.5"]) == ["89", "90-virtual"]
    assert cuda.choose_architectures([], (13, 0), ["8.9", "8.9", "7.5"]) == ["75", "89"]
    assert cuda.choose_architectures([], (13, 0), ["12.0"]) == ["120a-real", "90-virtual"]
    assert cuda.choose_architectures([], (13, 0), []) == list(cuda.EVERYWHERE)
    assert cuda.choose_architectures([], (11, 7), []) == ["75-virtual", "80-virtual", "86-real"]
    with pytest.raises(UsageError, match="'sm_89' is no CUDA architecture; they look like 89"):
        cuda.choose_architectures(["sm_89"], (13, 0), [])


def test_gpus(toolkit: Toolkit) -> None:
    assert cuda.find_gpus() == []
    toolkit.add_gpu("NVIDIA H100, 80GB, 9.0", "[Not Supported]")
    assert cuda.find_gpus() == [cuda.Gpu("NVIDIA H100, 80GB", "9.0")]


def test_build_without_a_gpu(machine: FakeMachine, recorder: Recorder, toolkit: Toolkit) -> None:
    toolkit.add_cublas()
    machine.prepare(Target("cuda"), [])
    runtime = build(Target("cuda"), progress=recorder)
    assert runtime.root == machine.home / "cuda"
    assert runtime == find_runtime("cuda")
    assert runtime.manifest["cuda"] == "13.0"
    assert runtime.manifest["cuda_architectures"] == list(cuda.EVERYWHERE)
    assert runtime.manifest["gpus"] == []
    assert "-DGGML_CUDA=ON" in runtime.manifest["cmake_options"]
    assert any("not proven: there is no NVIDIA GPU" in note for note in recorder.notes)

    machine.script("cmake", "exit 1")
    assert build(Target("cuda"), progress=recorder) == runtime
    with pytest.raises(RuntimeBuildError, match="configuring"):  # for others it is built again
        build(Target("cuda"), cuda_architectures=["89"], progress=recorder)


def test_build_is_proven_on_a_gpu(machine: FakeMachine, recorder: Recorder, toolkit: Toolkit) -> None:
    toolkit.add_cublas()
    toolkit.add_gpu("NVIDIA GeForce RTX 4090, 8.9")
    machine.prepare(Target("cuda"), [], 'case "$*" in *CUDA0*) exit 3;; esac')
    with pytest.raises(RuntimeBuildError, match=r"test-backend-ops failed on NVIDIA GeForce RTX 4090 \(exit code 3\)"):
        build(Target("cuda"), progress=recorder)
    machine.set_tool("exit 0")
    runtime = build(Target("cuda"), progress=recorder)
    assert runtime.manifest["gpus"] == ["NVIDIA GeForce RTX 4090"]
    assert runtime.manifest["cuda_architectures"] == ["89"]


def test_what_cannot_be_combined() -> None:
    with pytest.raises(UsageError, match="not portable"):
        build(Target("cuda", portable=True))
    with pytest.raises(UsageError, match="add: --backend cuda"):
        build(cuda_architectures=["89"])
