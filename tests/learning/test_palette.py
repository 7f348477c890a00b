"""Choices of types are tried on the whole model: what is kept comes back, and what ends nearer is taken."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tesseraq_gguf.learning.bit_budget import Item, choose
from tesseraq_gguf.learning.palette import Palette, mend, painted, rounded, undominated
from tesseraq_gguf.types.grids import grid_of

SIZES = {"tsq2": 18, "tsq3": 26, "tsq4": 34}


def test_matrices_are_rounded_when_a_choice_asks_and_once(tmp_path):
    random, asked = torch.Generator().manual_seed(0), []
    weights = {name: torch.randn(8, 256, generator=random) for name in ("a.weight", "b.weight", "c.weight")}
    fed = torch.randn(64, 256, generator=random).bfloat16().float()

    def weight(name):
        asked.append(name)
        return weights[name]

    palette = Palette(tmp_path, weight)
    palette.feed({"a.weight": fed, "b.weight": fed, "c.weight": 2 * fed})
    assert asked == []
    choice = {"a.weight": "tsq4", "b.weight": "ptq1_61", "c.weight": "f16", "d.weight": "tsq2"}
    found = palette.of(choice, choice)
    assert set(found) == {"a.weight", "b.weight", "b.order"}
    assert asked == ["a.weight", "b.weight"]
    again = palette.of(choice, choice)
    assert asked == ["a.weight", "b.weight"]
    for one in (found, again):
        tensor, _ = painted(weights["a.weight"], fed, grid_of("tsq4"))
        assert torch.equal(one["a.weight"].arrays["q"], tensor.arrays["q"])
        tensor, order = painted(weights["b.weight"], fed, grid_of("ptq1_61"))
        assert torch.equal(one["b.weight"].arrays["q"], tensor.arrays["q"])
        assert one["b.order"].is_order and torch.equal(one["b.order"].arrays["values"].long(), order)
    # what is rounded elsewhere is kept beside it
    palette.keep({"d.weight": found["a.weight"]}, "tsq2")
    assert list(palette.of({"d.weight": "tsq2"}, ["d.weight"])) == ["d.weight"]
    assert palette.of({"d.weight": "tsq3"}, ["d.weight"]) == {}


def test_rounding_for_a_palette_sees_what_a_matrix_is_fed():
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(16, 128, generator=random)
    x = torch.randn(400, 24, generator=random) @ torch.randn(24, 128, generator=random)
    moment, grid = x.T @ x / len(x), grid_of("tsq2")
    off = [grid.dequantize(t) - weight for t in (rounded(weight, moment, grid), grid.quantize(weight))]
    well, nearest = (float(((d @ moment) * d).sum()) for d in off)
    assert well < 0.5 * nearest
    plain = grid_of("q8_0")
    assert torch.equal(
        rounded(weight, moment, plain).arrays["q"], plain.quantize(weight, moment.diagonal()).arrays["q"]
    )


@given(costs=st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.integers(1, 5), st.integers(0, 9)), min_size=1))
def test_types_that_are_left_out_have_a_better_one(costs):
    sizes = {type: float(size) for type, (size, _) in costs.items()}
    prices = {type: float(cost) for type, (_, cost) in costs.items()}
    found = undominated(prices, sizes)
    for type in costs:
        better = [t for t in found if sizes[t] <= sizes[type] and prices[t] <= prices[type]]
        assert better, type
    assert all(prices[a] > prices[b] and sizes[a] < sizes[b] for a, b in pairwise(found))


def _budget(items, size):
    return lambda factors: choose({n: item.scaled(factors.get(n, 1.0)) for n, item in items.items()}, size)


def test_a_choice_is_mended_where_costs_were_wrong():
    """Matrices of one kind matter eight times what was measured: they end with the bits."""
    costs = [{"tsq2": 1.0 + 0.01 * i, "tsq3": 0.3, "tsq4": 0.1} for i in range(6)]
    items = {f"{kind}{i}": Item(SIZES, costs[i]) for kind in "ab" for i in range(6)}
    size = 12 * 18 + 6 * 8

    def measure(choice):
        return sum(items[n].costs[t] * (8 if n[0] == "b" else 1) for n, t in choice.items())

    groups = {kind: [n for n in items if n[0] == kind] for kind in "ab"}
    found = mend(groups, _budget(items, size), measure, tries=12)
    assert found.before == measure(_budget(items, size)({}))
    assert found.after == measure(found.choice) < 0.7 * found.before
    assert all(found.choice[n] != "tsq2" for n in groups["b"])
    assert sum(SIZES[t] for t in found.choice.values()) <= size
    assert found.tried <= 12


@settings(deadline=None)
@given(seed=st.integers(0, 1000), tries=st.integers(1, 8))
def test_it_never_ends_farther_and_keeps_to_its_tries(seed, tries):
    random = torch.Generator().manual_seed(seed)
    costs = torch.rand(6, 3, generator=random).sort(descending=True).values.tolist()
    items = {str(i): Item(SIZES, dict(zip(SIZES, costs[i], strict=True))) for i in range(6)}
    runs = []

    def measure(choice):
        runs.append(choice)
        return float(torch.rand((), generator=torch.Generator().manual_seed(hash(tuple(choice.items())) % 2**31)))

    found = mend({"low": "012", "high": "345"}, _budget(items, 150), measure, tries)
    assert found.tried == len(runs) <= tries
    assert found.before == measure(runs[0])
    assert found.after <= found.before
    assert sum(SIZES[t] for t in found.choice.values()) <= 150
