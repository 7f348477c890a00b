"""Types within a budget: what each matrix costs in each type is measured, and those that cost least are chosen."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from tesseraq_gguf.conversion.identity import SENSITIVITY_TOKENS
from tesseraq_gguf.conversion.run import Model, Run
from tesseraq_gguf.conversion.type_plan import ALIGNED, TypePlan, ends_of, rule_types
from tesseraq_gguf.conversion.work_directory import TRIED, TYPES
from tesseraq_gguf.evaluation.divergence import Yardstick
from tesseraq_gguf.gguf_files.factors import bytes_of_factor
from tesseraq_gguf.learning.bit_budget import CostMeter, Item, bytes_of, choose
from tesseraq_gguf.learning.embeddings import EndsPassed, embedding_costs
from tesseraq_gguf.learning.palette import Palette, mend
from tesseraq_gguf.learning.sensitivity import measure_sensitivity
from tesseraq_gguf.models import Decoder
from tesseraq_gguf.models.experts import stack_of
from tesseraq_gguf.models.quantised import Quantised
from tesseraq_gguf.models.speculation import head_matrices
from tesseraq_gguf.paths import temporary_sibling
from tesseraq_gguf.recipe.readers import AUTO
from tesseraq_gguf.recipe.recipe import Recipe
from tesseraq_gguf.recipe.rules import read_rules, rules_of
from tesseraq_gguf.types.facts import ORDERED_TYPES, WITH_FACTOR, tensor_type
from tesseraq_gguf.types.grids import MatrixGrids, grid_of

_EMBEDDING_CANDIDATES = ("q8_0",)
"""Types to choose from for embedding and output matrix, besides those for the blocks."""

_ORDER_BYTES = 4
"""Of a column's place in an order."""

_SPARE = 1 << 13
"""Bytes left for metadata that is not known before the file is written."""

_RANGE_BYTES = 160
"""Of the range of what a matrix is fed, and its name, in a file's metadata."""

_TRIES = 24
"""Choices that are run on the whole model."""

_TRIED = 8
"""Sequences that they are run on."""


def choose_types(run: Run, model: Model) -> Model:
    """Choose types where the recipe has a budget, or take the choice of an earlier run of the same recipe."""
    if not run.recipe.budgeted or run.calibration is None:
        return model
    kept = run.work.note(TYPES)
    if kept is not None:
        plan, told = model.plan.ruled(read_rules(kept.splitlines()), model.decoder), run.work.note(TRIED)
        return replace(model, plan=replace(plan, divergence=float(told) if told else None))
    few = run.calibration.first(SENSITIVITY_TOKENS)
    with run.memory_explained():
        chosen = run.team.from_first(lambda: _measured(run, model, few))
    if chosen.divergence is not None:
        run.work.keep_note(TRIED, repr(chosen.divergence))
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
    """Choose types by what each costs on tokens, int64 [samples, length], and mend the choice by running it."""
    run.progress.stage("Measuring what each matrix costs in each type")
    decoder = model.decoder
    with tempfile.TemporaryDirectory(prefix="tesseraq-") as folder:
        grids = MatrixGrids(run.recipe.granularity, scaled=model.plan.scaled)
        # hundreds of experts are not rounded in all types: what each alone costs must do there
        palette = None if _streams(decoder) else Palette(Path(folder), partial(_matrix, decoder), grids)
        meter = CostMeter(dict(model.plan.candidates(run.recipe, decoder)), grids, palette)
        measure_sensitivity(decoder, tokens, run.recipe.seed, run.progress.advance, meter)
        budget = _Budget(run.recipe, model, meter, tokens)
        if palette is None:
            return budget.choice({})
        return _mended(run, model, budget, palette)


def _matrix(decoder: Decoder, name: str) -> Tensor:
    return decoder.matrix(name).to(decoder.device)


def _streams(decoder: Decoder) -> bool:
    """Whether blocks have so many experts that they are read one after the other."""
    return any(decoder.load_block(index, hollow=decoder.matrix_shapes()).mixtures for index in range(len(decoder)))


