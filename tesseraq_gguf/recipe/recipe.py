"""Recipe: everything that decides what a conversion makes, as data."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from tesseraq_gguf.compute.schemes import ActivationScheme, scheme_of
from tesseraq_gguf.methods.table import FILE, METHODS, MethodRow, Settings
from tesseraq_gguf.recipe.options import OPTIONS, refuse_conflicts
from tesseraq_gguf.recipe.presets import PREPROCESSING_STEPS, PRESETS, Preset
from tesseraq_gguf.recipe.readers import AUTO, FROM_FILE
from tesseraq_gguf.types.facts import tensor_type
from tesseraq_gguf.types.mixes import Mix, mix_of


@dataclass(frozen=True)
class Recipe:
    """One conversion.

    Paths are given as strings or paths, names in any case, sizes in bytes or as text such as `"1G"`, rules as pairs, as
    a dict or as lines `REGEX=TYPE`. Whole numbers are ints of Python or numpy: a float is refused, even 32.0. Whatever
    would be ignored is refused as well. The fields of a recipe that was made are what is said here.

    Attributes:
        model: a Hugging Face folder, a hub id, with a revision behind an @ perhaps, a `.gguf` file, `demo` or
            `demo:smollm2`.
        out: the GGUF file to write.
        type: tensor type of the matrices in the decoder blocks, or a mix of llama-quantize's, which gives each matrix
            of the file the type that llama-quantize gives it; a float type means that nothing is learned.
        rules: pairs (regular expression, type); the last one that matches a matrix's checkpoint name gives it its type.
            Rules that match nothing in the blocks may name the embedding or the output matrix.
        target_bpw: bits per weight that the blocks' matrices may have, with those of a head for speculation; types of
            the blocks' are then chosen.
        target_size: bytes that the file may have; types of the blocks' matrices and the embedding are then chosen.
        candidates: types to choose from.
        method: how codes are learned, one of `table.METHODS`.
        init: what learned rounding begins at, one of `options.INITIALISATIONS`, or `file:` and a GGUF file.
        rotate: mix channels by Hadamard matrices before anything is learned, where that folds into the weights.
        finish: the last pass over the whole model, one of `options.FINISHES`.
        finish_steps: its steps; None takes the preset's.
        rank: of LRQ's scaling matrices; None means a quarter of the model's width.
        parts: how much of PTQ1.61 its method does, one of `table.PARTS`.
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
        imatrix: an importance matrix of llama-imatrix's, which rounding to nearest weighs errors by; None weighs all
            alike.
        write_imatrix: the file to write an importance matrix of the calibration to, for llama-quantize; None writes
            none.
        token: of the hub; None takes the environment's. It decides nothing, and stands nowhere in what is made.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, …
        memory_budget: bytes of the device's memory that activations kept from block to block may take; what does not
            fit is kept elsewhere. None takes a part of what is free.
        embedding_type: tensor type of the embedding; `AUTO` leaves it to `target_size` or a mix. None becomes `AUTO` if
            there is one, `type` where nothing is learned, and q8_0 else.
        output_type: tensor type of the output matrix; None means that of the embedding, or what a mix has.
        mmproj: the file to write the projector to, which images and sound go through; None writes none.
        mmproj_type: tensor type of its matrices, one of `options.PROJECTOR_TYPES`.
        no_mtp: leave the model's head for speculation out of the file.
        split: bytes that a file may have: a larger one is written in parts, by llama.cpp's names. None writes one file.
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
    candidates: tuple[str, ...] = ("tsq2", "tsq3", "tsq4")
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
    imatrix: Path | None = None
    write_imatrix: Path | None = None
    token: str | None = field(default=None, repr=False)
    device: str = "auto"
    memory_budget: int | None = None
    embedding_type: str = None  # type: ignore[assignment]  # a recipe that was made has one
    output_type: str | None = None
    mmproj: Path | None = None
    mmproj_type: str = "f16"
    no_mtp: bool = False
    split: int | None = None
    work_dir: Path | None = None
    fresh: bool = False
    seed: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        """Normalise all fields, and refuse what cannot be meant.

        Raises:
            UsageError: a field is of another kind, unknown or out of range, or would be ignored.
        """
        for name, option in OPTIONS.items():
            object.__setattr__(self, name, option.read(name, getattr(self, name)))
        given = self._given()
        if self.embedding_type is None:
            object.__setattr__(self, "embedding_type", self._unnamed_embedding)
        refuse_conflicts(self, set(given))

    def chosen(self) -> list[str]:
        """Return the names of the fields that are not as they are unless something is given."""
        found = self._given()
        return [name for name in found if name != "embedding_type" or self.embedding_type != self._unnamed_embedding]

    def _given(self) -> list[str]:
        return [f.name for f in fields(self) if getattr(self, f.name) != f.default]

    @property
    def _unnamed_embedding(self) -> str | None:
        if self.start_file is not None:
            return None
        chosen = self.target_size is not None or self.mix is not None
        return AUTO if chosen else "q8_0" if self.learns else self.type

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
    def preprocessing_steps(self) -> int:
        """Steps of the preprocessing, if there is one."""
        return self.preprocess_steps or PREPROCESSING_STEPS[self.preset]

    @property
    def start(self) -> str:
        """What learned rounding begins at: `init`, and in place of `auto` what measured best (docs/notes/starts.md).

        From AWQ learning ends with less error than from GPTQ, although AWQ alone has more. With activations rounded its
        scales serve these as well, and GPTQ follows; that was measured for TesseraQ with activations of 4 bits alone.
        """
        if self.start_file is not None:
            return FILE.name
        if self.init != "auto":
            return self.init
        return "awq+gptq" if self.scheme.rounds else "awq"

    @property
    def start_file(self) -> Path | None:
        """The GGUF file that learning begins at, where `init` names one."""
        return Path(self.init.removeprefix(FROM_FILE)) if self.init.startswith(FROM_FILE) else None

    @property
    def method_row(self) -> MethodRow:
        """What is known of the method."""
        return METHODS[self.method]

    def method_settings(self, width: int) -> Settings:
        """Return what the method is built from, for a model with so many channels."""
        settings = self.settings
        return Settings(
            settings.steps,
            settings.batch,
            settings.rounding_rate,
            settings.parameter_rate,
            width,
            self.rotate,
            {name: getattr(self, name) for name in self.method_row.options},
        )

    @property
    def scheme(self) -> ActivationScheme:
        """How activations are rounded while learning."""
        return scheme_of(self.activations, self.kv_bits)

    @property
    def budgeted(self) -> bool:
        """Whether types are chosen within a budget."""
        return self.target_bpw is not None or self.target_size is not None

    @property
    def budget(self) -> str:
        """What types are chosen for, in words; where there is a budget."""
        if self.target_size is not None:
            return f"a file of {self.target_size:,} bytes"
        return f"{self.target_bpw:g} bits per weight in the blocks"

    @property
    def learns(self) -> bool:
        """Whether anything is learned or rounded block by block: True for types with a grid."""
        return self.mix is not None or not tensor_type(self.type).is_float

    @property
    def mix(self) -> Mix | None:
        """The mix of llama-quantize that `type` names, if it names one."""
        return mix_of(self.type)

    @property
    def calibrates(self) -> bool:
        """Whether calibration text is needed."""
        return self.learns and (self.method_row.calibrates or self.scheme.static or self.rotate or self.budgeted)
