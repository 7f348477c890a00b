"""The rows of the quality table as data: how a file is made, and what its block matrices must be.

Commands are templates. `{out}` is the file to make; the other names in braces are things that several rows share
(`places.py` makes them): models, importance matrices, texts, tokens, programs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tesseraq_gguf.methods.table import METHODS, STARTS
from tesseraq_gguf.recipe.readers import STOCK
from tesseraq_gguf.types.facts import ORDERED_TYPES, names
from tesseraq_gguf.types.grids import grid_of

OURS, LLAMA_CPP, AUTOROUND, REFERENCE = "ours", "llama-quantize", "AutoRound", "16 bits"
FAMILIES = (REFERENCE, OURS, LLAMA_CPP, AUTOROUND)

TYPES, ROUNDING, PTQ161, ACTIVATIONS, FILES = "types", "rounding", "ptq161", "activations", "files"
"""Studies: what a type of some size can do, ours and theirs; how rounding is learned, by what it generalises to; what
the parts of PTQ1.61 bring, one after the other; what is left with activations of few bits; and files as users make
them, by their whole size."""

Command = tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One file to make and measure.

    Attributes:
        name: what it is called in `--rows` and among the results.
        family: whose work it is.
        method: how it was quantised, as the table says it.
        type: type that every matrix of the blocks must have; None if the tool mixes types.
        padded: whether the model's rows were padded to a multiple of 256.
        commands: what makes the file.
        bits: bits per weight, if the file does not tell.
        note: what a reader must know.
        study: which table it stands in. Rows of `ROUNDING` learn on four fifths of the calibration text and are
            measured on the rest of it as well.
        rank: of LRQ's scaling matrices, as a share 1/n of the model's width: n. None for other methods.
        samples: calibration sequences, where the study says so.
        scheme: how activations are rounded in the measurement, which torch then makes; None leaves it to llama.cpp.
        mix: what the tool calls the types of the file, where matrices may have different ones.
    """

    name: str
    family: str
    method: str
    type: str | None
    padded: bool
    commands: tuple[Command, ...]
    bits: float | None = None
    note: str = ""
    study: str = TYPES
    rank: int | None = None
    samples: int | None = None
    scheme: str | None = None
    mix: str = ""

    def filled(self, places: Mapping[str, object]) -> list[list[str]]:
        """Return the commands with every name in braces replaced."""
        return [[word.format_map(places) for word in command] for command in self.commands]


CUSTOM_TYPES = names(lambda t: t.custom and not t.ordered)
STAND_INS = ("q5_0", "q5_1")
"""Types that rows get which q4_k and q5_k do not divide, and that nobody asks for."""

STOCK_TYPES = names(lambda t: t.family and not t.custom and t.name not in STAND_INS)
(ONE_BIT_TYPE,) = ORDERED_TYPES
METHOD_NAMES = {name: row.title for name, row in METHODS.items()}
REFINED_TYPES = ("q2_k", "iq3_xxs")
"""Types of llama-quantize's files that are improved in place."""

SEEDED_TYPES = ("tsq2", "bcq2")
"""Types of 2.25 bits that are learned with three seeds; rows that name none have seed 0."""

ROUNDING_SAMPLES = 512
"""Calibration sequences of the study of rounding, where it does not vary them."""

RANKS = (16, 8, 4, 2)
"""Ranks of the same, as shares of the model's width: a sixteenth to a half."""

# what `--pure` is told, by the type that comes of it: the file type IQ2_S is made of iq2_xs, IQ2_M of iq2_s
LLAMA_TYPES = {
    "q1_0": "Q1_0",
    "iq1_s": "IQ1_S",
    "tq1_0": "TQ1_0",
    "iq1_m": "IQ1_M",
    "iq2_xxs": "IQ2_XXS",
    "iq2_xs": "IQ2_XS",
    "iq2_s": "IQ2_M",
    "q2_k": "Q2_K",
    "iq3_xxs": "IQ3_XXS",
    "q3_k": "Q3_K",
    "q4_0": "Q4_0",
    "q4_k": "Q4_K",
    "iq4_xs": "IQ4_XS",
    "iq4_nl": "IQ4_NL",
    "mxfp4": "MXFP4_MOE",
    "q5_k": "Q5_K",
    "q6_k": "Q6_K",
    "q8_0": "Q8_0",
}
LLAMA_MIXES = (
    "IQ2_XXS", "IQ2_M", "Q2_K_S", "Q2_K", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_K_S", "Q4_K_M",
)  # fmt: skip
"""What llama-quantize is told where files are compared by their whole size."""

