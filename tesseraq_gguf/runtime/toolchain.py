"""What a build needs from the machine: CMake, Ninja, compilers, and instruction sets that really run.

For another kind of machine: compilers named by its triple, and qemu to run what they made.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tesseraq_gguf.errors import RuntimeBuildError
from tesseraq_gguf.runtime.target import Target


@dataclass(frozen=True)
class Toolchain:
    """Programs of a build. The compilers are None on Windows, where CMake finds them by itself."""

    cmake: str
    ninja: str
    cc: str | None
    cxx: str | None


def find_toolchain(target: Target | None = None) -> Toolchain:
    """Look the programs up, on PATH and among the scripts of this Python.

    Args:
        target: what is to be built; another kind of machine has compilers of its own.

    Raises:
        RuntimeBuildError: one is missing; the message says how to get it.
    """
    cmake, ninja = _find("cmake"), _find("ninja") or _find("ninja-build")
    missing = [name for name, path in (("cmake", cmake), ("ninja", ninja)) if not path]
    if not cmake or not ninja:
        raise RuntimeBuildError(
            f"{' and '.join(missing)} not found; run: pip install {' '.join(missing)} "
            "(or: pip install 'tesseraq-gguf[build]')"
        )
    if target and target.cross:
        compilers = _find(f"{target.triple}-gcc"), _find(f"{target.triple}-g++")
        if not compilers[0] or not compilers[1]:
            raise RuntimeBuildError(
                f"no C and C++ compiler for {target.triple} found; install them (apt install {target.cross.packages})"
            )
        return Toolchain(cmake, ninja, *compilers)
    if sys.platform == "win32":
        return Toolchain(cmake, ninja, None, None)
    cc = os.environ.get("CC") or _find("cc") or _find("gcc") or _find("clang")
    cxx = os.environ.get("CXX") or _find("c++") or _find("g++") or _find("clang++")
    if not cc or not cxx:
        hint = (
            "xcode-select --install"
            if sys.platform == "darwin"
            else "apt install build-essential, or your system's like"
        )
        raise RuntimeBuildError(f"no C and C++ compiler found; install one ({hint})")
    return Toolchain(cmake, ninja, cc, cxx)


def find_emulator(target: Target) -> list[str] | None:
    """The head of a command that runs a target's programs here: empty for this machine, None if qemu is missing.

    Their libraries are looked for where the cross-compilers have theirs, or where QEMU_LD_PREFIX says.
    """
    if target.cross is None:
        return []
    emulator = _find(target.cross.emulator) or _find(f"{target.cross.emulator}-static")
    if emulator is None:
        return None
    command = [emulator, "-cpu", target.cross.emulated]
    prefix = Path("/usr", str(target.triple))
    return [*command, "-L", str(prefix)] if prefix.is_dir() and "QEMU_LD_PREFIX" not in os.environ else command


def compiler_version(compiler: str | None) -> str:
    """The first line a compiler says about itself."""
    if compiler is None:
        return "found by CMake"
    result = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True)
    return (result.stdout.strip().splitlines() or [compiler])[0]


@dataclass(frozen=True)
class InstructionSet:
    """One step of x86's ladder.

    Attributes:
        switch: CMake option of ggml.
        compiler_flags: what it makes the compiler do.
        cpu_flags: what /proc/cpuinfo calls it.
        probe: a C program that uses it and exits with 0 if the result is right.
    """

    switch: str
    compiler_flags: tuple[str, ...]
    cpu_flags: tuple[str, ...]
    probe: str

    @property
    def name(self) -> str:
        """Short name for people: `AVX512_VNNI`."""
        return self.switch.removeprefix("GGML_")


def _probe(body: str) -> str:
    return (
        "#include <immintrin.h>\n#include <stdlib.h>\n"
        f"int main(int argc, char ** argv) {{ (void) argv; volatile int one = argc > 0; {body} }}\n"
    )


_AVX512 = ("-mavx512f", "-mavx512cd", "-mavx512vl", "-mavx512dq", "-mavx512bw")

X86_INSTRUCTION_SETS = (
    InstructionSet("GGML_SSE42", ("-msse4.2",), ("sse4_2",), _probe("return _mm_crc32_u32(0, one) == 0;")),
    InstructionSet(
        "GGML_AVX",
        ("-mavx",),
        ("avx",),
        _probe("float f[8]; _mm256_storeu_ps(f, _mm256_set1_ps(one)); return f[7] != 1;"),
    ),
    InstructionSet(
        "GGML_F16C",
        ("-mavx", "-mf16c"),
        ("f16c",),
        _probe("return _mm_cvtss_f32(_mm_cvtph_ps(_mm_set1_epi16(0x3c00 * one))) != 1;"),
    ),
    InstructionSet(
        "GGML_FMA",
        ("-mavx", "-mfma"),
        ("fma",),
        _probe("__m128 f = _mm_set1_ps(one); return _mm_cvtss_f32(_mm_fmadd_ps(f, f, f)) != 2;"),
    ),
    InstructionSet("GGML_BMI2", ("-mbmi2",), ("bmi2",), _probe("return _pext_u32(6 * one, 2) != 1;")),
    InstructionSet(
        "GGML_AVX2",
        ("-mavx2",),
        ("avx2",),
        _probe(
            "int i[8]; _mm256_storeu_si256((__m256i *) i, _mm256_abs_epi32(_mm256_set1_epi32(-one))); return i[7] != 1;"
        ),
    ),
    InstructionSet(
        "GGML_AVX_VNNI",
        ("-mavx2", "-mavxvnni"),
        ("avx_vnni",),
        _probe(
            "__m256i v = _mm256_set1_epi8(one); int i[8]; "
            "_mm256_storeu_si256((__m256i *) i, _mm256_dpbusd_avx_epi32(v, v, v)); return i[7] == 0;"
        ),
    ),
    InstructionSet(
        "GGML_AVX512",
        _AVX512,
        ("avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"),
        _probe("int i[16]; _mm512_storeu_si512(i, _mm512_abs_epi32(_mm512_set1_epi32(-one))); return i[15] != 1;"),
    ),
    InstructionSet(
        "GGML_AVX512_VBMI",
        (*_AVX512, "-mavx512vbmi"),
        ("avx512vbmi",),
        _probe(
            "__m512i v = _mm512_set1_epi8(one); int i[16]; "
            "_mm512_storeu_si512(i, _mm512_permutexvar_epi8(v, v)); return i[15] == 0;"
        ),
    ),
    InstructionSet(
        "GGML_AVX512_VNNI",
        (*_AVX512, "-mavx512vnni"),
        ("avx512_vnni",),
        _probe(
            "__m512i v = _mm512_set1_epi8(one); int i[16]; "
            "_mm512_storeu_si512(i, _mm512_dpbusd_epi32(v, v, v)); return i[15] == 0;"
        ),
    ),
    InstructionSet(
        "GGML_AVX512_BF16",
        (*_AVX512, "-mavx512bf16"),
        ("avx512_bf16",),
        _probe(
            "__m512bh v = (__m512bh) _mm512_set1_epi16(0x3f80 * one); float f[16]; "
            "_mm512_storeu_ps(f, _mm512_dpbf16_ps(_mm512_setzero_ps(), v, v)); return f[15] != 2;"
        ),
    ),
)
"""From old to new; a set is used only if its probe ran, whatever the processor says of itself.

