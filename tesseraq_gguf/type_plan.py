"""Which tensor type every matrix gets: as asked, as its rows and llama.cpp's converter allow, or within a budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from tesseraq_gguf.bit_budget import CostMeter, Item, bytes_of, choose
from tesseraq_gguf.converter.column_orders import ORDERED_TYPES
from tesseraq_gguf.converter.gguf_file import open_gguf
from tesseraq_gguf.converter.tensor_types import tensor_type
from tesseraq_gguf.converter.writer import check_source
from tesseraq_gguf.embeddings import embedding_costs
from tesseraq_gguf.errors import ModelError, UsageError
from tesseraq_gguf.models import Decoder, ModelSource
from tesseraq_gguf.models.experts import stack_of
from tesseraq_gguf.recipe import AUTO, Recipe
from tesseraq_gguf.rules import ruled
from tesseraq_gguf.runtime.source import SourceTree

_EMBEDDING_CANDIDATES = ("q8_0",)
"""Types to choose from for embedding and output matrix, besides those for the blocks."""

_WITHOUT_ORDER = "tsq2"
"""Type of matrices whose columns cannot have the order that their type would need."""

_UNORDERED = "is not learned and gets a stock type: experts cannot have an order of columns"

_ORDER_BYTES = 4
"""Of a column's place in an order."""

_SPARE = 1 << 16
"""Bytes left for metadata that is not known before the file is written."""


@dataclass(frozen=True)
class TypePlan:
    """Types of the matrices, by checkpoint name.

    Attributes:
        types: of matrices in the blocks, to be learned.
        outside: of embedding and output matrix, where these are rounded with care, not plain.
        embedding_type: of embedding and output matrix where they are plain.
        fallbacks: what is said of matrices that do not get the type that was asked for.
        chosen: what was chosen within a budget.
    """

    types: dict[str, str]
    outside: dict[str, str]
    embedding_type: str
    fallbacks: dict[str, str]
    chosen: dict[str, str] = field(default_factory=dict)

    def main_type(self, decoder: Decoder) -> str:
        """The type that most weights of the blocks have."""
        shapes = decoder.matrix_shapes()
        counts: Counter[str] = Counter()
        for name, type in self.types.items():
            counts[type] += shapes[name][0] * shapes[name][1]
        return counts.most_common(1)[0][0]

    def ruled(self, rules: Sequence[tuple[str, str]], decoder: Decoder) -> TypePlan:
        """Return the plan with an earlier choice, rules that name matrices whole."""
        return self.with_choice(dict(rules), decoder)

    def with_choice(self, chosen: Mapping[str, str], decoder: Decoder) -> TypePlan:
        """Return the plan with types chosen for some matrices."""
        ends = {decoder.embedding_name(), decoder.output_name()}
        plain = [t for name, t in chosen.items() if name in ends and tensor_type(t).plain]
        careful = {name: t for name, t in chosen.items() if name in ends and not tensor_type(t).plain}
        inside = {name: t for name, t in chosen.items() if name not in ends}
        kept = {name: t for name, t in self.outside.items() if name not in chosen}
        return replace(
            self,
            types=self.types | inside,
            outside=kept | careful,
            embedding_type=plain[0] if plain else self.embedding_type,
            chosen=dict(chosen),
        )

    def candidates(self, recipe: Recipe, decoder: Decoder) -> dict[str, list[str]]:
        """Types that a budget may give each matrix of the blocks; those that a rule names are settled.

        Raises:
            UsageError: no candidate fits the rows of a matrix.
        """
        shapes, found = decoder.matrix_shapes(), {}
        for name in self.types:
            if ruled(recipe.rules, name) is None:
                possible = [t for t in recipe.candidates if not (stack_of(name) and t.lower() in ORDERED_TYPES)]
                found[name] = [t for t in possible if tensor_type(t).fits(shapes[name][1])]
                if not found[name]:
                    raise UsageError(f"none of {', '.join(recipe.candidates)} fits the rows of {name}: name others")
        return found


def plan_types(recipe: Recipe, source: ModelSource, decoder: Decoder, tree: SourceTree) -> TypePlan:
    """Choose the tensor type of each matrix, budgets apart.

    Raises:
        UsageError: types of embedding and output that cannot be meant, or a rule that matches nothing.
        ModelError: no matrix of the blocks can be learned.
    """
    types, fallbacks = {}, {}
    shapes = decoder.matrix_shapes()
    for pattern, type in recipe.rules:
        if not any(ruled(((pattern, type),), name) for name in shapes):
            raise UsageError(
                f"--tensor-type {pattern}={type} matches no matrix of the blocks, such as {next(iter(shapes))}"
            )
    for name, (_, columns) in shapes.items():
        asked = ruled(recipe.rules, name) or recipe.type
        if stack_of(name) and asked.lower() in ORDERED_TYPES:
            found, _ = _fitting(_WITHOUT_ORDER, columns)
            said = f"is {found}, not {asked.lower()}: experts cannot have an order of columns" if found else _UNORDERED
        else:
            found, said = _fitting(asked, columns)
        if said:
            fallbacks[name] = said
        if found:
            types[name] = found
    for stack, members in _together(types).items():
        if len(kinds := {types[name] for name in members}) > 1:
            raise UsageError(f"the experts of {stack} become one tensor: they cannot be {' and '.join(sorted(kinds))}")
    outside = {}
    for name, asked in _asked_outside(recipe, decoder).items():
        if not tensor_type(asked).plain:  # floats, and 8 bits, where rounding to nearest is as good as any
            found, said = _fitting(asked, decoder.hidden_size)
            if said:
                fallbacks[name] = said
            if found:
                outside[name] = found
                shapes[name] = (decoder.config.vocab_size, decoder.hidden_size)
    refused = check_source(source, {name: shapes[name] for name in types | outside}, tree=tree)
    for name, reason in refused.items():
        fallbacks[name] = f"is not learned and gets a stock type: {reason}"
        types.pop(name, None)
        outside.pop(name, None)
    if not types:
        raise ModelError(f"{source.name}: no matrix of its blocks can be learned in {recipe.type.lower()}")
    embedding = "q8_0" if recipe.embedding_type == AUTO else recipe.embedding_type
    return TypePlan(types, outside, embedding, fallbacks)