NAMED_MIXES = ("Q2_K_S", "Q3_K_M", "Q4_K_M", "IQ2_M", "IQ3_XXS")
"""Mixes that are learned as well."""

_LEARNED = (
    ("gptq", "GPTQ", ("--method", "gptq")),
    ("qep", "QEP+GPTQ", ("--method", "qep")),
    ("tesseraq-awq", "TesseraQ from AWQ", ("--method", "tesseraq", "--init", "awq")),
)
"""Ends of names of rows, methods as tables say them, and as the program does."""

FILE_TYPES = ("tsq2", "bcq2", "tsq3", "tsq4", "q2_k", "q3_k", "q4_0", "q4_k", "iq4_nl")
"""Types of our own rows there."""

AUTOROUND_BITS = 2 + (16 + 2) / 64
"""2-bit codes, and for each group of 64 a scale of 16 bits and a zero-point of 2."""


_FORMER_PASS = "its last pass is the former one, which compared a quarter of the positions of 8 sequences in a step"
_MIXED = "the calibration text and 131,072 tokens of the model's own (`tesseraq-gguf write-text`)"


# of a model that came quantised: the types that lose nothing of it
_HOLD_THE_LEVELS_OF = {"q4_1": ("q4_1", "q5_1")}


def all_rows() -> list[Row]:
    """Return every row, in the order in which they are measured."""
    return [
        *_references(), *_llama_rows(), *_autoround_rows(), *_our_rows(), *_refined_rows(), *_one_bit_rows(),
        *_mix_rows(), *_budget_rows(),
        *_rounding_rows(), *_ptq161_rows(), *_activation_rows(),
    ]  # fmt: skip


def file_rows(samples: int | None = None, sizes: Sequence[str] = (), came_as: str = "") -> list[Row]:
    """Return the rows of a model that files are compared on by their whole size, in the order of measuring.

    Args:
        samples: calibration sequences of a model that is too large for the preset's.
        sizes: of files whose types are chosen, as `--target-size` takes them.
        came_as: the type whose levels the model's weights are on; no type that has them is a candidate then.
    """
    return [
        Row("reference", REFERENCE, "none", None, False, (("cp", "{plain_f16}", "{out}"),), study=FILES, mix="F16"),
        *(_file_of_llama(mix) for mix in LLAMA_MIXES),
        *(row for type in FILE_TYPES for row in _files_of_ours(type, type.upper(), samples)),
        *(row for mix in NAMED_MIXES for row in _files_of_ours(f"mix:{mix.lower()}", mix, samples)),
        *(row for size in sizes for row in _files_of_a_size(size, samples, came_as)),
    ]


def _file_of_llama(mix: str) -> Row:
    command = ("{quantize}", "--imatrix", "{plain_imatrix}", "{plain_f16}", "{out}", mix, "{threads}")
    return Row(f"llama-{mix.lower()}", LLAMA_CPP, "imatrix", None, False, (command,), study=FILES, mix=mix)


def _files_of_ours(type: str, title_of_types: str, samples: int | None) -> Iterator[Row]:
    learning, mixed = _learning(samples), type.startswith("mix:")
    # a mix names the embedding's type too
    types = ("--type", type) if mixed else ("--type", type, "--embedding-type", "q8_0")
    learned = ((name, title, (*options, *learning)) for name, title, options in _LEARNED)
    for name, title, options in (("rtn", "RTN", ("--method", "rtn")), *learned):
        commands = (("{cli}", "convert", "{plain_model}", "{out}", *types, *options),)
        row = f"ours-{type.replace(':', '-')}-{name}"
        yield Row(row, OURS, title, None, False, commands, study=FILES, mix=title_of_types)


