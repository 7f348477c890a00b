"""Probing: moved rows are found, anything else is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tesseraq_gguf.converter.row_order import Kept, Unplaceable, block_index, moved_groups, placements
from tesseraq_gguf.models.pieces import Piece, Stored, stored_tensors, whole

SHAPE = (12, 5)


def alone(name: str, shape: tuple[int, int]) -> Stored:
    """A matrix that is stored as itself."""
    return Stored(name, shape, {name: whole(name, shape)})


def _placements(make, name="model.layers.3.a.weight"):
    return placements(lambda data, name, block: make(data), [alone(name, SHAPE)])[name]


def test_rows_in_their_order():
    (found,) = _placements(lambda w: [("a", w)])
    assert (found.name, found.rows) == ("a", None)


def test_permuted_and_split_rows():
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    first, second = _placements(lambda w: [("a", w[order][:4]), ("b", w[order][4:])])
    codes = np.arange(60).reshape(SHAPE)
    np.testing.assert_array_equal(first.take(codes), codes[order.numpy()][:4])
    np.testing.assert_array_equal(second.take(codes), codes[order.numpy()][4:])


def test_columns_in_another_order():
    order = torch.tensor([4, 0, 1, 2, 3])
    (found,) = _placements(lambda w: [("a", w[:, order])])
    assert (found.rows, found.columns.tolist()) == (None, order.tolist())


def test_groups_of_columns_that_stay_together():
    heads = np.arange(48).reshape(2, 3, 8).swapaxes(0, 1).reshape(-1)
    assert moved_groups(heads, 8).tolist() == [0, 3, 1, 4, 2, 5]
    halves = moved_groups(heads, 4)
    assert halves is not None and len(halves) == 12
    assert moved_groups(heads, 16) is None
    assert moved_groups(heads[::-1], 8) is None
    assert moved_groups(np.roll(np.arange(32), 4), 8) is None
    assert moved_groups(np.arange(12), 8) is None


def test_llamas_permutation():
    (found,) = _placements(lambda w: [("a", w.reshape(2, 2, 3, 5).swapaxes(1, 2).reshape(w.shape))])
    assert found.rows.tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_the_converter_is_told_name_and_block():
    told = []
    placements(lambda data, name, block: told.append((name, block)) or [("a", data)], [alone("x.7.b.weight", SHAPE)])
    assert set(told) == {("x.7.b.weight", 7)}
    assert block_index("lm_head.weight") is None


def _forget(weights, seen=[]):  # noqa: B006
    seen.append(weights)
    return [("a", weights)] * len(seen)


REFUSED = {
    "merged": (lambda w: [], "merges"),
    "transposed": (lambda w: [("a", w.T)], "changes its shape"),
    "new dimensions": (lambda w: [("a", w[None, None])], "changes its shape"),
    "cut columns": (lambda w: [("a", w[:, :4])], "changes its shape"),
    "shifted": (lambda w: [("a", w + 1)], "columns or values"),
    "scaled": (lambda w: [("a", w * 2)], "columns or values"),
    "repeated columns": (lambda w: [("a", w[:, [0, 0, 1, 2, 3]])], "columns or values"),
    "columns moved in some rows": (lambda w: [("a", torch.cat([w[:6], w[6:].flip(1)]))], "columns or values"),
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
        placements(lambda data, name, block: [("a", data)], [alone("a", ((1 << 24) + 1, 1))])


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


def _stacked(change):
    return placements(_stacking(change), [alone(name, shape) for name, shape in EXPERTS.items()])


def test_stacks_of_experts():
    order = torch.tensor([2, 0, 1])
    rows = torch.randperm(6, generator=torch.Generator().manual_seed(1))

    def change(target, layers):
        return layers[order][:, rows] if target == "up" else layers

    found = _stacked(change)
    assert found.keys() == EXPERTS.keys()
    for e in range(3):
        (up,), (down,) = found[f"layers.2.experts.{e}.up"], found[f"layers.2.experts.{e}.down"]
        assert (up.name, up.layer, up.rows.tolist()) == ("up", [1, 2, 0][e], rows.tolist())
        assert (down.name, down.layer, down.rows, down.at) == ("down", e, None, None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda _, layers: layers + layers, "columns or values"),
        (lambda _, layers: layers[[0, 0, 1]], "drops, repeats or adds"),
        (lambda _, layers: layers[:2], "drops, repeats or adds"),
        (lambda target, layers: layers if target == "up" else layers.flatten(0, 1)[:30].view(3, 10, 6), "drops"),
        (lambda _, layers: torch.where(torch.arange(layers.shape[2]) > 2, layers, layers.flip(0)), "mixes its rows"),
    ],
)
def test_anything_but_stacking_is_refused(change, said):
    with pytest.raises(Unplaceable, match=said):
        _stacked(change)


def test_a_converter_that_waits_for_other_matrices_says_so():
    with pytest.raises(Kept, match="merges"):
        _placements(lambda w: [])


def _fusing():
    """A converter that joins three matrices once the last one has come."""
    kept = {}

    def modify(data, name, block):
        kept[name] = data
        return [("qkv", torch.cat([kept.pop("0.v"), kept.pop("0.q"), kept.pop("0.k")]))] if len(kept) == 3 else []

    return modify


def test_matrices_that_a_converter_fuses():
    shapes = {"0.q": (4, 6), "0.k": (2, 6), "0.v": (2, 6)}
    found = placements(_fusing(), [alone(name, shape) for name, shape in shapes.items()])
    at = {name: place.at.tolist() for name, (place,) in found.items()}
    assert at == {"0.q": [2, 3, 4, 5], "0.k": [6, 7], "0.v": [0, 1]}
    assert all(place.rows is None and place.layer is None for (place,) in found.values())


def test_a_matrix_that_is_stored_the_other_way_round():
    (tensor,) = stored_tensors({"m": Piece("0.c.weight", (5, 12), rows=12, transposed=True)}, ["m"])
    (place,) = placements(lambda data, name, block: [("c", data.T)], [tensor])["m"]
    assert (place.name, place.rows, place.at) == ("c", None, None)
    with pytest.raises(Unplaceable, match="changes its shape"):
        placements(lambda data, name, block: [("c", data)], [tensor])


def interleaved(experts: int, inner: int, hidden: int) -> dict[str, Piece]:
    """Gate and up of experts in one stack, row by row, stored the other way round."""
    return {
        f"{e}.{part}": Piece("0.experts", (experts, hidden, 2 * inner), inner, e, first, 2, True)
        for e in range(experts)
        for first, part in enumerate(("gate", "up"))
    }


def test_stacks_of_interleaved_and_transposed_matrices_are_taken_apart():
    pieces = interleaved(3, 4, 20)
    tensors = list(stored_tensors(pieces, pieces))
    assert [tensor.name for tensor in tensors] == ["0.experts"]

    def modify(data, name, block):
        rows = data.transpose(-1, -2)
        return [("gate", rows[:, ::2]), ("up", rows[:, 1::2].flip(1))]

    found = placements(modify, tensors)
    for e in range(3):
        (gate,), (up,) = found[f"{e}.gate"], found[f"{e}.up"]
        assert (gate.name, gate.layer, gate.rows, gate.at) == ("gate", e, None, None)
        assert (up.name, up.layer, up.rows.tolist()) == ("up", e, [3, 2, 1, 0])


def test_a_stack_that_stays_joined():
    pieces = interleaved(2, 3, 20)
    found = placements(lambda data, *_: [("both", data.transpose(-1, -2))], list(stored_tensors(pieces, pieces)))
    assert {name: (p.layer, p.at.tolist()) for name, (p,) in found.items()} == {
        "0.gate": (0, [0, 2, 4]), "0.up": (0, [1, 3, 5]), "1.gate": (1, [0, 2, 4]), "1.up": (1, [1, 3, 5]),
    }  # fmt: skip


def test_a_converter_that_counts_the_columns_of_stacks():
    pieces = interleaved(2, 3, 20)

    def modify(data, name, block):
        return [("both", data.transpose(-1, -2).reshape(2, 6, 20))]

    assert len(placements(modify, list(stored_tensors(pieces, pieces)))) == 4


def test_pieces_fill_what_they_were_taken_from():
    pieces = interleaved(3, 4, 5)
    (tensor,) = stored_tensors(pieces, pieces)
    values = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    taken = {name: piece.view(values).clone() for name, piece in pieces.items()}
    assert taken["2.up"].shape == (4, 5)
    assert torch.equal(taken["2.up"], values[2].T[1::2])
    assert torch.equal(tensor.filled(taken.__getitem__), values)
    (turned,) = stored_tensors({"m": Piece("c", (5, 8), rows=8, transposed=True)}, ["m"])
    assert torch.equal(turned.filled(lambda _: values[0].T), values[0])
