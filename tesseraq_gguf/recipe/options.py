"""The options of a conversion, each declared once. No torch.

The command line, what a `Recipe` reads and refuses, what a run is and what its file says all come from here. The field
of the same name in `Recipe` has the type and the default; a test holds both together.

They stand in the order in which a file says how it was made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tesseraq_gguf.arguments import Reader, as_option, choice, device, flag, number, path, secret, spelled, text
from tesseraq_gguf.compute.schemes import KEY_VALUE_BITS, SCHEMES
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.methods.table import METHODS, PARTS, STARTS
from tesseraq_gguf.recipe import conflicts, readers
from tesseraq_gguf.recipe.conflicts import Judge, nothing
from tesseraq_gguf.recipe.presets import PRESETS
from tesseraq_gguf.recipe.readers import at_least, optional
from tesseraq_gguf.types.facts import WITH_CODEBOOKS, names
from tesseraq_gguf.types.mixes import spellings

if TYPE_CHECKING:
    from tesseraq_gguf.recipe.recipe import Recipe

INITIALISATIONS = ("auto", *STARTS)
"""What methods can begin at; `auto` is the start that serves best (`Recipe.start`)."""

FINISHES = ("none", "distill")
"""Last passes over the whole model."""

GRANULARITIES = ("group", "channel")
"""What shares a scale and a zero-point."""

CODEBOOKS = ("universal", "model")
"""Where types with codebooks have them from."""

PROJECTOR_TYPES = ("f16", "bf16", "f32", "q8_0")
"""Types that llama.cpp's converter writes a projector in."""

MAKE, LEARN, CALIBRATION, MACHINE, EXPERIMENTS = (
    "What to make",
    "How to learn",
    "Calibration",
    "Machine",
    "Experiments",
)
"""Headings under which `convert --help` lists options."""

Entries = Callable[["Recipe"], Mapping[str, object]]
"""What an option adds to what a run is, or to what its file says, by key."""

_WORDS = "FILE|wikitext2|c4"


def _none(_: Recipe) -> dict[str, object]:
    return {}


@dataclass(frozen=True)
class Option:
    """One option of a conversion.

    Attributes:
        name: of the field; `arguments.as_option` says what it is called on the command line.
        read: makes of what was given what it means.
        help: what `convert --help` says of it; what it lacks is not on the command line.
        group: its heading there; "" for what is given by its place.
        kind: what the command line makes of the word.
        many: whether the command line takes it often.
        metavar: what `--help` calls its value, where the kind says too little.
        unset: what `--help` says of the default, where that says too little.
        always: whether it has a meaning where nothing is learned.
        clash: what it contradicts.
        idle: why it would be ignored, where something is learned.
        identity: what of it decides what blocks learn. Options that decide one thing together declare the same.
        metadata: what the file says of it, beside its preset.
        said: what the file's one line says of it.
        beside: whether the file is the same with and without it.
    """

    name: str
    read: Reader
    help: str = ""
    group: str = ""
    kind: type[Any] = str
    many: bool = False
    metavar: str | None = None
    unset: str | None = None
    always: bool = False
    clash: Judge = nothing
    idle: Judge = nothing
    identity: Entries = _none
    metadata: Entries = _none
    said: Callable[[Recipe], str] = lambda _: ""
    beside: bool = False


def _listed(names: Any) -> str:
    return ", ".join(map(str, names))


def _summaries() -> str:
    return "; ".join(f"{row.name} {row.summary}" for row in METHODS.values())


def _budget(recipe: Recipe) -> dict[str, object]:
    return {"budget": [recipe.budget, *recipe.candidates] if recipe.budgeted else None}


def _ends(recipe: Recipe) -> dict[str, object]:
    return {"ends": [recipe.embedding_type, recipe.output_type] if recipe.budgeted else None}


def _scheme(recipe: Recipe) -> dict[str, object]:
    return {"activations": str(recipe.scheme) if recipe.scheme.rounds else None}


def _spent(recipe: Recipe) -> dict[str, object]:
    # the last pass works on blocks of any run: it may be added, or repeated with other settings
    return {"preset": {key: value for key, value in asdict(recipe.settings).items() if key != "finish_steps"}}


def _parts(recipe: Recipe) -> str | None:
    return recipe.parts if "parts" in recipe.method_row.options else None