def _files_of_a_size(size: str, samples: int | None, came_as: str) -> Iterator[Row]:
    left_out = _HOLD_THE_LEVELS_OF.get(came_as, ())
    candidates = ",".join(type for type in STOCK if type not in left_out)
    for name, title, options in _LEARNED:
        command = (
            "{cli}", "convert", "{plain_model}", "{out}", "--target-size", size, "--candidates", candidates, *options,
            *_learning(samples),
        )  # fmt: skip
        row = f"ours-size-{size.lower()}-{name}"
        note = f"types chosen among all stock types but {' and '.join(left_out)}" if left_out else ""
        yield Row(row, OURS, title, None, False, (command,), study=FILES, mix=f"chosen for {size}", note=note)


def _learning(samples: int | None) -> tuple[str, ...]:
    fewer = ("--samples", str(samples)) if samples else ()
    return ("--preset", "{preset}", "--calibration", "{calibration}", *fewer)


def _references() -> Iterator[Row]:
    yield Row("reference", REFERENCE, "none", "f16", False, (("cp", "{plain_reference}", "{out}"),))
    note = "the same model with padded rows: its distance from the row above is the noise of the measurement"
    yield Row("reference-padded", REFERENCE, "none", "f16", True, (("cp", "{padded_reference}", "{out}"),), note=note)


def _llama_rows() -> Iterator[Row]:
    def row(name: str, type: str, padded: bool, note: str = "", mixed: bool = False) -> Row:
        model = "padded" if padded else "plain"
        matrix = f"{{{model}_imatrix{'_mixed' if mixed else ''}}}"
        command = (
            "{quantize}", "--pure", "--imatrix", matrix, "--token-embedding-type", "q8_0",
            f"{{{model}_f16}}", "{out}", LLAMA_TYPES[type], "{threads}",
        )  # fmt: skip
        method = f"imatrix{', own text too' if mixed else ''}"
        return Row(name, LLAMA_CPP, method, type, padded, (command,), note=note)

    for type in LLAMA_TYPES:
        yield row(f"llama-{type}", type, True)
    yield row(
        "llama-iq3_xxs-own", "iq3_xxs", True, f"its importance matrix is of {_MIXED}, the whole of it", mixed=True
    )
    yield row("llama-q4_0-plain", "q4_0", False, "unpadded: its blocks of 32 fit rows of 640")


def _autoround_rows() -> Iterator[Row]:
    learn = ("{autoround}", "{autoround_script}")
    own, last = ("--llama-cpp", "{llama_cpp}"), ("--iters", "{iters}", "--threads", "{threads}")
    yield Row(
        "autoround-w2g64", AUTOROUND, "W2, groups of 64, asymmetric", "f16", False,
        (
            (*learn, "{plain_folder}", "{out}.folder", "{tokens}", "--format", "fake", *last),
            ("{cli}", "convert", "{out}.folder", "{out}", "--type", "f16", "--embedding-type", "q8_0"),
        ),
        bits=AUTOROUND_BITS,
        note="its dequantised weights, written in 16 bits; no GGUF type holds them",
    )  # fmt: skip
    for mix in ("q2_k_s", "q4_k_m"):
        yield Row(
            f"autoround-{mix}", AUTOROUND, f"its export to {mix.upper()}", None, True,
            ((*learn, "{padded_folder}", "{out}", "{tokens}", "--format", f"gguf:{mix}", *own, *last),),
            note="types of the matrices are its own choice",
        )  # fmt: skip


