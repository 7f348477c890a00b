"""Probing: moved rows are found, anything else is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tesseraq_gguf.converter.row_order import Unplaceable, block_index, placements, stacked_placements

SHAPE = (12, 5)


def _placements(make):
    return placements(lambda data, name, block: make(data), "model.layers.3.a.weight", SHAPE)


def test_rows_in_their_order():
    (found,) = _placements(lambda w: [("a", w)])
    assert (found.name, found.rows) == ("a", None)


def test_permuted_and_split_rows():
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    first, second = _placements(lambda w: [("a", w[order][:4]), ("b", w[order][4:])])
    codes = np.arange(60).reshape(SHAPE)
    np.testing.assert_array_equal(first.take(codes), codes[order.numpy()][:4])
    np.testing.assert_array_equal(second.take(codes), codes[order.numpy()][4:])


def test_llamas_permutation():
    (found,) = _placements(lambda w: [("a", w.reshape(2, 2, 3, 5).swapaxes(1, 2).reshape(w.shape))])
    assert found.rows.tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_the_converter_is_told_name_and_block():
    told = []
    placements(lambda data, name, block: told.append((name, block)) or [("a", data)], "x.7.b.weight", SHAPE)
    assert set(told) == {("x.7.b.weight", 7)}
    assert block_index("lm_head.weight") is None


def _forget(weights, seen=[]):  # noqa: B006
    seen.append(weights)
    return [("a", weights)] * len(seen)


REFUSED = {
    "merged": (lambda w: [], "merges"),
    "transposed": (lambda w: [("a", w.T)], "changes its shape"),
    "new dimension": (lambda w: [("a", w[None])], "changes its shape"),
    "cut columns": (lambda w: [("a", w[:, :4])], "changes its shape"),
    "shifted": (lambda w: [("a", w + 1)], "columns or values"),
    "scaled": (lambda w: [("a", w * 2)], "columns or values"),
    "moved columns": (lambda w: [("a", w.flip(1))], "columns or values"),
    "rounded": (lambda w: [("a", w.clamp(max=3))], "columns or values"),
    "mixed": (lambda w: [("a", torch.where(torch.arange(5) > 2, w, w.flip(0)))], "mixes its rows"),
    "dropped": (lambda w: [("a", w[:11])], "drops"),
    "repeated": (lambda w: [("a", w), ("b", w)], "drops, repeats"),
    "raises": (lambda w: 1 / 0, r"refuses it \(division by zero\)"),
    "remembers": (_forget, "remembers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, reason = REFUSED[case]
    with pytest.raises(Unplaceable, match=reason):
        _placements(make)


def test_too_large_to_count_in_float32():
    with pytest.raises(Unplaceable, match="too large"):
        placements(lambda data, name, block: [("a", data)], "a", ((1 << 24) + 1, 1))


EXPERTS = {
    f"layers.2.experts.{e}.{kind}": (6, 12) if kind == "up" else (12, 6) for e in range(3) for kind in ("up", "down")
}


def _stacking(change=lambda target, layers: layers):
    """A converter that collects a block's experts and stacks them once the last one has come."""
    collected = {}

    def modify(data, name, block):
        collected[name] = data
        if len(collected) < len(EXPERTS):
            return []
        stacks = {
            kind: torch.stack([collected[f"layers.{block}.experts.{e}.{kind}"] for e in range(3)])
            for kind in ("up", "down")
        }
        collected.clear()
        return [(target, change(target, layers)) for target, layers in stacks.items()]

    return modify


def test_stacks_of_experts():
    order = torch.tensor([2, 0, 1])
    rows = torch.randperm(6, generator=torch.Generator().manual_seed(1))

    def change(target, layers):
        return layers[order][:, rows] if target == "up" else layers

    found = stacked_placements(_stacking(change), EXPERTS)
    assert found.keys() == EXPERTS.keys()
    for e in range(3):
        up, down = found[f"layers.2.experts.{e}.up"], found[f"layers.2.experts.{e}.down"]
        assert (up.name, up.layer, up.rows.tolist()) == ("up", [1, 2, 0][e], rows.tolist())
        assert (down.name, down.layer, down.rows) == ("down", e, None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda _, layers: layers.flip(2), "mixes experts, rows or columns"),
        (lambda _, layers: layers[[0, 0, 1]], "drops, repeats or adds"),
        (lambda _, layers: layers[:2], "does not stack all"),
        (lambda _, layers: torch.where(torch.arange(layers.shape[1])[:, None] > 2, layers, layers.flip(0)), "mixes"),
        (lambda _, layers: layers.flatten(0, 1), "merges it"),
    ],
)
def test_anything_but_stacking_is_refused(change, said):
    with pytest.raises(Unplaceable, match=said):
        stacked_placements(_stacking(change), EXPERTS)