_OPTIONS = (
    Option(
        "model", text,
        "A Hugging Face folder, a hub id such as Qwen/Qwen3-0.6B or OWNER/NAME@REVISION, a .gguf file, 'demo' or "
        "'demo:smollm2'.",
        always=True,
    ),
    Option("out", path, "The GGUF file to write.", kind=Path, always=True),
    Option(
        "type", readers.type_or_mix,
        "Tensor type of the decoder blocks' matrices: "
        f"{_listed(names(lambda t: t.custom))} for our runtime; "
        f"{_listed(names(lambda t: t.family and not t.custom))} for any llama.cpp. "
        f"With {_listed(names(lambda t: t.is_float))} nothing is learned. Or a mix, which gives every matrix of the "
        f"file, embedding and output too, the type that llama-quantize gives it: {_listed(spellings())}.",
        MAKE, always=True, clash=conflicts.type_beside_budget,
        idle=conflicts.beside_file,
    ),
    Option(
        "rules", readers.rules,
        "Give matrices whose name in the checkpoint matches another type, a float type perhaps; may be given often, "
        "the last wins. One that matches nothing in the blocks is for embedding or output matrix.",
        MAKE, many=True, metavar="REGEX=TYPE", always=True, clash=conflicts.rules,
        identity=lambda recipe: {"rules": [list(rule) for rule in recipe.rules] if recipe.budgeted else None},
        idle=conflicts.beside_file,
    ),
    Option(
        "target_bpw", optional(number),
        "Choose each matrix's type so that the blocks take so many bits per weight; OUT.types tells which.",
        MAKE, kind=float, clash=conflicts.two_budgets, identity=_budget,
        idle=conflicts.beside_file,
    ),
    Option(
        "target_size", optional(readers.size),
        "Choose types, the embedding's too unless it is given, so that the file is no larger (200M, 1.5G, …).",
        MAKE, metavar="SIZE", clash=conflicts.two_budgets, identity=_budget,
        idle=conflicts.beside_file,
    ),
    Option(
        "candidates", readers.candidates,
        "Types that a target chooses from; stock are all that are learned and that any llama.cpp reads.",
        MAKE, metavar="TYPES",
        idle=conflicts.first(conflicts.without_target, conflicts.beside_file), identity=_budget,
    ),
    Option(
        "embedding_type", optional(readers.embedding_type), "Tensor type of the embedding, any that --type takes.",
        MAKE, unset="q8_0; a mix's own; --type itself where nothing is learned", always=True,
        clash=conflicts.embedding_type,
        identity=_ends,
        idle=conflicts.beside_file,
    ),
    Option(
        "output_type", optional(readers.type_name), "Tensor type of the output matrix.",
        MAKE, unset="that of the embedding; a mix's own", always=True, clash=conflicts.output_type, identity=_ends,
        idle=conflicts.beside_file,
    ),
    Option(
        "mmproj", optional(path),
        "Also write the projector of a model that sees or hears, as chat and serve take it, to this file.",
        MAKE, kind=Path, metavar="FILE", always=True, clash=conflicts.projector, beside=True,
    ),
    Option(
        "mmproj_type", choice("type of a projector", PROJECTOR_TYPES),
        f"Tensor type of its matrices: {_listed(PROJECTOR_TYPES)}.",
        MAKE, always=True, idle=conflicts.without_projector, beside=True,
    ),
    Option(
        "no_mtp", flag, "Leave the model's head for speculation (MTP, nextn) out of the file.",
        MAKE, kind=bool, always=True,
    ),
    Option(
        "split", optional(readers.size),
        "Write parts of so many bytes at most (4G, …) where the file is larger: NAME-00001-of-00003.gguf and so on.",
        MAKE, metavar="SIZE", always=True, clash=conflicts.split,
    ),
    Option(
        "preset", choice("preset", tuple(PRESETS)), f"How much to spend: {_listed(PRESETS)} (the paper's setting).",
        LEARN, idle=conflicts.without_preset, identity=_spent,
    ),
    Option(
        "method", choice("method", tuple(METHODS)), f"How to learn: {_summaries()}.",
        LEARN, identity=lambda recipe: {"method": recipe.method}, said=lambda recipe: recipe.method,
    ),
    Option(
        "init", readers.initialisation(INITIALISATIONS),
        f"What learned rounding begins at: {_listed(INITIALISATIONS)}, or file:GGUF, a quantised file whose types, "
        "codes and scales are taken and improved.",
        LEARN, idle=conflicts.without_start, identity=lambda recipe: {"init": recipe.start},
        said=lambda recipe: f" from {recipe.start}" if recipe.method_row.begins else "",
    ),
    Option(
        "calibration", optional(text),
        "Text to learn on. By default the help topics that ship with Python, which need no network.",
        CALIBRATION, metavar=_WORDS, idle=conflicts.without_calibration,
    ),
    Option(
        "samples", optional(at_least(1)), "Calibration sequences, in place of the preset's.",
        CALIBRATION, kind=int, idle=conflicts.without_calibration, identity=_spent,
    ),
    Option(
        "seqlen", optional(at_least(8, "tokens")), "Tokens of a sequence, in place of the preset's.",
        CALIBRATION, kind=int, idle=conflicts.without_sequences, identity=_spent,
    ),
    Option(
        "imatrix", optional(path),
        "An importance matrix of llama-imatrix's, GGUF or the older .dat, to round with where nothing is calibrated.",
        CALIBRATION, kind=Path, metavar="FILE", clash=conflicts.imatrix, idle=conflicts.with_calibration,
    ),
    Option(
        "write_imatrix", optional(path),
        "Also write an importance matrix of the calibration to this GGUF file, for llama-quantize.",
        CALIBRATION, kind=Path, metavar="FILE", clash=conflicts.write_imatrix, idle=conflicts.without_calibration,
        beside=True,
    ),
    Option(
        "token", optional(secret), "Token of the hub, for models that are gated or private.",
        MACHINE, unset="HF_TOKEN of the environment, or the one of hf auth login", always=True,
        idle=conflicts.without_hub, beside=True,
    ),
    Option("device", device, "auto, cpu, cuda, cuda:1, …", MACHINE),
    Option(
        "memory_budget", optional(readers.size),
        "Memory of the device for activations kept from block to block (800M, 16G, …); if they need more, a GPU's go "
        "to main memory, and those there to disk.",
        MACHINE, metavar="SIZE", unset="a quarter of a GPU's free memory, half of the free main memory",
        idle=conflicts.without_calibration, beside=True,
    ),
    Option(
        "work_dir", optional(path), "Where finished blocks are kept until the file is whole. By default beside OUT.",
        MACHINE, kind=Path, beside=True,
    ),
    Option("fresh", flag, "Throw the blocks of an earlier run away.", MACHINE, kind=bool, beside=True),
    Option(
        "seed", at_least(0), "The same seed, options and machine give the same file.",
        MACHINE, kind=int, identity=lambda recipe: {"seed": recipe.seed},
    ),
    Option("processes", at_least(1), always=True, identity=_spent),  # torchrun's
    Option(
        "rotate", flag,
        "First mix channels by Hadamard matrices, where that folds into the weights: for activations of 4 bits or "
        "fewer.",
        EXPERIMENTS, kind=bool, identity=lambda recipe: {"rotate": recipe.rotate or None},
        said=lambda recipe: " rotated" if recipe.rotate else "",
        idle=conflicts.beside_file,
    ),
    Option(
        "granularity", choice("granularity", GRANULARITIES),
        "What shares a scale: group, the type's own; or channel, a whole row, as in some papers.",
        EXPERIMENTS,
        identity=lambda recipe: {"granularity": None if recipe.granularity == "group" else recipe.granularity},
        said=lambda recipe: " per channel" if recipe.granularity == "channel" else "",
        idle=conflicts.beside_file,
    ),
    Option(
        "activations", choice("rounding of activations", SCHEMES),
        f"Learn for activations rounded so: {_listed(SCHEMES)}. The runtime rounds them in its own way; "
        "eval --simulate measures the file with this one.",
        EXPERIMENTS, identity=_scheme,
        said=lambda recipe: f", activations {recipe.scheme}" if recipe.scheme.rounds else "",
    ),
    Option(
        "kv_bits", optional(readers.key_value_bits),
        f"Learn for keys and values of so many bits: {_listed(KEY_VALUE_BITS)}.",
        EXPERIMENTS, kind=int, unset="not rounded", identity=_scheme,
    ),
    Option(
        "rank", optional(at_least(1)), "Rank of lrq's scaling matrices.",
        EXPERIMENTS, kind=int, unset="a quarter of the model's width, as in the paper",
        idle=conflicts.of_another_method("rank"), identity=lambda recipe: {"rank": recipe.rank},
        metadata=lambda recipe: {"rank": recipe.rank},
    ),
    Option(
        "parts", choice("part of PTQ1.61", PARTS),
        "How much of ptq161 is done, for its ablation: mask, scales (mask and learned scales), or cosine, all of it.",
        EXPERIMENTS, idle=conflicts.of_another_method("parts"), identity=lambda recipe: {"parts": _parts(recipe)},
        metadata=lambda recipe: {"parts": _parts(recipe)},
    ),
    Option(
        "preprocess", optional(text),
        "Quantise once, let low-rank adapters learn this text, and quantise the result (needs peft).",
        EXPERIMENTS, metavar=_WORDS,
        metadata=lambda recipe: {"preprocess": Path(recipe.preprocess).name if recipe.preprocess else None},
        said=lambda recipe: ", preprocessed" if recipe.preprocess else "",
        idle=conflicts.beside_file,
    ),
    Option(
        "preprocess_steps", optional(at_least(1)), "Steps of that, in place of the preset's.",
        EXPERIMENTS, kind=int, clash=conflicts.preprocess_steps,
        metadata=lambda recipe: {"preprocess_steps": recipe.preprocessing_steps if recipe.preprocess else None},
    ),
    Option(
        "codebooks", choice("kind of codebooks", CODEBOOKS),
        f"Codebooks of {_listed(WITH_CODEBOOKS)}: universal, or model, designed from this model and put into the file.",
        LEARN, idle=conflicts.first(conflicts.without_codebooks, conflicts.beside_file),
        identity=lambda recipe: {"codebooks": None if recipe.codebooks == "universal" else recipe.codebooks},
        said=lambda recipe: ", codebooks of its own" if recipe.codebooks == "model" else "",
    ),
    Option(
        "finish", choice("finish", FINISHES),
        "A last pass: distill lets scales and norms of the whole model learn from its full-precision answers.",
        LEARN, clash=conflicts.finish, idle=conflicts.without_learning,
        said=lambda recipe: "" if recipe.finish == "none" else f", {recipe.finish}",
    ),
    Option(
        "finish_steps", optional(at_least(1)), "Steps of that, in place of the preset's.",
        LEARN, kind=int, clash=conflicts.finish_steps,
    ),
)  # fmt: skip