def _our_rows() -> Iterator[Row]:
    for type in (*CUSTOM_TYPES, *STOCK_TYPES):
        padded = type.endswith("_k") or type.startswith("iq")  # as llama-quantize's are, most of whose blocks need it

        def row(name: str, method: str, *options: str, type: str = type, padded: bool = padded, note: str = "") -> Row:
            model = "{padded_f16}" if padded else "{plain_model}"
            command = ("{cli}", "convert", model, "{out}", "--type", type, "--embedding-type", "q8_0", *options)
            return Row(f"ours-{type}-{name}", OURS, method, type, padded, (command,), note=note)

        learning = ("--preset", "{preset}", "--calibration", "{calibration}")
        codebooks = type.startswith("bcq")
        yield row("rtn", "LO-BCQ" if codebooks else "RTN", "--method", "rtn")
        if codebooks:
            yield row("rtn-model", "LO-BCQ, the model's own codebooks", "--method", "rtn", "--codebooks", "model")
        starts = [start for start in STARTS.values() if start.needs != "uniform" or grid_of(type).uniform]
        for start in (start for start in starts if start.name != "none"):
            yield row(start.name.replace("+", "-"), start.title, "--method", start.name, *learning)
        for start in starts:
            title = "TesseraQ" if start.name == "none" else f"TesseraQ from {start.title}"
            name = f"tesseraq-{start.name.replace('+', '-')}"
            yield row(name, title, "--method", "tesseraq", "--init", start.name, *learning)
        if type in SEEDED_TYPES:  # what is chance, where types of one size are compared
            for seed in ("1", "2"):
                title, begun = f"TesseraQ from AWQ, seed {seed}", ("--method", "tesseraq", "--init", "awq")
                yield row(f"tesseraq-awq-seed{seed}", title, *begun, "--seed", seed, *learning)
        if type in ("tsq2", "tsq3", "tsq4"):
            learn = ("--method", "flexround", "--init", "awq")
            yield row("flexround-awq", "FlexRound from AWQ", *learn, *learning)
            yield row("flexround-distill", "FlexRound from AWQ, distilled", *learn, "--finish", "distill", *learning)
        # a row names what it begins at: it must not change with `--init auto`
        begun = ("--method", "tesseraq", "--init", "gptq")
        finish = (*begun, "--finish", "distill")
        yield row("tesseraq-distill", "TesseraQ from GPTQ, distilled", *finish, *learning)
        if type == "tsq2":  # the default preset, to show what more learning buys
            more = ("--preset", "balanced", "--calibration", "{calibration}")
            yield row("balanced", "TesseraQ from GPTQ, `balanced`", *begun, *more)
            # as many sequences as a text of 386 leaves to learn on when a last pass holds some out
            note = "its blocks are those of the row that adds “distilled” to it, before the last pass"
            title = "TesseraQ from GPTQ, `balanced`, 363 sequences"
            yield row("balanced-363", title, *begun, *more, "--samples", "363", note=note)
            title = "TesseraQ from GPTQ, `balanced`, distilled"
            yield row("balanced-distill", title, *finish, *more)
            from_awq = ("--method", "tesseraq", "--init", "awq", "--finish", "distill")
            yield row("balanced-awq-distill", "TesseraQ from AWQ, `balanced`, distilled", *from_awq, *more)
            mixed = ("--preset", "balanced", "--calibration", "{mixed_text}", "--samples", "1024")
            title = "TesseraQ from GPTQ, `balanced`, own text too, distilled"
            yield row("own-distill", title, *finish, *mixed, note=f"learned on {_MIXED}")
            yield row(
                "own-awq-distill", "TesseraQ from AWQ, `balanced`, own text too, distilled",
                *from_awq, *mixed, note=f"learned on {_MIXED}; {_FORMER_PASS}",
            )  # fmt: skip
            most = ("--preset", "balanced", "--calibration", "{more_mixed_text}", "--samples", "2048")
            title = "TesseraQ from GPTQ, `balanced`, much own text, distilled for long"
            note = "learned on the calibration text and 393,216 tokens of the model's own, of three seeds"
            note += f"; {_FORMER_PASS}"
            yield row("own-long-distill", title, *finish, "--finish-steps", "300", *most, note=note)
            note = "learned when `balanced` had 20 × 25 steps of 4 sequences and a last pass of 80"
            flexround = ("--method", "flexround", "--init", "awq", "--finish", "distill")
            yield row(
                "flexround-balanced-distill", "FlexRound from AWQ, `balanced`, distilled", *flexround, *more, note=note
            )


