"""What a runtime is built to run on: this processor, any processor of its kind, or another kind of machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tesseraq_gguf.errors import UsageError


@dataclass(frozen=True)
class Cross:
    """A kind of machine that another one can build for.

    Attributes:
        system: what CMake calls its operating system.
        processor: what CMake calls its processor.
        packages: Debian packages of the compilers, for an error message.
        emulator: the program of qemu that runs its programs here.
        emulated: the processor that it is told to be, with all that ggml has kernels for.
    """

    system: str
    processor: str
    packages: str
    emulator: str
    emulated: str


CROSS: Mapping[str, Cross] = {
    # qemu's own choice has vectors of 2048 bits, which no processor has and ggml's kernels of Q4_K and Q6_K do not know
    "aarch64-linux-gnu": Cross(
        "Linux", "aarch64", "gcc-aarch64-linux-gnu g++-aarch64-linux-gnu", "qemu-aarch64", "max,sve-max-vq=2"
    ),
}
"""Targets of cross-builds, by the triple that their compilers' names begin with."""


@dataclass(frozen=True)
class Target:
    """What a runtime is built to run on.

    Attributes:
        backend: which devices it runs on: `cpu`, or `cuda` for GPUs as well.
        portable: True for the CPU backend in several variants, of which ggml loads the best when a program starts;
            False for the instruction sets of the machine that builds.
        triple: a key of `CROSS` for another kind of machine, None for this one. Such builds are always portable.

    Raises:
        UsageError: an unknown triple, or a backend that is built for this machine's processor only.
    """

    backend: str = "cpu"
    portable: bool = False
    triple: str | None = None

    def __post_init__(self) -> None:
        if self.backend == "cuda" and (self.portable or self.triple):
            raise UsageError("the backend 'cuda' is built for this machine's processor only, not portable")
        if self.triple is None:
            return
        if self.triple not in CROSS:
            raise UsageError(f"unknown target '{self.triple}'. Known targets: {', '.join(CROSS)}")
        object.__setattr__(self, "portable", True)

    @property
    def name(self) -> str:
        """Its folder beside the others: `cpu`, `cpu-portable`, `cpu-aarch64-linux-gnu`."""
        return f"{self.backend}-{self.triple or 'portable'}" if self.portable else self.backend

    @property
    def cross(self) -> Cross | None:
        """The other kind of machine; None if it is this one."""
        return CROSS[self.triple] if self.triple else None

    @property
    def build_command(self) -> str:
        """What a user runs to get it."""
        option = f" --target {self.triple}" if self.triple else " --portable" if self.portable else ""
        option = f" --backend {self.backend}" if self.backend == "cuda" else option
        return f"tesseraq-gguf runtime build{option}"