def within_budget(
    recipe: Recipe, plan: TypePlan, source: ModelSource, decoder: Decoder, meter: CostMeter, tokens: Tensor
) -> TypePlan:
    """Choose types that cost least within the recipe's budget.

    Args:
        recipe: names the budget and the types to choose from.
        plan: what is settled.
        source: the model.
        decoder: the same.
        meter: what the blocks' matrices cost.
        tokens: that it was measured on, int64 [samples, length].

    Raises:
        UsageError: the budget is too small for the smallest types.
    """
    shapes = decoder.matrix_shapes()
    together = _together(meter.candidates)
    items = {name: _item(members, meter, shapes) for name, members in together.items()}
    settled = sum(bytes_of(shapes[name], type) for name, type in plan.types.items() if name not in meter.candidates)
    # orders of columns at most: which inputs will need one is not known yet
    wanted = [name for name, costs in meter.costs.items() if costs.keys() & set(ORDERED_TYPES)]
    settled += sum(_ORDER_BYTES * shapes[name][1] for name in wanted)

    def choice(budget: int) -> TypePlan:
        chosen = choose(items, budget)
        return plan.with_choice({n: t for name, t in chosen.items() for n in together.get(name, [name])}, decoder)

    if recipe.target_bpw is not None:
        weights = sum(shapes[name][0] * shapes[name][1] for name in plan.types)
        return choice(int(recipe.target_bpw * weights / 8) - settled)
    ends = dict.fromkeys((decoder.embedding_name(), decoder.output_name()))
    shape = (decoder.config.vocab_size, decoder.hidden_size)
    if recipe.embedding_type == AUTO:
        types = [t for t in (*recipe.candidates, *_EMBEDDING_CANDIDATES) if tensor_type(t).fits(shape[1])]
        types = [t for t in types if t not in ORDERED_TYPES]  # columns of an embedding have no order
        types = list(dict.fromkeys(types)) or ["f16"]
        for name in ends:
            costs = embedding_costs(decoder, name, [t for t in types if t != "q8_0"], tokens, meter.final, meter.bottom)
            # eight bits are taken to cost nothing: what they do is far below what the other types do
            items[name] = Item(
                {t: bytes_of(shape, t) for t in types}, costs | ({"q8_0": 0.0} if "q8_0" in types else {})
            )
    else:
        settled += sum(bytes_of(shape, plan.outside.get(name, plan.embedding_type)) for name in ends)
    assert recipe.target_size is not None
    rest = _bytes_of_the_rest(source, decoder, shapes)
    return choice(recipe.target_size - settled - rest)


def _together(names: Iterable[str]) -> dict[str, list[str]]:
    """Matrices that must have one type: those of a stack, by its name; each other one is on its own."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(stack_of(name) or name, []).append(name)
    return found


def _item(members: list[str], meter: CostMeter, shapes: Mapping[str, tuple[int, int]]) -> Item:
    """Sizes and costs of matrices with one type. An expert that no token came to has no costs."""
    types = meter.candidates[members[0]]
    known = [meter.costs[name] for name in members if name in meter.costs]
    return Item(
        {t: sum(bytes_of(shapes[name], t) for name in members) for t in types},
        {t: sum(costs[t] for costs in known) for t in types},
    )


def _bytes_of_the_rest(source: ModelSource, decoder: Decoder, shapes: Mapping[str, tuple[int, int]]) -> int:
    """What a file holds besides its matrices: header, vocabulary, norms. Rather too much than too little."""
    vectors = sum(
        p.numel() for index in range(len(decoder)) for p in decoder.load_block(index, hollow=shapes).module.parameters()
        if p.dim() == 1
    )  # fmt: skip
    if source.gguf:
        file = open_gguf(source.gguf)
        header = file.bytes - sum(t.bytes for t in file.tensors)
    else:
        names = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
        header = max((f.stat().st_size for n in names if (f := source.folder / n).is_file()), default=0)
    return header + 4 * (vectors + decoder.hidden_size) + 96 * len(shapes) + _SPARE


def _fitting(asked: str, columns: int) -> tuple[str | None, str]:
    """Return the type that rows of `columns` weights get, None if they cannot be learned, and what is said of it."""
    kind = tensor_type(asked)
    if kind.fits(columns):
        return kind.name, ""
    reason = f"{kind.block_weights} does not divide its rows of {columns}"
    if kind.fallback and tensor_type(kind.fallback).fits(columns):
        return kind.fallback, f"is {kind.fallback}, not {kind.name}: {reason} (llama-quantize does the same)"
    return None, f"is not learned and gets a stock type: {reason}"


def _asked_outside(recipe: Recipe, decoder: Decoder) -> dict[str, str]:
    embedding, output = decoder.embedding_name(), decoder.output_name()
    if recipe.embedding_type == AUTO:
        return {}
    if embedding == output:
        if recipe.output_type not in (None, recipe.embedding_type):
            raise UsageError("this model's output matrix is its embedding: give --embedding-type alone")
        return {embedding: recipe.embedding_type}
    return {embedding: recipe.embedding_type, output: recipe.output_type or recipe.embedding_type}
