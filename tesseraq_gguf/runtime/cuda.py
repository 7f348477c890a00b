"""What a build for NVIDIA's GPUs needs: nvcc, cuBLAS, and the architectures to compile for.

They are looked for in a toolkit of the system and in the wheels that NVIDIA publishes: `pip install nvidia-cuda-nvcc
nvidia-cuda-cccl nvidia-cublas` brings all of it.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tesseraq_gguf.errors import RuntimeBuildError, UsageError

OLDEST = (11, 7)
"""The oldest toolkit that ggml is built with."""

EVERYWHERE = ("75-virtual", "80-virtual", "86-real", "89-real", "90-virtual", "120a-real")
"""Architectures for any GPU since Turing: code for the common ones, PTX that the driver compiles for the others.

ggml chooses so for builds that are to run elsewhere. `120a` is the one whose PTX later devices may refuse; they take
that of 90. Toolkits that do not know an architecture leave it out.
"""

SINCE = {"89": (11, 8), "90": (11, 8), "120": (12, 8)}
"""Toolkits by the architectures that they were the first to know."""

_ARCHITECTURE = re.compile(r"(\d{2,3})[af]?(-real|-virtual)?")


@dataclass(frozen=True)
class Cuda:
    """What a build was found.

    Attributes:
        nvcc: the compiler.
        version: its release.
        include: a folder with `cublas_v2.h`, if the compiler would not look there.
        cublas: libraries of cuBLAS by the names that CMake's FindCUDAToolkit has for them; empty if it finds them.
        driver: whether the driver's library can be linked and loaded here; memory of its own kind needs it.
    """

    nvcc: str
    version: tuple[int, int]
    include: Path | None
    cublas: dict[str, Path]
    driver: bool

    @property
    def options(self) -> list[str]:
        """CMake options."""
        options = ["-DGGML_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={self.nvcc}"]
        options += [f"-DCUDA_{name}_LIBRARY={path}" for name, path in self.cublas.items()]
        if self.include:
            options.append(f"-DCMAKE_CUDA_FLAGS=-I{self.include}")
        if not self.driver:
            options.append("-DGGML_CUDA_NO_VMM=ON")
        return options

    @property
    def library_folders(self) -> list[Path]:
        """Where the programs find cuBLAS and the CUDA runtime when they start; the loader knows a system's own."""
        lib = Path(self.nvcc).resolve().parent.parent / "lib"
        folders = [path for path in (lib, lib.with_name("lib64")) if any(path.glob("libcudart.so*"))]
        return list(dict.fromkeys([*folders, *(path.parent for path in self.cublas.values())]))


def find_cuda() -> Cuda:
    """Look everything up.

    Raises:
        RuntimeBuildError: something is missing or too old; the message says what, and how to get it.
    """
    if sys.platform != "linux":
        raise RuntimeBuildError("the CUDA backend is built on Linux only")
    nvcc = _find_nvcc()
    if nvcc is None:
        raise RuntimeBuildError(
            "nvcc not found; install NVIDIA's CUDA toolkit, or: "
            "pip install nvidia-cuda-nvcc nvidia-cuda-cccl nvidia-cublas"
        )
    version = _release(nvcc)
    if version < OLDEST:
        raise RuntimeBuildError(f"{nvcc} is of CUDA {_dotted(version)}; ggml needs {_dotted(OLDEST)} or newer")
    include, cublas = _find_cublas(nvcc, version)
    return Cuda(nvcc, version, include, cublas, _has_driver(nvcc))


