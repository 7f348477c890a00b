"""Recipe: everything that decides what a conversion makes, as data. Presets are the rows of one table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.schemes import ActivationScheme, scheme_of

METHODS = ("tesseraq", "ptq161", "lrq", "flexround", "awq+gptq", "gptq", "awq", "omniquant", "rtn")
"""Methods by name: those that learn the rounding, then those to compare with."""

LEARNED = ("tesseraq", "lrq", "flexround")
"""Those that learn the rounding, from a start."""

INITIALISATIONS = ("auto", "gptq", "awq+gptq", "awq", "omniquant", "none")
"""What they can begin at; `auto` is the one that serves best (`Recipe.start`), and LRQ's and FlexRound's papers have
`none`."""

FINISHES = ("none", "distill")
"""Last passes over the whole model."""

GRANULARITIES = ("group", "channel")
"""What shares a scale and a zero-point."""


AUTO = "auto"
"""Type of an embedding that is chosen within `target_size`."""

CANDIDATES = ("tsq2", "tsq3", "tsq4")
"""Types that a budget is spent on unless others are named."""

PARTS = ("mask", "scales", "cosine")
"""Parts of PTQ1.61, each with all before it: the mask alone, learned scales, the cosine in their loss."""

CODEBOOKS = ("universal", "model")
"""Where types with codebooks have them from."""


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
        finish_steps: Adam steps of the last pass, if there is one.
    """

    samples: int
    length: int
    steps: int
    batch: int
    rounding_rate: float
    parameter_rate: float
    finish_steps: int


PRESETS = {
    "fast": Preset(samples=128, length=256, steps=6, batch=4, rounding_rate=6e-2, parameter_rate=1e-2, finish_steps=50),
    "balanced": Preset(
        samples=512, length=256, steps=50, batch=2, rounding_rate=3e-2, parameter_rate=5e-3, finish_steps=200
    ),
    "best": Preset(
        samples=512, length=2048, steps=250, batch=4, rounding_rate=1e-3, parameter_rate=1e-3, finish_steps=1000
    ),
}
"""`best` is the paper's setting (arXiv 2410.19103, §4.1); the others spend less and take larger steps. Rates are for
types of 2 bits, those of more take shares of them (`methods.tesseraq.parameter_share`)."""