def _mended(run: Run, model: Model, budget: _Budget, palette: Palette) -> TypePlan:
    """Try the choice, and others that its neighbourhood has, on text that costs were not measured on."""
    calibration, decoder = run.calibration, model.decoder
    assert calibration is not None
    run.progress.stage("Trying choices of types on the whole model")
    after = len(calibration.first(SENSITIVITY_TOKENS))
    fresh = calibration.tokens[after : after + _TRIED] if len(calibration.tokens) > after else calibration.held_out
    yardstick = Yardstick(decoder, fresh)
    plans: dict[str, TypePlan] = {}
    tried = 0

    def choose(factors: Mapping[str, float]) -> Mapping[str, str]:
        plan = budget.choice(factors)
        plans[rules_of(plan.chosen, "")] = plan
        return plan.chosen

    def measure(choice: Mapping[str, str]) -> float:
        nonlocal tried
        ends = palette.of(choice, ends_of(decoder))
        quantised = Quantised(
            decoder,
            lambda index: palette.of(choice, [n for n in choice if n.startswith(decoder.block_prefix(index))]),
            {name: grid_of(tensor.type).dequantize(tensor) for name, tensor in ends.items()},
        )
        found = yardstick.divergence(quantised)
        tried += 1
        run.progress.advance(tried, _TRIES)
        return found

    mended = mend(_groups(decoder, budget.names), choose, measure, _TRIES)
    run.progress.note(
        f"divergence of the types chosen, before anything is learned: {mended.before:.4f} -> {mended.after:.4f}, "
        f"{mended.tried} choices tried"
    )
    return replace(plans[rules_of(mended.choice, "")], divergence=mended.after)


def _groups(decoder: Decoder, names: Iterable[str]) -> dict[str, list[str]]:
    """Matrices that are alike: of one kind in all blocks, and all of the first, middle and last blocks."""
    groups: dict[str, list[str]] = {}
    for name in names:
        index = next((i for i in range(len(decoder)) if name.startswith(decoder.block_prefix(i))), None)
        if index is None:
            groups.setdefault(name, []).append(name)
            continue
        kind = name.removeprefix(decoder.block_prefix(index))
        groups.setdefault(stack_of(kind) or kind, []).append(name)
        groups.setdefault(f"third {3 * index // len(decoder)}", []).append(name)
    return dict(sorted(groups.items(), key=lambda group: -len(group[1])))


class _Budget:
    """Bytes that are to be spent where they serve best.

    Args:
        recipe: names the budget and the types to choose from.
        model: its plan says what is settled.
        meter: what the blocks' matrices cost.
        tokens: that it was measured on, int64 [samples, length].
    """

    def __init__(self, recipe: Recipe, model: Model, meter: CostMeter, tokens: Tensor) -> None:
        self._decoder, self._plan = model.decoder, model.plan
        shapes = self._decoder.matrix_shapes()
        self._together = _together(meter.candidates)
        self._items = {name: _item(members, meter, shapes) for name, members in self._together.items()}
        plan, decoder = self._plan, self._decoder
        settled = sum(plan.bytes_of(name, shape) for name, shape in shapes.items() if name not in meter.candidates)
        # orders of columns at most: which inputs will need one is not known yet
        wanted = [name for name, costs in meter.costs.items() if costs.keys() & set(ORDERED_TYPES)]
        settled += sum(_ORDER_BYTES * shapes[name][1] for name in wanted)
        if recipe.target_bpw is not None:
            drafting = {name: shape for name, shape in head_matrices(decoder).items() if name in plan.head}
            settled += sum(plan.bytes_of(name, shape) for name, shape in drafting.items())
            weights = sum(rows * columns for rows, columns in (shapes | drafting).values())
            self._bytes = int(recipe.target_bpw * weights / 8) - settled
            return
        assert recipe.target_size is not None
        open_ends = _open_ends(recipe, decoder)
        self._items |= {name: _end(recipe, decoder, name, meter, tokens) for name in open_ends}
        settled += sum(
            plan.bytes_of(name, shape) for name, shape in _end_shapes(decoder).items() if name not in open_ends
        )
        others = {n for m in plan.file.values() for n in m.names} - shapes.keys() - set(ends_of(decoder))
        settled += sum(plan.bytes_in_file(m) for m in plan.file.values() if others & set(m.names))
        self._bytes = recipe.target_size - settled - _bytes_of_the_rest(recipe, plan)

    @property
    def names(self) -> list[str]:
        """Matrices whose types are chosen, by checkpoint name."""
        return [name for item in self._items for name in self._together.get(item, [item])]

    def choice(self, factors: Mapping[str, float]) -> TypePlan:
        """Choose types that cost least within the budget.

        Args:
            factors: by which what a matrix costs is counted for more or less, by its name.

        Raises:
            UsageError: the budget is too small for the smallest types.
        """
        items = {
            name: item.scaled(factors.get(self._together.get(name, [name])[0], 1.0))
            for name, item in self._items.items()
        }
        chosen = {n: t for name, t in choose(items, self._bytes).items() for n in self._together.get(name, [name])}
        return self._plan.with_choice(chosen, self._decoder)


