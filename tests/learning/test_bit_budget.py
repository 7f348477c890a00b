"""Bit budgets: the choice is the best there is, its costs are divergences, and runs within a budget keep it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conversions import Listener
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TEXT, make_model  # noqa: F401  (a fixture)

from tesseraq_gguf.conversion.pipeline import convert, plan
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.gguf_files.inspection import inspect
from tesseraq_gguf.learning.bit_budget import CostMeter, Item, Watched, bytes_of, choose, costs_of
from tesseraq_gguf.learning.embeddings import EndsPassed, embedding_costs
from tesseraq_gguf.learning.sensitivity import measure_sensitivity
from tesseraq_gguf.models import Decoder
from tesseraq_gguf.recipe.readers import AUTO
from tesseraq_gguf.recipe.recipe import Recipe
from tesseraq_gguf.types.grids import grid_of

CPU = torch.device("cpu")
TOKENS = torch.randint(4, 300, (6, 48), generator=torch.Generator().manual_seed(0))


@st.composite
def item(draw):
    sizes = {t: draw(st.integers(1, 30)) * 8 for t in ("a", "b", "c")[: draw(st.integers(1, 3))]}
    return Item(sizes, {t: draw(st.integers(0, 50)) / 8 for t in sizes})


@settings(max_examples=200, deadline=None)
@given(items=st.lists(item(), min_size=1, max_size=5), budget=st.integers(0, 1200))
def test_no_other_choice_costs_less_and_fits(items, budget):
    named = {str(i): item for i, item in enumerate(items)}
    fitting = [
        (sum(i.costs[t] for i, t in zip(items, types, strict=True)), types)
        for types in itertools.product(*(i.sizes for i in items))
        if sum(i.sizes[t] for i, t in zip(items, types, strict=True)) <= budget
    ]
    if not fitting:
        with pytest.raises(UsageError, match="smallest types need"):
            choose(named, budget)
        return
    found = choose(named, budget)
    assert list(found) == list(named)
    assert sum(named[n].sizes[t] for n, t in found.items()) <= budget
    assert sum(named[n].costs[t] for n, t in found.items()) == min(fitting)[0]


def test_sizes_that_share_no_unit_still_fit():
    """More sizes than the programme tells apart: it rounds up, and never goes over."""
    random = torch.Generator().manual_seed(1)
    items = {}
    for index in range(40):
        base, more = (int(torch.randint(10**7, 10**8, (), generator=random)) for _ in range(2))
        cost = float(torch.rand((), generator=random))
        items[str(index)] = Item({"small": base, "large": base + more}, {"small": cost, "large": 0.0})
    least = sum(i.sizes["small"] for i in items.values())
    most = sum(i.sizes["large"] for i in items.values())
    budget = (least + most) // 2
    found = choose(items, budget)
    used = sum(items[n].sizes[t] for n, t in found.items())
    assert 0.97 * (budget - least) < used - least <= budget - least
    assert set(choose(items, most).values()) == {"large"}
    assert set(choose(items, least).values()) == {"small"}


def _states(decoder, replaced=None):
    """Final hidden states with some matrices replaced, by checkpoint name."""
    replaced = replaced or {}
    hidden, recorded = decoder.stem(TOKENS, {n: w for n, w in replaced.items() if n == decoder.embedding_name()})
    with torch.no_grad():
        for index in range(len(decoder)):
            block = decoder.load_block(index)
            hidden = block.run(hidden, recorded.arguments[index], block.by_module(replaced))
    return hidden


def _divergence(decoder, replaced):
    answers = decoder.answers()
    p, q = answers(_states(decoder)), answers(_states(decoder, replaced))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_costs_are_the_divergence_that_a_matrix_alone_makes(make_model):  # noqa: F811
    """To second order and over few tokens: within a factor, and in the right order."""
    decoder = Decoder(make_model("llama"), CPU)
    names = list(decoder.matrix_shapes())
    meter = CostMeter({name: ["tsq2", "tsq4"] for name in names})
    costs = []
    for seed in range(12):  # answers are drawn: the mean of some passes
        measure_sensitivity(decoder, TOKENS, seed, witness=meter)
        costs.append({name: dict(c) for name, c in meter.costs.items()})
    found, true = [], []
    for name in names:
        weight = decoder.matrix(name)
        for type in ("tsq2", "tsq4"):
            grid = grid_of(type)
            rounded = grid.dequantize(grid.quantize(weight))
            found.append(sum(c[name][type] for c in costs) / len(costs))
            true.append(_divergence(decoder, {name: rounded}))
    ratio = (torch.tensor(found) / torch.tensor(true)).log()
    assert ratio.abs().median() < 0.7
    ranks = [torch.tensor(v).argsort().argsort().double() for v in (found, true)]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.9


def test_types_with_salient_places_are_tried_in_an_order():
    random = torch.Generator().manual_seed(4)
    weight = torch.randn(32, 256, generator=random)
    fed = torch.randn(200, 256, generator=random) * torch.rand(256, generator=random) ** 4
    felt = torch.randn(200, 32, generator=random)
    costs = costs_of(Watched(weight, fed, felt), ["ptq1_61"])
    grid = grid_of("ptq1_61")
    off = grid.dequantize(grid.quantize(weight, fed.square().mean(0))) - weight
    as_it_stands = 0.5 * float(((fed @ off.T) * felt).sum(1).square().mean())
    assert costs["ptq1_61"] < 0.25 * as_it_stands


def test_some_rows_tell_what_all_cost():
    random = torch.Generator().manual_seed(5)
    weight, fed = torch.randn(1024, 128, generator=random), torch.randn(400, 128, generator=random)
    matrix = Watched(weight, fed, torch.randn(400, 1024, generator=random))
    some = matrix.some(128)
    assert [len(some.weight), some.felt.shape[1], len(matrix.some(4096).weight)] == [128, 128, 1024]
    whole, part = (costs_of(m, ["tsq2", "tsq3", "tsq4"]) for m in (matrix, some))
    for type, cost in whole.items():
        assert 8 * part[type] == pytest.approx(cost, rel=0.3)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_costs_of_the_embedding_are_in_the_same_unit(kind, make_model):  # noqa: F811
    """Gemma's is both ends, Llama's two; what each alone makes of the answers."""

    decoder = Decoder(make_model(kind), CPU)
    ends = dict.fromkeys((decoder.embedding_name(), decoder.output_name()))
    assert len(ends) == (1 if kind == "gemma3" else 2)
    for name in ends:
        costs, true = [], 0.0
        for seed in range(8):
            meter = CostMeter({})
            measure_sensitivity(decoder, TOKENS, seed, witness=meter)
            passed = EndsPassed(TOKENS, meter.final, meter.bottom)
            costs.append(embedding_costs(decoder, name, ["tsq4"], passed)["tsq4"])
        grid = grid_of("tsq4")
        rounded = grid.dequantize(grid.quantize(decoder.matrix(name)))
        hidden = _states(decoder, {name: rounded} if name == decoder.embedding_name() else {})
        norm, head = decoder.final_norm()[1], decoder.output_weight()
        changed = rounded if name == decoder.output_name() else head
        p = decoder.answers()(_states(decoder))
        q = (norm(hidden) @ changed.T).log_softmax(-1)
        true = float((p.exp() * (p - q)).sum(-1).mean())
        assert 0.4 < sum(costs) / len(costs) / true < 2.5


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT * 30)
    return file


def _recipe(source, out, text, **options) -> Recipe:
    settings: dict[str, Any] = {"method": "gptq", "calibration": str(text), "samples": 6, "seqlen": 32}
    return Recipe(str(source.folder), out, **settings | options)


@pytest.mark.slow
def test_a_budget_is_kept_and_its_choice_can_be_replayed(make_model, text, tmp_path):  # noqa: F811
    source = make_model("gemma3")
    report = convert(_recipe(source, tmp_path / "a.gguf", text, target_bpw=2.75))
    assert 2.6 < report.block_bits_per_weight <= 2.75
    choice = (tmp_path / "a.gguf.types").read_text()
    rules = tuple(tuple(line.split("=")) for line in choice.splitlines() if not line.startswith("#"))
    assert len(rules) == 2 * 7
    assert len({type for _, type in rules}) > 1
    replayed = convert(_recipe(source, tmp_path / "b.gguf", text, rules=rules))
    assert replayed.block_bits_per_weight == report.block_bits_per_weight
    assert [(t.name, t.type) for t in inspect(tmp_path / "b.gguf").tensors] == [
        (t.name, t.type) for t in inspect(tmp_path / "a.gguf").tensors
    ]


@pytest.mark.slow
def test_a_rule_is_kept_within_a_budget(make_model, text, tmp_path):  # noqa: F811
    rules = ((r"layers\.0\.mlp\.down_proj", "tsq4"),)
    convert(_recipe(make_model("gemma3"), tmp_path / "a.gguf", text, target_bpw=2.75, rules=rules, method="rtn"))
    types = {t.name: t.type for t in inspect(tmp_path / "a.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == "tsq4"
    with pytest.raises(UsageError, match="matches no matrix"):
        convert(_recipe(make_model("gemma3"), tmp_path / "b.gguf", text, rules=(("mpl", "tsq4"),)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma3", "llama-576"])
def test_a_file_is_no_larger_than_it_may_be(kind, make_model, text, tmp_path):  # noqa: F811
    source = make_model(kind)
    sizes = {}
    for type in ("tsq2", "tsq4"):
        sizes[type] = convert(
            Recipe(str(source.folder), tmp_path / f"{type}.gguf", type=type, method="rtn", embedding_type=type)
        ).bytes
    wanted = sizes["tsq4"] - 50_000
    recipe = _recipe(source, tmp_path / "a.gguf", text, target_size=wanted, embedding_type=AUTO, method="rtn")
    planned = plan(recipe)
    report = convert(recipe, told := Listener())
    # a file of so few bytes feels those that are left for metadata, and the size of one matrix
    assert wanted - 40_000 < report.bytes <= wanted
    assert abs(planned.bytes - report.bytes) < 2000
    assert planned.divergence is not None
    assert planned.types == {t.name: t.type for t in inspect(recipe.out).tensors if t.name in planned.types}
    assert not any("choices tried" in note for note in told.notes)  # the plan's choice was kept
    assert {t.type for t in inspect(recipe.out).tensors if t.name.startswith("blk.")} > {"f32", "tsq2"}
    with pytest.raises(UsageError, match="smallest types need"):
        convert(_recipe(source, tmp_path / "c.gguf", text, target_size=sizes["tsq2"] // 2, method="rtn"))


def test_sizes_of_matrices_are_those_of_the_file():
    assert bytes_of((3, 128), "tsq2") == 3 * 2 * 18
    assert bytes_of((3, 128), "q8_0") == 3 * 4 * 34


@pytest.mark.slow
def test_mixed_types_find_their_orders(make_model, text, tmp_path):  # noqa: F811
    """Matrices that read the same may have an order or none; the file is verified against what was learned."""
    recipe = _recipe(
        make_model("llama-256"), tmp_path / "a.gguf", text, target_bpw=2.0, candidates=("ptq1_61", "tsq2"),
    )  # fmt: skip
    assert convert(recipe).block_bits_per_weight <= 2.0
    assert {"ptq1_61", "tsq2"} <= {t.type for t in inspect(recipe.out).types}