def _refined_rows() -> Iterator[Row]:
    """Files of llama-quantize's, whose codes then move."""
    for type in REFINED_TYPES:
        quantise = (
            "{quantize}", "--pure", "--imatrix", "{padded_imatrix}", "--token-embedding-type", "q8_0",
            "{padded_f16}", "{out}.start.gguf", LLAMA_TYPES[type], "{threads}",
        )  # fmt: skip
        refine = (
            "{cli}", "convert", "{padded_f16}", "{out}", "--init", "file:{out}.start.gguf", "--preset", "{preset}",
            "--calibration", "{calibration}",
        )  # fmt: skip
        title = "TesseraQ from llama-quantize's file"
        yield Row(f"ours-{type}-refined", OURS, title, type, True, (quantise, refine))


def _mix_rows() -> Iterator[Row]:
    """Mixes of llama-quantize's, by its name for them, of the padded model: theirs and ours."""
    for mix in NAMED_MIXES:
        name = mix.lower()
        quantise = (
            "{quantize}", "--imatrix", "{padded_imatrix}", "--token-embedding-type", "q8_0", "{padded_f16}", "{out}",
            mix, "{threads}",
        )  # fmt: skip
        yield Row(f"llama-mix-{name}", LLAMA_CPP, "imatrix", None, True, (quantise,), mix=f"mix {mix}")
        convert = (
            "{cli}", "convert", "{padded_f16}", "{out}", "--type", f"mix:{name}", "--embedding-type", "q8_0",
            "--preset", "{preset}", "--calibration", "{calibration}",
        )  # fmt: skip
        for end, title, options in _LEARNED:
            yield Row(f"ours-mix-{name}-{end}", OURS, title, None, True, ((*convert, *options),), mix=f"mix {mix}")


def _ptq1_61(name: str, title: str, *options: str, study: str = TYPES, note: str = "") -> Row:
    command = ("{cli}", "convert", "{plain_model}", "{out}", "--type", ONE_BIT_TYPE, "--embedding-type", "q8_0")
    if "rtn" not in options:
        options += ("--preset", "{preset}", "--calibration", "{calibration}")
    return Row(name, OURS, title, ONE_BIT_TYPE, False, ((*command, *options),), study=study, note=note)


def _one_bit_rows() -> Iterator[Row]:
    """PTQ1_61 by the paper's method, and by those that go beyond it: they learn signs and 4-bit codes too."""
    for method in ("rtn", "gptq", "ptq161"):
        yield _ptq1_61(f"ours-{ONE_BIT_TYPE}-{method}", METHOD_NAMES[method], "--method", method)
    for start in ("gptq", "awq"):
        learn = ("--method", "tesseraq", "--init", start)
        yield _ptq1_61(f"ours-{ONE_BIT_TYPE}-tesseraq-{start}", f"TesseraQ from {METHOD_NAMES[start]}", *learn)
    distilled = ("--method", "tesseraq", "--init", "gptq", "--finish", "distill")
    yield _ptq1_61(f"ours-{ONE_BIT_TYPE}-tesseraq-distill", "TesseraQ from GPTQ, distilled", *distilled)


def _ptq161_rows() -> Iterator[Row]:
    """The paper's ablation: each row does what the one before does, and one thing more."""
    for name, title, options in (
        ("mask", "mask", ("--parts", "mask")),
        ("scales", "+ learned scales", ("--parts", "scales")),
        ("cosine", "+ cosine in the loss", ("--parts", "cosine")),
        ("preprocess", "+ preprocessing", ("--parts", "cosine", "--preprocess", "{calibration}")),
    ):
        yield _ptq1_61(f"ptq161-{name}", title, "--method", "ptq161", *options, study=PTQ161)


