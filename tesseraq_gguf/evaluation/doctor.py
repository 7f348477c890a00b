"""What this machine has for learning and running, what is amiss, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from tesseraq_gguf.errors import EvaluationError, RuntimeMissingError
from tesseraq_gguf.evaluation.trial import USUAL_ANSWER, USUAL_PROMPT, try_speed
from tesseraq_gguf.paths import cache_folder
from tesseraq_gguf.runtime import pin
from tesseraq_gguf.runtime.cuda import find_gpus
from tesseraq_gguf.runtime.locate import RUNTIME_VARIABLE, Runtime, find_runtime
from tesseraq_gguf.runtime.threads import usable_cores, usable_processors
from tesseraq_gguf.runtime.toolchain import X86_INSTRUCTION_SETS, cpu_flags

State = Literal["good", "poor", "bad"]

_LIBRARIES = ("torch", "transformers", "gguf", "numpy", "safetensors", "datasets")

_NEEDED_ROOM = 5e9
"""Bytes of disk below which a build or a work directory may not fit."""

_NEEDED_MEMORY = 2e9

_BUSY = 25.0
"""Per cent of all processors' time that goes elsewhere, from which on rates say little."""

_TOLERATED = 0.75
"""Share of the slowest usual ratio that is still taken for usual."""

_KERNELS = (
    (("AVX512_VNNI", "AVX512_VBMI"), "AVX-512 with VNNI and VBMI: 16 rows at a time, codebooks as well"),
    (("AVX512_VNNI",), "AVX-512 with VNNI: 16 rows at a time, codebooks row by row"),
    (("AVX2", "AVX_VNNI"), "AVX2 with VNNI: 8 rows at a time, codebooks row by row"),
    (("AVX2",), "AVX2: 8 rows at a time, codebooks row by row"),
    (("MATMUL_INT8",), "ARM's int8 matrix products"),
    (("DOTPROD",), "ARM's int8 dot products"),
    (("NEON",), "NEON"),
)
"""What llama.cpp says that its CPU backend has, best first, and the kernels that are compiled with it."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: what.
        state: good; poor, where something works less well than it could; or bad, where something does not work.
        said: what was found.
        advice: what to do about it; empty where nothing is amiss.
    """

    topic: str
    state: State
    said: str
    advice: str = ""


def examine(
    timed: bool = True, watch: Callable[[str, int, int], None] = lambda *_: None, here: Path = Path()
) -> Iterator[Finding]:
    """Look at one thing after the other.

    Args:
        timed: whether speed is tried, for ten seconds.
        watch: told how far that is.
        here: folder whose disk is looked at.
    """
    yield _versions()
    runtime: Runtime | None = None
    try:
        runtime = find_runtime()
    except RuntimeMissingError as error:
        yield Finding("runtime", "bad", "none for eval, compare, chat and serve", str(error))
    features = ""
    if runtime:
        yield _runtime(runtime)
        features = _features(runtime)
        if not features:
            yield _broken(runtime)
    yield _processor(runtime, features)
    yield from _gpus()
    yield _memory()
    yield from _disks(here)
    if runtime and features and timed:
        yield _speed(runtime, watch)


def _versions() -> Finding:
    known = {name: _version(name) for name in ("tesseraq-gguf", *_LIBRARIES)}
    said = ", ".join(f"{name} {version}" for name, version in known.items() if version)
    missing = [name for name, version in known.items() if not version]
    python = f"Python {platform.python_version()}, {said}"
    if missing:
        advice = f"convert and write-text need {' and '.join(missing)}: pip install {' '.join(missing)}"
        return Finding("versions", "bad", python, advice)
    return Finding("versions", "good", python)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _runtime(runtime: Runtime) -> Finding:
    manifest = runtime.manifest
    kind = "for every processor of this kind" if manifest.get("portable") else "for this processor"
    named = f", named by {RUNTIME_VARIABLE}" if os.environ.get(RUNTIME_VARIABLE) else ""
    source = "a checkout of llama.cpp" if manifest.get("checkout") else f"llama.cpp of {pin.PACKAGE} {pin.VERSION}"
    built = str(manifest.get("built", ""))[:10]
    said = f"{runtime.root}{named}: {source}, {manifest.get('backend', 'cpu')}, {kind}, built and proven on {built}"
    return Finding("runtime", "good", said)


def _features(runtime: Runtime) -> str:
    """What llama.cpp says of the CPU backend that it chose; empty if it does not start."""
    program = (
        "from tesseraq_gguf.runtime.load import load_llama_cpp as load\n"
        "cpp = load(); cpp.llama_backend_init(); print(cpp.llama_print_system_info().decode())"
    )
    tried = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, errors="replace")
    return tried.stdout.strip() if tried.returncode == 0 else ""


def _broken(runtime: Runtime) -> Finding:
    advice = f"build it anew on this machine: {runtime.target.build_command} --force"
    return Finding("runtime", "bad", "it does not start here: it may be of another processor", advice)