def _end_shapes(decoder: Decoder) -> dict[str, tuple[int, int]]:
    return dict.fromkeys(ends_of(decoder), (decoder.config.vocab_size, decoder.hidden_size))


def _end(recipe: Recipe, decoder: Decoder, name: str, meter: CostMeter, tokens: Tensor) -> Item:
    """Sizes and costs of the embedding or the output matrix."""
    shape = _end_shapes(decoder)[name]
    types = [t for t in (*recipe.candidates, *_EMBEDDING_CANDIDATES) if tensor_type(t).fits(shape[1])]
    types = [t for t in types if t not in ORDERED_TYPES]  # columns of an embedding have no order
    types = list(dict.fromkeys(types)) or ["f16"]
    careful = [t for t in types if not tensor_type(t).plain]
    passed = EndsPassed(tokens, meter.final, meter.bottom, replace(meter.grids, granularity="group"))
    costs = embedding_costs(decoder, name, careful, passed, meter.palette)
    # eight bits are taken to cost nothing: what they do is far below what the other types do
    costs = {t: 0.0 for t in types if tensor_type(t).plain} | costs
    return Item({t: bytes_of(shape, t) for t in costs}, costs)


def _together(names: Iterable[str]) -> dict[str, list[str]]:
    """Matrices that must have one type: those of a stack, by its name; each other one is on its own."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(stack_of(name) or name, []).append(name)
    return found


def _item(members: list[str], meter: CostMeter, shapes: Mapping[str, tuple[int, int]]) -> Item:
    """Sizes and costs of matrices with one type. An expert that no token came to has no costs."""
    known = [meter.costs[name] for name in members if name in meter.costs]
    types = list(known[0]) if known else meter.candidates[members[0]]
    return Item(
        {t: sum(bytes_of(shapes[name], t) for name in members) for t in types},
        {t: sum(costs[t] for costs in known) for t in types},
    )


def _bytes_of_the_rest(recipe: Recipe, plan: TypePlan) -> int:
    """What a file holds besides its matrices: header, vocabulary, norms."""
    ranges = len(plan.all()) * _RANGE_BYTES if recipe.scheme.static else 0
    scaled = {target: m for target, m in plan.file.items() if m.factor and {*recipe.candidates} & {*WITH_FACTOR}}
    beside = sum(bytes_of_factor(target, matrix.layers) for target, matrix in scaled.items())
    return plan.rest + ALIGNED * len(plan.file) + ranges + beside + _SPARE


def _open_ends(recipe: Recipe, decoder: Decoder) -> list[str]:
    """Names of embedding and output matrix, as far as their types are to be chosen within the size of the file."""
    if recipe.embedding_type != AUTO:
        return []
    ends = ends_of(decoder)
    ruled = rule_types(recipe.rules, decoder.matrix_shapes(), ends)
    settled = {ends[1]} if len(ends) > 1 and recipe.output_type else set[str]()
    return [name for name in ends if name not in ruled and name not in settled]
