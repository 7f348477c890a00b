"""Recipe: everything that decides what a conversion makes, as data. Presets are the rows of one table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tesseraq_gguf.errors import UsageError

METHODS = ("tesseraq", "gptq", "rtn")
"""Methods by name, best first."""


@dataclass(frozen=True)
class Preset:
    """How much calibration and learning a run spends.

    Attributes:
        samples: calibration sequences.
        length: tokens of a sequence.
        steps: Adam steps in each of the 20 stages of progressive adaptive rounding.
        batch: sequences of a step.
        rounding_rate: learning rate of the rounding variables ν.
        parameter_rate: learning rate of scales and zero-points.
    """

    samples: int
    length: int
    steps: int
    batch: int
    rounding_rate: float
    parameter_rate: float


PRESETS = {
    "fast": Preset(samples=128, length=256, steps=6, batch=4, rounding_rate=6e-2, parameter_rate=1e-2),
    "balanced": Preset(samples=256, length=256, steps=25, batch=4, rounding_rate=3e-2, parameter_rate=5e-3),
    "best": Preset(samples=512, length=2048, steps=250, batch=4, rounding_rate=1e-3, parameter_rate=1e-3),
}
"""`best` is the paper's setting (arXiv 2410.19103, §4.1); the others spend less and take larger steps."""


@dataclass(frozen=True)
class Recipe:
    """One conversion.

    Attributes:
        model: a Hugging Face folder, a hub id, a `.gguf` file, or `demo`.
        out: the GGUF file to write.
        type: tensor type of the matrices in the decoder blocks; a stock float type means that nothing is learned.
        method: how codes are learned: `tesseraq`, `gptq` or `rtn`.
        preset: `fast`, `balanced` or `best`.
        calibration: a text file, `wikitext2`, `c4`, or None for a small text that needs no network.
        samples: calibration sequences; None takes the preset's.
        seqlen: tokens of a sequence; None takes the preset's.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, …
        embedding_type: tensor type of embedding and output matrix.
        work_dir: where finished blocks are kept until the file is written; None means a folder beside `out`.
        fresh: throw finished blocks of an earlier run away.
        seed: makes the run repeatable.
    """

    model: str
    out: Path
    type: str = "tsq2"
    method: str = "tesseraq"
    preset: str = "balanced"
    calibration: str | None = None
    samples: int | None = None
    seqlen: int | None = None
    device: str = "auto"
    embedding_type: str = "q8_0"
    work_dir: Path | None = None
    fresh: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check names and numbers.

        Raises:
            UsageError: an unknown preset or method, or a number that cannot be meant.
        """
        object.__setattr__(self, "out", Path(self.out))
        if self.preset not in PRESETS:
            raise UsageError(f"unknown preset '{self.preset}'. Presets: {', '.join(PRESETS)}")
        if self.method not in METHODS:
            raise UsageError(f"unknown method '{self.method}'. Methods: {', '.join(METHODS)}")
        if self.samples is not None and self.samples < 1:
            raise UsageError(f"--samples must be at least 1, not {self.samples}")
        if self.seqlen is not None and self.seqlen < 8:
            raise UsageError(f"--seqlen must be at least 8 tokens, not {self.seqlen}")

    @property
    def settings(self) -> Preset:
        """The preset, with `samples` and `seqlen` of this recipe in place of its own where given."""
        preset = PRESETS[self.preset]
        return Preset(
            samples=self.samples or preset.samples,
            length=self.seqlen or preset.length,
            steps=preset.steps,
            batch=preset.batch,
            rounding_rate=preset.rounding_rate,
            parameter_rate=preset.parameter_rate,
        )

    @property
    def learns(self) -> bool:
        """Whether anything is learned or rounded block by block: True for types with a grid."""
        from tesseraq_gguf.grids import GRIDS

        return self.type.lower() in GRIDS