def choose_architectures(wanted: Sequence[str], version: tuple[int, int], capabilities: Sequence[str]) -> list[str]:
    """Architectures to compile for, as CMake spells them.

    Args:
        wanted: what the user asked for; may be empty.
        version: of the toolkit.
        capabilities: of the GPUs that are here: `8.9`. They are what is built for if nothing is asked for.

    Raises:
        UsageError: something that is no architecture.
    """
    for name in wanted:
        if not _ARCHITECTURE.fullmatch(name):
            raise UsageError(f"'{name}' is no CUDA architecture; they look like 89, 90-virtual, 120a-real")
    if wanted:
        return list(wanted)
    if not capabilities:
        return [name for name in EVERYWHERE if version >= SINCE.get(_number(name), (0, 0))]
    here = sorted({value.replace(".", "") for value in capabilities}, key=int)
    # a plain number means code and PTX, but that of 12x as ggml compiles it is for 12x alone
    old = [name for name in here if int(name) < 120]
    new = [f"{name}a-real" for name in here if int(name) >= 120]
    return old + new + (["90-virtual"] if new and "90" not in old else [])


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine: its name, and its compute capability: `8.9`."""

    name: str
    capability: str


def find_gpus() -> list[Gpu]:
    """The GPUs that the driver knows; none if there is no driver."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    query = [smi, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True)
    rows = [line.rsplit(",", 1) for line in result.stdout.splitlines() if result.returncode == 0]
    return [
        Gpu(row[0].strip(), row[1].strip()) for row in rows if len(row) == 2 and re.fullmatch(r"\s*\d+\.\d\s*", row[1])
    ]


def _find_nvcc() -> str | None:
    if named := os.environ.get("CUDACXX"):
        return named
    folders = [Path(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    for folder in folders:
        if found := shutil.which("nvcc", path=str(folder)):
            return found
    if found := shutil.which("nvcc"):
        return _without_wrapper(found)
    folders = [Path("/usr/local/cuda/bin"), *(folder / "bin" for folder in _wheel_folders())]
    return next((found for folder in folders if (found := shutil.which("nvcc", path=str(folder)))), None)


def _without_wrapper(nvcc: str) -> str:
    """The compiler itself where a script on PATH only calls it: its libraries are beside it."""
    result = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.*)$", result.stderr, re.MULTILINE)
    found = Path(top[1].strip(), "bin", "nvcc") if top else None
    return str(found.resolve()) if found and found.is_file() else nvcc


def _release(nvcc: str) -> tuple[int, int]:
    result = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    release = re.search(r"release (\d+)\.(\d+)", result.stdout)
    if result.returncode or release is None:
        raise RuntimeBuildError(f"{nvcc} does not run: {(result.stderr or result.stdout).strip()[-200:]}")
    return int(release[1]), int(release[2])


def _find_cublas(nvcc: str, version: tuple[int, int]) -> tuple[Path | None, dict[str, Path]]:
    """The folder of its header and its libraries; None and none if both are where nvcc and CMake look."""
    root = Path(nvcc).resolve().parent.parent
    if (root / "include" / "cublas_v2.h").is_file() and any(
        any((root / folder).glob("libcublas.so*")) for folder in ("lib64", "lib", "targets/x86_64-linux/lib")
    ):
        return None, {}
    if Path("/usr/include/cublas_v2.h").is_file():
        return None, {}
    for folder in _wheel_folders():
        include, lib = folder / "include", folder / "lib"
        libraries = {name: next(iter(sorted(lib.glob(f"lib{name}.so*"))), None) for name in ("cublas", "cublasLt")}
        found = {name: path for name, path in libraries.items() if path}
        major = next((path.name.rpartition(".")[2] for path in found.values()), "")
        if (include / "cublas_v2.h").is_file() and len(found) == 2 and major in ("so", str(version[0])):
            return include, found
    raise RuntimeBuildError(
        f"cuBLAS for CUDA {version[0]} not found; install it with the toolkit, or: pip install "
        + (f"'nvidia-cublas=={version[0]}.{version[1]}.*'" if version[0] >= 13 else f"nvidia-cublas-cu{version[0]}")
    )


def _wheel_folders() -> Iterator[Path]:
    """Folders of NVIDIA's wheels in this Python: one for everything since CUDA 13, one for each part before."""
    for packages in [*site.getsitepackages(), site.getusersitepackages()]:
        nvidia = Path(packages, "nvidia")
        yield from sorted(nvidia.glob("cu[0-9]*"))
        yield from (folder for name in ("cuda_nvcc", "cublas") if (folder := nvidia / name).is_dir())


def _has_driver(nvcc: str) -> bool:
    libraries = (
        subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout if shutil.which("ldconfig") else ""
    )
    stub = Path(nvcc).resolve().parent.parent / "lib64" / "stubs" / "libcuda.so"
    return "libcuda.so.1 " in libraries and (stub.is_file() or "libcuda.so " in libraries)


def _number(architecture: str) -> str:
    matched = _ARCHITECTURE.fullmatch(architecture)
    assert matched, architecture
    return matched[1]


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
