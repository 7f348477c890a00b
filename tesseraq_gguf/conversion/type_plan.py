"""Which tensor type every matrix gets: as asked, and as its rows and llama.cpp's converter allow."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from tesseraq_gguf.arguments import spelled
from tesseraq_gguf.conversion import mix
from tesseraq_gguf.converter.plain_types import EMBEDDINGS, OUTPUT, fitting_type
from tesseraq_gguf.converter.writer import FileMatrix, SourceCheck, check_source, files_matrices
from tesseraq_gguf.errors import ModelError, TesseraqError, UsageError
from tesseraq_gguf.gguf_files.factors import bytes_of_factor
from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.learning.bit_budget import bytes_of
from tesseraq_gguf.methods.table import start_row
from tesseraq_gguf.models import Decoder, ModelSource
from tesseraq_gguf.models.experts import stack_of
from tesseraq_gguf.models.speculation import head_matrices
from tesseraq_gguf.models.weights import open_checkpoint
from tesseraq_gguf.recipe.conflicts import without_order
from tesseraq_gguf.recipe.readers import AUTO
from tesseraq_gguf.recipe.recipe import Recipe
from tesseraq_gguf.runtime.source import SourceTree
from tesseraq_gguf.types.facts import ORDERED_TYPES, TENSOR_TYPES, WITH_FACTOR, tensor_type
from tesseraq_gguf.types.grids import Grid, grid_for

ALIGNED = 32
"""Bytes that a tensor's data are a multiple of in a file."""

_FALLBACK = "q8_0"
"""Type of matrices that are not learned, where it fits their rows."""

_ITS_TYPE = "{its type}"
"""Stands for a type that is not known yet in what is said of a matrix."""

_UNORDERED = f"is not learned and is {_ITS_TYPE}: experts cannot have an order of columns"


