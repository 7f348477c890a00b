"""Types within a budget: what each matrix costs in each type is measured, and those that cost least are chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from tesseraq_gguf.conversion.identity import SENSITIVITY_TOKENS
from tesseraq_gguf.conversion.run import Model, Run
from tesseraq_gguf.conversion.type_plan import TypePlan, ends_of, rule_types
from tesseraq_gguf.conversion.work_directory import TYPES
from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.learning.bit_budget import CostMeter, Item, bytes_of, choose
from tesseraq_gguf.learning.embeddings import embedding_costs
from tesseraq_gguf.learning.sensitivity import measure_sensitivity
from tesseraq_gguf.models import Decoder, ModelSource
from tesseraq_gguf.models.experts import stack_of
from tesseraq_gguf.models.speculation import head_matrices
from tesseraq_gguf.paths import temporary_sibling
from tesseraq_gguf.recipe.readers import AUTO
from tesseraq_gguf.recipe.recipe import Recipe
from tesseraq_gguf.recipe.rules import read_rules, rules_of
from tesseraq_gguf.types.facts import ORDERED_TYPES, tensor_type

_EMBEDDING_CANDIDATES = ("q8_0",)
"""Types to choose from for embedding and output matrix, besides those for the blocks."""

_ORDER_BYTES = 4
"""Of a column's place in an order."""

_SPARE = 1 << 16
"""Bytes left for metadata that is not known before the file is written."""


def choose_types(run: Run, model: Model) -> Model:
    """Choose types where the recipe has a budget, or take the choice of an earlier run of the same recipe."""
    if not run.recipe.budgeted or run.calibration is None:
        return model
    kept = run.work.note(TYPES)
    if kept is not None:
        return replace(model, plan=model.plan.ruled(read_rules(kept.splitlines()), model.decoder))
    few = run.calibration.first(SENSITIVITY_TOKENS)
    with run.memory_explained():
        chosen = run.team.from_first(lambda: _measured(run, model, few))
    run.work.keep_note(TYPES, rules_of(chosen.chosen, ""))
    return replace(model, plan=chosen)


def keep_choice(run: Run, plan: TypePlan) -> None:
    """Write types that were chosen beside the file, to be read, edited and given to --tensor-types."""
    recipe = run.recipe
    if not recipe.budgeted:
        return
    place = recipe.out.with_name(f"{recipe.out.name}.types")
    said = f"types of {recipe.out.name}, chosen for {recipe.budget}; for --tensor-types"
    with temporary_sibling(place) as partial:
        partial.write_text(rules_of(plan.chosen, said), encoding="utf-8")
    counts = Counter(plan.chosen.values())
    chosen = ", ".join(f"{n} matrices in {t}" for t, n in sorted(counts.items()))
    run.progress.note(f"{chosen}; the choice is in {place}")


def _measured(run: Run, model: Model, tokens: Tensor) -> TypePlan:
    """Choose types by what each costs on tokens, int64 [samples, length]."""
    run.progress.stage("Measuring what each matrix costs in each type")
    meter = CostMeter(model.plan.candidates(run.recipe, model.decoder), run.recipe.granularity)
    measure_sensitivity(model.decoder, tokens, run.recipe.seed, run.progress.advance, meter)
    return _within_budget(run.recipe, model, meter, tokens)


def _within_budget(recipe: Recipe, model: Model, meter: CostMeter, tokens: Tensor) -> TypePlan:
    """Choose types that cost least within the recipe's budget.

    Args:
        recipe: names the budget and the types to choose from.
        model: its plan says what is settled.
        meter: what the blocks' matrices cost.
        tokens: that it was measured on, int64 [samples, length].

    Raises:
        UsageError: the budget is too small for the smallest types.
    """
    decoder, plan = model.decoder, model.plan
    shapes = decoder.matrix_shapes()
    together = _together(meter.candidates)
    items = {name: _item(members, meter, shapes) for name, members in together.items()}
    settled = sum(plan.bytes_of(name, shape) for name, shape in shapes.items() if name not in meter.candidates)
    # orders of columns at most: which inputs will need one is not known yet
    wanted = [name for name, costs in meter.costs.items() if costs.keys() & set(ORDERED_TYPES)]
    settled += sum(_ORDER_BYTES * shapes[name][1] for name in wanted)

    def choice(budget: int) -> TypePlan:
        chosen = choose(items, budget)
        return plan.with_choice({n: t for name, t in chosen.items() for n in together.get(name, [name])}, decoder)

    if recipe.target_bpw is not None:
        drafting = {name: shape for name, shape in head_matrices(decoder).items() if name in plan.head}
        settled += sum(plan.bytes_of(name, shape) for name, shape in drafting.items())
        weights = sum(rows * columns for rows, columns in (shapes | drafting).values())
        return choice(int(recipe.target_bpw * weights / 8) - settled)
    shape = (decoder.config.vocab_size, decoder.hidden_size)
    open_ends = _open_ends(recipe, decoder)
    for name in open_ends:
        types = [t for t in (*recipe.candidates, *_EMBEDDING_CANDIDATES) if tensor_type(t).fits(shape[1])]
        types = [t for t in types if t not in ORDERED_TYPES]  # columns of an embedding have no order
        types = list(dict.fromkeys(types)) or ["f16"]
        careful = [t for t in types if not tensor_type(t).plain]
        costs = embedding_costs(decoder, name, careful, tokens, meter.final, meter.bottom)
        # eight bits are taken to cost nothing: what they do is far below what the other types do
        items[name] = Item({t: bytes_of(shape, t) for t in types}, dict.fromkeys(types, 0.0) | costs)
    settled += sum(plan.bytes_of(name, shape) for name in ends_of(decoder) if name not in open_ends)
    others = {n for m in plan.file.values() for n in m.names} - shapes.keys() - set(ends_of(decoder))
    settled += sum(plan.bytes_in_file(m) for m in plan.file.values() if others & set(m.names))
    assert recipe.target_size is not None
    rest = _bytes_of_the_rest(model.source, decoder, shapes)
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


def _open_ends(recipe: Recipe, decoder: Decoder) -> list[str]:
    """Names of embedding and output matrix, as far as their types are to be chosen within the size of the file."""
    if recipe.embedding_type != AUTO:
        return []
    ends = ends_of(decoder)
    ruled = rule_types(recipe.rules, decoder.matrix_shapes(), ends)
    settled = {ends[1]} if len(ends) > 1 and recipe.output_type else set[str]()
    return [name for name in ends if name not in ruled and name not in settled]
