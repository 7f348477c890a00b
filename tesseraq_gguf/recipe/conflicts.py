"""What options contradict, and where they would be ignored: one small function for each reason. No torch.

A function is asked of an option that the user gave. It returns None where nothing is wrong. What it returns else is a
whole message for a contradiction, and the first half of one, the reason, for what would be ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tesseraq_gguf.arguments import spelled
from tesseraq_gguf.gguf_files.parts import SUFFIX, part_of
from tesseraq_gguf.methods.table import METHODS
from tesseraq_gguf.recipe.readers import AUTO
from tesseraq_gguf.types.facts import ORDERED_TYPES, TENSOR_TYPES, WITH_CODEBOOKS, tensor_type

if TYPE_CHECKING:
    from tesseraq_gguf.recipe.recipe import Recipe

Judge = Callable[["Recipe"], str | None]
"""Says what is wrong with an option in a recipe, if anything is."""


def nothing(_: Recipe) -> None:
    """Find nothing wrong."""


# --- contradictions -------------------------------------------------------------------------------------------------


def two_budgets(recipe: Recipe) -> str | None:
    """Bits per weight and bytes cannot both decide."""
    if recipe.target_bpw is None or recipe.target_size is None:
        return None
    return f"{spelled('target_bpw')} and {spelled('target_size')} are two budgets: give one"


def type_beside_budget(recipe: Recipe) -> str | None:
    """One type for all leaves nothing to choose."""
    if not recipe.budgeted:
        return None
    if recipe.mix:
        return f"{spelled('type')} {recipe.type} chooses types, and so does a target: give one of them"
    return (
        f"{spelled('type')} gives all matrices one type, a target chooses among {spelled('candidates')}: "
        "give one of them"
    )


def embedding_type(recipe: Recipe) -> str | None:
    """The type of the embedding is chosen within bytes alone, has no order, and can be learned only with others."""
    if recipe.embedding_type == AUTO and recipe.target_size is None and recipe.mix is None:
        return f"the type of the embedding can be chosen with {spelled('target_size')} only, or is a mix's: name one"
    return _outside({"embedding_type": recipe.embedding_type}, recipe)


def output_type(recipe: Recipe) -> str | None:
    """The output matrix has no order, and can be learned only with others."""
    return _outside({"output_type": recipe.output_type}, recipe)


def rules(recipe: Recipe) -> str | None:
    """Rules cannot have something learned where nothing is."""
    return None if recipe.learns else _unlearned({f"{spelled('rules')} {p}": type for p, type in recipe.rules}, recipe)


def finish(recipe: Recipe) -> str | None:
    """The last pass knows neither rounded activations nor scales of rows."""
    if recipe.finish == "none":
        return None
    if recipe.scheme.rounds:
        return f"{spelled('finish')} learns with activations as they are: it is not possible with rounded ones"
    if recipe.granularity == "channel":
        return (
            f"{spelled('finish')} moves the scale of every group: it is not possible with "
            f"{spelled('granularity')} channel"
        )
    return None


def finish_steps(recipe: Recipe) -> str | None:
    """Steps of a last pass want one."""
    return f"{spelled('finish_steps')} must go with {spelled('finish')} distill" if recipe.finish == "none" else None


def preprocess_steps(recipe: Recipe) -> str | None:
    """Steps of preprocessing want a text."""
    if recipe.preprocess is not None:
        return None
    return f"{spelled('preprocess_steps')} must go with {spelled('preprocess')} TEXT"


def projector(recipe: Recipe) -> str | None:
    """A projector is a file of its own."""
    if recipe.mmproj is None or recipe.mmproj.absolute() != Path(recipe.out).absolute():
        return None
    return f"{spelled('mmproj')} {recipe.mmproj} is the output itself: name another file"


def imatrix(recipe: Recipe) -> str | None:
    """An importance matrix knows channels as they are, in their own order."""
    if recipe.rotate:
        return f"{spelled('rotate')} mixes the channels that {spelled('imatrix')} tells apart: give one of them"
    found = next((type for type in ORDERED_TYPES if type in _types(recipe)), None)
    return f"{spelled('imatrix')} cannot be given with {found}, which orders columns by itself" if found else None


def write_imatrix(recipe: Recipe) -> str | None:
    """An importance matrix is a file of its own."""
    if recipe.write_imatrix is None or recipe.write_imatrix.absolute() != Path(recipe.out).absolute():
        return None
    return f"{spelled('write_imatrix')} {recipe.write_imatrix} is the output itself: name another file"


def split(recipe: Recipe) -> str | None:
    """Parts are named after the output."""
    out = Path(recipe.out)
    if recipe.split is None or (out.suffix in ("", SUFFIX) and part_of(out.name) is None):
        return None
    return f"with {spelled('split')} parts are named after the output: give it a name such as model{SUFFIX}"


def without_order(type: str) -> str:
    """Say that embedding and output matrix cannot have a type."""
    return f"{type} is for matrices in the blocks: columns of the embedding have no order"


def _outside(named: Mapping[str, str | None], recipe: Recipe) -> str | None:
    """What is wrong with types outside the blocks, by the option that names them."""
    ordered = next((type for type in named.values() if type in ORDERED_TYPES), None)
    if ordered:
        return without_order(ordered)
    return None if recipe.learns else _unlearned({spelled(name): type for name, type in named.items()}, recipe)


def _unlearned(wanted: Mapping[str, str | None], recipe: Recipe) -> str | None:
    for what, type in wanted.items():
        if type is not None and not tensor_type(type).plain:
            plain = ", ".join(t.name for t in TENSOR_TYPES.values() if t.plain)
            return (
                f"{what}: '{type}' can only be learned, and with {spelled('type')} {recipe.type} nothing is: "
                f"choose one of {plain}"
            )
    return None


# --- what would be ignored ------------------------------------------------------------------------------------------


def without_target(recipe: Recipe) -> str | None:
    """Candidates are for a budget."""
    return None if recipe.budgeted else "there is no target to choose types for"


def without_hub(recipe: Recipe) -> str | None:
    """A token is for models that are downloaded from the hub."""
    here = recipe.model.partition(":")[0] == "demo" or Path(recipe.model).exists()
    return f"{recipe.model} is not downloaded from the hub" if here else None


def without_projector(recipe: Recipe) -> str | None:
    """A type is for a projector that is written."""
    return None if recipe.mmproj else "no projector is written"


def without_start(recipe: Recipe) -> str | None:
    """A start is for methods that learn the rounding from one."""
    row = recipe.method_row
    if row.begins:
        return None
    return f"{_method(recipe)} knows one way" if row.calibrates else _learns_nothing(recipe)


def beside_file(recipe: Recipe) -> str | None:
    """A file to begin at has its types, its scales and its columns as they are."""
    return f"a file to begin at ({spelled('init')}) has types and scales" if recipe.start_file else None


def first(*judges: Judge) -> Judge:
    """Return what says the first thing that one of some judges finds wrong."""
    return lambda recipe: next((said for judge in judges if (said := judge(recipe))), None)


def without_learning(recipe: Recipe) -> str | None:
    """The last pass is for what was learned."""
    return None if recipe.method_row.calibrates else _learns_nothing(recipe)


def without_calibration(recipe: Recipe) -> str | None:
    """Text is for methods and schemes that look at it."""
    return None if recipe.calibrates else f"{_method(recipe)} uses no calibration"


def with_calibration(recipe: Recipe) -> str | None:
    """An importance matrix is for what looks at no text, which says more."""
    if not recipe.method_row.calibrates:
        return None
    return f"{_method(recipe)} learns from calibration text, which says more (rtn rounds with an importance matrix)"


def without_sequences(recipe: Recipe) -> str | None:
    """Preprocessing takes sequences of the same length."""
    return None if recipe.preprocess else without_calibration(recipe)


def without_preset(recipe: Recipe) -> str | None:
    """Preprocessing takes its steps from the preset."""
    if recipe.preprocess:
        return None
    return without_calibration(recipe) or without_learning(recipe)


def without_codebooks(recipe: Recipe) -> str | None:
    """Codebooks are for types that have any."""
    if _types(recipe) & set(WITH_CODEBOOKS):
        return None
    chosen = f"none of {', '.join(recipe.candidates)}" if recipe.budgeted else f"not {recipe.type}"
    return f"{', '.join(WITH_CODEBOOKS)} have codebooks, {chosen}"


def _types(recipe: Recipe) -> set[str | None]:
    """Types that a recipe names."""
    inside = recipe.candidates if recipe.budgeted else (recipe.type,)
    return {*inside, recipe.embedding_type, recipe.output_type, *(type for _, type in recipe.rules)}


def of_another_method(name: str) -> Judge:
    """Return what finds that an option belongs to another method, as the table of methods says."""

    def judge(recipe: Recipe) -> str | None:
        owner = next(row for row in METHODS.values() if name in row.options)
        if owner.name == recipe.method:
            return None
        alone = f"{spelled(name)} {'are' if name.endswith('s') else 'is'} {owner.name}'s alone"
        return (without_start(recipe) if owner.begins else None) or alone

    return judge


def _method(recipe: Recipe) -> str:
    return f"{spelled('method')} {recipe.method}"


def _learns_nothing(recipe: Recipe) -> str:
    return f"{_method(recipe)} learns nothing"
