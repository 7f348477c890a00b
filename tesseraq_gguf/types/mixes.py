"""The mixes of llama-quantize: names under which it chooses a type for each matrix of a model. No torch.

Here are their names alone. Which matrix gets which type is asked of llama-quantize itself (`conversion/mix.py`): it
depends on the architecture, the layer, experts, the embedding, and whether anything was calibrated.
"""

from __future__ import annotations

from dataclasses import dataclass

from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.types.facts import TENSOR_TYPES

PREFIX = "mix:"
"""Begins the name of a mix where a type has the same name."""


@dataclass(frozen=True)
class Mix:
    """One mix.

    Attributes:
        name: as llama-quantize has it, lower case.
        file_type: value of `llama_ftype` (`general.file_type`).
    """

    name: str
    file_type: int

    @property
    def spelled(self) -> str:
        """What users call it: by its name, or with `mix:` before it where that is a type's."""
        return PREFIX + self.name if self.name in TENSOR_TYPES else self.name


_MIXES = (
    Mix("q2_0", 41), Mix("q2_k_s", 21), Mix("q2_k", 10),
    Mix("q3_k_s", 11), Mix("q3_k_m", 12), Mix("q3_k_l", 13),
    Mix("q4_0", 2), Mix("q4_1", 3), Mix("q4_k_s", 14), Mix("q4_k_m", 15),
    Mix("q5_0", 8), Mix("q5_1", 9), Mix("q5_k_s", 16), Mix("q5_k_m", 17), Mix("q6_k", 18), Mix("q8_0", 7),
    Mix("iq1_s", 24), Mix("iq1_m", 31), Mix("iq2_xxs", 19), Mix("iq2_xs", 20), Mix("iq2_s", 28), Mix("iq2_m", 29),
    Mix("iq3_xxs", 23), Mix("iq3_xs", 22), Mix("iq3_s", 26), Mix("iq3_m", 27), Mix("iq4_nl", 25), Mix("iq4_xs", 30),
    Mix("mxfp4_moe", 38),
)  # fmt: skip

MIXES = {mix.name: mix for mix in _MIXES}
"""The mixes by name."""


def spellings() -> list[str]:
    """Return what users call the mixes, those that need no `mix:` before them first."""
    return sorted((mix.spelled for mix in MIXES.values()), key=lambda name: name.startswith(PREFIX))


def mix_of(name: str) -> Mix | None:
    """Return the mix of a name; None if it is that of a type, or of nothing.

    Raises:
        UsageError: it begins as a mix and is none.
    """
    name = name.strip().lower()
    if not name.startswith(PREFIX):
        return None if name in TENSOR_TYPES else MIXES.get(name)
    try:
        return MIXES[name.removeprefix(PREFIX)]
    except KeyError:
        raise UsageError(f"unknown mix '{name}'. llama-quantize has: {', '.join(MIXES)}") from None