@dataclass(frozen=True)
class Recipe:
    """One conversion.

    Attributes:
        model: a Hugging Face folder, a hub id, a `.gguf` file, or `demo`.
        out: the GGUF file to write.
        type: tensor type of the matrices in the decoder blocks; a float type means that nothing is learned.
        rules: pairs (regular expression, type); the last one that matches a matrix's checkpoint name gives it its type.
        target_bpw: bits per weight that the blocks' matrices may have; their types are then chosen.
        target_size: bytes that the file may have; types of the blocks' matrices and the embedding are then chosen.
        candidates: types to choose from.
        method: how codes are learned, one of `METHODS`.
        init: what learned rounding begins at, one of `INITIALISATIONS`.
        rotate: mix channels by Hadamard matrices before anything is learned, where that folds into the weights.
        finish: the last pass over the whole model, one of `FINISHES`.
        finish_steps: its steps; None takes the preset's.
        rank: of LRQ's scaling matrices; None means a quarter of the model's width.
        granularity: what shares a scale and a zero-point: a type's own `group`, or a `channel`, a whole row.
        activations: how activations are rounded while learning, one of `schemes.SCHEMES`.
        kv_bits: bits of keys and values while learning; None leaves them.
        codebooks: `universal`, or `model` for codebooks designed from this model, in types that have any.
        preprocess: the text of quantisation preprocessing, as `calibration`; None leaves it out.
        preprocess_steps: its steps; None takes the preset's.
        preset: `fast`, `balanced` or `best`.
        calibration: a text file, `wikitext2`, `c4`, or None for a small text that needs no network.
        samples: calibration sequences; None takes the preset's.
        seqlen: tokens of a sequence; None takes the preset's.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, …
        memory_budget: bytes of the device's memory that activations kept from block to block may take; what does not
            fit is kept elsewhere. None takes a part of what is free.
        embedding_type: tensor type of the embedding; `AUTO` leaves it to `target_size`.
        output_type: tensor type of the output matrix; None means that of the embedding.
        work_dir: where finished blocks are kept until the file is written; None means a folder beside `out`.
        fresh: throw finished blocks of an earlier run away.
        seed: makes the run repeatable.
        processes: how many learn together; a step has at least one sequence for each.
    """

    model: str
    out: Path
    type: str = "tsq2"
    rules: tuple[tuple[str, str], ...] = ()
    target_bpw: float | None = None
    target_size: int | None = None
    candidates: tuple[str, ...] = CANDIDATES
    method: str = "tesseraq"
    init: str = "auto"
    rotate: bool = False
    finish: str = "none"
    finish_steps: int | None = None
    rank: int | None = None
    parts: str = "cosine"
    granularity: str = "group"
    activations: str = "none"
    kv_bits: int | None = None
    codebooks: str = "universal"
    preprocess: str | None = None
    preprocess_steps: int | None = None
    preset: str = "balanced"
    calibration: str | None = None
    samples: int | None = None
    seqlen: int | None = None
    device: str = "auto"
    memory_budget: int | None = None
    embedding_type: str = "q8_0"
    output_type: str | None = None
    work_dir: Path | None = None
    fresh: bool = False
    seed: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        """Check names and numbers.

        Raises:
            UsageError: an unknown preset or method, or a number that cannot be meant.
        """
        object.__setattr__(self, "out", Path(self.out))
        _check("preset", self.preset, tuple(PRESETS))
        _check("method", self.method, METHODS)
        _check("initialisation", self.init, INITIALISATIONS)
        _check("finish", self.finish, FINISHES)
        _check("granularity", self.granularity, GRANULARITIES)
        _check("part of PTQ1.61", self.parts, PARTS)
        if self.target_bpw is not None and self.target_size is not None:
            raise UsageError("--target-bpw and --target-size are two budgets: give one")
        if self.target_bpw is not None and not self.target_bpw > 0:
            raise UsageError(f"--target-bpw must be more than 0, not {self.target_bpw:g}")
        if self.embedding_type == AUTO and self.target_size is None:
            raise UsageError("the type of the embedding can be chosen with --target-size only: name one")
        if self.scheme.rounds and self.finish != "none":
            raise UsageError("--finish learns with activations as they are: it is not possible with rounded ones")
        _check("kind of codebooks", self.codebooks, CODEBOOKS)
        if self.granularity == "channel" and self.finish != "none":
            raise UsageError("--finish moves the scale of every group: it is not possible with --granularity channel")
        if self.finish_steps is not None and (self.finish == "none" or self.finish_steps < 1):
            raise UsageError("--finish-steps must be at least 1, and go with --finish distill")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"--rank must be at least 1, not {self.rank}")
        if self.preprocess_steps is not None and (self.preprocess is None or self.preprocess_steps < 1):
            raise UsageError("--preprocess-steps must be at least 1, and go with --preprocess TEXT")
        if self.samples is not None and self.samples < 1:
            raise UsageError(f"--samples must be at least 1, not {self.samples}")
        if self.seqlen is not None and self.seqlen < 8:
            raise UsageError(f"--seqlen must be at least 8 tokens, not {self.seqlen}")

    @property
    def settings(self) -> Preset:
        """The preset, with this recipe's numbers where given, and a sequence for each process."""
        preset = PRESETS[self.preset]
        return replace(
            preset,
            samples=self.samples or preset.samples,
            length=self.seqlen or preset.length,
            batch=max(preset.batch, self.processes),
            finish_steps=self.finish_steps or preset.finish_steps,
        )

    @property
    def start(self) -> str:
        """What learned rounding begins at: `init`, and in place of `auto` what measured best (docs/quality.md).

        From AWQ learning ends with less error than from GPTQ, although AWQ alone has more. With activations rounded its
        scales serve these as well, and GPTQ follows; that was measured for TesseraQ with activations of 4 bits alone.
        """
        if self.init != "auto":
            return self.init
        return "awq+gptq" if self.scheme.rounds else "awq"

    @property
    def scheme(self) -> ActivationScheme:
        """How activations are rounded while learning."""
        return scheme_of(self.activations, self.kv_bits)

    @property
    def budgeted(self) -> bool:
        """Whether types are chosen within a budget."""
        return self.target_bpw is not None or self.target_size is not None

    @property
    def learns(self) -> bool:
        """Whether anything is learned or rounded block by block: True for types with a grid."""
        from tesseraq_gguf.grids import GRIDS

        return self.type.lower() in GRIDS

    @property
    def calibrates(self) -> bool:
        """Whether calibration text is needed."""
        return self.learns and (self.method != "rtn" or self.scheme.static or self.rotate or self.budgeted)


def _check(what: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise UsageError(f"unknown {what} '{name}'. There are: {', '.join(known)}")