def _budget_rows() -> Iterator[Row]:
    """Types chosen within a budget, against one type for all: their rounding is GPTQ's, as cheap as it is good."""
    for bits in ("2.75",):
        command = ("{cli}", "convert", "{plain_model}", "{out}", "--target-bpw", bits, "--embedding-type", "q8_0",
                   "--method", "gptq", "--preset", "{preset}", "--calibration", "{calibration}")  # fmt: skip
        note = "types chosen among TSQ2, TSQ3 and TSQ4 by what each matrix costs the model's answers"
        yield Row(f"ours-budget-{bits}-gptq", OURS, f"GPTQ, `--target-bpw {bits}`", None, False, (command,), note=note)


def _rounding_rows() -> Iterator[Row]:
    """LRQ against FlexRound, TesseraQ and what they begin at: same type, same text, same number of steps."""

    def row(type: str, method: str, *, init: str = "", rank: int | None = None, samples: int = ROUNDING_SAMPLES) -> Row:
        name = f"rounding-{type}-{method}"
        command = ("{cli}", "convert", "{plain_model}", "{out}", "--type", type, "--embedding-type", "q8_0",
                   "--method", method, *(("--init", init) if init else ()))  # fmt: skip
        if method != "rtn":
            command += ("--preset", "{preset}", "--calibration", "{learned_text}")
            command += ("--samples", str(samples), "--seqlen", "128")
        if rank:
            command += ("--rank", f"{{width_{rank}th}}")
            name += f"-rank{rank}"
        if samples != ROUNDING_SAMPLES:
            name += f"-{samples}"
        title = METHOD_NAMES[method]
        if init not in ("", "none"):
            name += f"-{init}"
            title += f" from {METHOD_NAMES[init]}"
        return Row(name, OURS, title, type, False, (command,), study=ROUNDING, rank=rank, samples=samples)

    for type in ("tsq3", "tsq4", "q4_0"):
        for method in ("rtn", "awq", "gptq"):
            yield row(type, method)
        for init in ("none", "gptq", "awq"):  # the papers', and ours
            yield row(type, "lrq", init=init, rank=4)
            yield row(type, "flexround", init=init)
        for init in ("gptq", "awq"):
            yield row(type, "tesseraq", init=init)
    for rank in RANKS:
        if rank != 4:  # is among the rows above
            yield row("tsq3", "lrq", init="none", rank=rank)
    for samples in (8, 32, 128):
        yield row("tsq3", "awq", samples=samples)
        yield row("tsq3", "lrq", init="none", rank=4, samples=samples)
        yield row("tsq3", "flexround", init="none", samples=samples)
        yield row("tsq3", "tesseraq", init="gptq", samples=samples)


def _activation_rows() -> Iterator[Row]:
    """W4A4 and W3A3: rounding alone, what brings it into shape, and TesseraQ, which learns with activations rounded."""
    learning = ("--preset", "{preset}", "--calibration", "{calibration}")
    learned = ("--method", "tesseraq", "--rotate", "--activations")
    for type, scheme in (("tsq4", "a4"), ("tsq3", "a3")):
        for name, title, options in (
            ("rtn", "RTN", ("--method", "rtn")),
            ("awq", "AWQ", ("--method", "awq", *learning)),
            (
                "rotated",
                "rotation, RTN",
                ("--method", "rtn", "--rotate", "--samples", "8", "--calibration", "{calibration}"),
            ),
            ("rotated-gptq", "rotation, GPTQ", ("--method", "gptq", "--rotate", *learning)),
            ("start", "rotation, AWQ+GPTQ", ("--method", "awq+gptq", "--rotate", "--activations", scheme, *learning)),
            ("tesseraq", "rotation, TesseraQ from AWQ+GPTQ", (*learned, scheme, "--init", "awq+gptq", *learning)),
        ):
            command = (
                "{cli}",
                "convert",
                "{plain_model}",
                "{out}",
                "--type",
                type,
                "--embedding-type",
                "q8_0",
                *options,
            )
            yield Row(f"{scheme}-{name}", OURS, title, type, False, (command,), study=ACTIVATIONS, scheme=scheme)