AMX is left out: virtual machines name it and trap on it, some of them only on another host, and none of our types
needs it.
"""


NEVER_BUILT = ("sapphirerapids",)
"""Variants of ggml's CPU backend that portable runtimes leave out.

All that this one has and `zen4` has not is AMX. ggml would choose it on every machine that names AMX, and virtual
machines name it and trap on it.
"""

VARIANT_FLAGS: Mapping[str, tuple[str, ...]] = {
    "cooperlake": ("-mavx512bf16",),
    "zen4": ("-mavx512bf16",),
    "alderlake": ("-mavxvnni",),
    "armv8.2_3": ("-march=armv8.2-a+dotprod+fp16+sve",),
    "armv8.6_1": ("-march=armv8.6-a+dotprod+fp16+sve+i8mm",),
    "armv8.6_2": ("-march=armv8.6-a+dotprod+fp16+sve+i8mm+sve2",),
    "armv9.2_1": ("-march=armv9.2-a+dotprod+fp16+sve+i8mm+sme",),
    "armv9.2_2": ("-march=armv9.2-a+dotprod+fp16+sve+i8mm+sve2+sme",),
}
"""Flags by variant that compilers of the last years do not know; GCC 12 lacks SME, for one."""


def variants_left_out(cc: str | None, processor: str) -> list[str]:
    """Names of the variants that a portable runtime goes without: never built, or unknown to this compiler.

    Args:
        cc: the C compiler; None if CMake finds it, which then has to know them all.
        processor: what the runtime is for, as `platform.machine()` says it.
    """
    arm = processor.lower() in {"aarch64", "arm64"}
    of_processor = [name for name in VARIANT_FLAGS if name.startswith("armv") == arm]
    unknown = [name for name in of_processor if cc and not _accepts(cc, VARIANT_FLAGS[name])]
    return unknown if arm else [*NEVER_BUILT, *unknown]


def _accepts(cc: str, flags: Sequence[str]) -> bool:
    """Whether a compiler knows these flags."""
    command = [*cc.split(), *flags, "-fsyntax-only", "-x", "c", "-"]
    return subprocess.run(command, input="int x;\n", text=True, capture_output=True).returncode == 0


def is_linux_x86() -> bool:
    """Whether instruction sets are probed here; elsewhere ggml chooses (GGML_NATIVE)."""
    return sys.platform.startswith("linux") and platform.machine().lower() in {"x86_64", "amd64"}


def probe_instruction_sets(cc: str) -> tuple[list[InstructionSet], list[InstructionSet]]:
    """Compile and run a small program per instruction set that this processor names.

    Returns:
        `(usable, trapped)`: those whose program ran, and those the processor names but whose program was killed.
    """
    named = cpu_flags()
    usable: list[InstructionSet] = []
    trapped: list[InstructionSet] = []
    with tempfile.TemporaryDirectory() as folder:
        for candidate in X86_INSTRUCTION_SETS:
            if not named.issuperset(candidate.cpu_flags):
                continue
            code = _run_probe(cc, candidate, Path(folder))
            if code == 0:
                usable.append(candidate)
            elif code is not None and code < 0:
                trapped.append(candidate)
    return usable, trapped


def native_options(usable: Sequence[InstructionSet]) -> list[str]:
    """CMake options that switch exactly these instruction sets on."""
    switches = (f"-D{candidate.switch}={'ON' if candidate in usable else 'OFF'}" for candidate in X86_INSTRUCTION_SETS)
    return ["-DGGML_NATIVE=OFF", *switches]


def _run_probe(cc: str, candidate: InstructionSet, folder: Path) -> int | None:
    """Exit code of the probe, negative if a signal ended it, None if the compiler does not know the instructions."""
    source, program = folder / "probe.c", folder / candidate.name
    source.write_text(candidate.probe)
    command = [*cc.split(), "-O1", *candidate.compiler_flags, "-o", str(program), str(source)]
    if subprocess.run(command, capture_output=True).returncode:
        return None
    return subprocess.run([str(program)], capture_output=True).returncode


def cpu_flags() -> set[str]:
    """What Linux says that an x86 processor has; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def _find(name: str) -> str | None:
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
