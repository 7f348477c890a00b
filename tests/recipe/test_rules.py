"""Rules and sizes as users write them."""

from __future__ import annotations

import pytest

from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.recipe.rules import read_rules, ruled, rules_of, size_of


def test_the_last_rule_that_matches_wins():
    rules = read_rules(["# a comment", "", "mlp=tsq3", r"layers\.0\.mlp = TSQ4"])
    assert rules == (("mlp", "tsq3"), (r"layers\.0\.mlp", "tsq4"))
    assert ruled(rules, "model.layers.0.mlp.up_proj.weight") == "tsq4"
    assert ruled(rules, "model.layers.10.mlp.up_proj.weight") == "tsq3"
    assert ruled(rules, "model.layers.0.self_attn.q_proj.weight") is None


def test_a_choice_that_was_written_is_read_back():
    types = {f"model.layers.{i}.mlp.up_proj.weight": ("tsq2", "tsq3")[i % 2] for i in range(21)}
    rules = read_rules(rules_of(types, "two lines\nof comment").splitlines())
    assert dict(rules) == types
    assert all(ruled(rules, name) == type for name, type in types.items())


@pytest.mark.parametrize(
    ("line", "said"),
    [("mlp", "REGEX=TYPE"), ("=tsq2", "REGEX=TYPE"), ("(=tsq2", "no regular"), ("a=q9", "unknown tensor")],
)
def test_what_is_no_rule_is_named(line, said):
    with pytest.raises(UsageError, match=said):
        read_rules([line])


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("200M", 200_000_000), ("1.5 GB", 1_500_000_000), ("2MiB", 2 << 20), ("700k", 700_000)],
)
def test_sizes(text, size):
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "M", "-3M", "2X", "0", "1.G", "3I"])
def test_what_is_no_size_is_named(text):
    with pytest.raises(UsageError, match="is no size"):
        size_of(text)