OPTIONS = {option.name: option for option in _OPTIONS}
"""The options by name."""


def refuse_conflicts(recipe: Recipe, given: Set[str]) -> None:
    """Refuse options that contradict each other, or that would be ignored.

    Args:
        recipe: its fields are read.
        given: names of the fields that the user gave.

    Raises:
        UsageError: naming the first that is found.
    """
    options = [option for option in _OPTIONS if option.name in given]
    judged = [option for option in options if recipe.learns or option.always]
    for option in judged:
        if message := option.clash(recipe):
            raise UsageError(message)
    for option in options:
        reason = option.idle(recipe) if option in judged else f"{spelled('type')} {recipe.type} learns nothing"
        if reason:
            raise UsageError(f"{reason}: {spelled(option.name)} has no meaning there")


def identity_of(recipe: Recipe) -> dict[str, object]:
    """Return what of a recipe decides what blocks learn, JSON-ready, beside the types of the matrices."""
    return {key: value for option in _OPTIONS for key, value in option.identity(recipe).items()}


def settings_of(recipe: Recipe) -> dict[str, object]:
    """Return the settings that a file names, JSON-ready."""
    settings: dict[str, object] = {"preset": recipe.preset, **asdict(recipe.settings), "seed": recipe.seed}
    own = {key: value for option in _OPTIONS for key, value in option.metadata(recipe).items()}
    return settings | {key: value for key, value in own.items() if value is not None}