def _processor(runtime: Runtime | None, features: str) -> Finding:
    cores, threads = usable_cores(), len(usable_processors())
    said = f"{_name_of_processor()}, {cores} {'core' if cores == 1 else 'cores'}"
    said += f" of {threads} threads" if threads > cores else ""
    if not features or not runtime:
        return Finding("processor", "good", said)
    kernels = _kernels(features)
    if kernels is None:
        advice = "our types run without vector instructions, slowly: this processor, or this build, has none of them"
        return Finding("processor", "poor", said, advice)
    said += f"; kernels: {kernels}"
    unused = _unused(runtime)
    if unused:
        command = f"{runtime.target.build_command} --force"
        advice = f"the runtime makes no use of {', '.join(unused)}. Unless these trap here, a new build may: {command}"
        return Finding("processor", "poor", said, advice)
    return Finding("processor", "good", said)


def _name_of_processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _kernels(features: str) -> str | None:
    """Which of our kernels run, from what llama.cpp says: `AVX2 = 1 | AVX512 = 1`."""
    present = set(re.findall(r"(\w+) = 1\b", features))
    return next((said for needed, said in _KERNELS if present.issuperset(needed)), None)


def _unused(runtime: Runtime) -> list[str]:
    """Instruction sets that the processor names and that a runtime for it was built without."""
    built = runtime.manifest.get("instruction_sets")
    if not built:  # of ARM, or one of all variants, of which the best is loaded
        return []
    flags = cpu_flags()
    return [s.name for s in X86_INSTRUCTION_SETS if s.name not in built and flags.issuperset(s.cpu_flags)]


def _gpus() -> Iterator[Finding]:
    gpus = find_gpus()
    if not gpus:
        yield Finding("GPU", "good", "none of NVIDIA's; learning and running are the processor's")
        return
    names = ", ".join(f"{gpu.name} ({gpu.capability})" for gpu in gpus)
    program = "import torch; raise SystemExit(not torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode:
        advice = "torch does not see it, so learning would not use it: install a CUDA build of torch"
        yield Finding("GPU", "poor", names, advice)
    else:
        yield Finding("GPU", "good", f"{names}, and torch learns on it")
    try:
        yield Finding("GPU", "good", f"runtime for it: {find_runtime('cuda').root}; {RUNTIME_VARIABLE} chooses it")
    except RuntimeMissingError:
        advice = "eval, chat and serve run on the processor; for the GPU: tesseraq-gguf runtime build --backend cuda"
        yield Finding("GPU", "poor", "no runtime for it", advice)


def _memory() -> Finding:
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    said = f"{memory.available / 1e9:.1f} GB of {memory.total / 1e9:.1f} GB free, swap {swap.total / 1e9:.1f} GB"
    if memory.available < _NEEDED_MEMORY:
        return Finding("memory", "poor", said, "learning holds a block, activations and the embedding: free some")
    return Finding("memory", "good", said)


def _disks(here: Path) -> Iterator[Finding]:
    places = {"disk, cache": cache_folder(""), "disk, here": here.absolute()}
    for topic, place in places.items():
        free = shutil.disk_usage(place).free
        said = f"{free / 1e9:.1f} GB free at {place}"
        if not os.access(place, os.W_OK):
            yield Finding(topic, "poor", said, "nothing can be written there: go to another folder")
        elif free < _NEEDED_ROOM:
            room = "set TESSERAQ_GGUF_CACHE" if topic.endswith("cache") else "give --work-dir"
            yield Finding(topic, "poor", said, f"a build or a work directory may not fit: free some, or {room}")
        else:
            yield Finding(topic, "good", said)


def _speed(runtime: Runtime, watch: Callable[[str, int, int], None]) -> Finding:
    busy = psutil.cpu_percent(interval=1.0)
    try:
        trial = try_speed(watch)
    except EvaluationError as error:
        return Finding("speed", "bad", str(error), f"build the runtime anew: {runtime.target.build_command} --force")
    said = (
        f"TSQ2 against Q4_0, one block of a 7B model: prompts {trial.prompt:.1f} × ({trial.ours.prompt:.0f} and "
        f"{trial.theirs.prompt:.0f} tokens/s; on whole models {_span(USUAL_PROMPT)}), answers {trial.answer:.1f} × "
        f"({trial.ours.answer:.0f} and {trial.theirs.answer:.0f} tokens/s; on whole models {_span(USUAL_ANSWER)})"
    )
    if trial.prompt >= _TOLERATED * USUAL_PROMPT[0] and trial.answer >= _TOLERATED * USUAL_ANSWER[0]:
        return Finding("speed", "good", said)
    if busy > _BUSY:
        return Finding("speed", "poor", said, f"{busy:.0f} % of the processors went elsewhere: try on a quiet machine")
    if runtime.manifest.get("portable"):
        return Finding(
            "speed", "poor", said, "a runtime for this very processor may be faster: tesseraq-gguf runtime build"
        )
    return Finding("speed", "poor", said, "less than usual: what else runs here, and is the processor throttled?")


def _span(usual: tuple[float, float]) -> str:
    return f"{usual[0]:g} to {usual[1]:g}"