@dataclass(frozen=True)
class TypePlan:
    """The one map from matrices to tensor types: every matrix of a model has exactly one. Names are the checkpoint's.

    Attributes:
        types: of matrices in the blocks, to be learned.
        outside: of embedding and output matrix, where these are rounded with care.
        plain: of all other matrices: floats, 8 bits that need no care, or what a GGUF file had before.
        file: the matrices of the file to be written, by their names there.
        fallbacks: what is said of matrices that do not get the type that was asked for.
        chosen: what was chosen within a budget.
        head: of matrices of a head for speculation, which are rounded.
        columns: for each column in the file that of the matrix, where the converter moves columns.
        rest: bytes of the file besides its matrices, and besides what it says of how it was made.
        divergence: what the types that were chosen within a budget leave before anything is learned, in nats per token;
            None where that was not measured.
    """

    types: dict[str, str]
    outside: dict[str, str]
    plain: dict[str, str]
    file: dict[str, FileMatrix]
    fallbacks: dict[str, str] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    head: dict[str, str] = field(default_factory=dict)
    columns: dict[str, list[int]] = field(default_factory=dict)
    rest: int = 0
    divergence: float | None = None

    def all(self) -> dict[str, str]:
        """Types of all matrices."""
        return self.plain | self.types | self.outside | self.head

    def in_file(self) -> dict[str, str]:
        """Types of all matrices, by name in the file."""
        types = self.all()
        return {target: matrix.forced or types[matrix.names[0]] for target, matrix in self.file.items()}

    def learned_in_file(self) -> set[str]:
        """Names in the file of what was learned in the blocks."""
        return {target for target, matrix in self.file.items() if self.types.keys() & set(matrix.names)}

    def bytes_of(self, name: str, shape: tuple[int, int]) -> int:
        """Size of a matrix [rows, columns] in its type."""
        type = self.all()[name]
        if type in TENSOR_TYPES:
            return bytes_of(shape, type)
        matrix = next(m for m in self.file.values() if name in m.names)  # a type of the GGUF file alone
        return -(-matrix.own_bytes * shape[0] * shape[1] // matrix.weights)

    @property
    def scaled(self) -> frozenset[str]:
        """Matrices that can have a factor in the file, where their types know one."""
        return frozenset(
            n for matrix in self.file.values() if matrix.factor for n in matrix.names if n not in self.head
        )

    def file_bytes(self) -> int:
        """Size of the file, but for what it says of how it was made."""
        matrices = sum(-(-self.bytes_in_file(m) // ALIGNED) * ALIGNED for m in self.file.values())
        return self.rest + matrices + self._bytes_of_factors()

    def _bytes_of_factors(self) -> int:
        """Size of the factors of the file, with what its header says of them."""
        learned, types = self.types.keys() | self.outside.keys(), self.in_file()
        return sum(
            bytes_of_factor(target, matrix.layers)
            for target, matrix in self.file.items()
            if types[target] in WITH_FACTOR
            if (matrix.factor if matrix.names[0] in learned else matrix.own_factor)
        )

    def bytes_in_file(self, matrix: FileMatrix) -> int:
        """Size of a matrix of the file."""
        return self.bytes_of(matrix.names[0], (matrix.weights // matrix.columns, matrix.columns))

    def main_type(self, decoder: Decoder) -> str:
        """The type that most learned weights of the blocks have; most weights, if nothing was learned after all."""
        shapes = decoder.matrix_shapes()
        counts: Counter[str] = Counter()
        for name, type in (self.types or {n: self.plain[n] for n in shapes}).items():
            counts[type] += shapes[name][0] * shapes[name][1]
        return counts.most_common(1)[0][0]

    def ruled(self, rules: Sequence[tuple[str, str]], decoder: Decoder) -> TypePlan:
        """Return the plan with an earlier choice, rules that name matrices whole."""
        return self.with_choice(dict(rules), decoder)

    def with_choice(self, chosen: Mapping[str, str], decoder: Decoder) -> TypePlan:
        """Return the plan with types chosen for some matrices."""
        ends = {decoder.embedding_name(), decoder.output_name()}
        plain = {n: t for n, t in chosen.items() if (tensor_type(t).plain if n in ends else tensor_type(t).is_float)}
        learned = {n: t for n, t in chosen.items() if n not in plain}
        kept = {n: t for n, t in self.types.items() if n not in chosen}
        kept_outside = {n: t for n, t in self.outside.items() if n not in chosen}
        return replace(
            self,
            types=kept | {n: t for n, t in learned.items() if n not in ends},
            outside=kept_outside | {n: t for n, t in learned.items() if n in ends},
            plain={n: t for n, t in self.plain.items() if n not in chosen} | plain,
            chosen=dict(chosen),
        )

    def with_factors(self, scaled: Set[str]) -> TypePlan:
        """Return the plan with factors for these matrices alone."""
        file = {target: replace(matrix, factor=scaled >= set(matrix.names)) for target, matrix in self.file.items()}
        return replace(self, file=file)

    def candidates(self, recipe: Recipe, decoder: Decoder) -> dict[str, list[str]]:
        """Types that a budget may give each matrix of the blocks; those that a rule names are settled."""
        shapes = decoder.matrix_shapes()
        ruled = rule_types(recipe.rules, shapes, ends_of(decoder))
        return {n: _possible(recipe, n, shapes[n][1]) for n in self.types if n not in ruled}


def plan_types(
    recipe: Recipe, decoder: Decoder, tree: SourceTree, settled: Mapping[str, str] = MappingProxyType({})
) -> TypePlan:
    """Choose the tensor type of each matrix of a model that is to be learned, budgets apart.

    Args:
        recipe: what to make.
        decoder: the model.
        tree: the patched llama.cpp.
        settled: types that are known, by checkpoint name.

    Raises:
        UsageError: types that cannot be meant, or a rule that matches nothing or what it cannot change.
        ModelError: no matrix of the blocks can be learned.
    """
    types, plain, fallbacks = {}, {}, dict[str, str]()
    shapes, ends = decoder.matrix_shapes(), ends_of(decoder)
    drafting = head_matrices(decoder)
    ruled = {**settled} | rule_types(recipe.rules, [*shapes, *drafting], ends)
    outer = dict.fromkeys(ends, (decoder.config.vocab_size, decoder.hidden_size))
    check, mixed, torn = _asked_of_llama_cpp(recipe, decoder, shapes | outer | drafting, tree)
    fallbacks |= torn
    for type in {mixed[name] for name in shapes if name in mixed}:
        if tensor_type(type).family:
            check_grid(recipe, grid_for(type, tensor_type(type).block_weights, recipe.granularity))
    for name, (_, columns) in shapes.items():
        asked = ruled.get(name) or mixed.get(name) or _first(recipe, name, columns)
        if tensor_type(asked).is_float:
            plain[name] = asked
            continue
        if name in ruled:
            check_grid(recipe, grid_for(asked, tensor_type(asked).block_weights, recipe.granularity))
        if stack_of(name) and (instead := tensor_type(asked).without_order):
            found, _ = _fitting(instead, columns)
            said = f"is {found}, not {asked}: experts cannot have an order of columns" if found else _UNORDERED
        else:
            found, said = _fitting(asked, columns)
        if said:
            fallbacks[name] = said
        if found:
            types[name] = found
    for name, said in _torn_apart(types, shapes, ruled).items():
        fallbacks[name] = said
        types.pop(name)
    outside = {}
    for name, asked in _asked_outside(recipe, ends, ruled, mixed).items():
        columns = decoder.hidden_size
        found, said = (None, "") if tensor_type(asked).plain else _fitting(asked, columns)
        if said:
            fallbacks[name] = said
        if found:
            outside[name] = found
        else:  # floats, and 8 bits, where rounding to nearest is as good as any
            plain[name] = fitting_type(asked if tensor_type(asked).plain else _FALLBACK, columns)
    for name, reason in (check.dropped | _torn_columns(recipe, types, check.groups)).items():
        if name in types or name in outside:
            fallbacks[name] = f"is not learned and gets a stock type: {reason}"
            types.pop(name, None)
            if outside.pop(name, None):
                plain[name] = mixed.get(name) or fitting_type(_FALLBACK, decoder.hidden_size)
    for name, forced in _forced(check.file).items():
        if types.get(name, forced) != forced and name not in ruled:  # of rules it is said that they cannot be followed
            fallbacks[name] = f"is not learned: it is {forced} in every file of llama.cpp's"
            types.pop(name)
            plain[name] = forced
    if not types:
        raise _nothing_learned(recipe, decoder.source, plain.keys() & decoder.matrix_shapes().keys(), fallbacks)
    free = {n for m in check.file.values() if m.forced is None for n in m.names} - check.dropped.keys()
    head = _head_types(recipe, {n: s for n, s in drafting.items() if n in free}, ruled, mixed)
    head = {n: t for n, t in head.items() if n not in _torn_columns(recipe, head, check.groups)}
    known = types | outside | plain | head
    plain |= {
        name: mixed.get(name) or _left_alone(target, matrix, plain.get(decoder.embedding_name(), _FALLBACK))
        for target, matrix in check.file.items()
        for name in matrix.names
        if name not in known
    }
    # what the converter merges with others is known by the name of the last of them
    plain |= {n: fitting_type(_FALLBACK, s[1]) for n, s in (shapes | outer).items() if n not in known | plain}
    said_of = {name: said.replace(_ITS_TYPE, (types | outside | plain)[name]) for name, said in fallbacks.items()}
    plan = TypePlan(types, outside, plain, check.file, said_of, head=head, columns=check.columns, rest=check.rest)
    _check_file(plan, ruled)
    return plan


def _asked_of_llama_cpp(
    recipe: Recipe, decoder: Decoder, shapes: Mapping[str, tuple[int, int]], tree: SourceTree
) -> tuple[SourceCheck, dict[str, str], dict[str, str]]:
    """What the converter says of the model; the types that llama-quantize gives it in a mix, by checkpoint name; and
    what is said of matrices that cannot have these."""
    source = decoder.source
    with tempfile.TemporaryDirectory() as folder:
        outline = Path(folder) / "outline.gguf" if recipe.mix else None
        check = check_source(source, shapes, decoder.samples(), pieces=decoder.pieces(), tree=tree, outline=outline)
        if recipe.mix is None or outline is None:
            return check, {}, {}
        types = mix.ask(recipe.mix, source.gguf or outline, recipe.calibrates or recipe.imatrix is not None)
    return check, mix.by_matrix(recipe.mix, types, check.file), mix.torn(types, check.file)


def _torn_columns(recipe: Recipe, types: Mapping[str, str], groups: Mapping[str, int]) -> dict[str, str]:
    """Matrices whose columns llama.cpp moves in groups that are no whole blocks of their types, with that reason."""
    said = {}
    for name, size in groups.items():
        for kind in map(tensor_type, recipe.candidates if recipe.budgeted else [types[name]] if name in types else []):
            if kind.name in ORDERED_TYPES or size % kind.block_weights:
                said[name] = (
                    f"llama.cpp moves its columns in groups of {size}, and {kind.name} needs {kind.block_weights}"
                )
    return said


def _forced(file: Mapping[str, FileMatrix]) -> dict[str, str]:
    """Types that llama.cpp insists on, by checkpoint name."""
    return {name: matrix.forced for matrix in file.values() if matrix.forced for name in matrix.names}


def _head_types(
    recipe: Recipe, shapes: Mapping[str, tuple[int, int]], ruled: Mapping[str, str], mixed: Mapping[str, str]
) -> dict[str, str]:
    """Types of a head's matrices, where they are rounded to a grid: those of the blocks, without orders of columns."""
    found = {}
    for name, (_, columns) in shapes.items():
        asked = ruled.get(name) or mixed.get(name) or _first(recipe, name, columns)
        unordered = tensor_type(asked).without_order or asked
        type = None if tensor_type(unordered).plain else _fitting(unordered, columns)[0]
        if type:
            found[name] = type
    torn = _torn_apart(found, shapes, ruled)
    return {name: type for name, type in found.items() if name not in torn}


def plan_plain(recipe: Recipe, source: ModelSource, tree: SourceTree) -> TypePlan:
    """Choose the tensor type of each matrix of a model of which nothing is learned.

    Raises:
        UsageError: types that cannot be meant, or a rule that matches nothing or what it cannot change.
    """
    if source.gguf and not recipe.rules:
        matrices, rest = files_matrices(open_gguf(source.gguf), tree.llama_cpp)
        file = {target: FileMatrix((target,), **facts) for target, facts in matrices.items()}
    else:
        check = check_source(source, _shapes_to_place(source), tree=tree)
        file, rest = check.file, check.rest
    inside = [n for target, m in file.items() if target.startswith("blk.") for n in m.names]
    places = {target: file[target].names[0] for target in (*EMBEDDINGS, OUTPUT) if target in file}
    ends = {OUTPUT: places.pop(OUTPUT)} if OUTPUT in places else {}
    ruled = rule_types(recipe.rules, inside, list(dict.fromkeys([*places.values(), *ends.values()])))
    if recipe.output_type is not None and not ends:
        raise _tied()
    asked = dict.fromkeys(places.values(), recipe.embedding_type)
    asked |= dict.fromkeys(ends.values(), recipe.output_type or recipe.embedding_type)
    plain = {
        name: fitting_type((asked | ruled).get(name, recipe.type), matrix.columns)
        for matrix in file.values()
        for name in matrix.names
    }
    plan = TypePlan({}, {}, plain, file, rest=rest)
    _check_file(plan, ruled)
    return plan


def check_types(recipe: Recipe) -> None:
    """Refuse methods that cannot learn a type which the recipe names for the blocks, before there is a model."""
    if recipe.mix:  # its types are not known yet
        return
    for wanted in map(tensor_type, recipe.candidates if recipe.budgeted else (recipe.type,)):
        if not wanted.is_float:
            check_grid(recipe, grid_for(wanted.name, wanted.block_weights, recipe.granularity))


def check_grid(recipe: Recipe, grid: Grid) -> None:
    """Refuse methods that move weights in steps of one scale where codes name codewords, or do not all reach as far."""
    recipe.method_row.check(grid)
    if recipe.rotate and grid.ordered:
        raise UsageError(
            f"{spelled('rotate')} mixes the channels that stand out, which {grid.type} keeps apart: leave it out"
        )
    if recipe.method_row.begins:
        start_row(recipe.start).check(grid)


def rule_types(rules: Sequence[tuple[str, str]], inside: Iterable[str], ends: Sequence[str]) -> dict[str, str]:
    """Return what rules say, by checkpoint name; the last one that matches a matrix is right.

    A rule is for the matrices of the blocks that it matches. One that matches none of them is for the embedding or the
    output matrix, so that `.*=tsq3` leaves these as they are and `lm_head=f16` does what it says.

    Raises:
        UsageError: a rule matches nothing, or gives a type for the blocks alone to embedding or output.
    """
    found, inside = dict[str, str](), list(inside)
    for pattern, type in rules:
        matched = [name for name in inside if re.search(pattern, name)]
        outside = [] if matched else [name for name in ends if re.search(pattern, name)]
        if not matched and not outside:
            tied = f", and the output matrix is the embedding, {ends[0]}" if len(ends) == 1 else ""
            example = f", such as {inside[0]}" if inside else ""
            raise UsageError(f"{spelled('rules')} {pattern}={type} matches no matrix of the model{example}{tied}")
        if outside and type in ORDERED_TYPES:
            raise UsageError(f"{spelled('rules')} {pattern}={type}: {without_order(type)}")
        found |= dict.fromkeys(matched or outside, type)
    return found


def _torn_apart(
    types: Mapping[str, str], shapes: Mapping[str, tuple[int, int]], ruled: Mapping[str, str]
) -> dict[str, str]:
    """What is said of experts that are not learned because others of their block are not: these are stacked together.

    Raises:
        UsageError: a rule wants it so.
    """
    blocks: dict[str, list[str]] = {}
    for name in shapes:
        if stack := stack_of(name):
            blocks.setdefault(stack.partition("*")[0], []).append(name)
    said = dict[str, str]()
    for block, names in blocks.items():
        left = [name for name in names if name not in types]
        if left and len(left) < len(names):
            if wish := next((name for name in left if name in ruled), None):
                raise UsageError(
                    f"{stack_of(wish)} cannot be {ruled[wish]} while other matrices of {block}* are learned: "
                    "a rule must name all matrices of a block's experts, or give a type that is learned"
                )
            reason = f"is not learned and is {_ITS_TYPE}: {left[0]} is not, and experts are stacked together"
            said |= {name: reason for name in names if name in types}
    return said


def _check_file(plan: TypePlan, ruled: Mapping[str, str]) -> None:
    """Refuse rules that the file cannot follow."""
    types, placed = plan.all(), set[str]()
    for target, matrix in plan.file.items():
        placed |= set(matrix.names)
        if len(kinds := {types[name] for name in matrix.names}) > 1:
            what = f"the experts of {stack_of(matrix.names[0])}" if stack_of(matrix.names[0]) else f"parts of {target}"
            raise UsageError(f"{what} become one tensor: they cannot be {' and '.join(sorted(kinds))}")
        asked = ruled.get(matrix.names[0])
        if asked and matrix.forced not in (None, asked):
            raise UsageError(f"{matrix.names[0]} is {matrix.forced} in every file of llama.cpp's: it cannot be {asked}")
    for name in ruled:
        if name not in placed and name not in plan.fallbacks:
            raise UsageError(f"{name} cannot have a type of its own: llama.cpp's converter keeps it in another tensor")


def _left_alone(target: str, matrix: FileMatrix, embedding: str) -> str:
    """The type of a matrix that nobody decides about: a stock type, or the one it has if that is smaller."""
    if matrix.forced:
        return matrix.forced
    if target in (*EMBEDDINGS, OUTPUT):
        return fitting_type(embedding if tensor_type(embedding).plain else _FALLBACK, matrix.columns)
    found = fitting_type(_FALLBACK, matrix.columns)
    bits = tensor_type(found).bits_per_weight
    return matrix.own if matrix.own and 8 * matrix.own_bytes <= bits * matrix.weights else found


def _tied() -> UsageError:
    return UsageError(f"this model's output matrix is its embedding: give {spelled('embedding_type')} alone")


def _nothing_learned(
    recipe: Recipe, source: ModelSource, plain: Iterable[str], fallbacks: Mapping[str, str]
) -> TesseraqError:
    if list(plain):
        return UsageError("the rules leave nothing to learn. To write the model as it is, give type f16")
    name, said = next(iter(fallbacks.items()), ("", ""))
    reason = f" ({name}: {said.partition(': ')[2]})" if name else ""
    return ModelError(
        f"{source.name}: no matrix of its blocks can be learned in {recipe.type}{reason}. "
        f"Give another {spelled('type')}, or f16 to write the model as it is"
    )


def _shapes_to_place(source: ModelSource) -> dict[str, tuple[int, int]]:
    """Shapes [out, in] of matrices whose places must be asked for, by checkpoint name.

    These are the experts, which llama.cpp's converter stacks; of a GGUF file, whose names are others, all matrices.
    """
    if source.gguf:
        weights = open_checkpoint(source)
        shapes = {name: weights.shape(name) for name in weights}
    elif any(source.folder.glob("model*.safetensors")):
        shapes = _stored_shapes(source.weight_map())
    else:  # weights in files that only the converter reads
        return {}
    return {
        name: (shape[0], shape[1]) for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2
    }


def _stored_shapes(files: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    """Shapes of the experts' matrices, as safetensors files have them."""
    from safetensors import safe_open

    shapes = {}
    for name in filter(stack_of, files):
        with safe_open(files[name], "pt") as tensors:
            shapes[name] = tuple(tensors.get_slice(name).get_shape())
    return shapes


def ends_of(decoder: Decoder) -> list[str]:
    """Return the names of embedding and output matrix; one, where they are the same."""
    return list(dict.fromkeys((decoder.embedding_name(), decoder.output_name())))


def _possible(recipe: Recipe, name: str, columns: int) -> list[str]:
    """The candidates that a matrix can have."""
    possible = [t for t in recipe.candidates if not (stack_of(name) and t in ORDERED_TYPES)]
    return [t for t in possible if tensor_type(t).fits(columns)]


def _first(recipe: Recipe, name: str, columns: int) -> str:
    """The type that a matrix gets where no rule says one: under a budget, for a start, any that it can have."""
    learned = [t for t in _possible(recipe, name, columns) if not tensor_type(t).is_float] if recipe.budgeted else []
    if recipe.mix:  # llama.cpp has no tensor for it
        return _FALLBACK
    return learned[0] if learned else recipe.candidates[0] if recipe.budgeted else recipe.type


def _fitting(asked: str, columns: int) -> tuple[str | None, str]:
    """Return the type that rows of `columns` weights get, None if they cannot be learned, and what is said of it."""
    kind = tensor_type(asked)
    if kind.fits(columns):
        return kind.name, ""
    reason = f"{kind.block_weights} does not divide its rows of {columns}"
    if kind.fallback and tensor_type(kind.fallback).fits(columns):
        return kind.fallback, f"is {kind.fallback}, not {kind.name}: {reason} (llama-quantize does the same)"
    return None, f"is not learned and is {_ITS_TYPE}: {reason}"


def _asked_outside(
    recipe: Recipe, ends: Sequence[str], ruled: Mapping[str, str], mixed: Mapping[str, str]
) -> dict[str, str]:
    """Types asked for embedding and output matrix."""
    embedding, output = ends[0], ends[-1]
    if embedding == output and recipe.output_type not in (None, recipe.embedding_type):
        raise _tied()
    if embedding != output and recipe.output_type and ruled.get(output, recipe.output_type) != recipe.output_type:
        raise UsageError(
            f"{spelled('output_type')} {recipe.output_type} and a rule for {output} are two: give one of them"
        )
    first = mixed.get(embedding, _FALLBACK) if recipe.embedding_type in (None, AUTO) else recipe.embedding_type
    asked = {output: recipe.output_type or mixed.get(output, first)} | {embedding: first}
    return asked | {name: ruled[name] for name in asked if name in ruled}