def command_of(recipe: Recipe) -> list[str]:
    """Return the words of the command that makes the file again, with names of files in place of their paths.

    The output is called out.gguf, whatever it was called, and what does not change the file is left out.
    """
    runner = ["torchrun", f"--nproc-per-node={recipe.processes}", "-m"] if recipe.processes > 1 else []
    program = "tesseraq_gguf" if runner else "tesseraq-gguf"
    words = [*runner, program, "convert", _without_folder(recipe.model), "out.gguf"]
    for name in recipe.chosen():
        option = OPTIONS[name]
        if option.group and not option.beside:
            words += _as_words(option, getattr(recipe, name))
    return words


def _as_words(option: Option, value: Any) -> list[str]:
    name = as_option(option.name)
    if option.kind is bool:
        return [name]
    if option.many:
        return [word for pattern, type in value for word in (name, f"{pattern}={type}")]
    if isinstance(value, tuple):
        return [name, ",".join(value)]
    if isinstance(value, Path):
        return [name, value.name]
    start, mark, rest = str(value).partition(readers.FROM_FILE)
    return [name, f"{start}{mark}{_without_folder(rest)}" if mark else _without_folder(str(value))]


def _without_folder(given: str) -> str:
    """A path's last part; what is no path, such as a name on the hub, stays."""
    return Path(given).name if Path(given).exists() else given


def said_of(recipe: Recipe) -> str:
    """Return the line in which a file says how it was made."""
    return "".join(option.said(recipe) for option in _OPTIONS)
